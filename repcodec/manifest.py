"""Utterance lists, and which utterances a shard holds.

The published format: line 1 is the audio root, every other line `relative_path<TAB>n_samples`.
"""

import hashlib
import os
import posixpath
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from repcodec.audio import find_sound_files, num_samples_at_16khz, read_audio
from repcodec.errors import RepCodecError
from repcodec.files import atomic_write


def utterance_id(relative_path: str) -> str:
    """Return the id of an utterance: its path below the audio root, without the ending."""
    return posixpath.splitext(relative_path)[0]


SAMPLE_TOLERANCE = 160
"""A manifest may be wrong by so many samples, half a frame: other programs round differently when resampling."""


def check_lines(*names: str) -> None:
    """Refuse names that a tab-separated UTF-8 line cannot hold.

    Raises:
        RepCodecError: names the first.
    """
    for name in names:
        # How Python reads a file name that is no UTF-8: with lone surrogates.
        if re.search("[\t\n\r\ud800-\udfff]", name):
            raise RepCodecError(f"{name!r} holds a tab, a line break or a byte that is no UTF-8: rename it.")


def shard_range(num_utterances: int, rank: int, num_shards: int) -> tuple[int, int]:
    """Return the first utterance of shard `rank` of `num_shards` and the one after its last, by the published rule.

    Raises:
        RepCodecError: there is no such shard, or it would be empty.
    """
    if not 0 <= rank < num_shards:
        raise RepCodecError(f"shard {rank} of {num_shards}: expected a number from 0 up to below the second one.")
    # Python's rounding, half to even, as the published scripts have it.
    start = round(num_utterances / num_shards * rank)
    stop = round(num_utterances / num_shards * (rank + 1))
    if start == stop:
        raise RepCodecError(
            f"shard {rank} of {num_shards} is empty: there are {num_utterances} utterances; use fewer shards."
        )
    return start, stop


class SoundList:
    """Contract: utterances of one split, and their sound.

    Attributes:
        root: the audio root; "" where there is none.
        paths: what names each utterance: a path below the audio root, or the id of a cut.
        ids: the id of each.
        num_samples: samples an utterance has at 16 kHz, in the order of `paths`.
    """

    root: Path | str
    paths: Sequence[str]
    ids: Sequence[str]
    num_samples: Sequence[int]

    def __len__(self) -> int:
        return len(self.paths)

    def waveform(self, utterance: int) -> npt.NDArray[np.float32]:
        """Return the (S,) float32 waveform of an utterance at 16 kHz.

        Raises:
            RepCodecError: the sound is unreadable, or not as long as the list says.
        """
        raise NotImplementedError

    def check_length(self, utterance: int, found: int, where: object) -> None:
        """Refuse a sound of `found` samples where the list says another number, beyond `SAMPLE_TOLERANCE`.

        Raises:
            RepCodecError: names `where`.
        """
        expected = self.num_samples[utterance]
        if abs(found - expected) > SAMPLE_TOLERANCE:
            raise RepCodecError(
                f"{where}: {found} samples at 16 kHz, but the list of sounds says {expected}; make the list again (a "
                "manifest with `repcodec manifest`)."
            )

    def sha256(self) -> str:
        """Return the hash of the listed utterances (not of the root, which may move)."""
        text = "".join(f"{name}\t{samples}\n" for name, samples in zip(self.paths, self.num_samples, strict=True))
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Manifest(SoundList):
    """Utterances of one split, in files below one folder.

    Attributes:
        root: the audio root.
        paths: one path relative to the root an utterance.
        num_samples: samples an utterance has at 16 kHz, in the order of `paths`.
        skipped: what was left out when the list was made, and why; by path, or by line of the .tsv.
    """

    root: Path
    paths: Sequence[str]
    num_samples: Sequence[int]
    skipped: dict[str, str] = field(default_factory=dict, compare=False)

    @cached_property
    def ids(self) -> list[str]:  # type: ignore[override]  # worked out when asked for
        """The id of each utterance."""
        return [utterance_id(path) for path in self.paths]

    def write(self, path: Path | str) -> None:
        """Write the published format.

        Raises:
            RepCodecError: a path holds a tab or a line break, or the file cannot be written.
        """
        check_lines(str(self.root), *self.paths)
        with atomic_write(path) as file:
            file.write(f"{self.root}\n")
            file.writelines(f"{name}\t{samples}\n" for name, samples in zip(self.paths, self.num_samples, strict=True))

    @classmethod
    def read(cls, path: Path | str, skip_bad: bool = False) -> "Manifest":
        """Read the published format.

        Args:
            path: the .tsv file.
            skip_bad: leave out bad lines and note them in `skipped`, instead of refusing the first.

        Raises:
            RepCodecError: the file is missing, empty, a line is not `path<TAB>samples`, or two have the same id.
        """
        try:
            lines = Path(path).read_text(encoding="utf-8").rstrip("\n").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise RepCodecError(f"{path}: not a readable manifest ({error}).") from error
        paths: dict[str, int] = {}
        first: dict[str, str] = {}
        skipped: dict[str, str] = {}
        for number, line in enumerate(lines[1:], start=2):
            name, tab, samples = line.partition("\t")
            identity = utterance_id(name)
            if not (name and tab and samples.isdecimal() and len(samples) < 16):
                more = " (a path cannot hold a tab: rename it)" if samples.count("\t") else ""
                reason = f"found {line[:80]!r}, expected relative_path<TAB>number_of_samples{more}"
            elif identity in first:
                reason = f"{name!r} has the id of {first[identity]!r}; ids are paths without endings, rename one"
            else:
                paths[name] = int(samples)
                first[identity] = name
                continue
            if not skip_bad:
                raise RepCodecError(f"{path}, line {number}: {reason}.")
            skipped[f"line {number}"] = reason
        if not paths:
            raise RepCodecError(f"{path}: the manifest lists no utterance; `repcodec manifest FOLDER` makes one.")
        return cls(Path(lines[0]), list(paths), list(paths.values()), skipped)

    def waveform(self, utterance: int) -> npt.NDArray[np.float32]:
        """Read an utterance's file; see `SoundList`."""
        path = self.root / self.paths[utterance]
        waveform = read_audio(path)
        self.check_length(utterance, len(waveform), path)
        return waveform

    def shard(self, rank: int, num_shards: int) -> "Manifest":
        """Return the utterances of shard `rank` of `num_shards`, by the published rule; `skipped` goes to the first.

        Raises:
            RepCodecError: there is no such shard, or it would be empty.
        """
        start, stop = shard_range(len(self), rank, num_shards)
        skipped = self.skipped if rank == 0 else {}
        return Manifest(self.root, self.paths[start:stop], self.num_samples[start:stop], skipped)


