"""Tokenizers x features -> results."""

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from repcodec.checkpoint import read_config
from repcodec.data import STATISTICS_FRAMES, ShardsDataModule
from repcodec.errors import RepCodecError
from repcodec.kmeans import KMeansTokenizer
from repcodec.labels import PhoneLabels
from repcodec.manifest import utterance_id
from repcodec.metrics import CodeUsage, NormalizedError, PhoneAgreement
from repcodec.quantizers import fit_centroids
from repcodec.shards import FeatureShards
from repcodec.tokenization import Tokenizer, encode_shards, utterance_features


@dataclass
class Row:
    """One tokenizer's figures on a split.

    Attributes:
        name: of the tokenizer.
        normalized_error: sum |x - x̂|² / sum |x - mean|², the mean being the training set's.
        perplexity: of the codes, over the whole split.
        used_share: share of the codes used in the split, 0 to 1.
        corpus_used_share: the same over all splits together.
        bits_per_second: codes per second times log2 of the codebook size, over all codebooks.
        entropy_bits_per_second: codes per second times the entropy of the codes.
        codes_per_second: over all codebooks.
        pnmi, phone_purity: 0 to 1; None without phone labels.
        valid_normalized_error: normalized_error of the validation split.
        num_codebooks, codebook_size: K and V.
    """

    name: str
    normalized_error: float
    perplexity: float
    used_share: float
    corpus_used_share: float
    bits_per_second: float
    entropy_bits_per_second: float
    codes_per_second: float
    pnmi: float | None
    phone_purity: float | None
    valid_normalized_error: float
    num_codebooks: int
    codebook_size: int

    def as_dict(self) -> dict:
        """Return the figures as plain values, for JSON."""
        return asdict(self)


@dataclass
class Result:
    """A row, and the counts its plots are drawn from.

    Attributes:
        row: the figures.
        usage: (K, V) frames a code.
        joint: (phones, V) frames of each phone and code of the first codebook; None without labels.
    """

    row: Row
    usage: np.ndarray
    joint: np.ndarray | None


def fit_kmeans(data: ShardsDataModule, codebook_size: int, folder: Path) -> KMeansTokenizer:
    """Fit the k-means baseline on the training split and save it; a saved one of the same features is taken.

    Raises:
        RepCodecError: fewer frames than codes, or the folder cannot be written.
    """
    about = {
        "encoder": data.encoder,
        "layer": data.layer,
        "features": str(data.dir),
        "frames": int(data.train.lengths.sum()),
        "seed": data.seed,
    }
    if (folder / "config.json").exists() and about.items() <= read_config(folder).items():
        return KMeansTokenizer.from_pretrained(folder)
    # Centred and scaled like the codec's features: distances keep their order, and a codec that starts from k-means
    # starts from these very codes.
    mean, scale = data.statistics.mean, data.statistics.scale
    frames = (torch.from_numpy(data.train.sample(STATISTICS_FRAMES)) - mean) / torch.tensor(scale)
    print(f"Fitting k-means of {codebook_size} codes to {len(frames):,} frames …", flush=True)
    centroids = torch.from_numpy(fit_centroids(frames.numpy(), codebook_size, data.seed))
    tokenizer = KMeansTokenizer(centroids * scale + mean)
    tokenizer.save_pretrained(folder, about)
    return tokenizer


@torch.inference_mode()
def evaluate(tokenizer: Tokenizer, name: str, data: ShardsDataModule, split: str = "test") -> Result:
    """Measure a tokenizer on a split.

    Args:
        tokenizer: a codec or a k-means model.
        name: what tables call it.
        data: the feature set; its training split gives the mean, all its splits the codes used.
        split: which split the figures are of.

    Raises:
        RepCodecError: the tokenizer takes another width, or labels and features share no utterance.
    """
    if tokenizer.dim != data.dim:
        raise RepCodecError(
            f"{name} takes features of width {tokenizer.dim}, but {data.dir} holds width {data.dim}; "
            "choose the encoder it was trained on with encoder=…"
        )
    splits = {other: data.split(other) for other in ("train", "valid", "test")}
    corpus_usage = CodeUsage(tokenizer.num_codebooks, tokenizer.codebook_size)
    passes = {other: _run(tokenizer, shards, data, f"{name}, {other}") for other, shards in splits.items()}
    for measured in passes.values():
        corpus_usage.counts += measured.usage.counts
    shards, measured = splits[split], passes[split]
    usage = {key: float(value) for key, value in measured.usage.compute().items()}
    codes_per_second = (shards.frame_rate or 50) / tokenizer.stride
    agreement = _phone_agreement(data.phone_labels, measured.codes, shards, tokenizer)
    phones = {key: float(value) for key, value in agreement.compute().items()} if agreement else {}
    row = Row(
        name=name,
        normalized_error=float(measured.error.compute()),
        perplexity=usage["perplexity"],
        used_share=usage["used_share"],
        corpus_used_share=float(torch.gt(corpus_usage.counts, 0).double().mean()),
        bits_per_second=codes_per_second * tokenizer.num_codebooks * float(np.log2(tokenizer.codebook_size)),
        entropy_bits_per_second=codes_per_second * usage["entropy_bits"],
        codes_per_second=codes_per_second * tokenizer.num_codebooks,
        pnmi=phones.get("pnmi"),
        phone_purity=phones.get("phone_purity"),
        valid_normalized_error=float(passes["valid"].error.compute()),
        num_codebooks=tokenizer.num_codebooks,
        codebook_size=tokenizer.codebook_size,
    )
    return Result(row, measured.usage.counts.numpy(), agreement.joint.numpy() if agreement else None)


@dataclass
class _Pass:
    """One pass over a split: its codes, their use, and the error of what decodes from them."""

    codes: list[Tensor]
    usage: CodeUsage
    error: NormalizedError


def _run(tokenizer: Tokenizer, shards: FeatureShards, data: ShardsDataModule, description: str) -> _Pass:
    error = NormalizedError(data.statistics.mean)
    usage = CodeUsage(tokenizer.num_codebooks, tokenizer.codebook_size)
    kept = []
    for utterance, codes in enumerate(encode_shards(tokenizer, shards, description)):
        kept.append(codes)
        if codes.shape[1] == 0:
            continue
        features = utterance_features(shards, utterance)
        reconstruction = tokenizer.decode(codes[None])[:, : features.shape[1]]
        error.update(reconstruction, features, torch.ones(features.shape[:2], dtype=torch.bool))
        usage.update(codes[None])
    return _Pass(kept, usage, error)


def _phone_agreement(
    labels: PhoneLabels | None, codes: list[Tensor], shards: FeatureShards, tokenizer: Tokenizer
) -> PhoneAgreement | None:
    """Count phones against codes; None without labels or where the shards do not name their utterances."""
    if labels is None:
        return None
    if shards.names is None or shards.frame_rate is None:
        raise RepCodecError(f"{shards.folder}: no .json names the utterances, so phone labels cannot be matched.")
    ids = [utterance_id(name) for name in shards.names]
    matched = [i for i, utterance in enumerate(ids) if utterance in labels]
    if not matched:
        raise RepCodecError(f"{shards.folder}: no utterance has phone labels; the first is {ids[0]!r}.")
    agreement = PhoneAgreement(len(labels.phones), tokenizer.codebook_size)
    for i in matched:
        code_rate = shards.frame_rate / tokenizer.stride
        phones = labels.frames(ids[i], codes[i].shape[1], code_rate)
        agreement.update(torch.from_numpy(phones), codes[i][0])
    return agreement
