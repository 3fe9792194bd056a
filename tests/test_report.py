import csv
import json
import re

import numpy as np
import pytest
from PIL import Image

from repcodec.errors import RepCodecError
from repcodec.evaluation import Result, Row
from repcodec.labels import PhoneLabels
from repcodec.report import print_table, read_curve, table, write_report

LABELS = PhoneLabels({"u": [(0, 1, "a"), (1, 2, "<b>"), (2, 3, "c")]})


def result(name, error=0.5, pnmi=0.6, joint=True):
    values = {"perplexity": 30.5, "used_share": 0.75, "corpus_used_share": 0.9, "bits_per_second": 300.0,
              "entropy_bits_per_second": 250.0, "codes_per_second": 50.0, "phone_purity": pnmi,
              "valid_normalized_error": error + 0.1, "num_codebooks": 1, "codebook_size": 64}  # fmt: skip
    counts = np.random.default_rng(0).integers(0, 9, (3, 64))
    return Result(
        Row(name=name, normalized_error=error, pnmi=pnmi, **values), counts.sum(0)[None], counts if joint else None
    )


def test_best_of_each_column_is_marked():
    rows = table([result("one", 0.5, 0.6), result("two", 0.4, 0.5)])
    assert [cells[0] for cells in rows] == [("one", False), ("two", False)]
    assert (rows[0][1], rows[1][1]) == (("0.500", False), ("0.400", True))
    assert (rows[0][2], rows[1][2]) == (("0.600", True), ("0.500", False))


def test_missing_figures_are_a_dash(capsys):
    rows = table([result("one", pnmi=None, joint=False)])
    assert rows[0][2] == ("–", False)
    print_table([result("one")], "title")
    assert "0.500" in capsys.readouterr().out


def test_report_is_whole_and_needs_nothing_else(tmp_path):
    results = [result("<script>alert(1)</script>"), result("k-means 64", 0.45)]
    write_report(tmp_path, results, {"features": "a & b"}, LABELS, [(0, 0.9), (50, 0.7)])
    names = {path.name for path in tmp_path.iterdir()}
    images = {"comparison.png", "curve.png", "usage.png", "phones_0.png", "phones_1.png"}
    assert names == {"results.json", "results.csv", "report.html"} | images
    for name in images:
        with Image.open(tmp_path / name) as image:
            assert image.width > 400
            assert len(set(image.convert("L").resize((64, 64)).tobytes())) > 10, "not a blank picture"
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "a &amp; b" in page
    assert page.count("data:image/png;base64,") == 5
    sources = re.findall(r"(?:src|href)=\"([^\"]*)\"", page)
    assert all(source.startswith("data:") for source in sources)
    assert not re.search(r"https?://", page)


def test_json_and_csv_hold_the_figures(tmp_path):
    write_report(tmp_path, [result("one", joint=False)], {"features": "f"}, None, [])
    row = json.loads((tmp_path / "results.json").read_text())["rows"][0]
    assert (row["name"], row["normalized_error"], row["used_share"], row["pnmi"]) == ("one", 0.5, 0.75, 0.6)
    with open(tmp_path / "results.csv", newline="") as file:
        assert next(csv.DictReader(file))["perplexity"] == "30.5"


def test_curve_is_read_from_every_version_of_the_logs(tmp_path):
    for version, rows in enumerate(["0,0.9,\n49,,3\n49,0.8,\n", "99,0.7,\n"]):
        (tmp_path / f"version_{version}").mkdir()
        text = "step,valid/normalized_error,train/loss\n" + rows
        (tmp_path / f"version_{version}" / "metrics.csv").write_text(text)
    assert read_curve(tmp_path) == [(0, 0.9), (49, 0.8), (99, 0.7)]
    assert read_curve(tmp_path / "nothing") == []


def test_unwritable_folder_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RepCodecError, match="could not be written"):
        write_report(tmp_path / "file", [result("one")], {}, None, [])
