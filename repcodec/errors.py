"""The one error class for what a user can mend, and how an entry point shows it."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class RepCodecError(Exception):
    """Bad input or an unusable environment, described in one sentence for the user.

    The sentence names the file or option, what was found, what was expected and what to do.
    Entry points print it without a traceback and exit with code 1.
    """


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def user_message(error: BaseException) -> str | None:
    """Return the sentence for the user behind an error, None where it is no user's mistake.

    Looks through errors that wrap others (Hydra's when it makes an object), and through the traceback that a
    DataLoader worker makes of one. What the system refuses by name (a full disk, a folder that cannot be made)
    counts too, as do Hydra's and Lightning's own words about a wrong option.
    """
    # By name: this file is imported where neither Hydra nor Lightning must be.
    making = type(error).__name__ == "InstantiationException"
    if type(error).__module__ == "omegaconf.errors":  # its further lines are of no use to the user
        return first_line(error)
    if type(error).__module__ == "hydra.errors" and not making:
        return str(error)
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, RepCodecError):
            return str(cause).rpartition("RepCodecError: ")[2].strip()
        if isinstance(cause, OSError) and cause.filename is not None:
            return f"{cause.filename}: {cause.strerror}."
        if type(cause).__name__ == "MisconfigurationException" or (making and isinstance(cause, ValueError)):
            return str(cause)
        cause = cause.__cause__
    return None


@contextmanager
def one_sentence() -> Iterator[None]:
    """End the program with exit code 1 and one sentence when the block ends in a user's mistake."""
    try:
        yield
    except Exception as error:
        message = user_message(error)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        sys.exit(1)
