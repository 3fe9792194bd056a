"""Recognition: a small CTC probe, trained from tokens (or features) to phones, scored on speakers it has not heard.

It stands in for a recognizer's word error rate: the same small network, with the same number of steps, for every
tokenizer, so that error rates compare what the tokens hold and how easily it is read.

Letters: B batch, T frames, D feature width, K codebooks, V codes a codebook, H width of the probe, L phones.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from rapidfuzz.distance import Levenshtein
from torch import Tensor, nn
from torch.nn.functional import ctc_loss, gelu
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from repcodec.architecture import FRAME_RATE
from repcodec.errors import RepCodecError
from repcodec.labels import SILENCES, PhoneLabels
from repcodec.stacks import frame_mask

STEPS = 300
"""Of training, with every tokenizer. On the demo twice as many take 0.015 off the error at most, in the same order."""

WIDTH, LAYERS, KERNEL, DROPOUT = 128, 3, 5, 0.35
"""The network: H, and convolutions over KERNEL frames, so that it sees 6 frames to each side."""

BATCH_FRAMES, LEARNING_RATE, WEIGHT_DECAY, GRADIENT_NORM = 1200, 4e-3, 0.01, 1.0
"""The training: frames a step, padding included; AdamW, its rate in one cycle; the gradient's norm at most."""

EMBEDDING_SCALE = 0.1
"""Standard deviation of the first embeddings: small, so that a code hardly seen in training says little."""


@dataclass
class ProbeData:
    """Utterances for the probe; `probe_data` makes it.

    Attributes:
        inputs: of each utterance, features (T, D) float, or codes (K, T) int64; 50 frames a second or more.
        targets: of each utterance, (L,) int64, the phones in their order.
        unlabelled: how many utterances were left out, having no phone.
        too_short: how many were left out, having fewer frames than CTC needs for their phones.
    """

    inputs: list[Tensor] = field(default_factory=list)
    targets: list[Tensor] = field(default_factory=list)
    unlabelled: int = 0
    too_short: int = 0


def probe_data(
    labels: PhoneLabels,
    utterances: Sequence[str],
    inputs: Iterable[Tensor | npt.NDArray[np.number]],
    rate: float,
    source: object,
) -> ProbeData:
    """Put together what the probe is trained or scored on.

    Args:
        labels: silences (`SILENCES`) are left out of the targets.
        utterances: their ids; those without labels are left out, and counted.
        inputs: of each utterance, features (T, D) or codes (K, N).
        rate: frames, or codes of a codebook, per second. Codes slower than the features are repeated to 50 a second:
            so the probe sees as far to each side with every tokenizer, and has room for as many phones.
        source: what a message calls the utterances.

    Raises:
        RepCodecError: no utterance is left.
    """
    data = ProbeData()
    repeats = max(1, round(FRAME_RATE / rate))
    silent = [i for i, phone in enumerate(labels.phones) if phone.lower() in SILENCES]
    for utterance, values in zip(utterances, inputs, strict=True):
        phones = labels.segments(utterance)[2]
        target = torch.from_numpy(phones[~np.isin(phones, silent)])
        frames = torch.as_tensor(values)
        if not frames.is_floating_point():
            frames = frames.long().repeat_interleave(repeats, 1)
        if len(target) == 0:
            data.unlabelled += 1
        elif _num_frames(frames) < _frames_needed(target):
            data.too_short += 1
        else:
            data.inputs.append(frames)
            data.targets.append(target)
    if not data.inputs:
        raise RepCodecError(
            f"{source}: nothing for the probe: of {len(utterances)} utterances {data.unlabelled} have no phone label "
            f"and {data.too_short} fewer frames than phones; the first is {next(iter(utterances), None)!r}."
        )
    return data


def check_held_out(train_speakers: Iterable[str], test_speakers: Iterable[str]) -> None:
    """Refuse speakers that are in both sets: the probe would know them.

    Raises:
        RepCodecError: names one, and how many there are.
    """
    both = sorted(set(train_speakers) & set(test_speakers))
    if both:
        raise RepCodecError(
            f"the probe needs speakers it was not trained on, but {len(both)} are in both splits, as is {both[0]!r}; "
            "split by speaker."
        )


