"""Losses, and metrics over a whole set; right under DDP, since torchmetrics adds their states up over ranks.

Axes: B batch, T frames, D feature width, K codebooks, V codes a codebook.
"""

import math

import torch
from torch import Tensor
from torchmetrics import Metric

from repcodec.quantizers import NO_CODE


def reconstruction_loss(prediction: Tensor, target: Tensor, mask: Tensor, kind: str) -> Tensor:
    """Mean squared ("l2") or absolute ("l1") difference over the valid frames, in float32 or better.

    Args:
        prediction, target: (B, T, D).
        mask: (B, T) bool, True where a frame is valid; without any the loss is 0.
        kind: "l1" or "l2".
    """
    dtype = torch.promote_types(target.dtype, torch.float32)
    difference = (prediction.to(dtype) - target.to(dtype)).masked_fill(~mask[..., None], 0)
    total = difference.abs().sum() if kind == "l1" else difference.square().sum()
    return total / (mask.sum().clamp(min=1) * target.shape[-1])


class NormalizedError(Metric):
    """sum |x - x̂|² / sum |x - mean|² over all frames, the mean being that of the training set.

    0 is a perfect reconstruction, 1 as good as always answering the mean.
    """

    full_state_update = False
    mean: Tensor
    error: Tensor
    variation: Tensor

    def __init__(self, mean: Tensor):
        """Take the (D,) mean of the training set."""
        super().__init__()
        self.register_buffer("mean", mean.double(), persistent=False)
        self.add_state("error", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("variation", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, reconstruction: Tensor, features: Tensor, mask: Tensor) -> None:
        """Add a batch: (B, T, D), (B, T, D), and the valid frames (B, T)."""
        features = features[mask].double()
        self.error = self.error + (reconstruction[mask].double() - features).square().sum()
        self.variation = self.variation + (features - self.mean).square().sum()

    def compute(self) -> Tensor:
        """Return the scalar; not finite when nothing varied."""
        return self.error / self.variation


class CodeUsage(Metric):
    """How the codes were used over all frames: a count for each code of each codebook."""

    full_state_update = False
    counts: Tensor

    def __init__(self, num_codebooks: int, codebook_size: int):
        super().__init__()
        self.add_state("counts", torch.zeros(num_codebooks, codebook_size, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, codes: Tensor) -> None:
        """Add codes (B, K, T); `NO_CODE` counts nowhere."""
        size = self.counts.shape[1]
        # Not in place: states that a validation in inference mode made are updated by training too.
        self.counts = self.counts + torch.stack(
            [torch.bincount(row[row != NO_CODE], minlength=size) for row in codes.transpose(0, 1)]
        )

    def compute(self) -> dict[str, Tensor]:
        """Return scalars, averaged over codebooks, and the counts (K, V) of all ranks.

        perplexity: e to the entropy of the codes; used_share: share of codes used at all;
        entropy_bits: bits a frame, summed over codebooks.
        """
        share = self.counts.double() / self.counts.sum(1, keepdim=True).clamp(min=1)
        entropy = -torch.xlogy(share, share).sum(1)
        return {
            "perplexity": entropy.exp().mean(),
            "used_share": torch.gt(self.counts, 0).double().mean(),
            "entropy_bits": entropy.sum() / math.log(2),
            "counts": self.counts,
        }


class PhoneAgreement(Metric):
    """How much the codes of the first codebook say about phones: PNMI and phone purity (Hsu et al. 2021).

    PNMI = I(phone; code) / H(phone); phone purity = the share of frames whose phone is the commonest of
    their code. Both over all labelled frames.
    """

    full_state_update = False
    joint: Tensor

    def __init__(self, num_phones: int, codebook_size: int):
        super().__init__()
        self.add_state("joint", torch.zeros(num_phones, codebook_size, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, phones: Tensor, codes: Tensor) -> None:
        """Add frames: phone (N,) and code (N,) of each; a negative phone or code counts nowhere."""
        known = (phones >= 0) & (codes >= 0)
        pairs = phones[known] * self.joint.shape[1] + codes[known]
        self.joint = self.joint + torch.bincount(pairs, minlength=self.joint.numel()).view_as(self.joint)

    def compute(self) -> dict[str, Tensor]:
        """Return the scalars pnmi and phone_purity; NaN without a labelled frame."""
        joint = self.joint.double() / self.joint.sum()

        def entropy(p: Tensor) -> Tensor:
            return -torch.xlogy(p, p).sum()

        phones, codes = joint.sum(1), joint.sum(0)
        information = entropy(phones) + entropy(codes) - entropy(joint)
        return {"pnmi": information / entropy(phones), "phone_purity": joint.max(0).values.sum()}
