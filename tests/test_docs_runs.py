"""The trainings, evaluations and benchmarks that README and docs/ name, shrunk, but whole."""

# ruff: noqa: F811  # fixtures are imported, and parameters have their names

import gzip
import json
import logging
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import write_split
from hydra.core.singleton import Singleton
from test_cuts import lhotse_files, served  # noqa: F401  (a fixture that served needs)
from test_docs import (  # noqa: F401  (models and checkout are fixtures)
    DIM,
    DOCUMENTS,
    ROOT,
    checkout,
    commands,
    make_features,
    models,
    repcodec,
    run,
)

from repcodec.codec import RepCodec
from repcodec.manifest import Manifest, utterance_id

BENCHMARKS = {
    "data": "--dim 16 --minutes 0.2 --runs 1 --batches 2",
    "extraction": "--audio LibriSpeech/test --runs 1",
    "kills": "1 --jobs convert",
    "quantizers": "--features few --encoder whisper_tiny_en --steps 1",
    "recipes": "--features few --encoder whisper_tiny_en --steps 2 --fast-steps 2 --seeds 0",
    "scoring": "--hours 0.1 --processes 1",
    "tokenization": "--dim 16 --minutes 0.2 --runs 1",
    "train": "--dims 16 --steps 1",
}
RUNS = [name for name, path in DOCUMENTS.items() if re.search(r"\b(train|evaluate)\.py \S*=", path.read_text())]


@pytest.fixture
def studio(checkout, models):
    """The same folder with what training and evaluation name: features, recordings, labels, tokens files."""
    make_features()
    write_features("dumped")
    for name in ("features_a", "features_b"):
        Path(name).symlink_to("features")
    Path("cache").mkdir(exist_ok=True)
    Path("cache/whisper-tiny.en").symlink_to(models / "whisper")  # as if it had been made there
    Path("path/to").mkdir(parents=True)
    Path("path/to/recordings").symlink_to(Path("LibriSpeech").resolve())
    about = {"encoder": "hubert_base", "layer": 9, "frame_rate": 50, "encoder_model": str(models / "hubert")}
    for i, size in enumerate((8, 16)):
        RepCodec(DIM, codebook_size=size).save_pretrained(f"outputs/sizes/{i}/codec", about)
    shutil.copy("test.tsv", "dev-clean.tsv")
    run("tokenize outputs/large/codec train.tsv -o train.tokens")
    run("tokenize outputs/large/codec test.tsv -o dev-clean.tokens")
    Path("dev-clean.tokens.gz").write_bytes(gzip.compress(Path("dev-clean.tokens").read_bytes()))
    with gzip.open("phones.jsonl.gz", "wt") as lines:
        for split in ("train", "valid", "test"):
            manifest = Manifest.read(f"{split}.tsv")
            for path, samples in zip(manifest.paths, manifest.num_samples, strict=True):
                phones = ["abca"[i // 10 % 4] for i in range(samples // 160)]
                name = utterance_id(path)
                lines.write(json.dumps({"name": name, "phones": phones}) + "\n")
                labels = Path("alignments", f"{name}.phn")
                labels.parent.mkdir(parents=True, exist_ok=True)
                starts = range(0, samples - 1599, 1600)
                labels.write_text("".join(f"{s} {s + 1600} {'abca'[i % 4]}\n" for i, s in enumerate(starts)))


def write_features(folder):
    for split in ("train", "valid"):
        write_split(Path(folder, split), [40, 30, 20, 25], dim=DIM)


def shrunk(script, words, models, url):
    """The overrides of a command with others behind them, for a run of two steps on one CPU."""
    given = " ".join(words)
    overrides = ["encoder.dim=16"]
    if "data=demo" in given or "experiment=demo" in given:
        overrides += [f"encoder.model='{models}/whisper'", "data.name=few"]
        overrides += [] if "data.audio=" in given else ["data.audio=path/to/recordings"]
    if script == "evaluate.py":
        overrides += ["kmeans=[8,16]"] if "tokens=" not in given else []
    else:
        overrides += ["data.batch_size=4", "data.crop=16", "trainer.max_steps=2", "trainer.val_check_interval=2"]
        overrides += [] if "logger=" in given else ["logger=none"]
        overrides += ["data.num_workers=0", f"encoder.model='{models}/hubert'"] if "data=audio" in given else []
        overrides += ["hydra.sweeper.n_trials=1"] if "optuna" in given else []
        fixed = "fsq" in given or "codebook_size" in given or "optuna" in given
        overrides += [] if fixed else ["quantizer.codebook_size=16"]
    found = [re.sub(r"^trainer=(gpu|ddp|slurm)$", "trainer=cpu", word) for word in words]
    found = [word.replace("launcher=slurm", "launcher=submitit_local") for word in found]
    found = [word.replace("https://host", f"{url}/shar").replace("000099", "000003") for word in found]
    left_out = ("trainer.num_nodes", "hydra.launcher.partition")
    return [word for word in found if not word.startswith(left_out)] + overrides


def run_script(script, overrides, monkeypatch):
    """Run train.py or evaluate.py in this process, and leave nothing of Hydra's behind."""
    handlers, level, state = logging.root.handlers[:], logging.root.level, Singleton.get_state()
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setattr(sys, "argv", [script, *overrides])
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as stop:
        assert not stop.code, (script, overrides)
    finally:
        Singleton.set_state(state)
        for handler in set(logging.root.handlers) - set(handlers):
            handler.close()
        logging.root.handlers[:], logging.root.level = handlers, level


def made(pattern):
    return {(path, path.stat().st_mtime_ns) for path in Path("outputs").rglob(pattern)}


@pytest.mark.slow
@pytest.mark.parametrize("document", RUNS)
def test_every_run_trains_or_evaluates(document, studio, models, served, tmp_path):
    found = commands(document, tmp_path / "noting")
    if not any({"extract", "hubert_large"} <= set(words) for words in found):
        for layer in (12, 18):
            write_features(f"features/hubert_large/l{layer}")
    for words in found:
        with pytest.MonkeyPatch.context() as patch:
            if words[:2] in (["python", "train.py"], ["python", "evaluate.py"]) and words[2:] != ["--help"]:
                pattern = {"train.py": "codec/config.json", "evaluate.py": "report.html"}[words[1]]
                before = made(pattern)
                run_script(words[1], shrunk(words[1], words[2:], models, served), patch)
                assert made(pattern) - before, words
            elif words[0] == "repcodec":
                repcodec(words[1:], patch)


@pytest.mark.slow
@pytest.mark.parametrize("script", sorted(path.stem for path in ROOT.glob("benchmarks/*.py")))
def test_every_benchmark_runs(script, checkout):
    for split in ("train", "valid", "test"):
        write_split(Path("few", split), [400, 300, 500], dim=384)
    command = [sys.executable, str(ROOT / "benchmarks" / f"{script}.py"), *BENCHMARKS[script].split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\d", done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train.py", "evaluate.py"])
def test_scripts_help_names_their_groups(script):
    done = subprocess.run([sys.executable, ROOT / script, "--help"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0
    assert "encoder: data2vec_base" in done.stdout


def test_every_benchmark_has_its_place():
    scripts = {path.name for path in ROOT.glob("benchmarks/*.py")}
    page = DOCUMENTS["docs/benchmarks.md"].read_text(encoding="utf-8")
    assert set(re.findall(r"^\| .* \| \[(\w+\.py)\]\(#", page, re.M)) == scripts
    assert {Path(words[1]).name for words in map(str.split, re.findall(r"^python .*", page, re.M))} == scripts
    assert set(BENCHMARKS) == {name.removesuffix(".py") for name in scripts}
