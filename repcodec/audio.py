"""Read a sound file as the speech encoders want it: mono, 16 kHz, float32."""

from pathlib import Path

import numpy as np

from repcodec.errors import RepCodecError

SAMPLE_RATE = 16_000
"""Samples per second that every speech encoder takes, in hertz."""

SOUND_SUFFIXES = {".wav", ".flac", ".mp3", ".ogg", ".opus", ".aiff", ".aif"}
"""Endings of the files that `find_sound_files` takes; libsndfile reads them all."""


def read_audio(path: Path | str) -> np.ndarray:
    """Read a sound file.

    Several channels are averaged; another sampling rate is converted by soxr at its "HQ" quality.

    Args:
        path: any file libsndfile reads.

    Returns:
        (S,) float32 waveform at 16 kHz; integer samples come to [-1, 1].

    Raises:
        RepCodecError: the file is missing, unreadable, cut off, empty or holds a value that is not finite.
    """
    import soundfile

    try:
        with soundfile.SoundFile(path) as file:
            announced, rate = file.frames, file.samplerate
            samples = file.read(dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, OSError, TypeError) as error:  # TypeError: raw samples without a header
        raise RepCodecError(f"{path}: not a readable sound file ({error}); remove it or convert it.") from error
    if len(samples) < announced:
        raise RepCodecError(
            f"{path}: the sound is cut off: {len(samples)} samples, its header says {announced}; copy it again."
        )
    if not np.isfinite(samples).all():
        raise RepCodecError(f"{path}: the sound holds a value that is not finite; record or convert it again.")
    waveform = resample(samples.mean(axis=1), rate)
    if len(waveform) == 0:
        raise RepCodecError(f"{path}: the sound is empty (0 samples at 16 kHz); remove it.")
    return waveform


def resample(samples: np.ndarray, rate: int) -> np.ndarray:
    """Convert a (S,) waveform from `rate` hertz to 16 kHz; returns float32."""
    import soxr

    if rate != SAMPLE_RATE:
        samples = soxr.resample(samples, rate, SAMPLE_RATE, quality="HQ")
    return np.ascontiguousarray(samples, dtype=np.float32)


def num_samples_at_16khz(path: Path | str) -> int:
    """Return how many samples `read_audio` gives for a file: from its header, or by reading it at another rate.

    Raises:
        RepCodecError: the file is missing, unreadable or empty.
    """
    import soundfile

    try:
        info = soundfile.info(str(path))
    except (soundfile.SoundFileError, OSError, TypeError) as error:
        raise RepCodecError(f"{path}: not a readable sound file ({error}); remove it or convert it.") from error
    if info.samplerate == SAMPLE_RATE and info.frames > 0:
        return info.frames
    return len(read_audio(path))


def find_sound_files(root: Path | str) -> list[Path]:
    """List the sound files below a folder, in any depth, sorted by path.

    Raises:
        RepCodecError: `root` is not a folder, or holds no sound file.
    """
    root = Path(root)
    if not root.is_dir():
        raise RepCodecError(f"{root} is not a folder; give a folder of sound files.")
    files = sorted(path for path in root.rglob("*") if path.suffix.lower() in SOUND_SUFFIXES and path.is_file())
    if not files:
        raise RepCodecError(f"{root} holds no sound file ({', '.join(sorted(SOUND_SUFFIXES))}).")
    return files
