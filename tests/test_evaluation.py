import json
import sys
from functools import partial

import numpy as np
import pytest
import torch
from conftest import DIM, refused

from repcodec.codec import RepCodec
from repcodec.data import ShardsDataModule
from repcodec.errors import RepCodecError
from repcodec.evaluation import Evaluation, Measures, fit_kmeans
from repcodec.kmeans import KMeansTokenizer
from repcodec.probe import phone_error_rate


def module(splits, labels=None, **options):
    return ShardsDataModule(dim=DIM, encoder="hubert_base", layer=9, dir=str(splits), labels=labels, **options)


def evaluate(tokenizer, name, data, split="test", corpus=False):
    return Evaluation(data, split, Measures(corpus)).measure(tokenizer, name)


@pytest.fixture
def labels(splits):
    path = splits / "phones.tsv"
    rows = ["utt\tstart_s\tend_s\tphone"]
    for utterance in range(3):
        rows += [f"utt{utterance}\t{t / 20}\t{(t + 1) / 20}\t{'abc'[(t + utterance) % 3]}" for t in range(10)]
    path.write_text("\n".join(rows) + "\n")
    return str(path)


def frames(splits, split):
    data = module(splits)
    return np.concatenate([data.split(split).features(i) for i in range(len(data.split(split)))])


def test_figures_of_kmeans_by_hand(splits, labels):
    torch.manual_seed(0)
    tokenizer = KMeansTokenizer(torch.randn(6, DIM) * 3)
    result = evaluate(tokenizer, "k", module(splits, labels), corpus=True)
    x, mean = frames(splits, "test"), frames(splits, "train").astype(np.float64).mean(0)
    centroids = tokenizer.centroids.numpy()
    codes = ((x[:, None] - centroids) ** 2).sum(-1).argmin(1)
    row = result.row
    assert row.normalized_error == pytest.approx(
        ((x - centroids[codes]) ** 2).sum() / ((x - mean) ** 2).sum(), rel=1e-5
    )
    share = np.bincount(codes, minlength=6) / len(codes)
    entropy = -sum(p * np.log(p) for p in share if p)
    assert row.perplexity == pytest.approx(np.exp(entropy))
    assert row.used_share == pytest.approx((share > 0).mean())
    assert row.bits_per_second == pytest.approx(50 * np.log2(6))
    assert row.entropy_bits_per_second == pytest.approx(50 * entropy / np.log(2))
    assert result.usage.tolist() == [np.bincount(codes, minlength=6).tolist()]
    assert result.joint.sum() == 2 * len(x)  # every frame is labelled, in both of its halves
    corpus = [((frames(splits, s)[:, None] - centroids) ** 2).sum(-1).argmin(1) for s in ("train", "valid", "test")]
    assert row.corpus_used_share == pytest.approx(len(set(np.concatenate(corpus).tolist())) / 6)


def test_evaluation_does_not_change_with_the_split_into_shards_or_order(splits, labels, codec):
    codec = codec.float().eval()
    row = evaluate(codec, "c", module(splits, labels)).row
    again = evaluate(codec, "c", module(splits, labels, whole_frames=30)).row
    assert row == again
    assert 0 <= row.pnmi <= 1
    assert 0 < row.phone_purity <= 1


def test_without_labels_the_phone_columns_are_empty(splits, codec):
    row = evaluate(codec.float(), "c", module(splits)).row
    assert row.pnmi is None
    assert row.phone_purity is None


def test_strided_codec_is_measured_on_all_its_frames(splits):
    codec = RepCodec(DIM, enc_strides=(2, 1), dec_strides=(1, 2), codebook_size=16).eval()
    result = evaluate(codec, "s", module(splits))
    assert result.row.codes_per_second == 25
    assert result.usage.sum() == 8 + 11 + 5


def test_labels_of_other_utterances_are_an_error(splits, tmp_path, codec):
    (tmp_path / "other.tsv").write_text("utt\tstart_s\tend_s\tphone\nelse\t0\t1\ta\n")
    with pytest.raises(
        RepCodecError,
        match=r"no utterance has labels; the labels are of ids like 'else', the utterances like 'spk/utt0'",
    ):
        evaluate(codec.float(), "c", module(splits, str(tmp_path / "other.tsv")))


def test_codec_and_features_of_different_width_are_one_sentence(splits):
    with pytest.raises(RepCodecError, match=r"width 6, but .* width 8"):
        evaluate(RepCodec(6, codebook_size=4), "six", module(splits))


