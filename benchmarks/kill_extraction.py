"""Does an extraction that is killed over and over end with the right bytes? Exit code 1 where it does not.

    python benchmarks/kill_extraction.py                         # 50 kills, the demo corpus
    python benchmarks/kill_extraction.py 200 --audio FOLDER --files 150 --seed 7

One `repcodec extract` with Whisper tiny.en runs undisturbed: the reference. Then the same command is killed with
SIGKILL at random moments and started again after every kill, until that many kills have been made. Of the moments,

    5 in 8 are counted from a run's first batch on, so that they fall into the model's work;
    1 in 8 from the last batch on, when the shard's files are put in place;
    2 in 8 are drawn over a whole run, from the start of Python on.

A run that ends before its kill completes an extraction: that is compared with the reference, byte by byte, deleted,
and the next one begins. After every kill, what lies there is no shard for a reader, or the whole one with the
reference's bytes. And at no time does the journal list fewer batches than before: no kill loses an earlier run's work.
"""

import argparse
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from repcodec.demo_corpus import build_corpus
from repcodec.demo_weights import convert_whisper_tiny_en
from repcodec.errors import RepCodecError
from repcodec.extraction import feature_folder
from repcodec.manifest import Manifest, make_manifest
from repcodec.shards import FeatureShards
from repcodec.speech_encoders import batches_of

ENCODER, LAYER = "whisper_tiny_en", 3


class WrongError(Exception):
    """A kill left something that it must not, or a run failed."""


