"""Tokenizers, k-means baselines and tokens files side by side: each is measured once, and kept for the next run."""

import hashlib
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from repcodec.audio import SAMPLE_RATE, read_audio
from repcodec.audio_data import AudioDataModule
from repcodec.checkpoint import read_config
from repcodec.codec import RepCodec
from repcodec.data import FeaturesDataModule
from repcodec.distributed import first_rank_first, of_all_ranks, rank_and_world, several_ranks
from repcodec.errors import RepCodecError
from repcodec.evaluation import Evaluation, Measures, fit_kmeans
from repcodec.hub import local_folder
from repcodec.kmeans import KMeansTokenizer
from repcodec.labels import PhoneLabels
from repcodec.logs import read_validations
from repcodec.manifest import Manifest, utterance_id
from repcodec.packing import Tokenizer, encode_packed
from repcodec.pipeline import load_encoder_of, load_tokenizer
from repcodec.results import Example, Result, Row, load_result, save_result
from repcodec.robustness import UnitEdits, unit_edits
from repcodec.speech_encoders import SpeechEncoder
from repcodec.tokenization import check_fits, kmeans_label, label
from repcodec.tokens import read_root, read_tokens
from repcodec.tokens_evaluation import TokensFacts, measure_tokens

NUM_EXAMPLES, EXAMPLE_SECONDS = 3, 3.5
"""Utterances that the report shows, and about how long they are."""

MEASURES_VERSION = 1
"""Of what figures mean, part of what results are kept under: another definition takes another number."""

MOST_LOOKED_AT = 1000
"""Utterances of a tokens file that these are chosen from."""


@dataclass(frozen=True)
class Plan:
    """What is compared, and on what.

    Attributes:
        run_dir: where results and k-means models are kept.
        data: the features; None: there are tokens files only.
        split: which split the figures are of.
        measures: what is measured besides the usual.
        robustness: whether to measure how far tokens change with the sound; needs the sounds and the speech encoder.
        tokenizers: folders of saved codecs and k-means models, and files of scikit-learn's k-means models.
        kmeans: sizes of the baselines, fitted on the training split.
        tokens: tokens files.
        facts: what is known of the codes in those.
        labels: phones for those.
        allow_pickle: whether scikit-learn's models may be unpickled.
        device: where tokenizers run.
    """

    run_dir: Path
    data: FeaturesDataModule | None
    split: str
    measures: Measures
    robustness: bool
    tokenizers: Sequence[str]
    kmeans: Sequence[int]
    tokens: Sequence[str]
    facts: TokensFacts
    labels: PhoneLabels | None
    allow_pickle: bool
    device: torch.device


