"""From sound files to shards: the same features whatever the batches, and the same bytes whatever interrupts."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import refused

from repcodec.extraction import extract, feature_folder
from repcodec.manifest import Manifest, make_manifest
from repcodec.shards import FeatureShards
from repcodec.speech_encoders import EncoderSpec, SpeechEncoder, batches_of, encoder_table, load_speech_encoder

ROOT = Path(__file__).parent.parent
SPEC = EncoderSpec("tiny", "nowhere", 4, 2, 1, None, 50)


class Windows(SpeechEncoder):
    """The mean, the ends and the power of every 320 samples, times `scale`: features one can check.

    Fails at call number `fails_at`.
    """

    def __init__(self, scale=1.0, fails_at=None):
        super().__init__(4, 1)
        self.weight = torch.nn.Parameter(torch.tensor(scale))
        self.blocks = torch.nn.ModuleList()
        self.weights_sha256 = f"of scale {scale}"
        self.calls, self.fails_at = 0, fails_at

    @classmethod
    def num_frames(cls, num_samples):
        return num_samples // 320

    def segments(self, waveform):
        frames = waveform[: len(waveform) // 320 * 320].view(-1, 320)
        parts = [frames.mean(1), frames[:, 0], frames[:, -1], frames.square().mean(1)]
        return [torch.stack(parts, 1) * self.weight]

    def forward(self, waveforms):
        self.calls += 1
        if self.calls == self.fails_at:
            raise RuntimeError("the device fell off the bus")
        return super().forward(waveforms)


def write_noise(path, num_samples, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.random.default_rng(seed).normal(0, 0.1, num_samples), 16_000)


@pytest.fixture
def sounds(tmp_path):
    for i, name in enumerate(["b/two.wav", "a/one.flac", "a/three with space.wav"]):
        write_noise(tmp_path / "audio" / name, 3200 + 700 * i, seed=i)
    return tmp_path / "audio"


@pytest.fixture
def ten_sounds(tmp_path):
    """Ten sounds from 0.3 to 1.2 seconds; batches of one second hold the first two, then one each."""
    for i in range(10):
        write_noise(tmp_path / "ten" / f"{i}.wav", 3200 + 1600 * (i + 1), seed=i)
    return make_manifest(tmp_path / "ten")


def content(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def assert_unfinished(folder):
    """Nothing there can be taken for a shard: every file is a hidden one."""
    with refused(folder, "no {rank}_{n}.npy shard"):
        FeatureShards(folder)
    assert not list(folder.glob("[!.]*"))


def test_manifest_lists_sorted_paths_and_samples(sounds):
    manifest = make_manifest(sounds)
    assert list(manifest.paths) == ["a/one.flac", "a/three with space.wav", "b/two.wav"]
    assert list(manifest.num_samples) == [3900, 4600, 3200]
    assert manifest.root == sounds.resolve()


def test_shards_hold_what_the_encoder_gives(sounds, tmp_path):
    manifest, encoder = make_manifest(sounds), Windows()
    for rank in range(2):
        extract(manifest, tmp_path / "out", SPEC, encoder, rank, 2)
    shards = FeatureShards(tmp_path / "out", 4)
    assert shards.names == list(manifest.paths)
    assert shards.lengths.tolist() == [12, 14, 10]
    for i, name in enumerate(manifest.paths):
        samples, _ = soundfile.read(sounds / name, dtype="float32")
        (expected,) = encoder([torch.from_numpy(samples)])
        assert np.array_equal(shards.features(i), expected.numpy())
    about = json.loads((tmp_path / "out" / "0_2.json").read_text())
    assert (about["encoder"], about["layer"], about["dim"], about["frame_rate"]) == ("tiny", 1, 4, 50)
    assert (about["dtype"], about["batch_seconds"]) == ("float32", 100)
    assert about["manifest_sha256"] == manifest.sha256()
    assert about["weights_sha256"] == encoder.weights_sha256


def test_features_lie_where_training_looks_for_them():
    assert str(feature_folder("root", "hubert_base", 9, "train")) == "root/hubert_base/l9/train"


# A finished shard


def test_finished_shard_is_left_alone(sounds, tmp_path):
    encoder = Windows()
    extract(make_manifest(sounds), tmp_path / "out", SPEC, encoder)
    extract(make_manifest(sounds), tmp_path / "out", SPEC, encoder)
    assert encoder.calls == 1


def test_a_finished_shard_is_left_alone_when_sounds_or_model_moved_or_batches_are_of_another_size(sounds, tmp_path):
    extract(make_manifest(sounds), tmp_path / "out", SPEC, Windows(), model="/models/here")
    before = content(tmp_path / "out")
    sounds.rename(tmp_path / "moved")
    encoder = Windows()

    extract(
        make_manifest(tmp_path / "moved"), tmp_path / "out", SPEC, encoder, model="/models/there", batch_seconds=0.3
    )

    assert encoder.calls == 0
    assert content(tmp_path / "out") == before


def test_finished_shard_of_other_sounds_is_refused(sounds, tmp_path):
    manifest = make_manifest(sounds)
    extract(manifest, tmp_path / "out", SPEC, Windows())
    fewer = Manifest(manifest.root, manifest.paths[:2], manifest.num_samples[:2])
    with refused(tmp_path / "out" / "0_1.json", "manifest_sha256 differs"):
        extract(fewer, tmp_path / "out", SPEC, Windows())


@pytest.mark.parametrize(
    ("encoder", "more", "differs"),
    [(Windows(), {"dtype": "float16"}, "(dtype differs)"), (Windows(2.0), {}, "(weights_sha256 differs)")],
)
def test_a_finished_shard_of_another_type_or_other_weights_is_refused(sounds, tmp_path, encoder, more, differs):
    manifest = make_manifest(sounds)
    extract(manifest, tmp_path / "out", SPEC, Windows())
    before = content(tmp_path / "out")

    with refused(tmp_path / "out" / "0_1.json", differs):
        extract(manifest, tmp_path / "out", SPEC, encoder, **more)

    assert encoder.calls == 0
    assert content(tmp_path / "out") == before


def test_shards_of_another_count_in_the_folder_are_refused(sounds, tmp_path):
    manifest = make_manifest(sounds)
    extract(manifest, tmp_path / "out", SPEC, Windows(), 1, 2)
    before = content(tmp_path / "out")

    with refused(tmp_path / "out", "shards of 2", "one of 3", "--shard I/2"):
        extract(manifest, tmp_path / "out", SPEC, Windows(), 0, 3)

    assert content(tmp_path / "out") == before


# Batches


def test_batches_are_the_utterances_in_order_each_as_full_as_it_may_be():
    rng = np.random.default_rng(0)
    for _ in range(300):
        samples = rng.integers(0, 50_000, rng.integers(0, 40)).tolist()
        seconds = float(rng.uniform(0.05, 5))
        batches = batches_of(samples, seconds)

        assert [i for batch in batches for i in batch] == list(range(len(samples)))
        sizes = [sum(samples[i] for i in batch) for batch in batches]
        assert all(size <= seconds * 16_000 or len(batch) == 1 for size, batch in zip(sizes, batches, strict=True))
        # The first of the next batch did not fit: what is in a batch depends on nothing else.
        nexts = [samples[batch[0]] for batch in batches[1:]]
        assert all(size + after > seconds * 16_000 for size, after in zip(sizes, nexts, strict=False))


def test_shards_are_the_same_for_batches_of_any_size(speech, whisper_folder, tmp_path):
    spec = encoder_table()["whisper_tiny_en"]
    encoder = load_speech_encoder(spec, 2, whisper_folder)
    manifest = Manifest.read(speech / "train.tsv")
    for seconds in (0.1, 1, 100):
        extract(manifest, tmp_path / str(seconds), spec, encoder, batch_seconds=seconds)
    assert len(batches_of(manifest.num_samples, 100)) == 1 < len(batches_of(manifest.num_samples, 0.1))

    one = FeatureShards(tmp_path / "0.1", 384)
    for other in (FeatureShards(tmp_path / "1", 384), FeatureShards(tmp_path / "100", 384)):
        assert other.names == one.names == list(manifest.paths)
        assert np.array_equal(other.lengths, one.lengths)
        rows, others = one.sample(10**9), other.sample(10**9)
        assert np.linalg.norm(others - rows) / np.linalg.norm(rows) < 1e-6


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 48_000])
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("subtype", ["PCM_16", "FLOAT"])
def test_sound_of_any_rate_and_layout_has_the_frames_of_its_16_khz_version(tmp_path, rate, channels, subtype):
    for name, hertz, width, kind in [("here", rate, channels, subtype), ("reference", 16_000, 1, "FLOAT")]:
        (tmp_path / name).mkdir()
        for i, seconds in enumerate([0.48, 0.96, 1.0]):  # the first two end with a frame: one sample less is one fewer
            sine = 0.5 * np.sin(2 * np.pi * 440 * np.arange(round(seconds * hertz)) / hertz)
            soundfile.write(tmp_path / name / f"{i}.wav", np.stack([sine] * width, 1), hertz, subtype=kind)
        extract(make_manifest(tmp_path / name), tmp_path / f"{name}-out", SPEC, Windows())

    found, reference = FeatureShards(tmp_path / "here-out"), FeatureShards(tmp_path / "reference-out")
    assert found.lengths.tolist() == reference.lengths.tolist() == [24, 48, 50]
    middle = slice(3, -3)  # the filter rings at both ends
    np.testing.assert_allclose(found.features(2)[middle], reference.features(2)[middle], atol=2e-3)


# Half the disk


def test_float16_takes_half_the_disk_and_is_float32_rounded(ten_sounds, tmp_path):
    for dtype in ("float32", "float16"):
        extract(ten_sounds, tmp_path / dtype, SPEC, Windows(), dtype=dtype)
    whole, half = (np.load(tmp_path / dtype / "0_1.npy") for dtype in ("float32", "float16"))

    assert half.dtype == np.float16 and half.nbytes * 2 == whole.nbytes
    assert np.array_equal(half, whole.astype(np.float16))
    header = (tmp_path / "float32" / "0_1.npy").stat().st_size - whole.nbytes
    assert (tmp_path / "float16" / "0_1.npy").stat().st_size == header + half.nbytes
    assert (tmp_path / "float16" / "0_1.len").read_bytes() == (tmp_path / "float32" / "0_1.len").read_bytes()


def test_a_feature_that_float16_cannot_hold_is_refused_by_name(sounds, tmp_path):
    with refused("a/one.flac", "more than float16 holds", "--dtype float32"):
        extract(make_manifest(sounds), tmp_path / "out", SPEC, Windows(1e6), dtype="float16")

    assert list((tmp_path / "out").iterdir()) == []
    extract(make_manifest(sounds), tmp_path / "out", SPEC, Windows(1e6))
    assert np.abs(np.load(tmp_path / "out" / "0_1.npy")).max() > 65504


# Bad sounds


def test_failure_leaves_nothing_that_looks_finished(sounds, tmp_path):
    (sounds / "b" / "two.wav").write_bytes(b"RIFF garbage")
    manifest = Manifest(sounds, ["a/one.flac", "b/two.wav"], [3900, 3200])
    with refused(sounds / "b" / "two.wav", "not a readable sound file"):
        extract(manifest, tmp_path / "out", SPEC, Windows())
    assert list((tmp_path / "out").iterdir()) == []


def test_too_short_sound_is_one_sentence(sounds, tmp_path):
    write_noise(sounds / "short.wav", 100)
    with refused(sounds / "short.wav", "100 samples are too short"):
        extract(make_manifest(sounds), tmp_path / "out", SPEC, Windows())


@pytest.mark.parametrize("wrong_by", [-161, -160, 160, 161])
def test_a_manifest_may_be_wrong_by_160_samples_and_no_more(sounds, tmp_path, wrong_by):
    manifest = make_manifest(sounds)
    samples = [manifest.num_samples[0] + wrong_by, *manifest.num_samples[1:]]
    manifest = Manifest(manifest.root, manifest.paths, samples)

    if abs(wrong_by) > 160:
        with refused(sounds / "a" / "one.flac", "3900 samples at 16 kHz", samples[0], "make the list again"):
            extract(manifest, tmp_path / "out", SPEC, Windows())
    else:
        extract(manifest, tmp_path / "out", SPEC, Windows())
        assert FeatureShards(tmp_path / "out").lengths.tolist() == [12, 14, 10]


def test_skipped_sounds_leave_the_others_features_as_they_are(ten_sounds, tmp_path):
    extract(ten_sounds, tmp_path / "whole", SPEC, Windows())
    for bad in ("0.wav", "4.wav", "9.wav"):
        (ten_sounds.root / bad).write_bytes(b"no sound")
    extract(ten_sounds, tmp_path / "out", SPEC, Windows(), batch_seconds=0.1, skip_bad=True)

    whole, found = FeatureShards(tmp_path / "whole"), FeatureShards(tmp_path / "out")
    assert found.names == [f"{i}.wav" for i in (1, 2, 3, 5, 6, 7, 8)]
    for i, name in enumerate(found.names):
        assert np.array_equal(found.features(i), whole.features(whole.names.index(name)))
    skipped = [line.split("\t") for line in (tmp_path / "out" / "0_1.skipped.tsv").read_text().splitlines()]
    assert [name for name, _ in skipped] == ["0.wav", "4.wav", "9.wav"]
    assert all("not a readable sound file" in reason for _, reason in skipped)


def test_nothing_is_listed_as_skipped_where_nothing_was(sounds, tmp_path):
    extract(make_manifest(sounds), tmp_path / "out", SPEC, Windows(), skip_bad=True)

    assert content(tmp_path / "out").keys() == {"0_1.npy", "0_1.len", "0_1.json"}


def test_sounds_that_are_all_bad_are_refused(sounds, tmp_path):
    manifest = make_manifest(sounds)
    for path in manifest.paths:
        (sounds / path).unlink()
    with refused(tmp_path / "out" / "0_1.npy", "no utterance is left"):
        extract(manifest, tmp_path / "out", SPEC, Windows(), skip_bad=True)
    assert_unfinished(tmp_path / "out")
