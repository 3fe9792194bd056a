"""The codes of a tokens file -> results: read line by line, so that a thousand hours need no more memory than one.

Axes: K codebooks, N codes an utterance.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from repcodec.abx import abx_errors
from repcodec.abx_items import abx_items
from repcodec.architecture import FRAME_RATE
from repcodec.audio import SAMPLE_RATE
from repcodec.errors import RepCodecError
from repcodec.labels import PhoneLabels, matched, matched_sentence, speaker_of
from repcodec.manifest import Manifest, utterance_id
from repcodec.results import Result
from repcodec.scores import Scores
from repcodec.tokens import Tokens, read_about, read_tokens

MOST_CODES = 2**20
"""Codes that all codebooks may have together: more are no codebooks', and counting them would fill the memory."""

RATES = (12.5, 25.0, 50.0, 75.0, 100.0)
"""Codes a second that durations may point to."""


@dataclass(frozen=True)
class TokensFacts:
    """What codes are, as far as it is told.

    Attributes:
        manifest: of their sounds, for durations: in the published format, in any order.
        codes_per_second: of each codebook.
        codebook_size: V.
    """

    manifest: Path | None = None
    codes_per_second: float | None = None
    codebook_size: int | None = None

    def __post_init__(self) -> None:
        """Refuse what is no number above 0.

        Raises:
            RepCodecError: says which.
        """
        rate, size = self.codes_per_second, self.codebook_size
        if rate is not None and not (type(rate) in (int, float) and 0 < rate < math.inf):
            raise RepCodecError(f"codes_per_second={rate}: expected a number above 0.")
        if size is not None and not (type(size) is int and size > 0):
            raise RepCodecError(f"codebook_size={size}: expected a whole number above 0.")


