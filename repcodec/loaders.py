"""Which crops come when, and loaders that read them ahead and go on where they stopped."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from repcodec.errors import RepCodecError
from repcodec.mixture import row_pattern

MOST_TIMES = 100
"""How often an utterance may come in one batch: a few sounds are enough to try things out, but not for any batch."""


class CropSampler(Sampler[list[tuple[int, int]]]):
    """Random crops in an endless random order, cut into batches; only this rank's rows are given.

    The order is one shuffle of the utterances after another, each used up before the next, so all batches
    are full, however few utterances there are. Utterances without a frame are left out. Where utterances are from
    several folders, each folder has an order of its own, and rows are drawn from the folders in a fixed pattern.
    Batch number n is a function of n and the seed.

    Attributes:
        position: the number of the next batch.
    """

    def __init__(
        self,
        lengths: npt.NDArray[np.int64],
        num_frames: int,
        batch_size: int,
        seed: int,
        rank: int,
        world_size: int,
        folder_of: npt.NDArray[np.integer] | None = None,
        weights: Sequence[int] = (1,),
    ):
        """Take what decides the batches.

        Args:
            lengths: (N,) frames.
            num_frames: of a crop.
            batch_size: of one rank.
            seed: of order and crops.
            rank, world_size: this rank's place.
            folder_of: (N,) the folder of each utterance; None: there is one.
            weights: rows that are drawn from each folder in sum(weights) rows.

        Raises:
            RepCodecError: every utterance would come many times in one batch.
        """
        folder_of = np.zeros_like(lengths) if folder_of is None else folder_of
        self.utterances = [np.flatnonzero((lengths > 0) & (folder_of == folder)) for folder in range(len(weights))]
        there, rows = sum(map(len, self.utterances)), batch_size * world_size
        if rows > MOST_TIMES * max(1, there):
            devices = f" on {world_size} devices" if world_size > 1 else ""
            raise RepCodecError(
                f"data.batch_size={batch_size}{devices}: the training set has {there:,} utterances, so each would come "
                f"{rows // max(1, there):,} times in a batch; take a smaller batch."
            )
        self.lengths, self.num_frames, self.batch_size, self.seed = lengths, num_frames, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.position = 0
        self.weights, self._folders = weights, row_pattern(weights)
        self._earlier = np.empty_like(self._folders)  # rows of the same folder before this one in the pattern
        for folder, weight in enumerate(weights):
            self._earlier[self._folders == folder] = np.arange(weight)
        self._shuffles = [(-1, np.empty(0, int), np.empty(0))] * len(weights)

    def __len__(self) -> int:
        """Return a number that is never reached: the one epoch has no end, so nothing depends on where epochs do."""
        return 2**62

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """Yield batches from `position` on, as (utterance, first frame) pairs."""
        for number in range(self.position, len(self)):
            yield self.batch(number)

    def batch(self, number: int) -> list[tuple[int, int]]:
        """Return this rank's rows of batch `number`."""
        rows = (number * self.world_size + self.rank) * self.batch_size + np.arange(self.batch_size)
        times, place = np.divmod(rows, len(self._folders))
        chosen, starts = np.empty_like(rows), np.empty_like(rows)
        for folder, mine in enumerate(self.utterances):
            here = np.flatnonzero(self._folders[place] == folder)
            shuffles, index = np.divmod(times[here] * self.weights[folder] + self._earlier[place[here]], len(mine))
            for shuffle in np.unique(shuffles).tolist():
                order, where = self._shuffle(folder, shuffle)
                these = shuffles == shuffle
                chosen[here[these]] = utterances = order[index[these]]
                room = np.maximum(self.lengths[utterances] - self.num_frames, 0)
                starts[here[these]] = where[index[these]] * (room + (room > 0))
        return list(zip(chosen.tolist(), starts.tolist(), strict=True))

    def _shuffle(self, folder: int, shuffle: int) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.float64]]:
        """Return a folder's utterances in the order of one of its shuffles, and where each is cropped, 0 to 1."""
        kept = self._shuffles[folder]
        if kept[0] != shuffle:
            rng = np.random.default_rng([self.seed, shuffle, folder])
            mine = self.utterances[folder]
            kept = self._shuffles[folder] = shuffle, rng.permutation(mine), rng.random(len(mine))
        return kept[1:]


class ResumableLoader(DataLoader[Any]):
    """A DataLoader over a sampler with a `position`; its state is the number of batches given out.

    Attributes:
        waited: seconds that batches were waited for, so far.
    """

    sampler: Any
    waited = 0.0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # torch names its own iterator class
        """Yield batches from the sampler's position on."""
        started = perf_counter()
        for batch in self._read():
            self.waited += perf_counter() - started
            self.sampler.position += 1
            yield batch
            started = perf_counter()

    def _read(self) -> Iterator[Any]:
        return super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        """Return the state that Lightning puts into a checkpoint."""
        return {"position": self.sampler.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the batches of a checkpoint."""
        self.sampler.position = state["position"]


class ReadAheadLoader(ResumableLoader):
    """Reads ahead in threads: copying what is mapped needs no process of its own, and no way back from it."""

    def __init__(self, dataset: Dataset[Any], sampler: Sampler[Any], num_threads: int):
        """Take a dataset of batches and how many of them are made at once; 0: each when it is asked for."""
        super().__init__(dataset, sampler=sampler, batch_size=None)
        self.num_threads = num_threads

    def _read(self) -> Iterator[Any]:
        if self.num_threads == 0:
            yield from map(self.dataset.__getitem__, self.sampler)
            return
        # Threads draw the crops too, so that this one, which trains, has nothing to do but take the batches.
        with ThreadPoolExecutor(self.num_threads) as pool:
            ahead: deque[Future[Any]] = deque()
            for number in range(self.sampler.position, len(self.sampler)):
                ahead.append(pool.submit(self._make, number))
                if len(ahead) > self.num_threads:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()

    def _make(self, number: int) -> Any:
        batch = self.dataset[self.sampler.batch(number)]
        # In memory that a GPU reads by itself, while this process goes on.
        return batch.pin_memory() if torch.cuda.is_available() else batch
