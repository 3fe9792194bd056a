"""Convolution stacks: features -> code vectors, and back.

Axes: B batch, C channels, T frames. Inside this file tensors are (B, C, T); the faces of the stacks
take and give (B, T, C), as everywhere else.

Padding changes nothing: `valid` (B, T) says which frames are, and the others are zero before every
convolution, just as the convolution's own zero padding. Biases make them nonzero after every stage, so they
are zeroed again. That serves both ways of running many utterances: one a row, padded to the longest (in
training), or all in one row end to end with a few zeros between them (`packed`, in inference).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from repcodec.architecture import Architecture
from repcodec.conv import TILE, FrameConv, add_residual


def frame_mask(lengths: Tensor, num_frames: int) -> Tensor:
    """Return (B, T) bool: True where a frame is valid."""
    return torch.arange(num_frames, device=lengths.device) < lengths[:, None]


def zeroed(x: Tensor, valid: Tensor | None) -> Tensor:
    """Zero the frames of x (B, C, T) where `valid` (B, T) is False, in place; None says that all are valid.

    In inference on a CPU few are touched where few frames are not valid.
    """
    if valid is None:
        return x
    if torch.is_grad_enabled() or x.device.type != "cpu" or torch.compiler.is_compiling():
        # Filled, not multiplied: what stands in the padding may be NaN.
        return x.masked_fill_(~valid[:, None], 0)
    x.mT[(~valid).nonzero(as_tuple=True)] = 0
    return x


def packed(pieces: Sequence[Tensor], gap: int, unit: int) -> tuple[Tensor, Tensor, list[int]]:
    """Lay pieces (T, C) end to end in one row, each at a multiple of `unit` tiles, `gap` zeros or more after it.

    Returns:
        The row (1, T', C), where it is valid (1, T'), and where each piece begins.
    """
    starts, end = [], 0
    for piece in pieces:
        starts.append(end)
        end += -(-(len(piece) + gap) // (TILE * unit)) * TILE * unit
    row = pieces[0].new_zeros(1, end, pieces[0].shape[1])
    valid = torch.zeros(1, end, dtype=torch.bool, device=row.device)
    for piece, start in zip(pieces, starts, strict=True):
        row[0, start : start + len(piece)] = piece
        valid[0, start : start + len(piece)] = True
    return row, valid, starts


def _same_conv(
    channels_in: int, channels_out: int, kernel_size: int, dilation: int = 1, bias: bool = False
) -> FrameConv:
    """Return a convolution with an odd kernel and the zero padding that keeps T."""
    padding = kernel_size // 2 * dilation
    return FrameConv(channels_in, channels_out, kernel_size, padding=padding, dilation=dilation, bias=bias)


class ResidualUnit(nn.Module):
    """x + conv1x1(ELU(conv(ELU(x)))), without biases."""

    def __init__(self, channels: int, kernel_size: int, dilation: int):
        super().__init__()
        self.conv = _same_conv(channels, channels, kernel_size, dilation)
        self.pointwise = _same_conv(channels, channels, 1)

    def forward(self, x: Tensor, valid: Tensor | None) -> Tensor:
        """(B, C, T), zero where it is not `valid` -> the same; in inference x itself may be changed."""
        if self.conv.is_fast(x) and self.pointwise.is_fast(x):
            return zeroed(
                add_residual(x[0].mT.contiguous(), self.conv.transformed(), self.pointwise.weight).mT[None], valid
            )
        # ELU(0) = 0, so what goes into the convolution is zero there too.
        # In place where no gradient needs what stood there: a convolution's does not need its output.
        inner = self.conv(nn.functional.elu(x))
        branch = self.pointwise(nn.functional.elu(inner, inplace=True))
        return zeroed(branch.add_(x), valid)


class EncoderStage(nn.Module):
    """Residual units, one a dilation, then a convolution that may divide the frame rate by `stride`."""

    def __init__(
        self, channels_in: int, channels_out: int, stride: int, dilations: Sequence[int], kernel_size: int, bias: bool
    ):
        super().__init__()
        self.stride = stride
        self.conv: nn.Conv1d
        self.residuals = nn.ModuleList(ResidualUnit(channels_in, kernel_size, d) for d in dilations)
        if stride == 1:
            self.conv = _same_conv(channels_in, channels_out, 3, bias=bias)
        else:
            self.conv = nn.Conv1d(
                channels_in, channels_out, 2 * stride, stride, padding=(2 * stride - 1) // 2, bias=bias
            )

    def forward(self, x: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(B, C, T) and where it is valid -> (B, C', T / stride) and the same; T is a multiple of the stride."""
        for residual in self.residuals:
            x = residual(x, valid)
        if valid is not None and self.stride > 1:
            # A position needs two frames of its own: n frames give (n - 2) // stride + 1, as published.
            valid = valid[:, 1 :: self.stride]
        return zeroed(self.conv(x), valid), valid


