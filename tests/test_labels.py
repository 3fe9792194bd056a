import pickle
import tracemalloc
from itertools import pairwise

import numpy as np
import pytest
from conftest import refused

from repcodec.labels import UNLABELLED, PhoneLabels, matched, matched_sentence, speaker_of
from repcodec.manifest import Manifest


def write(path, *rows):
    path.write_text("utt\tstart_s\tend_s\tphone\n" + "".join("\t".join(map(str, row)) + "\n" for row in rows))
    return path


def of(*utterances):
    """Labels of a second each."""
    return PhoneLabels({utterance: [(0.0, 1.0, "a")] for utterance in utterances})


def brute_force(labels, segments, num_frames, frame_rate):
    """The phone at each frame's centre, by looking at every segment."""
    found = []
    for frame in range(num_frames):
        centre = (frame + 0.5) / frame_rate
        covering = [phone for start, end, phone in segments if start <= centre < end]
        found.append(labels.phones.index(covering[-1]) if covering else UNLABELLED)
    return found


@pytest.mark.parametrize("frame_rate", [25, 50, 100, 16000 / 320 / 3])
@pytest.mark.parametrize("seed", range(4))
def test_frames_are_those_of_a_plain_loop(seed, frame_rate):
    rng = np.random.default_rng(seed)
    times = np.cumsum(rng.uniform(0, 0.1, 60)).round(2).tolist()  # rounded: boundaries meet centres, segments empty
    segments = [(a, b, str(rng.choice(list("aeiou")))) for a, b in pairwise(times)]
    segments = [segment for segment in segments if rng.random() < 0.8]  # gaps
    labels = PhoneLabels({"u": [segments[i] for i in rng.permutation(len(segments))]})

    num_frames = int(times[-1] * frame_rate) + 10
    frames = labels.frames("u", num_frames, frame_rate)

    assert frames.dtype == np.int64 and frames.shape == (num_frames,)
    assert frames.tolist() == brute_force(labels, segments, num_frames, frame_rate)
    assert UNLABELLED in frames and frames.max() > 0


def test_frames_before_between_and_after_segments_are_unlabelled():
    labels = PhoneLabels({"u": [(0.1, 0.2, "a"), (0.3, 0.4, "b")]})

    # Frames of 0.1 s: centres at 0.05, 0.15, ...
    assert labels.frames("u", 6, 10).tolist() == [UNLABELLED, 0, UNLABELLED, 1, UNLABELLED, UNLABELLED]


def test_a_boundary_at_a_frames_centre_belongs_to_the_later_segment():
    labels = PhoneLabels({"u": [(0.0, 0.5, "a"), (0.5, 1.0, "b")]})

    assert labels.frames("u", 2, 1).tolist() == [1, UNLABELLED]


def test_a_segment_inside_a_longer_one_does_not_hide_the_rest_of_it():
    segments = [(0.0, 1.0, "a"), (0.2, 0.4, "b")]
    labels = PhoneLabels({"u": segments})

    assert labels.frames("u", 10, 10).tolist() == brute_force(labels, segments, 10, 10)


def test_no_frames_are_asked_for():
    assert PhoneLabels({"u": [(0.0, 1.0, "a")]}).frames("u", 0, 50).shape == (0,)


def test_an_unknown_utterance_is_unlabelled_throughout():
    labels = PhoneLabels({"u": [(0.0, 1.0, "a")]})
    frames = labels.frames("v", 4, 50)

    assert labels.key("v") is None
    assert frames.dtype == np.int64 and frames.tolist() == [UNLABELLED] * 4


def test_an_utterance_without_segments_is_unlabelled_throughout():
    labels = PhoneLabels({"u": [(0.0, 1.0, "a")], "v": []})

    assert labels.frames("v", 3, 50).tolist() == [UNLABELLED] * 3


