import gzip
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import refused

from repcodec import files
from repcodec.errors import RepCodecError
from repcodec.tokens import (
    LineWriter,
    Tokens,
    about_path,
    format_line,
    is_finished,
    read_about,
    read_root,
    read_tokens,
    run_lengths,
)

TWO = np.array([[3, 3, 3, 1023, 0], [5, 5, 6, 6, 6]])


def write(path, utterances, kind="tokens", deduplicate=False, root="/audio"):
    """Write a whole tokens file of (name, (K, N) codes)."""
    with LineWriter(path, {"made": "here"}, root if kind == "tokens" else None) as writer:
        for name, codes in utterances:
            writer.write(format_line(Tokens(name, np.atleast_2d(codes), 9, 0.18), kind, deduplicate))
    return path


def read(path):
    return [(tokens.name, tokens.codes.tolist()) for tokens in read_tokens(path)]


def test_the_published_format_is_written_byte_for_byte(tmp_path):
    utterances = [("b/é.flac", np.array([3, 1023, 0])), ("a.wav", np.array([7], dtype=np.int32))]
    path = write(tmp_path / "x" / "test.tokens", utterances)

    assert path.read_bytes() == b"/audio\nb/\xc3\xa9.flac\t3 1023 0\na.wav\t7\n"
    assert read_root(path) == "/audio"


def test_json_lines_hold_all_codebooks_ids_and_durations(tmp_path):
    path = write(tmp_path / "a.jsonl", [("b/é.flac", TWO)], "jsonl")

    line = {"id": "b/é", "path": "b/é.flac", "duration": 0.18, "frames": 9, "codes": TWO.tolist()}
    assert path.read_text() == json.dumps(line, ensure_ascii=False) + "\n"
    (tokens,) = read_tokens(path)
    assert (tokens.num_frames, tokens.duration) == (9, 0.18)


@pytest.mark.parametrize("kind", ["tokens", "jsonl"])
@pytest.mark.parametrize("deduplicate", [False, True])
def test_reading_gives_what_was_written_in_order(tmp_path, kind, deduplicate):
    rng = np.random.default_rng(0)
    num_codebooks = 1 if kind == "tokens" else 3
    written = [(f"{i * 7 % 10}.wav", rng.integers(2, size=(num_codebooks, i))) for i in range(10)]
    path = write(tmp_path / "a", written, kind, deduplicate)

    found = list(read_tokens(str(path)))

    assert [tokens.name for tokens in found] == [name for name, _ in written]
    for tokens, (_, expected) in zip(found, written, strict=True):
        assert tokens.codes.dtype == np.int64
        np.testing.assert_array_equal(tokens.codes, expected)


def test_runs_end_where_any_codebook_changes():
    codes, lengths = run_lengths(TWO)
    assert codes.tolist() == [[3, 3, 1023, 0], [5, 6, 6, 6]]
    assert lengths.tolist() == [2, 1, 1, 1]
    assert [part.shape for part in run_lengths(np.empty((1, 0), np.int64))] == [(1, 0), (0,)]


def test_deduplicated_lines_are_run_length_pairs():
    tokens = Tokens("a.wav", TWO[:1], 5, 0.1)
    assert format_line(tokens, "tokens", deduplicate=True) == "a.wav\t3:3 1023:1 0:1\n"
    line = json.loads(format_line(tokens, "jsonl", deduplicate=True))
    assert line["codes"] == [[3, 1023, 0]] and line["repeats"] == [3, 1, 1]


def test_several_codebooks_are_refused_in_the_published_format():
    with refused("2 codebooks", ".jsonl"):
        format_line(Tokens("a.wav", TWO), "tokens")


# Resuming


def test_a_failure_leaves_whole_lines_for_the_next_run_and_no_file(tmp_path):
    path = tmp_path / "a.tokens"
    with refused("bad features"), LineWriter(path, {"x": 1}, "/audio") as writer:
        writer.write("a.wav\t1 2\n")
        raise RepCodecError("bad features")
    assert not path.exists() and not about_path(path).exists()

    with LineWriter(path, {"x": 1}, "/audio") as writer:
        assert writer.done == ["a.wav"]
        writer.write("b.wav\t3\n")

    assert path.read_text() == "/audio\na.wav\t1 2\nb.wav\t3\n"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.tokens", "a.tokens.json"]
    assert is_finished(path, {"x": 1}) and not is_finished(path, {"x": 2})


