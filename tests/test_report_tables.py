import statistics

import numpy as np
import pytest

from repcodec.report_tables import families, interval, leaders, preferred, tables
from repcodec.results import Result, Row

NAN = float("nan")


def result(name, codebooks=1, size=64, phones=5, **figures):
    """A tokenizer's result, with made-up counts; figures that are not given are those of a real one."""
    rng = np.random.default_rng(len(name) + size)
    joint = rng.integers(0, 9, (phones, size)) * (rng.random((phones, size)) < 0.3)
    joint[0, 0] = 5
    usage = np.stack([rng.permutation(joint.sum(0)) for _ in range(codebooks)])
    values = {"normalized_error": 0.5, "perplexity": 30.5, "used_share": 0.75, "bits_per_second": 50.0 * codebooks *
              np.log2(size), "codes_per_second": 50.0 * codebooks, "pnmi": 0.6}  # fmt: skip
    return Result(Row(name, codebooks, size, **{**values, **figures}), usage, joint)


def features(**figures):
    return Result(Row("features", **figures), np.zeros((0, 0), np.int64))


def cells(results, table, field):
    found = next(each for each in tables(results) if each.title == table)
    place = [column.name for column in found.columns].index(field)
    return [line[place] for line in found.cells]


def test_best_of_each_column_is_marked():
    results = [result("one", normalized_error=0.5, pnmi=0.6), result("two", normalized_error=0.4, pnmi=0.5)]
    errors = cells(results, "Overview", "normalized_error")
    assert [(cell.text, cell.mark) for cell in errors] == [("0.500", ""), ("0.400", "best")]
    assert [cell.mark for cell in cells(results, "Phones", "pnmi")] == ["best", ""]
    assert [cell.mark for cell in cells(results, "Overview", "perplexity")] == ["", ""], "more is not better"


def test_what_is_written_alike_is_as_good_and_none_is_best_of_equals():
    alike = [result("a", pnmi=0.6001), result("b", pnmi=0.6004), result("c", pnmi=0.5)]
    assert [cell.mark for cell in cells(alike, "Overview", "pnmi")] == ["best", "best", ""]
    assert [cell.mark for cell in cells(alike[:2], "Overview", "pnmi")] == ["", ""]
    assert [cell.mark for cell in cells(alike[:1], "Overview", "pnmi")] == [""]


def test_best_at_a_rate_is_marked_where_it_is_not_the_best_of_all():
    results = [
        result("k-means 64", normalized_error=0.6), result("RepCodec 64", normalized_error=0.5),
        result("RepCodec 2 x 64", 2, normalized_error=0.3), result("RepCodec 128", size=128, normalized_error=0.45),
    ]  # fmt: skip
    assert [cell.mark for cell in cells(results, "Overview", "normalized_error")] == ["", "rate", "best", ""]


def test_features_are_never_the_best():
    results = [result("a", phone_error_rate=0.4), features(phone_error_rate=0.1), result("b", phone_error_rate=0.3)]
    shown = cells(results, "Recognition", "phone_error_rate")
    assert [(cell.text, cell.mark) for cell in shown] == [("40.0%", ""), ("10.0%", ""), ("30.0%", "best")]
    assert [(text, row.name) for _, text, row in leaders(results) if "error rate" in _] == [("30.0%", "b")]


def test_only_measured_columns_are_shown_and_nan_is_not_measured():
    results = [result("a", pnmi=NAN), result("b", pnmi=None, normalized_error=float("inf"))]
    shown = {table.title: [column.name for column in table.columns] for table in tables(results)}
    assert shown["Reconstruction"] == ["normalized_error"]
    assert not {"Phones", "ABX", "Recognition", "Robustness"} & set(shown)
    assert [cell.text for cell in cells(results, "Overview", "normalized_error")] == ["0.500", "–"]
    assert tables([features()])[0].cells == [[]], "nothing at all"


def test_robustness_has_a_column_an_augmentation():
    results = [
        result("a", unit_edit_distance={"noise": 0.4, "gain": 0.1}),
        result("b", unit_edit_distance={"noise": 0.3, "speed": NAN}), result("c", unit_edit_distance={}),
    ]  # fmt: skip
    assert [c.text for c in cells(results, "Robustness", "unit_edit_distance_noise")] == ["0.400", "0.300", "–"]
    assert [c.text for c in cells(results, "Robustness", "unit_edit_distance_gain")] == ["0.100", "–", "–"]
    assert [c.heading for c in tables(results)[-1].columns] == ["noise", "gain"]
    assert "Robustness" not in [table.title for table in tables(results[2:])]


def test_intervals_stand_beside_the_figures_and_seeds_give_a_deviation():
    rates = [0.2, 0.23, 0.22]
    row = result("a", phone_error_rate=sum(rates) / 3, phone_error_rates=rates).row
    mean, deviation = statistics.mean(rates), statistics.stdev(rates)
    assert interval(row, "phone_error_rate") == pytest.approx((mean - deviation, mean + deviation))
    one = result("b", phone_error_rates=[0.3], phone_error_rate=0.3)
    bounded = result("c", intervals={"pnmi": (0.55, 0.651), "used_share": (0.7, 0.8), "normalized_error": (NAN, 1.0)})
    results = [Result(row, one.usage), one, bounded]
    assert [cell.bounds for cell in cells(results, "Overview", "phone_error_rate")] == ["± 1.5%", "", ""]
    assert cells(results, "Overview", "pnmi")[2].bounds == "0.550–0.651"
    assert cells(results, "Overview", "used_share")[2].bounds == "70.0–80.0%"
    assert cells(results, "Overview", "normalized_error")[2].bounds == ""


def test_families_are_the_kinds_of_tokenizers():
    names = ["k-means 64", "RepCodec 64, runs/1024/codec", "k-means 128", "RepCodec 2 x 64", "their.tokens"]
    shapes = [(1, 64), (1, 64), (1, 128), (2, 64), (1, 64)]
    found = families([*(result(name, *shape) for name, shape in zip(names, shapes, strict=True)), features()])
    assert [(kind.name, kind.number, [size for size, _ in kind.members]) for kind in found] == [
        ("k-means", 0, ["64", "128"]),
        ("RepCodec", 1, ["64"]),
        ("RepCodec residual", 2, ["2 × 64"]),
        ("their.tokens", 3, ["64"]),
    ]
    assert len({kind.color for kind in found}) == 4
    assert len(set(found[0].shades())) == 2


def test_two_of_the_same_size_are_told_apart_by_their_names():
    found = families([result("RepCodec 64, a"), result("RepCodec 64, b"), result("k-means 64")])
    assert [kind.name for kind in found] == ["RepCodec 64, a", "RepCodec 64, b", "k-means"]


def test_preferred_of_a_family_says_most_about_phones():
    results = [result("k-means 64", pnmi=0.7), result("k-means 128", size=128, pnmi=0.6), result("RepCodec 64")]
    assert [each.row.name for each in preferred(families(results))] == ["k-means 64", "RepCodec 64"]
    unmeasured = [result("k-means 64", pnmi=None), result("k-means 128", size=128, pnmi=None)]
    assert [each.row.name for each in preferred(families(unmeasured))] == ["k-means 128"]
