"""Pictures of a training run: how codes are used, the codebook over features, curves.

Drawn without a display and without pyplot, so a notebook keeps its own backend. Axes: N frames, C width of a code
vector, K codebooks, V codes a codebook.
"""

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GREY, RED = "#b8bec6", "#c0504d"

PANELS: dict[str, tuple[str, ...]] = {
    "training loss": ("train/loss", "train/reconstruction", "train/commitment"),
    "normalized error": ("valid/normalized_error",),
    "perplexity": ("valid/perplexity", "train/perplexity"),
    "share of codes used": ("valid/used_share", "train/used_share"),
    "learning rate": ("train/learning_rate",),
    "gradient norm, before clipping": ("train/gradient_norm",),
}
"""Of each panel of the curves: its title and what it shows."""


def _figure(
    size: tuple[float, float], edges: tuple[float, float, float, float], rows: int = 1, columns: int = 1, **options: Any
) -> tuple["Figure", Any]:
    """Return a figure and its axes, several as an array.

    The layout is fixed: to let matplotlib find one doubles the time of drawing.

    Args:
        size: width and height in inches.
        edges: left, right, bottom and top of the axes, as shares of the size.
        rows, columns: of axes.
        options: of `Figure.subplots`.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=110)
    axes = figure.subplots(rows, columns, **options)
    left, right, bottom, top = edges
    figure.subplots_adjust(left, bottom, right, top, wspace=0.28, hspace=0.3)
    return figure, axes


def png(figure: "Figure") -> bytes:
    """Draw a figure as PNG, the same bytes for the same figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def usage_figure(counts: npt.NDArray[np.int64], step: int) -> "Figure":
    """Draw how often each code is used: sorted, and as a histogram over the codes.

    Args:
        counts: (K, V) frames a code.
        step: of the training, for the title.
    """
    figure, (left, right) = _figure((9, 3.6), (0.08, 0.98, 0.14, 0.9), 1, 2, width_ratios=(3, 2))
    share = counts / np.maximum(1, counts.sum(1, keepdims=True))
    size = counts.shape[1]
    bins = np.linspace(0, max(1.0, np.log10(1 + counts.max())), 41)
    for k, (row, of_all) in enumerate(zip(counts, share, strict=True)):
        used = np.sort(of_all[of_all > 0])[::-1]
        color, name = f"C{k}", f"codebook {k + 1}"
        left.step(np.arange(len(used)), used, where="mid", color=color, label=name)
        if len(counts) == 1:
            left.fill_between(np.arange(len(used)), used, step="mid", color=color, alpha=0.25, linewidth=0)
        right.hist(np.log10(1 + row), bins, histtype="stepfilled", color=color, alpha=0.45)
    left.axhline(1 / size, linestyle="--", color="0.5", linewidth=1, label="all codes alike")
    left.set(yscale="log", xlim=(-0.5, size - 0.5), xlabel="code, most used first", ylabel="share of frames")
    right.set(xlabel="log10(1 + frames of the code)", ylabel="codes")
    if len(counts) > 1:
        left.legend(frameon=False, fontsize=8)
    entropy = -np.sum(share * np.log(np.where(share > 0, share, 1)), 1)
    figure.suptitle(
        f"Use of the {size:,} codes on the validation set, step {step:,}: "
        f"{np.mean(counts > 0):.1%} used, perplexity {np.exp(entropy).mean():,.0f}",
        fontsize=10,
    )
    _tidy(left, right)
    left.minorticks_on()  # names places between the powers of ten, where those are few
    return figure


