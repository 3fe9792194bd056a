"""What the tables of a report hold: columns, how a figure is written, which is best, which tokenizers are of a kind."""

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from repcodec.results import Result, Row

COLORS = ("#d9702a", "#3a79d8", "#22996c", "#9a5fd0", "#d0487f", "#8b8520", "#2391ae", "#a3683f")
"""Of the kinds of tokenizers, in the order in which they come; each can be seen on white and on black."""


@dataclass(frozen=True)
class Column:
    """A column of the tables.

    Attributes:
        field: of `Row`.
        heading: short.
        meaning: for the reader, a clause.
        form: how a figure is written.
        best: which of the column's figures is best; None where none is.
        key: of the field's dict, where it is one.
    """

    field: str
    heading: str
    meaning: str
    form: str
    best: Callable[[Iterable[Any]], Any] | None = None
    key: str | None = None

    @property
    def name(self) -> str:
        """Of the column in files."""
        return self.field if self.key is None else f"{self.field}_{self.key}"

    @property
    def better(self) -> str:
        """Say which figures are better: "lower", "higher", or nothing."""
        ways: dict[object, str] = {min: "lower", max: "higher"}
        return ways.get(self.best, "") if self.best else ""

    @property
    def arrow(self) -> str:
        """Show the same."""
        return {"lower": "↓", "higher": "↑"}.get(self.better, "")

    def value(self, row: Row) -> float | None:
        """Return a row's figure, None where it is missing or not finite."""
        found = getattr(row, self.field)
        if isinstance(found, dict):
            found = found.get(self.key)
        return number(found)


GROUPS = {
    "Reconstruction": (
        Column("normalized_error", "error", "Σ‖x − x̂‖² / Σ‖x − mean‖² of the features, 0 is perfect", "{:.3f}", min),
        Column("cosine_similarity", "cosine", "of features and reconstruction, mean over frames", "{:.3f}", max),
    ),
    "Rate": (
        Column("bits_per_second", "bits/s", "tokens a second times log₂ of the codebook's size", "{:,.0f}"),
        Column("entropy_bits_per_second", "entropy bits/s", "the same at the entropy of the tokens", "{:,.0f}"),
        Column("codes_per_second", "tokens/s", "over all codebooks", "{:,.1f}"),
        Column("deduplicated_per_second", "runs/s", "tokens a second when runs of equal ones are one", "{:,.1f}"),
    ),
    "Use of the codes": (
        Column("perplexity", "perplexity", "e to the entropy of the codes: their number, used alike", "{:,.0f}"),
        Column("used_share", "used", "share of the codes that occur in this set", "{:.1%}", max),
        Column("corpus_used_share", "used, corpus", "share of the codes that occur in any split", "{:.1%}", max),
    ),
    "Phones": (
        Column("pnmi", "PNMI", "share of the information about the phone that the token tells", "{:.3f}", max),
        Column("phone_purity", "phone purity", "frames whose phone is the commonest of their token", "{:.3f}", max),
        Column("cluster_purity", "cluster purity", "frames whose token is the commonest of their phone", "{:.3f}", max),
        Column("v_measure", "V-measure", "harmonic mean of homogeneity and completeness", "{:.3f}", max),
    ),
    "ABX": (
        Column("abx_within", "ABX within", "of the tokens, within speakers", "{:.2%}", min),
        Column("abx_across", "ABX across", "of the tokens, across speakers", "{:.2%}", min),
        Column("abx_reconstruction_within", "decoded within", "of what decodes from them", "{:.2%}", min),
        Column("abx_reconstruction_across", "decoded across", "of what decodes from them", "{:.2%}", min),
    ),
    "Recognition": (
        Column("phone_error_rate", "phone error rate", "of a small CTC probe on held-out speakers", "{:.1%}", min),
    ),
    "Robustness": (
        Column("unit_edit_distance", "", "edits a token", "{:.3f}", min),
    ),
}  # fmt: skip
"""The columns there can be, by what they are about."""

