"""The LightningModule: steps, logging, optimizers, nothing else."""

import math
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.optim import Optimizer

from repcodec.codec import CodecOutput, RepCodec
from repcodec.data import Batch
from repcodec.distributed import sum_over_ranks
from repcodec.errors import RepCodecError, first_line
from repcodec.metrics import CodeUsage, NormalizedError, reconstruction_loss
from repcodec.numerics import explain_not_finite, gradient_norm
from repcodec.quantizers import NO_CODE
from repcodec.stacks import frame_mask


class CodecModule(L.LightningModule):
    """Trains a codec: reconstruction and commitment losses over valid frames, codebook updates of its own.

    Attributes:
        losses: of the last training batch, over all ranks: "reconstruction", "commitment", "loss".
        valid_counts: (K, V) frames a code, of the last validation and all ranks.
    """

    def __init__(
        self,
        codec: RepCodec,
        optimizer: Callable[..., Optimizer],
        scheduler: Callable[..., torch.optim.lr_scheduler.LRScheduler],
        reconstruction: str = "l2",
        reconstruction_weight: float = 45.0,
        commitment_weight: float = 1.0,
        compile: bool = False,
    ):
        """Take finished parts.

        Args:
            codec: what is trained.
            optimizer: makes the optimizer from the parameters.
            scheduler: makes the schedule from the optimizer; it moves once a step.
            reconstruction: "l1" or "l2".
            reconstruction_weight, commitment_weight: of the two losses in their sum.
            compile: whether the stacks run through torch.compile; the quantizer, its updates and logging do not.

        Raises:
            ValueError: another `reconstruction`.
        """
        super().__init__()
        if reconstruction not in ("l1", "l2"):
            raise ValueError(f"reconstruction={reconstruction!r}: expected l1 or l2")
        self.codec = codec
        self.optimizer, self.scheduler = optimizer, scheduler
        self.reconstruction = reconstruction
        self.weights = {"reconstruction": reconstruction_weight, "commitment": commitment_weight}
        self.train_usage = CodeUsage(codec.num_codebooks, codec.codebook_size)
        self.valid_usage = CodeUsage(codec.num_codebooks, codec.codebook_size)
        self.valid_error: NormalizedError
        self.valid_counts: Tensor
        self._batches: list[Batch] = []  # since the last step of the optimizer
        self._total = torch.zeros(())  # of their losses
        self.losses: dict[str, Tensor] = {}
        if compile:  # in place: names in checkpoints and saved codecs stay
            codec.encoder.compile()
            codec.decoder.compile()

    def setup(self, stage: str) -> None:
        """Make the metric that needs the training set's mean.

        Raises:
            RepCodecError: training shall take no step, or one of no batch, or validate after none.
        """
        for option in ("accumulate_grad_batches", "val_check_interval", "max_steps", "max_epochs"):
            if stage == "fit" and getattr(self.trainer, option) == 0:
                raise RepCodecError(f"trainer.{option}=0: expected at least 1.")
        data = self.trainer.datamodule  # type: ignore[attr-defined]  # Lightning sets it on attach
        self.valid_error = NormalizedError(data.statistics.mean)

    def _losses(self, batch: Batch) -> tuple[dict[str, Tensor], CodecOutput]:
        """Return reconstruction, commitment and their weighted sum, each a mean over the valid frames of all ranks.

        Ranks may hold different numbers of valid frames, and the strategy averages gradients over ranks:
        each rank's mean is weighted by its share of the frames, times the number of ranks.
        """
        output = self.codec(batch.features, None if batch.full else batch.lengths)
        mask = None if batch.full else frame_mask(batch.lengths, batch.features.shape[1])
        # In features as the stacks see them: the mean falls out of a difference, the scale is that of all dimensions.
        reconstruction = reconstruction_loss(output.reconstruction, batch.features, mask, self.reconstruction)
        scale = self.codec.feature_scale.to(reconstruction)
        reconstruction = reconstruction / (scale if self.reconstruction == "l1" else scale.square())
        losses = {"reconstruction": reconstruction, "commitment": output.quantizer.loss}
        if self.trainer.world_size > 1:
            coded = output.quantizer.codes[:, 0] != NO_CODE
            counts = torch.stack([batch.lengths.sum(), coded.sum()]).double()
            shares = counts * self.trainer.world_size / sum_over_ranks(counts.clone()).clamp(min=1)
            losses = {name: loss * share.to(loss) for (name, loss), share in zip(losses.items(), shares, strict=True)}
        losses["loss"] = sum(self.weights[name] * loss for name, loss in losses.items())
        return losses, output

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of a batch; under gradient accumulation each batch weighs the same."""
        losses, output = self._losses(batch)
        self.train_usage.update(output.quantizer.codes)
        # Of all ranks in one sum: what is logged, and what says to every rank alike that one has diverged.
        means = sum_over_ranks(torch.stack([loss.detach() for loss in losses.values()])) / self.trainer.world_size
        self._batches.append(batch)
        self._total = self._total + means[-1]
        self.losses = dict(zip(losses, means, strict=True))
        if self._logs():
            self.log_dict({f"train/{name}": mean for name, mean in self.losses.items()})
            self.log("train/learning_rate", self.trainer.optimizers[0].param_groups[0]["lr"])
        return losses["loss"]

    def _logs(self) -> bool:
        """Say whether Lightning writes down this step: taking figures that nobody reads slows a GPU's step down."""
        return self.trainer._logger_connector.should_update_logs

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Check the step, then update the codebooks: once an optimizer step, whatever the gradient accumulation.

        Loss and gradients are those of all ranks by now, so all see the same and stop at the same step.

        Raises:
            RepCodecError: the loss or a gradient is not finite; the step is not taken.
        """
        norm = gradient_norm(parameter for group in optimizer.param_groups for parameter in group["params"])
        if not math.isfinite(norm + self._total) and not self._probing():  # the one wait for the device
            context = self.trainer.precision_plugin.forward_context()
            ids = self.trainer.datamodule.train_ids  # type: ignore[attr-defined]  # Lightning sets it on attach
            raise explain_not_finite(self.global_step, self.codec, self._batches, ids, context)
        self._batches, self._total = [], torch.zeros((), device=norm.device)
        if self._logs():
            self.log("train/gradient_norm", norm)
        self.codec.quantizer.update()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Take the step, and let go of the gradients then: the next forward pass takes their memory."""
        super().optimizer_step(*args, **kwargs)
        self.trainer.optimizers[0].zero_grad()

    def optimizer_zero_grad(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: there are no gradients left, see `optimizer_step`."""

    def _probing(self) -> bool:
        """Say whether a gradient overflowed only since 16-mixed tries out by how much it can be scaled."""
        scaler = self._scaler()
        return scaler is not None and bool(torch.isfinite(self._total)) and scaler.get_scale() > 1

    def _scaler(self) -> torch.amp.GradScaler | None:
        """Return what scales the loss under 16-mixed."""
        return getattr(self.trainer.precision_plugin, "scaler", None)

    def on_validation_epoch_start(self) -> None:
        """Begin anew; the last validation's metrics stand until here, for callbacks to show."""
        self.valid_error.reset()
        self.valid_usage.reset()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a batch to the metrics over the whole validation set."""
        output = self.codec(batch.features, batch.lengths)
        mask = frame_mask(batch.lengths, batch.features.shape[1])
        self.valid_error.update(output.reconstruction, batch.features, mask)
        self.valid_usage.update(output.quantizer.codes)

    def on_validation_epoch_end(self) -> None:
        """Log the metrics: of the validation set, and the use of codes in training since the last validation."""
        error = self.valid_error.compute()
        self.log("valid/normalized_error", error, sync_dist=True)
        self.log("valid_error", error, prog_bar=True, logger=False, sync_dist=True)
        usages = {"valid": self.valid_usage}
        # Every rank computes or none: a rank may hold no validation utterance, but all are at the same step.
        if self.global_step > 0:
            usages["train"] = self.train_usage
        for prefix, usage in usages.items():
            values = usage.compute()
            counts = values.pop("counts")
            if prefix == "valid":
                self.valid_counts = counts
            self.log_dict({f"{prefix}/{name}": value for name, value in values.items()}, sync_dist=True)
        self.train_usage.reset()

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Make optimizer and schedule.

        Raises:
            RepCodecError: they do not take their options.
        """
        given = getattr(self.optimizer, "keywords", {})
        # A fused step would unscale gradients itself, after they are clipped and their norm is told; under mixed
        # precision Lightning clips none of a fused optimizer, scaled or not.
        mixed = isinstance(self.trainer.precision_plugin, MixedPrecision)
        unscaled = self._scaler() is not None or self.trainer.gradient_clip_val
        changed = {"fused": False} if given.get("fused") and mixed and unscaled else {}
        try:
            optimizer = self.optimizer(self.codec.parameters(), **changed)
            scheduler = self.scheduler(optimizer)
        except (TypeError, ValueError) as error:
            words = [f"optimizer.{name}={value}" for name, value in given.items() if isinstance(value, str)]
            if words:
                raise RepCodecError(f"{', '.join(words)}: expected a number.") from error
            raise RepCodecError(f"optimizer or scheduler: an option does not fit ({first_line(error)}).") from error
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
