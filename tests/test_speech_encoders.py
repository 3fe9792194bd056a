import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from conftest import refused
from torch import nn

from repcodec.errors import RepCodecError
from repcodec.speech_encoders import EncoderSpec, HubertEncoder, encoder_table, find_encoder, load_speech_encoder

PUBLISHED = {
    "hubert_base": ("facebook/hubert-base-ls960", 768, 12, 9, False),
    "hubert_large": ("facebook/hubert-large-ll60k", 1024, 24, 18, True),
    "data2vec_base": ("facebook/data2vec-audio-base", 768, 12, 6, True),
    "data2vec_large": ("facebook/data2vec-audio-large", 1024, 24, 18, True),
    "whisper_medium": ("openai/whisper-medium", 1024, 24, 24, None),
    "whisper_large_v2": ("openai/whisper-large-v2", 1280, 32, 32, None),
}
CONV = {"conv_dim": [16, 16, 16, 16, 16, 16, 16], "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2}
SMALL = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32, **CONV}
FAMILIES = {
    "hubert_base": (transformers.HubertModel, transformers.HubertConfig(**SMALL)),
    "hubert_large": (
        transformers.HubertModel,
        transformers.HubertConfig(**SMALL, feat_extract_norm="layer", do_stable_layer_norm=True, conv_bias=True),
    ),
    "data2vec_base": (transformers.Data2VecAudioModel, transformers.Data2VecAudioConfig(**SMALL)),
    "data2vec_large": (
        transformers.Data2VecAudioModel,
        transformers.Data2VecAudioConfig(
            **SMALL | {"hidden_size": 24, "num_hidden_layers": 5, "num_attention_heads": 4, "intermediate_size": 40}
        ),
    ),
}
LAYERS = [(name, layer) for name in FAMILIES for layer in (1, 3)] + [("data2vec_large", 5)]
WHISPER = transformers.WhisperConfig(
    d_model=16, encoder_layers=3, encoder_attention_heads=2, encoder_ffn_dim=32, decoder_layers=1,
    decoder_attention_heads=2, decoder_ffn_dim=32, vocab_size=60, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    decoder_start_token_id=1,
)  # fmt: skip


def spec(norm=True, dim=16, layers=3):
    return EncoderSpec("small", "nowhere/at-all", dim, layers, 2, norm, 50)


def family(name):
    """The row of one of the small models."""
    return {"data2vec_large": spec(dim=24, layers=5), "whisper": spec(None), "hubert_base": spec(False)}.get(
        name, spec()
    )


def alone(encoder, waveform):
    (features,) = encoder([waveform])
    return features


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Random weights of every family, saved by transformers."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("models")
    for name, (cls, config) in FAMILIES.items():
        model = cls(config)
        for parameter in model.encoder.parameters():  # transformers starts biases at 0 and norms at 1
            torch.nn.init.normal_(parameter, 0, 0.3)
        model.save_pretrained(root / name)
    whisper = transformers.WhisperForConditionalGeneration(WHISPER)
    for block in whisper.model.encoder.layers:
        for parameter in block.parameters():
            torch.nn.init.normal_(parameter, 0, 0.2)
    whisper.save_pretrained(root / "whisper")
    return root


def wave(samples=12_345, seed=0):
    return torch.randn(samples, generator=torch.Generator().manual_seed(seed)) * 0.1 + 0.02


@pytest.mark.parametrize("name", PUBLISHED)
def test_table_holds_the_published_settings(name):
    row = encoder_table()[name]
    assert (row.model, row.dim, row.num_layers, row.layer, row.waveform_norm) == PUBLISHED[name]
    assert row.frame_rate == 50


def whole_model(folders, name, layer):
    """What block `layer` of transformers' own, whole model puts out for a waveform, and what the model ends with."""
    cls, _ = FAMILIES[name]
    whole = cls.from_pretrained(folders / name).eval()
    seen = []
    whole.encoder.layers[layer - 1].register_forward_hook(
        lambda _, __, output: seen.append(output[0] if isinstance(output, tuple) else output)
    )

    def run(waveform):
        seen.clear()
        with torch.no_grad():
            last = whole(waveform[None]).last_hidden_state
        return seen[0].view(-1, last.shape[-1]), last[0]

    return run


@pytest.mark.parametrize(("name", "layer"), LAYERS)
def test_layer_n_is_the_output_of_block_n(folders, name, layer):
    waveform = wave()
    row = family(name)
    normed = torch.nn.functional.layer_norm(waveform, waveform.shape) if row.waveform_norm else waveform
    expected, _ = whole_model(folders, name, layer)(normed)
    features = alone(load_speech_encoder(row, layer, folders / name), waveform)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)
    assert len(features) == (len(waveform) - 400) // 320 + 1


