"""RepCodec: speech features -> codes -> speech features.

Axes: B batch, T frames, D feature width, K codebooks, V codes a codebook. Features are (B, T, D),
codes (B, K, T / stride).

Source: RepCodec: A Speech Representation Codec for Speech Tokenization (Huang et al., 2023).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from repcodec.architecture import Architecture
from repcodec.checkpoint import fill, load_tensors, read_config, read_lightning, read_published, save_folder
from repcodec.errors import RepCodecError, first_line
from repcodec.hub import local_folder, push
from repcodec.library_quantizers import QUANTIZERS
from repcodec.packing import encode_packed
from repcodec.quantizers import NO_CODE, EMAQuantizer, Quantizer, QuantizerOutput, valid_rows
from repcodec.stacks import DecoderStack, EncoderStack, frame_mask, packed, start_as_identity

OPTIONS = [field.name for field in fields(Architecture)]


@dataclass
class CodecOutput:
    """What the codec makes of a batch.

    Attributes:
        reconstruction: (B, T, D) features, zero beyond the lengths.
        quantizer: codes (B, K, T / stride), quantized vectors and commitment loss.
    """

    reconstruction: Tensor
    quantizer: QuantizerOutput


class _Unset(TorchFunctionMode):
    """Draws no random numbers for weights that are about to be loaded; the meta device would load 80 MB of code."""

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (nn.init.kaiming_uniform_, Tensor.uniform_, Tensor.normal_):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


class RepCodec(nn.Module):
    """Encoder stack, projector, quantizer, decoder stack.

    Features are shifted by `feature_mean` and divided by `feature_scale` before the encoder, and
    brought back after the decoder; as published, these are 0 and 1.

    Attributes:
        dim, output_dim: D, width of the features in and out.
        architecture: the shape of the stacks.
        quantizer: see `repcodec.quantizers.Quantizer`.
        about: what config.json says besides: speech encoder, layer, frame rate …
        feature_mean: (D,) buffer.
        feature_scale: scalar buffer.
    """

    feature_mean: Tensor
    feature_scale: Tensor

    def __init__(
        self,
        dim: int,
        *,
        codebook_num: int = 1,
        codebook_size: int = 1024,
        quantizer: Quantizer | None = None,
        **options: int | bool | Sequence[int],
    ):
        """Build a codec; `RepCodec(dim)` is the published architecture.

        Args:
            dim: D; every width that is not given is D.
            codebook_num, codebook_size: K and V of the published quantizer, used when no `quantizer` is given.
            quantizer: another quantizer, of width `code_dim`.
            options: the published options, see `Architecture`.

        Raises:
            TypeError: there is no such option.
            ValueError: options that fit no codec, or a quantizer of another width.
        """
        super().__init__()
        shape = self.architecture = Architecture(dim, **options)  # type: ignore[arg-type]  # it checks them itself
        if quantizer is None:
            quantizer = EMAQuantizer(shape.code_dim, codebook_size, codebook_num)
        if quantizer.dim != shape.code_dim:
            raise ValueError(f"the quantizer has width {quantizer.dim}, code_dim is {shape.code_dim}")
        self.dim, self.output_dim, self.quantizer = shape.input_channels, shape.output_channels, quantizer
        self.about: dict[str, Any] = {}
        self.encoder, self.decoder = EncoderStack(shape), DecoderStack(shape)
        self.register_buffer("feature_mean", torch.zeros(shape.input_channels))
        self.register_buffer("feature_scale", torch.ones(()))

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return next(self.buffers()).device

    @property
    def stride(self) -> int:
        """Frames a code."""
        return self.architecture.stride

    @property
    def reach(self) -> tuple[int, int]:
        """Frames before its own and after its own that a code depends on."""
        return self.architecture.reach

    @property
    def decoder_reach(self) -> int:
        """Codes before and after its own that a code's frames depend on, at most."""
        return self.architecture.decoder_reach

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

    def config(self) -> dict[str, Any]:
        """Return what config.json says: the architecture, the quantizer and `about`, plain values."""
        quantizer = {"kind": self.quantizer.kind, **self.quantizer.config()}
        published = {"codebook_num": self.num_codebooks, "codebook_size": self.codebook_size}
        return {"kind": "repcodec", **self.architecture.options(), **published, "quantizer": quantizer, **self.about}

    def save_pretrained(self, folder: Path | str, about: dict[str, Any] | None = None) -> None:
        """Save the codec: config.json, model.safetensors and a model card.

        Args:
            folder: made when missing.
            about: what config.json shall say besides the architecture and `self.about`.

        Raises:
            RepCodecError: the folder cannot be written.
        """
        save_folder(folder, {**self.config(), **(about or {})}, self.state_dict())

    def push_to_hub(
        self, repo_id: str, *, private: bool = False, token: str | None = None, revision: str | None = None
    ) -> str:
        """Save the codec on the Hugging Face hub, for `from_pretrained`; return its address there.

        What `about` says of folders on this machine stays here.

        Args:
            repo_id: "user/name"; made when missing.
            private: whether a new one is private.
            token: with the right to write; None: that of `hf auth login` or HF_TOKEN.
            revision: the branch; None: main.

        Raises:
            RepCodecError: there is no token, or the hub cannot be reached or refuses.
        """
        return push(self.config(), self.state_dict(), repo_id, private=private, token=token, revision=revision)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "RepCodec":
        """Build a codec, without weights, from what `config` returned.

        Raises:
            KeyError, TypeError, ValueError: it describes none.
        """
        # Codecs saved before there was a choice were padded.
        options = {"pad_to_stride": True} | {name: config[name] for name in OPTIONS if name in config}
        arguments = dict(config["quantizer"])
        kind = QUANTIZERS[arguments.pop("kind")]
        with _Unset():
            codec = cls(**options, quantizer=kind(config["code_dim"], **arguments))
        described = {*OPTIONS, "kind", "quantizer", "codebook_num", "codebook_size", "weights_sha256"}
        codec.about = {key: value for key, value in config.items() if key not in described}
        return codec

    @classmethod
    def from_pretrained(cls, folder: Path | str, revision: str | None = None) -> "RepCodec":
        """Load a saved codec, in evaluation mode.

        Args:
            folder: a folder, or a hub id such as "user/codec".
            revision: branch, tag or commit on the hub.

        Raises:
            RepCodecError: the folder holds no codec, or a damaged one; or the hub cannot be reached.
        """
        folder = local_folder(folder, revision)
        config = read_config(folder)
        if config["kind"] != "repcodec":
            raise RepCodecError(f"{folder} holds a {config['kind']}, expected a repcodec.")
        codec = cls._described(config, folder / "config.json")
        load_tensors(folder, codec)
        return codec.eval()

    @classmethod
    def from_published(cls, path: Path | str, config: Path | str | dict[str, Any] | None = None) -> "RepCodec":
        """Load a codec in the published format, in evaluation mode; nothing in the file is run.

        Args:
            path: a .pkl file; its stem is one of `repcodec.checkpoint.PUBLISHED`, such as hubert_base_l9.pkl.
            config: the published training config (a YAML file, or the dict in it) of a codec with another name or
                another shape.

        Raises:
            RepCodecError: see `repcodec.checkpoint.read_published`.
        """
        described, tensors = read_published(path, config)
        codec = cls._described(described, path)
        fill(codec, tensors, path)
        return codec.eval()

    @classmethod
    def from_lightning(cls, path: Path | str) -> "RepCodec":
        """Load the codec of a Lightning checkpoint of train.py, in evaluation mode; nothing in the file is run.

        Raises:
            RepCodecError: see `repcodec.checkpoint.read_lightning`.
        """
        described, tensors = read_lightning(path)
        codec = cls._described(described, path)
        fill(codec, tensors, path)
        return codec.eval()

    @classmethod
    def _described(cls, config: dict[str, Any], source: Path | str) -> "RepCodec":
        """`from_config`, of what a user's file says.

        Raises:
            RepCodecError: it describes no codec; names `source`.
        """
        try:
            return cls.from_config(config)
        except (KeyError, TypeError, ValueError, RuntimeError, ArithmeticError, MemoryError) as error:
            said = first_line(error)[:300]
            raise RepCodecError(
                f"{source}: describes no codec this version can build ({said}); copy it again."
            ) from error

    def normalize(self, features: Tensor) -> Tensor:
        """Features (…, D) as the stacks see them."""
        return (features - self.feature_mean) / self.feature_scale

    def forward(self, features: Tensor, lengths: Tensor | None = None) -> CodecOutput:
        """Code and decode (B, T, D), of which `lengths` (B,) frames are valid; None: all of them."""
        if lengths is None and features.shape[1] % self.stride:  # not all frames are those of a whole code
            lengths = torch.full((len(features),), features.shape[1], device=features.device)
        z, valid = self._vectors(features, lengths)
        quantized = self.quantizer(z, valid)
        return CodecOutput(self._features(quantized.quantized, valid, lengths, features.shape[1]), quantized)

    @torch.no_grad()
    def encode(self, features: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Features (B, T, D), of which `lengths` (B,) are valid -> codes (B, K, ceil(T / stride)).

        Beyond an utterance's last code stands `NO_CODE`. No work goes into padding; see `encode_packed`.

        Raises:
            RepCodecError: features of another width or shape, or lengths that do not fit them.
        """
        self._check_width(features)
        counts = [features.shape[1]] * len(features) if lengths is None else torch.as_tensor(lengths).tolist()
        if len(counts) != len(features) or not all(0 <= count <= features.shape[1] for count in counts):
            raise RepCodecError(
                f"lengths {counts}: expected one for each of {len(features)} rows, 0 to {features.shape[1]}."
            )
        rows = encode_packed(self, (row[:count] for row, count in zip(features, counts, strict=True)))
        num_codes = self.architecture.num_codes(features.shape[1])
        codes = torch.full((len(features), num_codes, self.num_codebooks), NO_CODE, device=features.device)
        for b, row in enumerate(rows):
            codes[b, : len(row)] = row
        return codes.mT.contiguous()

    @torch.no_grad()
    def decode(self, codes: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Codes (B, K, N) -> features (B, N * stride, D).

        Args:
            codes: `NO_CODE` beyond an utterance's last code.
            lengths: (B,) frames of each row that are valid, zeros beyond; without it every code gives `stride` frames.

        Raises:
            RepCodecError: a code that the codebook does not have.
        """
        self.check_codes(codes)
        if codes.shape[-1] == 0:  # as of an utterance that is shorter than a code; no convolution takes it
            return self.feature_mean.new_zeros(len(codes), 0, self.output_dim)
        mask = codes[:, 0] >= 0
        valid = None if mask.all() else mask
        return self._features(self.quantizer.decode(codes), valid, lengths, codes.shape[-1] * self.stride)

    @torch.no_grad()
    def encode_pieces(self, pieces: list[Tensor]) -> list[Tensor]:
        """Features (T, D) of each piece -> its codes (N, K), none seeing another."""
        shape, stride = self.architecture, self.stride
        pieces = [piece.to(self.feature_mean.dtype) for piece in pieces]
        counts = [shape.num_codes(len(piece)) for piece in pieces]
        row, valid, starts = packed(pieces, shape.gap * stride, stride)
        row.sub_(self.feature_mean).div_(self.feature_scale)[~valid] = 0  # `normalize`, without a copy
        if shape.pad_to_stride:  # the zeros that fill a code's frames up are frames too
            for start, count in zip(starts, counts, strict=True):
                valid[0, start : start + count * stride] = True
        z, valid = self.encoder(row, valid)
        codes = self.quantizer.encode(z, valid)[0].T
        return [codes[start // stride :][:count] for start, count in zip(starts, counts, strict=True)]

    @torch.no_grad()
    def decode_pieces(self, pieces: list[Tensor]) -> list[Tensor]:
        """Codes (N, K) of each piece -> its features (N * stride, D), none seeing another."""
        row, valid, starts = packed(pieces, self.architecture.gap, 1)
        codes = row.masked_fill(~valid[..., None], NO_CODE).mT
        features = self._features(self.quantizer.decode(codes), valid, None, codes.shape[-1] * self.stride)[0]
        return [
            features[start * self.stride :][: len(piece) * self.stride]
            for start, piece in zip(starts, pieces, strict=True)
        ]

    def check_codes(self, codes: Tensor) -> None:
        """Refuse codes that the codebooks do not have.

        Raises:
            RepCodecError: names the first.
        """
        if codes.ndim != 3 or codes.shape[1] != self.num_codebooks:
            raise RepCodecError(
                f"the codec decodes codes (B, {self.num_codebooks}, N), but got shape {tuple(codes.shape)}."
            )
        wrong = codes[(codes >= self.codebook_size) | (codes < NO_CODE)]
        if len(wrong):
            raise RepCodecError(
                f"code {int(wrong[0])}: the codec has codes 0 to {self.codebook_size - 1}; decode with the one that "
                "made it."
            )

    def vectors(self, features: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Return what the quantizer would see of a batch: its valid vectors (N, C)."""
        return valid_rows(*self._vectors(features, lengths))

    def _check_width(self, features: Tensor) -> None:
        if features.ndim != 3 or features.shape[-1] != self.dim:
            raise RepCodecError(
                f"the codec takes features of width {self.dim}, (B, T, D), but got shape {tuple(features.shape)}; "
                "choose the speech encoder it was trained with."
            )

    def _vectors(self, features: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Features -> vectors (B, N, C), and where they are valid (B, N), None: everywhere.

        Frames are filled up with zeros to a multiple of the total stride, each row to its own.
        """
        self._check_width(features)
        batch, num_frames, _ = features.shape
        x = self.normalize(features)
        if short := -num_frames % self.stride:
            if lengths is None:
                lengths = torch.full((batch,), num_frames, device=features.device)
            x = nn.functional.pad(x, (0, 0, 0, short))
        valid = None
        if lengths is not None:
            valid = frame_mask(lengths, x.shape[1])
            x = x.masked_fill(~valid[..., None], 0)
            if self.architecture.pad_to_stride:
                valid = frame_mask((lengths + self.stride - 1) // self.stride * self.stride, x.shape[1])
        z, valid = self.encoder(x, valid)
        return z, valid

    def _features(self, vectors: Tensor, valid: Tensor | None, lengths: Tensor | None, num_frames: int) -> Tensor:
        """Vectors (B, N, C), where they are valid -> features (B, num_frames, D), zero beyond `lengths`."""
        features: Tensor = self.decoder(vectors, valid)
        # A codec into features of another kind has no mean and scale of theirs to bring back.
        if features.shape[-1] == len(self.feature_mean):
            features = features * self.feature_scale + self.feature_mean
        features = features[:, :num_frames]
        if lengths is not None:
            valid = frame_mask(lengths, features.shape[1])
        elif valid is not None:
            valid = valid.repeat_interleave(self.stride, 1)[:, :num_frames]
        return features if valid is None else features.masked_fill(~valid[..., None], 0)
