import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from repcodec import demo_corpus
from repcodec.audio import read_audio
from repcodec.demo_corpus import SENTENCES, VOICES, Speaker, build_corpus, split_recordings
from repcodec.errors import RepCodecError
from repcodec.labels import PhoneLabels
from repcodec.manifest import Manifest

FEW = {"train": 10, "valid": 2, "test": 3}


def digests(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    texts = {path.relative_to(folder): path.read_bytes().replace(str(folder).encode(), b"") for path in files}
    return {name: hashlib.sha256(text).hexdigest() for name, text in texts.items()}


def test_corpus_is_byte_identical_for_a_seed(tmp_path):
    build_corpus(tmp_path / "one", 0, FEW)
    build_corpus(tmp_path / "two", 0, FEW)
    one = digests(tmp_path / "one")
    assert one == digests(tmp_path / "two")
    assert len(one) == 15 + 3 + 2
    assert json.loads((tmp_path / "one" / "corpus.json").read_text())["seed"] == 0


def test_another_seed_is_another_corpus_and_not_taken_for_this_one(tmp_path):
    build_corpus(tmp_path / "one", 0, FEW)
    build_corpus(tmp_path / "two", 1, FEW)
    assert digests(tmp_path / "one") != digests(tmp_path / "two")
    with pytest.raises(RepCodecError, match=r"holds another corpus \(seed differs\)"):
        build_corpus(tmp_path / "one", 1, FEW)


def test_splits_share_no_voice_and_no_sentence(tmp_path):
    voices = [voice for split in VOICES.values() for voice in split]
    assert len(set(voices)) == len(voices)
    text = (Path(demo_corpus.__file__).parent / "demo_sentences.txt").read_text().splitlines()
    assert len(set(text)) == len(text) == sum(SENTENCES.values())
    build_corpus(tmp_path, 0, FEW)
    spoken = {split: Manifest.read(tmp_path / f"{split}.tsv").paths for split in FEW}
    assert {split: len(paths) for split, paths in spoken.items()} == FEW
    for split, paths in spoken.items():
        assert {path.split("/")[0] for path in paths} <= set(VOICES[split])


def test_labels_cover_the_sound_without_gaps(tmp_path):
    build_corpus(tmp_path, 0, FEW)
    labels = PhoneLabels.read(tmp_path / "phones.tsv")
    for split in ("train", "valid", "test"):
        manifest = Manifest.read(tmp_path / f"{split}.tsv")
        for name, samples in zip(manifest.paths, manifest.num_samples, strict=True):
            assert len(read_audio(manifest.root / name)) == samples
            phones = labels.frames(name.removesuffix(".flac"), samples // 320, 50)
            assert (phones >= 0).all()
            assert len(set(phones.tolist())) > 8


def test_labels_lie_where_the_sound_is():
    """Pauses are silent; vowels are louder than the average."""
    speaker = Speaker()
    speaker.set_voice("Gene", 160)
    said = speaker.say("Stop, my sister sees the sea.")
    power = {"SIL": [], "i:": [], "s": []}
    for start, end, phone in said.phones:
        if phone in power:
            power[phone].append(float((said.waveform[int(start * 16_000) + 80 : int(end * 16_000)] ** 2).mean()))
    mean = float((said.waveform**2).mean())
    assert np.mean(power["i:"]) > mean
    assert np.mean(power["SIL"]) < 0.2 * mean
    spectra = {}
    for start, end, phone in said.phones:
        if phone in ("s", "i:"):
            piece = said.waveform[int(start * 16_000) : int(end * 16_000)]
            spectrum = np.abs(np.fft.rfft(piece)) ** 2
            spectra[phone] = (spectrum * np.fft.rfftfreq(len(piece), 1 / 16_000)).sum() / spectrum.sum()
    assert spectra["s"] > 3000 > spectra["i:"], "an s hisses"


@pytest.mark.parametrize("voice", ["nosuch", "gene", "../../lang/gmw/en", ""])
def test_voice_that_cannot_be_set_is_an_error(voice):
    with pytest.raises(RepCodecError, match="has no voice"):
        Speaker().set_voice(voice, 160)


def test_every_voice_of_the_corpus_sounds_different():
    speaker, said = Speaker(), set()
    for voice in (voice for split in VOICES.values() for voice in split):
        speaker.set_voice(voice, 160)
        said.add(speaker.say("One sentence for all voices.").waveform.tobytes())
    assert len(said) == sum(map(len, VOICES.values()))


def recordings(folder, count=12):
    rng = np.random.default_rng(0)
    for i in range(count):
        (folder / f"s{i % 3}").mkdir(parents=True, exist_ok=True)
        soundfile.write(folder / f"s{i % 3}" / f"{i}.wav", rng.normal(0, 0.1, 8000 + 320 * i), 16_000)


def test_too_few_recordings_or_another_folder_is_one_sentence(tmp_path):
    recordings(tmp_path / "audio", 9)
    with pytest.raises(RepCodecError, match="9 sound files; at least 10"):
        split_recordings(tmp_path / "audio", tmp_path / "corpus", 0)
    recordings(tmp_path / "audio", 10)
    split_recordings(tmp_path / "audio", tmp_path / "corpus", 0)
    recordings(tmp_path / "audio", 11)
    with pytest.raises(RepCodecError, match=r"another corpus \(files_sha256 differs\)"):
        split_recordings(tmp_path / "audio", tmp_path / "corpus", 0)
