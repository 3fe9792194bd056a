"""Whole comparisons: kept results, several processes, and everything that is measured, on small real data."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import joblib
import numpy as np
import pytest
import torch
from conftest import DIM, refused
from hydra import compose, initialize_config_dir
from sklearn.cluster import KMeans

from repcodec.codec import RepCodec
from repcodec.comparison import Comparison, Plan
from repcodec.data import ShardsDataModule
from repcodec.demo_corpus import SPLITS
from repcodec.evaluation import Evaluation, Measures
from repcodec.extraction import extract
from repcodec.kmeans import KMeansTokenizer
from repcodec.labels import PhoneLabels
from repcodec.manifest import Manifest
from repcodec.report_tables import tables
from repcodec.shards import FeatureShards
from repcodec.speech_encoders import encoder_table, load_speech_encoder
from repcodec.tokens_evaluation import TokensFacts

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))


@pytest.fixture
def labels(splits):
    path = splits / "phones.tsv"
    rows = ["utt\tstart_s\tend_s\tphone"]
    for utterance in range(8):
        rows += [f"utt{utterance}\t{t / 20}\t{(t + 1) / 20}\t{'abc'[(t + utterance) % 3]}" for t in range(10)]
    path.write_text("\n".join(rows) + "\n")
    return path


def plan(splits, tmp_path, labels=None, **options):
    data = ShardsDataModule(dim=DIM, encoder="hubert_base", layer=9, dir=str(splits), labels=labels and str(labels))
    usual = Plan(
        run_dir=tmp_path / "run", data=data, split="test", measures=Measures(), robustness=False, tokenizers=[],
        kmeans=[5], tokens=[], facts=TokensFacts(), labels=data.phone_labels, allow_pickle=False,
        device=torch.device("cpu"),
    )  # fmt: skip
    return replace(usual, **options)


def saved(tmp_path, size=8, seed=0):
    torch.manual_seed(seed)
    folder = tmp_path / f"codec-{size}-{seed}"
    RepCodec(DIM, codebook_size=size).save_pretrained(folder)
    return str(folder)


def test_what_was_measured_is_not_measured_again(splits, tmp_path, labels, monkeypatch, capsys):
    one = plan(splits, tmp_path, labels, tokenizers=[saved(tmp_path)], measures=Measures(corpus=True, abx=True))
    first = Comparison(one).run()
    for method in ("measure", "measure_features"):
        monkeypatch.setattr(f"repcodec.evaluation.Evaluation.{method}", lambda *_: pytest.fail("measured again"))
    again = Comparison(one).run()
    assert [result.row for result in again] == [result.row for result in first]
    assert [result.row.name for result in first] == ["RepCodec 8", "k-means 5", "features"]
    for before, after in zip(first[:2], again, strict=False):
        np.testing.assert_array_equal(before.usage, after.usage)
        np.testing.assert_array_equal(before.joint, after.joint)
    assert again[2].joint is None
    assert capsys.readouterr().out.count("measured before") == 3


@pytest.mark.parametrize("change", ["weights", "labels", "times", "measures", "split", "damage", "features"])
def test_what_was_measured_of_something_else_is_measured_anew(splits, tmp_path, labels, change):
    one = plan(splits, tmp_path, labels, tokenizers=[saved(tmp_path)], kmeans=[])
    (first,) = Comparison(one).run()
    if change == "weights":
        RepCodec(DIM, codebook_size=8).save_pretrained(one.tokenizers[0])
    elif change == "labels":
        labels.write_text(labels.read_text().replace("\ta\n", "\tb\n"))
        one = plan(splits, tmp_path, labels, tokenizers=one.tokenizers, kmeans=[])
    elif change == "times":  # the same phones and utterances
        labels.write_text(labels.read_text().replace("\t0.05\t", "\t0.06\t"))
        one = plan(splits, tmp_path, labels, tokenizers=one.tokenizers, kmeans=[])
    elif change == "measures":
        one = replace(one, measures=Measures(corpus=True))
    elif change == "split":
        one = replace(one, split="valid")
    elif change == "features":
        for path in (splits / "test").glob("*.npy"):
            rows = np.load(path)
            np.save(path, rows[::-1])
        one = plan(splits, tmp_path, labels, tokenizers=one.tokenizers, kmeans=[])
    else:
        (kept,) = (tmp_path / "run" / "measured").glob("*.npz")
        kept.write_bytes(kept.read_bytes()[:50])
    (again,) = Comparison(one).run()
    assert (again.row == first.row) == (change == "damage")


def test_kmeans_of_scikit_learn_only_when_that_is_allowed(splits, tmp_path):
    rng = np.random.default_rng(0)
    joblib.dump(KMeans(6, n_init=1, random_state=0).fit(rng.normal(size=(50, DIM))), tmp_path / "km.bin")
    one = plan(splits, tmp_path, tokenizers=[str(tmp_path / "km.bin")], kmeans=[])
    with refused(tmp_path / "km.bin", "is a pickle", "allow_pickle=true"):
        Comparison(one)
    (result,) = Comparison(replace(one, allow_pickle=True)).run()
    assert (result.row.name, result.row.codebook_size) == ("k-means 6", 6)
    joblib.dump({"no": "model"}, tmp_path / "km.bin")
    with refused(tmp_path / "km.bin", "not a k-means model"):
        Comparison(replace(one, allow_pickle=True))


def test_hostile_pickle_runs_nothing(splits, tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    joblib.dump(Trap(), tmp_path / "km.bin")
    with refused("is a pickle"):
        Comparison(plan(splits, tmp_path, tokenizers=[str(tmp_path / "km.bin")], kmeans=[]))
    assert not (tmp_path / "sprung").exists()


def test_tokens_files_alone_need_no_features(tmp_path, splits, labels):
    (tmp_path / "a.tokens").write_text("/audio\nutt0.wav\t1 2 2 0\nutt1.wav\t0 1\n")
    known = PhoneLabels.read(labels)
    one = replace(
        plan(splits, tmp_path), kmeans=[], tokens=[str(tmp_path / "a.tokens")], data=None, labels=known
    )  # fmt: skip
    comparison = Comparison(one)
    (result,) = comparison.run()
    assert (result.row.name, result.row.codebook_size) == ("a.tokens", 3)
    assert result.row.pnmi is not None
    examples = comparison.examples([result])
    assert [example.utterance for example in examples] == ["utt0", "utt1"]
    assert examples[0].codes["a.tokens"][0].tolist() == [1, 2, 2, 0]
    assert examples[0].phones[0] == (0.0, 0.05, "a")
    assert comparison.facts() == {"tokens": str(tmp_path / "a.tokens"), "labels": str(labels)}


def test_nothing_to_compare_and_a_missing_file(splits, tmp_path):
    with refused("name at least one tokenizer"):
        Comparison(plan(splits, tmp_path, kmeans=[]))
    with refused(tmp_path / "none", "no such tokens file"):
        Comparison(plan(splits, tmp_path, tokens=[str(tmp_path / "none")]))
    with refused(tmp_path / "none.tsv"):
        Comparison(plan(splits, tmp_path, facts=TokensFacts(tmp_path / "none.tsv")))


def test_a_kmeans_model_of_the_users_own_is_measured_beside_the_baseline_of_its_size(splits, tmp_path):
    torch.manual_seed(0)
    mine = KMeansTokenizer(30 + torch.randn(5, DIM))  # far from all features: worse than whatever fits the baseline
    mine.save_pretrained(tmp_path / "mine")
    place = str(tmp_path / "mine")
    found = Comparison(plan(splits, tmp_path, tokenizers=[place, place])).run()
    assert [result.row.name for result in found] == [f"k-means 5, {place}", "k-means 5"]
    assert found[0].row.normalized_error > found[1].row.normalized_error


def test_curves_stay_with_the_tokenizers_they_are_of(splits, tmp_path):
    places = []
    for size in (4, 8):
        run = tmp_path / f"run-{size}"
        torch.manual_seed(0)
        RepCodec(DIM, codebook_size=size).save_pretrained(run / "codec")
        (run / "validations.csv").write_text(f"step,valid/normalized_error\n0,{size / 10}\n")
        places.append(str(run / "codec"))
    found = Comparison(plan(splits, tmp_path, tokenizers=[places[0], *places])).run()
    curves = {result.row.name: result.curve for result in found}
    assert curves == {"RepCodec 4": [(0, 0.4)], "RepCodec 8": [(0, 0.8)], "k-means 5": []}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("kmeans=many", "kmeans=many: expected numbers of codes"),
        ("kmeans=[8,-1]", "kmeans=-1: expected numbers of codes"),
        ("tokenizers=nothing", "nothing/config.json"),
        ("tokens=none.tokens", "none.tokens: no such tokens file"),
        ("labels=none.tsv", "none.tsv: no such label file or folder"),
        ("data.labels=none", "none: no such label file or folder"),
        ("layer=9.5", "layer=9.5: hubert_base has layers 1 to 12"),
        ("tokenizers=5", "5/config.json"),
        ("codebook_size=8.5", "codebook_size=8.5: expected a whole number above 0"),
        ("codes_per_second=-50", "codes_per_second=-50: expected a number above 0"),
        ("codes_per_second=fifty", "codes_per_second=fifty: expected a number above 0"),
    ],
)
def test_a_value_of_another_kind_is_one_sentence(splits, tmp_path, override, message):
    with refused(message):
        evaluate_here(splits, tmp_path / "run", *(["tokenizers=[]"] if "tokenizers" not in override else []), override)


def test_one_value_alone_is_a_list_of_it(splits, tmp_path):
    place = saved(tmp_path)
    rows = evaluate_here(splits, tmp_path / "run", f"tokenizers={place}", "kmeans=4")
    assert [row["name"] for row in rows] == ["RepCodec 8", "k-means 4"]


def test_the_probe_reads_as_much_as_it_can_train_on(splits, tmp_path, labels, monkeypatch):
    monkeypatch.setattr("repcodec.evaluation.STEPS", 1)
    monkeypatch.setattr("repcodec.evaluation.BATCH_FRAMES", 100)
    chosen = []
    for seed in (0, 0, 1):
        data = ShardsDataModule(
            dim=DIM, encoder="hubert_base", layer=9, dir=str(splits), labels=str(labels), seed=seed
        )  # fmt: skip
        monkeypatch.setattr("repcodec.evaluation.check_held_out", lambda *_: None)
        evaluation = Evaluation(data, "test", Measures(probe=True))
        chosen.append(evaluation._probe_numbers)
        lengths = evaluation._probe_train[0].lengths
        assert 0 < lengths[list(chosen[-1])].sum() <= 100 < lengths.sum()
    assert chosen[0] == chosen[1] != chosen[2]


def test_the_table_says_what_abx_compared(splits, tmp_path, labels):
    results = Comparison(plan(splits, tmp_path, labels, measures=Measures(abx=True))).run()
    kinds = {(result.row.abx_kind, result.row.abx_items) for result in results}
    ((kind, items),) = kinds
    (table,) = [table for table in tables(results) if table.title == "ABX"]
    assert kind in ("phone", "triphone") and items > 0
    assert f"Compared are {items} {kind}s." in table.about
    results[0].row.abx_kind, results[0].row.abx_items = "triphone", 7
    (table,) = [table for table in tables(results) if table.title == "ABX"]
    assert f"7 triphones of k-means 5, {items} {kind}s of features" in table.about


def test_abx_and_probe_need_labels(splits, tmp_path):
    with refused("need phone labels"):
        Comparison(plan(splits, tmp_path, measures=Measures(abx=True)))


def evaluate_here(splits, run_dir, *overrides):
    """Run evaluate.py's own function on small shards; return the rows of its results."""
    return evaluated(run_dir, "encoder.dim=8", f"data.dir='{splits}'", *overrides)


