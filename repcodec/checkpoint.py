"""Saved folders: config.json and model.safetensors. Nothing in them is ever unpickled."""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from repcodec.errors import RepCodecError, first_line
from repcodec.files import atomic_write

if TYPE_CHECKING:
    from torch import Tensor, nn

FILES = ("config.json", "model.safetensors", "README.md")
"""What a saved folder holds; the last one is the model card."""


def save_folder(folder: Path | str, config: dict, tensors: "dict[str, Tensor]") -> None:
    """Write config.json and model.safetensors, each whole or not at all, config.json last.

    config.json holds the weights' hash, so that a kill between the two leaves nothing that looks finished.

    Raises:
        RepCodecError: the folder cannot be written.
    """
    from safetensors.torch import save

    folder = Path(folder)
    with atomic_write(folder / "model.safetensors", "w+b") as file:
        weights = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
        file.write(weights)
    config = {**config, "weights_sha256": hashlib.sha256(weights).hexdigest()}
    with atomic_write(folder / "config.json") as file:
        json.dump(config, file, indent=2)
        file.write("\n")


def read_config(folder: Path | str) -> dict:
    """Read the config.json of a saved folder.

    Raises:
        RepCodecError: there is none, or it is no JSON object with a "kind".
    """
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        kind = config["kind"]
    except FileNotFoundError as error:
        raise RepCodecError(
            f"{path} does not exist: {folder} is not a saved codec or k-means model; train.py saves one in the "
            "codec/ folder of its run."
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RepCodecError(f"{path}: not a readable description of a saved codec ({error!r}).") from error
    if not isinstance(kind, str):
        raise RepCodecError(f'{path}: "kind" is {kind!r}, expected a name.')
    return config


def load_tensors(folder: Path | str, module: "nn.Module") -> None:
    """Give a module the parameters and buffers of model.safetensors; names and shapes must agree exactly.

    They are mapped from the file, not copied: what is not used takes no memory.

    Raises:
        RepCodecError: the file is missing, damaged, or of another architecture.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(folder) / "model.safetensors"
    try:
        tensors = load_file(path)
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, SafetensorError) as error:
        raise RepCodecError(f"{path}: the weights cannot be read ({error}); save or download them again.") from error
    # A folder made by hand may lack the hash.
    if read_config(folder).get("weights_sha256", found) != found:
        raise RepCodecError(f"{path}: these are not the weights that config.json describes; save or copy both again.")
    try:
        module.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        raise RepCodecError(
            f"{path}: the weights do not fit the architecture in config.json beside them "
            f"({str(error).splitlines()[-1].strip()})"
        ) from error


def local_folder(name: Path | str, revision: str | None = None) -> Path:
    """Return a saved folder: `name` itself, or what the hub has under that id, downloaded once.

    Raises:
        RepCodecError: there is no such folder, and no such id or no network.
    """
    folder = Path(name).expanduser()
    is_id = str(name).count("/") == 1 and not str(name).startswith(("/", ".", "~"))
    if folder.is_dir() or not is_id:
        return folder
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(str(name), revision=revision, allow_patterns=list(FILES)))
    except Exception as error:  # the library and what it stands on raise many kinds
        raise RepCodecError(
            f"{name}: neither a folder here nor a codec that could be downloaded ({first_line(error)}); without a "
            "network, copy the folder that save_pretrained wrote and name it."
        ) from error