@pytest.mark.parametrize("torn", [b"b.wav\t1 2", b"b.wav\t", b"b.", b"\0\0\0\n", b"\xff\n", b"b.wav\t1 x\n"])
def test_a_torn_last_line_is_written_again(tmp_path, torn):
    path = tmp_path / "a.tokens"
    with refused(), LineWriter(path, {"x": 1}, "/audio") as writer:
        writer.write("a.wav\t1 2\n")
        raise RepCodecError("killed")
    with open(tmp_path / ".a.tokens.partial", "ab") as file:
        file.write(torn)

    with LineWriter(path, {"x": 1}, "/audio") as writer:
        assert writer.done == ["a.wav"]
        writer.write("b.wav\t3\n")

    assert path.read_text() == "/audio\na.wav\t1 2\nb.wav\t3\n"


def test_an_unfinished_file_of_something_else_is_begun_anew(tmp_path):
    path = tmp_path / "a.tokens"
    with refused(), LineWriter(path, {"codec": "old"}, "/audio") as writer:
        writer.write("a.wav\t1 2\n")
        raise RepCodecError("killed")

    with LineWriter(path, {"codec": "new"}, "/audio") as writer:
        assert writer.done == []
        writer.write("a.wav\t7\n")

    assert path.read_text() == "/audio\na.wav\t7\n"


def test_a_run_that_fails_before_its_first_line_leaves_nothing(tmp_path):
    with refused("bad features"), LineWriter(tmp_path / "a", {}, "/audio"):
        raise RepCodecError("bad features")
    assert not list(tmp_path.iterdir())


