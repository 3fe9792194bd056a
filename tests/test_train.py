"""train.py as a whole: in this process where that is enough, as a process of its own where it matters."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import lightning
import numpy as np
import pytest
import torch
from conftest import FAST_CODEC, refused, write_split
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from repcodec.checkpointing import of_this_run
from repcodec.codec import RepCodec
from repcodec.errors import RepCodecError, user_message
from repcodec.files import locked
from repcodec.logs import read_validations

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
FAST = [
    *FAST_CODEC, "data.batch_size=4", "data.crop=16", "trainer.max_steps=6", "trainer.val_check_interval=3",
    "trainer.log_every_n_steps=1",
]  # fmt: skip


def run_here(splits, run_dir, *overrides):
    """Run train.py's own function on the shipped configuration."""
    from train import train

    run_dir.mkdir(exist_ok=True)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("train", [*FAST, f"data.dir='{splits}'", f"run_dir='{run_dir}'", "run=test", *overrides])
    return train(config)


def command(splits, run_dir, *overrides):
    arguments = [*FAST, f"data.dir='{splits}'", f"hydra.run.dir='{run_dir}'", "logger=none", *overrides]
    return [sys.executable, str(ROOT / "train.py"), *arguments]


def run(splits, run_dir, *overrides):
    """Run train.py as a process with one thread."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command(splits, run_dir, *overrides), env=env, capture_output=True, text=True, timeout=240, check=False
    )


def metrics(run_dir):
    with open(run_dir / "logs" / "version_0" / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_run_folder_holds_config_checkpoints_logs_and_codec(splits, tmp_path):
    best = run_here(splits, tmp_path / "run", "logger=csv")
    folder = tmp_path / "run"
    assert OmegaConf.load(folder / "config.yaml").data.dim == 8
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt", "previous.ckpt"}
    config = json.loads((folder / "codec" / "config.json").read_text())
    assert (config["encoder"], config["layer"], config["frame_rate"]) == ("hubert_base", 9, 50)
    assert config["figures"]["normalized_error"] == pytest.approx(best)
    rows = metrics(folder)
    validations = [row for row in rows if row["valid/normalized_error"]]
    assert [int(row["step"]) for row in validations] == [0, 2, 5]
    assert min(float(row["valid/normalized_error"]) for row in validations[1:]) == pytest.approx(best)
    saved = RepCodec.from_pretrained(folder / "codec").state_dict()
    state = torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(value, state[f"codec.{name}"]) for name, value in saved.items())
    steps = [row for row in rows if row["train/loss"]]
    assert len(steps) == 6
    for row in steps:
        expected = 45 * float(row["train/reconstruction"]) + float(row["train/commitment"])
        assert float(row["train/loss"]) == pytest.approx(expected, rel=1e-4)
        assert float(row["train/learning_rate"]) == pytest.approx(1e-4)


@pytest.mark.slow  # test_callbacks.py has it in one process
def test_steps_after_the_last_interval_are_validated_and_saved(splits, tmp_path):
    run_here(splits, tmp_path / "run", "logger=csv", "trainer.max_steps=2")
    assert torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 2
    assert json.loads((tmp_path / "run" / "codec" / "config.json").read_text())["step"] == 2
    resumed = f"ckpt_path='{tmp_path}/run/checkpoints/last.ckpt'"
    run_here(splits, tmp_path / "run", "logger=none", "trainer.max_steps=7", resumed)
    run_here(splits, tmp_path / "whole", "logger=none", "trainer.max_steps=7")
    equal_checkpoints(*(tmp_path / name / "checkpoints" / "last.ckpt" for name in ("run", "whole")))


def test_logged_error_and_usage_are_those_of_the_saved_codec(splits, tmp_path):
    from repcodec.shards import FeatureShards

    best = run_here(splits, tmp_path / "run", "logger=csv")
    codec = RepCodec.from_pretrained(tmp_path / "run" / "codec")
    train, valid = FeatureShards(splits / "train"), FeatureShards(splits / "valid")
    mean = train.sample(10**6).astype(np.float64).mean(0)
    error = variation = 0
    for i in range(len(valid)):
        x = np.array(valid.features(i))
        with torch.no_grad():
            y = codec(torch.from_numpy(x)[None]).reconstruction[0].numpy()
        error, variation = error + ((x - y) ** 2).sum(), variation + ((x - mean) ** 2).sum()
    assert best == pytest.approx(error / variation, rel=1e-5)


def test_kmeans_start_begins_exactly_where_kmeans_ends(splits, tmp_path, monkeypatch):
    from repcodec.data import ShardsDataModule
    from repcodec.evaluation import Evaluation, fit_kmeans

    monkeypatch.setitem(sys.modules, "faiss", None)  # both by scikit-learn
    run_here(splits, tmp_path / "run", "logger=csv", "callbacks=kmeans_start", "trainer.max_steps=3")
    rows = [row for row in metrics(tmp_path / "run") if row["valid/normalized_error"]]
    data = ShardsDataModule(dim=8, encoder="hubert_base", layer=9, dir=str(splits))
    kmeans = Evaluation(data, "valid").measure(fit_kmeans(data, 16, tmp_path / "kmeans"), "k-means").row
    assert rows[0]["step"] == "0"
    assert float(rows[0]["valid/normalized_error"]) == pytest.approx(kmeans.valid_normalized_error, rel=1e-5)


def test_published_recipe_follows_its_formulas_step_by_step(splits, tmp_path):
    """Two steps of `experiment=published_*` against a plain loop: Adam, 45 and 1, EMA 0.8 by facts.md's formulas."""
    options = ["experiment=published_hubert_base_l9", "trainer.max_steps=2", "trainer.val_check_interval=2"]
    run_here(splits, tmp_path / "run", "logger=none", "+trainer.precision=64-true", *options)
    state = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    from repcodec.data import ShardsDataModule

    lightning.seed_everything(0, workers=True, verbose=False)
    codec = RepCodec(8, codebook_size=16).double()
    adam = torch.optim.Adam(codec.parameters(), lr=1e-4, betas=(0.5, 0.9))
    book = codec.quantizer.codebooks[0]
    data = ShardsDataModule(dim=8, encoder="hubert_base", layer=9, dir=str(splits), batch_size=4, crop=16)
    for batch, _ in zip(data.train_dataloader(), range(2), strict=False):
        mask = torch.arange(16) < batch.lengths[:, None]
        x = batch.features.double()
        z, _ = codec.encoder(x, mask)
        frames = z[mask]
        codes = (frames[:, None] - book.codes).square().sum(-1).argmin(1)
        quantized = torch.zeros_like(z)
        quantized[mask] = frames + (book.codes[codes] - frames).detach()
        y = codec.decoder(quantized, mask)
        loss = 45 * (y - x)[mask].square().mean() + (book.codes[codes] - frames).square().mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        one_hot = torch.nn.functional.one_hot(codes, 16).double()
        book.counts.mul_(0.8).add_(0.2 * one_hot.sum(0))
        book.sums.mul_(0.8).add_(0.2 * one_hot.T @ frames.detach())
        total = book.counts.sum()
        book.codes.copy_(book.sums / ((book.counts + 1e-5) / (total + 16 * 1e-5) * total)[:, None])
    for name, value in codec.state_dict().items():
        torch.testing.assert_close(state[f"codec.{name}"], value, rtol=1e-6, atol=1e-8)


