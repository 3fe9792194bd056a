"""The plots of a report: which there are, and those of training, of the use of codes and of their phones.

Axes: K codebooks, V codes a codebook.
"""

import math
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from repcodec.report_drawing import RULE, Plot, draw_plot, new_figure, percent, shortened, side_labels
from repcodec.report_rates import COMPARED, names_figure, points_of, rate_figure
from repcodec.report_tables import Family, families, number, preferred
from repcodec.results import Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_COLUMNS = 480
"""A phone plot of more codes than that has columns that stand for several; no screen shows more."""


def plots(results: list[Result], phones: list[str] | None) -> list[Plot]:
    """Draw what the results allow.

    Args:
        results: a tokenizer each.
        phones: names of the rows of `Result.joint`; without them the phones are not drawn.
    """
    kinds = families(results)
    ceiling = next((result.row for result in results if result.row.is_ceiling), None)
    drawn = []
    for field, (title, _, better) in COMPARED.items():
        points = [point for kind in kinds for point in points_of(kind, field)]
        if len({rate for rate, *_ in points}) > 1:
            note = f"Against bits per second; {better}."
            drawn.append(draw_plot(field, title, note, partial(rate_figure, kinds, ceiling, field)))
        elif len(points) > 1:  # of one rate
            note = f"At {points[0][0]:,.0f} bits per second; {better}."
            drawn.append(draw_plot(field, title, note, partial(names_figure, kinds, ceiling, field)))
    if any(len(_finite(result.curve)) > 1 for result in results):
        note = "Normalized error on the validation split. Dashed: tokenizers that are not trained step by step."
        drawn.append(draw_plot("training", "Training", note, partial(training_figure, kinds)))
    note = "Share of frames a code, most used first: a flat line uses all codes alike, its end is how many are used."
    drawn.append(draw_plot("usage", "Use of the codes", note, partial(usage_figure, kinds)))
    shown = preferred(kinds)
    for i, result in enumerate(results):
        if result.joint is not None and phones is not None and not result.row.is_ceiling and result.joint.any():
            used = int(np.count_nonzero(result.joint.sum(0)))
            plot = draw_plot(
                f"phones_{i}", result.row.name, f"{used:,} codes used", partial(phone_figure, result.joint, phones)
            )
            plot.phones, plot.closed = True, not any(result is other for other in shown)
            drawn.append(plot)
    return drawn


def training_figure(kinds: list[Family]) -> "Figure":
    """Draw the validation error of every training, and that of what was not trained in steps as a dashed line."""
    from matplotlib.ticker import EngFormatter, NullFormatter, ScalarFormatter

    figure, axes = new_figure(3.8, right=1.55)
    last = 0
    shown: list[float] = []
    ends: list[tuple[float, str, str]] = []
    for kind in kinds:
        for (_, result), color in zip(kind.members, kind.shades(), strict=True):
            curve = _finite(result.curve)
            final = number(result.row.valid_normalized_error)
            if len(curve) > 1:
                axes.plot(*zip(*curve, strict=True), color=color, linewidth=1.5, marker=".", markersize=3, zorder=3)
                last = max(last, curve[-1][0])
                shown.extend(error for _, error in curve)
                ends.append((curve[-1][1], shortened(result.row.name), color))
            elif final is not None:
                axes.axhline(final, color=color, linestyle="--", linewidth=1.1)
                shown.append(final)
                ends.append((final, shortened(result.row.name), color))
    if min(shown) > 0 and max(shown) > 3 * min(shown):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_formatter(NullFormatter() if max(shown) > 20 * min(shown) else ScalarFormatter())
    axes.set_xlim(0, last)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set(xlabel="step", ylabel="normalized error")
    side_labels(axes, ends, None, 5)
    return figure


def _finite(curve: list[tuple[int, float]]) -> list[tuple[int, float]]:
    return [(step, error) for step, error in curve if math.isfinite(error)]


