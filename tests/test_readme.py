"""The README: short, plain, its Python run as it stands; and the package, built, installed and used without a checkout.

Its commands are tried in test_docs.py, with those of the guides.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from repcodec import RepCodec
from repcodec.speech_encoders import encoder_table, load_speech_encoder

ROOT = Path(__file__).parent.parent


@pytest.fixture
def demo(tmp_path, speech, whisper_folder, monkeypatch):
    """A folder as after `make demo`: a codec in outputs/demo/codec; speech.wav and its features besides."""
    sound = sorted((speech / "audio").rglob("*.flac"))[0]
    waveform, rate = soundfile.read(sound, dtype="float32")
    soundfile.write(tmp_path / "speech.wav", waveform, rate)
    encoder = load_speech_encoder(encoder_table()["whisper_tiny_en"], 3, whisper_folder)
    (features,) = encoder([torch.from_numpy(waveform)])
    torch.manual_seed(0)
    codec = RepCodec(384, codebook_size=32)
    codec.start_as_identity()
    codec.quantizer.start(features, seed=0)
    about = {"encoder": "whisper_tiny_en", "layer": 3, "frame_rate": 50, "encoder_model": str(whisper_folder)}
    codec.save_pretrained(tmp_path / "outputs" / "demo" / "codec", about)
    np.save(tmp_path / "features.npy", features.numpy())
    monkeypatch.chdir(tmp_path)
    return features


def test_readme_is_short_and_plain_markdown():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert 100 <= len(text.splitlines()) <= 165, "read in ten minutes; the rest is in docs/"
    prose = re.sub(r"```.*?```|`[^`]*`", "", text, flags=re.S)
    assert not re.search(r"<[a-z/!]|\{[a-z]|:::", prose), "no HTML and no directive: GitHub and PyPI show it too"
    for title in (
        "Two commands", "Your own recordings", "Using a codec", "Published checkpoints", "Several GPUs",
        "Comparing tokenizers", "Figures",
    ):  # fmt: skip
        assert f"\n## {title}\n" in text
    guides = {path.name for path in (ROOT / "docs").glob("*.md")} - {"index.md", "changelog.md", "commands.md"}
    assert guides == set(re.findall(r"docs/(\w+\.md)", text)), "every guide is a click away"
    pictures = re.findall(r"!\[[^]]{40,}\]\((\S+)\)", text)
    assert pictures and all((ROOT / picture).is_file() for picture in pictures)


@pytest.mark.parametrize("document", ["README.md", "docs/tokenizing.md"])
def test_python_of_the_readme_and_of_its_guide_runs(document, demo, capsys):
    text = (ROOT / document).read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    names = {"features": demo[None], "chunks": demo.split(20)}
    exec(code.replace("features = codec.decode", "decoded = codec.decode"), names)
    offline = RepCodec.from_pretrained("outputs/demo/codec").encode(demo[None])
    assert names["decoded"].shape == demo[None].shape
    assert names["result"].codes.shape == (1, len(demo)) and names["result"].codes_per_second == 50
    assert names["result"].duration == pytest.approx(len(demo) / 50, abs=0.02)
    said = [int(number) for number in re.findall(r"\d+", capsys.readouterr().out)]
    assert said == (offline.flatten().tolist() if "stream" in code else [])


def test_installed_wheel_works_without_a_checkout(demo, tmp_path):
    built = tmp_path / "built"
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", built, ROOT], check=True, timeout=300)
    (wheel,) = built.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", tmp_path / "site", wheel], check=True, timeout=300)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}

    def run(*words):
        command = [sys.executable, "-m", "repcodec.cli", *words]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = "import repcodec; print(repcodec.__file__)"
    found = subprocess.run([sys.executable, "-c", where], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert found.stdout.startswith(str(tmp_path / "site"))
    expected = RepCodec.from_pretrained("outputs/demo/codec").encode(demo[None])[0, 0].tolist()
    assert run("tokenize", "outputs/demo/codec", "speech.wav").splitlines()[1].split("\t")[1].split() == list(
        map(str, expected)
    )
    assert "160 ms" in run("info", "outputs/demo/codec")
    assert run("convert", "outputs/demo/codec", "copy").startswith("copy: a codec of 1 x 32 codes")
    assert (
        "Whisper" in (tmp_path / "copy" / "README.md").read_text()
        or "whisper" in (tmp_path / "copy" / "README.md").read_text()
    )


@pytest.mark.slow  # installs PyTorch and everything else that the package names
def test_wheel_alone_in_an_empty_environment(demo, tmp_path):
    """Built from the source archive that `python -m build` makes; core dependencies only, in a folder elsewhere."""
    subprocess.run([sys.executable, "-m", "build", "--outdir", tmp_path / "built", ROOT], check=True, timeout=600)
    (wheel,) = (tmp_path / "built").glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "empty"], check=True, timeout=300)
    programs = tmp_path / "empty" / "bin"
    install = [programs / "pip", "--quiet", "install", "--constraint", ROOT / "constraints.txt", wheel]
    subprocess.run(install, check=True, timeout=1800)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*words):
        done = subprocess.run(
            words, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "usage: repcodec" in run(programs / "repcodec", "--help")
    expected = RepCodec.from_pretrained("outputs/demo/codec").encode(demo[None])[0, 0].tolist()
    said = run(programs / "repcodec", "tokenize", "outputs/demo/codec", "speech.wav")
    assert said.splitlines()[1].split("\t")[1] == " ".join(map(str, expected))
    where = "from repcodec import RepCodec, SpeechTokenizer; import repcodec; print(repcodec.__file__)"
    assert run(programs / "python", "-c", where).startswith(str(tmp_path / "empty"))
    names = sorted(path.stem for path in (ROOT / "repcodec").glob("*.py"))
    every = f"import importlib; [importlib.import_module('repcodec.' + name) for name in {names!r}]"
    run(programs / "python", "-c", every)
