import math
from functools import cache
from itertools import pairwise
from statistics import mean

import numpy as np
import pytest
import soundfile
import torch
from conftest import refused

from repcodec.abx import abx_errors, abx_sums
from repcodec.abx_items import abx_items
from repcodec.errors import user_message
from repcodec.labels import PhoneLabels
from repcodec.speech_encoders import encoder_table, load_speech_encoder


def corpus(seed, num_speakers=3, per_speaker=3, num_segments=14, phones="abc"):
    """Labels of some utterances, their ids (the speaker is the first part), and their lengths in seconds."""
    rng = np.random.default_rng(seed)
    segments = {}
    for number in range(num_speakers * per_speaker):
        times = np.cumsum(rng.uniform(0.01, 0.14, num_segments + 1)).round(3).tolist()
        chosen = rng.choice([*phones, "SIL"], num_segments, p=[0.9 / len(phones)] * len(phones) + [0.1])
        segments[f"s{number % num_speakers}/u{number}"] = [
            (a, b, str(phone)) for (a, b), phone in zip(pairwise(times), chosen, strict=True)
        ]
    return segments, list(segments), {utterance: rows[-1][1] for utterance, rows in segments.items()}


def walks(seed, durations, rate, width=5):
    """Random walks as features; a little shorter than the labels."""
    rng = np.random.default_rng(seed)
    return {u: np.cumsum(rng.normal(size=(int(d * rate), width)), 0).astype(np.float32) for u, d in durations.items()}


def some_codes(seed, durations, rate, num_codebooks, codebook_size=3):
    rng = np.random.default_rng(seed)
    return {u: rng.integers(0, codebook_size, (int(d * rate), num_codebooks)) for u, d in durations.items()}


def of_frames(values, utterances):
    return lambda number: values[utterances[number]]


def speakers(utterances):
    return [utterance.split("/")[0] for utterance in utterances]


def angle(a, b):
    a, b = a.tolist(), b.tolist()
    cosine = sum(p * q for p, q in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)
    return math.acos(max(-1.0, min(1.0, cosine)))


def different(a, b):
    return sum(p != q for p, q in zip(a.tolist(), b.tolist(), strict=True))


def warped(x, y, distance):
    """Mean distance along the path of least sum; of equal ones, from the end, both before Y before X."""

    @cache
    def best(i, j):
        before = [(i - 1, j - 1), (i, j - 1), (i - 1, j)]
        before = [best(*cell) for cell in before if min(cell) >= 0]
        total, steps = min(before, key=lambda found: found[0]) if before else (0, 0)
        return total + distance(x[i], y[j]), steps + 1

    total, steps = best(len(x) - 1, len(y) - 1)
    return total / steps


def brute_force(segments, values, rate, distance, triphones):
    """The definition, by looking at all triples: errors, cells and triples, within and across."""
    tokens = []
    for utterance, rows in segments.items():
        for n, (start, end, phone) in enumerate(rows):
            context = None
            if triphones:
                if not 0 < n < len(rows) - 1 or "SIL" in (rows[n - 1][2], rows[n + 1][2]):
                    continue
                context, start, end = (rows[n - 1][2], rows[n + 1][2]), rows[n - 1][0], rows[n + 1][1]
            frames = [
                frame for t, frame in enumerate(values[utterance]) if start - 1e-9 <= (t + 0.5) / rate <= end + 1e-9
            ]
            if frames and phone != "SIL":
                tokens.append((phone, context, utterance.split("/")[0], frames))

    @cache
    def d(i, j):
        return warped(tokens[i][3], tokens[j][3], distance)

    cells = {"within": {}, "across": {}}
    everyone = range(len(tokens))
    for x, a in ((x, a) for x in everyone for a in everyone if x != a and tokens[x][:2] == tokens[a][:2]):
        phone, context, speaker, _ = tokens[a]
        for b in everyone:
            if tokens[b][0] != phone and tokens[b][1:3] == (context, speaker):
                kind = "within" if tokens[x][2] == speaker else "across"
                cell = phone, tokens[b][0], speaker, context, tokens[x][2]
                wrong = 1.0 if d(x, a) > d(x, b) else 0.5 if d(x, a) == d(x, b) else 0.0
                cells[kind].setdefault(cell, []).append(wrong)

    def averaged(scores, key):
        groups = {}
        for cell, score in scores.items():
            groups.setdefault(key(cell), []).append(score)
        return {group: mean(found) for group, found in groups.items()}

    result = {}
    for kind, found in cells.items():
        scores = {cell: mean(wrong) for cell, wrong in found.items()}
        if triphones:
            scores = averaged(scores, lambda cell: cell[:3])
        scores = averaged(scores, lambda cell: cell[:2])
        result[kind] = mean(scores.values()) if scores else None
        result[kind + "_cells"] = len(found)
        result[kind + "_triples"] = sum(map(len, found.values()))
    return result


