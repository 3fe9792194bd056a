"""Tokens files: codes on disk, in the published format.

Line 1 is the audio root, every other line `relative_path<TAB>codes separated by spaces`.
One codebook a file.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from repcodec.errors import RepCodecError
from repcodec.files import atomic_write
from repcodec.manifest import check_lines


def write_tokens(path: Path | str, root: Path | str, utterances: Iterable[tuple[str, np.ndarray]]) -> None:
    """Write a tokens file, whole or not at all.

    Args:
        path: the file to make.
        root: the audio root, its first line.
        utterances: relative path and (T,) integer codes of each, consumed one by one.

    Raises:
        RepCodecError: a name cannot stand in a line, or the file cannot be written.
    """
    check_lines(str(root))
    with atomic_write(path) as file:
        file.write(f"{root}\n")
        for name, codes in utterances:
            check_lines(name)
            file.write(f"{name}\t{' '.join(map(str, codes.tolist()))}\n")


def read_tokens(path: Path | str) -> Iterator[tuple[str, np.ndarray]]:
    """Yield relative path and (T,) int64 codes of each utterance of a tokens file.

    Raises:
        RepCodecError: the file is unreadable, or a line is not `path<TAB>codes`.
    """
    try:
        with open(path, encoding="utf-8") as file:
            if not next(file, "").endswith("\n"):
                raise RepCodecError(f"{path}: the file is empty or cut off in its first line; make it again.")
            for number, line in enumerate(file, start=2):
                name, tab, codes = line.rstrip("\n").partition("\t")
                # A line without its end was cut off: the last code may be half of one.
                if not (name and tab and line.endswith("\n")):
                    raise RepCodecError(
                        f"{path}, line {number}: found {line[:60]!r}, expected relative_path<TAB>codes and a line end; "
                        "the file may be cut off, make it again."
                    )
                try:
                    yield name, np.array(codes.split(), dtype=np.int64)
                except (ValueError, OverflowError) as error:
                    raise RepCodecError(f"{path}, line {number}: a code is not a whole number ({error}).") from error
    except (OSError, UnicodeDecodeError) as error:
        raise RepCodecError(f"{path}: not a readable tokens file ({error}).") from error
