"""Features as batches; out of feature shards here, out of sound in `audio_data.py`.

Axes: B batch, T frames, D feature width. Which utterance stands in which batch, and where it is cropped,
is decided by a sampler, from the seed and the batch's number alone: workers only copy, so their number
changes nothing, and a resumed run goes on where the last one stopped.
"""

import weakref
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from repcodec.errors import RepCodecError
from repcodec.labels import PhoneLabels
from repcodec.loaders import CropSampler, ReadAheadLoader, ResumableLoader
from repcodec.mixture import FeatureMix, whole_weights
from repcodec.shards import FeatureShards
from repcodec.speech_encoders import encoder_table

SAMPLE_FRAMES = 200_000
"""Mean and scale of the training set, and the k-means baseline, see at most so many frames, evenly spaced over it."""


class Batch(NamedTuple):
    """Utterances, or crops of them.

    Attributes:
        features: (B, T, D) float32, zero beyond the lengths.
        lengths: (B,) int64, valid frames of each row.
        utterances: (B,) int64, their numbers in the split.
        full: whether all frames of all rows are valid; False where nobody has looked. To read that from `lengths`
            would wait for the device.
    """

    features: Tensor
    lengths: Tensor
    utterances: Tensor
    full: bool = False

    def pin_memory(self) -> "Batch":
        """Return the batch in memory that a GPU reads by itself while this process goes on."""
        tensors = self.features, self.lengths, self.utterances
        features, lengths, utterances = (tensor.pin_memory() for tensor in tensors)
        return Batch(features, lengths, utterances, self.full)


@dataclass(frozen=True)
class FeatureStatistics:
    """Statistics of the training set.

    Attributes:
        mean: (D,) float32.
        scale: root of the mean squared deviation from it, over frames and dimensions.
    """

    mean: Tensor
    scale: float


class ShardDataset(Dataset[Batch]):
    """A split's features; an item is a whole batch, asked for by (utterance, first frame) pairs.

    Args:
        num_frames: T of every item; None: as long as the batch's longest utterance.
    """

    def __init__(self, shards: FeatureShards, num_frames: int | None):
        self.shards, self.num_frames = shards, num_frames
        self._free: deque[npt.NDArray[np.float32]] = deque()  # appending and popping are safe between threads

    def __getitem__(self, places: Sequence[tuple[int, int]]) -> Batch:
        utterances = [utterance for utterance, _ in places]
        starts = [start for _, start in places]
        if self.num_frames is None:
            longest = max(1, int(self.shards.lengths[utterances].max()))
            features, lengths = self.shards.gather(utterances, starts, longest)
        else:
            room = self._room((len(places), self.num_frames, self.shards.dim))
            # Not checked: that costs as much as half a copy, and the step finds what is not finite (numerics.py).
            features, lengths = self.shards.gather(utterances, starts, self.num_frames, room, check=False)
        full = bool((lengths == features.shape[1]).all())
        return Batch(torch.from_numpy(features), torch.from_numpy(lengths), torch.tensor(utterances), full)

    def _room(self, shape: tuple[int, int, int]) -> npt.NDArray[np.float32]:
        """Return memory for a batch, if possible that of one that is no longer used: new pages cost half a copy."""
        while self._free:
            memory = self._free.pop()
            if memory.shape == shape:
                break
        else:
            memory = np.empty(shape, dtype=np.float32)
        # The tensor, and every view of it, holds this array, and nobody else does: when it goes, the memory is free.
        room = memory[:]
        weakref.finalize(room, self._free.append, memory).atexit = False
        return room