def measured(segments, values, rate, distance, utterances=None, **options):
    utterances = utterances or list(segments)
    items = abx_items(PhoneLabels(segments), utterances, speakers(utterances), **options)
    return abx_errors(items, of_frames(values, utterances), rate, distance)


SMALL = {"triphone": {"phones": "ab", "num_segments": 14}, "phone": {"per_speaker": 2, "num_segments": 12}}
EVERYTHING = {"max_tokens": None, "max_speakers": None}


@pytest.mark.parametrize("kind", ["triphone", "phone"])
@pytest.mark.parametrize("seed", range(2))
def test_features_give_what_the_definition_says(kind, seed):
    segments, _, durations = corpus(seed, **SMALL[kind])
    values = walks(seed, durations, 50)
    expected = brute_force(segments, values, 50, angle, kind == "triphone")
    errors = measured(segments, values, 50, "angular", kind=kind, **EVERYTHING)

    assert min(expected["within_cells"], expected["across_cells"]) > 10
    assert {name: getattr(errors, name) for name in expected} == pytest.approx(expected, abs=1e-9)
    assert errors.kind == kind and 0.1 < errors.across < 0.9


@pytest.mark.parametrize("kind", ["triphone", "phone"])
@pytest.mark.parametrize("rate, num_codebooks", [(50, 1), (25, 2), (12.5, 3)])
def test_codes_of_any_rate_give_what_the_definition_says(kind, rate, num_codebooks):
    segments, _, durations = corpus(num_codebooks, **SMALL[kind])
    values = some_codes(0, durations, rate, num_codebooks)
    expected = brute_force(segments, values, rate, different, kind == "triphone")
    errors = measured(segments, values, rate, "different", kind=kind, **EVERYTHING)

    assert min(expected["within_cells"], expected["across_cells"]) > 10
    assert {name: getattr(errors, name) for name in expected} == pytest.approx(expected, abs=1e-9)


def test_a_tiny_case_by_hand():
    # One frame a phone. s: a a b b, t: a b; codes say how far they are: only the two b of s are equal to an a.
    phones = {"s/u": "aabb", "t/v": "ab"}
    segments = {u: [(i / 10, (i + 1) / 10, phone) for i, phone in enumerate(row)] for u, row in phones.items()}
    values = {"s/u": np.array([[1, 1], [1, 2], [1, 1], [3, 3]]), "t/v": np.array([[1, 2], [3, 4]])}
    errors = measured(segments, values, 10, "different", **EVERYTHING)

    # Within s, X = a₁: d(A) = 1; b₁ 0, b₂ 2: 1 and 0. X = a₂: d(A) = 1; b₁ 1, b₂ 2: ½ and 0. -> (a, b): 3/8
    # X = b₁: d(A) = 2; a₁ 0, a₂ 1: 1 and 1. X = b₂: d(A) = 2; a₁ 2, a₂ 2: ½ and ½. -> (b, a): 3/4
    assert errors.within == (3 / 8 + 3 / 4) / 2
    assert (errors.within_cells, errors.within_triples) == (2, 8)
    # A, B of s, X of t. X = a: a₁ 1, a₂ 0; b₁ 1, b₂ 2: ½, 0, 0, 0. -> 1/8
    # X = b: b₁ 2, b₂ 1; a₁ 2, a₂ 2: ½ ½ 0 0 -> 1/4
    # A, B of t, X of s. a₁: A 1, B 2: 0; a₂: 0. -> 0. b₁: A 2, B 1: 1; b₂: A 1, B 2: 0 -> 1/2
    # Each pair has two cells, one for each speaker of A and B.
    assert errors.across == ((1 / 8 + 0) / 2 + (1 / 4 + 1 / 2) / 2) / 2
    assert (errors.across_cells, errors.across_triples) == (4, 12)
    assert (errors.items, errors.found, errors.without_frames, errors.drawn_utterances) == (6, 6, 0, 2)


