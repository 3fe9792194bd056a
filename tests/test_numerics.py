import logging
from functools import partial
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from conftest import DIM, refused
from lightning.pytorch.plugins import MixedPrecision

from repcodec.callbacks import CodecStart
from repcodec.codec import RepCodec
from repcodec.data import Batch, ShardsDataModule
from repcodec.module import CodecModule
from repcodec.numerics import CodebookWatch
from repcodec.shard_writer import write_shard
from repcodec.shards import FeatureShards

ADAM = partial(torch.optim.Adam, lr=1e-3)


class Spoil(L.Callback):
    """Spoils a number at step 2."""

    def __init__(self, where):
        self.where, self.before = where, None

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == 2 and self.where == "features":
            batch.features[1, 0, 0] = torch.inf
        if trainer.global_step == 2 and self.where == "weight":
            module.codec.decoder.output.weight.data[0, 0, 0] = torch.nan

    def on_after_backward(self, trainer, module):
        if trainer.global_step == 2 and self.where == "gradient":
            module.codec.encoder.projector.weight.grad[0, 0, 0] = torch.nan
        self.before = {name: value.clone() for name, value in module.codec.state_dict().items()}


def fit(splits, *callbacks, optimizer=ADAM, **options):
    torch.manual_seed(0)
    module = CodecModule(
        RepCodec(DIM, codebook_size=16), optimizer, lambda o: torch.optim.lr_scheduler.ConstantLR(o, 1.0)
    )
    data = ShardsDataModule(dim=DIM, encoder="hubert_base", layer=9, dir=str(splits), batch_size=3, crop=16)
    quiet = {"logger": False, "enable_model_summary": False, "enable_checkpointing": False}
    given = {"max_steps": 4, "max_epochs": -1, "limit_val_batches": 0, **quiet, **options}
    trainer = L.Trainer(accelerator="cpu", callbacks=list(callbacks), enable_progress_bar=False, **given)
    trainer.fit(module, data)
    return module, trainer


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("features", ("the features are not finite", "extract them again")),
        ("weight", ("the weight decoder.output.weight is not finite", "the run has diverged")),
        ("gradient", ("the gradient of encoder.projector.weight is not finite", "the run has diverged")),
    ],
)
def test_run_stops_before_the_step_and_names_what_is_not_finite(splits, where, words):
    spoil, seen = Spoil(where), []

    class Names(L.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            names = [trainer.datamodule.train.ids[u] for u in batch.utterances.tolist()]
            seen[:] = [names[1]] if where == "features" else names

    with refused("step 2: ", *words) as caught:
        fit(splits, spoil, names := Names())
    assert names is not None
    assert f"utterances {', '.join(seen)};" in str(caught.value)


def test_nothing_moves_in_the_step_that_is_refused(splits):
    spoil = Spoil("gradient")
    kept = {}

    class Keep(L.Callback):
        def on_exception(self, trainer, module, exception):
            kept.update({name: value.clone() for name, value in module.codec.state_dict().items()})

    with refused("step 2"):
        fit(splits, spoil, Keep())
    assert all(torch.equal(value, spoil.before[name]) for name, value in kept.items())


def test_a_step_under_accumulation_is_stopped_by_any_of_its_batches(splits):
    class First(Spoil):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if trainer.global_step == 2 and batch_idx % 2 == 0:
                batch.features[1, 0, 0] = torch.nan

    with refused("step 2: the features are not finite"):
        fit(splits, First("features"), accumulate_grad_batches=2)


def test_gradient_norm_is_logged_as_it_is_before_clipping(splits):
    norms = []

    class Norms(L.Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            norms.append(torch.cat([p.grad.flatten() for p in module.parameters()]).norm())

    _, trainer = fit(splits, Norms(), gradient_clip_val=1e-3, log_every_n_steps=1)
    torch.testing.assert_close(trainer.callback_metrics["train/gradient_norm"], norms[-1])


def test_overflow_of_the_gradient_scaler_is_no_error_but_one_without_end_is(splits):
    # Half precision on a CPU: Lightning has the plugin, the trainer's flag would choose bfloat16.
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=1000)
    module, _ = fit(splits, plugins=[MixedPrecision("16-mixed", "cpu", scaler)], max_steps=40)
    assert scaler.get_scale() < 2.0**40
    assert all(torch.isfinite(value).all() for value in module.codec.state_dict().values())
    assert {value.dtype for value in module.codec.state_dict().values()} == {torch.float32}
    with refused("the gradient of encoder.projector.weight is not finite"):
        fit(splits, Always(), plugins=[MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))], max_steps=40)


