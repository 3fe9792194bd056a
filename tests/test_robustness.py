import itertools
import sys

import numpy as np
import pytest
import soundfile
import torch
from conftest import refused

from repcodec import robustness
from repcodec.codec import RepCodec
from repcodec.kmeans import KMeansTokenizer
from repcodec.robustness import AUGMENTATIONS, UnitEdits, augment, count_edits, unit_edits
from repcodec.speech_encoders import encoder_table, load_speech_encoder


@pytest.fixture(scope="module")
def encoder(whisper_folder):
    return load_speech_encoder(encoder_table()["whisper_tiny_en"], 3, whisper_folder)


@pytest.fixture(scope="module")
def sounds(speech):
    paths = sorted((speech / "audio").rglob("*.flac"))[:2]
    return [(path.stem, soundfile.read(path, dtype="float32")[0]) for path in paths]


@pytest.fixture(scope="module")
def tokenizers(encoder, sounds):
    """A k-means model and a codec of two codebooks whose codes are frames of the speech itself."""
    torch.manual_seed(0)
    frames = torch.cat(encoder([torch.from_numpy(sound) for _, sound in sounds]))
    codec = RepCodec(384, codebook_size=32, codebook_num=2).eval()
    codec.start_as_identity()
    codec.quantizer.start(frames, seed=0)
    return {"k-means": KMeansTokenizer(frames[::8]), "codec": codec}


@pytest.fixture(scope="module")
def whole(encoder, tokenizers, sounds):
    return unit_edits(encoder, tokenizers, sounds)


def plain_distance(first, second):
    """Levenshtein's distance as it is defined."""
    table = {(i, 0): i for i in range(len(first) + 1)} | {(0, j): j for j in range(len(second) + 1)}
    for i, j in itertools.product(range(1, len(first) + 1), range(1, len(second) + 1)):
        kept = table[i - 1, j - 1] + (first[i - 1] != second[j - 1])
        table[i, j] = min(kept, table[i - 1, j] + 1, table[i, j - 1] + 1)
    return table[len(first), len(second)]


@pytest.mark.parametrize("num_codebooks", [1, 3])
def test_edits_are_those_of_the_definition(num_codebooks):
    rng = np.random.default_rng(0)
    for _ in range(50):
        clean, other = (rng.integers(0, 2, (num_codebooks, rng.integers(1, 25))) for _ in range(2))
        units = [[unit for unit, _ in itertools.groupby(map(tuple, codes.T.tolist()))] for codes in (clean, other)]
        assert count_edits(clean, other) == (plain_distance(*units), len(units[0]))
        assert count_edits(clean, clean)[0] == 0


def level(samples):
    return 10 * np.log10(np.mean(samples.astype(np.float64) ** 2))


def test_noise_and_gain_are_as_strong_as_they_say(sounds):
    sound = sounds[0][1]
    ratios, gains = set(), set()
    for seed in range(20):
        noise = augment("noise", sound, seed) - sound
        ratios.add(level(sound) - level(noise))
        assert abs(np.corrcoef(noise[1:], noise[:-1])[0, 1]) < 0.02  # white
        louder = augment("gain", sound, seed)
        gains.add(level(louder) - level(sound))
        factor = louder[sound != 0] / sound[sound != 0]
        assert np.ptp(factor) < 1e-5 * factor.mean()
    assert 5 < min(ratios) < 8 and 12 < max(ratios) < 15
    assert -10 < min(gains) < -5 and 5 < max(gains) < 10


def test_speed_changes_length_and_pitch_alike():
    tone = np.sin(2 * np.pi * 1000 * np.arange(16000) / 16000).astype(np.float32)
    found = set()
    for seed in range(12):
        faster = augment("speed", tone, seed)
        factor = len(tone) / len(faster)
        pitch = np.abs(np.fft.rfft(faster * np.hanning(len(faster)))).argmax() * 16000 / len(faster)
        assert pitch == pytest.approx(1000 * factor, rel=0.002)
        found.add(round(factor, 3))
    assert found == {0.9, 1.1}


def test_a_room_keeps_length_energy_and_time_and_dies_away_as_it_says():
    click = np.zeros(32000, dtype=np.float32)
    click[8000] = 1.0
    times = []
    for seed in range(8):
        heard = augment("reverberation", click, seed)
        assert len(heard) == len(click)
        assert np.sum(heard**2) == pytest.approx(1, rel=1e-3)
        assert np.abs(heard).argmax() == 8000  # the loudest stays where it was
        left = 10 * np.log10(np.cumsum(heard[8000:][::-1].astype(np.float64) ** 2)[::-1] + 1e-12)
        fell = [np.argmax(left < left[0] - decibels) for decibels in (5, 25)]
        times.append((fell[1] - fell[0]) * 3 / 16000)  # 20 dB three times over
    assert min(times) > 0.1 and max(times) < 0.9 and max(times) > 1.5 * min(times)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_what_is_drawn_depends_on_the_seed_alone(sounds, name):
    sound = sounds[0][1]
    np.random.seed(1)
    torch.manual_seed(1)
    first, kept = augment(name, sound, 7), sound.copy()
    state = torch.get_rng_state()
    np.random.seed(2)
    torch.manual_seed(2)
    assert np.array_equal(augment(name, sound, 7), first)
    assert first.dtype == np.float32 and np.array_equal(sound, kept)
    assert any(not np.array_equal(augment(name, sound, seed), first) for seed in range(8, 12))
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)


