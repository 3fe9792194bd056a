import mmap

import numpy as np
import pytest
from conftest import SHARD_DIM as DIM
from conftest import SHARD_LENGTHS, published, refused

from repcodec.shard_writer import write_shard
from repcodec.shards import FeatureShards, check_finite


def random(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def about(*names, **more):
    return {"encoder": "e", "layer": 9, "frame_rate": 50.0, "root": "/audio", "utterances": list(names), **more}


def write(folder, utterances, rank=0, num_shards=1, **more):
    """Write a shard with the writer."""
    with write_shard(folder, rank, num_shards, DIM, about(*utterances, **more)) as shard:
        for name, features in utterances.items():
            shard.append(name, features)


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
    assert shards.lengths.tolist() == [length for lengths in SHARD_LENGTHS for length in lengths]
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
