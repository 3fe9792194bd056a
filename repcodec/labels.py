"""Phone labels by utterance id."""

import hashlib
import re
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from repcodec.errors import RepCodecError
from repcodec.label_files import Segments, read_label_files

UNLABELLED = -1
"""Phone index of a frame that no label covers."""

SILENCES = frozenset({"", "sil", "<sil>", "silence", "sp", "spn", "nsn", "pau", "epi", "h#", "<eps>", "_"})
"""Labels, in lower case, that are no phone: pauses and noises of TIMIT, Kaldi, the Montreal Forced Aligner."""

SPEAKER = r"[^/_-]+"
"""The speaker in an utterance id, as a regular expression: all before the first / _ or -, as in LibriSpeech's
116-288045-0000, VCTK's p225_001 and where a speaker has a folder."""

LONGER_S, LONGER_SHARE = 0.5, 0.1
"""Labels may end so many seconds, or this share of the sound, after it. Aligners round to 10 ms, features lack up to
two frames and a sound may have been trimmed, while the least mistaken sampling rate, 22.05 for 16 kHz, makes 38 %."""

EARLY_SHARE, EARLY_S = 0.5, 0.1
"""Where no utterance has labels later than this share of its sound and so many seconds, all of them end too early."""


class PhoneLabels:
    """Phones with times, of any number of utterances, 18 bytes a segment.

    Attributes:
        phones: the phone inventory, sorted; a phone's index is its place here.
        source: what messages call the labels.
    """

    def __init__(self, segments: dict[str, list[tuple[float, float, str]]]):
        """Take (start in seconds, end in seconds, phone) of each segment, by utterance id."""
        self.source = "labels"
        self._store(
            (utterance, [start for start, _, _ in rows], [end for _, end, _ in rows], [phone for _, _, phone in rows])
            for utterance, rows in segments.items()
        )

    @classmethod
    def read(cls, path: Path | str) -> "PhoneLabels":
        """Read labels of any format of `label_files.read_label_files`, which picks it by what is there.

        Raises:
            RepCodecError: the labels are unreadable, cut off, without any phone, or hold a time that is none.
        """
        labels = cls({})
        labels.source = str(path)
        labels._store(read_label_files(path))
        if not labels.phones:
            raise RepCodecError(f"{path}: the label file lists no phone.")
        return labels

    def _store(self, pieces: Iterable[Segments]) -> None:
        """Keep segments in one array of each kind, utterance after utterance, sorted by start."""
        self._places: dict[str, int] = {}
        phone_index: defaultdict[str, int] = defaultdict(lambda: len(phone_index))
        starts, ends, phones = array("d"), array("d"), array("h")
        owners, firsts = array("i"), array("q")  # of each stretch of one utterance's segments: whose, and where
        for utterance, piece_starts, piece_ends, piece_phones in pieces:
            place = self._places.setdefault(utterance, len(self._places))
            if not owners or owners[-1] != place:
                owners.append(place)
                firsts.append(len(starts))
            starts.extend(piece_starts)
            ends.extend(piece_ends)
            try:
                phones.extend(map(phone_index.__getitem__, piece_phones))
            except OverflowError:
                raise RepCodecError(
                    f"{self.source}: {len(phone_index):,} different phones by {utterance!r}, expected some tens; are "
                    "these words, or is a column of times taken for phones?"
                ) from None
        self._starts, self._ends, self._phones = np.asarray(starts), np.asarray(ends), np.asarray(phones)
        del starts, ends, phones  # so that those brought together take their memory
        self._bring_together(np.asarray(owners), np.asarray(firsts))
        self._sort(phone_index)
        for column in (self._starts, self._ends, self._phones):
            column.flags.writeable = False  # `segments` hands out views
        self._by_stem: dict[str, list[str]] = {}
        for utterance in self._places:
            folder, _, stem = utterance.rpartition("/")
            if folder:
                self._by_stem.setdefault(stem, []).append(utterance)

    def _bring_together(self, owners: npt.NDArray[np.int32], firsts: npt.NDArray[np.longlong]) -> None:
        """Put the stretches of each utterance side by side, and note where each utterance's segments begin and end.

        Args:
            owners: (R,) the utterance of each stretch of segments.
            firsts: (R,) the first segment of each.
        """
        lengths = np.diff(firsts, append=len(self._starts))
        if len(owners) > len(self._places):
            stretches = np.argsort(owners, kind="stable")
            moved = lengths[stretches]
            order = np.repeat(firsts[stretches] - (np.cumsum(moved) - moved), moved)
            order += np.arange(len(order))
            self._starts = self._starts[order]
            self._ends = self._ends[order]
            self._phones = self._phones[order]
        segments_each = np.bincount(owners, lengths, len(self._places)).astype(np.int64)
        self._bounds = np.concatenate([[0], np.cumsum(segments_each)])

    def _sort(self, phone_index: dict[str, int]) -> None:
        """Number the phones anew, in the order of their names, and sort each utterance's segments by start."""
        self.phones = sorted(phone_index)
        sorted_index = np.empty(len(self.phones), np.int16)
        sorted_index[[phone_index[phone] for phone in self.phones]] = np.arange(len(self.phones))
        # An utterance at a time: neither the numbering nor the sorting needs memory for all.
        for first, stop in pairwise(self._bounds.tolist()):
            part = slice(first, stop)
            self._phones[part] = sorted_index[self._phones[part]]
            if (np.diff(self._starts[part]) <= 0).any():
                by_start = np.lexsort((self._phones[part], self._ends[part], self._starts[part]))
                for column in (self._starts, self._ends, self._phones):
                    column[part] = column[part][by_start]

    def __len__(self) -> int:
        return len(self._places)

    def sha256(self) -> str:
        """Return a hash of all that the labels say."""
        digest = hashlib.sha256("\n".join([*self.phones, "", *self._places]).encode())
        for column in (self._bounds, self._starts, self._ends, self._phones):
            digest.update(column.data)
        return digest.hexdigest()

    def ids(self) -> Iterator[str]:
        """Iterate over the ids of the labelled utterances, in the order of the file."""
        return iter(self._places)

    def key(self, utterance: str) -> str | None:
        """Return under which id the labels of an utterance stand; None where there are none.

        It is the utterance's own id or else the one that ends in the same name and all of whose folders are among the
        utterance's, in their order, or the other way round: corpora name their labels by the file's stem, by the path
        from another root, or (as for the Montreal Forced Aligner) by speaker and stem. Of several, the one that
        agrees in most.

        Raises:
            RepCodecError: several agree in as many.
        """
        if utterance in self._places:
            return utterance
        parts = utterance.split("/")
        names = self._by_stem.get(parts[-1], [])
        if parts[-1] in self._places:
            names = [*names, parts[-1]]
        shared = {name: min(len(parts), name.count("/") + 1) for name in names if _agree(name.split("/"), parts)}
        most = [name for name in shared if shared[name] == max(shared.values())]
        if len(most) > 1:
            raise RepCodecError(
                f"{self.source}: utterance {utterance!r} fits the labels of {most[0]!r} and of {most[1]!r}; use longer "
                "paths as ids."
            )
        return most[0] if most else None

    def segments(
        self, utterance: str
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.int64]]:
        """Return the segments of an utterance, sorted by start: starts and ends in seconds, and phone indices.

        Returns:
            (N,) float64, (N,) float64 and (N,) int64; N = 0 for an unknown utterance.

        Raises:
            RepCodecError: the utterance fits several labels, see `key`.
        """
        key = self.key(utterance)
        place = self._places[key] if key is not None else len(self)
        part = slice(*self._bounds[place : place + 2]) if key is not None else slice(0, 0)
        return self._starts[part], self._ends[part], self._phones[part].astype(np.int64)

    def frames(self, utterance: str, num_frames: int, frame_rate: float) -> npt.NDArray[np.int64]:
        """Return the phone at the centre of each frame.

        Args:
            utterance: the id.
            num_frames: T.
            frame_rate: frames per second.

        Returns:
            (T,) int64 phone indices, `UNLABELLED` where no segment covers the centre.

        Raises:
            RepCodecError: the utterance fits several labels, see `key`.
        """
        starts, ends, phones = self.segments(utterance)
        frames = np.full(num_frames, UNLABELLED)
        centres = (np.arange(num_frames) + 0.5) / frame_rate
        bounds = np.searchsorted(centres, np.stack([starts, ends], 1)).tolist()
        # In order of their starts: where segments overlap, the later one has its frames.
        for (first, stop), phone in zip(bounds, phones.tolist(), strict=True):
            frames[first:stop] = phone
        return frames

    def check_durations(self, keys: Sequence[str | None], durations: Sequence[float]) -> None:
        """Refuse labels whose times cannot be those of the sounds; what lies a little beyond a sound is all right.

        Args:
            keys: the labels' id of each utterance, as `matched` gives them; None where there are none.
            durations: of each utterance in seconds.

        Raises:
            RepCodecError: an utterance's labels end long after its sound (`LONGER_S`, `LONGER_SHARE`), or those of all
                utterances end early in them (`EARLY_SHARE`); names the utterance, both times and the likely mistake.
        """
        found: list[tuple[float, float, str]] = []
        for key, duration in zip(keys, durations, strict=True):
            if key is None or len(ends := self.segments(key)[1]) == 0:
                continue
            end = float(ends.max())
            if end > duration + max(LONGER_S, LONGER_SHARE * duration):
                raise RepCodecError(
                    f"{self.source}: the labels of {key!r} last {end:.2f} s, but its sound {duration:.2f} s; "
                    f"{_likely_mistake(end / max(duration, 0.02))}"
                )
            found.append((duration, end, key))
        if found and all(end < EARLY_SHARE * duration + EARLY_S for duration, end, _ in found):
            duration, end, key = max(found)
            raise RepCodecError(
                f"{self.source}: no utterance has labels beyond the first half of its sound (those of {key!r} last "
                f"{end:.2f} s, its sound {duration:.2f} s); are the times in another unit than seconds, the samples "
                "not at 16 kHz, or the phones not every 10 ms?"
            )


