"""Feature shards or sound -> tokens file."""

import glob
import hashlib
import os
import re
import shutil
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from repcodec.architecture import FRAME_RATE
from repcodec.audio import SAMPLE_RATE
from repcodec.errors import RepCodecError
from repcodec.extraction import run_batches
from repcodec.files import InUse, locked
from repcodec.manifest import SoundList, check_lines, shard_range
from repcodec.packing import Rows, Tokenizer, encode_packed
from repcodec.shards import FeatureShards
from repcodec.speech_encoders import BATCH_SECONDS, SpeechEncoder, batches_of
from repcodec.tokens import (
    LineWriter,
    Tokens,
    check_one_codebook,
    format_line,
    is_finished,
    put_in_place,
)


class FeatureSource:
    """Contract: the features of utterances in order, read when they are asked for; here out of feature shards.

    Attributes:
        names: relative path of each utterance.
        root: the audio root.
        num_frames: T of each utterance.
        about: what tells this source from another one, plain values.
        skipped: reasons, of the utterances that were left out so far.
    """

    names: Sequence[str]
    root: str
    num_frames: Sequence[int]
    about: dict[str, Any]
    skipped: list[str]

    def __init__(self, shards: FeatureShards, names: Sequence[str] | None = None, root: str | None = None):
        """Take shards; and what names their utterances where they do not.

        Raises:
            RepCodecError: nothing names them.
        """
        if names is None and shards.names is None:
            raise RepCodecError(
                f"{shards.folder}: these shards do not name their utterances: give --manifest FILE.tsv."
            )
        self.names, self.root = names or shards.names or [], shards.root if root is None else root
        if len(set(self.names)) < len(self.names):
            (twice, _), *_ = Counter(self.names).most_common(1)
            raise RepCodecError(f"{shards.folder}: the name {twice!r} stands twice; each utterance needs its own.")
        self.num_frames, self.skipped, self._shards = shards.lengths.tolist(), [], shards
        listing = "".join(f"{name}\t{length}\n" for name, length in zip(self.names, self.num_frames, strict=True))
        self.about = {"utterances_sha256": hashlib.sha256(listing.encode()).hexdigest(), "files": shards.stamp}

    def duration(self, utterance: int) -> float:
        """Return the seconds that an utterance lasts."""
        return self.num_frames[utterance] / (self._shards.frame_rate or FRAME_RATE)

    def utterances(self, numbers: Sequence[int], bar: "tqdm[Any]") -> Iterator[tuple[int, Rows]]:
        """Yield number and features of each utterance asked for; `bar` moves by the frames that are read."""
        for number in numbers:
            yield number, _ShardRows(self._shards, number, bar)


class _ShardRows:
    """The frames of one utterance, read from its shard when they are asked for."""

    def __init__(self, shards: FeatureShards, utterance: int, bar: "tqdm[Any]"):
        self._shards, self._utterance, self._bar, self._seen = shards, utterance, bar, 0

    def __len__(self) -> int:
        return int(self._shards.lengths[self._utterance])

    def __getitem__(self, part: slice) -> Tensor:
        frames = torch.from_numpy(self._shards.read(self._utterance, part.start or 0, part.stop))
        end = (part.start or 0) + len(frames)
        self._bar.update(max(0, end - self._seen))  # windows overlap
        self._seen = max(self._seen, end)
        return frames


class SoundSource(FeatureSource):
    """Features computed from sound on the way; see `FeatureSource`."""

    def __init__(
        self, sounds: SoundList, encoder: SpeechEncoder, batch_seconds: float = BATCH_SECONDS, skip_bad: bool = False
    ):
        """Take the sounds, and the speech encoder on its device.

        Args:
            batch_seconds: seconds of sound the encoder runs at once.
            skip_bad: leave out sounds that cannot be used and note why in `skipped`, instead of stopping at the first.
        """
        self.names, self.root, self.skipped = sounds.paths, str(sounds.root), []
        self.num_frames = [encoder.num_frames(samples) for samples in sounds.num_samples]
        self.about = {"utterances_sha256": sounds.sha256(), "encoder_sha256": encoder.weights_sha256}
        self.about["skip_bad"] = skip_bad
        self._sounds, self._encoder, self._options = sounds, encoder, (batch_seconds, skip_bad)

    def duration(self, utterance: int) -> float:
        """Return the seconds that an utterance lasts."""
        return self._sounds.num_samples[utterance] / SAMPLE_RATE

    def utterances(self, numbers: Sequence[int], bar: "tqdm[Any]") -> Iterator[tuple[int, Rows]]:
        """Yield number and features of each utterance asked for, but for those that were left out."""
        batch_seconds, skip_bad = self._options
        batches = batches_of([self._sounds.num_samples[number] for number in numbers], batch_seconds)
        batches = [[numbers[i] for i in batch] for batch in batches]
        results = run_batches(self._sounds, batches, self._encoder, batch_seconds, skip_bad)
        for batch, found in zip(batches, results, strict=True):
            for number, features in zip(batch, found, strict=True):
                if isinstance(features, RepCodecError):
                    self.skipped.append(str(features))
                else:
                    bar.update(len(features))
                    yield number, torch.from_numpy(features)


