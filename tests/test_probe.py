import itertools

import numpy as np
import pytest
import torch
from conftest import refused
from test_robustness import plain_distance

from repcodec import probe as probe_file
from repcodec.demo_corpus import build_corpus
from repcodec.kmeans import KMeansTokenizer
from repcodec.labels import PhoneLabels
from repcodec.manifest import Manifest
from repcodec.probe import Probe, ProbeData, check_held_out, phone_error_rate, probe_data, recognize
from repcodec.quantizers import fit_centroids
from repcodec.speech_encoders import encoder_table, load_speech_encoder

PHONES = 6


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def spoken(number, seed, speak=lambda phone, rng: [2 * phone + rng.integers(2)], wrong=0.0):
    """Sequences of phones that last 2 to 4 frames each, and the codes that `speak` makes of each frame."""
    rng = np.random.default_rng(seed)
    data = ProbeData()
    for _ in range(number):
        target = rng.integers(0, PHONES, rng.integers(4, 9))
        frames = np.repeat(target, rng.integers(2, 5, len(target)))
        frames = np.where(rng.random(len(frames)) < wrong, rng.integers(0, PHONES, len(frames)), frames)
        codes = np.array([speak(phone, rng) for phone in frames]).T
        data.inputs.append(torch.from_numpy(codes))
        # Nothing tells two of the same in a row from one.
        data.targets.append(torch.from_numpy(target[np.r_[True, target[1:] != target[:-1]]]))
    return data


def error_rate(train, test, codebook_size=2 * PHONES, seed=0, steps=40):
    return phone_error_rate(train, test, num_phones=PHONES, codebook_size=codebook_size, seed=seed, steps=steps)


