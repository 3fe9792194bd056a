"""evaluate.py as a process, on codecs that train.py and the package saved."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from repcodec.codec import RepCodec
from repcodec.files import locked

ROOT = Path(__file__).parent.parent


def evaluate(splits, run_dir, *overrides):
    command = [
        sys.executable,
        str(ROOT / "evaluate.py"),
        "encoder.dim=8",
        f"data.dir='{splits}'",
        f"run_dir='{run_dir}'",
    ]
    return subprocess.run([*command, *overrides], capture_output=True, text=True, timeout=240, check=False)


@pytest.mark.slow  # test_comparison.py runs evaluate.py in one and two processes
def test_several_codecs_and_kmeans_in_one_table(splits, tmp_path):
    for name, size in (("a", 8), ("b", 16)):
        torch.manual_seed(0)
        RepCodec(8, codebook_size=size).save_pretrained(tmp_path / name)
    folders = f"['{tmp_path}/a','{tmp_path}/b']"
    result = evaluate(splits, tmp_path / "run", f"tokenizers={folders}", "kmeans=[8,16]")
    assert result.returncode == 0, result.stderr
    rows = json.loads((tmp_path / "run" / "results.json").read_text())["rows"]
    sizes = [(row["name"].split(",")[0], row["codebook_size"]) for row in rows]
    assert sizes == [("RepCodec 8", 8), ("RepCodec 16", 16), ("k-means 8", 8), ("k-means 16", 16)]
    assert len({row["name"] for row in rows}) == 4
    for row in rows:
        assert row["name"].split(",")[0] in result.stdout
        assert 0 <= row["used_share"] <= 1
        assert row["normalized_error"] > 0
    assert (tmp_path / "run" / "report.html").exists()
    assert (tmp_path / "run" / "kmeans-16" / "model.safetensors").exists()


@pytest.mark.slow
def test_a_second_evaluation_in_the_same_folder_is_refused(splits, tmp_path):
    with locked(tmp_path / "run" / "results.json"):
        result = evaluate(splits, tmp_path / "run", "kmeans=[8]", "tokenizers=[]")
    assert result.returncode == 1
    assert f"process {os.getpid()} is making it" in result.stderr
    assert not (tmp_path / "run" / "results.json").exists()


@pytest.mark.slow  # test_comparison.py has the sentences
def test_mistake_is_one_sentence(splits, tmp_path):
    result = evaluate(splits, tmp_path / "run", f"tokenizers=['{tmp_path}/nothing']")
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert "is not a saved codec or k-means model" in result.stderr
    assert not (tmp_path / "run" / "results.json").exists()
