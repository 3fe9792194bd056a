"""ABX error: how often a phone is nearer to another phone than to itself (Schatz et al. 2013; Schatz 2016).

A, B and X are tokens: A and X of one phone a, B of another phone b. X is answered wrongly when d(X, A) > d(X, B), and
half wrongly when they are equal: chance is 0.5. Within speakers, one speaker says A, B and X, and X is not A; across
speakers, one says A and B, and another X. d is the mean, along the path that aligns two tokens best (dynamic time
warping), of the angle between frames or, for codes, of the codebooks that differ.

What this leaves open is done as in ZeroSpeech 2021 and the library fastabx (Poli et al. 2025). Tokens are compared that
stand between the same two phones, and they are as long as the triphone. The triples of one pair (a, b), one context,
one speaker of A and B and one of X are a cell. The error is the mean over contexts and speakers of X, then over
speakers of A and B, then over the ordered pairs. Without contexts, tokens are single phones, and the cells of a pair
make one mean.

Letters: N tokens, F frames of several tokens, W width (D features or K codebooks), P phones.
"""

import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO

import numpy as np
import numpy.typing as npt

from repcodec.abx_items import AbxItems, Kind, group_keys, groups_of, item_frames
from repcodec.alignment import Distance, frame_distances, token_distances
from repcodec.errors import RepCodecError

ERROR_UNITS = 2**40
"""Units in an error of 1; whole numbers have the same sum in every order."""

LATTICE = 2**21
"""Distances between frames held at once: 8 MB, and as much as 0.2 GB with what pairs of tokens of one frame need."""


@dataclass(frozen=True)
class AbxErrors:
    """ABX errors, and of what they are.

    Attributes:
        within, across: the errors within and across speakers, 0 to 1; None where there is no cell.
        items: tokens that could be compared.
        without_frames: tokens left out because no frame has its centre in them.
        within_cells, across_cells: cells that were averaged.
        within_triples, across_triples: (A, B, X) in them.
        kind, found, drawn_utterances, max_tokens, max_speakers, seed: see `AbxItems`.
    """

    within: float | None
    across: float | None
    items: int
    without_frames: int
    within_cells: int
    across_cells: int
    within_triples: int
    across_triples: int
    kind: Kind
    found: int
    drawn_utterances: int
    max_tokens: int | None
    max_speakers: int | None
    seed: int


@dataclass(frozen=True)
class AbxSums:
    """What one rank has found, to be added to what the others have.

    Attributes:
        table: (2, 4, P, P) int64; within and across speakers, for each pair (a, b): the sum of errors in `ERROR_UNITS`,
            how many were summed, cells, triples. The tables of all ranks add up; all else is the same on each.
        items: the tokens.
        without_frames: those left out because no frame has its centre in them.
    """

    table: npt.NDArray[np.int64]
    items: AbxItems
    without_frames: int

    def errors(self) -> AbxErrors:
        """Return the errors; those of all when `table` is the sum over the ranks."""
        means: list[float | None] = []
        for sums, terms, _, _ in self.table:
            pairs = terms > 0
            means.append(float((sums[pairs] / terms[pairs]).mean()) / ERROR_UNITS if pairs.any() else None)
        cells, triples = self.table[:, 2].sum((1, 2)).tolist(), self.table[:, 3].sum((1, 2)).tolist()
        items = self.items
        return AbxErrors(
            within=means[0],
            across=means[1],
            items=len(items.tokens) - self.without_frames,
            without_frames=self.without_frames,
            within_cells=cells[0],
            across_cells=cells[1],
            within_triples=triples[0],
            across_triples=triples[1],
            kind=items.kind,
            found=items.found,
            drawn_utterances=items.drawn_utterances,
            max_tokens=items.max_tokens,
            max_speakers=items.max_speakers,
            seed=items.seed,
        )


def abx_errors(
    items: AbxItems, frames: Callable[[int], npt.NDArray[np.number]], frame_rate: float, distance: Distance
) -> AbxErrors:
    """Return the ABX errors of features or codes.

    Args and errors: see `abx_sums`.
    """
    return abx_sums(items, frames, frame_rate, distance).errors()


def abx_sums(
    items: AbxItems,
    frames: Callable[[int], npt.NDArray[np.number]],
    frame_rate: float,
    distance: Distance,
    rank: int = 0,
    world_size: int = 1,
) -> AbxSums:
    """Compare tokens, each rank those of its share of the speakers of A and B; add up the tables of all ranks.

    Meanwhile the items' frames lie in a temporary file: memory grows with the number of items, not with their frames.

    Args:
        items: the tokens.
        frames: gives the (T, D) features or (T, K) codes of an utterance by its number; each rank calls it once for
            every utterance that has items.
        frame_rate: frames, or codes of one codebook, per second; labels may end after the last one.
        distance: see `frame_distances`.
        rank, world_size: which share; every `world_size`-th speaker from `rank` on.

    Raises:
        RepCodecError: features are not finite, or their width changes.
    """
    with tempfile.TemporaryFile() as file:
        stored = _Stored(items, frames, frame_rate, distance, file)
        tally = _Tally(len(items.phones), by_speaker=items.kind == "triphone")
        waiting: list[_Block] = []
        size = 0
        for block in _blocks(items, stored, range(rank, items.num_speakers, world_size)):
            if waiting and size + block.num_distances > LATTICE:
                _score(waiting, stored, distance, tally)
                waiting, size = [], 0
            waiting.append(block)
            size += block.num_distances
        _score(waiting, stored, distance, tally)
        tally.close()
    return AbxSums(tally.table, items, len(items.tokens) - len(stored.tokens))


