import json
import mmap
from pathlib import Path

import numpy as np
import pytest
from conftest import refused

from repcodec.shard_writer import write_shard
from repcodec.shards import FeatureShards, check_finite

DIM = 4
LENGTHS = [[3, 1, 5], [2], [4, 6]]
"""Frames of each utterance of the three shards that `split` makes."""


def random(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def about(*names, **more):
    return {"encoder": "e", "layer": 9, "frame_rate": 50.0, "root": "/audio", "utterances": list(names), **more}


def write(folder, utterances, rank=0, num_shards=1, **more):
    """Write a shard with the writer."""
    with write_shard(folder, rank, num_shards, DIM, about(*utterances, **more)) as shard:
        for name, features in utterances.items():
            shard.append(name, features)


def published(folder, rows, lengths, name="0_1"):
    """Write a shard as the published scripts do: numpy's own file, and the lengths."""
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / f"{name}.npy", rows)
    (folder / f"{name}.len").write_text("".join(f"{length}\n" for length in lengths))
    return folder / f"{name}.npy"


@pytest.fixture
def split(tmp_path):
    """A folder of three published shards, and the features of each utterance in order."""
    utterances = []
    for rank, lengths in enumerate(LENGTHS):
        rows = random(sum(lengths), DIM) + rank
        published(tmp_path / "split", rows, lengths, f"{rank}_{len(LENGTHS)}")
        utterances += np.split(rows, np.cumsum(lengths)[:-1])
    return tmp_path / "split", utterances


# Reading


def test_what_was_written_is_read_by_number(tmp_path):
    first, second, third = random(3, DIM), random(2, DIM), random(4, DIM)
    write(tmp_path, {"b.wav": first, "a/é.wav": second}, 0, 2)
    write(tmp_path, {"c.wav": third}, 1, 2)

    shards = FeatureShards(str(tmp_path), dim=DIM)

    assert len(shards) == 3 and shards.dim == DIM and shards.lengths.tolist() == [3, 2, 4]
    assert shards.names == ["b.wav", "a/é.wav", "c.wav"]
    assert (shards.root, shards.frame_rate) == ("/audio", 50.0)
    for number, features in enumerate([first, second, third]):
        np.testing.assert_array_equal(shards.features(number), features)


def test_published_shards_are_read_without_names(split):
    folder, utterances = split
    shards = FeatureShards(folder)

    assert (shards.names, shards.root, shards.frame_rate) == (None, "", None)
    assert shards.lengths.tolist() == [length for lengths in LENGTHS for length in lengths]
    for number, features in enumerate(utterances):
        np.testing.assert_array_equal(shards.features(number), features)


def test_ranks_are_ordered_as_numbers(tmp_path):
    for rank in range(11):
        published(tmp_path, np.full((1, DIM), rank, np.float32), [1], f"{rank}_11")

    shards = FeatureShards(tmp_path)

    assert [int(shards.features(number)[0, 0]) for number in range(11)] == list(range(11))


def test_values_are_mapped_not_read(split):
    folder, _ = split
    features = FeatureShards(folder).features(0)

    assert not features.flags.owndata and not features.flags.writeable
    base = features
    while isinstance(base, np.ndarray | memoryview):
        base = base.obj if isinstance(base, memoryview) else base.base
    assert isinstance(base, mmap.mmap)


def test_other_files_beside_the_shards_are_ignored(split):
    folder, utterances = split
    for name in [".0_3.npy.partial-1", "mean.npy", "0_3.npy.bak", "x_0_5.npy", "README"]:
        (folder / name).touch()

    assert len(FeatureShards(folder)) == len(utterances)


@pytest.mark.parametrize("start, stop", [(0, None), (1, None), (0, 2), (1, 3), (2, 100), (5, 5), (9, 12)])
def test_frames_of_an_utterance_stay_within_it(split, start, stop):
    folder, utterances = split
    shards = FeatureShards(folder)

    for number, features in enumerate(utterances):
        np.testing.assert_array_equal(shards.features(number, start, stop), features[start:stop])


@pytest.mark.parametrize("named, expected", [(False, "utterance 1"), (True, "b.wav")])
def test_where_names_the_shard_and_the_utterance(tmp_path, named, expected):
    if named:
        write(tmp_path, {"a.wav": random(3, DIM), "b.wav": random(2, DIM)})
    else:
        published(tmp_path, random(5, DIM), [3, 2])

    where = FeatureShards(tmp_path).where(1)

    assert str(tmp_path / "0_1.npy") in where and expected in where


def test_an_utterance_and_a_shard_without_frames_are_read(tmp_path):
    first, last = random(2, DIM), random(3, DIM)
    published(tmp_path, first, [0, 2, 0], "0_3")
    published(tmp_path, np.zeros((0, DIM), np.float32), [], "1_3")
    published(tmp_path, last, [3], "2_3")

    shards = FeatureShards(tmp_path)

    assert shards.lengths.tolist() == [0, 2, 0, 3]
    np.testing.assert_array_equal(shards.features(1), first)
    np.testing.assert_array_equal(shards.features(3), last)
    np.testing.assert_array_equal(shards.sample(100), np.concatenate([first, last]))


# Gathering and sampling


