"""Shards -> tokens file."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from repcodec.checkpoint import read_config
from repcodec.codec import RepCodec
from repcodec.errors import RepCodecError
from repcodec.kmeans import KMeansTokenizer
from repcodec.shards import FeatureShards, check_finite
from repcodec.tokens import write_tokens

Tokenizer = RepCodec | KMeansTokenizer
"""What turns features into codes and back; evaluation and tokenizing know only the contract they share."""


def load_tokenizer(folder: Path | str, shards: FeatureShards) -> Tokenizer:
    """Load a saved codec or k-means model, whichever the folder's config.json says.

    Args:
        folder: where it is saved.
        shards: what it shall tokenize.

    Raises:
        RepCodecError: the folder holds neither, or one trained on features of another width, encoder or layer.
    """
    kinds: dict[str, type[Tokenizer]] = {"repcodec": RepCodec, "kmeans": KMeansTokenizer}
    config = read_config(folder)
    if config["kind"] not in kinds:
        raise RepCodecError(f'{folder}/config.json: "kind" is {config["kind"]!r}, expected {" or ".join(kinds)}.')
    tokenizer = kinds[config["kind"]].from_pretrained(folder)
    if tokenizer.dim != shards.dim:
        raise RepCodecError(
            f"{shards.folder}: the features have width {shards.dim}, but {folder} takes {tokenizer.dim}; "
            "extract them with the speech encoder it was trained on."
        )
    shards.check_source(config.get("encoder"), config.get("layer"))
    return tokenizer


def usable_device(name: str) -> torch.device:
    """Return a torch device.

    Raises:
        RepCodecError: there is no such device here.
    """
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise RepCodecError(f"device {name}: not usable here ({str(error).splitlines()[0]}); cpu always is.") from error


def label(tokenizer: Tokenizer) -> str:
    """Return what tables call a tokenizer: its kind and its codebooks' size, as in "RepCodec 2 x 1024"."""
    kind = "RepCodec" if isinstance(tokenizer, RepCodec) else "k-means"
    several = f"{tokenizer.num_codebooks} x " if tokenizer.num_codebooks > 1 else ""
    return f"{kind} {several}{tokenizer.codebook_size}"


@torch.inference_mode()
def encode_shards(tokenizer: Tokenizer, shards: FeatureShards, description: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the features (T, D) and codes (K, T / stride) of every utterance in order; one without a frame has none.

    Raises:
        RepCodecError: a value is not finite.
    """
    device = next(tokenizer.buffers()).device
    with tqdm(total=int(shards.lengths.sum()), desc=description, unit="frame", unit_scale=True) as bar:
        for utterance, length in enumerate(shards.lengths):
            if length == 0:
                yield torch.empty(0, tokenizer.dim), torch.empty(tokenizer.num_codebooks, 0, dtype=torch.int64)
                continue
            values = np.array(shards.features(utterance), dtype=np.float32)
            check_finite(values, shards.where(utterance))
            features = torch.from_numpy(values)
            yield features, tokenizer.encode(features[None].to(device))[0].cpu()
            bar.update(int(length))


def tokenize(tokenizer: Tokenizer, shards: FeatureShards, path: Path | str, names: list[str], root: str) -> None:
    """Write the tokens of a split, in the published format.

    Args:
        tokenizer: of one codebook.
        shards: the features.
        path: the tokens file.
        names: relative path of each utterance.
        root: the audio root, the file's first line.

    Raises:
        RepCodecError: several codebooks, names that do not fit, bad features, or an unwritable file.
    """
    if tokenizer.num_codebooks > 1:
        raise RepCodecError(
            f"the codec has {tokenizer.num_codebooks} codebooks, but a tokens file holds one; use a codec of one."
        )
    if len(names) != len(shards):
        raise RepCodecError(f"{shards.folder}: {len(shards)} utterances, but {len(names)} names in the manifest.")
    codes = (codes[0].numpy() for _, codes in encode_shards(tokenizer, shards, "Tokenizing"))
    write_tokens(path, root, zip(names, codes, strict=True))
