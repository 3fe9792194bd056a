"""Readers of codecs, checkpoints and what runs keep, given damaged files and files that lie."""

import io
import json

import numpy as np
import pytest
import torch
import yaml
from fuzzing import Reader, check, lying_json, some
from hypothesis import given
from hypothesis import strategies as st
from test_published import complete, published_state

from repcodec.checkpointing import find_checkpoint, read_checkpoint
from repcodec.codec import RepCodec
from repcodec.info import describe_path
from repcodec.kmeans import KMeansTokenizer
from repcodec.logs import read_table, read_validations
from repcodec.results import Result, Row, load_result, save_result
from repcodec.sweeps import _jobs

DIM = 4
KEY = {"name": "RepCodec 8", "split": "test"}


def read_codec(folder):
    describe_path(folder)
    codec = RepCodec.from_pretrained(folder)
    codec.encode(torch.zeros(1, 3, codec.dim, dtype=codec.feature_mean.dtype))


def read_kmeans(folder):
    describe_path(folder)
    KMeansTokenizer.from_pretrained(folder).config()


def read_run(folder):
    start = find_checkpoint("last", folder)
    assert start is not None
    assert start.best >= 0 and start.step >= 0
    start.check_fits(RepCodec(DIM, codebook_size=8), "hubert_base", 9)


def read_result(folder):
    found = load_result(folder / "r.json", KEY)
    if found is not None:
        Row(**found.row.as_dict())
        assert found.usage.ndim == 2


def files_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def without_hash(folder):
    """A saved folder whose config.json says nothing of its weights, so that damaged ones are looked at."""
    files = files_of(folder)
    config = json.loads(files["config.json"])
    del config["weights_sha256"]
    return files | {"config.json": json.dumps(config).encode()}


def headers(whole):
    """Weights whose header says something else."""
    size = int.from_bytes(whole[:8], "little")
    lies = lying_json(whole[8 : 8 + size].decode()).map(lambda text: text.encode(errors="surrogatepass"))
    return lies.map(lambda head: len(head).to_bytes(8, "little") + head + whole[8 + size :])


def packed(value):
    file = io.BytesIO()
    np.savez_compressed(file, **value)
    return file.getvalue()


ARRAYS = [
    np.ones((1, 8)),
    np.ones((1, 8), object),
    np.ones(8),
    np.zeros((0, 8)),
    np.array(["a"] * 8)[None],
    np.ones((1, 9)),
]
"""Counts of a result: one is what it should be; objects are pickles."""


@pytest.fixture(scope="module")
def readers(tmp_path_factory):
    """Every reader, by the name it has here."""
    made = tmp_path_factory.mktemp("whole")
    about = {"encoder": "hubert_base", "layer": 9, "frame_rate": 50, "figures": {"normalized_error": 0.5}}
    codec = RepCodec(DIM, codebook_size=8)
    codec.save_pretrained(made / "codec", about)
    KMeansTokenizer(torch.randn(6, DIM)).save_pretrained(made / "kmeans", about)
    options = complete(DIM, codebook_size=8)
    torch.save({"model": {"repcodec": published_state(options)}, "steps": 3}, made / "tiny.pkl")
    (made / "config.yaml").write_text(yaml.safe_dump({"model_params": options, "batch_size": 32}))
    state = {
        "state_dict": {f"codec.{name}": value for name, value in codec.state_dict().items()},
        "optimizer_states": [], "lr_schedulers": [], "loops": {}, "global_step": 3,
        "codec": {**codec.config(), "encoder": "hubert_base", "layer": 9},
        "run": {"best": [(0.5, 3)], "random_states": [{}], "train_usage": torch.zeros(1, 8)},
    }  # fmt: skip
    torch.save(state, made / "last.ckpt")
    torch.save({**state, "global_step": 2}, made / "previous.ckpt", _use_new_zipfile_serialization=False)
    row = Row("RepCodec 8", 1, 8, 0.5, intervals={"pnmi": (0.1, 0.2)}, warnings=["few"], phone_error_rates=[0.3])
    save_result(Result(row, np.ones((1, 8), int), np.ones((3, 8), int), [(10, 0.5)]), made / "kept" / "r.json", KEY)
    job = {"overrides": ["quantizer.codebook_size=8"], "status": "finished", "error": 0.5, "sentence": None}
    codec_files, pickle, ckpt = without_hash(made / "codec"), (made / "tiny.pkl").read_bytes(), (made / "last.ckpt")
    described = {"model_params": options}
    names = st.dictionaries(st.sampled_from(["usage", "joint", "x"]), st.sampled_from(ARRAYS), min_size=1)
    counts = names.map(packed)
    config = (made / "config.yaml").read_bytes()
    return {
        "config.json": Reader(codec_files, ("config.json",), read_codec),
        "model.safetensors": Reader(
            codec_files, ("model.safetensors",), read_codec,
            {"model.safetensors": headers(codec_files["model.safetensors"])},
        ),
        "kmeans": Reader(without_hash(made / "kmeans"), ("config.json", "model.safetensors"), read_kmeans),
        "published.pkl": Reader(
            {"tiny.pkl": pickle}, ("tiny.pkl",), lambda at: RepCodec.from_published(at / "tiny.pkl", described)
        ),
        "training config": Reader(
            {"tiny.pkl": pickle, "config.yaml": config}, ("config.yaml",),
            lambda at: RepCodec.from_published(at / "tiny.pkl", at / "config.yaml"),
        ),
        "lightning.ckpt": Reader(
            {"last.ckpt": ckpt.read_bytes()}, ("last.ckpt",), lambda at: RepCodec.from_lightning(at / "last.ckpt")
        ),
        "run.ckpt": Reader(
            {"last.ckpt": ckpt.read_bytes()}, ("last.ckpt",), lambda at: read_checkpoint(at / "last.ckpt")
        ),
        "last.ckpt falls back": Reader(
            {name: (made / name).read_bytes() for name in ("last.ckpt", "previous.ckpt")},
            ("last.ckpt", "previous.ckpt"), read_run,
        ),
        "kept result": Reader(files_of(made / "kept"), ("r.json", "r.npz"), read_result, {"r.npz": counts}),
        "sweep": Reader(
            {"0/job.json": json.dumps(job).encode(), "1/job.json": json.dumps(job).encode()}, ("0/job.json",), _jobs
        ),
        "validations.csv": Reader(
            {"v.csv": b"step,normalized_error\n0,1.0\n10,0.5\n"}, ("v.csv",), lambda at: read_validations(at / "v.csv")
        ),
        "metrics.csv": Reader(
            {"m.csv": b"epoch,step,loss\n0,0,1.0\n0,10,0.5\n"}, ("m.csv",), lambda at: read_table(at / "m.csv", 10)
        ),
    }  # fmt: skip


NAMES = [
    "config.json", "model.safetensors", "kmeans", "published.pkl", "training config", "lightning.ckpt", "run.ckpt",
    "last.ckpt falls back", "kept result", "sweep", "validations.csv", "metrics.csv",
]  # fmt: skip


def test_every_reader_is_here(readers):
    assert list(readers) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_whole_files_are_read(readers, name, tmp_path):
    readers[name].write(tmp_path)
    readers[name].read(tmp_path)


@pytest.mark.parametrize("name", NAMES)
@some
@given(data=st.data())
def test_damaged_files_end_in_a_value_or_a_sentence(readers, name, data, tmp_path_factory):
    file, content = data.draw(readers[name].strategy)
    check(readers[name], file, content, tmp_path_factory.getbasetemp() / "damaged")
