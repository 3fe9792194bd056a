import os
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch
from conftest import refused, write_split
from test_audio import noise, sine, write_m4a

from repcodec.audio import read_audio
from repcodec.cli import main
from repcodec.codec import RepCodec
from repcodec.manifest import Manifest
from repcodec.shards import FeatureShards
from repcodec.tokens import read_tokens


def test_from_sound_files_to_tokens(tmp_path, capsys, whisper_folder):
    rng = np.random.default_rng(0)
    (tmp_path / "audio" / "spk").mkdir(parents=True)
    for i in range(3):
        soundfile.write(tmp_path / "audio" / "spk" / f"{i}.wav", rng.normal(0, 0.1, 8000 + 640 * i), 16_000)
    assert main(["manifest", str(tmp_path / "audio"), "-o", str(tmp_path / "train.tsv")]) == 0
    for shard in ("0/2", "1/2"):
        assert main(["extract", str(tmp_path / "train.tsv"), str(tmp_path / "features"), "--encoder", "whisper_tiny_en",
                     "--model", str(whisper_folder), "--layer", "2", "--shard", shard]) == 0  # fmt: skip
    folder = tmp_path / "features" / "whisper_tiny_en" / "l2" / "train"
    assert FeatureShards(folder, 384).lengths.tolist() == [25, 27, 29]
    torch.manual_seed(0)
    RepCodec(384, codebook_size=8).save_pretrained(tmp_path / "codec")
    assert main(["tokenize", str(tmp_path / "codec"), str(folder), "-o", str(tmp_path / "out.tokens")]) == 0
    found = list(read_tokens(tmp_path / "out.tokens"))
    assert [(tokens.name, tokens.codes.shape[1]) for tokens in found] == [
        ("spk/0.wav", 25),
        ("spk/1.wav", 27),
        ("spk/2.wav", 29),
    ]
    assert "3 utterances" in capsys.readouterr().out


def test_shards_made_elsewhere_take_their_names_from_the_manifest(tmp_path, capsys):
    write_split(tmp_path / "test", [5, 6])
    (tmp_path / "test" / "0_1.json").unlink()
    RepCodec(8, codebook_size=4).save_pretrained(tmp_path / "codec")
    command = ["tokenize", str(tmp_path / "codec"), str(tmp_path / "test"), "-o", str(tmp_path / "out.tokens")]
    assert main(command) == 1
    assert "give --manifest" in capsys.readouterr().err
    (tmp_path / "test.tsv").write_text("/data\na.flac\t1600\nb.flac\t9600\n")
    assert main([*command, "--manifest", str(tmp_path / "test.tsv")]) == 1
    assert "utterance 1 has 6 frames, not about 30" in capsys.readouterr().err
    (tmp_path / "test.tsv").write_text("/data\na.flac\t1600\nb.flac\t1920\n")
    assert main([*command, "--manifest", str(tmp_path / "test.tsv")]) == 0
    assert (tmp_path / "out.tokens").read_text().splitlines()[0] == "/data"