def evaluated(run_dir, *overrides):
    """Run evaluate.py's own function on the shipped configuration; return the rows of its results."""
    from evaluate import compare

    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("evaluate", [f"run_dir='{run_dir}'", *overrides])
    compare(config)
    return json.loads((run_dir / "results.json").read_text())["rows"]


def two_processes(splits, run_dir, *overrides):
    """Run evaluate.py by torchrun; return the rows of its results, and what it printed."""
    script = [str(ROOT / "evaluate.py"), "encoder.dim=8", f"data.dir='{splits}'", f"run_dir='{run_dir}'", *overrides]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*torchrun, *script], capture_output=True, text=True, timeout=900, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    return json.loads((run_dir / "results.json").read_text())["rows"], done.stdout


def test_two_processes_find_what_one_finds(splits, tmp_path, labels):
    (tmp_path / "a.tokens").write_text(
        "/audio\n" + "".join(f"utt{i}.wav\t{' '.join(map(str, range(i, 3 * i + 9)))}\n" for i in range(5))
    )
    overrides = [
        f"tokenizers=['{saved(tmp_path)}']", "kmeans=[5]", f"labels='{labels}'", f"tokens=['{tmp_path}/a.tokens']",
        "abx=true", "corpus=true", "speaker='spk|utt'", "codes_per_second=50",
    ]  # fmt: skip
    one = evaluate_here(splits, tmp_path / "one", *overrides)
    two, said = two_processes(splits, tmp_path / "two", *overrides)
    assert [row["name"] for row in one] == ["RepCodec 8", "k-means 5", "a.tokens", "features"]
    assert said.count("Written to") == 1
    for first, second in zip(one, two, strict=True):
        bounds, others = first.pop("intervals"), second.pop("intervals")
        assert first.keys() == second.keys()
        for field, value in first.items():
            assert value == (pytest.approx(second[field], rel=1e-9) if isinstance(value, float) else second[field])
        assert bounds.keys() == others.keys()
        for field in bounds:
            assert bounds[field] == pytest.approx(others[field], rel=1e-9)


