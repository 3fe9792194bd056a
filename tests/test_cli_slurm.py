"""`repcodec extract` as tasks of a SLURM job array."""

# ruff: noqa: F811  # fixtures are imported, and parameters have their names

import pytest
from test_cli import audio  # noqa: F401  (audio: fixture)

from repcodec.cli import main
from repcodec.manifest import make_manifest

# A SLURM job array


@pytest.fixture
def manifest(audio, tmp_path):
    make_manifest(audio).write(tmp_path / "train.tsv")
    return tmp_path / "train.tsv"


def test_a_task_of_a_slurm_job_array_makes_its_shard(manifest, tmp_path, monkeypatch, whisper_folder):
    command = [
        "extract",
        str(manifest),
        "",
        "--encoder",
        "whisper_tiny_en",
        "--layer",
        "1",
        "--model",
        str(whisper_folder),
    ]
    for name, value in {"ID": "1", "COUNT": "3", "MIN": "0", "MAX": "2"}.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", value)
    for root, shard in (("slurm", "slurm"), ("by hand", "1/3")):
        command[2] = str(tmp_path / root)
        assert main([*command, "--shard", shard]) == 0

    slurm, by_hand = (
        {path.name: path.read_bytes() for path in (tmp_path / root / "whisper_tiny_en" / "l1" / "train").iterdir()}
        for root in ("slurm", "by hand")
    )
    assert slurm.keys() == {"1_3.npy", "1_3.len", "1_3.json"}
    assert slurm == by_hand


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({}, "SLURM_ARRAY_TASK_ID is not set: submit with sbatch --array=0-N"),
        ({"ID": "0"}, "SLURM_ARRAY_TASK_COUNT is not set"),
        ({"ID": "1", "COUNT": "3", "MIN": "1", "MAX": "3"}, "the job array has 3 tasks from 1 to 3: submit all"),
        ({"ID": "0", "COUNT": "2", "MIN": "0", "MAX": "7"}, "the job array has 2 tasks from 0 to 7: submit all"),
        ({"ID": "6", "COUNT": "4", "MIN": "0"}, "6/4: expected I/N"),
    ],
)
def test_slurm_without_a_fitting_job_array_is_a_usage_error(
    environment, message, manifest, tmp_path, monkeypatch, capsys
):
    for name in ("ID", "COUNT", "MIN", "MAX"):
        monkeypatch.delenv(f"SLURM_ARRAY_TASK_{name}", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", value)
    with pytest.raises(SystemExit) as stop:
        main(["extract", str(manifest), str(tmp_path / "out"), "--encoder", "whisper_tiny_en", "--shard", "slurm"])
    assert stop.value.code == 2
    assert f"argument --shard: {message}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
