"""Codecs on disk: saved folders (config.json, model.safetensors), published .pkl files, Lightning's .ckpt files.

Nothing in them is ever run: of the last two, which are pickles, tensors and plain values alone are read.
"""

import hashlib
import json
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repcodec.architecture import Architecture
from repcodec.errors import RepCodecError, first_line
from repcodec.files import atomic_write, locked
from repcodec.model_card import model_card
from repcodec.pickles import check_bytes, plain_config, read_pickle, weights_of
from repcodec.shard_files import FRAME_RATES

if TYPE_CHECKING:
    from torch import Tensor, nn

FILES = ("config.json", "model.safetensors", "README.md")
"""What a saved folder holds; the last one is the model card."""

PUBLISHED = {
    "hubert_base_l9": ("hubert_base", 9),
    "hubert_large_l18": ("hubert_large", 18),
    "data2vec_base_l6": ("data2vec_base", 6),
    "data2vec_large_l18": ("data2vec_large", 18),
    "whisper_medium_l24": ("whisper_medium", 24),
    "whisper_large_l32": ("whisper_large_v2", 32),
}
"""The published settings: a checkpoint's file stem -> the speech encoder's name in the encoder table, and the layer."""

OPTIONS = {field.name for field in fields(Architecture)} - {"dim", "pad_to_stride"} | {"codebook_num", "codebook_size"}
"""What `model_params` of a published training config may say."""


MOST_YAML, MOST_DEPTH = 100_000, 100
"""Characters of a training config, and levels of lists in it, at most; real ones have a few thousand, and three."""


def save_folder(folder: Path | str, config: dict[str, Any], tensors: "dict[str, Tensor]") -> None:
    """Write model.safetensors, the model card README.md, and config.json, each whole or not at all and in this order.

    config.json holds the weights' hash, so that a kill in between leaves nothing that looks finished.

    Raises:
        RepCodecError: the folder cannot be written, or another process is saving there.
    """
    from safetensors.torch import save

    folder = Path(folder)
    with locked(folder / "model.safetensors"):  # two that save at once would mix theirs
        with atomic_write(folder / "model.safetensors", "w+b") as file:
            weights = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
            file.write(weights)
        with atomic_write(folder / "README.md") as file:
            file.write(model_card(config))
        config = {**config, "weights_sha256": hashlib.sha256(weights).hexdigest()}
        with atomic_write(folder / "config.json") as file:
            json.dump(config, file, indent=2)
            file.write("\n")


def read_config(folder: Path | str) -> dict[str, Any]:
    """Read the config.json of a saved folder.

    Raises:
        RepCodecError: there is none, or it is no JSON object with a "kind".
    """
    path = Path(folder) / "config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        kind = config["kind"]
    except FileNotFoundError as error:
        raise RepCodecError(
            f"{path} does not exist: {folder} is not a saved codec or k-means model; train.py saves one in the "
            "codec/ folder of its run."
        ) from error
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise RepCodecError(f"{path}: not a readable description of a saved codec ({error!r}).") from error
    if not isinstance(kind, str):
        raise RepCodecError(f'{path}: "kind" is {kind!r}, expected a name.')
    rate = config.get("frame_rate", 1)
    if not isinstance(rate, int | float) or not FRAME_RATES[0] <= rate <= FRAME_RATES[1]:
        raise RepCodecError(f'{path}: "frame_rate" is {rate!r}, expected frames per second, such as 50.')
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
    except (OSError, SafetensorError, ValueError, LookupError, TypeError, RuntimeError) as error:
        raise RepCodecError(
            f"{path}: the weights cannot be read ({first_line(error)}); save or download them again."
        ) from error
    # A folder made by hand may lack the hash.
    if read_config(folder).get("weights_sha256", found) != found:
        raise RepCodecError(f"{path}: these are not the weights that config.json describes; save or copy both again.")
    try:
        module.load_state_dict(tensors, assign=True)
        for parameter in module.parameters():
            parameter.mapped = True  # type: ignore[attr-defined]  # see repcodec.conv
    except RuntimeError as error:
        raise RepCodecError(
            f"{path}: the weights do not fit the architecture in config.json beside them "
            f"({str(error).splitlines()[-1].strip()})"
        ) from error


