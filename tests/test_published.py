"""Codecs in the published format, against a plain float64 reference written from its description."""

import os
import pickle
import zipfile
from collections import Counter, OrderedDict
from importlib.metadata import version
from math import prod
from pathlib import Path

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
from repcodec.shards import FeatureShards
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


@pytest.mark.parametrize("dim", sorted(set(WIDTHS.values())))
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


class RunsCode:
    """Unpickled, it makes a file."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


class OwnClass:
    pass


def write_pickle(value, path, protocol):
    if protocol in ("zip", "legacy"):
        torch.save(value, path, _use_new_zipfile_serialization=protocol == "zip")
    else:
        path.write_bytes(pickle.dumps(value, protocol))


LOADERS = {".pkl": load_tiny, ".ckpt": RepCodec.from_lightning}


@pytest.mark.parametrize("suffix", LOADERS)
@pytest.mark.parametrize("protocol", ["zip", "legacy", 0, 2, 4])
@pytest.mark.parametrize("place", ["top", "beside the weights", "among the weights"])
def test_hostile_pickles_are_not_run(tmp_path, tiny, suffix, protocol, place):
    evil, path = RunsCode(tmp_path / "mark"), tmp_path / f"hubert_base_l9{suffix}"
    loaded = torch.load(tiny, weights_only=True)
    loaded["state_dict"] = {f"codec.{name}": value for name, value in loaded["model"]["repcodec"].items()}
    if place == "top":
        loaded = evil
    elif place == "beside the weights":
        loaded = {"hook": evil, **loaded}
    else:
        loaded["model"]["repcodec"]["encoder.conv.conv.weight"] = loaded["state_dict"]["codec.x"] = evil
    write_pickle(loaded, path, protocol)
    with refused(path) as caught:
        LOADERS[suffix](path)
    assert not (tmp_path / "mark").exists()
    message = str(caught.value)
    assert "weights_only" not in message and "\n" not in message
    if protocol in ("zip", "legacy"):
        assert "could run code" in message and "system" in message


@pytest.mark.parametrize("suffix", LOADERS)
def test_unknown_classes_are_named(tmp_path, suffix):
    torch.save({"model": OwnClass()}, tmp_path / f"tiny{suffix}")
    with refused(tmp_path / f"tiny{suffix}", "OwnClass", "could run code"):
        LOADERS[suffix](tmp_path / f"tiny{suffix}")


@pytest.mark.parametrize("suffix", LOADERS)
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("share", [0.01, 0.5, 0.9, 0.9999])
def test_cut_off_files_are_one_sentence(tmp_path, tiny, suffix, zipped, share):
    path = tmp_path / f"cut{suffix}"
    torch.save(torch.load(tiny, weights_only=True), path, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with refused(path, "cut off", "copy it again"):
        LOADERS[suffix](path)


@pytest.mark.parametrize("suffix", LOADERS)
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "damaged"),
        (b"hello\n", "damaged"),
        (b"<!DOCTYPE html><html></html>", "another kind"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n", "another kind"),
        (b"\x80\x02\xff" * 100, "another kind"),
        (b"PK\x03\x04" + b"\0" * 500, "another kind"),
        (b"\0" * 10240, "another kind"),
        (pickle.dumps({"model": {}}, 2), "another kind"),
        (pickle.dumps(3, 4), "another kind"),
        ("folder", "is a folder"),
        ("missing", "does not exist"),
        ("unreadable", "Permission denied"),
    ],
)
def test_what_is_no_checkpoint_is_one_sentence(tmp_path, suffix, content, message):
    path = tmp_path / f"hubert_base_l9{suffix}"
    if content == "folder":
        path.mkdir()
    elif content == "unreadable":
        path.write_bytes(b"")
        path.chmod(0)
        if os.access(path, os.R_OK):
            pytest.skip("root reads every file")
    elif content != "missing":
        path.write_bytes(content)
    with refused(path, message) as caught:
        LOADERS[suffix](path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "found none"),
        (torch.zeros(3), "found none"),
        ({}, "found none"),
        ({"model": None}, "found none"),
        ({"model": {"other": {}}}, "found none"),
        ({"model": {"repcodec": []}}, "found none"),
        ({"model": {"repcodec": {}}}, "found none"),
        ({"model": {"repcodec": {"encoder.conv.conv.weight": 3}}}, "found none"),
        ({"model": {"repcodec": {"encoder.conv.conv.weight": torch.zeros(3)}}}, "found none"),
        ({"model": {"repcodec": {"encoder.conv.conv.weight": torch.zeros(8, 8, 3)}}}, "missing, such as decoder.conv1"),
        ({"state_dict": {}}, "Lightning checkpoint, whose suffix is .ckpt"),
    ],
)
def test_another_structure_is_one_sentence(tmp_path, content, message):
    torch.save(content, tmp_path / "tiny.pkl")
    with refused(tmp_path / "tiny.pkl", message):
        load_tiny(tmp_path / "tiny.pkl")


BIAS, EMBED = "decoder.conv_blocks.1.conv.conv.bias", "quantizer.codebook.layers.0.embed"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda state: state.pop(BIAS), f"(1 missing, such as {BIAS})"),
        (lambda state: state.update(extra=torch.zeros(1)), "(1 unexpected, such as extra)"),
        (lambda state: state.update({3: torch.zeros(1)}), "(1 unexpected, such as 3)"),
        (lambda state: state.update(new=state.pop(BIAS)), f"1 missing, such as {BIAS}; 1 unexpected, such as new"),
        (lambda state: state[BIAS].fill_(float("nan")), "not finite"),
        (lambda state: state[EMBED].mul_(float("inf")), "codes holds values that are not finite"),
        (lambda state: state.update({BIAS: "text"}), f"{BIAS} is no tensor of weights (found str)"),
        (lambda state: state.update({BIAS: torch.zeros(8).long()}), "found torch.int64"),
        (lambda state: state.update({BIAS: torch.zeros(8, device="meta")}), "no tensor of weights"),
        (lambda state: state.update({BIAS: torch.zeros(8).to_sparse()}), "no tensor of weights"),
        (lambda state: state.update({BIAS: torch.zeros(9)}), "shape (9,), but the architecture described has (8,)"),
        (lambda state: state.update({BIAS: torch.zeros(1).expand(10**7, 10**7)}), "has shape (10000000, 10000000)"),
        (lambda state: state.update({EMBED: torch.zeros(8)}), "has shape (8,)"),
        (lambda state: state.update({EMBED: torch.zeros(16, 8)}), "has shape (8, 16)"),
    ],
)
def test_bad_weights_are_one_sentence(tiny, damage, message):
    loaded = torch.load(tiny, weights_only=True)
    damage(loaded["model"]["repcodec"])
    torch.save(loaded, tiny)
    with refused(tiny, message):
        load_tiny(tiny)


def test_weights_that_share_memory_are_taken_apart(tmp_path, tiny):
    loaded = torch.load(tiny, weights_only=True)
    state = loaded["model"]["repcodec"]
    state["decoder.conv2.conv.weight"] = state["decoder.conv1.conv.weight"]
    torch.save(loaded, tiny)
    load_tiny(tiny).save_pretrained(tmp_path / "saved")


def test_a_name_that_tells_nothing_lists_the_six_and_the_option(tiny):
    with refused(tiny, *PUBLISHED, "(config)"):
        RepCodec.from_published(tiny)


def test_only_the_last_suffix_is_left_out_of_the_name(tiny):
    path = tiny.rename(tiny.with_name("hubert_base_l9.pkl.pkl"))
    with refused(path, "its name is none of"):
        RepCodec.from_published(path)


@pytest.mark.parametrize(
    ("name", "width", "message"),
    [
        ("hubert_base_l9", 1024, "width 768, but these weights take 1024, which fits hubert_large_l18 or data2vec_"),
        ("hubert_large_l18", 1280, "which fits whisper_large_l32: name"),
        ("whisper_large_l32", 768, "which fits hubert_base_l9 or data2vec_base_l6: name"),
        ("whisper_large_l32", 512, "which fits none of the six: give its training config"),
    ],
)
def test_weights_of_another_setting_say_which_it_fits(tmp_path, name, width, message):
    state = {"encoder.conv.conv.weight": torch.zeros(1).expand(width, width, 3)}
    with refused(write_published(tmp_path / f"{name}.pkl", state), message):
        RepCodec.from_published(tmp_path / f"{name}.pkl")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "not a readable YAML file"),
        ("a: !!python/object/apply:os.system ['true']", "not a readable YAML file"),
        ("\xff", "not a readable YAML file"),
        ("[" * 2_000, "not a readable YAML file"),
        ("", "with model_params, found none"),
        ("- 1", "with model_params, found none"),
        ("lr: 1", "with model_params, found none"),
        ("model_params:", "with model_params, found none"),
        ("model_params: {stride: 2, enc_strides: [2, 1], 3: 4}", "unknown options (stride, 3)"),
        ("model_params: {pad_to_stride: true}", "unknown options (pad_to_stride)"),
        ("model_params: {bias: 1}", "bias is 1, expected true or false"),
        ("model_params: {input_channels: true}", "input_channels is True, expected a number from 1 up"),
        ("model_params: {code_dim: 0}", "code_dim is 0, expected a number"),
        ("model_params: {codebook_num: 1.5}", "codebook_num is 1.5"),
        ("model_params: {codebook_size: many}", "codebook_size is 'many'"),
        ("model_params: {enc_strides: 2}", "enc_strides is 2, expected a list"),
        ("model_params: {enc_ratios: [1, 0]}", "enc_ratios is [1, 0], expected a list"),
        ("model_params: {enc_strides: [2, 1]}", "same product"),
        ("model_params: {enc_strides: [1]}", "as many ratios as strides"),
        ("model_params: {dec_kernel_size: 4}", "kernel size 4"),
    ],
)
def test_bad_training_config_is_one_sentence(tmp_path, tiny, text, message):
    config = tmp_path / "train.yaml"
    config.write_bytes(text.encode("latin-1"))
    with refused(config, message) as caught:
        RepCodec.from_published(tiny, config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("where", ["missing.yaml", "."])
def test_a_config_that_is_no_file_is_one_sentence(tmp_path, tiny, where):
    with refused(tmp_path / where, "not a readable YAML file"):
        RepCodec.from_published(tiny, tmp_path / where)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"codebook_size": 17}, "has shape (16, 8), but the architecture described has (17, 8)"),
        ({"codebook_num": 2}, "missing, such as quantizer.codebook.layers.1"),
        ({"bias": False}, "unexpected, such as decoder.conv_blocks.0.conv.conv.bias"),
        ({"enc_block_kernel_size": 5}, "has shape (8, 8, 3), but the architecture described has (8, 8, 5)"),
        ({"enc_block_dilations": [1]}, "unexpected, such as encoder.conv_blocks.0.res_units.1"),
        ({"input_channels": 9}, "has shape"),
        ({"enc_ratios": [2**20, 1]}, "describes no codec"),
    ],
)
def test_a_config_of_another_codec_is_one_sentence(tiny, options, message):
    with refused(tiny, message):
        RepCodec.from_published(tiny, {"model_params": TINY | options})


@pytest.mark.published
@pytest.mark.parametrize("name", PUBLISHED)
def test_real_published_files(request, tmp_path, name):
    """FOLDER holds NAME.pkl and, where there are some, features in NAME/ and their published tokens in NAME.tokens."""
    folder = request.config.getoption("--published")
    if folder is None:
        pytest.skip("needs published checkpoints: pytest -m published --published FOLDER")
    path = Path(folder, f"{name}.pkl")
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    codec = RepCodec.from_published(path)
    assert codec.architecture == Architecture(WIDTHS[name])
    codec.save_pretrained(tmp_path)
    saved = RepCodec.from_pretrained(tmp_path)
    assert all(torch.equal(saved.state_dict()[key], value) for key, value in codec.state_dict().items())
    if not path.with_suffix("").is_dir():
        pytest.skip(f"{path} loads; without features in {path.with_suffix('')}/ its codes are not compared")
    shards = FeatureShards(path.with_suffix(""), codec.dim)
    utterances = [torch.tensor(shards.features(i), dtype=torch.float32) for i in range(len(shards))]
    codes = [codec.encode(features[None])[0, 0].tolist() for features in utterances]
    assert [len(row) for row in codes] == shards.lengths.tolist()
    if not path.with_suffix(".tokens").is_file():
        pytest.skip(f"{path} encodes; without {path.with_suffix('.tokens')} its codes are not compared")
    lines = path.with_suffix(".tokens").read_text(encoding="utf-8").splitlines()[1:]  # the first is the audio root
    assert len(lines) == len(codes)
    names = [line.split("\t")[0] for line in lines]
    if shards.names is not None:
        assert names == shards.names
    published = [[int(code) for code in line.split("\t")[1].split()] for line in lines]
    assert [name for name, own, theirs in zip(names, codes, published, strict=True) if own != theirs] == []


def test_names_of_the_published_state_dict_are_those_of_the_description(tmp_path):
    """Written out once, as facts.md lists them, so that reader and test files cannot agree on a wrong name."""
    d = 4
    shapes = {"encoder.conv.conv.weight": (d, d, 3), "projector.project.conv.weight": (d, d, 3)}
    shapes |= {"decoder.conv1.conv.weight": (d, d, 3), "decoder.conv2.conv.weight": (d, d, 3)}
    for i in (0, 1):
        for j in (0, 1):
            for side in ("encoder", "decoder"):
                shapes[f"{side}.conv_blocks.{i}.res_units.{j}.conv1.conv.weight"] = (d, d, 3)
                shapes[f"{side}.conv_blocks.{i}.res_units.{j}.conv2.weight"] = (d, d, 1)
        for side in ("encoder", "decoder"):
            shapes |= {
                f"{side}.conv_blocks.{i}.conv.conv.weight": (d, d, 3),
                f"{side}.conv_blocks.{i}.conv.conv.bias": (d,),
            }
    shapes |= {"quantizer.codebook.layers.0.embed": (d, 6), "quantizer.codebook.layers.0.embed_avg": (d, 6)}
    shapes["quantizer.codebook.layers.0.cluster_size"] = (6,)
    state = {name: torch.randn(shape) for name, shape in shapes.items()}
    torch.save({"model": {"repcodec": state}, "steps": 1, "epochs": 1}, tmp_path / "a.pkl")
    codec = RepCodec.from_published(
        tmp_path / "a.pkl",
        {
            "model_params": {
                "input_channels": d,
                "output_channels": d,
                "encode_channels": d,
                "decode_channels": d,
                "code_dim": d,
                "codebook_size": 6,
            }
        },
    )
    unit = codec.encoder.stages[1].residuals[0]
    assert torch.equal(unit.pointwise.weight, state["encoder.conv_blocks.1.res_units.0.conv2.weight"])
    assert torch.equal(codec.quantizer.codebooks[0].codes, state["quantizer.codebook.layers.0.embed"].T)


def zip_that_unpacks_to_more(path):
    """A checkpoint whose pickle is packed, and a thousand times as long."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as parts:
        parts.writestr("tiny/data.pkl", b"\x80\x02" + b"0" * 10_000_000)
        parts.writestr("tiny/version", "3")


