import numpy as np
import pytest
import torch
from conftest import refused

from repcodec.errors import RepCodecError
from repcodec.kmeans import KMeansTokenizer
from repcodec.quantizers import NO_CODE, fit_centroids


def test_encode_is_the_nearest_centroid_and_decode_its_vector():
    torch.manual_seed(0)
    tokenizer = KMeansTokenizer(torch.randn(9, 4))
    features, lengths = torch.randn(2, 7, 4), torch.tensor([7, 3])
    codes = tokenizer.encode(features, lengths)
    assert codes.shape == (2, 1, 7)
    assert torch.equal(codes[0, 0], torch.cdist(features[0], tokenizer.centroids).argmin(1))
    assert codes[1, 0].tolist()[3:] == [NO_CODE] * 4
    decoded = tokenizer.decode(codes)
    assert torch.equal(decoded[0], tokenizer.centroids[codes[0, 0]])
    assert (decoded[1, 3:] == 0).all()


def test_saved_tokenizer_is_the_same(tmp_path):
    tokenizer = KMeansTokenizer(torch.randn(9, 4))
    tokenizer.save_pretrained(tmp_path, {"seed": 3})
    loaded = KMeansTokenizer.from_pretrained(tmp_path)
    assert torch.equal(loaded.centroids, tokenizer.centroids)
    assert loaded.config() == {**tokenizer.config(), "seed": 3}
    features = torch.randn(1, 20, 4)
    assert torch.equal(loaded.encode(features), tokenizer.encode(features))
    loaded.save_pretrained(tmp_path / "again")
    for name in ("config.json", "model.safetensors", "README.md"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()


def test_fit_has_converged():
    frames = np.random.default_rng(0).normal(size=(800, 3)).astype(np.float32)
    centroids = fit_centroids(frames, 10, seed=0)
    for _ in range(3):  # Lloyd's own steps move nothing any more
        nearest = ((frames[:, None] - centroids[None]) ** 2).sum(-1).argmin(1)
        moved = np.stack([frames[nearest == v].mean(0) for v in range(10)])
        np.testing.assert_allclose(moved, centroids, atol=0.02)
        centroids = moved


def test_fit_is_the_same_for_a_seed():
    frames = np.random.default_rng(0).normal(size=(300, 3))
    assert np.array_equal(fit_centroids(frames, 10, seed=1), fit_centroids(frames, 10, seed=1))


def test_fewer_frames_than_codes_is_one_sentence():
    with pytest.raises(RepCodecError, match="1024 codes needs at least as many frames, found 5"):
        fit_centroids(np.zeros((5, 3)), 1024)


def test_another_kind_of_folder_is_refused(tmp_path, codec):
    codec.save_pretrained(tmp_path)
    with pytest.raises(RepCodecError, match="holds a repcodec"):
        KMeansTokenizer.from_pretrained(tmp_path)


def test_features_of_another_width_type_or_lengths_as_a_list():
    tokenizer = KMeansTokenizer(torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
    features = torch.tensor([[[0.1, 0.1], [0.9, 0.8]], [[1.0, 1.0], [5.0, 5.0]]], dtype=torch.float64)
    assert tokenizer.encode(features, [2, 1]).tolist() == [[[0, 1]], [[1, -1]]]
    for wrong in (torch.zeros(1, 2, 3), torch.zeros(2, 2)):
        with refused(str(tuple(wrong.shape)), "(B, T, 2)"):
            tokenizer.encode(wrong)