def test_published_start_uses_one_codebook_update_a_step(splits, tmp_path):
    run_here(splits, tmp_path / "run", "logger=none", "+trainer.accumulate_grad_batches=2", "trainer.max_steps=1",
             "trainer.val_check_interval=2")  # fmt: skip
    state = torch.load(tmp_path / "run" / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    # Two batches of up to 64 frames, one update: N = 0.8 * 0 + 0.2 * all their frames.
    assert 0.2 * 64 < state["codec.quantizer.codebooks.0.counts"].sum() <= 0.2 * 128


@pytest.mark.parametrize("logger", ["none", "csv", "tensorboard", "wandb"])
def test_every_logger_runs(splits, tmp_path, logger, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    run_here(splits, tmp_path / "run", f"logger={logger}")
    folder = tmp_path / "run"
    assert (folder / "logs").exists() == (logger != "none")
    assert bool(list(folder.glob("tensorboard/**/events*"))) == (logger == "tensorboard")
    assert bool(list(folder.glob("wandb/offline-run-*/*.wandb"))) == (logger == "wandb")


def test_wandb_run_holds_losses_usage_histogram_and_learning_rate(splits, tmp_path, monkeypatch):
    import wandb

    monkeypatch.setenv("WANDB_SILENT", "true")
    logged = {}
    original = wandb.sdk.wandb_run.Run.log
    monkeypatch.setattr(
        wandb.sdk.wandb_run.Run, "log", lambda self, data, *a, **k: (logged.update(data), original(self, data, *a, **k))
    )
    run_here(splits, tmp_path / "run", "logger=wandb")
    wanted = {"train/loss", "train/reconstruction", "train/commitment", "train/learning_rate", "valid/perplexity"}
    wanted |= {"valid/used_share", "valid/normalized_error", "train/perplexity", "train/used_share"}
    assert wanted <= logged.keys()
    histogram = logged["valid/log10_code_counts_0"]
    assert isinstance(histogram, wandb.Histogram)
    assert sum(histogram.histogram) == 16  # every code once


def test_mixed_precision_keeps_codebook_and_losses_in_float32(splits, tmp_path):
    run_here(splits, tmp_path / "run", "logger=csv", "+trainer.precision=bf16-mixed", "callbacks=kmeans_start")
    state = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert {value.dtype for value in state.values()} == {torch.float32}
    mixed = [float(row["train/loss"]) for row in metrics(tmp_path / "run") if row["train/loss"]]
    run_here(splits, tmp_path / "full", "logger=csv", "callbacks=kmeans_start")
    full = [float(row["train/loss"]) for row in metrics(tmp_path / "full") if row["train/loss"]]
    assert mixed == pytest.approx(full, rel=0.05)
    assert mixed != full


def equal_checkpoints(one, other):
    one, other = (torch.load(path, weights_only=True) for path in (one, other))
    assert one["global_step"] == other["global_step"]
    for name, value in one["state_dict"].items():
        assert torch.equal(value, other["state_dict"][name]), name
    for index, state in one["optimizer_states"][0]["state"].items():
        for name, value in state.items():
            assert torch.equal(value, other["optimizer_states"][0]["state"][index][name]), (index, name)
    assert one["lr_schedulers"] == other["lr_schedulers"]
    return one


@pytest.mark.slow  # test_ddp.py does as much in processes that only train
def test_two_processes_equal_one_with_both_halves_of_the_batch(splits, tmp_path):
    shutil.rmtree(splits / "valid")
    write_split(splits / "valid", [20], seed=2)  # the second process has no validation utterance
    options = ["+trainer.precision=64-true", "trainer.max_steps=5", "quantizer.revive_below=0.05",
               "callbacks=kmeans_start"]  # fmt: skip
    ranks = ["trainer=ddp_cpu", "trainer.strategy.timeout.seconds=60", "data.batch_size=3"]
    two = run(splits, tmp_path / "two", *options, *ranks)
    assert two.returncode == 0, two.stderr
    one = run(splits, tmp_path / "one", *options, "trainer=cpu", "data.batch_size=6")
    assert one.returncode == 0, one.stderr
    states = [
        torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for name in ("one", "two")
    ]
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-8, atol=1e-8)


def one_sentence(result, *further):
    """Check that a run ended as a user's mistake does; return what it said."""
    assert result.returncode == 1, result.stderr
    assert "Traceback" not in result.stderr
    assert result.stderr.count("error: ") == 1
    said = result.stderr.partition("error: ")[2]
    assert all(word in said for word in further)
    return said


@pytest.mark.slow
def test_missing_checkpoint_and_diverged_run_are_one_sentence(splits, tmp_path):
    assert "no such checkpoint" in one_sentence(run(splits, tmp_path / "run", "ckpt_path=nowhere.ckpt"))
    assert "the run has diverged" in one_sentence(run(splits, tmp_path / "run", "optimizer.lr=1e30"))


def test_missing_features_name_the_command(tmp_path):
    with refused("repcodec extract train.tsv ROOT --encoder hubert_base --layer 9"):
        run_here(tmp_path / "nowhere", tmp_path / "run")
    assert not (tmp_path / "run" / "codec").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+trainer.no_such_option=1", "there is no such option"),
        ("quantizer.codebook_size=many", "quantizer: a value there is of another kind"),
        ("optimizer.lr=fast", "optimizer.lr=fast: expected a number"),
        ("optimizer.lr=-1", "optimizer or scheduler: an option does not fit"),
        ("data.batch_size=100000", "each would come 12,500 times in a batch"),
        ("data.crop=1.5", "data.crop=1.5: expected a whole number"),
        ("seed=a", "seed=a: expected a whole number"),
        ("seed=5000000000", "seed=5000000000: expected a whole number"),
        ("data.num_workers=many", "data.num_workers=many: expected a whole number"),
        ("callbacks.checkpoints=null", "callbacks.checkpoints"),
        ("layer=many", "layer=many: hubert_base has layers 1 to 12"),
        ("~callbacks.save_codec", "callbacks.save_codec"),
        ("~callbacks.checkpoints", "callbacks.checkpoints"),
    ],
)
def test_an_option_of_another_kind_is_one_sentence(splits, tmp_path, override, message):
    with pytest.raises(Exception) as caught:
        run_here(splits, tmp_path / "run", "logger=none", override)
    sentence = user_message(caught.value)
    assert sentence is not None and message in sentence
    assert not (tmp_path / "run" / "codec").exists()