def endless(path):
    """A tiny checkpoint whose description of the codec is lists that hold one another a thousand million times."""
    loaded = torch.load(path, weights_only=True)
    value = ["codec"]
    for _ in range(9):
        value = [value] * 10
    loaded["codec"] = {"kind": value}
    torch.save(loaded, path)


@pytest.mark.parametrize("suffix", LOADERS)
@pytest.mark.parametrize(("lie", "message"), [(zip_that_unpacks_to_more, "another kind"), (endless, "plain values")])
def test_small_files_that_would_fill_the_memory_are_refused(tmp_path, tiny, suffix, lie, message):
    loaded = torch.load(tiny, weights_only=True)
    loaded["state_dict"] = {f"codec.{name}": value for name, value in loaded["model"]["repcodec"].items()}
    path = tmp_path / f"tiny{suffix}"
    torch.save(loaded | {"codec": {}}, path)
    lie(path)
    assert path.stat().st_size < 1_000_000
    if suffix == ".pkl" and lie is endless:
        load_tiny(path)  # it reads no description
    else:
        with refused(path, message):
            LOADERS[suffix](path)


@pytest.mark.parametrize(
    "text",
    [
        "model_params: {code_dim: !!int ''}",
        "model_params: {code_dim: !!bool maybe}",
        "model_params: {code_dim: !!timestamp x}",
        "a: &a [1]\nmodel_params: {enc_strides: *a}",
        "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{f'*a{i - 1}, ' * 10}]\n" for i in range(1, 10)) + "model_params: *a9",
        "a" * 200_000,
        "[" * 50_000,
    ],
)
def test_a_training_config_that_is_none_is_one_sentence(tmp_path, tiny, text):
    (tmp_path / "config.yaml").write_text(text)
    with refused(tmp_path / "config.yaml", "not a readable YAML file"):
        RepCodec.from_published(tiny, tmp_path / "config.yaml")
