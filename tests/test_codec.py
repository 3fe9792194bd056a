import json

import pytest
import torch

from repcodec.codec import RepCodec
from repcodec.errors import RepCodecError
from repcodec.quantizers import NO_CODE, EMAQuantizer

PUBLISHED_WIDTHS = {
    "hubert_base_l9": 768,
    "hubert_large_l18": 1024,
    "data2vec_base_l6": 768,
    "data2vec_large_l18": 1024,
    "whisper_medium_l24": 1024,
    "whisper_large_l32": 1280,
}


def published_shapes(d):
    """Every tensor of the published state dict, by facts.md, under our names."""
    shapes = {"encoder.input.weight": (d, d, 3), "encoder.projector.weight": (d, d, 3)}
    shapes |= {"decoder.input.weight": (d, d, 3), "decoder.output.weight": (d, d, 3)}
    for stack in ("encoder", "decoder"):
        for stage in range(2):
            prefix = f"{stack}.stages.{stage}"
            shapes |= {f"{prefix}.conv.weight": (d, d, 3), f"{prefix}.conv.bias": (d,)}
            for unit in range(2):
                shapes[f"{prefix}.residuals.{unit}.conv.weight"] = (d, d, 3)
                shapes[f"{prefix}.residuals.{unit}.pointwise.weight"] = (d, d, 1)
    prefix = "quantizer.codebooks.0"
    return shapes | {f"{prefix}.codes": (1024, d), f"{prefix}.counts": (1024,), f"{prefix}.sums": (1024, d)}


def test_parameter_count_of_the_published_architecture():
    assert sum(p.numel() for p in RepCodec(768).parameters()) == 33_033_216


@pytest.mark.parametrize("name", PUBLISHED_WIDTHS)
def test_state_shapes_of_the_published_settings(name):
    d = PUBLISHED_WIDTHS[name]
    with torch.device("meta"):
        state = {key: tuple(value.shape) for key, value in RepCodec(d).state_dict().items()}
    normalization = {"feature_mean": (d,), "feature_scale": ()}
    assert state == published_shapes(d) | normalization


def test_all_published_options_shape_the_stacks():
    codec = RepCodec(
        10, input_channels=6, output_channels=7, encode_channels=4, decode_channels=3, code_dim=5, codebook_num=2,
        codebook_size=9, bias=False, enc_ratios=(1, 2), dec_ratios=(2, 1), enc_strides=(1, 2), dec_strides=(2, 1),
        enc_kernel_size=5, dec_kernel_size=7, enc_block_dilations=(1, 3, 9), enc_block_kernel_size=5,
        dec_block_dilations=(2,), dec_block_kernel_size=7,
    )  # fmt: skip
    shapes = {name: tuple(parameter.shape) for name, parameter in codec.named_parameters()}
    assert shapes["encoder.input.weight"] == (4, 6, 5)
    assert shapes["encoder.stages.0.residuals.2.conv.weight"] == (4, 4, 5)
    assert shapes["encoder.stages.1.conv.weight"] == (8, 4, 4)
    assert shapes["encoder.projector.weight"] == (5, 8, 3)
    assert shapes["decoder.input.weight"] == (6, 5, 7)
    assert shapes["decoder.stages.0.conv.weight"] == (6, 3, 4)
    assert shapes["decoder.stages.1.conv.weight"] == (3, 3, 3)
    assert shapes["decoder.stages.1.residuals.0.conv.weight"] == (3, 3, 7)
    assert shapes["decoder.output.weight"] == (7, 3, 7)
    assert not any(name.endswith("bias") for name in shapes)
    codes = codec.encode(torch.randn(2, 9, 6))
    assert codes.shape == (2, 2, 5)
    assert codec.decode(codes, torch.tensor([9, 9])).shape == (2, 10, 7)
    assert codec.num_codebooks == 2


@pytest.mark.parametrize("wrong", [{"enc_ratios": (1,)}, {"enc_strides": (2, 1)}, {"quantizer": EMAQuantizer(3)}])
def test_options_that_do_not_fit_are_refused(wrong):
    with pytest.raises(ValueError, match=r"ratios|strides|width"):
        RepCodec(8, **wrong)