def read_published(
    path: Path | str, config: Path | str | dict[str, Any] | None = None
) -> "tuple[dict[str, Any], dict[str, Tensor]]":
    """Read a codec in the published format, a .pkl file.

    Args:
        path: the file; its stem names one of the settings in `PUBLISHED`, unless `config` says the architecture.
        config: a published training config, a YAML file or what stands in one; what its `model_params` leave out is
            as published.

    Returns:
        What config.json says of it, and its tensors under our names.

    Raises:
        RepCodecError: the file is unreadable, of another kind, would run code, or lacks weights; its stem is none of
            the six and there is no config; the config is no such one, or the weights are of another architecture.
    """
    import torch

    path = Path(path).expanduser()
    loaded = read_pickle(path)
    model = loaded.get("model") if isinstance(loaded, dict) else None
    state: Any = model.get("repcodec") if isinstance(model, dict) else None
    first = state.get("encoder.conv.conv.weight") if isinstance(state, dict) else None
    if not isinstance(first, torch.Tensor) or first.ndim != 3:
        advice = "use another file"
        if isinstance(loaded, dict) and "state_dict" in loaded:
            advice = "it looks like a Lightning checkpoint, whose suffix is .ckpt"
        raise RepCodecError(
            f"{path}: expected a published codec, weights such as encoder.conv.conv.weight (C, D, kernel) in "
            f'["model"]["repcodec"], but found none; {advice}.'
        )
    if path.stem not in PUBLISHED and config is None:
        raise RepCodecError(
            f"{path}: its name is none of {', '.join(PUBLISHED)}, and the file does not say its architecture: give "
            "its training config, a YAML file (config), or name it after its setting."
        )
    options = {} if config is None else _model_params(config)
    about = _setting(path, None if "input_channels" in options else first.shape[1])
    books = {"codebook_num": options.pop("codebook_num", 1), "codebook_size": options.pop("codebook_size", 1024)}
    # A rest of frames that does not fill a code has none, as published; without strides there is no rest.
    pad = all(stride == 1 for stride in options.get("enc_strides", ()))
    try:
        shape = Architecture(options.get("input_channels", first.shape[1]), **options, pad_to_stride=pad)
    except ValueError as error:
        source = "config" if isinstance(config, dict) else config
        raise RepCodecError(f"{source}: its model_params describe no codec ({error}); correct them.") from error
    names = _published_names(shape, books["codebook_num"])
    _check_names(path, state, names, "give the training config that made them")
    tensors = {ours: weights_of(path, theirs, state[theirs]) for theirs, ours in names.items()}
    for name, tensor in tensors.items():
        if name.endswith((".codes", ".sums")) and tensor.ndim == 2:
            tensors[name] = tensor.T  # published, codes are columns
    tensors |= {"feature_mean": torch.zeros(shape.input_channels), "feature_scale": torch.ones(())}
    quantizer = {"kind": "ema", "codebook_size": books["codebook_size"], "num_codebooks": books["codebook_num"]}
    return {"kind": "repcodec", **shape.options(), **books, "quantizer": quantizer, **about}, tensors


def read_lightning(path: Path | str) -> "tuple[dict[str, Any], dict[str, Tensor]]":
    """Read the codec of a Lightning checkpoint that train.py made, a .ckpt file.

    Returns:
        What config.json says of it, and its tensors.

    Raises:
        RepCodecError: the file is unreadable, would run code, holds no codec, or does not describe it.
    """
    path = Path(path).expanduser()
    loaded = read_pickle(path)
    state = loaded.get("state_dict") if isinstance(loaded, dict) else None
    state = state if isinstance(state, dict) else {}
    tensors = {
        name.removeprefix("codec."): weights_of(path, name, tensor)
        for name, tensor in state.items()
        if str(name).startswith("codec.")
    }
    if not tensors:
        raise RepCodecError(
            f"{path}: expected a Lightning checkpoint of train.py, weights codec.… in its state_dict, but found none; "
            "a run has its own in checkpoints/."
        )
    if "codec" not in loaded:
        raise RepCodecError(
            f"{path}: an earlier version made this checkpoint, which does not say the codec's architecture: use the "
            "codec/ folder of its run."
        )
    return plain_config(path, loaded["codec"]), tensors


def fill(module: "nn.Module", tensors: "dict[str, Tensor]", source: Path | str) -> None:
    """Give a module copies of tensors, in its own precision; names and shapes must agree exactly.

    Raises:
        RepCodecError: they do not, or a value is not finite; names `source`, the file that the tensors are from.
    """
    import torch

    expected = module.state_dict()
    _check_names(source, tensors, expected, "use a file that holds the whole codec")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise RepCodecError(
                f"{source}: {name} has shape {tuple(tensor.shape)}, but the architecture described has "
                f"{tuple(expected[name].shape)}; give the training config that made it."
            )
    check_bytes(source, tensors)
    copies = {}
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise RepCodecError(f"{source}: {name} holds values that are not finite; use an earlier checkpoint.")
        copies[name] = tensor.to(expected[name].dtype, copy=True, memory_format=torch.contiguous_format)
    module.load_state_dict(copies, assign=True)


def _check_names(source: Path | str, found: dict[Any, Any], expected: dict[str, Any], advice: str) -> None:
    """Refuse tensors whose names are not those expected.

    Raises:
        RepCodecError: names the first that is missing and the first that is too many.
    """
    missing, unexpected = sorted(expected.keys() - found.keys()), sorted(map(str, found.keys() - expected.keys()))
    if missing or unexpected:
        parts = [f"{len(missing)} missing, such as {missing[0]}"] if missing else []
        parts += [f"{len(unexpected)} unexpected, such as {unexpected[0]}"] if unexpected else []
        raise RepCodecError(f"{source}: its tensors are not those of the architecture ({'; '.join(parts)}): {advice}.")


