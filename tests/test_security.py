"""Files from others: nothing in them is run, fills the memory, or decides where is written."""

import ast
import gzip
import io
import json
import os
import re
import tarfile
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from pathlib import Path

import joblib
import numpy as np
import pytest
import soundfile
import torch
from conftest import published, refused
from fuzzing import bounded
from test_extraction import SPEC, Windows, write_noise
from test_report_tables import result
from test_shard_files import Trap

from repcodec import results
from repcodec.audio import num_samples_at_16khz, read_audio
from repcodec.checkpointing import find_checkpoint
from repcodec.codec import RepCodec
from repcodec.cuts import open_sounds
from repcodec.decoding import decode_tokens
from repcodec.errors import RepCodecError
from repcodec.extraction import extract, feature_folder
from repcodec.kmeans import KMeansTokenizer
from repcodec.labels import PhoneLabels
from repcodec.manifest import Manifest
from repcodec.report import write_report
from repcodec.results import Example, Result, Row, load_result, save_result
from repcodec.shards import FeatureShards
from repcodec.tokenization import FeatureSource, write_tokens
from repcodec.tokens import Tokens, format_line, read_tokens

ROOT = Path(__file__).parent.parent
CODE = [*sorted((ROOT / "repcodec").glob("*.py")), ROOT / "train.py", ROOT / "evaluate.py"]

# What the code may not say; test_imports.py looks at torch.load, pickle and their like.

RUNS = {"eval", "exec", "compile", "__import__"}
"""Builtins that run text."""

UNSAFE = re.compile(
    r"os\.(system|popen|exec\w*|spawn\w*)|subprocess\.(getoutput|getstatusoutput)|yaml\.(load|load_all|full_load|unsafe_load|"
    r"Loader|UnsafeLoader|FullLoader)|marshal\.\w+|shelve\.\w+|runpy\.\w+|tempfile\.mktemp|shutil\.unpack_archive|"
    r"\w*(tar|zip|archive|parts|packed)\w*\.(extract|extractall)|torch\.hub\.\w+|joblib\.load|pandas\.read_pickle"
)
"""Calls that run what they are given, or write where an archive says."""


def unsafe_calls(text):
    """Yield what a file of Python calls that could run a user's data or a shell."""
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        said = {word.arg: ast.unparse(word.value) for word in node.keywords}
        if name in RUNS or UNSAFE.fullmatch(name):
            yield name
        if said.get("shell", "False") != "False" or said.get("trust_remote_code", "False") != "False":
            yield f"{name}(shell or trust_remote_code)"
        if said.get("allow_pickle", "False") != "False" and name.endswith("load"):
            yield f"{name}(allow_pickle)"
        if (
            re.fullmatch(r"subprocess\.\w+", name)
            and node.args
            and isinstance(node.args[0], ast.Constant | ast.JoinedStr)
        ):
            yield f"{name}(a text)"


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("eval(text)", ["eval"]),
        ("model.eval()", []),
        ("re.compile(text)", []),
        ("os.popen(text)", ["os.popen"]),
        ("yaml.load(file, yaml.SafeLoader)", ["yaml.load"]),
        ("yaml.safe_load(file)", []),
        (
            "subprocess.run(f'ls {name}', shell=True)",
            ["subprocess.run(shell or trust_remote_code)", "subprocess.run(a text)"],
        ),
        ("subprocess.run(['ls', name], check=True)", []),
        ("np.load(path, allow_pickle=True)", ["np.load(allow_pickle)"]),
        ("np.load(path, allow_pickle=trust)", ["np.load(allow_pickle)"]),
        ("np.load(path)", []),
        ("tar.extractall(folder)", ["tar.extractall"]),
        ("joblib.load(path)", ["joblib.load"]),
        (
            "AutoModel.from_pretrained(name, trust_remote_code=True)",
            ["AutoModel.from_pretrained(shell or trust_remote_code)"],
        ),
    ],
)
def test_what_is_looked_for_is_found(code, found):
    assert list(unsafe_calls(code)) == found


@pytest.mark.parametrize("path", CODE, ids=lambda path: path.stem)
def test_no_code_runs_what_it_reads_or_a_shell(path):
    # The one unpickling, behind allow_pickle: the test below springs its trap.
    assert list(unsafe_calls(path.read_text(encoding="utf-8"))) == (["joblib.load"] if path.stem == "kmeans" else [])


def test_templates_escape_all_but_the_pages_own_style_and_script():
    for path in (ROOT / "repcodec" / "templates").glob("*.html"):
        assert set(re.findall(r"{{\s*([^}]*?)\s*\|\s*safe", path.read_text(encoding="utf-8"))) <= {"script", "style"}
    assert "autoescape=True" in (ROOT / "repcodec" / "report.py").read_text(encoding="utf-8")


# Pickles in the place of files


def kept(folder, trap):
    save_result(Result(Row("a", 1, 8), np.ones((1, 8), int)), folder / "r.json", {})
    np.savez(folder / "r.npz", usage=np.array([[trap]], dtype=object))


