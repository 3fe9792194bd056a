from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from conftest import refused

from repcodec.abx_items import abx_items, item_frames
from repcodec.labels import PhoneLabels


def random_labels(seed, num_utterances=8, num_segments=60, phones="abcde", silence="SIL"):
    """Labels of short utterances, with pauses, gaps and two speakers."""
    rng = np.random.default_rng(seed)
    segments = {}
    for number in range(num_utterances):
        times = np.cumsum(rng.uniform(0.03, 0.2, num_segments)).round(2).tolist()
        rows = [(a, b, str(rng.choice([*phones, silence]))) for a, b in pairwise(times)]
        segments[f"s{number % 2}/u{number}"] = [row for row in rows if rng.random() < 0.95]
    return segments


def speakers_of(utterances):
    return [utterance.split("/")[0] for utterance in utterances]


def described(items):
    """The items in words: who, where, when, which phone between which."""
    found = []
    width = len(items.phones)
    for token in items.tokens:
        context = divmod(int(token["context"]), width) if items.kind == "triphone" else ()
        place = items.utterances[token["utterance"]], token["start"].item(), token["end"].item()
        found.append((*place, items.phones[token["phone"]], *(items.phones[phone] for phone in context)))
    return found


def joined(one, other):
    return other[0] - one[1] <= 0.01


def by_hand(segments, triphones):
    """All tokens of these kinds, by looking at every segment and its neighbours."""
    found = []
    for utterance, rows in segments.items():
        for before, row, after in zip([None, *rows], rows, [*rows[1:], None], strict=False):
            if row[2] == "SIL":
                continue
            if not triphones:
                found.append((utterance, *row))
            elif before and after and "SIL" not in (before[2], after[2]) and joined(before, row) and joined(row, after):
                found.append((utterance, before[0], after[1], row[2], before[2], after[2]))
    return found


@pytest.mark.parametrize("kind", ["phone", "triphone"])
def test_items_are_those_found_by_hand(kind):
    segments = random_labels(0, phones="abcdefg")
    expected = by_hand(segments, kind == "triphone")
    items = abx_items(PhoneLabels(segments), list(segments), speakers_of(segments), kind=kind, max_tokens=None)
    if kind == "triphone":  # a context of one phone only has nothing to compare
        phones = {}
        for token in expected:
            phones.setdefault(token[4:], set()).add(token[3])
        assert any(len(found) == 1 for found in phones.values())
        expected = [token for token in expected if len(phones[token[4:]]) > 1]

    assert len(expected) > 50
    assert sorted(described(items)) == sorted(expected)
    assert items.found == len(by_hand(segments, triphones=False))
    assert items.kind == kind and items.num_speakers == 2 and items.drawn_utterances == 8


@pytest.mark.parametrize("pause", ["SIL", "sil", "sp", "spn", "<eps>", "pau", "h#"])
def test_a_pause_is_no_item_and_no_context(pause):
    rows = [(i / 10, (i + 1) / 10, phone) for i, phone in enumerate(["a", "b", pause, "c", "a", "b", "c"])]
    labels = PhoneLabels({"u": rows, "v": [(0.0, 0.1, "c"), (0.1, 0.2, "b"), (0.2, 0.3, "b")]})
    of_phones = abx_items(labels, ["u", "v"], ["s", "s"], kind="phone")
    of_triphones = abx_items(labels, ["u", "v"], ["s", "s"], kind="triphone")

    assert of_phones.found == len(of_phones.tokens) == 9
    assert [token[3:] for token in described(of_triphones)] == [("a", "c", "b"), ("b", "c", "b")]


def test_triphones_where_they_repeat_enough_and_phones_where_not():
    often = random_labels(1, num_utterances=20, phones="abc")
    seldom = random_labels(1, num_utterances=4, phones="abcdefghijkl")

    for segments, kind in ((often, "triphone"), (seldom, "phone")):
        assert abx_items(PhoneLabels(segments), list(segments), speakers_of(segments)).kind == kind


