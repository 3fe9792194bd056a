from itertools import pairwise

import numpy as np
import pytest
from conftest import refused

from repcodec.labels import UNLABELLED, PhoneLabels

HEADER = "utt\tstart_s\tend_s\tphone\n"


def write(path, *rows, header=HEADER):
    path.write_text(header + "".join("\t".join(map(str, row)) + "\n" for row in rows))
    return path


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


def test_labels_named_by_the_stem_are_found_for_a_path():
    labels = PhoneLabels({"u": [(0.0, 1.0, "a")]})

    assert [labels.key(name) for name in ("u", "84/121/u", "84/u/v")] == ["u", "u", None]
    assert labels.frames("84/121/u", 1, 1).tolist() == [0]


def test_the_whole_id_goes_before_the_stem():
    labels = PhoneLabels({"u": [(0.0, 1.0, "a")], "84/u": [(0.0, 1.0, "b")]})

    assert labels.frames("84/u", 1, 1).tolist() == [1]
    assert labels.frames("85/u", 1, 1).tolist() == [0]


def test_a_table_is_read_in_any_order_of_rows_and_columns(tmp_path):
    rows = [("b", "x", 0.5, "v", 1.0), ("a", "y", 0.0, "u", 0.5), ("c", "z", 0.0, "v", 0.5), ("b", "", 0.5, "u", 1)]
    path = write(tmp_path / "a.tsv", *rows, header="phone\tnote\tstart_s\tutt\tend_s\n")
    labels = PhoneLabels.read_tsv(str(path))

    assert labels.phones == ["a", "b", "c"] and len(labels) == 2
    assert labels.frames("u", 4, 4).tolist() == [0, 0, 1, 1]
    assert labels.frames("v", 4, 4).tolist() == [2, 2, 1, 1]


def test_quotes_are_phones_not_quoting(tmp_path):
    labels = PhoneLabels.read_tsv(write(tmp_path / "a.tsv", ("u", 0, 1, '"'), ("u", 1, 2, "ə"), ("u", 2, 3, '"')))

    assert labels.phones == ['"', "ə"]
    assert labels.frames("u", 3, 1).tolist() == [0, 1, 0]


@pytest.mark.parametrize("column", ["utt", "start_s", "end_s", "phone"])
def test_a_missing_column_is_refused_by_name(tmp_path, column):
    path = write(tmp_path / "a.tsv", ("u", 0, 1, "a"), header=HEADER.replace(column, "other"))

    with refused(path, f"lacks {column}", "expected a tab-separated table"):
        PhoneLabels.read_tsv(path)


def test_a_table_with_commas_is_refused(tmp_path):
    path = write(tmp_path / "a.tsv", header="utt,start_s,end_s,phone\nu,0,1,a\n")

    with refused(path, "tab-separated"):
        PhoneLabels.read_tsv(path)


@pytest.mark.parametrize("start, end", [("x", 1), (0, ""), ("nan", 1), (0, "inf"), (-0.1, 1), (2, 1), (0, "nan")])
def test_bad_times_are_refused_by_line(tmp_path, start, end):
    path = write(tmp_path / "a.tsv", ("u", 0, 1, "a"), ("u", start, end, "b"))

    with refused(path, "line 3", "start_s", "end_s"):
        PhoneLabels.read_tsv(path)


@pytest.mark.parametrize("row", ["u", "u\t1", "u\t1\t2", "u\t1\t2\t"])
def test_a_short_row_is_refused_by_line(tmp_path, row):
    path = tmp_path / "a.tsv"
    path.write_text(f"{HEADER}u\t0\t1\ta\n{row}\n")

    with refused(path, "line 3"):
        PhoneLabels.read_tsv(path)


@pytest.mark.parametrize("row", ["1\t2\tb", "1\t2\tb\t"])
def test_a_row_without_an_utterance_is_refused_by_line(tmp_path, row):
    path = tmp_path / "a.tsv"
    path.write_text(f"start_s\tend_s\tphone\tutt\n0\t1\ta\tu\n{row}\n")

    with refused(path, "line 3"):
        PhoneLabels.read_tsv(path)


@pytest.mark.parametrize("content, found", [("", "lacks"), (HEADER, "no phone"), ("\n", "lacks")])
def test_an_empty_table_is_refused(tmp_path, content, found):
    (tmp_path / "a.tsv").write_text(content)

    with refused(tmp_path / "a.tsv", found):
        PhoneLabels.read_tsv(tmp_path / "a.tsv")


@pytest.mark.parametrize("content", [None, HEADER.encode() + b"u\t0\t1\t\xff\n"])
def test_a_missing_file_and_one_that_is_not_utf8_are_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "a.tsv").write_bytes(content)

    with refused(tmp_path / "a.tsv", "not a readable label file"):
        PhoneLabels.read_tsv(tmp_path / "a.tsv")
