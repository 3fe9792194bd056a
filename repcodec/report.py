"""Results -> table, plots, one HTML page."""

import base64
import csv
import io
import json
from pathlib import Path

import numpy as np
from jinja2 import Environment, PackageLoader

from repcodec.evaluation import Result
from repcodec.files import atomic_write
from repcodec.labels import PhoneLabels

COLUMNS = {
    "normalized_error": ("error", "normalized reconstruction error", "{:.3f}", min),
    "pnmi": ("PNMI", "information about phones, of 1", "{:.3f}", max),
    "phone_purity": ("purity", "phone purity, of 1", "{:.3f}", max),
    "perplexity": ("perplexity", "of the codes over the whole set", "{:.0f}", max),
    "used_share": ("used", "share of codes used in this set", "{:.1%}", max),
    "corpus_used_share": ("used, corpus", "share of codes used over all splits", "{:.1%}", max),
    "bits_per_second": ("bits/s", "bits per second, nominal", "{:.0f}", None),
}
"""Of each column: short heading, explanation, format, and which value is best."""


def table(results: list[Result]) -> list[list[tuple[str, bool]]]:
    """Return the table's cells: text, and whether it is the best of its column; the first is the name."""
    best = {}
    for key, (_, _, _, choose) in COLUMNS.items():
        values = [value for result in results if (value := getattr(result.row, key)) is not None]
        best[key] = choose(values) if choose and len(values) > 1 else None
    rows = []
    for result in results:
        cells = [(result.row.name, False)]
        for key, (_, _, form, _) in COLUMNS.items():
            value = getattr(result.row, key)
            cells.append(("–" if value is None else form.format(value), value is not None and value == best[key]))
        rows.append(cells)
    return rows


def print_table(results: list[Result], title: str) -> None:
    """Print the table on the terminal, the best of each column in bold."""
    from rich.console import Console
    from rich.table import Table

    output = Table(title=title)
    output.add_column("tokenizer")
    for heading, *_ in COLUMNS.values():
        output.add_column(heading, justify="right")
    for cells in table(results):
        output.add_row(*(f"[bold]{text}[/bold]" if best else text for text, best in cells))
    Console(width=max(100, Console().width)).print(output)


def write_report(
    folder: Path,
    results: list[Result],
    facts: dict[str, str],
    labels: PhoneLabels | None,
    curve: list[tuple[int, float]],
) -> None:
    """Write results.json, results.csv, the plots as PNG, and report.html, which needs no other file.

    Args:
        folder: where they go.
        results: a tokenizer each.
        facts: what was compared on what, for the page's head.
        labels: name the phones of the heat maps.
        curve: (step, normalized error) of each validation of the training; empty when unknown.

    Raises:
        RepCodecError: the folder cannot be written.
    """
    rows = [result.row.as_dict() for result in results]
    with atomic_write(folder / "results.json") as file:
        json.dump({**facts, "rows": rows}, file, indent=2)
    with atomic_write(folder / "results.csv") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    plots = [("usage", "How often each code is used, most used first", _usage_plot(results))]
    if len(curve) > 1:
        plots.insert(
            0, ("curve", "Normalized error on the validation split while training", _curve_plot(curve, results))
        )
    plots.insert(0, ("comparison", "Error and phone information", _comparison_plot(results)))
    for i, result in enumerate(results):
        if result.joint is not None and labels is not None:
            caption = f"Phones and codes of {result.row.name}: columns are codes, ordered by their commonest phone"
            plots.append((f"phones_{i}", caption, _phone_plot(result.joint, labels.phones)))
    for name, _, png in plots:
        with atomic_write(folder / f"{name}.png", "w+b") as file:
            file.write(png)
    images = [(caption, base64.b64encode(png).decode("ascii")) for _, caption, png in plots]
    page = Environment(loader=PackageLoader("repcodec", "templates"), autoescape=True).get_template("report.html")
    with atomic_write(folder / "report.html") as file:
        file.write(page.render(facts=facts, columns=COLUMNS.values(), rows=table(results), images=images))


def read_curve(logs: Path) -> list[tuple[int, float]]:
    """Return (step, normalized error) of every validation in the metrics.csv files below a run's logs.

    A resumed run goes on in a file of its own; one that begins at step 0 makes those before it void.
    """
    points: dict[int, float] = {}
    for path in sorted(logs.glob("version_*/metrics.csv"), key=lambda path: path.stat().st_mtime):
        with open(path, encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                if row.get("valid/normalized_error"):
                    if row["step"] == "0":
                        points.clear()
                    points[int(row["step"])] = float(row["valid/normalized_error"])
    return sorted(points.items())


def _figure(width: float, height: float):
    """Return a figure drawn without a display, and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    return figure, figure.subplots()


def _png(figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _comparison_plot(results: list[Result]) -> bytes:
    figure, axes = _figure(7.5, 1.2 + 0.75 * len(results))
    names = [result.row.name for result in results]
    places = np.arange(len(results))
    bars = [("normalized error (lower is better)", "normalized_error", "#c0504d"), ("PNMI (higher is better)", "pnmi",
                                                                                    "#4f81bd")]  # fmt: skip
    for i, (label, key, color) in enumerate(bars):
        values = [getattr(result.row, key) for result in results]
        if None in values:
            continue
        drawn = axes.barh(places + 0.38 * i, values, 0.36, label=label, color=color)
        axes.bar_label(drawn, fmt="%.3f", padding=3)
    axes.set_yticks(places + 0.19, names)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return _png(figure)


def _curve_plot(curve: list[tuple[int, float]], results: list[Result]) -> bytes:
    figure, axes = _figure(7.5, 3.6)
    axes.plot(*zip(*curve, strict=True), marker="o", markersize=3, label="codec in training")
    for i, result in enumerate(results):
        if result.row.valid_normalized_error is None:
            continue
        axes.axhline(result.row.valid_normalized_error, linestyle="--", color=f"C{i + 1}", label=result.row.name)
    axes.set_xlabel("step")
    axes.set_ylabel("normalized error")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return _png(figure)


def _usage_plot(results: list[Result]) -> bytes:
    figure, axes = _figure(7.5, 3.6)
    for result in results:
        for k, counts in enumerate(result.usage):
            label = result.row.name + (f", codebook {k + 1}" if len(result.usage) > 1 else "")
            axes.plot(np.sort(counts)[::-1] / max(1, counts.sum()), label=label)
    axes.set_yscale("log")
    axes.set_xlabel("rank of the code")
    axes.set_ylabel("share of frames")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return _png(figure)


def _phone_plot(joint: np.ndarray, phones: list[str]) -> bytes:
    """Draw P(phone | code): phones from the most frequent down, codes grouped by their commonest phone."""
    rows = np.argsort(-joint.sum(1), kind="stable")
    rows = rows[joint.sum(1)[rows] > 0]
    used = np.flatnonzero(joint.sum(0))
    share = joint[np.ix_(rows, used)] / joint[:, used].sum(0)
    columns = np.lexsort((-share.max(0), share.argmax(0)))
    figure, axes = _figure(7.5, 0.9 + 0.14 * len(rows))
    image = axes.imshow(share[:, columns], aspect="auto", interpolation="nearest", cmap="magma", vmin=0, vmax=1)
    axes.set_yticks(range(len(rows)), [phones[row] for row in rows], fontsize=7)
    axes.set_xlabel(f"the {len(used)} codes used")
    figure.colorbar(image, ax=axes, label="P(phone | code)", fraction=0.03)
    return _png(figure)
