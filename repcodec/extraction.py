"""Manifest -> feature shards."""

import json
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from repcodec.audio import SAMPLE_RATE
from repcodec.errors import RepCodecError
from repcodec.manifest import Manifest, SoundList, num_cores
from repcodec.shard_files import is_finished, num_shards_there, shard_path
from repcodec.shard_writer import MOVES, write_shard
from repcodec.shards import found_at
from repcodec.speech_encoders import BATCH_SECONDS, EncoderSpec, SpeechEncoder, batches_of

READ_AHEAD = 2
"""Batches that are decoded while the speech encoder is at work on one."""


def feature_folder(root: Path | str, encoder: str, layer: int, split: str) -> Path:
    """Return where a split's features lie: `root/<encoder>/l<layer>/<split>`.

    Raises:
        RepCodecError: a name is none of a folder.
    """
    for name, what in ((encoder, "a speech encoder"), (split, "a split, which is its manifest's, such as train.tsv")):
        if name in ("", ".", "..") or "/" in name:
            raise RepCodecError(f"{name!r} is no name of {what}: choose another.")
    return Path(root) / encoder / f"l{layer}" / split


@torch.inference_mode()
def extract(
    manifest: Manifest,
    folder: Path | str,
    spec: EncoderSpec,
    encoder: SpeechEncoder,
    rank: int = 0,
    num_shards: int = 1,
    model: Path | str | None = None,
    dtype: str = "float32",
    batch_seconds: float = BATCH_SECONDS,
    skip_bad: bool = False,
    description: str = "Extracting features",
) -> None:
    """Write shard `rank` of `num_shards` of a manifest's features; a finished shard of the same is left as it is.

    A run that was killed goes on after its last whole batch, and ends with the same bytes as one that was not.

    Args:
        manifest: the whole split.
        folder: where the shard goes.
        spec: the row of the encoder table, for the shard's description.
        encoder: the speech encoder, on its device.
        rank, num_shards: which shard of how many, cut by the published rule.
        model: where its weights came from, if not from the table's hub id.
        dtype: what the features are stored as, "float32" or "float16"; they are computed in float32.
        batch_seconds: seconds of sound run at once; a longer utterance is a batch of its own.
        skip_bad: leave out bad sounds and list them in `{rank}_{num_shards}.skipped.tsv`, instead of stopping at the
            first.
        description: what the progress bar says.

    Raises:
        RepCodecError: a sound is unreadable, not as long as the manifest says, or too short for one frame; the shard
            cannot be written; or a finished one there is of something else.
    """
    utterances = manifest.shard(rank, num_shards)
    about = {
        "encoder": spec.name,
        "layer": encoder.layer,
        "model": found_at(str(model or spec.model)),
        "weights_sha256": encoder.weights_sha256,
        "dim": encoder.dim,
        "frame_rate": encoder.frame_rate,
        "dtype": dtype,
        "manifest_sha256": manifest.sha256(),
        "root": str(manifest.root),
        "batch_seconds": batch_seconds,
    }
    if is_finished(folder, rank, num_shards):
        _check_same(shard_path(folder, rank, num_shards, ".json"), about)
        return
    if others := num_shards_there(folder) - {num_shards}:
        raise RepCodecError(
            f"{folder}: shards of {max(others)} are there, but this would be one of {num_shards}; delete them, or go "
            f"on with --shard I/{max(others)}."
        )
    batches = batches_of(utterances.num_samples, batch_seconds)
    seconds = [sum(utterances.num_samples[i] for i in batch) / SAMPLE_RATE for batch in batches]
    with write_shard(folder, rank, num_shards, encoder.dim, about, dtype, skip_bad=skip_bad) as shard:
        done = shard.num_batches
        for where, reason in utterances.skipped.items() if done == 0 else ():
            shard.skip(where, reason)

        def write(number: int, results: list[npt.NDArray[np.float32] | RepCodecError]) -> None:
            for utterance, result in zip(batches[number], results, strict=True):
                if isinstance(result, RepCodecError):
                    shard.skip(utterances.paths[utterance], str(result))
                else:
                    shard.append(utterances.paths[utterance], result)
            shard.commit()
            bar.update(seconds[number])

        with (
            tqdm(total=sum(seconds), initial=sum(seconds[:done]), desc=description, unit="s", unit_scale=True) as bar,
            ThreadPoolExecutor(1) as pool,
        ):
            writing: Future[None] | None = None  # a batch is written while the next one is run
            runs = run_batches(utterances, batches[done:], encoder, batch_seconds, skip_bad)
            for number, results in enumerate(runs, start=done):
                if writing is not None:
                    writing.result()
                writing = pool.submit(write, number, results)
            if writing is not None:
                writing.result()
    if shard.skipped:
        print(f"{len(shard.skipped)} sounds were skipped: {shard_path(folder, rank, num_shards, '.skipped.tsv')}")


