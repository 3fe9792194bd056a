import gzip
import json
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
from conftest import refused
from praatio import textgrid

from repcodec import files, label_files
from repcodec.labels import UNLABELLED, PhoneLabels

HEADER = "utt\tstart_s\tend_s\tphone\n"


def write(path, *rows, header=HEADER):
    path.write_text(header + "".join("\t".join(map(str, row)) + "\n" for row in rows))
    return path


def write_json(path, *utterances):
    text = "".join(
        json.dumps({"name": name, "phones": phones}, ensure_ascii=False) + "\n" for name, phones in utterances
    )
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def put(folder, name, content, encoding="utf-8"):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode(encoding))
    return path


def write_textgrid(path, tiers, end, kind="long_textgrid"):
    path.parent.mkdir(parents=True, exist_ok=True)
    grid = textgrid.Textgrid()
    for name, segments in tiers.items():
        grid.addTier(textgrid.IntervalTier(name, segments, 0, end))
    grid.save(str(path), kind, includeBlankSpaces=True)


def segments_of(labels, utterance):
    starts, ends, phones = labels.segments(utterance)
    return [(start, end, labels.phones[phone]) for start, end, phone in zip(starts, ends, phones, strict=True)]


# A table


def test_a_table_is_read_in_any_order_of_rows_and_columns(tmp_path):
    rows = [("b", "x", 0.5, "v", 1.0), ("a", "y", 0.0, "u", 0.5), ("c", "z", 0.0, "v", 0.5), ("b", "", 0.5, "u", 1)]
    path = write(tmp_path / "a.tsv", *rows, header="phone\tnote\tstart_s\tutt\tend_s\n")
    labels = PhoneLabels.read(str(path))

    assert labels.phones == ["a", "b", "c"] and list(labels.ids()) == ["v", "u"]
    assert labels.frames("u", 4, 4).tolist() == [0, 0, 1, 1]
    assert labels.frames("v", 4, 4).tolist() == [2, 2, 1, 1]


@pytest.mark.parametrize(
    "before, ending, after", [("", "\n", ""), ("", "\r\n", ""), ("", "\n", "\n\n"), ("\ufeff", "\n", "")]
)
def test_a_table_from_elsewhere_may_be_zipped_and_have_other_line_ends_and_a_byte_order_mark(
    tmp_path, before, ending, after
):
    text = before + ending.join(["utt\tstart_s\tend_s\tphone", "u\t0\t1\ta", "u\t1\t2\tb", after])
    zipped = put(tmp_path, "a.tsv.gz", gzip.compress(text.encode()))
    plain = put(tmp_path, "a.tsv", text)

    assert segments_of(PhoneLabels.read(plain), "u") == [(0, 1, "a"), (1, 2, "b")]
    assert segments_of(PhoneLabels.read(zipped), "u") == [(0, 1, "a"), (1, 2, "b")]


def test_an_utterance_of_more_segments_than_are_handed_on_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(label_files, "MAX_RUN", 7)
    rows = [("u" if i < 25 else "v", i, i + 1, "ab"[i % 2]) for i in range(50)]
    labels = PhoneLabels.read(write(tmp_path / "a.tsv", *rows))

    assert segments_of(labels, "u") == [row[1:] for row in rows[:25]]
    assert segments_of(labels, "v") == [row[1:] for row in rows[25:]]


def test_quotes_are_phones_not_quoting(tmp_path):
    labels = PhoneLabels.read(write(tmp_path / "a.tsv", ("u", 0, 1, '"'), ("u", 1, 2, "ə"), ("u", 2, 3, '"')))

    assert labels.phones == ['"', "ə"]
    assert labels.frames("u", 3, 1).tolist() == [0, 1, 0]


@pytest.mark.parametrize("column", ["utt", "start_s", "end_s", "phone"])
def test_a_missing_column_is_refused_by_name(tmp_path, column):
    path = write(tmp_path / "a.tsv", ("u", 0, 1, "a"), header=HEADER.replace(column, "other"))

    with refused(path, f"lacks {column}", "expected a tab-separated table"):
        PhoneLabels.read(path)


def test_a_table_with_commas_is_refused(tmp_path):
    path = write(tmp_path / "a.tsv", header="utt,start_s,end_s,phone\nu,0,1,a\n")

    with refused(path, "tab-separated"):
        PhoneLabels.read(path)


@pytest.mark.parametrize("start, end", [("x", 1), (0, ""), ("nan", 1), (0, "inf"), (-0.1, 1), (2, 1), (0, "nan")])
def test_bad_times_are_refused_by_line(tmp_path, start, end):
    path = write(tmp_path / "a.tsv", ("u", 0, 1, "a"), ("u", start, end, "b"))

    with refused(path, "line 3", "start_s", "end_s"):
        PhoneLabels.read(path)