def test_manifest_in_another_order_is_refused(tmp_path, capsys):
    write_split(tmp_path / "test", [5, 5])
    RepCodec(8, codebook_size=4).save_pretrained(tmp_path / "codec")
    (tmp_path / "test.tsv").write_text("/data\nspk/utt1.wav\t1600\nspk/utt0.wav\t1600\n")
    command = ["tokenize", str(tmp_path / "codec"), str(tmp_path / "test"), "-o", str(tmp_path / "out.tokens")]
    assert main([*command, "--manifest", str(tmp_path / "test.tsv")]) == 1
    assert "utterance 0 is spk/utt0.wav, where the manifest lists spk/utt1.wav" in capsys.readouterr().err
    assert not (tmp_path / "out.tokens").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tokenize", "nowhere", "nowhere", "-o", "x"], "nowhere: no such file or folder"),
        (["manifest", "nowhere", "-o", "x"], "nowhere is not a folder"),
        (["extract", "m.tsv", "out", "--encoder", "hubert_base"], "m.tsv: not a readable manifest"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_code_1(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_encoder_lists_the_known_ones_and_the_way_to_others(tmp_path, capsys):
    Manifest(tmp_path, ["a.wav"], [16_000]).write(tmp_path / "m.tsv")
    assert main(["extract", str(tmp_path / "m.tsv"), str(tmp_path / "out"), "--encoder", "hubert_huge"]) == 1
    error = capsys.readouterr().err
    assert "hubert_huge: no such speech encoder; known: data2vec_base, data2vec_large, hubert_base" in error
    assert "--model FOLDER_OR_HUB_ID" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [[], ["tokenize"], ["nonsense"], ["extract", "m.tsv", "out"]])
def test_usage_errors_exit_with_2(arguments):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--shard", "3/3", "expected I/N with 0 <= I < N"),
        ("--shard", "0/0", "expected I/N"),
        ("--shard", "-1/2", "expected"),
        ("--shard", "1", "expected I/N"),
        ("--shard", "1/2/3", "expected I/N"),
        ("--shard", "a/b", "expected I/N"),
        ("--shard", "", "expected I/N"),
        ("--batch-seconds", "0", "0: expected a positive number of seconds"),
        ("--batch-seconds", "-5", "expected"),
        ("--batch-seconds", "inf", "inf: expected a positive number of seconds"),
        ("--batch-seconds", "nan", "nan: expected a positive number of seconds"),
        ("--batch-seconds", "long", "long: expected a positive number of seconds"),
        ("--dtype", "float64", "invalid choice: 'float64'"),
        ("--layer", "last", "invalid int value: 'last'"),
    ],
)
def test_an_invalid_option_is_a_usage_error_that_names_it(option, value, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["extract", "m.tsv", "out", "--encoder", "hubert_base", option, value])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert f"argument {option}: " in error
    assert message in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("command", "title"), [("manifest", "example"), ("extract", "examples"), ("tokenize", "examples")]
)
def test_help_shows_examples(command, title, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"{title}:\n  repcodec {command} " in capsys.readouterr().out


def test_installed_command_runs():
    command = f"{sys.prefix}/bin/repcodec"
    result = subprocess.run([command, "--help"], capture_output=True, text=True, timeout=60, check=True)
    assert "tokenize" in result.stdout


# repcodec manifest


def bend(path):
    """Flip some bytes in the middle of a file."""
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 50] = bytes(byte ^ 0xFF for byte in content[middle : middle + 50])
    path.write_bytes(content)


def error_line(capsys):
    """The one sentence on stderr, between progress bars."""
    error = capsys.readouterr().err
    assert "Traceback" not in error
    (line,) = [line for line in error.replace("\r", "\n").splitlines() if line.startswith("error: ")]
    return line.removeprefix("error: ")


@pytest.fixture
def audio(tmp_path):
    """Three good sounds."""
    folder = tmp_path / "audio"
    (folder / "näive é").mkdir(parents=True)
    soundfile.write(folder / "good one.wav", sine(440, 0.5, 16_000), 16_000)
    soundfile.write(folder / "näive é" / "日本 語.flac", noise(8_000), 16_000)
    soundfile.write(folder / "x.ogg", noise(24_000), 44_100)
    return folder


def test_manifest_finds_every_kind_of_sound_in_any_depth_and_through_links(audio, tmp_path, capsys):
    deep = tmp_path / "elsewhere" / "b" / "c"
    deep.mkdir(parents=True)
    soundfile.write(deep / "mpeg.mp3", noise(24_000), 24_000)
    soundfile.write(deep / "new.opus", noise(24_000), 48_000, format="OGG", subtype="OPUS")
    soundfile.write(deep / "LOUD.WAV", noise(8_000, 2), 8_000)
    write_m4a(deep / "phone.m4a", sine(440, 1, 44_100), 44_100)
    os.symlink(tmp_path / "elsewhere", audio / "link")
    os.symlink(audio, deep / "back")

    assert main(["manifest", str(audio), "-o", str(tmp_path / "all.tsv")]) == 0

    manifest = Manifest.read(tmp_path / "all.tsv")
    assert list(manifest.paths) == [
        "good one.wav", "link/b/c/LOUD.WAV", "link/b/c/mpeg.mp3", "link/b/c/new.opus", "link/b/c/phone.m4a",
        "näive é/日本 語.flac", "x.ogg",
    ]  # fmt: skip
    assert list(manifest.num_samples) == [len(read_audio(audio / path)) for path in manifest.paths]
    out = capsys.readouterr().out
    assert "7 utterances" in out and "skipped" not in out


