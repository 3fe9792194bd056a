"""Tokenizers x features -> results; and the same for the codes of a tokens file, whatever made it.

Axes: K codebooks, N codes an utterance, T frames, D feature width.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from repcodec.abx import AbxErrors, abx_sums
from repcodec.abx_items import abx_items
from repcodec.alignment import Distance
from repcodec.architecture import FRAME_RATE
from repcodec.checkpoint import read_config
from repcodec.data import SAMPLE_FRAMES, FeaturesDataModule
from repcodec.distributed import of_all_ranks, rank_and_world, sum_over_ranks
from repcodec.errors import RepCodecError
from repcodec.kmeans import KMeansTokenizer
from repcodec.labels import SPEAKER, matched, matched_sentence, speaker_of
from repcodec.packing import Tokenizer
from repcodec.probe import BATCH_FRAMES, STEPS, ProbeData, check_held_out, phone_error_rate, probe_data
from repcodec.quantizers import fit_centroids
from repcodec.results import Result, Row
from repcodec.scores import Scores
from repcodec.shards import FeatureShards
from repcodec.tokenization import encode_shards

PROBE_SEEDS = (0, 1, 2)
"""Of the recognition probe's runs, whose spread says how much a difference between tokenizers means."""


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
    # Centred and scaled like the codec's features: distances keep their order, and scikit-learn's sums keep digits.
    mean, scale = data.statistics.mean, data.statistics.scale
    frames = (torch.from_numpy(data.train.sample(SAMPLE_FRAMES)) - mean) / torch.tensor(scale)
    fit, about["fitted_with"] = _kmeans_library()
    print(
        f"Fitting k-means of {codebook_size} codes to {len(frames):,} frames with {about['fitted_with']} …", flush=True
    )
    centroids = torch.from_numpy(fit(frames.numpy(), codebook_size, data.seed))
    tokenizer = KMeansTokenizer(centroids * scale + mean)
    tokenizer.about = {**about, **known, "repcodec_version": version("repcodec")}
    if data.train.frame_rate is not None:
        tokenizer.about["frame_rate"] = data.train.frame_rate
    tokenizer.save_pretrained(folder)
    return tokenizer


