"""The command `repcodec`: its flags and their help; `commands.py` does what they ask."""

import argparse
import os
import sys

from repcodec.errors import user_message


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="repcodec",
        description="Speech to discrete tokens. Train with train.py, compare with evaluate.py, use with these.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, summary: str, *examples: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=summary,
            description=summary,
            epilog="\n  ".join(["example:" if len(examples) == 1 else "examples:", *examples]),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(run=name, usage=sub.error)
        return sub

    manifest = command(
        "manifest",
        "List the sound files below a folder, in the published .tsv format. Unreadable files are listed and left out.",
        "repcodec manifest LibriSpeech/train-clean-100 -o train.tsv",
    )  # fmt: skip
    manifest.add_argument("folder", help="folder of sound files (wav, flac, mp3, ogg, opus, m4a), in any depth")
    manifest.add_argument("-o", "--output", required=True, help="the manifest to write; its stem names the split")
    manifest.add_argument("--strict", action="store_true", help="stop at the first unreadable file instead")

    extract = command(
        "extract", "Compute a speech encoder's features into ROOT/<encoder>/l<layer>/<manifest's stem>/. "
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
        "tokenize", "Turn features or sound into a tokens file. After a kill, the same command goes on.",
        "repcodec tokenize outputs/demo/codec cache/demo/features/whisper_tiny_en/l3/test -o test.tokens",
        "repcodec tokenize codec LibriSpeech/test-clean -o test.jsonl --deduplicate",
        "repcodec tokenize codec train.tsv -o train.tokens --device cuda --shard 0/8",
        "repcodec tokenize user/codec-on-the-hub speech.wav",
        "sox speech.mp3 -t wav - | repcodec tokenize codec -",
        "features-as-they-come | repcodec tokenize codec - --stream",
    )  # fmt: skip
    tokenize.add_argument("codec", help="a saved codec or k-means model: a folder or a hub id")
    tokenize.add_argument(
        "input", nargs="+",
        help="a folder of feature shards ({rank}_{n}.npy), a manifest (.tsv), a folder of sound files, sound files, or "
        "- for one sound on standard input",
    )  # fmt: skip
    tokenize.add_argument("-o", "--output", help="the file to write; standard output when left out")
    tokenize.add_argument(
        "--format", choices=["tokens", "jsonl"],
        help="tokens: the published format, one codebook; jsonl: JSON lines with id, duration and the codes of all "
        "codebooks (default: jsonl for an output that ends in .jsonl and for several codebooks on standard output)",
    )  # fmt: skip
    tokenize.add_argument(
        "--deduplicate", action="store_true",
        help="write runs of equal codes as one: code:length in the published format, codes and repeats in JSON lines",
    )  # fmt: skip
    tokenize.add_argument("--manifest", help="names the utterances of shards made elsewhere, which have no .json")
    tokenize.add_argument(
        "--model", metavar="FOLDER_OR_HUB_ID",
        help="where the speech encoder's weights are, for sound (default: where they were in training, or the hub)",
    )  # fmt: skip
    tokenize.add_argument(
        "--shard", type=_shard, metavar="I/N|slurm",
        help="do part I of N of the utterances only; whoever finishes the last part joins them, in order. slurm: I and "
        "N are this task's place in a SLURM job array numbered from 0",
    )  # fmt: skip
    tokenize.add_argument("--skip-bad", action="store_true", help="leave out bad sounds instead of stopping")
    tokenize.add_argument(
        "--batch-seconds", type=_seconds, default=100.0, metavar="S",
        help="seconds of sound the speech encoder runs at once (default 100); fewer if memory runs out",
    )  # fmt: skip
    tokenize.add_argument(
        "--stream", action="store_true",
        help="features only: write a JSON line as soon as codes are ready; - reads frames of little-endian float32 "
        "values, one after another, from standard input",
    )  # fmt: skip
    tokenize.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 … (default cpu)")

    decode = command(
        "decode", "Turn a tokens file back into a shard of features.",
        "repcodec decode outputs/demo/codec test.tokens decoded/test",
    )  # fmt: skip
    decode.add_argument("codec", help="the codec or k-means model that made the tokens: a folder or a hub id")
    decode.add_argument("tokens", help="a tokens file in the published format, or JSON lines")
    decode.add_argument("folder", help="gets 0_1.npy, 0_1.len and 0_1.json")
    decode.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 … (default cpu)")

    info = command(
        "info", "Say what a codec, a folder of feature shards or a tokens file is.",
        "repcodec info outputs/demo/codec",
        "repcodec info cache/demo/features/whisper_tiny_en/l3/test",
        "repcodec info test.tokens",
    )  # fmt: skip
    info.add_argument("path", help="a codec (folder or hub id), a folder of feature shards, or a tokens file")

    convert = command(
        "convert",
        "Turn a published checkpoint (.pkl), a Lightning checkpoint (.ckpt) or a saved codec into a saved codec.",
        "repcodec convert hubert_base_l9.pkl codecs/hubert_base_l9",
        "repcodec convert mine.pkl codecs/mine --config train_config.yaml",
        "repcodec convert outputs/demo/checkpoints/last.ckpt codecs/last",
    )  # fmt: skip
    convert.add_argument("source", help="one of the six published files by its name, another .pkl, a .ckpt, or a codec")
    convert.add_argument("folder", help="the saved codec to write")
    convert.add_argument(
        "--config", help="the published training config (.yaml) of a .pkl that is not named as one of the six"
    )

    export = command(
        "export", "Write a codec as ONNX graphs, encode.onnx and decode.onnx, of any number of frames.",
        "repcodec export outputs/demo/codec onnx",
        "repcodec export outputs/demo/codec onnx --check cache/demo/features/whisper_tiny_en/l3/test",
    )  # fmt: skip
    export.add_argument("codec", help="a saved codec: a folder or a hub id")
    export.add_argument("folder", help="gets encode.onnx and decode.onnx")
    export.add_argument("--format", choices=["onnx"], default="onnx", help="the only one so far")
    export.add_argument("--check", metavar="FEATURES", help="a folder of feature shards to compare both on")
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


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit code: 0, 1 after a user's mistake in data, 2 in usage."""
    args = _parser().parse_args(arguments)
    from repcodec import commands

    try:
        getattr(commands, args.run)(args)
    except BrokenPipeError:  # whoever read our output wants no more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if (message := user_message(error)) is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
