import itertools

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from test_report_tables import features, result

from repcodec.report_rates import names_figure, points_of, rate_figure
from repcodec.report_tables import families


def eleven():
    """The tokenizers of `make compare`, whose figures lie close together, and the features."""
    sizes = (100, 500, 1024, 2048)
    errors = {"k-means": (0.65, 0.57, 0.55, 0.53), "RepCodec": (0.62, 0.46, 0.39, 0.36)}
    found = []
    for kind, values in errors.items():
        for size, error in zip(sizes, values, strict=True):
            rate = 0.078 + 0.002 * (size == 2048) * (-1) ** (kind == "RepCodec")
            found.append(
                result(
                    f"{kind} {size}", 1, size, normalized_error=error, pnmi=1 - error + 0.1, abx_across=rate,
                    valid_normalized_error=error, intervals={"abx_across": (rate - 0.007, rate + 0.01)},
                )
            )  # fmt: skip
    found += [result(f"RepCodec {k} x 1024", k, 1024, normalized_error=0.6 / k, abx_across=0.07) for k in (2, 4)]
    for each in found[4:]:
        each.curve = [(step, each.row.normalized_error + 1 / (step + 5)) for step in range(0, 500, 50)]
    return [*found, features(abx_across=0.042)]


def check_names(figure, number):
    """Draw a figure: the names in its axes lie within it, and none covers another."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert len(boxes) == number
    width, height = canvas.get_width_height()
    assert all(box.x0 >= 0 and box.x1 <= width and box.y0 >= 0 and box.y1 <= height for box in boxes)
    inner = [box.shrunk(0.9, 0.9) for box in boxes]
    assert not any(one.overlaps(other) for one, other in itertools.combinations(inner, 2))


def test_rate_plot_shows_each_figure_and_interval_at_its_rate():
    results = eleven()
    figure = rate_figure(families(results), results[-1].row, "abx_across")
    axes = figure.axes[0]
    lines = {line.get_label(): line.get_xydata() for line in axes.lines if not line.get_label().startswith("_")}
    assert list(lines) == ["k-means", "RepCodec", "RepCodec residual"]
    rows = [each.row for each in results[4:8]]
    assert lines["RepCodec"].tolist() == [[row.bits_per_second, row.abx_across] for row in rows]
    bars = {tuple(map(tuple, line.get_xydata().tolist())) for line in axes.lines}
    low, high = rows[0].intervals["abx_across"]
    assert ((rows[0].bits_per_second, low), (rows[0].bits_per_second, high)) in bars
    (ceiling,) = [line for line in axes.lines if line.get_linestyle() == "--"]
    assert set(ceiling.get_ydata()) == {0.042}
    assert axes.get_xscale() == "log"


@pytest.mark.parametrize("field", ["normalized_error", "pnmi", "abx_across"])
def test_names_of_eleven_tokenizers_cover_neither_one_another_nor_the_edge(field):
    check_names(rate_figure(families(eleven()), None, field), 10)


def test_names_plot_has_a_row_a_tokenizer_with_its_interval():
    results = [
        result("k-means 64", abx_across=0.08, intervals={"abx_across": (0.07, 0.1)}),
        result("RepCodec 64, outputs/some/long/folder/codec", abx_across=0.06), features(abx_across=0.04),
    ]  # fmt: skip
    figure = names_figure(families(results), results[-1].row, "abx_across")
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["k-means 64", "RepCodec 64…folder/codec"]
    lines = [line.get_xydata().tolist() for line in axes.lines]
    assert lines == [[[0.07, 0], [0.1, 0]], [[0.08, 0]], [[0.06, 1]], [[0.04, 0], [0.04, 1]]]
    assert [text.get_text() for text in axes.texts] == ["8.0%", "6.0%", "features"]
    check_names(figure, 3)
    assert min(label.get_window_extent().x0 for label in axes.get_yticklabels()) >= 0


def test_what_has_no_rate_or_no_figure_is_no_point():
    results = [
        result("k-means 128", size=128, pnmi=0.7), result("k-means 64", pnmi=0.6),
        result("k-means 32", size=32, pnmi=float("nan")), result("k-means 16", size=16, bits_per_second=None),
    ]  # fmt: skip
    (kind,) = families(results)
    assert points_of(kind, "pnmi") == [(300.0, 0.6, "64", None), (350.0, 0.7, "128", None)]


@pytest.mark.parametrize("number", [1, 12])
def test_any_number_of_families_with_long_names(number):
    results = [result(f"RepCodec 64, outputs/{'x' * 60}/{i}", bits_per_second=300.0) for i in range(number)]
    results += [result(f"their-{'y' * 60}.tokens", bits_per_second=500.0 + i) for i in range(number)]
    figure = rate_figure(families(results), None, "pnmi")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    legend, axes = figure.legends[0].get_window_extent(), figure.axes[0].get_window_extent()
    assert legend.y0 >= axes.y1 and legend.x1 <= canvas.get_width_height()[0]
    assert len(figure.legends[0].get_texts()) == len(families(results))
