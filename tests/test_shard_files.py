import json
from pathlib import Path

import numpy as np
import pytest
from conftest import SHARD_DIM as DIM
from conftest import published, refused
from test_shards import about, random

from repcodec.shards import FeatureShards


@pytest.mark.parametrize("lengths, found", [([3, 1], 4), ([3, 3], 6), ([], 0), ([5, 0, 1], 6)])
def test_lengths_that_do_not_sum_to_the_rows_are_refused(tmp_path, lengths, found):
    published(tmp_path, random(5, DIM), lengths)

    with refused(tmp_path / "0_1.len", f"sum to {found} ", "5 rows"):
        FeatureShards(tmp_path)


def test_a_negative_length_is_refused_as_such(tmp_path):
    published(tmp_path, random(5, DIM), [6, -1])

    with refused(tmp_path / "0_1.len", "-1"):
        FeatureShards(tmp_path)


@pytest.mark.parametrize("content", [b"3\nx\n", b"5.0\n", b"3, 2\n", b"\xff\n", b"9" * 30 + b"\n"])
def test_a_len_file_of_other_than_whole_numbers_is_refused(tmp_path, content):
    published(tmp_path, random(5, DIM), [])
    (tmp_path / "0_1.len").write_bytes(content)

    with refused(tmp_path / "0_1.len", "expected one number of frames a line"):
        FeatureShards(tmp_path)


def test_a_missing_len_file_is_refused(split):
    folder, _ = split
    (folder / "1_3.len").unlink()

    with refused(folder / "1_3.len", "missing"):
        FeatureShards(folder)


@pytest.mark.parametrize("rank", range(3))
def test_a_missing_shard_is_refused(split, rank):
    folder, _ = split
    (folder / f"{rank}_3.npy").unlink()

    with refused(folder, "2 of 3 shards", f"[{rank}]"):
        FeatureShards(folder)


def test_a_shard_beyond_the_last_is_refused(split):
    folder, _ = split
    published(folder, random(2, DIM), [2], "3_3")

    with refused(folder, "4 of 3"):
        FeatureShards(folder)


def test_two_sets_in_one_folder_are_refused(split):
    folder, _ = split
    published(folder, random(2, DIM), [2], "0_1")

    with refused(folder, "shards of 1 and shards of 3", "one complete set"):
        FeatureShards(folder)


@pytest.mark.parametrize("exists", [True, False])
def test_a_folder_without_shards_is_refused(tmp_path, exists):
    folder = tmp_path / "train"
    if exists:
        folder.mkdir()

    with refused(folder, "repcodec extract"):
        FeatureShards(folder)


def test_a_file_in_the_folders_place_is_refused(tmp_path):
    (tmp_path / "train").touch()

    with refused(tmp_path / "train"):
        FeatureShards(tmp_path / "train")


@pytest.mark.parametrize("lengths", [[[]], [[0, 0]], [[], [0]]])
def test_a_split_without_frames_is_refused(tmp_path, lengths):
    for rank, of_shard in enumerate(lengths):
        published(tmp_path, np.zeros((0, DIM), np.float32), of_shard, f"{rank}_{len(lengths)}")

    with refused(tmp_path, "empty"):
        FeatureShards(tmp_path)


@pytest.mark.parametrize("cut", [1, 4, 4 * DIM, 20 * DIM])
def test_a_truncated_array_is_refused(tmp_path, cut):
    path = published(tmp_path, random(5, DIM), [5])
    path.write_bytes(path.read_bytes()[:-cut])

    with refused(path, "truncated", f"{20 * DIM - cut} bytes", f"expected {20 * DIM}"):
        FeatureShards(tmp_path)


@pytest.mark.parametrize("more", [1, 4 * DIM])
def test_an_overlong_array_is_refused(tmp_path, more):
    path = published(tmp_path, random(5, DIM), [5])
    path.write_bytes(path.read_bytes() + bytes(more))

    with refused(path, "overlong", f"{20 * DIM + more} bytes", f"expected {20 * DIM}"):
        FeatureShards(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"this is no array at all" * 20, bytes(200), b"\x93NUMPY\x09\x00" + bytes(99)]
)
def test_a_file_that_is_no_array_is_refused(tmp_path, content):
    path = published(tmp_path, random(5, DIM), [5])
    path.write_bytes(content)

    with refused(path, "not a readable .npy file"):
        FeatureShards(tmp_path)


def test_a_header_cut_off_anywhere_is_refused(tmp_path):
    path = published(tmp_path, random(5, DIM), [5])
    content = path.read_bytes()
    for size in range(128):
        path.write_bytes(content[:size])
        with refused(path, "not a readable .npy file"):
            FeatureShards(tmp_path)


@pytest.mark.parametrize("wrong", [b"'", b"(", b"{", b"0", b"\\", b"\x00"])
def test_a_header_with_a_wrong_byte_is_refused(tmp_path, wrong):
    path = published(tmp_path, random(5, DIM), [5])
    content = path.read_bytes()
    end = content.index(b"}")
    for place in range(10, end):
        # A header that still reads as the same array is no fault.
        if content[place : place + 1] in (wrong, b" "):
            continue
        path.write_bytes(content[:place] + wrong + content[place + 1 :])
        with refused(path):
            FeatureShards(tmp_path)


