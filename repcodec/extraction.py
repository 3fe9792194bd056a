"""Manifest -> feature shards."""

import json
from pathlib import Path

import torch
from tqdm import tqdm

from repcodec.audio import SAMPLE_RATE, find_sound_files, num_samples_at_16khz, read_audio
from repcodec.errors import RepCodecError
from repcodec.manifest import Manifest
from repcodec.shards import is_finished, shard_path, write_shard
from repcodec.speech_encoders import EncoderSpec, SpeechEncoder


def feature_folder(root: Path | str, encoder: str, layer: int, split: str) -> Path:
    """Return where a split's features lie: `root/<encoder>/l<layer>/<split>`."""
    return Path(root) / encoder / f"l{layer}" / split


def make_manifest(folder: Path | str) -> Manifest:
    """List the sound files below a folder.

    Raises:
        RepCodecError: the folder holds none, or one is unreadable.
    """
    root = Path(folder).resolve()
    files = find_sound_files(root)
    samples = [num_samples_at_16khz(path) for path in tqdm(files, desc="Reading sound headers", unit="file")]
    return Manifest(root, [path.relative_to(root).as_posix() for path in files], samples)


@torch.inference_mode()
def extract(
    manifest: Manifest,
    folder: Path | str,
    spec: EncoderSpec,
    encoder: SpeechEncoder,
    rank: int = 0,
    num_shards: int = 1,
    model: Path | str | None = None,
    description: str = "Extracting features",
) -> None:
    """Write shard `rank` of `num_shards` of a manifest's features; a finished shard of the same is left as it is.

    Args:
        manifest: the whole split.
        folder: where the shard goes.
        spec: the row of the encoder table, for the shard's description.
        encoder: the speech encoder, on its device.
        model: where its weights came from, if not from the table's hub id.
        description: what the progress bar says.

    Raises:
        RepCodecError: a sound file is unreadable or too short for one frame, the shard cannot be written,
            or a finished one there is of something else.
    """
    utterances = manifest.shard(rank, num_shards)
    about = {
        "encoder": spec.name,
        "layer": encoder.layer,
        "model": str(model or spec.model),
        "dim": encoder.dim,
        "frame_rate": encoder.frame_rate,
        "dtype": "float32",
        "manifest_sha256": manifest.sha256(),
        "root": str(manifest.root),
        "utterances": list(utterances.paths),
    }
    if is_finished(folder, rank, num_shards):
        _check_same(shard_path(folder, rank, num_shards, ".json"), about)
        return
    device = next(encoder.parameters()).device
    with (
        write_shard(folder, rank, num_shards, encoder.dim, about) as shard,
        tqdm(total=sum(utterances.num_samples) / SAMPLE_RATE, desc=description, unit="s", unit_scale=True) as bar,
    ):
        for name, num_samples in zip(utterances.paths, utterances.num_samples, strict=True):
            path = manifest.root / name
            waveform = torch.from_numpy(read_audio(path)).to(device)
            features = encoder(waveform)
            if len(features) == 0:
                raise RepCodecError(
                    f"{path}: {len(waveform)} samples are too short for one frame; remove it from the manifest."
                )
            shard.append(name, features.cpu().numpy())
            bar.update(num_samples / SAMPLE_RATE)


def _check_same(path: Path, about: dict) -> None:
    """Refuse to take a finished shard for one of other sounds, encoder or layer; the audio root may have moved."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        differs = [key for key in about if key != "root" and found.get(key) != about[key]]
    except (OSError, ValueError, AttributeError) as error:
        raise RepCodecError(f"{path}: not a readable shard description ({error!r}); delete the shard.") from error
    if differs:
        raise RepCodecError(
            f"{path}: a finished shard of something else is there ({', '.join(differs)} differs): "
            "delete the folder, or extract into another one."
        )
