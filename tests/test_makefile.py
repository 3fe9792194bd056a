"""`make compare`, shrunk: the Makefile's own commands on a few sentences, codecs of two steps."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_make_compare_compares_all(speech, whisper_folder, tmp_path):
    for name in ("train.py", "evaluate.py", "conf"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "whisper-tiny.en").symlink_to(whisper_folder)
    command = [
        "make", "-f", ROOT / "Makefile", "-o", f"{sys.prefix}/.installed", f"VENV={sys.prefix}", "compare", "RUN=few",
        f"AUDIO={speech / 'audio'}", f"LABELS={speech / 'phones.tsv'}", "SIZES=8,16", "CODEBOOKS=2", "STEPS=2",
        "OVERRIDES=codec=small logger=csv data.batch_size=2 ~callbacks.dashboard",
        "MEASURES=corpus=true abx=true robustness=true",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    made = tmp_path / "outputs" / "few" / "compare"
    rows = {row["name"]: row for row in json.loads((made / "results.json").read_text())["rows"]}
    assert list(rows) == [
        "RepCodec 8", "RepCodec 16", "RepCodec 2 x 1024", "k-means 8", "k-means 16", "features"
    ]  # fmt: skip
    measured = {"normalized_error", "pnmi", "abx_within", "corpus_used_share", "unit_edit_distance"}
    for row in list(rows.values())[:-1]:
        assert not [name for name in measured if row[name] is None]
    report = (made / "report.html").read_text(encoding="utf-8")
    assert all(name in report for name in rows)
