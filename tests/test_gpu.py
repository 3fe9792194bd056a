"""What a CPU gives, a GPU gives; needs one."""

import json

import numpy as np
import pytest
import soundfile
import torch
from conftest import DIM
from test_comparison import evaluate_here, saved
from test_library_quantizers import codec_of, every_kind
from test_resume import OPTIONS, equal_runs, stop_here
from test_speech_encoders import family, folders, wave  # noqa: F401  (folders is a fixture)
from test_train import metrics, run, run_here

from repcodec.cli import main
from repcodec.codec import RepCodec
from repcodec.speech_encoders import load_speech_encoder
from repcodec.tokens import read_tokens

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
QUANTIZERS = ["ema", "ema_revived", "rvq", "rotation", "simvq", "lfq"]
SHORT = ["logger=csv", "~callbacks.dashboard", "trainer.max_steps=20", "trainer.val_check_interval=10"]


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """Products in full precision, as on the CPU."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def walk():
    return torch.randn(200, DIM, generator=torch.Generator().manual_seed(3)).double().cumsum(0) / 3


def losses(run_dir):
    return [float(row["train/loss"]) for row in metrics(run_dir) if row["train/loss"]]


@every_kind
@pytest.mark.parametrize("strides", [(1, 1), (2, 2)])
def test_codes_and_reconstructions_are_those_of_the_cpu(kind, strides):
    codec = codec_of(kind, strides)
    features = torch.stack([walk(), -walk()])
    lengths = torch.tensor([200, 67])
    codes = codec.encode(features, lengths)
    found = codec.cuda().encode(features.cuda(), lengths.cuda())
    assert found.is_cuda
    assert torch.equal(found.cpu(), codes)
    decoded = codec.decode(found[:1])
    torch.testing.assert_close(decoded.cpu(), codec.cpu().decode(codes[:1]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_training_logs_the_losses_of_the_cpu(splits, tmp_path, quantizer):
    options = [f"quantizer={quantizer}", *SHORT, "callbacks=kmeans_start", "+trainer.precision=64-true"]
    run_here(splits, tmp_path / "cpu", *options)
    run_here(splits, tmp_path / "gpu", *options, "trainer=gpu")
    expected = losses(tmp_path / "cpu")
    assert len(expected) == 20
    assert losses(tmp_path / "gpu") == pytest.approx(expected, rel=1e-6)
    one, other = (RepCodec.from_pretrained(tmp_path / name / "codec") for name in ("cpu", "gpu"))
    assert torch.equal(one.encode(walk().float()[None]), other.encode(walk().float()[None]))


@pytest.mark.parametrize(("precision", "tolerance"), [("32-true", 1e-4), ("bf16-mixed", 0.05), ("16-mixed", 0.05)])
def test_every_precision_trains(splits, tmp_path, precision, tolerance):
    options = [*SHORT, "callbacks=kmeans_start", f"+trainer.precision={precision}"]
    run_here(splits, tmp_path / "gpu", *options, "trainer=gpu", "+trainer.gradient_clip_val=1.0")
    run_here(splits, tmp_path / "cpu", *SHORT, "callbacks=kmeans_start", "+trainer.gradient_clip_val=1.0")
    found, expected = (losses(tmp_path / name) for name in ("gpu", "cpu"))
    assert found == pytest.approx(expected, rel=tolerance)
    state = torch.load(tmp_path / "gpu" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert {value.dtype for value in state.values()} == {torch.float32}


def test_compiled_stacks_give_the_same_losses(splits, tmp_path):
    for name, compiled in (("eager", "false"), ("compiled", "true")):
        run_here(splits, tmp_path / name, *SHORT, "callbacks=kmeans_start", "trainer=gpu", f"module.compile={compiled}")
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "eager"), rel=1e-4)


def test_a_seed_gives_the_same_run_and_a_stopped_one_goes_on_bit_for_bit(splits, tmp_path):
    options = [*OPTIONS, "trainer=gpu", "+trainer.deterministic=warn"]
    for name in ("one", "other"):
        run_here(splits, tmp_path / name, *options)
    equal_runs(tmp_path / "one", tmp_path / "other")
    stop_here(splits, tmp_path / "stopped", *options, at=12)
    run_here(splits, tmp_path / "stopped", *options, "ckpt_path=last")
    equal_runs(tmp_path / "one", tmp_path / "stopped")


def test_a_process_group_of_nccl_trains(splits, tmp_path):
    options = [*SHORT, "callbacks=kmeans_start", "+trainer.precision=64-true", "quantizer.revive_below=0.1"]
    nccl = ["trainer=ddp", "+trainer.strategy.process_group_backend=nccl"]
    done = run(splits, tmp_path / "ddp", *options, *nccl, "logger=csv")
    assert done.returncode == 0, done.stderr
    run_here(splits, tmp_path / "gpu", *options, "trainer=gpu")
    assert losses(tmp_path / "ddp") == pytest.approx(losses(tmp_path / "gpu"), rel=1e-9)


@pytest.mark.parametrize("name", ["hubert_base", "hubert_large", "data2vec_large", "whisper"])
def test_speech_encoders_give_the_features_of_the_cpu(folders, name):  # noqa: F811  (the fixture of that name)
    encoder = load_speech_encoder(family(name), 2, folders / name)
    waves = [wave(), wave(7_000, 1), wave(30_000, 2)]
    expected = encoder(waves)
    found = encoder.cuda()([one.cuda() for one in waves])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-3, atol=1e-4)


def test_commands_make_the_same_tokens_and_features(splits, tmp_path, codec):
    folder = tmp_path / "codec"
    codec.float().save_pretrained(folder, {"frame_rate": 50})
    for device in ("cpu", "cuda"):
        out = str(tmp_path / f"{device}.tokens")
        assert main(["tokenize", str(folder), str(splits / "test"), "-o", out, "--device", device]) == 0
        assert main(["decode", str(folder), out, str(tmp_path / device), "--device", device]) == 0
    one, other = (list(read_tokens(tmp_path / f"{device}.tokens")) for device in ("cpu", "cuda"))
    for a, b in zip(one, other, strict=True):
        assert (a.codes == b.codes).mean() > 0.98  # ties in single precision may fall otherwise


def test_sound_becomes_features_on_the_gpu(folders, tmp_path):  # noqa: F811  (the fixture of that name)
    (tmp_path / "audio").mkdir()
    for number in range(5):
        soundfile.write(tmp_path / "audio" / f"{number}.wav", wave(9_000 + 3_000 * number, number).numpy(), 16_000)
    assert main(["manifest", str(tmp_path / "audio"), "-o", str(tmp_path / "all.tsv")]) == 0
    rows = []
    for device in ("cpu", "cuda"):
        out = tmp_path / device
        words = ["extract", str(tmp_path / "all.tsv"), str(out), "--encoder", "small", "--layer", "2"]
        assert main([*words, "--model", str(folders / "whisper"), "--device", device]) == 0
        rows.append(np.load(next(out.rglob("*.npy"))))
    np.testing.assert_allclose(rows[1], rows[0], rtol=1e-3, atol=1e-4)


def test_evaluation_finds_the_same(splits, tmp_path):
    tokenizer = saved(tmp_path)
    found = []
    for device in ("cpu", "cuda"):
        overrides = [f"tokenizers=['{tokenizer}']", "kmeans=[5]", "corpus=true", f"device={device}"]
        found.append(evaluate_here(splits, tmp_path / device, *overrides))
    for one, other in zip(*found, strict=True):
        for field, value in one.items():
            if isinstance(value, float):
                assert other[field] == pytest.approx(value, rel=1e-3), field
    assert json.loads((tmp_path / "cuda" / "results.json").read_text())["rows"]
