"""Small real shards and codecs, made by the project's own code."""

import os
import subprocess
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from repcodec.codec import RepCodec
from repcodec.errors import RepCodecError
from repcodec.shard_writer import write_shard

if "PYTEST_XDIST_WORKER" in os.environ:
    # Several test processes with several threads each hinder one another; what they start inherits this too.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)

DIM = 8
FAST_CODEC = ["encoder.dim=8", "quantizer.codebook_size=16"]


os.environ["WANDB_MODE"] = "offline"  # whoever runs the tests may be logged in


LONG = (
    "test_comparison", "test_extraction_stops", "test_train", "test_config", "test_notebooks", "test_commands",
    "test_resume", "test_hub", "test_ranks", "test_imports", "test_library_quantizers", "test_library_codecs",
    "test_published", "test_published_files", "test_export", "test_docs", "test_audio_data", "test_ddp", "test_sweeps",
    "test_readme", "test_evaluate", "test_abx", "test_extraction",
)  # fmt: skip
"""Files that take longest: they begin first, so that no process is left alone with one at the end."""


def pytest_addoption(parser):
    parser.addoption("--published", metavar="FOLDER", help="folder of published checkpoints, NAME.pkl")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


def write_split(
    folder: Path, lengths: list[int], dim: int = DIM, seed: int = 0, num_shards: int = 1, **more
) -> list[np.ndarray]:
    """Write smooth random features of the lengths given; return them. `more` goes into the .json."""
    rng = np.random.default_rng(seed)
    utterances = [np.cumsum(rng.normal(size=(n, dim)), 0).astype(np.float32) / 3 for n in lengths]
    cuts = [round(len(lengths) / num_shards * rank) for rank in range(num_shards + 1)]
    for rank in range(num_shards):
        names = [f"spk/utt{i}.wav" for i in range(cuts[rank], cuts[rank + 1])]
        about = {"root": "/audio", "frame_rate": 50, **more}
        with write_shard(folder, rank, num_shards, dim, about) as shard:
            for name, i in zip(names, range(cuts[rank], cuts[rank + 1]), strict=True):
                shard.append(name, utterances[i])
    return utterances


@pytest.fixture
def splits(tmp_path: Path) -> Path:
    """A folder with train/, valid/ and test/ shards of width 8."""
    folder = tmp_path / "splits"
    write_split(folder / "train", [40, 7, 25, 60, 33, 12, 51, 18], seed=1, num_shards=2)
    write_split(folder / "valid", [20, 31, 5], seed=2)
    write_split(folder / "test", [15, 22, 9], seed=3)
    return folder


@pytest.fixture
def codec() -> RepCodec:
    """A small float64 codec with large biases, so that unmasked padding would show."""
    torch.manual_seed(0)
    codec = RepCodec(DIM, codebook_size=16).double()
    with torch.no_grad():
        for name, parameter in codec.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 2)
        # Codes where the vectors of features like those of `write_split` lie, so that all are in use.
        walk = torch.randn(160, DIM).double().cumsum(0) / 3
        codec.quantizer.codebooks[0].place(codec.vectors(walk[None])[::10], torch.ones(16))
    return codec


@contextmanager
def refused(*fragments):
    """Expect a RepCodecError whose sentence holds all fragments."""
    with pytest.raises(RepCodecError) as caught:
        yield caught
    message = str(caught.value)
    for fragment in fragments:
        assert str(fragment) in message
        if isinstance(fragment, Path):  # the test's own name is part of it: look for the words elsewhere
            message = message.replace(str(fragment), "")


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system of 64 KiB."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a tiny file system")
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a tiny file system cannot be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture(scope="session")
def speech(tmp_path_factory):
    """Real speech: a demo corpus of a few sentences, with train.tsv, valid.tsv, test.tsv and phones.tsv."""
    from repcodec.demo_corpus import build_corpus

    folder = tmp_path_factory.mktemp("speech") / "corpus"
    build_corpus(folder, sentences={"train": 7, "valid": 2, "test": 2})
    return folder


@pytest.fixture(scope="session")
def whisper_folder(tmp_path_factory):
    """Whisper tiny.en's real weights, in transformers' format."""
    from repcodec.demo_weights import convert_whisper_tiny_en

    return convert_whisper_tiny_en(tmp_path_factory.mktemp("weights"))


SHARD_DIM, SHARD_LENGTHS = 4, [[3, 1, 5], [2], [4, 6]]
"""Width, and frames of each utterance of the three shards, of `split`."""


def published(folder, rows, lengths, name="0_1"):
    """Write a shard as the published scripts do: numpy's own file, and the lengths."""
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / f"{name}.npy", rows)
    (folder / f"{name}.len").write_text("".join(f"{length}\n" for length in lengths))
    return folder / f"{name}.npy"


@pytest.fixture
def split(tmp_path):
    """A folder of three published shards, and the features of each utterance in order."""
    utterances = []
    for rank, lengths in enumerate(SHARD_LENGTHS):
        rows = np.random.default_rng(rank).standard_normal((sum(lengths), SHARD_DIM), dtype=np.float32)
        published(tmp_path / "split", rows, lengths, f"{rank}_{len(SHARD_LENGTHS)}")
        utterances += np.split(rows, np.cumsum(lengths)[:-1])
    return tmp_path / "split", utterances
