"""How fast is a training step, against a plain one of the published codec? Prints the ratios of medians and of memory.

    python benchmarks/train.py                          # widths 768, 1024 and 1280, 32 x 96 frames, float32
    python benchmarks/train.py --dims 1280 --steps 5

Two processes, one a way, take steps in turn, on random features; each takes a step to warm up first:

    plain   the published step, plainly: Conv1d on unpadded crops, a one-hot (N, V) matrix for the moving averages,
            45 x mean squared error + commitment loss, Adam as PyTorch chooses to run it
    ours    `lightning.Trainer.fit` of the published recipe as `train.py` runs it: crops out of feature shards, masks,
            losses, metrics, logging, the codebook's update, Adam, fused

Memory is the peak of each process; on a GPU that of the device. There it goes on with frames a second of our step in
float32, tf32 and bf16, compiled or not, and the share of the card's matrix rate that the step's products make up
(`--device` tries that part anywhere).
"""

import argparse
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import LambdaCallback
from torch import Tensor, nn

from repcodec.codec import RepCodec
from repcodec.data import ShardsDataModule
from repcodec.module import CodecModule
from repcodec.shard_writer import write_shard

BATCH, CROP, CODES = 32, 96, 1024
ADAM = partial(torch.optim.Adam, lr=1e-4, betas=(0.5, 0.9))  # conf/optimizer/adam.yaml fuses it
CUDA = torch.cuda.is_available()
PRECISIONS = {"float32": ("32-true", "highest"), "tf32": ("32-true", "high"), "bf16": ("bf16-mixed", "highest")}
"""Lightning's precision, and what PyTorch's products of float32 matrices may round to."""


def main() -> None:
    """Time both ways in turn and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", type=int, nargs="+", default=[768, 1024, 1280], help="widths (default: all three)")
    parser.add_argument("--steps", type=int, default=11, help="of each way (default 11)")
    parser.add_argument("--device", action="store_true", help="only the table of precisions")
    parser.add_argument("--deterministic", action="store_true", help="there with +trainer.deterministic=warn")
    parser.add_argument("--one", nargs=2, metavar=("WAY", "DIM"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        {"plain": plain_steps, "ours": our_steps}[args.one[0]](int(args.one[1]), 1 + args.steps, Answers().between)
        return
    for dim in args.dims:
        if not args.device:
            compare(dim, args.steps)
        if CUDA or args.device:
            for precision in PRECISIONS:
                for compiled in (False, True):
                    print(device_rate(dim, precision, compiled, args.steps, args.deterministic), flush=True)


def compare(dim: int, num_steps: int) -> None:
    """Let both ways take steps in turn, each in a process of its own; print both and their ratios."""
    ways = ("plain", "ours")
    servers = {
        way: subprocess.Popen(
            [sys.executable, __file__, "--one", way, str(dim), "--steps", str(num_steps)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for way in ways
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    peaks: dict[str, float] = {}
    for _ in range(1 + num_steps):
        for way, server in servers.items():
            assert server.stdin is not None and server.stdout is not None
            server.stdin.write("step\n")
            server.stdin.flush()
            found = json.loads(server.stdout.readline())
            seconds[way].append(found["seconds"])
            peaks[way] = found["peak"]
    for server in servers.values():
        server.communicate()
    for way in ways:
        times = seconds[way][1:]
        print(f"width {dim}, {way:5}: {statistics.median(times):.4g} s a step ({min(times):.4g} to {max(times):.4g}), "
              f"{BATCH * CROP / statistics.median(times):.0f} frames a second, peak {peaks[way]:.0f} MiB")  # fmt: skip
    plain, ours = (statistics.median(seconds[way][1:]) for way in ways)
    memory = peaks["ours"] / peaks["plain"]
    print(f"width {dim}: ours takes {ours / plain:.3f} of the plain step's time, {memory:.3f} of its memory ("
          f"{num_steps} steps each, {torch.get_num_threads()} threads)", flush=True)  # fmt: skip


class Answers:
    """Waits for a line of the standard input before each step; answers with its seconds and the peak of memory."""

    start: float | None = None

    def between(self) -> None:
        """Call this before the first step and after every one."""
        if CUDA:
            torch.cuda.synchronize()
        if self.start is not None:
            print(json.dumps({"seconds": time.perf_counter() - self.start, "peak": peak_memory()}), flush=True)
        if not sys.stdin.readline():
            raise SystemExit  # all steps that were asked for are taken
        self.start = time.perf_counter()


def peak_memory() -> float:
    """Return the peak of this process's memory, on a GPU the device's, in MiB."""
    if CUDA:
        return torch.cuda.max_memory_allocated() / 2**20
    # Not getrusage: its peak begins with what the parent had.
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) / 1024


class Residual(nn.Module):
    """x + conv1x1(ELU(conv3(ELU(x))))."""

    def __init__(self, dim: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.ELU(), nn.Conv1d(dim, dim, 3, padding=1, bias=False), nn.ELU(), nn.Conv1d(dim, dim, 1, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, T) -> the same."""
        return x + self.layers(x)