def test_two_processes_do_not_write_the_same_file(tmp_path):
    with LineWriter(tmp_path / "a", {}, "/audio") as writer:
        writer.write("a.wav\t1\n")
        code = (
            f"from repcodec.tokens import LineWriter\nLineWriter({str(tmp_path / 'a')!r}, {{}}, '/audio').__enter__()"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert f"process {os.getpid()} is making it" in done.stderr
    assert (tmp_path / "a").read_text() == "/audio\na.wav\t1\n"


def test_an_unwritable_folder_is_refused(tmp_path):
    (tmp_path / "file").touch()

    with refused(tmp_path / "file" / "a", "could not be written"):
        write(tmp_path / "file" / "a", [("a.wav", np.array([1]))])


def test_a_full_disk_is_one_sentence_and_leaves_nothing_that_looks_finished(tiny_disk):
    codes = np.full(100_000, 1023)
    with refused(tiny_disk / "a", "could not be written", "space"):
        write(tiny_disk / "a", [("a.wav", codes)])
    assert not (tiny_disk / "a").exists()


# Bad input


@pytest.mark.parametrize("name", ["a\tb.wav", "a\nb.wav", "a\rb.wav", os.fsdecode(b"caf\xe9.wav")])
@pytest.mark.parametrize("kind", ["tokens", "jsonl"])
def test_a_path_that_a_line_cannot_hold_is_refused(name, kind):
    with refused(repr(name)):
        format_line(Tokens(name, np.array([[1]])), kind)


@pytest.mark.parametrize("last", ["b.wav\t1 2", "b.wav\t", "b.wav", "b"])
def test_a_cut_off_last_line_is_refused(tmp_path, last):
    (tmp_path / "a").write_text(f"/audio\na.wav\t1 2 3\n{last}")

    with refused(tmp_path / "a", "line 3", "cut off"):
        list(read_tokens(tmp_path / "a"))


@pytest.mark.parametrize("content", ["", "/aud"])
def test_a_file_cut_off_in_its_first_line_is_refused(tmp_path, content):
    (tmp_path / "a").write_text(content)

    with refused(tmp_path / "a"):
        list(read_tokens(tmp_path / "a"))


@pytest.mark.parametrize("line", ["b.wav 1 2", "\t1 2", "", "b.wav"])
def test_a_line_that_is_not_path_tab_codes_is_refused(tmp_path, line):
    (tmp_path / "a").write_text(f"/audio\na.wav\t1 2 3\n{line}\nc.wav\t4\n")

    with refused(tmp_path / "a", "line 3", repr(line + "\n"), "expected relative_path<TAB>codes"):
        list(read_tokens(tmp_path / "a"))


@pytest.mark.parametrize("codes", ["1 x 3", "1.5", "1 nan", "1,2", "1\t2 x", "1:2 3", "1:2:3", "x:1"])
def test_a_code_that_is_not_a_whole_number_is_refused(tmp_path, codes):
    (tmp_path / "a").write_text(f"/audio\na.wav\t1 2 3\nb.wav\t{codes}\n")

    with refused(tmp_path / "a", "line 3", "not a whole number"):
        list(read_tokens(tmp_path / "a"))


@pytest.mark.parametrize("codes", ["1 -3", "-1:2", str(2**31), str(2**64), f"1 {2**31}:2"])
def test_a_code_that_no_codebook_has_is_refused(tmp_path, codes):
    (tmp_path / "a").write_text(f"/audio\nb.wav\t{codes}\n")

    with refused(tmp_path / "a", "line 2"):
        list(read_tokens(tmp_path / "a"))


def test_a_file_cut_off_between_two_lines_is_refused(tmp_path):
    path = write(tmp_path / "a.tokens", [("a.flac", TWO[0]), ("b.flac", TWO[1])])
    whole = path.read_bytes()
    path.write_bytes(b"".join(whole.splitlines(keepends=True)[:2]))
    with refused(path, f"a.tokens.json beside it tells of {len(whole)}", "make it again"):
        read(path)
    about_path(path).unlink()  # then nothing tells
    assert [name for name, _ in read(path)] == ["a.flac"]


def test_a_gzipped_file_is_read_and_a_cut_one_refused(tmp_path):
    lines = "/audio\n" + "".join(f"{name}.wav\t{i} {i + 1}\n" for i, name in enumerate("abcdefg"))
    (tmp_path / "a.gz").write_bytes(gzip.compress(lines.encode()))
    assert [found.name for found in read_tokens(tmp_path / "a.gz")] == [f"{name}.wav" for name in "abcdefg"]
    assert read_root(tmp_path / "a.gz") == "/audio"
    (tmp_path / "a.gz").write_bytes((tmp_path / "a.gz").read_bytes()[:-9])
    with refused(tmp_path / "a.gz", "not a readable tokens file"):
        list(read_tokens(tmp_path / "a.gz"))


@pytest.mark.parametrize("kind", ["tokens", "jsonl"])
def test_every_rank_reads_its_share(tmp_path, kind):
    found = [Tokens(f"{name}.wav", np.array([[i, i + 1]])) for i, name in enumerate("abcdefg")]
    text = "".join(format_line(tokens, kind) for tokens in found)
    (tmp_path / "a").write_text(text if kind == "jsonl" else "/audio\n" + text)
    for world in (2, 3, 9):
        parts = [[tokens.name for tokens in read_tokens(tmp_path / "a", rank, world)] for rank in range(world)]
        assert parts == [[tokens.name for tokens in found][rank::world] for rank in range(world)]


@pytest.mark.parametrize("codes", ["1:0", "1:-2", "1:99999999999", "1:60000000 2:60000000"])
def test_a_run_of_no_or_endless_length_is_refused(tmp_path, codes):
    (tmp_path / "a").write_text(f"/audio\nb.wav\t{codes}\n")

    with refused(tmp_path / "a", "line 2", "run's length"):
        list(read_tokens(tmp_path / "a"))


@pytest.mark.parametrize(
    "line",
    [
        "[1]",
        "{",
        '{"id": "a"}',
        '{"codes": [[1]]}',
        '{"id": 3, "codes": [[1]]}',
        '{"id": "a", "codes": []}',
        '{"id": "a", "codes": [1, 2]}',
        '{"id": "a", "codes": [[1, 2], [3]]}',
        '{"id": "a", "codes": [[1.5]]}',
        '{"id": "a", "codes": [[true]]}',
        '{"id": "a", "codes": [["1"]]}',
        '{"id": "a", "codes": [[1]], "repeats": [1, 2]}',
        '{"id": "a", "codes": [[1]], "repeats": "11"}',
        '{"id": "a", "codes": [[1, 2]], "repeats": [3]}',
        '{"id": "a", "codes": [[1]], "frames": -1}',
        '{"id": "a", "codes": [[1]], "frames": "many"}',
        '{"id": "a", "codes": [[99999999999999999999]]}',
        '{"id": "a", "codes": [[1]], "duration": NaN}',
        '{"id": "a", "codes": [[1]], "duration": ' + "9" * 400 + "}",
        '{"id": "a", "codes": ' + "[" * 100_000,
    ],
)
def test_a_json_line_that_is_no_utterance_is_refused(tmp_path, line):
    (tmp_path / "a").write_text('{"id": "z", "codes": [[1]]}\n' + line + "\n")

    with refused(tmp_path / "a", "line 2", 'expected a JSON object with "id" and "codes"'):
        list(read_tokens(tmp_path / "a"))


def test_a_cut_off_json_line_is_refused(tmp_path):
    (tmp_path / "a").write_text('{"id": "z", "codes": [[1]]}\n{"id": "y", "codes": [[1]]}')

    with refused(tmp_path / "a", "line 2", "cut off"):
        list(read_tokens(tmp_path / "a"))


@pytest.mark.parametrize("content", [None, b"/audio\n\xff.wav\t1\n"])
def test_a_missing_file_and_one_that_is_not_utf8_are_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "a").write_bytes(content)

    with refused(tmp_path / "a", "not a readable tokens file"):
        list(read_tokens(tmp_path / "a"))


