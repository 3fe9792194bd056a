"""Codecs in the published format, against a plain float64 reference written from its description."""

from collections import Counter, OrderedDict
from importlib.metadata import version
from math import prod

import pytest
import torch
import yaml
from conftest import refused
from test_codec import PUBLISHED_WIDTHS as WIDTHS
from torch.nn.functional import conv1d, conv_transpose1d, elu

from repcodec.architecture import Architecture
from repcodec.checkpoint import PUBLISHED
from repcodec.codec import RepCodec
from repcodec.quantizers import NO_CODE
from repcodec.speech_encoders import encoder_table

LENGTHS = (97, 98, 100, 1)

SMALL = {
    "published shape": {},
    "halved": {"enc_strides": [2, 1], "dec_strides": [1, 2]},
    "halved first": {"enc_strides": [2, 1], "dec_strides": [2, 1]},
    "sixth": {"enc_strides": [2, 3], "dec_strides": [3, 2]},
    "third": {"enc_strides": [3], "dec_strides": [3], "enc_ratios": [2], "dec_ratios": [2]},
    "three stages": {
        "enc_strides": [1, 2, 2], "dec_strides": [4, 1, 1], "enc_ratios": [1, 2, 3], "dec_ratios": [3, 2, 1],
    },
    "residual": {"codebook_num": 3},
    "dilations": {"enc_block_dilations": [1, 3, 9], "dec_block_dilations": [2]},
    "kernels": {
        "enc_kernel_size": 5, "dec_kernel_size": 7, "enc_block_kernel_size": 5, "dec_block_kernel_size": 7,
        "enc_block_dilations": [2, 1], "dec_block_dilations": [1, 2, 3],
    },
    "ratios": {"enc_ratios": [1, 2], "dec_ratios": [3, 1]},
    "no bias": {"bias": False},
    "widths": {"output_channels": 7, "encode_channels": 9, "decode_channels": 5, "code_dim": 6},
    "all": {
        "bias": False, "enc_strides": [2, 1], "dec_strides": [1, 2], "enc_ratios": [2, 1], "dec_ratios": [2, 3],
        "codebook_num": 2, "codebook_size": 33, "code_dim": 10, "enc_block_dilations": [3], "dec_kernel_size": 5,
    },
}  # fmt: skip


def complete(dim, **given):
    """All options of a codec, those that are not given as published at width `dim`."""
    widths = ("input_channels", "output_channels", "encode_channels", "decode_channels", "code_dim")
    options = {**dict.fromkeys(widths, dim), "codebook_num": 1, "codebook_size": 1024, "bias": True}
    for side in ("enc", "dec"):
        options |= {f"{side}_ratios": [1, 1], f"{side}_strides": [1, 1], f"{side}_kernel_size": 3}
        options |= {f"{side}_block_dilations": [1, 1], f"{side}_block_kernel_size": 3}
    return options | given