def main(arguments: list[str] | None = None) -> int:
    """Kill extractions and print what came of it; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kills", nargs="?", type=int, default=50)
    parser.add_argument("--audio", help="folder of sound files; the demo corpus when left out")
    parser.add_argument("--files", type=int, help="so many files at most")
    parser.add_argument("--batch-seconds", type=float, default=5.0)
    parser.add_argument("--within", type=float, default=2.0, help="seconds from a run's first batch on (default 2)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="of every run: their number may change last bits")
    parser.add_argument("--cache", default="cache", help="folder for the corpus and the weights")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        trial = Trial(args, Path(folder))
        try:
            trial.run()
        except WrongError as error:
            print(f"WRONG after {trial.kills} kills: {error}")
            return 1
    print(trial.summary())
    return 0


class Trial:
    """Extractions in one folder, one after another, killed and started again.

    Attributes:
        kills: made so far.
        moments: how many kills found the shard in which state.
        num_runs: how many runs each complete extraction took.
        leftovers: hidden files beside complete shards.
    """

    def __init__(self, args: argparse.Namespace, folder: Path):
        """Make the manifest."""
        manifest = _sounds(args.audio, Path(args.cache))
        manifest = Manifest(manifest.root, manifest.paths[: args.files], manifest.num_samples[: args.files])
        manifest.write(folder / "sounds.tsv")
        self.args, self.manifest, self.log = args, manifest, folder / "log"
        self.num_batches = len(batches_of(manifest.num_samples, args.batch_seconds))
        self.command = [
            sys.executable, "-m", "repcodec.cli", "extract", str(folder / "sounds.tsv"), str(folder / "features"),
            "--encoder", ENCODER, "--layer", str(LAYER), "--model", str(convert_whisper_tiny_en(Path(args.cache))),
            "--batch-seconds", str(args.batch_seconds),
        ]  # fmt: skip
        self.environment = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
        self.shard = feature_folder(folder / "features", ENCODER, LAYER, "sounds")
        self.random = random.Random(args.seed)
        self.reference: dict[str, bytes] = {}
        self.duration = 0.0
        self.kills = self.lines_before = 0
        self.moments: Counter[str] = Counter()
        self.num_runs: list[int] = []
        self.leftovers: Counter[str] = Counter()

    def run(self) -> None:
        """Make the reference, kill, and bring the extraction that was killed last to its end.

        Raises:
            WrongError: something is not as it must be.
        """
        start = time.monotonic()
        process = self._start()
        self._wait(process)
        self.duration = time.monotonic() - start
        self.reference = self._visible()
        self._delete()
        while self.kills < self.args.kills:
            self._extraction()

    def summary(self) -> str:
        """Say what was found."""
        moments = ", ".join(f"{count} {moment}" for moment, count in self.moments.most_common())
        runs = f"{min(self.num_runs)} to {max(self.num_runs)}" if self.num_runs else "no"
        left = ", ".join(f"{name} {count} times" for name, count in self.leftovers.most_common())
        return (
            f"{len(self.manifest)} files, {sum(self.manifest.num_samples) / 16_000 / 60:.1f} minutes, "
            f"{self.num_batches} batches of {self.args.batch_seconds:g} s, OMP_NUM_THREADS={self.args.threads}, seed "
            f"{self.args.seed}; an undisturbed run takes {self.duration:.1f} s\n"
            f"{self.kills} kills: {moments}\n"
            f"{len(self.num_runs)} complete extractions, of {runs} runs each: all byte-identical to the undisturbed "
            f"one\nhidden files left beside complete shards: {left or 'none'}"
        )

    def _extraction(self) -> None:
        """Run the command until it comes to its end, killing it while there are kills to make."""
        runs = 0
        while True:
            runs += 1
            self.lines_before = self._journal_lines()
            process = self._start()
            try:
                self._wait_for_the_moment(process)
            finally:
                process.kill()
                process.wait()
            if process.returncode != -signal.SIGKILL:
                break
            self.kills += 1
            self._check_killed()
        if (found := self._visible()) != self.reference:
            raise WrongError(f"other bytes: {_sizes(found)}, expected {_sizes(self.reference)}")
        self.num_runs.append(runs)
        self.leftovers.update(re.sub(r"\d+$", "PID", path.name) for path in self.shard.glob(".*"))
        self._delete()

    def _start(self) -> subprocess.Popen:
        with open(self.log, "wb") as log:
            return subprocess.Popen(self.command, env=self.environment, stdout=log, stderr=subprocess.STDOUT)

    def _wait_for_the_moment(self, process: subprocess.Popen) -> None:
        kind = self.random.randrange(8)
        if self.kills == self.args.kills:
            self._wait(process)
        elif kind < 5:
            self._wait(process, lines=max(1, self.lines_before) + 1)
            self._wait(process, self.random.uniform(0, self.args.within))
        elif kind == 5:
            self._wait(process, lines=1 + self.num_batches)
            self._wait(process, self.random.uniform(0, 0.02))
        else:
            self._wait(process, self.random.uniform(0, self.duration))

    def _wait(self, process: subprocess.Popen, seconds: float = float("inf"), lines: float = float("inf")) -> None:
        """Wait for so many seconds, so many lines in the journal, or the process's end."""
        end = time.monotonic() + seconds
        while process.poll() is None and time.monotonic() < end and self._kept_lines() < lines:
            time.sleep(0.0005)
        if process.returncode:
            raise WrongError(f"a run failed: {self.log.read_text(errors='replace')[-2000:]}")

    def _check_killed(self) -> None:
        lines = self._kept_lines()
        try:
            FeatureShards(self.shard)
        except RepCodecError:
            if self._visible():
                self.moments["while the files were put in place"] += 1
            elif lines == 1 + self.num_batches:
                self.moments["after the last batch"] += 1
            elif lines > max(1, self.lines_before):
                self.moments["after some batches of this run"] += 1
            else:
                self.moments["before this run's first batch"] += 1
            return
        if (found := self._visible()) != self.reference:
            raise WrongError(f"a half-written shard can be opened: {_sizes(found)}")
        self.moments["when the shard was there"] += 1

    def _kept_lines(self) -> int:
        """Count the journal's lines, and see that they are no fewer than before: it goes when the shard is there."""
        lines = self._journal_lines()
        if lines < self.lines_before and not (self.shard / "0_1.npy").exists():
            raise WrongError(f"the journal had {self.lines_before} lines and now has {lines}")
        return lines

    def _journal_lines(self) -> int:
        """Count the whole lines: one that says what the shard is, and one a batch."""
        try:
            return (self.shard / ".0_1.journal").read_bytes().count(b"\n")
        except FileNotFoundError:
            return 0

    def _visible(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.shard.glob("[!.]*")}

    def _delete(self) -> None:
        for path in self.shard.iterdir():
            path.unlink()


def _sounds(audio: str | None, cache: Path) -> Manifest:
    if audio is not None:
        return make_manifest(audio)
    build_corpus(cache / "demo")
    return Manifest.read(cache / "demo" / "train.tsv")


def _sizes(content: dict[str, bytes]) -> str:
    return ", ".join(f"{name} of {len(data)} bytes" for name, data in sorted(content.items()))


if __name__ == "__main__":
    sys.exit(main())