@pytest.mark.parametrize("row", ["u", "u\t1", "u\t1\t2", "u\t1\t2\t"])
def test_a_short_row_is_refused_by_line(tmp_path, row):
    path = put(tmp_path, "a.tsv", f"{HEADER}u\t0\t1\ta\n{row}\n")

    with refused(path, "line 3"):
        PhoneLabels.read(path)


@pytest.mark.parametrize("row", ["1\t2\tb", "1\t2\tb\t"])
def test_a_row_without_an_utterance_is_refused_by_line(tmp_path, row):
    path = put(tmp_path, "a.tsv", f"start_s\tend_s\tphone\tutt\n0\t1\ta\tu\n{row}\n")

    with refused(path, "line 3"):
        PhoneLabels.read(path)


@pytest.mark.parametrize("content, found", [("", "lacks"), (HEADER, "no phone"), ("\n", "lacks")])
def test_an_empty_table_is_refused(tmp_path, content, found):
    path = put(tmp_path, "a.tsv", content)

    with refused(path, found):
        PhoneLabels.read(path)


# JSON lines


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "labels"])
def test_json_lines_hold_a_phone_every_10_ms(tmp_path, name):
    path = write_json(tmp_path / name, ("116-288045-0000", ["SIL"] * 3 + ["AA", "B", "B"]), ("1-2-3", ["B"]))
    labels = PhoneLabels.read(path)

    assert labels.phones == ["AA", "B", "SIL"] and list(labels.ids()) == ["116-288045-0000", "1-2-3"]
    assert segments_of(labels, "116-288045-0000") == [(0, 0.03, "SIL"), (0.03, 0.04, "AA"), (0.04, 0.06, "B")]
    assert segments_of(labels, "1-2-3") == [(0, 0.01, "B")]


