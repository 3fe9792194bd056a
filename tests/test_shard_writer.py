"""Writing shards: whole or not at all, and resumed to the same bytes."""

import json
import multiprocessing
import os
import signal
from contextlib import suppress

import numpy as np
import pytest
from conftest import refused

from repcodec.errors import RepCodecError
from repcodec.shard_files import is_finished, shard_path
from repcodec.shard_writer import write_shard
from repcodec.shards import FeatureShards

DIM = 4
ABOUT = {"encoder": "e", "layer": 9, "frame_rate": 50.0, "root": "/audio"}


def random(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def write(folder, utterances, rank=0, num_shards=1, **more):
    with write_shard(folder, rank, num_shards, DIM, ABOUT | more) as shard:
        for name, features in utterances.items():
            shard.append(name, features)


def test_the_published_format_is_written(tmp_path):
    first, second = random(3, DIM), random(2, DIM)
    write(tmp_path / "x", {"b.wav": first, "a.wav": second}, rank=1, num_shards=4)

    assert {path.name for path in (tmp_path / "x").iterdir()} == {"1_4.npy", "1_4.len", "1_4.json"}
    array = np.load(tmp_path / "x" / "1_4.npy")
    assert array.dtype == np.dtype("<f4") and array.flags.c_contiguous
    np.testing.assert_array_equal(array, np.concatenate([first, second]))
    assert (tmp_path / "x" / "1_4.len").read_bytes() == b"3\n2\n"
    assert json.loads((tmp_path / "x" / "1_4.json").read_text("utf-8")) == {
        **ABOUT, "dim": DIM, "dtype": "float32", "utterances": ["b.wav", "a.wav"],
    }  # fmt: skip


def test_the_values_end_with_the_file_and_can_be_mapped(tmp_path):
    features = random(3, DIM)
    write(tmp_path, {"a.wav": features})

    assert (tmp_path / "0_1.npy").read_bytes().endswith(features.tobytes())
    np.testing.assert_array_equal(np.load(tmp_path / "0_1.npy", mmap_mode="r"), features)


def test_the_header_has_room_for_many_rows(tmp_path):
    rows = np.arange(123_456, dtype=np.float32)[:, None]
    with write_shard(tmp_path, 0, 1, 1, ABOUT) as shard:
        shard.append("a.wav", rows[:5])
        shard.append("b.wav", rows[5:])

    np.testing.assert_array_equal(np.load(tmp_path / "0_1.npy"), rows)


@pytest.mark.parametrize(
    "features",
    [random(5, DIM).astype(np.float64), random(DIM, 5).T, random(10, DIM)[::2], random(5, DIM).astype(">f4")],
)
def test_any_float_layout_is_written_as_float32_rows(tmp_path, features):
    write(tmp_path, {"a.wav": features})

    array = np.load(tmp_path / "0_1.npy")
    assert array.dtype == np.dtype("<f4")
    np.testing.assert_array_equal(array, features.astype(np.float32))


def test_nothing_is_there_before_the_end(tmp_path):
    with write_shard(tmp_path, 0, 1, DIM, ABOUT) as shard:
        shard.append("a.wav", random(3, DIM))
        assert not [path for suffix in ("npy", "len", "json") for path in tmp_path.glob(f"*.{suffix}")]
        assert not is_finished(tmp_path, 0, 1)

    assert is_finished(tmp_path, 0, 1)


@pytest.mark.parametrize("missing", [".npy", ".len", ".json"])
def test_a_shard_without_one_of_its_files_is_not_finished(tmp_path, missing):
    write(tmp_path, {"a.wav": random(3, DIM)})
    assert not is_finished(tmp_path, 0, 2)
    shard_path(tmp_path, 0, 1, missing).unlink()

    assert not is_finished(tmp_path, 0, 1)


@pytest.mark.parametrize("shape", [(3, DIM + 1), (3, DIM - 1), (DIM,), (1, 3, DIM), (3, 0)])
def test_appending_another_shape_is_refused_and_leaves_nothing(tmp_path, shape):
    with refused("b.wav", shape, f"(T, {DIM})"):
        write(tmp_path, {"a.wav": random(3, DIM), "b.wav": np.zeros(shape, np.float32)})

    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_appending_a_value_that_is_not_finite_is_refused_and_leaves_nothing(tmp_path, value):
    features = random(5, DIM)
    features[2, 1] = features[4] = value

    with refused("b.wav", "frame 2", "NaN or infinity", "2 such frames"):
        write(tmp_path, {"a.wav": random(3, DIM), "b.wav": features})

    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:overflow")  # numpy's, of the value that is the test
def test_appending_a_value_beyond_float32_is_refused_and_leaves_nothing(tmp_path):
    features = random(5, DIM).astype(np.float64)
    features[2, 1] = 1e300

    with refused("a.wav", "frame 2"):
        write(tmp_path, {"a.wav": features})

    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("failure", [RuntimeError("out of memory"), KeyboardInterrupt(), OSError("sound lost")])
def test_a_failure_while_writing_leaves_nothing(tmp_path, failure):
    expected = RepCodecError if isinstance(failure, OSError) else type(failure)
    with pytest.raises(expected), write_shard(tmp_path, 0, 1, DIM, ABOUT) as shard:
        shard.append("a.wav", random(3, DIM))
        raise failure

    assert not list(tmp_path.iterdir())


def test_a_shard_that_is_there_is_not_replaced(tmp_path):
    write(tmp_path / "ours", {"a.wav": random(3, DIM)})
    (tmp_path / "published").mkdir()
    np.save(tmp_path / "published" / "0_1.npy", random(3, DIM))
    (tmp_path / "published" / "0_1.len").write_text("3\n")
    for folder in (tmp_path / "ours", tmp_path / "published"):
        before = content(folder)
        with refused(folder / "0_1.npy", "there already"):
            write(folder, {"a.wav": random(7, DIM)})
        assert content(folder) == before


def test_an_unwritable_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("in the way")
    folder = tmp_path / "file" / "train"

    with refused(folder / "0_1.npy", "could not be written"):
        write(folder, {"a.wav": random(3, DIM)})

    assert (tmp_path / "file").read_text() == "in the way"


def test_a_disk_full_of_features_is_refused_and_leaves_nothing(tiny_disk):
    with refused(tiny_disk / "0_1.npy", "No space left"):
        write(tiny_disk, {f"{i}.wav": random(1000, DIM) for i in range(6)})

    assert not list(tiny_disk.iterdir())


def test_a_disk_full_before_the_lengths_leaves_nothing(tiny_disk):
    with refused("No space left"):
        write(tiny_disk, {"a.wav": random(3, DIM)}, note="x" * 100_000)

    assert not is_finished(tiny_disk, 0, 1)
    assert not list(tiny_disk.iterdir())


# Types


def test_float16_halves_the_rows_and_rounds_them(tmp_path):
    features = random(5, DIM)
    with write_shard(tmp_path, 0, 1, DIM, ABOUT, "float16") as shard:
        shard.append("a.wav", features)

    array = np.load(tmp_path / "0_1.npy")
    assert array.dtype == np.dtype("<f2")
    np.testing.assert_array_equal(array, features.astype(np.float16))
    assert json.loads((tmp_path / "0_1.json").read_text())["dtype"] == "float16"
    batch, _ = FeatureShards(tmp_path).gather([0], [0], 5)
    assert batch.dtype == np.float32


def test_a_value_beyond_float16_is_refused_by_name(tmp_path):
    features = random(5, DIM)
    features[2, 1] = -70_000
    with (
        refused("b.wav", "70000", "float16", "--dtype float32"),
        write_shard(tmp_path, 0, 1, DIM, ABOUT, "float16") as s,
    ):
        s.append("b.wav", features)

    assert not list(tmp_path.iterdir())


# Resuming

BATCHES = [{"a.wav": random(3, DIM), "b.wav": random(1, DIM)}, {"c.wav": random(5, DIM)}, {"d.wav": random(2, DIM)}]


def write_batches(folder, stop_after=None, about=ABOUT, skip_bad=True, bad=()):
    """Write BATCHES, from where an earlier run stopped; return at which batch it began."""
    with write_shard(folder, 0, 1, DIM, about, skip_bad=skip_bad) as shard:
        began = shard.num_batches
        for number, batch in enumerate(BATCHES[began:], start=began):
            for name, features in batch.items():
                if name in bad:
                    shard.skip(name, "no\nsound")
                else:
                    shard.append(name, features)
            if number == stop_after:
                raise RuntimeError
            shard.commit()
    return began


@pytest.mark.parametrize(("stop_after", "resumed_at"), [(0, 0), (1, 1), (2, 2)])
def test_a_stopped_shard_goes_on_after_its_last_commit(tmp_path, stop_after, resumed_at):
    write_batches(tmp_path / "whole")
    with pytest.raises(RuntimeError):
        write_batches(tmp_path / "x", stop_after)
    assert not is_finished(tmp_path / "x", 0, 1)
    with refused("no {rank}_{n}.npy shard"):
        FeatureShards(tmp_path / "x")

    assert write_batches(tmp_path / "x") == resumed_at

    assert content(tmp_path / "x") == content(tmp_path / "whole")
    assert content(tmp_path / "x").keys() == {"0_1.npy", "0_1.len", "0_1.json"}


def test_torn_ends_of_a_killed_run_are_cut_off(tmp_path):
    write_batches(tmp_path / "whole")
    with pytest.raises(RuntimeError):
        write_batches(tmp_path / "x", 2)
    with open(tmp_path / "x" / ".0_1.npy.partial", "ab") as file:
        file.write(b"half a row")
    with open(tmp_path / "x" / ".0_1.journal", "a") as file:
        file.write('{"written": [["d.wav"')

    assert write_batches(tmp_path / "x") == 2
    assert content(tmp_path / "x") == content(tmp_path / "whole")


def test_rows_that_never_reached_the_disk_are_made_again(tmp_path):
    write_batches(tmp_path / "whole")
    with pytest.raises(RuntimeError):
        write_batches(tmp_path / "x", 2)
    partial = tmp_path / "x" / ".0_1.npy.partial"
    os.truncate(partial, partial.stat().st_size - 60)  # into the second batch

    assert write_batches(tmp_path / "x") == 1
    assert content(tmp_path / "x") == content(tmp_path / "whole")


def test_rows_that_the_disk_lost_are_made_again(tmp_path):
    write_batches(tmp_path / "whole")
    with pytest.raises(RuntimeError):
        write_batches(tmp_path / "x", 2)
    partial = tmp_path / "x" / ".0_1.npy.partial"
    content_before = partial.read_bytes()
    partial.write_bytes(content_before[:-40] + bytes(40))  # as long as before, but zeros in the second batch

    assert write_batches(tmp_path / "x") == 1
    assert content(tmp_path / "x") == content(tmp_path / "whole")


def test_an_unfinished_shard_of_another_kind_is_neither_taken_nor_lost(tmp_path):
    write_batches(tmp_path / "whole")
    with pytest.raises(RuntimeError):
        write_batches(tmp_path / "x", 1)
    before = content(tmp_path / "x")

    with refused("0_1.npy.partial", "layer differs", "former settings"):
        write_batches(tmp_path / "x", about=ABOUT | {"layer": 3})

    assert content(tmp_path / "x") == before
    assert write_batches(tmp_path / "x") == 1
    assert content(tmp_path / "x") == content(tmp_path / "whole")


def test_an_unfinished_shard_goes_on_where_sounds_and_model_have_moved(tmp_path):
    with pytest.raises(RuntimeError):
        write_batches(tmp_path / "x", 1, about=ABOUT | {"model": "/here"})

    assert write_batches(tmp_path / "x", about=ABOUT | {"model": "/there", "root": "/moved"}) == 1
    assert FeatureShards(tmp_path / "x").root == "/moved"


def test_a_resume_that_is_interrupted_loses_nothing(tmp_path, monkeypatch):
    write_batches(tmp_path / "whole")
    with pytest.raises(RuntimeError):
        write_batches(tmp_path / "x", 2)

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("repcodec.shard_writer.ShardWriter._checksum_of", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write_batches(tmp_path / "x")

    assert write_batches(tmp_path / "x") == 2
    assert content(tmp_path / "x") == content(tmp_path / "whole")


def test_skipped_utterances_are_listed_and_the_rest_agrees(tmp_path):
    write_batches(tmp_path / "whole", bad=["a.wav", "c.wav"])
    with pytest.raises(RuntimeError):
        write_batches(tmp_path / "x", 1, bad=["a.wav", "c.wav"])
    assert write_batches(tmp_path / "x", bad=["a.wav", "c.wav"]) == 1

    assert content(tmp_path / "x") == content(tmp_path / "whole")
    assert (tmp_path / "x" / "0_1.skipped.tsv").read_text() == "a.wav\tno sound\nc.wav\tno sound\n"
    shards = FeatureShards(tmp_path / "x")
    assert (shards.names, shards.lengths.tolist()) == (["b.wav", "d.wav"], [1, 2])


def test_a_strict_run_does_not_go_on_after_a_skipped_utterance_and_loses_nothing(tmp_path):
    with pytest.raises(RuntimeError):
        write_batches(tmp_path / "x", 2, bad=["c.wav"])

    with refused("left out 1 sounds", "--skip-bad"):
        write_batches(tmp_path / "x", skip_bad=False)

    assert write_batches(tmp_path / "x", bad=["c.wav"]) == 2
    assert FeatureShards(tmp_path / "x").names == ["a.wav", "b.wav", "d.wav"]


def test_a_shard_of_nothing_is_refused(tmp_path):
    with refused(tmp_path / "0_1.npy", "no utterance is left"), write_shard(tmp_path, 0, 1, DIM, ABOUT) as shard:
        shard.skip("a.wav", "no sound")

    assert not list(tmp_path.iterdir())


def _hold(folder, ready):
    with write_shard(folder, 0, 1, DIM, ABOUT) as shard:
        shard.append("a.wav", random(3, DIM))
        shard.commit()
        ready.set()
        signal.pause()


def test_a_second_writer_is_refused_with_the_first_ones_process_id_until_that_dies(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=_hold, args=(tmp_path, ready))
    process.start()
    assert ready.wait(60)
    with refused(f"process {process.pid} is making it"):
        write_batches(tmp_path)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert (tmp_path / ".0_1.npy.lock").exists()  # left behind, but held by nobody

    write_batches(tmp_path)

    assert is_finished(tmp_path, 0, 1)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    "line",
    [
        "[]",
        "{}",
        '{"written": 3, "skipped": [], "crc32": 0}',
        '{"written": [["a", -5]], "skipped": [], "crc32": 0}',
        '{"written": [["a", "b"]], "skipped": [], "crc32": 0}',
        '{"written": [["a"]], "skipped": [], "crc32": 0}',
        '{"written": [], "skipped": [3], "crc32": 0}',
        "[" * 100_000,
    ],
)
def test_a_journal_that_is_garbage_from_a_line_on_is_taken_up_to_it(tmp_path, line):
    with suppress(KeyboardInterrupt), write_shard(tmp_path, 0, 1, 2, {"root": "/audio", "frame_rate": 50}) as shard:
        shard.append("a.wav", np.ones((3, 2), np.float32))
        shard.commit()
        raise KeyboardInterrupt
    with open(tmp_path / ".0_1.journal", "a") as journal:
        journal.write(f"{line}\n")

    with write_shard(tmp_path, 0, 1, 2, {"root": "/audio", "frame_rate": 50}) as shard:
        assert shard.utterances == ["a.wav"]
    assert FeatureShards(tmp_path).lengths.tolist() == [3]
