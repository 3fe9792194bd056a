"""Losses, and metrics over a whole set; right under DDP, since torchmetrics adds their states up over ranks.

Axes: B batch, T frames, D feature width, K codebooks, V codes a codebook.
"""

import math
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.sparse import csr_array
from torch import Tensor
from torchmetrics import Metric

from repcodec.quantizers import NO_CODE


def reconstruction_loss(prediction: Tensor, target: Tensor, mask: Tensor | None, kind: str) -> Tensor:
    """Mean squared ("l2") or absolute ("l1") difference over the valid frames, in float32 or better.

    Args:
        prediction, target: (B, T, D).
        mask: (B, T) bool, True where a frame is valid, None: everywhere; without any the loss is 0.
        kind: "l1" or "l2".
    """
    dtype = torch.promote_types(target.dtype, torch.float32)
    difference = prediction.to(dtype) - target.to(dtype)
    if mask is not None:
        difference = difference.masked_fill(~mask[..., None], 0)
    total = difference.abs().sum() if kind == "l1" else difference.square().sum()
    return total / (max(1, target.numel()) if mask is None else mask.sum().clamp(min=1) * target.shape[-1])


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


class RunCount(Metric):
    """How many runs of equal codes there are: what is left when each is written once. All codebooks must stay equal."""

    full_state_update = False
    runs: Tensor
    codes: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("runs", "codes"):
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, codes: Tensor) -> None:
        """Add an utterance's codes (K, N)."""
        changes = (codes[:, 1:] != codes[:, :-1]).any(0).sum()
        self.runs = self.runs + changes + min(1, codes.shape[1])
        self.codes = self.codes + codes.shape[1]

    def compute(self) -> Tensor:
        """Return runs a code, 0 to 1; NaN without a code."""
        return self.runs / self.codes