@pytest.mark.parametrize("seed", range(3))
def test_json_lines_come_back_phone_by_phone(tmp_path, seed):
    rng = np.random.default_rng(seed)
    # Long enough that boundaries in binary fractions of a second would miss frame centres, were they not the same.
    phones = np.repeat(rng.choice(list("abc"), 4000), rng.integers(1, 5, 4000)).tolist()
    labels = PhoneLabels.read(write_json(tmp_path / "a.jsonl", ("u", phones)))

    def named(frames):
        return [labels.phones[frame] if frame != UNLABELLED else None for frame in frames]

    assert named(labels.frames("u", len(phones) + 3, 100)) == phones + [None] * 3
    # At 50 Hz a frame's centre is the boundary of its two phones: the later one has it.
    assert named(labels.frames("u", len(phones) // 2, 50)) == phones[1::2]
    # Both phones of each of T codes, as the reference figures count them.
    assert named(labels.frames("u", 2 * 1000, 2 * 50.0)) == phones[:2000]


def test_an_empty_phone_is_none(tmp_path):
    labels = PhoneLabels.read(write_json(tmp_path / "a.jsonl", ("u", ["", "", "a", "", "a"]), ("v", [])))

    assert segments_of(labels, "u") == [(0.02, 0.03, "a"), (0.04, 0.05, "a")]
    assert labels.key("v") == "v" and segments_of(labels, "v") == []


@pytest.mark.parametrize("word", ["name", "id", "utt"])
def test_the_utterance_is_called_name_or_id(tmp_path, word):
    path = put(tmp_path, "a.jsonl", f'\n{{"{word}": "u", "phones": ["a"], "text": "A"}}\r\n\n')

    assert segments_of(PhoneLabels.read(path), "u") == [(0, 0.01, "a")]


@pytest.mark.parametrize(
    "line",
    [
        '{"name": "v", "phones": ["a", "b"',
        '{"name": "v"}',
        '{"phones": ["a"]}',
        '{"name": "v", "phones": "a a"}',
        '{"name": "v", "phones": ["a", 1]}',
        '{"name": "v", "phones": [null, "a"]}',
        '{"name": "v", "phones": [["a"]]}',
        '{"name": "", "phones": ["a"]}',
        '{"name": 3, "phones": ["a"]}',
        '["v", "a"]',
        "3",
        "[" * 100_000,
        "u\t0\t1\ta",
    ],
)
def test_a_line_that_is_no_utterance_is_refused_by_number(tmp_path, line):
    path = put(tmp_path, "a.jsonl", f'{{"name": "u", "phones": ["a"]}}\n{line}\n')

    with refused(path, "line 2", '"phones": [a phone every 10 ms]') as caught:
        PhoneLabels.read(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_an_utterance_named_in_two_lines_is_refused(tmp_path):
    path = write_json(tmp_path / "a.jsonl", ("u", ["a"]), ("v", ["a"]), ("u", ["b"]))

    with refused(path, "line 3", "'u' has had its phones in an earlier line"):
        PhoneLabels.read(path)


# All formats


def test_real_labels_are_the_same_in_every_format(speech, tmp_path):
    table = PhoneLabels.read(speech / "phones.tsv")
    every_10_ms = {}
    for name in table.ids():
        segments = segments_of(table, name)
        write_textgrid(tmp_path / "grids" / f"{name}.TextGrid", {"phones": segments}, segments[-1][1])
        samples = "".join(f"{start * 16000:.0f} {end * 16000:.0f} {phone}\n" for start, end, phone in segments)
        put(tmp_path / "timit", f"{name}.PHN", samples)
        every_10_ms[name] = table.frames(name, int(segments[-1][1] * 100), 100)
    lines = ((name, [table.phones[frame] for frame in frames]) for name, frames in every_10_ms.items())
    coarse = PhoneLabels.read(write_json(tmp_path / "a.jsonl.gz", *lines))
    grids, timit = PhoneLabels.read(tmp_path / "grids"), PhoneLabels.read(tmp_path / "timit")

    assert len(table) == len(grids) == len(timit) == len(coarse) == 11
    assert grids.phones == timit.phones == table.phones == coarse.phones
    for name, frames in every_10_ms.items():
        assert segments_of(grids, name) == segments_of(table, name)
        for ours, theirs in zip(timit.segments(name), table.segments(name), strict=True):
            assert np.allclose(ours, theirs, rtol=0, atol=1 / 16000)
        assert coarse.frames(name, len(frames), 100).tolist() == frames.tolist()


@pytest.mark.parametrize("name", ["a.tsv", "a.jsonl"])
@pytest.mark.parametrize(
    "content",
    [
        None,
        b"\xff" * 100,
        bytes(range(256)) * 100,
        b"\x1f\x8b" + bytes(range(256)),
        HEADER.encode() + b"u\t0\t1\t\xff\n",
        HEADER.encode() + b"u\t0\t1\ta\0\xff\n",
    ],
)
def test_a_missing_file_and_bytes_that_are_no_text_are_refused(tmp_path, name, content):
    if content is not None:
        put(tmp_path, name, content)

    with refused(tmp_path / name) as caught:
        PhoneLabels.read(tmp_path / name)
    with refused("not a readable label file"):
        PhoneLabels.read(f"{tmp_path / name}\0")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kept", [1, 5, 100, -9, -4, -1])
def test_a_zipped_file_that_was_cut_off_is_refused(tmp_path, kept):
    path = write_json(tmp_path / "a.jsonl.gz", *((f"u{i}", [str(i), "b"]) for i in range(100)))
    path.write_bytes(path.read_bytes()[:kept])

    with refused(path):
        PhoneLabels.read(path)


@pytest.mark.parametrize("name", ["a.tsv", "a.jsonl"])
def test_a_file_without_line_ends_does_not_fill_the_memory(tmp_path, monkeypatch, name):
    monkeypatch.setattr(files, "MAX_LINE", 1000)
    path = put(tmp_path, name, (HEADER if name == "a.tsv" else "") + "x" * 5000)

    with refused(path, "over 1,000 characters"):
        PhoneLabels.read(path)


@pytest.fixture
def shut():
    """A folder of labels that others can list, in it a folder and a file that nobody can read."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        put(Path(folder), "open/a.phn", "0 10 a\n")
        put(Path(folder), "open/shut/b.phn", "0 10 a\n")
        put(Path(folder), "a.tsv", f"{HEADER}u\t0\t1\ta\n").chmod(0)
        (Path(folder) / "open" / "shut").chmod(0)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)  # root may read all
        try:
            yield Path(folder)
        finally:
            os.seteuid(user)
            (Path(folder) / "open" / "shut").chmod(0o755)


def test_what_may_not_be_read_is_refused(shut):
    with refused(shut / "open" / "shut", "cannot be listed (Permission denied)"):
        PhoneLabels.read(shut / "open")
    with refused(shut / "a.tsv", "not a readable label file", "Permission denied"):
        PhoneLabels.read(shut / "a.tsv")
    with refused(shut / "open" / "shut" / "b.phn"):
        PhoneLabels.read(shut / "open" / "shut" / "b.phn")


def test_samples_that_no_sound_has_are_refused(tmp_path):
    path = put(tmp_path, "labels/a.phn", f"0 {'9' * 400} a\n")

    with refused(path, "line 1", "expected start_sample end_sample phone"):
        PhoneLabels.read(tmp_path / "labels")


@pytest.mark.parametrize("line", [r'{"name": "\ud800", "phones": ["a"]}', r'{"name": "a", "phones": ["\udfff"]}'])
def test_halves_of_characters_are_refused(tmp_path, line):
    path = put(tmp_path, "a.jsonl", f"{line}\n")

    with refused(path, "line 1", "no character of UTF-8"):
        PhoneLabels.read(path)


def test_names_of_files_that_are_no_utf8_are_refused(tmp_path):
    put(tmp_path, "labels/a\udcff.phn", "0 10 a\n")

    with refused(tmp_path / "labels", "no character of UTF-8"):
        PhoneLabels.read(tmp_path / "labels")
