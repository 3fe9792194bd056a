"""SpeechTokenizer: sound -> speech encoder -> codec or k-means -> codes."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from repcodec.architecture import FRAME_RATE
from repcodec.audio import SAMPLE_RATE, read_audio, to_mono_16khz
from repcodec.checkpoint import read_config
from repcodec.codec import RepCodec
from repcodec.errors import RepCodecError
from repcodec.hub import local_folder
from repcodec.kmeans import KMeansTokenizer
from repcodec.packing import Tokenizer, encode_packed, encode_stream
from repcodec.shards import check_finite
from repcodec.speech_encoders import SpeechEncoder, encoder_table, find_encoder, load_speech_encoder


def load_tokenizer(name: Path | str, revision: str | None = None) -> RepCodec | KMeansTokenizer:
    """Load a saved codec or k-means model, whichever its config.json says, in evaluation mode.

    Args:
        name: a folder, or a hub id.
        revision: branch, tag or commit on the hub.

    Raises:
        RepCodecError: there is neither, or a damaged one.
    """
    kinds: dict[str, type[RepCodec] | type[KMeansTokenizer]] = {"repcodec": RepCodec, "kmeans": KMeansTokenizer}
    folder = local_folder(name, revision)
    config = read_config(folder)
    if config["kind"] not in kinds:
        raise RepCodecError(f'{folder}/config.json: "kind" is {config["kind"]!r}, expected {" or ".join(kinds)}.')
    return kinds[config["kind"]].from_pretrained(folder)


def usable_device(name: str | torch.device) -> torch.device:
    """Return a torch device.

    Raises:
        RepCodecError: there is no such device here.
    """
    try:
        device = torch.empty(0, device=name).device
        if device.type == "meta":
            raise RuntimeError("it computes nothing")
        return device
    except (RuntimeError, AssertionError) as error:
        raise RepCodecError(f"device {name}: not usable here ({str(error).splitlines()[0]}); cpu always is.") from error


def load_encoder_of(tokenizer: Tokenizer, model: Path | str | None = None) -> SpeechEncoder:
    """Load the speech encoder whose features a tokenizer was trained on.

    Args:
        tokenizer: a saved one; its config.json names encoder and layer.
        model: folder or hub id of the encoder's weights; None: where they were in training, if that is still there,
            or the encoder's hub id.

    Raises:
        RepCodecError: the tokenizer names no encoder, the weights cannot be loaded, or they are not those that the
            tokenizer was trained with.
    """
    about = tokenizer.about
    if about.get("encoder") is None or about.get("layer") is None:
        raise RepCodecError(
            "the tokenizer's config.json names no speech encoder and layer, so it takes features only; write "
            '"encoder" and "layer" there.'
        )
    if model is None and (known := about.get("encoder_model")):
        # A folder may have moved with the machine; a hub id is good anywhere.
        is_folder = str(known).startswith(("/", ".", "~"))
        model = known if not is_folder or Path(known).is_dir() else None
    if model is None and about["encoder"] not in encoder_table():
        raise RepCodecError(f"{about['encoder']}: the speech encoder's weights are not at hand: give their folder.")
    encoder = load_speech_encoder(find_encoder(about["encoder"], model), about["layer"], model)
    expected = about.get("encoder_sha256")
    if expected is not None and encoder.weights_sha256 and encoder.weights_sha256 != expected:
        raise RepCodecError(
            f"{model or about['encoder']}: not the speech encoder that the tokenizer was trained with (other weights); "
            "give the folder or hub id of that one."
        )
    if encoder.dim != tokenizer.dim:
        raise RepCodecError(
            f"{model or about['encoder']}: its width is {encoder.dim}, but the tokenizer takes {tokenizer.dim}."
        )
    return encoder


@dataclass(frozen=True)
class TokenizedSpeech:
    """What a SpeechTokenizer makes of a sound.

    Attributes:
        codes: (K, N) int64.
        codes_per_second: codes a second of each codebook.
        duration: seconds of sound.
    """

    codes: Tensor
    codes_per_second: float
    duration: float


class SpeechTokenizer:
    """A tokenizer together with the speech encoder whose features it codes.

    Attributes:
        tokenizer: a codec or a k-means model, in evaluation mode.
        codes_per_second: codes a second.
    """

    def __init__(self, tokenizer: RepCodec | KMeansTokenizer, model: Path | str | None = None):
        """Take a tokenizer on its device, and where the speech encoder's weights are; see `load_encoder_of`."""
        self.tokenizer, self._model = tokenizer, model
        self.codes_per_second = tokenizer.about.get("frame_rate", FRAME_RATE) / tokenizer.stride

    @classmethod
    def from_pretrained(
        cls,
        name: Path | str,
        model: Path | str | None = None,
        device: str | torch.device = "cpu",
        revision: str | None = None,
    ) -> "SpeechTokenizer":
        """Load a saved codec or k-means model; its speech encoder is loaded when the first sound comes.

        Args:
            name: a folder that `save_pretrained` wrote, or a hub id.
            model: folder or hub id of the speech encoder's weights; None: see `load_encoder_of`.
            device: where both run.
            revision: branch, tag or commit of the tokenizer on the hub.

        Raises:
            RepCodecError: there is no such tokenizer, or no such device.
        """
        return cls(load_tokenizer(name, revision).to(usable_device(device)), model)

    @cached_property
    def encoder(self) -> SpeechEncoder:
        """The speech encoder, loaded when it is first asked for; see `load_encoder_of`."""
        return load_encoder_of(self.tokenizer, self._model).to(self.tokenizer.device)

    @torch.inference_mode()
    def __call__(
        self, sound: Path | str | npt.NDArray[np.floating] | Tensor, sample_rate: int | None = None
    ) -> TokenizedSpeech:
        """Tokenize one sound.

        Args:
            sound: a sound file, or samples (S,) or (channels, S), in [-1, 1] as floats.
            sample_rate: of samples, in hertz; it has to be given with them.

        Raises:
            RepCodecError: the file is unreadable, the sound too short for one frame, or the encoder cannot be loaded.
        """
        if isinstance(sound, str | Path):
            waveform, source = read_audio(sound), str(sound)
        else:
            if sample_rate is None:
                raise RepCodecError("samples come without a rate: say sample_rate=16000, or what it is.")
            samples, source = np.atleast_2d(np.asarray(sound, dtype=np.float32)), "the sound"
            waveform = to_mono_16khz(samples.T, sample_rate, source)
        (features,) = self.encoder([torch.from_numpy(waveform).to(self.tokenizer.device)])
        if len(features) == 0:
            raise RepCodecError(f"{source}: {len(waveform)} samples at 16 kHz are too short for one frame.")
        (codes,) = encode_packed(self.tokenizer, [features])
        return TokenizedSpeech(codes.T.cpu(), self.codes_per_second, len(waveform) / SAMPLE_RATE)

    def stream(self, chunks: Iterable[Tensor | npt.NDArray[np.floating]]) -> Iterator[Tensor]:
        """Code features as they come: the same codes as offline, as soon as what they look ahead to has come.

        Args:
            chunks: features (t, D) of one utterance, any number of frames each.

        Yields:
            (K, n) int64, the codes that have become ready; memory does not grow with the utterance.

        Raises:
            RepCodecError: a chunk of another width, or with a value that is not finite.
        """

        def frames() -> Iterator[Tensor]:
            for number, chunk in enumerate(chunks):
                values = np.asarray(chunk, dtype=np.float32)
                if values.ndim != 2 or values.shape[1] != self.tokenizer.dim:
                    raise RepCodecError(
                        f"chunk {number}: shape {values.shape}, expected (frames, {self.tokenizer.dim}) features."
                    )
                check_finite(values, f"chunk {number}")
                yield torch.from_numpy(values).to(self.tokenizer.device)

        codes = encode_stream(self.tokenizer, frames())
        while True:
            with torch.inference_mode():  # not across a yield: it would be on for whoever takes the codes
                ready = next(codes, None)
            if ready is None:
                return
            yield ready.T.cpu()

    @torch.inference_mode()
    def decode(self, codes: Tensor) -> Tensor:
        """Codes (K, N) -> features (N * stride, D).

        Raises:
            RepCodecError: a code that the codebooks do not have.
        """
        return self.tokenizer.decode(codes[None].to(self.tokenizer.device))[0].cpu()
