import os

import numpy as np
import pytest
from conftest import refused

from repcodec.errors import RepCodecError
from repcodec.tokens import read_tokens, write_tokens


def test_the_published_format_is_written_byte_for_byte(tmp_path):
    utterances = [("b/é.flac", np.array([3, 1023, 0])), ("a.wav", np.array([7], dtype=np.int32))]
    write_tokens(tmp_path / "x" / "test.tokens", "/audio", utterances)

    assert (tmp_path / "x" / "test.tokens").read_bytes() == b"/audio\nb/\xc3\xa9.flac\t3 1023 0\na.wav\t7\n"


def test_reading_gives_what_was_written_in_order(tmp_path):
    rng = np.random.default_rng(0)
    written = [(f"{i * 7 % 10}.wav", rng.integers(1024, size=i)) for i in range(10)]
    write_tokens(tmp_path / "a", tmp_path, iter(written))

    read = list(read_tokens(str(tmp_path / "a")))

    assert [name for name, _ in read] == [name for name, _ in written]
    for (_, codes), (_, expected) in zip(read, written, strict=True):
        assert codes.dtype == np.int64 and codes.ndim == 1
        np.testing.assert_array_equal(codes, expected)


def test_utterances_are_consumed_one_by_one(tmp_path):
    alive = []

    def utterances():
        for i in range(3):
            alive.append(i)
            yield f"{i}.wav", np.array([i])
            assert alive.pop() == i  # the next is asked for only when this one is done

    write_tokens(tmp_path / "a", "/audio", utterances())

    assert len((tmp_path / "a").read_text().splitlines()) == 4


def test_a_failure_half_way_leaves_nothing(tmp_path):
    def utterances():
        yield "a.wav", np.array([1])
        raise RepCodecError("bad features")

    with refused("bad features"):
        write_tokens(tmp_path / "a", "/audio", utterances())

    assert not list(tmp_path.iterdir())


def test_an_unwritable_folder_is_refused(tmp_path):
    (tmp_path / "file").touch()

    with refused(tmp_path / "file" / "a", "could not be written"):
        write_tokens(tmp_path / "file" / "a", "/audio", [("a.wav", np.array([1]))])


@pytest.mark.parametrize("name", ["a\tb.wav", "a\nb.wav", "a\rb.wav", os.fsdecode(b"caf\xe9.wav")])
def test_a_path_the_format_cannot_hold_is_refused(tmp_path, name):
    with refused(repr(name)):
        write_tokens(tmp_path / "a", "/audio", [(name, np.array([1]))])

    assert not list(tmp_path.iterdir())


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


@pytest.mark.parametrize("codes", ["1 x 3", "1.5", "1 nan", "1,2", "1\t2 x", str(2**64)])
def test_a_code_that_is_not_a_whole_number_is_refused(tmp_path, codes):
    (tmp_path / "a").write_text(f"/audio\na.wav\t1 2 3\nb.wav\t{codes}\n")

    with refused(tmp_path / "a", "line 3", "not a whole number"):
        list(read_tokens(tmp_path / "a"))


@pytest.mark.parametrize("content", [None, b"/audio\n\xff.wav\t1\n"])
def test_a_missing_file_and_one_that_is_not_utf8_are_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "a").write_bytes(content)

    with refused(tmp_path / "a", "not a readable tokens file"):
        list(read_tokens(tmp_path / "a"))
