"""Extraction that was stopped or killed, and run again."""

# ruff: noqa: F811  # fixtures are imported, and parameters have their names

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import refused
from test_extraction import ROOT, SPEC, Windows, assert_unfinished, content, sounds, ten_sounds, write_noise  # noqa: F401  (sounds and ten_sounds: fixtures)

from repcodec.cli import main
from repcodec.extraction import extract, feature_folder
from repcodec.manifest import make_manifest
from repcodec.shard_files import shard_path
from repcodec.shards import FeatureShards

# Stopped and run again


@pytest.mark.parametrize("batches_done", [0, 1, 3, 6])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_an_extraction_that_failed_goes_on_after_its_last_batch_to_the_same_bytes(
    ten_sounds, tmp_path, batches_done, dtype
):
    whole = Windows()
    extract(ten_sounds, tmp_path / "whole", SPEC, whole, dtype=dtype, batch_seconds=1)
    with pytest.raises(RuntimeError):
        extract(ten_sounds, tmp_path / "out", SPEC, Windows(fails_at=batches_done + 1), dtype=dtype, batch_seconds=1)
    assert_unfinished(tmp_path / "out")

    again = Windows()
    extract(ten_sounds, tmp_path / "out", SPEC, again, dtype=dtype, batch_seconds=1)

    assert again.calls == whole.calls - batches_done
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert content(tmp_path / "out").keys() == {"0_1.npy", "0_1.len", "0_1.json"}


def test_an_extraction_that_fails_at_every_batch_gets_to_the_end(ten_sounds, tmp_path):
    whole = Windows()
    extract(ten_sounds, tmp_path / "whole", SPEC, whole, batch_seconds=0.1)
    for _ in range(whole.calls - 1):
        with pytest.raises(RuntimeError):
            extract(ten_sounds, tmp_path / "out", SPEC, Windows(fails_at=2), batch_seconds=0.1)

    extract(ten_sounds, tmp_path / "out", SPEC, Windows(fails_at=2), batch_seconds=0.1)

    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_an_unfinished_shard_made_otherwise_is_refused_and_kept(ten_sounds, tmp_path):
    with pytest.raises(RuntimeError):
        extract(ten_sounds, tmp_path / "out", SPEC, Windows(2.0, fails_at=3), batch_seconds=0.5)
    before = content(tmp_path / "out")

    with refused("0_1.npy.partial", "weights_sha256, batch_seconds differs", "former settings"):
        extract(ten_sounds, tmp_path / "out", SPEC, Windows(), batch_seconds=1)

    assert content(tmp_path / "out") == before


def test_a_strict_run_that_stopped_at_a_bad_sound_goes_on_with_skip_bad(ten_sounds, tmp_path):
    (ten_sounds.root / "7.wav").write_bytes(b"no sound")
    whole, strict, again = Windows(), Windows(), Windows()
    extract(ten_sounds, tmp_path / "whole", SPEC, whole, batch_seconds=1, skip_bad=True)
    with refused(ten_sounds.root / "7.wav"):
        extract(ten_sounds, tmp_path / "out", SPEC, strict, batch_seconds=1)
    assert_unfinished(tmp_path / "out")

    extract(ten_sounds, tmp_path / "out", SPEC, again, batch_seconds=1, skip_bad=True)

    assert strict.calls > 1 and strict.calls + again.calls == whole.calls
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert "7.wav" in (tmp_path / "out" / "0_1.skipped.tsv").read_text()


def test_rows_of_a_batch_that_was_never_noted_are_cut_off_when_its_sound_is_gone(ten_sounds, tmp_path):
    whole = Windows()
    extract(ten_sounds, tmp_path / "whole", SPEC, whole, batch_seconds=1)
    with pytest.raises(RuntimeError):
        extract(ten_sounds, tmp_path / "out", SPEC, Windows(fails_at=whole.calls), batch_seconds=1)
    with open(tmp_path / "out" / ".0_1.npy.partial", "ab") as file:  # as a kill in the middle of the last batch
        file.write(bytes(1000))
    (ten_sounds.root / "9.wav").unlink()

    extract(ten_sounds, tmp_path / "out", SPEC, Windows(), batch_seconds=1, skip_bad=True)

    found, reference = FeatureShards(tmp_path / "out"), FeatureShards(tmp_path / "whole")
    assert found.names == reference.names[:9]
    assert np.array_equal(found.sample(10**9), reference.sample(10**9)[: found.lengths.sum()])


