"""Codes as frames come: what `repcodec tokenize --stream` reads and writes."""

import json
from collections.abc import Iterable, Iterator
from typing import IO

import numpy as np
import numpy.typing as npt

from repcodec.architecture import FRAME_RATE
from repcodec.errors import RepCodecError
from repcodec.pipeline import SpeechTokenizer
from repcodec.shards import FeatureShards


def raw_frames(file: IO[bytes], dim: int) -> Iterator[npt.NDArray[np.float32]]:
    """Yield the frames (t, D) of a stream of little-endian float32 values, as they come.

    Raises:
        RepCodecError: it ends within a frame.
    """
    rest = b""
    while block := file.read1(2**20):  # type: ignore[attr-defined]  # of buffered streams
        data = rest + block
        whole = len(data) // (4 * dim) * 4 * dim
        rest = data[whole:]
        if whole:
            yield np.frombuffer(bytearray(data[:whole]), "<f4").reshape(-1, dim)
    if rest:
        raise RepCodecError(
            f"stdin: ends with {len(rest)} bytes of a frame, expected frames of {dim} little-endian float32 values."
        )


def stream_lines(tokenizer: SpeechTokenizer, name: str, chunks: Iterable[npt.NDArray[np.float32]]) -> Iterator[str]:
    """Yield a JSON line whenever codes have become ready: id, start in seconds, and the codes of each codebook."""
    done = 0
    for codes in tokenizer.stream(chunks):
        line = {"id": name, "start": round(done / tokenizer.codes_per_second, 6), "codes": codes.tolist()}
        done += codes.shape[1]
        yield json.dumps(line, ensure_ascii=False) + "\n"


def shard_chunks(shards: FeatureShards, utterance: int) -> Iterator[npt.NDArray[np.float32]]:
    """Yield the frames (t, D) of an utterance, a second at a time."""
    step = round(shards.frame_rate or FRAME_RATE)
    for start in range(0, int(shards.lengths[utterance]), step):
        yield shards.read(utterance, start, start + step)
