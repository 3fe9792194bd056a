"""What the commands of `repcodec` do. Heavy imports happen inside the commands that need them."""

import argparse
import sys
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING

from repcodec.errors import RepCodecError

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    import numpy.typing as npt

    from repcodec.manifest import Manifest
    from repcodec.shards import FeatureShards


def manifest(args: argparse.Namespace) -> None:
    """List the sound files below a folder."""
    from repcodec.manifest import make_manifest

    found = make_manifest(args.folder, skip_bad=not args.strict)
    found.write(args.output)
    for reason in found.skipped.values():
        print(f"skipped: {reason}", file=sys.stderr)
    more = f"; {len(found.skipped)} files were skipped" if found.skipped else ""
    print(f"{args.output}: {len(found)} utterances, {sum(found.num_samples) / 16_000 / 60:.1f} minutes{more}")


def extract(args: argparse.Namespace) -> None:
    """Compute the features of one shard of a manifest."""
    from pathlib import Path

    from repcodec.manifest import Manifest

    manifest = Manifest.read(args.manifest, args.skip_bad)  # a mistake in it is told before anything heavy is loaded
    from repcodec.extraction import extract, feature_folder
    from repcodec.pipeline import usable_device
    from repcodec.speech_encoders import find_encoder, load_speech_encoder

    spec = find_encoder(args.encoder, args.model)
    encoder = load_speech_encoder(spec, args.layer, args.model).to(usable_device(args.device))
    folder = feature_folder(args.root, args.encoder, encoder.layer, Path(args.manifest).stem)
    rank, num_shards = args.shard
    extract(
        manifest, folder, spec, encoder, rank, num_shards, model=args.model, dtype=args.dtype,
        batch_seconds=args.batch_seconds, skip_bad=args.skip_bad,
    )  # fmt: skip
    print(f"{folder}: shard {rank} of {num_shards} is there")


def tokenize(args: argparse.Namespace) -> None:
    """Turn features or sound into a tokens file, or lines on standard output."""
    from pathlib import Path

    from repcodec.shard_files import num_shards_there

    if args.stream and (args.shard or args.deduplicate or args.format == "tokens" or len(args.input) > 1):
        args.usage("--stream writes JSON lines of one input as they come: no --shard, --deduplicate or --format tokens")
    if args.stream and (args.model or args.skip_bad):
        args.usage("--stream takes features: --model and --skip-bad are for sound")
    if args.shard and not args.output:
        args.usage("--shard needs -o FILE, where the parts are joined")
    if args.output:
        _check_output(Path(args.output), args.input)
    for name in args.input:
        if name != "-" and not (name and Path(name).exists()):
            raise RepCodecError(f"{name}: no such file or folder; give feature shards, a manifest or sound files.")
    from repcodec.checkpoint import read_config
    from repcodec.hub import local_folder

    args.codec = local_folder(args.codec)
    config = read_config(args.codec)  # a misspelt codec is told before anything heavy is loaded
    is_features = len(args.input) == 1 and Path(args.input[0]).is_dir() and bool(num_shards_there(args.input[0]))
    if args.stream:
        _stream(args, is_features)
        return
    kind = args.format or ("jsonl" if str(args.output or "").endswith(".jsonl") else "tokens")
    from repcodec.pipeline import load_encoder_of, load_tokenizer, usable_device
    from repcodec.tokenization import FeatureSource, SoundSource, check_fits, describe, encode_lines, write_tokens

    device = usable_device(args.device)
    tokenizer = load_tokenizer(args.codec).to(device)
    if not args.output and not args.format and tokenizer.num_codebooks > 1:
        kind = "jsonl"
    source: FeatureSource
    if is_features:
        from repcodec.shards import FeatureShards

        shards = FeatureShards(args.input[0])
        check_fits(tokenizer, args.codec, shards)
        source = FeatureSource(shards, *_names(args, shards))
    else:
        sounds = _sounds(args)
        encoder = load_encoder_of(tokenizer, args.model).to(device)
        source = SoundSource(sounds, encoder, args.batch_seconds, args.skip_bad)
        source.skipped += sounds.skipped.values()
    if args.output:
        about = describe(tokenizer, config.get("weights_sha256"))
        whole = write_tokens(tokenizer, source, about, args.output, kind, args.deduplicate, args.shard)
        skipped = f"; {len(source.skipped)} sounds were skipped" if source.skipped else ""
        if whole:
            with open(args.output, "rb") as file:
                print(f"{args.output}: {sum(1 for _ in file) - (kind == 'tokens')} utterances{skipped}")
        else:
            print(f"{args.output}: part {args.shard[0]} of {args.shard[1]} is there, the last one joins them{skipped}")
    else:
        if kind == "tokens":
            print(source.root)
        every = range(len(source.names))
        for line in encode_lines(tokenizer, source, every, every, kind, args.deduplicate):
            print(line, end="", flush=True)
    for reason in source.skipped:
        print(f"skipped: {reason}", file=sys.stderr)