class FeaturesDataModule(L.LightningDataModule):
    """Contract: training crops and whole validation and test utterances, as features of one speech encoder's layer.

    Attributes:
        dim: D.
        encoder, layer: name of the speech encoder, and its layer.
        source: where the features come from, for messages.
        device: where features are computed, if they are, when there is no trainer.
        decodes: whether reading an utterance takes work that other processes can do.
    """

    source: str
    decodes = False

    def __init__(
        self,
        *,
        dim: int,
        encoder: str,
        layer: int,
        labels: str | None = None,
        batch_size: int = 32,
        crop: int = 96,
        seed: int = 0,
        num_workers: int = 0,
        whole_frames: int = 20_000,
    ):
        """Take what all sources of features have; nothing is opened yet.

        Args:
            dim: D.
            encoder, layer: of the features.
            labels: phone labels in any format of `PhoneLabels.read`, for evaluation.
            batch_size: crops a batch and rank.
            crop: T, frames a crop; a shorter utterance is padded and masked.
            seed: of order and crops.
            num_workers: processes that read ahead, threads where that takes no computing.
            whole_frames: at most so many frames, padding included, in a batch of whole utterances.

        Raises:
            RepCodecError: a number is not positive, or no number.
        """
        super().__init__()
        for name, value in (("batch_size", batch_size), ("crop", crop), ("whole_frames", whole_frames)):
            if type(value) is not int or value < 1:
                raise RepCodecError(f"data.{name}={value}: expected a whole number, at least 1.")
        if type(num_workers) is not int or num_workers < 0:
            raise RepCodecError(f"data.num_workers={num_workers}: expected a whole number, at least 0.")
        if type(seed) is not int or not 0 <= seed < 2**32:
            raise RepCodecError(f"seed={seed}: expected a whole number from 0 to {2**32 - 1}.")
        self.dim, self.encoder, self.layer = dim, encoder, layer
        self.labels = labels
        self.batch_size, self.crop, self.seed, self.num_workers = batch_size, crop, seed, num_workers
        self.whole_frames = whole_frames
        self.device = torch.device("cpu")
        self._splits: dict[str, Any] = {}

    def has_split(self, name: str) -> bool:
        """Say whether there is a split of that name."""
        raise NotImplementedError

    def split(self, name: str) -> Any:
        """Open a split: a `FeatureShards`, or what offers the same.

        Raises:
            RepCodecError: it is missing or broken.
        """
        raise NotImplementedError

    def dataset(self, split: Any, num_frames: int | None) -> Dataset[Any]:
        """Return a dataset whose items are batches, asked for by (utterance, first frame) pairs; see ShardDataset."""
        return ShardDataset(split, num_frames)

    def opened(self, name: str) -> Any:
        """Return a split, opened once; see `split`."""
        if name not in self._splits:
            self._splits[name] = self.split(name)
        return self._splits[name]

    @property
    def train(self) -> Any:
        """The training split."""
        return self.opened("train")

    @property
    def train_ids(self) -> Sequence[str] | None:
        """Ids of the utterances that a training batch numbers; None where they are not known."""
        ids: Sequence[str] | None = self.train.ids
        return ids

    @property
    def about_features(self) -> dict[str, Any]:
        """What config.json says of the features besides encoder and layer, as far as it is known.

        waveform_norm: see `EncoderSpec`; encoder_model: hub id or absolute folder of the speech encoder;
        encoder_sha256: hash of its weights.
        """
        row = encoder_table().get(self.encoder)
        known: dict[str, Any] = {"waveform_norm": row.waveform_norm} if row is not None else {}
        known |= self.train.about_features
        return known

    def describe_valid(self) -> str:
        """Say what the validation split is, for the model card: that is made public, so no path is named."""
        minutes = int(self.valid.lengths.sum()) / (self.valid.frame_rate or 50) / 60
        length = f"{minutes / 60:.1f} hours" if minutes >= 60 else f"{minutes:.1f} minutes"
        corpus = f", of {self.corpus_name}" if self.corpus_name else ""
        return f"validation split, {len(self.valid):,} utterances, {length}{corpus}"

    @property
    def corpus_name(self) -> str:
        """Name of the folder that holds the validation split's sound; "" where that is not known."""
        return Path(self.valid.root).name

    @cached_property
    def statistics(self) -> FeatureStatistics:
        """Mean and scale of the training split."""
        frames = self.train.sample(SAMPLE_FRAMES)
        mean = frames.mean(0, dtype=np.float64)
        blocks = np.array_split(frames, -(-len(frames) // 8192))  # float64 of a block at a time, not of all
        squares = sum(float(((block - mean) ** 2).sum()) for block in blocks)
        scale = np.sqrt(squares / frames.size)
        return FeatureStatistics(torch.from_numpy(mean).float(), float(scale) or 1.0)

    @cached_property
    def phone_labels(self) -> PhoneLabels | None:
        """The phone labels, None where there are none."""
        return PhoneLabels.read(self.labels) if self.labels is not None else None

    def _rank(self) -> tuple[int, int]:
        """Return rank and world size; (0, 1) without a trainer."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def train_dataloader(self) -> ResumableLoader:
        """Return random crops, without end."""
        sampler = CropSampler(self.train.lengths, self.crop, self.batch_size, self.seed, *self._rank())
        return ResumableLoader(
            self.dataset(self.train, self.crop), sampler=sampler, batch_size=None, num_workers=self.num_workers
        )

    def val_dataloader(self) -> DataLoader[Any]:
        """Return the whole utterances of the validation split, this rank's share of them."""
        return self.whole_utterances(self.valid, *self._rank())

    @property
    def valid(self) -> Any:
        """The validation split."""
        return self.opened("valid")

    def start_batches(self) -> Iterable[Any]:
        """Return the whole utterances of the training split, all on this rank, in random order: to start a codec."""
        return self.whole_utterances(self.train, shuffle=True)

    def whole_utterances(
        self,
        split: Any,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = False,
        chosen: npt.NDArray[np.intp] | None = None,
    ) -> DataLoader[Any]:
        """Return batches of whole utterances, this rank's share of them, each sorted by length.

        Args:
            split: of which.
            rank, world_size: of this process.
            shuffle: whether batches come in random order.
            chosen: numbers of the utterances; None: all that have a frame.
        """
        chosen = np.flatnonzero(split.lengths) if chosen is None else chosen
        order = chosen[np.argsort(split.lengths[chosen], kind="stable")][rank::world_size]
        batches: list[list[tuple[int, int]]] = [[]]
        for utterance in order.tolist():
            if batches[-1] and (len(batches[-1]) + 1) * split.lengths[utterance] > self.whole_frames:
                batches.append([])
            batches[-1].append((utterance, 0))
        if shuffle:
            batches = [batches[i] for i in np.random.default_rng(self.seed).permutation(len(batches))]
        if len(order) == 0:
            # Fewer utterances than ranks: an empty crop, so that all ranks meet where metrics are added up.
            batches = [[(0, 2**31)]]
        workers = self.num_workers if self.decodes else 0
        return DataLoader(self.dataset(split, None), sampler=batches, batch_size=None, num_workers=workers)


class ShardsDataModule(FeaturesDataModule):
    """Batches out of feature shards of one folder, or of several that are mixed."""

    def __init__(
        self,
        *,
        dim: int,
        encoder: str,
        layer: int,
        root: str | Mapping[str, float] | None = None,
        dir: str | Mapping[str, float] | None = None,
        check: bool = False,
        **options: Any,
    ):
        """Describe where the splits train/, valid/ and test/ lie; nothing is opened yet.

        Args:
            dim: D.
            encoder, layer: of the features; they name the folder below `root`.
            root: holds `<encoder>/l<layer>/<split>/`, as `repcodec extract` writes; or several, each with its weight:
                rows of a training batch are drawn from them in that proportion, while validation and test are all
                that they hold of it.
            dir: holds `<split>/` itself, instead of `root`.
            check: whether to read all training and validation features once before training.
            options: see `FeaturesDataModule`.

        Raises:
            RepCodecError: neither `root` nor `dir` is given, a weight is no number above 0, or a number is not
                positive.
        """
        super().__init__(dim=dim, encoder=encoder, layer=layer, **options)
        places = dir if dir is not None else root
        if not places:
            raise RepCodecError("data.root and data.dir are both unset: say where the feature shards lie.")
        weights = dict(places) if isinstance(places, Mapping) else {places: 1}
        self.weights = whole_weights(weights)
        self.dirs = [Path(place) if dir is not None else Path(place) / encoder / f"l{layer}" for place in weights]
        self.source = str(self.dirs[0])
        if len(weights) > 1:
            self.source = " + ".join(f"{weight} x {one}" for weight, one in zip(self.weights, self.dirs, strict=True))
        self.check = check

    def prepare_data(self) -> None:
        """Where that is asked for, read all features of training and validation once.

        Raises:
            RepCodecError: a shard is damaged; names the file.
        """
        for name in ("train", "valid") if self.check else ():
            split = self.split(name)
            for utterance in tqdm(range(len(split)), desc=f"Checking the features, {name}", unit="utt"):
                split.read(utterance)

    def setup(self, stage: str) -> None:
        """Open both splits before training does anything else.

        Raises:
            RepCodecError: one is missing or broken.
        """
        if stage == "fit":
            assert len(self.train) and len(self.valid)

    def has_split(self, name: str) -> bool:
        """Say whether there is a folder of that name."""
        return any((one / name).is_dir() for one in self.dirs)

    def split(self, name: str) -> FeatureShards:
        """Open a split; of several roots the training split is their mixture, another one all that there is of it.

        Raises:
            RepCodecError: it is missing or broken; the sentence says which command makes it.
        """
        folders = [one / name for one in self.dirs]
        if name != "train" and self.has_split(name):
            folders = [folder for folder in folders if folder.is_dir()]
        for folder in folders:
            if not folder.is_dir():
                raise RepCodecError(
                    f"{folder} does not exist: no {name} features of {self.encoder} layer {self.layer}; make them with "
                    f"`repcodec extract {name}.tsv ROOT --encoder {self.encoder} --layer {self.layer}` and "
                    "data.root=ROOT, name another folder of splits with data.dir, or train from sound with data=audio."
                )
        mixed = name == "train" and len(folders) > 1
        shards = FeatureMix(folders, self.weights, self.dim) if mixed else FeatureShards(folders, self.dim)
        shards.check_source(self.encoder, self.layer)
        return shards

    def train_dataloader(self) -> ResumableLoader:
        """See `FeaturesDataModule`; threads read ahead."""
        sampler = CropSampler(
            self.train.lengths, self.crop, self.batch_size, self.seed, *self._rank(), self.train.folder_of, self.weights
        )
        return ReadAheadLoader(self.dataset(self.train, self.crop), sampler, self.num_workers)

    def start_batches(self) -> Iterable[Batch]:
        """See `FeaturesDataModule`; of several roots each is there by weight."""
        chosen = self.train.by_weight(self.seed) if isinstance(self.train, FeatureMix) else None
        return self.whole_utterances(self.train, shuffle=True, chosen=chosen)
