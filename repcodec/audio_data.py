"""Features as batches straight from sound: the frozen speech encoder runs on the training device (`data=audio`).

Workers decode sound; features are computed when a batch has reached the device, whole utterances at a time, and
cropped then, so that a batch holds what feature shards of the same sounds would have given.

Axes: B batch, T frames, D feature width, S samples.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler, get_worker_info

from repcodec.audio import SAMPLE_RATE
from repcodec.cuts import Shar, num_samples, open_sounds, read_cut
from repcodec.data import SAMPLE_FRAMES, Batch, FeaturesDataModule
from repcodec.errors import RepCodecError
from repcodec.loaders import ResumableLoader
from repcodec.manifest import SoundList
from repcodec.shards import check_source, found_at
from repcodec.speech_encoders import BATCH_SECONDS, EncoderSpec, SpeechEncoder, batches_of, load_speech_encoder

STRETCH = 60
"""Seconds of a long recording that a sample of the training set takes."""


class SoundBatch(NamedTuple):
    """Utterances whose features are still to be computed.

    Attributes:
        waveform: (sum of S,) float32 at 16 kHz, the utterances end to end.
        num_samples: (B,) int64, S of each.
        starts: (B,) int64, the first frame of each crop.
        utterances: (B,) int64, their numbers in the split.
        num_frames: T of the crops; 0: whole utterances, as long as the longest.
    """

    waveform: Tensor
    num_samples: Tensor
    starts: Tensor
    utterances: Tensor
    num_frames: int

    @classmethod
    def of(cls, rows: Sequence[tuple[npt.NDArray[np.float32], int, int]], num_frames: int) -> "SoundBatch":
        """Join (waveform, first frame, utterance) of each row."""
        waveforms, starts, utterances = zip(*rows, strict=True)
        lengths = torch.tensor([len(waveform) for waveform in waveforms])
        return cls(
            torch.from_numpy(np.concatenate(waveforms)),
            lengths,
            torch.tensor(starts),
            torch.tensor(utterances),
            num_frames,
        )


class SoundFeatures:
    """The features of a list of sounds, computed when they are asked for; offers what `FeatureShards` does to those
    that read whole utterances.

    Attributes:
        sounds: the list.
        lengths: (N,) frames of each utterance, as its listed samples have it.
        folder, names, ids, root, frame_rate, manifest_sha256, dim: see `FeatureShards`.
    """

    def __init__(
        self,
        sounds: SoundList,
        source: str,
        spec: EncoderSpec,
        layer: int,
        encode: Callable[[list[Tensor]], list[Tensor]],
        frames_of: Callable[[int], int],
        weights_sha256: str,
    ):
        """Take the list, what messages call it, and what its features are.

        Args:
            encode: waveforms (S,) -> features (T, D).
            frames_of: samples -> frames.
            weights_sha256: hash of the speech encoder's weights.

        Raises:
            RepCodecError: no utterance is long enough for one frame.
        """
        self.sounds, self.folder, self._encode = sounds, source, encode
        self.names, self.ids, self.root = list(sounds.paths), sounds.ids, str(sounds.root)
        self.dim, self.frame_rate = spec.dim, spec.frame_rate
        self._source, self._weights_sha256 = (spec.name, layer), weights_sha256
        self.lengths = np.array([frames_of(samples) for samples in sounds.num_samples])
        if self.lengths.sum() == 0:
            raise RepCodecError(f"{source}: no sound is long enough for one frame.")

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def manifest_sha256(self) -> str:
        """Hash of the list."""
        return self.sounds.sha256()

    @property
    def stamp(self) -> list[list[str | int]]:
        """What tells these features from others of the same name: the list of sounds, and the encoder's weights."""
        return [[self.manifest_sha256, self._weights_sha256]]

    def waveform(self, utterance: int) -> npt.NDArray[np.float32]:
        """Return the (S,) samples of an utterance at 16 kHz."""
        return self.sounds.waveform(utterance)

    def check_source(self, encoder: str | None, layer: int | None) -> None:
        """Refuse another speech encoder or layer; see `repcodec.shards.check_source`."""
        check_source(self.folder, self._source, (encoder, layer))

    def where(self, utterance: int) -> str:
        """Say in words which utterance this is, for messages."""
        return f"{self.folder}, {self.names[utterance]}"

    def read(self, utterance: int) -> npt.NDArray[np.float32]:
        """Return the (T, D) float32 features of an utterance."""
        features: npt.NDArray[np.float32] = (
            self._encode([torch.from_numpy(self.sounds.waveform(utterance))])[0].cpu().numpy()
        )
        return features

    def sample(self, num_frames: int) -> npt.NDArray[np.float32]:
        """Return at most `num_frames` frames: all of them when there are no more.

        Otherwise those of utterances evenly spaced over all, of a long one only `STRETCH` seconds in its middle.

        Returns:
            (N, D) float32.
        """
        chosen = np.flatnonzero(self.lengths)
        room = None
        if self.lengths.sum() > num_frames:
            room = STRETCH * SAMPLE_RATE
            typical = self.lengths[chosen].clip(max=STRETCH * self.frame_rate).mean()
            number = min(len(chosen), -(-num_frames // int(typical)))
            chosen = chosen[np.linspace(0, len(chosen) - 1, number).astype(int)]
        utterances = chosen.tolist()
        parts = []
        for batch in batches_of([self.sounds.num_samples[i] for i in utterances], BATCH_SECONDS):
            waveforms = [torch.from_numpy(self.sounds.waveform(utterances[i])) for i in batch]
            stretches = [one if room is None else one[max(0, len(one) - room) // 2 :][:room] for one in waveforms]
            parts += [features.cpu().numpy() for features in self._encode(stretches)]
        return np.concatenate(parts)[:num_frames]


class SoundDataset(Dataset[SoundBatch]):
    """A split's sounds; an item is a whole batch, asked for by (utterance, first frame) pairs.

    Args:
        num_frames: T of the crops; None: whole utterances.
    """

    def __init__(self, sounds: SoundList, num_frames: int | None):
        self.sounds, self.num_frames = sounds, num_frames or 0

    def __getitem__(self, places: Sequence[tuple[int, int]]) -> SoundBatch:
        rows = [(self.sounds.waveform(utterance), start, utterance) for utterance, start in places]
        return SoundBatch.of(rows, self.num_frames)


class SharDataset(Dataset[SoundBatch]):
    """Random crops of cuts that are read as a stream; an item is a whole batch, asked for by its number.

    Batch number n of a rank is a function of n, the seed and the number of ranks alone. Each worker reads past the
    whole stream and decodes what its own batches need.
    """

    def __init__(
        self,
        shar: Shar,
        frames_of: Callable[[int], int],
        crop: int,
        batch_size: int,
        seed: int,
        rank: int,
        world_size: int,
    ):
        self.shar, self.frames_of, self.crop, self.batch_size = shar, frames_of, crop, batch_size
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self._next = -1
        self._stream: Iterator[tuple[int, Any]] = iter(())

    def __getitem__(self, number: int) -> SoundBatch:
        workers = info.num_workers if (info := get_worker_info()) else 1
        if number != self._next:
            self._stream = self._open(number, workers)
        self._next = number + workers
        rows = []
        for place, cut in self._stream:
            room = self.frames_of(num_samples(cut)) - self.crop
            start = int(np.random.default_rng([self.seed, place]).integers(room + 1)) if room > 0 else 0
            rows.append((read_cut(cut, self.shar.source), start, place))
            if len(rows) == self.batch_size:
                break
        return SoundBatch.of(rows, self.crop)

    def _open(self, number: int, workers: int) -> Iterator[tuple[int, Any]]:
        def wanted(place: int) -> bool:
            batch, rank = divmod(place // self.batch_size, self.world_size)
            return rank == self.rank and batch >= number and (batch - number) % workers == 0

        return self.shar.stream(self.seed, number * self.world_size * self.batch_size, wanted)


class EndlessSampler(Sampler[int]):
    """Batch numbers from `position` on; the one epoch has no end."""

    def __init__(self) -> None:
        self.position = 0

    def __len__(self) -> int:
        return 2**62

    def __iter__(self) -> Iterator[int]:
        yield from range(self.position, len(self))


class AudioDataModule(FeaturesDataModule):
    """Batches of features, out of sound.

    The speech encoder is no part of the LightningModule, so a checkpoint holds none of its weights, only which it was.
    """

    decodes = True

    def __init__(
        self,
        *,
        train: str | Mapping[str, str | Sequence[str]] | None,
        valid: str | Mapping[str, str | Sequence[str]] | None,
        test: str | Mapping[str, str | Sequence[str]] | None,
        encoder: Mapping[str, Any],
        layer: int,
        batch_seconds: float = BATCH_SECONDS,
        **options: Any,
    ):
        """Say where the sounds are; nothing is opened yet.

        Args:
            train, valid, test: see `repcodec.cuts.open_sounds`; a Shar of the training split is streamed.
            encoder: a row of the encoder table; its `model` is where the weights come from.
            layer: 1-based.
            batch_seconds: seconds of sound that the speech encoder runs at once.
            options: see `FeaturesDataModule`.

        Raises:
            RepCodecError: there is no such layer, or a number is not positive.
        """
        self.spec = EncoderSpec(**encoder)
        super().__init__(dim=self.spec.dim, encoder=self.spec.name, layer=self.spec.valid_layer(layer), **options)
        if not batch_seconds > 0:
            raise RepCodecError(f"data.batch_seconds={batch_seconds}: expected more than 0.")
        self.sources = {"train": train, "valid": valid, "test": test}
        self.batch_seconds = batch_seconds
        self.source = "sound: " + ", ".join(f"{name} {source}" for name, source in self.sources.items() if source)

    @cached_property
    def speech_encoder(self) -> SpeechEncoder:
        """The frozen speech encoder, on the training device."""
        device = self.trainer.strategy.root_device if self.trainer else self.device
        return load_speech_encoder(self.spec, self.layer).to(device)

    @property
    def about_features(self) -> dict[str, Any]:
        """What config.json says of the features besides encoder and layer; see `FeaturesDataModule`."""
        return {
            "waveform_norm": self.spec.waveform_norm,
            "encoder_model": found_at(self.spec.model),
            "encoder_sha256": self.speech_encoder.weights_sha256,
        }

    @property
    def train_ids(self) -> Sequence[str] | None:
        """See `FeaturesDataModule`; a Shar's batches are numbered by their places in an endless stream."""
        return None if isinstance(self._train, Shar) else super().train_ids

    def has_split(self, name: str) -> bool:
        """Say whether sounds are given for a split."""
        return self.sources.get(name) is not None

    def _open(self, name: str) -> SoundList | Shar:
        source = self.sources.get(name)
        if source is None:
            raise RepCodecError(
                f"data.{name} is not set: give a manifest (`repcodec manifest FOLDER -o {name}.tsv`), a lhotse CutSet "
                "or a folder of Shar archives."
            )
        return open_sounds(source)

    @cached_property
    def _train(self) -> SoundList | Shar:
        return self._open("train")

    def split(self, name: str) -> SoundFeatures:
        """Open a split; of a Shar to train on, as many cuts as its statistics take."""
        sounds = self._train if name == "train" else self._open(name)
        frames_of = self.speech_encoder.num_frames
        if isinstance(sounds, Shar):
            sounds = sounds.sample(self.seed, SAMPLE_FRAMES, frames_of) if name == "train" else sounds.whole()
        weights = self.speech_encoder.weights_sha256
        return SoundFeatures(sounds, str(self.sources[name]), self.spec, self.layer, self.encode, frames_of, weights)

    def encode(self, waveforms: Sequence[Tensor]) -> list[Tensor]:
        """Waveforms (S,) at 16 kHz -> features (T, D) of each, on the speech encoder's device."""
        device = next(self.speech_encoder.parameters()).device
        features: list[Tensor] = []
        for batch in batches_of([len(waveform) for waveform in waveforms], self.batch_seconds):
            features += self.speech_encoder([waveforms[i].to(device) for i in batch])
        return features

    def features_of(self, batch: SoundBatch) -> Batch:
        """Compute a batch's features and crop them.

        Raises:
            RepCodecError: a feature is not finite.
        """
        found = self.encode(batch.waveform.split(batch.num_samples.tolist()))
        crops = [row[start:] for row, start in zip(found, batch.starts.tolist(), strict=True)]
        num_frames = batch.num_frames or max(1, *map(len, crops))
        crops = [crop[:num_frames] for crop in crops]
        # In the waveform's type: double where the whole training is.
        features = found[0].new_zeros(len(crops), num_frames, self.dim, dtype=batch.waveform.dtype)
        for row, crop in zip(features, crops, strict=True):
            row[: len(crop)] = crop
        if not torch.isfinite(features).all():
            bad = [int(u) for u, row in zip(batch.utterances, features, strict=True) if not torch.isfinite(row).all()]
            raise RepCodecError(f"{self.source}: features of utterances {bad[:5]} hold NaN or infinity.")
        lengths = torch.tensor([len(crop) for crop in crops], device=features.device)
        return Batch(features, lengths, batch.utterances, full=min(map(len, crops)) == num_frames)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Turn sound into features; Lightning calls this when a batch has reached the device.

        Raises:
            RepCodecError: the precision has rounded the sound itself.
        """
        if batch.waveform.dtype in (torch.float16, torch.bfloat16):
            raise RepCodecError(
                "data=audio takes trainer.precision 32, 16-mixed or bf16-mixed, not 16-true or bf16-true."
            )
        return self.features_of(batch)

    def dataset(self, split: SoundFeatures, num_frames: int | None) -> Dataset[SoundBatch]:
        """Return a dataset whose items are `SoundBatch`es."""
        return SoundDataset(split.sounds, num_frames)

    def train_dataloader(self) -> ResumableLoader:
        """Return random crops; of a Shar, in the order of its stream."""
        if not isinstance(self._train, Shar):
            return super().train_dataloader()
        dataset = SharDataset(
            self._train, self.speech_encoder.num_frames, self.crop, self.batch_size, self.seed, *self._rank()
        )
        return ResumableLoader(dataset, sampler=EndlessSampler(), batch_size=None, num_workers=self.num_workers)

    def start_batches(self) -> Iterable[Batch]:
        """Return the whole utterances of the training split, in random order, as features."""
        return map(self.features_of, super().start_batches())

    def state_dict(self) -> dict[str, Any]:
        """Return which speech encoder the features are of, for the checkpoint."""
        return {"encoder": self.encoder, "layer": self.layer, "weights_sha256": self.speech_encoder.weights_sha256}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Refuse a checkpoint that was trained on features of another speech encoder or layer.

        Raises:
            RepCodecError: says which it was.
        """
        if state != self.state_dict():
            raise RepCodecError(
                f"the checkpoint was trained on features of {state['encoder']} layer {state['layer']} with weights "
                f"{state['weights_sha256'][:12]}…, but these are of {self.encoder} layer {self.layer} with weights "
                f"{self.speech_encoder.weights_sha256[:12]}…; choose the same encoder, layer and encoder.model."
            )