def test_phones_are_one_sorted_inventory_of_all_utterances():
    labels = PhoneLabels({"u": [(0.0, 1.0, "t"), (1.0, 2.0, "a")], "v": [(0.0, 1.0, "k"), (1.0, 2.0, "a")]})

    assert labels.phones == ["a", "k", "t"] and len(labels) == 2
    assert labels.frames("u", 2, 1).tolist() == [2, 0]
    assert labels.frames("v", 2, 1).tolist() == [1, 0]


def test_labels_are_kept_in_the_order_of_their_starts_whatever_the_order_of_the_rows(tmp_path):
    rng = np.random.default_rng(0)
    names = [f"u{i}" for i in range(20)]
    rows = [(name, *np.sort(rng.integers(0, 9, 2)).tolist(), str(rng.choice(list("abc")))) for name in names * 30]
    plain = PhoneLabels.read(write(tmp_path / "a.tsv", *sorted(rows)))
    mixed = PhoneLabels.read(write(tmp_path / "b.tsv", *(rows[i] for i in rng.permutation(len(rows)))))
    whole = PhoneLabels({name: [row[1:] for row in rows if row[0] == name] for name in names})

    assert sorted(mixed.ids()) == sorted(names) and len(mixed) == 20
    for labels in (plain, mixed, whole):
        for name in names:
            starts, ends, phones = labels.segments(name)
            found = list(zip(starts.tolist(), ends.tolist(), [labels.phones[phone] for phone in phones], strict=True))
            assert found == sorted(row[1:] for row in rows if row[0] == name)
            assert labels.frames(name, 18, 2).tolist() == brute_force(labels, found, 18, 2)


def test_segments_are_seconds_and_indices():
    labels = PhoneLabels({"84/u": [(0.5, 1.0, "b"), (0.0, 0.5, "c")], "v": [(0.0, 0.25, "a")], "w": []})
    starts, ends, phones = labels.segments("84/u")

    assert (starts.tolist(), ends.tolist(), phones.tolist()) == ([0, 0.5], [0.5, 1], [2, 1])
    assert (starts.dtype, ends.dtype, phones.dtype) == (np.float64, np.float64, np.int64)
    for name in ("w", "x"):
        assert [column.shape for column in labels.segments(name)] == [(0,)] * 3
    with pytest.raises(ValueError, match="read-only"):
        starts[0] = 1


def test_ids_are_those_of_all_utterances():
    assert list(PhoneLabels({"b": [(0.0, 1.0, "x")], "a": []}).ids()) == ["b", "a"]


def test_labels_travel_to_other_processes():
    labels = pickle.loads(pickle.dumps(PhoneLabels({"1/u": [(0.0, 1.0, "b"), (1.0, 2.0, "a")]})))  # noqa: S301  # ours

    assert labels.phones == ["a", "b"] and labels.frames("u", 3, 1).tolist() == [1, 0, UNLABELLED]


@pytest.mark.parametrize("shuffled", [False, True])
def test_no_python_object_is_kept_for_a_segment(tmp_path, shuffled):
    rows = [(f"u{i // 100}", i % 100 / 8, (i % 100 + 1) / 8, f"p{i % 40}") for i in range(30_000)]
    if shuffled:
        rows = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    path = write(tmp_path / "a.tsv", *rows)
    PhoneLabels.read(write(tmp_path / "b.tsv", ("u", 0, 1, "a")))  # what is imported for it is
    tracemalloc.start()
    try:
        labels = PhoneLabels.read(path)
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert len(labels) == 300
    # 18 bytes a segment, the names and the reader's buffers; two floats and a text would be 120.
    assert kept < 24 * len(rows)
    assert peak < (80 if shuffled else 32) * len(rows)


def test_more_phones_than_any_language_has_are_refused():
    segments = [(i / 4, (i + 1) / 4, f"{i / 4}") for i in range(33_000)]

    with refused("labels", "32,769 different phones", "expected some tens"):
        PhoneLabels({"u": segments})


# Matching


