"""Convolution stacks: features -> code vectors, and back.

Axes: B batch, C channels, T frames. Inside this file tensors are (B, C, T); the faces of the stacks
take and give (B, T, C), as everywhere else.

Padding changes nothing: `lengths` (B,) says how many frames of each row are valid, and frames beyond
are zero before every convolution, just as the convolution's own zero padding. Biases make them nonzero
after every stage, so they are zeroed again.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def frame_mask(lengths: Tensor, num_frames: int) -> Tensor:
    """Return (B, T) bool: True where a frame is valid."""
    return torch.arange(num_frames, device=lengths.device) < lengths[:, None]


def masked(x: Tensor, lengths: Tensor | None) -> Tensor:
    """Zero the frames of x (B, C, T) beyond `lengths`; None says that all are valid."""
    if lengths is None:
        return x
    # Filled, not multiplied: what stands in the padding may be NaN.
    return x.masked_fill(~frame_mask(lengths, x.shape[-1])[:, None], 0)


def _same_conv(
    channels_in: int, channels_out: int, kernel_size: int, dilation: int = 1, bias: bool = False
) -> nn.Conv1d:
    """Return a convolution with zero padding that keeps T.

    Raises:
        ValueError: an even kernel, which cannot keep T with the same padding on both sides.
    """
    if kernel_size % 2 == 0:
        raise ValueError(f"kernel size {kernel_size}: expected an odd one, which keeps the number of frames")
    padding = (kernel_size - 1) // 2 * dilation
    return nn.Conv1d(channels_in, channels_out, kernel_size, padding=padding, dilation=dilation, bias=bias)


class ResidualUnit(nn.Module):
    """x + conv1x1(ELU(conv(ELU(x)))), without biases."""

    def __init__(self, channels: int, kernel_size: int, dilation: int):
        super().__init__()
        self.conv = _same_conv(channels, channels, kernel_size, dilation)
        self.pointwise = nn.Conv1d(channels, channels, 1, bias=False)

    def forward(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        """(B, C, T), zero beyond `lengths` -> the same."""
        # ELU(0) = 0, so what goes into the convolution is zero beyond the lengths too.
        branch = self.pointwise(nn.functional.elu(self.conv(nn.functional.elu(x))))
        return masked(x + branch, lengths)


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

    def forward(self, x: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(B, C, T) and lengths -> (B, C', T / stride) and lengths / stride; T is a multiple of the stride."""
        for residual in self.residuals:
            x = residual(x, lengths)
        lengths = None if lengths is None else lengths // self.stride
        return masked(self.conv(x), lengths), lengths


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

    def forward(self, x: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(B, C, T) and lengths -> (B, C', T * stride) and lengths * stride."""
        lengths = None if lengths is None else lengths * self.stride
        x = masked(self.conv(x), lengths)
        for residual in self.residuals:
            x = residual(x, lengths)
        return x, lengths


class EncoderStack(nn.Module):
    """Input convolution, stages, projector: features -> vectors to quantize."""

    def __init__(
        self,
        channels_in: int,
        channels: int,
        channels_out: int,
        *,
        ratios: Sequence[int],
        strides: Sequence[int],
        kernel_size: int,
        dilations: Sequence[int],
        block_kernel_size: int,
        bias: bool,
    ):
        """Stage i goes to `channels * ratios[i]`; the projector goes from the last one to `channels_out`."""
        super().__init__()
        widths = [channels] + [channels * ratio for ratio in ratios]
        self.input = _same_conv(channels_in, channels, kernel_size)
        self.stages = nn.ModuleList(
            EncoderStage(widths[i], widths[i + 1], stride, dilations, block_kernel_size, bias)
            for i, stride in enumerate(strides)
        )
        self.projector = _same_conv(widths[-1], channels_out, 3)

    def forward(self, x: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(B, T, D), T and lengths multiples of the total stride -> (B, T / stride, code width) and its lengths."""
        x = masked(self.input(masked(x.mT, lengths)), lengths)
        for stage in self.stages:
            x, lengths = stage(x, lengths)
        return self.projector(x).mT, lengths


class DecoderStack(nn.Module):
    """Input convolution, stages, output convolution: quantized vectors -> features."""

    def __init__(
        self,
        channels_in: int,
        channels: int,
        channels_out: int,
        *,
        ratios: Sequence[int],
        strides: Sequence[int],
        kernel_size: int,
        dilations: Sequence[int],
        block_kernel_size: int,
        bias: bool,
    ):
        """The stages start at `channels * ratios[0]`; stage i goes to `channels * ratios[i + 1]`, the last to C."""
        super().__init__()
        widths = [channels * ratio for ratio in ratios] + [channels]
        self.input = _same_conv(channels_in, widths[0], 3)
        self.stages = nn.ModuleList(
            DecoderStage(widths[i], widths[i + 1], stride, dilations, block_kernel_size, bias)
            for i, stride in enumerate(strides)
        )
        self.output = _same_conv(channels, channels_out, kernel_size)

    def forward(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        """(B, T, code width) and lengths -> (B, T * stride, D), zero beyond the lengths."""
        x = masked(self.input(masked(x.mT, lengths)), lengths)
        for stage in self.stages:
            x, lengths = stage(x, lengths)
        return masked(self.output(x), lengths).mT


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
