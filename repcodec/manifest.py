"""Utterance lists, and which utterances a shard holds.

The published format: line 1 is the audio root, every other line `relative_path<TAB>n_samples`.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from repcodec.errors import RepCodecError
from repcodec.files import atomic_write


def utterance_id(relative_path: str) -> str:
    """Return the id of an utterance: its path below the audio root, without the ending."""
    return str(PurePosixPath(relative_path).with_suffix(""))


def check_lines(*names: str) -> None:
    """Refuse names that a tab-separated UTF-8 line cannot hold.

    Raises:
        RepCodecError: names the first.
    """
    for name in names:
        # How Python reads a file name that is no UTF-8: with lone surrogates.
        broken = any("\ud800" <= mark <= "\udfff" for mark in name)
        if broken or any(mark in name for mark in "\t\n\r"):
            raise RepCodecError(f"{name!r} holds a tab, a line break or a byte that is no UTF-8: rename it.")


@dataclass(frozen=True)
class Manifest:
    """Utterances of one split.

    Attributes:
        root: the audio root.
        paths: one path relative to the root an utterance.
        num_samples: samples an utterance has at 16 kHz, in the order of `paths`.
    """

    root: Path
    paths: Sequence[str]
    num_samples: Sequence[int]

    def __len__(self) -> int:
        return len(self.paths)

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
    def read(cls, path: Path | str) -> "Manifest":
        """Read the published format.

        Raises:
            RepCodecError: the file is missing, empty, or a line is not `path<TAB>samples`.
        """
        try:
            lines = Path(path).read_text(encoding="utf-8").rstrip("\n").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise RepCodecError(f"{path}: not a readable manifest ({error}).") from error
        if len(lines) < 2:
            raise RepCodecError(f"{path}: the manifest lists no utterance; `repcodec manifest FOLDER` makes one.")
        names, counts = [], []
        for number, line in enumerate(lines[1:], start=2):
            name, tab, samples = line.partition("\t")
            if not (name and tab and samples.isdecimal()):
                raise RepCodecError(
                    f"{path}, line {number}: found {line[:80]!r}, expected relative_path<TAB>number_of_samples."
                )
            names.append(name)
            counts.append(int(samples))
        return cls(Path(lines[0]), names, counts)

    def sha256(self) -> str:
        """Return the hash of the listed utterances (not of the root, which may move)."""
        text = "".join(f"{name}\t{samples}\n" for name, samples in zip(self.paths, self.num_samples, strict=True))
        return hashlib.sha256(text.encode()).hexdigest()

    def shard(self, rank: int, num_shards: int) -> "Manifest":
        """Return the utterances of shard `rank` of `num_shards`, by the published rule.

        Raises:
            RepCodecError: there is no such shard, or it would be empty.
        """
        if not 0 <= rank < num_shards:
            raise RepCodecError(f"shard {rank} of {num_shards}: expected a number from 0 up to below the second one.")
        # Python's rounding, half to even, as the published scripts have it.
        start = round(len(self) / num_shards * rank)
        stop = round(len(self) / num_shards * (rank + 1))
        if start == stop:
            raise RepCodecError(
                f"shard {rank} of {num_shards} is empty: the manifest has {len(self)} utterances; use fewer shards."
            )
        return Manifest(self.root, self.paths[start:stop], self.num_samples[start:stop])