def test_silence_stays_silent():
    for name in AUGMENTATIONS:
        assert not augment(name, np.zeros(16000, dtype=np.float32), 0).any()


def test_nothing_changed_is_no_distance_and_noise_is_more_than_gain(monkeypatch, encoder, tokenizers, sounds, whole):
    for counts in whole.values():
        distances = counts.distances()
        assert list(distances) == list(AUGMENTATIONS)
        assert 0 <= distances["gain"] < distances["speed"] and distances["gain"] < distances["noise"] < 1.1
        assert 0.1 < distances["reverberation"] < 1.1
        assert counts.utterances == 2 and counts.left_out == 0
    monkeypatch.setattr(robustness, "augment", lambda name, sound, seed: sound.copy())
    for counts in unit_edits(encoder, tokenizers, sounds).values():
        assert set(counts.distances().values()) == {0.0}


def test_the_encoder_runs_once_a_version_and_tokenizers_do_not_see_one_another(encoder, tokenizers, sounds):
    seen = []
    hook = encoder.register_forward_pre_hook(lambda module, inputs: seen.extend(map(len, inputs[0])))
    together = unit_edits(encoder, tokenizers, sounds[:1])
    hook.remove()
    assert len(seen) == 1 + len(AUGMENTATIONS)
    assert seen[0] == len(sounds[0][1])
    for name, tokenizer in tokenizers.items():
        assert unit_edits(encoder, {name: tokenizer}, sounds[:1])[name] == together[name]
    # The same by hand: each version by itself, and the definition.
    utterance, sound = sounds[0]
    noisy = augment("noise", sound, robustness._seed(0, "noise", utterance))
    codes = [
        tokenizers["k-means"].encode(encoder([torch.from_numpy(version)])[0][None])[0, 0].tolist()
        for version in (sound, noisy)
    ]
    expected = plain_distance(*([unit for unit, _ in itertools.groupby(version)] for version in codes))
    assert together["k-means"].edits["noise"] == expected


def test_order_processes_and_global_state_change_nothing(encoder, tokenizers, sounds, whole):
    np.random.seed(3)
    torch.manual_seed(3)
    parts = [unit_edits(encoder, tokenizers, iter([sound])) for sound in sounds[::-1]]
    for name in tokenizers:
        assert parts[0][name] + parts[1][name] == whole[name]
    other = unit_edits(encoder, tokenizers, sounds[1:], seed=1)
    assert other["codec"].edits != parts[0]["codec"].edits


def test_too_short_sounds_are_left_out_and_counted(encoder, tokenizers, sounds):
    short = [("empty", np.zeros(0, np.float32)), ("short", np.full(200, 0.1, np.float32))]
    for counts in unit_edits(encoder, tokenizers, short).values():
        assert counts == UnitEdits(left_out=2)
    with refused("no sound is long enough", "2 were left out"):
        unit_edits(encoder, tokenizers, short)["codec"].distances()
    # 330 samples are a frame, but not when they are played faster.
    fast = [(str(i), np.full(330, 0.1, np.float32)) for i in range(6)]
    counts = unit_edits(encoder, tokenizers, fast)["k-means"]
    assert counts.utterances + counts.left_out == 6 and 0 < counts.left_out < 6


def test_what_is_no_sound_or_fits_not_is_refused(encoder, tokenizers, sounds):
    with refused("echo", "noise, gain, speed, reverberation"):
        augment("echo", sounds[0][1], 0)
    for bad in (np.zeros((2, 100), np.float32), np.full(1000, np.nan, np.float32)):
        with refused("expected (samples,)", str(bad.shape)):
            augment("gain", bad, 0)
    with refused("narrow", "width 8", "width 384"):
        unit_edits(encoder, {"narrow": KMeansTokenizer(torch.zeros(4, 8))}, sounds)
    other = KMeansTokenizer(torch.zeros(4, 384))
    other.about = {"encoder": "whisper_tiny_en", "layer": 2}
    with refused("other", "layer 2", "layer 3"):
        unit_edits(encoder, {"other": other}, sounds)
    other.about = {"encoder": "whisper_tiny_en", "layer": 3, "encoder_sha256": "0" * 64}
    with refused("other", "another one"):
        unit_edits(encoder, {"other": other}, sounds)


@pytest.mark.parametrize(("name", "module"), [("noise", "lhotse.audio.mixer"), ("reverberation", "pyroomacoustics")])
def test_a_missing_library_is_named(monkeypatch, sounds, name, module):
    monkeypatch.setitem(sys.modules, module, None)
    with refused(module.split(".")[0], "pip install 'repcodec[evaluation]'"):
        augment(name, sounds[0][1], 0)
