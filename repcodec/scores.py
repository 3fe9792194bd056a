"""What is counted of codes, utterance by utterance, in bounded memory; added up over processes at the end.

Axes: K codebooks, N codes an utterance, T frames, D feature width.
"""

import math

import torch
from torch import Tensor

from repcodec.labels import PhoneLabels
from repcodec.metrics import CodeUsage, PhoneAgreement, PhoneBootstrap, RunCount, UtteranceRatio
from repcodec.results import Result, Row

PHONES_PER_SECOND = 100
"""Phones are compared with codes every 10 ms, as aligners give them: a code of 20 ms counts for both of its halves."""

WAITING = 100_000
"""Codes that wait, at most, until they are counted together."""

MOST_BY_CHANCE = 0.05
"""PNMI that could be chance, from which on a reader is warned."""


class Scores:
    """Counts over utterances; every process adds its own, then all of them ask for the result together."""

    def __init__(
        self,
        num_codebooks: int,
        codebook_size: int,
        codes_per_second: float,
        labels: PhoneLabels | None = None,
        mean: Tensor | None = None,
    ):
        """Take what the codes are.

        Args:
            num_codebooks, codebook_size: K and V.
            codes_per_second: of each codebook.
            labels: phones; None: there are none.
            mean: (D,) of the training set's features; None: there is no reconstruction.
        """
        self.num_codebooks, self.codebook_size = num_codebooks, codebook_size
        self.codes_per_second, self.labels = codes_per_second, labels
        self.usage, self.runs = CodeUsage(num_codebooks, codebook_size), RunCount()
        self.mean = mean.double() if mean is not None else None
        self.error, self.cosine = UtteranceRatio(), UtteranceRatio()
        # A code counts for so many phones, so that codes of any rate are compared with the phones of the same times.
        self.phones_per_code = max(1, round(PHONES_PER_SECOND / codes_per_second))
        self._codes: list[Tensor] = []
        self._pairs: list[Tensor] = []
        self._waiting = 0
        sizes = (len(labels.phones), codebook_size) if labels is not None else None
        self.agreement = PhoneAgreement(*sizes) if sizes else None
        self.bootstrap = PhoneBootstrap(*sizes) if sizes else None

    def add(
        self,
        utterance: str,
        codes: Tensor,
        key: str | None = None,
        features: Tensor | None = None,
        reconstruction: Tensor | None = None,
    ) -> None:
        """Count an utterance.

        Args:
            utterance: its id.
            codes: (K, N) int64.
            key: the labels' id of it; None: it has none.
            features, reconstruction: (T, D), where there is one.
        """
        if codes.shape[1] == 0:
            return
        self.runs.update(codes)
        self._codes.append(codes)
        if features is not None and reconstruction is not None and self.mean is not None:
            x, y = features.double(), reconstruction.double()
            self.error.update(utterance, float((x - y).square().sum()), float((x - self.mean).square().sum()))
            self.cosine.update(utterance, float(torch.nn.functional.cosine_similarity(x, y).sum()), len(x))
        if key is not None and self.labels is not None and self.agreement is not None and self.bootstrap is not None:
            repeated = codes[0].repeat_interleave(self.phones_per_code)
            rate = self.codes_per_second * self.phones_per_code
            phones = torch.from_numpy(self.labels.frames(key, len(repeated), rate))
            self._pairs.append(torch.stack([phones, repeated]))
            self.bootstrap.update(utterance, phones, repeated)
        self._waiting += codes.shape[1]
        if self._waiting >= WAITING:
            self._count()

    def _count(self) -> None:
        """Count what waits: one utterance at a time would take many times as long."""
        if self._codes:
            self.usage.update(torch.cat(self._codes, 1)[None])
        if self._pairs and self.agreement is not None:
            self.agreement.update(*torch.cat(self._pairs, 1))
        self._codes, self._pairs, self._waiting = [], [], 0

    def result(self, name: str) -> Result:
        """Return the figures over all utterances of all processes; all of them have to ask."""
        self._count()
        usage = self.usage.compute()
        row = Row(
            name=name,
            num_codebooks=self.num_codebooks,
            codebook_size=self.codebook_size,
            perplexity=float(usage["perplexity"]),
            used_share=float(usage["used_share"]),
            bits_per_second=self.codes_per_second * self.num_codebooks * math.log2(self.codebook_size),
            entropy_bits_per_second=self.codes_per_second * float(usage["entropy_bits"]),
            codes_per_second=self.codes_per_second * self.num_codebooks,
            deduplicated_per_second=float(self.runs.compute()) * self.codes_per_second * self.num_codebooks,
        )
        if self.mean is not None:
            row.normalized_error, error = self.error.compute()
            row.cosine_similarity, cosine = self.cosine.compute()
            _note(row, "normalized_error", error)
            _note(row, "cosine_similarity", cosine)
        joint = None
        if self.agreement is not None and self.bootstrap is not None:
            figures = self.agreement.compute()
            joint = figures.pop("joint").numpy()
            # The phones of one code are no new evidence.
            by_chance = float(figures.pop("pnmi_by_chance")) * self.phones_per_code
            for field, value in figures.items():
                setattr(row, field, float(value))
            for field, deviations in self.bootstrap.compute().items():
                _note(row, field, deviations)
            if by_chance > MOST_BY_CHANCE:
                row.warnings.append(
                    f"about {by_chance:.2f} of the PNMI could be chance: {int(joint.sum() / self.phones_per_code):,} "
                    f"labelled codes are few for {int((joint.sum(0) > 0).sum()):,} codes in use; compare tokenizers "
                    "of one size, or score more speech."
                )
        return Result(row, usage["counts"].numpy(), joint)


def _note(row: Row, field: str, deviations: tuple[float, float]) -> None:
    """Note a 95 % interval, given how far its ends lie from the estimate."""
    estimate = getattr(row, field)
    if all(map(math.isfinite, (estimate, *deviations))):
        row.intervals[field] = (estimate + deviations[0], estimate + deviations[1])