@torch.inference_mode()
def run_batches(
    utterances: SoundList, batches: list[list[int]], encoder: SpeechEncoder, batch_seconds: float, skip_bad: bool
) -> Iterator[list[npt.NDArray[np.float32] | RepCodecError]]:
    """Yield the features (T, D) of each utterance of one batch after another; sound is decoded meanwhile.

    Args:
        utterances: the sounds.
        batches: numbers of the utterances run at once.
        encoder: the speech encoder, on its device.
        batch_seconds: how the batches were cut, for the message when memory runs out.
        skip_bad: yield the error of a bad sound in its features' place, instead of raising it.

    Raises:
        RepCodecError: a bad sound, or too little memory.
    """
    device = next(encoder.parameters()).device
    for sounds in _read_ahead(utterances, batches, encoder, skip_bad):
        good = [torch.from_numpy(sound).to(device) for sound in sounds if isinstance(sound, np.ndarray)]
        features = iter(_run(encoder, good, batch_seconds))
        yield [sound if isinstance(sound, RepCodecError) else next(features) for sound in sounds]


def _read_ahead(
    utterances: SoundList, batches: list[list[int]], encoder: SpeechEncoder, skip_bad: bool
) -> Iterator[list[npt.NDArray[np.float32] | RepCodecError]]:
    """Yield the waveforms of one batch after another; threads decode the next ones meanwhile.

    Raises:
        RepCodecError: a bad sound; with `skip_bad` the error stands in its waveform's place.
    """

    def read(utterance: int) -> npt.NDArray[np.float32] | RepCodecError:
        try:
            waveform = utterances.waveform(utterance)
            if encoder.num_frames(len(waveform)) == 0:
                path = Path(utterances.root, utterances.paths[utterance])
                raise RepCodecError(f"{path}: {len(waveform)} samples are too short for one frame; leave it out.")
        except RepCodecError as error:
            if not skip_bad:
                raise
            return error
        return waveform

    pool = ThreadPoolExecutor(num_cores())
    try:
        waiting: deque[list[Future[npt.NDArray[np.float32] | RepCodecError]]] = deque()
        for batch in batches:
            waiting.append([pool.submit(read, utterance) for utterance in batch])
            if len(waiting) > READ_AHEAD:
                yield [future.result() for future in waiting.popleft()]
        while waiting:
            yield [future.result() for future in waiting.popleft()]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _run(encoder: SpeechEncoder, waveforms: list[torch.Tensor], batch_seconds: float) -> list[npt.NDArray[np.float32]]:
    """Return the features (T, D) of each waveform.

    Raises:
        RepCodecError: the batch does not fit into the accelerator's memory.
    """
    try:
        return [features.cpu().numpy() for features in encoder(waveforms)] if waveforms else []
    except torch.OutOfMemoryError as error:
        raise RepCodecError(
            f"a batch of {sum(map(len, waveforms)) / SAMPLE_RATE:.0f} seconds does not fit into the device's memory: "
            f"choose --batch-seconds below {batch_seconds:g}."
        ) from error


def _check_same(path: Path, about: dict[str, Any]) -> None:
    """Refuse to take a finished shard for one of other sounds, encoder or layer; its files may have moved."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        differs = [key for key in about if key not in (*MOVES, "batch_seconds") and found.get(key) != about[key]]
    except (OSError, ValueError, AttributeError) as error:
        raise RepCodecError(f"{path}: not a readable shard description ({error!r}); delete the shard.") from error
    if differs:
        raise RepCodecError(
            f"{path}: a finished shard of something else is there ({', '.join(differs)} differs): "
            "delete the folder, or extract into another one."
        )
