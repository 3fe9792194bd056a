"""Folders of labels, a file an utterance: TextGrids and TIMIT .phn."""

import sys

import pytest
from conftest import refused
from test_label_files import put, segments_of, write, write_textgrid

from repcodec.labels import UNLABELLED, PhoneLabels

# As the Montreal Forced Aligner writes them: silence is an empty interval, and of the size (here too small, as MFA 2
# had it) nothing can be believed.
LONG = '''File type = "ooTextFile"
Object class = "TextGrid"

xmin = 0
xmax = 0.5
tiers? <exists>
size = 2
item []:
    item [1]:
        class = "IntervalTier"
        name = "words"
        xmin = 0
        xmax = 0.5
        intervals: size = 1
        intervals [1]:
            xmin = 0.03
            xmax = 0.42
            text = "the ""cat"""
    item [2]:
        class = "IntervalTier"
        name = "phones"
        xmin = 0
        xmax = 0.5
        intervals: size = 3
        intervals [1]:
            xmin = 0.0
            xmax = 0.03
            text = ""
        intervals [2]:
            xmin = 0.03
            xmax = 0.11
            text = "DH"
        intervals [3]:
            xmin = 0.11
            xmax = 0.42
            text = "ə"""
        intervals [4]:
            xmin = 0.42
            xmax = 0.5
            text = ""
'''
SHORT = '''File type = "ooTextFile"
Object class = "TextGrid"

0
0.5
<exists>
2
"IntervalTier"
"words"
0
0.5
1
0.03
0.42
"the ""cat"""
"IntervalTier"
"phones"
0
0.5
4
0
0.03
""
0.03
0.11
"DH"
0.11
0.42
"ə"""
0.42
0.5
""
'''
CAT = [(0.03, 0.11, "DH"), (0.11, 0.42, 'ə"')]


# Folders


@pytest.mark.parametrize("content", [LONG, SHORT, LONG.replace("\n", " \n"), LONG.replace("\n", "\r\n")])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-8-sig"])
def test_textgrids_written_by_hand(tmp_path, content, encoding):
    put(tmp_path, "116/116-288045-0000.TextGrid", content, encoding)
    put(tmp_path, "u.v.textgrid", content)
    labels = PhoneLabels.read(tmp_path)

    assert sorted(labels.ids()) == ["116/116-288045-0000", "u.v"]
    assert segments_of(labels, "116/116-288045-0000") == segments_of(labels, "u.v") == CAT
    assert labels.frames("u.v", 6, 10).tolist() == [0, 1, 1, 1, UNLABELLED, UNLABELLED]


@pytest.mark.parametrize("kind", ["long_textgrid", "short_textgrid", "json", "textgrid_json"])
def test_textgrids_written_by_the_library(tmp_path, kind):
    tiers = {"words": [(0.03, 0.42, "the cat")], "phones": CAT}
    write_textgrid(tmp_path / "deep" / "er" / "u.TextGrid", tiers, 0.5, kind)
    write_textgrid(tmp_path / "silent.TextGrid", {"phones": []}, 1, kind)
    labels = PhoneLabels.read(tmp_path)

    assert segments_of(labels, "deep/er/u") == CAT
    assert labels.key("silent") == "silent" and segments_of(labels, "silent") == []


def test_the_phones_of_one_named_speaker(tmp_path):
    write_textgrid(tmp_path / "u.TextGrid", {"Ann - words": [(0, 1, "a")], "Ann - phones": [(0, 1, "AH")]}, 1)

    assert segments_of(PhoneLabels.read(tmp_path), "u") == [(0, 1, "AH")]


def test_phones_of_several_speakers_and_of_none_are_refused(tmp_path):
    write_textgrid(tmp_path / "a" / "u.TextGrid", {"A - phones": [(0, 1, "a")], "B - phones": [(0, 1, "b")]}, 1)
    write_textgrid(tmp_path / "b" / "u.TextGrid", {"words": [(0, 1, "a")], "phonemes": [(0, 1, "b")]}, 1)

    with refused(tmp_path / "a" / "u.TextGrid", "several speakers ('A - phones', 'B - phones')"):
        PhoneLabels.read(tmp_path / "a")
    with refused(tmp_path / "b" / "u.TextGrid", "no phones among its tiers ('words', 'phonemes')", "called 'phones'"):
        PhoneLabels.read(tmp_path / "b")


def test_without_the_library_the_extra_is_named(tmp_path, monkeypatch):
    put(tmp_path, "u.TextGrid", LONG)
    monkeypatch.setitem(sys.modules, "praatio", None)

    with refused(tmp_path / "u.TextGrid", "pip install 'repcodec[textgrid]'"):
        PhoneLabels.read(tmp_path)


