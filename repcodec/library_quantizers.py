"""Quantizers of the package vector-quantize-pytorch behind our contract, and the registry of all.

The package's modules know neither masks nor ranks: they get the valid frames alone, and what they do to all frames of
a step at once (a mean, an entropy) is done here over the frames of all ranks.

Letters: N valid frames, C width of a code vector, L width of a projected one, V codes.
"""

from collections.abc import Sequence
from itertools import chain
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Categorical

from repcodec.distributed import first_rank_first, from_first_rank, sum_over_ranks
from repcodec.errors import RepCodecError
from repcodec.quantizers import (
    NO_CODE,
    EMAQuantizer,
    Quantizer,
    QuantizerOutput,
    check_size,
    fit_centroids,
    nearest_code,
    spread,
    spread_codes,
    valid_rows,
)


def _package() -> Any:
    """Import vector-quantize-pytorch.

    Raises:
        RepCodecError: it is not installed.
    """
    try:
        import vector_quantize_pytorch
    except ImportError as error:
        raise RepCodecError(
            "the quantizers fsq, lfq, simvq and rotation need the package vector-quantize-pytorch: "
            "pip install 'repcodec[quantizers]'."
        ) from error
    return vector_quantize_pytorch


def _rotate(rows: Tensor, vectors: Tensor) -> Tensor:
    """Vectors (N, C), whose gradient is handed on to the rows (N, C), turned and scaled as those are to become them."""
    rotated: Tensor = _package().vector_quantize_pytorch.rotate_to(rows, vectors)
    return rotated


class RotationQuantizer(EMAQuantizer):
    """`EMAQuantizer` with another gradient: the rotation trick (Fifty et al. 2024, arXiv 2410.06424).

    A vector's gradient is rotated and scaled as the vector is to become its code, instead of handed on unchanged.
    Codebooks, codes and commitment loss are those of `EMAQuantizer`; coding needs no package.
    """

    kind = "rotation"

    def _through(self, residual: Tensor, vectors: Tensor) -> Tensor:
        rotated = _rotate(residual, vectors)
        # Where rotating is ill-conditioned, the value is the code's still.
        return rotated + (vectors - rotated).detach()


