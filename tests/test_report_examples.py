import base64
import csv
import io
import itertools
import re

import numpy as np
import pytest
import soundfile
from test_report_tables import result

from repcodec.report_examples import MOST_TRACKS, SCALE, timeline
from repcodec.results import Example


def spoken(corpus, number=3):
    """Real utterances with their phones, and codes that are how loud each 20 ms is: an `Example` each."""
    with open(corpus / "phones.tsv", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    found = []
    for path in sorted(corpus.glob("audio/*/*.flac"))[:number]:
        sound, _ = soundfile.read(path, dtype="float32")
        utterance = f"{path.parent.name}/{path.stem}"
        segments = [
            (float(row["start_s"]), float(row["end_s"]), row["phone"]) for row in rows if row["utt"] == utterance
        ]
        loud = np.abs(sound[: len(sound) // 320 * 320]).reshape(-1, 320).max(1)
        codes = np.minimum(63, loud * 64).astype(np.int64)
        tokens = {"k-means 64": (codes, 50.0), "RepCodec 64": (codes[::2] // 4, 25.0)}
        found.append(Example(utterance, len(sound) / 16_000, sound, segments, tokens))
    return found, sorted({row["phone"] for row in rows})


@pytest.fixture(scope="module")
def utterance(speech):
    (example, *_), phones = spoken(speech, 1)
    return example, phones


def test_blocks_are_the_codes_in_their_places(utterance):
    example, _ = utterance
    line = timeline(example, [], None)
    assert [name for name, _ in line.tracks] == ["phones", "k-means 64", "RepCodec 64"]
    assert line.width == pytest.approx(example.duration * SCALE, abs=0.1)
    for name, blocks in line.tracks[1:]:
        codes, rate = example.codes[name]
        for i, code in enumerate(codes):
            middle = (i + 0.5) / rate * SCALE
            (block,) = [block for block in blocks if block.x <= middle < block.x + block.width]
            assert block.text == str(code)
        assert all(one.text != other.text for one, other in itertools.pairwise(blocks)), "runs are one"
        assert max(block.x + block.width for block in blocks) <= line.width + 0.2


def test_phones_stand_where_they_are_spoken(utterance):
    example, _ = utterance
    blocks = timeline(example, [], None).tracks[0][1]
    assert [block.text for block in blocks] == [phone for *_, phone in example.phones]
    for block, (start, end, _) in zip(blocks, example.phones, strict=True):
        assert block.x / SCALE == pytest.approx(start, abs=0.001)
        assert (block.x + block.width) / SCALE == pytest.approx(min(end, example.duration), abs=0.001)


def test_a_token_has_the_colour_of_the_phone_it_stands_for(utterance):
    example, phones = utterance
    tokens = result("k-means 64", phones=len(phones))
    blocks = dict(timeline(example, [tokens], phones).tracks)
    tones = {block.text: block.tone for block in blocks["phones"]}
    agreeing = 0
    for block in blocks["k-means 64"]:
        counts = tokens.joint[:, int(block.text)]
        if not counts.any():
            assert block.tone == "unknown"
        elif (phone := phones[int(np.argmax(counts))]) in tones:
            assert block.tone == tones[phone]
            assert f"mostly {phone} ({counts.max() / counts.sum():.0%})" in block.title
            agreeing += 1
    assert agreeing > 0
    # Without phones to go by, every code has a colour of its own.
    for name, plain in timeline(example, [], None).tracks[1:]:
        assert name and all(re.fullmatch(r"t\d+", block.tone) for block in plain)


def test_silence_has_no_colour():
    example = Example("u", 1.0, None, [(0.0, 0.5, "SIL"), (0.5, 1.0, "a")], {})
    assert [block.tone for block in timeline(example, [], ["SIL", "a"]).tracks[0][1]] == ["quiet", "t13"]
    assert [block.tone for block in timeline(example, [], ["SIL"]).tracks[0][1]] == ["quiet", "unknown"]


def test_sound_is_whole_and_its_outline_touches_every_peak(utterance):
    example, _ = utterance
    line = timeline(example, [], None)
    head, _, data = line.audio.partition(",")
    assert head == "data:audio/flac;base64"
    sound, rate = soundfile.read(io.BytesIO(base64.b64decode(data)))
    assert rate == 16_000
    np.testing.assert_allclose(sound, example.sound, atol=1 / 32768)
    points = np.array([[float(v) for v in pair.split()] for pair in line.wave.strip("MZ").split("L")])
    high, low = points[: len(points) // 2], points[len(points) // 2 :][::-1]
    peak = np.abs(example.sound).max()
    assert len(high) == int(line.width / 1.5)
    for i in range(0, len(high), 50):
        piece = example.sound[len(sound) * i // len(high) : len(sound) * (i + 1) // len(high)]
        assert -high[i, 1] == pytest.approx(100 * piece.max() / peak, abs=0.51)
        assert -low[i, 1] == pytest.approx(100 * piece.min() / peak, abs=0.51)


def test_odd_utterances():
    silent = timeline(
        Example("u", 0.1, np.zeros(1600, np.float32), [], {"a": (np.array([], np.int64), 50.0)}), [], None
    )
    assert silent.audio and silent.tracks == [("a", [])]
    loud = np.array([np.inf, -np.inf, np.nan, 3.0, -0.5], np.float32)
    assert "nan" not in timeline(Example("u", 5 / 16_000, loud, [], {}), [], None).wave
    for sound in (None, np.zeros(0, np.float32)):
        line = timeline(Example("u", 0.0, sound, [], {}), [], None)
        assert (line.audio, line.wave, line.tracks) == (None, "", [])
    codes = np.array([3, 3, -1, 70, 70, 70, 2])
    tokens = timeline(
        Example("u", 0.11, None, [], {"k-means 64": (codes, 50.0)}), [result("k-means 64")], list("abcde")
    )
    blocks = tokens.tracks[0][1]
    assert [block.text for block in blocks] == ["3", "70"], "no code, and what is after the end, are no blocks"
    assert blocks[1].tone == "unknown"
    assert blocks[1].x + blocks[1].width == pytest.approx(0.11 * SCALE, abs=0.11)


def test_no_more_tokenizers_than_fit_the_best_of_each_family_first():
    results = [result(f"k-means {2**i}", 1, 2**i, pnmi=0.9 - i / 20) for i in range(1, 7)]
    results += [result("RepCodec 64")]
    codes = {each.row.name: (np.arange(3), 50.0) for each in results}
    line = timeline(Example("u", 1.0, None, [], codes), results, None)
    names = [name for name, _ in line.tracks]
    assert len(names) == MOST_TRACKS
    assert names == ["k-means 2", "k-means 4", "k-means 8", "RepCodec 64"]