class DecoderStage(nn.Module):
    """A convolution that may multiply the frame rate by `stride`, then residual units."""

    def __init__(
        self, channels_in: int, channels_out: int, stride: int, dilations: Sequence[int], kernel_size: int, bias: bool
    ):
        super().__init__()
        self.stride = stride
        if stride == 1:
            self.conv: nn.Conv1d | nn.ConvTranspose1d = _same_conv(channels_in, channels_out, 3, bias=bias)
        else:
            self.conv = nn.ConvTranspose1d(
                channels_in,
                channels_out,
                2 * stride,
                stride,
                padding=(stride + 1) // 2,
                output_padding=stride % 2,
                bias=bias,
            )
        self.residuals = nn.ModuleList(ResidualUnit(channels_out, kernel_size, d) for d in dilations)

    def forward(self, x: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(B, C, T) and where it is valid -> (B, C', T * stride) and the same."""
        if valid is not None and self.stride > 1:
            valid = valid.repeat_interleave(self.stride, 1)
        x = zeroed(self.conv(x), valid)
        for residual in self.residuals:
            x = residual(x, valid)
        return x, valid


class EncoderStack(nn.Module):
    """Input convolution, stages, projector: features -> vectors to quantize."""

    def __init__(self, shape: Architecture):
        """Stage i goes to `encode_channels * enc_ratios[i]`; the projector goes from the last one to `code_dim`."""
        super().__init__()
        widths = [shape.encode_channels] + [shape.encode_channels * ratio for ratio in shape.enc_ratios]
        self.input = _same_conv(shape.input_channels, widths[0], shape.enc_kernel_size)
        self.stages = nn.ModuleList(
            EncoderStage(before, after, stride, shape.enc_block_dilations, shape.enc_block_kernel_size, shape.bias)
            for before, after, stride in zip(widths[:-1], widths[1:], shape.enc_strides, strict=True)
        )
        self.projector = _same_conv(widths[-1], shape.code_dim, 3)

    def forward(self, x: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(B, T, D), zero where it is not `valid` -> (B, T / stride, C) and the same; T a multiple of the stride."""
        x = zeroed(self.input(x.mT), valid)
        for stage in self.stages:
            x, valid = stage(x, valid)
        return self.projector(x).mT, valid


class DecoderStack(nn.Module):
    """Input convolution, stages, output convolution: quantized vectors -> features."""

    def __init__(self, shape: Architecture):
        """The stages start at `decode_channels * dec_ratios[0]`; stage i goes to the next ratio, the last to C."""
        super().__init__()
        widths = [shape.decode_channels * ratio for ratio in shape.dec_ratios] + [shape.decode_channels]
        self.input = _same_conv(shape.code_dim, widths[0], shape.dec_kernel_size)
        self.stages = nn.ModuleList(
            DecoderStage(before, after, stride, shape.dec_block_dilations, shape.dec_block_kernel_size, shape.bias)
            for before, after, stride in zip(widths[:-1], widths[1:], shape.dec_strides, strict=True)
        )
        self.output = _same_conv(widths[-1], shape.output_channels, shape.dec_kernel_size)

    def forward(self, x: Tensor, valid: Tensor | None) -> Tensor:
        """(B, N, C), zero where it is not `valid` -> (B, N * stride, D), the same."""
        x = zeroed(self.input(x.mT), valid)
        for stage in self.stages:
            x, valid = stage(x, valid)
        return zeroed(self.output(x), valid).mT


@torch.no_grad()
def start_as_identity(stack: EncoderStack | DecoderStack) -> None:
    """Set a stack's weights so that it hands its input on unchanged, as far as its widths allow.

    Convolutions become Dirac impulses (a strided one averages its stride's frames, a transposed one
    repeats), and the last convolution of every residual unit becomes zero. Training starts from there
    instead of from noise; the architecture is the same.
    """
    for module in stack.modules():
        if isinstance(module, ResidualUnit):
            module.pointwise.weight.zero_()
        elif isinstance(module, EncoderStage | DecoderStage):
            if module.conv.bias is not None:
                module.conv.bias.zero_()
            if module.stride > 1:
                _start_resampling(module.conv, module.stride)
            else:
                nn.init.dirac_(module.conv.weight)
    last = stack.projector if isinstance(stack, EncoderStack) else stack.output
    for conv in (stack.input, last):
        nn.init.dirac_(conv.weight)


def _start_resampling(conv: nn.Conv1d | nn.ConvTranspose1d, stride: int) -> None:
    """Let a strided convolution average the frames of its stride, a transposed one repeat each frame."""
    transposed = isinstance(conv, nn.ConvTranspose1d)
    eye = torch.eye(conv.weight.shape[0], conv.weight.shape[1]).to(conv.weight)
    # Output j of a strided convolution sees inputs from j * stride - padding on; input j of a transposed one
    # reaches outputs from j * stride - padding on. Frames j * stride and the next ones are its own.
    first = int(conv.padding[0])
    conv.weight.zero_()
    conv.weight[:, :, first : first + stride] = (eye if transposed else eye / stride)[:, :, None]
