"""README and docs/: every command in them is tried, nothing is left out, and the site needs no other host.

Commands are found by bash itself: each document's blocks run with programs that only note what they were called with.
What was noted is then done here, on tiny speech encoders and a few seconds of noise: `repcodec …` as it stands;
`python train.py …` and `evaluate.py` as far as Hydra composes them, and in the slow tests shrunk but whole.
"""

import argparse
import io
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from contextlib import redirect_stdout
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import transformers
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from test_config import check_arguments, targets
from test_imports import FILES, LAYERS
from test_published import complete, published_state, write_published

from repcodec.cli import main
from repcodec.codec import RepCodec
from repcodec.speech_encoders import encoder_table

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted(ROOT.glob("docs/**/*.md"))]
DOCUMENTS = {str(path.relative_to(ROOT)): path for path in PAGES}
PROGRAMS = ("python", "repcodec", "make", "pip", "pytest", "srun", "torchrun")
DIM = 16
NUM_SOUNDS = {"train": 8, "valid": 2, "test": 3, "test-clean": 2}
CONV = {"conv_dim": [16] * 7, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2}
SMALL = {"num_attention_heads": 2, "intermediate_size": 32}


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.S | re.M)


def spans(text):
    """Commands in `single quotes`; … stands for something, so such a one is none."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    return [shlex.split(span) for span in re.findall(rf"`(?:[A-Z_]+=\w+ )?((?:{'|'.join(PROGRAMS)}) [^`…]+)`", prose)]


def commands(document, folder):
    """All commands of a document as lists of words, in order: first those of its blocks, then those in its prose."""
    text = DOCUMENTS[document].read_text(encoding="utf-8")
    programs, noted = folder / "programs", folder / "noted"
    programs.mkdir(parents=True)
    for name in PROGRAMS:
        note = 'printf "%s\\0" "${0##*/}" "$@" >> "$NOTED"; printf "\\n\\0" >> "$NOTED"\n'
        (programs / name).write_text(f"#!{shutil.which('bash')}\n{note}")
        (programs / name).chmod(0o755)
    (programs / "cat").symlink_to(shutil.which("cat"))
    (folder / ".venv" / "bin").mkdir(parents=True)
    for name in (".venv/bin/activate", "speech.wav"):
        (folder / name).touch()
    noted.touch()
    script = "set -euo pipefail\n" + "\n".join(blocks(text, "bash"))
    environment = {"PATH": str(programs), "NOTED": str(noted)}
    done = subprocess.run(
        [shutil.which("bash"), "-c", script], env=environment, cwd=folder, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, f"{document}: {done.stderr}"
    found = [words.split("\0") for words in noted.read_text().split("\0\n\0") if words]
    return [inner(words) for words in found + spans(text)]


def inner(words):
    """What srun and torchrun run."""
    if words[0] == "srun":
        return words[next(i for i, word in enumerate(words[1:], 1) if not word.startswith("-")) :]
    if words[0] == "torchrun":
        return ["python", *words[words.index("evaluate.py") :]]
    return words


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Tiny speech encoders with random weights: a HuBERT with as many blocks as any, a Whisper."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("models")
    hubert = transformers.HubertConfig(hidden_size=DIM, num_hidden_layers=36, **SMALL, **CONV)
    transformers.HubertModel(hubert).save_pretrained(root / "hubert")
    whisper = transformers.WhisperConfig(
        d_model=DIM, encoder_layers=4, encoder_attention_heads=2, encoder_ffn_dim=32, decoder_layers=1,
        decoder_attention_heads=2, decoder_ffn_dim=32, vocab_size=60, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1,
    )  # fmt: skip
    transformers.WhisperForConditionalGeneration(whisper).save_pretrained(root / "whisper")
    return root


@pytest.fixture
def checkout(tmp_path, models, monkeypatch):
    """A folder that holds what the documentation's commands name, but for what they make themselves."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for task, value in {"ID": "0", "COUNT": "1", "MIN": "0", "MAX": "0"}.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{task}", value)
    for name in ("hubert_base", "hubert_large", "whisper_tiny_en"):
        tiny = replace(encoder_table()[name], dim=DIM, model=str(models / name.split("_")[0]))
        monkeypatch.setitem(encoder_table(), name, tiny)
    for name in ("models/hubert-base-ls960", "facebook/hubert-xlarge-ll60k"):
        Path(name).parent.mkdir()
        Path(name).symlink_to(models / "hubert")
    rng = np.random.default_rng(0)
    for tens, (split, number) in enumerate(NUM_SOUNDS.items()):
        for i in range(number):
            speaker = 10 * tens + i % 4
            path = Path("LibriSpeech", split, f"{speaker}", f"{speaker}-{i}.wav")
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(path, rng.normal(0, 0.1, 8000 + 640 * i), 16_000)
    shutil.copy(path, "speech.wav")
    torch.manual_seed(0)
    for name, encoder, layer in (("demo", "whisper_tiny_en", 3), ("large", "hubert_base", 9)):
        about = {"encoder": encoder, "layer": layer, "frame_rate": 50}
        RepCodec(DIM, codebook_size=16).save_pretrained(f"outputs/{name}/codec", about)
    for name in ("hubert_base_l9", "mine"):
        write_published(Path(f"{name}.pkl"), published_state(complete(DIM)))
    Path("train_config.yaml").write_text(yaml.safe_dump({"model_params": complete(DIM)}))
    run("manifest LibriSpeech/test -o cache/demo/test.tsv")
    run("extract cache/demo/test.tsv cache/demo/features --encoder whisper_tiny_en --layer 3")
    return folder