ABOUT = {
    "Reconstruction": "How much of the encoder's features survives.",
    "Rate": "What the tokens cost.",
    "Use of the codes": "Codes that are never used are paid for and say nothing.",
    "Phones": "What tokens of the first codebook say about phones. With more codes all but cluster purity rises.",
    "ABX": "How often two sounds of different phones lie closer together than two of the same; 50 % is chance.",
    "Recognition": "What can be read from the tokens, all with the same budget; ± is the deviation over seeds.",
    "Robustness": "Edits a token between clean speech and the same speech changed; 0 is the same tokens.",
}
"""What each group is there for."""

OVERVIEW = ("bits_per_second", "normalized_error", "perplexity", "used_share", "pnmi", "abx_across", "phone_error_rate")
"""What the first table has of each group."""

LEADERS = {
    "normalized_error": "lowest reconstruction error",
    "pnmi": "most phone information, PNMI",
    "abx_across": "lowest ABX error, across speakers",
    "phone_error_rate": "lowest phone error rate",
}
"""Whose best figures stand above the tables."""


@dataclass
class Cell:
    """A figure as it is written.

    Attributes:
        text: the figure, "–" where there is none.
        bounds: its interval or deviation; empty where there is none.
        mark: "best" of the column; "rate" where only the best of those with as many bits per second; or empty.
    """

    text: str
    bounds: str = ""
    mark: str = ""


@dataclass
class Table:
    """A table: title, what it is about, columns, and a line of cells a row."""

    title: str
    about: str
    columns: list[Column]
    cells: list[list[Cell]]


def tables(results: list[Result]) -> list[Table]:
    """Return the overview and a table a group, with the columns of which any row has a figure."""
    rows = [result.row for result in results]
    groups: dict[str, list[Column]] = {}
    for title, columns in GROUPS.items():
        every = [wide for column in columns for wide in _widened(column, rows)]
        filled = [column for column in every if any(column.value(row) is not None for row in rows)]
        groups |= {title: filled} if filled else {}
    flat = {column.name: column for columns in groups.values() for column in columns}
    overview = [flat[name] for name in OVERVIEW if name in flat]
    about = ABOUT | {"ABX": f"{ABOUT['ABX']} {_abx_items(rows)}"}
    made = [("Overview", "", overview), *((title, about[title], columns) for title, columns in groups.items())]
    return [
        Table(title, said, columns, [[line[i] for line in cells] for i in range(len(rows))])
        for title, said, columns in made
        for cells in [[_cells(column, rows) for column in columns]]
    ]


def _abx_items(rows: list[Row]) -> str:
    """Say what ABX compared: the same for all, as long as all were measured on the same utterances."""
    items = {row.name: f"{row.abx_items:,} {row.abx_kind}s" for row in rows if row.abx_items is not None}
    if len(set(items.values())) == 1:
        return f"Compared are {next(iter(items.values()))}."
    return f"Compared are {', '.join(f'{found} of {name}' for name, found in items.items())}." if items else ""


def _widened(column: Column, rows: list[Row]) -> list[Column]:
    """Return a column for each key of a field that is a dict."""
    keys = dict.fromkeys(key for row in rows if isinstance(found := getattr(row, column.field), dict) for key in found)
    return [replace(column, key=key, heading=key) for key in keys] or [column]


def _cells(column: Column, rows: list[Row]) -> list[Cell]:
    values = [column.value(row) for row in rows]
    cells = [
        Cell("–") if value is None else Cell(column.form.format(value), _bounds(column, row))
        for value, row in zip(values, rows, strict=True)
    ]
    # The features are no tokens: they show how far tokens can come.
    rated = [i for i, row in enumerate(rows) if values[i] is not None and not row.is_ceiling]
    if column.best is None or len(rated) < 2:
        return cells
    by_rate: dict[int, list[int]] = {}
    for i in rated:
        if (rate := number(rows[i].bits_per_second)) is not None:
            by_rate.setdefault(round(rate), []).append(i)
    for mark, alternatives in [*(("rate", same) for same in by_rate.values()), ("best", rated)]:
        best = column.form.format(column.best(values[i] for i in alternatives))
        # What is written alike is as good; where all are, none is best.
        alike = [i for i in alternatives if cells[i].text == best]
        if len(alike) < len(alternatives):
            for i in alike:
                cells[i].mark = mark
    return cells


