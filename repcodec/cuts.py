"""Sound that lhotse describes: CutSets, and Shar archives, local or remote (extra `audio`).

lhotse's manifests and paths can name shell commands; none is ever run here.
"""

import os
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from repcodec.audio import check_rate, samples_at_16khz, to_mono_16khz
from repcodec.errors import RepCodecError, first_line
from repcodec.files import bounded_lines, check_text
from repcodec.manifest import Manifest, SoundList

SCHEMES = ("http", "https", "s3", "gs", "azure")
"""What remote archives may be read over."""

MIXED_SHARDS = 4
"""Shards of a Shar that are shuffled together; their sound is held in memory, encoded as it is stored."""


def open_sounds(source: str | Mapping[str, str | Sequence[str]]) -> "SoundList | Shar":
    """Open a list of sounds.

    Args:
        source: a manifest (.tsv), a CutSet (.jsonl or .jsonl.gz, a path or a URL), a folder of Shar archives, or
            {"cuts": …, "recording": …}, each a list of paths or URLs or one with a number range, as in
            "https://host/cuts.{000000..000099}.jsonl.gz".

    Raises:
        RepCodecError: it is none of these, or it cannot be read.
    """
    if isinstance(source, Mapping):
        if set(source) != {"cuts", "recording"} or not all(source.values()):
            raise RepCodecError(f"a Shar needs the fields cuts and recording, found {dict(source)}.")
        return Shar(_expand(source["cuts"]), _expand(source["recording"]))
    source = str(source)
    if Path(source).is_dir():
        cuts, recordings = (sorted(map(str, Path(source).glob(f"{name}.*"))) for name in ("cuts", "recording"))
        return Shar(cuts, recordings)
    if source.endswith(".tsv"):
        return Manifest.read(source)
    if source.endswith((".jsonl", ".jsonl.gz")):
        return CutList(_read_cuts(source), source)
    raise RepCodecError(
        f"{source}: not a list of sounds; expected a manifest (.tsv), a lhotse CutSet (.jsonl, .jsonl.gz) or a folder "
        "of Shar archives."
    )


class CutList(SoundList):
    """Cuts, all known beforehand."""

    root = ""

    def __init__(self, cuts: Sequence[Any], source: str):
        """Take lhotse cuts, and what messages call their set.

        Raises:
            RepCodecError: there is none, or two have one id.
        """
        self._cuts, self._source = cuts, source
        self.paths = self.ids = [cut.id for cut in cuts]
        self.num_samples = [num_samples(cut) for cut in cuts]
        if not cuts:
            raise RepCodecError(f"{source}: the CutSet lists no cut.")
        if len(set(self.paths)) < len(self.paths):
            ordered = sorted(self.paths)
            twice = next(one for one, other in pairwise(ordered) if one == other)
            raise RepCodecError(f"{source}: two cuts have the id {twice!r}; rename one.")

    def waveform(self, utterance: int) -> npt.NDArray[np.float32]:
        """Read a cut's sound; see `SoundList`."""
        waveform = read_cut(self._cuts[utterance], self._source)
        self.check_length(utterance, len(waveform), f"{self._source}, cut {self.paths[utterance]!r}")
        return waveform


def num_samples(cut: Any) -> int:
    """Return how many samples a checked cut has at 16 kHz."""
    return samples_at_16khz(cut.num_samples, cut.sampling_rate)


def read_cut(cut: Any, source: str) -> npt.NDArray[np.float32]:
    """Return the (S,) float32 waveform of a cut at 16 kHz.

    Raises:
        RepCodecError: its sound cannot be read; names `source` and the cut.
    """
    from lhotse.audio.backend import set_current_audio_backend

    where = f"{source}, cut {cut.id!r}"
    # The one that never starts another program.
    set_current_audio_backend("LibsndfileBackend")
    try:
        samples = cut.load_audio()
    except Exception as error:  # lhotse and what it reads with raise many kinds
        raise RepCodecError(f"{where}: the sound cannot be read ({first_line(error)}).") from error
    return to_mono_16khz(samples.T, cut.sampling_rate, where)


