"""Do long jobs that are killed over and over end with the right bytes? Exit code 1 where one does not.

    python benchmarks/kills.py                         # 25 kills each of extract, tokenize, train, evaluate, convert
    python benchmarks/kills.py 100 --jobs train --seed 7

Each job runs undisturbed first: the reference. Then the same command is killed with SIGKILL at random moments and
started again after every kill, until that many kills have been made. Three in four of the moments are counted from the
first thing that a run puts on the disk, one in four is drawn over a whole run, from the start of Python on. A run that
ends before its kill completes the job: what it made is compared with the reference, byte by byte, deleted, and the next
one begins. After every kill, what lies there is refused by the reader, or it is whole; no kill loses what an earlier
run had kept. Extraction runs the real Whisper tiny.en on the demo's speech, in one thread as all else: the number of
threads may change last bits.
"""

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from repcodec.codec import RepCodec
from repcodec.demo_corpus import build_corpus
from repcodec.demo_weights import convert_whisper_tiny_en
from repcodec.errors import RepCodecError
from repcodec.kmeans import KMeansTokenizer
from repcodec.shard_writer import write_shard
from repcodec.shards import FeatureShards
from repcodec.tokens import read_tokens

ROOT, DIM = Path(__file__).parent.parent, 32


@dataclass
class Job:
    """What is killed.

    Attributes:
        command: its words.
        out: the folder that it writes to, and that is deleted between two.
        made: the files in there that must come out the same, and how each is read.
        improves: whether they are written anew meanwhile, as a training's codec after each better validation.
        kept: the file in there that gets a line for each piece of work that is done, and goes when all is.
    """

    command: list[str]
    out: Path
    made: dict[str, Callable[[Path], object]]
    improves: bool = False
    kept: str | None = None


class WrongError(Exception):
    """A kill left something that it must not, or a run failed."""


