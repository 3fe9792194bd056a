import os
import random
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import refused

from repcodec.checkpointing import Checkpoints, WholeCheckpointIO, random_state, set_random_state


def test_a_checkpoint_that_cannot_be_written_whole_leaves_the_one_before(tmp_path, monkeypatch):
    files, path = WholeCheckpointIO(), tmp_path / "last.ckpt"
    for step in range(3):
        files.save_checkpoint({"step": step}, path)
    original = torch.save

    def breaks_off(checkpoint, file):
        original(checkpoint, file)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", breaks_off)
    with refused(path, "No space left on device"):
        files.save_checkpoint({"step": 3}, path)
    found = {file.name: torch.load(file, weights_only=True)["step"] for file in tmp_path.iterdir()}
    assert found == {"last.ckpt": 2, "previous.ckpt": 1}


@pytest.mark.parametrize("moment", ["torch.save", "os.fsync", "os.replace"])
def test_a_process_killed_as_it_writes_leaves_a_sound_checkpoint(tmp_path, moment):
    files, path = WholeCheckpointIO(), tmp_path / "last.ckpt"
    for step in range(2):
        files.save_checkpoint({"step": step}, path)
    child = os.fork()
    if child == 0:
        owner, name = {"torch": torch, "os": os}[moment.split(".")[0]], moment.split(".")[1]
        original = getattr(owner, name)
        setattr(owner, name, lambda *values: (original(*values), os.kill(os.getpid(), signal.SIGKILL)))
        files.save_checkpoint({"step": 2}, path)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    found = {file.name: torch.load(file, weights_only=True)["step"] for file in tmp_path.glob("[!.]*")}
    # Killed between the two renames there is no last.ckpt, but the one before is what it was.
    expected = {"previous.ckpt": 1} if moment == "os.replace" else {"last.ckpt": 1, "previous.ckpt": 0}
    assert found == expected


def test_random_states_come_back_for_every_generator(tmp_path):
    torch.save(random_state(torch.device("cpu")), tmp_path / "state")
    drawn = [(random.random(), np.random.normal(), float(torch.rand(()))) for _ in range(2)]
    set_random_state(torch.load(tmp_path / "state", weights_only=True))
    assert [(random.random(), np.random.normal(), float(torch.rand(()))) for _ in range(2)] == drawn


def test_the_best_k_are_kept(tmp_path):
    callback = Checkpoints(str(tmp_path), keep_best=2)
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(_should_accumulate=lambda: False))
    trainer = SimpleNamespace(loggers=[], is_global_zero=True, fit_loop=loop)
    trainer.save_checkpoint = lambda path, weights_only: Path(path).write_text(str(trainer.global_step))
    for step, error in enumerate([0.5, 0.4, float("nan"), 0.6, 0.3, 0.45], 1):
        trainer.global_step, trainer.callback_metrics = step, {"valid/normalized_error": torch.tensor(error)}
        callback.on_validation_end(trainer, None)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "best-step2.ckpt": "2", "best-step5.ckpt": "5", "last.ckpt": "6",
    }  # fmt: skip
    assert [step for _, step in callback.best] == [5, 2]


def test_keeping_none_of_the_best_is_refused(tmp_path):
    with refused("keep_best=0"):
        Checkpoints(str(tmp_path), keep_best=0)


def test_leftovers_of_a_killed_write_are_no_checkpoints(tmp_path):
    from repcodec.checkpointing import find_checkpoint

    (tmp_path / f".last.ckpt.partial-{os.getpid()}").write_bytes(b"half")
    assert find_checkpoint("last", tmp_path) is None
