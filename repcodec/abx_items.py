"""The tokens that ABX compares."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
import numpy.typing as npt

from repcodec.labels import SILENCES, PhoneLabels

MAX_GAP = 0.01
"""Seconds between two phones from which on they are no neighbours: some labels leave pauses out."""

MAX_PHONES = 2**19
"""Phones after which no further utterance is drawn; LibriSpeech's dev-clean and test-clean together have fewer."""

ROUNDING = 1e-6
"""Frames by which rounding may move a time: 0.29 s at 50 frames a second is frame 14.499999999999998."""

Kind = Literal["triphone", "phone"]

TOKEN = np.dtype(
    [
        ("utterance", np.int64),
        ("start", np.float64),
        ("end", np.float64),
        ("phone", np.int64),
        ("context", np.int64),
        ("speaker", np.int64),
        ("lot", np.uint64),
    ]
)


@dataclass(frozen=True)
class AbxItems:
    """The tokens to compare, in an order that does not depend on that of the utterances.

    Attributes:
        tokens: (N,) `TOKEN`: number of the utterance; start and end in seconds; index into `phones`; which pair of
            phones is around it, 0 where contexts do not count; index of the speaker among the sorted names; its lot.
        phones: names.
        utterances: ids.
        num_speakers: how many there are.
        kind: "triphone", between the same two phones and as long as the triphone; "phone", alone and in any context.
        found: phones in the utterances that were drawn, pauses not counted.
        drawn_utterances: how many these are; all with labels, unless there are more phones than `MAX_PHONES`.
        max_tokens: at most so many of one phone, context and speaker were drawn; None: all.
        max_speakers: X of at most so many speakers are drawn for each phone, context and speaker of A; None: of all.
        seed: of the draws.
    """

    tokens: npt.NDArray[np.void]
    phones: Sequence[str]
    utterances: Sequence[str]
    num_speakers: int
    kind: Kind
    found: int
    drawn_utterances: int
    max_tokens: int | None
    max_speakers: int | None
    seed: int


