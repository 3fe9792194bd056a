"""Codecs with quantizers of vector-quantize-pytorch: saved, packed, trained, tokenizing, exported."""

import json
import sys

import numpy as np
import pytest
import torch
from conftest import DIM, FAST_CODEC, refused, write_split
from test_library_quantizers import MAKERS, codec_of, configuration, every_kind, features_in
from torch import nn

from repcodec import packing
from repcodec.codec import RepCodec
from repcodec.labels import PhoneLabels
from repcodec.library_quantizers import FSQQuantizer, LFQQuantizer, SimVQQuantizer
from repcodec.packing import decode_packed, encode_packed, encode_stream
from repcodec.shards import FeatureShards
from repcodec.tokens import read_tokens


@every_kind
def test_saved_codecs_are_the_same_bit_for_bit(kind, tmp_path):
    codec = codec_of(kind).float()
    codec.save_pretrained(tmp_path / "codec")
    checkpoint = {"state_dict": {f"codec.{name}": value for name, value in codec.state_dict().items()}}
    torch.save({**checkpoint, "codec": codec.config()}, tmp_path / "last.ckpt")
    features = torch.randn(2, 30, DIM)
    codes = codec.encode(features)
    for loaded in (RepCodec.from_pretrained(tmp_path / "codec"), RepCodec.from_lightning(tmp_path / "last.ckpt")):
        assert loaded.config() == codec.config()
        assert loaded.state_dict().keys() == codec.state_dict().keys()
        assert all(torch.equal(value, codec.state_dict()[name]) for name, value in loaded.state_dict().items())
        assert torch.equal(loaded.encode(features), codes)
        assert torch.equal(loaded.decode(codes), codec.decode(codes))


def test_saved_in_float64_a_codec_loads_in_float64(tmp_path):
    for kind in MAKERS:
        codec = codec_of(kind)
        codec.save_pretrained(tmp_path / kind)
        codes = codec.encode(torch.randn(1, 9, DIM))
        decoded = RepCodec.from_pretrained(tmp_path / kind).decode(codes)
        torch.testing.assert_close(decoded, codec.decode(codes), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["simvq", "fsq", "lfq", "rotation"])
def test_a_saved_codec_says_which_package_is_missing(kind, tmp_path, monkeypatch):
    codec = codec_of(kind).float()
    codec.save_pretrained(tmp_path)
    features = torch.randn(1, 9, DIM)
    codes = codec.encode(features)
    monkeypatch.setitem(sys.modules, "vector_quantize_pytorch", None)
    if kind == "rotation":  # coding needs none of it, training does
        assert torch.equal(RepCodec.from_pretrained(tmp_path).encode(features), codes)
        with refused("vector-quantize-pytorch", "pip install 'repcodec[quantizers]'"):
            codec(features)
    else:
        with refused("vector-quantize-pytorch", "pip install 'repcodec[quantizers]'"):
            RepCodec.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FSQQuantizer(4, [8, 2]), r"levels=\[8, 2\]: expected whole numbers from 3 up"),
        (lambda: FSQQuantizer(4, []), r"levels=\[\]: expected"),
        (lambda: FSQQuantizer(4, [1000] * 3), "of a product up to"),
        (lambda: LFQQuantizer(4, 1000), "codebook_size=1000: expected a power of two"),
        (lambda: LFQQuantizer(4, 16, -1.0), "expected entropy_weight >= 0"),
        (lambda: SimVQQuantizer(4, 0), "codebook_size=0: expected at least 1"),
    ],
)
def test_arguments_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_config_with_wrong_levels_is_one_sentence(tmp_path):
    codec_of("fsq").float().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantizer"]["levels"] = [5, "3"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with refused(tmp_path / "config.json", "describes no codec", "levels=[5, '3']"):
        RepCodec.from_pretrained(tmp_path)


