"""The frozen speech encoders, through transformers; what "layer n" means lives only here.

Layers count from 1: layer n is the output of the n-th Transformer block, before any norm that
follows the stack. Nothing above that block is kept or run.
"""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized, remove_parametrizations

from repcodec.audio import SAMPLE_RATE
from repcodec.errors import RepCodecError, first_line

HOP = 320
"""Samples a frame: 16,000 Hz / 320 = 50 frames per second."""

UNUSED = "masked_spec_embed"
"""Serves pre-training only; some published files lack it, and get a random one."""

BATCH_SECONDS = 100.0
"""Seconds of sound that a speech encoder runs at once, unless told otherwise."""


@dataclass(frozen=True)
class EncoderSpec:
    """A row of the encoder table, one file of conf/encoder/.

    Attributes:
        name: as on the command line and in feature folders.
        model: hub id, or a local folder in transformers' format.
        dim: D.
        num_layers: how many Transformer blocks it has.
        layer: the default layer, 1-based; None where nobody has published one.
        waveform_norm: whether the waveform is layer-normalized over the utterance (None: the encoder takes log-mel).
        frame_rate: frames per second.
        family: hubert, data2vec-audio or whisper, as transformers calls them; a model of another one is refused.
    """

    name: str
    model: str
    dim: int
    num_layers: int
    layer: int | None
    waveform_norm: bool | None
    frame_rate: int
    family: str | None = None

    def valid_layer(self, layer: int | None = None) -> int:
        """Return `layer`, or the default where it is None.

        Raises:
            RepCodecError: there is no such layer; names the valid range.
        """
        layer = self.layer if layer is None else layer
        if layer is None:
            raise RepCodecError(f"{self.name} has no published layer: choose one with --layer, 1 to {self.num_layers}.")
        if type(layer) is not int or not 1 <= layer <= self.num_layers:
            raise RepCodecError(f"layer={layer}: {self.name} has layers 1 to {self.num_layers}.")
        return layer


@cache
def encoder_table() -> dict[str, EncoderSpec]:
    """Return every known speech encoder by name; the wheel carries conf/encoder inside the package."""
    here = Path(__file__).parent
    folder = here / "conf" / "encoder"
    if not folder.is_dir():
        folder = here.parent / "conf" / "encoder"
    rows = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.yaml"))]
    names = [field.name for field in fields(EncoderSpec)]
    return {row["name"]: EncoderSpec(**{name: row[name] for name in names}) for row in rows}


class SpeechEncoder(nn.Module):
    """Contract: waveforms at 16 kHz in, the features of one layer out.

    A batch is packed, not padded: what looks along time (convolutions, the mel, attention) runs utterance by
    utterance, what does not (all the matrix products of the blocks) runs over the frames of all utterances end
    to end. So nothing is computed in vain, and no utterance sees another one.

    Attributes:
        dim: D.
        layer: the layer given, 1-based.
        frame_rate: frames per second.
        weights_sha256: hash of the weights up to `layer`: which encoder this is, wherever its files lie.
    """

    blocks: nn.ModuleList
    weights_sha256 = ""

    def __init__(self, dim: int, layer: int):
        super().__init__()
        self.dim, self.layer = dim, layer
        self.frame_rate = SAMPLE_RATE / HOP

    @classmethod
    def num_frames(cls, num_samples: int) -> int:
        """Return T for S samples."""
        raise NotImplementedError

    def segments(self, waveform: Tensor) -> list[Tensor]:
        """(S,) -> what block 1 takes, (T', D) of each stretch that is run by itself; none where S is too short."""
        raise NotImplementedError

    @torch.no_grad()
    def forward(self, waveforms: Sequence[Tensor]) -> list[Tensor]:
        """Waveforms (S,) at 16 kHz, on the encoder's device -> the features (T, D) of each, float32.

        Autocast is off, and so are TensorFloat-32 convolutions: training in mixed precision sees the same features.
        """
        with torch.autocast(next(self.parameters()).device.type, enabled=False), _exact_convolutions():
            parts = [self.segments(waveform.float()) for waveform in waveforms]
            lengths = [len(segment) for segments in parts for segment in segments]
            if not lengths:
                return [waveform.new_zeros(0, self.dim, dtype=torch.float32) for waveform in waveforms]
            x = torch.cat([segment for segments in parts for segment in segments])[None]
            for block in self.blocks:
                x = block(x, None, lengths=lengths)
            rows = x[0].split([sum(len(segment) for segment in segments) for segments in parts])
        return [row[: self.num_frames(len(waveform))] for row, waveform in zip(rows, waveforms, strict=True)]