def phone_error_rate(
    train: ProbeData,
    test: ProbeData,
    *,
    num_phones: int,
    codebook_size: int | None,
    seed: int,
    steps: int = STEPS,
    description: str = "Probe",
) -> float:
    """Train a probe and return its phone error rate on the test set.

    The probe runs on the CPU. On one machine, with the same number of threads, it is the same for the same seed,
    whatever ran before.

    Args:
        train: what it is trained on.
        test: what it is scored on, other speakers; see `check_held_out`.
        num_phones: of the inventory that targets are indices of.
        codebook_size: V; None for features, the ceiling.
        seed: of its weights, its batches and its dropout.
        steps: of training.
        description: of the progress bar.

    Returns:
        Insertions, deletions and substitutions from the most likely phones to those said, a phone said: 0 is perfect,
        1 is what a probe that says nothing gets, and insertions can make it more.

    Raises:
        RepCodecError: a set is empty, they do not fit one another, or a code or phone is beyond its range.
    """
    _check(train, num_phones, codebook_size, "training")
    _check(test, num_phones, codebook_size, "test")
    shapes = {frames.shape[0] if codebook_size else frames.shape[1] for frames in train.inputs + test.inputs}
    if len(shapes) > 1:
        what = "numbers of codebooks" if codebook_size else "feature widths"
        raise RepCodecError(f"the probe's utterances have several {what}: {', '.join(map(str, sorted(shapes)))}.")
    # Dropout draws from the global state; and tokens are often made in inference mode.
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad():
        torch.default_generator.manual_seed(seed)
        probe = Probe(train.inputs, num_phones, codebook_size)
        _train(probe, train, seed, steps, description)
    probe.eval()
    edits = sum(
        Levenshtein.distance(said, target.tolist())
        for said, target in zip(recognize(probe, test.inputs), test.targets, strict=True)
    )
    return edits / sum(len(target) for target in test.targets)


