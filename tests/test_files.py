import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import refused

from repcodec.errors import RepCodecError
from repcodec.files import atomic_write, locked


def test_text_is_written_as_utf8_with_plain_line_ends(tmp_path):
    with atomic_write(tmp_path / "a.txt") as file:
        file.write("é\nß\n")

    assert (tmp_path / "a.txt").read_bytes() == b"\xc3\xa9\n\xc3\x9f\n"


def test_bytes_can_be_sought_while_written(tmp_path):
    with atomic_write(tmp_path / "a.bin", "w+b") as file:
        file.write(b"....values")
        file.seek(0)
        file.write(b"head")

    assert (tmp_path / "a.bin").read_bytes() == b"headvalues"


def test_missing_folders_are_made(tmp_path):
    with atomic_write(tmp_path / "x" / "y" / "a.txt") as file:
        file.write("a")

    assert (tmp_path / "x" / "y" / "a.txt").read_text() == "a"


def test_a_string_path_is_taken(tmp_path):
    with atomic_write(str(tmp_path / "a.txt")) as file:
        file.write("a")

    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_nothing_but_the_file_is_left(tmp_path):
    with atomic_write(tmp_path / "a.txt") as file:
        file.write("a")

    assert list(tmp_path.iterdir()) == [tmp_path / "a.txt"]


def test_the_file_appears_only_at_the_end(tmp_path):
    with atomic_write(tmp_path / "a.txt") as file:
        file.write("a")
        file.flush()
        assert not (tmp_path / "a.txt").exists()
        # What is there meanwhile must match no reader's pattern.
        assert not list(tmp_path.glob("*.txt"))

    assert (tmp_path / "a.txt").exists()


def test_an_old_file_is_replaced_whole(tmp_path):
    (tmp_path / "a.txt").write_text("old and longer")
    with atomic_write(tmp_path / "a.txt") as file:
        file.write("new")

    assert (tmp_path / "a.txt").read_text() == "new"


@pytest.mark.parametrize("failure", [ValueError("broken"), KeyboardInterrupt(), RepCodecError("bad input")])
def test_a_failing_block_passes_on_its_own_error_and_leaves_nothing(tmp_path, failure):
    with pytest.raises(type(failure)) as caught, atomic_write(tmp_path / "a.txt") as file:
        file.write("half")
        raise failure

    assert caught.value is failure
    assert not list(tmp_path.iterdir())


def test_a_failing_block_leaves_the_old_file(tmp_path):
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(ValueError), atomic_write(tmp_path / "a.txt") as file:
        file.write("half")
        raise ValueError

    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.txt", "old")]


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("in the way")
    path = tmp_path / "file" / "a.txt"

    with pytest.raises(RepCodecError) as caught, atomic_write(path) as file:
        file.write("a")

    assert str(path) in str(caught.value)
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_folder_in_the_files_place_is_refused_and_left(tmp_path):
    (tmp_path / "a.txt").mkdir()

    with pytest.raises(RepCodecError, match="a directory"), atomic_write(tmp_path / "a.txt") as file:
        file.write("a")

    assert list(tmp_path.rglob("*")) == [tmp_path / "a.txt"]


@pytest.mark.parametrize("mode, piece", [("w", "x" * 1000), ("w+b", b"x" * 1000)])
def test_a_full_disk_is_refused_and_leaves_nothing(tiny_disk, mode, piece):
    path = tiny_disk / "a"

    with pytest.raises(RepCodecError) as caught, atomic_write(path, mode) as file:
        for _ in range(200):
            file.write(piece)

    assert str(path) in str(caught.value) and "No space left" in str(caught.value)
    assert not list(tiny_disk.iterdir())


def test_a_full_disk_leaves_the_old_file(tiny_disk):
    (tiny_disk / "a").write_text("old")

    with pytest.raises(RepCodecError), atomic_write(tiny_disk / "a") as file:
        file.write("x" * 200_000)

    assert [(path.name, path.read_text()) for path in tiny_disk.iterdir()] == [("a", "old")]


# Locks


def test_a_lock_names_its_process_and_is_gone_afterwards(tmp_path):
    with locked(tmp_path / "x" / "a.npy"):
        assert (tmp_path / "x" / ".a.npy.lock").read_text() == f"{os.getpid()}\n"

    assert not list((tmp_path / "x").iterdir())


def test_a_lock_whose_owner_lets_go_as_it_is_looked_at_is_taken(tmp_path, monkeypatch):
    lock = tmp_path / ".a.lock"
    looked, read = [], Path.read_text
    with open(lock, "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)

        def read_text(path, **options):
            if path == lock and not looked:
                looked.append(path)
                lock.unlink()
                held.close()
            return read(path, **options)

        monkeypatch.setattr(Path, "read_text", read_text)
        with locked(tmp_path / "a"):
            pass
    assert looked and not lock.exists()


def test_a_lock_is_gone_after_a_failure(tmp_path):
    with pytest.raises(RuntimeError), locked(tmp_path / "a.npy"):
        raise RuntimeError

    assert not list(tmp_path.iterdir())


def test_a_second_taker_is_refused_by_the_firsts_process_id_and_harms_nothing(tmp_path):
    with locked(tmp_path / "a.npy"):
        for _ in range(2):
            with pytest.raises(RepCodecError, match=f"process {os.getpid()} is making it"), locked(tmp_path / "a.npy"):
                pass
        assert (tmp_path / ".a.npy.lock").exists()
    with locked(tmp_path / "b.npy"), locked(tmp_path / "a.npy"):
        pass


def test_a_lock_that_a_killed_process_left_holds_nobody_up(tmp_path):
    (tmp_path / ".a.npy.lock").write_text("999999\n")

    with locked(tmp_path / "a.npy"):
        assert (tmp_path / ".a.npy.lock").read_text() == f"{os.getpid()}\n"


def test_an_unwritable_folder_cannot_be_locked(tmp_path):
    (tmp_path / "file").touch()

    with pytest.raises(RepCodecError, match="could not be written"), locked(tmp_path / "file" / "a.npy"):
        pass


def test_a_killed_process_whose_workers_still_end_holds_nobody_up(tmp_path):
    path = tmp_path / "made"
    code = (
        "import os, sys, time\nfrom repcodec.files import locked\n"
        "with locked(sys.argv[1]):\n"
        "    if os.fork() == 0: time.sleep(1.5); os._exit(0)\n"  # a worker has what its parent holds
        "    print('holds', flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"holds\n"
        with refused(path, f"process {process.pid} is making it"), locked(path):
            pass
        process.kill()
        process.wait()
        with locked(path):
            pass
    assert not list(tmp_path.iterdir())