class CodeUsage(Metric):
    """How the codes were used over all frames: a count for each code of each codebook."""

    full_state_update = False
    counts: Tensor

    def __init__(self, num_codebooks: int, codebook_size: int):
        super().__init__()
        self.add_state("counts", torch.zeros(num_codebooks, codebook_size, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, codes: Tensor) -> None:
        """Add codes (B, K, T); `NO_CODE` counts nowhere."""
        num_codebooks, size = self.counts.shape
        # NO_CODE has a place too, each codebook's first: leaving it out would wait for the device.
        places = codes.mT - NO_CODE + (size + 1) * torch.arange(num_codebooks, device=codes.device)
        counted = self.counts.new_zeros(num_codebooks * (size + 1))
        counted.index_add_(0, places.flatten(), counted.new_ones(()).expand(places.numel()))
        # Not in place: states that a validation in inference mode made are updated by training too.
        self.counts = self.counts + counted.view(num_codebooks, -1)[:, 1:]

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


def phone_agreement(joint: Tensor) -> dict[str, Tensor]:
    """Say how much codes tell about phones, from counts (…, phones, V); NaN where nothing was counted.

    pnmi: I(phone; code) / H(phone). phone_purity: share of frames whose phone is the commonest of their code.
    cluster_purity: share of frames whose code is the commonest of their phone (all three: Hsu et al. 2021, HuBERT).
    v_measure: harmonic mean of homogeneity, which is the PNMI, and completeness, I(phone; code) / H(code)
    (Rosenberg and Hirschberg 2007).
    """
    joint = joint.double() / joint.sum((-2, -1), keepdim=True)

    def entropy(p: Tensor, axes: tuple[int, ...] = (-1,)) -> Tensor:
        return -torch.xlogy(p, p).sum(axes)

    phones, codes = entropy(joint.sum(-1)), entropy(joint.sum(-2))
    information = phones + codes - entropy(joint, (-2, -1))
    return {
        "pnmi": information / phones,
        "phone_purity": joint.amax(-2).sum(-1),
        "cluster_purity": joint.amax(-1).sum(-1),
        "v_measure": 2 * information / (phones + codes),
    }


class PhoneAgreement(Metric):
    """How often each phone and each code of the first codebook come together, over all labelled frames."""

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
        """Return the scalars of `phone_agreement`, "pnmi_by_chance", and the counts "joint" (phones, V) of all ranks.

        By chance is about what the PNMI would be if codes told nothing, since a finite number of frames always seems to
        tell something: (cells - phones - codes + 1) / 2 N nats, of those that occur (Miller 1955), over H(phone).
        """
        seen = self.joint > 0
        bias = (seen.sum() - seen.any(1).sum() - seen.any(0).sum() + 1) / (2 * self.joint.sum())
        share = self.joint.sum(1).double() / self.joint.sum()
        by_chance = bias / -torch.xlogy(share, share).sum()
        return {**phone_agreement(self.joint), "pnmi_by_chance": by_chance, "joint": self.joint}


class PhoneBootstrap(Metric):
    """95 % intervals of `phone_agreement` over utterances: each replicate counts an utterance Poisson(1) times.

    That stands for drawing as many utterances with replacement (Hanley and MacGibbon 2006) without holding them all.
    How often follows from the utterance's id, so neither order nor the number of processes changes anything.
    """

    REPLICATES = 200
    MOST_COUNTS = 2**25
    """Phones x codes x replicates that are held at most, at 8 bytes."""
    FRAMES = 1_000_000
    """Frames that wait, at most, until they are counted together."""

    full_state_update = False
    joints: Tensor

    def __init__(self, num_phones: int, codebook_size: int):
        """Take the sizes; with a very large codebook there are fewer replicates."""
        super().__init__()
        self.shape = num_phones, codebook_size
        self.replicates = min(self.REPLICATES, self.MOST_COUNTS // (num_phones * codebook_size))
        zeros = torch.zeros(num_phones * codebook_size, self.replicates, dtype=torch.float64)
        self.add_state("joints", zeros, dist_reduce_fx="sum")
        self._pairs: list[npt.NDArray[np.int64]] = []
        self._weights: list[npt.NDArray[np.float64]] = []
        self._waiting = 0

    def update(self, utterance: str, phones: Tensor, codes: Tensor) -> None:
        """Add an utterance: its id, and the phone (N,) and code (N,) of each frame, negative: none."""
        known = (phones >= 0) & (codes >= 0)
        self._pairs.append((phones[known] * self.shape[1] + codes[known]).numpy())
        self._weights.append(replicate_weights(utterance, self.replicates))
        self._waiting += len(self._pairs[-1])
        if self._waiting >= self.FRAMES:
            self._count()

    def _count(self) -> None:
        lengths = [len(pairs) for pairs in self._pairs]
        if sum(lengths):
            owners = np.repeat(np.arange(len(lengths)), lengths)
            cells = (np.concatenate(self._pairs), owners)
            counts = csr_array((np.ones(len(owners)), cells), shape=(len(self.joints), len(lengths)))
            self.joints += torch.from_numpy(counts @ np.stack(self._weights))
        self._pairs, self._weights, self._waiting = [], [], 0

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Count what waits, then add up over ranks."""
        self._count()
        super().sync(*args, **kwargs)

    def compute(self) -> dict[str, tuple[float, float]]:
        """Return by how much each figure lies below and above its estimate at most; empty with too few replicates."""
        self._count()
        if self.replicates < 50:
            return {}
        figures = phone_agreement(self.joints.T.reshape(self.replicates, *self.shape))
        return {name: deviations(values) for name, values in figures.items()}


class UtteranceRatio(Metric):
    """A sum over utterances by another one, and its 95 % interval over utterances, as in `PhoneBootstrap`."""

    full_state_update = False
    sums: Tensor

    def __init__(self) -> None:
        super().__init__()
        zeros = torch.zeros(2, 1 + PhoneBootstrap.REPLICATES, dtype=torch.float64)
        self.add_state("sums", zeros, dist_reduce_fx="sum")

    def update(self, utterance: str, numerator: float, denominator: float) -> None:
        """Add what an utterance, named by its id, gives to both sums."""
        weights = torch.from_numpy(replicate_weights(utterance, PhoneBootstrap.REPLICATES))
        both = torch.tensor([[numerator], [denominator]], dtype=torch.float64)
        self.sums = self.sums + both * torch.cat([torch.ones(1, dtype=torch.float64), weights])

    def compute(self) -> tuple[float, tuple[float, float]]:
        """Return the ratio, and where its interval ends, counted from it; NaN without a denominator."""
        ratios = self.sums[0] / self.sums[1]
        return float(ratios[0]), deviations(ratios[1:])


def replicate_weights(utterance: str, replicates: int) -> npt.NDArray[np.float64]:
    """Return how often each replicate of a bootstrap counts an utterance, (replicates,) float64, from its id alone."""
    return np.random.default_rng(zlib.crc32(utterance.encode())).poisson(1, replicates).astype(np.float64)


def deviations(values: Tensor) -> tuple[float, float]:
    """Return where the middle 95 % of a bootstrap's replicates lie, from their mean: (below 0, above 0).

    From the mean, since replicates repeat utterances and so lie higher in PNMI than the estimate itself. NaN where
    they are all the same, as those of one utterance are: they tell nothing.
    """
    values = values[torch.isfinite(values)]
    if len(values) == 0 or float(values.max() - values.min()) <= 1e-9 * float(values.abs().max()):
        return math.nan, math.nan
    low, high = torch.quantile(values - values.mean(), torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()
    return low, high
