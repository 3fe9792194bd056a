"""Callbacks for what Lightning lacks: the codec's start, validation at both ends, the saved codec, one bar."""

import logging
import math
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm

from repcodec.checkpointing import MONITOR, of_this_run
from repcodec.codec import RepCodec
from repcodec.data import FeaturesDataModule
from repcodec.errors import RepCodecError
from repcodec.module import CodecModule

log = logging.getLogger("repcodec")


class CodecStart(L.Callback):
    """Starts a new codec where k-means ends: features scaled, stacks as the identity, codes from k-means.

    A resumed run is left alone.
    """

    def __init__(self, max_frames: int = 200_000, identity: bool = True, kmeans: bool = True):
        """Take what to do; the features are scaled in any case.

        Args:
            max_frames: how many frames of the training set k-means sees at most.
            identity: let the stacks hand their input on unchanged; False leaves their random start.
            kmeans: place the codes by k-means; False leaves their random start.
        """
        self.max_frames, self.identity, self.kmeans = max_frames, identity, kmeans

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Start the codec, unless a checkpoint was loaded."""
        assert isinstance(module, CodecModule)
        if trainer.ckpt_path is not None:
            return
        codec, data = module.codec, trainer.datamodule  # type: ignore[attr-defined]  # Lightning sets it on attach
        codec.feature_mean.copy_(data.statistics.mean)
        codec.feature_scale.fill_(data.statistics.scale)
        if self.identity:
            codec.start_as_identity()
        if not self.kmeans:
            return
        if trainer.global_rank == 0:
            vectors = self._vectors(codec, data, module.device)
            tqdm.write(f"The quantizer of {codec.codebook_size} codes starts from {len(vectors):,} frames …")
        else:  # rank 0 sees the same frames in the same order, however many ranks there are, and shares the codes
            vectors = torch.empty(0, codec.quantizer.dim, device=module.device)
        codec.quantizer.start(vectors, data.seed)

    @torch.no_grad()
    def _vectors(self, codec: RepCodec, data: FeaturesDataModule, device: torch.device) -> torch.Tensor:
        """Return what the quantizer sees of up to `max_frames` frames of the training set: (N, C)."""
        total = min(self.max_frames, int(data.train.lengths.sum()))
        found: list[tuple[int, torch.Tensor]] = []  # an utterance may come several times
        codec.eval()
        with tqdm(total=total, desc="Frames for k-means", unit="frame", unit_scale=True) as bar:
            for batch in data.start_batches():
                vectors = codec.vectors(batch.features.to(device), batch.lengths.to(device))
                counts = [codec.architecture.num_codes(length) for length in batch.lengths.tolist()]
                found += zip(batch.utterances.tolist(), vectors.split(counts), strict=True)
                bar.update(min(int(batch.lengths.sum()), total - bar.n))
                if bar.n >= total:
                    break
        codec.train()
        # In the split's order, as the k-means baseline sees it: the same frames then start the same codes.
        ordered = torch.cat([rows for _, rows in sorted(found, key=lambda one: one[0])])
        kept = min(len(ordered), self.max_frames)
        return ordered[torch.arange(kept, device=device) * len(ordered) // kept]


class ValidateEnds(L.Callback):
    """Validates before the first step and after the last one, wherever `val_check_interval` falls.

    So every curve begins at step 0, and no step is trained in vain. Put it after CodecStart and before the
    callbacks that save.
    """

    def __init__(self) -> None:
        self.validated_at = -1

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Remember the step."""
        self.validated_at = trainer.global_step

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Validate the start, but not that of a resumed run."""
        if trainer.ckpt_path is None:
            self._validate(trainer)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Validate the end, if no validation fell there; where a signal stopped the run, there is no end."""
        if self.validated_at < trainer.global_step and not trainer.interrupted:
            trainer.fit_loop.epoch_loop._batches_that_stepped -= 1  # in the logs the last step's number, as in between
            self._validate(trainer)
            trainer.fit_loop.epoch_loop._batches_that_stepped += 1

    def _validate(self, trainer: L.Trainer) -> None:
        """Run the validation as Lightning does between two steps."""
        first_loop_iter = trainer._logger_connector._first_loop_iter
        trainer.validating = True
        trainer.fit_loop.epoch_loop.val_loop.run()
        trainer.training = True
        trainer._logger_connector._first_loop_iter = first_loop_iter


