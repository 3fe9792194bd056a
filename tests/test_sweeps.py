"""Sweeps by the real train.py: in this process where that is enough, in launchers' processes where it matters."""

import csv
import json
import logging
import os
import runpy
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import FAST_CODEC, refused, write_split
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.singleton import Singleton
from hydra.errors import MissingConfigException
from hydra.utils import instantiate
from omegaconf import OmegaConf

from repcodec.errors import user_message
from repcodec.files import locked
from repcodec.sweeps import Job, _train_apart, run_job

ROOT = Path(__file__).parent.parent
FAST = [*FAST_CODEC, "data.batch_size=4", "data.crop=16", "trainer.max_steps=2", "trainer.val_check_interval=2"]
LAYERS = {"hubert_base": 9, "hubert_large": 18, "whisper_tiny_en": 3}


@pytest.fixture
def features(tmp_path):
    """Features of two encoders, as `repcodec extract` lays them out below data.root."""
    for seed, encoder in enumerate(("hubert_base", "hubert_large")):
        make_features(tmp_path / "features", encoder, seed)
    return tmp_path / "features"


def make_features(root, encoder, seed=0):
    folder = root / encoder / f"l{LAYERS[encoder]}"
    write_split(folder / "train", [40, 7, 25, 60], seed=seed)
    write_split(folder / "valid", [20, 31], seed=seed + 10)


@pytest.fixture
def sweep(monkeypatch, features):
    """Run `train.py -m` in this process, and leave nothing of Hydra's behind; return the exit code."""
    handlers, level = logging.root.handlers[:], logging.root.level
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")

    def run(*options):
        state = Singleton.get_state()
        monkeypatch.setattr(sys, "argv", ["train.py", "-m", *FAST, f"data.root='{features}'", "logger=none", *options])
        try:
            runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
        except SystemExit as stop:
            return stop.code
        finally:
            Singleton.set_state(state)
            for handler in set(logging.root.handlers) - set(handlers):
                handler.close()
            logging.root.handlers[:], logging.root.level = handlers, level
        return 0

    return run


def summary(folder):
    with open(folder / "summary.csv", newline="") as file:
        return list(csv.DictReader(file))


def error_of(folder):
    return json.loads((folder / "codec" / "config.json").read_text())["figures"]["normalized_error"]


def test_a_second_sweep_in_the_same_folder_is_refused(sweep, tmp_path, capsys):
    folder = tmp_path / "sweep"
    with locked(folder / "sweep.json"):
        assert sweep("seed=0,1", f"hydra.sweep.dir='{folder}'") == 1
    assert f"process {os.getpid()} is making it" in capsys.readouterr().err
    assert not list(folder.iterdir())


def test_a_sweep_goes_on_after_a_failed_job_and_again_by_the_same_command(features, sweep, tmp_path, capfd):
    # The run's name hangs on the encoder, which is swept: the sweep has one folder all the same.
    options = [
        "encoder=hubert_base,whisper_tiny_en,hubert_large",
        "~callbacks.dashboard",
        f"hydra.sweep.dir='{tmp_path}/sweeps/${{encoder.name}}'",
    ]
    assert sweep(*options) == 1
    assert [path.name for path in (tmp_path / "sweeps").iterdir()] == ["hubert_base"]
    folder = tmp_path / "sweeps" / "hubert_base"
    rows = summary(folder)
    errors = {number: error_of(folder / number) for number in ("0", "2")}
    assert {row["job"]: float(row["normalized_error"]) for row in rows[:2]} == pytest.approx(errors)
    assert float(rows[0]["normalized_error"]) < float(rows[1]["normalized_error"])
    assert [row["best"] for row in rows] == ["best", "", ""]
    assert [row["status"] for row in rows] == ["finished", "finished", "failed"]
    failed = rows[2]
    assert (failed["job"], failed["normalized_error"], failed["encoder"]) == ("1", "", "whisper_tiny_en")
    assert failed["folder"] == str(folder / "1")
    assert "repcodec extract train.tsv ROOT --encoder whisper_tiny_en --layer 3" in failed["sentence"]
    said = capfd.readouterr()
    assert f"Job 1 failed: {failed['sentence']}" in said.out
    assert "Traceback" not in said.out + said.err
    table = said.out[said.out.rindex("normalized error ┃") :]
    assert table.index(f"{min(errors.values()):.4f} best") < table.index(f"{max(errors.values()):.4f}")
    assert "crop" not in table.partition("Job 1 failed")[0], "what is the same in all jobs is no column"

    make_features(features, "whisper_tiny_en")
    before = (folder / "0" / "codec" / "model.safetensors").stat().st_mtime_ns
    assert sweep(*options) == 0
    assert (folder / "0" / "codec" / "model.safetensors").stat().st_mtime_ns == before, "trained again"
    rows = summary(folder)
    assert [row["status"] for row in rows] == ["finished"] * 3
    assert {row["job"]: float(row["normalized_error"]) for row in rows} == pytest.approx(
        {number: error_of(folder / number) for number in ("0", "1", "2")}
    )

    capfd.readouterr()
    assert sweep("encoder=hubert_base", "seed=0,1", f"hydra.sweep.dir='{folder}'") == 1
    said = capfd.readouterr().err
    assert said.startswith(f"error: {folder} holds another sweep") and "run=NAME" in said
    assert len(summary(folder)) == 3