class _LibraryQuantizer(Quantizer):
    """A module of the package with one codebook that the optimizer trains, if anything.

    Attributes:
        vq: the package's module.
    """

    num_codebooks = 1
    vq: Any

    def _codes(self, rows: Tensor) -> Tensor:
        """Frames (N, C) -> codes (N,)."""
        raise NotImplementedError

    def _quantize(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Frames (N, C) -> vectors (N, C) with the gradient that training wants, codes (N,), and the loss."""
        raise NotImplementedError

    def _vectors(self, codes: Tensor) -> Tensor:
        """Codes (…) -> vectors (…, C)."""
        raise NotImplementedError

    def _place(self, z: Tensor, seed: int) -> None:
        """`start`, on rank 0."""
        raise NotImplementedError

    @property
    def _dtype(self) -> torch.dtype:
        return next(chain(self.parameters(), (one for one in self.buffers() if one.is_floating_point()))).dtype

    def forward(self, z: Tensor, mask: Tensor | None) -> QuantizerOutput:
        """Quantize (B, T, C) where mask (B, T) is True, None: everywhere, in the quantizer's precision."""
        with torch.autocast(z.device.type, enabled=False):
            vectors, codes, loss = self._quantize(valid_rows(z, mask).to(self._dtype))
            if len(codes) == 0:  # a mean over nothing; and DDP waits for a gradient of every parameter
                loss = 0 * sum((parameter.sum() for parameter in self.parameters()), vectors.sum())
            # The value that `decode` gives, the gradient that the package gives.
            vectors = vectors + (self._vectors(codes) - vectors).detach()
        quantized = spread(vectors, mask, z.shape[:2], 0).to(z.dtype)
        return QuantizerOutput(quantized, spread_codes([codes], mask, z.shape[:2]), loss)

    def encode(self, z: Tensor, mask: Tensor | None) -> Tensor:
        """(B, T, C) and mask (B, T), None: all True -> codes (B, 1, T)."""
        with torch.autocast(z.device.type, enabled=False):
            return spread_codes([self._codes(valid_rows(z, mask).to(self._dtype))], mask, z.shape[:2])

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (B, 1, T) -> (B, T, C), zero where a code is `NO_CODE`."""
        with torch.autocast(codes.device.type, enabled=False):
            vectors = self._vectors(codes[:, 0].clamp(min=0))
        return vectors.masked_fill((codes[:, 0] == NO_CODE)[..., None], 0)

    def update(self) -> None:
        """Do nothing: what is learnt, the optimizer learns."""

    @torch.no_grad()
    def start(self, z: Tensor, seed: int) -> None:
        """Start from the vectors z (N, C) of rank 0, see each class; every rank gets the same."""
        with first_rank_first() as first:
            if first:
                self._place(z.to(self._dtype), seed)
        for tensor in self.state_dict().values():
            from_first_rank(tensor)


class SimVQQuantizer(_LibraryQuantizer):
    """Codes that move all together: a frozen codebook times a learnt matrix (SimVQ, Zhu et al. 2024, arXiv 2411.02038).

    The loss has two parts: the codes towards the vectors, and a quarter of the vectors towards the codes.
    """

    kind = "simvq"

    def __init__(self, dim: int, codebook_size: int = 1024):
        """Frozen codes are N(0, 1 / C).

        Args:
            dim: C.
            codebook_size: V.

        Raises:
            RepCodecError: the package is not installed.
            ValueError: an argument outside its range.
        """
        super().__init__()
        check_size(dim, codebook_size)
        self.dim, self.codebook_size = dim, codebook_size
        self.vq = _package().SimVQ(dim=dim, codebook_size=codebook_size)

    def config(self) -> dict[str, Any]:
        """Return the arguments that make this quantizer again."""
        return {"codebook_size": self.codebook_size}

    def _codes(self, rows: Tensor) -> Tensor:
        return nearest_code(rows.detach(), self.vq.codebook.detach())

    def _quantize(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # What the module's own forward does; that one takes no empty batch, and traces anew for every N.
        codes, mse = self._codes(rows), nn.functional.mse_loss
        vectors = self._vectors(codes)
        loss = mse(vectors, rows.detach()) + self.vq.input_to_quantize_commit_loss_weight * mse(rows, vectors.detach())
        return _rotate(rows, vectors), codes, loss

    def _vectors(self, codes: Tensor) -> Tensor:
        return nn.functional.embedding(codes, self.vq.codebook)

    def _place(self, z: Tensor, seed: int) -> None:
        """Freeze the codes where k-means ends, and let the matrix be the identity."""
        centroids = fit_centroids(z.cpu().numpy(), self.codebook_size, seed)
        self.vq.frozen_codebook.copy_(torch.from_numpy(centroids))
        nn.init.eye_(self.vq.code_transform.weight)


class _ProjectedQuantizer(_LibraryQuantizer):
    """A module with a fixed codebook (V, L), between two learnt projections C -> L and L -> C unless C = L."""

    def _codebook(self) -> Tensor:
        """Return the codebook (V, L)."""
        raise NotImplementedError

    def _vectors(self, codes: Tensor) -> Tensor:
        vectors: Tensor = self.vq.project_out(nn.functional.embedding(codes, self._codebook()).to(self._dtype))
        return vectors

    def _place(self, z: Tensor, seed: int) -> None:
        """Project onto the leading principal components, each of variance 1, and back by least squares.

        There is no codebook to place; without projections nothing is changed.
        """
        if not self.vq.has_projections:
            return
        into, out = self.vq.project_in, self.vq.project_out
        mean = z.mean(0)
        variances, directions = torch.linalg.eigh((z - mean).T @ (z - mean) / len(z))  # ascending
        # An eigenvector's sign is the library's choice: the largest of its values shall be positive everywhere.
        directions = directions * directions.gather(0, directions.abs().argmax(0, keepdim=True)).sign()
        count = min(into.weight.shape)
        weight = (directions / variances.clamp(min=1e-12).sqrt()).T.flip(0)[:count]
        into.weight[:count], into.bias[:count] = weight, -weight @ mean
        # Normal equations: L + 1 unknowns, however many frames.
        known = nn.functional.pad(nn.functional.embedding(self._codes(z), self._codebook()).to(z), (0, 1), value=1)
        found = torch.linalg.pinv(known.T @ known, hermitian=True) @ (known.T @ z)
        out.weight.copy_(found[:-1].T)
        out.bias.copy_(found[-1])


class FSQQuantizer(_ProjectedQuantizer):
    """Finite scalar quantization: dimensions are rounded to a few levels (Mentzer et al. 2023, arXiv 2309.15505).

    There is no codebook to learn, no code that dies, and no loss: V is the product of the levels.
    """

    kind = "fsq"

    def __init__(self, dim: int, levels: Sequence[int] = (8, 5, 5, 5)):
        """Project to as many dimensions as there are levels, unless C is their number.

        Args:
            dim: C.
            levels: of each of the L dimensions.

        Raises:
            RepCodecError: the package is not installed.
            ValueError: no level, or one below 3, or more than 2^24 codes.
        """
        super().__init__()
        levels = list(levels)
        whole = 0 < len(levels) < 24 and all(type(level) is int and level >= 3 for level in levels)
        if not whole or prod(levels) > 2**24:
            raise ValueError(f"levels={levels}: expected whole numbers from 3 up, of a product up to 2^24")
        self.dim, self.codebook_size, self.levels = dim, prod(levels), levels
        self.vq = _package().FSQ(levels, dim=dim)

    def config(self) -> dict[str, Any]:
        """Return the arguments that make this quantizer again."""
        return {"levels": self.levels}

    def _codebook(self) -> Tensor:
        codebook: Tensor = self.vq.implicit_codebook
        return codebook

    def _codes(self, rows: Tensor) -> Tensor:
        return self._quantize(rows)[1]

    def _quantize(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        vectors, codes = self.vq(rows[None])
        # What is not a number has a code too, so that the vectors tell of it.
        return vectors[0], codes[0].long().clamp(0, self.codebook_size - 1), rows[:0].sum()


class LFQQuantizer(_ProjectedQuantizer):
    """Lookup-free quantization: the signs of log2 V dimensions (Yu et al. 2023, arXiv 2310.05737).

    The loss asks that a frame be sure of its code and that all codes be used alike, by entropies, and that the
    projected vectors stay near their signs. The entropy over all codes is that of the frames of all ranks: the
    package's own one leaves the other ranks' frames out, so the projected vectors are quantized here.
    """

    kind = "lfq"
    INVERSE_TEMPERATURE = 100.0
    """Of the softmax over codes, as published."""

    def __init__(
        self, dim: int, codebook_size: int = 1024, entropy_weight: float = 0.1, commitment_weight: float = 0.25
    ):
        """Project to log2 V dimensions, unless C is their number.

        Args:
            dim: C.
            codebook_size: V, a power of two.
            entropy_weight, commitment_weight: of the two parts of the loss, as published.

        Raises:
            RepCodecError: the package is not installed.
            ValueError: an argument outside its range.
        """
        super().__init__()
        check_size(dim, codebook_size)
        if not 2 <= codebook_size <= 2**20 or codebook_size & (codebook_size - 1):
            raise ValueError(
                f"codebook_size={codebook_size}: expected a power of two up to 2^20 for lookup-free quantization"
            )
        if entropy_weight < 0 or commitment_weight < 0:
            raise ValueError("expected entropy_weight >= 0 and commitment_weight >= 0")
        self.dim, self.codebook_size = dim, codebook_size
        self.entropy_weight, self.commitment_weight = entropy_weight, commitment_weight
        self.vq = _package().LFQ(dim=dim, codebook_size=codebook_size)
        # Follows from V, and codecs on disk hold weights alone.
        self.vq.register_buffer("mask", self.vq.mask, persistent=False)

    def config(self) -> dict[str, Any]:
        """Return the arguments that make this quantizer again."""
        return {
            "codebook_size": self.codebook_size,
            "entropy_weight": self.entropy_weight,
            "commitment_weight": self.commitment_weight,
        }

    def _codebook(self) -> Tensor:
        codebook: Tensor = self.vq.codebook
        return codebook

    def _codes(self, rows: Tensor) -> Tensor:
        codes: Tensor = (self.vq.project_in(rows).gt(0) * self.vq.mask).sum(-1)
        return codes

    def _quantize(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        projected, codes = self.vq.project_in(rows), self._codes(rows)
        signs = nn.functional.embedding(codes, self._codebook()).to(projected)
        loss = self.commitment_weight * nn.functional.mse_loss(projected, signs)
        if self.training:
            loss = loss + self.entropy_weight * self._entropy_loss(projected)
        return self.vq.project_out(projected + (signs - projected).detach()), codes, loss

    def _entropy_loss(self, projected: Tensor) -> Tensor:
        """Return the mean entropy of a frame's codes, less the entropy of the codes of all frames on all ranks.

        Its gradient is such that the ranks' gradients, weighted by their shares of the frames, add up to that of all
        frames on one rank.
        """
        # |x - c|^2 less what is the same for every code.
        logits = 2 * self.INVERSE_TEMPERATURE * projected @ self._codebook().to(projected).T
        choice = Categorical(logits=logits, validate_args=False)
        mean = choice.probs.sum(0) / max(1, len(projected))
        total = sum_over_ranks(torch.cat([choice.probs.detach().sum(0), mean.new_full((1,), len(projected))]))
        mean = mean + (total[:-1] / total[-1].clamp(min=1) - mean).detach()
        used = Categorical(probs=mean, validate_args=False).entropy()
        loss: Tensor = choice.entropy().sum() / max(1, len(projected)) - used
        return loss


QUANTIZERS: dict[str, type[Quantizer]] = {
    quantizer.kind: quantizer
    for quantizer in (EMAQuantizer, RotationQuantizer, SimVQQuantizer, FSQQuantizer, LFQQuantizer)
}
"""The quantizers that a saved codec may name in its config.json."""
