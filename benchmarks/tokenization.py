"""How fast does `repcodec tokenize` make codes, against plain convolutions? Prints the ratio of medians and of memory.

    python benchmarks/tokenization.py                  # width 768, lengths as in LibriSpeech dev-clean
    python benchmarks/tokenization.py --dim 1024 --minutes 8 --runs 7

Both ways run in turn, each run in a process of its own that warms up first, on the same feature shards and the same
saved codec of the published shape (random weights: speed does not depend on them; its codes are frames' own vectors, so
that they are all in use):

    plain     features -> encoder stack -> projector -> nearest code, with plain Conv1d, one utterance at a time in file
              order, float32
    tokenize  `write_tokens`, what `repcodec tokenize` runs: shards read, codes made, the tokens file written

Codes are compared; where they differ, the two nearest codes' distances, computed in float64, say whether it is a tie.
The peak of memory is that of each process; the plain one has the whole codec in memory.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from repcodec.codec import RepCodec
from repcodec.shard_writer import write_shard
from repcodec.shards import FeatureShards
from repcodec.tokenization import FeatureSource, describe, write_tokens
from repcodec.tokens import read_tokens

LENGTHS = [
    *(98, 113, 123, 131, 139, 146, 154, 163, 171, 183, 192, 201, 214, 222, 232, 240, 249, 262, 275, 289, 302, 317),
    *(332, 345, 362, 376, 396, 413, 432, 451, 470, 495, 516, 546, 582, 634, 700, 777, 877, 1149),
]
"""Frames of LibriSpeech dev-clean's utterances: 40 quantiles."""


def main() -> None:
    """Time both ways in turn and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=768, help="feature width (default 768)")
    parser.add_argument("--minutes", type=float, default=10.0, help="of speech (default 10)")
    parser.add_argument("--runs", type=int, default=5, help="of each way (default 5)")
    parser.add_argument("--device", default="cpu", help="(default cpu)")
    parser.add_argument("--hours", type=float, help="instead: one utterance so long, and the peak of memory alone")
    parser.add_argument("--one", nargs=2, metavar=("WAY", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(run(args.one[0], Path(args.one[1]), args.device)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.hours:
            prepare(folder, args.dim, [round(args.hours * 180_000)])
            found = in_process("tokenize", folder, args.device)
            print(f"{args.hours:g} hours in one utterance, width {args.dim}: {found['rate']:.0f} frames a second, "
                  f"peak {found['peak']:.0f} MiB")  # fmt: skip
            return
        frames = prepare(folder, args.dim, lengths(args.minutes))
        results: dict[str, list[dict]] = {"plain": [], "tokenize": []}
        for number in range(args.runs):
            for way, found in results.items():
                found.append(in_process(way, folder, args.device))
                print(f"run {number + 1}, {way}: {found[-1]['rate']:.0f} frames a second", flush=True)
        print(f"width {args.dim}, {frames} frames, {args.runs} runs each, {torch.get_num_threads()} threads")
        for way, found in results.items():
            rates = [one["rate"] for one in found]
            print(f"{way:9} {statistics.median(rates):6.0f} frames a second ({min(rates):.0f} to {max(rates):.0f}), "
                  f"peak {statistics.median(one['peak'] for one in found):.0f} MiB")  # fmt: skip
        for what, key in (("speed", "rate"), ("peak memory", "peak")):
            plain, ours = (statistics.median(one[key] for one in results[way]) for way in ("plain", "tokenize"))
            print(f"{what}: {ours / plain:.2f} times the plain way's")
        print(compare(folder))


def lengths(minutes: float) -> list[int]:
    """Return utterances' frames, of LibriSpeech's lengths in random order, together as long as asked for."""
    rng, found = np.random.default_rng(0), []
    while sum(found) < minutes * 3000:
        found += rng.permutation(LENGTHS).tolist()
    return found


def prepare(folder: Path, dim: int, num_frames: list[int]) -> int:
    """Write feature shards and a codec; return the number of frames."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    with write_shard(folder / "features", 0, 1, dim, {"root": "/audio", "frame_rate": 50}) as shard:
        for i, length in enumerate(num_frames):
            shard.append(f"{i}.flac", rng.standard_normal((length, dim), dtype=np.float32))
    codec = RepCodec(dim).eval()
    for name, parameter in codec.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, 0, 0.3)
    with torch.no_grad():
        vectors = codec.vectors(torch.from_numpy(rng.standard_normal((1, 2048, dim), dtype=np.float32)))
        codec.quantizer.codebooks[0].codes.copy_(vectors[::2])
    codec.save_pretrained(folder / "codec", {"frame_rate": 50})
    return sum(num_frames)