class SaveCodec(L.Callback):
    """Saves the codec of the best validation after step 0: config.json, model.safetensors and the model card.

    Like `Checkpoints` it passes over step 0, so that best.ckpt and the saved codec are the same; a run that never came
    below its start says so.
    Every checkpoint describes its codec too, under "codec", for `RepCodec.from_lightning`.
    """

    def __init__(self, folder: str, encoder: str, layer: int, frame_rate: float):
        """Take the folder, and what config.json says of the features: speech encoder, layer, frames per second.

        The data adds what it knows of the speech encoder, and a validation its figures.
        """
        self.folder = Path(folder)
        self.about: dict[str, Any] = {
            "encoder": encoder,
            "layer": layer,
            "frame_rate": frame_rate,
            "repcodec_version": version("repcodec"),
        }
        self.best = self.at_start = float("inf")

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        """Refuse a run that would save no codec.

        Raises:
            RepCodecError: it shall not validate.
        """
        if trainer.limit_val_batches == 0:
            raise RepCodecError("trainer.limit_val_batches=0: expected at least 1; what a validation finds is saved.")

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Note what the data knows of the features, and whether the codec, which has its start by now, scales them."""
        assert isinstance(module, CodecModule)
        codec = module.codec
        if trainer.ckpt_path is not None and not of_this_run(trainer.ckpt_path, self.folder):
            self.best = self.at_start = float("inf")
        self.about |= trainer.datamodule.about_features  # type: ignore[attr-defined]  # see CodecStart
        self.about["feature_norm"] = bool((codec.feature_mean != 0).any() or codec.feature_scale != 1)

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Save when this validation is the best so far."""
        assert isinstance(module, CodecModule)
        error = float(trainer.callback_metrics.get(MONITOR, "nan"))
        if trainer.global_step == 0:
            self.at_start = error
        if trainer.global_step == 0 or not error < self.best:
            return
        self.best = error
        if trainer.is_global_zero:
            metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
            figures = {
                name.removeprefix("valid/"): value
                for name, value in metrics.items()
                if name.startswith("valid/") and math.isfinite(value)  # JSON has no other numbers
            }
            data = trainer.datamodule  # type: ignore[attr-defined]  # see CodecStart
            measured = {"step": trainer.global_step, "figures": figures, "measured_on": data.describe_valid()}
            module.codec.save_pretrained(self.folder, {**self.about, **measured})

    def on_save_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Let the checkpoint say what codec it holds, in plain values."""
        assert isinstance(module, CodecModule)
        checkpoint["codec"] = {**module.codec.config(), **self.about}

    def on_fit_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Warn when no step made the codec better than it began."""
        if trainer.is_global_zero and not trainer.interrupted and self.at_start <= self.best < math.inf:
            log.warning(
                "No validation was better than that of the start: normalized error %.4f at step 0, then %.4f at best. "
                "Train longer, or with a smaller optimizer.lr.", self.at_start, self.best,
            )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """Return the best error so far and that of the start, for the checkpoint."""
        return {"best": self.best, "at_start": self.at_start}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on comparing with a checkpoint's best."""
        self.best, self.at_start = state_dict["best"], state_dict.get("at_start", math.inf)


class StepProgress(ProgressBar):
    """One bar over all steps of the training; Lightning's own begins anew every epoch, which may be seconds."""

    _bar: "tqdm[Any] | None" = None

    def disable(self) -> None:
        """Show nothing; Lightning calls this on all ranks but the first."""
        self._bar = tqdm(disable=True)

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Open the bar where a resumed run stands."""
        super().on_train_start(trainer, module)
        if self._bar is None:
            self._bar = tqdm(total=trainer.max_steps, initial=trainer.global_step, desc="Training", unit="step")

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *args: Any) -> None:
        """Move the bar to the optimizer's step."""
        assert self._bar is not None
        # Figures only as often as the bar is drawn: each waits for the device.
        if trainer.global_step > self._bar.n and self._bar.update(trainer.global_step - self._bar.n):
            self._show_figures(trainer, module)

    def _show_figures(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert self._bar is not None and isinstance(module, CodecModule)
        figures = trainer.progress_bar_metrics | {"loss": module.losses["loss"]}
        self._bar.set_postfix({name: f"{float(value):.3f}" for name, value in figures.items()}, refresh=False)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Close the bar, with the last figures."""
        assert self._bar is not None and isinstance(module, CodecModule)
        if module.losses:
            self._show_figures(trainer, module)
        self._bar.close()
