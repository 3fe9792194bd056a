"""The files phone labels come in, read one utterance at a time: a table, JSON lines, TextGrids, TIMIT's .phn."""

import csv
import gzip
import io
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, compress, pairwise
from operator import itemgetter, ne
from pathlib import Path

from tqdm import tqdm

from repcodec.audio import SAMPLE_RATE
from repcodec.errors import RepCodecError, first_line
from repcodec.files import bounded_lines, check_text, walk_files

COLUMNS = ("utt", "start_s", "end_s", "phone")
"""What the header of a table has to name."""

PHONES_PER_SECOND = 100
"""JSON lines hold a phone every 10 ms."""

MAX_RUN = 10_000
"""Segments that the reader of a table hands on at a time."""

Segments = tuple[str, Sequence[float], Sequence[float], Sequence[str]]
"""Utterance, and the starts in seconds, ends in seconds and phones of some segments of it."""


def read_label_files(path: Path | str) -> Iterator[Segments]:
    """Yield the segments of phone labels in any format.

    A file is a table with a header that names utt, start_s, end_s and phone, whose rows may stand in any order, or
    JSON lines, `{"name": …, "phones": [a phone every 10 ms]}`; gzipped or not. A folder holds, in any depth, TextGrids
    as the Montreal Forced Aligner writes them or TIMIT's .phn files; an utterance's id is the path below the folder
    without the ending. An utterance without a phone comes too, with no segment. An empty phone (in a TextGrid, JSON
    lines) is none.

    Raises:
        RepCodecError: the file or folder is unreadable, cut off, or holds something else.
    """
    path = Path(path)
    if os.path.isdir(path):  # Path.is_dir would raise where it may not look
        yield from _read_folder(path)
        return
    if path.suffix.lower() in _READERS:
        raise RepCodecError(f"{path} is the file of one utterance: give the folder of all of them.")
    lines = _lines(path)
    try:
        first = next(lines, "")
        ending = Path(path.name.lower().removesuffix(".gz")).suffix
        read = _read_json if ending in (".jsonl", ".json") or first.startswith("{") else _read_table
        yield from read(path, chain([first], lines))
    except (OSError, EOFError, zlib.error, ValueError, csv.Error) as error:
        raise RepCodecError(f"{path}: not a readable label file ({error}).") from error


def _lines(path: Path) -> Iterator[str]:
    """Yield the lines of a text file with their ends, unzipped where it is zipped."""
    with (
        open(path, "rb") as file,
        tqdm(total=os.path.getsize(path), desc=f"Reading {path.name}", unit="B", unit_scale=True, delay=1) as bar,
    ):
        zipped = file.peek(2)[:2] == b"\x1f\x8b"
        text = io.TextIOWrapper(gzip.GzipFile(fileobj=file) if zipped else file, "utf-8-sig", newline="")
        for number, line in enumerate(bounded_lines(text, path), start=1):
            yield line
            if number % 500 == 0:
                bar.update(file.tell() - bar.n)


def _read_table(path: Path, lines: Iterable[str]) -> Iterator[Segments]:
    rows = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
    header = next(rows, [])
    missing = set(COLUMNS) - set(header)
    if missing:
        raise RepCodecError(
            f"{path}: the header lacks {', '.join(sorted(missing))}; "
            "expected a tab-separated table with utt, start_s, end_s, phone."
        )
    fields = itemgetter(*(header.index(name) for name in COLUMNS))
    utterance, starts, ends, phones = "", list[float](), list[float](), list[str]()
    for row in rows:
        if not row:
            continue
        name, start_s, end_s, phone = fields(row if len(row) >= len(header) else row + [""] * len(header))
        try:
            start, end = float(start_s), float(end_s)
        except ValueError:
            raise RepCodecError(
                f"{path}, line {rows.line_num}: start_s and end_s are not both numbers of seconds."
            ) from None
        if not (0 <= start <= end < float("inf")) or not phone:
            raise RepCodecError(
                f"{path}, line {rows.line_num}: expected 0 <= start_s <= end_s and a phone, found "
                f"{start}, {end}, {phone!r}."
            )
        if not name:
            raise RepCodecError(f"{path}, line {rows.line_num}: no utterance is named.")
        if name != utterance or len(starts) == MAX_RUN:
            if starts:
                yield utterance, starts, ends, phones
            utterance, starts, ends, phones = name, [], [], []
        starts.append(start)
        ends.append(end)
        phones.append(phone)
    if starts:
        yield utterance, starts, ends, phones


