import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from repcodec.labels import PhoneLabels
from repcodec.scores import Scores

UTTERANCES = {f"spk{i % 3}-{i}": 20 + 7 * i for i in range(12)}
"""Codes of each."""


def labels():
    rng = np.random.default_rng(5)
    segments = {}
    for name, codes in UTTERANCES.items():
        times = np.round(np.arange(0, codes * 0.02 + 0.05, 0.05), 2)
        segments[name] = [(a, b, "abcd"[rng.integers(4)]) for a, b in pairwise(times)]
    return PhoneLabels(segments)


def codes(seed=0, num_codebooks=1, size=8):
    """Codes that follow the phones, more or less."""
    rng, known = np.random.default_rng(seed), labels()
    found = {}
    for name, count in UTTERANCES.items():
        phones = known.frames(name, count, 50).clip(0)
        row = np.where(rng.random(count) < 0.7, phones, rng.integers(size, size=count))
        found[name] = torch.from_numpy(np.stack([row, *rng.integers(size, size=(num_codebooks - 1, count))]))
    return found


def scored(found, **options):
    scores = Scores(options.pop("num_codebooks", 1), 8, 50.0, labels(), **options)
    for name, row in found.items():
        scores.add(name, row, name)
    return scores.result("x")


def test_a_code_of_20_ms_counts_for_both_phones_of_10_ms():
    found, known = codes(), labels()
    result = scored(found)
    joint = np.zeros((4, 8), dtype=int)
    for name, row in found.items():
        for phone, code in zip(known.frames(name, 2 * row.shape[1], 100), np.repeat(row[0], 2), strict=True):
            if phone >= 0:
                joint[phone, code] += 1
    assert result.joint.tolist() == joint.tolist()
    p = joint / joint.sum()
    information = sum(
        p[i, j] * math.log(p[i, j] / (p[i].sum() * p[:, j].sum())) for i in range(4) for j in range(8) if p[i, j]
    )
    entropy = -sum(q * math.log(q) for q in p.sum(1) if q)
    assert result.row.pnmi == pytest.approx(information / entropy)
    assert result.row.phone_purity == pytest.approx(p.max(0).sum())
    assert result.row.cluster_purity == pytest.approx(p.max(1).sum())


def test_v_measure_is_that_of_scikit_learn():
    from sklearn.metrics import v_measure_score

    found, known = codes(), labels()
    pairs = [(known.frames(name, 2 * row.shape[1], 100), np.repeat(row[0], 2)) for name, row in found.items()]
    phones, clusters = (np.concatenate(part) for part in zip(*pairs, strict=True))
    expected = v_measure_score(phones[phones >= 0], clusters[phones >= 0])
    assert scored(found).row.v_measure == pytest.approx(expected)


def test_deduplicated_rate_counts_runs():
    scores = Scores(2, 8, 50.0)
    scores.add("a", torch.tensor([[1, 1, 1, 2, 2], [3, 3, 4, 4, 4]]))
    scores.add("b", torch.tensor([[2], [4]]))  # equal to the last one, but another utterance
    assert scores.result("x").row.deduplicated_per_second == pytest.approx(100 * 4 / 6)


def test_order_of_utterances_changes_nothing():
    found = codes()
    one, other = scored(found), scored(dict(reversed(found.items())))
    assert one.row.intervals.keys() == other.row.intervals.keys() != set()
    for field, bounds in one.row.intervals.items():
        assert bounds == pytest.approx(other.row.intervals[field], rel=1e-12), field
    assert one.joint.tolist() == other.joint.tolist()