class _Stored:
    """The tokens that have frames, their groups, and the frames in a file.

    Attributes:
        tokens: (N,) `TOKEN`, sorted by speaker, context, phone.
        length: (N,) frames of each.
        first, size: of each group, the tokens of one speaker, context and phone: the first, and their number.
        unit: the first group of each speaker and context.
    """

    def __init__(
        self,
        items: AbxItems,
        frames: Callable[[int], npt.NDArray[np.number]],
        frame_rate: float,
        distance: Distance,
        file: IO[bytes],
    ):
        tokens = items.tokens
        dtype = np.dtype(np.float32 if distance == "angular" else np.int32)
        first, stop = item_frames(tokens["start"], tokens["end"], frame_rate)
        offset, length = np.zeros((2, len(tokens)), dtype=np.int64)
        written = width = 0
        order = np.argsort(tokens["utterance"], kind="stable")
        for members in np.split(order, np.flatnonzero(np.diff(tokens["utterance"][order])) + 1):
            if not len(members):
                continue
            number = int(tokens["utterance"][members[0]])
            values = np.asarray(frames(number))
            width = width or values.shape[1]
            if values.shape[1] != width:
                raise RepCodecError(
                    f"{items.utterances[number]}: width {values.shape[1]}, but the utterances before have {width}; all "
                    "must be of one speech encoder or tokenizer."
                )
            if distance == "angular" and not np.isfinite(values).all():
                raise RepCodecError(f"{items.utterances[number]}: NaN or infinity in its frames; compute them anew.")
            length[members] = (np.minimum(stop[members], len(values)) - first[members]).clip(0)
            file.write(values[_ranges(first[members], length[members])].astype(dtype).tobytes())
            offset[members] = written + np.cumsum(length[members]) - length[members]
            written += int(length[members].sum())
        file.flush()
        kept = length > 0
        self.tokens, self.length, self._offset = tokens[kept], length[kept], offset[kept]
        # Mapped, so that the system may put pages away that it can read again.
        self._frames = np.memmap(file, dtype, "r", shape=(written, width)) if written else np.zeros((0, 1), dtype)
        self.first, self.unit = groups_of(self.tokens)
        self.size = np.diff(self.first, append=len(self.tokens))

    def frames(self, tokens: npt.NDArray[np.intp]) -> npt.NDArray[np.number]:
        """Return the (F, W) frames of tokens, one after the other."""
        frames: npt.NDArray[np.number] = self._frames[_ranges(self._offset[tokens], self.length[tokens])]
        return frames


def _ranges(first: npt.NDArray[np.integer], length: npt.NDArray[np.integer]) -> npt.NDArray[np.intp]:
    """Return first, first + 1, … of each range, one range after the other."""
    ranges: npt.NDArray[np.intp] = np.arange(length.sum()) + np.repeat(first - np.cumsum(length) + length, length)
    return ranges


@dataclass(frozen=True)
class _Block:
    """Some X against all tokens of one context by one speaker.

    Attributes:
        groups: those of A and B, first and end.
        columns: their tokens.
        rows: tokens X.
        group_x, group_a: of each of them; the same group within a speaker.
        num_distances: between frames.
    """

    groups: tuple[int, int]
    columns: npt.NDArray[np.intp]
    rows: npt.NDArray[np.intp]
    group_x: npt.NDArray[np.intp]
    group_a: npt.NDArray[np.intp]
    num_distances: int


