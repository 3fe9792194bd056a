import pytest
import torch
import transformers

from repcodec.errors import RepCodecError
from repcodec.speech_encoders import EncoderSpec, encoder_table, load_speech_encoder

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
    "data2vec": (transformers.Data2VecAudioModel, transformers.Data2VecAudioConfig(**SMALL)),
}
WHISPER = transformers.WhisperConfig(
    d_model=16, encoder_layers=3, encoder_attention_heads=2, encoder_ffn_dim=32, decoder_layers=1,
    decoder_attention_heads=2, decoder_ffn_dim=32, vocab_size=60, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    decoder_start_token_id=1,
)  # fmt: skip


def spec(norm=True, dim=16, layers=3):
    return EncoderSpec("small", "nowhere/at-all", dim, layers, 2, norm, 50)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Random weights of every family, saved by transformers."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("models")
    for name, (cls, config) in FAMILIES.items():
        cls(config).eval().save_pretrained(root / name)
    whisper = transformers.WhisperForConditionalGeneration(WHISPER)
    for block in whisper.model.encoder.layers:  # transformers starts biases at 0 and norms at 1
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


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("layer", [1, 3])
def test_layer_n_is_the_output_of_block_n(folders, name, layer):
    cls, _ = FAMILIES[name]
    whole = cls.from_pretrained(folders / name).eval()
    seen = []
    whole.encoder.layers[layer - 1].register_forward_hook(
        lambda _, __, output: seen.append(output[0] if isinstance(output, tuple) else output)
    )
    waveform = wave()
    with torch.no_grad():
        whole(torch.nn.functional.layer_norm(waveform, waveform.shape)[None])
        features = load_speech_encoder(spec(), layer, folders / name)(waveform)
    torch.testing.assert_close(features, seen[0].view(-1, 16), rtol=1e-4, atol=1e-5)
    assert len(features) == (len(waveform) - 400) // 320 + 1


def test_waveform_norm_is_only_where_the_table_says(folders):
    with torch.no_grad():
        plain, normed = (load_speech_encoder(spec(norm), 2, folders / "hubert_base")(wave()) for norm in (False, True))
        cls, _ = FAMILIES["hubert_base"]
        expected = cls.from_pretrained(folders / "hubert_base").eval()(wave()[None], output_hidden_states=True)
    torch.testing.assert_close(plain, expected.hidden_states[2][0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(plain, normed)


def test_long_audio_is_run_in_chunks(folders, monkeypatch):
    encoder = load_speech_encoder(spec(False), 2, folders / "hubert_base")
    monkeypatch.setattr(type(encoder), "CHUNK", 4000)
    waveform = wave(8399)
    with torch.no_grad():
        features = encoder(waveform)
        parts = [encoder(waveform[:4000]), encoder(waveform[4000:8000])]  # the last 399 samples give no frame
    torch.testing.assert_close(features, torch.cat(parts))
    assert encoder.num_frames(8399) == len(features)
    assert encoder.num_frames(8400) == len(features) + 1
    assert encoder(waveform[:399]).shape == (0, 16)


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
        features = encoder(waveform)
    torch.testing.assert_close(features, seen[0][0], rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        assert len(encoder(waveform[:16_100])) == 50
        assert encoder(waveform[:319]).shape == (0, 16)


def test_whisper_positions_continue_the_sinusoids(folders):
    encoder = load_speech_encoder(spec(None), 1, folders / "whisper")
    table = encoder.position_table(1600)
    t, i = torch.arange(1600)[:, None], torch.arange(8)
    angles = t * torch.exp(-torch.log(torch.tensor(10_000.0)) * i / 7)
    torch.testing.assert_close(table, torch.cat([angles.sin(), angles.cos()], 1), rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        assert encoder(wave(31 * 16_000)).shape == (1550, 16)


def test_encoders_are_frozen(folders):
    encoder = load_speech_encoder(spec(), 1, folders / "hubert_base")
    assert not encoder.training
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


@pytest.mark.parametrize("layer", [0, 4, -1])
def test_layer_outside_the_model_names_the_valid_range(folders, layer):
    with pytest.raises(RepCodecError, match="layers 1 to 3"):
        load_speech_encoder(spec(), layer, folders / "hubert_base")


def test_folder_that_is_no_model_says_what_to_do(tmp_path):
    with pytest.raises(RepCodecError, match=r"without a network.*--model"):
        load_speech_encoder(spec(), 1, tmp_path)


def test_model_of_another_kind_or_width_is_refused(folders, tmp_path):
    transformers.BertConfig().save_pretrained(tmp_path)
    with pytest.raises(RepCodecError, match="a bert model"):
        load_speech_encoder(spec(), 1, tmp_path)
    with pytest.raises(RepCodecError, match="width 16, but small has 768"):
        load_speech_encoder(spec(dim=768), 1, folders / "hubert_base")


def test_incomplete_weights_are_refused(folders, tmp_path):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folders / "hubert_base" / "model.safetensors")
    del tensors["encoder.layers.0.final_layer_norm.weight"]
    (tmp_path / "config.json").write_bytes((folders / "hubert_base" / "config.json").read_bytes())
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RepCodecError, match=r"lack encoder\.layers\.0"):
        load_speech_encoder(spec(), 1, tmp_path)
