"""The model card of a saved folder, README.md: what it is, its facts, the measured figures, how to use it.

Values come from config.json, which may be anybody's file: each is written as one line of plain text.
"""

import re
from dataclasses import fields
from math import log2
from pathlib import Path
from typing import Any

from repcodec.architecture import Architecture

CLASSES = {"repcodec": ("codec", "RepCodec"), "kmeans": ("kmeans", "KMeansTokenizer")}
"""Module and class of each kind of saved folder."""

FIGURES = {
    "normalized_error": "normalized error, Σ‖x − x̂‖² / Σ‖x − mean‖²: 0 is perfect",
    "perplexity": "perplexity of the codes",
    "used_share": "share of codes used",
    "entropy_bits": "entropy of the codes, bits a frame of codes",
}
"""What the figures of config.json mean; others stand under their names."""


def model_card(config: dict[str, Any], name: str | None = None) -> str:
    """Return the card of a saved codec or k-means model, as Markdown with YAML front matter.

    It names no folder of this machine.

    Args:
        config: what config.json says; keys that are missing, or of the wrong kind, are left out.
        name: the id on the hub, where the card goes there.
    """
    from jinja2 import Environment, PackageLoader

    kind, figures, measured_on = (config.get(key) for key in ("kind", "figures", "measured_on"))
    figures = figures if isinstance(figures, dict) else {}
    measured = {FIGURES.get(key, key): _figure(value) for key, value in figures.items()}
    what, features = _names(config)
    loader = PackageLoader("repcodec", "templates")
    template = Environment(loader=loader, trim_blocks=True, keep_trailing_newline=True).get_template("model_card.md")
    return template.render(
        title=f"{what}, {features}",
        what=what,
        features=features,
        facts=[(key, plain(value)) for key, value in _facts(config).items()],
        figures=[(plain(key), plain(value)) for key, value in measured.items()],
        measured_on=plain(measured_on) if isinstance(measured_on, str) else "",
        baseline=kind == "kmeans",
        used=CLASSES.get(str(kind)),
        name=name,
        encoder=_word(config.get("encoder")),
        layer=_word(config.get("layer")) or "LAYER",
    )


def is_hub_id(name: object) -> bool:
    """Say whether a name can only be one on the hub, such as "user/codec": it has that form, and no file has it."""
    part = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"
    return re.fullmatch(f"{part}/{part}", str(name)) is not None and not Path(str(name)).exists()


def public(config: dict[str, Any]) -> dict[str, Any]:
    """Return what of a config.json may leave this machine: all but the names of its folders."""
    private = {"features"} if is_hub_id(config.get("encoder_model")) else {"features", "encoder_model"}
    return {key: value for key, value in config.items() if key not in private}


def plain(value: object) -> str:
    """Write a value as part of a line of Markdown that shows its characters and does nothing else, and is not long."""
    line = "".join(character for character in " ".join(str(value).split()) if character.isprintable())
    return re.sub(r"[\\`*\[\]<>|&#~$]|(?<!\w)_|_(?!\w)", r"\\\g<0>", line[:200])


def _word(value: object) -> str | None:
    """Return a value that can stand in a command to be copied; None where there is none or it could do harm there."""
    known = value is not None and re.fullmatch(r"[A-Za-z0-9][\w.-]{0,50}", str(value), re.ASCII)
    return str(value) if known else None


def _figure(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _names(config: dict[str, Any]) -> tuple[str, str]:
    """Return what the folder holds and what it codes, in words, as Markdown."""
    kinds = {"repcodec": "RepCodec", "kmeans": "k-means"}
    kind = config.get("kind")
    size = f" {plain(config['codebook_size'])}" if "codebook_size" in config else ""
    several = f" {plain(books)} x" if (books := config.get("codebook_num", 1)) != 1 else ""
    features = f"features of {plain(config['encoder'])}" if "encoder" in config else "speech features"
    layer = f", layer {plain(config['layer'])}" if "layer" in config else ""
    return f"{kinds.get(str(kind), plain(kind))}{several}{size}", features + layer


def _facts(config: dict[str, Any]) -> dict[str, Any]:
    """Return the rows of the table of facts, as far as the config knows them."""
    shown = public(config)
    model = f" ({shown['encoder_model']})" if "encoder_model" in shown else ""
    facts: dict[str, Any] = {}
    if "encoder" in config:
        facts["speech encoder"] = f"{config['encoder']}{model}"
    rows = {"layer": "layer, counted from 1", "encoder_sha256": "weights up to there, SHA-256"}
    facts |= {title: config[key] for key, title in rows.items() if key in config}
    if "waveform_norm" in config:
        norms = {None: "none: the encoder takes a log-mel", True: "yes, over the utterance", False: "no"}
        norm = config["waveform_norm"]
        facts["waveform normalized"] = norms[norm] if norm is None or isinstance(norm, bool) else norm
    if "feature_norm" in config:
        yes = "by mean and scale of the training set, which are part of the weights"
        facts["features normalized"] = yes if config["feature_norm"] is True else "no"
    facts |= _rates(config)
    if "step" in config:
        facts["training steps"] = config["step"]
    return facts | {"made with": f"repcodec {config.get('repcodec_version', '')}".strip()}


def _rates(config: dict[str, Any]) -> dict[str, str]:
    """Return the rows of what is computed: widths, codes and bits a second, and how far a code looks ahead."""
    kind, rate = config.get("kind"), config.get("frame_rate")
    books: Any = 1 if kind == "kmeans" else config.get("codebook_num")
    size: Any = config.get("codebook_size")
    shape = _architecture(config) if kind == "repcodec" else None
    dim = shape.input_channels if shape is not None else config.get("dim")
    stride, after = (shape.stride, shape.reach[1]) if shape is not None else (1, 0)
    rows = {"width of the features": str(dim)} if _is_count(dim) else {}
    if not (_is_count(books) and _is_count(size)):
        return rows
    rows["codebooks x codes"] = f"{books} x {size}"
    if (shape is None and kind != "kmeans") or not isinstance(rate, int | float) or not 0.1 < rate < 1e6:
        return rows
    codes = books * rate / stride
    rows["features a second"] = f"{rate:g}"
    rows["codes a second"] = f"{codes:g}, one of each codebook every {stride / rate * 1000:g} ms"
    rows["bits a second"] = f"{codes * log2(size):.4g}"
    rows["look-ahead"] = f"{after} frames of features, {after / rate * 1000:g} ms, besides the speech encoder's"
    return rows


def _is_count(value: object) -> bool:
    """Say whether a value is a number of things that a file can hold."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31


def _architecture(config: dict[str, Any]) -> Architecture | None:
    """Return the shape of a codec; None where the config describes none that could be."""
    options = {field.name: config[field.name] for field in fields(Architecture) if field.name in config}
    try:
        shape = Architecture(**options)
        return shape if _is_count(shape.stride) and _is_count(shape.reach[1]) else None
    except (TypeError, ValueError):
        return None
