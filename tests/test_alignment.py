import math

import numpy as np
import pytest

from repcodec.alignment import ANGLE_UNITS, frame_distances, token_distances


def all_paths(num_x, num_y):
    """Every path from (0, 0) to the last frames of both, as lists of cells."""
    if num_x == num_y == 1:
        return [[(0, 0)]]
    before = [(num_x - 1, num_y - 1), (num_x, num_y - 1), (num_x - 1, num_y)]
    return [[*path, (num_x - 1, num_y - 1)] for i, j in before if i >= 1 and j >= 1 for path in all_paths(i, j)]


def by_all_paths(costs):
    """The mean along the cheapest path; among equals the first when read backwards, both before Y before X."""

    def moves(path):
        steps = [(path[k][0] - path[k - 1][0], path[k][1] - path[k - 1][1]) for k in range(len(path) - 1, 0, -1)]
        return [[(1, 1), (0, 1), (1, 0)].index(step) for step in steps]

    def total(path):
        return sum(costs[i][j] for i, j in path)

    path = min(all_paths(*np.shape(costs)), key=lambda path: (total(path), moves(path)))
    return total(path) / len(path)


def aligned(matrices):
    """The tokens' distances by one call, the matrices lying side by side and behind one another in one buffer."""
    stride = 7
    corners, buffer = [], np.full(0, np.nan, dtype=np.float32)
    for n, costs in enumerate(matrices):
        block = np.full((costs.shape[0] + n % 2, stride), np.nan, dtype=np.float32)  # NaN: must not be read
        left = n % (stride - costs.shape[1] + 1)
        block[: costs.shape[0], left : left + costs.shape[1]] = costs
        corners.append(len(buffer) + left)
        buffer = np.concatenate([buffer, block.ravel()])
    shape = np.array([costs.shape for costs in matrices]).T
    return token_distances(buffer, np.array(corners), np.full(len(corners), stride), shape)


@pytest.mark.parametrize("largest", [2, 3, 1000])
def test_the_best_of_all_paths_is_found(largest):
    rng = np.random.default_rng(largest)
    # Small numbers: many paths cost the same, and which one is taken decides its length.
    matrices = [rng.integers(0, largest, rng.integers(1, 6, 2)) for _ in range(200)]
    expected = [by_all_paths(costs.tolist()) for costs in matrices]

    assert aligned(matrices) == pytest.approx(expected, rel=1e-15)
    assert len({costs.shape for costs in matrices}) > 15


def test_pairs_are_aligned_in_parts_of_any_size(monkeypatch):
    rng = np.random.default_rng(0)
    matrices = [rng.integers(0, 5, rng.integers(1, 6, 2)) for _ in range(50)]
    expected = aligned(matrices)
    monkeypatch.setattr("repcodec.alignment.PAIRS", 3)

    assert aligned(matrices).tolist() == expected.tolist()


def test_a_repeated_frame_costs_nothing_but_shortens_the_mean():
    assert aligned([np.array([[0, 2], [0, 2], [2, 0]])]).tolist() == [0.0]
    assert aligned([np.array([[0, 2], [2, 1]])]).tolist() == [0.5]


def test_no_pairs_have_no_distances():
    none = np.zeros(0, dtype=np.int64)
    assert len(token_distances(np.zeros(0), none, none, np.zeros((2, 0), dtype=np.int64))) == 0


def test_angles_are_those_between_the_vectors():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(5, 6)).astype(np.float32), rng.normal(size=(7, 6)).astype(np.float32)
    angles = frame_distances(x, y, "angular")

    assert angles.shape == (5, 7) and angles.dtype == np.float32
    for i, j in np.ndindex(5, 7):
        a, b = x[i].tolist(), y[j].tolist()
        cosine = math.sumprod(a, b) if hasattr(math, "sumprod") else sum(p * q for p, q in zip(a, b, strict=True))
        expected = math.acos(cosine / math.hypot(*a) / math.hypot(*b)) / math.pi
        assert angles[i, j] / ANGLE_UNITS == pytest.approx(expected, abs=0.51 / ANGLE_UNITS)


def test_equal_frames_are_equally_far_in_whatever_product_they_stand():
    rng = np.random.default_rng(1)
    x = np.repeat(rng.normal(size=(11, 1280)).astype(np.float32), 13, axis=0)
    angles = frame_distances(x, x, "angular")

    assert (angles == np.kron(angles[::13, ::13], np.ones((13, 13)))).all()
    assert (np.diag(angles) == 0).all() and (angles == angles.T).all() and (angles == np.rint(angles)).all()
    for rows in (1, 2, 5, 142):
        assert (frame_distances(x[:rows], x, "angular") == angles[:rows]).all()


def test_scale_does_not_count_opposites_are_farthest_and_zero_is_at_a_right_angle():
    x = np.array([[1.0, 0], [1e-8, 0], [-1e8, 0], [0, 0]], dtype=np.float32)
    angles = frame_distances(x, x, "angular") / ANGLE_UNITS

    assert angles.tolist() == [[0, 0, 1, 0.5], [0, 0, 1, 0.5], [1, 1, 0, 0.5], [0.5, 0.5, 0.5, 0.5]]


def test_codes_differ_in_so_many_codebooks():
    rng = np.random.default_rng(2)
    x, y = rng.integers(0, 3, (6, 4)), rng.integers(0, 3, (8, 4))
    expected = [[sum(p != q for p, q in zip(a, b, strict=True)) for b in y.tolist()] for a in x.tolist()]

    assert frame_distances(x, y, "different").tolist() == expected