def test_equal_tokens_are_half_wrong_separable_ones_right_and_noise_is_at_chance():
    segments, _, durations = corpus(5, per_speaker=6, num_segments=30)
    # Not in whole milliseconds: a centre between two phones would be of both.
    segments = {u: [(a + 0.0005, b + 0.0005, phone) for a, b, phone in rows] for u, rows in segments.items()}
    labels = PhoneLabels(segments)
    rng = np.random.default_rng(0)
    same = {u: np.ones((round(d * 50), 4)) for u, d in durations.items()}
    apart = {u: np.eye(4)[labels.frames(u, len(same[u]), 50)] for u in same}
    mirrored = {u: -values for u, values in apart.items()}
    noise = {u: rng.normal(size=values.shape) for u, values in same.items()}
    for distance in ("angular", "different"):
        errors = measured(segments, {u: v.astype(int) for u, v in same.items()}, 50, distance, kind="phone")
        assert (errors.within, errors.across) == (0.5, 0.5)
        for values in (apart, mirrored):
            errors = measured(segments, {u: v.astype(int) for u, v in values.items()}, 50, distance, kind="phone")
            assert (errors.within, errors.across) == (0, 0)
    errors = measured(segments, noise, 50, "angular", kind="phone")
    assert (errors.within, errors.across) == (pytest.approx(0.5, abs=0.05), pytest.approx(0.5, abs=0.05))


def test_frames_that_repeat_tie_whatever_the_matrix_product_does():
    # Features decoded from few codes: tokens of the same codes must be equally far, bit for bit.
    segments, _, durations = corpus(6)
    table = np.random.default_rng(0).normal(size=(3, 1024)).astype(np.float32)
    codes = some_codes(1, durations, 50, 1)
    values = {u: table[code[:, 0]] for u, code in codes.items()}
    units = 2**22 / math.pi  # whole numbers, so that the definition's own sums are exact
    angles = {(i, j): round(angle(table[i], table[j]) * units) if i != j else 0 for i in range(3) for j in range(3)}
    expected = brute_force(segments, codes, 50, lambda a, b: angles[a[0], b[0]], triphones=False)
    errors = measured(segments, values, 50, "angular", kind="phone", **EVERYTHING)

    assert {name: getattr(errors, name) for name in expected} == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("kind", ["triphone", "phone"])
def test_order_blocks_and_ranks_change_no_bit(kind, monkeypatch):
    segments, utterances, durations = corpus(7, num_speakers=4, per_speaker=2, num_segments=20, phones="ab")
    values = walks(7, durations, 50)
    labels = PhoneLabels(segments)

    def sums(utterances, *share):
        items = abx_items(labels, utterances, speakers(utterances), kind=kind, max_tokens=4, max_speakers=3)
        return abx_sums(items, of_frames(values, utterances), 50, "angular", *share)

    alone = sums(utterances)
    assert np.array_equal(sums(utterances[::-1]).table, alone.table)
    for world_size in (3, 5):
        shares = [sums(utterances, rank, world_size) for rank in range(world_size)]
        assert np.array_equal(sum(share.table for share in shares), alone.table)
        assert {share.without_frames for share in shares} == {alone.without_frames}
        assert sum(share.table.any() for share in shares) == min(world_size, 4)
    monkeypatch.setattr("repcodec.abx.LATTICE", 5000)
    assert np.array_equal(sums(utterances).table, alone.table)


def test_at_most_so_many_speakers_of_x_are_drawn():
    segments, _, durations = corpus(8, num_speakers=8, per_speaker=3, num_segments=20)
    values = walks(8, durations, 50)
    options = {"kind": "phone", "max_tokens": None}
    cells = {most: measured(segments, values, 50, "angular", **options, max_speakers=most) for most in (None, 2, 7, 10)}

    assert cells[None].across_cells == 8 * 7 * 6 and cells[2].across_cells == 8 * 2 * 6
    assert cells[7].across == cells[10].across == cells[None].across != cells[2].across
    assert {found.within for found in cells.values()} == {cells[2].within}
    assert cells[2].max_speakers == 2 and cells[2].across == pytest.approx(cells[None].across, abs=0.1)
    other = measured(segments, values, 50, "angular", **options, max_speakers=2, seed=1)
    assert other.across != cells[2].across and other.seed == 1


def test_items_without_a_frame_are_left_out_and_counted():
    rows = [(0.0, 0.1, "a"), (0.1, 0.2, "b"), (0.2, 0.205, "a"), (0.205, 0.3, "a"), (0.3, 0.42, "b"), (0.42, 0.5, "c")]
    values = {"s/u": np.arange(42).reshape(21, 2)}  # 0.42 s: the last phone lies behind them
    errors = measured({"s/u": rows}, values, 50, "different", kind="phone")

    assert (errors.items, errors.without_frames, errors.found) == (4, 2, 6)
    assert errors.within_cells == 2 and errors.within_triples == 8
    assert errors.across is None and errors.across_cells == 0


