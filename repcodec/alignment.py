"""How far frames are from one another, and tokens of several frames: dynamic time warping.

Letters: F frames, W width (D features or K codebooks), M pairs of tokens.
"""

from typing import Literal

import numpy as np
import numpy.typing as npt

ANGLE_UNITS = 2**22
"""Units in an angle of π, 7.5e-7 rad each. Angles are whole units so that what is equal is equal: in which order a
matrix product sums depends on its shape, and d(X, A) = d(X, B) must not become a matter of that."""

PAIRS = 2**14
"""Pairs of tokens aligned at once, so that the columns of costs stay in the cache."""

Distance = Literal["angular", "different"]


def frame_distances(
    x: npt.NDArray[np.number], y: npt.NDArray[np.number], distance: Distance
) -> npt.NDArray[np.float32]:
    """Compare all frames (F, W) with all frames (F', W); return (F, F') float32 whole numbers.

    "angular": the angle, of which π has `ANGLE_UNITS` units; a vector of zeros is at a right angle to all.
    "different": the number of codebooks whose codes differ.
    """
    if distance == "different":
        differing: npt.NDArray[np.float32] = sum(
            (a[:, None] != b).astype(np.float32) for a, b in zip(x.T, y.T, strict=True)
        )
        return differing
    one, other = x.astype(np.float64), y.astype(np.float64)
    for vectors in (one, other):
        norm = np.linalg.norm(vectors, axis=1, keepdims=True)
        vectors /= np.where(norm == 0, 1, norm)
    angles = np.arccos((one @ other.T).clip(-1, 1))
    units: npt.NDArray[np.float32] = np.rint(angles * (ANGLE_UNITS / np.pi)).astype(np.float32)
    return units


def token_distances(
    lattice: npt.NDArray[np.floating],
    corner: npt.NDArray[np.integer],
    stride: npt.NDArray[np.integer],
    shape: npt.NDArray[np.integer],
) -> npt.NDArray[np.float64]:
    """Align pairs of tokens by dynamic time warping.

    The path goes from the first frames of both to the last by steps of one frame of X, of Y or of both, its sum of
    distances being the least; where several are, the one which, from the end, prefers steps of both, then of Y.

    Args:
        lattice: distances between frames; that of frames i of X and j of Y stands at corner + i · stride + j.
        corner, stride: (M,) of each pair.
        shape: (2, M) frames of X and of Y.

    Returns:
        (M,) float64, the mean distance along the path.
    """
    means = np.empty(len(corner))
    order = np.lexsort((-shape[0], shape[1]))
    for same in np.split(order, np.flatnonzero(np.diff(shape[1][order])) + 1):
        for part in np.split(same, range(PAIRS, len(same), PAIRS)):
            if len(part):
                means[part] = _align(lattice, corner[part], stride[part], shape[0][part], int(shape[1][part[0]]))
    return means


def _align(
    lattice: npt.NDArray[np.floating],
    corner: npt.NDArray[np.integer],
    stride: npt.NDArray[np.integer],
    num_x: npt.NDArray[np.integer],
    num_y: int,
) -> npt.NDArray[np.float64]:
    """Align pairs of tokens, the Y all of num_y frames, the longest X first; see `token_distances`."""
    means = np.empty(len(corner))
    # Of the best path to frames i - 1 and i of X and all frames of Y: sum of distances, steps.
    cost_before, cost = np.zeros((2, num_y, len(corner)))
    steps_before, steps = np.zeros((2, num_y, len(corner)), dtype=np.int32)
    going_on = np.searchsorted(-num_x, -np.arange(num_x[0] + 1))  # pairs whose X has more than i frames
    for i in range(num_x[0]):
        now = slice(going_on[i])
        at = corner[now] + i * stride[now]
        for j in range(num_y):
            above, left, both = cost_before[j, now], cost[j - 1, now], cost_before[j - 1, now]
            if i and j:
                straight = np.minimum(left, above)
                count = np.where(left <= above, steps[j - 1, now], steps_before[j, now])
                count = np.where(both <= straight, steps_before[j - 1, now], count)
                best = np.minimum(both, straight)
            else:
                best, count = (left, steps[j - 1, now]) if j else (above, steps_before[j, now])
            np.add(best, lattice[at + j], out=cost[j, now])
            np.add(count, 1, out=steps[j, now])
        done = slice(going_on[i + 1], going_on[i])
        means[done] = cost[-1, done] / steps[-1, done]
        cost_before, cost, steps_before, steps = cost, cost_before, steps, steps_before
    return means
