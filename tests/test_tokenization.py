import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import DIM, refused, write_split

from repcodec.codec import RepCodec
from repcodec.kmeans import KMeansTokenizer
from repcodec.quantizers import EMAQuantizer
from repcodec.shards import FeatureShards
from repcodec.tokenization import FeatureSource, check_fits, describe, encode_shards, label, write_tokens
from repcodec.tokens import LineWriter, is_finished, read_about, read_tokens

LENGTHS = [9, 1, 0, 14, 6, 30, 2]


@pytest.fixture
def shards(tmp_path):
    write_split(tmp_path / "test", LENGTHS, num_shards=2)
    return FeatureShards(tmp_path / "test")


@pytest.fixture
def codec(codec):
    return codec.float().eval()


def run(tokenizer, shards, path, **options):
    return write_tokens(tokenizer, FeatureSource(shards), describe(tokenizer, "hash"), path, **options)


def test_tokens_file_holds_each_utterances_codes_in_order(tmp_path, shards, codec):
    assert run(codec, shards, tmp_path / "out.tokens")
    assert (tmp_path / "out.tokens").read_text().startswith("/audio\nspk/utt0.wav\t")
    found = list(read_tokens(tmp_path / "out.tokens"))
    assert [tokens.name for tokens in found] == [f"spk/utt{i}.wav" for i in range(len(LENGTHS))]
    for i, tokens in enumerate(found):
        alone = codec.encode(torch.from_numpy(np.array(shards.features(i)))[None])[0]
        assert tokens.codes.tolist() == alone.tolist()
    assert len({code for tokens in found for code in tokens.codes[0].tolist()}) > 5
    assert read_about(tmp_path / "out.tokens")["tokenizer"] == "RepCodec 16"


def test_json_lines_hold_several_codebooks_and_frames_and_seconds(tmp_path, shards):
    torch.manual_seed(0)
    codec = RepCodec(DIM, codebook_size=16, codebook_num=3, enc_strides=(2, 1), dec_strides=(1, 2)).eval()
    assert run(codec, shards, tmp_path / "out.jsonl", kind="jsonl")
    for i, tokens in enumerate(read_tokens(tmp_path / "out.jsonl")):
        assert (tokens.num_frames, tokens.duration) == (LENGTHS[i], LENGTHS[i] / 50)
        alone = codec.encode(torch.from_numpy(np.array(shards.features(i)))[None])[0]
        assert tokens.codes.tolist() == alone.tolist()


@pytest.mark.parametrize("kind", ["tokens", "jsonl"])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_parts_made_in_any_order_join_to_the_same_bytes(tmp_path, shards, codec, kind, order):
    run(codec, shards, tmp_path / "whole", kind=kind, deduplicate=True)
    for rank in order:
        joined = run(codec, shards, tmp_path / "out", kind=kind, deduplicate=True, shard=(rank, 3))
        assert joined == (rank == order[-1])
        assert (tmp_path / "out").exists() == joined
    assert (tmp_path / "out").read_bytes() == (tmp_path / "whole").read_bytes()
    assert not list(tmp_path.glob("out.*_*"))
    assert run(codec, shards, tmp_path / "out", kind=kind, deduplicate=True, shard=(1, 3)), "a task sent again"
    assert not list(tmp_path.glob("out.*_*"))


def test_parts_of_another_codec_are_not_joined(tmp_path, shards, codec):
    run(codec, shards, tmp_path / "out", shard=(0, 2))
    write_tokens(codec, FeatureSource(shards), describe(codec, "another"), tmp_path / "out", shard=(1, 2))
    assert not (tmp_path / "out").exists()
    run(codec, shards, tmp_path / "out", shard=(1, 2))
    assert (tmp_path / "out").exists()


def test_a_finished_file_is_left_as_it_is_and_one_of_something_else_replaced(tmp_path, shards, codec):
    path = tmp_path / "out.tokens"
    run(codec, shards, path)
    before = path.stat().st_mtime_ns
    run(codec, shards, path)
    assert path.stat().st_mtime_ns == before
    run(codec, shards, path, deduplicate=True)
    assert ":" in path.read_text()
    assert is_finished(path, {**read_about(path), "bytes": 1} | {"deduplicated": False}) is False


