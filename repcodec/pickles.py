"""Pickles that torch.save made: tensors and plain values alone are read of them, no more than the file is long.

Nothing in them is ever run.
"""

import json
import os
import re
import warnings
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repcodec.errors import RepCodecError

if TYPE_CHECKING:
    from torch import Tensor

MOST_VALUES = 10_000
"""Values in a description of a codec, at most; real ones have a hundred."""


def read_pickle(path: Path) -> Any:
    """Read a file that torch.save made, tensors and plain values only.

    Raises:
        RepCodecError: there is no such file, it is no such file or a damaged one, or holds more.
    """
    import torch

    if not path.is_file():
        found = "is a folder" if path.is_dir() else "does not exist"
        raise RepCodecError(f"{path} {found}, expected a checkpoint file; check the path.")
    try:
        if zipfile.is_zipfile(path):  # torch writes it unpacked: it is no longer than the file
            with zipfile.ZipFile(path) as parts:
                if sum(part.file_size for part in parts.infolist()) > os.path.getsize(path):
                    raise ValueError("it holds more than its own size")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about the kinds of file that are then refused
            return torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError as error:
        raise RepCodecError(f"{path}: you may not read it ({error.strerror}); ask its owner.") from error
    except Exception as error:  # torch raises many kinds, and in many words advises to run the file
        if code := re.search(r"GLOBAL ([\w.]{1,80})", str(error)):
            raise RepCodecError(
                f"{path}: not loaded, because it holds {code[1]} and loading that could run code; expected tensors "
                "and plain values alone, so take the file from its publisher or save it again without that."
            ) from error
        raise RepCodecError(
            f"{path}: not a checkpoint that torch can read; it is damaged, cut off or of another kind: take "
            "another copy of it."
        ) from error


def weights_of(path: Path, name: str, tensor: Any) -> "Tensor":
    """Return what a checkpoint holds under a name, without its gradient.

    Raises:
        RepCodecError: it is no plain tensor of floating point numbers.
    """
    import torch

    kind = getattr(tensor, "dtype", type(tensor).__name__)
    plain = isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and tensor.layout == torch.strided
    if not plain or tensor.device.type != "cpu":
        raise RepCodecError(f"{path}: {name} is no tensor of weights (found {kind}); use another file.")
    detached: Tensor = tensor.detach()
    return detached


def check_bytes(path: Path | str, tensors: "dict[str, Tensor]") -> None:
    """Refuse tensors that share their values, or repeat them: small in the file, they may fill the memory.

    Raises:
        RepCodecError: they have more bytes than the file.
    """
    if sum(tensor.nbytes for tensor in tensors.values()) > os.path.getsize(path):
        raise RepCodecError(f"{path}: its tensors have more bytes than the file; it is no codec, use another one.")


def plain_config(path: Path, described: Any) -> dict[str, Any]:
    """Return a checkpoint's description of a codec, as it would come back from config.json.

    Raises:
        RepCodecError: it is none, or one that no codec has; names `path`.
    """
    # Lists that hold one another many times over are small in a pickle, and endless when they are written out.
    waiting, seen = [described], 0
    while waiting and seen <= MOST_VALUES:
        value = waiting.pop()
        seen += 1
        waiting += value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    try:
        config = json.loads(json.dumps(described)) if seen <= MOST_VALUES else None
    except (TypeError, ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise RepCodecError(f"{path}: its description of the codec is not made of plain values; use another file.")
    return config