def test_a_tier_of_points_holds_no_phones(tmp_path):
    put(tmp_path, "u.TextGrid", SHORT.replace('"IntervalTier"\n"phones"', '"TextTier"\n"phones"'))

    with refused(tmp_path / "u.TextGrid", "tier of intervals"):
        PhoneLabels.read(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "nothing of the kind",
        "{}",
        "[1]",
        "3",
        bytes(range(256)),
        b"\xff\xfe\x00",
        LONG[:430],  # cut off within the first interval
        LONG.replace("xmax = 0.11", "xmax = nan"),
        LONG.replace("xmax = 0.11", "xmax = 0.01"),
        LONG.replace("xmax = 0.11", "xmax = 0.12"),  # reaches into the next one
        LONG.replace("xmin = 0", "xmin = -0.2"),
        SHORT.replace("0.11\n", "nan\n"),
        SHORT.replace("\n0.03\n", "\n-0.03\n"),
        SHORT.replace("0.42\n", "inf\n"),
    ],
)
def test_a_broken_textgrid_is_refused_by_name(tmp_path, content):
    path = put(tmp_path, "u.TextGrid", content)

    with refused(path) as caught:
        PhoneLabels.read(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("ending", [".phn", ".PHN"])
def test_timit_counts_samples_at_16_khz(tmp_path, ending):
    put(tmp_path, f"TRAIN/DR1/FCJF0/SA1{ending}", "0 3050 h#\n3050 4559 sh\n4559 5723 ix\n\n")
    put(tmp_path, f"TRAIN/DR1/FCJF0/SX37{ending}", "0 1600 h#\r\n1600 3200 ix\r\n")
    put(tmp_path, "TRAIN/DR1/FCJF0/SA1.WRD", "3050 5723 she\n")
    labels = PhoneLabels.read(tmp_path)

    assert list(labels.ids()) == ["TRAIN/DR1/FCJF0/SA1", "TRAIN/DR1/FCJF0/SX37"]
    found = segments_of(labels, "TRAIN/DR1/FCJF0/SA1")
    assert found == [(0, 0.190625, "h#"), (0.190625, 0.2849375, "sh"), (0.2849375, 0.3576875, "ix")]
    assert segments_of(labels, "TRAIN/DR1/FCJF0/SX37") == [(0, 0.1, "h#"), (0.1, 0.2, "ix")]


@pytest.mark.parametrize(
    "line",
    ["0 10", "0 10 a b", "0.0 0.05 sil", "-1 10 a", "10 5 a", "nan 10 a", "0 inf a", "a b c", "1" * 5000 + " 2 a"],
)
def test_a_line_that_is_no_phone_is_refused_by_number(tmp_path, line):
    path = put(tmp_path, "a.phn", f"0 10 a\n{line}\n")

    with refused(path, "line 2", "expected start_sample end_sample phone", "16 kHz") as caught:
        PhoneLabels.read(tmp_path)
    assert len(str(caught.value)) < 500


def test_a_folder_of_both_kinds_and_one_of_neither_are_refused(tmp_path):
    put(tmp_path, "both/a.phn", "0 10 a\n")
    put(tmp_path, "both/deep/b.TextGrid", LONG)
    put(tmp_path, "neither/a.txt", "0 10 a\n")

    with refused(tmp_path / "both", "both TextGrid and .phn"):
        PhoneLabels.read(tmp_path / "both")
    with refused(tmp_path / "neither", "neither a TextGrid nor a .phn"):
        PhoneLabels.read(tmp_path / "neither")


def test_a_folder_of_empty_files_lists_no_phone(tmp_path):
    put(tmp_path, "a.phn", "\n")

    with refused(tmp_path, "lists no phone"):
        PhoneLabels.read(tmp_path)


def test_two_files_of_one_utterance_are_refused(tmp_path):
    put(tmp_path, "a.phn", "0 10 a\n")
    put(tmp_path, "a.PHN", "0 10 a\n")

    with refused("a.phn", "a.PHN", "same utterance"):
        PhoneLabels.read(tmp_path)


def test_what_macos_leaves_beside_files_is_no_label_and_links_are_followed(tmp_path):
    put(tmp_path, "corpus/spk/a.phn", "0 16000 a\n")
    put(tmp_path, "corpus/spk/._a.phn", b"\x00\x05\x16\x07")
    put(tmp_path, "elsewhere/b.phn", "0 16000 b\n")
    (tmp_path / "corpus" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "corpus" / "loop").symlink_to(tmp_path / "corpus")

    assert list(PhoneLabels.read(tmp_path / "corpus").ids()) == ["link/b", "spk/a"]


def test_the_file_of_one_utterance_is_refused(tmp_path):
    path = put(tmp_path, "a.PHN", "0 10 a\n")

    with refused(path, "give the folder"):
        PhoneLabels.read(path)


def test_short_reading_shows_no_bar(tmp_path, capfd):
    put(tmp_path, "grids/u.TextGrid", LONG)
    PhoneLabels.read(tmp_path / "grids")
    PhoneLabels.read(write(tmp_path / "a.tsv", ("u", 0, 1, "a")))

    assert capfd.readouterr() == ("", "")
