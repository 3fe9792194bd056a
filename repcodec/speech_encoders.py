"""The frozen speech encoders, through transformers; what "layer n" means lives only here.

Layers count from 1: layer n is the output of the n-th Transformer block, before any norm that
follows the stack. Nothing above that block is kept or run.
"""

from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from repcodec.audio import SAMPLE_RATE
from repcodec.errors import RepCodecError

HOP = 320
"""Samples a frame: 16,000 Hz / 320 = 50 frames per second."""


@dataclass(frozen=True)
class EncoderSpec:
    """A row of the encoder table, one file of conf/encoder/.

    Attributes:
        name: as on the command line and in feature folders.
        model: hub id, or a local folder in transformers' format.
        dim: D.
        num_layers: how many Transformer blocks it has.
        layer: the default layer, 1-based.
        waveform_norm: whether the waveform is layer-normalized over the utterance (None: the encoder takes log-mel).
        frame_rate: frames per second.
    """

    name: str
    model: str
    dim: int
    num_layers: int
    layer: int
    waveform_norm: bool | None
    frame_rate: int


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
    """Contract: a (S,) waveform at 16 kHz in, (T, D) features of one layer out.

    Attributes:
        dim: D.
        layer: the layer given, 1-based.
        frame_rate: frames per second.
    """

    def __init__(self, dim: int, layer: int):
        super().__init__()
        self.dim, self.layer = dim, layer
        self.frame_rate = SAMPLE_RATE / HOP

    def num_frames(self, num_samples: int) -> int:
        """Return T for S samples."""
        raise NotImplementedError

    def forward(self, waveform: Tensor) -> Tensor:
        """(S,) float32 at 16 kHz -> (T, D)."""
        raise NotImplementedError


class HubertEncoder(SpeechEncoder):
    """HuBERT and data2vec audio: convolutions over the waveform, then Transformer blocks."""

    CHUNK = 1_600_000
    """Samples run at once; a longer utterance is run in chunks of this and concatenated, as published."""

    RECEPTIVE_FIELD = 400
    """Samples the convolutions need for their first frame."""

    def __init__(self, model: Any, layer: int, waveform_norm: bool):
        """Take a transformers HubertModel or Data2VecAudioModel that ends with block `layer`."""
        super().__init__(model.config.hidden_size, layer)
        self.waveform_norm = waveform_norm
        # The norm after the stack is not part of any layer. In the post-norm shape the module of the same
        # name comes before the blocks and stays.
        if getattr(model.config, "do_stable_layer_norm", False):
            model.encoder.layer_norm = nn.Identity()
        self.model = model

    def num_frames(self, num_samples: int) -> int:
        """Return T for S samples, chunk by chunk."""
        full, rest = divmod(num_samples, self.CHUNK)
        frames = full * self._chunk_frames(self.CHUNK)
        return frames + (self._chunk_frames(rest) if rest >= self.RECEPTIVE_FIELD else 0)

    def _chunk_frames(self, num_samples: int) -> int:
        return (num_samples - self.RECEPTIVE_FIELD) // HOP + 1

    def forward(self, waveform: Tensor) -> Tensor:
        """(S,) float32 at 16 kHz -> (T, D)."""
        if self.waveform_norm:
            waveform = nn.functional.layer_norm(waveform, waveform.shape, eps=1e-5)
        chunks = [chunk for chunk in waveform.split(self.CHUNK) if len(chunk) >= self.RECEPTIVE_FIELD]
        if not chunks:
            return waveform.new_zeros(0, self.dim)
        return torch.cat([self.model(chunk[None]).last_hidden_state[0] for chunk in chunks])


