"""Every long job on a full disk, and in a folder that cannot be written: one sentence, and nothing half-written."""

import subprocess

import pytest
from test_comparison import evaluate_here
from test_train import run_here

from repcodec.cli import main
from repcodec.errors import user_message


@pytest.fixture(params=["full", "read-only"])
def out(request, tiny_disk):
    """A folder on a file system without room for more, or on one that takes nothing."""
    (tiny_disk / "out").mkdir()
    if request.param == "full":
        with pytest.raises(OSError), open(tiny_disk / "ballast", "wb", buffering=0) as file:
            while True:
                file.write(bytes(1024))
    else:
        subprocess.run(["mount", "-o", "remount,ro", tiny_disk], check=True)
    return tiny_disk / "out"


@pytest.fixture
def saved(codec, tmp_path):
    codec.float().save_pretrained(tmp_path / "codec", {"frame_rate": 50})
    return tmp_path / "codec"


@pytest.fixture
def command(capsys):
    """Run the command, which must fail; return the one sentence that it says."""

    def run(*words):
        assert main([str(word) for word in words]) == 1
        said = capsys.readouterr().err
        assert said.count("error: ") == 1 and "Traceback" not in said
        return said.partition("error: ")[2].strip()

    return run


def check(sentence, out):
    assert str(out) in sentence
    assert "No space left on device" in sentence or "Read-only file system" in sentence
    assert len(sentence.splitlines()) == 1
    made = [path for path in out.rglob("*") if path.is_file()]
    assert not [path for path in made if not path.name.startswith(".") and path.stat().st_size]


def test_extract(out, speech, whisper_folder, command):
    words = ("--encoder", "whisper_tiny_en", "--model", whisper_folder)
    check(command("extract", speech / "test.tsv", out, *words), out)


def test_tokenize(out, saved, splits, command):
    check(command("tokenize", saved, splits / "test", "-o", out / "test.tokens"), out)


def test_decode(out, saved, splits, command, tmp_path):
    assert main(["tokenize", str(saved), str(splits / "test"), "-o", str(tmp_path / "test.tokens")]) == 0
    check(command("decode", saved, tmp_path / "test.tokens", out / "decoded"), out)


def test_convert(out, saved, command):
    check(command("convert", saved, out / "codec"), out)


def test_train(out, splits):
    with pytest.raises(Exception) as caught:
        run_here(splits, out, "logger=csv")
    check(user_message(caught.value), out)


def test_evaluate(out, splits, saved):
    with pytest.raises(Exception) as caught:
        evaluate_here(splits, out, f"tokenizers=['{saved}']", "kmeans=[4]")
    check(user_message(caught.value), out)