def as_features(data):
    """Each code a direction, and noise."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.eye(2 * PHONES)
    inputs = [
        rows[codes[0]] + 0.1 * torch.randn(codes.shape[1], 2 * PHONES, generator=generator) for codes in data.inputs
    ]
    return ProbeData(inputs, data.targets)


def test_the_more_tokens_tell_of_phones_the_fewer_errors():
    clean = error_rate(spoken(24, 0), spoken(20, 1))
    blurred = error_rate(spoken(24, 0, wrong=0.4), spoken(20, 1, wrong=0.4))
    nothing = error_rate(spoken(24, 0, wrong=1.0), spoken(20, 1, wrong=1.0))
    assert clean < 0.1 < blurred - 0.05 < nothing - 0.15
    assert 0.6 < nothing <= 1.05


def test_every_codebook_is_read():
    halves = lambda phone, rng: [phone // 3, phone % 3]  # noqa: E731  # neither of the two tells the phone
    train, test = spoken(24, 0, halves), spoken(20, 1, halves)
    both = error_rate(train, test, codebook_size=3)
    first = [ProbeData([codes[:1] for codes in data.inputs], data.targets) for data in (train, test)]
    assert both < 0.1 and error_rate(*first, codebook_size=3) > both + 0.2


def test_features_are_read_and_their_scale_does_not_matter():
    train, test = as_features(spoken(24, 0)), as_features(spoken(20, 1))
    plain = error_rate(train, test, None, steps=60)
    assert plain < 0.1
    scale, shift = torch.logspace(-3, 3, 2 * PHONES), torch.linspace(-50, 50, 2 * PHONES)
    moved = [ProbeData([frames * scale + shift for frames in data.inputs], data.targets) for data in (train, test)]
    assert error_rate(*moved, None, steps=60) == pytest.approx(plain, abs=0.05)


@pytest.mark.parametrize("codebook_size", [2 * PHONES, None])
def test_padding_changes_nothing(codebook_size):
    data = spoken(12, 0)
    data = data if codebook_size else as_features(data)
    torch.manual_seed(0)
    probe = Probe(data.inputs, PHONES, codebook_size).double().eval()
    with torch.no_grad():
        together, lengths = probe(data.inputs)
        for i, frames in enumerate(data.inputs):
            alone = probe([frames])[0][0]
            assert lengths[i] == len(alone)
            torch.testing.assert_close(together[i, : lengths[i]], alone, rtol=0, atol=1e-10)
        alone = [probe.loss([frames], [target]) for frames, target in zip(data.inputs, data.targets, strict=True)]
        torch.testing.assert_close(probe.loss(data.inputs, data.targets), torch.stack(alone).mean(), rtol=0, atol=1e-10)


def test_phones_are_read_off_as_ctc_says():
    data = spoken(20, 0)
    torch.manual_seed(1)
    probe = Probe(data.inputs, PHONES, 2 * PHONES).eval()
    for said, codes in zip(recognize(probe, data.inputs), data.inputs, strict=True):
        best = probe([codes])[0][0].argmax(1).tolist()
        assert said == [phone for phone, _ in itertools.groupby(best) if phone != PHONES]


def test_the_rate_is_edits_a_phone(monkeypatch):
    rng = np.random.default_rng(0)
    data = spoken(20, 0)
    said = [rng.integers(0, PHONES, rng.integers(0, 12)).tolist() for _ in data.inputs]
    monkeypatch.setattr(probe_file, "recognize", lambda probe, inputs: said)
    edits = sum(plain_distance(one, target.tolist()) for one, target in zip(said, data.targets, strict=True))
    assert error_rate(data, data, steps=1) == edits / sum(map(len, data.targets))
    said[:] = [[] for _ in said]
    assert error_rate(data, data, steps=1) == 1.0


def test_the_seed_decides_alone_and_global_state_is_left():
    train, test = spoken(12, 0), spoken(12, 1)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = error_rate(train, test, steps=8)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    assert error_rate(train, test, steps=8) == first
    assert len({error_rate(train, test, seed=seed, steps=8) for seed in range(4)}) > 1


@pytest.mark.parametrize("codebook_size", [2 * PHONES, None])
def test_inference_mode_around_it_changes_nothing(codebook_size):
    train, test = (data if codebook_size else as_features(data) for data in (spoken(12, 0), spoken(12, 1)))
    expected = error_rate(train, test, codebook_size, steps=8)
    with torch.inference_mode():
        made = [
            ProbeData([x.clone() for x in data.inputs], [x.clone() for x in data.targets]) for data in (train, test)
        ]
        assert made[0].inputs[0].is_inference()
        assert error_rate(*made, codebook_size, steps=8) == expected
    assert error_rate(*made, codebook_size, steps=8) == expected


def test_batches_hold_everything_once_a_round_and_no_more_than_they_may():
    lengths = [*np.random.default_rng(0).integers(1, 900, 60).tolist(), 5000]
    batches = probe_file._batches(lengths, torch.Generator().manual_seed(0))
    for _ in range(3):
        seen = []
        while len(seen) < len(lengths):
            batch = next(batches)
            seen += batch
            assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= probe_file.BATCH_FRAMES
        assert sorted(seen) == list(range(len(lengths)))
    again = probe_file._batches(lengths, torch.Generator().manual_seed(0))
    other = probe_file._batches(lengths, torch.Generator().manual_seed(1))
    first = [next(again) for _ in range(9)]
    assert first != [next(other) for _ in range(9)]


def test_silence_is_no_phone_and_what_ctc_cannot_do_is_left_out_and_counted():
    labels = PhoneLabels(
        {
            "a": [(0.0, 0.1, "SIL"), (0.1, 0.2, "t"), (0.2, 0.3, "t"), (0.3, 0.4, "i"), (0.4, 0.5, "")],
            "b": [(0.0, 0.1, "i"), (0.1, 0.2, "sp"), (0.2, 0.3, "t")],
            "silent": [(0.0, 0.5, "SIL")],
        }
    )
    i, t = labels.phones.index("i"), labels.phones.index("t")
    utterances = ["a", "b", "silent", "unknown"]

    def data(frames, rate=50):
        codes = [torch.arange(frames)[None] for _ in utterances]
        return probe_data(labels, utterances, codes, rate, "test")

    found = data(4)
    assert [target.tolist() for target in found.targets] == [[t, t, i], [i, t]]  # t, a blank, t, i: 4 frames
    assert (found.unlabelled, found.too_short) == (2, 0)
    found = data(3)
    assert [target.tolist() for target in found.targets] == [[i, t]]
    assert (found.unlabelled, found.too_short) == (2, 1)
    # At 25 and 12.5 codes a second each stands for 2 and 4 frames.
    assert data(2, 25).inputs[0].tolist() == [[0, 0, 1, 1]]
    assert data(1, 12.5).inputs[0].tolist() == [[0, 0, 0, 0]]
    with refused("test", "4 utterances", "2 have no phone", "2 fewer frames", "'a'"):
        data(1)
    features = probe_data(labels, ["a"], [np.zeros((9, 3), np.float32)], 50, "test")
    assert features.inputs[0].shape == (9, 3)


def test_speakers_must_be_held_out():
    check_held_out(["a", "b"], ["c", "c"])
    with refused("2 are in both splits", "'b'"):
        check_held_out(["a", "b", "c"], ["d", "c", "b"])


def test_what_fits_not_is_refused():
    data = spoken(4, 0)
    with refused("test set is empty"):
        error_rate(data, ProbeData())
    with refused("training set, utterance 0", "codebook has 0 to 4"):
        error_rate(data, data, codebook_size=5)
    negative = ProbeData([data.inputs[0] - 100], data.targets[:1])
    with refused("test set, utterance 0", "codes from -"):
        error_rate(data, negative)
    with refused("expected features"):
        error_rate(data, data, codebook_size=None)
    with refused("expected codes"):
        error_rate(as_features(data), as_features(data))
    two = ProbeData([codes.repeat(2, 1) for codes in data.inputs], data.targets)
    with refused("several numbers of codebooks: 1, 2"):
        error_rate(data, two)
    wide = ProbeData([torch.zeros(40, 3)], data.targets[:1])
    with refused("several feature widths: 3, 12"):
        error_rate(as_features(data), wide, None)
    broken = ProbeData([torch.full((40, 3), torch.nan)], data.targets[:1])
    with refused("not finite"):
        error_rate(broken, broken, None)
    with refused("phones from 0 to 5", "found [6]"):
        error_rate(data, ProbeData(data.inputs[:1], [torch.tensor([6])]))
    with refused("1 frames are too few for 2 phones"):
        error_rate(data, ProbeData([data.inputs[0][:, :1]], [torch.tensor([1, 2])]))


def features_of(corpus, split, encoder):
    """The ids and features of a split of a demo corpus."""
    manifest = Manifest.read(corpus / f"{split}.tsv")
    return manifest.ids, [encoder([torch.from_numpy(manifest.waveform(i))])[0] for i in range(len(manifest))]


def test_real_speech_is_learned(speech, whisper_folder):
    labels = PhoneLabels.read(speech / "phones.tsv")
    encoder = load_speech_encoder(encoder_table()["whisper_tiny_en"], 3, whisper_folder)
    ids, features = features_of(speech, "valid", encoder)
    data = probe_data(labels, ids, features, 50, "valid")
    assert len(data.inputs) == 2 and "SIL" in labels.phones
    # The same utterances again: so few are no ground for other voices.
    assert phone_error_rate(data, data, num_phones=len(labels.phones), codebook_size=None, seed=0, steps=60) < 0.2


@pytest.mark.slow
def test_tokenizers_of_real_speech_are_ranked_on_other_voices_whatever_the_seed(tmp_path, whisper_folder):
    build_corpus(tmp_path / "corpus", sentences={"train": 60, "valid": 1, "test": 15})
    labels = PhoneLabels.read(tmp_path / "corpus" / "phones.tsv")
    encoder = load_speech_encoder(encoder_table()["whisper_tiny_en"], 3, whisper_folder)
    splits = {split: features_of(tmp_path / "corpus", split, encoder) for split in ("train", "test")}
    check_held_out(*([name.split("/")[0] for name in ids] for ids, _ in splits.values()))
    frames = torch.cat(splits["train"][1]).numpy()
    rates = []
    for size in (None, 128, 8):
        sets = []
        for split, (ids, inputs) in splits.items():
            if size is not None:
                kmeans = KMeansTokenizer(torch.from_numpy(fit_centroids(frames, size)))
                inputs = [kmeans.encode(features[None])[0] for features in inputs]
            sets.append(probe_data(labels, ids, inputs, 50, split))
        rates.append(
            [phone_error_rate(*sets, num_phones=len(labels.phones), codebook_size=size, seed=seed) for seed in range(3)]
        )
    print(rates)
    for better, worse in itertools.pairwise(rates):
        assert max(better) < min(worse)
    assert max(rates[0]) < 0.3 and max(rates[2]) <= 1
