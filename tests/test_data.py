import copy
import pickle
from itertools import islice

import lightning as L
import numpy as np
import pytest
import torch
from conftest import DIM, refused, write_split

from repcodec.data import ShardsDataModule
from repcodec.errors import RepCodecError
from repcodec.loaders import CropSampler
from repcodec.shards import FeatureShards


def module(splits, **options):
    return ShardsDataModule(
        dim=DIM, encoder="hubert_base", layer=9, dir=str(splits), **{"batch_size": 3, "crop": 16} | options
    )


def batches(data, count):
    return list(islice(data.train_dataloader(), count))


def test_crops_are_rows_of_their_utterances_padded_with_zeros(splits):
    data = module(splits)
    for batch in batches(data, 8):
        assert batch.features.shape == (3, 16, DIM)
        for features, length, utterance in zip(*batch[:3], strict=True):
            whole = torch.from_numpy(np.array(data.train.features(int(utterance))))
            assert length == min(16, len(whole))
            windows = whole.unfold(0, int(length), 1).mT if len(whole) > length else whole[None]
            assert (windows == features[:length]).all((1, 2)).any()
            assert (features[length:] == 0).all()
        assert batch.full == bool((batch.lengths == 16).all())


def test_every_utterance_comes_once_a_shuffle_short_ones_too(splits):
    seen = torch.cat([batch.utterances for batch in batches(module(splits, batch_size=4), 6)]).tolist()
    for first in range(0, 24, 8):
        assert sorted(seen[first : first + 8]) == list(range(8))


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_change_no_batch(splits, num_workers):
    for one, other in zip(batches(module(splits), 7), batches(module(splits, num_workers=num_workers), 7), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one[:3], other[:3], strict=True)) and one.full == other.full


def test_seed_decides_the_batches(splits):
    first, again, other = (batches(module(splits, seed=seed), 4) for seed in (0, 0, 1))
    assert all(torch.equal(a.features, b.features) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a.features, b.features) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("stop", [1, 3, 4, 7])
def test_resumed_loader_goes_on_where_it_stopped(splits, stop):
    expected = batches(module(splits), 10)
    loader = module(splits).train_dataloader()
    assert len(list(islice(loader, stop))) == stop
    resumed = module(splits).train_dataloader()
    resumed.load_state_dict(loader.state_dict())
    for a, b in zip(expected[stop:], islice(resumed, 10 - stop), strict=True):
        assert torch.equal(a.features, b.features)


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_the_global_batch(world_size):
    lengths = np.array([30, 0, 12, 50, 7, 22, 90, 4, 61])
    whole = CropSampler(lengths, 16, 8, 0, 0, 1)
    parts = [CropSampler(lengths, 16, 8 // world_size, 0, rank, world_size) for rank in range(world_size)]
    for number in range(6):
        assert [crop for part in parts for crop in part.batch(number)] == whole.batch(number)
    assert all(lengths[utterance] > 0 for utterance, _ in whole.batch(0))


def test_validation_takes_whole_utterances_once(splits):
    data = module(splits, whole_frames=45)
    seen = []
    for batch in data.val_dataloader():
        assert batch.features.shape[0] * batch.features.shape[1] <= 45
        for features, length, utterance in zip(*batch[:3], strict=True):
            whole = data.split("valid").features(int(utterance))
            assert torch.equal(features[:length], torch.from_numpy(np.array(whole)))
            seen.append(int(utterance))
    assert sorted(seen) == [0, 1, 2]


def test_statistics_are_those_of_the_training_split(splits):
    data = module(splits)
    frames = np.concatenate([data.train.features(i) for i in range(8)]).astype(np.float64)
    np.testing.assert_allclose(data.statistics.mean, frames.mean(0), rtol=1e-5)
    assert data.statistics.scale == pytest.approx(np.sqrt(((frames - frames.mean(0)) ** 2).mean()))


def test_missing_split_names_the_command_that_makes_it(tmp_path):
    data = ShardsDataModule(dim=8, encoder="hubert_large", layer=12, root=str(tmp_path))
    with pytest.raises(
        RepCodecError, match=r"hubert_large/l12/train.*repcodec extract .*--encoder hubert_large --layer 12"
    ):
        data.train_dataloader()


def test_wrong_width_is_one_sentence(splits):
    with pytest.raises(RepCodecError, match="width 8, expected 768"):
        ShardsDataModule(dim=768, encoder="hubert_base", layer=9, dir=str(splits)).train_dataloader()


def test_nan_is_one_sentence_where_whole_utterances_are_read(splits):
    path = splits / "train" / "0_2.npy"
    rows = np.load(path, mmap_mode="r+")
    rows[5, 2] = np.nan
    rows.flush()
    with pytest.raises(RepCodecError, match=r"0_2\.npy, spk/utt0\.wav: frame 5 holds NaN"):
        list(module(splits).start_batches())


@pytest.mark.parametrize("num_workers", [0, 1, 2, 3])
def test_memory_of_a_batch_is_used_again_only_when_nothing_holds_it(splits, num_workers):
    batches = iter(module(splits, batch_size=4, crop=16, num_workers=num_workers).train_dataloader())
    alone = iter(module(splits, batch_size=4, crop=16).train_dataloader())
    kept, memory = [], set()
    for number, batch in enumerate(islice(batches, 60)):
        memory.add(batch.features.data_ptr())
        expected = next(alone)
        assert torch.equal(batch.features, expected.features)
        assert torch.equal(batch.utterances, expected.utterances)
        if number % 10 == 0:  # a view, and what numpy makes of one, hold a batch too
            kept.append((batch.features[1:] if number % 20 else batch.features[1:].numpy(), expected.features[1:]))
    assert all(torch.equal(torch.as_tensor(view), expected) for view, expected in kept)
    assert len(memory) < 25


def test_start_batches_cover_the_training_split(splits):
    seen = [int(u) for batch in module(splits, whole_frames=60).start_batches() for u in batch.utterances]
    assert sorted(seen) == list(range(8))
    assert isinstance(module(splits), L.LightningDataModule)


def test_features_of_another_encoder_or_layer_are_refused(tmp_path):
    write_split(tmp_path / "train", [9], encoder="whisper_tiny_en", layer=3)
    for encoder, layer, found in (("hubert_base", 3, "speech encoder whisper"), ("whisper_tiny_en", 2, "layer 3")):
        with pytest.raises(RepCodecError, match=f"features of {found}"):
            ShardsDataModule(dim=8, encoder=encoder, layer=layer, dir=str(tmp_path)).split("train")


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"crop": 0}, {"whole_frames": -1}])
def test_numbers_that_are_not_positive_are_refused(splits, wrong):
    with pytest.raises(RepCodecError, match=r"data\.\w+=-?\d: expected a whole number, at least 1"):
        module(splits, **wrong)