class Shar:
    """Shar archives, read one after another: what does not fit a list in memory, or lies on a far disk.

    Attributes:
        source: what messages call it.
    """

    def __init__(self, cuts: Sequence[str], recordings: Sequence[str]):
        """Take the paths or URLs of the shards' cuts.*.jsonl.gz and recording.*.tar, in the same order.

        Raises:
            RepCodecError: there is none, their numbers differ, or one is a command.
        """
        for name in (*cuts, *recordings):
            _check_name(name)
        self.source = str(Path(cuts[0]).parent) if cuts else "the Shar"
        if not cuts or len(cuts) != len(recordings):
            raise RepCodecError(
                f"{self.source}: {len(cuts)} files of cuts and {len(recordings)} of recordings; a Shar has one each a "
                "shard."
            )
        self._shards = list(zip(cuts, recordings, strict=True))
        self._sizes: dict[int, int] = {}
        self._checked: set[str] = set()  # archives: each is looked through once, not in every round

    def whole(self) -> CutList:
        """Read all of it into memory, encoded as it is stored: for sets that are small.

        Raises:
            RepCodecError: an archive cannot be read.
        """
        return CutList([cut for shard in range(len(self._shards)) for cut in self.cuts(shard)], self.source)

    def sample(self, seed: int, num_frames: int, frames_of: Callable[[int], int]) -> CutList:
        """Read the first cuts of the random order into memory, until they have `num_frames` frames, or all.

        Args:
            seed: of the order.
            num_frames: how many are enough.
            frames_of: samples -> frames.

        Raises:
            RepCodecError: an archive cannot be read.
        """
        found: list[Any] = []
        frames = 0
        for group in self._round(seed, 0, 0):
            for _, cut in self._read(*group, 0, lambda place: True):
                found.append(cut)
                frames += frames_of(num_samples(cut))
                if frames >= num_frames:
                    return CutList(found, self.source)
        return CutList(found, self.source)

    def stream(
        self, seed: int, start: int = 0, wanted: Callable[[int], bool] = lambda place: True
    ) -> Iterator[tuple[int, Any]]:
        """Yield (place, cut) of an endless random order, from place `start` on, only those wanted.

        Which cut stands at which place is a function of the seed alone: shards are shuffled anew each time all were
        read, and so are the cuts of `MIXED_SHARDS` of them together. The next ones are read meanwhile. Sound is kept
        encoded, and only of what is wanted, but all of it is read past.

        Raises:
            RepCodecError: an archive cannot be read.
        """
        pool = ThreadPoolExecutor(1)
        try:
            waiting = None
            for group in self._groups(seed, start):
                following = pool.submit(self._read, *group, start, wanted)
                if waiting is not None:
                    yield from waiting.result()
                waiting = following
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _groups(self, seed: int, start: int) -> Iterator[tuple[int, list[int], npt.NDArray[np.int64]]]:
        """Yield the first place, the shards, and the places of the cuts, of each group that ends after `start`."""
        place = 0
        for number in count():
            for group in self._round(seed, number, place):
                place += len(group[2])
                if place > start:
                    yield group
            if place == 0:
                raise RepCodecError(f"{self.source}: the Shar holds no cut.")

    def _round(self, seed: int, number: int, place: int) -> Iterator[tuple[int, list[int], npt.NDArray[np.int64]]]:
        """Yield the groups of one round over all shards, which begins at `place`."""
        order = np.random.default_rng([seed, number]).permutation(len(self._shards)).tolist()
        for first in range(0, len(order), MIXED_SHARDS):
            shards = order[first : first + MIXED_SHARDS]
            total = sum(self._size(shard) for shard in shards)
            yield place, shards, np.random.default_rng([seed, number, first]).permutation(total)
            place += total

    def _read(
        self, first: int, shards: list[int], places: npt.NDArray[np.int64], start: int, wanted: Callable[[int], bool]
    ) -> list[tuple[int, Any]]:
        cuts = (cut for shard in shards for cut in self.cuts(shard))
        found = [
            (place, cut)
            for place, cut in zip((first + places).tolist(), cuts, strict=True)
            if place >= start and wanted(place)
        ]
        return sorted(found, key=lambda pair: pair[0])

    def cuts(self, shard: int) -> Iterator[Any]:
        """Yield the cuts of a shard as they are stored, their sound in memory.

        Raises:
            RepCodecError: the shard cannot be read, or is cut off.
        """
        manifest, archive = self._shards[shard]
        self._size(shard)  # first: lhotse takes a line, however long, into memory …
        if archive not in self._checked:  # … and a sound
            _check_archive(archive)
            self._checked.add(archive)
        found = 0
        for cut in _guarded(lambda: _cutset().from_shar(fields={"cuts": [manifest], "recording": [archive]}), archive):
            found += 1
            yield _checked(cut, archive)
        if found != self._size(shard):
            raise RepCodecError(
                f"{archive}: sound of {found} cuts, but {manifest} lists {self._size(shard)}; copy it again."
            )

    def _size(self, shard: int) -> int:
        """Return how many cuts a shard lists."""
        if shard not in self._sizes:
            self._sizes[shard] = sum(1 for _ in _lines(self._shards[shard][0]))
        return self._sizes[shard]


def _read_cuts(source: str) -> list[Any]:
    """Read a CutSet.

    Raises:
        RepCodecError: it cannot be read, or holds something else than plain cuts of recordings.
    """
    _check_name(source)

    def read() -> Iterator[Any]:
        from lhotse.serialization import decode_json_line, deserialize_item

        for line in _lines(source):
            yield deserialize_item(decode_json_line(line))

    return [_checked(cut, source) for cut in _guarded(read, source)]


