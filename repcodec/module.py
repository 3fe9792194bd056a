"""The LightningModule: steps, logging, optimizers, nothing else."""

from collections.abc import Callable

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.optim import Optimizer

from repcodec.codec import CodecOutput, RepCodec
from repcodec.data import Batch
from repcodec.errors import RepCodecError
from repcodec.metrics import CodeUsage, NormalizedError, reconstruction_loss
from repcodec.quantizers import sum_over_ranks
from repcodec.stacks import frame_mask


class CodecModule(L.LightningModule):
    """Trains a codec: reconstruction and commitment losses over valid frames, codebook updates of its own.

    Attributes:
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
    ):
        """Take finished parts.

        Args:
            codec: what is trained.
            optimizer: makes the optimizer from the parameters.
            scheduler: makes the schedule from the optimizer; it moves once a step.
            reconstruction: "l1" or "l2".
            reconstruction_weight, commitment_weight: of the two losses in their sum.

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

    def setup(self, stage: str) -> None:
        """Make the metric that needs the training set's mean."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]  # Lightning sets it on attach
        self.valid_error = NormalizedError(data.statistics.mean)

    def _losses(self, batch: Batch) -> tuple[dict[str, Tensor], CodecOutput]:
        """Return reconstruction, commitment and their weighted sum, each a mean over the valid frames of all ranks.

        Ranks may hold different numbers of valid frames, and the strategy averages gradients over ranks:
        each rank's mean is weighted by its share of the frames, times the number of ranks.
        """
        output = self.codec(batch.features, batch.lengths)
        mask = frame_mask(batch.lengths, batch.features.shape[1])
        counts = torch.stack([mask.sum(), output.code_mask.sum()]).double()
        share = counts * self.trainer.world_size / sum_over_ranks(counts.clone()).clamp(min=1)
        reconstruction = reconstruction_loss(
            self.codec.normalize(output.reconstruction), self.codec.normalize(batch.features), mask, self.reconstruction
        )
        losses = {
            "reconstruction": reconstruction * share[0].to(reconstruction.dtype),
            "commitment": output.quantizer.loss * share[1].to(output.quantizer.loss.dtype),
        }
        losses["loss"] = sum(self.weights[name] * loss for name, loss in losses.items())
        return losses, output

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of a batch; under gradient accumulation each batch weighs the same.

        Raises:
            RepCodecError: the loss is not finite.
        """
        losses, output = self._losses(batch)
        if not torch.isfinite(losses["loss"]):
            raise RepCodecError(
                f"step {self.global_step}: the loss is {float(losses['loss'])}, the run has diverged: "
                "lower optimizer.lr, or start from k-means (callbacks=kmeans_start)."
            )
        self.train_usage.update(output.quantizer.codes)
        self.log_dict(
            {f"train/{name}": loss.detach() for name, loss in losses.items()}, batch_size=len(batch.lengths),
            sync_dist=True,
        )  # fmt: skip
        self.log("train/learning_rate", self.trainer.optimizers[0].param_groups[0]["lr"])
        self.log("loss", losses["loss"].detach(), prog_bar=True, logger=False, batch_size=len(batch.lengths))
        return losses["loss"]

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Update the codebooks, once an optimizer step, whatever the gradient accumulation."""
        self.codec.quantizer.update()

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
        """Make optimizer and schedule."""
        optimizer = self.optimizer(self.codec.parameters())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.scheduler(optimizer), "interval": "step"}}