def features(folder, trap):
    published(folder, np.array([[trap]], dtype=object), [1])


SPRINGS = {
    "features": (features, FeatureShards, lambda at: np.load(at / "0_1.npy", allow_pickle=True)),
    "kept result": (
        kept, lambda at: load_result(at / "r.json", {}), lambda at: np.load(at / "r.npz", allow_pickle=True)["usage"],
    ),
    "published": (
        lambda at, trap: torch.save({"model": {"repcodec": trap}}, at / "hubert_base_l9.pkl"),
        lambda at: RepCodec.from_published(at / "hubert_base_l9.pkl"),
        lambda at: torch.load(at / "hubert_base_l9.pkl", weights_only=False),
    ),
    "lightning": (
        lambda at, trap: torch.save({"state_dict": {"codec.x": trap}}, at / "last.ckpt"),
        lambda at: RepCodec.from_lightning(at / "last.ckpt"),
        lambda at: torch.load(at / "last.ckpt", weights_only=False),
    ),
    "last": (
        lambda at, trap: torch.save({"run": trap}, at / "last.ckpt"),
        lambda at: find_checkpoint("last", at),
        lambda at: torch.load(at / "last.ckpt", weights_only=False),
    ),
    "k-means": (
        lambda at, trap: joblib.dump(trap, at / "km.bin"),
        lambda at: KMeansTokenizer.from_joblib(at / "km.bin"),
        lambda at: KMeansTokenizer.from_joblib(at / "km.bin", allow_pickle=True),  # the one opt-in
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", SPRINGS)
def test_no_pickle_is_run_unless_that_is_asked_for(tmp_path, kind):
    make, read, spring = SPRINGS[kind]
    (tmp_path / "in").mkdir()
    make(tmp_path / "in", Trap(tmp_path / "sprung"))
    try:
        assert read(tmp_path / "in") is None, "a value came out of it"
    except RepCodecError:
        pass
    assert not (tmp_path / "sprung").exists()
    try:
        spring(tmp_path / "in")
    except RepCodecError:
        pass
    assert (tmp_path / "sprung").exists(), "the trap does not work, so the test shows nothing"


# Where is written


@pytest.fixture
def out(tmp_path):
    """A folder to write into: afterwards, nothing beside it may have changed, nor lie anywhere under a hostile name."""
    place = tmp_path / "a" / "b" / "out"
    place.mkdir(parents=True)
    yield place
    inside = {path.name for path in place.rglob("*")}
    outside = {path for path in tmp_path.rglob("*") if place not in (path, *path.parents)}
    assert outside - {tmp_path / "a", tmp_path / "a" / "b"} <= {tmp_path / "given", *(tmp_path / "given").rglob("*")}
    assert not [name for name in inside if "evil" in name]
    assert not Path("/etc/evil").exists()


@pytest.fixture
def evil(tmp_path):
    """Ids that name places outside."""
    return [
        "../../../evil.wav",
        f"{tmp_path}/evil2.wav",
        "/etc/evil.wav",
        "a/../../../../evil3.wav",
        "..",
        "evil4/../..",
    ]


def test_decoding_writes_into_its_folder_alone(tmp_path, out, evil, codec):
    (tmp_path / "given").mkdir()
    for name, lines in {"t.tokens": ["/\n"], "t.jsonl": []}.items():
        lines += [format_line(Tokens(path, np.zeros((1, 3), np.int64)), Path(name).suffix[1:]) for path in evil]
        (tmp_path / "given" / name).write_text("".join(lines))
        assert decode_tokens(codec.float(), tmp_path / "given" / name, out / name[2:]) == len(evil)
        names = FeatureShards(out / name[2:]).names
        assert names == evil
        source = FeatureSource(FeatureShards(out / name[2:]))
        write_tokens(codec, source, {}, out / f"again-{name}", Path(name).suffix[1:])
        assert [tokens.name for tokens in read_tokens(out / f"again-{name}")] == evil


def test_extraction_writes_into_its_folder_alone(tmp_path, out):
    write_noise(tmp_path / "given" / "evil.wav", 3200)
    names = ["../evil.wav", str(tmp_path / "given" / "evil.wav")]
    (tmp_path / "given" / "root").mkdir()
    manifest = Manifest(tmp_path / "given" / "root", names, [3200, 3200])
    extract(manifest, out, replace(SPEC, name="../../evil"), Windows())
    assert FeatureShards(out).names == names


@pytest.mark.parametrize("split", ["..", ".", "", "../../evil", "/etc/evil"])
def test_a_manifest_whose_name_leads_out_of_the_root_is_refused(split):
    with refused("no name of a split"):
        feature_folder("features", "hubert_base", 9, split)
    with refused("no name of a speech encoder"):
        feature_folder("features", split, 9, "train")


def test_a_shar_writes_nothing(tmp_path, out, evil):
    for i, name in enumerate(evil):
        with tarfile.open(out / f"recording.{i:06d}.tar", "w") as tar:
            for ending in (".wav", ".json"):
                member = tarfile.TarInfo(name.removesuffix(".wav") + ending)
                member.size = 4
                tar.addfile(member, io.BytesIO(b"evil"))
        (out / f"cuts.{i:06d}.jsonl.gz").write_bytes(gzip.compress(b"{}\n"))
    with pytest.raises(RepCodecError):
        open_sounds(str(out)).whole()


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, *(name for name, _ in attrs)))


