"""Several processes give what one gives for the same global batch; real processes over gloo."""

import os
import socket
from datetime import timedelta

import lightning as L
import pytest
import torch
import torch.multiprocessing as mp
from conftest import DIM, write_split
from lightning.pytorch.strategies import DDPStrategy

from repcodec.callbacks import CodecStart, ValidateEnds
from repcodec.codec import RepCodec
from repcodec.data import Batch, ShardsDataModule
from repcodec.errors import RepCodecError
from repcodec.module import CodecModule
from repcodec.quantizers import EMAQuantizer
from repcodec.ranks import RankWatch

ROWS, CROP, STEPS = 8, 16, 20
mp.get_context("forkserver").set_forkserver_preload(
    ["repcodec.callbacks"]
)  # what is imported once is there for every process


class Data(ShardsDataModule):
    """Crops, where wanted with a step in which the last ranks have no valid frame."""

    empty_step = -1

    def on_after_batch_transfer(self, batch, dataloader_idx):
        if not self.trainer.training or self.trainer.global_step != self.empty_step:
            return batch
        first = self.trainer.global_rank * self.batch_size
        keep = torch.arange(first, first + self.batch_size) < ROWS // 4
        return Batch(batch.features * keep[:, None, None], batch.lengths * keep, batch.utterances)


class Record(L.Callback):
    """Remembers what every step logs."""

    def __init__(self):
        self.losses = []

    def on_train_batch_end(self, trainer, module, *args):
        # A batch that only adds to the gradient has no norm yet.
        found = {"train/gradient_norm": 0, **trainer.callback_metrics}
        self.losses.append([float(found[f"train/{name}"]) for name in NAMES])


NAMES = ("reconstruction", "commitment", "loss", "gradient_norm")


def fit(rank, world, port, folder, options):
    """Train as one of several processes; leave losses and weights in the folder."""
    options = {"steps": STEPS, "precision": "64-true", "revive": 0.0, "start": False, **options}
    if world > 1:
        places = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": world, "LOCAL_RANK": rank}
        os.environ |= {"NODE_RANK": "0", **{name: str(value) for name, value in places.items()}}
    torch.set_num_threads(1)
    torch.manual_seed(0)
    quantizer = EMAQuantizer(DIM, 16, 2, decay=0.9, revive_below=options["revive"])
    module = CodecModule(
        RepCodec(DIM, quantizer=quantizer), lambda p: torch.optim.Adam(p, 1e-3),
        lambda o: torch.optim.lr_scheduler.ConstantLR(o, 1.0), commitment_weight=45,
    )  # fmt: skip
    # Validation in batches of one utterance or two: the ranks have different numbers of them, or an empty one.
    data = Data(dim=DIM, encoder="hubert_base", layer=9, dir=f"{folder}/splits", batch_size=ROWS // world, crop=CROP,
                whole_frames=30)  # fmt: skip
    data.empty_step = options.get("empty_step", -1)
    record = Record()
    trainer = L.Trainer(
        accelerator="cpu", devices=world, precision=options["precision"], max_steps=options["steps"], max_epochs=-1,
        strategy=DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=60)) if world > 1 else "auto",
        accumulate_grad_batches=options.get("accumulate", 1), gradient_clip_val=options.get("clip"),
        val_check_interval=10, check_val_every_n_epoch=None, num_sanity_val_steps=0, use_distributed_sampler=False,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        log_every_n_steps=1,
        callbacks=[RankWatch(), *([CodecStart()] if options["start"] else []), ValidateEnds(), record],
    )  # fmt: skip
    trainer.fit(module, data)
    error = float(trainer.callback_metrics["valid/normalized_error"])
    result = {"losses": torch.tensor(record.losses).double(), "error": error, "state": module.codec.state_dict()}
    torch.save(result, f"{folder}/{world}-{rank}.pt")


def results(folder, world, worker=fit, **options):
    """Train in `world` processes; return what each of them has."""
    if not (folder / "splits").exists():
        # Crops shorter than the others too: the ranks then hold different numbers of valid frames.
        write_split(folder / "splits" / "train", [40, 7, 25, 60, 33, 12, 51, 18, 9, 44], seed=1)
        write_split(folder / "splits" / "valid", [20, 31, 5], seed=2)  # fewer than four ranks
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(worker, (world, port, str(folder), options), nprocs=world, start_method="forkserver")
    return [torch.load(folder / f"{world}-{rank}.pt", weights_only=True) for rank in range(world)]


def agree(one, other, tolerance):
    torch.testing.assert_close(other["losses"], one["losses"], rtol=tolerance, atol=tolerance)
    assert other["error"] == pytest.approx(one["error"], rel=tolerance)
    assert one["state"].keys() == other["state"].keys()
    for name, value in one["state"].items():
        torch.testing.assert_close(other["state"][name], value, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize(
    "options",
    [
        {"revive": 0.05, "start": True, "empty_step": 7, "clip": 0.5},
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"revive": 0.3, "accumulate": 2}, marks=pytest.mark.slow),
    ],
    ids=["revival, k-means start, clipping, ranks without a valid frame", "published start", "accumulation"],
)
def test_two_and_four_processes_take_the_same_twenty_steps_as_one(tmp_path, options):
    (one,) = results(tmp_path, 1, **options)
    assert len(one["losses"]) == STEPS * options.get("accumulate", 1)
    assert torch.isfinite(one["losses"]).all()
    for world in (2, 4):
        for rank in results(tmp_path, world, **options):
            agree(one, rank, 1e-8)


def test_first_step_in_single_precision_is_the_same_for_any_number_of_processes(tmp_path):
    options = {"precision": "32-true", "steps": 1, "start": True}
    (one,) = results(tmp_path, 1, **options)
    for world in (2, 4):
        for rank in results(tmp_path, world, **options):
            agree(one, rank, 1e-5)


class Poisoned(Data):
    """One value of the second half of the batch is NaN at step 3."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        if self.trainer.training and self.trainer.global_step == 3 and self.trainer.global_rank == 1:
            batch.features[1, 2, 5] = float("nan")
        return batch


def fit_poisoned(rank, world, port, folder, options):
    """Train until the data goes bad; leave what the rank says."""
    global Data
    Data = Poisoned
    try:
        fit(rank, world, port, folder, options)
    except RepCodecError as error:
        torch.save({"said": str(error)}, f"{folder}/{world}-{rank}.pt")


def test_all_ranks_stop_at_the_step_in_which_one_of_them_has_a_bad_batch(tmp_path):
    first, second = results(tmp_path, 2, worker=fit_poisoned)
    assert first == second
    assert first["said"].startswith("step 3: the features are not finite, in a batch with utterances spk/utt")