def main(arguments: list[str] | None = None) -> int:
    """Kill the jobs and print what came of it; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kills", nargs="?", type=int, default=25, help="of each job (default 25)")
    parser.add_argument("--jobs", nargs="+", help="which (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    wrong = False
    with tempfile.TemporaryDirectory() as folder:
        for name, job in jobs(Path(folder), args.jobs).items():
            trial = Trial(job, Path(folder) / "log", random.Random(args.seed))
            try:
                trial.run(args.kills)
                print(f"{name}: {trial.summary()}", flush=True)
            except WrongError as error:
                print(f"{name}: WRONG after {trial.kills} kills: {error}", flush=True)
                wrong = True
    return int(wrong)


def jobs(folder: Path, wanted: list[str] | None) -> dict[str, Job]:
    """Make sounds, features and codecs; return the jobs on them that are wanted, None: all."""
    weights = folder
    if wanted is None or "extract" in wanted:
        build_corpus(folder / "speech", sentences={"train": 200, "valid": 1, "test": 1})
        weights = convert_whisper_tiny_en(folder)
    rng = np.random.default_rng(0)
    for split, count in (("train", 400), ("valid", 100), ("test", 3000)):
        with write_shard(folder / "features" / split, 0, 1, DIM, {"root": "/audio", "frame_rate": 50}) as shard:
            for n in range(count):
                walk = rng.normal(size=(rng.integers(20, 400), DIM)).cumsum(0)
                shard.append(f"{split}-{n}.flac", walk.astype(np.float32))
    torch.manual_seed(0)
    codec = RepCodec(DIM, codebook_size=64)
    codec.save_pretrained(folder / "codec")
    large = RepCodec(512, codebook_size=1024)
    large.save_pretrained(folder / "large")
    features, python, cli = folder / "features", sys.executable, ["-m", "repcodec.cli"]
    usual = ["encoder.dim=32", f"data.dir='{features}'"]
    out = {name: folder / f"out-{name}" for name in ("extract", "tokenize", "train", "evaluate", "convert")}
    shard = "whisper_tiny_en/l3/train"
    found = {
        "extract": Job(
            [
                python, *cli, "extract", f"{folder}/speech/train.tsv", f"{out['extract']}", "--encoder",
                "whisper_tiny_en", "--layer", "3", "--model", f"{weights}", "--batch-seconds", "5",
            ],
            out["extract"],
            {f"{shard}/0_1{end}": lambda path: FeatureShards(path.parent) for end in (".npy", ".len", ".json")},
            kept=f"{shard}/.0_1.journal",
        ),
        "tokenize": Job(
            [python, *cli, "tokenize", f"{folder}/codec", f"{features}/test", "-o", f"{out['tokenize']}/test.tokens"],
            out["tokenize"],
            {"test.tokens": lambda path: list(read_tokens(path)), "test.tokens.json": Path.read_text},
            kept=".test.tokens.partial",
        ),
        "train": Job(
            [
                python, f"{ROOT}/train.py", *usual, f"hydra.run.dir='{out['train']}'", "run=killed", "ckpt_path=last",
                "logger=csv", "~callbacks.dashboard", "quantizer.codebook_size=32", "data.batch_size=4",
                "data.crop=32", "trainer.max_steps=60", "trainer.val_check_interval=5", "trainer.log_every_n_steps=1",
            ],
            out["train"],
            {"codec/model.safetensors": lambda path: RepCodec.from_pretrained(path.parent)},
            improves=True,
        ),
        "evaluate": Job(
            [
                python, f"{ROOT}/evaluate.py", *usual, f"run_dir='{out['evaluate']}'", "corpus=true",
                f"tokenizers=['{folder}/codec']", "kmeans=[16,32,64]",
            ],
            out["evaluate"],
            {
                "results.json": Path.read_text,
                "kmeans-64/model.safetensors": lambda path: KMeansTokenizer.from_pretrained(path.parent),
            },
        ),
        "convert": Job(
            [python, *cli, "convert", f"{folder}/large", f"{out['convert']}/codec"],
            out["convert"],
            {
                "codec/model.safetensors": lambda path: RepCodec.from_pretrained(path.parent),
                "codec/config.json": Path.read_text,
            },
        ),
    }  # fmt: skip
    return {name: job for name, job in found.items() if wanted is None or name in wanted}


class Trial:
    """One job, killed and started again.

    Attributes:
        kills: made so far.
        midway: of those, how many found something on the disk and the job not complete.
        completed: how often the job came to its end.
    """

    def __init__(self, job: Job, log: Path, chance: random.Random):
        self.job, self.log, self.random = job, log, chance
        self.kills = self.midway = self.completed = self.kept = 0
        self.reference: dict[str, bytes] = {}
        self.duration = self.before = 0.0

    def run(self, kills: int) -> None:
        """Make the reference, kill, and bring the job that was killed last to its end.

        Raises:
            WrongError: something is not as it must be.
        """
        began = time.monotonic()
        process = self._start()
        self.before = self._first_trace(process, began)
        self._end(process)
        self.duration = time.monotonic() - began
        self.reference = {name: (self.job.out / name).read_bytes() for name in self.job.made}
        shutil.rmtree(self.job.out)
        while self.kills < kills:
            self._kill(kills)

    def summary(self) -> str:
        """Say what was found."""
        return (
            f"{self.kills} kills, {self.midway} of them with part of the work on the disk; {self.completed} times "
            f"completed, each with the bytes of the undisturbed run, which takes {self.duration:.1f} s"
        )

    def _kill(self, kills: int) -> None:
        """Start and kill the job until it is complete; with no kills left to make, let it end."""
        while True:
            began, fresh = time.monotonic(), not self.job.out.exists()
            process = self._start()
            if self.kills == kills:
                self._end(process)
                break
            if self.random.random() < 0.75:
                began = began + self._first_trace(process, began) if fresh else began + self.before
                moment = self.random.uniform(0, self.duration - self.before)
            else:
                moment = self.random.uniform(0, self.duration)
            try:
                process.wait(max(0.0, began + moment - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                self.kills += 1
                self._look()
                continue
            self._end(process)
            break
        for name, expected in self.reference.items():
            if (self.job.out / name).read_bytes() != expected:
                raise WrongError(f"{name} differs from the undisturbed run's")
        self.completed += 1
        self.kept = 0
        shutil.rmtree(self.job.out)

    def _look(self) -> None:
        """Read what a kill left: refused with our own error, or whole."""
        left = [path for path in self.job.out.rglob("*") if path.is_file()] if self.job.out.exists() else []
        whole = all((self.job.out / name).is_file() for name in self.job.made)
        self.midway += bool(left) and (self.job.improves or not whole)
        if self.job.kept and not whole:
            file = self.job.out / self.job.kept
            kept = file.read_bytes().count(b"\n") if file.exists() else 0
            if kept < self.kept:
                raise WrongError(f"{file.name} had {self.kept} lines before the kill, and now has {kept}")
            self.kept = kept
        for name, read in self.job.made.items():
            path = self.job.out / name
            if not path.exists():
                continue
            try:
                read(path)
            except RepCodecError:
                continue
            if not self.job.improves and path.read_bytes() != self.reference[name]:
                raise WrongError(f"{name} was read after a kill, but is not the undisturbed run's")

    def _start(self) -> subprocess.Popen:
        with open(self.log, "wb") as log:
            return subprocess.Popen(
                self.job.command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=ROOT
            )

    def _end(self, process: subprocess.Popen) -> None:
        if process.wait(600):
            raise WrongError(f"exit code {process.returncode}: {self.log.read_text(errors='replace')[-1000:]}")

    def _first_trace(self, process: subprocess.Popen, began: float) -> float:
        """Wait until the run has put something on the disk; return the seconds since it began."""
        while process.poll() is None and not self.job.out.exists():
            time.sleep(0.01)
        return time.monotonic() - began


if __name__ == "__main__":
    sys.exit(main())
