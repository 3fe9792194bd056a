"""Real fits of a few steps; what the dashboards got is read back from their own files."""

import csv
import json
import os
import random
import struct
import subprocess
import sys
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image

from repcodec import dashboards
from repcodec.callbacks import SaveCodec, ValidateEnds
from repcodec.codec import RepCodec
from repcodec.dashboards import Dashboard, Rates, WandbRun, first_codebook, git_commit
from repcodec.data import ShardsDataModule
from repcodec.logs import read_validations
from repcodec.module import CodecModule
from repcodec.quantizers import EMACodebook, EMAQuantizer


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


@pytest.fixture
def undrawn(monkeypatch):
    """Pictures are made, but not drawn, which takes most of the time of a run this small."""
    monkeypatch.setattr(dashboards, "png", lambda figure: b"")


def fit(splits, folder, *callbacks, steps=4, loggers=(), dashboard=True, quantizer=None, ckpt_path=None, save=None):
    """Fit as train.py does, with dashboards in `folder`; return the trainer and the module."""
    L.seed_everything(0, verbose=False)
    quantizer = quantizer or EMAQuantizer(8, 16, revive_below=0.1)
    module = CodecModule(
        RepCodec(8, quantizer=quantizer),
        lambda p: torch.optim.Adam(p, 1e-4),
        lambda o: torch.optim.lr_scheduler.ConstantLR(o, 1.0),
    )
    data = ShardsDataModule(dim=8, encoder="hubert_base", layer=9, dir=str(splits), batch_size=4, crop=16)
    shown = [Rates(), Dashboard(str(folder), str(folder / "codec"))] if dashboard else []
    trainer = L.Trainer(
        accelerator="cpu", max_steps=steps, max_epochs=-1, val_check_interval=2, check_val_every_n_epoch=None,
        num_sanity_val_steps=0, logger=list(loggers), enable_checkpointing=False, enable_progress_bar=False,
        log_every_n_steps=1, callbacks=[ValidateEnds(), *callbacks, *shown],
    )  # fmt: skip
    trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True)
    if save:
        trainer.save_checkpoint(save)
    return trainer, module


