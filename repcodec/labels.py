"""Phone labels by utterance id."""

import csv
from collections import defaultdict
from pathlib import Path, PurePosixPath

import numpy as np

from repcodec.errors import RepCodecError

UNLABELLED = -1
"""Phone index of a frame that no label covers."""


class PhoneLabels:
    """Phones with times, of any number of utterances.

    Attributes:
        phones: the phone inventory, sorted; a phone's index is its place here.
    """

    def __init__(self, segments: dict[str, list[tuple[float, float, str]]]):
        """Take (start in seconds, end in seconds, phone) of each segment, by utterance id."""
        self.phones = sorted({phone for rows in segments.values() for _, _, phone in rows})
        index = {phone: i for i, phone in enumerate(self.phones)}
        self._segments = {
            utterance: (
                np.array([start for start, _, _ in rows]),
                np.array([end for _, end, _ in rows]),
                np.array([index[phone] for _, _, phone in rows]),
            )
            for utterance, rows in ((utterance, sorted(rows)) for utterance, rows in segments.items())
        }

    def __len__(self) -> int:
        return len(self._segments)

    def key(self, utterance: str) -> str | None:
        """Return under which id the labels of an utterance stand: its own or its stem, None where there are none."""
        # Corpora name their labels by the file's stem, also where the sound lies in folders.
        return next((name for name in (utterance, PurePosixPath(utterance).name) if name in self._segments), None)

    def frames(self, utterance: str, num_frames: int, frame_rate: float) -> np.ndarray:
        """Return the phone at the centre of each frame.

        Args:
            utterance: the id.
            num_frames: T.
            frame_rate: frames per second.

        Returns:
            (T,) int64 phone indices, `UNLABELLED` where no segment covers the centre.
        """
        key = self.key(utterance)
        if key is None:
            return np.full(num_frames, UNLABELLED)
        starts, ends, phones = self._segments[key]
        frames = np.full(num_frames, UNLABELLED)
        centres = (np.arange(num_frames) + 0.5) / frame_rate
        # In order of their starts: where segments overlap, the later one has its frames.
        for start, end, phone in zip(starts, ends, phones, strict=True):
            first, stop = np.searchsorted(centres, (start, end))
            frames[first:stop] = phone
        return frames

    @classmethod
    def read_tsv(cls, path: Path | str) -> "PhoneLabels":
        """Read a table with a header that names utt, start_s, end_s and phone; more columns are ignored.

        Raises:
            RepCodecError: the file is unreadable, empty, lacks a column or holds a time that is none.
        """
        segments: dict[str, list[tuple[float, float, str]]] = defaultdict(list)
        try:
            with open(path, encoding="utf-8", newline="") as file:
                rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
                missing = {"utt", "start_s", "end_s", "phone"} - set(rows.fieldnames or ())
                if missing:
                    raise RepCodecError(
                        f"{path}: the header lacks {', '.join(sorted(missing))}; "
                        "expected a tab-separated table with utt, start_s, end_s, phone."
                    )
                for row in rows:
                    try:
                        start, end = float(row["start_s"]), float(row["end_s"])
                    except (TypeError, ValueError):
                        raise RepCodecError(
                            f"{path}, line {rows.line_num}: start_s and end_s are not both numbers of seconds."
                        ) from None
                    if not (0 <= start <= end < float("inf")) or not row["phone"]:
                        raise RepCodecError(
                            f"{path}, line {rows.line_num}: expected 0 <= start_s <= end_s and a phone, found "
                            f"{start}, {end}, {row['phone']!r}."
                        )
                    if not row["utt"]:
                        raise RepCodecError(f"{path}, line {rows.line_num}: no utterance is named.")
                    segments[row["utt"]].append((start, end, row["phone"]))
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise RepCodecError(f"{path}: not a readable label file ({error}).") from error
        if not segments:
            raise RepCodecError(f"{path}: the label file lists no phone.")
        return cls(dict(segments))