def _read_json(path: Path, lines: Iterable[str]) -> Iterator[Segments]:
    seen = set()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            fields = json.loads(line)
            name, phones = fields.get("name", fields.get("id", fields.get("utt"))), fields["phones"]
            if not (isinstance(name, str) and name and isinstance(phones, list)):
                raise ValueError("the name is no text, or the phones are no list")
            # Where a phone is another one than before; the first is another one than nothing.
            firsts = list(compress(range(len(phones)), map(ne, phones, chain([object()], phones))))
            if not all(isinstance(phones[first], str) for first in firsts):
                raise ValueError("a phone is no text")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise RepCodecError(
                f'{where}: found {line[:60].strip()!r}, expected a JSON object {{"name": …, "phones": [a phone every '
                f"10 ms]}} ({first_line(error)}); the file may be cut off."
            ) from error
        check_text(where, name, *(phones[first] for first in firsts))
        if name in seen:
            raise RepCodecError(f"{where}: {name!r} has had its phones in an earlier line; remove one of them.")
        seen.add(name)
        runs = [(first, stop) for first, stop in pairwise([*firsts, len(phones)]) if phones[first]]
        yield (
            name,
            [first / PHONES_PER_SECOND for first, _ in runs],
            [stop / PHONES_PER_SECOND for _, stop in runs],
            [phones[first] for first, _ in runs],
        )


def _read_folder(root: Path) -> Iterator[Segments]:
    files = _find(root)
    kinds = {path.suffix.lower() for path in files}
    if len(kinds) != 1:
        found = "holds both TextGrid and .phn files" if kinds else "holds neither a TextGrid nor a .phn file"
        raise RepCodecError(
            f"{root} {found}: give a folder with the labels of every utterance in one of these formats."
        )
    read = _READERS[kinds.pop()]
    names: dict[str, Path] = {}
    for path in tqdm(files, desc=f"Reading {root.name}", unit="file", delay=1):
        name = path.relative_to(root).with_suffix("").as_posix()
        check_text(root, name)
        if names.setdefault(name, path) != path:
            raise RepCodecError(f"{path}: {names[name]} holds labels of the same utterance; remove one of them.")
        starts, ends, phones = list[float](), list[float](), list[str]()
        for start, end, phone in read(path):
            starts.append(start)
            ends.append(end)
            phones.append(phone)
        yield name, starts, ends, phones


def _find(root: Path) -> list[Path]:
    """List the label files of a folder, in any depth, through links too, sorted."""
    # What begins with a dot is no label file: macOS leaves such ones beside every file of an archive.
    return sorted(
        path for path in walk_files(root) if path.suffix.lower() in _READERS and not path.name.startswith(".")
    )


def _read_phn(path: Path) -> Iterator[tuple[float, float, str]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RepCodecError(f"{path}: not a readable .phn file ({error}).") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            first, stop, phone = line.split()
            start, end = int(first), int(stop)
            if not 0 <= start <= end < 2**63:
                raise ValueError
        except ValueError:
            raise RepCodecError(
                f"{path}, line {number}: found {line[:60]!r}, expected start_sample end_sample phone, whole samples at "
                "16 kHz with 0 <= start_sample <= end_sample."
            ) from None
        yield start / SAMPLE_RATE, end / SAMPLE_RATE, phone


def _read_textgrid(path: Path) -> Iterator[tuple[float, float, str]]:
    try:
        from praatio import textgrid
    except ImportError as error:
        raise RepCodecError(f"{path}: TextGrids need praatio: pip install 'repcodec[textgrid]'.") from error
    try:
        grid = textgrid.openTextgrid(str(path), includeEmptyIntervals=False, reportingMode="silence")
    except Exception as error:  # the parser takes apart what it is given: anything may come out of garbage
        raise RepCodecError(
            f"{path}: not a readable TextGrid ({first_line(error)}); it may be empty or cut off, make it again."
        ) from error
    tiers = [
        tier
        for tier in grid.tiers
        if isinstance(tier, textgrid.IntervalTier) and (tier.name == "phones" or tier.name.endswith(" - phones"))
    ]
    if len(tiers) != 1:
        names = ", ".join(repr(tier.name) for tier in tiers or grid.tiers)
        found = (
            f"holds the phones of several speakers ({names})" if tiers else f"has no phones among its tiers ({names})"
        )
        raise RepCodecError(
            f"{path}: {found}; expected one tier of intervals called 'phones' or '<speaker> - phones', as the Montreal "
            "Forced Aligner writes them, and one speaker a recording."
        )
    for start, end, phone in tiers[0].entries:
        # praatio loses the sign of an interval's time in the long format, not of the file's.
        if grid.minTimestamp < 0 or not 0 <= start <= end < float("inf"):
            raise RepCodecError(f"{path}: an interval ({start}, {end}, {phone!r}) is not within times from 0 s up.")
        yield start, end, phone


_READERS: dict[str, Callable[[Path], Iterator[tuple[float, float, str]]]] = {
    ".textgrid": _read_textgrid,
    ".phn": _read_phn,
}
"""How the file of one utterance is read, by its ending."""
