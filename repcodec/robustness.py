"""Robustness: how far tokens change when noise, gain, speed or a room change the sound but not what is said.

Letters: S samples, T frames, N codes an utterance, K codebooks.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from rapidfuzz.distance import Levenshtein
from torch import Tensor
from tqdm import tqdm

from repcodec.audio import SAMPLE_RATE
from repcodec.errors import RepCodecError
from repcodec.packing import Tokenizer, encode_packed
from repcodec.speech_encoders import BATCH_SECONDS, SpeechEncoder, batches_of
from repcodec.tokens import run_lengths

AUGMENTATIONS = ("noise", "gain", "speed", "reverberation")
"""What the sound is changed by, one at a time."""

NOISE_SNR = (5.0, 15.0)
"""Decibels that the speech is louder than white noise added to it."""

GAIN = (-10.0, 10.0)
"""Decibels; the samples stay floats, so nothing is clipped."""

SPEED = (0.9, 1.1)
"""Factors, either of them: resampled as a tape that runs slower or faster, so that the pitch changes too."""

ROOM = ((4.0, 3.0, 2.5), (8.0, 6.0, 3.5))
"""Metres: length, width and height of the smallest and of the largest room."""

REVERBERATION_TIME = (0.2, 0.6)
"""Seconds in which a room's sound falls by 60 dB, RT60; by Sabine's formula for its walls."""


def augment(name: str, sound: npt.NDArray[np.float32], seed: int) -> npt.NDArray[np.float32]:
    """Change a sound; what is drawn depends on the seed alone.

    Noise is white and mixed in by lhotse, whose are gain and speed too (Ko et al. 2015). A room is a box whose impulse
    response pyroomacoustics computes by the image source method (Allen and Berkley 1979); lhotse convolves with it,
    keeps length and energy, and shifts the direct sound to where it was.

    Args:
        name: of `AUGMENTATIONS`.
        sound: (S,) float32 at 16 kHz.
        seed: of the strength, drawn uniformly from the range above, of the noise and of the room.

    Returns:
        (S',) float32 at 16 kHz; S' is S but for the speed.

    Raises:
        RepCodecError: there is no such augmentation, the sound is no sound, or a library is missing.
    """
    if name not in AUGMENTATIONS:
        raise RepCodecError(f"{name}: no such augmentation; known: {', '.join(AUGMENTATIONS)}.")
    if sound.ndim != 1 or not len(sound) or not np.isfinite(sound).all():
        raise RepCodecError(f"a sound of shape {sound.shape}: expected (samples,), at least one, all of them finite.")
    try:
        from lhotse.audio.mixer import AudioMixer
        from lhotse.augmentation import ReverbWithImpulseResponse, Speed, Volume
    except ImportError as error:
        raise RepCodecError("augmented speech needs lhotse: pip install 'repcodec[evaluation]'.") from error
    draw = np.random.default_rng(seed)
    samples = np.asarray(sound, dtype=np.float32)[None]
    if name == "noise":
        mixer = AudioMixer(samples, SAMPLE_RATE)
        if samples.any():  # silence has no level that noise could be set against
            mixer.add_to_mix(draw.standard_normal(samples.shape, dtype=np.float32), snr=draw.uniform(*NOISE_SNR))
        samples = mixer.mixed_audio
    elif name == "gain":
        samples = Volume(10 ** (draw.uniform(*GAIN) / 20))(samples, SAMPLE_RATE)
    elif name == "speed":
        samples = Speed(float(draw.choice(SPEED)))(samples, SAMPLE_RATE)
    else:
        response = _room_response(draw)[None]
        reverb = ReverbWithImpulseResponse(rir_generator=lambda nsource: response)
        samples = reverb(samples, SAMPLE_RATE)
    changed: npt.NDArray[np.float32] = samples[0].astype(np.float32)
    return changed


def _room_response(draw: np.random.Generator) -> npt.NDArray[np.floating]:
    """Return the impulse response, at 16 kHz, from one place to another in a room, all three drawn."""
    try:
        import pyroomacoustics
    except ImportError as error:
        raise RepCodecError("reverberation needs pyroomacoustics: pip install 'repcodec[evaluation]'.") from error
    size = draw.uniform(*ROOM)
    absorption, order = pyroomacoustics.inverse_sabine(draw.uniform(*REVERBERATION_TIME), size)
    room = pyroomacoustics.ShoeBox(size, SAMPLE_RATE, materials=pyroomacoustics.Material(absorption), max_order=order)
    room.add_source(draw.uniform(0.1, 0.9, 3) * size)
    room.add_microphone(draw.uniform(0.1, 0.9, 3) * size)
    room.compute_rir()
    response: npt.NDArray[np.floating] = room.rir[0][0]
    return response


@dataclass
class UnitEdits:
    """What augmentation changed in a tokenizer's tokens; those of several processes, of their own sounds each, add up.

    Attributes:
        edits: by augmentation, insertions, deletions and substitutions from the tokens of the clean speech to those of
            the augmented, runs of equal tokens counting as one in both.
        units: tokens of the clean speech, likewise.
        utterances: how many were compared.
        left_out: how many were too short for a token.
    """

    edits: Counter[str] = field(default_factory=Counter)
    units: int = 0
    utterances: int = 0
    left_out: int = 0

    def __add__(self, other: "UnitEdits") -> "UnitEdits":
        return UnitEdits(
            self.edits + other.edits,
            self.units + other.units,
            self.utterances + other.utterances,
            self.left_out + other.left_out,
        )

    def distances(self) -> dict[str, float]:
        """Return the unit edit distance of each augmentation: edits a token of the clean speech.

        0: augmentation changes nothing; 1: it takes as many edits as there are tokens.

        Raises:
            RepCodecError: no utterance could be compared.
        """
        if not self.units:
            raise RepCodecError(f"no sound is long enough for a token; {self.left_out} were left out as too short.")
        return {name: self.edits[name] / self.units for name in AUGMENTATIONS}


def count_edits(clean: npt.NDArray[np.int64], augmented: npt.NDArray[np.int64]) -> tuple[int, int]:
    """Return the edits between two utterances' codes (K, N), and the units of the first.

    A unit is a run of frames in which the codes of all codebooks stay the same.
    """
    first, second = (list(map(tuple, run_lengths(codes)[0].T.tolist())) for codes in (clean, augmented))
    return Levenshtein.distance(first, second), len(first)


@torch.inference_mode()
def unit_edits(
    encoder: SpeechEncoder,
    tokenizers: Mapping[str, Tokenizer],
    sounds: Iterable[tuple[str, npt.NDArray[np.float32]]],
    seed: int = 0,
) -> dict[str, UnitEdits]:
    """Compare the tokens of each sound with those of the same sound augmented, in every way of `AUGMENTATIONS`.

    The measure is the unit edit distance of Gat et al. 2023, "Augmentation Invariant Discrete Representation for
    Generative Spoken Language Modeling" (arXiv 2209.15483): Levenshtein's distance from the deduplicated tokens of the
    clean speech to those of the augmented, by the number of the former; edits and tokens are added up over the
    utterances before they are divided, as in NAST (Messica and Adi 2024).

    Args:
        encoder: whose features all the tokenizers take; it runs once for each version of a sound.
        tokenizers: by name, on the encoder's device, in evaluation mode.
        sounds: id, and (S,) float32 samples at 16 kHz; with its id and the seed, a sound is always augmented alike.
        seed: of what is drawn.

    Returns:
        What changed, by the tokenizer's name.

    Raises:
        RepCodecError: a tokenizer takes features of another encoder or layer, a sound is no sound, or a library is
            missing.
    """
    for name, tokenizer in tokenizers.items():
        _check_takes(name, tokenizer, encoder)
    found = {name: UnitEdits() for name in tokenizers}
    for utterance, sound in tqdm(sounds, desc="Augmenting", unit="utterance"):
        if encoder.num_frames(len(sound)) == 0:
            for counts in found.values():
                counts.left_out += 1
            continue
        seeds = {name: _seed(seed, name, utterance) for name in AUGMENTATIONS}
        versions = [sound, *(augment(name, sound, seeds[name]) for name in AUGMENTATIONS)]
        features = _features(encoder, versions)
        for name, tokenizer in tokenizers.items():
            codes = [codes.T.cpu().numpy() for codes in encode_packed(tokenizer, features)]
            counts = found[name]
            if min(version.shape[1] for version in codes) == 0:  # played faster, or of a codec that downsamples
                counts.left_out += 1
                continue
            for augmentation, version in zip(AUGMENTATIONS, codes[1:], strict=True):
                edits, units = count_edits(codes[0], version)
                counts.edits[augmentation] += edits
            counts.units += units
            counts.utterances += 1
    return found


def _check_takes(name: str, tokenizer: Tokenizer, encoder: SpeechEncoder) -> None:
    """Refuse a tokenizer of another speech encoder's features, as far as its config.json tells."""
    about = tokenizer.about
    if about.get("encoder_sha256") and encoder.weights_sha256:  # of the weights up to the layer
        is_other = about["encoder_sha256"] != encoder.weights_sha256
    else:
        is_other = about.get("layer") not in (None, encoder.layer)
    if is_other or tokenizer.dim != encoder.dim:
        raise RepCodecError(
            f"{name} takes the features of {about.get('encoder', 'an encoder')}, layer {about.get('layer')}, of width "
            f"{tokenizer.dim}, but this encoder is another one or gives layer {encoder.layer}, of width {encoder.dim}; "
            "compare tokenizers of one encoder and layer at a time."
        )


def _seed(seed: int, *names: str) -> int:
    """Return a seed for what has these names: the same in every process and order."""
    return int.from_bytes(hashlib.sha256("\n".join([str(seed), *names]).encode()).digest()[:8])


def _features(encoder: SpeechEncoder, sounds: list[npt.NDArray[np.float32]]) -> list[Tensor]:
    """Run the encoder over sounds (S,), as many at once as it takes; return the features (T, D) of each."""
    device = next(encoder.parameters()).device
    waveforms = [torch.from_numpy(sound).to(device) for sound in sounds]
    batches = batches_of([len(sound) for sound in sounds], BATCH_SECONDS)
    return [features for batch in batches for features in encoder([waveforms[i] for i in batch])]
