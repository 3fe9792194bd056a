"""What is watched while numbers run: losses and gradients that are not finite, and codes that fall out of use."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor, nn

from repcodec.codec import RepCodec
from repcodec.data import Batch
from repcodec.distributed import several_ranks
from repcodec.errors import RepCodecError

log = logging.getLogger("repcodec")


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Return the norm of all gradients together, a scalar, without waiting for the device; 0 where there are none."""
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def explain_not_finite(
    step: int,
    codec: RepCodec,
    batches: Sequence[Batch],
    ids: Sequence[str] | None,
    context: AbstractContextManager[Any],
) -> RepCodecError:
    """Find out what is not finite in a step whose loss or gradient is not; every rank has to call it, all agree.

    It computes the batches again, so that a step that goes well keeps nothing for this.

    Args:
        step: the optimizer's.
        codec: weights and gradients as they are before the step is taken.
        batches: this rank's, all that went into the step.
        ids: of the split's utterances; None: unknown, their numbers are named.
        context: the precision that the step was computed in.

    Returns:
        The error to raise: step, first tensor that is not finite, in the order of computing, and its utterances.
    """
    found: list[tuple[int, str, list[str]] | None] = [None]
    with torch.no_grad(), context:
        training = codec.training
        codec.eval()  # notes nothing for the codebook
        for batch in batches:
            names = [ids[u] if ids is not None else f"number {u}" for u in batch.utterances.tolist()]
            for place, (what, tensor) in enumerate(_tensors(codec, batch)):
                rows = (~torch.isfinite(tensor)).flatten(1).any(1).tolist()
                if any(rows) and (found[0] is None or place < found[0][0]):
                    # Of a tensor without a row an utterance, the whole batch.
                    named = names if len(rows) != len(names) else [n for n, bad in zip(names, rows, strict=True) if bad]
                    found = [(place, what, named)]
        codec.train(training)
    if several_ranks():
        here, found = found[0], [None] * dist.get_world_size()
        dist.all_gather_object(found, here)
    known = [finding for finding in found if finding is not None]
    if not known:
        return RepCodecError(
            f"step {step}: loss and gradient are no longer finite, but are when computed again; run it once more, and "
            "if it stays, look for faulty memory."
        )
    place, what, named = min(known)
    advice = (
        "the run has diverged: lower optimizer.lr, clip gradients (+trainer.gradient_clip_val=1) or start from k-means "
        "(callbacks=kmeans_start)"
    )
    if place == 0:
        advice = "extract them again, or leave these utterances out"
    return RepCodecError(
        f"step {step}: {what} not finite, in a batch with utterances {', '.join(named)}; {advice}. "
        "The checkpoints in the run's folder are from before."
    )


def _tensors(codec: RepCodec, batch: Batch) -> Iterator[tuple[str, Tensor]]:
    """Yield what a step computes, in order, by name and verb; where rows can be told, the batch comes first."""
    yield "the features are", batch.features
    for name, value in [*codec.named_parameters(), *codec.named_buffers()]:
        yield f"the weight {name} is", value.flatten()[None]
    vectors = codec.vectors(batch.features, batch.lengths)
    yield "what the encoder stack makes of the features is", vectors[None]
    output = codec(batch.features, batch.lengths)
    yield "the commitment loss is", output.quantizer.loss[None, None]
    yield "the reconstruction is", output.reconstruction
    yield "the squared reconstruction error is", (output.reconstruction.float() - batch.features).square()
    for name, parameter in codec.named_parameters():
        if parameter.grad is not None:
            yield f"the gradient of {name} is", parameter.grad[None]
    norms = [parameter.grad.norm() for parameter in codec.parameters() if parameter.grad is not None]
    if norms:
        yield "the norm of all gradients is", torch.stack(norms).norm()[None, None]


class CodebookWatch(L.Callback):
    """Warns when a validation uses far fewer codes than the best one before, or hardly any, and says what to try.

    Once a fall: again only after use has recovered.
    """

    FALL, RECOVERED, FEW = 0.75, 0.9, 0.1
    """Shares: of the best use so far, below the first is a fall, above the second all is well; below the third of all
    codes that the validation's frames could use is too few at any time."""

    def __init__(self) -> None:
        self.best, self.low = 0.0, False

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Compare the use of codes with the best so far."""
        counts: Tensor = module.valid_counts  # type: ignore[assignment]  # (K, V) frames, of all ranks
        used = float(torch.gt(counts, 0).double().mean())
        # A validation of few frames cannot use all codes.
        few = self.FEW * min(1.0, float(counts[0].sum()) / counts.shape[1])
        if not self.low and (used < self.FALL * self.best or used < few):
            self.low = True
            if trainer.is_global_zero:
                log.warning(
                    "step %d: the validation uses %.1f %% of the codes%s; to keep them in use, revive unused codes "
                    "(quantizer.revive_below=0.02), start from k-means (callbacks=kmeans_start), let the codebook move "
                    "slower (quantizer.decay=0.95) or weigh the commitment more (module.commitment_weight=45).",
                    trainer.global_step, 100 * used, f", after {100 * self.best:.1f} %" if self.best > used else "",
                )  # fmt: skip
        elif self.low and used >= max(few, self.RECOVERED * self.best):
            self.low = False
        self.best = max(self.best, used)

    def state_dict(self) -> dict[str, Any]:
        """Return the best use so far, and whether it has fallen, for the checkpoint."""
        return {"best": self.best, "low": self.low}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on comparing with a checkpoint's best."""
        self.best, self.low = state_dict["best"], state_dict["low"]