def test_a_run_from_another_runs_checkpoint_saves_its_own_best(splits, tmp_path):
    run_here(splits, tmp_path / "one", "logger=none", "trainer.max_steps=3")
    start, worse = tmp_path / "one" / "checkpoints" / "last.ckpt", ["optimizer.lr=1", "trainer.max_steps=6"]
    best = run_here(splits, tmp_path / "two", "logger=none", f"ckpt_path='{start}'", *worse)
    config = json.loads((tmp_path / "two" / "codec" / "config.json").read_text())
    first = json.loads((tmp_path / "one" / "codec" / "config.json").read_text())
    assert config["figures"]["normalized_error"] == pytest.approx(best)
    assert best > first["figures"]["normalized_error"], "worse than what the other run had found"
    assert (tmp_path / "two" / "checkpoints" / "best.ckpt").exists()
    # Again, where this run has been before: what it left is set aside, and its curve begins anew.
    run_here(splits, tmp_path / "two", "logger=none", f"ckpt_path='{start}'", *worse)
    assert (tmp_path / "two" / "checkpoints.old" / "best.ckpt").exists()
    assert json.loads((tmp_path / "two" / "codec.old" / "config.json").read_text()) == config
    assert [row["step"] for row in read_validations(tmp_path / "two" / "validations.csv")] == [6]
    with refused(start, "has 3 steps already"):
        run_here(splits, tmp_path / "three", "logger=none", f"ckpt_path='{start}'", "trainer.max_steps=3")
    assert of_this_run("/last.ckpt", tmp_path / "codec") is False


