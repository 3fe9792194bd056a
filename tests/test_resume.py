"""A run that is stopped, however, and resumed equals one that was never stopped, bit for bit; real runs of train.py."""

import csv
import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import lightning as L
import pytest
import torch
from conftest import refused, write_split
from test_train import command, equal_checkpoints, run, run_here

from repcodec.checkpointing import find_checkpoint
from repcodec.errors import RepCodecError, user_message

OPTIONS = [
    "trainer.max_steps=23", "trainer.val_check_interval=5", "trainer.log_every_n_steps=3", "callbacks=kmeans_start",
    "scheduler=cosine", "quantizer.revive_below=0.1", "data.batch_size=5", "logger=csv", "~callbacks.dashboard",
]  # fmt: skip
CLOCK = {"train/frames_per_second", "train/data_wait_share"}


class Send(L.Callback):
    """Sends a signal to this process as a batch begins; at -1, before training does."""

    def __init__(self, at: int, number: int):
        self.at, self.number = at, number

    def on_train_start(self, trainer, module):
        if self.at == -1:
            os.kill(os.getpid(), self.number)

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.fit_loop.total_batch_idx == self.at:
            os.kill(os.getpid(), self.number)


def stop_here(splits, run_dir, *options, at, number=signal.SIGTERM):
    """Run train.py's function until the signal that comes in batch `at`, counted from 0."""
    send = ["+callbacks.send._target_=test_resume.Send", f"+callbacks.send.at={at}", f"+callbacks.send.number={number}"]
    with pytest.raises(SystemExit) as ended:
        run_here(splits, run_dir, *options, *send)
    assert ended.value.code == 143


def read(path):
    return torch.load(path, weights_only=True)


def rows(path):
    with open(path, newline="") as file:
        return [{name: text for name, text in row.items() if name not in CLOCK} for row in csv.DictReader(file)]


def equal_runs(one, other):
    """Check that two runs left the same weights, optimizer, schedule, codebook, random state, codec and record."""
    for name in ("last", "best"):
        paths = [folder / "checkpoints" / f"{name}.ckpt" for folder in (one, other)]
        equal_checkpoints(*paths)
        a, b = (read(path) for path in paths)
        assert a["loops"]["fit_loop"]["state_dict"] == b["loops"]["fit_loop"]["state_dict"]  # where the data stands
        a, b = a["run"], b["run"]
        assert a["best"] == b["best"]
        assert torch.equal(a["train_usage"], b["train_usage"])
        for x, y in zip(a["random_states"], b["random_states"], strict=True):
            assert torch.equal(x["torch"], y["torch"])
            assert (x["python"], x["numpy"]) == (y["python"], y["numpy"])
    tables = [rows(folder / "logs" / "version_0" / "metrics.csv") for folder in (one, other)]
    assert len(tables[0]) > 5
    assert tables[0] == tables[1]
    assert [path.name for path in (other / "logs").iterdir()] == ["version_0"]
    codecs = [json.loads((folder / "codec" / "config.json").read_text()) for folder in (one, other)]
    assert codecs[0] == codecs[1]


@pytest.fixture(autouse=True)
def one_thread(caplog):
    caplog.set_level("INFO", "repcodec")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    folder = tmp_path_factory.mktemp("features")
    write_split(folder / "train", [40, 7, 25, 60, 33, 12, 51, 18], seed=1, num_shards=2)
    write_split(folder / "valid", [20, 31, 5], seed=2)
    return folder


@pytest.fixture(scope="module")
def whole(features, tmp_path_factory):
    """A run that was never stopped."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("whole") / "run"
    run_here(features, folder, *OPTIONS)
    return folder


@pytest.fixture(scope="module")
def stopped(features, tmp_path_factory):
    """The same run, stopped by SIGTERM after step 13: last.ckpt is of that step, previous.ckpt of step 10."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("stopped") / "run"
    stop_here(features, folder, *OPTIONS, at=12)
    return folder


@pytest.fixture
def copy(stopped, tmp_path):
    return Path(shutil.copytree(stopped, tmp_path / "run"))


# Signals


