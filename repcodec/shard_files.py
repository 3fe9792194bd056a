"""The files of a feature shard: what they are called, and what they must hold before anything is read from them."""

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from repcodec.errors import RepCodecError, first_line
from repcodec.files import check_text

SUFFIXES = (".npy", ".len", ".json", ".skipped.tsv")
"""Files of a shard: features, lengths, what they are, and the utterances left out, where any was."""


def shard_path(folder: Path | str, rank: int, num_shards: int, suffix: str) -> Path:
    """Return where shard `rank` of `num_shards` has its .npy, .len or .json."""
    return Path(folder) / f"{rank}_{num_shards}{suffix}"


def is_finished(folder: Path | str, rank: int, num_shards: int) -> bool:
    """Say whether shard `rank` of `num_shards` has all its files."""
    return all(shard_path(folder, rank, num_shards, suffix).exists() for suffix in SUFFIXES[:3])


def num_shards_there(folder: Path | str) -> set[int]:
    """Return of how many shards those of a folder are: one number, unless sets are mixed."""
    return {num_shards for _, num_shards, _ in _numbered(Path(folder))}


def _numbered(folder: Path) -> Iterator[tuple[int, int, Path]]:
    """Yield rank, number of shards and path of every .npy file of a folder that is named like a shard."""
    for path in folder.glob("*.npy"):
        if match := re.fullmatch(r"(\d+)_(\d+)", path.stem):
            yield int(match[1]), int(match[2]), path


FRAME_RATES = (1, 16_000)
"""Least and most frames per second that a file may say, the most being one a sample."""


@dataclass(frozen=True)
class Shard:
    """One shard, opened: memory-mapped (rows, D) features, lengths, and its sidecar (empty when it has none).

    `offset` is where the values begin in the file, in bytes.
    """

    path: Path
    rows: npt.NDArray[np.floating]
    offset: int
    lengths: npt.NDArray[np.int64]
    about: dict[str, Any]


SAME = ("encoder", "weights_sha256", "layer", "frame_rate")
"""What shards that are read together must agree on, where their .json says it."""


def shard_files(folder: Path) -> list[Path]:
    """List the .npy files of a folder in rank order.

    Raises:
        RepCodecError: there is no such folder, or it holds none, not all, or several sets.
    """
    if not folder.is_dir():
        raise RepCodecError(f"{folder}: no such folder of feature shards; `repcodec extract` makes one.")
    found: dict[int, dict[int, Path]] = {}
    for rank, num_shards, path in _numbered(folder):
        found.setdefault(num_shards, {})[rank] = path
    if len(found) != 1:
        several = " and ".join(f"shards of {n}" for n in sorted(found))
        raise RepCodecError(
            f"{folder}: found {several or 'no {rank}_{n}.npy shard'}, expected one complete set; `repcodec extract` "
            "makes one."
        )
    (num_shards, by_rank), *_ = found.items()
    missing = sorted(set(range(num_shards)) - by_rank.keys())
    if missing or len(by_rank) != num_shards:
        raise RepCodecError(
            f"{folder}: found {len(by_rank)} of {num_shards} shards, number {missing[:5]} is missing; extract it too."
        )
    return [by_rank[rank] for rank in range(num_shards)]