def _setting(path: Path, width: int | None) -> dict[str, Any]:
    """Return what config.json says of a published file besides its architecture: where the features are from.

    Raises:
        RepCodecError: its weights are of another width than its name says; None: the config says the width.
    """
    from repcodec.speech_encoders import encoder_table

    about = {"frame_rate": 50, "feature_norm": False, "source": path.name, "repcodec_version": version("repcodec")}
    if path.stem not in PUBLISHED:
        return about
    encoder, layer = PUBLISHED[path.stem]
    spec = encoder_table()[encoder]
    if width not in (None, spec.dim):
        fits = [name for name, (other, _) in PUBLISHED.items() if encoder_table()[other].dim == width]
        raise RepCodecError(
            f"{path}: {path.stem} has features of width {spec.dim}, but these weights take {width}, which fits "
            + (f"{' or '.join(fits)}: name the file so." if fits else "none of the six: give its training config.")
        )
    return {"encoder": encoder, "layer": layer, "waveform_norm": spec.waveform_norm, **about}


def _check_yaml(text: str) -> None:
    """Refuse what would keep the YAML parser busy for long: no training config is like that.

    Raises:
        ValueError: it is long, deep (each level makes every later character dearer), or has aliases, which can make a
            short file endless.
    """
    import yaml

    if len(text) > MOST_YAML:
        raise ValueError(f"over {MOST_YAML:,} characters")
    depth = 0
    for event in yaml.parse(text):  # reads on only as far as the next event
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent) or depth > MOST_DEPTH:
            raise ValueError(f"over {MOST_DEPTH} lists in one another, or aliases in it")


def _model_params(config: Path | str | dict[str, Any]) -> dict[str, Any]:
    """Return the options of a published training config.

    Raises:
        RepCodecError: the file is unreadable, has no `model_params`, or one of them is unknown or of another type.
    """
    import yaml

    loaded: Any = config
    source = "config" if isinstance(config, dict) else config
    if not isinstance(config, dict):
        try:
            text = Path(config).expanduser().read_text(encoding="utf-8")
            _check_yaml(text)
            loaded = yaml.safe_load(text)
        except Exception as error:  # the parser raises many kinds for values of a type that they are not of
            said = " ".join(str(error).split())[:300] or type(error).__name__
            raise RepCodecError(f"{config}: not a readable YAML file ({said}); correct it.") from error
    options = loaded.get("model_params") if isinstance(loaded, dict) else None
    if not isinstance(options, dict):
        raise RepCodecError(f"{source}: expected a published training config with model_params, found none.")
    if unknown := [str(name) for name in options if name not in OPTIONS]:
        raise RepCodecError(
            f"{source}: model_params has unknown options ({', '.join(unknown)}); remove them, known are "
            f"{', '.join(sorted(OPTIONS))}."
        )
    for name, value in options.items():
        kind = type(getattr(Architecture, name, 1))  # of the default
        numbers = value if kind is tuple else [value]
        whole = isinstance(numbers, list | tuple) and all(type(number) is int and number > 0 for number in numbers)
        if not (isinstance(value, bool) if kind is bool else whole):
            expected = {bool: "true or false", tuple: "a list of whole numbers from 1 up", int: "a number from 1 up"}
            raise RepCodecError(f"{source}: {name} is {repr(value)[:80]}, expected {expected[kind]}.")
    return dict(options)


def _published_names(shape: Architecture, num_codebooks: int) -> dict[str, str]:
    """Return the name of every tensor of a published codec -> its name here."""
    names = {
        "encoder.conv.conv.weight": "encoder.input.weight",
        "projector.project.conv.weight": "encoder.projector.weight",
        "decoder.conv1.conv.weight": "decoder.input.weight",
        "decoder.conv2.conv.weight": "decoder.output.weight",
    }
    stacks = (
        ("encoder", shape.enc_strides, shape.enc_block_dilations),
        ("decoder", shape.dec_strides, shape.dec_block_dilations),
    )
    for stack, strides, dilations in stacks:
        for i, stride in enumerate(strides):
            theirs, ours = f"{stack}.conv_blocks.{i}", f"{stack}.stages.{i}"
            conv = "deconv" if stack == "decoder" and stride > 1 else "conv"
            for part in ("weight", "bias") if shape.bias else ("weight",):
                names[f"{theirs}.conv.{conv}.{part}"] = f"{ours}.conv.{part}"
            for j in range(len(dilations)):
                names[f"{theirs}.res_units.{j}.conv1.conv.weight"] = f"{ours}.residuals.{j}.conv.weight"
                names[f"{theirs}.res_units.{j}.conv2.weight"] = f"{ours}.residuals.{j}.pointwise.weight"
    for k in range(num_codebooks):
        theirs, ours = f"quantizer.codebook.layers.{k}", f"quantizer.codebooks.{k}"
        names |= {f"{theirs}.embed": f"{ours}.codes", f"{theirs}.cluster_size": f"{ours}.counts"}
        names[f"{theirs}.embed_avg"] = f"{ours}.sums"
    return names
