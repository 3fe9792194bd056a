"""A faster convolution along time behind `nn.Conv1d`'s face, for inference in float32 on a CPU."""

import ctypes
import mmap
import sys
import threading
from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

TILE = 6
"""Outputs of a tile. Utterances that start at a multiple of it are computed alike wherever they lie."""

MIN_CHANNELS = 256
"""With fewer, what is done beside the matrix products outweighs the ones that are saved."""

MIN_FRAMES = 256
"""With fewer, transforming the weights costs more than it saves."""

# F(6, 3) of Lavin & Gray 2016 (https://arxiv.org/abs/1509.09308), interpolated at 0, 1, -1, 2, -2, 1/2, -1/2 and
# infinity: outputs = _OUTPUTS @ ((_WEIGHTS @ weights) * (_INPUTS @ inputs)).
_INPUTS = torch.tensor(
    [
        [1, 0, -21 / 4, 0, 21 / 4, 0, -1, 0],
        [0, 1, 1, -17 / 4, -17 / 4, 1, 1, 0],
        [0, -1, 1, 17 / 4, -17 / 4, -1, 1, 0],
        [0, 1 / 2, 1 / 4, -5 / 2, -5 / 4, 2, 1, 0],
        [0, -1 / 2, 1 / 4, 5 / 2, -5 / 4, -2, 1, 0],
        [0, 2, 4, -5 / 2, -5, 1 / 2, 1, 0],
        [0, -2, 4, 5 / 2, -5, -1 / 2, 1, 0],
        [0, -1, 0, 21 / 4, 0, -21 / 4, 0, 1],
    ]
)
_WEIGHTS = torch.tensor(
    [
        [1, 0, 0],
        [-2 / 9, -2 / 9, -2 / 9],
        [-2 / 9, 2 / 9, -2 / 9],
        [1 / 90, 1 / 45, 2 / 45],
        [1 / 90, -1 / 45, 2 / 45],
        [32 / 45, 16 / 45, 8 / 45],
        [32 / 45, -16 / 45, 8 / 45],
        [0, 0, 1],
    ]
)
_OUTPUTS = torch.tensor(
    [
        [1, 1, 1, 1, 1, 1, 1, 0],
        [0, 1, -1, 2, -2, 1 / 2, -1 / 2, 0],
        [0, 1, 1, 4, 4, 1 / 4, 1 / 4, 0],
        [0, 1, -1, 8, -8, 1 / 8, -1 / 8, 0],
        [0, 1, 1, 16, 16, 1 / 16, 1 / 16, 0],
        [0, 1, -1, 32, -32, 1 / 32, -1 / 32, 1],
    ]
)


