import json

import numpy as np
import pytest
import soundfile
import torch
from conftest import refused
from test_audio import noise

from repcodec import RepCodec, SpeechTokenizer
from repcodec.kmeans import KMeansTokenizer
from repcodec.pipeline import load_encoder_of, load_tokenizer, usable_device
from repcodec.speech_encoders import encoder_table, load_speech_encoder


@pytest.fixture(scope="module")
def encoder(whisper_folder):
    return load_speech_encoder(encoder_table()["whisper_tiny_en"], 3, whisper_folder)


@pytest.fixture(scope="module")
def sounds(speech):
    return sorted((speech / "audio").rglob("*.flac"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory, whisper_folder, encoder, sounds):
    """A codec of real speech's features, started as training starts it."""
    torch.manual_seed(0)
    codec = RepCodec(384, codebook_size=64)
    codec.start_as_identity()
    waveforms = [torch.from_numpy(soundfile.read(path, dtype="float32")[0]) for path in sounds[:4]]
    codec.quantizer.start(torch.cat(encoder(waveforms)), seed=0)
    about = {"encoder": "whisper_tiny_en", "layer": 3, "frame_rate": 50, "encoder_model": str(whisper_folder)}
    folder = tmp_path_factory.mktemp("saved") / "codec"
    codec.save_pretrained(folder, {**about, "encoder_sha256": encoder.weights_sha256})
    return folder


def test_a_sound_file_becomes_codes(saved, sounds, encoder):
    tokenizer = SpeechTokenizer.from_pretrained(saved)
    result = tokenizer(str(sounds[0]))
    waveform, rate = soundfile.read(sounds[0], dtype="float32")
    assert result.codes_per_second == 50
    assert result.duration == len(waveform) / rate
    expected = RepCodec.from_pretrained(saved).encode(encoder([torch.from_numpy(waveform)])[0][None])
    assert torch.equal(result.codes, expected[0])
    assert result.codes.shape == (1, len(waveform) // 320) and len(result.codes.unique()) > 10
    decoded = tokenizer.decode(result.codes)
    assert decoded.shape == (result.codes.shape[1], 384)


def test_samples_of_any_kind_and_rate_give_the_same_codes(saved, sounds):
    tokenizer = SpeechTokenizer.from_pretrained(saved)
    waveform, _ = soundfile.read(sounds[0], dtype="float32")
    expected = tokenizer(sounds[0]).codes
    for samples in (waveform, torch.from_numpy(waveform), np.stack([waveform, waveform]), waveform.astype(np.float64)):
        assert torch.equal(tokenizer(samples, sample_rate=16_000).codes, expected)
    assert tokenizer(waveform, sample_rate=32_000).codes.shape[1] == len(waveform) // 640
    with refused("sample_rate=16000"):
        tokenizer(waveform)
    with refused("not finite"):
        tokenizer(np.full(9000, np.nan), sample_rate=16_000)
    with refused("100 samples at 16 kHz are too short"):
        tokenizer(noise(100), sample_rate=16_000)


def test_a_strided_codec_says_its_own_rate(tmp_path, whisper_folder, sounds):
    about = {"encoder": "whisper_tiny_en", "layer": 3, "frame_rate": 50}
    RepCodec(384, codebook_size=8, enc_strides=(2, 1), dec_strides=(1, 2)).save_pretrained(tmp_path, about)
    result = SpeechTokenizer.from_pretrained(tmp_path, model=whisper_folder)(sounds[0])
    assert result.codes_per_second == 25
    assert abs(result.codes.shape[1] / 25 - result.duration) <= 1 / 25


def test_kmeans_tokenizes_speech_too(tmp_path, whisper_folder, encoder, sounds):
    torch.manual_seed(0)
    about = {"encoder": "whisper_tiny_en", "layer": 3, "encoder_model": str(whisper_folder)}
    KMeansTokenizer(torch.randn(20, 384)).save_pretrained(tmp_path, about)
    result = SpeechTokenizer.from_pretrained(tmp_path)(sounds[0])
    assert result.codes.shape[0] == 1 and result.codes_per_second == 50


def test_stream_gives_what_the_sound_gives_at_once(saved, sounds, encoder):
    tokenizer = SpeechTokenizer.from_pretrained(saved)
    (features,) = encoder([torch.from_numpy(soundfile.read(sounds[1], dtype="float32")[0])])
    found = list(tokenizer.stream(features.numpy()[i : i + 7] for i in range(0, len(features), 7)))
    assert len(found) > 3
    assert torch.equal(torch.cat(found, 1), tokenizer(sounds[1]).codes)
    assert torch.is_inference_mode_enabled() is False
    with refused("chunk 1: shape (3, 5), expected (frames, 384)"):
        list(tokenizer.stream([features[:4], np.zeros((3, 5))]))
    with refused("chunk 0: frame 2 holds NaN"):
        list(tokenizer.stream([np.full((3, 384), [[0.0], [0.0], [np.nan]])]))


def change(saved, tmp_path, **values):
    """A copy of the saved codec whose config.json says something else."""
    codec = RepCodec.from_pretrained(saved)
    codec.about = {key: value for key, value in {**codec.about, **values}.items() if value != "drop"}
    codec.save_pretrained(tmp_path / "changed")
    return load_tokenizer(tmp_path / "changed")


@pytest.mark.slow
def test_encoder_is_found_where_it_was_or_where_it_is_told_to_be(saved, tmp_path, whisper_folder, monkeypatch):
    assert load_encoder_of(load_tokenizer(saved)).layer == 3
    moved = change(saved, tmp_path, encoder_model="/gone/whisper")
    assert load_encoder_of(moved, whisper_folder).dim == 384
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with refused("openai/whisper-tiny.en", "--model"):
        load_encoder_of(moved)


def test_another_encoder_is_refused(saved, tmp_path, whisper_folder):
    with refused("not the speech encoder that the tokenizer was trained with"):
        load_encoder_of(change(saved, tmp_path, layer=2))
    with refused("names no speech encoder"):
        load_encoder_of(change(saved, tmp_path, encoder="drop"))
    with refused("mine: the speech encoder's weights are not at hand"):
        load_encoder_of(change(saved, tmp_path, encoder="mine", encoder_model="/gone"))


def test_codec_and_kmeans_load_by_what_the_folder_says(tmp_path, saved):
    KMeansTokenizer(torch.randn(5, 8)).save_pretrained(tmp_path / "kmeans")
    assert isinstance(load_tokenizer(saved), RepCodec)
    assert isinstance(load_tokenizer(tmp_path / "kmeans"), KMeansTokenizer)
    (tmp_path / "config.json").write_text(json.dumps({"kind": "wav2vec"}))
    with refused("'wav2vec', expected repcodec or kmeans"):
        load_tokenizer(tmp_path)
    with refused("nowhere", "does not exist"):
        load_tokenizer(tmp_path / "nowhere")


def test_device_that_is_not_here_is_one_sentence():
    for name in ("gpu", "cuda:99"):
        with refused(f"device {name}: not usable here"):
            usable_device(name)