def published_state(o, seed=0):
    """Random weights under the published names: large biases, the others so that activations keep their size."""
    generator = torch.Generator().manual_seed(seed)
    state = OrderedDict()

    def weight(name, *shape, fan_in):
        state[name] = torch.randn(shape, generator=generator).div_(fan_in**0.5)

    def units(prefix, width, side):
        kernel = o[f"{side}_block_kernel_size"]
        for j in range(len(o[f"{side}_block_dilations"])):
            weight(f"{prefix}.res_units.{j}.conv1.conv.weight", width, width, kernel, fan_in=width * kernel)
            weight(f"{prefix}.res_units.{j}.conv2.weight", width, width, 1, fan_in=width)

    def bias(name, width):
        if o["bias"]:
            state[name] = torch.randn(width, generator=generator) * 2

    c, d = o["encode_channels"], o["input_channels"]
    weight("encoder.conv.conv.weight", c, d, o["enc_kernel_size"], fan_in=d * o["enc_kernel_size"])
    before = c
    for i, (ratio, stride) in enumerate(zip(o["enc_ratios"], o["enc_strides"], strict=True)):
        units(f"encoder.conv_blocks.{i}", before, "enc")
        kernel = 3 if stride == 1 else 2 * stride
        weight(f"encoder.conv_blocks.{i}.conv.conv.weight", c * ratio, before, kernel, fan_in=before * kernel)
        bias(f"encoder.conv_blocks.{i}.conv.conv.bias", c * ratio)
        before = c * ratio
    weight("projector.project.conv.weight", o["code_dim"], before, 3, fan_in=before * 3)
    for k in range(o["codebook_num"]):
        prefix, shape = f"quantizer.codebook.layers.{k}", (o["code_dim"], o["codebook_size"])
        state[f"{prefix}.embed"] = torch.randn(shape, generator=generator) * 3 / 2**k
        state[f"{prefix}.cluster_size"] = torch.rand(o["codebook_size"], generator=generator)
        state[f"{prefix}.embed_avg"] = state[f"{prefix}.embed"] * state[f"{prefix}.cluster_size"]
    c, d = o["decode_channels"], o["output_channels"]
    before = c * o["dec_ratios"][0]
    kernel = o["dec_kernel_size"]
    weight("decoder.conv1.conv.weight", before, o["code_dim"], kernel, fan_in=o["code_dim"] * kernel)
    for i, (ratio, stride) in enumerate(zip([*o["dec_ratios"][1:], 1], o["dec_strides"], strict=True)):
        prefix, after = f"decoder.conv_blocks.{i}", c * ratio
        if stride == 1:
            weight(f"{prefix}.conv.conv.weight", after, before, 3, fan_in=before * 3)
        else:  # every output sees two inputs
            weight(f"{prefix}.conv.deconv.weight", before, after, 2 * stride, fan_in=before * 2)
        bias(f"{prefix}.conv.{'conv' if stride == 1 else 'deconv'}.bias", after)
        units(prefix, after, "dec")
        before = after
    weight("decoder.conv2.conv.weight", d, before, o["dec_kernel_size"], fan_in=before * o["dec_kernel_size"])
    return state


def write_published(path, state, optimizer=None):
    """A file of the published layout."""
    schedule = {"milestones": Counter([100]), "gamma": 0.5, "last_epoch": 7, "_last_lr": [1e-4]}
    rest = {"optimizer": {"repcodec": optimizer or {}}, "scheduler": {"repcodec": schedule}, "steps": 7, "epochs": 1}
    torch.save({"model": {"repcodec": state}, **rest}, path)
    return path


