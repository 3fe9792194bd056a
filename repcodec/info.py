"""What a codec, a folder of feature shards or a tokens file is, in a few lines; loads neither torch nor any weights."""

from math import log2
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from repcodec.architecture import FRAME_RATE, Architecture
from repcodec.checkpoint import read_config
from repcodec.errors import RepCodecError
from repcodec.hub import local_folder
from repcodec.shard_files import num_shards_there
from repcodec.shards import FeatureShards
from repcodec.tokens import is_json, read_about, read_root, read_tokens


def describe_path(name: Path | str) -> list[tuple[str, str]]:
    """Return what there is to say of a path: pairs of a heading and a text.

    Args:
        name: a saved codec or k-means model (a folder or a hub id), a folder of feature shards or one of its .npy
            files, or a tokens file.

    Raises:
        RepCodecError: it is none of these, or a damaged one.
    """
    path = local_folder(name)
    if path.is_dir():
        if (path / "config.json").exists():
            return _tokenizer(path)
        if num_shards_there(path):
            return _shards(path)
        raise RepCodecError(f"{path}: neither a saved codec (config.json) nor feature shards (0_1.npy …) lie there.")
    if not path.exists():
        raise RepCodecError(
            f"{path}: no such file or folder; give a codec, a folder of feature shards or a tokens file."
        )
    if path.suffix in (".ckpt", ".pkl"):
        raise RepCodecError(f"{path}: a checkpoint; repcodec convert makes a codec of it, give that one.")
    return _shards(path.parent) if path.suffix == ".npy" else _tokens(path)


def _tokenizer(folder: Path) -> list[tuple[str, str]]:
    config = read_config(folder)
    try:
        kind, dim, size, rate = config["kind"], config["dim"], config["codebook_size"], config.get("frame_rate")
        num_codebooks, stride = config.get("codebook_num", 1), 1
        rows = [("kind", "RepCodec" if kind == "repcodec" else kind)]
        rate_text = "frames per second not stated, 50 assumed" if rate is None else f"{rate:g} frames per second"
        rate = rate or FRAME_RATE
        rows.append(("features", f"{_source(config)}, width {dim}, {rate_text}"))
        shape = None
        if kind == "repcodec":
            names = Architecture.__dataclass_fields__
            shape = Architecture(**{key: value for key, value in config.items() if key in names})
            stride = shape.stride
        bits = num_codebooks * log2(size) * rate / stride
        several = f"{num_codebooks} codebooks of {size}" if num_codebooks > 1 else f"one codebook of {size}"
        rows.append(("codes", f"{several}, {rate / stride:g} codes per second each, {bits:g} bits per second"))
        if shape is not None:
            before, after = (1000 * frames / rate for frames in shape.reach)
            strides = f"strides {'x'.join(map(str, shape.enc_strides))}" if stride > 1 else "no downsampling"
            rows.append(
                ("encoder stack", f"{len(shape.enc_strides)} stages of width {shape.encode_channels}, {strides}")
            )
            rows.append(("look-ahead", f"{after:g} ms after the code's own {1000 * stride / rate:g} ms"))
            rows.append(("look-back", f"{before:g} ms"))
        norms = {True: "the waveform's", False: "none of the waveform", None: "log-mel, no waveform"}
        norm = norms[config["waveform_norm"]] if "waveform_norm" in config else "not stated"
        of_features = {True: "; features by the training set's mean and scale", False: "; none of the features"}
        rows.append(("normalization", norm + of_features.get(config.get("feature_norm", ""), "")))
        rows += [(key.replace("_", " "), f"{value:.4g}") for key, value in (config.get("figures") or {}).items()]
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise RepCodecError(f"{folder}/config.json: describes no codec this version knows ({error!r}).") from error
    rows.append(("parameters", _parameters(folder)))
    rows.append(("made by", f"repcodec {config.get('repcodec_version', 'of an unknown version')}"))
    return rows


def _source(config: dict[str, Any]) -> str:
    return f"{config['encoder']}, layer {config.get('layer')}" if config.get("encoder") else "of an unknown encoder"


