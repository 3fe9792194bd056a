"""Results -> JSON, CSV, Markdown, W&B's table, plots, and one HTML page that needs no network."""

import base64
import csv
import hashlib
import html
import json
import math
import re
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader

from repcodec.errors import RepCodecError
from repcodec.files import atomic_write
from repcodec.report_drawing import Plot
from repcodec.report_examples import TONES, Timeline, timeline
from repcodec.report_plots import plots
from repcodec.report_tables import COLORS, codebooks, families, leaders, tables
from repcodec.results import Example, Result


def print_table(results: list[Result], title: str) -> None:
    """Print the overview on the terminal, the best of each column in bold, and the warnings."""
    from rich.console import Console
    from rich.table import Table as Printed
    from rich.text import Text

    results = _ordered(results)
    overview = tables(results)[0]
    printed = Printed(title=Text(title))
    printed.add_column("tokenizer")
    for column in overview.columns:
        printed.add_column(column.heading, justify="right")
    for result, cells in zip(results, overview.cells, strict=True):
        texts = []
        for cell in cells:
            style = {"best": "bold", "rate": "underline"}.get(cell.mark, "")
            below = ("\n" + cell.bounds, "dim") if cell.bounds else ""
            texts.append(Text.assemble((cell.text, style), below, justify="right"))
        printed.add_row(Text(result.row.name), *texts)
    console = Console(width=max(100, Console().width))
    console.print(printed)
    for result in results:
        for warning in result.row.warnings:
            console.print(Text(f"{result.row.name}: {warning}"))


def flat_rows(results: list[Result]) -> tuple[list[str], list[dict[str, Any]]]:
    """Return the columns and rows of one wide table of plain values, None where there is none.

    An interval becomes `<field>_low` and `<field>_high`, a dict `<field>_<key>`, a list `<field>_1`, `<field>_2` …
    """
    rows = []
    for result in results:
        flat: dict[str, Any] = {}
        for field, value in _plain(result.row.as_dict()).items():
            if field == "warnings":
                flat[field] = " ".join(value)
            elif field in ("unit_edit_distance", "phone_error_rates"):
                pairs = value.items() if isinstance(value, dict) else enumerate(value or (), 1)
                flat |= {f"{field}_{key}": item for key, item in pairs}
            elif field == "intervals":
                flat |= {f"{of}_{end}": bound for of, bounds in value.items()
                         for end, bound in zip(("low", "high"), bounds, strict=True)}  # fmt: skip
            else:
                flat[field] = value
        rows.append(flat)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    return columns, [{column: row.get(column) for column in columns} for row in rows]


def log_table(results: list[Result], run: Any) -> None:
    """Show the results as the table "evaluation" of a W&B run, `WandbRun.experiment`."""
    import wandb

    columns, rows = flat_rows(_ordered(results))
    run.log({"evaluation": wandb.Table(columns=[*columns], data=[[*row.values()] for row in rows])})


def write_report(
    folder: Path,
    results: list[Result],
    facts: dict[str, str],
    phones: list[str] | None,
    examples: Sequence[Example] = (),
) -> None:
    """Write results.json, results.csv, results.md, the plots as PNG, and report.html, which needs no other file.

    The same results give the same bytes. The features' own row comes last.

    Args:
        folder: where they go.
        results: a tokenizer each.
        facts: what was compared on what, for the head.
        phones: names of the rows of `Result.joint`; None without labels.
        examples: utterances to look at and to listen to.

    Raises:
        RepCodecError: there is no result, or the folder cannot be written.
    """
    if not results:
        raise RepCodecError("nothing was evaluated, so there is no report to write: name at least one tokenizer.")
    results = _ordered(results)
    with atomic_write(folder / "results.json") as file:
        rows = [_plain(result.row.as_dict()) for result in results]
        json.dump({**facts, "rows": rows}, file, indent=2, ensure_ascii=False, allow_nan=False)
    with atomic_write(folder / "results.csv") as file:
        columns, flat = flat_rows(results)
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(flat)
    with atomic_write(folder / "results.md") as file:
        file.write(markdown(results, facts))
    drawn = plots(results, phones)
    for plot in drawn:
        with atomic_write(folder / f"{plot.name}.png", "w+b") as file:
            file.write(plot.png)
    page = _page(results, facts, drawn, [timeline(example, results, phones) for example in examples])
    with atomic_write(folder / "report.html") as file:
        file.write(page)