def abx_items(
    labels: PhoneLabels,
    utterances: Sequence[str],
    speakers: Sequence[str],
    kind: Kind | None = None,
    max_tokens: int | None = 10,
    max_speakers: int | None = 5,
    seed: int = 0,
) -> AbxItems:
    """Find the tokens to compare.

    Pauses are no tokens, and a phone beside one has no context, as in ZeroSpeech's item files. Tokens whose context is
    that of no other phone are left out.

    Args:
        labels: phones with times; an utterance without has no token.
        utterances: ids.
        speakers: of each utterance.
        kind: see `AbxItems`. None: "triphone", unless that gives a cell within speakers to fewer than half as many
            pairs (a, b) as "phone" does, since minutes of speech repeat few triphones.
        max_tokens, max_speakers: see `AbxItems`; ZeroSpeech's are 10 and 5.
        seed: of the draws; besides it, they depend on ids and times alone.

    Raises:
        RepCodecError: an utterance fits several labels.
    """
    silent = np.array([phone.casefold() in SILENCES for phone in labels.phones], dtype=bool)
    names, indices = np.unique(np.asarray(speakers, dtype=str), return_inverse=True)
    lots = np.array([_lot(seed, utterance) for utterance in utterances], dtype=np.uint64)
    by_kind: dict[Kind, list[npt.NDArray[np.void]]] = {"phone": [np.zeros(0, TOKEN)], "triphone": [np.zeros(0, TOKEN)]}
    found = drawn = 0
    for number in np.argsort(lots, kind="stable"):
        if found >= MAX_PHONES:
            break
        segments = labels.segments(utterances[number])
        for name, tokens in _utterance_tokens(segments, silent, int(lots[number])).items():
            tokens["utterance"], tokens["speaker"] = number, indices[number]
            by_kind[name].append(tokens)
        found += len(by_kind["phone"][-1])
        drawn += len(segments[0]) > 0
    found_tokens = {name: np.concatenate(parts) for name, parts in by_kind.items()}
    if kind is None:
        pairs = {name: _num_pairs(tokens) for name, tokens in found_tokens.items()}
        kind = "triphone" if 2 * pairs["triphone"] >= pairs["phone"] > 0 else "phone"
    tokens = found_tokens[kind]

    if max_tokens is not None:
        tokens = tokens[np.lexsort((tokens["lot"], *group_keys(tokens)))]
        first, _ = groups_of(tokens)
        tokens = tokens[np.arange(len(tokens)) - np.repeat(first, np.diff(first, append=len(tokens))) < max_tokens]
    width = max(len(silent), 1)
    known = np.unique(tokens["context"] * width + tokens["phone"])  # phones of each context
    contexts, num_phones = np.unique(known // width, return_counts=True)
    tokens = tokens[np.isin(tokens["context"], contexts[num_phones > 1])]
    order = np.lexsort((tokens["start"], lots[tokens["utterance"]], *group_keys(tokens)))
    return AbxItems(
        tokens[order], labels.phones, utterances, len(names), kind, found, drawn, max_tokens, max_speakers, seed
    )


def _lot(seed: int, utterance: str) -> int:
    """Return a number of 64 bits that is as good as random, but always the same."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {utterance}".encode(), digest_size=8).digest(), "big")


def _utterance_tokens(
    segments: tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.int64]],
    silent: npt.NDArray[np.bool],
    lot: int,
) -> dict[Kind, npt.NDArray[np.void]]:
    """Make the tokens of both kinds of one utterance, from its segments; utterance and speaker are left open."""
    starts, ends, phones = segments
    tokens = np.zeros(len(phones), TOKEN)
    tokens["start"], tokens["end"], tokens["phone"] = segments
    tokens["lot"] = np.random.PCG64(lot).random_raw(len(phones))
    spoken = ~silent[phones]
    joined = np.zeros(len(phones), dtype=bool)  # to the next one
    joined[:-1] = spoken[:-1] & spoken[1:] & (starts[1:] - ends[:-1] <= MAX_GAP)
    inner = joined & np.roll(joined, 1)  # nothing is joined to the first one, as the last one is joined to nothing
    triphones = tokens.copy()
    triphones["start"], triphones["end"] = np.roll(starts, 1), np.roll(ends, -1)
    triphones["context"] = np.roll(phones, 1) * len(silent) + np.roll(phones, -1)
    return {"phone": tokens[spoken], "triphone": triphones[inner]}


def group_keys(
    tokens: npt.NDArray[np.void],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return what the tokens of a group share, the last the one to sort by first."""
    return tokens["phone"], tokens["context"], tokens["speaker"]


def groups_of(tokens: npt.NDArray[np.void]) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Return where each group begins among sorted tokens, and which group is the first of each speaker and context."""
    phone, context, speaker = (np.diff(key, prepend=-1) != 0 for key in group_keys(tokens))
    first = np.flatnonzero(phone | context | speaker)
    return first, np.flatnonzero((context | speaker)[first])


def _num_pairs(tokens: npt.NDArray[np.void]) -> int:
    """Return how many ordered pairs of phones have a cell within speakers."""
    tokens = tokens[np.lexsort(group_keys(tokens))]
    first, unit = groups_of(tokens)
    size, phone = np.diff(first, append=len(tokens)), tokens["phone"][first]
    seen = np.zeros((phone.max(initial=-1) + 1,) * 2, dtype=bool)
    for begin, end in pairwise([*unit, len(first)]):
        seen[np.ix_(phone[begin:end][size[begin:end] > 1], phone[begin:end])] = True
    np.fill_diagonal(seen, False)
    return int(seen.sum())


def item_frames(
    start: npt.NDArray[np.float64], end: npt.NDArray[np.float64], frame_rate: float
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return which frames have their centre in an item, its ends included, as in ABXpy and fastabx.

    Args:
        start, end: (N,) seconds.
        frame_rate: frames, or codes of one codebook, per second; frame i lasts from i / rate to (i + 1) / rate.

    Returns:
        (N,) first frames, and (N,) those after the last; equal where there is none.
    """
    first = np.ceil(start * frame_rate - 0.5 - ROUNDING).astype(np.int64).clip(0)
    stop = np.floor(end * frame_rate - 0.5 + ROUNDING).astype(np.int64) + 1
    return first, np.maximum(first, stop)
