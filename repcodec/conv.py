"""A faster convolution along time behind `nn.Conv1d`'s face, for inference in float32 on a CPU."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from itertools import pairwise
from queue import SimpleQueue
from threading import Barrier

import torch
from torch import Tensor, nn

TILE = 6
"""Outputs of a tile. Utterances that start at a multiple of it are computed alike wherever they lie."""

BLOCK = 256
"""Tiles computed at once: few enough for the cache, many enough for the matrix product."""

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
    """

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, T) -> (B, C', T'); the fast ways are for B = 1, best where frames lie in memory as (T, C)."""
        if not self.is_fast(input):
            return super().forward(input)
        frames = input[0].mT.contiguous()
        if self.kernel_size == (1,):
            return nn.functional.linear(frames, self.weight[..., 0], self.bias).mT[None]
        return winograd(frames, self.weight, self.bias).mT[None]

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


def winograd(frames: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve (T, C) frames with a kernel of three, (C', C, 3), zeros before and after; returns (T, C')."""
    weights, spaces = _transformed(weight), _Spaces(frames, weight)
    out = frames.new_empty(-(-len(frames) // TILE), TILE, len(weight))

    def block(first: int, stop: int) -> None:
        tiles = out[first:stop]
        with spaces.one() as space:
            space.convolve(space.seen(frames, first, stop), weights, tiles)
        if bias is not None:
            tiles += bias

    _side_by_side(block, len(out), BLOCK)
    return out.flatten(0, 1)[: len(frames)]


def residual_unit(frames: Tensor, weight: Tensor, pointwise: Tensor) -> Tensor:
    """(T, C) frames + conv1x1(ELU(conv(ELU(frames)))), block by block, so that what is between stays in the cache."""
    weights, spaces, elu = _transformed(weight), _Spaces(frames, weight), nn.functional.elu
    out = torch.empty_like(frames)

    def block(first: int, stop: int) -> None:
        rows = slice(TILE * first, TILE * stop)
        with spaces.one() as space:
            tiles = space.rows[: TILE * (stop - first)].view(-1, TILE, len(weight))  # once seen, they are not needed
            space.convolve(elu(space.seen(frames, first, stop), inplace=True), weights, tiles)
            inner = elu(tiles.flatten(0, 1)[: len(frames[rows])], inplace=True)
            torch.addmm(frames[rows], inner, pointwise[..., 0].mT, out=out[rows])

    _side_by_side(block, -(-len(frames) // TILE), BLOCK)
    return out


class _Space:
    """Memory for a block at a time, of one thread; taken once, as it is large."""

    def __init__(self, frames: Tensor, weight: Tensor, num_tiles: int):
        channels_out, channels, _ = weight.shape
        self.rows = frames.new_empty(num_tiles * TILE + 2, channels)
        self._inputs = frames.new_empty(num_tiles, TILE + 2, channels)
        self._products = frames.new_empty((TILE + 2) * num_tiles * channels_out)

    def seen(self, frames: Tensor, first: int, stop: int) -> Tensor:
        """Return a copy of the rows that the outputs of tiles `first` to `stop` see, zeros beyond the ends."""
        found = frames[max(0, TILE * first - 1) : TILE * stop + 1]
        rows = self.rows[: TILE * (stop - first) + 2]
        before = int(first == 0)
        rows[:before] = 0
        rows[before : before + len(found)] = found
        rows[before + len(found) :] = 0
        return rows

    def convolve(self, rows: Tensor, weights: Tensor, out: Tensor) -> None:
        """Write the outputs of tiles (tiles, 6, C'), of which `seen` returned the rows; they may share memory."""
        inputs = self._inputs[: len(out)]
        torch.bmm(_INPUTS.expand(len(out), -1, -1), rows.unfold(0, TILE + 2, TILE).mT, out=inputs)  # (tiles, 8, C)
        products = self._products[: (TILE + 2) * len(out) * out.shape[2]].view(TILE + 2, len(out), -1)
        torch.bmm(inputs.transpose(0, 1), weights, out=products)  # (8, tiles, C')
        torch.bmm(_OUTPUTS.expand(len(out), -1, -1), products.transpose(0, 1), out=out)


class _Spaces:
    """A space for each thread, made before they begin: threads' own memory would stay behind in pieces."""

    def __init__(self, frames: Tensor, weight: Tensor):
        self._free: SimpleQueue[_Space] = SimpleQueue()
        sizes = [stop - first for first, stop in pairwise(_cuts(-(-len(frames) // TILE), BLOCK))]
        for _ in range(min(torch.get_num_threads(), len(sizes))):
            self._free.put(_Space(frames, weight, max(sizes)))

    @contextmanager
    def one(self) -> Iterator[_Space]:
        """Lend a space to a thread."""
        space = self._free.get()
        try:
            yield space
        finally:
            self._free.put(space)


def _transformed(weight: Tensor) -> Tensor:
    """Return the eight weights (8, C, C') of a kernel (C', C, 3).

    They are not kept: that would take two and a half times the weights' memory, to save a twentieth of the time.
    """
    out = weight.new_empty(len(weight), TILE + 2, weight.shape[1])

    def block(first: int, stop: int) -> None:
        torch.bmm(_WEIGHTS.expand(stop - first, -1, -1), weight[first:stop].mT, out=out[first:stop])

    _side_by_side(block, len(weight), len(weight))
    return out.permute(1, 2, 0)


def _side_by_side(job: Callable[[int, int], None], count: int, block: int) -> None:
    """Call job(first, stop) for blocks of `count` things, of at most `block`, each thread with blocks of its own.

    So no thread waits for another one within a block, which is faster than all of them on every operation.
    """
    threads, cuts = torch.get_num_threads(), _cuts(count, block)

    def in_thread(first: int, stop: int) -> None:
        with torch.inference_mode():  # whether gradients are wanted is each thread's own
            job(first, stop)

    list((map if threads == 1 else _pool(threads).map)(in_thread, cuts[:-1], cuts[1:]))


def _cuts(count: int, block: int) -> list[int]:
    """Return where blocks of `count` things begin and end: as many for each thread, of at most `block`."""
    threads = torch.get_num_threads()
    num_blocks = min(count, -(-count // (block * threads)) * threads)
    return [count * i // num_blocks for i in range(num_blocks + 1)]


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Return as many threads, each of which computes alone."""
    pool, all_begun = ThreadPoolExecutor(threads), Barrier(threads)

    def begin(_: int) -> None:
        torch.set_num_threads(1)
        all_begun.wait()

    list(pool.map(begin, range(threads)))
    torch.set_num_threads(threads)  # the last call counts for threads that others begin
    return pool


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not live on in a forked process
