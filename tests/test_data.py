import copy
import pickle

import lightning as L
import numpy as np
import pytest
import torch
from conftest import DIM, write_split

from repcodec.data import CropSampler, ShardsDataModule
from repcodec.errors import RepCodecError
from repcodec.shards import FeatureShards


def module(splits, **options):
    return ShardsDataModule(
        dim=DIM, encoder="hubert_base", layer=9, dir=str(splits), **{"batch_size": 3, "crop": 16} | options
    )


def batches(data, count):
    loader, found = data.train_dataloader(), []
    while len(found) < count:
        found += list(loader)
    return found[:count]


def test_crops_are_rows_of_their_utterances_padded_with_zeros(splits):
    data = module(splits)
    for batch in batches(data, 8):
        assert batch.features.shape == (3, 16, DIM)
        for features, length, utterance in zip(*batch, strict=True):
            whole = torch.from_numpy(np.array(data.train.features(int(utterance))))
            assert length == min(16, len(whole))
            windows = whole.unfold(0, int(length), 1).mT if len(whole) > length else whole[None]
            assert (windows == features[:length]).all((1, 2)).any()
            assert (features[length:] == 0).all()


def test_every_utterance_comes_once_a_shuffle_short_ones_too(splits):
    seen = torch.cat([batch.utterances for batch in batches(module(splits, batch_size=4), 6)]).tolist()
    for first in range(0, 24, 8):
        assert sorted(seen[first : first + 8]) == list(range(8))


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_change_no_batch(splits, num_workers):
    for one, other in zip(batches(module(splits), 7), batches(module(splits, num_workers=num_workers), 7), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_seed_decides_the_batches(splits):
    first, again, other = (batches(module(splits, seed=seed), 4) for seed in (0, 0, 1))
    assert all(torch.equal(a.features, b.features) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a.features, b.features) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("stop", [1, 3, 4, 7])
def test_resumed_loader_goes_on_where_it_stopped(splits, stop):
    expected = batches(module(splits), 10)
    loader, count = module(splits).train_dataloader(), 0
    while count < stop:
        for _ in loader:
            count += 1
            if count == stop:
                break
    resumed = module(splits).train_dataloader()
    resumed.load_state_dict(loader.state_dict())
    rest = []
    while len(rest) < 10 - stop:
        rest += list(resumed)
    for a, b in zip(expected[stop:], rest, strict=False):
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
        for features, length, utterance in zip(*batch, strict=True):
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


def test_nan_in_a_worker_is_one_sentence(splits, tmp_path):
    path = splits / "train" / "0_2.npy"
    rows = np.load(path, mmap_mode="r+")
    rows[5, 2] = np.nan
    rows.flush()
    with pytest.raises(RepCodecError, match=r"0_2\.npy, spk/utt0\.wav: frame 5 holds NaN"):
        list(module(splits, batch_size=8, crop=60, num_workers=1).train_dataloader())


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
    with pytest.raises(RepCodecError, match=r"data\.\w+=-?\d: expected at least 1"):
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