def _bounds(column: Column, row: Row) -> str:
    bounds = interval(row, column.name)
    if bounds is None:
        return ""
    if column.name not in row.intervals:
        return "± " + column.form.format((bounds[1] - bounds[0]) / 2)
    low, high = (column.form.format(bound) for bound in bounds)
    return f"{low.removesuffix('%')}–{high}"


def leaders(results: list[Result]) -> list[tuple[str, str, Row]]:
    """Return for each of `LEADERS` what it is, the best figure, and whose it is: the first's of those as good."""
    columns = {column.name: column for table in GROUPS.values() for column in table}
    rows = [result.row for result in results]
    found = []
    for field, title in LEADERS.items():
        marked = zip(_cells(columns[field], rows), rows, strict=True)
        found.extend([(title, cell.text, row) for cell, row in marked if cell.mark == "best"][:1])
    return found


def codebooks(row: Row) -> str:
    """Return what a tokenizer's codes are, "1,024" or "2 × 1,024"; "–" of the features."""
    several = f"{row.num_codebooks} × " if row.num_codebooks > 1 else ""
    return "–" if row.is_ceiling else f"{several}{row.codebook_size:,}"


@dataclass
class Family:
    """Tokenizers of one kind, which differ in the number of their codes.

    Attributes:
        name: what they have in common.
        number: place among the families, which chooses colour and marker.
        members: what tells each from the others, and its result.
    """

    name: str
    number: int
    members: list[tuple[str, Result]]

    @property
    def color(self) -> str:
        """Of the family, in all plots."""
        return COLORS[self.number % len(COLORS)]

    def shades(self) -> list[str]:
        """Return a colour a member, from pale to the family's own."""
        color = np.array([int(self.color[i : i + 2], 16) for i in (1, 3, 5)])
        pale = np.linspace(0.45, 0, len(self.members)) if len(self.members) > 1 else [0.0]
        return ["#{:02x}{:02x}{:02x}".format(*(color + (200 - color) * share).astype(int)) for share in pale]


def families(results: list[Result]) -> list[Family]:
    """Group tokenizers by kind, in the order in which each kind first comes; the features are in none.

    The kind is the name up to the size, as in "k-means 1024"; those with several codebooks are one of their own. Where
    two of a kind have the same size and rate, only their names tell them apart, and each is a kind of its own.
    """
    kinds: dict[str, list[tuple[str, Result]]] = {}
    for result in results:
        row = result.row
        if not row.is_ceiling:
            several = row.num_codebooks > 1
            size = f"{row.num_codebooks} × {row.codebook_size}" if several else f"{row.codebook_size}"
            named = re.match(rf"(.+?) (?:{row.num_codebooks} ?[x×] ?)?{row.codebook_size}\b", row.name)
            kind = (named[1] if named else row.name) + (" residual" if several and named else "")
            kinds.setdefault(kind, []).append((size, result))
    found: list[Family] = []
    for kind, members in kinds.items():
        sizes = {(size, result.row.bits_per_second) for size, result in members}
        groups = {kind: members} if len(sizes) == len(members) else {r.row.name: [(s, r)] for s, r in members}
        for name, group in groups.items():
            found.append(Family(name, len(found), group))
    return found


def number(value: float | None) -> float | None:
    """Return a figure, None where it is missing or not finite."""
    return float(value) if value is not None and math.isfinite(value) else None


def interval(row: Row, field: str) -> tuple[float, float] | None:
    """Return the 95 % interval of a figure; of the phone error rate, where it has none, mean ± deviation over seeds."""
    low, high = row.intervals.get(field, (math.nan, math.nan))
    rates = row.phone_error_rates or []
    if field == "phone_error_rate" and field not in row.intervals and len(rates) > 1:
        mean, deviation = np.mean(rates), np.std(rates, ddof=1)
        low, high = float(mean - deviation), float(mean + deviation)
    return (low, high) if math.isfinite(low) and math.isfinite(high) else None


def preferred(kinds: list[Family]) -> list[Result]:
    """Return of each family the member that says most about phones, the last one where that was not measured."""
    return [
        max((result for _, result in reversed(kind.members)), key=lambda result: number(result.row.pnmi) or 0)
        for kind in kinds
    ]
