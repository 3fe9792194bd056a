"""Writing files whole or not at all, and by one process at a time; reading lines of a length that memory holds."""

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any

from repcodec.errors import RepCodecError

MAX_LINE = 1 << 26
"""Characters of the longest line that is read, a day of codes; a small zipped file may hold gigabytes in one."""


GRACE = 10.0
"""Seconds that the workers of a killed process have to end too."""


class InUse(RepCodecError):
    """Another process is making the file."""


@contextmanager
def atomic_write(path: Path | str, mode: str = "w") -> Iterator[IO[Any]]:
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


def bounded_lines(file: IO[str], source: Path | str) -> Iterator[str]:
    """Yield the lines of a text file with their ends.

    Raises:
        RepCodecError: one is longer than `MAX_LINE`; names `source`.
    """
    for number, line in enumerate(iter(partial(file.readline, MAX_LINE), ""), start=1):
        if len(line) == MAX_LINE:
            raise RepCodecError(
                f"{source}, line {number}: over {MAX_LINE:,} characters, expected an utterance a line; it is another "
                "kind of file, or damaged: make it again."
            )
        yield line


def check_text(source: Path | str, *texts: str) -> None:
    """Refuse texts that hold halves of characters, as JSON and the names of files can: nothing can write them.

    Raises:
        RepCodecError: names `source` and the first.
    """
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        broken = next(text for text in texts if any("\ud800" <= mark <= "\udfff" for mark in text))
        raise RepCodecError(f"{source}: {broken[:80]!r} holds what is no character of UTF-8: rename it.") from None


def walk_files(root: Path | str) -> Iterator[Path]:
    """Yield every file below a folder, in any depth, through links too, those of a folder linked twice only once.

    Raises:
        RepCodecError: a folder cannot be listed.
    """

    def fail(error: OSError) -> None:
        raise RepCodecError(f"{error.filename}: the folder cannot be listed ({error.strerror}); make it readable.")

    seen = set()
    for folder, subfolders, names in os.walk(root, onerror=fail, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link to a folder above, or a second one to the same
            subfolders.clear()
            continue
        seen.add(real)
        subfolders.sort()
        yield from (Path(folder, name) for name in names)


@contextmanager
def locked(path: Path | str) -> Iterator[None]:
    """Keep other processes from making `path`, by a lock file beside it that is gone afterwards.

    The system lets go of it when the process ends, however it ends, so a lock left behind holds nobody up; workers of a
    killed process end some seconds after it, and are waited for. On a file system that has no locks, this is none.

    Raises:
        InUse: another process, which the sentence names, is making it.
        RepCodecError: the folder cannot be written.
    """
    path = Path(path)
    lock = path.with_name(f".{path.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        deadline = time.monotonic() + GRACE
        while (file := _take(lock)) is None:
            try:
                owner = lock.read_text(encoding="ascii", errors="replace").strip()[:20]
            except FileNotFoundError:  # its owner has let go of it just now
                continue
            if (owner and _lives(owner)) or time.monotonic() > deadline:
                raise InUse(f"{path}: process {owner or '(unknown)'} is making it; wait for it, or stop it.")
            time.sleep(0.1)
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
    except OSError as error:
        raise RepCodecError(
            f"{path} could not be written ({error.strerror}): choose a folder you may write to."
        ) from error
    with file:
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def _lives(process: str) -> bool:
    """Say whether a process of this machine has this id; True where that cannot be known."""
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except (ValueError, PermissionError):
        return True
    return True


def _take(lock: Path) -> IO[str] | None:
    """Open a lock file and hold it; None when another process does."""
    while True:
        file = open(lock, "a", encoding="ascii")  # noqa: SIM115  # the caller closes it
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(file.fileno()).st_ino == lock.stat().st_ino:
                return file
        except BlockingIOError:
            file.close()
            return None
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                return file
            raise
        file.close()  # its last owner took it away just before we got it