class Reference:
    """The published codec in float64: one utterance, the whole of it, convolutions as torch has them."""

    def __init__(self, state, o):
        self.w, self.o = {name: value.double() for name, value in state.items()}, o

    def conv(self, x, name, dilation=1, stride=1):
        weight = self.w[f"{name}.weight"]
        padding = (weight.shape[-1] - 1) // 2 * dilation
        return conv1d(x, weight, self.w.get(f"{name}.bias"), stride, padding, dilation)

    def units(self, x, prefix, side):
        for j, dilation in enumerate(self.o[f"{side}_block_dilations"]):
            inner = self.conv(elu(x), f"{prefix}.res_units.{j}.conv1.conv", dilation)
            x = x + self.conv(elu(inner), f"{prefix}.res_units.{j}.conv2")
        return x

    def vectors(self, features):
        """(T, D) -> what is quantized, (N, C)."""
        x = self.conv(features.double().T[None], "encoder.conv.conv")
        for i, stride in enumerate(self.o["enc_strides"]):
            x = self.units(x, f"encoder.conv_blocks.{i}", "enc")
            x = self.conv(x, f"encoder.conv_blocks.{i}.conv.conv", stride=stride)
        return self.conv(x, "projector.project.conv")[0].T

    def check_codes(self, z, codes):
        """Vectors (N, C) and the codes (K, N) that somebody chose -> how many are not the nearest, but as near.

        Codes further away fail. Each codebook sees what the codes chosen before it left over.
        """
        residual, ties = z, 0
        assert len(codes) == self.o["codebook_num"]
        for k, chosen in enumerate(codes):
            embed = self.w[f"quantizer.codebook.layers.{k}.embed"].T.contiguous()
            distances = torch.stack([(row - embed).square().sum(1) for row in residual])
            nearest, at = distances.min(1)
            differ = at != chosen
            away = distances.gather(1, chosen[:, None])[:, 0]
            assert (away[differ] - nearest[differ] < 1e-5 * nearest[differ]).all()
            ties += int(differ.sum())
            residual = residual - embed[chosen]
        return ties

    def features(self, codes):
        """Codes (K, N) -> (N * stride, D)."""
        vectors = sum(self.w[f"quantizer.codebook.layers.{k}.embed"].T[chosen] for k, chosen in enumerate(codes))
        x = self.conv(vectors.T[None], "decoder.conv1.conv")
        for i, stride in enumerate(self.o["dec_strides"]):
            prefix = f"decoder.conv_blocks.{i}"
            if stride == 1:
                x = self.conv(x, f"{prefix}.conv.conv")
            else:
                weight, bias = self.w[f"{prefix}.conv.deconv.weight"], self.w.get(f"{prefix}.conv.deconv.bias")
                x = conv_transpose1d(x, weight, bias, stride, (stride + 1) // 2, stride % 2)
            x = self.units(x, prefix, "dec")
        return self.conv(x, "decoder.conv2.conv")[0].T


def num_codes(length, strides):
    for stride in strides:
        if stride > 1:
            length = (length - 2) // stride + 1 if length >= 2 else 0
    return length


def check(codec, state, o, lengths=LENGTHS, alone=True):
    """The codec's codes and features are those of the reference; utterances alone and in a padded batch."""
    reference, strides = Reference(state, o), o["enc_strides"]
    utterances = [torch.randn(length, o["input_channels"]) * 3 for length in lengths]
    batch = torch.full((len(lengths), max(lengths), o["input_channels"]), 1e3)
    for row, utterance in zip(batch, utterances, strict=True):
        row[: len(utterance)] = utterance
    together = codec.encode(batch, torch.tensor(lengths))
    decoded = codec.decode(together)
    ties = total = 0
    used = set()
    for b, utterance in enumerate(utterances):
        n = num_codes(len(utterance), strides)
        assert (together[b, :, n:] == NO_CODE).all()
        assert (decoded[b, n * codec.stride :] == 0).all()
        if n == 0:
            codes = codec.encode(utterance[None])
            assert codes.shape == (1, o["codebook_num"], 0)
            assert codec.decode(codes).shape == (1, 0, o["output_channels"])
            continue
        z = reference.vectors(utterance)
        assert len(z) == n
        runs = [(together[b, :, :n], decoded[b, : n * codec.stride])]
        if alone:
            codes = codec.encode(utterance[None])
            assert codes.shape == (1, o["codebook_num"], n)
            runs.append((codes[0], codec.decode(codes)[0]))
        checked = None
        for codes, features in runs:
            if checked is None or not torch.equal(codes, checked):
                checked, expected = codes, reference.features(codes)
                ties += reference.check_codes(z, codes)
                total += codes.numel()
                used |= set(codes[0].tolist())
            assert len(expected) == n * prod(strides)
            torch.testing.assert_close(features.double(), expected, rtol=1e-4, atol=1e-4 * float(expected.std()))
    assert ties <= 0.01 * total
    assert len(used) > 10, "a reference that always chooses the same codes says nothing"


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("dim", [768, *(pytest.param(dim, marks=pytest.mark.slow) for dim in (1024, 1280))])
def test_published_settings_equal_the_reference(tmp_path, dim):
    o = complete(dim)
    state = published_state(o)
    path = write_published(tmp_path / "codec.pkl", state)
    names = [name for name in PUBLISHED if WIDTHS[name] == dim]
    for name in names:
        path = path.rename(tmp_path / f"{name}.pkl")
        codec = RepCodec.from_published(path)
        encoder, layer = PUBLISHED[name]
        spec = encoder_table()[encoder]
        assert (spec.dim, spec.layer) == (dim, layer)
        assert codec.about == {
            "encoder": encoder, "layer": layer, "frame_rate": 50, "waveform_norm": spec.waveform_norm,
            "feature_norm": False, "source": f"{name}.pkl", "repcodec_version": version("repcodec"),
        }  # fmt: skip
        assert not codec.training
        assert codec.architecture == Architecture(dim)
    path.unlink()
    check(codec, state, o, alone=dim == 768)


@pytest.mark.parametrize("name", SMALL)
def test_other_shapes_equal_the_reference(tmp_path, name):
    o = complete(8, **({"codebook_size": 64} | SMALL[name]))
    state = published_state(o)
    path = write_published(tmp_path / "mine.pkl", state)
    codec = RepCodec.from_published(path, {"model_params": {"input_channels": 8, "codebook_size": 64} | SMALL[name]})
    assert codec.architecture.pad_to_stride == (codec.stride == 1)
    assert codec.about == {
        "frame_rate": 50, "feature_norm": False, "source": "mine.pkl", "repcodec_version": version("repcodec")
    }  # fmt: skip
    check(codec, state, o, lengths=(97, 98, 100, 1, 2, 5003))


@pytest.mark.parametrize(("stride", "length", "expected"), [(2, 97, 96), (2, 98, 98), (3, 98, 99), (3, 97, 96)])
def test_number_of_frames_is_as_published(tmp_path, stride, length, expected):
    given = {"enc_strides": [stride, 1], "dec_strides": [1, stride]}
    path = write_published(tmp_path / "mine.pkl", published_state(complete(8, **given)))
    codec = RepCodec.from_published(path, {"model_params": given})
    codes = codec.encode(torch.randn(1, length, 8))
    assert codes.shape[-1] == (length - 2) // stride + 1
    assert codec.decode(codes).shape == (1, expected, 8)


def test_config_is_a_yaml_file_and_what_it_leaves_out_is_as_published(tmp_path):
    given = {"enc_strides": [2, 1], "dec_strides": [2, 1]}
    state = published_state(complete(768, **given))
    path = write_published(tmp_path / "hubert_base_l9.pkl", state)
    (tmp_path / "train.yaml").write_text(yaml.safe_dump({"lr": 1e-4, "model_params": given}))
    codec = RepCodec.from_published(str(path), tmp_path / "train.yaml")
    assert codec.architecture == Architecture(768, **given, pad_to_stride=False)
    assert (codec.about["encoder"], codec.about["layer"]) == ("hubert_base", 9)
    with refused(path, "2 unexpected, such as decoder.conv_blocks.0.conv.deconv.bias", "training config"):
        RepCodec.from_published(path)


TINY = {"input_channels": 8, "codebook_size": 16}


@pytest.fixture
def tiny(tmp_path):
    """A small file of the published layout, saved with its optimizer's state as training leaves it."""
    state = published_state(complete(8, **TINY))
    parameters = [torch.nn.Parameter(value.clone()) for value in state.values()]
    optimizer = torch.optim.Adam(parameters, 1e-4, betas=(0.5, 0.9))
    sum(parameter.sum() for parameter in parameters).backward()
    optimizer.step()
    return write_published(tmp_path / "tiny.pkl", state, optimizer.state_dict())


def load_tiny(path):
    return RepCodec.from_published(path, {"model_params": TINY})


@pytest.mark.parametrize("zipped", [True, False])
def test_codebooks_are_transposed_and_saving_changes_nothing(tmp_path, tiny, zipped):
    loaded = torch.load(tiny, weights_only=True)
    torch.save(loaded, tiny, _use_new_zipfile_serialization=zipped)
    codec, state = load_tiny(tiny), loaded["model"]["repcodec"]
    book, prefix = codec.quantizer.codebooks[0], "quantizer.codebook.layers.0"
    assert torch.equal(book.codes, state[f"{prefix}.embed"].T)
    assert torch.equal(book.counts, state[f"{prefix}.cluster_size"])
    assert torch.equal(book.sums, state[f"{prefix}.embed_avg"].T)
    assert codec.quantizer.config() == {"codebook_size": 16, "num_codebooks": 1, "decay": 0.8, "revive_below": 0.0}
    codec.save_pretrained(tmp_path / "saved")
    saved = RepCodec.from_pretrained(tmp_path / "saved")
    assert saved.config() == codec.config()
    assert saved.state_dict().keys() == codec.state_dict().keys()
    for name, value in codec.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(saved.state_dict()[name], value)
    features = torch.randn(1, 50, 8)
    assert torch.equal(saved.encode(features), codec.encode(features))
    assert all(parameter.requires_grad for parameter in codec.parameters())


def test_half_precision_weights_make_a_float32_codec(tiny):
    loaded = torch.load(tiny, weights_only=True)
    state = loaded["model"]["repcodec"]
    for name, value in state.items():
        state[name] = value.half()
    torch.save(loaded, tiny)
    assert load_tiny(tiny).encode(torch.randn(1, 5, 8)).shape == (1, 1, 5)