def _agree(one: list[str], other: list[str]) -> bool:
    """Say whether all parts of the shorter path stand in the longer one, in their order."""
    shorter, longer = sorted((one, other), key=len)
    rest = iter(longer)
    return all(part in rest for part in shorter)


def _likely_mistake(ratio: float) -> str:
    """Ask for why labels may last so many times as long as the sound; silence at its end makes it less."""
    if ratio > 4000:
        return "are the times in samples instead of seconds?"
    if ratio > 300:
        return "are the times in milliseconds instead of seconds?"
    if ratio > 30:
        return "are the times in frames of 10 ms instead of seconds?"
    return "are they of another sampling rate (.phn: samples at 16 kHz; JSON lines: phones of 10 ms) or another sound?"


def matched(labels: PhoneLabels, utterances: Sequence[str]) -> list[str | None]:
    """Return under which id the labels of each utterance stand; None where there are none.

    Raises:
        RepCodecError: no utterance has labels, one fits several labels, or several fit the same.
    """
    keys = [labels.key(utterance) for utterance in utterances]
    times = Counter(key for key in keys if key is not None)
    if not times:
        raise RepCodecError(
            f"{labels.source}: no utterance has labels; the labels are of ids like {next(labels.ids(), None)!r}, the "
            f"utterances like {next(iter(utterances), None)!r}."
        )
    key, most = times.most_common(1)[0]
    if most > 1:
        fitting = [utterance for utterance, other in zip(utterances, keys, strict=True) if other == key]
        raise RepCodecError(
            f"{labels.source}: the labels of {key!r} fit several utterances, {fitting[0]!r} and {fitting[1]!r}; use "
            "paths as ids."
        )
    return keys


def matched_sentence(keys: Sequence[str | None]) -> str:
    """Say how many utterances have labels, from what `matched` gives."""
    without = keys.count(None)
    rest = f" ({without} without labels)" if without else ""
    return f"labels: {len(keys) - without} of {len(keys)} utterances matched{rest}"


def speaker_of(utterance: str, pattern: str = SPEAKER) -> str:
    """Return the speaker that an utterance id names.

    Args:
        utterance: the id.
        pattern: a regular expression of the id's beginning; its first group, where it has one, is the speaker.

    Raises:
        RepCodecError: the expression is none, or finds no speaker.
    """
    try:
        found = re.match(pattern, utterance)
    except (re.error, OverflowError, RecursionError) as error:
        raise RepCodecError(f"speaker pattern {pattern!r}: not a regular expression ({error}).") from error
    speaker = found[1 if found.re.groups else 0] if found else None
    if not speaker:
        raise RepCodecError(
            f"speaker pattern {pattern!r} finds no speaker at the beginning of the id {utterance!r}; give a regular "
            "expression whose first group is the speaker."
        )
    return speaker
