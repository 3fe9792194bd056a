"""Sweeps, `python train.py -m …`: jobs that fail alone, a sweep that goes on where it stopped, its summary.

Every job leaves job.json in its folder, wherever a launcher ran it; the summary is made of those files alone.
"""

import csv
import io
import json
import logging
import math
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, read_write

from repcodec.errors import RepCodecError, first_line, one_sentence, user_message
from repcodec.files import atomic_write, locked

log = logging.getLogger("repcodec")
# `hydra.job.num` counts from 0 in every process; a search that goes on numbers its jobs after those before.
OmegaConf.register_new_resolver("later_job", lambda number, before: int(number) + int(before), replace=True)

_held = ExitStack()  # two sweeps in one folder would mix their jobs; not the callback's, which launchers pickle


@dataclass
class Job:
    """One job of a sweep, as its job.json holds it.

    Attributes:
        overrides: what the command line of this job alone would say.
        status: "running", "finished" or "failed"; one that was killed stays "running".
        error: the best validation's normalized error, None unless finished.
        sentence: why it failed.
    """

    overrides: list[str]
    status: str = "running"
    error: float | None = None
    sentence: str | None = None

    @classmethod
    def read(cls, folder: Path) -> "Job | None":
        """Return the job whose folder this is, None where none has begun.

        Raises:
            RepCodecError: its job.json is damaged.
        """
        path = folder / "job.json"
        if not path.is_file():
            return None
        try:
            job = cls(**json.loads(path.read_text(encoding="utf-8")))
            job.error = None if job.error is None else float(job.error)
            if not all(isinstance(text, str) for text in [*job.overrides, job.status, job.sentence or ""]):
                raise TypeError("a value is no text")
        except (OSError, ValueError, TypeError, OverflowError, RecursionError) as error:
            raise RepCodecError(
                f"{path}: not a readable job of a sweep ({first_line(error)}); delete this folder to run it again."
            ) from error
        return job

    def write(self, folder: Path) -> None:
        """Write job.json, on the first rank."""
        if _is_first_rank():
            with atomic_write(folder / "job.json") as file:
                json.dump(asdict(self), file, indent=2)


def _is_first_rank() -> bool:
    # Not above: Hydra loads this file at every start, and a misspelt option shall not wait for Lightning to be loaded.
    from lightning.pytorch.utilities import rank_zero_only

    return bool(getattr(rank_zero_only, "rank", 0) == 0)


def in_sweep() -> bool:
    """Whether Hydra runs this job as one of several."""
    return HydraConfig.get().mode == RunMode.MULTIRUN


def run_job(train: Callable[[DictConfig], float], config: DictConfig, script: str) -> float:
    """Run one job of a sweep; return the best validation's normalized error, infinity where the job failed.

    A job that finished before is not run again, one that stopped goes on from its newest checkpoint. Infinity,
    not NaN, since both of Hydra's sweepers live on with it and a search learns to keep away.

    Args:
        train: the function that trains as configured.
        config: this job's configuration.
        script: the file that trains when it is run, for jobs of several processes.
    """
    folder, overrides = Path(config.run_dir), list(HydraConfig.get().overrides.task)
    before = Job.read(folder)
    if before is not None and before.overrides == overrides:
        if before.status == "finished" and before.error is not None:
            log.info("%s has finished before, with normalized error %.4f", folder, before.error)
            return before.error
        if config.ckpt_path is None:
            config.ckpt_path = "last"
    if "wandb" in config.logger:
        OmegaConf.update(config, "logger.wandb.name", f"{config.run}-{folder.name}")
        if "group" not in config.logger.wandb:
            OmegaConf.update(config, "logger.wandb.group", folder.parent.name, force_add=True)
    job = Job(overrides)
    job.write(folder)
    try:
        from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

        # Lightning starts the further processes of a job by the command line, which is the whole sweep's here.
        alone = config.trainer.devices == 1 or SLURMEnvironment.detect()
        job.error = train(config) if alone else _train_apart(config, overrides, script)
        if not math.isfinite(job.error):
            raise RepCodecError(f"the best validation's normalized error is {job.error}.")
        job.status = "finished"
    except Exception as error:
        known = user_message(error)
        job.status, job.error = "failed", None
        job.sentence = known or f"{type(error).__name__}: {first_line(error)}"
        log.error("Job %s failed: %s", folder.name, job.sentence, exc_info=known is None)
    job.write(folder)
    return math.inf if job.error is None else job.error


