"""Codes of tokens files, whatever made them, against phones."""

import random

import numpy as np
import pytest
import torch
from conftest import refused

from repcodec.labels import PhoneLabels
from repcodec.scores import Scores
from repcodec.tokens import Tokens, format_line, put_in_place
from repcodec.tokens_evaluation import TokensFacts, measure_tokens

LENGTHS = {f"spk{i % 2}/utt{i}.flac": 40 + 9 * i for i in range(8)}
"""Codes of each utterance, at 50 a second."""


def labels():
    rng = np.random.default_rng(3)
    return PhoneLabels(
        {
            name.removesuffix(".flac"): [(t / 10, (t + 1) / 10, "abc"[rng.integers(3)]) for t in range(count // 5)]
            for name, count in LENGTHS.items()
        }
    )


def utterances(num_codebooks=1):
    rng, known = np.random.default_rng(0), labels()
    for name, count in LENGTHS.items():
        codes = rng.integers(6, size=(num_codebooks, count))
        codes[0] = np.where(rng.random(count) < 0.5, known.frames(name[:-5], count, 50).clip(0), codes[0])
        yield Tokens(name, codes, count, count / 50)


def write(path, kind="tokens", num_codebooks=1, shuffled=False):
    lines = [format_line(tokens, kind) for tokens in utterances(num_codebooks)]
    if shuffled:
        random.Random(1).shuffle(lines)
    path.write_text(("/audio\n" if kind == "tokens" else "") + "".join(lines))
    return path


def write_manifest(path, scale=320, names=LENGTHS):
    rows = [f"{name}\t{count * scale}\n" for name, count in names.items()]
    path.write_text("/elsewhere\n" + "".join(reversed(rows)))
    return path


def test_figures_are_those_of_the_codes(tmp_path, capsys):
    scores = Scores(1, 6, 50.0, labels())
    for tokens in utterances():
        scores.add(tokens.name[:-5], torch.from_numpy(tokens.codes), tokens.name[:-5])
    expected = scores.result("x").row
    found = measure_tokens(write(tmp_path / "a"), "x", labels(), TokensFacts(None, 50.0, 6))
    assert found.row == expected
    assert found.row.warnings == []
    assert found.row.normalized_error is None
    assert "labels: 8 of 8 utterances matched" in capsys.readouterr().out


def test_order_of_lines_changes_nothing(tmp_path):
    one = measure_tokens(write(tmp_path / "a"), "x", labels())
    other = measure_tokens(write(tmp_path / "b", shuffled=True), "x", labels())
    assert one.joint.tolist() == other.joint.tolist()
    for field, bounds in one.row.intervals.items():
        assert bounds == pytest.approx(other.row.intervals[field])


def test_manifest_in_another_order_tells_the_rate(tmp_path):
    path = write(tmp_path / "a")
    halved = write_manifest(tmp_path / "m.tsv", scale=640)
    row = measure_tokens(path, "x", None, TokensFacts(halved)).row
    assert row.codes_per_second == 25
    assert not any("codes a second" in warning for warning in row.warnings)


def test_durations_in_json_lines_tell_the_rate_of_each_codebook(tmp_path):
    row = measure_tokens(write(tmp_path / "a.jsonl", "jsonl", num_codebooks=2), "x", labels()).row
    assert (row.num_codebooks, row.codes_per_second) == (2, 100)
    assert row.pnmi > 0


def test_what_is_not_known_is_assumed_and_said(tmp_path):
    row = measure_tokens(write(tmp_path / "a"), "x", None).row
    assert (row.codebook_size, row.codes_per_second) == (6, 50)
    size, rate = row.warnings
    assert "codebook_size=" in size
    assert "codes_per_second=" in rate


def test_description_beside_the_file_tells_what_made_it(tmp_path):
    partial = write(tmp_path / "partial")
    put_in_place(partial, tmp_path / "a", {"codebook_size": 64, "codes_per_second": 25})
    row = measure_tokens(tmp_path / "a", "x", None).row
    assert (row.codebook_size, row.codes_per_second, row.warnings) == (64, 25, [])


def test_abx_of_codes_that_follow_phones_is_better_than_chance(tmp_path):
    row = measure_tokens(write(tmp_path / "a"), "x", labels(), speaker="[^/]+").row
    assert row.abx_within < 0.45
    assert row.abx_across < 0.45


def test_code_beyond_the_codebook(tmp_path):
    with refused(tmp_path / "a", "holds code 5", "0 to 3"):
        measure_tokens(write(tmp_path / "a"), "x", None, TokensFacts(codebook_size=4))


def test_labels_of_other_utterances_name_one_of_each_side(tmp_path):
    with refused("else", "spk0/utt0"):
        measure_tokens(write(tmp_path / "a"), "x", PhoneLabels({"else": [(0, 1, "a")]}))


def test_labels_in_milliseconds(tmp_path):
    wrong = PhoneLabels({name[:-5]: [(0, 20.0 * count, "a")] for name, count in LENGTHS.items()})
    with refused("milliseconds"):
        measure_tokens(write(tmp_path / "a"), "x", wrong)


def test_manifest_of_other_sounds(tmp_path):
    other = write_manifest(tmp_path / "m.tsv", names={"z.flac": 9})
    with refused(other, "lists no utterance of", "'z'", "'spk0/utt0'"):
        measure_tokens(write(tmp_path / "a"), "x", None, TokensFacts(other))


def test_durations_that_fit_no_rate(tmp_path):
    wrong = write_manifest(tmp_path / "m.tsv", scale=441)
    with refused(tmp_path / "a", "36.3 codes a second", "codes_per_second"):
        measure_tokens(write(tmp_path / "a"), "x", None, TokensFacts(wrong))


@pytest.mark.parametrize("content", ["", "/audio\n", "/audio\na.wav\t\n"])
def test_file_without_a_code(tmp_path, content):
    (tmp_path / "a").write_text(content)
    with refused(tmp_path / "a"):
        measure_tokens(tmp_path / "a", "x", None)


def test_truncated_file(tmp_path):
    path = write(tmp_path / "a")
    path.write_bytes(path.read_bytes()[:-3])
    with refused(path, "cut off"):
        measure_tokens(path, "x", None)


def test_utterances_of_different_numbers_of_codebooks(tmp_path):
    path = write(tmp_path / "a.jsonl", "jsonl")
    path.write_text(path.read_text() + format_line(Tokens("z.wav", np.zeros((2, 3), int)), "jsonl"))
    with refused(path, "z.wav has 2 codebooks"):
        measure_tokens(path, "x", None)


def test_codebooks_that_would_fill_the_memory_are_refused(tmp_path):
    (tmp_path / "a").write_text(f"/audio\nu.wav\t1 {2**31 - 1}\n")
    with refused(tmp_path / "a", "can be counted"):
        measure_tokens(tmp_path / "a", "a", None)
