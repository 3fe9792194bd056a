"""Readers of the formats, given damaged files and files that lie: each gives a value or one sentence."""

import gzip
import io
import json
import tarfile
from contextlib import suppress

import numpy as np
import pytest
import soundfile
from conftest import published
from fuzzing import JSON, TEXT, Reader, check, lying_json, lying_table, some
from hypothesis import given
from hypothesis import strategies as st
from test_label_folders import LONG

from repcodec.audio import num_samples_at_16khz, read_audio
from repcodec.cuts import open_sounds
from repcodec.errors import RepCodecError
from repcodec.info import describe_path
from repcodec.labels import PhoneLabels
from repcodec.manifest import Manifest
from repcodec.shard_writer import write_shard
from repcodec.shards import FeatureShards
from repcodec.tokens import LineWriter, format_line, is_json, read_about, read_root, read_tokens
from repcodec.tokens_evaluation import measure_tokens

PATHS = ["spk/one.wav", "spk/two.flac", "spk/three.wav"]
PHONES = "utt\tstart_s\tend_s\tphone\nspk/one\t0\t0.06\tAH\nspk/one\t0.06\t0.1\tsil\nspk/two\t0.0\t0.04\tAH\n"
PHONE_LINES = '{"name": "spk/one", "phones": ["AH", "AH", "AH", "", "S"]}\n{"name": "spk/two", "phones": ["S", "S"]}\n'
CODES = "/audio\nspk/one.wav\t3 1 1 0\nspk/two.flac\t2 2 2 2 7 1\nspk/three.wav\t0 1\n"
RUNS = "/audio\nspk/one.wav\t3:1 1:2 0:1\nspk/two.flac\t2:4 7:1 1:1\n"
CODE_LINES = (
    '{"id": "spk/one", "path": "spk/one.wav", "duration": 0.08, "frames": 4, "codes": [[3, 1, 1, 0], [0, 0, 2, 1]]}\n'
    '{"id": "spk/two", "duration": 0.06, "frames": 3, "codes": [[2, 1], [0, 5]], "repeats": [2, 1]}\n'
)
ABOUT = json.dumps({
    "tokenizer": "RepCodec 8", "tokenizer_sha256": "0" * 64, "encoder": "hubert_base", "layer": 9, "codebook_size": 8,
    "num_codebooks": 1, "codes_per_second": 50.0, "root": "/audio", "format": "tokens",
})  # fmt: skip


def read_manifest(path):
    for skip_bad in (True, False):
        manifest = Manifest.read(path, skip_bad)
        manifest.sha256()
        manifest.shard(0, 1)
        manifest.waveform(0)


def read_shards(folder):
    shards = FeatureShards(folder)
    for utterance in range(min(len(shards), 5)):
        shards.read(utterance)
        shards.features(utterance).sum()
    shards.sample(10)
    shards.gather(range(min(len(shards), 3)), [0] * min(len(shards), 3), 4)
    with suppress(RepCodecError):
        shards.check_manifest(["a"] * len(shards), [320] * len(shards))


def read_tokens_file(path):
    read_about(path), is_json(path), read_root(path)
    for tokens in read_tokens(path):
        format_line(tokens, "jsonl")
    describe_path(path)
    with suppress(RepCodecError):
        measure_tokens(path, "name", None)
    with suppress(RepCodecError):
        measure_tokens(path, "name", PhoneLabels({"spk/one": [(0.0, 0.05, "AH")], "spk/two": [(0.0, 0.06, "S")]}))


def read_labels(path):
    labels = PhoneLabels.read(path)
    labels.sha256()
    for utterance in labels.ids():
        labels.frames(utterance, 10, 50)
    with suppress(RepCodecError):
        labels.check_durations(list(labels.ids()), [0.1] * len(labels))


def read_sound(path):
    num_samples_at_16khz(path)
    read_audio(path)


def read_cuts(source):
    sounds = open_sounds(source)
    sounds = sounds if hasattr(sounds, "paths") else sounds.whole()
    sounds.sha256()
    for utterance in range(len(sounds)):
        sounds.waveform(utterance)


def go_on_with_shard(folder):
    """Goes on with the shard that a killed process left, and finishes it."""
    try:
        with write_shard(folder, 0, 1, 4, {"root": "/audio", "frame_rate": 50}) as shard:
            shard.append("spk/three.wav", np.zeros((2, 4), np.float32))
            shard.commit()
        FeatureShards(folder)
    finally:
        leave_only(folder, ".0_1.journal", ".0_1.npy.partial")


def go_on_with_tokens(folder):
    try:
        with LineWriter(folder / "out.tokens", {"split": "test"}, "/audio") as file:
            if not file.done:
                file.write("spk/one.wav\t1 2\n")
        for _ in read_tokens(folder / "out.tokens"):
            pass
    finally:
        leave_only(folder, ".out.tokens.partial", ".out.tokens.about")