def _blocks(items: AbxItems, stored: _Stored, speakers: range) -> Iterator[_Block]:
    """Yield all that has to be compared with tokens of these speakers, one speaker after the other."""
    phone, context, speaker = (key[stored.first] for key in group_keys(stored.tokens))
    alike = defaultdict(list)
    for group, key in enumerate(zip(context.tolist(), phone.tolist(), strict=True)):
        alike[key].append(group)
    ends = np.append(stored.unit[1:], len(stored.first))
    units_of = np.searchsorted(speaker[stored.unit], np.arange(items.num_speakers + 1))
    for unit in (unit for s in speakers for unit in range(units_of[s], units_of[s + 1])):
        begin, end = int(stored.unit[unit]), int(ends[unit])
        if end - begin == 1:
            continue
        pairs = []  # groups of X and of A
        for group in range(begin, end):
            key = int(context[group]), int(phone[group])
            others = [other for other in alike[key] if other != group]
            if items.max_speakers is not None and len(others) > items.max_speakers:
                seeds = [items.seed, *key, int(speaker[group])]
                lots = np.random.PCG64(np.random.SeedSequence(seeds)).random_raw(len(others))
                others = [others[i] for i in np.argsort(lots)[: items.max_speakers]]
            if stored.size[group] > 1:
                pairs.append((group, group))
            pairs += [(other, group) for other in others]
        if not pairs:
            continue
        group_x, group_a = np.array(pairs).T
        size = stored.size[group_x]
        rows, group_x, group_a = (
            _ranges(stored.first[group_x], size),
            np.repeat(group_x, size),
            np.repeat(group_a, size),
        )
        columns = np.arange(stored.first[begin], stored.first[end - 1] + stored.size[end - 1])
        num_distances = stored.length[rows] * stored.length[columns].sum()
        parts = np.flatnonzero(np.diff(np.cumsum(num_distances) // LATTICE)) + 1
        for part in np.split(np.arange(len(rows)), parts):
            count = int(num_distances[part].sum())
            yield _Block((begin, end), columns, rows[part], group_x[part], group_a[part], count)


def _score(blocks: Sequence[_Block], stored: _Stored, distance: Distance, tally: "_Tally") -> None:
    """Compute the distances of some blocks together, and count their errors."""
    lattices, corners, strides, shapes = [], [], [], []
    written = 0
    for block in blocks:
        lattice = frame_distances(stored.frames(block.rows), stored.frames(block.columns), distance)
        num_x, num_y = stored.length[block.rows], stored.length[block.columns]
        corner = written + (np.cumsum(num_x) - num_x)[:, None] * lattice.shape[1] + np.cumsum(num_y) - num_y
        lattices.append(lattice.ravel())
        corners.append(corner.ravel())
        strides.append(np.full(corner.size, lattice.shape[1]))
        shapes.append(np.stack(np.broadcast_arrays(num_x[:, None], num_y)).reshape(2, -1))
        written += lattice.size
    if not blocks:
        return
    means = token_distances(
        np.concatenate(lattices), np.concatenate(corners), np.concatenate(strides), np.concatenate(shapes, 1)
    )
    parts = np.split(means, np.cumsum([corner.size for corner in corners])[:-1])
    for block, part in zip(blocks, parts, strict=True):
        tally.add(block, part.reshape(len(block.rows), -1), stored)


class _Tally:
    """Counts errors, and sums them up speaker by speaker of A and B.

    Attributes:
        table: see `AbxSums`.
    """

    def __init__(self, num_phones: int, by_speaker: bool):
        self.table = np.zeros((2, 4, num_phones, num_phones), dtype=np.int64)
        self._by_speaker, self._speaker = by_speaker, None
        self._errors = np.zeros((2, num_phones, num_phones))
        self._cells, self._triples = np.zeros((2, *self._errors.shape), dtype=np.int64)

    def add(self, block: _Block, distances: npt.NDArray[np.float64], stored: _Stored) -> None:
        """Add a block: distances of its rows X to its columns, A and B."""
        speaker = stored.tokens["speaker"][block.columns[0]]
        if speaker != self._speaker:
            self.close()
            self._speaker = speaker
        first, size = stored.first, stored.size
        groups = slice(*block.groups)
        starts, sizes = first[groups] - first[groups][0], size[groups]
        phones = stored.tokens["phone"][first[groups]]
        for x, group_x, group_a, row in zip(block.rows, block.group_x, block.group_a, distances, strict=True):
            to_a = row[first[group_a] - block.columns[0] :][: size[group_a]]
            if group_x == group_a:
                to_a = np.delete(to_a, x - first[group_a])
            to_a = np.sort(to_a)
            halves = 2 * len(to_a) - to_a.searchsorted(row, "left") - to_a.searchsorted(row, "right")
            triples = len(to_a) * sizes
            where = int(group_x != group_a), stored.tokens["phone"][x], phones  # also b = a; `close` leaves it out
            self._errors[where] += np.add.reduceat(halves, starts) / (2 * triples * size[group_x])
            self._triples[where] += triples
            self._cells[where] += x == first[group_x]

    def close(self) -> None:
        """Put what the last speaker gave into the table."""
        errors, cells, triples = self._errors, self._cells, self._triples
        for array in (errors, cells, triples):
            array[:, np.arange(array.shape[1]), np.arange(array.shape[1])] = 0
        terms = (cells > 0) if self._by_speaker else cells
        sums = errors * terms / np.maximum(cells, 1)
        self.table += np.stack([np.rint(sums * ERROR_UNITS).astype(np.int64), terms, cells, triples], 1)
        for array in (errors, cells, triples):
            array[:] = 0
