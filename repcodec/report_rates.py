"""Figures of all tokenizers: against bits per second, or beside their names where all have the same rate."""

import itertools
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from repcodec.report_drawing import INK, MARKERS, MUTED, new_figure, percent, shortened
from repcodec.report_tables import Family, interval, number
from repcodec.results import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COMPARED = {
    "normalized_error": ("Reconstruction error", "normalized error", "lower is better"),
    "pnmi": ("Phone information", "PNMI", "higher is better"),
    "abx_across": ("ABX error across speakers", "ABX error", "lower is better"),
    "phone_error_rate": ("Phone recognition on held-out speakers", "phone error rate", "lower is better"),
}
"""What is drawn of all tokenizers, against bits per second: title, name on the axis, and which way is better."""

SHARES = ("phone_error_rate", "abx_across")
"""Which of them are written in percent."""

Point = tuple[float, float, str, tuple[float, float] | None]
"""Bits per second, figure, size and interval of a tokenizer."""


def rate_figure(kinds: list[Family], ceiling: Row | None, field: str) -> "Figure":
    """Draw a figure against bits per second, a line a family, with intervals.

    Args:
        kinds: the families.
        ceiling: the features' own row, a dashed line.
        field: of `Row`, one of `COMPARED`.
    """
    from matplotlib.ticker import FixedLocator, NullLocator

    lines = [(kind, points) for kind in kinds if (points := points_of(kind, field))]
    widths = [len(shortened(kind.name, 40)) + 7 for kind, _ in lines]
    columns = len(lines) if sum(widths) <= 66 else max(1, 66 // max(widths))  # of the legend, in characters
    legend = 0.15 + 0.17 * math.ceil(len(lines) / columns)
    figure, axes = new_figure(2.9 + legend, top=legend)
    for kind, points in lines:
        rates, values, _, bars = zip(*points, strict=True)
        for rate, bar in zip(rates, bars, strict=True):
            if bar is not None:
                axes.plot((rate, rate), bar, color=kind.color, linewidth=1.4, alpha=0.45, zorder=2)
        style = {"color": kind.color, "marker": MARKERS[kind.number % len(MARKERS)], "markersize": 4.5, "zorder": 3}
        axes.plot(rates, values, label=shortened(kind.name, 40), linewidth=1.6, **style)
    if ceiling is not None and (value := number(getattr(ceiling, field))) is not None:
        axes.axhline(value, color=MUTED, linestyle="--", linewidth=1, zorder=1)
        axes.annotate(
            ceiling.name, (0, value), xycoords=("axes fraction", "data"), xytext=(3, 3), textcoords="offset points",
            fontsize=7, color=MUTED,
        )  # fmt: skip
    every = sorted({rate for _, line in lines for rate, *_ in line})
    axes.set_xscale("log")
    axes.set_xlim(every[0] / 1.25, every[-1] * 1.25)
    axes.xaxis.set_major_locator(FixedLocator(_apart(every)))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.xaxis.set_minor_locator(NullLocator())
    if field in SHARES:
        axes.yaxis.set_major_formatter(percent)
    axes.margins(y=0.14)
    axes.set(xlabel="bits per second", ylabel=COMPARED[field][1])
    _point_labels(axes, lines)
    figure.legend(
        loc="upper left", ncols=columns, frameon=False, fontsize=8, handlelength=1.6, columnspacing=1.2,
        labelcolor="linecolor", borderpad=0,
    )  # fmt: skip
    return figure


def names_figure(kinds: list[Family], ceiling: Row | None, field: str) -> "Figure":
    """Draw a figure of each tokenizer beside its name, with intervals: for those that have the same rate.

    Args:
        kinds: the families.
        ceiling: the features' own row, a dashed line.
        field: of `Row`, one of `COMPARED`.
    """
    rows = [
        (kind, result.row, value)
        for kind in kinds
        for _, result in kind.members
        if (value := number(getattr(result.row, field))) is not None
    ]
    figure, axes = new_figure(0.75 + 0.3 * len(rows), top=0.2, left=1.75, right=0.35)
    for place, (kind, row, value) in enumerate(rows):
        if (bounds := interval(row, field)) is not None:
            axes.plot(bounds, (place, place), color=kind.color, linewidth=2.5, alpha=0.35, solid_capstyle="butt")
        axes.plot(value, place, color=kind.color, marker=MARKERS[kind.number % len(MARKERS)], markersize=5.5)
        text = f"{value:.1%}" if field in SHARES else f"{value:.3f}"
        axes.annotate(
            text, (value, place), xytext=(0, 5), textcoords="offset points", fontsize=7, color=kind.color, ha="center"
        )
    axes.set_yticks(range(len(rows)), [shortened(row.name) for _, row, _ in rows], color=INK, fontsize=7.5)
    axes.set_ylim(len(rows) - 0.5, -0.7)
    axes.margins(x=0.12)
    axes.grid(False, axis="y")
    if ceiling is not None and (value := number(getattr(ceiling, field))) is not None:
        axes.axvline(value, color=MUTED, linestyle="--", linewidth=1, zorder=1)
        axes.annotate(
            ceiling.name, (value, 1), xycoords=("data", "axes fraction"), xytext=(0, 3), textcoords="offset points",
            fontsize=7, color=MUTED, ha="center",
        )  # fmt: skip
    if field in SHARES:
        axes.xaxis.set_major_formatter(percent)
    axes.set_xlabel(COMPARED[field][1])
    return figure


def points_of(kind: Family, field: str) -> list[Point]:
    """Return of each member for which both are known bits per second, figure, size and interval, by rate."""
    points = []
    for size, result in kind.members:
        rate, value = number(result.row.bits_per_second), number(getattr(result.row, field))
        if rate and value is not None:
            points.append((rate, value, size, interval(result.row, field)))
    return sorted(points, key=lambda point: point[0])


def _point_labels(axes: "Axes", lines: list[tuple[Family, list[Point]]]) -> None:
    """Write the sizes around the points, each where it covers least of the lines and of the names before it.

    Args:
        axes: with their limits as they will stay, and all lines.
        lines: of each family its `points_of`.
    """
    scale = 72 / axes.figure.dpi  # pixels -> points, in which fonts are measured
    of_data = [line for line in axes.lines if line.get_transform() is axes.transData]
    taken = np.concatenate([_dense(axes.transData.transform(line.get_xydata()) * scale) for line in of_data])
    left, right = (axes.transAxes.transform([(0, 0), (1, 1)]) * scale)[:, 0]
    sides = np.array([(0, 1), (0, -1), (1, 1), (-1, 1), (-1, -1), (1, -1), (1, 0), (-1, 0)])
    inside = np.stack(np.meshgrid(np.linspace(-1, 1, 9), np.linspace(-1, 1, 5)), -1).reshape(-1, 2)
    for kind, line in lines:
        for rate, value, size, _ in line:
            here = axes.transData.transform((rate, value)) * scale
            half = np.array([2.1 * len(size), 3.6])
            best, best_cost = np.zeros(2), math.inf
            for i, offset in enumerate([half * side + reach * side for reach in (2.5, 8) for side in sides]):
                out = not left < here[0] + offset[0] - half[0] < here[0] + offset[0] + half[0] < right
                cost = np.sum((np.abs(taken - here - offset) < half + 0.5).all(1)) + 0.2 * i + 100 * out
                if cost < best_cost:
                    best, best_cost = offset, cost
            taken = np.concatenate([taken, here + best + half * inside])  # a name covers more than a line does
            axes.annotate(
                size, (rate, value), xytext=(best[0], best[1]), textcoords="offset points", ha="center", va="center",
                fontsize=7, color=kind.color, zorder=4,
            )  # fmt: skip


def _dense(line: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return places (N, 2) two points apart along a line of corners (M, 2)."""
    parts = [line[:1]]
    for start, end in itertools.pairwise(line):
        steps = max(1, int(np.hypot(*(end - start)) / 2))
        parts.append(start + (end - start) * (np.arange(1, steps + 1) / steps)[:, None])
    return np.concatenate(parts)


def _apart(rates: Iterable[float]) -> list[float]:
    """Return those rates that have room for a label each on a logarithmic axis, the smallest always."""
    kept: list[float] = []
    for rate in rates:
        if not kept or rate > 1.17 * kept[-1]:
            kept.append(rate)
    return kept
