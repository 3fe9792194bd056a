"""The one error class for what a user can mend, and how an entry point shows it."""


class RepCodecError(Exception):
    """Bad input or an unusable environment, described in one sentence for the user.

    The sentence names the file or option, what was found, what was expected and what to do.
    Entry points print it without a traceback and exit with code 1.
    """


def user_message(error: BaseException) -> str | None:
    """Return the sentence for the user behind an error, None where it is no user's mistake.

    Looks through the errors that wrap others (Hydra's when it makes an object), and through the traceback
    that a DataLoader worker makes of one. A ValueError counts where it is what Hydra's error wraps: an
    option's value that does not fit.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, RepCodecError):
            return str(cause).rpartition("RepCodecError: ")[2].strip()
        if isinstance(cause, ValueError) and cause is not error:
            return str(cause)
        cause = cause.__cause__
    return None