@pytest.fixture
def partly_bad(audio):
    """The three good sounds, and six files that a manifest cannot take."""
    (audio / "broken.wav").write_bytes(b"RIFF garbage")
    (audio / "empty.mp3").write_bytes(b"")
    soundfile.write(audio / "näive é" / "nothing.wav", np.zeros(0), 16_000)
    soundfile.write(audio / "tab\tin.wav", noise(8_000), 16_000)
    (audio / "tab\tfolder").mkdir()
    soundfile.write(audio / "tab\tfolder" / "a.wav", noise(8_000), 16_000)
    soundfile.write(audio / "x.wav", noise(8_000), 16_000)
    return audio


def test_manifest_lists_unreadable_files_and_leaves_them_out(partly_bad, tmp_path, capsys):
    assert main(["manifest", str(partly_bad), "-o", str(tmp_path / "all.tsv")]) == 0

    assert list(Manifest.read(tmp_path / "all.tsv").paths) == ["good one.wav", "näive é/日本 語.flac", "x.ogg"]
    output = capsys.readouterr()
    assert "3 utterances" in output.out and "6 files were skipped" in output.out
    skipped = [line for line in output.err.splitlines() if line.startswith("skipped: ")]
    names = ["broken.wav", "empty.mp3", "nothing.wav", r"tab\tfolder", r"tab\tin.wav", "x.wav: has the id of x.ogg"]
    assert len(skipped) == len(names)
    for name in names:
        assert sum(name in line for line in skipped) == 1


@pytest.mark.parametrize(
    ("delete", "first"),
    [
        ([], "broken.wav"),
        (["broken.wav"], "empty.mp3"),
        (["broken.wav", "empty.mp3"], "nothing.wav"),
        (["broken.wav", "empty.mp3", "näive é/nothing.wav"], r"tab\tfolder"),
        (["broken.wav", "empty.mp3", "näive é/nothing.wav", "tab\tfolder/a.wav"], r"tab\tin.wav"),
        (["broken.wav", "empty.mp3", "näive é/nothing.wav", "tab\tfolder/a.wav", "tab\tin.wav"], "x.wav"),
    ],
)
def test_manifest_stops_at_the_first_unreadable_file_when_strict(partly_bad, tmp_path, capsys, delete, first):
    for name in delete:
        (partly_bad / name).unlink()

    assert main(["manifest", str(partly_bad), "-o", str(tmp_path / "all.tsv"), "--strict"]) == 1

    assert first in error_line(capsys)
    assert not (tmp_path / "all.tsv").exists()


def test_manifest_of_unreadable_files_only_is_an_error(tmp_path, capsys):
    (tmp_path / "audio").mkdir()
    for name in ("a.wav", "b.flac", "c.m4a"):
        (tmp_path / "audio" / name).write_bytes(b"no sound")

    assert main(["manifest", str(tmp_path / "audio"), "-o", str(tmp_path / "all.tsv")]) == 1

    assert "no usable sound file: all 3 are unreadable" in error_line(capsys)
    assert not (tmp_path / "all.tsv").exists()


# repcodec extract with bad sounds


@pytest.fixture
def extract(tmp_path, whisper_folder):
    """Run `repcodec extract` on lines of a manifest; return its exit code and the shard's folder."""

    def run(folder, lines, *more):
        manifest = tmp_path / "mixed.tsv"
        manifest.write_text("".join(f"{line}\n" for line in [folder, *lines]), encoding="utf-8")
        code = main(["extract", str(manifest), str(tmp_path / "features"), "--encoder", "whisper_tiny_en",
                     "--layer", "1", "--model", str(whisper_folder), "--batch-seconds", "1", *more])  # fmt: skip
        return code, tmp_path / "features" / "whisper_tiny_en" / "l1" / "mixed"

    return run


