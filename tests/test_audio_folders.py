"""Finding sound files, and files that are not what they say."""

import os

import numpy as np
import pytest
import soundfile
from conftest import refused
from test_audio import noise

from repcodec.audio import (
    find_sound_files,
    num_samples_at_16khz,
    read_audio,
)

# Finding


def test_sound_files_are_found_in_any_depth_sorted_and_by_ending(tmp_path):
    for name in ["b.wav", "a/z.flac", "a/b/c.MP3", "a/notes.txt", "a/z.tsv", "wav"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.wav").mkdir()

    found = [path.relative_to(tmp_path).as_posix() for path in find_sound_files(tmp_path)]

    assert found == ["a/b/c.MP3", "a/z.flac", "b.wav"]


def test_links_are_followed_and_a_cycle_of_them_ends(tmp_path):
    for name in ["root/a/one.wav", "elsewhere/deep/two.flac", "elsewhere/three.m4a"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    root = tmp_path / "root"
    os.symlink(tmp_path / "elsewhere", root / "link")
    os.symlink(root, tmp_path / "elsewhere" / "deep" / "back")
    os.symlink(tmp_path / "elsewhere" / "three.m4a", root / "b.m4a")
    os.symlink(tmp_path / "nowhere.wav", root / "broken.wav")

    found = [path.relative_to(root).as_posix() for path in find_sound_files(root)]

    assert found == ["a/one.wav", "b.m4a", "broken.wav", "link/deep/two.flac", "link/three.m4a"]


def test_a_folder_that_is_linked_to_again_is_listed_once(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "one.wav").touch()
    os.symlink(tmp_path / "a", tmp_path / "b")

    assert find_sound_files(tmp_path) == [tmp_path / "a" / "one.wav"]


def test_a_folder_without_sound_is_refused(tmp_path):
    (tmp_path / "a.txt").touch()

    with refused(tmp_path, "no sound file", ".flac"):
        find_sound_files(str(tmp_path))


@pytest.mark.parametrize("name", ["missing", "a.wav"])
def test_a_root_that_is_no_folder_is_refused(tmp_path, name):
    (tmp_path / "a.wav").touch()

    with refused(tmp_path / name, "not a folder"):
        find_sound_files(tmp_path / name)


# Headers that do not know or do not tell the truth


def flac_that_claims(path, num_samples):
    """A real FLAC of 20,000 samples whose STREAMINFO gives another total: 36 bits after the sampling rate."""
    soundfile.write(path, noise(20_000), 16_000)
    data = bytearray(path.read_bytes())
    word = int.from_bytes(data[18:26], "big") >> 36 << 36 | num_samples
    data[18:26] = word.to_bytes(8, "big")
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("read", [read_audio, num_samples_at_16khz])
@pytest.mark.parametrize("claim", [0, 2**36 - 1])  # 0: unknown, as in a streamed FLAC
def test_a_flac_of_unknown_length_or_that_claims_years_is_refused(tmp_path, read, claim):
    path = flac_that_claims(tmp_path / "a.flac", claim)

    with refused(path, "its header says", "convert it"):
        read(path)


@pytest.mark.parametrize("ending", ["flac", "ogg", "mp3"])
def test_ten_minutes_of_silence_are_no_lie(tmp_path, ending):
    with soundfile.SoundFile(tmp_path / f"a.{ending}", "w", 16_000, 1) as file:
        for _ in range(600):
            file.write(np.zeros(16_000, np.float32))

    assert num_samples_at_16khz(tmp_path / f"a.{ending}") == 16_000 * 600


def test_a_folder_that_cannot_be_listed_is_refused(tmp_path, monkeypatch):
    soundfile.write(tmp_path / "a.wav", noise(10), 16_000)
    (tmp_path / "closed").mkdir()
    scandir = os.scandir

    def closed(path):
        if str(path).endswith("closed"):  # root may list everything
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    with refused(tmp_path / "closed", "cannot be listed"):
        find_sound_files(tmp_path)


@pytest.mark.parametrize("rate", [1, 999, 2**31 - 1])
def test_a_sampling_rate_that_no_recording_has_is_refused_before_it_is_converted(tmp_path, rate):
    path = tmp_path / "a.wav"
    soundfile.write(path, np.zeros(1000), 16_000)
    whole = path.read_bytes()
    path.write_bytes(whole[:24] + rate.to_bytes(4, "little") + whole[28:])

    for read in (read_audio, num_samples_at_16khz):
        with refused(path, f"{rate} samples a second", "header is wrong"):
            read(path)


def test_a_path_that_no_file_can_have_is_one_sentence(tmp_path):
    for read in (read_audio, num_samples_at_16khz):
        with refused("no such file"):
            read(f"{tmp_path}/a\0.wav")