def list_sounds(paths: Sequence[Path], skip_bad: bool = False) -> Manifest:
    """List sound files in the order given; their root is the deepest folder that holds them all.

    Args:
        paths: of the files.
        skip_bad: leave out unusable files and note them in `skipped`, instead of refusing the first.

    Raises:
        RepCodecError: none is usable, or one is unreadable, a folder, has a name that a line cannot hold, or the id
            of another one.
    """
    for path in paths:
        if path.is_dir():
            raise RepCodecError(f"{path} is a folder: give one folder alone, or sound files.")
    files = [path.expanduser().resolve() for path in paths]
    root = Path(os.path.commonpath([path.parent for path in files]))
    ids: set[str] = set()
    listed: dict[str, int] = {}
    skipped: dict[str, str] = {}
    for path in files:
        name = path.relative_to(root).as_posix()
        try:
            check_lines(name)
            num_samples = num_samples_at_16khz(path)
            if utterance_id(name) in ids:
                raise RepCodecError(f"{path}: has the id of another one; ids are paths without endings, rename one.")
        except RepCodecError as error:
            if not skip_bad:
                raise
            skipped[name] = str(error)
            continue
        ids.add(utterance_id(name))
        listed[name] = num_samples
    if not listed:
        raise RepCodecError(f"{root}: none of the {len(files)} sound files can be read: {next(iter(skipped.values()))}")
    return Manifest(root, list(listed), list(listed.values()), skipped)


def make_manifest(folder: Path | str, skip_bad: bool = False) -> Manifest:
    """List the sound files below a folder, reading many headers at a time.

    Args:
        folder: searched in any depth.
        skip_bad: leave out unusable files and note them in `skipped`, instead of refusing the first.

    Raises:
        RepCodecError: the folder holds no usable file, or one is unreadable, empty, has a name that a manifest cannot
            hold or the id of another one.
    """
    root = Path(folder).expanduser().resolve()
    files = find_sound_files(root)
    names = [path.relative_to(root).as_posix() for path in files]
    listed: dict[str, int] = {}
    skipped: dict[str, str] = {}
    ids: dict[str, str] = {}

    def samples(name: str) -> int | RepCodecError:
        try:
            check_lines(name)
            return num_samples_at_16khz(root / name)
        except RepCodecError as error:
            return error

    with ThreadPoolExecutor(4 * num_cores()) as pool:
        # Some at a time: a pool takes all its work in at once, and does all of it even after a failure.
        some = (pool.map(samples, names[first : first + 1000]) for first in range(0, len(names), 1000))
        found_counts = chain.from_iterable(some)
        counts = tqdm(found_counts, total=len(files), desc="Reading sound headers", unit="file")
        for name, path, found in zip(names, files, counts, strict=True):
            if not isinstance(found, RepCodecError) and (first := ids.setdefault(utterance_id(name), name)) != name:
                found = RepCodecError(f"{path}: has the id of {first}; ids are paths without endings, rename one.")
            if not isinstance(found, RepCodecError):
                listed[name] = found
            elif skip_bad:
                skipped[name] = str(found)
            else:
                raise found
    if not listed:
        raise RepCodecError(f"{root} holds no usable sound file: all {len(files)} are unreadable.")
    return Manifest(root, list(listed), list(listed.values()), skipped)


def num_cores() -> int:
    """Return how many cores this process may use: on a cluster, fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
