"""Writing files whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from repcodec.errors import RepCodecError


@contextmanager
def atomic_write(path: Path | str, mode: str = "w") -> Iterator[IO]:
    """Open a temporary sibling of `path` that takes its place only when the block ends well.

    Args:
        path: the file to make; its folder is made when missing.
        mode: "w" for text (UTF-8) or "w+b" for bytes that are also read or sought.

    Raises:
        RepCodecError: the folder cannot be written or the disk is full; `path` is untouched then.
    """
    path = Path(path)
    # The process id keeps two writers apart; the leading dot hides it from every reader's pattern.
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise RepCodecError(
            f"{path} could not be written ({error.strerror or error}): nothing was left there; "
            "free some space or choose a folder you may write to, then run the same command again."
        ) from error
    finally:
        try:
            partial.unlink(missing_ok=True)
        except OSError:
            pass
