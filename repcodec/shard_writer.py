"""Write feature shards: whole or not at all, by one process at a time, and resumable after a kill.

Until a shard is finished, its rows grow in `.{rank}_{n}.npy.partial`, and `.{rank}_{n}.journal` lists what they are:
line 1 says what the shard is, every further line which utterances one batch added, and the checksum of its rows. So
nothing has to wait for the disk: what it lost, in a power cut, is found out and made again.
"""

import json
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from repcodec.errors import RepCodecError
from repcodec.files import atomic_write, locked
from repcodec.shard_files import SUFFIXES, shard_path
from repcodec.shards import check_finite

MOVES = ("root", "model")
"""What of a shard's description says only where files lie."""

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
        self._noted, self._checksum = (0, 0), 0

    def write_header(self) -> None:
        """Write the .npy header at the start; numpy leaves room for the row count to grow."""
        self._rows.seek(0)
        header = {"descr": self._dtype.str, "fortran_order": False, "shape": (sum(self.lengths), self._dim)}
        np.lib.format.write_array_header_1_0(self._rows, header)

    def append(self, utterance: str, features: npt.NDArray[np.floating]) -> None:
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
        self._checksum = zlib.crc32(rows.data, self._checksum)
        self.utterances.append(utterance)
        self.lengths.append(len(rows))

    def skip(self, utterance: str, reason: str) -> None:
        """Note an utterance that is left out."""
        self.skipped.append((utterance, reason))

    def commit(self) -> None:
        """Note everything appended so far: after a kill, the shard goes on from here."""
        written, skipped = self._noted
        pairs = list(zip(self.utterances[written:], self.lengths[written:], strict=True))
        record = {"written": pairs, "skipped": self.skipped[skipped:], "crc32": self._checksum}
        self._rows.flush()
        self._journal.write(json.dumps(record) + "\n")
        self._journal.flush()
        self.num_batches += 1
        self._noted, self._checksum = (len(self.utterances), len(self.skipped)), 0

    def resume(self, about: dict[str, Any], skip_bad: bool) -> None:
        """Take over what an earlier run noted and wrote.

        Args:
            about: what the shard is.
            skip_bad: whether utterances may be left out.

        Raises:
            RepCodecError: the earlier run made another kind of shard, or left out utterances where none may be.
        """
        first, *records = _whole_lines(self._journal)
        if records:
            self._check_same(first, about, records, skip_bad)
        row_bytes = self._dim * self._dtype.itemsize
        self.write_header()
        end = self._rows.tell()
        lines = [json.dumps(first if records else about) + "\n"]
        for record in records:
            num_bytes = sum(length for _, length in record["written"]) * row_bytes
            if self._checksum_of(num_bytes) != record["crc32"]:
                break
            end += num_bytes
            self.utterances += [name for name, _ in record["written"]]
            self.lengths += [length for _, length in record["written"]]
            self.skipped += [(name, reason) for name, reason in record["skipped"]]
            lines.append(json.dumps(record) + "\n")
        self.num_batches = len(lines) - 1
        self._noted = len(self.utterances), len(self.skipped)
        self._rows.truncate(end)
        self._rows.seek(end)
        if self.num_batches:  # the good lines are there already, letter for letter: a kill here loses none of them
            self._journal.truncate(sum(map(len, lines)))
            self._journal.seek(0, os.SEEK_END)
        else:
            self._journal.seek(0)
            self._journal.truncate()
            self._journal.writelines(lines)
            self._journal.flush()

    def _check_same(
        self, first: dict[str, Any], about: dict[str, Any], records: list[dict[str, Any]], skip_bad: bool
    ) -> None:
        what = f"an unfinished shard is there ({self._rows.name} and the .journal beside it)"
        if differs := [key for key in about if key not in MOVES and first.get(key) != about[key]]:
            raise RepCodecError(
                f"{what} that was made otherwise ({', '.join(differs)} differs): go on with the former settings, or "
                "delete both files."
            )
        if not skip_bad and (skipped := sum(len(record["skipped"]) for record in records)):
            raise RepCodecError(f"{what} that left out {skipped} sounds: go on with --skip-bad, or delete both files.")

    def _checksum_of(self, num_bytes: int) -> int | None:
        """Return the checksum of the next bytes, None where there are not so many."""
        checksum = 0
        while num_bytes:
            block = self._rows.read(min(num_bytes, 2**24))
            if not block:
                return None
            checksum, num_bytes = zlib.crc32(block, checksum), num_bytes - len(block)
        return checksum