def test_no_name_changes_the_reports_tags_or_files(out):
    def tags(folder, text):
        row = result(f"name{text}", pnmi=0.5, warnings=[f"warning{text}"])
        row.joint = None
        phones = [(0.0, 0.5, f"p{text}")]
        example = Example(f"id{text}", 1.0, None, phones, {f"name{text}": (np.array([1, 2, 3]), 3.0)})
        write_report(folder, [row], {f"fact{text}": f"value{text}"}, None, [example])
        reader = Tags()
        reader.feed((folder / "report.html").read_text())
        return reader.found

    for i, text in enumerate(["</script><script>x()</script>", "\"'><a href=javascript:x()>", "../../evil"]):
        assert tags(out / str(i), text) == tags(out / f"calm{i}", "x" * len(text))  # a long name is drawn elsewhere
    assert len({tuple(sorted(path.name for path in folder.iterdir())) for folder in out.iterdir()}) == 1


# What a small file may cost

MEGABYTE = 1 << 20


def bomb(start):
    """Two gigabytes that lie in two megabytes: one line without an end, after the start given."""
    return gzip.compress(start) + 32 * packed_ones()


@cache
def packed_ones():
    return gzip.compress(b"1" * (64 * MEGABYTE), 6)


def sparse(path):
    """A tar whose one sound is a hole of 4 GB."""
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        member = tarfile.TarInfo("0.wav")
        member.size = 4 << 30
        tar.fileobj.write(member.tobuf(tarfile.GNU_FORMAT))


def endless_line(name, start, read):
    def make(folder):
        (folder / name).write_bytes(bomb(start))

    return make, lambda folder: read(folder / name)


def shar(folder, archive):
    (folder / "cuts.000000.jsonl.gz").write_bytes(gzip.compress(b"{}\n"))
    archive(folder / "recording.000000.tar")


def long_wav(folder):
    file = io.BytesIO()
    soundfile.write(file, np.zeros(1600), 16_000, format="FLAC")
    whole = file.getvalue()  # the number of samples has 36 bits, from the 22nd byte on
    (folder / "a.flac").write_bytes(whole[:21] + bytes([whole[21] | 0x0F]) + b"\xff" * 4 + whole[26:])


def large_codec(folder, **changes):
    RepCodec(4, codebook_size=8).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantizer"] |= changes
    (folder / "config.json").write_text(json.dumps(config))


LIES = {
    "tokens": endless_line("a", b"/audio\nb.wav\t", lambda path: list(read_tokens(path))),
    "JSON lines": endless_line("a", b'{"id": "', lambda path: list(read_tokens(path))),
    "labels": endless_line("a.tsv", b"utt\tstart_s\tend_s\tphone\n", PhoneLabels.read),
    "cuts": endless_line("a.jsonl.gz", b'{"id": "', lambda path: open_sounds(str(path))),
    "a Shar's cuts": (
        lambda at: (shar(at, sparse), (at / "cuts.000000.jsonl.gz").write_bytes(bomb(b"{"))),
        lambda at: open_sounds(str(at)).whole(),
    ),
    "a Shar's hole": (lambda at: shar(at, sparse), lambda at: open_sounds(str(at)).whole()),
    "a packed Shar": (
        lambda at: shar(at, lambda path: path.write_bytes(bomb(b""))), lambda at: open_sounds(str(at)).whole(),
    ),
    "sound": (long_wav, lambda at: read_audio(at / "a.flac")),
    "a sound's header": (long_wav, lambda at: num_samples_at_16khz(at / "a.flac")),
    "codes": (lambda at: large_codec(at, codebook_size=10**9), RepCodec.from_pretrained),
    "codebooks": (lambda at: large_codec(at, num_codebooks=10**9), RepCodec.from_pretrained),
}  # fmt: skip


@pytest.mark.parametrize("kind", LIES)
def test_a_small_file_that_says_it_is_large_is_refused(tmp_path, kind):
    make, read = LIES[kind]
    make(tmp_path)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 4 * MEGABYTE
    with bounded(tmp_path, 600 * MEGABYTE), pytest.raises(RepCodecError) as caught:
        read(tmp_path)
    assert not re.search("allocate|memory", str(caught.value)), "refused only when it was too late"


def test_a_kept_result_that_unpacks_to_too_much_is_measured_again(tmp_path, monkeypatch):
    save_result(Result(Row("a", 1, 8), np.zeros((1, 8), int), np.zeros((100, 8), int)), tmp_path / "r.json", {})
    assert load_result(tmp_path / "r.json", {}) is not None
    monkeypatch.setattr(results, "MOST_BYTES", 1000)
    assert os.path.getsize(tmp_path / "r.npz") < 1000
    assert load_result(tmp_path / "r.json", {}) is None