class Comparison:
    """Measures what a plan says; every process of a group does its share, and all have the results.

    Attributes:
        plan: what it is.
        evaluation: of the tokenizers on the features; None where there are none.
    """

    def __init__(self, plan: Plan):
        """Load and check everything before anything is measured.

        Raises:
            RepCodecError: there is nothing to compare, or something cannot be read or does not fit.
        """
        if not (plan.tokenizers or plan.kmeans or plan.tokens):
            raise RepCodecError("tokenizers, kmeans and tokens are all empty: name at least one tokenizer to evaluate.")
        self.plan = plan
        self.evaluation = Evaluation(plan.data, plan.split, plan.measures) if plan.data is not None else None
        self._tokenizers: dict[str, tuple[Tokenizer, str]] = {}  # by name; and the hash of its weights
        self._curves: dict[str, list[tuple[int, float]]] = {}
        loaded = [(place, *self._load(place)) for place in dict.fromkeys(plan.tokenizers)]
        kinds = Counter(label(tokenizer) for _, tokenizer, _ in loaded)
        kinds.update(kmeans_label(size) for size in plan.kmeans)
        for place, tokenizer, digest in loaded:
            name = label(tokenizer) if kinds[label(tokenizer)] == 1 else f"{label(tokenizer)}, {place}"
            self._tokenizers[name] = tokenizer, digest
            self._curves[name] = _curve_of(place) if isinstance(tokenizer, RepCodec) else []
        for path in plan.tokens:
            if not os.path.isfile(path):
                raise RepCodecError(f"{path}: no such tokens file.")
        manifest = plan.facts.manifest
        self._manifest_sha256 = Manifest.read(manifest).sha256() if manifest is not None else None
        self._labels_sha256 = plan.labels.sha256() if plan.labels is not None else None

    def _load(self, place: str) -> tuple[Tokenizer, str]:
        """Load a tokenizer; return it with the hash of its weights."""
        assert self.evaluation is not None
        tokenizer: RepCodec | KMeansTokenizer
        if os.path.isfile(place):
            tokenizer = KMeansTokenizer.from_joblib(place, self.plan.allow_pickle)
            digest = hashlib.sha256(Path(place).read_bytes()).hexdigest()
        else:
            tokenizer, digest = load_tokenizer(place), str(read_config(local_folder(place)).get("weights_sha256"))
        check_fits(tokenizer, place, self.evaluation.shards)
        return tokenizer.to(self.plan.device), digest

    def run(self) -> list[Result]:
        """Measure everything that an earlier run has not measured.

        Raises:
            RepCodecError: a value is not finite, a tokens file is damaged, or a result cannot be kept.
        """
        plan, results = self.plan, []
        if self.evaluation is not None:
            assert plan.data is not None
            for size in plan.kmeans:
                folder = plan.run_dir / f"kmeans-{size}"
                with first_rank_first() as first:
                    kmeans = fit_kmeans(plan.data, size, folder) if first else None
                kmeans = kmeans or KMeansTokenizer.from_pretrained(folder)
                digest = str(read_config(folder).get("weights_sha256"))
                self._tokenizers[kmeans_label(size)] = kmeans.to(plan.device), digest
            for name, (tokenizer, digest) in self._tokenizers.items():
                result = self._once(name, {"tokenizer": digest}, partial(self.evaluation.measure, tokenizer, name))
                result.curve = self._curves.get(name, [])
                results.append(result)
            if plan.robustness:
                self._measure_robustness(results)
            if plan.measures.abx or plan.measures.probe:
                results.append(self._once("features", {}, self.evaluation.measure_features))
        for name, path in self._named_files():
            about = {"tokens": [os.path.getsize(path), os.stat(path).st_mtime_ns]}
            results.append(self._once(name, about, partial(self._measure_tokens, path, name)))
        return results

    def _named_files(self) -> list[tuple[str, str]]:
        """Return what tables call the tokens files, by their names where these differ, and where they are."""
        paths = self.plan.tokens
        names = [Path(path).name for path in paths]
        return list(zip(names if len(set(names)) == len(names) else paths, paths, strict=True))

    def _measure_tokens(self, path: str, name: str) -> Result:
        speaker = self.plan.measures.speaker if self.plan.measures.abx else None
        return measure_tokens(path, name, self.plan.labels, self.plan.facts, speaker, *rank_and_world())

    def _key(self) -> dict[str, Any]:
        """Say what results are of, so that those of something else are not taken for them."""
        plan = self.plan
        facts = {name: str(value) for name, value in asdict(plan.facts).items()}
        key: dict[str, Any] = {"split": plan.split, "measures": asdict(plan.measures), "labels": self._labels_sha256}
        key |= {"facts": facts, "manifest": self._manifest_sha256, "version": MEASURES_VERSION}
        if plan.data is not None and self.evaluation is not None:
            key["features"] = [self.evaluation.shards.stamp, plan.data.train.stamp, str(plan.data.source)]
            key["seed"] = plan.data.seed  # of what the probe trains on
        return key

    def _once(self, name: str, about: dict[str, Any], measure: Callable[[], Result]) -> Result:
        """Return a result that was kept, or measure and keep it."""
        found = [load_result(*self._place(name, about))]
        if several_ranks():
            dist.broadcast_object_list(found)
        if found[0] is not None:
            if rank_and_world()[0] == 0:
                print(f"{name}: measured before", flush=True)
            return found[0]
        result = measure()
        self._keep(result, about)
        return result

    def _keep(self, result: Result, about: dict[str, Any]) -> None:
        if rank_and_world()[0] == 0:
            save_result(result, *self._place(result.row.name, about))

    def _place(self, name: str, about: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
        """Return where a result is kept, and what says that it is this one."""
        key = {"name": name, **about, **self._key()}
        slug = re.sub(r"[^0-9A-Za-z.]+", "-", name).strip("-.")[-60:]
        return self.plan.run_dir / "measured" / f"{slug}-{zlib.crc32(name.encode()):08x}.json", key

    def _measure_robustness(self, results: list[Result]) -> None:
        """Measure all tokenizers that lack it at once, since they share the speech encoder."""
        assert self.evaluation is not None
        lacking = {r.row.name: self._tokenizers[r.row.name] for r in results if r.row.unit_edit_distance is None}
        if not lacking:
            return
        encoder = self._encoder([tokenizer for tokenizer, _ in lacking.values()]).to(self.plan.device)
        rank, world = rank_and_world()
        numbers = range(rank, len(self.evaluation.ids), world)
        edits = unit_edits(encoder, {name: t for name, (t, _) in lacking.items()}, map(self._sound, numbers))
        every = of_all_ranks({(rank, name): found for name, found in edits.items()})
        for result in results:
            name = result.row.name
            if name in lacking:
                parts = [part for (_, other), part in every.items() if other == name]
                result.row.unit_edit_distance = sum(parts, UnitEdits()).distances()
                self._keep(result, {"tokenizer": lacking[name][1]})

    def _encoder(self, tokenizers: Sequence[Tokenizer]) -> SpeechEncoder:
        """Load the speech encoder of the features, from where they say it is or a tokenizer does."""
        assert self.plan.data is not None
        if isinstance(self.plan.data, AudioDataModule):
            return self.plan.data.speech_encoder
        known = [tokenizer for tokenizer in tokenizers if tokenizer.about.get("encoder") is not None]
        place = self.plan.data.about_features.get("encoder_model")
        is_there = place is not None and Path(place).is_dir()
        return load_encoder_of((known or tokenizers)[0], place if is_there else None)

    def _sound(self, number: int) -> tuple[str, npt.NDArray[np.float32]]:
        """Return id and samples of an utterance of the features."""
        assert self.evaluation is not None
        return self.evaluation.ids[number], self.evaluation.shards.waveform(number)

    def facts(self) -> dict[str, str]:
        """Say what was compared on what, for the head of the report."""
        facts = {}
        if self.evaluation is not None and (data := self.plan.data) is not None:
            minutes = float(self.evaluation.shards.lengths.sum()) / self.evaluation.frame_rate / 60
            facts["features"] = f"{data.encoder}, layer {data.layer}, width {data.dim}"
            facts["set"] = (
                f"{self.plan.split}, {len(self.evaluation.ids):,} utterances, {minutes:.1f} minutes, of {data.source}"
            )
        if self.plan.tokens:
            facts["tokens"] = ", ".join(map(str, self.plan.tokens))
        if self.plan.labels is not None:
            facts["labels"] = self.plan.labels.source
        return facts

    @torch.inference_mode()
    def examples(self, results: Sequence[Result]) -> list[Example]:
        """Return a few short utterances with the codes that each tokenizer gives them; take what `run` has found."""
        return self._examples_of_features() if self.evaluation is not None else self._examples_of_tokens(results[0].row)

    def _examples_of_features(self) -> list[Example]:
        evaluation = self.evaluation
        assert evaluation is not None
        shards, rate = evaluation.shards, evaluation.frame_rate
        shown = []
        for number in _chosen((shards.lengths / rate).tolist(), evaluation.keys):
            codes = {}
            for name, (tokenizer, _) in self._tokenizers.items():
                features = torch.from_numpy(shards.read(number)).to(self.plan.device)
                (found,) = encode_packed(tokenizer, [features])
                codes[name] = found[:, 0].cpu().numpy(), rate / tokenizer.stride
            utterance, sound = evaluation.ids[number], _if_there(partial(shards.waveform, number))
            phones = _phones(evaluation.labels, evaluation.keys[number])
            duration = len(sound) / SAMPLE_RATE if sound is not None else float(shards.lengths[number] / rate)
            shown.append(Example(utterance, duration, sound, phones, codes))
        return shown

    def _examples_of_tokens(self, row: Row) -> list[Example]:
        """Return utterances of the first tokens file, of which the row is."""
        (name, path), *_ = self._named_files()
        labels = self.plan.labels
        assert row.codes_per_second is not None
        rate = row.codes_per_second / row.num_codebooks
        found = list(islice(read_tokens(path), MOST_LOOKED_AT))
        ids = [utterance_id(tokens.name) for tokens in found]
        keys = [labels.key(utterance) if labels is not None else None for utterance in ids]
        shown = []
        for number in _chosen([tokens.codes.shape[1] / rate for tokens in found], keys):
            sound = _if_there(partial(read_audio, Path(read_root(path)) / found[number].name))
            codes = {name: (found[number].codes[0], rate)}
            duration = found[number].codes.shape[1] / rate
            shown.append(Example(ids[number], duration, sound, _phones(labels, keys[number]), codes))
        return shown


def _chosen(durations: Sequence[float], keys: Sequence[str | None]) -> list[int]:
    """Return the utterances nearest to a good length, those with labels first, in order."""
    has_labels = any(key is not None for key in keys)
    fit = [n for n, key in enumerate(keys) if (key is not None or not has_labels) and durations[n] > 0]
    return sorted(sorted(fit, key=lambda n: abs(durations[n] - EXAMPLE_SECONDS))[:NUM_EXAMPLES])


def _phones(labels: PhoneLabels | None, key: str | None) -> list[tuple[float, float, str]]:
    if labels is None or key is None:
        return []
    starts, ends, phones = (column.tolist() for column in labels.segments(key))
    return [(start, end, labels.phones[phone]) for start, end, phone in zip(starts, ends, phones, strict=True)]


def _if_there(read: Callable[[], npt.NDArray[np.float32]]) -> npt.NDArray[np.float32] | None:
    """Read a sound; None where it is no longer there: the report then shows the rest."""
    try:
        return read()
    except RepCodecError:
        return None


def _curve_of(place: str) -> list[tuple[int, float]]:
    """Return (step, normalized error) of each validation of a codec that still lies in the folder of its run."""
    rows = read_validations(local_folder(place).parent / "validations.csv")
    return [(int(row["step"]), row["valid/normalized_error"]) for row in rows if "valid/normalized_error" in row]