@contextmanager
def _exact_convolutions() -> Iterator[None]:
    """Switch off TensorFloat-32 in cuDNN's convolutions, on by default: it keeps 10 bits of the mantissa."""
    convolutions: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]  # torch makes it at run time
    before = convolutions.fp32_precision
    convolutions.fp32_precision = "ieee"
    try:
        yield
    finally:
        convolutions.fp32_precision = before


def _packed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, *, lengths: list[int],
    **options: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attend within each segment of (1, heads, sum of lengths, head width); the form transformers asks for."""
    parts = [
        nn.functional.scaled_dot_product_attention(q, k, v, scale=options["scaling"])
        for q, k, v in zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    ]
    return torch.cat(parts, 2).transpose(1, 2), None


class HubertEncoder(SpeechEncoder):
    """HuBERT and data2vec audio: convolutions over the waveform, then Transformer blocks."""

    CHUNK = 1_600_000
    """Samples run at once; a longer utterance is run in chunks of this and concatenated, as published."""

    RECEPTIVE_FIELD = 400
    """Samples the convolutions need for their first frame."""

    def __init__(self, model: Any, layer: int, waveform_norm: bool):
        """Take a transformers HubertModel or Data2VecAudioModel that ends with block `layer`.

        The norm after the stack is not part of any layer. In the post-norm shape the module of the same name comes
        before the blocks.
        """
        super().__init__(model.config.hidden_size, layer)
        self.waveform_norm = waveform_norm
        self.convolutions: nn.Module = model.feature_extractor
        self.projection: nn.Module = model.feature_projection
        self.positions: nn.Module = model.encoder.pos_conv_embed
        for module in self.positions.modules():  # the weight norm, once instead of at every call
            if is_parametrized(module):
                remove_parametrizations(module, "weight")
        # data2vec's is always post-norm, whatever its configuration, which may have begun as wav2vec 2.0's, says.
        pre_norm = model.config.model_type == "hubert" and model.config.do_stable_layer_norm
        self.norm: nn.Module = nn.Identity() if pre_norm else model.encoder.layer_norm
        self.blocks = model.encoder.layers

    @classmethod
    def num_frames(cls, num_samples: int) -> int:
        """Return T for S samples, chunk by chunk."""
        full, rest = divmod(num_samples, cls.CHUNK)
        return full * cls._chunk_frames(cls.CHUNK) + cls._chunk_frames(rest)

    @classmethod
    def _chunk_frames(cls, num_samples: int) -> int:
        return max(0, (num_samples - cls.RECEPTIVE_FIELD) // HOP + 1)

    def segments(self, waveform: Tensor) -> list[Tensor]:
        """(S,) -> (T', D) of each chunk."""
        if self.waveform_norm and len(waveform):
            waveform = nn.functional.layer_norm(waveform, waveform.shape, eps=1e-5)
        chunks = [chunk for chunk in waveform.split(self.CHUNK) if len(chunk) >= self.RECEPTIVE_FIELD]
        return [self._front(chunk) for chunk in chunks]

    def _front(self, chunk: Tensor) -> Tensor:
        x = self.projection(self.convolutions(chunk[None]).mT)
        x = x[0] if isinstance(x, tuple) else x  # data2vec hands out its normed input too
        normed: Tensor = self.norm(x + self.positions(x))[0]
        return normed


class WhisperEncoder(SpeechEncoder):
    """Whisper's encoder on the log-mel of the utterance at its own length, not padded to 30 s."""

    WINDOW, MEL_HOP = 400, 160
    """Samples of a mel frame's window, and from one mel frame to the next."""

    window: Tensor
    filters: Tensor

    def __init__(self, model: Any, layer: int):
        """Take transformers' module of that name, ending with block `layer`; its last norm is left out."""
        from transformers import WhisperFeatureExtractor

        super().__init__(model.config.d_model, layer)
        self.conv1: nn.Conv1d = model.conv1
        self.conv2: nn.Conv1d = model.conv2
        self.positions: nn.Embedding = model.embed_positions
        self.blocks = model.layers
        filters = WhisperFeatureExtractor(feature_size=model.config.num_mel_bins).mel_filters
        self.register_buffer("filters", torch.from_numpy(filters).float().T.contiguous(), persistent=False)
        self.register_buffer("window", torch.hann_window(self.WINDOW), persistent=False)

    @classmethod
    def num_frames(cls, num_samples: int) -> int:
        """Return T for S samples."""
        return num_samples // HOP

    def log_mel(self, waveform: Tensor) -> Tensor:
        """(S,) -> (mel bands, S // 160): log10 of the mel power, at most 8 below the utterance's maximum, scaled.

        Source: openai/whisper, as the paper's section 2.2 describes (Radford et al. 2022).
        """
        spectrum = torch.stft(waveform, self.WINDOW, self.MEL_HOP, window=self.window, return_complex=True)
        mel = self.filters @ spectrum[:, :-1].abs().square()
        log = mel.clamp(min=1e-10).log10()
        return (log.clamp(min=log.max() - 8) + 4) / 4

    def segments(self, waveform: Tensor) -> list[Tensor]:
        """(S,) -> (T', D) of the whole utterance; T' may be one more than T."""
        if self.num_frames(len(waveform)) == 0:
            return []
        x = nn.functional.gelu(self.conv1(self.log_mel(waveform)[None]))
        x = nn.functional.gelu(self.conv2(x))[0].mT
        return [x + self.position_table(len(x))]

    def position_table(self, num_frames: int) -> Tensor:
        """Return (T, D) positions: the model's table, or the same sinusoids computed for a longer T."""
        table = self.positions.weight
        if num_frames > len(table):
            from transformers.models.whisper.modeling_whisper import sinusoids

            table = sinusoids(num_frames, self.dim).to(table)
        return table[:num_frames]


def batches_of(num_samples: Sequence[int], batch_seconds: float) -> list[list[int]]:
    """Cut utterances, in their order, into batches of at most `batch_seconds` seconds of sound, at least one each."""
    batches: list[list[int]] = []
    room = 0.0
    for utterance, samples in enumerate(num_samples):
        if not batches or samples > room:
            batches.append([])
            room = batch_seconds * SAMPLE_RATE
        batches[-1].append(utterance)
        room -= samples
    return batches


def find_encoder(name: str, model: str | Path | None = None) -> EncoderSpec:
    """Return the row of the encoder table, or one read off a model of the three families that is not in it.

    Args:
        name: in the table; any name when `model` is given.
        model: a hub id or a local folder.

    Raises:
        RepCodecError: no such row and no model, or one that is not of the three families.
    """
    if name in encoder_table():
        return encoder_table()[name]
    if model is None:
        raise RepCodecError(
            f"{name}: no such speech encoder; known: {', '.join(encoder_table())}. Others of these families need "
            "--model FOLDER_OR_HUB_ID."
        )
    config = _read_config(str(model))
    # fairseq normalizes the waveform for the models whose convolutions have a LayerNorm; data2vec's always have.
    norms = {"whisper": None, "data2vec-audio": True, "hubert": getattr(config, "feat_extract_norm", None) == "layer"}
    shape, family = (config.hidden_size, config.num_hidden_layers), config.model_type
    return EncoderSpec(name, str(model), *shape, None, norms[family], SAMPLE_RATE // HOP, family)


def load_speech_encoder(spec: EncoderSpec, layer: int | None = None, model: str | Path | None = None) -> SpeechEncoder:
    """Load a frozen speech encoder, in float32 and evaluation mode.

    Args:
        spec: its row of the table.
        layer: 1-based; the row's default when None.
        model: a hub id or a local folder instead of the row's.

    Raises:
        RepCodecError: a layer past the end, a folder that holds no such model, or no network for a hub id.
    """
    layer = spec.valid_layer(layer)
    source = str(model or spec.model)
    whole = _load_blocks(source, layer, spec)
    weights_sha256 = _sha256(whole)
    if whole.config.model_type == "whisper":
        encoder: SpeechEncoder = WhisperEncoder(whole, layer)
    else:
        encoder = HubertEncoder(whole, layer, bool(spec.waveform_norm))
    if encoder.dim != spec.dim:
        raise RepCodecError(f"{source}: the model has width {encoder.dim}, but {spec.name} has {spec.dim}.")
    encoder.weights_sha256 = weights_sha256
    return encoder.eval().requires_grad_(False)


def _sha256(model: nn.Module) -> str:
    """Hash a model's weights as they are stored: what is computed from them differs in its last bits by machine."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if UNUSED not in name:
            digest.update(f"{name} {tuple(value.shape)}".encode())
            digest.update(value.contiguous().numpy())
    return digest.hexdigest()


def _load_blocks(source: str, layer: int, spec: EncoderSpec) -> Any:
    """Load a transformers model as far as block `layer`: the blocks above are not even read."""
    import transformers
    from transformers.models.whisper.modeling_whisper import WhisperEncoder as WhisperBlocks

    config = _read_config(source)
    if spec.family not in (None, config.model_type):
        raise RepCodecError(f"{source}: a {config.model_type} model, but {spec.name} is of the family {spec.family}.")
    # A whole Whisper names its encoder's weights model.encoder.* or encoder.*.
    inner = {r"^(model\.)?encoder\.": ""}
    classes: dict[str, tuple[Any, dict[str, str] | None]] = {
        "whisper": (WhisperBlocks, inner),
        "hubert": (transformers.HubertModel, None),
        "data2vec-audio": (transformers.Data2VecAudioModel, None),
    }
    cls, names = classes[config.model_type]
    if layer > config.num_hidden_layers:
        raise RepCodecError(f"layer={layer}: the model in {source} has layers 1 to {config.num_hidden_layers}.")
    config.num_hidden_layers = layer  # Whisper's configuration takes that for its encoder's layers
    transformers.AttentionInterface.register("packed", _packed_attention)
    transformers.utils.logging.disable_progress_bar()
    level = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()  # it would list every weight above `layer`
    try:
        model, report = cls.from_pretrained(
            source, config=config, dtype=torch.float32, key_mapping=names, output_loading_info=True,
            attn_implementation="packed",
        )  # fmt: skip
    except Exception as error:  # transformers and what it reads the files with raise many kinds
        raise _not_loadable(source, error) from error
    finally:
        transformers.utils.logging.set_verbosity(level)
    missing = [name for name in report["missing_keys"] if UNUSED not in name]
    if missing:
        raise RepCodecError(f"{source}: the weights lack {missing[0]} and {len(missing) - 1} more; download it again.")
    return model


def _read_config(source: str) -> Any:
    """Read a model's configuration.

    Raises:
        RepCodecError: there is none, or it is of another family.
    """
    import huggingface_hub
    import transformers

    if source.startswith(("/", ".", "~")) and not Path(source).is_dir():
        raise RepCodecError(f"{source}: no such folder; give one that save_pretrained wrote, or a hub id.")
    huggingface_hub.utils.logging.set_verbosity(logging.ERROR)  # it would tell of every try without a network
    try:
        config = transformers.AutoConfig.from_pretrained(source)
    except Exception as error:  # see _load_blocks
        raise _not_loadable(source, error) from error
    if config.model_type not in (known := ("whisper", "hubert", "data2vec-audio")):
        raise RepCodecError(f"{source}: a {config.model_type} model; expected {', '.join(known)}.")
    return config


def _not_loadable(source: str, error: Exception) -> RepCodecError:
    return RepCodecError(
        f"{source}: no speech encoder could be loaded from there; without a network, save the model with "
        f"transformers' save_pretrained elsewhere and give that folder with --model ({first_line(error)})"
    )