def _parameters(folder: Path) -> str:
    """Count the values in model.safetensors by its header."""
    from safetensors import SafetensorError, safe_open

    path = folder / "model.safetensors"
    try:
        with safe_open(path, framework="np") as file:
            names = file.keys()  # the file itself is no mapping
            sizes = {name: int(np.prod(file.get_slice(name).get_shape())) for name in names}
    except (OSError, SafetensorError) as error:
        raise RepCodecError(f"{path}: the weights cannot be read ({error}); save or download them again.") from error
    trained = sum(size for name, size in sizes.items() if name.startswith(("encoder.", "decoder.")))
    return f"{trained:,} in the stacks, {sum(sizes.values()) - trained:,} in codebooks and statistics"


def _shards(folder: Path) -> list[tuple[str, str]]:
    shards = FeatureShards(folder)
    rate = shards.frame_rate or FRAME_RATE
    frames = int(shards.lengths.sum())
    rows = [
        ("kind", f"feature shards, {max(num_shards_there(folder))} in number, {shards.dtype}"),
        ("features", f"{_source(shards.about)}, width {shards.dim}, {rate:g} frames per second"),
        ("utterances", f"{len(shards):,}"),
        ("frames", f"{frames:,}, {_time(frames / rate)}"),
        ("longest", f"{int(shards.lengths.max()):,} frames, {_time(shards.lengths.max() / rate)}"),
    ]
    if shards.names is None:
        return [*rows, ("names", "none: made elsewhere, the manifest names the utterances")]
    return [*rows, ("first", shards.names[0]), ("audio root", shards.root)]


def _tokens(path: Path) -> list[tuple[str, str]]:
    about = read_about(path)
    rate = about.get("codes_per_second", FRAME_RATE)
    counts: list[npt.NDArray[np.integer]] = []
    num_utterances = total = longest = 0
    first = None
    for tokens in tqdm(read_tokens(path), desc="Reading", unit="utt", leave=False, delay=1):
        if not counts:
            counts = [np.zeros(0, np.int64) for _ in tokens.codes]
        if len(tokens.codes) != len(counts):
            raise RepCodecError(
                f"{path}, {tokens.name}: {len(tokens.codes)} codebooks, those before have {len(counts)}."
            )
        first = first or tokens.name
        num_utterances, total = num_utterances + 1, total + tokens.codes.shape[1]
        longest = max(longest, tokens.codes.shape[1])
        counts = [_added(found, row, tokens.name, path) for found, row in zip(counts, tokens.codes, strict=True)]
    if first is None:
        raise RepCodecError(f"{path}: the tokens file holds no utterance.")
    rows = [
        ("kind", f"tokens file, {'JSON lines' if is_json(path) else 'published format'}"),
        ("made by", str(about.get("tokenizer", "unknown: no description lies beside it"))),
        ("utterances", f"{num_utterances:,}"),
        ("codes", f"{total:,} of each of {len(counts)} codebooks, {_time(total / rate)} at {rate:g} per second"),
        ("longest", f"{longest:,} codes"),
    ]
    for k, found in enumerate(counts):
        share = found[found > 0] / max(1, found.sum())
        perplexity = np.exp(-(share * np.log(share)).sum())
        of = f" of {about['codebook_size']}" if "codebook_size" in about else ""
        rows.append(
            (f"codebook {k}", f"{len(share)}{of} codes used, the largest {len(found) - 1}; perplexity {perplexity:.1f}")
        )
    return [*rows, ("first", first), ("audio root", read_root(path))]


MAX_CODE = 2**24
"""A code above this is no code of any codebook, and counting it would fill the memory."""


def _added(
    counts: npt.NDArray[np.integer], codes: npt.NDArray[np.int64], name: str, path: Path
) -> npt.NDArray[np.intp]:
    """Add the codes (N,) of an utterance to the counts of each code."""
    if codes.size and codes.max() > MAX_CODE:
        raise RepCodecError(f"{path}, {name}: code {codes.max()} is larger than any codebook; make the file again.")
    more = np.bincount(codes, minlength=len(counts))
    more[: len(counts)] += counts
    return more


def _time(seconds: float) -> str:
    """Return a duration as people say it."""
    hours, minutes = seconds / 3600, seconds / 60
    return (
        f"{hours:.1f} hours" if hours >= 1 else f"{minutes:.1f} minutes" if minutes >= 1 else f"{seconds:.1f} seconds"
    )