def _check_output(output: "Path", inputs: list[str]) -> None:
    """Refuse to write onto what is read."""
    from pathlib import Path

    for name in inputs:
        if output.resolve() == Path(name).resolve():
            raise RepCodecError(f"{output} is the input: give another name to -o.")
        inside = Path(name).is_dir() and output.resolve().parent == Path(name).resolve()
        if inside and output.name.endswith((".npy", ".len", ".json", ".skipped.tsv")):
            raise RepCodecError(f"{output} would lie among the files of the input: give another name to -o.")


def _names(args: argparse.Namespace, shards: "FeatureShards") -> tuple[list[str] | None, str | None]:
    """Return the names and the root that a manifest gives to shards; None without one."""
    if not args.manifest:
        return None, None
    from repcodec.manifest import Manifest

    manifest = Manifest.read(args.manifest)
    shards.check_manifest(manifest.paths, manifest.num_samples)
    return list(manifest.paths), str(manifest.root)


def _sounds(args: argparse.Namespace) -> "Manifest":
    """Return the list of the sounds that the command was given: a manifest, a folder, files, or standard input."""
    from pathlib import Path
    from tempfile import mkdtemp

    from repcodec.manifest import Manifest, list_sounds, make_manifest

    first = Path(args.input[0])
    if args.input == ["-"]:
        import atexit
        import shutil

        folder = Path(mkdtemp())
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        with open(folder / "stdin", "wb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file)
        return list_sounds([folder / "stdin"])
    if len(args.input) == 1 and first.suffix == ".tsv":
        return Manifest.read(first, args.skip_bad)
    if len(args.input) == 1 and first.is_dir():
        return make_manifest(first, args.skip_bad)
    return list_sounds([Path(name) for name in args.input], args.skip_bad)


def _stream(args: argparse.Namespace, is_features: bool) -> None:
    from pathlib import Path

    from repcodec.pipeline import SpeechTokenizer
    from repcodec.streaming import raw_frames, shard_chunks, stream_lines
    from repcodec.tokens import about_path

    if not is_features and args.input != ["-"]:
        args.usage("--stream takes features: a folder of feature shards, or - for frames on standard input")
    tokenizer = SpeechTokenizer.from_pretrained(args.codec, device=args.device)
    utterances: Iterable[tuple[str, Iterator[npt.NDArray[np.float32]]]]
    if is_features:
        from repcodec.shards import FeatureShards
        from repcodec.tokenization import check_fits

        shards = FeatureShards(args.input[0])
        check_fits(tokenizer.tokenizer, args.codec, shards)
        names = _names(args, shards)[0] or shards.names or [str(number) for number in range(len(shards))]
        utterances = ((name, shard_chunks(shards, number)) for number, name in enumerate(names))
    else:
        utterances = [("stdin", raw_frames(sys.stdin.buffer, tokenizer.tokenizer.dim))]
    if args.output:
        about_path(args.output).unlink(missing_ok=True)  # of what stood there before
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    with open(args.output, "w", encoding="utf-8") if args.output else nullcontext(sys.stdout) as file:
        for name, chunks in utterances:
            for line in stream_lines(tokenizer, name, chunks):
                file.write(line)
                file.flush()


def decode(args: argparse.Namespace) -> None:
    """Turn a tokens file back into a shard of features."""
    from repcodec.tokens import read_tokens

    next(read_tokens(args.tokens), None)  # a missing file is told before anything heavy is loaded
    from repcodec.decoding import decode_tokens
    from repcodec.pipeline import load_tokenizer, usable_device

    tokenizer = load_tokenizer(args.codec).to(usable_device(args.device))
    print(f"{args.folder}: {decode_tokens(tokenizer, args.tokens, args.folder)} utterances")


def info(args: argparse.Namespace) -> None:
    """Say what a codec, a folder of feature shards or a tokens file is."""
    from repcodec.info import describe_path

    rows = describe_path(args.path)
    width = max(len(heading) for heading, _ in rows)
    for heading, text in rows:
        # Halves of characters, which a description can hold, are shown as numbers.
        print(f"{heading:{width}}  {text}".encode(errors="backslashreplace").decode())


def convert(args: argparse.Namespace) -> None:
    """Turn a checkpoint into a saved codec."""
    from repcodec.conversion import convert

    codec = convert(args.source, args.folder, args.config)
    print(f"{args.folder}: a codec of {codec.num_codebooks} x {codec.codebook_size} codes for width {codec.dim}")


def export(args: argparse.Namespace) -> None:
    """Write a codec as ONNX graphs."""
    from repcodec.codec import RepCodec
    from repcodec.export import check_onnx, export_onnx
    from repcodec.shards import FeatureShards

    shards = FeatureShards(args.check) if args.check else None
    codec = RepCodec.from_pretrained(args.codec)
    print(*export_onnx(codec, args.folder), sep="\n")
    if shards is not None:
        print(check_onnx(codec, args.folder, (shards.read(utterance) for utterance in range(len(shards)))))
