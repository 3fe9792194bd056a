"""Read a sound file as the speech encoders want it: mono, 16 kHz, float32."""

import os
from pathlib import Path

import numpy as np
import numpy.typing as npt

from repcodec.errors import RepCodecError
from repcodec.files import walk_files

SAMPLE_RATE = 16_000
"""Samples per second that every speech encoder takes, in hertz."""

SOUND_SUFFIXES = {".wav", ".flac", ".mp3", ".ogg", ".opus", ".aiff", ".aif", ".m4a"}
"""Endings of the files that `find_sound_files` takes; libsndfile reads them all but .m4a, which needs PyAV."""

RATES = (1000, 1_000_000)
"""Least and most samples per second of a file. Below, a small file becomes a huge one; its header is wrong."""

SAMPLES_A_BYTE = 20_000
"""More than any format packs, silence included: a header that says more lies or, as in a streamed FLAC, knows not."""


def read_audio(path: Path | str) -> npt.NDArray[np.float32]:
    """Read a sound file.

    Several channels are averaged; another sampling rate is converted by soxr at its "HQ" quality.

    Args:
        path: any file libsndfile reads, or an .m4a where the extra `audio` is installed.

    Returns:
        (S,) float32 waveform at 16 kHz; integer samples come to [-1, 1].

    Raises:
        RepCodecError: the file is missing, unreadable, cut off, empty or holds a value that is not finite.
    """
    samples, rate = _decode_with_av(path, "mov") if _is_m4a(path) else _decode(path)
    return to_mono_16khz(samples, rate, str(path))


def to_mono_16khz(samples: npt.NDArray[np.floating], rate: int, source: str) -> npt.NDArray[np.float32]:
    """Average the channels of (S', channels) samples at `rate` hertz and convert them to 16 kHz.

    Args:
        source: what messages name.

    Returns:
        (S,) float32.

    Raises:
        RepCodecError: no sample, or one that is not finite.
    """
    check_rate(rate, source)
    if not np.isfinite(samples).all():
        raise RepCodecError(f"{source}: the sound holds a value that is not finite; record or convert it again.")
    waveform = resample(samples.mean(axis=1), rate)
    if len(waveform) == 0:
        raise RepCodecError(f"{source}: the sound is empty (0 samples at 16 kHz); remove it.")
    return waveform


def check_rate(rate: int, source: Path | str) -> None:
    """Refuse a sampling rate in hertz that no recording has.

    Raises:
        RepCodecError: names `source`.
    """
    least, most = RATES
    if not least <= rate <= most:
        raise RepCodecError(
            f"{source}: {rate} samples a second, expected {least} to {most}; its header is wrong, convert it."
        )


def resample(samples: npt.NDArray[np.floating], rate: int) -> npt.NDArray[np.float32]:
    """Convert a (S,) waveform from `rate` hertz to 16 kHz; returns float32."""
    import soxr

    if rate != SAMPLE_RATE:
        samples = soxr.resample(samples, rate, SAMPLE_RATE, quality="HQ")
    return np.ascontiguousarray(samples, dtype=np.float32)


def samples_at_16khz(num_samples: int, rate: int) -> int:
    """Return how many samples `resample` makes of `num_samples` at `rate` hertz: rounded, halves up, as soxr does."""
    return (2 * num_samples * SAMPLE_RATE + rate) // (2 * rate)


def num_samples_at_16khz(path: Path | str) -> int:
    """Return how many samples `read_audio` gives for a file, from its header; an .m4a is decoded.

    Raises:
        RepCodecError: the file is missing, unreadable or empty.
    """
    import soundfile

    if _is_m4a(path):
        return len(read_audio(path))
    try:
        info = soundfile.info(str(path))
        _check_announced(path, info.frames)
    except (soundfile.SoundFileError, OSError, TypeError, ValueError) as error:
        raise _unreadable(path, error) from error
    check_rate(info.samplerate, path)
    if _is_bare_mp3(path, info.format):
        return len(read_audio(path))
    return samples_at_16khz(info.frames, info.samplerate) or len(read_audio(path))