@pytest.mark.parametrize("num_frames", [1, 3, 8])
@pytest.mark.parametrize("seed", range(3))
def test_gather_is_slicing_with_zeros_behind(split, num_frames, seed):
    folder, utterances = split
    rng = np.random.default_rng(seed)
    chosen = rng.integers(len(utterances), size=7)
    starts = [int(rng.integers(len(utterances[u]))) for u in chosen]

    batch, lengths = FeatureShards(folder).gather(chosen.tolist(), starts, num_frames)

    assert batch.shape == (7, num_frames, DIM) and batch.dtype == np.float32
    assert lengths.shape == (7,) and lengths.dtype == np.int64
    for b, (utterance, start) in enumerate(zip(chosen, starts, strict=True)):
        crop = utterances[utterance][start : start + num_frames]
        assert lengths[b] == len(crop)
        np.testing.assert_array_equal(batch[b, : len(crop)], crop)
        assert not batch[b, len(crop) :].any()


def test_gather_gives_a_copy_that_may_be_changed(split):
    folder, utterances = split
    shards = FeatureShards(folder)
    shards.gather([0], [0], 2)[0][:] = 0

    np.testing.assert_array_equal(shards.features(0), utterances[0])


@pytest.mark.parametrize("dtype", ["<f2", "<f8", ">f4", ">f2"])
def test_other_float_types_are_gathered_and_sampled_as_float32(tmp_path, dtype):
    rows = random(5, DIM).astype(dtype)
    published(tmp_path, rows, [3, 2])
    shards = FeatureShards(tmp_path)

    batch, _ = shards.gather([1, 0], [0, 0], 3)
    sample = shards.sample(5)

    assert batch.dtype == sample.dtype == np.dtype(np.float32)
    np.testing.assert_array_equal(batch[0, :2], rows[3:].astype(np.float32))
    np.testing.assert_array_equal(batch[1], rows[:3].astype(np.float32))
    np.testing.assert_array_equal(sample, rows.astype(np.float32))


@pytest.mark.parametrize("num_frames", range(1, 24))
def test_a_sample_is_evenly_spaced_over_all_shards(split, num_frames):
    folder, utterances = split
    rows = np.concatenate(utterances)
    step = next(step for step in range(1, 100) if len(rows[::step]) <= num_frames)

    np.testing.assert_array_equal(FeatureShards(folder).sample(num_frames), rows[::step])


@pytest.mark.parametrize("num_frames", [21, 22, 1_000_000])
def test_a_sample_of_more_than_there_is_is_everything(split, num_frames):
    folder, utterances = split

    np.testing.assert_array_equal(FeatureShards(folder).sample(num_frames), np.concatenate(utterances))


@pytest.fixture(params=[np.nan, np.inf, -np.inf])
def bad_frame(request, tmp_path):
    """A folder of two shards; frame 4 of utterance 1, row 7 of the first shard, is bad."""
    rows = random(9, DIM)
    rows[7, 2] = request.param
    first = published(tmp_path, rows, [3, 6], "0_2")
    published(tmp_path, random(4, DIM), [4], "1_2")
    return first


def test_gathering_a_bad_frame_is_refused(bad_frame):
    with refused(bad_frame, "utterance 1", "frame 4", "NaN or infinity"):
        FeatureShards(bad_frame.parent).gather([2, 0, 1], [0, 0, 0], 6)


def test_gathering_a_crop_counts_the_bad_frame_from_the_utterances_start(bad_frame):
    with refused(bad_frame, "utterance 1", "frame 4"):
        FeatureShards(bad_frame.parent).gather([1], [3], 3)


def test_gathering_around_a_bad_frame_works(bad_frame):
    _, lengths = FeatureShards(bad_frame.parent).gather([0, 1, 1, 2], [0, 0, 5, 0], 4)

    assert lengths.tolist() == [3, 4, 1, 4]


def test_sampling_a_bad_frame_is_refused(bad_frame):
    with refused(bad_frame, "frame 7", "NaN or infinity"):
        FeatureShards(bad_frame.parent).sample(100)


def test_sampling_every_so_often_counts_the_bad_frame_in_the_file(bad_frame):
    rows = np.load(bad_frame)
    rows[[6, 7]] = rows[[7, 6]]
    np.save(bad_frame, rows)

    with refused(bad_frame, "frame 6"):
        FeatureShards(bad_frame.parent).sample(7)


def test_both_infinities_in_one_frame_are_refused(tmp_path):
    rows = random(5, DIM)
    rows[1, :2] = np.inf, -np.inf
    published(tmp_path, rows, [5])

    with refused("frame 1"):
        FeatureShards(tmp_path).gather([0], [0], 5)


def test_large_finite_values_are_taken():
    check_finite(np.full((3, DIM), 3e38, np.float32), "here")


# Refusing


def test_another_width_than_expected_is_refused(split):
    folder, _ = split

    with refused(folder / "0_3.npy", f"width {DIM}", "expected 768"):
        FeatureShards(folder, dim=768)


def test_shards_of_several_widths_are_refused(split):
    folder, _ = split
    published(folder, random(2, DIM + 1), [2], "1_3")

    with refused(folder / "1_3.npy", f"width {DIM + 1}", folder / "0_3.npy", DIM):
        FeatureShards(folder)


@pytest.mark.parametrize("difference", [{"layer": 6}, {"encoder": "other"}, {"frame_rate": 25.0}])
def test_shards_described_as_made_differently_are_refused(tmp_path, difference):
    write(tmp_path, {"a.wav": random(3, DIM)}, 0, 2)
    write(tmp_path, {"b.wav": random(3, DIM)}, 1, 2, **difference)

    with refused(tmp_path / "1_2", *difference):
        FeatureShards(tmp_path)


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