def test_a_search_by_optuna_survives_a_failed_job_and_goes_on_from_its_storage(features, sweep, tmp_path):
    folder = tmp_path / "search"
    space = "quantizer.codebook_size=choice(8,16)"  # the codec here is small
    options = ["sweep=optuna", "~callbacks.dashboard", space, f"hydra.sweep.dir='{folder}'"]
    (features / "hubert_base").rename(features / "away")
    assert sweep(*options, "hydra.sweeper.n_trials=1") == 1
    (features / "away").rename(features / "hubert_base")
    assert sweep(*options, "hydra.sweeper.n_trials=3") == 1, "one of its jobs has failed"
    rows = {row["job"]: row for row in summary(folder)}
    assert {number: row["status"] for number, row in rows.items()} == {"0": "failed", "1": "finished", "2": "finished"}
    assert len({row["optimizer.lr"] for row in rows.values()}) == 3, "the search began again"
    with sqlite3.connect(folder / "optuna.db") as storage:
        trials = storage.execute(
            "select number, state, value from trials join trial_values using (trial_id) order by number"
        ).fetchall()
    assert [(number, state) for number, state, _ in trials] == [(0, "COMPLETE"), (1, "COMPLETE"), (2, "COMPLETE")]
    assert trials[0][2] == float("inf")
    assert [value for *_, value in trials[1:]] == pytest.approx([float(rows[n]["normalized_error"]) for n in "12"])
    assert sweep(*options, "hydra.sweeper.n_trials=3") == 1
    assert len(summary(folder)) == 3, "three in all"


@pytest.fixture
def job(tmp_path):
    """Run one job of a sweep with a function in place of training; return what it returned and its job.json."""
    folder = tmp_path / "sweep" / "4"
    state = Singleton.get_state()

    def run(train):
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            options = ["seed=3", "run=name", f"run_dir='{folder}'"]
            config = compose("train", options, return_hydra_config=True)
            HydraConfig.instance().set_config(config)
        return run_job(train, config, str(ROOT / "train.py")), Job.read(folder)

    yield run
    Singleton.set_state(state)


def raising(error):
    def train(config):
        raise error

    return train


def test_a_job_that_fails_returns_infinity_and_leaves_its_sentence(job, capfd):
    worst = float("inf")
    found, left = job(raising(ZeroDivisionError("division by zero")))
    assert (found, left.status, left.error) == (worst, "failed", None)
    assert left.sentence == "ZeroDivisionError: division by zero"
    found, left = job(lambda config: float("nan"))
    assert (found, left.status, left.error) == (worst, "failed", None)
    assert "nan" in left.sentence


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), SystemExit(143)])
def test_a_user_and_a_signal_end_the_whole_sweep(job, stop, tmp_path):
    with pytest.raises(type(stop)):
        job(raising(stop))
    assert Job.read(tmp_path / "sweep" / "4").status == "running"


def test_a_job_that_stopped_goes_on_from_its_checkpoint_and_one_that_finished_is_not_run_again(job):
    seen = []

    def train(config):
        logged = instantiate(config.logger.wandb)._wandb_init  # what wandb.init will get
        seen.append((config.ckpt_path, logged["group"], logged["name"]))
        if len(seen) == 1:
            raise KeyboardInterrupt
        return 0.25

    with pytest.raises(KeyboardInterrupt):
        job(train)
    assert job(train)[0] == job(train)[0] == 0.25
    assert seen == [(None, "sweep", "name-4"), ("last", "sweep", "name-4")]


