"""The command `repcodec`: what a user does without Hydra."""

import argparse
import sys

from repcodec.errors import RepCodecError, user_message


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="repcodec",
        description="Speech to discrete tokens. Train with train.py, compare with evaluate.py, use with these.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run, summary: str, example: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=summary,
            description=summary,
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(run=run)
        return sub

    manifest = command(
        "manifest", _manifest, "List the sound files below a folder, in the published .tsv format.",
        "repcodec manifest LibriSpeech/train-clean-100 -o train.tsv",
    )  # fmt: skip
    manifest.add_argument("folder", help="folder of sound files, searched in any depth")
    manifest.add_argument("-o", "--output", required=True, help="the manifest to write; its stem names the split")

    extract = command(
        "extract", _extract, "Compute a speech encoder's features into ROOT/<encoder>/l<layer>/<manifest's stem>/.",
        "repcodec extract train.tsv features --encoder hubert_base --layer 9",
    )  # fmt: skip
    extract.add_argument("manifest", help="what `repcodec manifest` wrote")
    extract.add_argument("root", help="folder of all features; give it to train.py as data.root")
    extract.add_argument(
        "--encoder", required=True, metavar="NAME", help="a name of conf/encoder/, such as hubert_base"
    )
    extract.add_argument("--layer", type=int, help="1-based; the encoder's published layer when left out")
    extract.add_argument(
        "--model", metavar="FOLDER_OR_HUB_ID", help="where the encoder's weights are; a folder offline"
    )
    extract.add_argument(
        "--shard", default="0/1", metavar="I/N", help="make shard I of N only (default 0/1: all in one)"
    )
    extract.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 … (default cpu)")

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


def _manifest(args: argparse.Namespace) -> None:
    from repcodec.extraction import make_manifest

    manifest = make_manifest(args.folder)
    manifest.write(args.output)
    print(f"{args.output}: {len(manifest)} utterances, {sum(manifest.num_samples) / 16_000 / 60:.1f} minutes")


def _extract(args: argparse.Namespace) -> None:
    from pathlib import Path

    from repcodec.extraction import extract, feature_folder
    from repcodec.manifest import Manifest
    from repcodec.speech_encoders import encoder_table, load_speech_encoder
    from repcodec.tokenization import usable_device

    if args.encoder not in encoder_table():
        raise RepCodecError(f"--encoder {args.encoder}: no such speech encoder; known: {', '.join(encoder_table())}.")
    rank, _, num_shards = args.shard.partition("/")
    if not (rank.isdecimal() and num_shards.isdecimal() and int(rank) < int(num_shards)):
        raise RepCodecError(f"--shard {args.shard}: expected I/N with 0 <= I < N, such as 0/4.")
    manifest, spec = Manifest.read(args.manifest), encoder_table()[args.encoder]
    encoder = load_speech_encoder(spec, args.layer, args.model).to(usable_device(args.device))
    folder = feature_folder(args.root, args.encoder, encoder.layer, Path(args.manifest).stem)
    extract(manifest, folder, spec, encoder, int(rank), int(num_shards), model=args.model)
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