def _page(results: list[Result], facts: dict[str, str], drawn: list[Plot], timelines: list[Timeline]) -> str:
    """Fill the page in; everything is escaped, and its policy allows no other style and script than its own."""
    environment = Environment(
        loader=PackageLoader("repcodec", "templates"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["base64"] = _base64
    made, kinds = tables(results), families(results)
    warnings = [(result.row.name, warning) for result in results for warning in result.row.warnings]
    warned: dict[str, list[int]] = {result.row.name: [] for result in results}
    for i, (name, _) in enumerate(warnings, 1):
        warned[name].append(i)
    style, script = (
        environment.get_template(name).render(colors=COLORS, tones=range(TONES)) for name in ("report.css", "report.js")
    )
    return environment.get_template("report.html").render(
        results=results, facts=facts, kinds=kinds, tables=made, timelines=timelines, codebooks=codebooks,
        family_of={result.row.name: kind.number for kind in kinds for _, result in kind.members},
        num_colors=len(COLORS), leaders=leaders(results), warnings=warnings, warned=warned,
        rated=any(cell.mark == "rate" for table in made for line in table.cells for cell in line),
        plots=[plot for plot in drawn if not plot.phones], phone_plots=[plot for plot in drawn if plot.phones],
        style=style, script=script, style_hash=_sha256(style), script_hash=_sha256(script), version=version("repcodec"),
    )  # fmt: skip


def markdown(results: list[Result], facts: dict[str, str]) -> str:
    """Return the tables as GitHub's Markdown: the best in bold, the best of its rate underlined."""
    lines = ["# Speech tokenizers compared", ""]
    lines += [f"- {_escaped(name.replace('_', ' '))}: {_escaped(str(fact))}" for name, fact in facts.items()]
    for table in tables(results):
        lines += ["", f"## {table.title}", "", *([table.about, ""] if table.about else [])]
        headings = [f"{_escaped(column.heading)} {column.arrow}".strip() for column in table.columns]
        lines.append("| " + " | ".join(["tokenizer", "codes", *headings]) + " |")
        lines.append("|---|" + "---:|" * (len(headings) + 1))
        for result, cells in zip(results, table.cells, strict=True):
            written = []
            for cell in cells:
                text = {"best": f"**{cell.text}**", "rate": f"<ins>{cell.text}</ins>"}.get(cell.mark, cell.text)
                written.append(text + (f"<br><sub>{cell.bounds}</sub>" if cell.bounds else ""))
            lines.append("| " + " | ".join([_escaped(result.row.name), codebooks(result.row), *written]) + " |")
        if table.about:
            lines += ["", *(f"- {column.heading}: {column.meaning}" for column in table.columns if column.key is None)]
    lines += ["", "Bold: best of its column; underlined: best of those with as many bits per second."]
    for result in results:
        lines += [f"\n> {_escaped(f'{result.row.name}: {warning}')}" for warning in result.row.warnings]
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    """Return text that Markdown shows as it is."""
    return re.sub(r"([\\`*_\[\]|~#])", r"\\\1", html.escape(" ".join(text.split()), quote=False))


def _ordered(results: list[Result]) -> list[Result]:
    """Put the features' own row last."""
    return sorted(results, key=lambda result: result.row.is_ceiling)


def _plain(value: Any) -> Any:
    """Return a value that JSON has: no NumPy, and None for what is not finite."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _sha256(text: str) -> str:
    return _base64(hashlib.sha256(text.encode()).digest())
