"""The notebooks, run from top to bottom on a small demo: real speech, Whisper tiny.en, codecs of a few steps."""

import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from repcodec.demo_corpus import SPLITS
from repcodec.extraction import extract
from repcodec.manifest import Manifest
from repcodec.speech_encoders import encoder_table, load_speech_encoder

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def made(speech, whisper_folder, tmp_path_factory):
    """A folder that looks as after `make demo` and a sweep, but small."""
    folder = tmp_path_factory.mktemp("made")
    shutil.copytree(speech, folder / "cache" / "demo")
    (folder / "cache" / "whisper-tiny.en").symlink_to(whisper_folder)
    spec, features = (
        encoder_table()["whisper_tiny_en"],
        folder / "cache" / "demo" / "features" / "whisper_tiny_en" / "l3",
    )
    encoder = load_speech_encoder(spec, 3, whisper_folder)
    for split in SPLITS:
        extract(Manifest.read(speech / f"{split}.tsv"), features / split, spec, encoder, model=whisper_folder)
    usual = [
        "experiment=fast", "encoder=whisper_tiny_en", "layer=3", f"data.dir='{features}'", "data.batch_size=2",
        "codec=small", "trainer.max_steps=4", "trainer.val_check_interval=2", "logger=csv",
    ]  # fmt: skip
    several = ["-m", "quantizer.codebook_size=16,32", f"hydra.sweep.dir='{folder}/outputs/sweep'"]
    command = [sys.executable, str(ROOT / "train.py"), *several, *usual]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / "outputs" / "demo").symlink_to(folder / "outputs" / "sweep" / "1")
    return folder


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_and_shows_pictures(made, path):
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": made}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert not [output for output in outputs if output.output_type == "error"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_kept_without_output_and_as_lines(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None
    assert path.read_text(encoding="utf-8") == nbformat.writes(notebook) + "\n"


def test_there_are_the_three():
    assert [path.stem for path in NOTEBOOKS] == ["codebook", "quickstart", "sweep"]