def in_process(way: str, folder: Path, device: str) -> dict:
    """Run one way in a process of its own; return frames a second and the peak of memory in MiB."""
    command = [sys.executable, __file__, "--one", way, str(folder), "--device", device]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def run(way: str, folder: Path, device: str) -> dict:
    """Load, warm up, tokenize; the plain way's codes go to plain.npy, the other's to out.tokens."""
    codec = RepCodec.from_pretrained(folder / "codec").to(device)
    shards = FeatureShards(folder / "features")
    warm = torch.zeros(2, 900, codec.dim, device=device)
    with torch.inference_mode():
        codec.encode(warm) if way == "tokenize" else plain(codec, warm[:1])
    if way == "plain":  # the whole codec comes into memory, not only what the encoder maps from the file
        assert all(bool(value.isfinite().all()) for value in codec.state_dict().values())
    start = time.perf_counter()
    if way == "tokenize":
        path = folder / "out.tokens"
        path.unlink(missing_ok=True)
        write_tokens(codec, FeatureSource(shards), describe(codec, None), path)
    else:
        with torch.inference_mode():
            codes = [plain(codec, torch.from_numpy(shards.read(i)).to(device)[None]).cpu() for i in range(len(shards))]
        np.save(folder / "plain.npy", torch.cat(codes).numpy())
    seconds = time.perf_counter() - start
    # Not getrusage: its peak begins with what the parent had.
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return {"rate": int(shards.lengths.sum()) / seconds, "peak": int(status["VmHWM"].split()[0]) / 1024}


def plain(codec: RepCodec, features: Tensor) -> Tensor:
    """(1, T, D) features -> codes (T,), by the published layers and nothing else."""

    def conv(layer: nn.Conv1d, x: Tensor) -> Tensor:
        return nn.functional.conv1d(x, layer.weight, layer.bias, padding=layer.padding)

    elu, stack = nn.functional.elu, codec.encoder
    x = conv(stack.input, features.mT)
    for stage in stack.stages:
        for unit in stage.residuals:
            x = x + conv(unit.pointwise, elu(conv(unit.conv, elu(x))))
        x = conv(stage.conv, x)
    z, codes = conv(stack.projector, x)[0].T, codec.quantizer.codebooks[0].codes
    return (z.square().sum(1, keepdim=True) - 2 * z @ codes.T + codes.square().sum(1)).argmin(1)


def compare(folder: Path) -> str:
    """Say how many codes of the two ways differ, and how many of those are no ties."""
    reference = np.load(folder / "plain.npy")
    found = np.concatenate([tokens.codes[0] for tokens in read_tokens(folder / "out.tokens")])
    shards, exact = FeatureShards(folder / "features"), RepCodec.from_pretrained(folder / "codec").double()
    codes, differ, no_ties, first = exact.quantizer.codebooks[0].codes, 0, 0, 0
    for utterance, length in enumerate(shards.lengths.tolist()):
        wrong = np.flatnonzero(found[first : first + length] != reference[first : first + length])
        first += length
        if len(wrong):
            with torch.no_grad():
                z = exact.vectors(torch.from_numpy(shards.read(utterance)).double()[None])[wrong]
            best, second = torch.cdist(z, codes).square().topk(2, largest=False).values.T
            differ += len(wrong)
            no_ties += int(((second - best) / best >= 1e-5).sum())
    return f"codes: {differ} of {len(reference)} differ, of which {no_ties} are no ties"


if __name__ == "__main__":
    main()