def test_labels_that_fit_several_utterances_are_an_error(tmp_path, codec):
    from repcodec.shard_writer import write_shard

    for split in ("train", "test"):
        with write_shard(tmp_path / split, 0, 1, DIM, {"root": "", "frame_rate": 50}) as shard:
            for name in ["s1/a.wav", "s2/a.wav"]:
                shard.append(name, np.ones((5, DIM), dtype=np.float32))
    (tmp_path / "p.tsv").write_text("utt\tstart_s\tend_s\tphone\na\t0\t1\tx\n")
    with pytest.raises(RepCodecError, match="the labels of 'a' fit several utterances"):
        evaluate(codec.float(), "c", module(tmp_path, str(tmp_path / "p.tsv")))


def test_only_the_split_asked_for_is_needed(splits, codec):
    import shutil

    shutil.rmtree(splits / "test")
    result = evaluate(codec.float(), "c", module(splits), "valid")
    assert result.usage.sum() == 20 + 31 + 5
    assert result.row.corpus_used_share is None
    with pytest.raises(RepCodecError, match="test does not exist"):
        evaluate(codec.float(), "c", module(splits), "test")


def test_fitted_kmeans_is_saved_and_taken_again_for_the_same_features_only(splits, tmp_path):
    first = fit_kmeans(module(splits), 5, tmp_path / "k")
    written = (tmp_path / "k" / "model.safetensors").stat().st_mtime_ns
    assert torch.equal(fit_kmeans(module(splits), 5, tmp_path / "k").centroids, first.centroids)
    assert (tmp_path / "k" / "model.safetensors").stat().st_mtime_ns == written
    other = fit_kmeans(module(splits, seed=3), 5, tmp_path / "k")
    assert not torch.equal(other.centroids, first.centroids)


def test_fitted_kmeans_says_what_features_it_is_of(splits, tmp_path):
    for path in splits.glob("train/*.json"):
        about = json.loads(path.read_text()) | {"model": "facebook/x", "weights_sha256": "ab" * 32}
        path.write_text(json.dumps(about))
    about = fit_kmeans(module(splits), 5, tmp_path / "k").about
    expected = {"encoder": "hubert_base", "layer": 9, "frame_rate": 50, "waveform_norm": False}
    expected |= {"encoder_model": "facebook/x", "encoder_sha256": "ab" * 32}
    assert expected.items() <= about.items()
    assert about == KMeansTokenizer.from_pretrained(tmp_path / "k").about
    written = (tmp_path / "k" / "model.safetensors").stat().st_mtime_ns
    for path in splits.glob("train/*.json"):  # the same encoder elsewhere is the same
        path.write_text(path.read_text().replace("facebook/x", "/else/where"))
    fit_kmeans(module(splits), 5, tmp_path / "k")
    assert (tmp_path / "k" / "model.safetensors").stat().st_mtime_ns == written
    for path in splits.glob("train/*.json"):  # other weights are not
        path.write_text(path.read_text().replace("ab" * 32, "cd" * 32))
    assert fit_kmeans(module(splits), 5, tmp_path / "k").about["encoder_sha256"] == "cd" * 32


def test_faiss_fits_as_well_as_scikit_learn(splits, tmp_path, monkeypatch):
    pytest.importorskip("faiss", reason="pip install 'repcodec[faiss]'")
    data, errors = module(splits), []
    for library in ("faiss", "scikit-learn"):
        if library != "faiss":
            monkeypatch.setitem(sys.modules, "faiss", None)
        kmeans = fit_kmeans(data, 8, tmp_path / library)
        assert kmeans.about["fitted_with"].startswith(library)
        errors.append(evaluate(kmeans, library, data).row.normalized_error)
        with refused("needs at least as many frames"):
            fit_kmeans(data, 1000, tmp_path / "too many")
    assert errors[0] == pytest.approx(errors[1], rel=0.15)


def test_the_probe_hears_codes_and_features_of_every_split(splits, labels, codec, monkeypatch):
    monkeypatch.setattr("repcodec.evaluation.check_held_out", lambda *_: None)
    monkeypatch.setattr("repcodec.evaluation.phone_error_rate", partial(phone_error_rate, steps=2))
    evaluation = Evaluation(module(splits, labels), "test", Measures(probe=True, abx=True))
    codes, features = evaluation.measure(codec.float().eval(), "c").row, evaluation.measure_features().row
    for row in (codes, features):
        assert len(row.phone_error_rates) == 3
        assert row.phone_error_rate == pytest.approx(np.mean(row.phone_error_rates)) and row.phone_error_rate > 0
        assert row.abx_kind in ("phone", "triphone")
    assert features.is_ceiling and not codes.is_ceiling