@pytest.mark.parametrize("strides", [(1, 1), (2, 3)])
def test_padded_batch_equals_single_utterances(strides):
    torch.manual_seed(0)
    codec = RepCodec(8, codebook_size=16, codebook_num=2, enc_strides=strides, dec_strides=strides[::-1]).double()
    for name, parameter in codec.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, 0, 2)
    codec.feature_mean.normal_()
    codec.feature_scale.fill_(3.0)
    features, lengths = torch.randn(3, 20, 8).double(), torch.tensor([20, 7, 1])
    codes = codec.encode(features, lengths)
    decoded = codec.decode(codes, lengths)
    output = codec(features, lengths)
    for b, length in enumerate(lengths.tolist()):
        alone = codec.encode(features[b : b + 1, :length])
        n = alone.shape[-1]
        assert n == -(-length // codec.stride)
        assert torch.equal(codes[b, :, :n], alone[0])
        assert (codes[b, :, n:] == NO_CODE).all()
        single = codec.decode(alone, torch.tensor([length]))[0, :length]
        torch.testing.assert_close(decoded[b, :length], single)
        torch.testing.assert_close(output.reconstruction[b, :length], single)
        assert (decoded[b, length:] == 0).all()
    assert torch.equal(output.quantizer.codes, codes)


def test_lengths_that_are_all_full_change_nothing(codec):
    features = torch.randn(2, 12, 8).double()
    assert torch.equal(codec.encode(features), codec.encode(features, torch.tensor([12, 12])))


def test_identity_start_makes_the_codec_a_quantizer_of_scaled_features():
    codec = RepCodec(8, codebook_size=16)
    codec.start_as_identity()
    codec.feature_mean.normal_()
    codec.feature_scale.fill_(2.0)
    features = torch.randn(1, 30, 8)
    scaled = (features - codec.feature_mean) / 2
    nearest = torch.cdist(scaled[0], codec.quantizer.codebooks[0].codes).argmin(1)
    output = codec(features)
    assert torch.equal(output.quantizer.codes[0, 0], nearest)
    expected = codec.quantizer.codebooks[0].codes[nearest] * 2 + codec.feature_mean
    torch.testing.assert_close(output.reconstruction[0], expected)


def test_gradients_reach_every_parameter(codec):
    output = codec(torch.randn(2, 9, 8).double(), torch.tensor([9, 4]))
    (output.reconstruction.square().sum() + output.quantizer.loss).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in codec.parameters())


def test_saved_codec_is_the_same_bit_for_bit(tmp_path, codec):
    codec = codec.float()
    codec.save_pretrained(tmp_path, {"encoder": "hubert_base", "layer": 9})
    loaded = RepCodec.from_pretrained(tmp_path)
    assert not loaded.training
    assert loaded.architecture == codec.architecture
    for name, value in codec.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["encoder"] == "hubert_base"
    assert config["codebook_size"] == 16
    features = torch.randn(1, 9, 8)
    assert torch.equal(codec.eval().encode(features), loaded.encode(features))


def test_strided_residual_codec_round_trips(tmp_path):
    codec = RepCodec(8, code_dim=4, enc_strides=(2, 1), dec_strides=(1, 2), quantizer=EMAQuantizer(4, 16, 3, 0.9, 0.1))
    codec.save_pretrained(tmp_path)
    loaded = RepCodec.from_pretrained(tmp_path)
    assert loaded.quantizer.config() == codec.quantizer.config()
    assert loaded.stride == 2


def test_wrong_width_is_one_sentence(codec):
    with pytest.raises(RepCodecError, match=r"width 8.*\(1, 5, 7\)"):
        codec.encode(torch.zeros(1, 5, 7).double())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "does not exist"),
        (lambda folder: (folder / "config.json").write_text("{"), "not a readable description"),
        (lambda folder: (folder / "config.json").write_text('{"kind": "repcodec"}'), "no codec this version can build"),
        (lambda folder: (folder / "config.json").write_text('{"kind": "kmeans"}'), "holds a kmeans"),
        (lambda folder: (folder / "model.safetensors").unlink(), "cannot be read"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\x08" * 50), "cannot be read"),
        (lambda folder: RepCodec(6, codebook_size=16).save_pretrained(folder / "other"), None),
    ],
)
def test_damaged_folder_is_one_sentence(tmp_path, codec, damage, message):
    codec.float().save_pretrained(tmp_path)
    damage(tmp_path)
    if message is None:  # weights of another width beside our config.json, put together by hand
        (tmp_path / "other" / "model.safetensors").replace(tmp_path / "model.safetensors")
        config = json.loads((tmp_path / "config.json").read_text())
        del config["weights_sha256"]
        (tmp_path / "config.json").write_text(json.dumps(config))
        message = "do not fit the architecture"
    with pytest.raises(RepCodecError, match=message):
        RepCodec.from_pretrained(tmp_path)


def test_features_of_another_precision_are_taken():
    torch.manual_seed(0)
    codec = RepCodec(8, codebook_size=16).eval()
    features = torch.randn(1, 20, 8).half()
    assert torch.equal(codec.encode(features), codec.encode(features.float()))
    assert torch.equal(codec.encode(features.double()), codec.encode(features.float()))


@pytest.mark.parametrize("lengths", [[9, 21], [9], [9, -1]])
def test_lengths_that_cannot_be_are_one_sentence(codec, lengths):
    with pytest.raises(RepCodecError, match="expected one for each of 2 rows, 0 to 20"):
        codec.encode(torch.randn(2, 20, 8).double(), torch.tensor(lengths))


@pytest.mark.parametrize("shape", [(4,), (1, 4), (1, 2, 4)])
def test_codes_of_another_shape_are_one_sentence(codec, shape):
    with pytest.raises(RepCodecError, match=r"decodes codes \(B, 1, N\)"):
        codec.decode(torch.zeros(shape, dtype=torch.int64))
    with pytest.raises(RepCodecError, match="code 16: the codec has codes 0 to 15"):
        codec.decode(torch.full((1, 1, 3), 16))