def test_nothing_to_compare_gives_none():
    segments = {"s/u": [(0.0, 0.1, "a"), (0.1, 0.2, "b")]}
    values = {"s/u": np.ones((10, 3)), "s/v": np.ones((10, 3))}
    for utterances in (["s/u"], ["s/v"]):
        errors = measured(segments, values, 50, "angular", utterances)
        assert errors.within is None and errors.across is None and errors.within_cells == 0
    errors = measured(segments, {"s/u": np.ones((0, 3))}, 50, "angular", ["s/u"])
    assert errors.within is None and (errors.items, errors.without_frames) == (0, 2)


def test_each_utterance_is_asked_for_once_and_others_not_at_all():
    segments, utterances, durations = corpus(9)
    values, asked = walks(9, durations, 50), []
    items = abx_items(PhoneLabels(segments), ["s9/none", *utterances], speakers(["s9/none", *utterances]))
    abx_errors(items, lambda number: asked.append(number) or values[utterances[number - 1]], 50, "angular")

    assert asked == list(range(1, len(utterances) + 1))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_features_that_are_not_finite_or_of_another_width_are_refused_by_utterance(bad):
    segments, utterances, durations = corpus(10)
    values = walks(10, durations, 50)
    values[utterances[4]][3, 2] = bad
    with refused(utterances[4], "NaN or infinity"):
        measured(segments, values, 50, "angular")
    values = walks(10, durations, 50)
    values[utterances[4]] = values[utterances[4]][:, :3]
    with refused(utterances[4], "width 3", "have 5"):
        measured(segments, values, 50, "angular")


def test_a_full_disk_ends_in_a_sentence(tiny_disk, monkeypatch):
    segments, _, durations = corpus(12)
    monkeypatch.setattr("tempfile.tempdir", str(tiny_disk))
    with pytest.raises(OSError) as caught:
        measured(segments, walks(12, durations, 50, width=512), 50, "angular")
    assert "free some space" in user_message(caught.value) and list(tiny_disk.iterdir()) == []


@pytest.fixture(scope="module")
def real(speech, whisper_folder):
    """Labels, ids and layer 3 of Whisper tiny.en of the demo's sentences; each is of another speaker."""
    encoder = load_speech_encoder(encoder_table()["whisper_tiny_en"], 3, whisper_folder)
    sounds = sorted((speech / "audio").rglob("*.flac"))
    utterances = [path.relative_to(speech / "audio").with_suffix("").as_posix() for path in sounds]
    features = encoder([torch.from_numpy(soundfile.read(path, dtype="float32")[0]) for path in sounds])
    labels = PhoneLabels.read(speech / "phones.tsv")
    return labels, utterances, {u: x.numpy() for u, x in zip(utterances, features, strict=True)}


def segments_of(labels, utterance):
    starts, ends, phones = (column.tolist() for column in labels.segments(utterance))
    return [(start, end, labels.phones[phone]) for start, end, phone in zip(starts, ends, phones, strict=True)]


def test_real_speech_gives_what_the_definition_says(real):
    labels, utterances, features = real
    segments = {u: segments_of(labels, u)[:20] for u in utterances[:4]}
    expected = brute_force(segments, features, 50, angle, triphones=False)
    errors = measured(segments, features, 50, "angular", utterances[:4], **EVERYTHING)

    assert errors.kind == "phone" and errors.within_triples > 100 and errors.across_triples > 300
    assert {name: getattr(errors, name) for name in expected} == pytest.approx(expected, abs=1e-9)


def test_speech_is_better_than_noise_and_its_codes_are_worse_than_its_features(real):
    labels, utterances, features = real
    items = abx_items(labels, utterances, speakers(utterances))
    frames = np.concatenate(list(features.values()))
    centres = frames[np.random.default_rng(0).choice(len(frames), 64, replace=False)]
    codes = {u: np.linalg.norm(x[:, None] - centres, axis=2).argmin(1)[:, None] for u, x in features.items()}
    of_features = abx_errors(items, of_frames(features, utterances), 50, "angular")
    of_codes = abx_errors(items, of_frames(codes, utterances), 50, "different")

    assert of_features.within < 0.15 and of_features.across < 0.15
    assert of_features.within < of_codes.within < 0.4 and of_features.across < of_codes.across < 0.4
    assert of_features.items == of_codes.items > 300
