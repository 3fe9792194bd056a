"""Write feature shards: whole or not at all, by one process at a time, and resumable after a kill.

Until a shard is finished, its rows grow in `.{rank}_{n}.npy.partial`, and `.{rank}_{n}.journal` lists what of them
is sure: line 1 says what the shard is, every further line which utterances one batch added.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from repcodec.errors import RepCodecError
from repcodec.files import atomic_write, locked
from repcodec.shards import SUFFIXES, check_finite, shard_path

DTYPES = {"float32": "<f4", "float16": "<f2"}
"""Types that features are stored as."""


class ShardWriter:
    """Appends the features of one utterance after another to one shard; `write_shard` makes one.

    Attributes:
        utterances: relative paths of the utterances written so far, those of an earlier, killed run included.
        lengths: their frames.
        skipped: (relative path, reason) of the utterances left out so far.
        num_batches: how often `commit` was called so far: where a resumed run goes on.
    """

    def __init__(self, rows: IO[bytes], journal: IO[str], dim: int, dtype: str):
        self._rows, self._journal, self._dim, self._dtype = rows, journal, dim, np.dtype(DTYPES[dtype])
        self.utterances: list[str] = []
        self.lengths: list[int] = []
        self.skipped: list[tuple[str, str]] = []
        self.num_batches = 0
        self._noted = (0, 0)

    def write_header(self) -> None:
        """Write the .npy header at the start; numpy leaves room for the row count to grow."""
        self._rows.seek(0)
        header = {"descr": self._dtype.str, "fortran_order": False, "shape": (sum(self.lengths), self._dim)}
        np.lib.format.write_array_header_1_0(self._rows, header)

    def append(self, utterance: str, features: np.ndarray) -> None:
        """Append the (T, D) features of an utterance.

        Raises:
            RepCodecError: wrong width, a value that is not finite, or one that the type cannot hold.
        """
        if features.ndim != 2 or features.shape[1] != self._dim:
            raise RepCodecError(f"{utterance}: features have shape {features.shape}, expected (T, {self._dim}).")
        with np.errstate(over="ignore"):  # refused in the next lines
            rows = np.ascontiguousarray(features, dtype=self._dtype)
        if self._dtype.itemsize == 2 and np.isfinite(features).all() and not np.isfinite(rows).all():
            raise RepCodecError(
                f"{utterance}: a feature is {np.abs(features).max():.6g}, more than float16 holds (65504); extract "
                "with --dtype float32."
            )
        check_finite(rows, utterance)
        self._rows.write(rows.data)
        self.utterances.append(utterance)
        self.lengths.append(len(rows))

    def skip(self, utterance: str, reason: str) -> None:
        """Note an utterance that is left out."""
        self.skipped.append((utterance, reason))

    def commit(self) -> None:
        """Make sure of everything appended so far: after a kill, the shard goes on from here."""
        written, skipped = self._noted
        pairs = list(zip(self.utterances[written:], self.lengths[written:], strict=True))
        self._rows.flush()
        os.fsync(self._rows.fileno())
        self._journal.write(json.dumps({"written": pairs, "skipped": self.skipped[skipped:]}) + "\n")
        self._journal.flush()
        os.fsync(self._journal.fileno())
        self.num_batches += 1
        self._noted = len(self.utterances), len(self.skipped)

    def resume(self, about: dict, with_skipped: bool) -> None:
        """Take over what an earlier run made sure of, and start a new shard where that is nothing, or of another kind.

        Args:
            about: what the shard is.
            with_skipped: whether batches that left out utterances count too; those after them never do.
        """
        first, *records = _whole_lines(self._journal)
        sure = first == about
        good = [first if sure else about]
        row_bytes = self._dim * self._dtype.itemsize
        if not sure:
            self._rows.truncate(0)
        self.write_header()
        start = self._rows.tell()
        room = self._rows.seek(0, os.SEEK_END) - start
        for record in records if sure else []:
            frames = sum(length for _, length in record["written"])
            if (record["skipped"] and not with_skipped) or (sum(self.lengths) + frames) * row_bytes > room:
                break
            self.utterances += [name for name, _ in record["written"]]
            self.lengths += [length for _, length in record["written"]]
            self.skipped += [(name, reason) for name, reason in record["skipped"]]
            good.append(record)
        self.num_batches = len(good) - 1
        self._noted = len(self.utterances), len(self.skipped)
        self._rows.truncate(start + sum(self.lengths) * row_bytes)
        self._rows.seek(0, os.SEEK_END)
        self._journal.truncate(0)
        self._journal.writelines(json.dumps(record) + "\n" for record in good)
        self._journal.flush()
        os.fsync(self._journal.fileno())


def _whole_lines(journal: IO[str]) -> list[Any]:
    """Read a journal up to its last whole line; [None] where it has none."""
    journal.seek(0)
    records: list[Any] = []
    try:
        for line in journal:
            if not line.endswith("\n"):
                break
            records.append(json.loads(line))
    except ValueError:  # a kill tore this line, or it is no journal of ours
        pass
    return records or [None]


@contextmanager
def write_shard(
    folder: Path | str,
    rank: int,
    num_shards: int,
    dim: int,
    about: dict,
    dtype: str = "float32",
    with_skipped: bool = True,
) -> Iterator[ShardWriter]:
    """Write one shard; its files appear only when the block ends well, the .npy last.

    When the block fails, or the process is killed, what was committed stays, and the next call with the same `about`
    goes on after it; without a commit nothing stays.

    Args:
        folder: where `{rank}_{num_shards}.*` go.
        dim: D.
        about: what the .json beside the features says, besides the type and the utterances' relative paths in order.
        dtype: "float32" or "float16".
        with_skipped: whether to go on after batches that left out utterances; otherwise such a batch is made again.

    Raises:
        RepCodecError: the files cannot be written, another process is writing them, or no utterance was appended.
    """
    npy = shard_path(folder, rank, num_shards, ".npy")
    partial, journal = (npy.with_name(f".{npy.stem}{suffix}") for suffix in (".npy.partial", ".journal"))
    about = json.loads(json.dumps({**about, "dim": dim, "dtype": dtype}))  # as it comes back from a file
    with locked(npy):
        writer = None
        try:
            for path in (partial, journal):
                path.touch()
            with open(partial, "r+b") as rows, open(journal, "r+", encoding="utf-8") as lines:
                writer = ShardWriter(rows, lines, dim, dtype)
                writer.resume(about, with_skipped)
                yield writer
                if not writer.utterances:
                    raise RepCodecError(f"{npy}: no utterance is left for this shard; mend the list of sounds.")
                writer.write_header()
                rows.flush()
                os.fsync(rows.fileno())
            _describe(npy, about, writer)
            os.replace(partial, npy)
            journal.unlink()
        except BaseException as error:
            if writer is None or writer.num_batches == 0:
                partial.unlink(missing_ok=True)
                journal.unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise RepCodecError(
                    f"{npy} could not be written ({error.strerror or error}): nothing that looks finished was left; "
                    "free some space or choose a folder you may write to, then run the same command again."
                ) from error
            raise


def _describe(npy: Path, about: dict, writer: ShardWriter) -> None:
    """Write what lies beside a shard's .npy, which itself comes last: a reader asks for all of them."""
    _, lengths, sidecar, skipped = files = [npy.with_suffix(suffix) for suffix in SUFFIXES]
    # An older shard's values must not stand beside these descriptions, whatever happens from here on.
    for old in files:
        old.unlink(missing_ok=True)
    try:
        with atomic_write(sidecar) as file:
            json.dump({**about, "utterances": writer.utterances}, file, indent=1, ensure_ascii=False)
        with atomic_write(lengths) as file:
            file.writelines(f"{length}\n" for length in writer.lengths)
        if writer.skipped:
            with atomic_write(skipped) as file:
                file.writelines(f"{name}\t{' '.join(reason.split())}\n" for name, reason in writer.skipped)
    except BaseException:
        for half in files:
            half.unlink(missing_ok=True)
        raise
