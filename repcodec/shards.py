"""Read feature shards: `{rank}_{n}.npy`, a (sum of T, D) float array, and `{rank}_{n}.len`, one T a line.

Beside them lies `{rank}_{n}.json`, which names the utterances and says how the features were made;
shards made by the published scripts lack it and are read all the same. `shard_writer.py` writes them.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from repcodec.audio import read_audio
from repcodec.errors import RepCodecError
from repcodec.manifest import utterance_id
from repcodec.shard_files import SAME, Shard, check_alike, open_shard, shard_files


def found_at(model: str) -> str:
    """Return where a model is from, wherever one stands: a folder's absolute path, a hub id as it is."""
    return str(Path(model).resolve()) if Path(model).is_dir() else model


def check_source(where: object, found: tuple[str | None, int | None], expected: tuple[str | None, int | None]) -> None:
    """Refuse features of another (speech encoder, layer) than expected; None on either side is not compared.

    Raises:
        RepCodecError: they differ.
    """
    for name, one, other in zip(("speech encoder", "layer"), found, expected, strict=True):
        if one is not None and other is not None and one != other:
            raise RepCodecError(
                f"{where}: features of {name} {one}, expected {other}; choose other features, or the encoder=… and "
                "layer=… they are of."
            )


def check_finite(features: npt.NDArray[np.floating], source: object, first: int = 0, step: int = 1) -> None:
    """Refuse features (T, D) that hold NaN or infinity.

    Args:
        source: what the message names.
        first, step: the row of the source that row 0 is, and how many lie between two rows.

    Raises:
        RepCodecError: names `source` and the first bad frame.
    """
    bad = np.flatnonzero(~np.isfinite(features).all(axis=-1))
    if len(bad):
        raise RepCodecError(
            f"{source}: frame {first + int(bad[0]) * step} holds NaN or infinity ({len(bad)} such frames); "
            "extract these features again, in float32."
        )