class WhisperEncoder(SpeechEncoder):
    """Whisper's encoder on the log-mel of the utterance at its own length, not padded to 30 s."""

    def __init__(self, model: Any, layer: int):
        """Take transformers' module of that name, ending with block `layer`; its last norm is left out."""
        from transformers import WhisperFeatureExtractor

        super().__init__(model.config.d_model, layer)
        self.conv1: nn.Conv1d = model.conv1
        self.conv2: nn.Conv1d = model.conv2
        self.positions: nn.Embedding = model.embed_positions
        self.blocks: nn.ModuleList = model.layers
        self.log_mel = WhisperFeatureExtractor(feature_size=model.config.num_mel_bins)

    def num_frames(self, num_samples: int) -> int:
        """Return T for S samples."""
        return num_samples // HOP

    def forward(self, waveform: Tensor) -> Tensor:
        """(S,) float32 at 16 kHz -> (T, D)."""
        num_frames = self.num_frames(len(waveform))
        if num_frames == 0:
            return waveform.new_zeros(0, self.dim)
        device = waveform.device
        mel = self.log_mel(
            waveform.cpu().numpy(),
            sampling_rate=SAMPLE_RATE,
            truncation=False,
            padding="do_not_pad",
            return_tensors="pt",
            device=str(device),
        ).input_features.to(device, self.conv1.weight.dtype)
        x = nn.functional.gelu(self.conv1(mel))
        x = nn.functional.gelu(self.conv2(x)).mT
        x = x + self.position_table(x.shape[1])
        for block in self.blocks:
            x = block(x, None)
        return x[0, :num_frames]

    def position_table(self, num_frames: int) -> Tensor:
        """Return (T, D) positions: the model's table, or the same sinusoids computed for a longer T."""
        table = self.positions.weight
        if num_frames <= len(table):
            return table[:num_frames]
        from transformers.models.whisper.modeling_whisper import sinusoids

        return sinusoids(num_frames, self.dim).to(table)


def load_speech_encoder(spec: EncoderSpec, layer: int | None = None, model: str | Path | None = None) -> SpeechEncoder:
    """Load a frozen speech encoder, in float32 and evaluation mode.

    Args:
        spec: its row of the table.
        layer: 1-based; the row's default when None.
        model: a hub id or a local folder instead of the row's.

    Raises:
        RepCodecError: a layer past the end, a folder that holds no such model, or no network for a hub id.
    """
    layer = spec.layer if layer is None else layer
    if not 1 <= layer <= spec.num_layers:
        raise RepCodecError(f"layer={layer}: {spec.name} has layers 1 to {spec.num_layers}.")
    source = str(model or spec.model)
    whole = _load_blocks(source, layer)
    if whole.config.model_type == "whisper":
        encoder: SpeechEncoder = WhisperEncoder(whole, layer)
    else:
        encoder = HubertEncoder(whole, layer, bool(spec.waveform_norm))
    if encoder.dim != spec.dim:
        raise RepCodecError(f"{source}: the model has width {encoder.dim}, but {spec.name} has {spec.dim}.")
    return encoder.eval().requires_grad_(False)


def _load_blocks(source: str, layer: int) -> Any:
    """Load a transformers model as far as block `layer`: the blocks above are not even read."""
    import transformers
    from transformers.models.whisper.modeling_whisper import WhisperEncoder as WhisperBlocks

    transformers.utils.logging.disable_progress_bar()
    try:
        config = transformers.AutoConfig.from_pretrained(source)
        # A whole Whisper names its encoder's weights model.encoder.* or encoder.*.
        inner = {r"^(model\.)?encoder\.": ""}
        classes: dict[str, tuple[Any, str, dict | None]] = {
            "whisper": (WhisperBlocks, "encoder_layers", inner),
            "hubert": (transformers.HubertModel, "num_hidden_layers", None),
            "data2vec-audio": (transformers.Data2VecAudioModel, "num_hidden_layers", None),
        }
        if config.model_type not in classes:
            raise RepCodecError(f"{source}: a {config.model_type} model; expected {', '.join(classes)}.")
        cls, num_layers, names = classes[config.model_type]
        if layer > getattr(config, num_layers):
            raise RepCodecError(f"layer={layer}: the model in {source} has layers 1 to {getattr(config, num_layers)}.")
        setattr(config, num_layers, layer)
        level = transformers.utils.logging.get_verbosity()
        transformers.utils.logging.set_verbosity_error()  # it would list every weight above `layer`
        model, report = cls.from_pretrained(
            source, config=config, dtype=torch.float32, key_mapping=names, output_loading_info=True
        )
        transformers.utils.logging.set_verbosity(level)
    except (OSError, ValueError) as error:
        raise RepCodecError(
            f"{source}: no speech encoder could be loaded from there; without a network, save the model with "
            f"transformers' save_pretrained elsewhere and give that folder with --model ({str(error).splitlines()[0]})"
        ) from error
    # masked_spec_embed serves pre-training only, and some published files lack it.
    missing = [name for name in report["missing_keys"] if "masked_spec_embed" not in name]
    if missing:
        raise RepCodecError(f"{source}: the weights lack {missing[0]} and {len(missing) - 1} more; download it again.")
    return model