def test_make_compare_compares_all(speech, whisper_folder, tmp_path):
    for name in ("train.py", "evaluate.py", "conf"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "whisper-tiny.en").symlink_to(whisper_folder)
    command = [
        "make", "-f", ROOT / "Makefile", "-o", f"{sys.prefix}/.installed", f"VENV={sys.prefix}", "compare", "RUN=few",
        f"AUDIO={speech / 'audio'}", f"LABELS={speech / 'phones.tsv'}", "SIZES=8,16", "CODEBOOKS=2", "STEPS=2",
        "OVERRIDES=codec=small logger=csv data.batch_size=2 ~callbacks.dashboard",
        "MEASURES=corpus=true abx=true",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    made = tmp_path / "outputs" / "few" / "compare"
    rows = {row["name"]: row for row in json.loads((made / "results.json").read_text())["rows"]}
    assert list(rows) == [
        "RepCodec 8", "RepCodec 16", "RepCodec 2 x 1024", "k-means 8", "k-means 16", "features"
    ]  # fmt: skip
    measured = {"normalized_error", "pnmi", "abx_within", "corpus_used_share"}
    for row in list(rows.values())[:-1]:
        assert not [name for name in measured if row[name] is None]
    report = (made / "report.html").read_text(encoding="utf-8")
    assert all(name in report for name in rows)


@pytest.fixture(scope="module")
def speech_features(speech, whisper_folder, tmp_path_factory):
    """A folder of the splits of Whisper tiny.en's features of real speech, and a codec of them."""
    folder = tmp_path_factory.mktemp("features")
    spec = encoder_table()["whisper_tiny_en"]
    encoder = load_speech_encoder(spec, 3, whisper_folder)
    for split in SPLITS:
        extract(Manifest.read(speech / f"{split}.tsv"), folder / split, spec, encoder, model=whisper_folder)
    torch.manual_seed(0)
    codec = RepCodec(384, codebook_size=32)
    codec.start_as_identity()
    frames = torch.from_numpy(FeatureShards(folder / "train").sample(2000))
    codec.quantizer.start(frames, seed=0)
    about = {"encoder": "whisper_tiny_en", "layer": 3, "frame_rate": 50, "encoder_model": str(whisper_folder)}
    codec.save_pretrained(folder / "codec", about)
    return folder


@pytest.mark.slow  # probes with three seeds each, twice
def test_two_processes_find_what_one_finds_on_speech(speech, speech_features, tmp_path):
    overrides = [
        "encoder=whisper_tiny_en", "layer=3", "encoder.dim=384", f"tokenizers=['{speech_features}/codec']",
        "kmeans=[]", f"labels='{speech}/phones.tsv'", "probe=true", "robustness=true", "wandb=tests",
    ]  # fmt: skip
    one = evaluate_here(speech_features, tmp_path / "one", *overrides)
    two, _ = two_processes(speech_features, tmp_path / "two", *overrides)
    assert [row["name"] for row in one] == ["RepCodec 32", "features"]
    for first, second in zip(one, two, strict=True):
        assert first["phone_error_rates"] == second["phone_error_rates"]
        assert first["unit_edit_distance"] == pytest.approx(second["unit_edit_distance"])
    for run in ("one", "two"):  # one table each, whoever logged
        (table,) = (tmp_path / run).rglob("evaluation_*.table.json")
        logged = json.loads(table.read_text())
        names = [dict(zip(logged["columns"], row, strict=True))["name"] for row in logged["data"]]
        assert names == [row["name"] for row in one]
