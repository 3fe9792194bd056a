"""What does each quantizer make of the same features? Trains all of them side by side and prints a Markdown table.

    python benchmarks/quantizers.py                    # the demo's features, which `make demo` leaves in cache/
    python benchmarks/quantizers.py --features features/hubert_base/l9 --encoder hubert_base --labels phones.tsv

Every quantizer is an option of conf/quantizer/ in the recipe `experiment=fast`, with its own codec; all see the same
batches, and take each step in turn, so that what else the machine does slows all alike. A step is forward, backward,
codebook update and optimizer; its time is the median, also as a multiple of ema's. The figures are those of
evaluate.py, after the last step.
"""

import argparse
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig

from repcodec.data import SAMPLE_FRAMES, Batch, FeaturesDataModule
from repcodec.evaluation import Evaluation
from repcodec.metrics import reconstruction_loss
from repcodec.module import CodecModule
from repcodec.results import Row
from repcodec.stacks import frame_mask

CONF = Path(__file__).parent.parent / "conf"
QUANTIZERS = ["ema", "ema_revived", "rotation", "simvq", "fsq", "lfq", "rvq"]


def main() -> None:
    """Train, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    demo = Path("cache/demo")
    features = demo / "features" / "whisper_tiny_en" / "l3"
    parser.add_argument("--features", type=Path, default=features, help=f"folder of the splits (default {features})")
    parser.add_argument("--encoder", default="whisper_tiny_en", help="conf/encoder's name (default whisper_tiny_en)")
    parser.add_argument("--layer", type=int, help="of the features (default: the encoder's)")
    parser.add_argument("--labels", help="phone labels, for PNMI (default: the demo's, of the demo's features)")
    parser.add_argument("--quantizers", nargs="+", default=QUANTIZERS, help=f"(default {' '.join(QUANTIZERS)})")
    parser.add_argument("--steps", type=int, default=500, help="(default 500)")
    parser.add_argument(
        "--start-frames", type=int, default=SAMPLE_FRAMES, help="that k-means sees (default %(default)s)"
    )
    parser.add_argument("--batch", type=int, default=16, help="crops of 96 frames (default 16)")
    args = parser.parse_args()
    if args.labels is None and args.features == features:
        args.labels = str(demo / "phones.tsv")

    configs = {name: configuration(args, name) for name in args.quantizers}
    data = instantiate(next(iter(configs.values())).data)
    runs = {}
    for name, config in configs.items():
        runs[name] = Run(config, data, args.start_frames)
        print(f"{name}: started", file=sys.stderr, flush=True)
    for number, batch in enumerate(batches(data, args.steps), start=1):
        losses = {name: run.step(batch) for name, run in runs.items()}
        if number % 50 == 0 or number == args.steps:
            print(f"step {number}:", *(f"{name} {loss:.3f}" for name, loss in losses.items()), file=sys.stderr)
    evaluation = Evaluation(data)
    rows = {name: evaluation.measure(run.codec.eval(), name).row for name, run in runs.items()}
    print(table(rows, {name: statistics.median(run.seconds) for name, run in runs.items()}))
    print(f"{args.steps} steps, {args.batch} x 96 frames, width {data.dim}, {torch.get_num_threads()} threads")


def configuration(args: argparse.Namespace, quantizer: str) -> DictConfig:
    """Compose what train.py would."""
    overrides = [
        "experiment=fast", f"encoder={args.encoder}", f"quantizer={quantizer}", f"data.dir='{args.features}'",
        f"data.batch_size={args.batch}", f"trainer.max_steps={args.steps}", "run_dir=.", "run=benchmark",
        f"data.labels='{args.labels}'" if args.labels else "data.labels=null",
    ]  # fmt: skip
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", overrides + ([f"layer={args.layer}"] if args.layer else []))


def batches(data: FeaturesDataModule, steps: int) -> Iterator[Batch]:
    """Yield as many training batches, epoch after epoch."""
    loader, given = data.train_dataloader(), 0
    while True:
        for batch in loader:
            if given == steps:
                return
            yield batch
            given += 1


class Run:
    """One quantizer's codec in training: as `CodecStart` starts it and `CodecModule` takes steps.

    Attributes:
        codec: what is trained.
        seconds: of every step.
    """

    def __init__(self, config: DictConfig, data: FeaturesDataModule, start_frames: int):
        torch.manual_seed(config.seed)
        self.module: CodecModule = instantiate(config.module)
        self.codec, self.seconds = self.module.codec, list[float]()
        statistics_ = data.statistics
        self.codec.feature_mean.copy_(statistics_.mean)
        self.codec.feature_scale.fill_(statistics_.scale)
        self.codec.start_as_identity()
        with torch.no_grad():
            frames = torch.from_numpy(data.train.sample(start_frames))
            self.codec.quantizer.start(self.codec.vectors(frames[None]), data.seed)
        self.optimizer = self.module.optimizer(self.codec.parameters())
        self.scheduler = self.module.scheduler(self.optimizer)

    def step(self, batch: Batch) -> float:
        """Take a step; return its loss."""
        began = perf_counter()
        output = self.codec(batch.features, None if batch.full else batch.lengths)
        mask = None if batch.full else frame_mask(batch.lengths, batch.features.shape[1])
        error = reconstruction_loss(output.reconstruction, batch.features, mask, "l2")
        loss = self.module.weights["reconstruction"] * error / self.codec.feature_scale.square()
        loss = loss + self.module.weights["commitment"] * output.quantizer.loss
        self.optimizer.zero_grad()
        loss.backward()
        self.codec.quantizer.update()
        self.optimizer.step()
        self.scheduler.step()
        self.seconds.append(perf_counter() - began)
        return loss.item()


def table(rows: dict[str, Row], seconds: dict[str, float]) -> str:
    """Return the Markdown table."""
    lines = [
        "| quantizer | codes | normalized error | perplexity | codes used | PNMI | bits a second | ms a step |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        codes = f"{row.num_codebooks} x {row.codebook_size}" if row.num_codebooks > 1 else f"{row.codebook_size}"
        pnmi = "" if row.pnmi is None else f"{row.pnmi:.3f}"
        times = f" ({seconds[name] / seconds['ema']:.2f} x)" if "ema" in seconds else ""
        lines.append(
            f"| {name} | {codes} | {row.normalized_error:.4f} | {row.perplexity:.0f} | {row.used_share:.0%} | {pnmi} "
            f"| {row.bits_per_second:.0f} | {1000 * seconds[name]:.0f}{times} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
