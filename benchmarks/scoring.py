"""How much memory and time does scoring a tokens file of 1,000 hours take, and do two processes find the same?

    python benchmarks/scoring.py                       # 1,000 hours, 180 million codes; needs 2.5 GB of disk
    python benchmarks/scoring.py --hours 10 --processes 1 2

Utterances of 12 seconds, 50 codes a second, and phones of 30 to 150 milliseconds are drawn at random, the codes so that
they say something about the phone. `evaluate.py` scores them in one process, then in several, each time anew. Printed
are the seconds and the largest memory of any process; the exit code is 1 where the results differ.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

EVALUATE = Path(__file__).parent.parent / "evaluate.py"
SECONDS, RATE, NUM_PHONES, NUM_CODES = 12, 50, 40, 1024


def main() -> int:
    """Make the files, score them, compare; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=float, default=1000, help="of speech (default 1000)")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="to score with (default 1 2)")
    parser.add_argument("--folder", type=Path, help="for the files, kept (default: a temporary one)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        num_codes = make(folder, round(args.hours * 3600 / SECONDS))
        found = []
        for processes in args.processes:
            rows, seconds, memory = score(folder, processes)
            found.append(rows)
            print(
                f"{num_codes:,} codes, {processes} process{'es' * (processes > 1)}: {seconds:.0f} s, at most "
                f"{memory / 2**20:.2f} GiB in one, PNMI {rows[0]['pnmi']:.4f}, perplexity {rows[0]['perplexity']:.1f}",
                flush=True,
            )
    same = all(equal(other, found[0]) for other in found[1:])
    print("all the same" if same else "the results DIFFER")
    return 0 if same else 1


def make(folder: Path, num_utterances: int) -> int:
    """Write codes.tokens and phones.tsv; return the number of codes."""
    rng, frames = np.random.default_rng(0), SECONDS * RATE
    with open(folder / "codes.tokens", "w") as tokens, open(folder / "phones.tsv", "w") as labels:
        tokens.write("/audio\n")
        labels.write("utt\tstart_s\tend_s\tphone\n")
        for n in tqdm(range(num_utterances), desc="Drawing codes", unit="utt", mininterval=5):
            ends = np.cumsum(rng.uniform(0.03, 0.15, SECONDS * 30))
            ends = np.append(ends[ends < SECONDS - 0.01], SECONDS).round(2)
            phones = rng.integers(NUM_PHONES, size=len(ends))
            of_frame = phones[np.searchsorted(ends, (np.arange(frames) + 0.5) / RATE)]
            codes = (of_frame * (NUM_CODES // NUM_PHONES) + rng.geometric(0.02, frames)) % NUM_CODES
            tokens.write(f"speaker{n % 1000}/utt{n}.flac\t{' '.join(map(str, codes.tolist()))}\n")
            starts = [0.0, *ends.tolist()]
            labels.writelines(
                f"utt{n}\t{start:.2f}\t{end:.2f}\tp{phone}\n"
                for start, end, phone in zip(starts, starts[1:], phones.tolist(), strict=False)
            )
    return num_utterances * frames


def score(folder: Path, processes: int) -> tuple[list[dict], float, int]:
    """Run evaluate.py anew; return its rows, seconds, and the largest resident memory of a process in KiB."""
    run_dir = folder / f"run-{processes}"
    shutil.rmtree(run_dir, ignore_errors=True)
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes > 1 else []
    command = [
        sys.executable, *torchrun, str(EVALUATE), f"tokens=['{folder}/codes.tokens']", f"labels='{folder}/phones.tsv'",
        f"codebook_size={NUM_CODES}", f"codes_per_second={RATE}", f"run_dir='{run_dir}'",
    ]  # fmt: skip
    began, largest = time.monotonic(), 0
    with open(folder / "log", "w") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        while process.poll() is None:
            largest = max([largest, *map(resident, family(process.pid))])
            time.sleep(0.2)
    if process.returncode:
        raise SystemExit((folder / "log").read_text()[-2000:])
    return json.loads((run_dir / "results.json").read_text())["rows"], time.monotonic() - began, largest


def family(pid: int) -> list[int]:
    """Return a process and those that it started."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:  # ended just now
        return []
    return [pid, *(found for child in children for found in family(int(child)))]


def resident(pid: int) -> int:
    """Return the largest memory that a process has had so far, KiB."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)


def equal(rows: list[dict], others: list[dict]) -> bool:
    """Say whether results are the same beyond rounding."""
    one, other = (
        json.loads(json.dumps(rows), parse_float=lambda text: f"{float(text):.9g}") for rows in (rows, others)
    )
    return one == other


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