def find_sound_files(root: Path | str) -> list[Path]:
    """List the sound files below a folder, in any depth, through links too, sorted by path.

    Raises:
        RepCodecError: `root` is not a folder, holds no sound file, or a folder in it cannot be listed.
    """
    root = Path(root)
    if not root.is_dir():
        raise RepCodecError(f"{root} is not a folder; give a folder of sound files.")
    # A link to nowhere is listed: that it cannot be read is told when it is.
    files = [
        path
        for path in walk_files(root)
        if path.suffix.lower() in SOUND_SUFFIXES and (path.is_file() or path.is_symlink())
    ]
    if not files:
        raise RepCodecError(f"{root} holds no sound file ({', '.join(sorted(SOUND_SUFFIXES))}).")
    return sorted(files)


def _is_m4a(path: Path | str) -> bool:
    return Path(path).suffix.lower() == ".m4a"


def _unreadable(path: Path | str, error: Exception) -> RepCodecError:
    if not os.path.exists(path):
        return RepCodecError(f"{path}: no such file; where a manifest lists it, its first line names the folder.")
    return RepCodecError(f"{path}: not a readable sound file ({error}); remove it or convert it.")


def _cut_off(path: Path | str, found: int, announced: int) -> RepCodecError:
    return RepCodecError(f"{path}: the sound is cut off: {found} samples, its header says {announced}; copy it again.")


def _check_announced(path: Path | str, num_samples: int) -> None:
    """Refuse a header whose number of samples cannot be true, before memory is taken for them."""
    size = os.path.getsize(path)
    if num_samples > SAMPLES_A_BYTE * size:
        raise RepCodecError(
            f"{path}: its header says {num_samples} samples, which {size} bytes cannot hold; convert it."
        )


def _decode(path: Path | str) -> tuple[npt.NDArray[np.float32], int]:
    """Return (S', channels) float32 samples and their rate in hertz."""
    import soundfile

    try:
        with soundfile.SoundFile(path) as file:
            announced, rate = file.frames, file.samplerate
            _check_announced(path, announced)
            if _is_bare_mp3(path, file.format):
                return _decode_with_av(path, "mp3")
            samples = file.read(dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, OSError, TypeError, ValueError, MemoryError) as error:
        # TypeError: raw, without a header; ValueError: a name with a zero in it
        raise _unreadable(path, error) from error
    if len(samples) < announced:
        raise _cut_off(path, len(samples), announced)
    return samples, rate


def _is_bare_mp3(path: Path | str, kind: str) -> bool:
    """Say whether a file is an MP3 whose first frame does not say how long it is.

    libsndfile guesses then, from the first frame's bit rate, and reads no further than its guess.
    """
    if kind != "MP3":
        return False
    with open(path, "rb") as file:
        start = file.read(10)
        # A tag may come before the first frame; its size has 7 bits a byte.
        tag = 10 + sum(byte << 7 * place for place, byte in enumerate(reversed(start[6:])))
        file.seek(tag if start[:3] == b"ID3" else 0)
        first_frame = file.read(1500)
    return not any(mark in first_frame for mark in (b"Xing", b"Info", b"VBRI"))


def _decode_with_av(path: Path | str, kind: str) -> tuple[npt.NDArray[np.float32], int]:
    """Return (S', channels) float32 samples of FFmpeg's format "mov" or "mp3" and their rate in hertz."""
    try:
        import av
    except ImportError as error:
        what = ".m4a" if kind == "mov" else "an MP3 that does not say how long it is"
        raise RepCodecError(
            f"{path}: reading {what} needs PyAV: pip install 'repcodec[audio]', or convert it."
        ) from error
    announced = None
    try:
        # From an open file and as this one format: a playlist in disguise cannot name other files or hosts.
        with open(path, "rb") as file, av.open(file, "r", format=kind, metadata_errors="replace") as container:
            stream = container.streams.audio[0]
            to_float = av.AudioResampler(format="fltp")
            frames = [out for frame in container.decode(stream) for out in to_float.resample(frame)]
            blocks = [frame.to_ndarray() for frame in frames + to_float.resample(None)]
            rate = stream.rate
            if kind == "mov" and stream.duration and stream.time_base:
                announced = round(stream.duration * stream.time_base * rate)
    except (av.FFmpegError, OSError, IndexError, ValueError) as error:
        raise _unreadable(path, error) from error
    samples = np.concatenate([*blocks, np.zeros((stream.channels, 0), np.float32)], axis=1).T
    if announced is not None and len(samples) < announced - 2048:  # AAC's longest frame
        raise _cut_off(path, len(samples), announced)
    return samples[:announced], rate  # AAC's last frame is filled up with silence
