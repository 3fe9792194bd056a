import json

import numpy as np
import pytest
import soundfile
import torch

from repcodec.errors import RepCodecError
from repcodec.extraction import extract, feature_folder, make_manifest
from repcodec.manifest import Manifest
from repcodec.shards import FeatureShards
from repcodec.speech_encoders import EncoderSpec, SpeechEncoder

SPEC = EncoderSpec("tiny", "nowhere", 4, 2, 1, None, 50)


class Windows(SpeechEncoder):
    """The mean, the ends and the power of every 320 samples: features one can check."""

    def __init__(self, dim=4):
        super().__init__(dim, 1)
        self.weight = torch.nn.Parameter(torch.ones(dim))
        self.calls = 0

    def forward(self, waveform):
        self.calls += 1
        frames = waveform[: len(waveform) // 320 * 320].view(-1, 320)
        parts = [frames.mean(1), frames[:, 0], frames[:, -1], frames.square().mean(1)]
        return torch.stack(parts, 1)[:, : self.dim] * self.weight


@pytest.fixture
def sounds(tmp_path):
    rng = np.random.default_rng(0)
    for i, name in enumerate(["b/two.wav", "a/one.flac", "a/three with space.wav"]):
        (tmp_path / "audio" / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(tmp_path / "audio" / name, rng.normal(0, 0.1, 3200 + 700 * i), 16_000)
    return tmp_path / "audio"


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
        with torch.no_grad():
            expected = encoder(torch.from_numpy(samples)).numpy()
        assert np.array_equal(shards.features(i), expected)
    about = json.loads((tmp_path / "out" / "0_2.json").read_text())
    assert (about["encoder"], about["layer"], about["dim"], about["frame_rate"]) == ("tiny", 1, 4, 50)
    assert about["manifest_sha256"] == manifest.sha256()


def test_finished_shard_is_left_alone(sounds, tmp_path):
    encoder = Windows()
    extract(make_manifest(sounds), tmp_path / "out", SPEC, encoder)
    extract(make_manifest(sounds), tmp_path / "out", SPEC, encoder)
    assert encoder.calls == 3


def test_finished_shard_of_other_sounds_is_refused(sounds, tmp_path):
    manifest = make_manifest(sounds)
    extract(manifest, tmp_path / "out", SPEC, Windows())
    fewer = Manifest(manifest.root, manifest.paths[:2], manifest.num_samples[:2])
    with pytest.raises(RepCodecError, match=r"0_1\.json.*manifest_sha256"):
        extract(fewer, tmp_path / "out", SPEC, Windows())


def test_failure_leaves_nothing_that_looks_finished(sounds, tmp_path):
    (sounds / "b" / "two.wav").write_bytes(b"RIFF garbage")
    manifest = Manifest(sounds, ["a/one.flac", "b/two.wav"], [3900, 3200])
    with pytest.raises(RepCodecError, match=r"two\.wav: not a readable sound file"):
        extract(manifest, tmp_path / "out", SPEC, Windows())
    assert list((tmp_path / "out").iterdir()) == []


def test_too_short_sound_is_one_sentence(sounds, tmp_path):
    soundfile.write(sounds / "short.wav", np.zeros(100), 16_000)
    with pytest.raises(RepCodecError, match=r"short\.wav: 100 samples are too short"):
        extract(make_manifest(sounds), tmp_path / "out", SPEC, Windows())


def test_features_lie_where_training_looks_for_them():
    assert str(feature_folder("root", "hubert_base", 9, "train")) == "root/hubert_base/l9/train"