def usage_figure(kinds: list[Family]) -> "Figure":
    """Draw the share of frames of each code, most used first; a panel a family, a line a codebook."""
    from matplotlib.ticker import LogLocator

    figure, all_axes = new_figure(0.5 + 1.6 * len(kinds), 0.25, rows=len(kinds), sharex=True, sharey=True)
    for kind, axes in zip(kinds, np.atleast_1d(all_axes), strict=True):
        starts = []
        for (size, result), color in zip(kind.members, kind.shades(), strict=True):
            for k, counts in enumerate(result.usage):
                used = np.sort(counts[counts > 0])[::-1] / max(1, counts.sum())
                if len(used) == 0:
                    continue
                # As many points as can be told apart on a logarithmic axis.
                ranks = np.unique(np.geomspace(1, len(used), 200).round().astype(int))
                label = f"{size}, codebook {k + 1}" if len(result.usage) > 1 else ""
                style = ("-", "--", "-.", ":")[k % 4]
                axes.plot(ranks, used[ranks - 1], linestyle=style, color=color, linewidth=1.4, label=label)
                if len(result.usage) == 1:
                    starts.append((float(used[0]), size, color))
        axes.set_title(shortened(kind.name, 56), fontsize=8.5, color=kind.color, loc="left", fontweight="bold")
        axes.set(xscale="log", yscale="log", ylabel="share of frames")
        axes.set_xlim(0.5)
        axes.minorticks_off()
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axes.yaxis.set_major_formatter(percent)
        if starts:
            side_labels(axes, starts, 1, -4)
        elif axes.lines:
            axes.legend(frameon=False, fontsize=6.5, loc="upper right", ncols=2, handlelength=2.4, labelspacing=0.2)
    np.atleast_1d(all_axes)[-1].set_xlabel("code, most used first")
    return figure


def phone_figure(joint: npt.NDArray[np.int64], phones: list[str]) -> "Figure":
    """Draw P(phone | code): phones from the most frequent down, codes grouped by their commonest phone.

    Args:
        joint: (phones, V) frames of each phone and code.
        phones: names of the rows.
    """
    from matplotlib.colors import LinearSegmentedColormap

    rows = np.argsort(-joint.sum(1), kind="stable")
    rows = rows[joint.sum(1)[rows] > 0]
    used = np.flatnonzero(joint.sum(0))
    share = joint[np.ix_(rows, used)] / joint[:, used].sum(0)
    share = share[:, np.lexsort((-share.max(0), share.argmax(0)))]
    if len(used) > MOST_COLUMNS:
        share = _fewer_columns(share, MOST_COLUMNS)
    # Of one hue, from clear to full, so that it lies on white and on black alike.
    clear = LinearSegmentedColormap.from_list("clear", [(0.18, 0.5, 0.96, 0.0), (0.18, 0.5, 0.96, 1.0)])
    figure, axes = new_figure(0.85 + 0.108 * len(rows), top=0.45, left=0.45)
    image = axes.imshow(
        share, aspect="auto", interpolation="none", cmap=clear, vmin=0, vmax=1, extent=(0, len(used), len(rows), 0)
    )
    axes.set_yticks(np.arange(len(rows)) + 0.5, [phones[row] for row in rows], fontsize=6.5)
    axes.tick_params(axis="y", length=0, pad=2)
    axes.grid(False)
    axes.set_xlabel("codes used")
    height = figure.get_figheight()
    scale = figure.add_axes((0.65, 1 - 0.36 / height, 0.3, 0.08 / height))
    bar = figure.colorbar(image, cax=scale, orientation="horizontal", ticks=(0, 0.5, 1))
    figure.text(0.63, 1 - 0.32 / height, "P(phone | code)", ha="right", va="center", fontsize=7.5)
    bar.ax.tick_params(labelsize=7, length=2)
    bar.outline.set_edgecolor(RULE)
    return figure


def _fewer_columns(image: npt.NDArray[np.float64], columns: int) -> npt.NDArray[np.float64]:
    """Average the columns of an image into fewer, each by how much of it falls into which."""
    total = np.concatenate([np.zeros((len(image), 1)), image.cumsum(1)], 1)
    cuts = np.linspace(0, image.shape[1], columns + 1)
    at_cuts = np.stack([np.interp(cuts, np.arange(total.shape[1]), row) for row in total])
    averaged: npt.NDArray[np.float64] = np.diff(at_cuts, axis=1) / (image.shape[1] / columns)
    return averaged
