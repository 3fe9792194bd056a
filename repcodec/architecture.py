"""The shape of a codec, as plain numbers: its options, how frames become codes, and how far a code looks.

Imports nothing heavy, so that `repcodec info` describes a saved codec without loading it.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from math import ceil, prod
from typing import Any

MOST_REACH = 100_000
"""Frames that a code may look away at most, half an hour; a damaged config.json may say anything."""

MOST_WIDTH, MOST_UNITS = 2**20, 1000
"""The largest number of an option, and the most residual units of a stack, for the same reason."""

FRAME_RATE = 50.0
"""Frames per second where nothing says how many: those of every speech encoder here."""


@dataclass(frozen=True)
class Architecture:
    """The options that shape a codec's stacks, under their published names; config.json stores them all.

    Attributes:
        dim: D; every width that is not given is D.
        input_channels, output_channels: feature width in and out.
        encode_channels, decode_channels: C of the encoder stack and of the decoder stack.
        code_dim: width of a code vector.
        bias: whether the stages' convolutions have one.
        enc_ratios, dec_ratios: widths of the stages, in multiples of C.
        enc_strides, dec_strides: of the stages; both have the same product.
        enc_kernel_size: of the encoder's first convolution; dec_kernel_size: of the decoder's first and last.
        enc_block_dilations, dec_block_dilations: one residual unit of a stage each.
        enc_block_kernel_size, dec_block_kernel_size: of the residual units.
        pad_to_stride: fill an utterance up with zero frames to a multiple of the total stride, so that no frame is
            without a code. False in codecs converted from the published format, where a rest at the end has none.

    Raises:
        ValueError: lists of different lengths, unequal total strides, an even kernel, a number below 1, or a code that
            looks too far.
    """

    dim: int
    input_channels: int = 0
    output_channels: int = 0
    encode_channels: int = 0
    decode_channels: int = 0
    code_dim: int = 0
    bias: bool = True
    enc_ratios: Sequence[int] = (1, 1)
    dec_ratios: Sequence[int] = (1, 1)
    enc_strides: Sequence[int] = (1, 1)
    dec_strides: Sequence[int] = (1, 1)
    enc_kernel_size: int = 3
    dec_kernel_size: int = 3
    enc_block_dilations: Sequence[int] = (1, 1)
    enc_block_kernel_size: int = 3
    dec_block_dilations: Sequence[int] = (1, 1)
    dec_block_kernel_size: int = 3
    pad_to_stride: bool = True

    def __post_init__(self) -> None:
        for name in ("input_channels", "output_channels", "encode_channels", "decode_channels", "code_dim"):
            object.__setattr__(self, name, getattr(self, name) or self.dim)
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool):
                continue
            if not isinstance(value, int):
                value = tuple(value)
                object.__setattr__(self, field.name, value)
            numbers = value if isinstance(value, tuple) else (value,)
            if len(numbers) > MOST_UNITS:
                raise ValueError(f"{field.name}: a list of {len(numbers)}, expected at most {MOST_UNITS}")
            if not all(isinstance(number, int) and 1 <= number <= MOST_WIDTH for number in numbers):
                raise ValueError(f"{field.name}={value}: expected whole numbers from 1 to {MOST_WIDTH}")
            if field.name.endswith("kernel_size") and value % 2 == 0:
                raise ValueError(f"kernel size {value}: expected an odd one, which keeps the number of frames")
        if len(self.enc_ratios) != len(self.enc_strides) or len(self.dec_ratios) != len(self.dec_strides):
            raise ValueError("expected as many ratios as strides, in the encoder and in the decoder")
        if max(
            len(self.enc_strides) * len(self.enc_block_dilations), len(self.dec_strides) * len(self.dec_block_dilations)
        ) > MOST_UNITS:  # fmt: skip
            raise ValueError(f"a stack of more than {MOST_UNITS} residual units")
        if self.stride != prod(self.dec_strides):
            raise ValueError(
                f"enc_strides {self.enc_strides} and dec_strides {self.dec_strides} must have the same product"
            )
        if max(*self.reach, self.decoder_reach * self.stride) > MOST_REACH:
            raise ValueError(f"kernel sizes, dilations and strides make a code look more than {MOST_REACH} frames away")

    def options(self) -> dict[str, Any]:
        """Return all options as plain values, for config.json."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @property
    def stride(self) -> int:
        """Frames a code."""
        return prod(self.enc_strides)

    def num_codes(self, num_frames: int) -> int:
        """Return how many codes an utterance of T frames has."""
        if self.pad_to_stride:
            return -(-num_frames // self.stride)
        for stride in self.enc_strides:
            if stride > 1:
                num_frames = max(0, (num_frames - 2) // stride + 1)
        return num_frames

    @property
    def reach(self) -> tuple[int, int]:
        """How many frames before its own and after its own a code depends on; its own are `stride` frames."""
        before = after = self.enc_kernel_size // 2
        rate = 1  # frames a position, at the depth reached
        for stride in self.enc_strides:
            units = sum(self.enc_block_kernel_size // 2 * dilation for dilation in self.enc_block_dilations) * rate
            # A strided convolution has 2 * stride weights, of which stride - 1 lie before its own frames.
            before += units + (stride - 1 if stride > 1 else 1) * rate
            after += units + stride * rate
            rate *= stride
        return before + rate, after + rate - (self.stride - 1)  # the projector's

    @property
    def decoder_reach(self) -> int:
        """How many codes before and after its own the frames of a code depend on, at most."""
        rate, total = 1, float(self.dec_kernel_size // 2)  # the input convolution's
        for stride in self.dec_strides:
            total += 1 / rate
            rate *= stride
            total += sum(self.dec_block_kernel_size // 2 * dilation for dilation in self.dec_block_dilations) / rate
        return ceil(total + self.dec_kernel_size // 2 / rate)

    @property
    def gap(self) -> int:
        """How many zeros, at every depth, keep utterances that lie end to end from seeing each other."""
        units = [self.enc_block_kernel_size // 2 * dilation for dilation in self.enc_block_dilations]
        units += [self.dec_block_kernel_size // 2 * dilation for dilation in self.dec_block_dilations]
        return max(self.enc_kernel_size // 2, self.dec_kernel_size // 2, *units, *self.enc_strides, *self.dec_strides)