def test_the_last_layer_of_hubert_large_is_before_the_final_norm(folders):
    waveform = wave()
    block, normed = whole_model(folders, "hubert_large", 3)(torch.nn.functional.layer_norm(waveform, waveform.shape))
    features = alone(load_speech_encoder(spec(), 3, folders / "hubert_large"), waveform)
    torch.testing.assert_close(features, block, rtol=1e-4, atol=1e-5)
    assert (features - normed).norm() > 0.1 * normed.norm()
    final_norm = transformers.HubertModel.from_pretrained(folders / "hubert_large").encoder.layer_norm
    with torch.no_grad():
        torch.testing.assert_close(final_norm(features), normed, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [*FAMILIES, "whisper"])
def test_nothing_above_the_layer_is_kept(folders, name):
    encoder = load_speech_encoder(family(name), 2, folders / name)
    assert len(encoder.blocks) == 2
    assert not [key for key in encoder.state_dict() if key.startswith(("blocks.2", "blocks.3"))]


@pytest.mark.parametrize(("name", "layer"), [*LAYERS, ("whisper", 1), ("whisper", 3)])
def test_what_is_kept_ends_with_the_layer(folders, name, layer):
    encoder = load_speech_encoder(family(name), layer, folders / name)
    assert encoder.layer == len(encoder.blocks) == layer
    kept = {key.split(".")[0] for key in encoder.state_dict()}
    expected = {"convolutions", "projection", "positions", "norm", "blocks"}
    if name == "hubert_large":  # pre-norm: the only norm beside the blocks is the one that follows them
        expected -= {"norm"}
    assert kept == ({"conv1", "conv2", "positions", "blocks"} if name == "whisper" else expected)


def test_data2vec_is_post_norm_whatever_its_config_says(folders, tmp_path):
    """Its architecture has no such setting, but a config.json that began as wav2vec 2.0's can hold it."""
    shutil.copytree(folders / "data2vec_base", tmp_path / "data2vec_base")
    file = tmp_path / "data2vec_base" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"do_stable_layer_norm": True}))
    expected, _ = whole_model(tmp_path, "data2vec_base", 2)(torch.nn.functional.layer_norm(wave(), wave().shape))
    features = alone(load_speech_encoder(spec(), 2, tmp_path / "data2vec_base"), wave())
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)


