"""What the report's plots have in common: size, colours for light and dark, names that cover nothing.

Drawn without a display and without pyplot.
"""

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from sklearn.isotonic import isotonic_regression

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKERS = "osD^vPXp"
"""Of the families, in their order."""

INK, MUTED, RULE = "#1c2632", "#5c6875", "#dde3ea"
DARK = {INK: "#e8edf2", MUTED: "#a3aeba", RULE: "#303a46"}
"""What the colours of text, axes and grid become in the dark."""

WIDTH = 4.6
"""Of every plot in inches: no wider than a phone, so that the labels stay readable there."""


@dataclass
class Plot:
    """A plot, drawn.

    Attributes:
        name: of its PNG file, without the ending.
        title: what it shows.
        note: how to read it.
        png: on white.
        light, dark: SVG.
        phones: whether it is of phones and codes.
        closed: whether the page shows it only when asked.
    """

    name: str
    title: str
    note: str
    png: bytes
    light: bytes
    dark: bytes
    phones: bool = False
    closed: bool = False


def draw_plot(name: str, title: str, note: str, draw: Callable[[], "Figure"]) -> Plot:
    """Draw a figure as PNG and as SVG for light and dark; the same bytes for the same figure."""
    from matplotlib.style import context

    settings: dict[Any, Any] = {
        "font.size": 8, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": MUTED, "xtick.color": MUTED,
        "ytick.color": MUTED, "axes.grid": True, "grid.color": RULE, "grid.linewidth": 0.6, "axes.linewidth": 0.7,
        "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False, "axes.facecolor": "none",
        "xtick.major.width": 0.7, "ytick.major.width": 0.7, "svg.fonttype": "none", "svg.hashsalt": name,
        "text.parse_math": False,
    }  # fmt: skip
    png, svg = io.BytesIO(), io.BytesIO()
    with context(["default", settings]):  # whatever a notebook has set
        figure = draw()
        figure.savefig(png, format="png", dpi=180, facecolor="white", metadata={"Software": None})
        figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    # Measured in matplotlib's own wide font, drawn in the page's.
    text = svg.getvalue().decode().replace("'DejaVu Sans'", "system-ui, 'DejaVu Sans'")
    dark = re.sub("|".join(DARK), lambda found: DARK[found[0]], text)
    return Plot(name, title, note, png.getvalue(), text.encode(), dark.encode())


def new_figure(
    height: float, top: float = 0.1, left: float = 0.7, right: float = 0.15, rows: int = 1, **options: Any
) -> tuple["Figure", Any]:
    """Return a figure of the width of all, and its axes, several as an array.

    The layout is fixed: to let matplotlib find one takes several times as long as drawing.

    Args:
        height: inches.
        top, left, right: room beside the axes, inches.
        rows: of axes.
        options: of `Figure.subplots`.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height))
    axes = figure.subplots(rows, **options)
    edges = (left / WIDTH, 0.42 / height, 1 - right / WIDTH, 1 - top / height)
    figure.subplots_adjust(*edges, hspace=0.28)
    return figure, axes


def percent(value: float, place: int | None = None) -> str:
    """Write a share on an axis."""
    return f"{100 * value:g}%"


def side_labels(axes: "Axes", ends: list[tuple[float, str, str]], x: float | None, offset: int) -> None:
    """Write names at the heights where lines end, moved so far that none covers another.

    Args:
        axes: with their limits as they will stay.
        ends: value, name and colour of each.
        x: where the lines end; None at the right edge.
        offset: points to the right; names left of the ends when negative.
    """
    ends = sorted(ends)
    heights = axes.transAxes.inverted().transform(axes.transData.transform([(1, value) for value, *_ in ends]))[:, 1]
    gap = 8.5 / (axes.get_window_extent().height * 72 / axes.figure.dpi)
    for (_, name, color), height in zip(ends, spread(heights, gap), strict=True):
        axes.annotate(
            name, (1 if x is None else x, height), xycoords=("axes fraction" if x is None else "data", "axes fraction"),
            xytext=(offset, 0), textcoords="offset points", fontsize=7, color=color, va="center",
            ha="left" if offset > 0 else "right",
        )  # fmt: skip


def shortened(name: str, most: int = 24) -> str:
    """Return a name of at most so many characters; of a long one the start, and the end, which tells folders apart."""
    return name if len(name) <= most else f"{name[: most // 2 - 1]}…{name[-most // 2 :]}"


def spread(places: npt.NDArray[np.float64], gap: float) -> npt.NDArray[np.float64]:
    """Return sorted places moved as little as puts `gap` between neighbours; those that touch move as one group."""
    steps = gap * np.arange(len(places))
    moved: npt.NDArray[np.float64] = isotonic_regression(places - steps) + steps if len(places) else places
    return moved
