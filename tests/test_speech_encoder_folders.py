"""Folders and hub ids that hold no speech encoder, or another one: one sentence each."""

# ruff: noqa: F811  # fixtures are imported, and parameters have their names

import os
import shutil
import socket
import threading
from contextlib import contextmanager
from functools import cache
from urllib.parse import urlsplit

import huggingface_hub
import pytest
import torch
import transformers
from conftest import refused
from safetensors.torch import load_file, save_file
from test_speech_encoders import FAMILIES, PUBLISHED, family, folders, spec, wave  # noqa: F401  (folders: fixture)
from torch import nn

from repcodec.cli import main
from repcodec.errors import RepCodecError
from repcodec.speech_encoders import encoder_table, find_encoder, load_speech_encoder


def test_the_weights_hash_is_of_the_weights_up_to_the_layer(folders, tmp_path):
    shutil.copytree(folders / "hubert_base", tmp_path / "moved")
    hashes = [
        load_speech_encoder(spec(False), layer, folder / name).weights_sha256
        for layer, folder, name in [(2, folders, "hubert_base"), (2, tmp_path, "moved"), (3, tmp_path, "moved")]
    ]
    assert hashes[0] == hashes[1] != hashes[2]
    tensors = load_file(tmp_path / "moved" / "model.safetensors")
    for block, same in ((2, True), (1, False)):
        tensors[f"encoder.layers.{block}.final_layer_norm.bias"][3] += 1
        save_file(tensors, tmp_path / "moved" / "model.safetensors", metadata={"format": "pt"})
        found = load_speech_encoder(spec(False), 2, tmp_path / "moved").weights_sha256
        assert (found == hashes[0]) == same


@pytest.mark.parametrize("name", [*FAMILIES, "whisper"])
def test_the_weights_hash_is_of_one_layer_of_one_model(folders, name):
    hashes = {
        load_speech_encoder(family(other), layer, folders / other).weights_sha256
        for other, layer in [(name, 1), (name, 1), (name, 2), ("hubert_base", 3), ("data2vec_base", 3)]
    }
    assert len(hashes) == 4