def plain_steps(dim: int, num_steps: int, between: Callable[[], None]) -> None:
    """Train the plain codec; `between` is called before the first step and after every one."""
    torch.manual_seed(0)
    device = "cuda" if CUDA else "cpu"

    def conv(bias: bool = False) -> nn.Conv1d:
        return nn.Conv1d(dim, dim, 3, padding=1, bias=bias)

    def stages(conv_first: bool) -> Iterator[nn.Module]:
        for _ in range(2):
            units = [Residual(dim), Residual(dim)]
            yield from [conv(bias=True), *units] if conv_first else [*units, conv(bias=True)]

    encoder = nn.Sequential(conv(), *stages(conv_first=False), conv()).to(device)
    decoder = nn.Sequential(conv(), *stages(conv_first=True), conv()).to(device)
    codes = torch.randn(dim, CODES, device=device)
    sums, counts = codes.clone(), torch.zeros(CODES, device=device)
    optimizer = ADAM([*encoder.parameters(), *decoder.parameters()])
    corpus = torch.randn(64, 200, dim)
    between()
    for _ in range(num_steps):
        batch = torch.stack([corpus[i, i : i + CROP] for i in torch.randperm(len(corpus))[:BATCH].tolist()])
        features = batch.to(device).mT
        z = encoder(features)
        rows = z.mT.reshape(-1, dim)
        with torch.no_grad():
            distances = rows.square().sum(1, keepdim=True) - 2 * rows @ codes + codes.square().sum(0, keepdim=True)
            chosen = distances.argmin(1)
            one_hot = nn.functional.one_hot(chosen, CODES).type(rows.dtype)
            vectors = nn.functional.embedding(chosen, codes.T).view(BATCH, CROP, dim).mT
            counts.mul_(0.8).add_(one_hot.sum(0), alpha=0.2)
            sums.mul_(0.8).add_(rows.T @ one_hot, alpha=0.2)
            smoothed = (counts + 1e-5) / (counts.sum() + CODES * 1e-5) * counts.sum()
            codes = sums / smoothed
        commitment = nn.functional.mse_loss(vectors, z)
        reconstruction = nn.functional.mse_loss(decoder(z + (vectors - z).detach()), features)
        optimizer.zero_grad()
        (45 * reconstruction + commitment).backward()
        optimizer.step()
        between()


def our_steps(
    dim: int,
    num_steps: int,
    between: Callable[[], None],
    precision: str = "32-true",
    compiled: bool = False,
    deterministic: bool = False,
) -> None:
    """Train as `train.py` does, in the published recipe; `between` as in `plain_steps`."""
    warnings.filterwarnings("ignore")  # as to workers, intervals and a missing validation, in every round again
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    L.seed_everything(0, verbose=False)
    constant = partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=lambda step: 1.0)
    with tempfile.TemporaryDirectory() as name:
        rng = np.random.default_rng(0)
        for split, number in (("train", 64), ("valid", 1)):
            with write_shard(Path(name) / split, 0, 1, dim, {"root": "/audio", "frame_rate": 50}) as shard:
                for i in range(number):
                    shard.append(f"{i}.flac", rng.standard_normal((200, dim), dtype=np.float32))
        data = ShardsDataModule(
            dim=dim, encoder="hubert_base", layer=9, dir=name, batch_size=BATCH, crop=CROP, num_workers=2
        )
        timer = LambdaCallback(on_train_start=lambda *_: between(), on_train_batch_end=lambda *_: between())
        trainer = L.Trainer(
            accelerator="gpu" if CUDA else "cpu", devices=1, precision=precision, max_steps=num_steps,
            deterministic="warn" if deterministic else None,
            limit_val_batches=0, log_every_n_steps=50, use_distributed_sampler=False, callbacks=[timer],
            logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            default_root_dir=name,
        )  # fmt: skip
        trainer.fit(CodecModule(RepCodec(dim), partial(ADAM, fused=True), constant, compile=compiled), data)


def device_rate(dim: int, precision: str, compiled: bool, num_steps: int, deterministic: bool) -> str:
    """Return a line: frames a second of our step, and its share of the device's matrix rate."""
    device = torch.device("cuda" if CUDA else "cpu")
    lightning_precision, products = PRECISIONS[precision]
    torch.set_float32_matmul_precision(products)
    torch.backends.cudnn.allow_tf32 = precision == "tf32"  # the convolutions'
    times: list[float] = []

    def between() -> None:
        if CUDA:
            torch.cuda.synchronize()
        times.append(time.perf_counter())

    our_steps(dim, 3 + num_steps, between, lightning_precision, compiled, deterministic)
    seconds = statistics.median(after - before for before, after in pairwise(times[3:]))
    frames, weights = BATCH * CROP, sum(p.numel() for p in RepCodec(dim).parameters() if p.dim() == 3)
    # A product with each weight forward, two backward, and one with the codebook; two operations each.
    operations = frames * 2 * (3 * weights + CODES * dim)
    rate = matrix_rate(device, torch.bfloat16 if precision == "bf16" else torch.float32)
    return (f"width {dim}, {precision:7}, {'compiled' if compiled else 'eager':8}: {frames / seconds:9.0f} frames a "
            f"second, {operations / seconds / rate:.2f} of the matrix rate, {rate / 1e12:.3g} TFLOP/s")  # fmt: skip


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return operations a second of a large product of matrices."""
    size = 8192 if device.type == "cuda" else 1024
    one, other = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        if CUDA:
            torch.cuda.synchronize()
        start = time.perf_counter()
        one @ other
        if CUDA:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


if __name__ == "__main__":
    main()