@pytest.mark.parametrize(
    ("option", "extra"),
    [("sweep=optuna", "sweep"), ("hydra/launcher=joblib", "sweep"), ("hydra/launcher=slurm", "slurm")],
)
def test_a_plugin_that_is_not_installed_is_named_with_its_extra(option, extra, monkeypatch):
    # Hydra finds a plugin by what it has put into this store when Hydra imported it.
    hydra = ConfigStore.instance().repo["hydra"]
    for kind, name in (("sweeper", "optuna"), ("launcher", "joblib"), ("launcher", "submitit_slurm")):
        monkeypatch.delitem(hydra[kind], f"{name}.yaml", raising=False)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        compose("train", [])  # whoever does not ask for one needs none
        with pytest.raises(MissingConfigException) as caught:
            compose("train", [option])
    assert f"pip install 'repcodec[{extra}]'" in user_message(caught.value)


def test_slurm_gets_an_array_of_jobs_that_go_back_into_the_queue(sweep, tmp_path, monkeypatch, capfd):
    (tmp_path / "bin").mkdir()
    for name in ("sbatch", "srun", "scontrol"):
        (tmp_path / "bin" / name).write_text("#!/bin/sh\necho no cluster here >&2\nexit 3\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    options = ["hydra/launcher=slurm", "hydra.launcher.partition=gpu", f"hydra.sweep.dir='{tmp_path}/sweep'"]
    assert sweep("seed=0,1,2", *options) == 1
    assert "error: the sweep's jobs could not be run by submitit: no cluster here" in capfd.readouterr().err
    (script,) = (tmp_path / "sweep" / ".submitit").glob("*.sh")
    lines = script.read_text().splitlines()
    for wanted in ("array=0-2%3", "signal=USR2@300", "requeue", "open-mode=append", "gpus-per-node=1", "partition=gpu"):
        assert f"#SBATCH --{wanted}" in lines
    assert "-m submitit.core._submit" in next(line for line in lines if line.startswith("srun "))


SCRIPT = """
import json, sys
from pathlib import Path
given = dict(word.split("=", 1) for word in sys.argv[1:])
folder = Path(given["hydra.run.dir"].strip("'"))
print("progress", file=sys.stderr)
if given["seed"] == "1":
    sys.exit("error: no such features.")
if given["seed"] == "2":
    sys.exit(7)
(folder / "codec").mkdir(parents=True)
(folder / "codec" / "config.json").write_text(json.dumps({"figures": {"normalized_error": 0.5}}))
"""


def test_a_job_of_several_ranks_runs_by_its_own_command_and_brings_back_its_error(tmp_path, capfd):
    """The command is another here; with train.py and two ranks it runs in the slow tests below."""
    (tmp_path / "script.py").write_text(SCRIPT)
    config = OmegaConf.create({"run_dir": str(tmp_path / "0"), "run": "a job", "ckpt_path": None, "logger": {}})
    script = str(tmp_path / "script.py")
    assert _train_apart(config, ["seed=0"], script) == 0.5
    assert "progress" in capfd.readouterr().err
    with refused("no such features."):
        _train_apart(config, ["seed=1"], script)
    with refused("its process ended with code 7", tmp_path / "0" / "train.log"):
        _train_apart(config, ["seed=2"], script)


@pytest.mark.slow
@pytest.mark.parametrize("option", ["hydra/launcher=joblib", "hydra/launcher=submitit_local", "trainer=ddp_cpu"])
def test_jobs_in_processes_of_their_own_are_in_the_summary(features, tmp_path, option):
    folder = tmp_path / "sweep"
    command = [sys.executable, str(ROOT / "train.py"), "-m", *FAST, f"data.root='{features}'", "logger=none"]
    result = subprocess.run(
        [*command, "encoder=hubert_base,whisper_tiny_en", f"hydra.sweep.dir='{folder}'", option],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert result.returncode == 1, result.stderr
    assert "Traceback" not in result.stderr
    finished, failed = summary(folder)
    assert float(finished["normalized_error"]) == pytest.approx(error_of(folder / "0"))
    assert (finished["job"], finished["status"], failed["job"], failed["status"]) == ("0", "finished", "1", "failed")
    assert "repcodec extract train.tsv ROOT --encoder whisper_tiny_en --layer 3" in failed["sentence"]
    assert f"Job 1 failed: {failed['sentence']}" in result.stdout