@pytest.mark.parametrize(
    ("precision", "clip", "fused"),
    [("32-true", 0.1, True), ("bf16-mixed", None, True), ("bf16-mixed", 0.1, False), ("16-mixed", None, False)],
)
def test_an_optimizer_is_fused_where_gradients_are_still_clipped_and_told(splits, precision, clip, fused):
    # Half precision on a CPU: Lightning has the plugin, the trainer's flag would choose bfloat16.
    scaler = torch.amp.GradScaler("cpu") if precision == "16-mixed" else None
    plugins = [] if precision == "32-true" else [MixedPrecision(precision, "cpu", scaler)]
    optimizer = partial(torch.optim.Adam, fused=True)
    module, trainer = fit(splits, max_steps=2, optimizer=optimizer, plugins=plugins, gradient_clip_val=clip)
    assert trainer.optimizers[0].defaults["fused"] == fused
    assert all(torch.isfinite(value).all() for value in module.codec.state_dict().values())


class Always(L.Callback):
    def on_after_backward(self, trainer, module):
        module.codec.encoder.projector.weight.grad[0, 0, 0] = torch.nan


def validate(watch, step, used, frames=10_000, size=100):
    counts = torch.zeros(1, size, dtype=torch.int64)
    counts[0, :used] = frames // used
    trainer = SimpleNamespace(is_global_zero=True, global_step=step)
    watch.on_validation_end(trainer, SimpleNamespace(valid_counts=counts))


def test_codebook_that_falls_out_of_use_is_warned_of_once_a_fall(caplog):
    watch = CodebookWatch()
    with caplog.at_level(logging.WARNING, "repcodec"):
        for step, used in enumerate([50, 80, 70, 55, 50, 40, 78, 30]):
            validate(watch, step, used)
    said = [record.getMessage() for record in caplog.records]
    assert [words.partition(":")[0] for words in said] == ["step 3", "step 7"]
    assert "uses 55.0 % of the codes, after 80.0 %" in said[0]
    assert "quantizer.revive_below" in said[0]


def test_codebook_hardly_used_is_warned_of_from_the_start_unless_there_are_few_frames(caplog):
    with caplog.at_level(logging.WARNING, "repcodec"):
        validate(CodebookWatch(), 0, 4, frames=8)
        assert not caplog.records
        watch = CodebookWatch()
        validate(watch, 0, 4)
        resumed = CodebookWatch()
        resumed.load_state_dict(watch.state_dict())
        validate(resumed, 1, 3)
    assert [record.getMessage().partition(" %")[0] for record in caplog.records] == ["step 0: the validation uses 4.0"]


@pytest.mark.parametrize("option", ["max_steps", "max_epochs", "val_check_interval", "accumulate_grad_batches"])
def test_zero_steps_are_refused(splits, option):
    with refused(f"trainer.{option}=0: expected at least 1"):
        fit(splits, **{option: 0})


def test_batch_larger_than_the_data_takes_utterances_several_times(splits):
    data = ShardsDataModule(dim=DIM, encoder="hubert_base", layer=9, dir=str(splits), batch_size=20, crop=16)
    batch: Batch = next(iter(data.train_dataloader()))
    counts = torch.bincount(batch.utterances, minlength=8)
    assert set(counts.tolist()) == {2, 3}
    long = [row for u, row in zip(batch.utterances.tolist(), batch.features, strict=True) if data.train.lengths[u] > 30]
    assert len({tuple(row.flatten().tolist()) for row in long}) == len(long), "different crops"


def test_features_with_a_few_huge_dimensions_train_stably(tmp_path):
    """As those of HuBERT large and Whisper: two of eight dimensions a hundred times as large, and far from zero."""
    rng = np.random.default_rng(0)
    scale, offset = np.ones(DIM), np.zeros(DIM)
    scale[:2], offset[:2] = 100, 500
    for split in ("train", "valid"):
        with write_shard(tmp_path / split, 0, 1, DIM, {"root": "/audio", "frame_rate": 50}) as shard:
            for i in range(12):
                values = rng.standard_normal((40, DIM)).cumsum(0) / 4 * scale + offset
                shard.append(f"{i}.flac", values.astype(np.float32))

    class Losses(L.Callback):
        seen: list[float] = []

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            self.seen.append(float(outputs["loss"]))

    module, _ = fit(tmp_path, CodecStart(), Losses(), max_steps=60)
    assert max(Losses.seen) < 100, "the loss of raw features would begin above 100,000"
    assert sum(Losses.seen[-10:]) < sum(Losses.seen[:10])
    codec, shards = module.codec.eval(), FeatureShards(tmp_path / "valid")
    features = torch.from_numpy(np.concatenate([shards.read(i) for i in range(12)]))[None]
    decoded = codec.decode(codec.encode(features))
    error = (decoded - features).square().sum() / (features - features.mean(1)).square().sum()
    assert error < 0.3, "decoding gives the features' own scale back"
