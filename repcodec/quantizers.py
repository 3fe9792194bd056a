"""Quantizers: the contract, its result, and vector quantization with moving averages.

Letters: N valid frames, C width of a code vector, K codebooks, V codes a codebook.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from repcodec.distributed import first_rank_first, from_first_rank, gather_rows, sum_over_ranks
from repcodec.errors import RepCodecError

NO_CODE = -1
"""Code of a frame beyond an utterance's length."""


@dataclass
class QuantizerOutput:
    """What a quantizer makes of a batch.

    Attributes:
        quantized: (B, T, C) code vectors, zero at invalid frames; gradients pass to the input unchanged.
        codes: (B, K, T) int64, `NO_CODE` at invalid frames.
        loss: scalar, the commitment loss summed over codebooks; a mean over valid frames.
    """

    quantized: Tensor
    codes: Tensor
    loss: Tensor


MOST_VALUES = 2**27
"""Values of all codes of a codec, 512 MiB: a config.json may ask for any number, before there is a weight for it."""


def check_size(dim: int, codebook_size: int, num_codebooks: int = 1) -> None:
    """Refuse codebooks without a code, and such as fill the memory.

    Raises:
        ValueError: says which numbers are meant.
    """
    if codebook_size < 1:
        raise ValueError(f"codebook_size={codebook_size}: expected at least 1")
    if num_codebooks < 1 or dim * codebook_size * num_codebooks > MOST_VALUES:
        asked = f"num_codebooks={num_codebooks}, codebook_size={codebook_size}"
        raise ValueError(f"{asked}: expected at least one codebook, and not over {MOST_VALUES} values")