class Probe(nn.Module):
    """Features or codes -> log probabilities of phones; but for its first layer the same for all.

    Attributes:
        blank: index of CTC's blank, the last one.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, inputs: Sequence[Tensor], num_phones: int, codebook_size: int | None):
        """Take the training utterances, features (T, D) or codes (K, T), for their statistics and their shape."""
        super().__init__()
        self.blank, self.codebook_size = num_phones, codebook_size
        if codebook_size is None:
            frames = torch.cat(list(inputs)).float()
            self.register_buffer("mean", frames.mean(0))
            self.register_buffer("scale", frames.std(0, correction=0).clamp(min=1e-5))
            self.first: nn.Linear | nn.Embedding = nn.Linear(frames.shape[1], WIDTH)
        else:
            self.first = nn.Embedding(len(inputs[0]) * codebook_size, WIDTH)
            nn.init.normal_(self.first.weight, std=EMBEDDING_SCALE)
        self.convolutions = nn.ModuleList(nn.Conv1d(WIDTH, WIDTH, KERNEL, padding="same") for _ in range(LAYERS))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(LAYERS))
        self.dropout = nn.Dropout(DROPOUT)
        self.last = nn.Linear(WIDTH, num_phones + 1)

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Run utterances, features (T, D) or codes (K, T).

        Returns:
            (B, T, phones + 1) log probabilities, T being that of the longest; and the valid frames (B,) of each.
        """
        lengths = torch.tensor([_num_frames(frames) for frames in inputs])
        if self.codebook_size is None:
            x = self.first((pad_sequence(list(inputs), batch_first=True).float() - self.mean) / self.scale)
        else:
            codes = pad_sequence([frames.T for frames in inputs], batch_first=True)
            x = self.first(codes + self.codebook_size * torch.arange(codes.shape[2])).sum(2)
        mask = frame_mask(lengths, x.shape[1])[..., None]
        x = self.dropout(x)
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = x + self.dropout(gelu(norm(convolution((x * mask).mT).mT)))
        return self.last(x).log_softmax(-1), lengths

    def loss(self, inputs: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
        """Return CTC's loss (Graves et al. 2006) a phone, averaged over the utterances."""
        log_probabilities, lengths = self(inputs)
        phones = torch.tensor([len(target) for target in targets])
        return ctc_loss(log_probabilities.transpose(0, 1), torch.cat(list(targets)), lengths, phones, blank=self.blank)


def _train(probe: Probe, data: ProbeData, seed: int, steps: int, description: str) -> None:
    """Train for `steps` batches."""
    optimizer = torch.optim.AdamW(probe.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, steps, pct_start=0.1)
    batches = _batches([_num_frames(frames) for frames in data.inputs], torch.Generator().manual_seed(seed))
    for batch in tqdm((next(batches) for _ in range(steps)), desc=f"{description}, seed {seed}", total=steps):
        loss = probe.loss([data.inputs[i] for i in batch], [data.targets[i] for i in batch])
        optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_(probe.parameters(), GRADIENT_NORM)
        optimizer.step()
        schedule.step()


def _batches(lengths: list[int], generator: torch.Generator) -> Iterator[list[int]]:
    """Yield batches of utterances of similar lengths without end, all utterances once in each round."""
    while True:
        jitter = torch.rand(len(lengths), generator=generator) * 0.2 + 0.9  # other neighbours in every round
        batches: list[list[int]] = [[]]
        for utterance in torch.argsort(torch.tensor(lengths) * jitter).tolist():
            longest = max(lengths[i] for i in [*batches[-1], utterance])
            if batches[-1] and longest * (len(batches[-1]) + 1) > BATCH_FRAMES:
                batches.append([])
            batches[-1].append(utterance)
        for i in torch.randperm(len(batches), generator=generator).tolist():
            yield batches[i]


@torch.inference_mode()
def recognize(probe: Probe, inputs: Sequence[Tensor]) -> list[list[int]]:
    """Return the phones of each utterance: the most likely of each frame, runs as one, blanks left out."""
    found = []
    for first in range(0, len(inputs), 16):
        log_probabilities, lengths = probe(inputs[first : first + 16])
        for frames, length in zip(log_probabilities.argmax(-1), lengths.tolist(), strict=True):
            runs = frames[:length].unique_consecutive()
            found.append(runs[runs != probe.blank].tolist())
    return found


def _num_frames(frames: Tensor) -> int:
    """Return T of features (T, D) or codes (K, T)."""
    return frames.shape[0] if frames.is_floating_point() else frames.shape[1]


def _frames_needed(target: Tensor) -> int:
    """Return how many frames CTC needs: one a phone, and a blank between two that are the same."""
    return len(target) + int((target[1:] == target[:-1]).sum())


def _check(data: ProbeData, num_phones: int, codebook_size: int | None, which: str) -> None:
    """Refuse what no probe can be trained on."""
    if not data.inputs:
        raise RepCodecError(f"the probe's {which} set is empty.")
    for number, (frames, target) in enumerate(zip(data.inputs, data.targets, strict=True)):
        where = f"the probe's {which} set, utterance {number}"
        if frames.is_floating_point() != (codebook_size is None) or frames.ndim != 2:
            expected = "features (frames, width)" if codebook_size is None else "codes (codebooks, frames)"
            raise RepCodecError(f"{where}: {frames.dtype} of shape {tuple(frames.shape)}, expected {expected}.")
        if codebook_size is None and not torch.isfinite(frames).all():
            raise RepCodecError(f"{where}: a feature is not finite; extract the features again.")
        if codebook_size is not None and (frames.min() < 0 or frames.max() >= codebook_size):
            raise RepCodecError(
                f"{where}: codes from {int(frames.min())} to {int(frames.max())}, but the codebook has 0 to "
                f"{codebook_size - 1}; do the codes belong to this tokenizer?"
            )
        if len(target) == 0 or target.min() < 0 or target.max() >= num_phones:
            raise RepCodecError(f"{where}: expected phones from 0 to {num_phones - 1}, found {target.tolist()[:5]} ….")
        if _num_frames(frames) < _frames_needed(target):
            raise RepCodecError(f"{where}: {_num_frames(frames)} frames are too few for {len(target)} phones.")
