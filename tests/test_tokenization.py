import numpy as np
import pytest
import torch
from conftest import DIM, write_split

from repcodec.codec import RepCodec
from repcodec.errors import RepCodecError
from repcodec.kmeans import KMeansTokenizer
from repcodec.quantizers import EMAQuantizer
from repcodec.shards import FeatureShards
from repcodec.tokenization import encode_shards, label, load_tokenizer, tokenize, usable_device
from repcodec.tokens import read_tokens


@pytest.fixture
def shards(tmp_path):
    write_split(tmp_path / "test", [9, 1, 0, 14, 6], num_shards=2)
    return FeatureShards(tmp_path / "test")


def test_tokens_file_holds_each_utterances_codes_in_order(tmp_path, shards, codec):
    codec = codec.float().eval()
    tokenize(codec, shards, tmp_path / "out.tokens", shards.names, "/audio")
    assert (tmp_path / "out.tokens").read_text().startswith("/audio\nspk/utt0.wav\t")
    found = list(read_tokens(tmp_path / "out.tokens"))
    assert [name for name, _ in found] == [f"spk/utt{i}.wav" for i in range(5)]
    for i, (_, codes) in enumerate(found):
        assert len(codes) == shards.lengths[i]
        if len(codes):
            alone = codec.encode(torch.from_numpy(np.array(shards.features(i)))[None])[0, 0]
            assert codes.tolist() == alone.tolist()


def test_codec_and_kmeans_load_by_what_the_folder_says(tmp_path, shards, codec):
    codec.float().save_pretrained(tmp_path / "codec")
    KMeansTokenizer(torch.randn(5, DIM)).save_pretrained(tmp_path / "kmeans")
    assert isinstance(load_tokenizer(tmp_path / "codec", shards), RepCodec)
    assert isinstance(load_tokenizer(tmp_path / "kmeans", shards), KMeansTokenizer)
    (tmp_path / "config.json").write_text('{"kind": "wav2vec"}')
    with pytest.raises(RepCodecError, match="'wav2vec', expected repcodec or kmeans"):
        load_tokenizer(tmp_path, shards)


def test_labels_tell_kinds_and_sizes_apart():
    assert label(KMeansTokenizer(torch.zeros(7, 3))) == "k-means 7"
    assert label(RepCodec(4, quantizer=EMAQuantizer(4, 16, 2))) == "RepCodec 2 x 16"


def test_strided_codec_gives_fewer_codes(shards):
    codec = RepCodec(DIM, enc_strides=(2, 1), dec_strides=(1, 2), codebook_size=16).eval()
    counts = [codes.shape[1] for _, codes in encode_shards(codec, shards, "")]
    assert counts == [5, 1, 0, 7, 3]


def refused(tmp_path, tokenizer, shards, names=None):
    with pytest.raises(RepCodecError) as error:
        tokenize(tokenizer, shards, tmp_path / "out.tokens", names or shards.names, "/audio")
    assert not (tmp_path / "out.tokens").exists()
    return str(error.value)


def test_bad_input_is_one_sentence_and_writes_nothing(tmp_path, shards, codec):
    several = RepCodec(DIM, codebook_size=4, codebook_num=2).eval()
    assert "2 codebooks" in refused(tmp_path, several, shards)
    assert "5 utterances, but 2 names" in refused(tmp_path, codec.float(), shards, ["a", "b"])
    rows = np.load(tmp_path / "test" / "1_2.npy", mmap_mode="r+")
    rows[3, 1] = np.nan
    rows.flush()
    assert "1_2.npy, spk/utt3.wav: frame 3 holds NaN" in refused(tmp_path, codec.float().eval(), shards)


def test_features_a_codec_was_not_trained_on_are_refused(tmp_path, codec):
    RepCodec(6, codebook_size=4).save_pretrained(tmp_path / "six")
    codec.float().save_pretrained(tmp_path / "codec", {"encoder": "hubert_base", "layer": 6})
    write_split(tmp_path / "test", [9], encoder="hubert_base", layer=9)
    shards = FeatureShards(tmp_path / "test")
    with pytest.raises(RepCodecError, match=r"features have width 8, but .* takes 6"):
        load_tokenizer(tmp_path / "six", shards)
    with pytest.raises(RepCodecError, match="features of layer 9, expected 6"):
        load_tokenizer(tmp_path / "codec", shards)


def test_device_that_is_not_here_is_one_sentence():
    for name in ("gpu", "cuda:99"):
        with pytest.raises(RepCodecError, match=f"device {name}: not usable here"):
            usable_device(name)