def test_a_run_stopped_by_sigterm_between_validations_goes_on_bit_for_bit(features, whole, copy):
    steps = [read(copy / "checkpoints" / f"{name}.ckpt")["global_step"] for name in ("previous", "last")]
    assert steps == [10, 13]
    run_here(features, copy, *OPTIONS, "ckpt_path=last")
    equal_runs(whole, copy)


def test_a_run_stopped_where_a_validation_is_due_validates_first(features, whole, tmp_path):
    stop_here(features, tmp_path / "run", *OPTIONS, at=9)
    assert read(tmp_path / "run" / "checkpoints" / "last.ckpt")["run"]["best"][0][1] in (5, 10)
    run_here(features, tmp_path / "run", *OPTIONS, "ckpt_path=last")
    equal_runs(whole, tmp_path / "run")


def test_a_run_stopped_before_its_first_step_saves_that_one(features, whole, tmp_path):
    stop_here(features, tmp_path / "run", *OPTIONS, at=-1)
    assert read(tmp_path / "run" / "checkpoints" / "last.ckpt")["global_step"] == 1
    run_here(features, tmp_path / "run", *OPTIONS, "ckpt_path=last")
    equal_runs(whole, tmp_path / "run")


def test_a_run_stopped_amid_accumulated_batches_ends_the_step_first(features, tmp_path):
    options = [*OPTIONS, "++trainer.accumulate_grad_batches=3", "trainer.max_steps=8", "trainer.val_check_interval=3"]
    run_here(features, tmp_path / "whole", *options)
    stop_here(features, tmp_path / "run", *options, at=12)  # the first batch of the fifth step
    last = read(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert last["global_step"] == 5
    assert last["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["ready"] == 15
    run_here(features, tmp_path / "run", *options, "ckpt_path=last")
    equal_runs(tmp_path / "whole", tmp_path / "run")
    with open(tmp_path / "run" / "logs" / "version_0" / "metrics.csv", newline="") as file:
        validated = [int(row["step"]) for row in csv.DictReader(file) if row["valid/normalized_error"]]
    assert validated == [0, 2, 5, 7], "val_check_interval counts steps of the optimizer, not batches"


def test_workers_that_read_ahead_lose_no_batch(features, whole, tmp_path):
    stop_here(features, tmp_path / "run", *OPTIONS, "data.num_workers=2", at=12)
    run_here(features, tmp_path / "run", *OPTIONS, "data.num_workers=1", "ckpt_path=last")
    equal_runs(whole, tmp_path / "run")


@pytest.mark.parametrize("task", [None, "7"])
def test_slurms_signal_saves_then_queues_the_job_again(features, whole, tmp_path, monkeypatch, task):
    (tmp_path / "scontrol").write_text(
        f"#!/bin/sh\nls '{tmp_path}'/run/checkpoints/last.ckpt && echo $* >> {tmp_path}/asked\n"
    )
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    slurm = {"NTASKS": 1, "JOB_ID": 42, "JOB_NAME": "x", "PROCID": 0, "LOCALID": 0, "NODEID": 0, "NODELIST": "here"}
    if task is not None:
        slurm |= {"ARRAY_JOB_ID": 40, "ARRAY_TASK_ID": task}
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    stop_here(features, tmp_path / "run", *OPTIONS, at=12, number=signal.SIGUSR1)
    assert (tmp_path / "asked").read_text() == ("requeue 42\n" if task is None else "requeue 40_7\n")
    assert not list((tmp_path / "run").glob("hpc_ckpt*"))
    if task is None:
        run_here(features, tmp_path / "run", *OPTIONS, "ckpt_path=last")
        equal_runs(whole, tmp_path / "run")


def wait_for(path, process):
    deadline = time.monotonic() + 300
    while not path.exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)


def stop_process(splits, run_dir, *options, number, delay):
    """Run train.py as a process, send it a signal some time after its first checkpoint, return its exit code."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command(splits, run_dir, *options), env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    wait_for(run_dir / "checkpoints" / "last.ckpt", process)
    time.sleep(delay)
    process.send_signal(number)
    return process.wait(300)


def test_a_killed_process_goes_on_bit_for_bit(features, tmp_path):
    options = [*OPTIONS, "trainer.max_steps=120", "trainer.val_check_interval=20"]
    run_here(features, tmp_path / "whole", *options)
    delay = random.SystemRandom().uniform(0, 0.2)
    assert stop_process(features, tmp_path / "run", *options, number=signal.SIGKILL, delay=delay) == -signal.SIGKILL
    assert read(tmp_path / "run" / "checkpoints" / "last.ckpt")["global_step"] < 120
    run_here(features, tmp_path / "run", *options, "ckpt_path=last")
    equal_runs(tmp_path / "whole", tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_two_processes_go_on_bit_for_bit(features, tmp_path, number):
    options = [*OPTIONS, "trainer=ddp_cpu", "trainer.max_steps=60", "trainer.val_check_interval=10"]
    options += ["data.batch_size=3", "data.num_workers=1"]
    code = stop_process(features, tmp_path / "run", *options, number=number, delay=0.1)
    assert code == (143 if number == signal.SIGTERM else -signal.SIGKILL)
    stopped_at = read(tmp_path / "run" / "checkpoints" / "last.ckpt")["global_step"]
    assert 0 < stopped_at < 60
    for name, extra in (("run", ["ckpt_path=last"]), ("whole", [])):
        result = run(features, tmp_path / name, *options, *extra)
        assert result.returncode == 0, result.stderr
    equal_runs(tmp_path / "whole", tmp_path / "run")
    assert len(read(tmp_path / "run" / "checkpoints" / "last.ckpt")["run"]["random_states"]) == 2


# Weights & Biases


def wandb_runs(folder):
    return sorted(path.name for path in (folder / "wandb").glob("*run-*"))


def test_an_offline_run_of_wandb_goes_on_under_its_id(features, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    options = [*OPTIONS, "logger=wandb", "logger.wandb.offline=true"]
    for extra in (["trainer.max_steps=2"], ["trainer.max_steps=4", "ckpt_path=last"], ["trainer.max_steps=2"]):
        run_here(features, tmp_path / "run", *options, *extra)
        time.sleep(1)  # W&B's folders are named by the second
    first, resumed, new = (name.rpartition("-")[2] for name in wandb_runs(tmp_path / "run"))
    assert first == resumed != new
    assert (tmp_path / "run" / "wandb_id.txt").read_text() == new


@pytest.mark.slow
def test_a_server_of_wandb_that_is_away_does_not_stop_the_run(features, tmp_path, monkeypatch, caplog):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    monkeypatch.setenv("WANDB_BASE_URL", "http://localhost:9")
    options = [*OPTIONS, "logger=wandb", "logger.wandb.offline=false", "trainer.max_steps=2"]
    run_here(features, tmp_path / "run", *options)
    assert read(tmp_path / "run" / "checkpoints" / "last.ckpt")["global_step"] == 2
    assert "offline" in caplog.text
    identity = (tmp_path / "run" / "wandb_id.txt").read_text()
    assert any(name.startswith("offline-run") and name.endswith(identity) for name in wandb_runs(tmp_path / "run"))


# Which checkpoint


def test_last_of_a_new_run_begins_it(features, whole, tmp_path, caplog):
    assert run_here(features, tmp_path / "run", *OPTIONS, "trainer.max_steps=2", "ckpt_path=last") > 0
    assert "holds no checkpoint yet: the run begins" in caplog.text


DAMAGE = {
    "empty": lambda content: b"",
    "cut off": lambda content: content[: len(content) // 2],
    "garbage": lambda content: b"garbage" * 100,
    "a bit": lambda content: content[:5000] + bytes([content[5000] ^ 255]) + content[5001:],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_last_checkpoint_falls_back_to_the_one_before(copy, caplog, damage):
    last = copy / "checkpoints" / "last.ckpt"
    last.write_bytes(DAMAGE[damage](last.read_bytes()))
    start = find_checkpoint("last", copy / "checkpoints")
    assert (start.path.name, start.step) == ("previous.ckpt", 10)
    assert f"{last}: not a checkpoint that torch can read" in caplog.text
    assert "Going on from" in caplog.text
    with refused(last):
        find_checkpoint(str(last), copy / "checkpoints")


def test_a_run_goes_on_bit_for_bit_from_the_one_before(features, whole, copy):
    (copy / "checkpoints" / "last.ckpt").write_bytes(b"")
    run_here(features, copy, *OPTIONS, "ckpt_path=last")
    equal_runs(whole, copy)


def test_a_damaged_checkpoint_takes_not_the_place_of_the_sound_one_before(features, copy):
    (copy / "checkpoints" / "last.ckpt").write_bytes(b"")
    run_here(features, copy, *OPTIONS, "ckpt_path=last", "trainer.max_steps=12")  # one save, at the end
    steps = {name: read(copy / "checkpoints" / f"{name}.ckpt")["global_step"] for name in ("previous", "last")}
    assert steps == {"previous": 10, "last": 12}


def test_damaged_checkpoints_alone_are_refused_and_nothing_is_overwritten(features, copy):
    for path in (copy / "checkpoints").iterdir():
        path.write_bytes(b"x")
    with refused(copy / "checkpoints", "none of its checkpoints can be read", "best.ckpt", "previous.ckpt"):
        run_here(features, copy, *OPTIONS, "ckpt_path=last")
    assert {path.read_bytes() for path in (copy / "checkpoints").iterdir()} == {b"x"}


def test_a_checkpoint_without_a_state_of_training_is_refused(features, copy):
    path = copy / "weights.ckpt"
    torch.save({"state_dict": {}}, path)
    with refused(path, "optimizer_states"):
        run_here(features, copy, *OPTIONS, f"ckpt_path='{path}'")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("encoder.dim=16", "dim is 8 in the checkpoint, but 16 in the configuration"),
        ("quantizer.codebook_size=32", "codebook_size is 16 in the checkpoint, but 32"),
        ("quantizer=rvq", "num_codebooks is 1 in the checkpoint, but 4"),
        ("codec=small", "enc_ratios is [1, 1] in the checkpoint, but [1]"),
        ("layer=3", "layer is 9 in the checkpoint, but 3"),
    ],
)
def test_a_checkpoint_of_another_codec_names_what_differs(features, copy, override, words):
    with refused(copy / "checkpoints" / "last.ckpt", words, "run=NAME"):
        run_here(features, copy, *OPTIONS, override, "ckpt_path=last")


def test_a_finished_run_stays_as_it_is_and_goes_on_with_more_steps(features, whole, tmp_path, caplog):
    folder = Path(shutil.copytree(whole, tmp_path / "run"))
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    best = run_here(features, folder, *OPTIONS, "ckpt_path=last")
    assert "is finished: 23 steps" in caplog.text
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert best == json.loads((folder / "codec" / "config.json").read_text())["figures"]["normalized_error"]
    run_here(features, folder, *OPTIONS, "trainer.max_steps=26", "ckpt_path=last")
    assert read(folder / "checkpoints" / "last.ckpt")["global_step"] == 26
    table = rows(folder / "logs" / "version_0" / "metrics.csv")
    assert [int(row["step"]) for row in table if row["valid/normalized_error"]] == [0, 4, 9, 14, 19, 22, 24, 25]


def test_a_new_run_of_an_old_name_sets_its_checkpoints_aside(features, copy, caplog):
    run_here(features, copy, *OPTIONS, "trainer.max_steps=2")
    assert read(copy / "checkpoints.old" / "last.ckpt")["global_step"] == 13
    assert {path.name for path in (copy / "checkpoints").iterdir()} == {"last.ckpt", "best.ckpt"}
    assert "ckpt_path=last goes on" in caplog.text


# A full disk


def test_a_full_disk_keeps_the_earlier_checkpoints(features, tiny_disk):
    # Room for the codec and three checkpoints of 97 KB; of a fourth one's temporary file there is too much.
    subprocess.run(["mount", "-o", "remount,size=380k", tiny_disk], check=True)
    with pytest.raises(RepCodecError) as caught:
        run_here(features, tiny_disk / "run", *OPTIONS)
    assert "No space left on device" in user_message(caught.value)
    steps = {path.name: read(path)["global_step"] for path in (tiny_disk / "run" / "checkpoints").iterdir()}
    assert steps == {"previous.ckpt": 5, "last.ckpt": 10, "best.ckpt": steps["best.ckpt"]}
    subprocess.run(["mount", "-o", "remount,size=800k", tiny_disk], check=True)
    run_here(features, tiny_disk / "run", *OPTIONS, "ckpt_path=last")
    assert read(tiny_disk / "run" / "checkpoints" / "last.ckpt")["global_step"] == 23