def test_a_strict_run_after_a_skipping_one_is_refused_and_loses_nothing(ten_sounds, tmp_path):
    (ten_sounds.root / "4.wav").write_bytes(b"no sound")
    extract(ten_sounds, tmp_path / "whole", SPEC, Windows(), batch_seconds=1, skip_bad=True)
    with pytest.raises(RuntimeError):
        extract(ten_sounds, tmp_path / "out", SPEC, Windows(fails_at=5), batch_seconds=1, skip_bad=True)

    with refused("left out 1 sounds", "--skip-bad"):
        extract(ten_sounds, tmp_path / "out", SPEC, Windows(), batch_seconds=1)

    extract(ten_sounds, tmp_path / "out", SPEC, Windows(), batch_seconds=1, skip_bad=True)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


# Killed: real processes, the real Whisper tiny.en


def words(manifest, root, model):
    return ["extract", str(manifest), str(root), "--encoder", "whisper_tiny_en", "--layer", "2", "--model", str(model),
            "--batch-seconds", "1.5"]  # fmt: skip


def run_here(manifest, root, model):
    """Run the command in this process, on one core as in `start`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert main(words(manifest, root, model)) == 0
    finally:
        torch.set_num_threads(threads)


def start(manifest, root, model, *more):
    """Start `repcodec extract` in a process of its own, on one core: the number of threads may change last bits."""
    command = [sys.executable, "-m", "repcodec.cli", *words(manifest, root, model), *more]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(*processes):
    for process in processes:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output


def num_lines(journal):
    return journal.read_bytes().count(b"\n") if journal.exists() else 0


@pytest.fixture(scope="module")
def undisturbed(whisper_folder, tmp_path_factory):
    """A manifest of 40 seconds of noise, and a folder of features that the command made of it in one go."""
    folder = tmp_path_factory.mktemp("undisturbed")
    for i in range(40):
        write_noise(folder / "audio" / f"{i:02}.wav", 16_000 + 37 * i, seed=i)
    make_manifest(folder / "audio").write(folder / "noise.tsv")
    run_here(folder / "noise.tsv", folder / "features", whisper_folder)
    return folder / "noise.tsv", feature_folder(folder / "features", "whisper_tiny_en", 2, "noise")


def test_a_killed_extraction_goes_on_to_the_same_bytes(undisturbed, whisper_folder, tmp_path):
    manifest, reference = undisturbed
    folder = feature_folder(tmp_path, "whisper_tiny_en", 2, "noise")
    journal = folder / ".0_1.journal"
    process = start(manifest, tmp_path, whisper_folder)
    while num_lines(journal) < 2 and process.poll() is None:
        time.sleep(0.002)
    process.kill()
    output, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL, output
    assert_unfinished(folder)
    assert 2 <= num_lines(journal) < 41  # a line what it is, and one a batch

    run_here(manifest, tmp_path, whisper_folder)

    assert content(folder) == content(reference)


@pytest.mark.slow
def test_shards_made_side_by_side_are_together_what_one_is(undisturbed, whisper_folder, tmp_path):
    manifest, reference = undisturbed
    finish(*[start(manifest, tmp_path, whisper_folder, "--shard", f"{rank}/3") for rank in range(3)])

    folder = feature_folder(tmp_path, "whisper_tiny_en", 2, "noise")
    assert set(content(folder)) == {
        shard_path("", i, 3, end).name for i in range(3) for end in (".npy", ".len", ".json")
    }
    one, three = FeatureShards(reference, 384), FeatureShards(folder, 384)
    assert three.names == one.names
    assert np.array_equal(three.lengths, one.lengths)
    rows, others = one.sample(10**9), three.sample(10**9)
    assert np.linalg.norm(others - rows) / np.linalg.norm(rows) < 1e-6


@pytest.mark.slow
def test_an_extraction_killed_at_random_moments_ends_with_the_same_bytes(monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from kills import main

    assert main(["4", "--jobs", "extract"]) == 0
    assert "extract: 4 kills" in capsys.readouterr().out
