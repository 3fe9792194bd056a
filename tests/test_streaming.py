import io
import json

import numpy as np
import torch
from conftest import DIM, refused, write_split

from repcodec.codec import RepCodec
from repcodec.pipeline import SpeechTokenizer
from repcodec.shards import FeatureShards
from repcodec.streaming import raw_frames, shard_chunks, stream_lines


class Slowly(io.BytesIO):
    """A pipe that gives 13 bytes at a time."""

    def read1(self, size=-1):
        return super().read1(13)


def test_raw_frames_are_put_together_from_any_pieces():
    frames = np.random.default_rng(0).normal(size=(9, 5)).astype("<f4")
    for pipe in (io.BufferedReader(io.BytesIO(frames.tobytes())), Slowly(frames.tobytes())):
        found = list(raw_frames(pipe, 5))
        assert np.array_equal(np.concatenate(found), frames)
    assert list(raw_frames(io.BytesIO(b""), 5)) == []


def test_a_stream_that_ends_within_a_frame_is_refused():
    with refused("stdin: ends with 3 bytes of a frame, expected frames of 5"):
        list(raw_frames(io.BytesIO(bytes(23)), 5))


def test_lines_hold_the_offline_codes_and_when_they_begin(tmp_path):
    torch.manual_seed(0)
    codec = RepCodec(DIM, codebook_size=16, codebook_num=2, enc_strides=(2, 1), dec_strides=(1, 2)).eval()
    write_split(tmp_path / "test", [130, 9])
    shards = FeatureShards(tmp_path / "test")
    tokenizer = SpeechTokenizer(codec)
    for utterance in range(2):
        lines = [json.loads(line) for line in stream_lines(tokenizer, "a", shard_chunks(shards, utterance))]
        codes = np.concatenate([line["codes"] for line in lines], axis=1)
        assert codes.tolist() == codec.encode(torch.from_numpy(shards.read(utterance))[None])[0].tolist()
        begin = 0
        for line in lines:
            assert line["start"] == begin / 25 and line["id"] == "a"
            begin += len(line["codes"][0])
    assert len(list(stream_lines(tokenizer, "a", shard_chunks(shards, 0)))) == 4
