"""Utterances as waveform, phones and tokens on one time axis, ready for the page to draw, with their sound."""

import base64
import io
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from repcodec.labels import SILENCES
from repcodec.report_tables import families, preferred
from repcodec.results import Example, Result

SCALE = 360
"""Pixels a second: a frame of 20 ms has 7.2."""

MOST_TRACKS = 4
"""Tokenizers shown of an utterance; more would not fit a screen."""

TONES = 36
"""Hues that the page's stylesheet has."""


@dataclass
class Block:
    """A phone, or a run of equal codes: left edge and width in pixels, text, class of its colour, and its facts.

    `room` says how the text fits: "along" the axis, "across" it, or "none".
    """

    x: float
    width: float
    text: str
    tone: str
    title: str
    room: str


@dataclass
class Timeline:
    """An utterance to draw.

    Attributes:
        utterance: its id.
        duration: seconds.
        width: pixels of the whole axis.
        wave: of a waveform's outline, y from -1 to 1 times 100 downwards: an SVG path; empty without sound.
        ticks: (pixels, seconds) to mark.
        tracks: name and blocks, from above.
        audio: the sound as a data: address of FLAC, which every browser plays; None where there is none.
    """

    utterance: str
    duration: float
    width: float
    wave: str
    ticks: list[tuple[float, str]]
    tracks: list[tuple[str, list[Block]]]
    audio: str | None


def timeline(example: Example, results: list[Result], phones: list[str] | None) -> Timeline:
    """Lay an utterance out.

    A code has the colour of the phone that it stands for most often in the whole set, so that tokens that follow the
    phones look like them; without phone labels every code has a colour of its own.

    Args:
        example: the utterance; of more than `MOST_TRACKS` tokenizers, the best of each family come first.
        results: the tokenizers', to know what their codes stand for.
        phones: names of the rows of `Result.joint`.
    """
    width = max(1.0, example.duration * SCALE)
    index = {phone: i for i, phone in enumerate(phones or sorted({phone for _, _, phone in example.phones}))}
    tracks = []
    if example.phones:
        blocks = [
            _block(start, min(end, example.duration), phone, _tone(phone, index), phone)
            for start, end, phone in example.phones
            if start < example.duration
        ]
        tracks.append(("phones", blocks))
    by_name = {result.row.name: result for result in results}
    for name in _shown(example, results):
        codes, rate = example.codes[name]
        tracks.append((name, list(_runs(codes, rate, example.duration, by_name.get(name), phones, index))))
    step = 0.5 if example.duration < 20 else 5.0
    ticks = [(second * SCALE, f"{second:g} s") for second in np.arange(0, example.duration, step).tolist()]
    sound = example.sound if example.sound is not None and len(example.sound) else None
    wave = "" if sound is None else _outline(sound, width)
    return Timeline(
        example.utterance,
        example.duration,
        round(width, 1),
        wave,
        ticks,
        tracks,
        None if sound is None else _flac(sound),
    )


def _shown(example: Example, results: list[Result]) -> list[str]:
    """Return which tokenizers are shown, in the order of the results."""
    first = [result.row.name for result in preferred(families(results))]
    order = [name for name in [*first, *example.codes] if name in example.codes]
    chosen = list(dict.fromkeys(order))[:MOST_TRACKS]
    return [name for name in example.codes if name in chosen]


def _tone(phone: str, index: dict[str, int]) -> str:
    if phone.lower() in SILENCES:
        return "quiet"
    # Steps of 13 on a circle of 36 reach all of it, and put neighbours in the list far apart.
    return f"t{index[phone] * 13 % TONES}" if phone in index else "unknown"


def _block(start: float, end: float, text: str, tone: str, title: str) -> Block:
    width = (end - start) * SCALE
    room = "along" if width >= 6.2 * len(text) + 3 else "across" if width >= 10 else "none"
    return Block(round(start * SCALE, 1), round(width, 1), text, tone, f"{title}, {start:.2f} to {end:.2f} s", room)


def _runs(
    codes: npt.NDArray[np.int64],
    rate: float,
    duration: float,
    result: Result | None,
    phones: list[str] | None,
    index: dict[str, int],
) -> Iterator[Block]:
    """Yield a block for each run of equal codes within the duration; a negative code is none."""
    codes = np.asarray(codes)
    cuts = [0, *(np.flatnonzero(np.diff(codes)) + 1).tolist(), len(codes)]
    for start, stop in itertools.pairwise(cuts):
        if start == stop or codes[start] < 0 or start / rate >= duration:
            continue
        code = int(codes[start])
        tone, title = f"t{code * 13 % TONES}", f"code {code}"
        if result is not None and result.joint is not None and phones is not None:
            counts = result.joint[:, code] if code < result.joint.shape[1] else np.zeros(1)
            tone = "unknown"
            if counts.any():
                phone = phones[int(counts.argmax())]
                tone, title = _tone(phone, index), f"{title}, mostly {phone} ({counts.max() / counts.sum():.0%})"
        yield _block(start / rate, min(stop / rate, duration), str(code), tone, title)


def _outline(sound: npt.NDArray[np.float32], width: float) -> str:
    """Return an SVG path around the samples, highest and lowest of every one and a half pixels."""
    columns = max(1, min(len(sound), int(width / 1.5)))
    edges = np.linspace(0, len(sound), columns + 1).astype(int)[:-1]
    sound = np.nan_to_num(sound.astype(np.float64), posinf=0, neginf=0)
    scale = 100 / max(1e-6, float(np.abs(sound).max()))
    high = np.maximum.reduceat(sound, edges) * scale
    low = np.minimum.reduceat(sound, edges) * scale
    x = (np.arange(columns) + 0.5) * width / columns
    above = [f"{place:.1f} {-value:.0f}" for place, value in zip(x, high, strict=True)]
    below = [f"{place:.1f} {-value:.0f}" for place, value in zip(x, low, strict=True)]
    return "M" + "L".join([*above, *below[::-1]]) + "Z"


def _flac(sound: npt.NDArray[np.float32]) -> str:
    import soundfile

    buffer = io.BytesIO()
    soundfile.write(buffer, np.clip(np.nan_to_num(sound), -1, 1), 16_000, format="FLAC", subtype="PCM_16")
    return "data:audio/flac;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
