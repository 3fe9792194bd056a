"""Checkpoints of a training run: written whole, found again, and all in them that the run's continuation depends on.

They hold plain values and tensors only. A run that is killed, or stopped by a signal, goes on from its newest one as
if it had never stopped; see `Checkpoints`.
"""

import logging
import os
import random
import shutil
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerStatus
from lightning.pytorch.utilities import rank_zero_only

from repcodec.codec import RepCodec
from repcodec.distributed import sum_over_ranks
from repcodec.errors import RepCodecError
from repcodec.files import atomic_write
from repcodec.module import CodecModule
from repcodec.pickles import plain_config, read_pickle

MONITOR = "valid/normalized_error"
"""The figure, lower is better, by which the best checkpoint and the saved codec are chosen."""

LAST, PREVIOUS, BEST = "last.ckpt", "previous.ckpt", "best.ckpt"
"""Files in the checkpoints/ folder of a run."""

TERMINATE, REQUEUE = 1, 2

log = logging.getLogger("repcodec")
inform, warn = rank_zero_only(log.info), rank_zero_only(log.warning)


@dataclass(frozen=True)
class Resumption:
    """A checkpoint that a run goes on from.

    Attributes:
        path: the file.
        contents: what is in it.
    """

    path: Path
    contents: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        step: int = self.contents["global_step"]
        return step

    @property
    def best(self) -> float:
        """The best validation's normalized error so far."""
        return min((error for error, _ in self.contents["run"]["best"]), default=float("inf"))

    def is_finished(self, max_steps: int, run_dir: Path) -> bool:
        """Say whether there is nothing left to train.

        Raises:
            RepCodecError: so it is, but by another run.
        """
        if not 0 <= max_steps <= self.step:
            return False
        if not of_this_run(self.path, run_dir / "checkpoints"):
            raise RepCodecError(f"{self.path} has {self.step} steps already: give a larger trainer.max_steps.")
        log.info("%s is finished: %d steps. A larger trainer.max_steps goes on.", run_dir, self.step)
        return True

    def check_fits(self, codec: RepCodec, encoder: str, layer: int) -> None:
        """Refuse to go on with another codec, or on features of another speech encoder or layer.

        Raises:
            RepCodecError: names every setting that differs.
        """
        theirs, ours = self.contents["codec"], {**codec.config(), "encoder": encoder, "layer": layer}
        differ = list(_differences("", {name: theirs.get(name) for name in ours}, ours))
        if differ:
            raise RepCodecError(
                f"{self.path}: this checkpoint does not fit the configuration: {'; '.join(differ)}. Set these as in "
                "the checkpoint to go on with it, or begin a run of another name (run=NAME)."
            )


def _differences(prefix: str, theirs: Any, ours: Any) -> Any:
    """Yield a few words about every setting that differs."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for name in [*ours, *(theirs.keys() - ours.keys())]:
            yield from _differences(f"{prefix}.{name}" if prefix else name, theirs.get(name), ours.get(name))
    elif _plain(theirs) != _plain(ours):
        yield f"{prefix} is {_plain(theirs)} in the checkpoint, but {_plain(ours)} in the configuration"


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _is_score(pair: Any) -> bool:
    """Say whether this is the error of a validation, and its step."""
    return isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], float) and isinstance(pair[1], int)


def read_checkpoint(path: Path) -> Resumption:
    """Read a checkpoint of a training run.

    Raises:
        RepCodecError: it is missing, damaged, or holds no whole state of a training.
    """
    contents = read_pickle(path)
    needed = {"state_dict", "optimizer_states", "lr_schedulers", "loops", "global_step", "codec", "run"}
    missing = sorted(needed - contents.keys()) if isinstance(contents, dict) else sorted(needed)
    if missing:
        raise RepCodecError(
            f"{path}: not a whole state of a training, it lacks {', '.join(missing)}; an earlier version or another "
            "program made it: use a checkpoint of this version's train.py."
        )
    run = contents["run"]
    best = run.get("best") if isinstance(run, dict) else None
    if not (isinstance(best, list) and all(map(_is_score, best))) or type(contents["global_step"]) is not int:
        raise RepCodecError(f"{path}: its state of a training is damaged (run, global_step); use another checkpoint.")
    plain_config(path, contents["codec"])
    return Resumption(path, contents)


def find_checkpoint(ckpt_path: str | None, folder: Path) -> Resumption | None:
    """Return what a run shall go on from, None where it shall begin.

    Args:
        ckpt_path: a file; "last" for the newest sound checkpoint in `folder`, if there is any; None to begin.
        folder: the run's own checkpoints.

    Raises:
        RepCodecError: the file is missing or damaged, or there are checkpoints in the folder, but no sound one.
    """
    if ckpt_path is None:
        return None
    if ckpt_path != "last":
        if not Path(ckpt_path).is_file():
            raise RepCodecError(
                f"ckpt_path={ckpt_path}: no such checkpoint; a run has its own in checkpoints/, and ckpt_path=last "
                "is the newest of them."
            )
        return read_checkpoint(Path(ckpt_path))
    others = sorted(folder.glob("best*.ckpt"), key=lambda path: path.stat().st_mtime, reverse=True)
    found = [path for path in (folder / LAST, folder / PREVIOUS, *others) if path.is_file()]
    for path in found:
        try:
            start = read_checkpoint(path)
        except RepCodecError as error:
            warn("%s Looking for the checkpoint before it.", error)
        else:
            inform("Going on from %s, step %d.", path, start.step)
            return start
    if found:
        raise RepCodecError(
            f"{folder}: none of its checkpoints can be read ({', '.join(path.name for path in found)}): bring back a "
            "copy, or begin anew without ckpt_path=last."
        )
    inform("%s holds no checkpoint yet: the run begins.", folder)
    return None


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint whole or not at all; of last.ckpt, the one that it replaces stays as previous.ckpt.

    Attributes:
        last_is_sound: whether the last.ckpt that is there may take the place of previous.ckpt.
    """

    last_is_sound: bool = True

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Write a checkpoint; Lightning calls this on the first rank alone.

        Raises:
            RepCodecError: the folder cannot be written or the disk is full; what stood there is untouched then.
        """
        path = Path(path)
        with atomic_write(path, "w+b") as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:  # torch's own, instead of what the system said
                raise error.__context__ if isinstance(error.__context__, OSError) else error from None
            file.flush()
            os.fsync(file.fileno())
            if path.name == LAST and path.exists() and self.last_is_sound:
                os.replace(path, path.with_name(PREVIOUS))
        if path.name == LAST:
            self.last_is_sound = True


def of_this_run(start: Path | str | None, folder: Path) -> bool:
    """Say whether a checkpoint is one of the run that `folder` is part of; else what lies there is another run's."""
    return start is not None and Path(start).resolve().parent.parent == folder.resolve().parent