class FeatureShards:
    """All shards of a split, read through memory maps.

    Utterances are numbered through the shards in rank order, which is manifest order; of several folders, through
    one after the other.

    Attributes:
        folder: where the shards lie.
        dim: D.
        lengths: (N,) frames of each utterance.
        folder_of: (N,) which of the folders each utterance is from, 0 where there is one.
        names: relative path of each utterance, or None where the shards have no .json.
        ids: their ids, or None.
        root: the audio root, "" where the shards have no .json.
        frame_rate: frames per second, None where the shards have no .json.
        manifest_sha256: hash of the manifest they were made from, None where the shards have no .json.
        about: what the first shard's .json says, empty where there is none.
        dtype: what the features are stored as.
    """

    def __init__(self, folder: Path | str | Sequence[Path | str], dim: int | None = None):
        """Open and check every shard of a folder, or of several (headers and lengths, not the values).

        Args:
            dim: the width expected, if one is.

        Raises:
            RepCodecError: no shard, a missing or unfinished one, wrong width or type, a truncated file,
                or lengths that do not sum to the rows.
        """
        folders = [Path(one) for one in ([folder] if isinstance(folder, Path | str) else folder)]
        self.folder: Path | str = folders[0] if len(folders) == 1 else " + ".join(map(str, folders))
        opened = [[open_shard(path, dim) for path in shard_files(one)] for one in folders]
        self._folders = opened
        self._shards = [shard for shards in opened for shard in shards]
        first = self._shards[0]
        self.dim = first.rows.shape[1]
        for one, shards in zip(folders, opened, strict=True):
            for shard in shards:
                check_alike(shard, shards[0], (*SAME, "manifest_sha256"))
            check_alike(shards[0], first, [key for key in SAME if shards[0].about.get(key) and first.about.get(key)])
            if not any(len(shard.rows) for shard in shards):
                raise RepCodecError(f"{one}: the split is empty: its shards hold no frame; extract it again.")
        self.lengths = np.concatenate([shard.lengths for shard in self._shards])
        self.folder_of = np.repeat(np.arange(len(opened)), [sum(len(s.lengths) for s in shards) for shards in opened])
        self._shard_of = np.repeat(np.arange(len(self._shards)), [len(s.lengths) for s in self._shards])
        self._row_of = np.concatenate([np.cumsum(s.lengths) - s.lengths for s in self._shards])
        described = all(shard.about for shard in self._shards)
        self.names = [name for s in self._shards for name in s.about["utterances"]] if described else None
        self.ids = [utterance_id(name) for name in self.names] if self.names is not None else None
        roots = {shards[0].about.get("root", "") for shards in opened}
        self.root = roots.pop() if len(roots) == 1 else ""
        self.frame_rate = first.about.get("frame_rate")
        manifests = [shards[0].about.get("manifest_sha256") for shards in opened]
        self.manifest_sha256 = "+".join(map(str, manifests)) if None not in manifests else None
        self.about = first.about
        self.dtype = first.rows.dtype
        self._source = first.about.get("encoder"), first.about.get("layer")

    def __len__(self) -> int:
        return len(self.lengths)

    def __reduce__(self) -> tuple[type["FeatureShards"], tuple[Any, ...]]:
        """Reopen the files in another process instead of copying their rows there."""
        return FeatureShards, ([shards[0].path.parent for shards in self._folders], self.dim)

    @property
    def stamp(self) -> list[list[str | int]]:
        """Name, bytes and time of each file of features: what tells them from features that replaced them."""
        found = [(shard.path, shard.path.stat()) for shard in self._shards]
        return [[path.name, stat.st_size, stat.st_mtime_ns] for path, stat in found]

    def waveform(self, utterance: int) -> npt.NDArray[np.float32]:
        """Return the (S,) samples at 16 kHz that an utterance's features were made of.

        Raises:
            RepCodecError: nothing says where the sound is, or it cannot be read.
        """
        if self.names is None or not self.root:
            raise RepCodecError(f"{self.folder}: does not say where the sounds are; turn robustness off.")
        return read_audio(Path(self.root) / self.names[utterance])

    @property
    def about_features(self) -> dict[str, str]:
        """What the .json says of the speech encoder's weights: "encoder_model", folder or hub id, "encoder_sha256"."""
        known = {"encoder_model": self.about.get("model"), "encoder_sha256": self.about.get("weights_sha256")}
        found = {key: value for key, value in known.items() if isinstance(value, str) and value}
        return {key: found_at(value) if key == "encoder_model" else value for key, value in found.items()}

    def check_source(self, encoder: str | None, layer: int | None) -> None:
        """Refuse features of another speech encoder or layer; see `check_source`."""
        check_source(self.folder, self._source, (encoder, layer))

    def check_manifest(self, names: Sequence[str], num_samples: Sequence[int]) -> None:
        """Refuse a manifest that does not list these utterances in this order.

        Shards that name their utterances are compared by name, others by length, at 320 samples a frame.

        Raises:
            RepCodecError: names the first utterance that differs.
        """
        if len(names) != len(self):
            raise RepCodecError(f"{self.folder}: {len(self)} utterances, but the manifest lists {len(names)}.")
        for i, (name, samples) in enumerate(zip(names, num_samples, strict=True)):
            # An encoder's convolutions take up to two frames from each chunk's end.
            slack = 2 + 2 * (samples // 1_600_000)
            if self.names is not None and self.names[i] != name:
                found = f"is {self.names[i]}"
            elif abs(samples / 320 - self.lengths[i]) > slack:
                found = f"has {self.lengths[i]} frames, not about {samples // 320}"
            else:
                continue
            raise RepCodecError(
                f"{self.folder}: utterance {i} {found}, where the manifest lists {name}; give the manifest that the "
                "features were made from."
            )

    def where(self, utterance: int) -> str:
        """Say in words which utterance this is, for messages."""
        path = self._shards[self._shard_of[utterance]].path
        return f"{path}, {self.names[utterance] if self.names else f'utterance {utterance}'}"

    def features(self, utterance: int, start: int = 0, stop: int | None = None) -> npt.NDArray[np.floating]:
        """Return a view (T, D) of an utterance, or of its frames `start` to `stop`; values are not checked."""
        row, length = self._row_of[utterance], self.lengths[utterance]
        stop = length if stop is None else min(stop, length)
        rows: npt.NDArray[np.floating] = self._shards[self._shard_of[utterance]].rows[row + start : row + stop]
        return rows

    def read(self, utterance: int, start: int = 0, stop: int | None = None) -> npt.NDArray[np.float32]:
        """Read an utterance's features (T, D), or its frames `start` to `stop`, as float32.

        Unlike `features` this maps nothing: reading a whole split takes no more memory than its longest piece.

        Raises:
            RepCodecError: a value is not finite, or the file has changed since it was opened.
        """
        shard, row = self._shards[self._shard_of[utterance]], self._row_of[utterance]
        stop = self.lengths[utterance] if stop is None else min(stop, self.lengths[utterance])
        start = min(start, stop)
        dtype, count = shard.rows.dtype, int(stop - start) * self.dim
        if count == 0:
            return np.empty((0, self.dim), dtype=np.float32)
        offset = shard.offset + int(row + start) * self.dim * dtype.itemsize
        try:
            values = np.fromfile(shard.path, dtype, count, offset=offset)
        except OSError as error:
            raise RepCodecError(f"{shard.path}: cannot be read ({error.strerror}).") from error
        if len(values) < count:
            raise RepCodecError(f"{shard.path}: the file was cut off while it was read; extract it again.")
        frames = values.reshape(-1, self.dim).astype(np.float32, copy=False)
        check_finite(frames, self.where(utterance), int(start))
        return frames

    def gather(
        self,
        utterances: Sequence[int],
        starts: Sequence[int],
        num_frames: int,
        out: npt.NDArray[np.float32] | None = None,
        check: bool = True,
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        """Copy crops straight into one batch, zeros where an utterance ends before its crop.

        Args:
            utterances: B utterances.
            starts: the first frame of each crop.
            num_frames: T, the frames of a crop.
            out: (B, T, D) float32, where the batch shall lie; None: in new memory.
            check: whether to look for values that are not finite.

        Returns:
            (B, T, D) float32 features and (B,) int64 valid frames of each.

        Raises:
            RepCodecError: a value is not finite.
        """
        batch = np.empty((len(utterances), num_frames, self.dim), dtype=np.float32) if out is None else out
        chosen, first = np.asarray(utterances), np.asarray(starts)
        lengths = np.maximum(np.minimum(self.lengths[chosen] - first, num_frames), 0)
        rows = self._row_of[chosen] + first
        places = zip(self._shard_of[chosen].tolist(), rows.tolist(), lengths.tolist(), strict=True)
        with np.errstate(over="ignore", invalid="ignore"):
            for b, (shard, row, length) in enumerate(places):
                frames = batch[b, :length]
                frames[:] = self._shards[shard].rows[row : row + length]
                if length < num_frames:
                    batch[b, length:] = 0
                # The quickest look at all values: what is not finite makes this sum so. Large values may, too.
                if check and not math.isfinite(np.vecdot(frames, frames).sum()):
                    check_finite(frames, self.where(utterances[b]), starts[b])
        return batch, lengths

    def sample(self, num_frames: int) -> npt.NDArray[np.float32]:
        """Return at most `num_frames` frames, evenly spaced over all: all of them when there are no more.

        Returns:
            (N, D) float32.

        Raises:
            RepCodecError: a value is not finite.
        """
        return self._sample(self._shards, num_frames)

    def _sample(self, shards: Sequence[Shard], num_frames: int) -> npt.NDArray[np.float32]:
        step = max(1, -(-sum(len(shard.rows) for shard in shards) // num_frames))
        parts = []
        first = 0
        for shard in shards:
            rows = np.asarray(shard.rows[first::step], dtype=np.float32)
            check_finite(rows, shard.path, first, step)
            parts.append(rows)
            first = (first - len(shard.rows)) % step
        return np.concatenate(parts)