def _cutset() -> Any:
    """Import lhotse's CutSet: with core dependencies only, it is not there."""
    from lhotse import CutSet

    return CutSet


def _checked(cut: Any, source: str) -> Any:
    """Refuse a cut whose sound is not simply read: a mixture, none at all, one changed, or one that a command makes.

    A changed or mixed one can hold further recordings, and those a command.
    """
    from lhotse import MonoCut, MultiCut

    recording = cut.recording if type(cut) in (MonoCut, MultiCut) else None
    if recording is None or recording.transforms:
        raise RepCodecError(
            f"{source}: {getattr(cut, 'id', 'an entry')!r} is no cut of one plain recording; save mixed, resampled or "
            "otherwise changed cuts as sound first."
        )
    for one in recording.sources:
        if one.type not in ("file", "url", "memory"):
            raise RepCodecError(
                f"{source}: cut {cut.id!r} has its sound from a {one.type}, which is not read; expected file or url."
            )
        if one.type != "memory":
            _check_name(str(one.source))
    if not isinstance(cut.id, str):
        raise RepCodecError(f"{source}: {cut.id!r} is no id of a cut, expected a text; make it again.")
    check_text(source, cut.id)
    try:
        check_rate(cut.sampling_rate, f"{source}, cut {cut.id!r}")
        if not 0 <= int(cut.start * cut.sampling_rate) < 2**63 > num_samples(cut) >= 0:
            raise ValueError("its times are no numbers of seconds")
    except (ArithmeticError, TypeError, ValueError, AttributeError) as error:
        raise RepCodecError(f"{source}: cut {cut.id!r} is damaged ({first_line(error)}); make it again.") from error
    return cut


def _guarded(make: Callable[[], Any], source: str) -> Iterator[Any]:
    """Yield what lhotse reads from `source`, its errors as one sentence.

    Raises:
        RepCodecError: lhotse is missing, or cannot read it.
    """
    try:
        yield from make()
    except ImportError as error:
        raise RepCodecError(f"{source}: reading it needs more ({error}): pip install 'repcodec[audio]'.") from error
    except RepCodecError:
        raise
    except Exception as error:  # lhotse and what it reads with raise many kinds
        raise RepCodecError(f"{source}: not a readable list of cuts ({first_line(error)}).") from error


def _lines(source: str) -> Iterator[str]:
    """Yield the lines of a text file, local or remote, packed or not, that hold something."""

    def lines() -> Iterator[str]:
        from lhotse.serialization import open_best

        with open_best(source, "r") as file:
            yield from (line for line in bounded_lines(file, source) if line.strip())

    return _guarded(lines, source)


def _check_archive(archive: str) -> None:
    """Refuse an archive that is packed, or has a sound that says it is longer than the file; remote ones are trusted.

    Raises:
        RepCodecError: it is one of these, or cannot be read.
    """
    if "://" in archive:
        return
    if ".tar" not in archive:  # lhotse takes it for JSON lines
        for _ in _lines(archive):
            pass
        return
    try:
        size = os.path.getsize(archive)
        with tarfile.open(archive, "r:") as tar:  # not packed
            too_long = [member.name for member in tar if member.size > size or member.issparse()]
    except Exception as error:  # headers that are garbage raise many kinds
        raise RepCodecError(f"{archive}: not a readable archive ({first_line(error)}); copy it again.") from error
    if too_long:
        raise RepCodecError(f"{archive}: {too_long[0]!r} is said to be longer than the archive; copy it again.")


def _check_name(source: str) -> None:
    """Refuse what lhotse would start another program for."""
    scheme = source.partition("://")[0] if "://" in source else None
    if source.startswith("pipe:") or scheme not in (None, *SCHEMES):
        raise RepCodecError(
            f"{source}: commands are not run, and other programs not started; give a path, or a URL of "
            f"{', '.join(SCHEMES)}."
        )


def _expand(names: str | Sequence[str]) -> list[str]:
    """Return a list of names as it is, or the names that one with a range {first..last} stands for."""
    if not isinstance(names, str):
        return [str(name) for name in names]
    before, brace, rest = names.partition("{")
    numbers, _, after = rest.partition("}")
    first, _, last = numbers.partition("..")
    if not brace:
        return [names]
    if not (first.isdecimal() and last.isdecimal() and max(len(first), len(last)) <= 6):
        raise RepCodecError(
            f"{names}: expected a range of numbers of at most six digits in braces, such as {{000000..000099}}."
        )
    return [f"{before}{number:0{len(first)}d}{after}" for number in range(int(first), int(last) + 1)]
