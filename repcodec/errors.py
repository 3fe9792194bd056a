"""The one error class for what a user can mend, and how an entry point shows it."""

import difflib
import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

EXTRAS = {"optuna": "sweep", "joblib": "sweep", "submitit_local": "slurm", "submitit_slurm": "slurm"}
"""Hydra's plugins, and the extras that bring them."""


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
        return _wrong_override(error)
    if type(error).__module__.startswith("submitit.") or "are you indeed on a slurm cluster" in str(error):
        return f"the sweep's jobs could not be run by submitit: {first_line(error)}"
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, RepCodecError):
            return str(cause).rpartition("RepCodecError: ")[2].strip()
        if isinstance(cause, OSError) and cause.filename is not None:
            return f"{cause.filename}: {cause.strerror}."
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):  # in a write no file is named
            return f"{cause.strerror}: free some space, then run the same command again."
        if str(cause).startswith("No supported gpu backend"):
            return "no GPU was found; trainer=cpu trains without one, trainer=ddp_cpu in several processes."
        if type(cause).__name__ == "MisconfigurationException" or (making and isinstance(cause, ValueError)):
            return str(cause)
        if making and isinstance(cause, TypeError):  # an option that there is not, or a value of another kind
            key = str(error).rpartition("full_key: ")[2]
            return f"{key}: a value there is of another kind, or there is no such option ({first_line(cause)})."
        if type(cause).__name__ in ("InductorError", "BackendCompilerFailed"):
            return f"module.compile=true: torch.compile fails ({first_line(cause)}); train with module.compile=false."
        if _lost_a_rank(cause):
            return (
                f"another process of this run has died or no longer answers ({first_line(cause)}); see what it said, "
                "and start the run again from its last checkpoint."
            )
        cause = cause.__cause__
    return None


def _wrong_override(error: Any) -> str:
    """Say in one sentence what Hydra says of an override in several lines, with its search path."""
    quoted = first_line(error).split("'")[1::2]
    if type(error).__name__ == "MissingConfigException":
        group, _, option = (error.missing_cfg_file or "").rpartition("/")
        if option in EXTRAS:
            return f"{group}={option} needs a plugin: pip install 'repcodec[{EXTRAS[option]}]'."
        return f"{group}={option}: there is no such option; {group} has {', '.join(error.options or ['none'])}."
    if quoted and str(error).startswith("Ambiguous value"):
        return f"{quoted[0]}: several values make a sweep, which needs -m; a list is written key=[value,value]."
    if quoted and type(error.__cause__).__module__ == "omegaconf.errors":
        parent = error.__cause__.parent_node or ()
        near = difflib.get_close_matches(str(error.__cause__.key), map(str, parent), 1)
        return (
            f"{quoted[0]}: the configuration has no such option{f'; did you mean {near[0]}?' if near else '.'} "
            f"--cfg job lists all; an argument that it leaves unsaid is added with a plus, +{quoted[0]}=…"
        )
    return str(error)


def _lost_a_rank(error: BaseException) -> bool:
    """Say whether torch.distributed, of which gloo tells no kind of its own, could not reach another process."""
    kinds = ("DistBackendError", "DistNetworkError", "DistStoreError")
    return type(error).__name__ in kinds or (isinstance(error, RuntimeError) and "/gloo/" in str(error))


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