def make_features():
    """What `repcodec manifest` and `extract` make, for documents that take it as made."""
    for split in ("train", "valid", "test"):
        run(f"manifest LibriSpeech/{split} -o {split}.tsv")
        run(f"extract {split}.tsv features --encoder hubert_base --layer 9")


def run(command):
    assert main(shlex.split(command)) == 0, command


def repcodec(words, monkeypatch):
    """Run `repcodec …` as it stands, but on the CPU; a bare name is only looked up."""
    if len(words) < 2 or "export" in words:  # test_export.py has that: it takes long
        with pytest.raises(SystemExit) as stop:
            main([*words[:1], "--help"])
        assert stop.value.code == 0
        return
    with open("speech.wav", "rb") as sound:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(sound))
        assert main(["cpu" if word == "cuda" else word for word in words]) == 0, words


def jobs(overrides):
    """The overrides of every job of a sweep; of a single run, one list."""
    choices = []
    for override in OverridesParser.create().parse_overrides(overrides):
        if override.is_sweep_override():
            choices.append([f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()])
        else:
            choices.append([override.input_line])
    return [list(job) for job in product(*choices)]


def composes(script, words):
    """Compose what `train.py` or `evaluate.py` would run, and check what it hands to whom."""
    if words == ["--help"]:
        return
    all_jobs = jobs([word for word in words if word != "-m"])
    assert "-m" in words or len(all_jobs) == 1, "a sweep needs -m"
    for job in all_jobs:
        check_job(script, job)


def check_job(script, job):
    named = [] if any(word.startswith("run=") for word in job) else ["run=documented"]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose(script, [*job, *named, "run_dir=outputs"], return_hydra_config=True)
    rest = OmegaConf.masked_copy(config, [key for key in config if key != "hydra"])
    OmegaConf.resolve(rest)
    for node in targets(rest):
        check_arguments(node)


def parses(script, words, monkeypatch):
    """Start a benchmark as far as it reads its options."""

    def parse(parser, arguments=None):
        parser.parse_known_args = argparse.ArgumentParser.parse_known_args.__get__(parser)
        _, unknown = parser.parse_known_args(arguments)
        sys.exit(f"unknown options: {unknown}" if unknown else 0)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    monkeypatch.setattr(sys, "argv", [script, *words])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert stop.value.code == 0