def test_labels_named_by_the_stem_are_found_for_a_path():
    labels = of("u")

    assert [labels.key(name) for name in ("u", "84/121/u", "84/u/v")] == ["u", "u", None]
    assert labels.frames("84/121/u", 1, 1).tolist() == [0]


def test_the_whole_id_goes_before_the_stem():
    labels = PhoneLabels({"u": [(0.0, 1.0, "a")], "84/u": [(0.0, 1.0, "b")]})

    assert labels.frames("84/u", 1, 1).tolist() == [1]
    assert labels.frames("85/u", 1, 1).tolist() == [0]
    assert labels.key("x/84/u") == "84/u"


@pytest.mark.parametrize(
    "label, utterance",
    [
        ("116-288045-0000", "116/288045/116-288045-0000"),  # JSON lines of LibriSpeech
        ("116/116-288045-0000", "116/288045/116-288045-0000"),  # aligned by speaker
        ("dev-clean/116/288045/116-288045-0000", "116/288045/116-288045-0000"),  # from the root above
        ("116/288045/116-288045-0000", "dev-clean/116/288045/116-288045-0000"),
        ("116/288045/116-288045-0000", "116-288045-0000"),  # tokens without folders
        ("TRAIN/DR1/FCJF0/SA1", "DR1/FCJF0/SA1"),
    ],
)
def test_labels_are_found_from_another_root(label, utterance):
    labels = of(label, "116/288045/116-288045-0001", "else")

    assert labels.key(utterance) == label
    assert labels.frames(utterance, 1, 1).tolist() == [0]


@pytest.mark.parametrize(
    "label, utterance",
    [
        ("p1/001", "p2/001"),  # another speaker's
        ("p1/001", "x/p2/001"),
        ("a/b/001", "b/a/001"),
        ("p1/001", "p1/1001"),
        ("001/p1", "001"),
        ("SA1", "sa1"),
    ],
)
def test_labels_of_another_folder_are_not_taken(label, utterance):
    assert of(label).key(utterance) is None


def test_an_utterance_that_fits_several_labels_is_refused():
    labels = of("DR1/FCJF0/SA1", "DR2/MJSW0/SA1")

    assert labels.key("x/DR2/MJSW0/SA1") == "DR2/MJSW0/SA1"
    with refused("'SA1' fits the labels of 'DR1/FCJF0/SA1' and of 'DR2/MJSW0/SA1'", "longer paths"):
        labels.key("SA1")
    with refused("'SA1' fits"):
        matched(labels, ["DR1/FCJF0/SA1", "SA1"])


def test_how_many_utterances_have_labels():
    keys = matched(of("u", "v", "w"), ["1/v", "x", "u", "y"])

    assert keys == ["v", None, "u", None]
    assert matched_sentence(keys) == "labels: 2 of 4 utterances matched (2 without labels)"
    assert matched_sentence(["u", "v"]) == "labels: 2 of 2 utterances matched"


def test_no_match_shows_one_id_of_each_side(tmp_path):
    path = write(tmp_path / "a.tsv", ("116-1", 0, 1, "a"), ("116-2", 0, 1, "a"))

    with refused(path, "no utterance has labels", "'116-1'", "'Gene/Gene-000'"):
        matched(PhoneLabels.read(path), ["Gene/Gene-000", "Gene/Gene-001"])
    with refused("no utterance has labels", "None"):
        matched(of("u"), [])


def test_labels_that_fit_several_utterances_are_refused():
    with refused("the labels of 'a' fit several utterances, 's1/a' and 's2/a'"):
        matched(of("a", "b"), ["s1/a", "b", "s2/a"])


# Times and sounds


def scaled(labels, factor):
    return PhoneLabels(
        {
            name: [
                (start * factor, end * factor, labels.phones[phone])
                for start, end, phone in zip(*labels.segments(name), strict=True)
            ]
            for name in labels.ids()
        }
    )