class Quantizer(nn.Module):
    """Contract: what the codec asks of a quantizer.

    Attributes:
        kind: its name in `repcodec.library_quantizers.QUANTIZERS`.
        dim: C.
        codebook_size: V.
        num_codebooks: K.
        revived: codes moved onto frames because they were unused, so far in this process.
    """

    kind: str
    dim: int
    codebook_size: int
    num_codebooks: int
    revived: int = 0

    def forward(self, z: Tensor, mask: Tensor | None) -> QuantizerOutput:
        """Quantize (B, T, C) where mask (B, T) is True, None: everywhere; in training, note the step's statistics."""
        raise NotImplementedError

    def encode(self, z: Tensor, mask: Tensor | None) -> Tensor:
        """(B, T, C) and mask (B, T), None: all True -> codes (B, K, T)."""
        raise NotImplementedError

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (B, K, T) -> (B, T, C), zero where a code is `NO_CODE`."""
        raise NotImplementedError

    def update(self) -> None:
        """Move the codebooks by what the forward passes since the last call noted; once an optimizer step."""
        raise NotImplementedError

    def start(self, z: Tensor, seed: int) -> None:
        """Place the first codes on the vectors z (N, C) of rank 0; every rank gets the same codes."""
        raise NotImplementedError

    def config(self) -> dict[str, Any]:
        """Return the arguments besides `dim` that make this quantizer again, plain values."""
        raise NotImplementedError


def nearest_code(z: Tensor, codebook: Tensor) -> Tensor:
    """Return (N,) int64: the code nearest each row of z (N, C) by squared Euclidean distance.

    The codebook is (V, C). Rows are taken in blocks, so that memory does not grow with N.
    """
    # |z - e|^2 less |z|^2, which is the same for every code.
    half_norms = codebook.square().sum(1) / 2
    size = 512 if z.device.type == "cpu" else 16_384  # a CPU's cache holds that many distances
    with torch.autocast(z.device.type, enabled=False):
        blocks = [torch.addmm(half_norms, block, codebook.T, alpha=-1).argmin(1) for block in z.split(size)]
    return torch.cat(blocks)


def fit_centroids(frames: npt.NDArray[np.floating], num_centroids: int, seed: int = 0) -> npt.NDArray[np.float32]:
    """Fit k-means to convergence: mini-batches first, then full passes until the error stops falling.

    Args:
        frames: (N, D) float.
        num_centroids: V.
        seed: of the start and the mini-batches.

    Returns:
        (V, D) float32.

    Raises:
        RepCodecError: fewer frames than centroids.
    """
    from sklearn.cluster import KMeans, MiniBatchKMeans
    from sklearn.exceptions import ConvergenceWarning

    if len(frames) < num_centroids:
        raise RepCodecError(
            f"k-means of {num_centroids} codes needs at least as many frames, found {len(frames)}; "
            "take a smaller codebook or more speech."
        )
    frames = np.ascontiguousarray(frames, dtype=np.float32)
    rough = MiniBatchKMeans(
        num_centroids, batch_size=max(4096, 4 * num_centroids), n_init=1, max_iter=30, random_state=seed,
        reassignment_ratio=0.0,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # repeated frames: fewer distinct points than codes
        rough.fit(frames)
        exact = KMeans(num_centroids, init=rough.cluster_centers_, n_init=1, max_iter=100, tol=1e-5, random_state=seed)
        centroids: npt.NDArray[np.float32] = exact.fit(frames).cluster_centers_.astype(np.float32)
    return centroids


class EMACodebook(nn.Module):
    """One codebook, moved by exponential moving averages of what was assigned to it (VQ-VAE, appendix A.1).

    Buffers, all of the codebook's own precision, also under mixed precision:
        codes: (V, C), the code vectors: moving sum / smoothed moving count.
        counts: (V,), moving average of the frames a step assigns to each code, over all ranks.
        sums: (V, C), moving average of the sum of those frames.
    """

    codes: Tensor
    counts: Tensor
    sums: Tensor

    EPSILON = 1e-5
    """Laplace smoothing of the counts, as published."""

    def __init__(self, codebook_size: int, dim: int, decay: float, revive_below: float):
        super().__init__()
        self.decay, self.revive_below = decay, revive_below
        self.register_buffer("codes", torch.randn(codebook_size, dim))
        self.register_buffer("counts", torch.zeros(codebook_size))
        self.register_buffer("sums", self.codes.clone())
        self._pending: list[tuple[Tensor, Tensor]] = []
        self.revived = 0

    def quantize(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Valid frames z (N, C) -> their code vectors (N, C) and codes (N,)."""
        codes = nearest_code(z, self.codes)
        return self.codes[codes], codes

    def note(self, z: Tensor, codes: Tensor) -> None:
        """Remember the frames z (N, C) and their codes (N,) for the next `update`."""
        self._pending.append((z.detach(), codes))

    @torch.no_grad()
    def update(self) -> None:
        """Move the codes by the frames noted on all ranks; without one, or with one not finite, nothing moves."""
        if not self._pending:
            z, codes = self.codes[:0], torch.empty(0, dtype=torch.int64, device=self.codes.device)
        else:
            z, codes = (torch.cat(parts) for parts in zip(*self._pending, strict=True))
        self._pending.clear()
        counts = torch.zeros_like(self.counts).index_add_(0, codes, torch.ones_like(z[:, 0]))
        sums = torch.zeros_like(self.sums).index_add_(0, codes, z)
        sum_over_ranks(counts)
        sum_over_ranks(sums)
        # Nothing to learn from, or an overflow of half precision, whose step the optimizer skips too.
        most, largest = torch.stack([counts.amax(), sums.abs().amax()]).tolist()
        if most == 0 or not math.isfinite(largest):
            return
        self.counts.mul_(self.decay).add_(counts, alpha=1 - self.decay)
        self.sums.mul_(self.decay).add_(sums, alpha=1 - self.decay)
        total = self.counts.sum()
        smoothed = (self.counts + self.EPSILON) / (total + len(self.counts) * self.EPSILON) * total
        old = self.codes.clone()
        self.codes.copy_(self.sums / smoothed[:, None])
        if self.revive_below > 0:
            self._revive(z, codes, old)

    def _revive(self, z: Tensor, codes: Tensor, old: Tensor) -> None:
        """Move codes whose count fell below `revive_below` onto frames of this step, and reset their statistics.

        The frames are those at evenly spaced ranks of the quantization error, over the frames of all ranks:
        that depends on no random number and on no order, so any number of ranks chooses the same ones.
        """
        unused = torch.lt(self.counts, self.revive_below).nonzero()[:, 0]
        if len(unused) == 0:
            return
        z, errors = gather_rows(z), gather_rows((z - old[codes]).square().sum(1))
        unused = unused[: len(z)]
        self.revived += len(unused)
        ranked = errors.argsort(descending=True, stable=True)
        chosen = z[ranked[torch.arange(len(unused), device=z.device) * len(z) // len(unused)]]
        # The count of an ordinary code, so that the code gets its time before it is revived again.
        share = self.counts.sum() / len(self.counts)
        self.codes[unused], self.counts[unused], self.sums[unused] = chosen, share, chosen * share

    @torch.no_grad()
    def place(self, codes: Tensor, counts: Tensor) -> None:
        """Start from codes (V, C) and the frames (V,) a step would assign to each."""
        self.codes.copy_(codes)
        self.counts.copy_(counts)
        self.sums.copy_(self.codes * self.counts[:, None])


class EMAQuantizer(Quantizer):
    """Residual vector quantization over K codebooks with moving averages; K = 1 is the published quantizer.

    A codebook quantizes what the ones before it left over. A step's vectors, codes and losses use the codes
    from before its update.
    """

    kind = "ema"

    def __init__(
        self, dim: int, codebook_size: int = 1024, num_codebooks: int = 1, decay: float = 0.8, revive_below: float = 0.0
    ):
        """Codes start as N(0, 1).

        Args:
            dim: C.
            codebook_size: V.
            num_codebooks: K.
            decay: of the moving averages.
            revive_below: a code whose moving count of frames a step falls below this is moved onto a frame of the
                batch; 0 leaves unused codes alone, as published.

        Raises:
            ValueError: an argument outside its range.
        """
        super().__init__()
        check_size(dim, codebook_size, num_codebooks)
        if not 0 <= decay < 1 or revive_below < 0:
            raise ValueError("expected 0 <= decay < 1 and revive_below >= 0")
        self.dim, self.codebook_size, self.num_codebooks = dim, codebook_size, num_codebooks
        self.decay, self.revive_below = decay, revive_below
        books = [EMACodebook(codebook_size, dim, decay, revive_below) for _ in range(num_codebooks)]
        self.codebooks = nn.ModuleList(books)

    @property
    def revived(self) -> int:  # type: ignore[override]  # what the codebooks count
        """Codes moved onto frames because they were unused, so far in this process, over all codebooks."""
        return sum(codebook.revived for codebook in self._books())

    def _books(self) -> list[EMACodebook]:
        """Return the codebooks, in the order in which they quantize."""
        return list(self.codebooks)  # type: ignore[arg-type]  # nn.ModuleList tells no type

    def config(self) -> dict[str, Any]:
        """Return the arguments that make this quantizer again."""
        return {
            "codebook_size": self.codebook_size,
            "num_codebooks": self.num_codebooks,
            "decay": self.decay,
            "revive_below": self.revive_below,
        }

    def forward(self, z: Tensor, mask: Tensor | None) -> QuantizerOutput:
        """Quantize (B, T, C) where mask (B, T) is True, None: everywhere; in training, note the step's statistics."""
        residual = self._valid(z, mask)
        parts: list[Tensor] = []
        codes, losses = [], []
        for codebook in self._books():
            if parts:
                residual = residual - parts[-1]
            vectors, chosen = codebook.quantize(residual)
            if self.training:
                codebook.note(residual, chosen)
            # A sum over its number, not a mean: without a single valid frame the loss is 0 and still has a gradient.
            losses.append(nn.functional.mse_loss(residual, vectors, reduction="sum") / max(1, residual.numel()))
            parts.append(self._through(residual, vectors))
            codes.append(chosen)
        quantized = spread(reduce(torch.add, parts), mask, z.shape[:2], 0).to(z.dtype)
        return QuantizerOutput(quantized, spread_codes(codes, mask, z.shape[:2]), reduce(torch.add, losses))

    def _through(self, residual: Tensor, vectors: Tensor) -> Tensor:
        """Straight through: the value of the vectors (N, C), the derivative of the residual (N, C)."""
        return residual + (vectors - residual).detach()

    def encode(self, z: Tensor, mask: Tensor | None) -> Tensor:
        """(B, T, C) and mask (B, T), None: all True -> codes (B, K, T)."""
        residual, books = self._valid(z, mask), self._books()
        codes: list[Tensor] = []
        for k, codebook in enumerate(books):
            if k > 0:
                residual = residual - books[k - 1].codes[codes[-1]]
            codes.append(nearest_code(residual, codebook.codes))
        return spread_codes(codes, mask, z.shape[:2])

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (B, K, T) -> (B, T, C), zero where a code is `NO_CODE`."""
        mask = codes[:, 0] != NO_CODE
        vectors = torch.stack([book.codes[codes[:, k].clamp(min=0)] for k, book in enumerate(self._books())]).sum(0)
        return vectors * mask[..., None].to(vectors.dtype)

    def update(self) -> None:
        """Move the codebooks by the frames of the forward passes since the last call, over all ranks."""
        for codebook in self._books():
            codebook.update()

    @torch.no_grad()
    def start(self, z: Tensor, seed: int) -> None:
        """Place the codes by k-means over rank 0's vectors z (N, C), codebook after codebook; all ranks get them."""
        with first_rank_first() as first:
            residual = z.to(self._books()[0].codes)
            for codebook in self._books() if first else []:
                centroids = torch.from_numpy(fit_centroids(residual.cpu().numpy(), self.codebook_size, seed))
                centroids = centroids.to(codebook.codes)
                codes = nearest_code(residual, centroids)
                # A code that no frame chose counts one all the same, or its first update would move it to the origin.
                counts = torch.bincount(codes, minlength=self.codebook_size).clamp(min=1).to(codebook.counts)
                codebook.place(centroids, counts / counts.mean())
                residual = residual - centroids[codes]
        for buffer in self.buffers():
            from_first_rank(buffer)

    def _valid(self, z: Tensor, mask: Tensor | None) -> Tensor:
        """Return the valid frames (N, C) in the codebook's precision, whatever autocast says."""
        return valid_rows(z, mask).to(self._books()[0].codes.dtype)


def valid_rows(z: Tensor, mask: Tensor | None) -> Tensor:
    """Return the rows (N, …) of z (B, T, …) where mask (B, T) is True, None: all, which needs no look at the mask."""
    return z.flatten(0, 1) if mask is None else z[mask]


def spread(rows: Tensor, mask: Tensor | None, shape: Sequence[int], fill: float) -> Tensor:
    """Undo `valid_rows`: put the rows (N, …) back to their places in `shape` (B, T), `fill` elsewhere."""
    if mask is None:
        return rows.view(*shape, *rows.shape[1:])
    placed = rows.new_full((*shape, *rows.shape[1:]), fill)
    placed[mask] = rows
    return placed


def spread_codes(codes: list[Tensor], mask: Tensor | None, shape: Sequence[int]) -> Tensor:
    """K lists of codes (N,) -> (B, K, T)."""
    return spread(torch.stack(codes, 1), mask, shape, NO_CODE).mT.contiguous()