def test_features_that_changed_are_tokenized_again(tmp_path, shards, codec):
    run(codec, shards, tmp_path / "out")
    before = (tmp_path / "out").read_text()
    rows = np.load(tmp_path / "test" / "0_2.npy", mmap_mode="r+")
    rows[:] += 5
    rows.flush()
    os.utime(tmp_path / "test" / "0_2.npy", ns=(1, 1))
    run(codec, FeatureShards(tmp_path / "test"), tmp_path / "out")
    assert (tmp_path / "out").read_text() != before


KILLED = """
import sys, time, torch
from repcodec.codec import RepCodec
from repcodec.shards import FeatureShards
from repcodec import packing, tokenization
from repcodec.tokens import LineWriter
packing.PACK = 12
torch.set_num_threads(1)
codec = RepCodec(8, codebook_size=16).float().eval()
wait, write = float(sys.argv[3]), LineWriter.write
LineWriter.write = lambda self, line: (write(self, line), print(flush=True), time.sleep(wait))
codec.load_state_dict(torch.load(sys.argv[4], weights_only=True))
source = tokenization.FeatureSource(FeatureShards(sys.argv[1]))
tokenization.write_tokens(codec, source, tokenization.describe(codec, "hash"), sys.argv[2])
"""


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(codec, tmp_path, monkeypatch):
    write_split(tmp_path / "test", [20, 7, 9, 30, 2, 11, 8], num_shards=2)
    monkeypatch.setattr("repcodec.packing.PACK", 12)
    run(codec, FeatureShards(tmp_path / "test"), tmp_path / "whole")
    torch.save(codec.state_dict(), tmp_path / "weights")
    command = [sys.executable, "-c", KILLED, str(tmp_path / "test"), str(tmp_path / "out"), "5", tmp_path / "weights"]
    for lines in (2, 1):
        running = subprocess.Popen(command, stdout=subprocess.PIPE)
        for _ in range(lines):
            running.stdout.readline()
        running.send_signal(signal.SIGKILL)
        running.wait()
        running.stdout.close()
        assert not (tmp_path / "out").exists()
    assert len((tmp_path / ".out.partial").read_text().splitlines()) == 1 + 3
    written, write = [], LineWriter.write
    monkeypatch.setattr(LineWriter, "write", lambda self, line: (written.append(line), write(self, line)))
    run(codec, FeatureShards(tmp_path / "test"), tmp_path / "out")
    assert len(written) == 4, "three of seven were there"
    assert (tmp_path / "out").read_bytes() == (tmp_path / "whole").read_bytes()


def test_labels_tell_kinds_and_sizes_apart():
    assert label(KMeansTokenizer(torch.zeros(7, 3))) == "k-means 7"
    assert label(RepCodec(4, quantizer=EMAQuantizer(4, 16, 2))) == "RepCodec 2 x 16"


def test_strided_codec_gives_fewer_codes(shards):
    codec = RepCodec(DIM, enc_strides=(2, 1), dec_strides=(1, 2), codebook_size=16).eval()
    counts = [codes.shape[1] for _, codes in encode_shards(codec, shards, "")]
    assert counts == [5, 1, 0, 7, 3, 15, 1]