@pytest.mark.parametrize("dtype", [np.int16, np.int64, np.uint8, np.bool_, np.complex64])
def test_another_type_than_float_is_refused(tmp_path, dtype):
    path = published(tmp_path, np.ones((5, DIM), dtype), [5])

    with refused(path, np.dtype(dtype), "expected", "float"):
        FeatureShards(tmp_path)


@pytest.mark.parametrize("shape", [(20,), (5, 2, 2), ()])
def test_an_array_of_other_than_two_axes_is_refused(tmp_path, shape):
    path = published(tmp_path, np.ones(shape, np.float32), [5])

    with refused(path, shape, "expected a (frames, width)"):
        FeatureShards(tmp_path)


def test_fortran_order_is_refused_as_such(tmp_path):
    path = published(tmp_path, np.asfortranarray(random(5, DIM)), [5])

    with refused(path, "ortran"):
        FeatureShards(tmp_path)


class Trap:
    """Unpickling this makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_an_array_of_objects_is_refused_without_unpickling(tmp_path):
    sprung = tmp_path / "sprung"
    path = published(tmp_path / "split", np.array([[Trap(sprung)]], dtype=object), [1])

    with refused(path, "object", "expected"):
        FeatureShards(tmp_path / "split")

    assert not sprung.exists()
    np.load(path, allow_pickle=True)
    assert sprung.exists()  # the trap works, so it was not touched above


@pytest.mark.parametrize(
    "description",
    [
        "",
        "{",
        "[]",
        "null",
        "3",
        '"a.wav"',
        "{}",
        json.dumps({"root": "/audio", "frame_rate": 50}),
        json.dumps({"root": "/audio", "utterances": ["a.wav", "b.wav"]}),
        json.dumps({"frame_rate": 50, "utterances": ["a.wav", "b.wav"]}),
        json.dumps(about("a.wav", "b.wav", frame_rate="50")),
        json.dumps(about("a.wav", "b.wav", frame_rate=None)),
        json.dumps(about("a.wav", "b.wav", root=None)),
        json.dumps(about("a.wav", 3)),
        json.dumps({**about(), "utterances": None}),
        json.dumps({**about(), "utterances": "ab"}),
        json.dumps({**about(), "utterances": {"a.wav": 3, "b.wav": 2}}),
        json.dumps({**about(), "utterances": None, "root": None}),
        b"\xff{}",
    ],
)
def test_a_malformed_description_is_refused(tmp_path, description):
    published(tmp_path, random(5, DIM), [3, 2])
    content = description if isinstance(description, bytes) else description.encode()
    (tmp_path / "0_1.json").write_bytes(content)

    with refused(tmp_path / "0_1.json"):
        FeatureShards(tmp_path)


@pytest.mark.parametrize("names", [[], ["a.wav"], ["a.wav", "b.wav", "c.wav"]])
def test_a_description_of_another_number_of_utterances_is_refused(tmp_path, names):
    published(tmp_path, random(5, DIM), [3, 2])
    (tmp_path / "0_1.json").write_text(json.dumps(about(*names)))

    with refused(tmp_path / "0_1.json", f"names {len(names)} utterances", "2"):
        FeatureShards(tmp_path)


@pytest.mark.parametrize(
    "header",
    [
        "{[]: 1}",
        "-" * 5000 + "1",
        "{'descr': '<f4', 1: False, 'shape': (5, 4)}",
        "{'descr': ('<f4',), 'fortran_order': False, 'shape': (5, 4)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (0, -4)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (-5, -4)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (True, 20)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000000, 4)}",
    ],
)
def test_a_header_that_is_none_is_refused(tmp_path, header):
    path = published(tmp_path, random(5, DIM), [5])
    path.write_bytes(b"\x93NUMPY\1\0" + len(header).to_bytes(2, "little") + header.encode() + bytes(80))

    with refused(path) as caught:
        FeatureShards(tmp_path)
    assert "\n" not in str(caught.value)


def test_lengths_whose_sum_overflows_to_the_rows_are_refused(tmp_path):
    published(tmp_path, random(5, DIM), [2**62] * 4 + [5])

    with refused(tmp_path / "0_1.len", "lengths sum to"):
        FeatureShards(tmp_path)


@pytest.mark.parametrize(
    ("description", "found"),
    [
        ("[" * 100_000, "not a readable shard description"),
        (json.dumps(about("a.wav", "b.wav", frame_rate=0)), "'frame_rate' is 0"),
        (json.dumps(about("a.wav", "b.wav", frame_rate=float("nan"))), "'frame_rate' is nan"),
        (json.dumps(about("a.wav", "b.wav", frame_rate=10**400)), "'frame_rate' is 1000"),
        (json.dumps(about("a.wav", "\ud800.wav")), "no character of UTF-8"),
    ],
)
def test_a_description_that_lies_is_refused(tmp_path, description, found):
    published(tmp_path, random(5, DIM), [3, 2])
    (tmp_path / "0_1.json").write_text(description)

    with refused(tmp_path / "0_1.json", found):
        FeatureShards(tmp_path)
