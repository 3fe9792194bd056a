"""A faster convolution along time behind `nn.Conv1d`'s face, for inference in float32 on a CPU."""

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
        if not self._is_fast(input):
            return super().forward(input)
        frames = input[0].mT.contiguous()
        if self.kernel_size == (1,):
            return nn.functional.linear(frames, self.weight[..., 0], self.bias).mT[None]
        return winograd(frames, self.weight, self.bias).mT[None]

    def _is_fast(self, x: Tensor) -> bool:
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
    num_tiles = -(-len(frames) // TILE)
    # Not kept: transforming the weights takes a twentieth of the time, keeping them twice and a half their memory.
    weights = torch.matmul(_WEIGHTS, weight.mT).permute(1, 2, 0)  # (8, C, C')
    out = frames.new_empty(num_tiles, TILE, len(weight))
    for first in range(0, num_tiles, BLOCK):
        tiles = out[first : first + BLOCK]
        rows = frames[max(0, TILE * first - 1) : TILE * (first + len(tiles)) + 1]
        before = int(first == 0)
        rows = nn.functional.pad(rows, (0, 0, before, TILE * len(tiles) + 2 - len(rows) - before))
        inputs = torch.matmul(_INPUTS, rows.unfold(0, TILE + 2, TILE).mT)  # (tiles, 8, C)
        products = torch.bmm(inputs.transpose(0, 1), weights)  # (8, tiles, C')
        torch.bmm(_OUTPUTS.expand(len(tiles), -1, -1), products.transpose(0, 1), out=tiles)
        if bias is not None:
            tiles += bias
    return out.flatten(0, 1)[: len(frames)]