def test_bad_input_is_one_sentence_and_writes_nothing(tmp_path, shards, codec):
    several = RepCodec(DIM, codebook_size=4, codebook_num=2).eval()
    with refused("2 codebooks", ".jsonl"):
        run(several, shards, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))
    with refused("shard 0 of 20 is empty"):
        run(codec, shards, tmp_path / "out", shard=(0, 20))
    rows = np.load(tmp_path / "test" / "1_2.npy", mmap_mode="r+")
    rows[5, 1] = np.nan
    rows.flush()
    with refused("1_2.npy, spk/utt4.wav: frame 5 holds NaN"):
        run(codec, shards, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_features_cut_off_after_they_were_opened_are_one_sentence(tmp_path, shards, codec):
    path = tmp_path / "test" / "1_2.npy"
    os.truncate(path, path.stat().st_size - 100)
    with refused(path, "cut off"):
        run(codec, shards, tmp_path / "out")


def test_features_a_codec_was_not_trained_on_are_refused(tmp_path, codec):
    codec.about = {"encoder": "hubert_base", "layer": 6}
    write_split(tmp_path / "test", [9], encoder="hubert_base", layer=9)
    shards = FeatureShards(tmp_path / "test")
    with refused("features have width 8, but six takes 6"):
        check_fits(RepCodec(6, codebook_size=4), "six", shards)
    with refused("features of layer 9, expected 6"):
        check_fits(codec, "codec", shards)


def test_long_utterance_takes_bounded_memory(tmp_path):
    """Half an hour at width 64, in a process that may use little more than it needs before."""
    write_split(tmp_path / "short", [100], dim=64)
    write_split(tmp_path / "long", [90_000], dim=64)
    code = """
import resource, sys, torch
from repcodec.codec import RepCodec
from repcodec.shards import FeatureShards
from repcodec.tokenization import FeatureSource, describe, write_tokens
torch.set_num_threads(1)
codec = RepCodec(64, codebook_size=16).eval()
peaks = []
for name in ("short", "long"):
    source = FeatureSource(FeatureShards(f"{sys.argv[1]}/{name}"))
    write_tokens(codec, source, describe(codec, ""), f"{sys.argv[1]}/{name}.tokens")
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
print(peaks[1] - peaks[0])
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path], check=True, capture_output=True, text=True)
    assert int(done.stdout) < 20_000, "KiB; the features alone have 22,500"
    (tokens,) = read_tokens(tmp_path / "long.tokens")
    assert tokens.codes.shape == (1, 90_000)


def test_description_beside_the_file_says_what_made_it(tmp_path, shards, codec):
    codec.about = {"frame_rate": 50, "encoder": "hubert_base", "layer": 9}
    run(codec, shards, tmp_path / "out")
    about = json.loads((tmp_path / "out.json").read_text())
    assert about["codes_per_second"] == 50 and about["codebook_size"] == 16 and about["encoder"] == "hubert_base"
    assert about["bytes"] == (tmp_path / "out").stat().st_size


def test_parts_that_were_left_behind_go_when_the_file_is_whole(tmp_path, shards, codec):
    run(codec, shards, tmp_path / "out", shard=(0, 2))
    run(codec, shards, tmp_path / "out", shard=(1, 3))
    assert len(list(tmp_path.glob("out.*"))) == 4
    (tmp_path / "out.1_2.tokens").touch()  # somebody's own
    run(codec, shards, tmp_path / "out")
    run(codec, shards, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.glob("out*")) == ["out", "out.1_2.tokens", "out.json"]


def test_a_folder_or_a_name_twice_is_told_before_anything_is_computed(tmp_path, shards, codec):
    with refused("is a folder"):
        run(codec, shards, tmp_path)
    about = json.loads((tmp_path / "test" / "0_2.json").read_text())
    about["utterances"][1] = about["utterances"][0]
    (tmp_path / "test" / "0_2.json").write_text(json.dumps(about))
    with refused("'spk/utt0.wav' stands twice"):
        run(codec, FeatureShards(tmp_path / "test"), tmp_path / "out")
    about["utterances"][1] = "a\nb.wav"
    (tmp_path / "test" / "0_2.json").write_text(json.dumps(about))
    with refused("line break"):
        run(codec, FeatureShards(tmp_path / "test"), tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def test_a_kill_as_the_file_is_put_in_place_loses_no_line(codec, shards, tmp_path, monkeypatch):
    run(codec, shards, tmp_path / "whole")
    replace = os.replace

    def killed(source, target):
        if target == tmp_path / "out":
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", killed)
        with pytest.raises(KeyboardInterrupt):
            run(codec, shards, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(LineWriter, "write", lambda self, line: pytest.fail("written again"))
    run(codec, shards, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == (tmp_path / "whole").read_bytes()