def measure_tokens(
    path: Path | str,
    name: str,
    labels: PhoneLabels | None,
    facts: TokensFacts = TokensFacts(),
    speaker: str | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> Result:
    """Measure the codes of a tokens file.

    What it does not say of itself is taken from `facts`, then from the description beside it, then from what it holds:
    the codebook's size is then one more than the largest code, and the rate follows from durations.

    Args:
        path: a tokens file of either format, gzipped or not.
        name: what tables call it.
        labels: phones; None: there are none.
        facts: what is known.
        speaker: regular expression of the speaker in an utterance's id, to measure ABX errors of the codes; that holds
            all codes in memory. None: they are not measured.
        rank, world_size: of this process; each scores every n-th utterance, all get the same result.

    Raises:
        RepCodecError: the file is damaged, a code is beyond the codebook, no utterance has labels or a place in the
            manifest, or the rate cannot be told.
    """
    found = _survey(path, facts)
    ids = found.ids
    keys: list[str | None] = [None] * len(ids)
    if labels is not None:
        keys = matched(labels, ids)
        labels.check_durations(keys, [n / found.codes_per_second for n in found.num_codes])
        if rank == 0:
            print(f"{path}: {matched_sentence(keys)}", flush=True)
    scores = Scores(found.num_codebooks, found.codebook_size, found.codes_per_second, labels)
    numbers = range(rank, len(ids), world_size)
    total = sum(found.num_codes[rank::world_size])
    with tqdm(total=total, desc=name, unit="code", unit_scale=True) as bar:
        for number, tokens in zip(numbers, _checked(path, found, rank, world_size), strict=True):
            scores.add(ids[number], torch.from_numpy(tokens.codes), keys[number])
            bar.update(tokens.codes.shape[1])
    result = scores.result(name)
    result.row.warnings += found.warnings
    if labels is not None and speaker is not None:
        items = abx_items(labels, ids, [speaker_of(utterance, speaker) for utterance in ids])
        codes = {number: tokens.codes.T for number, tokens in enumerate(_checked(path, found))}
        errors = abx_errors(items, lambda number: codes[number], found.codes_per_second, "different")
        result.row.abx_within, result.row.abx_across = errors.within, errors.across
        result.row.abx_kind, result.row.abx_items = errors.kind, errors.items
    return result


@dataclass(frozen=True)
class _Found:
    """What a first pass over a tokens file finds."""

    ids: list[str]
    num_codes: list[int]
    num_codebooks: int
    codebook_size: int
    codes_per_second: float
    warnings: list[str]


def _survey(path: Path | str, facts: TokensFacts) -> _Found:
    """Read a tokens file once for what it says of itself."""
    about, warnings = read_about(path), []
    samples = dict(_samples(facts.manifest)) if facts.manifest is not None else {}
    ids, num_codes, num_codebooks, largest = [], [], None, -1
    codes_timed, seconds = 0, 0.0
    for tokens in tqdm(read_tokens(path), desc=f"Reading {Path(path).name}", unit="utterance", delay=1):
        utterance = utterance_id(tokens.name)
        if num_codebooks is not None and len(tokens.codes) != num_codebooks:
            raise RepCodecError(
                f"{path}: {tokens.name} has {len(tokens.codes)} codebooks, the utterances before it {num_codebooks}."
            )
        num_codebooks = len(tokens.codes)
        ids.append(utterance)
        num_codes.append(tokens.codes.shape[1])
        largest = max(largest, int(tokens.codes.max(initial=-1)))
        duration = samples[utterance] / SAMPLE_RATE if utterance in samples else tokens.duration
        if duration is not None:
            seconds += duration
            codes_timed += tokens.codes.shape[1]
    if num_codebooks is None or largest < 0:
        raise RepCodecError(f"{path}: holds no code; make it again.")
    if samples and not any(utterance in samples for utterance in ids):
        raise RepCodecError(
            f"{facts.manifest}: lists no utterance of {path}; it has ids like {next(iter(samples))!r}, the tokens file "
            f"like {ids[0]!r}."
        )
    size = facts.codebook_size or about.get("codebook_size")
    if size is None:
        size = largest + 1
        warnings.append(
            f"the codebook's size is not known and was taken as {size}, one more than the largest code; "
            "codebook_size=V says it."
        )
    if num_codebooks * max(size, largest + 1) > MOST_CODES:
        raise RepCodecError(
            f"{path}: {num_codebooks} codebooks of {max(size, largest + 1):,} codes are more than the {MOST_CODES:,} "
            "that can be counted; make the file, or the description beside it, again."
        )
    if largest >= size:
        raise RepCodecError(
            f"{path}: holds code {largest}, but the codebook has {size} codes, 0 to {size - 1}; is it another "
            "tokenizer's, or codebook_size wrong?"
        )
    rate = facts.codes_per_second or about.get("codes_per_second")
    if rate is None and seconds > 0:
        measured = codes_timed / seconds
        rate = min(RATES, key=lambda known: abs(known - measured))
        if abs(measured / rate - 1) > 0.05:
            raise RepCodecError(
                f"{path}: {measured:.1f} codes a second by the sounds' durations, which is none of "
                f"{', '.join(map(str, RATES))}; is the manifest of other sounds? Otherwise say codes_per_second=…"
            )
    if rate is None:
        rate = FRAME_RATE
        warnings.append(f"codes a second are not known and were taken as {rate:g}; codes_per_second=… says it.")
    return _Found(ids, num_codes, num_codebooks, int(size), float(rate), warnings)


def _samples(path: Path) -> Iterator[tuple[str, int]]:
    manifest = Manifest.read(path)
    yield from zip(manifest.ids, manifest.num_samples, strict=True)


def _checked(path: Path | str, found: _Found, rank: int = 0, world_size: int = 1) -> Iterator[Tokens]:
    """Yield the utterances again; they are those of the first pass unless the file was changed meanwhile."""
    for tokens in read_tokens(path, rank, world_size):
        if int(tokens.codes.max(initial=-1)) >= found.codebook_size or len(tokens.codes) != found.num_codebooks:
            raise RepCodecError(f"{path}: {tokens.name} is not what it was a moment ago; is the file being written?")
        yield tokens