def check_fits(tokenizer: Tokenizer, name: Path | str, shards: FeatureShards) -> None:
    """Refuse features that a tokenizer was not trained on.

    Raises:
        RepCodecError: they are of another width, encoder or layer.
    """
    if tokenizer.dim != shards.dim:
        raise RepCodecError(
            f"{shards.folder}: the features have width {shards.dim}, but {name} takes {tokenizer.dim}; "
            "extract them with the speech encoder it was trained on."
        )
    shards.check_source(tokenizer.about.get("encoder"), tokenizer.about.get("layer"))


def label(tokenizer: Tokenizer) -> str:
    """Return what tables call a tokenizer: its kind and its codebooks' size, as in "RepCodec 2 x 1024"."""
    if hasattr(tokenizer, "centroids"):
        return kmeans_label(tokenizer.codebook_size)
    several = f"{tokenizer.num_codebooks} x " if tokenizer.num_codebooks > 1 else ""
    return f"RepCodec {several}{tokenizer.codebook_size}"


def kmeans_label(codebook_size: int) -> str:
    """Return what tables call a k-means model."""
    return f"k-means {codebook_size}"


@torch.inference_mode()
def encode_shards(
    tokenizer: Tokenizer, shards: FeatureShards, description: str, numbers: range | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the features (T, D) and codes (K, N) of utterances in order; one without a frame has none.

    Args:
        tokenizer: on its device.
        shards: of the features.
        description: for the progress bar.
        numbers: which utterances; None: all.

    Raises:
        RepCodecError: a value is not finite.
    """
    waiting: deque[Tensor] = deque()
    numbers = range(len(shards)) if numbers is None else numbers

    def rows() -> Iterator[Tensor]:
        for utterance in numbers:
            waiting.append(torch.from_numpy(shards.read(utterance)))
            yield waiting[-1].to(tokenizer.device)

    total = int(shards.lengths[numbers.start : numbers.stop : numbers.step].sum())
    with tqdm(total=total, desc=description, unit="frame", unit_scale=True) as bar:
        for codes in encode_packed(tokenizer, rows()):
            features = waiting.popleft()
            bar.update(len(features))
            yield features, codes.T.cpu()


def write_tokens(
    tokenizer: Tokenizer,
    source: FeatureSource,
    about: dict[str, Any],
    path: Path | str,
    kind: str = "tokens",
    deduplicate: bool = False,
    shard: tuple[int, int] | None = None,
) -> bool:
    """Write the tokens file of a source; one of the same description is left as it is.

    After a kill the same call goes on where the last one stopped.

    Args:
        tokenizer: on its device, in evaluation mode.
        source: of the features.
        about: what made the codes, for the description beside the file; see `describe`.
        path: the tokens file.
        kind: one of `repcodec.tokens.FORMATS`.
        deduplicate: write runs of equal codes as one.
        shard: (I, N): only the I-th of N parts of the utterances, into `path.I_N`; whoever finishes the last part
            joins them, in order, to `path`.

    Returns:
        Whether `path` itself is there now.

    Raises:
        RepCodecError: several codebooks in the published format, bad features, or an unwritable file.
    """
    if kind == "tokens":
        check_one_codebook(tokenizer.num_codebooks)
    path = Path(path)
    if path.is_dir():
        raise RepCodecError(f"{path} is a folder: give the name of a file to write.")
    check_lines(source.root, *source.names)  # before anything is computed
    about = {**about, **source.about, "format": kind, "deduplicated": deduplicate, "root": source.root}
    if is_finished(path, about):
        _remove_parts(path)
        return True
    part = path if shard is None else _part(path, *shard)
    start, stop = (0, len(source.names)) if shard is None else shard_range(len(source.names), *shard)
    described = about if shard is None else {**about, "shard": list(shard)}
    if not is_finished(part, described):
        with LineWriter(part, described, source.root if kind == "tokens" else None) as writer:
            numbers = _remaining(source.names, range(start, stop), writer.done)
            for line in encode_lines(tokenizer, source, numbers, range(start, stop), kind, deduplicate):
                writer.write(line)
    return shard is None or _join(path, about, shard[1])


def _remaining(names: Sequence[str], numbers: range, done: list[str]) -> range:
    """Return the utterances after the last one done; some before it may have been left out."""
    if not done:
        return numbers
    for number in reversed(numbers):
        if names[number] == done[-1]:
            return range(number + 1, numbers.stop)
    return numbers


@torch.inference_mode()
def encode_lines(
    tokenizer: Tokenizer,
    source: FeatureSource,
    numbers: range,
    whole: range,
    kind: str = "tokens",
    deduplicate: bool = False,
) -> Iterator[str]:
    """Yield the lines of the utterances `numbers` out of `whole`, with a progress bar over these.

    Raises:
        RepCodecError: bad features or sound.
    """
    device = tokenizer.device
    waiting: deque[tuple[int, int]] = deque()  # number and frames
    initial = sum(source.num_frames[whole.start : numbers.start])
    total = sum(source.num_frames[whole.start : whole.stop])
    with tqdm(total=total, initial=initial, desc="Tokenizing", unit="frame", unit_scale=True) as bar:

        def utterances() -> Iterator[Rows]:
            for number, rows in source.utterances(numbers, bar):
                waiting.append((number, len(rows)))
                yield rows if device.type == "cpu" else _OnDevice(rows, device)

        for codes in encode_packed(tokenizer, utterances()):
            number, num_frames = waiting.popleft()
            found = Tokens(source.names[number], codes.T.cpu().numpy(), num_frames, source.duration(number))
            yield format_line(found, kind, deduplicate)


class _OnDevice:
    """Rows that are moved to a device when they are read."""

    def __init__(self, rows: Rows, device: torch.device):
        self._rows, self._device = rows, device

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, part: slice) -> Tensor:
        return self._rows[part].to(self._device)


def describe(tokenizer: Tokenizer, weights_sha256: str | None) -> dict[str, Any]:
    """Return what a tokens file's description says of the tokenizer: plain values."""
    return {
        "tokenizer": label(tokenizer),
        "tokenizer_sha256": weights_sha256,
        "encoder": tokenizer.about.get("encoder"),
        "layer": tokenizer.about.get("layer"),
        "codebook_size": tokenizer.codebook_size,
        "num_codebooks": tokenizer.num_codebooks,
        "codes_per_second": tokenizer.about.get("frame_rate", FRAME_RATE) / tokenizer.stride,
    }


def _part(path: Path, rank: int, num_shards: int) -> Path:
    """Return where part `rank` of a tokens file grows until all are joined."""
    return path.with_name(f"{path.name}.{rank}_{num_shards}")


def _join(path: Path, about: dict[str, Any], num_shards: int) -> bool:
    """Join the parts of a tokens file in order and remove them, if all are there; say whether the file is there now."""
    parts = [_part(path, rank, num_shards) for rank in range(num_shards)]
    if not all(is_finished(part, {**about, "shard": [rank, num_shards]}) for rank, part in enumerate(parts)):
        return is_finished(path, about)
    try:
        with locked(path):
            partial = path.with_name(f".{path.name}.joined")
            with open(partial, "wb") as file:
                for rank, part in enumerate(parts):
                    with open(part, "rb") as lines:
                        if rank and about["format"] == "tokens":
                            lines.readline()  # the root stands in the first part's
                        shutil.copyfileobj(lines, file)
                file.flush()
                os.fsync(file.fileno())
            put_in_place(partial, path, about)
    except FileNotFoundError:  # another process, which finished its part at the same moment, was faster
        path.with_name(f".{path.name}.joined").unlink(missing_ok=True)
        return is_finished(path, about)
    except InUse:  # … or is at it now
        return False
    _remove_parts(path)
    return True


def _remove_parts(path: Path) -> None:
    """Remove the finished parts of a tokens file that is whole, whatever left them behind."""
    for part in path.parent.glob(f"{glob.escape(path.name)}.*_*"):
        if re.fullmatch(r"\d+_\d+(\.json)?", part.name.removeprefix(f"{path.name}.")):
            part.unlink(missing_ok=True)