def open_shard(path: Path, dim: int | None) -> Shard:
    """Map a shard's values and read what lies beside them.

    Raises:
        RepCodecError: a file is missing or damaged, or the width is not `dim`.
    """
    try:
        with open(path, "rb") as file:
            version = np.lib.format.read_magic(file)
            read_header = (
                np.lib.format.read_array_header_1_0 if version == (1, 0) else (np.lib.format.read_array_header_2_0)
            )
            shape, fortran_order, dtype = read_header(file)
            if any(type(size) is not int or size < 0 for size in shape):
                raise ValueError(f"its shape is {shape}")
            offset = file.tell()
            found_bytes = os.fstat(file.fileno()).st_size - offset
    except Exception as error:  # the header is a Python literal: anything may come out of garbage
        raise RepCodecError(f"{path}: not a readable .npy file ({first_line(error)}); extract it again.") from error
    if len(shape) != 2 or fortran_order or dtype.kind != "f":
        order = "Fortran" if fortran_order else "C"
        raise RepCodecError(
            f"{path}: holds a {dtype} array of shape {shape} in {order} order, expected a (frames, width) float array "
            "in C order."
        )
    if dim is not None and shape[1] != dim:
        raise RepCodecError(
            f"{path}: the features have width {shape[1]}, expected {dim}; choose the speech encoder they were made "
            "with, or extract them again."
        )
    if found_bytes != shape[0] * shape[1] * dtype.itemsize:
        raise RepCodecError(
            f"{path}: the file is truncated or overlong: {found_bytes} bytes of values, expected "
            f"{shape[0] * shape[1] * dtype.itemsize}; extract it again."
        )
    lengths = _read_lengths(path.with_suffix(".len"), rows=shape[0])
    about = _read_sidecar(path.with_suffix(".json"), len(lengths))
    # numpy cannot map an empty file; its own class of mapped arrays is slow to slice.
    rows = np.asarray(np.memmap(path, dtype, "r", offset, shape)) if shape[0] else np.empty(shape, dtype)
    return Shard(path, rows, offset, lengths, about)


def check_alike(shard: Shard, other: Shard, keys: Sequence[str]) -> None:
    """Refuse shards that cannot be read together.

    Args:
        shard, other: which.
        keys: of the .json, what both must agree on besides the width.

    Raises:
        RepCodecError: names the first that differs.
    """
    made = {"width": (shard.rows.shape[1], other.rows.shape[1])}
    made |= {key: (shard.about.get(key), other.about.get(key)) for key in keys}
    for key, (found, expected) in made.items():
        if found != expected:
            raise RepCodecError(
                f"{shard.path}: {key} {found}, but {other.path} has {expected}; "
                "shards that are read together must come from one speech encoder."
            )


def _read_lengths(path: Path, rows: int) -> npt.NDArray[np.int64]:
    try:
        lines = path.read_text(encoding="ascii").split()
        lengths = np.array(lines, dtype=np.int64)
    except FileNotFoundError as error:
        raise RepCodecError(f"{path} is missing: the shard was never finished; extract it again.") from error
    except (OSError, ValueError, OverflowError) as error:
        raise RepCodecError(f"{path}: expected one number of frames a line ({error}).") from error
    if (lengths < 0).any():
        raise RepCodecError(f"{path}: a length is negative ({lengths.min()}); extract this shard again.")
    if (lengths > rows).any() or lengths.sum() != rows:  # many large ones may come to any sum
        raise RepCodecError(
            f"{path}: the lengths sum to {lengths.sum()} frames, but the .npy beside it has {rows} rows; "
            "extract this shard again."
        )
    return lengths


def _read_sidecar(path: Path, num_utterances: int) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        about: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RepCodecError(f"{path}: not a readable shard description ({error}); extract this shard again.") from error
    expected = {"root": str, "frame_rate": int | float, "utterances": list}
    for key, kind in expected.items():
        if not isinstance(about, dict) or not isinstance(about.get(key), kind):
            raise RepCodecError(f"{path}: {key!r} is missing or of the wrong kind; extract this shard again.")
    if not FRAME_RATES[0] <= about["frame_rate"] <= FRAME_RATES[1]:
        raise RepCodecError(
            f"{path}: 'frame_rate' is {about['frame_rate']}, expected frames per second; extract this shard again."
        )
    names = about["utterances"]
    if len(names) != num_utterances or not all(isinstance(name, str) for name in names):
        raise RepCodecError(
            f"{path}: names {len(names)} utterances, the .len beside it {num_utterances}; extract this shard again."
        )
    check_text(path, about["root"], *names)
    return about