def try_command(words, monkeypatch):
    """Do with a command what a test can; one that nothing can be done with fails."""
    program, *rest = words
    if program == "repcodec":
        repcodec(rest, monkeypatch)
    elif program == "make":
        done = subprocess.run(["make", "-n", *rest], cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
    elif program == "pytest":  # a test that ran the tests would never end
        files = [word for word in rest if not word.startswith("-")]
        assert files and all(any(ROOT.glob(name)) for name in files)
    elif program == "pip":
        if rest == ["install", "."]:  # test_readme.py installs the wheel
            return
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        extra = re.fullmatch(r"repcodec\[(\w+)\]", rest[1])[1]
        assert rest[0] == "install" and extra in project["optional-dependencies"]
    elif program == "python" and rest[0] in ("train.py", "evaluate.py"):
        composes(Path(rest[0]).stem, rest[1:])
    elif program == "python" and re.fullmatch(r"benchmarks/\w+\.py", rest[0]):
        parses(rest[0], rest[1:], monkeypatch)
    else:
        pytest.fail(f"no way to try {shlex.join(words)}")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_works(document, request, tmp_path):
    found = commands(document, tmp_path / "noting")
    used = [words for words in found if words[0] == "repcodec" and len(words) > 2]
    if used:
        request.getfixturevalue("checkout")
        if not any(words[1] == "manifest" for words in used):
            make_features()
    for words in found:
        with pytest.MonkeyPatch.context() as patch:
            try_command(words, patch)


def test_commands_are_found_as_bash_reads_them(tmp_path, monkeypatch):
    """The finder itself: loops, quotes, comments, lines that go on, pipes; a program it does not know is an error."""
    text = """`make lint`, `repcodec tokenize …`
```bash
for i in a b; do repcodec info "$i c"; done  # twice
cat speech.wav | python train.py \\
  'data.root={a: 1}'
srun --kill-on-bad-exit python train.py
```
"""
    (tmp_path / "page.md").write_text(text)
    monkeypatch.setitem(DOCUMENTS, "page", tmp_path / "page.md")
    assert commands("page", tmp_path / "one") == [
        ["repcodec", "info", "a c"], ["repcodec", "info", "b c"], ["python", "train.py", "data.root={a: 1}"],
        ["python", "train.py"], ["make", "lint"],
    ]  # fmt: skip
    (tmp_path / "page.md").write_text("```bash\nrepcodex info\n```\n")
    with pytest.raises(AssertionError, match="repcodex"):
        commands("page", tmp_path / "two")


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("repcodec tokenise outputs/demo/codec speech.wav", "SystemExit: 2"),
        ("repcodec info no/such/codec", "AssertionError: .*no/such/codec"),
        ("pytest tests/test_no_such.py", "AssertionError"),
        ("make no-such-target", "AssertionError: .*No rule to make target 'no-such-target'"),
        ("pip install 'repcodec[no_such_extra]'", "AssertionError"),
        ("python train.py data.no_such_key=1", "ConfigCompositionException: .*data.no_such_key"),
        ("python train.py quantizer=no_such_quantizer", "MissingConfigException: .*no_such_quantizer"),
        ("python train.py +trainer.no_such_option=1", "TypeError: .*no_such_option"),
        ("python train.py quantizer=ema,fsq", "AssertionError: a sweep needs -m"),
        ("python benchmarks/data.py --no-such-option", "AssertionError: .*--no-such-option"),
        ("python elsewhere.py", "Failed: no way to try python elsewhere.py"),
    ],
)
def test_a_wrong_command_does_not_pass(command, reason, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "speech.wav").touch()
    with pytest.raises((Exception, SystemExit, pytest.fail.Exception)) as caught:
        try_command(shlex.split(command), monkeypatch)
    assert re.match(reason, f"{caught.type.__name__}: {caught.value}", re.S)


def test_python_of_the_guides_runs(checkout):
    """That of the README and of tokenizing.md runs in test_readme.py, with a real encoder's features."""
    found = {name: blocks(path.read_text(encoding="utf-8"), "python") for name, path in DOCUMENTS.items()}
    assert {name for name in found if found[name]} == {"README.md", "docs/tokenizing.md", "docs/migration.md"}
    for code in found["docs/migration.md"]:
        exec(code, {})
    assert RepCodec.from_pretrained("codecs/hubert_base_l9").about["encoder"] == "hubert_base"


def anchors(path):
    """The headings of a page as GitHub and the site link to them."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.S | re.M)
    titles = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_link_leads_somewhere(document):
    path = DOCUMENTS[document]
    text = re.sub(r"^```bash.*?^```|`[^`\n]*`", "", path.read_text(encoding="utf-8"), flags=re.S | re.M)
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"^```\{(?:image|include)\} (\S+)", text, re.M)
    for link in links:
        if not link.startswith("https://"):
            name, _, anchor = link.partition("#")
            target = path.parent / name if name else path
            assert target.is_file(), link
            assert not anchor or anchor in anchors(target), link


def test_reference_holds_every_file_and_command_once():
    pages = {path.stem: path.read_text(encoding="utf-8") for path in ROOT.glob("docs/api/*.md")}
    listed = re.findall(r"automodule:: repcodec\.(\w+)", "\n".join(pages.values()))
    assert sorted(listed) == FILES
    layers = ("formats", "networks", "lightning", "jobs", "entries")
    for page, names in zip(layers, LAYERS, strict=True):
        assert set(re.findall(r"automodule:: repcodec\.(\w+)", pages[page])) == names
    with pytest.raises(SystemExit), redirect_stdout(io.StringIO()) as said:
        main(["--help"])
    known = re.findall(r"^    (\w+) ", said.getvalue(), re.M)
    assert re.findall(r"^```\{command-help\} (\w+)", DOCUMENTS["docs/commands.md"].read_text(), re.M) == known


def test_architecture_names_every_file_in_its_layer():
    table = DOCUMENTS["docs/architecture.md"].read_text(encoding="utf-8")
    for page, names in zip(("formats", "networks", "lightning", "jobs", "entries"), LAYERS, strict=True):
        rows = re.findall(rf"^\| \[\w+\]\(api/{page}\.md\).*\| (.*) \|$", table, re.M)
        assert set(re.findall(r"`(\w+)`", " ".join(rows))) == names