class FrameConv(nn.Conv1d):
    """A convolution along time; where they are faster, matrix products take its place.

    Kernel 3 is computed by Winograd's F(6, 3): eight products make six outputs instead of eighteen. Kernel 1 is one
    product. Both differ from a direct convolution by rounding alone. Weights, names and gradients are `nn.Conv1d`'s.
    Transformed weights are kept until the weights change, in 8/3 of their memory.
    """

    _kept: tuple[Tensor, int, Tensor] | None = None

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, T) -> (B, C', T'); the fast ways are for B = 1, best where frames lie in memory as (T, C)."""
        if not self.is_fast(input):
            return super().forward(input)
        frames = input[0].mT.contiguous()
        if self.kernel_size == (1,):
            return nn.functional.linear(frames, self.weight[..., 0], self.bias).mT[None]
        return winograd(frames, self.transformed(), self.bias).mT[None]

    def is_fast(self, x: Tensor) -> bool:
        """Say whether a fast way exists for this convolution and wins on this input."""
        return (
            not torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
            and x.device.type == "cpu"
            and x.dtype == self.weight.dtype == torch.float32
            and not torch.is_autocast_enabled("cpu")
            and len(x) == 1
            and (self.stride, self.dilation, self.groups) == ((1,), (1,), 1)
            and (self.kernel_size, self.padding) in (((3,), (1,)), ((1,), (0,)))
            and min(self.in_channels, self.out_channels) >= MIN_CHANNELS
            and x.shape[-1] >= MIN_FRAMES
        )

    def transformed(self) -> Tensor:
        """Return the eight weights (8, C, C') of the kernel."""
        weight = self.weight
        if weight.is_inference():  # then nothing says whether they have changed
            return transformed(weight)
        with _TRANSFORMING:
            if self._kept is None or self._kept[0] is not weight or self._kept[1] != weight._version:
                self._kept = None  # not both at once
                self._kept = (weight, weight._version, transformed(weight))
                if getattr(weight, "mapped", False):
                    _let_go(weight)  # they are read no more, and lie in a file
            return self._kept[2]

    def train(self, mode: bool = True) -> "FrameConv":
        """Set the mode; what was kept goes."""
        self._kept = None
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FrameConv":
        self._kept = None  # the weights move under the same name
        apply: Callable[..., FrameConv] = super()._apply  # torch leaves it without annotations
        return apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and other processes transform for themselves."""
        return {name: value for name, value in self.__dict__.items() if name != "_kept"}


_TRANSFORMING = threading.Lock()
"""So that threads with the same codec do the work once."""


def winograd(frames: Tensor, weights: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve (T, C) frames with a transformed kernel of three (8, C, C'), zeros before and after; returns (T, C')."""
    out = frames.new_empty(-(-len(frames) // TILE), TILE, weights.shape[2])
    _convolve(_SPACE.seen(frames), weights, out)
    if bias is not None:
        out += bias
    return out.flatten(0, 1)[: len(frames)]


def add_residual(frames: Tensor, weights: Tensor, pointwise: Tensor) -> Tensor:
    """Add conv1x1(ELU(conv(ELU(frames)))), its kernel transformed, to (T, C) frames in place; returns them."""
    seen, elu = _SPACE.seen(frames), nn.functional.elu
    inner = seen[: len(seen) - 2].view(-1, TILE, seen.shape[1])  # once transformed, what was seen is not needed
    _convolve(elu(seen, inplace=True), weights, inner)
    inner = elu(inner.flatten(0, 1)[: len(frames)], inplace=True)
    return frames.addmm_(inner, pointwise[..., 0].mT)


def _convolve(seen: Tensor, weights: Tensor, out: Tensor) -> None:
    """Write the outputs (tiles, 6, C') of rows (6 tiles + 2, C); they may share memory."""
    tiles = seen.unfold(0, TILE + 2, TILE).mT  # (tiles, 8, C)
    inputs = _SPACE.take("inputs", *tiles.shape)
    torch.bmm(_INPUTS.expand(len(tiles), -1, -1), tiles, out=inputs)
    products = _SPACE.take("products", TILE + 2, len(tiles), weights.shape[2])
    torch.bmm(inputs.transpose(0, 1), weights, out=products)
    torch.bmm(_OUTPUTS.expand(len(tiles), -1, -1), products.transpose(0, 1), out=out)


def transformed(weight: Tensor) -> Tensor:
    """Return the eight weights (8, C, C') of a kernel (C', C, 3)."""
    channels_out, channels, size = weight.shape
    out = weight.new_empty(TILE + 2, channels_out, channels)
    torch.mm(_WEIGHTS, weight.detach().reshape(-1, size).mT, out=out.view(TILE + 2, -1))
    return out.mT


def _let_go(tensor: Tensor) -> None:
    """Hand a tensor's memory back to the system; if it is read again, the system reads it from its file."""
    if sys.platform == "linux":
        page, end = mmap.PAGESIZE, tensor.data_ptr() + tensor.nbytes
        first = -(-tensor.data_ptr() // page) * page
        # MADV_PAGEOUT, which loses nothing whatever the pages are; what a kernel makes of it is no matter.
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(max(0, end // page * page - first)), 21)


class _Space(threading.local):
    """Memory of each thread's own, taken once: large pieces that come and go leave holes."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def take(self, name: str, *shape: int) -> Tensor:
        """Return a tensor of that shape with anything in it, until the next call with that name."""
        size = prod(shape)
        if name not in self._held or len(self._held[name]) < size:
            self._held.pop(name, None)
            with torch.inference_mode(False):  # or it could be written to in that mode alone
                self._held[name] = torch.empty(size, dtype=torch.float32, device="cpu")
        return self._held[name][:size].view(shape)

    def seen(self, frames: Tensor) -> Tensor:
        """Return a copy of (T, C) frames, zeros before them and after, up to the end of the last tile's view."""
        rows = self.take("seen", -(-len(frames) // TILE) * TILE + 2, frames.shape[1])
        rows[0], rows[1 : 1 + len(frames)], rows[1 + len(frames) :] = 0, frames, 0
        return rows


_SPACE = _Space()