def test_interval_is_that_of_drawing_utterances_again():
    """Against the bootstrap as it is written in books: with replacement, everything computed anew."""
    from repcodec.metrics import phone_agreement

    found, known = codes(), labels()
    joints = []
    for name, row in found.items():
        phones, repeated = known.frames(name, 2 * row.shape[1], 100), np.repeat(row[0], 2)
        joint = np.zeros((4, 8))
        np.add.at(joint, (phones[phones >= 0], repeated[phones >= 0]), 1)
        joints.append(joint)
    rng = np.random.default_rng(0)
    draws = [sum(joints[i] for i in rng.integers(len(joints), size=len(joints))) for _ in range(2000)]
    spread = float(phone_agreement(torch.from_numpy(np.stack(draws)))["phone_purity"].std())
    low, high = scored(found).row.intervals["phone_purity"]
    assert low < scored(found).row.phone_purity < high
    assert (high - low) / 3.92 == pytest.approx(spread, rel=0.25)  # 200 replicates


def test_counting_in_parts_changes_nothing(monkeypatch):
    whole = scored(codes()).row.intervals
    monkeypatch.setattr("repcodec.metrics.PhoneBootstrap.FRAMES", 50)
    for field, bounds in scored(codes()).row.intervals.items():
        assert bounds == pytest.approx(whole[field], rel=1e-12)


def test_a_huge_codebook_has_no_interval_but_figures():
    scores = Scores(1, 2**20, 50.0, labels())
    for name, row in codes().items():
        scores.add(name, row * 1000, name)
    row = scores.result("x").row
    assert row.pnmi == pytest.approx(scored(codes()).row.pnmi)
    assert "pnmi" not in row.intervals


def test_reader_is_warned_where_codes_could_say_so_much_by_chance():
    rng = np.random.default_rng(0)
    scores = Scores(1, 4096, 50.0, labels())
    for name, count in UTTERANCES.items():
        scores.add(name, torch.from_numpy(rng.integers(4096, size=(1, count))), name)
    result = scores.result("x")
    assert result.row.pnmi > 0.5  # of nothing at all
    assert "could be chance" in result.row.warnings[0]
    assert scored(codes()).row.warnings == []


def test_error_and_cosine_with_intervals():
    rng = torch.Generator().manual_seed(0)
    mean = torch.randn(5, generator=rng)
    scores = Scores(1, 8, 50.0, None, mean)
    parts = []
    for name, row in codes().items():
        x = torch.randn(row.shape[1], 5, generator=rng)
        y = x + 0.5 * torch.randn(x.shape, generator=rng)
        parts.append((x.double(), y.double()))
        scores.add(name, row, None, x, y)
    row = scores.result("x").row
    x, y = (torch.cat(part) for part in zip(*parts, strict=True))
    assert row.normalized_error == pytest.approx(float((x - y).square().sum() / (x - mean).square().sum()))
    cosine = (x * y).sum(1) / x.norm(dim=1) / y.norm(dim=1)
    assert row.cosine_similarity == pytest.approx(float(cosine.mean()))
    for field in ("normalized_error", "cosine_similarity"):
        low, high = row.intervals[field]
        assert low < getattr(row, field) < high
    assert row.pnmi is None
    assert "pnmi" not in row.intervals


def test_an_utterance_without_a_code_counts_nowhere():
    found = codes()
    row = scored(found | {"empty": torch.zeros(1, 0, dtype=torch.int64)}).row
    assert row == scored(found).row


@pytest.mark.parametrize("rate, per_code", [(100.0, 1), (50.0, 2), (25.0, 4), (12.5, 8), (200.0, 1)])
def test_codes_of_any_rate_meet_the_phones_of_their_time(rate, per_code):
    known = PhoneLabels({"u": [(0.0, 0.48, "a"), (0.48, 0.96, "b")]})
    count = round(0.96 * rate)
    scores = Scores(1, 2, rate, known)
    scores.add("u", torch.arange(count)[None] // (count // 2), "u")
    result = scores.result("x")
    assert scores.phones_per_code == per_code
    assert result.row.pnmi == pytest.approx(1)
    assert result.joint.tolist() == [[count // 2 * per_code, 0], [0, count // 2 * per_code]]