def test_nan_features_in_a_worker_end_the_run_in_one_sentence(splits, tmp_path):
    rows = np.load(splits / "train" / "0_2.npy", mmap_mode="r+")
    rows[:] = np.inf
    rows.flush()
    with refused("holds NaN or infinity"):
        run_here(splits, tmp_path / "run", "data.num_workers=1")


def test_a_second_training_in_the_same_folder_is_refused(splits, tmp_path):
    run = tmp_path / "run"
    with locked(run / "checkpoints"), refused(run, f"process {os.getpid()} is making it"):
        run_here(splits, run)
    assert not list(run.iterdir())


@pytest.mark.slow  # test_errors.py has the sentences
def test_unknown_encoder_lists_the_known_ones(tmp_path):
    assert "hubert_huge" in one_sentence(run(tmp_path, tmp_path / "run", "encoder=hubert_huge"), "hubert_large")


@pytest.mark.slow  # test_errors.py has the sentences
def test_misspelt_override_is_named(tmp_path):
    assert "batch_sice" in one_sentence(run(tmp_path, tmp_path / "run", "data.batch_sice=3"))


@pytest.mark.slow
def test_option_that_does_not_fit_is_one_sentence(splits, tmp_path):
    assert "same product" in one_sentence(run(splits, tmp_path / "run", "codec.enc_strides=[1,2]"))


@pytest.mark.slow  # test_disk.py has the sentences
def test_unwritable_output_folder_is_one_sentence(splits, tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert str(tmp_path / "file" / "run") in one_sentence(run(splits, tmp_path / "file" / "run"))


@pytest.mark.slow
def test_full_disk_is_one_sentence(splits, tiny_disk):
    sentence = one_sentence(run(splits, tiny_disk / "run", "encoder.dim=8", "quantizer.codebook_size=4096"))
    assert "No space left" in sentence
    assert not list(tiny_disk.rglob("config.json")), "no codec that looks finished"


@pytest.mark.parametrize("layer", [0, 13])
def test_layer_outside_the_encoder_names_the_valid_range(splits, tmp_path, layer):
    with pytest.raises(RepCodecError, match=f"layer={layer}: hubert_base has layers 1 to 12"):
        run_here(splits, tmp_path / "run", f"layer={layer}")
