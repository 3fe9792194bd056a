"""Feature shards of several folders, mixed: how often each is drawn from is given by weights, not by its size."""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from math import gcd, lcm
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from repcodec.errors import RepCodecError
from repcodec.shards import FeatureShards

MOST_ROWS = 1_000_000
"""Rows after which the order of folders repeats, at most."""


def whole_weights(weights: Mapping[str, float | str]) -> list[int]:
    """Return the smallest whole numbers in the proportion of the weights: {"a": 0.75, "b": 0.25} gives [3, 1].

    Raises:
        RepCodecError: a weight is no number above 0, or there are no such numbers that are small enough.
    """
    parts = []
    for name, weight in weights.items():
        text = str(weight)
        try:
            # Of an exponent of many digits, Fraction would write the number out.
            part = Fraction(text) if len(text.lower().partition("e")[2]) <= 3 else Fraction(0)
        except (ValueError, ZeroDivisionError):
            part = Fraction(0)
        if part <= 0:
            raise RepCodecError(f"{name}: its weight in the mixture is {weight}, expected a number above 0.")
        parts.append(part)
    common = lcm(*(part.denominator for part in parts))
    whole = [int(part * common) for part in parts]
    whole = [number // gcd(*whole) for number in whole]
    if sum(whole) > MOST_ROWS:
        shown = " to ".join(str(weight) for weight in weights.values())
        raise RepCodecError(f"the weights {shown} of the mixture are too fine: round them, as in 3 to 1.")
    return whole


def row_pattern(weights: Sequence[int]) -> npt.NDArray[np.intp]:
    """Return which folder each of sum(weights) rows is drawn from, each folder's rows spread evenly."""
    folders = np.repeat(np.arange(len(weights)), weights)
    places = np.concatenate([(np.arange(weight) + 0.5) / weight for weight in weights])
    return folders[np.argsort(places, kind="stable")]


class FeatureMix(FeatureShards):
    """Feature shards of several folders; samples of frames hold each folder's by weight.

    Attributes:
        weights: whole numbers, one a folder.
    """

    def __init__(self, folders: Sequence[Path | str], weights: Sequence[int], dim: int | None = None):
        """Open the folders; see `FeatureShards`.

        Raises:
            RepCodecError: a folder is broken, or another speech encoder's, or one of another width.
        """
        super().__init__(folders, dim)
        self.weights = list(weights)

    def __reduce__(self) -> tuple[type[FeatureShards], tuple[Any, ...]]:
        """See `FeatureShards`."""
        (folders, dim) = super().__reduce__()[1]
        return FeatureMix, (folders, self.weights, dim)

    def sample(self, num_frames: int) -> npt.NDArray[np.float32]:
        """Return as many frames, of each folder by weight, evenly spaced over it; no more than there are in all.

        The frames of a folder too small for its weight come several times.

        Returns:
            (N, D) float32.

        Raises:
            RepCodecError: a value is not finite.
        """
        total = min(num_frames, int(self.lengths.sum()))
        parts = []
        for shards, weight in zip(self._folders, self.weights, strict=True):
            wanted = max(1, total * weight // sum(self.weights))
            rows = self._sample(shards, 2 * wanted)  # that many at most, half of them at least
            parts.append(rows[np.arange(wanted) * len(rows) // wanted])
        return np.concatenate(parts)

    def by_weight(self, seed: int) -> npt.NDArray[np.intp]:
        """Return whole utterances, of each folder so many that its frames are there by weight, of it all in all.

        From a folder too large for its weight random utterances are left out; those of one too small come several
        times.

        Returns:
            (N,) numbers of utterances.
        """
        chosen = []
        for folder, weight in enumerate(self.weights):
            mine = np.flatnonzero((self.folder_of == folder) & (self.lengths > 0))
            times, rest = divmod(int(self.lengths.sum()) * weight // sum(self.weights), int(self.lengths[mine].sum()))
            order = np.random.default_rng([seed, folder]).permutation(mine)
            chosen += [np.repeat(mine, times), order[np.cumsum(self.lengths[order]) <= rest]]
        return np.concatenate(chosen)
