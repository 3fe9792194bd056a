"""What evaluation finds of a tokenizer: figures, and what their plots are drawn from; kept on disk between runs.

Axes: K codebooks, V codes a codebook, N codes an utterance, S samples.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
import numpy.typing as npt

from repcodec.files import atomic_write

MOST_BYTES = 1 << 30
"""Bytes of the counts of one result, unpacked: zeros pack a thousandfold, and a file that was changed may hold any."""


@dataclass
class Row:
    """One tokenizer's figures on a split; None where something was not measured.

    Attributes:
        name: of the tokenizer.
        num_codebooks, codebook_size: K and V; 0 and 0 in the row of the features themselves, the ceiling.
        normalized_error: sum |x - x̂|² / sum |x - mean|², the mean being the training set's.
        cosine_similarity: of features and reconstruction, the mean over frames, -1 to 1.
        perplexity: of the codes, over the whole split.
        used_share: share of the codes used in the split, 0 to 1.
        corpus_used_share: the same over all splits together.
        bits_per_second: codes per second times log2 of the codebook size, over all codebooks.
        entropy_bits_per_second: codes per second times the entropy of the codes.
        codes_per_second: over all codebooks.
        deduplicated_per_second: the same when runs of equal codes are one.
        pnmi, phone_purity, cluster_purity, v_measure: of the first codebook's codes, 0 to 1; need phone labels.
        abx_within, abx_across: ABX error of the codes within and across speakers, 0 to 1 (chance 0.5).
        abx_reconstruction_within, abx_reconstruction_across: the same of what decodes from them.
        abx_kind, abx_items: what was compared, "triphone" or "phone", and how many of them; see `AbxItems`.
        unit_edit_distance: by augmentation, edits a code between tokens of clean and of augmented speech.
        phone_error_rate: of the probe on held-out speakers, the mean over its seeds.
        phone_error_rates: one a seed.
        valid_normalized_error: normalized_error of the validation split.
        intervals: by field, the 95 % interval over utterances (bootstrap).
        warnings: what the reader should know about these figures, a sentence each.
    """

    name: str
    num_codebooks: int = 0
    codebook_size: int = 0
    normalized_error: float | None = None
    cosine_similarity: float | None = None
    perplexity: float | None = None
    used_share: float | None = None
    corpus_used_share: float | None = None
    bits_per_second: float | None = None
    entropy_bits_per_second: float | None = None
    codes_per_second: float | None = None
    deduplicated_per_second: float | None = None
    pnmi: float | None = None
    phone_purity: float | None = None
    cluster_purity: float | None = None
    v_measure: float | None = None
    abx_within: float | None = None
    abx_across: float | None = None
    abx_reconstruction_within: float | None = None
    abx_reconstruction_across: float | None = None
    abx_kind: str | None = None
    abx_items: int | None = None
    unit_edit_distance: dict[str, float] | None = None
    phone_error_rate: float | None = None
    phone_error_rates: list[float] | None = None
    valid_normalized_error: float | None = None
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @property
    def is_ceiling(self) -> bool:
        """Whether this is the row of the features themselves."""
        return self.num_codebooks == 0

    def as_dict(self) -> dict[str, Any]:
        """Return the figures as plain values, for JSON."""
        return asdict(self)


@dataclass
class Result:
    """A row, and what its plots are drawn from.

    Attributes:
        row: the figures.
        usage: (K, V) frames a code; (0, 0) in the row of the features.
        joint: (phones, V) frames of each phone and code of the first codebook; None without labels.
        curve: (step, normalized error) of each validation of its training; empty where that is not known.
    """

    row: Row
    usage: npt.NDArray[np.int64]
    joint: npt.NDArray[np.int64] | None = None
    curve: list[tuple[int, float]] = field(default_factory=list)


@dataclass
class Example:
    """An utterance, to look at and to listen to.

    Attributes:
        utterance: its id.
        duration: seconds.
        sound: (S,) float32 at 16 kHz; None where there is none.
        phones: start and end in seconds, and phone, of each segment; empty without labels.
        codes: of each tokenizer by name, (N,) codes of its first codebook and their number a second.
    """

    utterance: str
    duration: float
    sound: npt.NDArray[np.float32] | None
    phones: list[tuple[float, float, str]]
    codes: dict[str, tuple[npt.NDArray[np.int64], float]]


def save_result(result: Result, path: Path, key: dict[str, Any]) -> None:
    """Keep a result, so that a run that was stopped goes on after it.

    Args:
        path: ends in .json; the counts go beside it as .npz.
        key: what it is the result of, plain values.

    Raises:
        RepCodecError: the folder cannot be written.
    """
    with atomic_write(path.with_suffix(".npz"), "w+b") as file:
        if result.joint is None:
            np.savez_compressed(file, usage=result.usage)
        else:
            np.savez_compressed(file, usage=result.usage, joint=result.joint)
    with atomic_write(path) as file:  # last: it says that the other is there
        json.dump({"key": key, "row": result.row.as_dict(), "curve": result.curve}, file, indent=1)


def load_result(path: Path, key: dict[str, Any]) -> Result | None:
    """Return a result that was kept; None where there is none of this key, or a damaged one."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["key"] != json.loads(json.dumps(key)):
            return None
        row = Row(**kept["row"])
        row.intervals = {name: (low, high) for name, (low, high) in row.intervals.items()}
        with ZipFile(path.with_suffix(".npz")) as packed:
            if sum(part.file_size for part in packed.infolist()) > MOST_BYTES:
                return None
        with np.load(path.with_suffix(".npz")) as counts:
            usage, joint = counts["usage"], counts.get("joint")
        shapes_fit = usage.shape == (row.num_codebooks, row.codebook_size) and (joint is None or joint.ndim == 2)
        if not (shapes_fit and _are_figures(row)):
            return None
        return Result(row, usage, joint, [(int(step), float(error)) for step, error in kept["curve"]])
    except Exception:  # the reading of JSON, of a zip and of arrays raises many kinds, and all mean: measure again
        return None


def _are_figures(row: Row) -> bool:
    """Say whether the values of a row read from a file are of the kinds that `Row` names."""
    values = row.as_dict()
    texts = [values.pop("name"), values.pop("abx_kind") or "", *values.pop("warnings")]
    numbers = [bound for bounds in values.pop("intervals").values() for bound in bounds]
    numbers += [*(values.pop("unit_edit_distance") or {}).values(), *(values.pop("phone_error_rates") or [])]
    numbers += [value for value in values.values() if value is not None]
    return all(isinstance(text, str) for text in texts) and all(isinstance(number, int | float) for number in numbers)
