import copy

import numpy as np
import pytest
from conftest import DIM, refused, write_split

from repcodec.mixture import FeatureMix, row_pattern, whole_weights
from repcodec.shards import FeatureShards


@pytest.fixture
def two(tmp_path):
    """Two folders: 60 frames of values near 0, and 600 near 1000."""
    first = write_split(tmp_path / "a", [20, 0, 40], encoder="hubert_base", layer=9)
    second = write_split(tmp_path / "b", [100] * 6, seed=1, num_shards=2, encoder="hubert_base", layer=9)
    for path in (tmp_path / "b").glob("*.npy"):
        np.save(path, np.load(path) + 1000)
    return tmp_path / "a", tmp_path / "b", [*first, *(one + 1000 for one in second)]


@pytest.mark.parametrize(
    ("weights", "whole"),
    [
        ({"a": 3, "b": 1}, [3, 1]),
        ({"a": 0.75, "b": 0.25}, [3, 1]),
        ({"a": "1/3", "b": 1}, [1, 3]),
        ({"a": 100, "b": 23.5, "c": 60}, [200, 47, 120]),
        ({"a": 7}, [1]),
    ],
)
def test_weights_become_the_smallest_whole_numbers(weights, whole):
    assert whole_weights(weights) == whole


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf"), "much", None])
def test_a_weight_that_is_no_number_above_0_is_refused(weight):
    with refused("features_b", str(weight), "above 0"):
        whole_weights({"features_a": 1, "features_b": weight})


def test_weights_without_a_short_pattern_are_refused():
    with refused("1.0000001 to 3", "round them"):
        whole_weights({"a": 1.0000001, "b": 3})


@pytest.mark.parametrize("weights", [[3, 1], [2, 3, 7], [1], [50, 1]])
def test_a_folders_rows_are_spread_evenly_over_the_pattern(weights):
    rows = np.tile(row_pattern(weights), 3)
    total = sum(weights)
    for folder, weight in enumerate(weights):
        counts = np.cumsum(rows == folder)
        assert counts[total - 1] == weight
        expected = np.arange(1, len(rows) + 1) * weight / total
        assert np.abs(counts - expected).max() <= 1


def test_utterances_are_numbered_through_the_folders(two):
    a, b, utterances = two
    mix = FeatureMix([a, b], [3, 1], DIM)
    assert mix.lengths.tolist() == [20, 0, 40, *[100] * 6]
    assert mix.folder_of.tolist() == [0] * 3 + [1] * 6
    for number, expected in enumerate(utterances):
        np.testing.assert_array_equal(mix.features(number), expected)
        np.testing.assert_array_equal(mix.read(number), expected)
    again = copy.copy(mix)  # as another process gets it
    assert (again.weights, again.lengths.tolist()) == ([3, 1], mix.lengths.tolist())


@pytest.mark.parametrize("num_frames", [100, 400, 10_000])
@pytest.mark.parametrize("weights", [[3, 1], [1, 1], [1, 9]])
def test_a_sample_holds_the_folders_by_weight(two, num_frames, weights):
    sample = FeatureMix(two[:2], weights, DIM).sample(num_frames)
    total = min(num_frames, 660)
    assert total - 2 <= len(sample) <= total
    assert (sample[:, 0] < 500).mean() == pytest.approx(weights[0] / sum(weights), abs=0.01)


def test_a_sample_takes_the_frames_of_a_small_folder_equally_often(two):
    sample = FeatureMix(two[:2], [10, 1], DIM).sample(660)
    rows, counts = np.unique(sample[sample[:, 0] < 500], axis=0, return_counts=True)
    assert len(rows) == 60 and set(counts) == {10}  # 600 of 660 frames, out of 60


@pytest.mark.parametrize("weights", [[3, 1], [1, 1], [1, 20]])
def test_utterances_by_weight_have_the_frames_of_each_folder_by_weight(two, weights):
    mix = FeatureMix(two[:2], weights, DIM)
    chosen = mix.by_weight(seed=0)
    frames = [mix.lengths[chosen[mix.folder_of[chosen] == folder]].sum() for folder in range(2)]
    for folder, (found, longest) in enumerate(zip(frames, (40, 100), strict=True)):
        wanted = 660 * weights[folder] / sum(weights)
        assert wanted - longest < found <= wanted
    assert mix.lengths[chosen].min() > 0
    np.testing.assert_array_equal(chosen, mix.by_weight(seed=0))


def test_folders_of_another_width_or_encoder_are_refused(two, tmp_path):
    write_split(tmp_path / "wide", [5], dim=DIM + 1)
    with refused(tmp_path / "wide" / "0_1.npy", "width 9", "8"):
        FeatureMix([two[0], tmp_path / "wide"], [1, 1])
    write_split(tmp_path / "other", [5], encoder="whisper_tiny_en", layer=3)
    with refused(tmp_path / "other" / "0_1.npy", "encoder whisper_tiny_en", "hubert_base"):
        FeatureMix([two[0], tmp_path / "other"], [1, 1])


def test_a_folder_without_frames_is_refused_by_name(two, tmp_path):
    write_split(tmp_path / "empty", [0, 0])
    with refused(tmp_path / "empty", "the split is empty"):
        FeatureMix([two[0], tmp_path / "empty"], [1, 1])


def test_folders_of_several_manifests_and_roots_go_together(two, tmp_path):
    for name, root in (("c", "/one"), ("d", "/other")):
        write_split(tmp_path / name, [5], manifest_sha256=name, root=root)
    mix = FeatureShards([tmp_path / "c", tmp_path / "d"])
    assert (mix.manifest_sha256, mix.root, len(mix)) == ("c+d", "", 2)
    assert FeatureShards(tmp_path / "c").manifest_sha256 == "c"


@pytest.mark.parametrize("weight", ["1e999999999", "1e-999999999", "0.5e+1234"])
def test_a_weight_that_would_take_a_lifetime_to_write_out_is_refused(weight):
    with refused("expected a number above 0"):
        whole_weights({"a": weight, "b": 1})