def test_the_weights_hash_does_not_depend_on_what_the_model_was_saved_in(folders, tmp_path):
    transformers.HubertForCTC.from_pretrained(folders / "hubert_base").save_pretrained(tmp_path / "hubert_base")
    transformers.Data2VecAudioForCTC.from_pretrained(folders / "data2vec_base").save_pretrained(
        tmp_path / "data2vec_base"
    )
    transformers.WhisperModel.from_pretrained(folders / "whisper").save_pretrained(tmp_path / "whisper")
    for name in ("hubert_base", "data2vec_base", "whisper"):
        hashes = [load_speech_encoder(family(name), 2, root / name).weights_sha256 for root in (folders, tmp_path)]
        assert hashes[0] == hashes[1]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_weights_hash_is_the_same_at_every_load_of_a_file_without_the_mask_of_pre_training(folders, tmp_path, name):
    """Some published files lack it, and then transformers draws it at random."""
    shutil.copytree(folders / name, tmp_path / name)
    tensors = load_file(tmp_path / name / "model.safetensors")
    tensors.pop("masked_spec_embed", None)
    save_file(tensors, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    hashes = {load_speech_encoder(family(name), 2, tmp_path / name).weights_sha256 for _ in range(2)}
    assert hashes == {load_speech_encoder(family(name), 2, folders / name).weights_sha256}


def test_a_folder_that_is_not_there_is_one_sentence(tmp_path):
    with refused(tmp_path / "nowhere", "no such folder"):
        load_speech_encoder(spec(), 1, tmp_path / "nowhere")
    with refused(tmp_path / "nowhere", "no such folder"):
        find_encoder("mine", tmp_path / "nowhere")
    with refused("./nowhere", "no such folder"):
        find_encoder("mine", "./nowhere")


@contextmanager
def on_one_line():
    """Check what an error says, and let it pass."""
    try:
        yield
    except RepCodecError as error:
        assert "\n" not in str(error)
        assert len(str(error)) < 600
        raise


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"model_type": "nonsense"}', '{"model_type": 3}', "\x00"])
def test_a_configuration_that_is_none_is_one_sentence(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with refused(tmp_path, "no speech encoder could be loaded"), on_one_line():
        load_speech_encoder(spec(), 1, tmp_path)
    with refused(tmp_path, "no speech encoder could be loaded"), on_one_line():
        find_encoder("mine", tmp_path)


@pytest.mark.parametrize("name", ["hubert_base", "whisper"])
def test_corrupt_weights_are_one_sentence(folders, tmp_path, name):
    shutil.copytree(folders / name, tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    for content in (b"", b"nonsense", weights.read_bytes()[:2000]):
        weights.write_bytes(content)
        with refused(tmp_path / "model", "no speech encoder could be loaded"), on_one_line():
            load_speech_encoder(family(name), 1, tmp_path / "model")


def test_weights_of_another_shape_are_one_sentence(folders, tmp_path):
    shutil.copytree(folders / "hubert_base", tmp_path / "model")
    shutil.copy(folders / "data2vec_large" / "model.safetensors", tmp_path / "model" / "model.safetensors")
    with refused(tmp_path / "model"), on_one_line():
        load_speech_encoder(spec(False), 1, tmp_path / "model")


def test_a_folder_without_weights_is_one_sentence(folders, tmp_path):
    shutil.copy(folders / "hubert_base" / "config.json", tmp_path)
    with refused(tmp_path, "no speech encoder could be loaded", "model.safetensors"), on_one_line():
        load_speech_encoder(spec(False), 1, tmp_path)


def test_a_hostile_pickle_is_not_run(folders, tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/run",)

    (tmp_path / "model").mkdir()
    shutil.copy(folders / "hubert_base" / "config.json", tmp_path / "model")
    torch.save({"encoder": Hostile()}, tmp_path / "model" / "pytorch_model.bin")
    with refused(tmp_path / "model", "no speech encoder could be loaded"):
        load_speech_encoder(spec(False), 1, tmp_path / "model")
    assert not (tmp_path / "run").exists()


def test_no_network_for_a_hub_id_is_one_sentence(tmp_path, monkeypatch, capsys):
    (tmp_path / "m.tsv").write_text("/audio\na.wav\t16000\n")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # as the variable does, without its retries
    assert main(["extract", str(tmp_path / "m.tsv"), str(tmp_path / "out"), "--encoder", "hubert_base"]) == 1
    (sentence,) = capsys.readouterr().err.splitlines()
    assert sentence.startswith("error: facebook/hubert-base-ls960: no speech encoder could be loaded")
    assert "without a network" in sentence and "--model" in sentence


def test_no_network_for_another_hub_id_is_one_sentence(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for ask in (lambda: find_encoder("mine", "nowhere/at-all"), lambda: load_speech_encoder(spec(), 1)):
        with refused("nowhere/at-all", "without a network", "save_pretrained", "--model"), on_one_line():
            ask()


def test_folder_that_is_no_model_says_what_to_do(tmp_path):
    with pytest.raises(RepCodecError, match=r"without a network.*--model"):
        load_speech_encoder(spec(), 1, tmp_path)


def test_model_of_another_kind_or_width_is_refused(folders, tmp_path):
    transformers.BertConfig().save_pretrained(tmp_path)
    with pytest.raises(RepCodecError, match="a bert model"):
        load_speech_encoder(spec(), 1, tmp_path)
    with refused(tmp_path, "a bert model", "expected whisper, hubert, data2vec-audio"), on_one_line():
        find_encoder("mine", tmp_path)
    with pytest.raises(RepCodecError, match="width 16, but small has 768"):
        load_speech_encoder(spec(dim=768), 1, folders / "hubert_base")


def test_incomplete_weights_are_refused(folders, tmp_path):
    tensors = load_file(folders / "hubert_base" / "model.safetensors")
    del tensors["encoder.layers.0.final_layer_norm.weight"]
    (tmp_path / "config.json").write_bytes((folders / "hubert_base" / "config.json").read_bytes())
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RepCodecError, match=r"lack encoder\.layers\.0"):
        load_speech_encoder(spec(), 1, tmp_path)


@cache
def why_the_hub_cannot_be_reached():
    """Try once a process, for 4 s at most; None: it can."""
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return "no network to the hub (HF_HUB_OFFLINE is set)"
    host = urlsplit(huggingface_hub.constants.ENDPOINT).hostname
    outcome = [f"no network to the hub ({host} did not answer within 4 s)"]

    def attempt():  # its timeout is for each address, and not for looking up the name
        try:
            socket.create_connection((host, 443), timeout=3).close()
            outcome.append(None)
        except OSError as error:
            outcome.append(f"no network to the hub ({host}: {error})")

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(4)
    return outcome[-1]


@pytest.mark.hub
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_encoders_load_from_the_hub(name):
    if reason := why_the_hub_cannot_be_reached():
        pytest.skip(reason)
    row = encoder_table()[name]
    encoder = load_speech_encoder(row)
    assert len(encoder.blocks) == row.layer
    (features,) = encoder([wave(16_000)])
    assert features.shape == (50 if row.waveform_norm is None else 49, row.dim)
    assert torch.isfinite(features).all()
    config = transformers.AutoConfig.from_pretrained(row.model)
    if name.startswith("hubert"):
        large = name == "hubert_large"
        assert (config.feat_extract_norm, config.do_stable_layer_norm) == ("layer" if large else "group", large)
    found = find_encoder("other", row.model)
    assert (found.dim, found.num_layers, found.waveform_norm) == (row.dim, row.num_layers, row.waveform_norm)
    if name.startswith("whisper"):
        assert (config.num_mel_bins, config.max_source_positions) == (80, 1500)
        return
    norms = [type(module) for module in encoder.convolutions.modules() if "Norm" in type(module).__name__[-9:]]
    assert norms == ([nn.GroupNorm] if name == "hubert_base" else [nn.LayerNorm] * 7)
    assert isinstance(encoder.norm, nn.Identity if name == "hubert_large" else nn.LayerNorm)


@pytest.mark.parametrize(
    ("name", "model"), [("whisper", "hubert_base"), ("hubert_base", "whisper"), ("data2vec_base", "hubert_base")]
)
def test_a_model_of_another_family_is_refused_whatever_its_width(folders, name, model):
    row = find_encoder("mine", folders / name)
    with refused(folders / model, "but mine is of the family"):
        load_speech_encoder(row, 1, folders / model)
