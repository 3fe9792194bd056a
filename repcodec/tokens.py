"""Tokens files: codes on disk, one utterance a line.

The published format holds one codebook: line 1 is the audio root, every other line
`relative_path<TAB>codes separated by spaces`. JSON lines (`.jsonl`) hold any number of them:
`{"id": …, "path": …, "duration": seconds, "frames": T, "codes": [codes of each codebook]}`.

Deduplicated, runs of equal codes are one: `code:length` in the published format; in JSON lines the codes of the
runs, and `"repeats": [length of each]`.

Axes: K codebooks, N codes an utterance.
"""

import gzip
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from repcodec.errors import RepCodecError
from repcodec.files import atomic_write, bounded_lines, check_text, locked
from repcodec.manifest import check_lines, utterance_id

FORMATS = ("tokens", "jsonl")
"""The published one, and JSON lines."""

MAX_CODES = 100_000_000
"""Codes that one line may stand for, 23 days of speech: a run's length is no reason to fill the memory."""

MAX_CODE = 2**31
"""Codes are below this."""

RATES, MAX_SECONDS = (0.1, 1e6), 1e9
"""Codes a second, and seconds of an utterance, that a file may say: beyond these no arithmetic is sound."""


@dataclass(frozen=True)
class Tokens:
    """The codes of one utterance.

    Attributes:
        name: path below the audio root.
        codes: (K, N) int64.
        num_frames: T, the frames that were coded; None where the file does not say.
        duration: seconds; None where the file does not say.
    """

    name: str
    codes: npt.NDArray[np.int64]
    num_frames: int | None = None
    duration: float | None = None


