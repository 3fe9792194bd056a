"""Features of the real Whisper tiny.en against an independent implementation: OpenAI's own package."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from repcodec.manifest import Manifest
from repcodec.speech_encoders import encoder_table, load_speech_encoder

whisper = pytest.importorskip("whisper", reason="pip install 'repcodec[parity]'")


@pytest.fixture(scope="module")
def blocks(whisper_folder):
    """OpenAI's encoder with the same weights; transformers' names for them, renamed."""
    from safetensors.torch import load_file

    names = {
        "embed_positions.weight": "positional_embedding", "layers.": "blocks.", "self_attn_layer_norm": "attn_ln",
        "self_attn.q_proj": "attn.query", "self_attn.k_proj": "attn.key", "self_attn.v_proj": "attn.value",
        "self_attn.out_proj": "attn.out", "final_layer_norm": "mlp_ln", "fc1": "mlp.0", "fc2": "mlp.2",
        "layer_norm.": "ln_post.",
    }  # fmt: skip
    state = {}
    for name, value in load_file(whisper_folder / "model.safetensors").items():
        name = name.removeprefix("encoder.")
        for theirs, ours in names.items():
            if theirs != "layer_norm." or name.startswith("layer_norm."):
                name = name.replace(theirs, ours)
        state[name] = value
    encoder = whisper.model.AudioEncoder(80, 1500, 384, 6, 4)
    encoder.load_state_dict(state)
    return encoder.eval()


@torch.no_grad()
def openai_features(encoder, waveform, layer):
    mel = whisper.audio.log_mel_spectrogram(waveform)[None]
    x = torch.nn.functional.gelu(encoder.conv1(mel))
    x = torch.nn.functional.gelu(encoder.conv2(x)).permute(0, 2, 1)
    num_frames = x.shape[1]
    positions = encoder.positional_embedding if num_frames <= 1500 else whisper.model.sinusoids(num_frames, 384)
    x = x + positions[:num_frames]
    for block in encoder.blocks[:layer]:
        x = block(x)
    return x[0, : len(waveform) // 320]


@pytest.fixture(scope="module")
def waveforms(speech):
    """Speech of under 30 s and of over 30 s, each ending amid a frame: half a frame is run and then cut off."""
    manifest = Manifest.read(speech / "train.tsv")
    parts = [manifest.waveform(i) for i in range(len(manifest))]
    whole = np.concatenate(parts * 2)
    assert len(parts[0]) < 30 * 16_000 < len(whole)
    whole_and_part = {"short": parts[0], "long": whole}
    cut = {length: torch.from_numpy(x[: len(x) // 320 * 320 - 120]) for length, x in whole_and_part.items()}
    assert len(cut["long"]) > 30 * 16_000
    assert all(len(x) // 160 % 2 == 1 for x in cut.values())
    return cut


@pytest.mark.parametrize("length", ["short", "long"])
@pytest.mark.parametrize("layer", [1, 2, 3, 4])
def test_every_layer_is_that_of_openais_own_implementation(whisper_folder, blocks, waveforms, layer, length):
    waveform = waveforms[length]
    expected = openai_features(blocks, waveform, layer)
    (found,) = load_speech_encoder(encoder_table()["whisper_tiny_en"], layer, whisper_folder)([waveform])
    assert found.shape == expected.shape == (len(waveform) // 320, 384)
    assert (found - expected).norm() / expected.norm() < 1e-4
    assert ((found - expected).norm(dim=1) / expected.norm(dim=1)).max() < 1e-4


@pytest.mark.parametrize("layer", [1, 4])
def test_a_batch_of_both_is_that_of_openais_own_implementation(whisper_folder, blocks, waveforms, layer):
    encoder = load_speech_encoder(encoder_table()["whisper_tiny_en"], layer, whisper_folder)
    for features, waveform in zip(encoder(list(waveforms.values())), waveforms.values(), strict=True):
        expected = openai_features(blocks, waveform, layer)
        assert (features - expected).norm() / expected.norm() < 1e-4


@pytest.mark.parametrize("length", ["short", "long"])
def test_the_log_mel_is_that_of_openais_own_implementation(whisper_folder, waveforms, length):
    encoder = load_speech_encoder(encoder_table()["whisper_tiny_en"], 1, whisper_folder)
    expected = whisper.audio.log_mel_spectrogram(waveforms[length])
    torch.testing.assert_close(encoder.log_mel(waveforms[length]), expected, rtol=0, atol=1e-4)


def test_neither_another_layer_nor_the_final_norm_passes_for_the_layer(blocks, waveforms):
    layers = [openai_features(blocks, waveforms["short"], layer) for layer in (1, 2, 3, 4)]
    with torch.no_grad():
        layers.append(blocks.ln_post(layers[-1]))
    for one, other in pairwise(layers):
        assert (one - other).norm() > 0.1 * other.norm()