def leave_only(folder, *names):
    """Make a folder what it was, as far as names go: that those that write may change it is no fault of theirs."""
    for path in folder.iterdir():
        if path.name not in names:
            path.unlink()
    for name in names:
        (folder / name).touch()


def sound(kind, rate=16_000, channels=1, **options):
    file = io.BytesIO()
    file.name = f"sound.{kind}"
    wave = np.sin(np.arange(channels * rate // 10).reshape(-1, channels) / 9) / 2
    soundfile.write(file, wave, rate, format=kind.upper(), **options)
    return file.getvalue()


def header(text):
    """A .npy file of 9 x 4 values, whose header says this."""
    head = text.encode()
    version, length = (b"\1\0", 2) if len(head) < 2**16 else (b"\2\0", 4)
    return b"\x93NUMPY" + version + len(head).to_bytes(length, "little") + head + bytes(144)


LITERALS = [
    *TEXT[:24],
    *JSON[-8:],
    "(9,)",
    "(9, 4, 1)",
    "(0, 4)",
    "(-9, -4)",
    "(0, -4)",
    "(10**15, 4)",
    "(1000000000000000, 4)",
    "(True, 36)",
    "[9, 4]",
    "'<f4'",
    "'>f4'",
    "'|O'",
    "'<f8'",
    "'<f2'",
    "'<g'",
    "('<f4',)",
    "('<f4', (9,))",
    "[('a', '<f4')]",
    "{[]: 1}",
    "-" * 3000 + "1",
    "(" * 80 + ")" * 80,
    "None",
    "True",
    "'x' * 10**9",
    "__import__('os').system('touch evil')",
]
HEADERS = st.builds(
    lambda kind, order, shape, rest: header(
        f"{{'descr': {kind}, 'fortran_order': {order}, 'shape': {shape}, {rest}}}\n"
    ),
    st.just("'<f4'") | st.sampled_from(LITERALS), st.sampled_from(["False", "True", "1", "None"]),
    st.just("(9, 4)") | st.sampled_from(LITERALS), st.sampled_from(["", "", "", "1: 2", "'descr': 3", "[]: 1"]),
) | st.sampled_from(LITERALS).map(header)  # fmt: skip


def archive(text, change):
    """A Shar's archive in which the description of one sound is another."""
    changed = io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(change)) as whole, tarfile.open(fileobj=changed, mode="w") as tar:
        for i, member in enumerate(whole):
            content = whole.extractfile(member).read()
            if i == 1:
                content = text.encode(errors="surrogatepass")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return changed.getvalue()


def zipped(text):
    return gzip.compress(text.encode(errors="surrogatepass"), 1)


def files_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def readers(tmp_path_factory):
    """Every reader, by the name it has here."""
    made = tmp_path_factory.mktemp("whole")
    rows = np.random.default_rng(0).standard_normal((9, 4), dtype=np.float32)
    published(made / "npy", rows, [4, 0, 5])
    with write_shard(
        made / "shard", 0, 1, 4, {"root": "/audio", "frame_rate": 50, "encoder": "a", "layer": 9}
    ) as shard:
        for path, part in zip(PATHS, (rows[:3], rows[3:4], rows[4:]), strict=True):
            shard.append(path, part)
        shard.commit()
    try:
        with write_shard(made / "killed", 0, 1, 4, {"root": "/audio", "frame_rate": 50}) as shard:
            for path, part in zip(PATHS[:2], (rows[:3], rows[3:]), strict=True):
                shard.append(path, part)
                shard.commit()
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    found = {
        "manifest": Reader(
            {"m.tsv": f"{made}\n{PATHS[0]}\t1600\n{PATHS[1]}\t800\n".encode()}, ("m.tsv",),
            lambda folder: read_manifest(folder / "m.tsv"),
        ),
        "features": Reader(files_of(made / "npy"), ("0_1.npy", "0_1.len"), read_shards, {"0_1.npy": HEADERS}),
        "described features": Reader(files_of(made / "shard"), ("0_1.json", "0_1.json", "0_1.len"), read_shards),
        "unfinished shard": Reader(files_of(made / "killed"), (".0_1.journal", ".0_1.npy.partial"), go_on_with_shard),
        "unfinished tokens": Reader(
            {".out.tokens.about": b'{"split": "test"}', ".out.tokens.partial": CODES.encode()},
            (".out.tokens.about", ".out.tokens.partial"), go_on_with_tokens,
        ),
    }  # fmt: skip
    for name, text in {"a.tokens": CODES, "b.tokens": RUNS, "c.jsonl": CODE_LINES}.items():
        files = {name: text.encode(), f"{name}.json": ABOUT.encode()}
        found[name] = Reader(files, tuple(files), lambda folder, name=name: read_tokens_file(folder / name))
    packed = {"d.tokens.gz": gzip.compress(CODES.encode())}
    lies = {"d.tokens.gz": (lying_table(CODES) | lying_table(RUNS)).map(zipped)}
    found["d.tokens.gz"] = Reader(packed, tuple(packed), lambda folder: read_tokens_file(folder / "d.tokens.gz"), lies)
    labels = {
        "phones.tsv": PHONES.encode(), "phones.jsonl": PHONE_LINES.encode(),
        "phones.gz": gzip.compress(PHONES.encode()),
        "grids/spk/one.TextGrid": LONG.encode(), "timit/spk/one.phn": b"0 960 h#\n960 1600 ah\n",
    }  # fmt: skip
    grids = lying_table(LONG, " = ").map(str.encode)
    for name, whole in labels.items():
        top = name.split("/")[0]
        lies = {name: lying_table(PHONES).map(zipped)} if name.endswith(".gz") else {name: grids}
        found[name] = Reader({name: whole}, (name,), lambda folder, top=top: read_labels(folder / top), lies)
    kinds = {"wav": {}, "flac": {}, "mp3": {}, "ogg": {"rate": 44_100}, "aiff": {"channels": 2}, "w64": {}, "au": {}}
    for kind, options in kinds.items():
        name = f"sound.{kind}"
        found[name] = Reader(
            {name: sound(kind, **options)}, (name,), lambda folder, name=name: read_sound(folder / name)
        )
    found["sound.opus"] = Reader(
        {"sound.opus": sound("ogg", subtype="OPUS")}, ("sound.opus",), lambda folder: read_sound(folder / "sound.opus")
    )
    found |= lhotse_readers(made / "lhotse")
    return found


def lhotse_readers(folder):
    """CutSets and Shar archives; sounds are where they were made, since their paths stand in the files."""
    from lhotse import CutSet, Recording

    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.wav").write_bytes(sound("wav"))
    cuts = CutSet.from_cuts(Recording.from_file(path).to_cut() for path in sorted(folder.glob("*.wav")))
    cuts.to_file(folder / "cuts.jsonl")
    (folder / "shar").mkdir()
    cuts.to_shar(folder / "shar", fields={"recording": "wav"}, shard_size=3)
    lines = (folder / "cuts.jsonl").read_bytes()
    packed = gzip.compress(lines)
    shar = files_of(folder / "shar")
    sounds = shar["recording.000000.tar"]
    with tarfile.open(fileobj=io.BytesIO(sounds)) as tar:
        described = tar.extractfile(tar.getmembers()[1]).read().decode()
    cut = st.sampled_from(lines.decode().splitlines()).flatmap(lying_json)
    stored = st.sampled_from(gzip.decompress(shar["cuts.000000.jsonl.gz"]).decode().splitlines()).flatmap(lying_json)
    lies = {
        "cuts.000000.jsonl.gz": stored.map(lambda line: zipped(f"{line}\n")),
        "recording.000000.tar": lying_json(described).map(lambda text: archive(text, sounds)),
    }
    return {
        "cuts.jsonl": Reader({"cuts.jsonl": lines}, ("cuts.jsonl",), lambda at: read_cuts(at / "cuts.jsonl")),
        "cuts.jsonl.gz": Reader(
            {"cuts.jsonl.gz": packed},
            ("cuts.jsonl.gz",),
            lambda at: read_cuts(at / "cuts.jsonl.gz"),
            {"cuts.jsonl.gz": cut.map(lambda line: zipped(f"{line}\n"))},
        ),
        "shar": Reader(shar, tuple(shar), read_cuts, lies),
    }


NAMES = [
    "manifest", "features", "described features", "unfinished shard", "unfinished tokens", "a.tokens",
    "b.tokens", "c.jsonl", "d.tokens.gz", "phones.tsv", "phones.jsonl", "phones.gz", "grids/spk/one.TextGrid",
    "timit/spk/one.phn", "sound.wav", "sound.flac", "sound.mp3", "sound.ogg", "sound.aiff", "sound.w64", "sound.au",
    "sound.opus", "cuts.jsonl", "cuts.jsonl.gz", "shar",
]  # fmt: skip


def test_every_reader_is_here(readers):
    assert list(readers) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_whole_files_are_read(readers, name, tmp_path):
    reader = readers[name]
    reader.write(tmp_path)
    if name == "manifest":  # its sounds are elsewhere
        with pytest.raises(RepCodecError):
            reader.read(tmp_path)
    else:
        reader.read(tmp_path)


@pytest.mark.parametrize("name", NAMES)
@some
@given(data=st.data())
def test_damaged_files_end_in_a_value_or_a_sentence(readers, name, data, tmp_path_factory):
    file, content = data.draw(readers[name].strategy)
    check(readers[name], file, content, tmp_path_factory.getbasetemp() / "damaged")