def run_lengths(codes: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """(K, N) codes -> the codes (K, R) of the runs in which all codebooks stay the same, and their lengths (R,)."""
    changes = np.flatnonzero((codes[:, 1:] != codes[:, :-1]).any(0)) + 1
    starts = np.concatenate([np.zeros(min(1, codes.shape[1]), np.int64), changes])
    return codes[:, starts], np.diff(starts, append=codes.shape[1])


def format_line(tokens: Tokens, kind: str, deduplicate: bool = False) -> str:
    """Return the line of an utterance in a format of `FORMATS`, with its end.

    Raises:
        RepCodecError: the name cannot stand in a line, or the published format shall hold several codebooks.
    """
    check_lines(tokens.name)
    codes, repeats = run_lengths(tokens.codes) if deduplicate else (tokens.codes, None)
    if kind == "jsonl":
        line = {"id": utterance_id(tokens.name), "path": tokens.name, "duration": tokens.duration}
        line |= {"frames": tokens.num_frames, "codes": codes.tolist()}
        if repeats is not None:
            line["repeats"] = repeats.tolist()
        return json.dumps({key: value for key, value in line.items() if value is not None}, ensure_ascii=False) + "\n"
    check_one_codebook(len(codes))
    row = codes[0].tolist()
    marks = map(str, row) if repeats is None else (f"{c}:{n}" for c, n in zip(row, repeats.tolist(), strict=True))
    return f"{tokens.name}\t{' '.join(marks)}\n"


def check_one_codebook(num_codebooks: int) -> None:
    """Refuse several codebooks in the published format.

    Raises:
        RepCodecError: says which format holds them.
    """
    if num_codebooks > 1:
        raise RepCodecError(
            f"the tokenizer has {num_codebooks} codebooks, but the published format holds one: write JSON lines, with "
            "an output that ends in .jsonl or --format jsonl."
        )


def read_tokens(path: Path | str, rank: int = 0, world_size: int = 1) -> Iterator[Tokens]:
    """Yield the utterances of a tokens file of either format, deduplicated or not, gzipped or not.

    Args:
        path: the file.
        rank, world_size: only utterances number `rank`, `rank + world_size` …

    Raises:
        RepCodecError: the file is unreadable or cut off, or a line is none of an utterance.
    """
    size = read_about(path).get("bytes")
    try:
        if size is not None and size != (found := os.path.getsize(path)):
            raise RepCodecError(
                f"{path} has {found:,} bytes, but {about_path(path).name} beside it tells of {size:,}: it was cut off "
                "or changed; make it again, or delete that description."
            )
        with _open(path) as file:
            every = bounded_lines(file, path)
            first = next(every, "")
            if not first.endswith("\n"):
                raise RepCodecError(f"{path}: the file is empty or cut off in its first line; make it again.")
            is_lines = first.startswith(_JSON)
            lines = enumerate(chain([first], every) if is_lines else every, start=1 if is_lines else 2)
            parse = _parse_json if is_lines else _parse_line
            for number, line in islice(lines, rank, None, world_size):
                yield parse(line, f"{path}, line {number}")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise RepCodecError(f"{path}: not a readable tokens file ({error}).") from error


def _open(path: Path | str) -> IO[str]:
    """Open a text file, unzipped where it is gzipped."""
    with open(path, "rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
    return gzip.open(path, "rt", encoding="utf-8") if zipped else open(path, encoding="utf-8")


def read_root(path: Path | str) -> str:
    """Return the audio root that a tokens file names; "" in JSON lines, whose description beside them may say it.

    Raises:
        RepCodecError: the file is unreadable.
    """
    first = _first_line(path)
    return str(read_about(path).get("root", "")) if first.startswith(_JSON) else first


def is_json(path: Path | str) -> bool:
    """Say whether a tokens file holds JSON lines.

    Raises:
        RepCodecError: the file is unreadable.
    """
    return _first_line(path).startswith(_JSON)


_JSON = '{"'
"""How JSON lines begin, and no audio root does."""


def _first_line(path: Path | str) -> str:
    try:
        with _open(path) as file:
            return next(bounded_lines(file, path), "").rstrip("\n")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise RepCodecError(f"{path}: not a readable tokens file ({error}).") from error


def _parse_line(line: str, where: str) -> Tokens:
    name, tab, text = line.rstrip("\n").partition("\t")
    # A line without its end was cut off: the last code may be half of one.
    if not (name and tab and line.endswith("\n")):
        raise RepCodecError(
            f"{where}: found {line[:60]!r}, expected relative_path<TAB>codes and a line end; the file may be cut off, "
            "make it again."
        )
    try:
        if ":" in text:
            pairs = [mark.split(":") for mark in text.split()]
            codes = _repeated([[int(code) for code, _ in pairs]], [int(length) for _, length in pairs], where)
        else:
            codes = np.fromstring(text, dtype=np.int64, sep=" ")[None]  # six times as fast as int() of each
            if codes.size != text.count(" ") + (text != ""):  # it ends at what is no number, and takes any space
                codes = np.array([text.split()], dtype=np.int64)
    except (ValueError, OverflowError) as error:
        raise RepCodecError(f"{where}: a code is not a whole number ({error}).") from error
    return _checked(Tokens(name, codes), where)


def _parse_json(line: str, where: str) -> Tokens:
    try:
        if not line.endswith("\n"):
            raise ValueError("the line has no end, the file may be cut off")
        fields = json.loads(line)
        name, rows, repeats = fields.get("path") or fields["id"], fields["codes"], fields.get("repeats")
        if not (isinstance(name, str) and rows and all(isinstance(row, list) for row in rows)):
            raise ValueError("the id is no text, or the codes are no lists")
        if any(type(code) is not int for row in [*rows, repeats or []] for code in row):
            raise ValueError("a code is not a whole number")
        codes = np.array(rows, dtype=np.int64) if repeats is None else _repeated(rows, repeats, where)
        frames, duration = fields.get("frames"), fields.get("duration")
        if not (frames is None or (type(frames) is int and frames >= 0)) or not (
            duration is None or (isinstance(duration, int | float) and 0 <= duration < MAX_SECONDS)
        ):
            raise ValueError("frames or duration is no number from 0 up")
    except (ValueError, OverflowError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RepCodecError(
            f'{where}: found {line[:60]!r}, expected a JSON object with "id" and "codes" ({error!r}); make it again.'
        ) from error
    check_text(where, name)
    return _checked(Tokens(name, codes, frames, duration), where)


def _repeated(rows: Sequence[Sequence[int]], repeats: Sequence[int], where: str) -> npt.NDArray[np.int64]:
    """K lists of the codes of R runs, and their lengths -> (K, N)."""
    lengths = np.array(repeats, dtype=np.int64)
    if any(len(row) != len(repeats) for row in rows):
        raise ValueError("not as many repeats as codes")
    if (lengths < 1).any() or len(rows) * sum(repeats) > MAX_CODES:
        raise RepCodecError(f"{where}: a run's length is not a number from 1 up, or all are more than {MAX_CODES}.")
    return np.repeat(np.array(rows, dtype=np.int64), lengths, axis=1)


def _checked(tokens: Tokens, where: str) -> Tokens:
    if tokens.codes.size and not 0 <= tokens.codes.min() <= tokens.codes.max() < MAX_CODE:
        raise RepCodecError(
            f"{where}: codes from {tokens.codes.min()} to {tokens.codes.max()}, expected 0 to {MAX_CODE - 1}; make the "
            "file again."
        )
    return tokens


# The description beside a tokens file


def about_path(path: Path | str) -> Path:
    """Return where the description of a tokens file lies: what made it, out of what."""
    return Path(f"{path}.json")


def read_about(path: Path | str) -> dict[str, Any]:
    """Return the description beside a tokens file; empty where there is none, as with those made elsewhere.

    Raises:
        RepCodecError: it is unreadable.
    """
    sidecar = about_path(path)
    try:
        about = json.loads(sidecar.read_text(encoding="utf-8"))
        about = dict(about)
        size, rate = about.get("codebook_size", 1), about.get("codes_per_second", 1)
        if not (type(size) is int and 0 < size <= MAX_CODE and type(about.get("root", "")) is str):
            raise ValueError("codebook_size is no whole number from 1 up, or root no text")
        if type(about.get("bytes", 0)) is not int:
            raise ValueError("bytes is no whole number")
        if not (isinstance(rate, int | float) and RATES[0] <= rate <= RATES[1]):
            raise ValueError("codes_per_second is no number of codes a second")
        return about
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise RepCodecError(f"{sidecar}: not a readable description of a tokens file ({error}); delete it.") from error


def is_finished(path: Path | str, about: dict[str, Any]) -> bool:
    """Say whether a whole tokens file of this description is there; one of another description will be replaced."""
    found = read_about(path)
    return Path(path).exists() and found.pop("bytes", None) == os.path.getsize(path) and found == about


class LineWriter:
    """Writes a tokens file line by line, and goes on with one that a kill left unfinished.

    Lines grow in `.{name}.partial`, beside `.{name}.about`, which says what they are. Use as a context: the file
    takes its place, and the description its own, when the block ends well.

    Attributes:
        done: the names of the utterances that an earlier, killed run wrote, in order.
    """

    def __init__(self, path: Path | str, about: dict[str, Any], root: str | None):
        """Take the file, what it is, and its first line, None where there is none (JSON lines).

        Raises:
            RepCodecError: the root cannot stand in a line.
        """
        self.path, self._about = Path(path), json.loads(json.dumps(about))  # as it comes back from a file
        if root is not None:
            check_lines(root)
        self._root = root
        self._partial, self._note = (self.path.with_name(f".{self.path.name}.{kind}") for kind in ("partial", "about"))
        self._lock = locked(self.path)
        self._file: IO[str]
        self.done: list[str] = []

    def __enter__(self) -> "LineWriter":
        """Take over what an earlier run wrote, or begin.

        Raises:
            RepCodecError: another process writes this file, or the folder cannot be written.
        """
        self._lock.__enter__()
        try:
            self._resume()
        except BaseException as error:
            self._lock.__exit__(None, None, None)
            if isinstance(error, OSError):
                raise self._unwritable(error) from error
            raise
        return self

    def _resume(self) -> None:
        try:
            same = json.loads(self._note.read_text(encoding="utf-8")) == self._about and self._partial.exists()
        except (OSError, ValueError, RecursionError):
            same = False
        if not same:
            self._partial.unlink(missing_ok=True)
            with atomic_write(self._note) as note:
                json.dump(self._about, note)
        self._file = open(self._partial, "a+", encoding="utf-8", newline="\n")  # noqa: SIM115  # closed in __exit__
        end = self._whole_lines()
        self._file.truncate(end)
        if end == 0 and self._root is not None:
            self._file.write(f"{self._root}\n")

    def _whole_lines(self) -> int:
        """Note the utterances of the whole lines there are; return where these end, in bytes."""
        end = 0
        parse = _parse_json if self._root is None else _parse_line
        with open(self._partial, "rb") as file:
            for number, line in enumerate(file):
                try:
                    if number == 0 and self._root is not None:
                        if line != f"{self._root}\n".encode():
                            break
                    else:
                        self.done.append(parse(line.decode(), "").name)
                except (RepCodecError, UnicodeDecodeError):  # a kill tore it
                    break
                end += len(line)
        return end

    def write(self, line: str) -> None:
        """Append a line; a kill from now on loses no line before it.

        Raises:
            RepCodecError: the disk is full.
        """
        try:
            self._file.write(line)
            self._file.flush()
        except OSError as error:
            raise self._unwritable(error) from error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Put the file in its place when the block ended well; otherwise leave what the next run goes on with."""
        try:
            try:
                with self._file:
                    self._file.flush()
                    os.fsync(self._file.fileno())
            except OSError:
                if kind is None:
                    raise
            if kind is None:
                put_in_place(self._partial, self.path, self._about)
                self._note.unlink(missing_ok=True)
            elif not self.done and self._partial.stat().st_size <= len(f"{self._root}\n".encode()):
                self._partial.unlink()
                self._note.unlink(missing_ok=True)
        except OSError as failed:
            raise self._unwritable(failed) from failed
        finally:
            self._lock.__exit__(None, None, None)

    def _unwritable(self, error: OSError) -> RepCodecError:
        return RepCodecError(
            f"{self.path} could not be written ({error.strerror or error}): nothing that looks finished was left; free "
            "some space or choose a folder you may write to, then run the same command again."
        )


def put_in_place(partial: Path, path: Path, about: dict[str, Any]) -> None:
    """Give a whole tokens file its description, then its name; what stood there goes first, as it is something else.

    Killed in between, `partial` is still there, and the next run ends with it.
    """
    about_path(path).unlink(missing_ok=True)
    path.unlink(missing_ok=True)
    with atomic_write(about_path(path)) as file:
        json.dump({**about, "bytes": os.path.getsize(partial)}, file, indent=1, ensure_ascii=False)
    os.replace(partial, path)
