"""How fast do batches come out of feature shards, against a bare gather? Prints rates and the ratios of medians.

    python benchmarks/data.py                  # width 768, float32 and float16 shards, 0, 1 and 2 threads
    python benchmarks/data.py --dim 1280 --minutes 30 --runs 15

Batches of 32 crops of 96 frames, from warm page cache. All ways run in turn:

    bare gather   rows of one memory-mapped array, at random places, copied into one buffer that is used again and
                  again (converted to float32 on the way, where they are float16): nothing else
    loader, n     `ShardsDataModule(num_workers=n).train_dataloader()`: the sampler, new tensors, zeros behind short
                  utterances, the look for NaN and infinity, n threads that read ahead
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np

from repcodec.data import ShardsDataModule
from repcodec.shard_writer import write_shard

BATCH, CROP = 32, 96


def main() -> None:
    """Time all ways in turn and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=768, help="feature width (default 768)")
    parser.add_argument("--minutes", type=float, default=60.0, help="of speech (default 60: 0.55 GB at width 768)")
    parser.add_argument("--runs", type=int, default=11, help="of each way (default 11)")
    parser.add_argument("--batches", type=int, default=100, help="a run (default 100)")
    args = parser.parse_args()
    for dtype in ("float32", "float16"):
        with tempfile.TemporaryDirectory() as folder:
            num_frames = prepare(Path(folder), args.dim, args.minutes, dtype)
            print(
                f"\n{dtype} shards, width {args.dim}, {num_frames:,} frames, {args.runs} runs of {args.batches} batches"
            )
            ways = {"bare gather": bare_gather(Path(folder) / "train" / "0_1.npy", args.batches)}
            for threads in (0, 1, 2):
                ways[f"loader, {threads}"] = loader(Path(folder), args.dim, threads, args.batches)
            rates: dict[str, list[float]] = {name: [] for name in ways}
            for _ in range(args.runs):
                for name, run in ways.items():
                    start = time.perf_counter()
                    rates[name].append(run() / (time.perf_counter() - start) / 1e6)
            bare = statistics.median(rates["bare gather"])
            print(f"{'':12} {'million frames a second':>24} {'least':>6} {'most':>6} {'of bare':>8}")
            for name, found in rates.items():
                middle = statistics.median(found)
                print(f"{name:12} {middle:24.2f} {min(found):6.2f} {max(found):6.2f} {middle / bare:8.2f}", flush=True)


def prepare(folder: Path, dim: int, minutes: float, dtype: str) -> int:
    """Write a training split with utterances of 1 to 25 seconds; return its number of frames."""
    rng, total = np.random.default_rng(0), 0
    with write_shard(folder / "train", 0, 1, dim, {"root": "/audio", "frame_rate": 50}) as shard:
        while total < minutes * 3000:
            length = int(rng.integers(50, 1250))
            shard.append(f"{total}.flac", rng.standard_normal((length, dim), dtype=np.float32))
            total += length
    path = folder / "train" / "0_1.npy"
    if dtype != "float32":
        np.save(path, np.load(path).astype(dtype))
    return total


def bare_gather(path: Path, num_batches: int) -> Callable[[], int]:
    """Return what gathers so many batches and returns the number of frames."""
    rows = np.asarray(np.load(path, mmap_mode="r"))
    rows.max()  # every page is there
    buffer = np.zeros((BATCH, CROP, rows.shape[1]), dtype=np.float32)
    rng = np.random.default_rng(1)

    def run() -> int:
        for starts in rng.integers(len(rows) - CROP, size=(num_batches, BATCH)).tolist():
            for row, start in enumerate(starts):
                buffer[row] = rows[start : start + CROP]
        return num_batches * BATCH * CROP

    return run


def loader(folder: Path, dim: int, threads: int, num_batches: int) -> Callable[[], int]:
    """Return what takes so many batches out of the training loader and returns the number of frames."""
    data = ShardsDataModule(
        dim=dim, encoder="hubert_base", layer=9, dir=str(folder), batch_size=BATCH, crop=CROP, num_workers=threads
    )
    for utterance in range(len(data.train)):
        data.train.features(utterance).max()
    batches = data.train_dataloader()
    return lambda: sum(int(batch.lengths.sum()) for batch in islice(batches, num_batches))


if __name__ == "__main__":
    main()
