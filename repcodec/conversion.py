"""Any codec file -> a saved codec: published .pkl files, Lightning's .ckpt files, saved folders and hub ids."""

from pathlib import Path
from typing import Any

from repcodec.codec import RepCodec
from repcodec.errors import RepCodecError


def convert(source: Path | str, folder: Path | str, config: Path | str | dict[str, Any] | None = None) -> RepCodec:
    """Save a codec of any kind in `folder`: config.json, model.safetensors and a model card.

    Args:
        source: a folder is a saved codec, a .ckpt file a Lightning checkpoint of train.py, any other file a codec in
            the published format; what is neither file nor folder is a hub id.
        folder: made when missing.
        config: a published training config, see `RepCodec.from_published`; for the published format alone.

    Returns:
        The codec, in evaluation mode.

    Raises:
        RepCodecError: `source` holds no codec, or a damaged one; `config` is given where the file says its
            architecture; `folder` is the source itself, or cannot be written.
    """
    path, folder = Path(source).expanduser(), Path(folder).expanduser()
    if folder.exists() and path.exists() and folder.samefile(path):
        raise RepCodecError(f"{folder}: this is what shall be converted, so it is left alone; name another folder.")
    published = not path.is_dir() and path.suffix != ".ckpt" and (path.is_file() or path.suffix == ".pkl")
    if config is not None and not published:
        raise RepCodecError(
            f"{source}: says its own architecture; give a config for codecs in the published format alone, .pkl files."
        )
    if published:
        codec = RepCodec.from_published(path, config)
    elif path.suffix == ".ckpt" and not path.is_dir():
        codec = RepCodec.from_lightning(path)
    else:
        codec = RepCodec.from_pretrained(source)
    codec.save_pretrained(folder)
    return codec
