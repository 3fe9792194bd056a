"""Does `experiment=fast` win, and what does each of its ingredients give? Draws the curves and prints the table.

    python benchmarks/recipes.py --features cache/demo/features/whisper_tiny_en/l3 --encoder whisper_tiny_en
    python benchmarks/recipes.py --features features/hubert_base/l9 --encoder hubert_base --without trainer=gpu

Every run is `train.py` itself, in a folder of its own below --out; a finished one is not run again, one that was
stopped goes on. The published recipe and the winning one are trained with every seed; with --without also the winning
one without one ingredient at a time, with the first seed.

The table says at which step a run first reaches the error that the published recipe has at its end, and how many codes
the whole corpus (all three splits) uses at the end.
"""

import argparse
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import torch

from repcodec.codec import RepCodec
from repcodec.logs import read_validations
from repcodec.packing import encode_packed
from repcodec.shards import FeatureShards

TRAIN = Path(__file__).parent.parent / "train.py"
WITHOUT = {
    "k-means start": ["callbacks.start.kmeans=false"],
    "start as identity": ["callbacks.start.identity=false"],
    "commitment weight 45": ["module.commitment_weight=1"],
    "decay 0.95": ["quantizer.decay=0.8"],
    "revival of unused codes": ["quantizer.revive_below=0"],
    "learning rate 1e-3": ["optimizer.lr=1e-4"],
    "cosine schedule": ["scheduler=constant"],
}
"""The ingredients of conf/experiment/fast.yaml, and what takes each out."""


def main() -> None:
    """Train what is not trained yet, then draw and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=Path, required=True, help="folder of the splits train, valid and test")
    parser.add_argument("--encoder", required=True, help="conf/encoder's name of the speech encoder")
    parser.add_argument("--layer", type=int, help="of the features (default: the encoder's)")
    parser.add_argument("--steps", type=int, default=2000, help="of the published recipe (default 2000)")
    parser.add_argument("--fast-steps", type=int, default=800, help="of the winning one (default 800)")
    parser.add_argument("--batch", type=int, default=16, help="crops a batch (default 16)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(default 0 1 2)")
    parser.add_argument("--without", action="store_true", help="also leave each ingredient out")
    parser.add_argument("overrides", nargs="*", help="of train.py in every run, as trainer=gpu")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side (default 1)")
    parser.add_argument("--out", type=Path, default=Path("outputs/recipes"), help="(default outputs/recipes)")
    args = parser.parse_args()

    recipes = {"published": [f"trainer.max_steps={args.steps}"]}
    recipes["winning"] = ["experiment=fast", f"trainer.max_steps={args.fast_steps}"]
    runs = [(name, overrides, seed) for name, overrides in recipes.items() for seed in args.seeds]
    if args.without:
        runs += [(f"without {what}", recipes["winning"] + off, args.seeds[0]) for what, off in WITHOUT.items()]
    folders = [args.out / f"{name.replace(' ', '-')}-{seed}" for name, _, seed in runs]
    failed = Event()
    with ThreadPoolExecutor(args.jobs) as pool:
        made = [pool.submit(train, args, failed, *run[1:], folder) for run, folder in zip(runs, folders, strict=True)]
        try:
            for one in made:
                one.result()
        finally:
            failed.set()
    found: dict[str, list[dict[int, float]]] = {}
    used: dict[str, list[float]] = {}
    for (name, _, _), folder in zip(runs, folders, strict=True):
        found.setdefault(name, []).append(curve(folder))
        used.setdefault(name, []).append(codes_used(folder / "codec", args.features))
        print(f"{folder}: {list(found[name][-1].values())[-1]:.4f} at the end", flush=True)
    draw(found, args.out / "curves.svg")
    print(table(found, used))
    print(f"curves: {args.out / 'curves.svg'}")


def train(args: argparse.Namespace, failed: Event, overrides: list[str], seed: int, folder: Path) -> None:
    """Run train.py, or go on with a run that was stopped; its own output goes to the folder's log.

    Once one run has failed, none begins any more.
    """
    done = folder / "done"
    if done.exists() or failed.is_set():
        return
    folder.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable, str(TRAIN), f"encoder={args.encoder}", f"data.dir={args.features}",
        f"hydra.run.dir={folder}", f"run={folder.name}", f"seed={seed}", f"data.batch_size={args.batch}", "logger=csv",
        "trainer.val_check_interval=50", "ckpt_path=last", *overrides, *args.overrides,
    ]  # fmt: skip
    if args.layer is not None:
        command.append(f"layer={args.layer}")
    with open(folder / "train.log", "a", encoding="utf-8") as log:
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode
    if code != 0:
        failed.set()  # now, not when the main thread comes to this run
        raise SystemExit(f"{folder / 'train.log'} ends with exit code {code}; mend that, then start again.")
    done.touch()


def curve(folder: Path) -> dict[int, float]:
    """Return the validation error at each step."""
    return {int(row["step"]): row["valid/normalized_error"] for row in read_validations(folder / "validations.csv")}


def codes_used(folder: Path, features: Path) -> float:
    """Return the share of codes that some frame of the corpus has."""
    codec, counts = RepCodec.from_pretrained(folder), None
    for split in ("train", "valid", "test"):
        shards = FeatureShards(features / split)
        rows = (torch.from_numpy(shards.read(i)) for i in range(len(shards)))
        for codes in encode_packed(codec, rows):
            new = torch.bincount(codes[:, 0], minlength=codec.codebook_size)
            counts = new if counts is None else counts + new
    assert counts is not None
    return float((counts > 0).double().mean())


def table(found: dict[str, list[dict[int, float]]], used: dict[str, list[float]]) -> str:
    """Return a Markdown table, medians over seeds and their range."""
    goal = statistics.median(list(run.values())[-1] for run in found["published"])
    lines = [
        f"| recipe | seeds | normalized error at the end | first step at {goal:.4f} or below | codes used |",
        "|---|---|---|---|---|",
    ]
    for name, runs in found.items():
        ends = [list(run.values())[-1] for run in runs]
        first = [next((step for step, error in run.items() if error <= goal), None) for run in runs]
        shown = ", ".join("never" if step is None else str(step) for step in first)
        spread = f" ({min(ends):.3f} to {max(ends):.3f})" if len(ends) > 1 else ""
        lines.append(
            f"| {name} | {len(runs)} | {statistics.median(ends):.3f}{spread} at step {max(runs[0])} | {shown} | "
            f"{100 * min(used[name]):.0f} % |"
        )
    return "\n".join(lines)


def draw(found: dict[str, list[dict[int, float]]], path: Path) -> None:
    """Draw every run's validation error over its steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    colours = {"published": "tab:gray", "winning": "tab:blue"}
    for name, runs in found.items():
        for number, run in enumerate(runs):
            axes.plot(
                list(run), list(run.values()), color=colours.get(name), linewidth=2 if name in colours else 1,
                linestyle="-" if name in colours else "--", label=name if number == 0 else None,
            )  # fmt: skip
    axes.set(xlabel="step", ylabel="normalized error of the validation set", ylim=(0, 1.05))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path)


if __name__ == "__main__":
    main()
