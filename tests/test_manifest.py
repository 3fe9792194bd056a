import hashlib
import math
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import refused

from repcodec.manifest import Manifest, list_sounds, utterance_id


def manifest(num_utterances, root="/audio"):
    return Manifest(
        Path(root), [f"spk/{i}.flac" for i in range(num_utterances)], list(range(100, 100 + num_utterances))
    )


@pytest.mark.parametrize(
    "relative_path, expected",
    [
        ("a.wav", "a"),
        ("84/121123/84-121123-0000.flac", "84/121123/84-121123-0000"),
        ("spk.1/a.b.wav", "spk.1/a.b"),
        ("spk.1/a", "spk.1/a"),
        ("é ß.wav", "é ß"),
    ],
)
def test_an_utterance_id_is_the_path_without_its_ending(relative_path, expected):
    assert utterance_id(relative_path) == expected


def test_the_published_format_is_written_byte_for_byte(tmp_path):
    Manifest(Path("/audio"), ["a/é.flac", "b c.wav"], [16000, 1]).write(tmp_path / "x" / "train.tsv")

    assert (tmp_path / "x" / "train.tsv").read_bytes() == b"/audio\na/\xc3\xa9.flac\t16000\nb c.wav\t1\n"


def test_reading_gives_what_was_written(tmp_path):
    written = manifest(5, "/au dio/é")
    written.write(tmp_path / "train.tsv")

    assert Manifest.read(str(tmp_path / "train.tsv")) == written
    assert len(written) == 5


@pytest.mark.parametrize(
    "content", [b"/audio\na.wav\t16000", b"/audio\r\na.wav\t16000\r\n", b"/audio\na.wav\t16000\n\n"]
)
def test_other_line_ends_are_read(tmp_path, content):
    (tmp_path / "train.tsv").write_bytes(content)

    assert Manifest.read(tmp_path / "train.tsv") == Manifest(Path("/audio"), ["a.wav"], [16000])


@pytest.mark.parametrize(
    "line", ["b.wav", "b.wav 16000", "b.wav\t", "b.wav\t1.5", "b.wav\t-3", "b.wav\tx", "\t16000", "", "b.wav\t1\t2"]
)
def test_a_line_that_is_not_path_tab_samples_is_refused_by_number(tmp_path, line):
    (tmp_path / "train.tsv").write_text(f"/audio\na.wav\t16000\n{line}\nc.wav\t16000\n")

    with refused(tmp_path / "train.tsv", "line 3", repr(line), "expected relative_path<TAB>number_of_samples"):
        Manifest.read(tmp_path / "train.tsv")


def test_two_paths_with_the_same_id_are_refused_by_both_names_and_the_line(tmp_path):
    (tmp_path / "train.tsv").write_text("/audio\nx/a.wav\t16000\nx/b.wav\t16000\nx/a.flac\t16000\n")

    with refused(tmp_path / "train.tsv", "line 4", "x/a.flac", "x/a.wav"):
        Manifest.read(tmp_path / "train.tsv")


def test_the_same_path_twice_is_refused(tmp_path):
    (tmp_path / "train.tsv").write_text("/audio\na.wav\t16000\na.wav\t16000\n")

    with refused(tmp_path / "train.tsv", "line 3", "a.wav"):
        Manifest.read(tmp_path / "train.tsv")


def test_paths_that_only_look_alike_are_not_the_same_id(tmp_path):
    whole = Manifest(Path("/audio"), ["a.b.wav", "a.wav", "x/a.wav", "x.a/a.wav", "A.wav"], [1, 2, 3, 4, 5])
    whole.write(tmp_path / "train.tsv")

    assert Manifest.read(tmp_path / "train.tsv") == whole


def test_bad_lines_can_be_skipped_and_are_noted(tmp_path):
    lines = ["/audio", "é a.wav\t16000", "no samples", "tab\tin.wav\t16000", "b.wav\t3", "b.flac\t3", "", "c.wav\t5"]
    (tmp_path / "train.tsv").write_text("\n".join(lines), encoding="utf-8")

    read = Manifest.read(tmp_path / "train.tsv", skip_bad=True)

    assert read == Manifest(Path("/audio"), ["é a.wav", "b.wav", "c.wav"], [16000, 3, 5])
    assert list(read.skipped) == ["line 3", "line 4", "line 6", "line 7"]
    for line, fragments in {
        "line 3": ["'no samples'"],
        "line 4": [repr("tab\tin.wav\t16000"), "a path cannot hold a tab"],
        "line 6": ["b.flac", "b.wav"],
        "line 7": ["''"],
    }.items():
        assert all(fragment in read.skipped[line] for fragment in fragments)


def test_a_manifest_of_bad_lines_only_is_refused(tmp_path):
    (tmp_path / "train.tsv").write_text("/audio\nno samples\n")

    with refused(tmp_path / "train.tsv", "no utterance"):
        Manifest.read(tmp_path / "train.tsv", skip_bad=True)


def test_what_was_skipped_goes_to_the_first_shard(tmp_path):
    (tmp_path / "train.tsv").write_text("/audio\na.wav\t1\nb.wav\t1\nno samples\n")
    read = Manifest.read(tmp_path / "train.tsv", skip_bad=True)

    assert [list(read.shard(rank, 2).skipped) for rank in range(2)] == [["line 4"], []]


@pytest.mark.parametrize("content", ["", "\n", "/audio", "/audio\n", "/audio\n\n"])
def test_a_manifest_without_utterances_is_refused(tmp_path, content):
    (tmp_path / "train.tsv").write_text(content)

    with refused(tmp_path / "train.tsv", "no utterance"):
        Manifest.read(tmp_path / "train.tsv")


