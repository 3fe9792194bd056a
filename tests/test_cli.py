import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch
from conftest import write_split

from repcodec.cli import main
from repcodec.codec import RepCodec
from repcodec.demo_weights import convert_whisper_tiny_en
from repcodec.shards import FeatureShards
from repcodec.tokens import read_tokens


def test_from_sound_files_to_tokens(tmp_path, capsys):
    rng = np.random.default_rng(0)
    (tmp_path / "audio" / "spk").mkdir(parents=True)
    for i in range(3):
        soundfile.write(tmp_path / "audio" / "spk" / f"{i}.wav", rng.normal(0, 0.1, 8000 + 640 * i), 16_000)
    model = convert_whisper_tiny_en(tmp_path)
    assert main(["manifest", str(tmp_path / "audio"), "-o", str(tmp_path / "train.tsv")]) == 0
    for shard in ("0/2", "1/2"):
        assert main(["extract", str(tmp_path / "train.tsv"), str(tmp_path / "features"), "--encoder", "whisper_tiny_en",
                     "--model", str(model), "--layer", "2", "--shard", shard]) == 0  # fmt: skip
    folder = tmp_path / "features" / "whisper_tiny_en" / "l2" / "train"
    assert FeatureShards(folder, 384).lengths.tolist() == [25, 27, 29]
    torch.manual_seed(0)
    RepCodec(384, codebook_size=8).save_pretrained(tmp_path / "codec")
    assert main(["tokenize", str(tmp_path / "codec"), str(folder), "-o", str(tmp_path / "out.tokens")]) == 0
    found = list(read_tokens(tmp_path / "out.tokens"))
    assert [(name, len(codes)) for name, codes in found] == [("spk/0.wav", 25), ("spk/1.wav", 27), ("spk/2.wav", 29)]
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
        (["tokenize", "nowhere", "nowhere", "-o", "x"], "nowhere: no such folder of feature shards"),
        (["manifest", "nowhere", "-o", "x"], "nowhere is not a folder"),
        (["extract", "m.tsv", "out", "--encoder", "hubert_huge"], "known: data2vec_base, data2vec_large, hubert_base"),
        (["extract", "m.tsv", "out", "--encoder", "hubert_base", "--shard", "3/3"], "expected I/N with 0 <= I < N"),
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


@pytest.mark.parametrize("arguments", [[], ["tokenize"], ["nonsense"], ["extract", "m.tsv", "out"]])
def test_usage_errors_exit_with_2(arguments):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2


@pytest.mark.parametrize("command", ["manifest", "extract", "tokenize"])
def test_help_shows_an_example(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"example:\n  repcodec {command} " in capsys.readouterr().out


def test_installed_command_runs():
    command = f"{sys.prefix}/bin/repcodec"
    result = subprocess.run([command, "--help"], capture_output=True, text=True, timeout=60, check=True)
    assert "tokenize" in result.stdout
