"""Saved folders on the Hugging Face hub: read by id, and pushed."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from repcodec.checkpoint import FILES, read_config, save_folder
from repcodec.errors import RepCodecError, first_line
from repcodec.files import atomic_write
from repcodec.model_card import is_hub_id, model_card, public

if TYPE_CHECKING:
    from torch import Tensor

SECONDS = 10
"""How long the hub may take for its first answer; most of the library's own requests wait without end."""


def local_folder(name: Path | str, revision: str | None = None) -> Path:
    """Return a saved folder: `name` itself, or what the hub has under that id, downloaded once.

    Without a network, or with HF_HUB_OFFLINE=1, what was downloaded before is taken.

    Args:
        name: a folder, or a hub id such as "user/codec".
        revision: branch, tag or commit on the hub.

    Raises:
        RepCodecError: no such folder, and no such id or no way to the hub; or the id holds no saved folder.
    """
    folder = Path(name).expanduser()
    if folder.is_dir() or not is_hub_id(name):
        return folder
    import huggingface_hub

    unreachable = _unreachable(str(name), revision, None)
    try:
        found = huggingface_hub.snapshot_download(
            str(name), revision=revision, allow_patterns=list(FILES), local_files_only=unreachable is not None
        )
    except Exception as error:  # the library and what it stands on raise many kinds
        at = f" at revision {revision}" if revision is not None else ""
        raise RepCodecError(
            f"{name}: no folder here, and not to be had from the hub{at}: {_reason(unreachable or error)}, or name a "
            "folder that save_pretrained wrote."
        ) from error
    if missing := [file for file in FILES[:2] if not Path(found, file).is_file()]:
        raise RepCodecError(
            f"{name}: what the hub has there lacks {' and '.join(missing)}, so it is no saved codec or k-means model; "
            "name one that push_to_hub made."
        )
    return Path(found)


def push(
    config: dict[str, Any],
    tensors: "dict[str, Tensor]",
    repo_id: str,
    *,
    private: bool = False,
    token: str | None = None,
    revision: str | None = None,
) -> str:
    """Save what `save_folder` saves on the hub, without the names of this machine's folders; see `push_folder`.

    Raises:
        RepCodecError: the hub cannot be reached, or refuses.
    """
    config = public(config)
    with TemporaryDirectory() as folder:
        save_folder(folder, config, tensors)
        with atomic_write(Path(folder, "README.md")) as file:
            file.write(model_card(config, repo_id))
        return push_folder(folder, repo_id, private=private, token=token, revision=revision)


def push_folder(
    folder: Path | str,
    repo_id: str,
    *,
    private: bool = False,
    token: str | None = None,
    message: str = "Upload with repcodec",
    revision: str | None = None,
) -> str:
    """Upload a saved folder as it is; repository and branch are made when missing. Return its address on the hub.

    Args:
        folder: what `save_folder` wrote; other files in it stay here.
        repo_id: "user/name", or "name" for the token's owner.
        private: whether a new repository is private; one that is there stays what it is.
        token: with the right to write; None: that of `hf auth login` or HF_TOKEN.
        message: of the commit.
        revision: the branch; None: main.

    Raises:
        RepCodecError: the folder is no saved one, there is no token, or the hub cannot be reached or refuses.
    """
    import huggingface_hub

    read_config(folder)
    if token is None and huggingface_hub.get_token() is None:
        raise RepCodecError(
            f"{repo_id}: the hub takes no uploads without a token: log in with `hf auth login`, set HF_TOKEN, or give "
            "token=…"
        )
    try:
        if (unreachable := _unreachable(repo_id, None, token)) is not None:
            raise unreachable
        hub = huggingface_hub.HfApi(token=token)
        address = hub.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            hub.create_branch(address.repo_id, branch=revision, exist_ok=True)
        hub.upload_folder(
            repo_id=address.repo_id, folder_path=folder, allow_patterns=list(FILES), commit_message=message,
            revision=revision,
        )  # fmt: skip
    except Exception as error:  # see local_folder
        raise RepCodecError(f"{repo_id}: not uploaded to the hub: {_reason(error)}.") from error
    return str(address) if revision is None else f"{address}/tree/{revision}"


def _unreachable(repo_id: str, revision: str | None, token: str | None) -> Exception | None:
    """Ask the hub for an id; return the error when it gives no answer at all, within `SECONDS`."""
    import huggingface_hub

    try:
        huggingface_hub.HfApi(token=token).model_info(repo_id, revision=revision, timeout=SECONDS)
    except huggingface_hub.errors.HfHubHTTPError:
        return None  # a refusal is an answer; whoever asks next is told the same
    except Exception as error:
        return error
    return None


def _reason(error: Exception) -> str:
    """Say in words why the hub's library has given up; and what to do."""
    import huggingface_hub
    from huggingface_hub import errors

    causes: list[BaseException] = [error]
    while cause := causes[-1].__cause__:
        causes.append(cause)

    def met(kind: type[BaseException]) -> bool:
        return any(isinstance(cause, kind) for cause in causes)

    answers = [answer for cause in causes if (answer := getattr(cause, "response", None)) is not None]
    status = answers[0].status_code if answers else None
    log_in = "log in with `hf auth login`, or set HF_TOKEN"
    if met(errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set; unset it"
    if met(errors.HFValidationError):
        return f"this is no id ({first_line(causes[-1])}); give user/name"
    if met(errors.RevisionNotFoundError):
        return "there is no such revision; give a branch, tag or commit that there is"
    if met(errors.RepositoryNotFoundError) or status == 404:
        return f"there is no such id, or it is hidden from you ({status}); check its spelling, or {log_in}"
    if status == 401:
        return f"the hub does not know the token (401); {log_in}"
    if status == 403:
        return "the token may not do that (403); make one that may, in the hub's settings"
    if status is not None:
        said = answers[0].headers.get("X-Error-Message") or answers[0].reason_phrase
        return f"the hub answered {status} {said}; try again later"
    if any(type(cause).__module__.startswith("httpx") for cause in causes):
        where = huggingface_hub.constants.ENDPOINT
        return f"{where} gave no answer ({first_line(causes[-1])}); connect to the network"
    return f"{first_line(causes[-1])}; mend that and try again"