def set_aside(folder: Path) -> None:
    """Rename a folder that an earlier run left, if it did, in place of what the one before it left, and say so."""
    aside = folder.with_name(f"{folder.name}.old")
    if folder.exists():
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
        log.warning("An earlier run's %s: now in %s (ckpt_path=last goes on with a run).", folder.name, aside)


class Checkpoints(Checkpoint):
    """Saves after every validation, at the end, and when a signal stops the run, which then goes on as if it never had.

    In the folder: last.ckpt, previous.ckpt (the last one but one) and best.ckpt; with `keep_best` above 1 the best
    ones are best-stepSTEP.ckpt. Lightning's ModelCheckpoint saves before the validation that is due at the same step,
    which a resumed run then never sees; here everything about a step is logged and on disk before its checkpoint is.

    A checkpoint says under "run" what Lightning's own state lacks: the random states of every rank, the best errors,
    and the use of codes in training since the last validation. Loggers are saved with it.

    SIGTERM, and on SLURM the signal before a job's time is up, end the training after the optimizer's step that is
    being taken, on all ranks together; SLURM then queues the job again.
    """

    def __init__(self, folder: str, keep_best: int = 1):
        """Take where checkpoints lie, and how many of the best are kept, by `MONITOR`.

        Raises:
            RepCodecError: `keep_best` is below 1.
        """
        if keep_best < 1:
            raise RepCodecError(f"callbacks.checkpoints.keep_best={keep_best}: expected at least 1.")
        self.folder, self.keep_best = Path(folder), keep_best
        self.best: list[tuple[float, int]] = []  # (error, step), best first
        self.stopped = False
        self._files = WholeCheckpointIO()
        self._saved_at = 0
        self._signalled = 0
        self._loaded: dict[str, Any] | None = None

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        """Have checkpoints written whole."""
        trainer.strategy.checkpoint_io = self._files

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Restore what Lightning does not, or set an earlier run's checkpoints and codec aside; then heed signals."""
        assert isinstance(module, CodecModule)
        if self._loaded is not None:
            states = self._loaded["random_states"]
            set_random_state(states[min(trainer.global_rank, len(states) - 1)])
            counts = self._loaded["train_usage"].to(module.device)
            module.train_usage.counts = counts if trainer.is_global_zero else torch.zeros_like(counts)
            self._loaded = None
        goes_on = of_this_run(trainer.ckpt_path, self.folder)
        if not goes_on:
            self.best = []
        elif Path(str(trainer.ckpt_path)).name != LAST:  # the last one may be damaged
            self._files.last_is_sound = False
        if trainer.is_global_zero:
            for partial in self.folder.glob(".*.partial-*"):  # of a run that was killed as it wrote
                partial.unlink(missing_ok=True)
            if not goes_on and any(self.folder.glob("*.ckpt")):
                for earlier in (self.folder, self.folder.with_name("codec")):  # checkpoints first: they can be resumed
                    set_aside(earlier)
        self._heed_signals(trainer)

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        """Name steps in the logs as a run that was never stopped does; Lightning may be off by one after a resume."""
        trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *args: Any) -> None:
        """End the training if a rank was told to, after a step of the optimizer; the ranks agree on which."""
        if not _between_steps(trainer) or trainer.global_step == trainer.max_steps:
            return
        signalled = torch.tensor(self._signalled, device=trainer.strategy.root_device)
        self._signalled = int(trainer.strategy.reduce(signalled, reduce_op="max"))
        if self._signalled:
            self.stopped = True
            trainer.fit_loop.epoch_loop.max_steps = trainer.global_step
            trainer.state.status = TrainerStatus.INTERRUPTED  # no validation of an end that is none

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Save, after a validation in between or at the end; not at step 0."""
        if trainer.global_step > 0 and _between_steps(trainer):
            self._save(trainer, trainer.callback_metrics.get(MONITOR))

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Save what the last steps made, and say so when a signal ended them."""
        if self._saved_at != trainer.global_step:
            self._save(trainer)
        if self.stopped and trainer.is_global_zero:
            log.warning("Stopped by a signal after step %d; ckpt_path=last goes on from there.", trainer.global_step)
            if self._signalled == REQUEUE:
                _requeue()

    def on_save_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add what Lightning's own state lacks; on all ranks, since each has its part."""
        assert isinstance(module, CodecModule)
        states: list[Any] = [random_state(module.device)] * trainer.world_size
        if trainer.world_size > 1:
            dist.all_gather_object(states, random_state(module.device))
        usage = sum_over_ranks(module.train_usage.counts.clone()).cpu()
        checkpoint["run"] = {"best": self.best, "random_states": states, "train_usage": usage}
        # The one epoch goes on, also from where a training ended.
        under_way = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
        checkpoint["loops"]["fit_loop"]["epoch_progress"] = {"total": dict(under_way), "current": dict(under_way)}

    def on_load_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take it back; random states only when the training starts, after all that draws random numbers before."""
        self._loaded = checkpoint["run"]
        self.best = self._loaded["best"]
        self._saved_at = checkpoint["global_step"]

    def _save(self, trainer: L.Trainer, error: Any = None) -> None:
        """Save the last checkpoint, before it the best one: killed in between, a resumed run does both again."""
        step = trainer.global_step
        for logger in trainer.loggers:
            logger.save()
        if error is not None and float(error) < float("inf"):
            self.best = sorted([*self.best, (float(error), step)])
            kept, dropped = self.best[: self.keep_best], self.best[self.keep_best :]
            self.best = kept
            if (float(error), step) in kept:
                trainer.save_checkpoint(self._best_path(step), weights_only=False)
            if trainer.is_global_zero and self.keep_best > 1:
                for _, other in dropped:
                    self._best_path(other).unlink(missing_ok=True)
        trainer.save_checkpoint(self.folder / LAST, weights_only=False)
        self._saved_at = step

    def _best_path(self, step: int) -> Path:
        return self.folder / (BEST if self.keep_best == 1 else f"best-step{step}.ckpt")

    def _heed_signals(self, trainer: L.Trainer) -> None:
        """Let signals only leave a note, instead of what Lightning does at once, wherever the ranks are just then."""

        def note(number: int, frame: Any) -> None:
            self._signalled = max(self._signalled, REQUEUE if number in requeuing else TERMINATE)

        if trainer.received_sigterm:  # already, as the codec had its start
            self._signalled, trainer._signal_connector.received_sigterm = TERMINATE, False
        environment = trainer._accelerator_connector.cluster_environment
        requeuing = set()
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            requeuing = {environment.requeue_signal or signal.SIGUSR1}
        for number in (signal.SIGTERM, *requeuing):  # Lightning puts back what was there when the training is over
            signal.signal(number, note)


def _between_steps(trainer: L.Trainer) -> bool:
    """Say whether the last batch ended a step of the optimizer, with no gradient left over."""
    return not trainer.fit_loop.epoch_loop._should_accumulate()


def _requeue() -> None:
    """Have SLURM queue this job again, a task of an array alone."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    job = f"{array}_{task}" if array else os.environ["SLURM_JOB_ID"]
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True, text=True)
        log.warning("SLURM job %s is queued again.", job)
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        log.warning("SLURM job %s could not be queued again (%s): start it again yourself.", job, said.strip())


def random_state(device: torch.device) -> dict[str, Any]:
    """Return the states of all random number generators of this process, as plain values and tensors."""
    numpy_state = np.random.get_state(legacy=False)
    keys = numpy_state["state"] | {"key": numpy_state["state"]["key"].tolist()}
    state = {"python": random.getstate(), "numpy": numpy_state | {"state": keys}, "torch": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_random_state(state: dict[str, Any]) -> None:
    """Put the generators of this process into the states that `random_state` returned."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
