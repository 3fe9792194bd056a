import json

import numpy as np
import pytest
import torch
from conftest import DIM, refused, write_split

from repcodec.codec import RepCodec
from repcodec.decoding import decode_tokens
from repcodec.kmeans import KMeansTokenizer
from repcodec.shards import FeatureShards
from repcodec.tokenization import FeatureSource, describe, write_tokens

LENGTHS = [9, 1, 0, 14, 6]


@pytest.fixture
def shards(tmp_path):
    write_split(tmp_path / "test", LENGTHS, encoder="hubert_base", layer=9)
    return FeatureShards(tmp_path / "test")


@pytest.mark.parametrize("kind", ["tokens", "jsonl"])
@pytest.mark.parametrize("strides", [(1, 1), (2, 1)])
def test_codes_become_features_again(tmp_path, shards, kind, strides):
    torch.manual_seed(0)
    codec = RepCodec(DIM, codebook_size=16, enc_strides=strides, dec_strides=strides[::-1]).eval()
    codec.about = {"encoder": "hubert_base", "layer": 9, "frame_rate": 50}
    write_tokens(codec, FeatureSource(shards), describe(codec, None), tmp_path / "out", kind=kind)

    assert decode_tokens(codec, tmp_path / "out", tmp_path / "decoded") == 5

    decoded = FeatureShards(tmp_path / "decoded", DIM)
    decoded.check_source("hubert_base", 9)
    assert decoded.names == shards.names and decoded.root == "/audio"
    # JSON lines say how many frames there were, the published format does not.
    expected = LENGTHS if kind == "jsonl" else [-(-length // codec.stride) * codec.stride for length in LENGTHS]
    assert decoded.lengths.tolist() == expected
    for i, length in enumerate(LENGTHS):
        if length:
            codes = codec.encode(torch.from_numpy(shards.read(i))[None])
            frames = codec.decode(codes)[0, : expected[i]].numpy()
            np.testing.assert_allclose(decoded.features(i), frames, rtol=1e-4, atol=1e-5)


def test_kmeans_decodes_to_its_centroids(tmp_path):
    centroids = torch.randn(4, 3)
    (tmp_path / "a").write_text("/audio\na.wav\t2 0 2\n")
    decode_tokens(KMeansTokenizer(centroids), tmp_path / "a", tmp_path / "decoded")
    assert np.array_equal(FeatureShards(tmp_path / "decoded").features(0), centroids[[2, 0, 2]].numpy())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("b.wav\t3 16", "b.wav: code 16, but the tokenizer has 0 to 15"),
        ("b.wav\t3 x", "line 3: a code is not a whole number"),
        ("b.wav", "line 3: found"),
    ],
)
def test_bad_tokens_are_one_sentence_and_leave_no_shard(tmp_path, codec, line, message):
    (tmp_path / "a").write_text(f"/audio\na.wav\t1 2\n{line}\n")
    with refused(tmp_path / "a", message):
        decode_tokens(codec.float(), tmp_path / "a", tmp_path / "decoded")
    assert not list((tmp_path / "decoded").glob("*.npy"))


def test_another_number_of_codebooks_is_refused(tmp_path, codec):
    (tmp_path / "a").write_text(json.dumps({"id": "a", "codes": [[1], [2]]}) + "\n")
    with refused(tmp_path / "a", "2 codebooks, but the tokenizer has 1"):
        decode_tokens(codec.float(), tmp_path / "a", tmp_path / "decoded")


def test_a_shard_that_is_there_is_not_replaced(tmp_path, codec):
    write_split(tmp_path / "decoded", [3])
    (tmp_path / "a").write_text("/audio\na.wav\t1 2\n")
    with refused(tmp_path / "decoded" / "0_1.npy", "is there already"):
        decode_tokens(codec.float(), tmp_path / "a", tmp_path / "decoded")


def test_a_file_without_utterances_and_one_that_says_too_many_frames_are_refused(tmp_path, codec):
    (tmp_path / "a").write_text("/audio\n")
    with refused(tmp_path / "a", "holds no utterance"):
        decode_tokens(codec.float(), tmp_path / "a", tmp_path / "decoded")
    (tmp_path / "a").write_text(json.dumps({"id": "a", "codes": [[1, 2]], "frames": 3}) + "\n")
    with refused(tmp_path / "a", "says 3 frames, but its codes stand for 2"):
        decode_tokens(codec.float(), tmp_path / "a", tmp_path / "decoded")