def test_another_process_reopens_the_files_instead_of_copying_them(splits):
    shards = FeatureShards(splits / "train")
    assert len(pickle.dumps(shards)) < 500
    assert np.array_equal(copy.copy(shards).features(3), shards.features(3))


def test_float16_shards_give_float32_batches(tmp_path):
    write_split(tmp_path / "train", [30, 20])
    path = tmp_path / "train" / "0_1.npy"
    np.save(path, np.load(path).astype(np.float16))
    assert FeatureShards(tmp_path / "train").gather([0], [3], 5)[0].dtype == np.float32


# Fewer utterances than rows


@pytest.mark.parametrize("batch_size", [8, 9, 20, 100])
def test_a_batch_larger_than_the_data_takes_each_utterance_equally_often(splits, batch_size):
    for batch in batches(module(splits, batch_size=batch_size), 4):
        counts = torch.bincount(batch.utterances, minlength=8)
        assert len(batch.utterances) == batch_size
        # One that was left over by the batch before may come once more.
        assert counts.max() <= -(-batch_size // 8) + 1 and counts.min() >= batch_size // 8 - 1


def test_an_utterance_that_comes_again_in_a_batch_is_cropped_elsewhere(splits):
    sampler = module(splits, batch_size=800).train_dataloader().sampler
    crops = [crop for number in range(10) for crop in sampler.batch(number)]
    assert {start for utterance, start in crops if utterance == 3} == set(range(60 - 16 + 1))
    assert {start for utterance, start in crops if utterance == 1} == {0}


def test_a_training_split_without_a_frame_is_refused(tmp_path):
    write_split(tmp_path / "train", [0, 0])
    with refused(tmp_path / "train", "the split is empty"):
        module(tmp_path).train_dataloader()


# Several roots


@pytest.fixture
def roots(tmp_path):
    """Two roots of shards of hubert_base layer 9; only the first has a test split."""
    for name, lengths, shift in (("a", [40, 7, 25, 60], 0), ("b", [33, 12, 51, 18, 20, 90], 1)):
        folder = tmp_path / name / "hubert_base" / "l9"
        for split in ("train", "valid", "test")[: 3 - shift]:
            write_split(folder / split, lengths, seed=shift, encoder="hubert_base", layer=9)
    return str(tmp_path / "a"), str(tmp_path / "b")


def mixed(roots, weights=(3, 1), **options):
    root = dict(zip(roots, weights, strict=True))
    return ShardsDataModule(
        dim=DIM, encoder="hubert_base", layer=9, root=root, **{"batch_size": 3, "crop": 16} | options
    )


def test_rows_are_drawn_from_the_roots_by_weight(roots):
    data = mixed(roots)
    seen = torch.cat([batch.utterances for batch in batches(data, 16)])
    assert (seen < 4).view(12, 4).sum(1).tolist() == [3] * 12
    # Within a root one shuffle after another.
    first, second = seen[seen < 4], seen[seen >= 4]
    assert all(sorted(shuffle) == [0, 1, 2, 3] for shuffle in first.view(9, 4).tolist())
    assert all(sorted(shuffle) == [4, 5, 6, 7, 8, 9] for shuffle in second.view(2, 6).tolist())


@pytest.mark.parametrize(("world_size", "num_workers", "stop"), [(1, 0, 5), (1, 3, 0), (2, 0, 3), (4, 2, 7)])
def test_ranks_workers_and_a_stop_change_no_batch_of_a_mixture(roots, world_size, num_workers, stop):
    expected = batches(mixed(roots, batch_size=8), 10)[stop:]
    parts = []
    for rank in range(world_size):
        data = mixed(roots, batch_size=8 // world_size, num_workers=num_workers)
        data._rank = lambda rank=rank: (rank, world_size)
        loader = data.train_dataloader()
        loader.load_state_dict({"position": stop})
        parts.append(list(islice(loader, 10 - stop)))
    for whole, *shares in zip(expected, *parts, strict=True):
        for one, *others in zip(whole[:3], *(share[:3] for share in shares), strict=True):
            assert torch.equal(one, torch.cat(others))


def test_statistics_are_those_of_the_mixture(roots):
    data = mixed(roots, weights=(1, 1))
    frames = [np.concatenate([data.train.features(u) for u in mine]) for mine in (range(4), range(4, 10))]
    mean = (frames[0].mean(0) + frames[1].mean(0)) / 2
    squares = [((one - mean) ** 2).mean() for one in frames]
    # The smaller root's 132 frames stand for 178, so some come once more than others.
    np.testing.assert_allclose(data.statistics.mean, mean, atol=0.1)
    assert data.statistics.scale == pytest.approx(np.sqrt(sum(squares) / 2), rel=0.05)


def test_start_batches_hold_the_roots_by_weight(roots):
    data = mixed(roots, weights=(1, 9), whole_frames=100)
    frames = torch.zeros(2)
    for batch in data.start_batches():
        for utterance, length in zip(batch.utterances, batch.lengths, strict=True):
            frames[int(utterance >= 4)] += length
    total = int(data.train.lengths.sum())
    assert total - 150 < frames.sum() <= total
    assert frames[0] <= total / 10 and 0.8 * total < frames[1] <= 0.9 * total


def test_validation_and_test_are_all_that_the_roots_hold_of_them(roots):
    data = mixed(roots)
    assert sorted(torch.cat([batch.utterances for batch in data.val_dataloader()]).tolist()) == list(range(10))
    assert len(data.split("test")) == 4 and data.has_split("test") and not data.has_split("other")


def test_a_root_without_training_features_is_named(roots, tmp_path):
    with refused(tmp_path / "c" / "hubert_base" / "l9" / "train", "does not exist", "data.root=ROOT"):
        mixed((*roots, str(tmp_path / "c")), (1, 1, 1)).train_dataloader()


def test_folders_of_splits_are_mixed_too(splits, tmp_path):
    write_split(tmp_path / "more" / "train", [30])
    data = ShardsDataModule(dim=DIM, encoder="hubert_base", layer=9, dir={str(splits): 1, str(tmp_path / "more"): 0.5})
    assert (data.weights, len(data.train), len(data.valid)) == ([2, 1], 9, 3)
    assert str(splits) in data.source and "2 x" in data.source


# The check


def damage(path):
    rows = np.load(path)
    rows[6, 1] = np.inf
    np.save(path, rows)


@pytest.mark.parametrize("split", ["train", "valid"])
def test_the_check_reads_all_values_and_names_file_utterance_and_frame(splits, split):
    module(splits, check=True).prepare_data()
    path = sorted((splits / split).glob("*.npy"))[-1]
    damage(path)
    module(splits).prepare_data()  # nobody asked
    with refused(path, "spk/utt", "frame 6", "NaN or infinity"):
        module(splits, check=True).prepare_data()


@pytest.mark.parametrize("split", ["train", "valid"])
def test_shards_that_do_not_fit_are_found_before_training_without_the_check(splits, split):
    path = sorted((splits / split).glob("*.len"))[0]
    path.write_text("3\n" + path.read_text())
    with refused(path, "the lengths sum to"):
        module(splits).setup("fit")