def test_times_of_real_labels_and_those_in_other_units(speech):
    labels = PhoneLabels.read(speech / "phones.tsv")
    manifests = [Manifest.read(speech / f"{split}.tsv") for split in ("train", "valid", "test")]
    durations = {name: n / 16000 for it in manifests for name, n in zip(it.ids, it.num_samples, strict=True)}

    names = list(durations)

    def check(factor):
        scaled(labels, factor).check_durations(matched(labels, names), [durations[name] for name in names])

    for factor in (1, 1.02, 0.95, 0.8):
        check(factor)
    with refused("samples instead of seconds"):
        check(16000)
    with refused("milliseconds instead of seconds"):
        check(1000)
    with refused("frames of 10 ms instead of seconds"):
        check(100)
    for rate in (22050, 24000, 32000, 44100, 48000):  # .phn of sounds at these
        with refused("sampling rate"):
            check(rate / 16000)
    for factor in (0.5, 0.1, 0.01, 0.001):  # .phn at 8 kHz or a phone every 20 ms, and other units
        with refused("no utterance has labels beyond the first half"):
            check(factor)


@pytest.mark.parametrize("duration, fine", [(1.0, True), (0.5, True), (0.49, False), (0.0, False)])
def test_labels_may_end_half_a_second_after_a_short_sound(duration, fine):
    labels = of("u")
    if fine:
        return labels.check_durations(["u"], [duration])
    with refused("'u' last 1.00 s, but its sound", f"{duration:.2f} s"):
        labels.check_durations(["u"], [duration])


def test_labels_may_end_a_tenth_after_a_long_sound_and_what_lies_beyond_is_no_frame():
    labels = PhoneLabels({"u": [(0.0, 10.9, "a"), (10.9, 11.0, "b")]})

    labels.check_durations(["u"], [10.0])
    assert labels.frames("u", 10, 1).tolist() == [0] * 10
    with refused("'u' last 11.00 s, but its sound 9.90 s", "another sound?"):
        labels.check_durations(["u"], [9.9])


def test_one_utterance_may_have_few_labels_and_one_none():
    labels = PhoneLabels({"u": [(0.0, 0.1, "a")], "v": [(0.0, 4.0, "a")], "w": []})

    labels.check_durations(["u", None, "v", "w"], [60.0, 5.0, 7.0, 5.0])
    with refused("those of 'u' last 0.10 s, its sound 60.00 s"):
        labels.check_durations(["u", "w"], [60.0, 5.0])
    labels.check_durations([None], [1.0])


# Speakers


@pytest.mark.parametrize(
    "utterance, speaker",
    [
        ("116-288045-0000", "116"),
        ("116/288045/116-288045-0000", "116"),
        ("p225_001", "p225"),
        ("Gene/Gene-000", "Gene"),
        ("alone", "alone"),
    ],
)
def test_speakers_of_known_corpora(utterance, speaker):
    assert speaker_of(utterance) == speaker


def test_a_pattern_names_the_speaker_by_its_first_group_or_its_match():
    assert speaker_of("TRAIN/DR1/FCJF0/SA1", r".*/(\w+)/\w+$") == "FCJF0"
    assert speaker_of("TRAIN/DR1/FCJF0/SA1", r"(?:\w+)/DR\d") == "TRAIN/DR1"
    assert speaker_of("2_a", r"(\d)_(.)") == "2"


@pytest.mark.parametrize("pattern", [r"\d+", "x*", r"(\d+)?-?", "a/(b)"])
def test_a_pattern_that_finds_no_speaker_is_refused(pattern):
    with refused(repr(pattern), "finds no speaker", "'Gene-000'"):
        speaker_of("Gene-000", pattern)


@pytest.mark.parametrize("pattern", ["(", "[", "*", "(?P<a", "a{99999999999}"])
def test_a_broken_pattern_is_refused(pattern):
    with refused(repr(pattern), "not a regular expression"):
        speaker_of("Gene-000", pattern)