def test_an_unreadable_description_is_refused(tmp_path):
    about_path(tmp_path / "a").write_text("{")
    with refused(about_path(tmp_path / "a"), "not a readable description"):
        read_about(tmp_path / "a")
    assert read_about(tmp_path / "b") == {}


@pytest.mark.parametrize(
    "about",
    [
        {"codebook_size": "64"},
        {"codebook_size": 0},
        {"codebook_size": 2**40},
        {"codes_per_second": 0},
        {"codes_per_second": float("nan")},
        {"codes_per_second": 10**400},
        {"codes_per_second": "50"},
        {"root": 3},
        {"bytes": "many"},
    ],
)
def test_a_description_that_lies_is_refused(tmp_path, about):
    about_path(tmp_path / "a").write_text(json.dumps(about))
    with refused(about_path(tmp_path / "a"), "not a readable description", "delete it"):
        read_about(tmp_path / "a")


def test_runs_of_many_codebooks_do_not_fill_the_memory(tmp_path):
    line = {"id": "a", "codes": [[1]] * 1000, "repeats": [99_999_999]}
    (tmp_path / "a").write_text(json.dumps(line) + "\n")
    with refused(tmp_path / "a", "line 1", "run's length"):
        list(read_tokens(tmp_path / "a"))


def test_a_name_that_nothing_can_write_is_refused(tmp_path):
    (tmp_path / "a").write_text('{"id": "\\ud800", "codes": [[1]]}\n')
    with refused(tmp_path / "a", "line 1", "no character of UTF-8"):
        list(read_tokens(tmp_path / "a"))


@pytest.mark.parametrize("first", ["/audio\na.wav\t", '{"id": "'])
def test_a_line_without_end_does_not_fill_the_memory(tmp_path, monkeypatch, first):
    monkeypatch.setattr(files, "MAX_LINE", 1000)
    (tmp_path / "a").write_bytes(gzip.compress(first.encode() + b"1" * 5000))
    with refused(tmp_path / "a", "over 1,000 characters"):
        list(read_tokens(tmp_path / "a"))


def test_a_note_of_a_killed_run_that_is_garbage_is_begun_anew(tmp_path):
    (tmp_path / ".a.partial").write_text("/audio\nb.wav\t1\n")
    (tmp_path / ".a.about").write_text("[" * 100_000)
    with LineWriter(tmp_path / "a", {}, "/audio") as file:
        assert file.done == []
        file.write("c.wav\t2\n")
    assert [tokens.name for tokens in read_tokens(tmp_path / "a")] == ["c.wav"]
