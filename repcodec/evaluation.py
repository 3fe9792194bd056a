"""Tokenizers x features -> results."""

from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from repcodec.checkpoint import read_config
from repcodec.data import SAMPLE_FRAMES, FeaturesDataModule
from repcodec.errors import RepCodecError
from repcodec.kmeans import KMeansTokenizer
from repcodec.labels import PhoneLabels
from repcodec.metrics import CodeUsage, NormalizedError, PhoneAgreement
from repcodec.packing import Tokenizer
from repcodec.quantizers import fit_centroids
from repcodec.shards import FeatureShards
from repcodec.tokenization import encode_shards


@dataclass
class Row:
    """One tokenizer's figures on a split; None where something was not measured.

    Attributes:
        name: of the tokenizer.
        num_codebooks, codebook_size: K and V; 0 and 0 in the row of the features themselves, the ceiling.
        normalized_error: sum |x - x̂|² / sum |x - mean|², the mean being the training set's.
        cosine_similarity: of features and reconstruction, the mean over frames, -1 to 1.
        perplexity: of the codes, over the whole split.
        used_share: share of the codes used in the split, 0 to 1.
        corpus_used_share: the same over all splits together.
        bits_per_second: codes per second times log2 of the codebook size, over all codebooks.
        entropy_bits_per_second: codes per second times the entropy of the codes.
        codes_per_second: over all codebooks.
        deduplicated_per_second: the same when runs of equal codes are one.
        pnmi, phone_purity, cluster_purity, v_measure: of the first codebook's codes, 0 to 1; need phone labels.
        abx_within, abx_across: ABX error of the codes within and across speakers, 0 to 1 (chance 0.5).
        abx_reconstruction_within, abx_reconstruction_across: the same of what decodes from them.
        unit_edit_distance: by augmentation, edits a code between tokens of clean and of augmented speech.
        phone_error_rate: of the probe on held-out speakers, the mean over its seeds.
        phone_error_rates: one a seed.
        valid_normalized_error: normalized_error of the validation split.
        intervals: by field, the 95 % interval over utterances (bootstrap).
        warnings: what the reader should know about these figures, a sentence each.
    """

    name: str
    num_codebooks: int = 0
    codebook_size: int = 0
    normalized_error: float | None = None
    cosine_similarity: float | None = None
    perplexity: float | None = None
    used_share: float | None = None
    corpus_used_share: float | None = None
    bits_per_second: float | None = None
    entropy_bits_per_second: float | None = None
    codes_per_second: float | None = None
    deduplicated_per_second: float | None = None
    pnmi: float | None = None
    phone_purity: float | None = None
    cluster_purity: float | None = None
    v_measure: float | None = None
    abx_within: float | None = None
    abx_across: float | None = None
    abx_reconstruction_within: float | None = None
    abx_reconstruction_across: float | None = None
    unit_edit_distance: dict[str, float] | None = None
    phone_error_rate: float | None = None
    phone_error_rates: list[float] | None = None
    valid_normalized_error: float | None = None
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def as_dict(self) -> dict:
        """Return the figures as plain values, for JSON."""
        return asdict(self)


@dataclass
class Result:
    """A row, and what its plots are drawn from.

    Attributes:
        row: the figures.
        usage: (K, V) frames a code; (0, 0) in the row of the features.
        joint: (phones, V) frames of each phone and code of the first codebook; None without labels.
        curve: (step, normalized error) of each validation of its training; empty where that is not known.
    """

    row: Row
    usage: np.ndarray
    joint: np.ndarray | None = None
    curve: list[tuple[int, float]] = field(default_factory=list)


@dataclass
class Example:
    """An utterance, to look at and to listen to.

    Attributes:
        utterance: its id.
        duration: seconds.
        sound: (S,) float32 at 16 kHz; None where there is none.
        phones: start and end in seconds, and phone, of each segment; empty without labels.
        codes: of each tokenizer by name, (N,) codes of its first codebook and their number a second.
    """

    utterance: str
    duration: float
    sound: np.ndarray | None
    phones: list[tuple[float, float, str]]
    codes: dict[str, tuple[np.ndarray, float]]


def fit_kmeans(data: FeaturesDataModule, codebook_size: int, folder: Path) -> KMeansTokenizer:
    """Fit the k-means baseline on the training split and save it; a saved one of the same features is taken.

    Raises:
        RepCodecError: fewer frames than codes, or the folder cannot be written.
    """
    known = data.about_features
    about = {
        "encoder": data.encoder,
        "layer": data.layer,
        "features": data.source,
        "frames": int(data.train.lengths.sum()),
        "manifest_sha256": data.train.manifest_sha256,
        "seed": data.seed,
        **{key: value for key, value in known.items() if key != "encoder_model"},  # a folder may move
    }
    if (folder / "config.json").exists() and about.items() <= read_config(folder).items():
        return KMeansTokenizer.from_pretrained(folder)
    # Centred and scaled like the codec's features: distances keep their order, and a codec that starts from k-means
    # starts from these very codes.
    mean, scale = data.statistics.mean, data.statistics.scale
    frames = (torch.from_numpy(data.train.sample(SAMPLE_FRAMES)) - mean) / torch.tensor(scale)
    print(f"Fitting k-means of {codebook_size} codes to {len(frames):,} frames …", flush=True)
    centroids = torch.from_numpy(fit_centroids(frames.numpy(), codebook_size, data.seed))
    tokenizer = KMeansTokenizer(centroids * scale + mean)
    tokenizer.about = {**about, **known, "repcodec_version": version("repcodec")}
    if data.train.frame_rate is not None:
        tokenizer.about["frame_rate"] = data.train.frame_rate
    tokenizer.save_pretrained(folder)
    return tokenizer