def test_data2vec_has_its_waveform_normed_whatever_its_config_says(folders, tmp_path):
    config = json.loads((folders / "data2vec_base" / "config.json").read_text()) | {"feat_extract_norm": "group"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert find_encoder("mine", tmp_path).waveform_norm is True


def test_waveform_norm_is_only_where_the_table_says(folders):
    plain, normed = (
        alone(load_speech_encoder(spec(norm), 2, folders / "hubert_base"), wave()) for norm in (False, True)
    )
    expected, _ = whole_model(folders, "hubert_base", 2)(wave())
    torch.testing.assert_close(plain, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(plain, normed)


def test_waveform_norm_is_over_the_whole_utterance_before_it_is_cut_into_chunks(folders, monkeypatch):
    monkeypatch.setattr(HubertEncoder, "CHUNK", 4000)
    waveform = torch.cat([wave(4000), 5 * wave(4000, seed=1) + 1])
    features = alone(load_speech_encoder(spec(True), 2, folders / "hubert_large"), waveform)
    normed = (waveform - waveform.mean()) / (waveform.var(correction=0) + 1e-5).sqrt()
    run = whole_model(folders, "hubert_large", 2)
    torch.testing.assert_close(
        features, torch.cat([run(normed[:4000])[0], run(normed[4000:])[0]]), rtol=1e-4, atol=1e-4
    )
    each = [run(torch.nn.functional.layer_norm(chunk, chunk.shape))[0] for chunk in waveform.split(4000)]
    assert (features - torch.cat(each)).norm() > 1e-2 * features.norm()


def test_waveform_norm_adds_1e_5_to_the_variance(folders):
    """The convolutions' own norms hide most of its scale: so look at what they are given, for a very quiet sound."""
    encoder = load_speech_encoder(spec(), 1, folders / "hubert_large")
    seen = []
    encoder.convolutions.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0]))
    waveform = wave() * 0.02
    encoder([waveform])
    expected = (waveform - waveform.mean()) / (waveform.var(correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(seen[0], expected, rtol=1e-4, atol=1e-5)
    assert 0.2 < float(seen[0].std()) < 0.8


def test_long_audio_is_run_in_chunks(folders, monkeypatch):
    encoder = load_speech_encoder(spec(False), 2, folders / "hubert_base")
    monkeypatch.setattr(HubertEncoder, "CHUNK", 4000)
    waveform = wave(8399)
    features = alone(encoder, waveform)
    parts = encoder([waveform[:4000], waveform[4000:8000]])  # the last 399 samples give no frame
    torch.testing.assert_close(features, torch.cat(parts))
    assert encoder.num_frames(8399) == len(features)
    assert encoder.num_frames(8400) == len(features) + 1
    assert alone(encoder, waveform[:399]).shape == (0, 16)


def test_chunks_are_as_long_as_published():
    assert HubertEncoder.CHUNK == 1_600_000
    assert HubertEncoder.num_frames(1_600_000) == 4_999
    assert HubertEncoder.num_frames(1_600_399) == 4_999
    assert HubertEncoder.num_frames(1_600_400) == 5_000
    assert HubertEncoder.num_frames(3_600_000) == 2 * 4_999 + 1_249
    assert [HubertEncoder.num_frames(samples) for samples in (0, 399, 400, 719, 720)] == [0, 0, 1, 1, 2]


LENGTHS = [12_345, 400, 33_000, 150, 9_000, 8_320, 640]
"""One too short for a frame, one long enough for several chunks of 10,000 samples."""


@pytest.mark.parametrize(("name", "layer"), [*LAYERS, ("whisper", 1), ("whisper", 3)])
def test_a_batch_gives_what_each_utterance_gives_alone(folders, name, layer, monkeypatch):
    monkeypatch.setattr(HubertEncoder, "CHUNK", 10_000)
    encoder = load_speech_encoder(family(name), layer, folders / name)
    lengths = [*LENGTHS, 31 * 16_000] if name == "whisper" else LENGTHS  # over 30 s the positions are others
    waveforms = [wave(samples, seed) * (seed + 1) for seed, samples in enumerate(lengths)]
    singles = [alone(encoder, waveform) for waveform in waveforms]
    assert [len(single) for single in singles] == [encoder.num_frames(samples) for samples in lengths]
    every = range(len(lengths))
    for order in (every, every[::-1], np.random.default_rng(0).permutation(len(lengths)), [3, 1], [2, 2, 0]):
        batch = encoder([waveforms[i] for i in order])
        for i, features in zip(order, batch, strict=True):
            assert features.shape == singles[i].shape == (len(singles[i]), encoder.dim)
            if len(features):
                assert (features - singles[i]).norm() / singles[i].norm() < 1e-5
    assert [len(features) for features in encoder([waveforms[3]])] == [0]


@pytest.mark.parametrize("name", [*FAMILIES, "whisper"])
def test_padding_would_change_the_features(folders, name):
    """The bound above tells: a batch padded with silence would be far outside of it."""
    encoder = load_speech_encoder(family(name), 1, folders / name)
    single, padded = alone(encoder, wave()), alone(encoder, nn.functional.pad(wave(), (0, 8000)))
    assert (padded[: len(single)] - single).norm() > 1e-3 * single.norm()


@pytest.mark.parametrize("name", [*FAMILIES, "whisper"])
def test_a_batch_without_a_frame_gives_empty_features(folders, name):
    encoder = load_speech_encoder(family(name), 1, folders / name)
    assert encoder([]) == []
    for features in encoder([wave(319), wave(0), wave(1).double()]):
        assert features.shape == (0, encoder.dim) and features.dtype == torch.float32


def test_the_real_whisper_gives_in_a_batch_what_each_utterance_gives_alone(whisper_folder, speech):
    from repcodec.manifest import Manifest

    manifest = Manifest.read(speech / "train.tsv")
    waveforms = [torch.from_numpy(manifest.waveform(i)) for i in range(len(manifest))]
    encoder = load_speech_encoder(encoder_table()["whisper_tiny_en"], 4, whisper_folder)
    for features, waveform in zip(encoder(waveforms), waveforms, strict=True):
        single = alone(encoder, waveform)
        assert (features - single).norm() / single.norm() < 1e-5


@pytest.mark.parametrize("name", [*FAMILIES, "whisper"])
def test_autocast_and_double_precision_change_nothing(folders, name):
    encoder = load_speech_encoder(family(name), 2, folders / name)
    expected = alone(encoder, wave())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(alone(encoder, wave()), expected)
    assert torch.equal(alone(encoder, wave().double()), expected)
    assert expected.dtype == torch.float32 and not expected.requires_grad


@pytest.mark.parametrize("layer", [1, 3])
def test_whisper_is_run_on_the_unpadded_mel_before_the_last_norm(folders, layer):
    whole = transformers.WhisperModel.from_pretrained(folders / "whisper").encoder.eval()
    encoder = load_speech_encoder(spec(None), layer, folders / "whisper")
    waveform = wave(30 * 16_000)
    seen = []
    whole.layers[layer - 1].register_forward_hook(lambda _, __, output: seen.append(output))
    extractor = transformers.WhisperFeatureExtractor()
    with torch.no_grad():
        # At exactly 30 s, and only there, the unpadded utterance is what transformers itself computes.
        whole(extractor(waveform.numpy(), sampling_rate=16_000, return_tensors="pt").input_features)
    features = alone(encoder, waveform)
    torch.testing.assert_close(features, seen[0][0], rtol=1e-4, atol=1e-4)
    assert len(alone(encoder, waveform[:16_100])) == 50
    assert alone(encoder, waveform[:319]).shape == (0, 16)


@pytest.mark.parametrize("samples", [320, 481, 16_000, 31 * 16_000 + 77])
def test_the_log_mel_is_that_of_transformers(folders, samples):
    encoder = load_speech_encoder(spec(None), 1, folders / "whisper")
    extractor = transformers.WhisperFeatureExtractor()
    expected = extractor(
        wave(samples).numpy(), sampling_rate=16_000, truncation=False, padding="do_not_pad", return_tensors="pt"
    ).input_features[0]
    found = encoder.log_mel(wave(samples))
    assert found.shape == (80, samples // 160)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_the_log_mel_ends_eight_below_the_maximum_of_the_utterance(folders):
    waveform = wave(40_159) * torch.linspace(1, 0, 40_159) ** 8  # so quiet at its end that this bound is at work
    options = {"sampling_rate": 16_000, "truncation": False, "padding": "do_not_pad", "return_tensors": "pt"}
    expected = transformers.WhisperFeatureExtractor()(waveform.numpy(), **options).input_features[0]
    assert (expected == expected.min()).float().mean() > 0.1
    found = load_speech_encoder(spec(None), 1, folders / "whisper").log_mel(waveform)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_whisper_positions_continue_the_sinusoids(folders):
    encoder = load_speech_encoder(spec(None), 1, folders / "whisper")
    table = encoder.position_table(1600)
    t, i = torch.arange(1600)[:, None], torch.arange(8)
    angles = t * torch.exp(-torch.log(torch.tensor(10_000.0)) * i / 7)
    torch.testing.assert_close(table, torch.cat([angles.sin(), angles.cos()], 1), rtol=1e-3, atol=1e-3)
    assert alone(encoder, wave(31 * 16_000)).shape == (1550, 16)


def test_encoders_are_frozen(folders):
    encoder = load_speech_encoder(spec(), 1, folders / "hubert_base")
    assert not encoder.training
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_weights_saved_in_half_precision_run_in_single(folders, tmp_path):
    transformers.HubertModel.from_pretrained(folders / "hubert_base", dtype=torch.float16).save_pretrained(tmp_path)
    encoder = load_speech_encoder(spec(False), 1, tmp_path)
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.float32}


@pytest.mark.parametrize("layer", [0, 4, -1])
def test_layer_outside_the_model_names_the_valid_range(folders, layer):
    with pytest.raises(RepCodecError, match="layers 1 to 3"):
        load_speech_encoder(spec(), layer, folders / "hubert_base")


@pytest.mark.parametrize("layer", [0, 4])
def test_a_model_with_fewer_layers_than_the_table_names_its_own(folders, layer):
    with refused(f"layer={layer}", f"layers 1 to {3 if layer else 9}"):
        load_speech_encoder(spec(layers=9), layer, folders / "hubert_base")


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("hubert_base", (16, 3, False)), ("hubert_large", (16, 3, True)), ("data2vec_base", (16, 3, True)),
        ("data2vec_large", (24, 5, True)), ("whisper", (16, 3, None)),
    ],
)  # fmt: skip
def test_another_size_is_read_off_its_folder(folders, name, found):
    row = find_encoder("mine", folders / name)
    assert (row.name, row.model, row.layer, row.frame_rate) == ("mine", str(folders / name), None, 50)
    assert (row.dim, row.num_layers, row.waveform_norm) == found
    assert alone(load_speech_encoder(row, found[1]), wave()).shape[1] == found[0]
    with refused("mine has no published layer", f"1 to {found[1]}"):
        load_speech_encoder(row)


def test_the_table_comes_before_the_folder_and_an_unknown_name_lists_it(folders):
    assert find_encoder("hubert_base", folders / "whisper") == encoder_table()["hubert_base"]
    with refused("hubert_huge", "data2vec_base, data2vec_large, hubert_base", "--model"):
        find_encoder("hubert_huge")