@pytest.mark.parametrize("strides", [(1, 1), (1, 2), (2, 2)])
@every_kind
def test_packed_windows_and_streams_give_the_codes_of_the_whole(kind, strides, monkeypatch):
    monkeypatch.setattr(packing, "PACK", 40)
    codec = codec_of(kind, strides)
    generator = torch.Generator().manual_seed(1)
    utterances = [torch.randn(length, DIM, generator=generator).double() for length in (50, 1, 0, 7, 131, 34)]
    whole = [codec(features[None]).quantizer.codes[0] if len(features) else None for features in utterances]
    found = list(encode_packed(codec, utterances))
    decoded = list(decode_packed(codec, found))
    for features, expected, codes, made in zip(utterances, whole, found, decoded, strict=True):
        assert len(codes) == -(-len(features) // codec.stride)
        if expected is None:
            continue
        assert torch.equal(codes.T, expected)
        assert torch.equal(torch.cat(list(encode_stream(codec, features.split(7)))), codes)
        torch.testing.assert_close(made, codec.decode(expected[None])[0])


@pytest.mark.parametrize(("option", "strides", "rate"), [("strided", (1, 2), 25.0), ("strided4", (2, 2), 12.5)])
def test_codes_of_25_and_12_5_hz_are_made_written_evaluated_and_decoded(option, strides, rate, splits, tmp_path):
    from hydra.utils import instantiate

    from repcodec.evaluation import Evaluation
    from repcodec.tokenization import FeatureSource, describe, encode_shards, write_tokens

    config = configuration(f"codec={option}", "run_dir=/tmp", "run=test", *FAST_CODEC)
    assert tuple(config.codec.enc_strides) == strides
    torch.manual_seed(0)
    codec = instantiate(config.codec).eval()
    rows = ["utt\tstart_s\tend_s\tphone"]
    for utterance in range(3):
        rows += [f"utt{utterance}\t{t / 7:.3f}\t{(t + 1) / 7:.3f}\t{'abc'[(t + utterance) % 3]}" for t in range(4)]
    (tmp_path / "phones.tsv").write_text("\n".join(rows) + "\n")
    labels = str(tmp_path / "phones.tsv")
    data = features_in(splits, labels)
    codec.quantizer.start(codec.vectors(torch.from_numpy(data.train.sample(300))[None]), seed=0)
    result = Evaluation(data).measure(codec, option)
    shards = FeatureShards(splits / "test")
    codes = [codes for _, codes in encode_shards(codec, shards, "codes")]
    assert [row.shape[1] for row in codes] == [-(-length // codec.stride) for length in (15, 22, 9)]
    assert result.row.codes_per_second == rate
    assert result.row.bits_per_second == rate * 4
    # The phone of every 10 ms, counted by hand.
    joint = np.zeros((3, 16))
    phones = PhoneLabels.read(labels).phones
    for utterance, row in enumerate(codes):
        for n, code in enumerate(np.repeat(row[0], round(100 / rate)).tolist()):
            place = int((n + 0.5) / 100 * 7)
            if place < 4:
                joint[list(phones).index("abc"[(place + utterance) % 3]), code] += 1
    assert np.array_equal(result.joint, joint)
    p = joint / joint.sum()
    known, each = -sum(x * np.log(x) for x in p.sum(1) if x), -sum(x * np.log(x) for x in p.sum(0) if x)
    assert result.row.pnmi == pytest.approx((known + each + sum(x * np.log(x) for x in p.flat if x)) / known)
    # A tokens file of them, and the features they decode to, of the utterances' own lengths.
    assert write_tokens(codec, FeatureSource(shards), describe(codec, None), tmp_path / "test.tokens")
    written = [tokens.codes for tokens in read_tokens(tmp_path / "test.tokens")]
    assert [[list(map(int, book)) for book in tokens] for tokens in written] == [row.tolist() for row in codes]
    lengths = torch.from_numpy(shards.lengths)
    batched = codec.encode(
        nn.utils.rnn.pad_sequence([torch.from_numpy(shards.read(i)) for i in range(3)], batch_first=True), lengths
    )
    decoded = codec.decode(batched, lengths)
    for utterance, row in enumerate(codes):
        assert torch.equal(batched[utterance, :, : row.shape[1]], row)
        alone = codec.decode(row[None])[0, : lengths[utterance]]
        torch.testing.assert_close(decoded[utterance, : lengths[utterance]], alone, rtol=1e-4, atol=1e-5)


def test_bits_per_second_follow_from_the_levels(splits):
    from repcodec.evaluation import Evaluation

    row = Evaluation(features_in(splits)).measure(codec_of("fsq").float(), "fsq").row
    assert row.codebook_size == 15
    assert row.bits_per_second == pytest.approx(50 * np.log2(15))


@pytest.mark.parametrize(
    "option", ["fsq", *(pytest.param(name, marks=pytest.mark.slow) for name in ("rotation", "simvq", "lfq"))]
)
def test_the_demo_recipe_trains_with_every_quantizer(option, tmp_path):
    from repcodec.evaluation import Evaluation
    from train import train

    lengths = [40, 70, 25, 60, 33, 52, 51, 48]
    for seed, split in enumerate(("train", "valid")):
        write_split(tmp_path / split, lengths, seed=seed)
    size = {"fsq": "quantizer.levels=[4,4]"}.get(option, "quantizer.codebook_size=16")
    overrides = ["experiment=demo", f"quantizer={option}", size, "data=shards", f"data.dir='{tmp_path}'",
                 "encoder.dim=8", "data.crop=16", "trainer.max_steps=20", "trainer.val_check_interval=10",
                 "logger=none", f"run_dir='{tmp_path / 'run'}'"]  # fmt: skip
    (tmp_path / "run").mkdir()
    best = train(configuration(*overrides))
    codec = RepCodec.from_pretrained(tmp_path / "run" / "codec")
    assert codec.quantizer.kind == option
    row = Evaluation(features_in(tmp_path), "valid").measure(codec, option).row
    assert row.normalized_error == pytest.approx(best, rel=1e-4)
    assert best < 1


@pytest.mark.slow
def test_rotation_is_exported_and_others_are_refused(tmp_path):
    from repcodec.export import check_onnx, export_onnx

    codec = codec_of("rotation, two codebooks").float()
    export_onnx(codec, tmp_path)
    check = check_onnx(codec, tmp_path, [np.random.default_rng(0).normal(size=(40, DIM)).astype(np.float32)])
    assert check.not_ties == 0
    assert check.relative_error < 1e-5
    for kind in ("simvq", "fsq", "lfq"):
        with refused(f'"{kind}" cannot be exported', '"ema" or "rotation"'):
            export_onnx(codec_of(kind), tmp_path / kind)
