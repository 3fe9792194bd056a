"""The demo's corpus, spoken by espeak-ng, which tells the exact time of every phone; or recordings, split in three."""

import ctypes
import hashlib
import json
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from repcodec.audio import SAMPLE_RATE, find_sound_files, resample
from repcodec.errors import RepCodecError
from repcodec.files import atomic_write, locked
from repcodec.manifest import Manifest, make_manifest, utterance_id

SPLITS = ("train", "valid", "test")

CORPUS_VERSION = 1
"""Part of the corpus folder's name: another text, voice or recipe takes another number."""

SILENCE = "SIL"
"""Label of pauses."""

VOICES = {
    "train": ("Gene", "f1", "m1", "Andrea", "m3", "f4", "Lee", "belinda", "Alex", "anika"),
    "valid": ("m7", "linda"),
    "test": ("Michael", "steph", "max"),
}
"""espeak-ng's voice variants of American English; no voice and no sentence is in two splits.

Left out are the variants with `breath`: they say something else every time, from uninitialized memory.
"""

SENTENCES = {"train": 224, "valid": 30, "test": 46}
"""How many sentences each split has."""

WORDS_PER_MINUTE = (135, 175)
"""Each sentence's speaking rate is drawn from this range."""


@dataclass(frozen=True)
class Utterance:
    """One sentence, spoken.

    Attributes:
        waveform: (S,) float32 at 16 kHz.
        phones: start in seconds, end in seconds and name of each phone, pauses included.
    """

    waveform: npt.NDArray[np.float32]
    phones: list[tuple[float, float, str]]


class _Event(ctypes.Structure):
    """espeak_EVENT of espeak-ng's speak_lib.h."""

    class _Id(ctypes.Union):
        _fields_ = (("number", ctypes.c_int), ("name", ctypes.c_char_p), ("string", ctypes.c_char * 8))

    _fields_ = (
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", _Id),
    )


class Speaker:
    """espeak-ng, synthesizing to memory. The library keeps one voice a process, so use one Speaker at a time."""

    _LIST_END, _PHONEME = 0, 7  # espeak_EVENT_TYPE
    _RATE = 1  # espeak_PARAMETER
    _CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))

    def __init__(self) -> None:
        """Load the library and its data from the package espeakng-loader.

        Raises:
            RepCodecError: the package is missing, or the library does not start.
        """
        try:
            import espeakng_loader
        except ImportError as error:
            raise RepCodecError("the demo corpus needs espeak-ng: pip install 'repcodec[demo]'.") from error
        self._data = Path(espeakng_loader.get_data_path())
        self._library = ctypes.CDLL(espeakng_loader.get_library_path())
        # 2: give the samples to a callback before Synth returns; 1: report phonemes too.
        self._rate = self._library.espeak_Initialize(2, 0, os.fsencode(self._data), 1)
        if self._rate <= 0:
            raise RepCodecError(f"espeak-ng did not start with the data in {self._data}: reinstall espeakng-loader.")
        self._blocks: list[npt.NDArray[np.int16]] = []
        self._starts: list[tuple[int, str]] = []
        self._callback = self._CALLBACK(self._collect)  # kept here, or it would be freed while in use
        self._library.espeak_SetSynthCallback(self._callback)

    def _collect(
        self, samples: "ctypes._Pointer[ctypes.c_short]", count: int, events: "ctypes._Pointer[_Event]"
    ) -> int:
        if samples and count > 0:
            self._blocks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        i = 0
        while events[i].type != self._LIST_END:
            if events[i].type == self._PHONEME:
                self._starts.append((events[i].sample, events[i].id.string.decode("ascii")))
            i += 1
        return 0

    def set_voice(self, variant: str, words_per_minute: int) -> None:
        """Choose a variant of the American English voice.

        Raises:
            RepCodecError: there is no such voice; espeak-ng itself would go on with another one, silently.
        """
        known = self._data / "voices" / "!v" / variant
        found = Path(variant).name == variant and known.is_file()
        if not found or self._library.espeak_SetVoiceByName(f"en-us+{variant}".encode()) != 0:
            raise RepCodecError(f"espeak-ng has no voice en-us+{variant}: {known.parent} lists the variants.")
        if self._library.espeak_SetParameter(self._RATE, words_per_minute, 0) != 0:
            raise RepCodecError(f"espeak-ng refused a rate of {words_per_minute} words per minute.")

    def say(self, text: str) -> Utterance:
        """Speak a sentence with the voice set.

        Raises:
            RepCodecError: nothing was spoken.
        """
        self._blocks.clear()
        self._starts.clear()
        data = text.encode("utf-8") + b"\0"
        # 0: position is in characters from the start, 0: no end position, 1: the text is UTF-8.
        status = self._library.espeak_Synth(data, len(data), 0, 1, 0, 1, None, None)
        if status != 0 or not self._blocks or not self._starts:
            raise RepCodecError(f"espeak-ng could not speak {text!r} (status {status}).")
        samples = np.concatenate(self._blocks).astype(np.float32) / 32768
        return Utterance(resample(samples, self._rate), self._segments(len(samples)))

    def _segments(self, num_samples: int) -> list[tuple[float, float, str]]:
        """Turn the starts of phones (samples) into segments (seconds), the last one up to the end."""
        named = [(start, _phone_name(mnemonic)) for start, mnemonic in self._starts]
        segments = [(0, SILENCE)] + [(start, phone) for start, phone in named if phone]
        ends = [start for start, _ in segments[1:]] + [num_samples]
        return [
            (start / self._rate, end / self._rate, phone)
            for (start, phone), end in zip(segments, ends, strict=True)
            if end > start
        ]


