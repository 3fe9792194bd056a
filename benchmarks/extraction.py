"""How fast are features made in batches, against one utterance at a time? Prints the ratio of medians.

    python benchmarks/extraction.py                          # the demo corpus, Whisper tiny.en
    python benchmarks/extraction.py --audio FOLDER --runs 5
    python benchmarks/extraction.py --shape hubert_base --minutes 2

All ways run in turn, in this one process, on the same sounds:

    one at a time   read, run, write; the next utterance
    packed          `repcodec extract` as it is: packed batches, sound decoded meanwhile
    padded          utterances of like length padded to the longest, attention masked (Whisper only; without writing)

Shapes other than whisper_tiny_en have random weights: speed does not depend on them.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

from repcodec.audio import SAMPLE_RATE
from repcodec.demo_corpus import build_corpus
from repcodec.demo_weights import convert_whisper_tiny_en
from repcodec.extraction import extract
from repcodec.manifest import Manifest, make_manifest
from repcodec.shard_writer import write_shard
from repcodec.speech_encoders import SpeechEncoder, batches_of, encoder_table, load_speech_encoder

CONFIGS = {
    "hubert_base": (transformers.HubertModel, transformers.HubertConfig()),
    "hubert_large": (
        transformers.HubertModel,
        transformers.HubertConfig(
            hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096,
            feat_extract_norm="layer", do_stable_layer_norm=True, conv_bias=True,
        ),
    ),
    "data2vec_base": (transformers.Data2VecAudioModel, transformers.Data2VecAudioConfig()),
}  # fmt: skip
"""The published shapes."""


def main() -> None:
    """Time all ways in turn and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--audio", help="folder of sound files; the demo corpus when left out")
    parser.add_argument("--shape", default="whisper_tiny_en", choices=["whisper_tiny_en", *CONFIGS])
    parser.add_argument("--layer", type=int, help="1-based; the encoder's published layer when left out")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="of sound at most")
    parser.add_argument("--batch-seconds", type=float, default=100.0)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--device", default="cpu", help="(default cpu)")
    parser.add_argument("--cache", default="cache", help="folder for the corpus and the weights")
    args = parser.parse_args()
    spec = encoder_table()[args.shape]
    encoder = load_speech_encoder(spec, args.layer, weights(args.shape, Path(args.cache))).to(args.device)
    manifest = first_minutes(sounds(args.audio, Path(args.cache)), args.minutes)
    seconds = sum(manifest.num_samples) / SAMPLE_RATE
    ways: dict[str, Callable[[Path], None]] = {
        "one at a time": lambda folder: one_at_a_time(manifest, encoder, folder),
        "packed": lambda folder: extract(manifest, folder, spec, encoder, batch_seconds=args.batch_seconds),
    }
    if args.shape == "whisper_tiny_en":
        ways["padded"] = lambda folder: padded(manifest, encoder, args.batch_seconds)
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(args.runs):
        for way, run in ways.items():
            with tempfile.TemporaryDirectory() as folder:
                start = time.perf_counter()
                run(Path(folder))
                times[way].append(time.perf_counter() - start)
    print(
        f"{args.shape} on {args.device}, layer {encoder.layer}, {len(manifest)} utterances, "
        f"{seconds / 60:.1f} minutes, {args.runs} runs"
    )
    reference = statistics.median(times["one at a time"])
    for way, found in times.items():
        median = statistics.median(found)
        print(
            f"{way:14} {median:7.2f} s ({min(found):.2f} to {max(found):.2f}), {seconds / median:5.0f} x real time, "
            f"{reference / median:.2f} times one at a time"
        )


def weights(shape: str, cache: Path) -> Path:
    """Return a folder with a model: the real Whisper tiny.en, or random weights of another shape."""
    if shape not in CONFIGS:
        return convert_whisper_tiny_en(cache)
    folder = cache / f"random-{shape}"
    if not (folder / "config.json").exists():
        cls, config = CONFIGS[shape]
        cls(config).save_pretrained(folder)
    return folder


def sounds(audio: str | None, cache: Path) -> Manifest:
    """Return a manifest of a folder, or of the demo corpus's training voices."""
    if audio is not None:
        return make_manifest(audio)
    build_corpus(cache / "demo")
    return Manifest.read(cache / "demo" / "train.tsv")


def first_minutes(manifest: Manifest, minutes: float) -> Manifest:
    """Return the first utterances, at most so many minutes of them."""
    total, count = 0.0, 0
    while count < len(manifest) and total + manifest.num_samples[count] <= minutes * 60 * SAMPLE_RATE:
        total += manifest.num_samples[count]
        count += 1
    return Manifest(manifest.root, manifest.paths[:count], manifest.num_samples[:count])


@torch.inference_mode()
def one_at_a_time(manifest: Manifest, encoder: SpeechEncoder, folder: Path) -> None:
    """Read an utterance, run it, write it; then the next."""
    device = next(encoder.parameters()).device
    with write_shard(folder, 0, 1, encoder.dim, {"root": str(manifest.root), "frame_rate": 50}) as shard:
        for utterance, path in enumerate(manifest.paths):
            (features,) = encoder([torch.from_numpy(manifest.waveform(utterance)).to(device)])
            shard.append(path, features.cpu().numpy())


@torch.inference_mode()
def padded(manifest: Manifest, encoder: SpeechEncoder, batch_seconds: float) -> None:
    """Run batches of like lengths, padded behind the convolutions, with masked attention."""
    device = next(encoder.parameters()).device
    order = sorted(range(len(manifest)), key=lambda utterance: manifest.num_samples[utterance])
    for batch in batches_of([manifest.num_samples[utterance] for utterance in order], batch_seconds):
        waveforms = [torch.from_numpy(manifest.waveform(order[i])).to(device) for i in batch]
        inputs = [encoder.segments(waveform)[0] for waveform in waveforms]
        lengths = torch.tensor([len(one) for one in inputs])
        x = torch.nn.utils.rnn.pad_sequence(inputs, batch_first=True)
        mask = (torch.arange(x.shape[1]) < lengths[:, None])[:, None, None].to(device)
        for block in encoder.blocks:
            x = x + _attention(block, x, mask)
            x = x + block.fc2(block.activation_fn(block.fc1(block.final_layer_norm(x))))


def _attention(block: torch.nn.Module, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    attention, z = block.self_attn, block.self_attn_layer_norm(x)
    heads = [
        projection(z).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    ]
    mixed = torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=mask)
    return attention.out_proj(mixed.transpose(1, 2).flatten(2))


if __name__ == "__main__":
    main()