def wandb_records(path):
    """Read a .wandb file, in LevelDB's log format: blocks of 32 KiB, pieces with a head of 7 bytes each."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, parts = path.read_bytes(), 7, b""
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + 7])
        parts += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last piece of one
            record = Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def distinct_colors(path):
    return len(Image.open(path).convert("RGB").getcolors(2**24))


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """A run with W&B offline and TensorBoard: its folder and what was printed."""
    from conftest import write_split

    folder = tmp_path_factory.mktemp("shown")
    for name, lengths in (("train", [40, 7, 25, 60, 33, 12]), ("valid", [20, 31, 5])):
        write_split(folder / "splits" / name, lengths, seed=len(lengths))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        logger = WandbRun(project="repcodec", name="shown", save_dir=str(folder))
        saver = SaveCodec(str(folder / "codec"), "hubert_base", 9, 50)
        fit(folder / "splits", folder, saver, loggers=[logger, TensorBoardLogger(folder, "tensorboard")])
        logger.experiment.finish()
    return folder


PICTURES = [f"{name}-{step:08d}.png" for name in ("code_usage", "codebook") for step in (0, 2, 4)]


def test_every_validation_leaves_pictures_that_are_not_blank(shown):
    pictures = sorted(path.name for path in (shown / "figures").iterdir())
    assert pictures == sorted([*PICTURES, "curves.png"])
    assert all(distinct_colors(shown / "figures" / name) > 50 for name in pictures)


def test_wandb_run_holds_pictures_figures_summary_config_and_codec(shown):
    (folder,) = shown.glob("wandb/offline-run-*")
    records = list(wandb_records(next(folder.glob("*.wandb"))))
    history, summary, config = {}, {}, {}
    for record in records:
        for found, items in (
            (history, record.history.item), (summary, record.summary.update), (config, record.config.update)
        ):  # fmt: skip
            found |= {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
    names = {"train/loss", "train/reconstruction", "train/commitment", "train/gradient_norm", "train/learning_rate",
             "train/frames_per_second", "train/data_wait_share", "train/revived_codes", "valid/normalized_error",
             "valid/perplexity", "valid/used_share"}  # fmt: skip
    assert names <= history.keys()
    for name in ("valid/code_usage", "valid/codebook"):
        assert distinct_colors(folder / "files" / history[f"{name}/path"]) > 50
    assert sum(history["valid/log10_code_counts_0/values"]) == 16  # every code once
    images = list((folder / "files").rglob("*.png"))
    assert len(images) == len(PICTURES)
    best = min(
        (row for row in read_validations(shown / "validations.csv") if row["step"]),
        key=lambda r: r["valid/normalized_error"],
    )
    assert summary["best/step"] == best["step"]
    assert summary["best/normalized_error"] == best["valid/normalized_error"]
    assert summary["hours"] > 0
    assert config["git_commit"] == git_commit()
    assert (shown / "commit.txt").read_text().strip() == (git_commit() or "not from a git checkout")
    (artifact,) = [record.artifact for record in records if record.WhichOneof("record_type") == "artifact"]
    assert artifact.type == "model"
    saved = {entry.path: Path(entry.local_path) for entry in artifact.manifest.contents}
    assert saved == {path.name: path for path in (shown / "codec").iterdir()}


def test_tensorboard_holds_pictures_and_histograms(shown):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = shown.glob("tensorboard/version_0/events*")
    events = EventAccumulator(str(file), {"images": 0, "histograms": 0}).Reload()
    assert set(events.Tags()["images"]) == {"valid/code_usage", "valid/codebook"}
    images = events.Images("valid/codebook")
    assert [image.step for image in images] == [0, 2, 4]
    import io

    assert distinct_colors(io.BytesIO(images[-1].encoded_image_string)) > 50
    assert [event.step for event in events.Histograms("valid/log10_code_counts_0")] == [0, 2, 4]


def test_summary_is_printed(splits, tmp_path, capsys, undrawn):
    fit(splits, tmp_path, steps=2)
    said = capsys.readouterr().out
    best = read_validations(tmp_path / "validations.csv")[-1]
    assert "After 2 steps" in said
    assert f"{best['valid/normalized_error']:.4f}" in said
    assert f"{best['valid/used_share']:.1%}" in said


def test_dashboards_change_no_training_and_no_random_state(splits, tmp_path):
    ends = []
    for dashboard in (True, False):
        trainer, module = fit(splits, tmp_path, dashboard=dashboard)
        states = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
        ends.append((module.state_dict(), trainer.optimizers[0].state_dict()["state"], states))
    (one, one_adam, one_random), (other, other_adam, other_random) = ends
    assert all(torch.equal(one[name], other[name]) for name in other)
    for index, state in other_adam.items():
        assert all(torch.equal(state[name], one_adam[index][name]) for name in state)
    assert one_random == other_random


def test_table_goes_on_after_a_resume(splits, tmp_path, undrawn):
    fit(splits, tmp_path / "stopped", steps=3, save=tmp_path / "stopped" / "checkpoints" / "at3.ckpt")
    with open(tmp_path / "stopped" / "validations.csv", newline="") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["0", "2", "3"]
    hours = read_validations(tmp_path / "stopped" / "validations.csv")[-1]["hours"]
    fit(splits, tmp_path / "stopped", steps=6, ckpt_path=tmp_path / "stopped" / "checkpoints" / "at3.ckpt")
    fit(splits, tmp_path / "whole", steps=6)
    resumed, whole = (read_validations(tmp_path / name / "validations.csv") for name in ("stopped", "whole"))
    assert [row["step"] for row in resumed] == [0, 2, 3, 4, 6]
    assert resumed[3]["hours"] > hours
    kept = {row["step"]: row for row in resumed}
    for row in whole:
        assert row.keys() == kept[row["step"]].keys()
        for name in row.keys() - {"hours", "train/frames_per_second", "train/data_wait_share"}:
            if row["step"] != 4 or not name.startswith("train/"):  # the stopped run's figures of 3 and 4 stand apart
                assert row[name] == kept[row["step"]][name], name


def test_table_has_the_mean_of_the_losses_since_the_last_validation(splits, tmp_path, undrawn):
    fit(splits, tmp_path, loggers=[CSVLogger(tmp_path, "logs")])
    with open(tmp_path / "logs" / "version_0" / "metrics.csv", newline="") as file:
        losses = [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]
    rows = read_validations(tmp_path / "validations.csv")
    assert "train/loss" not in rows[0]
    means = [sum(losses[i : i + 2]) / 2 for i in (0, 2)]
    assert [row["train/loss"] for row in rows[1:]] == pytest.approx(means)


def test_a_new_run_in_the_same_folder_begins_a_new_table(splits, tmp_path, undrawn):
    fit(splits, tmp_path, steps=4)
    fit(splits, tmp_path, steps=2)
    assert [row["step"] for row in read_validations(tmp_path / "validations.csv")] == [0, 2]


def test_sample_is_what_the_quantizer_sees_evenly_spaced(splits, tmp_path, monkeypatch, undrawn):
    drawn = []
    monkeypatch.setattr(dashboards, "SAMPLE", 20)
    monkeypatch.setattr(dashboards, "codebook_figure", lambda *arguments: drawn.append(arguments))
    _, module = fit(splits, tmp_path, steps=2)
    sample, codes, counts, step = drawn[-1]
    data = ShardsDataModule(dim=8, encoder="hubert_base", layer=9, dir=str(splits))
    (batch,) = data.val_dataloader()
    with torch.no_grad():
        vectors = module.codec.eval().vectors(batch.features, batch.lengths)
    assert len(vectors) == 56
    np.testing.assert_array_equal(sample, vectors[::3].numpy())
    np.testing.assert_array_equal(codes, module.codec.quantizer.codebooks[0].codes.numpy())
    assert counts.sum() == 56
    assert step == 2


def test_residual_quantizer_shows_its_first_codebook_and_every_usage(splits, tmp_path):
    quantizer = EMAQuantizer(8, 16, num_codebooks=3)
    fit(splits, tmp_path, steps=2, quantizer=quantizer)
    assert first_codebook(quantizer) is quantizer.codebooks[0].codes
    assert distinct_colors(tmp_path / "figures" / "codebook-00000002.png") > 50


def test_quantizer_without_a_codebook_shows_what_its_codes_stand_for(monkeypatch):
    pytest.importorskip("vector_quantize_pytorch", reason="pip install 'repcodec[quantizers]'")
    from repcodec.library_quantizers import FSQQuantizer

    quantizer = FSQQuantizer(8, levels=[4, 3])
    codes = first_codebook(quantizer)
    assert codes.shape == (12, 8)
    assert len(codes.unique(dim=0)) == 12
    assert torch.equal(quantizer.decode(torch.tensor([[[5]]]))[0, 0], codes[5])
    monkeypatch.setattr(dashboards, "MOST_CODES", 11)
    assert first_codebook(quantizer) is None


def test_run_without_a_picture_of_the_codebook_goes_on(splits, tmp_path, monkeypatch, undrawn):
    monkeypatch.setattr(dashboards, "first_codebook", lambda quantizer: None)
    fit(splits, tmp_path, steps=2)
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {
        "code_usage-00000000.png", "code_usage-00000002.png", "curves.png"
    }  # fmt: skip


def test_speed_is_frames_by_time_of_steps_and_waits(splits, tmp_path, monkeypatch, undrawn):
    clock = iter(range(10**6))
    for module in ("loaders", "dashboards"):  # every look at the clock takes a second
        monkeypatch.setattr(f"repcodec.{module}.perf_counter", lambda: next(clock))
    seen = []

    class Frames(L.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            seen.append(int(batch.lengths.sum()))

    monkeypatch.setattr(Dashboard, "on_train_batch_end", lambda *a: None)
    fit(splits, tmp_path, Frames(), steps=3, loggers=[CSVLogger(tmp_path, "logs")])
    with open(tmp_path / "logs" / "version_0" / "metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["train/frames_per_second"]]
    assert len(rows) == len(seen) == 3
    for row, frames in zip(rows, seen, strict=True):  # one second waited, one second of the step
        assert float(row["train/frames_per_second"]) == frames / 2
        assert float(row["train/data_wait_share"]) == 0.5


def test_revived_codes_are_counted_between_validations(splits, tmp_path, monkeypatch, undrawn):
    original, unused = EMACodebook._revive, []

    def counted(self, z, codes, old):
        unused.append(min(len(z), int((self.counts < self.revive_below).sum())))
        original(self, z, codes, old)

    monkeypatch.setattr(EMACodebook, "_revive", counted)
    fit(splits, tmp_path, steps=4, quantizer=EMAQuantizer(8, 16, num_codebooks=2, revive_below=0.1))
    rows = read_validations(tmp_path / "validations.csv")
    assert len(unused) == 8
    assert "train/revived_codes" not in rows[0]
    assert [row["train/revived_codes"] for row in rows[1:]] == [sum(unused[:4]), sum(unused[4:])]
    assert sum(unused[:4]) > 0


def test_commit_says_whether_files_were_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(dashboards, "__file__", str(tmp_path / "repcodec" / "dashboards.py"))
    assert git_commit() is None  # no checkout
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path)]
    (tmp_path / "file").write_text("one")
    for words in (["init", "-q"], ["add", "file"], ["commit", "-qm", "first"], ["tag", "v1"]):
        subprocess.run([*git, *words], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert git_commit() == commit
    (tmp_path / "file").write_text("two")
    assert git_commit() == f"{commit}-dirty"
    monkeypatch.setenv("PATH", "")
    assert git_commit() is None


@pytest.mark.parametrize(
    ("environment", "netrc", "mode"),
    [
        ({}, "", "offline"),
        ({}, "machine api.wandb.ai login user password 0", "online"),
        ({}, "machine elsewhere.org login user password 0", "offline"),
        ({"WANDB_API_KEY": "0" * 40}, "", "online"),
        ({"WANDB_API_KEY": "0" * 40, "WANDB_MODE": "offline"}, "", "offline"),
        ({"WANDB_API_KEY": "0" * 40, "WANDB_MODE": "disabled"}, "", "disabled"),
        ({"WANDB_MODE": "online"}, "", "online"),
    ],
)
def test_wandb_is_online_where_somebody_is_logged_in(tmp_path, monkeypatch, environment, netrc, mode):
    import wandb

    wandb.teardown()  # it reads the environment once
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    (tmp_path / "netrc").write_text(netrc)
    for name, value in {"NETRC": str(tmp_path / "netrc"), "WANDB_CONFIG_DIR": str(tmp_path), **environment}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    try:
        assert WandbRun(project="repcodec")._mode() == mode
        assert WandbRun(project="repcodec", offline=True)._mode() == "offline"
        assert WandbRun(project="repcodec", offline=False)._mode() == "online"
    finally:
        wandb.teardown()


@pytest.mark.slow
@pytest.mark.parametrize(
    "environment",
    [{"WANDB_API_KEY": "too short"}, {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"}],
)
def test_run_that_cannot_go_online_is_kept_offline(tmp_path, environment):
    code = (
        "import sys\n"
        "from repcodec.dashboards import WandbRun\n"
        "run = WandbRun(project='repcodec', save_dir=sys.argv[1]).experiment\n"
        "run.log({'a': 1})\n"
        "run.finish()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], env=os.environ | {"WANDB_MODE": "online", **environment},
        capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    assert "W&B cannot be used online" in done.stderr
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert any(record.history.item for record in wandb_records(file))


def test_disabled_wandb_leaves_the_pictures(splits, tmp_path, monkeypatch):
    import wandb

    monkeypatch.setenv("WANDB_MODE", "disabled")
    wandb.teardown()  # it reads the environment once
    try:
        logger = WandbRun(project="repcodec", save_dir=str(tmp_path))
        fit(splits, tmp_path, steps=2, loggers=[logger])
        logger.experiment.finish()
    finally:
        wandb.teardown()  # and would stay as it is
    assert not (tmp_path / "wandb").exists()
    assert (tmp_path / "figures" / "codebook-00000002.png").is_file()
