"""The one error class for what a user can mend, and how an entry point shows it."""


class RepCodecError(Exception):
    """Bad input or an unusable environment, described in one sentence for the user.

    The sentence names the file or option, what was found, what was expected and what to do.
    Entry points print it without a traceback and exit with code 1.
    """


def user_message(error: RepCodecError) -> str:
    """Return the sentence of `error`, also when a DataLoader worker has wrapped it in a traceback."""
    return str(error).rpartition("RepCodecError: ")[2].strip()
