"""Published checkpoints that are damaged, hostile or of something else: one sentence, and nothing of them is run."""

# ruff: noqa: F811  # fixtures are imported, and parameters have their names

import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import refused
from test_published import TINY, WIDTHS, load_tiny, seed, tiny, write_published  # noqa: F401  (seed and tiny: fixtures)

from repcodec.architecture import Architecture
from repcodec.checkpoint import PUBLISHED
from repcodec.codec import RepCodec
from repcodec.shards import FeatureShards


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
    with refused(path, "cut off", "another copy"):
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
