"""A rank that dies takes the others along; real processes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import FAST_CODEC

from repcodec.ranks import RankWatch

ROOT = Path(__file__).parent.parent
mp.get_context("forkserver").set_forkserver_preload(["repcodec.callbacks"])  # imported once, not by every process


def stay_or_end(rank, world, folder, what):
    """Be a rank that watches the others: far from any collective operation, or at the end of its training."""
    os.dup2(os.open(f"{folder}/{rank}.said", os.O_WRONLY | os.O_CREAT), 2)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    os.environ["MASTER_ADDR"] = "127.0.0.1"

    def broadcast(value):
        values = [value]
        dist.broadcast_object_list(values)
        return values[0]

    strategy = SimpleNamespace(broadcast=broadcast, barrier=lambda name: dist.barrier())
    trainer = SimpleNamespace(world_size=world, global_rank=rank, strategy=strategy)
    watch = RankWatch()
    watch.setup(trainer, None, "fit")
    Path(folder, f"{rank}.ready").touch()
    if what == "stay":
        time.sleep(600)
    time.sleep(rank / 4)  # the first to end waits for the others, or they would take it for dead
    watch.teardown(trainer, None, "fit")
    time.sleep((2 - rank) / 4)


def ranks(folder, what):
    """Start three ranks that watch one another."""
    context = mp.get_context("forkserver")
    processes = [context.Process(target=stay_or_end, args=(rank, 3, str(folder), what)) for rank in range(3)]
    for process in processes:
        process.start()
    return processes


@pytest.mark.parametrize("dead", [0, 2])
def test_ranks_that_are_stuck_end_when_another_one_dies(tmp_path, dead):
    processes = ranks(tmp_path, "stay")
    while len(list(tmp_path.glob("*.ready"))) < 3:
        assert all(process.is_alive() for process in processes)
        time.sleep(0.05)
    os.kill(processes[dead].pid, signal.SIGKILL)
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [-9 if rank == dead else 1 for rank in range(3)]
    said = [(tmp_path / f"{rank}.said").read_text() for rank in range(3)]
    # Rank 0 sees every other one, those see rank 0 alone.
    assert f"error: rank {dead} of this run has died" in said[1 if dead == 0 else 0]
    assert all("error: rank" in words for rank, words in enumerate(said) if rank != dead)


def test_ranks_that_end_well_take_none_for_dead(tmp_path):
    for process in (processes := ranks(tmp_path, "end")):
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert [(tmp_path / f"{rank}.said").read_text() for rank in range(3)] == ["", "", ""]


def descendant(parent):
    """The process of rank 1, which rank 0 starts."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            child = int(path.read_text().rpartition(")")[2].split()[1]) == parent
            if child and b"train_ddp_process_1" in (path.parent / "cmdline").read_bytes():
                return int(path.parent.name)
        except OSError:  # it has ended meanwhile
            continue
    return None


def alive(process):
    try:
        return "Z" not in Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the second process in /proc")
@pytest.mark.parametrize("dead", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_training_ends_in_one_sentence_when_a_rank_is_killed(splits, tmp_path, dead):
    options = [*FAST_CODEC, f"data.dir='{splits}'", f"hydra.run.dir='{tmp_path}/run'", "logger=none",
               "trainer=ddp_cpu", "data.batch_size=2", "data.crop=16", "trainer.max_steps=1000000",
               "trainer.val_check_interval=10"]  # fmt: skip
    with open(tmp_path / "said", "w+") as said:
        first = subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), *options], stdout=said, stderr=said, start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        try:
            begun = time.monotonic()
            while not list(tmp_path.glob("run/checkpoints/*.ckpt")):
                assert first.poll() is None, (tmp_path / "said").read_text()
                assert time.monotonic() - begun < 300
                time.sleep(0.1)
            second = descendant(first.pid)
            os.kill((first.pid, second)[dead], signal.SIGKILL)
            died = time.monotonic()
            while first.poll() is None or alive(second):
                assert time.monotonic() - died < 120
                time.sleep(0.1)
        finally:
            os.killpg(first.pid, signal.SIGKILL) if first.poll() is None or alive(second) else None
    words = (tmp_path / "said").read_text()
    assert "Traceback" not in words
    assert "another process of this run has died" in words or f"rank {dead} of this run has died" in words
    assert "start the run again from its last checkpoint" in words
    assert first.returncode == (-9 if dead == 0 else 1)
