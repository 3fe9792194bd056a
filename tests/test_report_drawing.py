import io
import itertools
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from PIL import Image

from repcodec.report_drawing import DARK, INK, draw_plot, new_figure, percent, shortened, side_labels, spread


def sample():
    """A figure with hostile names, and a picture in it."""
    figure, axes = new_figure(2.0, right=1.5)
    axes.plot([1, 2, 3], [0.1, 0.3, 0.2], label="a line")
    axes.imshow(np.eye(3), extent=(1, 2, 0.1, 0.2), aspect="auto", interpolation="none")
    axes.set_title("$x^ <b>")
    axes.yaxis.set_major_formatter(percent)
    return figure


def test_a_plot_is_a_picture_and_two_drawings_on_their_own():
    plot = draw_plot("sample", "title", "note", sample)
    with Image.open(io.BytesIO(plot.png)) as image:
        assert image.width == 828
        assert image.getpixel((2, image.height - 2))[:3] == (255, 255, 255)
        assert len(image.convert("RGB").getcolors(2**24)) > 50, "not blank"
    for svg in (plot.light, plot.dark):
        root = ElementTree.fromstring(svg)
        links = [value for element in root.iter() for name, value in element.attrib.items() if name.endswith("href")]
        assert any(link.startswith("data:image/png") for link in links)
        assert all(link.startswith(("#", "data:image/png")) for link in links)
        words = [element.text for element in root.iter() if element.tag.endswith("text")]
        assert "$x^ <b>" in words and "20%" in words, "text stays text"
    assert INK.encode() in plot.light
    assert not any(color.encode() in plot.dark for color in DARK)
    assert plot.light != plot.dark and len(plot.light) == len(plot.dark)


def test_a_plot_is_the_same_bytes_whatever_a_notebook_has_set():
    import matplotlib

    first = draw_plot("sample", "", "", sample)
    with matplotlib.rc_context({"font.size": 20, "figure.dpi": 72, "axes.facecolor": "black", "text.color": "red"}):
        second = draw_plot("sample", "", "", sample)
    assert first == second


@pytest.mark.parametrize("values", [[0.5, 0.5, 0.501, 0.9], [0.0, 0.0, 1.0, 1.0]])
def test_names_beside_lines_cover_nothing(values):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure, axes = new_figure(2.0, right=1.5)
    axes.set_ylim(0, 1)
    side_labels(axes, [(value, f"name {i}", "red") for i, value in enumerate(values)], None, 5)
    FigureCanvasAgg(figure).draw()
    boxes = [text.get_window_extent() for text in axes.texts]
    assert len(boxes) == 4
    assert not any(
        one.shrunk(1, 0.85).overlaps(other.shrunk(1, 0.85)) for one, other in itertools.combinations(boxes, 2)
    )
    order = sorted(range(4), key=lambda i: boxes[i].y0)
    assert [axes.texts[i].get_text() for i in order] == [f"name {i}" for i in np.argsort(values, kind="stable")]


def test_spread_moves_as_little_as_it_must():
    apart = np.array([0.0, 1.0, 2.0])
    assert spread(apart, 1.0).tolist() == apart.tolist()
    moved = spread(np.array([0.5, 0.5, 0.6, 3.0]), 0.5)
    assert (np.diff(moved) >= 0.5 - 1e-9).all()
    assert moved[3] == 3.0
    assert moved[:3].mean() == pytest.approx(np.mean([0.5, 0.5, 0.6]))
    assert spread(np.array([]), 1.0).tolist() == []


def test_long_names_keep_their_start_and_their_end():
    assert shortened("k-means 1024") == "k-means 1024"
    for most in (24, 40, 56):
        short = shortened("RepCodec 1024, outputs/a/very/long/path/to/a/run/seed0/codec", most)
        assert len(short) == most
        assert short.startswith("RepCodec 10") and short.endswith("/seed0/codec") and "…" in short


def test_shares_on_an_axis():
    assert [percent(value) for value in (0.003, 0.1, 0.2850, 1)] == ["0.3%", "10%", "28.5%", "100%"]
