"""lhotse's CutSets and Shar archives: read right, in a reproducible random order, and without running commands."""

import gzip
import http.server
import json
import sys
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import refused

from repcodec.audio import read_audio
from repcodec.cuts import CutList, Shar, open_sounds, read_cut
from repcodec.manifest import Manifest


@pytest.fixture(scope="module")
def lhotse_files(tmp_path_factory):
    """Eleven sounds of two rates, mono and stereo; as a CutSet, and as Shar archives of three cuts."""
    from lhotse import CutSet, Recording

    folder = tmp_path_factory.mktemp("lhotse")
    rng = np.random.default_rng(0)
    for i in range(11):
        rate, channels = (16_000, 1) if i % 2 == 0 else (44_100, 2)
        soundfile.write(folder / f"{i:02d}.wav", rng.uniform(-0.5, 0.5, (rate // 10 * (i + 3), channels)), rate)
    cuts = CutSet.from_cuts(Recording.from_file(path).to_cut() for path in sorted(folder.glob("*.wav")))
    cuts.to_file(folder / "cuts.jsonl.gz")
    cuts.to_file(folder / "plain.jsonl")
    (folder / "shar").mkdir()
    cuts.to_shar(folder / "shar", fields={"recording": "wav"}, shard_size=3)
    return folder


@pytest.fixture
def served(lhotse_files):
    """The same files, from a web server on this machine."""
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(lhotse_files))
    handler.log_message = lambda *_: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def same_sounds(sounds, folder):
    assert list(sounds.paths) == [f"{i:02d}" for i in range(11)]
    for i in range(11):
        expected = read_audio(folder / f"{i:02d}.wav")
        found = sounds.waveform(i)
        assert found.dtype == np.float32
        assert len(found) == len(expected) == sounds.num_samples[i]
        np.testing.assert_allclose(found, expected, atol=2e-4)


@pytest.mark.parametrize("name", ["cuts.jsonl.gz", "plain.jsonl"])
def test_a_cutset_gives_the_sound_of_its_files(lhotse_files, name):
    same_sounds(open_sounds(str(lhotse_files / name)), lhotse_files)


def test_a_shar_gives_the_sound_of_its_files(lhotse_files):
    same_sounds(open_sounds(str(lhotse_files / "shar")).whole(), lhotse_files)


def test_a_cut_of_a_part_gives_that_part(lhotse_files, tmp_path):
    from lhotse import CutSet

    cut = next(iter(CutSet.from_jsonl_lazy(lhotse_files / "plain.jsonl"))).truncate(offset=0.05, duration=0.1)
    CutSet.from_cuts([cut]).to_file(tmp_path / "part.jsonl")
    found = open_sounds(str(tmp_path / "part.jsonl")).waveform(0)
    np.testing.assert_array_equal(found, read_audio(lhotse_files / "00.wav")[800:2400])


def test_a_remote_cutset_and_shar_are_those_on_the_disk(lhotse_files, served):
    assert open_sounds(f"{served}/cuts.jsonl.gz").paths == open_sounds(str(lhotse_files / "cuts.jsonl.gz")).paths
    remote = open_sounds(
        {"cuts": f"{served}/shar/cuts.{{000000..000003}}.jsonl.gz",
         "recording": f"{served}/shar/recording.{{000000..000003}}.tar"}
    )  # fmt: skip
    same_sounds(remote.whole(), lhotse_files)
    local = open_sounds(str(lhotse_files / "shar"))
    for (place, cut), (other_place, other), _ in zip(remote.stream(5), local.stream(5), range(15), strict=False):
        assert (place, cut.id) == (other_place, other.id)


def test_a_manifest_is_read_too(speech):
    assert isinstance(open_sounds(str(speech / "train.tsv")), Manifest)


def ids(shar, seed, num, **options):
    return [(place, cut.id) for (place, cut), _ in zip(shar.stream(seed, **options), range(num), strict=False)]


def test_the_stream_takes_every_cut_once_a_round_in_another_order(lhotse_files):
    shar = open_sounds(str(lhotse_files / "shar"))
    found = ids(shar, 0, 33)
    assert [place for place, _ in found] == list(range(33))
    rounds = [[name for _, name in found[first : first + 11]] for first in (0, 11, 22)]
    assert all(sorted(names) == [f"{i:02d}" for i in range(11)] for names in rounds)
    assert rounds[0] != rounds[1] != rounds[2]
    assert rounds[0] != sorted(rounds[0])
    assert ids(shar, 0, 33) == found
    assert ids(shar, 1, 33) != found


def test_an_id_that_is_there_twice_is_refused_where_statistics_are_taken(lhotse_files):
    shards = [str(lhotse_files / "shar" / name) for name in ("cuts.000000.jsonl.gz", "recording.000000.tar")]
    twice = Shar(shards[:1] * 2, shards[1:] * 2)
    with refused("two cuts have the id"):
        twice.sample(0, 10**6, lambda samples: samples)


@pytest.mark.parametrize("start", [1, 7, 11, 12, 25])
def test_the_stream_goes_on_from_any_place(lhotse_files, start):
    shar = open_sounds(str(lhotse_files / "shar"))
    assert ids(shar, 0, 8, start=start) == ids(shar, 0, start + 8)[start:]


def test_the_stream_gives_only_what_is_wanted(lhotse_files):
    shar = open_sounds(str(lhotse_files / "shar"))
    assert ids(shar, 0, 9, wanted=lambda place: place % 3 == 1) == ids(shar, 0, 27)[1::3]


def test_a_sample_is_the_beginning_of_the_stream_or_all(lhotse_files):
    shar = open_sounds(str(lhotse_files / "shar"))
    some = shar.sample(0, 100, lambda samples: samples // 320)
    assert [name for _, name in ids(shar, 0, len(some))] == some.paths
    assert 100 <= sum(samples // 320 for samples in some.num_samples) < 100 + 65
    assert sorted(shar.sample(0, 10**6, lambda samples: samples).paths) == [f"{i:02d}" for i in range(11)]


# What is refused


def lines(lhotse_files):
    return [json.loads(line) for line in (lhotse_files / "plain.jsonl").read_text().splitlines()]


def write_lines(path, entries):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return str(path)


def test_a_command_is_refused_and_not_run(lhotse_files, tmp_path):
    cuts = lines(lhotse_files)[:1]
    cuts[0]["recording"]["sources"][0] |= {"type": "command", "source": f"touch {tmp_path}/run"}
    with refused("evil.jsonl", "cut '00'", "command"):
        open_sounds(write_lines(tmp_path / "evil.jsonl", cuts)).waveform(0)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["url", "file"])
def test_a_pipe_in_a_cut_is_refused_and_not_run(lhotse_files, tmp_path, kind):
    cuts = lines(lhotse_files)[:1]
    cuts[0]["recording"]["sources"][0] |= {"type": kind, "source": f"pipe:touch {tmp_path}/run"}
    with refused("pipe:touch", "commands are not run"):
        open_sounds(write_lines(tmp_path / "evil.jsonl", cuts)).waveform(0)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["x.opus", "x.sph", "x.wav", "x.mp4"])
def test_a_file_name_with_a_command_is_only_a_name(lhotse_files, tmp_path, name):
    cuts = lines(lhotse_files)[:1]
    cuts[0]["recording"]["sources"][0]["source"] = f"$(touch {tmp_path}/run) ; touch {tmp_path}/run ; {name}"
    with refused("evil.jsonl", "cut '00'", "cannot be read"):
        open_sounds(write_lines(tmp_path / "evil.jsonl", cuts)).waveform(0)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("field", ["cuts", "recording"])
def test_a_pipe_as_a_shard_is_refused_and_not_run(lhotse_files, tmp_path, field):
    shards = {
        "cuts": [str(lhotse_files / "shar" / "cuts.000000.jsonl.gz")],
        "recording": [str(lhotse_files / "shar" / "recording.000000.tar")],
    }
    shards[field] = [f"pipe:touch {tmp_path}/run"]
    with refused("pipe:touch", "commands are not run"):
        open_sounds(shards).whole()
    assert not (tmp_path / "run").exists()


def test_a_pipe_as_a_cutset_is_refused_and_not_run(tmp_path):
    with refused("commands are not run"):
        open_sounds(f"pipe:touch {tmp_path}/run.jsonl")
    assert not list(tmp_path.iterdir())


def test_a_command_hidden_in_a_transform_is_refused_and_not_run(lhotse_files, tmp_path):
    cuts = lines(lhotse_files)[:1]
    hidden = lines(lhotse_files)[0]["recording"]
    hidden["sources"][0] |= {"type": "command", "source": f"touch {tmp_path}/run; cat {lhotse_files}/00.wav"}
    transform = {"name": "ReverbWithImpulseResponse", "kwargs": {"rir": hidden, "normalize_output": True}}
    cuts[0]["recording"]["transforms"] = [transform]
    with refused("evil.jsonl", "'00'", "no cut of one plain recording"):
        open_sounds(write_lines(tmp_path / "evil.jsonl", cuts)).waveform(0)
    assert not (tmp_path / "run").exists()


def test_a_command_hidden_behind_a_mixed_cuts_custom_field_is_refused_and_not_run(lhotse_files, tmp_path):
    from lhotse import CutSet

    one, other = list(CutSet.from_jsonl_lazy(lhotse_files / "plain.jsonl"))[:3:2]
    CutSet.from_cuts([one.mix(other).with_id("both")]).to_file(tmp_path / "mixed.jsonl")
    mixed = json.loads((tmp_path / "mixed.jsonl").read_text())
    mixed["tracks"][0]["cut"]["custom"] = {"recording": "1"}
    evil = {"type": "command", "source": f"touch {tmp_path}/run; cat {lhotse_files}/02.wav"}
    mixed["tracks"][1]["cut"]["recording"]["sources"][0] |= evil
    with refused("evil.jsonl", "'both'", "no cut of one plain recording"):
        open_sounds(write_lines(tmp_path / "evil.jsonl", [mixed])).waveform(0)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("url", ["hdfs://host/a.wav", "ssh://host/a.wav", "file:///etc/passwd", "ftp://host/a.wav"])
def test_a_url_that_needs_another_program_or_ones_own_keys_is_refused(lhotse_files, tmp_path, url):
    cuts = lines(lhotse_files)[:1]
    cuts[0]["recording"]["sources"][0] |= {"type": "url", "source": url}
    with refused(url, "http, https, s3"):
        open_sounds(write_lines(tmp_path / "evil.jsonl", cuts))


def test_a_mixed_cut_is_refused_by_name(lhotse_files, tmp_path):
    from lhotse import CutSet

    one, other = list(CutSet.from_jsonl_lazy(lhotse_files / "plain.jsonl"))[:3:2]
    CutSet.from_cuts([one.mix(other).with_id("both")]).to_file(tmp_path / "mixed.jsonl")
    with refused("mixed.jsonl", "'both'", "no cut of one plain recording"):
        open_sounds(str(tmp_path / "mixed.jsonl"))


def test_two_cuts_of_one_id_are_refused(lhotse_files, tmp_path):
    with refused("two.jsonl", "two cuts have the id '00'"):
        open_sounds(write_lines(tmp_path / "two.jsonl", [lines(lhotse_files)[0]] * 2))


def test_a_missing_sound_and_another_length_name_the_cut(lhotse_files, tmp_path):
    cuts = lines(lhotse_files)[:2]
    cuts[0]["recording"]["sources"][0]["source"] = str(tmp_path / "nowhere.wav")
    cuts[1] = lines(lhotse_files)[2] | {"id": "long", "duration": 5.0}
    cuts[1]["recording"] |= {"duration": 5.0, "num_samples": 80_000}
    sounds = open_sounds(write_lines(tmp_path / "bad.jsonl", cuts))
    with refused("bad.jsonl", "cut '00'", "cannot be read"):
        sounds.waveform(0)
    with refused("bad.jsonl", "cut 'long'"):
        sounds.waveform(1)


@pytest.mark.parametrize("content", ["", "{\n", "[1, 2]\n", '{"id": "a"}\n', "\x00\x01\n", '{"type": "Nonsense"}\n'])
def test_what_is_no_cutset_is_one_sentence(tmp_path, content):
    (tmp_path / "x.jsonl").write_text(content)
    with refused(tmp_path / "x.jsonl"):
        open_sounds(str(tmp_path / "x.jsonl"))


def test_a_gzip_that_is_none_is_one_sentence(tmp_path):
    (tmp_path / "x.jsonl.gz").write_text("{}")
    with refused(tmp_path / "x.jsonl.gz", "not a readable list of cuts"):
        open_sounds(str(tmp_path / "x.jsonl.gz"))


def test_a_shard_that_is_cut_off_is_refused(lhotse_files, tmp_path):
    cuts, recording = (lhotse_files / "shar" / name for name in ("cuts.000000.jsonl.gz", "recording.000000.tar"))
    content = recording.read_bytes()
    for end in (len(content) // 2, 1024, 0):
        (tmp_path / "recording.tar").write_bytes(content[:end])
        with refused(tmp_path / "recording.tar"):
            Shar([str(cuts)], [str(tmp_path / "recording.tar")]).whole()
    fewer = tmp_path / "cuts.jsonl.gz"
    more = gzip.decompress(cuts.read_bytes()).decode()
    fewer.write_bytes(gzip.compress((more + more.replace('"id": "0', '"id": "9')).encode()))
    with refused(recording, "sound of 3 cuts"):
        Shar([str(fewer)], [str(recording)]).whole()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("sound.mp3", "not a list of sounds"),
        (123, "123: not a list of sounds"),
        ({"cuts": None, "recording": None}, "needs the fields cuts and recording"),
        ({"cuts": ["a"]}, "needs the fields cuts and recording"),
        ({"cuts": ["a"], "recording": ["b", "c"]}, "1 files of cuts and 2 of recordings"),
        ({"cuts": "a.{0..}.jsonl", "recording": "b"}, "expected a range of numbers"),
        ("nowhere.jsonl", "nowhere.jsonl: not a readable list of cuts"),
        ("http://127.0.0.1:9/cuts.jsonl.gz", "http://127.0.0.1:9/cuts.jsonl.gz: not a readable list of cuts"),
    ],
)
def test_what_is_no_list_of_sounds_is_one_sentence(source, message):
    with refused(message):
        open_sounds(source)


def test_a_folder_without_archives_is_refused(tmp_path):
    with refused("0 files of cuts"):
        open_sounds(str(tmp_path))


def test_without_lhotse_the_extra_is_named(lhotse_files, monkeypatch):
    monkeypatch.setitem(sys.modules, "lhotse", None)
    with refused("pip install 'repcodec[audio]'"):
        open_sounds(str(lhotse_files / "cuts.jsonl.gz"))


def test_an_unreadable_cut_of_a_shar_is_named(lhotse_files):
    cut = next(open_sounds(str(lhotse_files / "shar")).cuts(0))
    cut.recording.sources[0].source = b"no sound"
    with refused("the shar, cut '00'", "cannot be read"):
        read_cut(cut, "the shar")
    assert isinstance(CutList([cut], "the shar"), CutList)


def test_a_folder_is_listed_in_order(lhotse_files):
    shar = open_sounds(str(lhotse_files / "shar"))
    assert [cut.id for cut in shar.cuts(2)] == ["06", "07", "08"]
    assert shar.source == str(Path(lhotse_files / "shar"))
