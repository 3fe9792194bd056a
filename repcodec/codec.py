"""RepCodec: speech features -> codes -> speech features.

Axes: B batch, T frames, D feature width, K codebooks, V codes a codebook. Features are (B, T, D),
codes (B, K, T / stride).

Source: RepCodec: A Speech Representation Codec for Speech Tokenization (Huang et al., 2023).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor, nn

from repcodec.checkpoint import load_tensors, read_config, save_folder
from repcodec.errors import RepCodecError
from repcodec.quantizers import QUANTIZERS, EMAQuantizer, Quantizer, QuantizerOutput
from repcodec.stacks import DecoderStack, EncoderStack, frame_mask, start_as_identity

ARCHITECTURE = (
    *("dim", "input_channels", "output_channels", "encode_channels", "decode_channels", "code_dim", "bias"),
    *("enc_ratios", "dec_ratios", "enc_strides", "dec_strides", "enc_kernel_size", "dec_kernel_size"),
    *("enc_block_dilations", "enc_block_kernel_size", "dec_block_dilations", "dec_block_kernel_size"),
)
"""The published names of the options that shape the stacks; config.json holds them, and the quantizer's."""


@dataclass
class CodecOutput:
    """What the codec makes of a batch.

    Attributes:
        reconstruction: (B, T, D) features, zero beyond the lengths.
        quantizer: codes (B, K, T / stride), quantized vectors and commitment loss.
        code_mask: (B, T / stride) bool, True where there is a code.
    """

    reconstruction: Tensor
    quantizer: QuantizerOutput
    code_mask: Tensor