@pytest.mark.parametrize("content", [None, b"/audio\n\xff\xfe.wav\t16000\n"])
def test_a_missing_file_and_one_that_is_not_utf8_are_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "train.tsv").write_bytes(content)

    with refused(tmp_path / "train.tsv", "not a readable manifest"):
        Manifest.read(tmp_path / "train.tsv")


def test_a_folder_is_refused(tmp_path):
    with refused(tmp_path, "not a readable manifest"):
        Manifest.read(tmp_path)


@pytest.mark.parametrize("name", ["a\tb.wav", "a\nb.wav", "a\rb.wav"])
def test_a_path_the_format_cannot_hold_is_refused(tmp_path, name):
    with refused(repr(name)):
        Manifest(Path("/audio"), ["a.wav", name], [1, 2]).write(tmp_path / "train.tsv")

    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("root", ["/audio\n2", "/audio\r2"])
def test_a_root_the_format_cannot_hold_is_refused(tmp_path, root):
    with refused(repr(root)):
        Manifest(Path(root), ["a.wav"], [1]).write(tmp_path / "train.tsv")

    assert not list(tmp_path.iterdir())


def test_a_file_name_that_is_not_utf8_is_refused(tmp_path):
    name = os.fsdecode(b"caf\xe9.wav")

    with refused("caf"):
        Manifest(Path("/audio"), [name], [1]).write(tmp_path / "train.tsv")

    assert not list(tmp_path.iterdir())


def test_an_unwritable_folder_is_refused(tmp_path):
    (tmp_path / "file").touch()

    with refused(tmp_path / "file" / "train.tsv", "could not be written"):
        manifest(1).write(tmp_path / "file" / "train.tsv")


def test_the_hash_is_of_the_utterance_lines():
    lines = b"spk/0.flac\t100\nspk/1.flac\t101\n"

    assert manifest(2).sha256() == hashlib.sha256(lines).hexdigest()


def test_the_hash_ignores_the_root_and_nothing_else():
    base = Manifest(Path("/audio"), ["a.wav", "b.wav"], [1, 2])

    assert Manifest(Path("/moved"), ["a.wav", "b.wav"], [1, 2]).sha256() == base.sha256()
    others = [(["b.wav", "a.wav"], [1, 2]), (["a.wav", "b.wav"], [1, 3]), (["a.wav"], [1])]
    for names, samples in others:
        assert Manifest(Path("/audio"), names, samples).sha256() != base.sha256()


def half_to_even(x):
    """Rounding spelled out: to the nearest, and to the even one where two are as near."""
    below = math.floor(x)
    if x - below == 0.5:
        return below + below % 2
    return below + (x - below > 0.5)


@pytest.mark.parametrize("num_shards", [*range(1, 20), 29, 32, 64, 97])
def test_shards_hold_what_the_published_rule_says(num_shards):
    for num_utterances in [*range(1, 75), 2703, 28539]:
        whole = manifest(num_utterances)
        for rank in range(num_shards):
            start = half_to_even(num_utterances / num_shards * rank)
            stop = half_to_even(num_utterances / num_shards * (rank + 1))
            if start == stop:
                with refused(f"shard {rank} of {num_shards} is empty", f"{num_utterances} utterances"):
                    whole.shard(rank, num_shards)
            else:
                expected = Manifest(whole.root, whole.paths[start:stop], whole.num_samples[start:stop])
                assert whole.shard(rank, num_shards) == expected


@pytest.mark.parametrize("num_utterances, sizes", [(5, [2, 3]), (7, [4, 3]), (9, [4, 5]), (10, [2, 3, 3, 2])])
def test_halves_go_to_the_even_number(num_utterances, sizes):
    shards = [manifest(num_utterances).shard(rank, len(sizes)) for rank in range(len(sizes))]

    assert [len(shard) for shard in shards] == sizes


@pytest.mark.parametrize("num_utterances, num_shards", [(5, 2), (12, 12), (100, 7), (2703, 13)])
def test_all_shards_together_are_the_manifest_in_order(num_utterances, num_shards):
    whole = manifest(num_utterances)
    shards = [whole.shard(rank, num_shards) for rank in range(num_shards)]

    assert [name for shard in shards for name in shard.paths] == whole.paths
    assert [samples for shard in shards for samples in shard.num_samples] == whole.num_samples


@pytest.mark.parametrize("rank, num_shards", [(-1, 2), (2, 2), (5, 2), (0, -1), (0, 0)])
def test_a_shard_that_is_not_among_them_is_refused(rank, num_shards):
    with refused(f"shard {rank} of {num_shards}"):
        manifest(8).shard(rank, num_shards)


def test_listed_files_that_cannot_be_read_are_left_out_when_asked(tmp_path):
    soundfile.write(tmp_path / "good.wav", np.zeros(1600), 16_000)
    (tmp_path / "bad.wav").write_bytes(b"no sound")
    paths = [tmp_path / "bad.wav", tmp_path / "good.wav"]
    with refused(tmp_path / "bad.wav"):
        list_sounds(paths)
    manifest = list_sounds(paths, skip_bad=True)
    assert manifest.paths == ["good.wav"] and list(manifest.skipped) == ["bad.wav"]
    with refused(tmp_path, "none of the 1 sound files can be read"):
        list_sounds(paths[:1], skip_bad=True)
    with refused(tmp_path / "good.wav", "has the id of another one"):
        list_sounds([tmp_path / "good.wav"] * 2)
    (tmp_path / "good.mp3").write_bytes(b"no sound")
    found = list_sounds([tmp_path / "good.mp3", tmp_path / "good.wav", tmp_path / "good.wav"], skip_bad=True)
    assert found.paths == ["good.wav"], "one that cannot be read takes no id"
