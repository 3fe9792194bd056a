import io

import numpy as np
import pytest
from PIL import Image

from repcodec.figures import codebook_figure, curves_figure, png, usage_figure


def colors(figure):
    """Draw a figure; return how many colours it has."""
    image = Image.open(io.BytesIO(png(figure))).convert("RGB")
    assert min(image.size) > 300
    return len(image.getcolors(2**24))


def legend(figure):
    return [text.get_text() for text in figure.axes[0].get_legend().get_texts()]


def test_usage_shows_every_codebook_sorted_and_says_how_many_codes_are_used():
    counts = np.array([[0, 8, 2, 90], [25, 25, 25, 25]])
    figure = usage_figure(counts, 3000)
    assert colors(figure) > 10
    steps = [line.get_ydata().tolist() for line in figure.axes[0].lines[:2]]
    assert steps == [[0.9, 0.08, 0.02], [0.25] * 4]
    title = figure.get_suptitle()
    assert "step 3,000" in title
    assert "87.5% used" in title
    entropy = -(0.9 * np.log(0.9) + 0.08 * np.log(0.08) + 0.02 * np.log(0.02))
    assert f"perplexity {(np.exp(entropy) + 4) / 2:.0f}" in title


def test_codebook_lies_over_its_vectors_and_unused_codes_are_told_apart():
    rng = np.random.default_rng(0)
    vectors = np.concatenate([rng.normal(center, 1, (50, 8)) for center in (-20, 20)]).astype(np.float32)
    codes = np.stack([vectors[:50].mean(0), vectors[50:].mean(0), vectors[0], np.full(8, 1e4)])
    figure = codebook_figure(vectors, codes, np.array([50, 50, 0, 0]), 7)
    assert colors(figure) > 100
    frames, used, unused = (np.asarray(drawn.get_offsets()) for drawn in figure.axes[0].collections)
    assert (len(frames), len(used), len(unused)) == (100, 2, 2)
    for code in used:  # each in the middle of its own fifty
        near = frames[np.abs(frames - code).max(1) < 10]
        assert len(near) == 50
        np.testing.assert_allclose(near.mean(0), code, atol=1e-3)
    assert legend(figure) == ["100 vectors", "2 codes in use", "2 codes without a frame, 1 of them outside"]
    assert figure.axes[0].get_xlim()[1] < 100, "a dead code far off does not squeeze the rest"


def test_equal_vectors_and_a_single_code_are_drawn():
    figure = codebook_figure(np.ones((5, 4), np.float32), np.ones((1, 4), np.float32), np.array([5]), 0)
    assert colors(figure) > 10


@pytest.mark.parametrize("vectors", [np.full((9, 4), np.nan), np.ones((2, 4)), np.ones((9, 1))])
def test_no_picture_where_there_is_no_plane(vectors):
    assert codebook_figure(vectors, vectors, np.ones(len(vectors)), 0) is None


def test_curves_show_what_there_is():
    rows = [{"step": 0, "valid/normalized_error": 0.9}]
    assert colors(curves_figure(rows)) > 10
    rows += [{"step": s, "valid/normalized_error": 1 / s, "train/loss": 0.0, "train/perplexity": s} for s in (5, 10)]
    figure = curves_figure(rows)
    drawn = {axes.get_title(): [line.get_xydata().tolist() for line in axes.lines] for axes in figure.axes}
    assert drawn["normalized error"] == [[[0, 0.9], [5, 0.2], [10, 0.1]]]
    assert drawn["perplexity"] == [[[5, 5], [10, 10]]]
    assert drawn["gradient norm, before clipping"] == []
    assert colors(figure) > 10


def test_a_notebook_keeps_its_backend():
    import subprocess
    import sys

    code = (
        "import sys, numpy as np\n"
        "from repcodec.figures import png, usage_figure\n"
        "assert 'matplotlib' not in sys.modules\n"
        "png(usage_figure(np.ones((1, 4)), 0))\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