def _phone_name(mnemonic: str) -> str:
    """Drop stress and length marks from espeak-ng's mnemonic; pauses become SIL, mere marks nothing."""
    if mnemonic.startswith("_"):
        return SILENCE
    return mnemonic.strip("',%=;-")


def build_corpus(folder: Path, seed: int = 0, sentences: dict[str, int] = SENTENCES) -> None:
    """Speak the demo corpus, once: later calls find it.

    Args:
        folder: gets `audio/<voice>/<utt>.flac`, `<split>.tsv`, `phones.tsv`, and `corpus.json` with version and seed.
        seed: of the sentences' order and the speaking rates.
        sentences: how many each split has.

    Raises:
        RepCodecError: the folder holds another corpus, a voice cannot be set, the folder cannot be written, or
            another process is making it.
    """
    about = {"version": CORPUS_VERSION, "seed": seed, "voices": VOICES, "sentences": sentences}
    about = json.loads(json.dumps(about))  # tuples as they come back from a file
    if is_made(folder, about):
        return
    # In a process of its own: what espeak-ng said before changes what it says next, whatever voice is set, so that
    # only a fresh library speaks the same bytes.
    with locked(folder / "corpus.json"), ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
        fresh.submit(_speak_corpus, folder, seed, sentences).result()
        mark_made(folder, about)


def _speak_corpus(folder: Path, seed: int, sentences: dict[str, int]) -> None:
    import soundfile

    rng = np.random.default_rng(seed)
    text = Path(__file__).with_name("demo_sentences.txt").read_text(encoding="ascii").splitlines()
    order = iter(rng.permutation(len(text)))
    speaker = Speaker()
    phone_rows = ["utt\tstart_s\tend_s\tphone\n"]
    with tqdm(total=sum(sentences.values()), desc="Speaking the corpus", unit="utt") as bar:
        for split in SPLITS:
            paths, num_samples = [], []
            for n in range(sentences[split]):
                voice = VOICES[split][n % len(VOICES[split])]
                speaker.set_voice(voice, int(rng.integers(*WORDS_PER_MINUTE)))
                utterance = speaker.say(text[next(order)])
                path = folder / "audio" / voice / f"{voice}-{n // len(VOICES[split]):03d}.flac"
                with atomic_write(path, "w+b") as file:
                    soundfile.write(file, utterance.waveform, SAMPLE_RATE, format="FLAC")
                paths.append(path.relative_to(folder / "audio").as_posix())
                num_samples.append(len(utterance.waveform))
                phone_rows += [
                    f"{utterance_id(paths[-1])}\t{start:.5f}\t{end:.5f}\t{phone}\n"
                    for start, end, phone in utterance.phones
                ]
                bar.update()
            Manifest((folder / "audio").resolve(), paths, num_samples).write(folder / f"{split}.tsv")
    with atomic_write(folder / "phones.tsv") as file:
        file.writelines(phone_rows)


def is_made(folder: Path, about: dict[str, Any]) -> bool:
    """Say whether a corpus folder is whole.

    Raises:
        RepCodecError: it is, but holds another corpus than `about` describes.
    """
    path = folder / "corpus.json"
    if not path.exists():
        return False
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RepCodecError(f"{path}: unreadable ({error}); delete {folder} and run this again.") from error
    if found != about:
        differs = [key for key in about if not isinstance(found, dict) or found.get(key) != about[key]]
        raise RepCodecError(
            f"{folder} holds another corpus ({', '.join(differs) or 'made by another version'} differs); "
            "give data.audio as when it was made, choose another folder name with data.name=…, or delete it."
        )
    return True


def mark_made(folder: Path, about: dict[str, Any]) -> None:
    """Write corpus.json, last of all: it says that the rest is whole, and what it is."""
    with atomic_write(folder / "corpus.json") as file:
        json.dump(about, file, indent=1)


def split_recordings(audio: Path, folder: Path, seed: int) -> None:
    """Split recordings at random, a tenth for validation and a tenth for testing, and write the manifests, once.

    Raises:
        RepCodecError: fewer than ten files, the folder holds another corpus, or another process is making it.
    """
    audio = audio.expanduser().resolve()
    files = find_sound_files(audio)
    listing = "".join(f"{path.relative_to(audio).as_posix()}\t{path.stat().st_size}\n" for path in files)
    about = {"audio": str(audio), "files_sha256": hashlib.sha256(listing.encode()).hexdigest(), "seed": seed}
    if is_made(folder, about):
        return
    with locked(folder / "corpus.json"):
        manifest = make_manifest(audio)
        if len(manifest) < 10:
            raise RepCodecError(f"{audio}: {len(manifest)} sound files; at least 10 are needed for three splits.")
        order = np.random.default_rng(seed).permutation(len(manifest))
        tenth = len(manifest) // 10
        parts = {"valid": order[:tenth], "test": order[tenth : 2 * tenth], "train": order[2 * tenth :]}
        for split, indices in parts.items():
            chosen = sorted(indices.tolist())
            paths = [manifest.paths[i] for i in chosen]
            Manifest(manifest.root, paths, [manifest.num_samples[i] for i in chosen]).write(folder / f"{split}.tsv")
        mark_made(folder, about)