@pytest.mark.parametrize("kind", ["phone", "triphone"])
def test_at_most_so_many_tokens_are_drawn_the_same_in_every_order(kind):
    segments = random_labels(2, num_utterances=20, phones="abc")
    labels = PhoneLabels(segments)

    def drawn(utterances, **options):
        items = abx_items(labels, utterances, speakers_of(utterances), kind=kind, **options)
        return items, described(items)

    everything = drawn(list(segments), max_tokens=None)[1]
    items, tokens = drawn(list(segments), max_tokens=3)
    groups = {}
    for token in tokens:
        groups.setdefault((token[0].split("/")[0], *token[3:]), []).append(token)
    sizes = [len(group) for group in groups.values()]
    assert max(sizes) == 3 and set(tokens) < set(everything) and items.max_tokens == 3
    for key, group in groups.items():  # a group is cut only where it has more
        whole = [token for token in everything if (token[0].split("/")[0], *token[3:]) == key]
        assert len(group) == min(3, len(whole))
    assert drawn(list(segments)[::-1], max_tokens=3)[1] == tokens
    assert drawn(list(segments), max_tokens=3, seed=1)[1] != tokens


def test_of_a_large_corpus_utterances_are_drawn(monkeypatch):
    segments = random_labels(3, num_utterances=20)
    labels = PhoneLabels(segments)
    monkeypatch.setattr("repcodec.abx_items.MAX_PHONES", 300)

    items = abx_items(labels, list(segments), speakers_of(segments), kind="phone", max_tokens=None)
    again = abx_items(labels, list(segments)[::-1], speakers_of(list(segments)[::-1]), kind="phone", max_tokens=None)

    assert 300 <= items.found < 360 and 4 < items.drawn_utterances < 12
    assert len({token[0] for token in described(items)}) == items.drawn_utterances
    assert described(again) == described(items)


def test_utterances_without_labels_and_labels_of_nothing_give_no_items():
    labels = PhoneLabels({"u": [(0.0, 0.1, "a"), (0.1, 0.2, "b")], "v": []})
    items = abx_items(labels, ["x", "84/u", "v"], ["s", "s", "t"])

    assert described(items) == [("84/u", 0.0, 0.1, "a"), ("84/u", 0.1, 0.2, "b")]
    assert items.drawn_utterances == 1 and items.num_speakers == 2
    for empty in (
        abx_items(labels, ["x"], ["s"]),
        abx_items(labels, [], []),
        abx_items(PhoneLabels({}), ["x"], ["s"]),
        abx_items(PhoneLabels({"u": [(0.0, 1.0, "sil")]}), ["u"], ["s"]),
        abx_items(PhoneLabels({"u": [(0.0, 1.0, "a")]}), ["u"], ["s"]),
    ):
        assert len(empty.tokens) == 0


def test_an_utterance_of_several_labels_is_refused():
    labels = PhoneLabels({"a/u": [(0.0, 0.1, "a")], "b/u": [(0.1, 0.2, "b")]})
    with refused("'u'", "fits the labels"):
        abx_items(labels, ["u"], ["s"])


@pytest.mark.parametrize("rate", [Fraction(50), Fraction(25), Fraction(25, 2), Fraction(100), Fraction(50, 3)])
def test_frames_are_those_whose_centre_lies_in_the_item(rate):
    # Times in steps of 5 ms: many centres lie on the ends.
    times = [Fraction(i, 200) for i in range(100)]
    spans = [(a, b) for a in times[::3] for b in times[::2] if a <= b]
    first, stop = item_frames(*np.array([(float(a), float(b)) for a, b in spans]).T, float(rate))
    centres = [(i + Fraction(1, 2)) / rate for i in range(60)]
    met = 0
    for (a, b), begin, end in zip(spans, first.tolist(), stop.tolist(), strict=True):
        expected = [i for i, centre in enumerate(centres) if a <= centre <= b]
        assert list(range(begin, end)) == expected
        met += a in centres or b in centres
    assert met > 20 or rate == Fraction(50, 3)


def test_a_span_between_two_centres_has_no_frame():
    first, stop = item_frames(np.array([0.011, 0.0]), np.array([0.029, 0.009]), 50)
    assert (stop - first).tolist() == [0, 0] and (first >= 0).all()