def _kmeans_library() -> tuple[Callable[[npt.NDArray[np.floating], int, int], npt.NDArray[np.float32]], str]:
    """Return what fits k-means, and its name: faiss where it is installed, which is faster, else scikit-learn."""
    try:
        import faiss
    except ImportError:
        return fit_centroids, f"scikit-learn {version('scikit-learn')}"

    def fit(frames: npt.NDArray[np.floating], codebook_size: int, seed: int) -> npt.NDArray[np.float32]:
        if len(frames) < codebook_size:
            raise RepCodecError(
                f"k-means of {codebook_size} codes needs at least as many frames, found {len(frames)}; take a smaller "
                "codebook or more speech."
            )
        most = -(-len(frames) // codebook_size)  # points a centroid: all frames, faiss would draw some
        kmeans = faiss.Kmeans(
            frames.shape[1],
            codebook_size,
            niter=100,
            seed=seed,
            min_points_per_centroid=1,
            max_points_per_centroid=most,
        )
        kmeans.train(np.ascontiguousarray(frames, dtype=np.float32))
        centroids: npt.NDArray[np.float32] = kmeans.centroids
        return centroids

    return fit, f"faiss {faiss.__version__}"


@dataclass(frozen=True)
class Measures:
    """What is measured besides reconstruction, use of the codes and agreement with phones.

    Attributes:
        corpus: codes used over all splits together, and the error of the validation split.
        abx: ABX errors of codes and reconstruction; needs phone labels.
        probe: the recognition probe, trained on the split "train"; needs phone labels.
        speaker: regular expression of the speaker in an utterance's id.
    """

    corpus: bool = False
    abx: bool = False
    probe: bool = False
    speaker: str = SPEAKER


class Evaluation:
    """One split of a set of features, on which tokenizers are measured alike.

    In several processes each codes every n-th utterance; all of them get the same results.

    Attributes:
        shards: the split.
        ids: of its utterances; their numbers where the shards do not name them.
    """

    def __init__(self, data: FeaturesDataModule, split: str = "test", measures: Measures | None = None):
        """Open the split and match the labels.

        Args:
            data: the feature set; its training split gives the mean.
            split: which split the figures are of.
            measures: what is measured besides the usual.

        Raises:
            RepCodecError: there is no such split, it names no utterances though there are labels, labels are not of
                its utterances, or a measure needs labels that are missing.
        """
        self.data, self.split, self.measures = data, split, measures or Measures()
        self.labels = data.phone_labels
        self.shards, self.ids, self.keys = self._open(split, say=True)
        if self.labels is None and (self.measures.abx or self.measures.probe):
            raise RepCodecError("abx and probe need phone labels: give data.labels=FILE, or turn them off.")
        if self.measures.abx and self.labels is not None:
            self._items = abx_items(self.labels, self.ids, self._speakers(self.ids))
        if self.measures.probe:
            self._probe_train = self._open("train")
            check_held_out(self._speakers(self._probe_train[1]), self._speakers(self.ids))
            self._probe_numbers = self._chosen_for_probe()

    def _open(self, split: str, say: bool = False) -> tuple[FeatureShards, list[str], list[str | None]]:
        """Return a split, the ids of its utterances and the labels' ids of them."""
        shards = self.data.opened(split)
        ids = shards.ids or [str(number) for number in range(len(shards))]
        if self.labels is None:
            return shards, ids, [None] * len(ids)
        if shards.ids is None or shards.frame_rate is None:
            raise RepCodecError(f"{shards.folder}: no .json names the utterances, so phone labels cannot be matched.")
        keys = matched(self.labels, ids)
        self.labels.check_durations(keys, (shards.lengths / shards.frame_rate).tolist())
        if say and rank_and_world()[0] == 0:
            print(matched_sentence(keys), flush=True)
        return shards, ids, keys

    def _chosen_for_probe(self) -> set[int]:
        """Choose which utterances with labels the probe trains on, at random: as many as its steps can take."""
        shards, _, keys = self._probe_train
        labelled = [number for number, key in enumerate(keys) if key is not None]
        drawn = np.random.default_rng(self.data.seed).permutation(labelled)
        fit = np.cumsum(shards.lengths[drawn]) <= STEPS * BATCH_FRAMES
        return set(drawn[: max(1, int(fit.sum()))].tolist()) if len(labelled) else set()

    def _speakers(self, ids: Sequence[str]) -> list[str]:
        return [speaker_of(utterance, self.measures.speaker) for utterance in ids]

    @property
    def frame_rate(self) -> float:
        """Frames per second of the features."""
        return self.shards.frame_rate or FRAME_RATE

    def measure(self, tokenizer: Tokenizer, name: str) -> Result:
        """Measure a tokenizer.

        Args:
            tokenizer: a codec or a k-means model, on its device.
            name: what tables call it.

        Raises:
            RepCodecError: the tokenizer takes another width, or a value is not finite.
        """
        if tokenizer.dim != self.data.dim:
            raise RepCodecError(
                f"{name} takes features of width {tokenizer.dim}, but {self.data.source} holds width {self.data.dim}; "
                "choose the encoder it was trained on with encoder=…"
            )
        rate, mean = self.frame_rate / tokenizer.stride, self.data.statistics.mean
        shape = tokenizer.num_codebooks, tokenizer.codebook_size, rate
        scores = Scores(*shape, self.labels, mean)
        codes = self._pass(tokenizer, name, self.split, scores, keep=self.measures.abx or self.measures.probe)
        result = scores.result(name)
        if self.split == "valid":
            result.row.valid_normalized_error = result.row.normalized_error
        used, train = result.usage > 0, codes
        for split in self._other_splits():
            # Only the validation split's error is asked for: nothing else need be decoded.
            scores = Scores(*shape, None, mean if split == "valid" else None)
            kept = self._pass(tokenizer, name, split, scores, keep=self.measures.probe and split == "train")
            of_split = scores.result(name)
            used = used | (of_split.usage > 0)
            if split == "train":
                train = kept
            elif split == "valid":
                result.row.valid_normalized_error = of_split.row.normalized_error
        if self.measures.corpus:
            result.row.corpus_used_share = float(used.mean())
        if self.measures.abx:
            of_codes = self._abx(lambda number: codes[number].T.numpy(), rate, "different")
            decoded = self._abx(lambda number: _decoded(tokenizer, codes[number]).numpy(), self.frame_rate, "angular")
            result.row.abx_within, result.row.abx_across = of_codes.within, of_codes.across
            result.row.abx_kind, result.row.abx_items = of_codes.kind, of_codes.items
            result.row.abx_reconstruction_within = decoded.within
            result.row.abx_reconstruction_across = decoded.across
        if self.measures.probe:
            heard = self._probe_data(train, self._probe_train[2], rate, "train")
            unheard = self._probe_data(codes, self.keys, rate, self.split)
            self._probe(result.row, name, heard, unheard, tokenizer.codebook_size)
        return result

    def measure_features(self) -> Result:
        """Measure the features themselves: what no code can beat, where a measure is of phones."""
        row = Row(name="features")
        if self.measures.abx:
            errors = self._abx(self.shards.read, self.frame_rate, "angular")
            row.abx_within, row.abx_across = errors.within, errors.across
            row.abx_kind, row.abx_items = errors.kind, errors.items
        if self.measures.probe:
            shards, _, keys = self._probe_train
            train, test = (
                self._probe_data({n: torch.from_numpy(s.read(n)) for n in numbers}, k, self.frame_rate, split)
                for s, k, split, numbers in (
                    (shards, keys, "train", self._probe_numbers),
                    (self.shards, self.keys, self.split, range(len(self.shards))),
                )
            )
            self._probe(row, row.name, train, test, None)
        return Result(row, np.zeros((0, 0), dtype=np.int64))

    def _other_splits(self) -> list[str]:
        """Return which splits have to be coded besides the one that figures are of."""
        return [
            split
            for split in ("train", "valid", "test")
            if split != self.split
            and ((self.measures.corpus and self.data.has_split(split)) or (self.measures.probe and split == "train"))
        ]

    def _pass(self, tokenizer: Tokenizer, name: str, split: str, scores: Scores, keep: bool) -> dict[int, Tensor]:
        """Code this rank's utterances of a split and count them; return the codes (K, N) of all ranks, if kept."""
        scored = split == self.split
        shards = self.data.opened(split)
        rank, world = rank_and_world()
        numbers = range(rank, len(shards), world)
        codes: dict[int, Tensor] = {}
        encoded = encode_shards(tokenizer, shards, f"{name}, {split}", numbers)
        for number, (features, found) in zip(numbers, encoded, strict=True):
            reconstruction = None
            if scores.mean is not None:
                reconstruction = _decoded(tokenizer, found)[: len(features)]
                features = features[: len(reconstruction)]  # a converted strided codec leaves a rest at the end out
            utterance, key = (self.ids[number], self.keys[number]) if scored else (str(number), None)
            scores.add(utterance, found, key, features, reconstruction)
            if keep and (scored or number in self._probe_numbers):
                codes[number] = found
        return of_all_ranks(codes)

    def _abx(self, frames: Callable[[int], npt.NDArray[np.number]], frame_rate: float, distance: Distance) -> AbxErrors:
        """Return ABX errors over the cells of all ranks."""
        sums = abx_sums(self._items, frames, frame_rate, distance, *rank_and_world())
        sums.table[:] = sum_over_ranks(torch.from_numpy(sums.table)).numpy()
        return sums.errors()

    def _probe_data(
        self, inputs: Mapping[int, Tensor], keys: Sequence[str | None], rate: float, split: str
    ) -> ProbeData:
        assert self.labels is not None
        numbers = [number for number in sorted(inputs) if keys[number] is not None]
        utterances = [str(keys[number]) for number in numbers]
        return probe_data(self.labels, utterances, [inputs[number] for number in numbers], rate, f"split {split}")

    def _probe(self, row: Row, name: str, train: ProbeData, test: ProbeData, codebook_size: int | None) -> None:
        """Train the probe once a seed, each rank its share of the seeds, and note the error rates."""
        assert self.labels is not None
        rank, world = rank_and_world()
        rates = {
            seed: phone_error_rate(
                train, test, num_phones=len(self.labels.phones), codebook_size=codebook_size, seed=seed,
                description=f"{name}, probe",
            )
            for seed in PROBE_SEEDS[rank::world]
        }  # fmt: skip
        rates = of_all_ranks(rates)
        row.phone_error_rates = [rates[seed] for seed in PROBE_SEEDS]
        row.phone_error_rate = float(np.mean(row.phone_error_rates))


@torch.inference_mode()
def _decoded(tokenizer: Tokenizer, codes: Tensor) -> Tensor:
    """Codes (K, N) -> (N * stride, D) on the CPU."""
    if codes.shape[1] == 0:
        return torch.zeros(0, tokenizer.output_dim)
    return tokenizer.decode(codes[None].to(tokenizer.device))[0].cpu()