def _whole_lines(journal: IO[str]) -> list[Any]:
    """Read a journal up to its last whole line; [None] where it has none."""
    journal.seek(0)
    records: list[Any] = []
    try:
        for line in journal:
            if not line.endswith("\n"):
                break
            record = json.loads(line)
            if records and not _is_record(record):
                break
            records.append(dict(record))
    except (ValueError, TypeError, RecursionError):  # a kill tore this line, or it is no journal of ours
        pass
    return records or [None]


def _is_record(record: Any) -> bool:
    """Say whether a line of a journal is what `ShardWriter.commit` writes."""
    if not isinstance(record, dict) or record.keys() != {"written", "skipped", "crc32"}:
        return False
    written, skipped = record["written"], record["skipped"]
    if not (isinstance(written, list) and isinstance(skipped, list)):
        return False
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in [*written, *skipped]):
        return False
    return all(isinstance(name, str) and type(length) is int and length >= 0 for name, length in written)


@contextmanager
def write_shard(
    folder: Path | str,
    rank: int,
    num_shards: int,
    dim: int,
    about: dict[str, Any],
    dtype: str = "float32",
    skip_bad: bool = True,
) -> Iterator[ShardWriter]:
    """Write one shard; its files appear only when the block ends well, the .npy last.

    When the block fails, or the process is killed, what was committed stays, and the next call goes on after it;
    without a commit nothing stays.

    Args:
        folder: where `{rank}_{num_shards}.*` go.
        dim: D.
        about: what the .json beside the features says, besides the type and the utterances' relative paths in order.
        dtype: "float32" or "float16".
        skip_bad: whether to go on with an unfinished shard that left out utterances.

    Raises:
        RepCodecError: the files cannot be written, there is such a .npy already, another process is writing it, an
            unfinished one is of another kind, or no utterance was appended.
    """
    npy = shard_path(folder, rank, num_shards, ".npy")
    partial, journal = (npy.with_name(f".{npy.stem}{suffix}") for suffix in (".npy.partial", ".journal"))
    about = json.loads(json.dumps({**about, "dim": dim, "dtype": dtype}))  # as it comes back from a file
    with locked(npy):
        if npy.exists():
            raise RepCodecError(f"{npy}: this shard is there already; delete it, or write into another folder.")
        kept = any(path.exists() for path in (partial, journal))
        try:
            for path in (partial, journal):
                path.touch()
            with open(partial, "r+b") as rows, open(journal, "r+", encoding="utf-8") as lines:
                writer = ShardWriter(rows, lines, dim, dtype)
                writer.resume(about, skip_bad)
                kept = False  # from here on it is the batches that count
                try:
                    yield writer
                finally:
                    kept = writer.num_batches > 0
                if not writer.utterances:
                    raise RepCodecError(f"{npy}: no utterance is left for this shard; mend the list of sounds.")
                writer.write_header()
                rows.flush()
                os.fsync(rows.fileno())
            _describe(npy, about, writer)
            os.replace(partial, npy)
            journal.unlink()
        except BaseException as error:
            if not kept:
                partial.unlink(missing_ok=True)
                journal.unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise RepCodecError(
                    f"{npy} could not be written ({error.strerror or error}): nothing that looks finished was left; "
                    "free some space or choose a folder you may write to, then run the same command again."
                ) from error
            raise


def _describe(npy: Path, about: dict[str, Any], writer: ShardWriter) -> None:
    """Write what lies beside a shard's .npy, which itself comes last: a reader asks for all of them."""
    lengths, sidecar, skipped = files = [npy.with_suffix(suffix) for suffix in SUFFIXES[1:]]
    try:
        skipped.unlink(missing_ok=True)  # of an older shard, whose .npy somebody deleted
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
