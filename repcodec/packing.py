"""Run a tokenizer over utterances of any length: packed end to end, in windows, or as frames arrive.

Nothing is padded and memory does not grow with an utterance's length: a long one is run in windows that overlap
by what the convolutions see. Codes do not depend on what else is run, nor on where windows begin, but for ties: in
float32 a few frames are convolved directly, many by `repcodec.conv`'s faster way, which rounds otherwise.

Axes: T frames, N codes an utterance, D feature width, K codebooks.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from itertools import chain
from threading import Barrier
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from repcodec.conv import TILE

PACK = 1152
"""Frames that are run at once, at most; a longer utterance is cut into windows of so many."""

SIDE_BY_SIDE = 8
"""Packs that are run at the same time on a CPU, at most; each takes some 60 MB at width 768."""


class Rows(Protocol):
    """What has rows: a tensor, or something that reads them when they are asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> Tensor: ...


class Tokenizer(Protocol):
    """Contract: what turns features into codes and back; the codec and the k-means baseline are both.

    Attributes:
        dim, output_dim: D, width of the features in and out.
        stride: frames a code.
        codebook_size, num_codebooks: V and K.
        reach: frames before and after a code's own that it depends on.
        decoder_reach: codes before and after that a code's frames depend on.
        about: what config.json says besides its shape: speech encoder, layer, frame rate …
        device: where it runs.
    """

    dim: int
    output_dim: int
    about: dict[str, Any]

    @property
    def stride(self) -> int:
        """Frames a code."""

    @property
    def codebook_size(self) -> int:
        """V."""

    @property
    def num_codebooks(self) -> int:
        """K."""

    @property
    def reach(self) -> tuple[int, int]:
        """Frames before and after a code's own that it depends on."""

    @property
    def decoder_reach(self) -> int:
        """Codes before and after that a code's frames depend on."""

    @property
    def device(self) -> torch.device:
        """Where it runs."""

    def encode(self, features: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Features (B, T, D), of which lengths (B,) are valid -> codes (B, K, N)."""

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (B, K, N) -> features (B, N * stride, D)."""

    def encode_pieces(self, pieces: list[Tensor]) -> list[Tensor]:
        """Features (T, D) of each piece -> its codes (N, K), none seeing another."""

    def decode_pieces(self, pieces: list[Tensor]) -> list[Tensor]:
        """Codes (N, K) of each piece -> its features (N * stride, D), none seeing another."""


def encode_packed(tokenizer: Tokenizer, utterances: Iterable[Rows]) -> Iterator[Tensor]:
    """Yield the codes (N, K) of each utterance's features (T, D), in order."""
    yield from _in_windows(tokenizer.encode_pieces, utterances, max(tokenizer.reach), tokenizer.stride, 1)


def decode_packed(tokenizer: Tokenizer, utterances: Iterable[Rows]) -> Iterator[Tensor]:
    """Yield the features (N * stride, D) of each utterance's codes (N, K), in order."""
    yield from _in_windows(tokenizer.decode_pieces, utterances, tokenizer.decoder_reach, 1, tokenizer.stride)


def _in_windows(
    run: Callable[[list[Tensor]], list[Tensor]], utterances: Iterable[Rows], reach: int, down: int, up: int
) -> Iterator[Tensor]:
    """Cut utterances into windows of `reach` more rows on each side, run many at once, join the results.

    `down` rows in give `up` rows out.
    """
    # Windows begin where tiles do, as utterances in a pack: the same sums, the same rounding.
    unit = TILE * down
    size, reach = max(unit, PACK // up // unit * unit), -(-reach // unit) * unit

    def packs() -> Iterator[list[_Window]]:
        pack: list[_Window] = []
        for utterance in utterances:
            for first in range(0, max(1, len(utterance)), size):
                before, stop = min(first, reach), first + size
                ends = stop >= len(utterance)
                rows = utterance[first - before : min(stop + reach, len(utterance))]
                kept = slice(before // down * up, None if ends else (before + size) // down * up)
                if pack and sum(len(window.rows) for window in pack) + len(rows) > size:
                    yield pack
                    pack = []
                pack.append(_Window(rows, kept, ends))
        if pack:
            yield pack

    parts: list[Tensor] = []
    for pack, results in _side_by_side(lambda pack: run([window.rows for window in pack]), packs()):
        for window, result in zip(pack, results, strict=True):
            parts.append(result[window.kept])
            if window.ends:
                yield torch.cat(parts) if len(parts) > 1 else parts[0]
                parts.clear()


class _Window(NamedTuple):
    """Part of an utterance.

    Attributes:
        rows: with those before and after that its results depend on.
        kept: which of the results are its own.
        ends: whether the utterance ends here.
    """

    rows: Tensor
    kept: slice
    ends: bool


def _side_by_side(
    job: Callable[[list[_Window]], list[Tensor]], packs: Iterator[list[_Window]]
) -> Iterator[tuple[list[_Window], list[Tensor]]]:
    """Yield each pack and its results in order; on a CPU each thread computes a pack of its own.

    So no thread waits for another one within a pack, which is faster than all of them on every operation.
    """
    first, second = next(packs, None), next(packs, None)
    if first is None:
        return
    threads = torch.get_num_threads() if first[0].rows.device.type == "cpu" else 1
    if second is None or threads == 1:
        for pack in chain([first], [] if second is None else [second], packs):
            yield pack, job(pack)
        return
    running: deque[tuple[list[_Window], Future[list[Tensor]]]] = deque()
    pool = _pool(threads)
    for pack in chain([first, second], packs):
        if len(running) > min(threads, SIDE_BY_SIDE):  # one waits, so that no thread does
            done, results = running.popleft()
            yield done, results.result()
        running.append((pack, pool.submit(job, pack)))
    for done, results in running:
        yield done, results.result()


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Return threads that share `threads` cores; up to SIDE_BY_SIDE each of them computes alone."""
    workers = min(threads, SIDE_BY_SIDE)
    pool, all_begun = ThreadPoolExecutor(workers), Barrier(workers)

    def begin(_: int) -> None:
        torch.get_num_threads()  # a thread's first question sets the number anew
        torch.set_num_threads(threads // workers)
        all_begun.wait()

    list(pool.map(begin, range(workers)))
    torch.set_num_threads(threads)  # the last call counts for threads that others begin
    return pool


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not live on in a forked process


def encode_stream(tokenizer: Tokenizer, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield codes (n, K) as soon as the frames they depend on have come; all together are those of `encode_packed`.

    Args:
        tokenizer: in evaluation mode.
        chunks: features (t, D) of one utterance, as they come, any number of frames each.
    """
    stride, (before, after) = tokenizer.stride, tokenizer.reach
    frames: Tensor | None = None
    begin = done = 0  # the first frame that is kept; codes given so far
    for chunk in chunks:
        for part in chunk.split(PACK):
            frames = part.clone() if frames is None else torch.cat([frames, part])
            ready = max(0, begin + len(frames) - after) // stride
            if ready > done:
                yield tokenizer.encode_pieces([frames])[0][done - begin // stride : ready - begin // stride]
                done = ready
                # What the next code looks back on, from a tile on, as in `encode_packed`.
                keep = max(0, done * stride - before) // (TILE * stride) * TILE * stride
                frames, begin = frames[keep - begin :].clone(), keep
    if frames is not None:
        rest = tokenizer.encode_pieces([frames])[0][done - begin // stride :]
        if len(rest):
            yield rest