def codebook_figure(
    vectors: npt.NDArray[np.floating], codes: npt.NDArray[np.floating], counts: npt.NDArray[np.int64], step: int
) -> "Figure | None":
    """Draw the codes over the vectors that they stand for, on the first two principal components of the vectors.

    Args:
        vectors: (N, C), a sample of what the quantizer sees.
        codes: (V, C).
        counts: (V,) frames a code.
        step: of the training, for the title.

    Returns:
        None where the vectors span no plane: fewer than 3 finite ones, or of width 1.
    """
    from sklearn.decomposition import PCA

    vectors = vectors[np.isfinite(vectors).all(1)]
    if len(vectors) < 3 or vectors.shape[1] < 2:
        return None
    # Exact and without a random number; float64, since huge dimensions of features square.
    with np.errstate(invalid="ignore"):  # shares of no variance, where all vectors are equal
        pca = PCA(2, svd_solver="covariance_eigh").fit(vectors.astype(np.float64))
    frames, places = pca.transform(vectors), pca.transform(np.nan_to_num(codes))
    used = counts > 0
    shown = np.concatenate([frames, places[used]])
    low, high = shown.min(0), shown.max(0)
    room = 0.05 * np.maximum(high - low, 1e-12)
    inside = ((places >= low - room) & (places <= high + room)).all(1)

    from matplotlib.colors import LogNorm

    figure, axes = _figure((7.5, 6), (0.1, 0.92, 0.16, 0.94))
    axes.scatter(*frames.T, s=5, color=GREY, alpha=0.6, linewidths=0, label=f"{len(frames):,} vectors", zorder=1)
    most = max(2, int(counts.max()))
    order = np.flatnonzero(used)[np.argsort(counts[used], kind="stable")]  # the most used ones on top
    drawn = axes.scatter(
        *places[order].T, s=10 + 70 * counts[order] / most, c=counts[order], cmap="viridis", norm=LogNorm(1, most),
        edgecolors="white", linewidths=0.4, label=f"{used.sum():,} codes in use", zorder=3,
    )  # fmt: skip
    if not used.all():
        outside = f", {np.sum(~used & ~inside):,} of them outside" if (~used & ~inside).any() else ""
        axes.scatter(
            *places[~used].T, s=14, marker="x", color=RED, linewidths=0.8, zorder=2,
            label=f"{np.sum(~used):,} codes without a frame{outside}",
        )  # fmt: skip
    figure.colorbar(drawn, ax=axes, label="frames of the code", fraction=0.04)
    share = np.nan_to_num(pca.explained_variance_ratio_)
    axes.set(
        xlim=(low[0] - room[0], high[0] + room[0]), ylim=(low[1] - room[1], high[1] + room[1]),
        xlabel=f"first principal component ({share[0]:.0%} of the variance)",
        ylabel=f"second principal component ({share[1]:.0%})",
    )  # fmt: skip
    axes.set_title(f"Codebook over the vectors of the validation set, step {step:,}", fontsize=10)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=3, frameon=False, fontsize=8)
    _tidy(axes)
    return figure


def curves_figure(rows: Sequence[Mapping[str, float]]) -> "Figure":
    """Draw the curves of a training.

    Args:
        rows: of each validation "step" and the figures named in `PANELS`, as far as there are any.
    """
    from matplotlib.ticker import EngFormatter

    figure, grid = _figure((11, 5.8), (0.05, 0.98, 0.09, 0.95), 2, 3)
    for axes, (title, names) in zip(grid.flat, PANELS.items(), strict=True):
        for name in names:
            points = [(row["step"], row[name]) for row in rows if name in row]
            if points:
                axes.plot(*zip(*points, strict=True), marker=".", markersize=4, linewidth=1.2, label=name)
        axes.set_title(title, fontsize=10)
        if len(names) > 1 and axes.lines:
            axes.legend(frameon=False, fontsize=8)
        if title == "training loss" and any(np.greater(line.get_ydata(), 0).any() for line in axes.lines):
            axes.set_yscale("log")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 20k
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 5)) if axes.get_yscale() == "linear" else None
    for axes in grid[-1]:
        axes.set_xlabel("step")
    _tidy(*grid.flat)
    return figure


def _tidy(*all_axes: "Axes") -> None:
    """Take away the frame's upper and right side, and lay a faint grid behind."""
    for axes in all_axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="0.92", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.minorticks_off()