def _train_apart(config: DictConfig, overrides: list[str], script: str) -> float:
    """Train in processes of their own, by the command that would run this job alone; return its error."""
    folder = Path(config.run_dir)
    options = {"hydra.run.dir": folder, "run": config.run}
    if config.ckpt_path is not None:
        options["ckpt_path"] = config.ckpt_path
    if "wandb" in config.logger:
        options |= {"logger.wandb.name": config.logger.wandb.name, "++logger.wandb.group": config.logger.wandb.group}
    command = [sys.executable, script, *overrides, *(f"{key}={_quoted(value)}" for key, value in options.items())]
    tail = ""
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process, _ended_with(process):
        assert process.stderr is not None
        # newline="" lets a progress bar's carriage returns through.
        for line in io.TextIOWrapper(process.stderr, encoding="utf-8", errors="replace", newline=""):
            sys.stderr.write(line)
            tail = (tail + line)[-2000:]
    if process.returncode:
        _, told, sentence = tail.rpartition("error: ")
        unsaid = f"its process ended with code {process.returncode}; see {folder}/train.log."
        raise RepCodecError(sentence.strip() if told else unsaid)
    figures: dict[str, float] = json.loads((folder / "codec" / "config.json").read_text(encoding="utf-8"))["figures"]
    return figures["normalized_error"]


@contextmanager
def _ended_with(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Let the process end when this one is told to, by Ctrl-C or SIGTERM."""
    old = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    except BaseException:
        process.terminate()
        raise
    finally:
        signal.signal(signal.SIGTERM, old)


def _quoted(value: object) -> str:
    """Return a value as a word of Hydra's override grammar, whatever characters it holds."""
    return "'" + str(value).replace("'", "\\'") + "'"


class SweepSummary(Callback):
    """Gives a sweep one folder and, from its jobs' files, its summary: summary.csv, a table, the exit code."""

    def on_multirun_start(self, config: DictConfig, **kwargs: object) -> None:
        """Fix the sweep's folder for all jobs, and go on with the sweep that lies there already.

        The folder's name may hang on an option that is swept, so that every job would have one of its own.
        """
        folder = Path(config.hydra.sweep.dir)
        with one_sentence(), read_write(config.hydra):
            _held.enter_context(locked(folder / "sweep.json"))
            _claim(folder, config)
            given = config.hydra.overrides.hydra
            given.append(f"hydra.sweep.dir={_quoted(folder)}")
            jobs = _jobs(folder)
            if jobs and "n_trials" in config.hydra.sweeper:  # a search: what it has tried already it does not repeat
                before = max(jobs) + 1
                ended = sum(job.status != "running" for job in jobs.values())
                config.hydra.sweeper.n_trials = max(0, config.hydra.sweeper.n_trials - ended)
                if config.hydra.sweeper.sampler.seed is not None:
                    config.hydra.sweeper.sampler.seed += before  # or its first draws would come again
                given.append(f"hydra.sweep.subdir='${{later_job:${{hydra.job.num}},{before}}}'")

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: object) -> None:
        """Bring summary.csv up to date, in whatever process the job ran."""
        if in_sweep() and _is_first_rank():
            folder = Path(config.hydra.sweep.dir)
            write_summary(folder, _jobs(folder))

    def on_multirun_end(self, config: DictConfig, **kwargs: object) -> None:
        """Print the summary; end with exit code 1 where a job failed."""
        folder = Path(config.hydra.sweep.dir)
        _held.close()
        with one_sentence():
            jobs = _jobs(folder)
            write_summary(folder, jobs)
        print_summary(folder, jobs)
        if any(job.status == "failed" for job in jobs.values()):
            sys.exit(1)