@torch.inference_mode()
def evaluate(
    tokenizer: Tokenizer, name: str, data: FeaturesDataModule, split: str = "test", corpus: bool = False
) -> Result:
    """Measure a tokenizer on a split.

    Args:
        tokenizer: a codec or a k-means model, on its device.
        name: what tables call it.
        data: the feature set; its training split gives the mean.
        split: which split the figures are of.
        corpus: whether to run over all splits that there are, for the codes used in them together.

    Raises:
        RepCodecError: there is no such split, the tokenizer takes another width, or labels and features share no
            utterance.
    """
    if tokenizer.dim != data.dim:
        raise RepCodecError(
            f"{name} takes features of width {tokenizer.dim}, but {data.source} holds width {data.dim}; "
            "choose the encoder it was trained on with encoder=…"
        )
    splits = {split: data.split(split)}
    if corpus:
        others = [other for other in ("train", "valid", "test") if other != split and data.has_split(other)]
        splits |= {other: data.split(other) for other in others}
    passes = {other: _run(tokenizer, shards, data, f"{name}, {other}") for other, shards in splits.items()}
    used = torch.stack([measured.usage.counts for measured in passes.values()]).sum(0) > 0
    shards, measured = splits[split], passes[split]
    usage = {key: float(value) for key, value in measured.usage.compute().items() if value.ndim == 0}
    codes_per_second = (shards.frame_rate or 50) / tokenizer.stride
    agreement = _phone_agreement(data.phone_labels, measured.codes, shards, tokenizer)
    phones = {key: float(value) for key, value in agreement.compute().items()} if agreement is not None else {}
    row = Row(
        name=name,
        normalized_error=float(measured.error.compute()),
        perplexity=usage["perplexity"],
        used_share=usage["used_share"],
        corpus_used_share=float(used.double().mean()) if corpus else None,
        bits_per_second=codes_per_second * tokenizer.num_codebooks * float(np.log2(tokenizer.codebook_size)),
        entropy_bits_per_second=codes_per_second * usage["entropy_bits"],
        codes_per_second=codes_per_second * tokenizer.num_codebooks,
        pnmi=phones.get("pnmi"),
        phone_purity=phones.get("phone_purity"),
        valid_normalized_error=float(passes["valid"].error.compute()) if "valid" in passes else None,
        num_codebooks=tokenizer.num_codebooks,
        codebook_size=tokenizer.codebook_size,
    )
    return Result(row, measured.usage.counts.numpy(), agreement.joint.numpy() if agreement is not None else None)


@dataclass
class _Pass:
    """One pass over a split: its codes, their use, and the error of what decodes from them."""

    codes: list[Tensor]
    usage: CodeUsage
    error: NormalizedError


def _run(tokenizer: Tokenizer, shards: FeatureShards, data: FeaturesDataModule, description: str) -> _Pass:
    error = NormalizedError(data.statistics.mean)
    usage = CodeUsage(tokenizer.num_codebooks, tokenizer.codebook_size)
    kept = []
    for features, codes in encode_shards(tokenizer, shards, description):
        kept.append(codes)
        if codes.shape[1] == 0:
            continue
        reconstruction = tokenizer.decode(codes[None].to(tokenizer.device))[0, : len(features)].cpu()
        features = features[: len(reconstruction)]  # a converted strided codec leaves a rest at the end out
        error.update(reconstruction, features, torch.ones(len(features), dtype=torch.bool))
        usage.update(codes[None])
    return _Pass(kept, usage, error)


def _phone_agreement(
    labels: PhoneLabels | None, codes: list[Tensor], shards: FeatureShards, tokenizer: Tokenizer
) -> PhoneAgreement | None:
    """Count phones against codes; None without labels.

    Raises:
        RepCodecError: the shards do not name their utterances, or no label is of one of them, or one is of several.
    """
    if labels is None:
        return None
    if shards.ids is None or shards.frame_rate is None:
        raise RepCodecError(f"{shards.folder}: no .json names the utterances, so phone labels cannot be matched.")
    keys = [labels.key(utterance) for utterance in shards.ids]
    matched = [key for key in keys if key is not None]
    if len(set(matched)) < len(matched):
        twice = next(key for key in matched if matched.count(key) > 1)
        raise RepCodecError(f"{shards.folder}: the labels of {twice!r} fit several utterances; use paths as ids.")
    agreement = PhoneAgreement(len(labels.phones), tokenizer.codebook_size)
    code_rate = shards.frame_rate / tokenizer.stride
    for utterance, key in enumerate(keys):
        if key is not None:
            phones = labels.frames(key, codes[utterance].shape[1], code_rate)
            agreement.update(torch.from_numpy(phones), codes[utterance][0])
    if agreement.joint.sum() == 0:
        raise RepCodecError(f"{shards.folder}: no frame has a phone label; the first utterance is {shards.ids[0]!r}.")
    return agreement
