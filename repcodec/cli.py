"""The command `repcodec`: what a user does without Hydra."""

import argparse
import os
import sys

from repcodec.errors import RepCodecError, user_message


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="repcodec",
        description="Speech to discrete tokens. Train with train.py, compare with evaluate.py, use with these.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run, summary: str, *examples: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=summary,
            description=summary,
            epilog="\n  ".join(["example:" if len(examples) == 1 else "examples:", *examples]),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(run=run)
        return sub

    manifest = command(
        "manifest", _manifest,
        "List the sound files below a folder, in the published .tsv format. Unreadable files are listed and left out.",
        "repcodec manifest LibriSpeech/train-clean-100 -o train.tsv",
    )  # fmt: skip
    manifest.add_argument("folder", help="folder of sound files (wav, flac, mp3, ogg, opus, m4a), in any depth")
    manifest.add_argument("-o", "--output", required=True, help="the manifest to write; its stem names the split")
    manifest.add_argument("--strict", action="store_true", help="stop at the first unreadable file instead")

    extract = command(
        "extract", _extract, "Compute a speech encoder's features into ROOT/<encoder>/l<layer>/<manifest's stem>/. "
        "After a kill, the same command goes on.",
        "repcodec extract train.tsv features --encoder hubert_base --layer 9",
        "repcodec extract train.tsv features --encoder whisper_medium --model whisper-medium --device cuda --shard 0/8",
        "repcodec extract train.tsv features --encoder hubert_xlarge --model facebook/hubert-xlarge-ll60k --layer 36",
    )  # fmt: skip
    extract.add_argument("manifest", help="what `repcodec manifest` wrote")
    extract.add_argument("root", help="folder of all features; give it to train.py as data.root")
    extract.add_argument(
        "--encoder", required=True, metavar="NAME",
        help="a name of conf/encoder/, such as hubert_base; with --model and --layer any name, for another size of "
        "HuBERT, data2vec or Whisper",
    )  # fmt: skip
    extract.add_argument("--layer", type=int, help="1-based; the encoder's published layer when left out")
    extract.add_argument(
        "--model", metavar="FOLDER_OR_HUB_ID", help="where the encoder's weights are; a folder offline"
    )
    extract.add_argument(
        "--shard", type=_shard, default=(0, 1), metavar="I/N|slurm",
        help="make shard I of N only (default 0/1: all in one); slurm: I and N are this task's place in a SLURM job "
        "array numbered from 0",
    )  # fmt: skip
    extract.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 … (default cpu)")
    extract.add_argument(
        "--dtype", choices=["float32", "float16"], default="float32",
        help="what features are stored as; float16 takes half the disk (default float32)",
    )  # fmt: skip
    extract.add_argument(
        "--batch-seconds", type=_seconds, default=100.0, metavar="S",
        help="seconds of sound the encoder runs at once (default 100); fewer if memory runs out",
    )  # fmt: skip
    extract.add_argument(
        "--skip-bad", action="store_true",
        help="leave out bad sounds and manifest lines, and list them beside the shard, instead of stopping",
    )  # fmt: skip

    tokenize = command(
        "tokenize", _tokenize, "Turn feature shards into a tokens file in the published format.",
        "repcodec tokenize outputs/demo/codec cache/demo/features/whisper_tiny_en/l3/test -o test.tokens",
    )  # fmt: skip
    tokenize.add_argument("codec", help="folder of a saved codec or k-means model")
    tokenize.add_argument("features", help="folder of feature shards, {rank}_{n}.npy and .len")
    tokenize.add_argument("-o", "--output", required=True, help="the tokens file to write")
    tokenize.add_argument("--manifest", help="names the utterances of shards made elsewhere, which have no .json")
    tokenize.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 … (default cpu)")
    return parser


def _shard(text: str) -> tuple[int, int]:
    """Read I/N, or the place in a SLURM job array."""
    if text == "slurm":
        try:
            first = os.environ.get("SLURM_ARRAY_TASK_MIN", "0")
            rank, num_shards = (os.environ[f"SLURM_ARRAY_TASK_{name}"] for name in ("ID", "COUNT"))
        except KeyError as error:
            raise argparse.ArgumentTypeError(f"{error.args[0]} is not set: submit with sbatch --array=0-N") from None
        last = os.environ.get("SLURM_ARRAY_TASK_MAX", str(int(num_shards) - 1) if num_shards.isdecimal() else "")
        if first != "0" or last != str(int(num_shards) - 1):
            raise argparse.ArgumentTypeError(
                f"the job array has {num_shards} tasks from {first} to {last}: submit all, with sbatch --array=0-N; "
                "one alone is made with --shard I/N"
            )
    else:
        rank, _, num_shards = text.partition("/")
    if not (rank.isdecimal() and num_shards.isdecimal() and int(rank) < int(num_shards)):
        raise argparse.ArgumentTypeError(f"{rank}/{num_shards}: expected I/N with 0 <= I < N, such as 0/4, or slurm")
    return int(rank), int(num_shards)


def _seconds(text: str) -> float:
    """Read a positive number of seconds."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: expected a positive number of seconds, such as 100")
    return seconds


def _manifest(args: argparse.Namespace) -> None:
    from repcodec.extraction import make_manifest

    manifest = make_manifest(args.folder, skip_bad=not args.strict)
    manifest.write(args.output)
    for reason in manifest.skipped.values():
        print(f"skipped: {reason}", file=sys.stderr)
    more = f"; {len(manifest.skipped)} files were skipped" if manifest.skipped else ""
    print(f"{args.output}: {len(manifest)} utterances, {sum(manifest.num_samples) / 16_000 / 60:.1f} minutes{more}")


def _extract(args: argparse.Namespace) -> None:
    from pathlib import Path

    from repcodec.manifest import Manifest

    manifest = Manifest.read(args.manifest, args.skip_bad)  # a mistake in it is told before anything heavy is loaded
    from repcodec.extraction import extract, feature_folder
    from repcodec.speech_encoders import find_encoder, load_speech_encoder
    from repcodec.tokenization import usable_device

    spec = find_encoder(args.encoder, args.model)
    encoder = load_speech_encoder(spec, args.layer, args.model).to(usable_device(args.device))
    folder = feature_folder(args.root, args.encoder, encoder.layer, Path(args.manifest).stem)
    rank, num_shards = args.shard
    extract(
        manifest, folder, spec, encoder, rank, num_shards, model=args.model, dtype=args.dtype,
        batch_seconds=args.batch_seconds, skip_bad=args.skip_bad,
    )  # fmt: skip
    print(f"{folder}: shard {rank} of {num_shards} is there")


def _tokenize(args: argparse.Namespace) -> None:
    from repcodec.manifest import Manifest
    from repcodec.shards import FeatureShards
    from repcodec.tokenization import load_tokenizer, tokenize, usable_device

    shards = FeatureShards(args.features)
    tokenizer = load_tokenizer(args.codec, shards).to(usable_device(args.device))
    if args.manifest:
        manifest = Manifest.read(args.manifest)
        shards.check_manifest(manifest.paths, manifest.num_samples)
        names, root = list(manifest.paths), str(manifest.root)
    elif shards.names is not None:
        names, root = shards.names, shards.root
    else:
        raise RepCodecError(f"{args.features}: these shards do not name their utterances: give --manifest FILE.tsv.")
    tokenize(tokenizer, shards, args.output, names, root)
    print(f"{args.output}: {len(names)} utterances")


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit code: 0, 1 after a user's mistake in data, 2 in usage."""
    args = _parser().parse_args(arguments)
    try:
        args.run(args)
    except RepCodecError as error:
        print(f"error: {user_message(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