class RepCodec(nn.Module):
    """Encoder stack, projector, quantizer, decoder stack.

    Features are shifted by `feature_mean` and divided by `feature_scale` before the encoder, and
    brought back after the decoder; as published, these are 0 and 1.

    Attributes:
        dim: D.
        stride: frames a code.
        quantizer: see `repcodec.quantizers.Quantizer`.
        feature_mean: (D,) buffer.
        feature_scale: scalar buffer.
    """

    feature_mean: Tensor
    feature_scale: Tensor

    def __init__(
        self,
        dim: int,
        *,
        input_channels: int | None = None,
        output_channels: int | None = None,
        encode_channels: int | None = None,
        decode_channels: int | None = None,
        code_dim: int | None = None,
        codebook_num: int = 1,
        codebook_size: int = 1024,
        bias: bool = True,
        enc_ratios: Sequence[int] = (1, 1),
        dec_ratios: Sequence[int] = (1, 1),
        enc_strides: Sequence[int] = (1, 1),
        dec_strides: Sequence[int] = (1, 1),
        enc_kernel_size: int = 3,
        dec_kernel_size: int = 3,
        enc_block_dilations: Sequence[int] = (1, 1),
        enc_block_kernel_size: int = 3,
        dec_block_dilations: Sequence[int] = (1, 1),
        dec_block_kernel_size: int = 3,
        quantizer: Quantizer | None = None,
    ):
        """Build a codec; `RepCodec(dim)` is the published architecture.

        Args:
            dim: D; every width that is not given is D.
            input_channels, output_channels: feature width in and out.
            encode_channels, decode_channels: C of the encoder stack and of the decoder stack.
            code_dim: width of a code vector.
            codebook_num, codebook_size: K and V of the published quantizer, used when no `quantizer` is given.
            bias: whether the stages' convolutions have one.
            enc_ratios, dec_ratios: widths of the stages, in multiples of C.
            enc_strides, dec_strides: of the stages; both have the same product.
            enc_kernel_size: of the first convolution; dec_kernel_size: of the last.
            enc_block_dilations, dec_block_dilations: one residual unit of a stage each.
            enc_block_kernel_size, dec_block_kernel_size: of the residual units.
            quantizer: another quantizer, of width `code_dim`.

        Raises:
            ValueError: lists of different lengths, unequal total strides, or a quantizer of another width.
        """
        super().__init__()
        input_channels, output_channels = input_channels or dim, output_channels or dim
        encode_channels, decode_channels = encode_channels or dim, decode_channels or dim
        code_dim = code_dim or dim
        if len(enc_ratios) != len(enc_strides) or len(dec_ratios) != len(dec_strides):
            raise ValueError("expected as many ratios as strides, in the encoder and in the decoder")
        if prod(enc_strides) != prod(dec_strides):
            raise ValueError(f"enc_strides {enc_strides} and dec_strides {dec_strides} must have the same product")
        if quantizer is None:
            quantizer = EMAQuantizer(code_dim, codebook_size, codebook_num)
        if quantizer.dim != code_dim:
            raise ValueError(f"the quantizer has width {quantizer.dim}, code_dim is {code_dim}")
        self.dim = dim
        self.stride = prod(enc_strides)
        self.quantizer = quantizer
        self.architecture = {
            "dim": dim,
            "input_channels": input_channels,
            "output_channels": output_channels,
            "encode_channels": encode_channels,
            "decode_channels": decode_channels,
            "code_dim": code_dim,
            "bias": bias,
            "enc_ratios": list(enc_ratios),
            "dec_ratios": list(dec_ratios),
            "enc_strides": list(enc_strides),
            "dec_strides": list(dec_strides),
            "enc_kernel_size": enc_kernel_size,
            "dec_kernel_size": dec_kernel_size,
            "enc_block_dilations": list(enc_block_dilations),
            "enc_block_kernel_size": enc_block_kernel_size,
            "dec_block_dilations": list(dec_block_dilations),
            "dec_block_kernel_size": dec_block_kernel_size,
        }
        self.encoder = EncoderStack(
            input_channels,
            encode_channels,
            code_dim,
            ratios=enc_ratios,
            strides=enc_strides,
            kernel_size=enc_kernel_size,
            dilations=enc_block_dilations,
            block_kernel_size=enc_block_kernel_size,
            bias=bias,
        )
        self.decoder = DecoderStack(
            code_dim,
            decode_channels,
            output_channels,
            ratios=dec_ratios,
            strides=dec_strides,
            kernel_size=dec_kernel_size,
            dilations=dec_block_dilations,
            block_kernel_size=dec_block_kernel_size,
            bias=bias,
        )
        self.register_buffer("feature_mean", torch.zeros(input_channels))
        self.register_buffer("feature_scale", torch.ones(()))

    @property
    def codebook_size(self) -> int:
        """V."""
        return self.quantizer.codebook_size

    @property
    def num_codebooks(self) -> int:
        """K."""
        return self.quantizer.num_codebooks

    def start_as_identity(self) -> None:
        """Set the weights so that the codec hands features to the quantizer, and vectors back, unchanged."""
        start_as_identity(self.encoder)
        start_as_identity(self.decoder)

    def save_pretrained(self, folder: Path | str, about: dict | None = None) -> None:
        """Save the codec: config.json and model.safetensors.

        Args:
            folder: made when missing.
            about: what config.json says besides the architecture: speech encoder, layer, frame rate …

        Raises:
            RepCodecError: the folder cannot be written.
        """
        quantizer = {"kind": self.quantizer.kind, **self.quantizer.config()}
        published = {"codebook_num": self.num_codebooks, "codebook_size": self.codebook_size}
        config = {"kind": "repcodec", **self.architecture, **published, "quantizer": quantizer, **(about or {})}
        save_folder(folder, config, self.state_dict())

    @classmethod
    def from_pretrained(cls, folder: Path | str) -> "RepCodec":
        """Load a saved codec, in evaluation mode.

        Raises:
            RepCodecError: the folder holds no codec, or a damaged one.
        """
        config = read_config(folder)
        if config["kind"] != "repcodec":
            raise RepCodecError(f"{folder} holds a {config['kind']}, expected a repcodec.")
        try:
            options = {name: config[name] for name in ARCHITECTURE}
            arguments = dict(config["quantizer"])
            quantizer = QUANTIZERS[arguments.pop("kind")](config["code_dim"], **arguments)
            codec = cls(**options, quantizer=quantizer)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise RepCodecError(
                f"{folder}/config.json: describes no codec this version can build ({error})."
            ) from error
        load_tensors(folder, codec)
        return codec.eval()

    def normalize(self, features: Tensor) -> Tensor:
        """Features (…, D) as the stacks see them."""
        return (features - self.feature_mean) / self.feature_scale

    def forward(self, features: Tensor, lengths: Tensor | None = None) -> CodecOutput:
        """Code and decode (B, T, D), of which `lengths` (B,) frames are valid; None: all of them."""
        z, mask, padded = self._vectors(features, lengths)
        quantized = self.quantizer(z, mask)
        return CodecOutput(self._features(quantized.quantized, padded, lengths, features.shape[1]), quantized, mask)

    @torch.no_grad()
    def encode(self, features: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Features (B, T, D), of which `lengths` (B,) are valid -> codes (B, K, ceil(T / stride)).

        Beyond an utterance's last code stands `repcodec.quantizers.NO_CODE`.
        """
        z, mask, _ = self._vectors(features, lengths)
        return self.quantizer.encode(z, mask)

    @torch.no_grad()
    def decode(self, codes: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Codes (B, K, N) -> features (B, N * stride, D).

        Args:
            codes: `NO_CODE` beyond an utterance's last code.
            lengths: (B,) frames of each row that are valid, zeros beyond; without it every code gives `stride` frames.
        """
        valid = (codes[:, 0] >= 0).sum(1)
        padded = None if (valid == codes.shape[-1]).all() else valid
        num_frames = codes.shape[-1] * self.stride
        return self._features(self.quantizer.decode(codes), padded, lengths, num_frames)

    def vectors(self, features: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Return what the quantizer would see of a batch: its valid vectors (N, C)."""
        z, mask, _ = self._vectors(features, lengths)
        return z[mask]

    def _vectors(self, features: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Features -> vectors (B, N, C), where they are valid (B, N), and how many are (B,), None for all.

        Frames are filled up with zeros to a multiple of the total stride, each row to its own.
        """
        if features.ndim != 3 or features.shape[-1] != len(self.feature_mean):
            raise RepCodecError(
                f"the codec takes features of width {len(self.feature_mean)}, (B, T, D), but got shape "
                f"{tuple(features.shape)}; choose the speech encoder it was trained with."
            )
        batch, num_frames, _ = features.shape
        x = self.normalize(features)
        if lengths is not None and bool((lengths == num_frames).all()):
            lengths = None
        if short := -num_frames % self.stride:
            if lengths is None:
                lengths = torch.full((batch,), num_frames, device=features.device)
            x = nn.functional.pad(x, (0, 0, 0, short))
        if lengths is not None:
            x = x.masked_fill(~frame_mask(lengths, x.shape[1])[..., None], 0)
            lengths = (lengths + self.stride - 1) // self.stride * self.stride
        z, counts = self.encoder(x, lengths)
        if counts is None:
            return z, torch.ones(z.shape[:2], dtype=torch.bool, device=z.device), None
        return z, frame_mask(counts, z.shape[1]), counts

    def _features(self, vectors: Tensor, counts: Tensor | None, lengths: Tensor | None, num_frames: int) -> Tensor:
        """Vectors (B, N, C), `counts` (B,) of them valid -> features (B, num_frames, D), zero beyond `lengths`."""
        features = self.decoder(vectors, counts)
        # A codec into features of another kind has no mean and scale of theirs to bring back.
        if features.shape[-1] == len(self.feature_mean):
            features = features * self.feature_scale + self.feature_mean
        features = features[:, :num_frames]
        if lengths is None and counts is not None:
            lengths = counts * self.stride
        if lengths is not None:
            features = features.masked_fill(~frame_mask(lengths, features.shape[1])[..., None], 0)
        return features