def _claim(folder: Path, config: DictConfig) -> None:
    """Make the sweep's folder, unless another sweep has it: their jobs' numbers would mix."""
    sweep = {
        "overrides": OmegaConf.to_container(config.hydra.overrides.task),
        "params": OmegaConf.to_container(config.hydra.sweeper.params or OmegaConf.create()),
    }
    path = folder / "sweep.json"
    if not path.is_file():
        with atomic_write(path) as file:
            json.dump(sweep, file, indent=2)
        return
    try:
        other = json.loads(path.read_text(encoding="utf-8"))
        what = " ".join(other["overrides"])
    except (OSError, ValueError, TypeError, LookupError, RecursionError) as error:
        raise RepCodecError(f"{path}: not a readable description of a sweep ({first_line(error)}).") from error
    if other != sweep:
        raise RepCodecError(
            f"{folder} holds another sweep, of {what}: give the same options to go on with it, "
            "name this one with run=NAME, or delete that folder."
        )


def _jobs(folder: Path) -> dict[int, Job]:
    """Return the jobs of a sweep that have begun, by number."""
    found = {int(path.name): Job.read(path) for path in folder.iterdir() if re.fullmatch("[0-9]{1,9}", path.name)}
    return {number: job for number, job in sorted(found.items()) if job is not None}


def _ranked(jobs: dict[int, Job]) -> list[int]:
    """Return the jobs' numbers: the finished ones first, the best at the top."""
    return sorted(jobs, key=lambda number: math.inf if (error := jobs[number].error) is None else error)


def _options(jobs: dict[int, Job]) -> dict[str, list[str]]:
    """Return option → its value in every job, in the order of the command line."""
    given = [dict(override.split("=", 1) for override in job.overrides if "=" in override) for job in jobs.values()]
    names = dict.fromkeys(name for options in given for name in options)
    return {name: [options.get(name, "") for options in given] for name in names}


def write_summary(folder: Path, jobs: dict[int, Job]) -> None:
    """Write summary.csv: a line a job, the best first, every override a column."""
    options, place = _options(jobs), {number: i for i, number in enumerate(jobs)}
    with atomic_write(folder / "summary.csv") as file:
        writer = csv.writer(file)
        writer.writerow(["job", "best", "normalized_error", "status", *options, "sentence", "folder"])
        for rank, number in enumerate(_ranked(jobs)):
            job = jobs[number]
            best = "best" if rank == 0 and job.error is not None else ""
            values = (values[place[number]] for values in options.values())
            writer.writerow([number, best, job.error, job.status, *values, job.sentence, folder / str(number)])


def _short(value: str) -> str:
    """Return a number of many digits, as a search draws them, with four."""
    try:
        return f"{float(value):.4g}" if len(value) > 8 else value
    except ValueError:
        return value


def print_summary(folder: Path, jobs: dict[int, Job]) -> None:
    """Print the jobs as a table with the options in which they differ, then why some failed."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    options, place = _options(jobs), {number: i for i, number in enumerate(jobs)}
    options = {name: values for name, values in options.items() if len(set(values)) > 1}
    table = Table(title=escape(str(folder)))
    for heading in ("job", "normalized error", "status"):
        table.add_column(heading, justify="right")
    for name in options:
        table.add_column(escape(name))
    for rank, number in enumerate(_ranked(jobs)):
        job = jobs[number]
        best = rank == 0 and job.error is not None
        error = "" if job.error is None else f"{job.error:.4f}" + " best" * best
        values = (escape(_short(values[place[number]])) for values in options.values())
        table.add_row(str(number), error, job.status, *values, style="bold" if best else None)
    console = Console(width=max(100, Console().width))
    console.print(table)
    for number, job in jobs.items():
        if job.sentence is not None:
            console.print(f"Job {number} failed: {job.sentence}", markup=False, highlight=False, soft_wrap=True)
    print(f"Written to {folder}: summary.csv")