GOOD = {"good one.wav": 8000, "näive é/日本 語.flac": 8000, "x.ogg": 8707}
BAD = {
    "zero length": ("zero.wav\t0", "zero.wav: the sound is empty"),
    "zero length, listed as more": ("zero.wav\t16000", "zero.wav: the sound is empty"),
    "too short": ("short.wav\t100", "short.wav: 100 samples are too short"),
    "corrupt": ("bent é.flac\t32000", "bent é.flac: not a readable sound file"),
    "longer than listed": ("long.wav\t8000", "long.wav: 8161 samples at 16 kHz, but the list of sounds says 8000"),
    "shorter than listed": ("long.wav\t8322", "long.wav: 8161 samples at 16 kHz, but the list of sounds says 8322"),
    "duplicate id": ("x.wav\t8000", "'x.wav' has the id of 'x.ogg'"),
    "tab": ("tab\tin.wav\t8000", "a path cannot hold a tab"),
    "missing": ("missing.wav\t8000", "missing.wav: no such file"),
}  # fmt: skip
IN_THE_LINE = ("duplicate id", "tab")


@pytest.fixture
def mixed(audio):
    """The three good sounds and everything that is bad."""
    soundfile.write(audio / "zero.wav", np.zeros(0), 16_000)
    soundfile.write(audio / "short.wav", noise(100), 16_000)
    soundfile.write(audio / "long.wav", noise(8161), 16_000)
    soundfile.write(audio / "bent é.flac", noise(32_000), 16_000)
    bend(audio / "bent é.flac")
    soundfile.write(audio / "x.wav", noise(8_000), 16_000)
    soundfile.write(audio / "tab\tin.wav", noise(8_000), 16_000)
    return audio


def test_extract_leaves_out_everything_bad_and_lists_it(mixed, extract, tmp_path):
    good = [f"{path}\t{samples}" for path, samples in GOOD.items()]
    bad = {key: one for key, one in BAD.items() if key not in ("zero length", "shorter than listed")}  # by id
    lines = [*good[:1], *[line for line, _ in bad.values()][:4], *good[1:], *[line for line, _ in bad.values()][4:]]
    code, folder = extract(mixed, lines, "--skip-bad")
    assert code == 0
    assert {path.name for path in folder.iterdir()} == {"0_1.npy", "0_1.len", "0_1.json", "0_1.skipped.tsv"}

    skipped = dict(line.split("\t") for line in (folder / "0_1.skipped.tsv").read_text("utf-8").splitlines())
    assert len(skipped) == len(bad) == 7
    for key, (line, reason) in bad.items():
        where = f"line {lines.index(line) + 2}" if key in IN_THE_LINE else line.split("\t")[0]
        assert reason in skipped[where]

    shards = FeatureShards(folder, 384)
    assert shards.names == list(GOOD)
    assert shards.lengths.tolist() == [samples // 320 for samples in GOOD.values()]
    reference = tmp_path / "reference"
    (tmp_path / "features").rename(reference)
    assert extract(mixed, good)[0] == 0
    only = FeatureShards(folder, 384)
    for utterance in range(3):
        np.testing.assert_allclose(shards.features(utterance), only.features(utterance), atol=1e-5)


@pytest.mark.parametrize("kind", BAD)
def test_extract_stops_at_anything_bad_with_one_sentence(mixed, extract, capsys, kind):
    line, reason = BAD[kind]
    good = [f"{path}\t{samples}" for path, samples in GOOD.items()]
    code, folder = extract(mixed, [*good, line])
    assert code == 1
    error = error_line(capsys)
    assert reason in error
    if kind in IN_THE_LINE:
        assert "mixed.tsv, line 5: " in error
        assert not folder.exists()
    else:
        assert str(mixed) in error
        assert not list(folder.glob("[!.]*"))
        with refused(folder):
            FeatureShards(folder)


def test_extract_goes_on_past_what_stopped_it_with_skip_bad(mixed, extract):
    good = [f"{path}\t{samples}" for path, samples in GOOD.items()]
    lines = [*good[:2], BAD["corrupt"][0], good[2]]
    code, folder = extract(mixed, lines)
    assert code == 1
    journal = (folder / ".0_1.journal").read_text()
    assert len(journal.splitlines()) == 2  # what it is, and the batch of the first two

    assert extract(mixed, lines, "--skip-bad")[0] == 0

    assert FeatureShards(folder).names == list(GOOD)
    assert (folder / "0_1.skipped.tsv").read_text("utf-8").startswith("bent é.flac\t")
