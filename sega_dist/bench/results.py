"""A benchmark's rows: kept as they come, so that a run that was stopped goes on; then a table, CSV, JSON and a picture.

A row is a dict with `column` (the way to compute), `why` (empty, or why there is no time), and where it was timed
`median_ms`, `p20_ms`, `p80_ms` and `floor_ms`, the roofline's. A case is what columns are compared on.
"""

import csv
import json
import math
import statistics
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

Row = dict[str, Any]
Case = tuple[Any, ...]


class Results:
    """Rows in OUT/rows.jsonl, identified by the values of `key`, the code that made them among these."""

    def __init__(self, out: Path, key: tuple[str, ...], code: str, again: bool = False):
        self.out, self.key = out, key
        out.mkdir(parents=True, exist_ok=True)
        self.kept = out / "rows.jsonl"
        lines = self.kept.read_text().splitlines() if self.kept.exists() and not again else []
        rows = [row for row in map(json.loads, lines) if not row["why"] and row.get("code") == code]
        self.known = {self._key_of(row): row for row in rows}

    def _key_of(self, row: Row) -> tuple[Any, ...]:
        return tuple(row.get(name) for name in self.key)

    def has(self, row: Row) -> bool:
        """Whether one with these values of the key was timed."""
        return self._key_of(row) in self.known

    def add(self, row: Row) -> None:
        self.known[self._key_of(row)] = row
        with self.kept.open("a") as stream:
            stream.write(json.dumps(row) + "\n")

    @property
    def rows(self) -> list[Row]:
        return list(self.known.values())

    def write(self, name: str, facts: dict[str, Any], shown: list[Row], case: tuple[str, ...], title: str) -> None:
        """NAME.csv, NAME.json with where the figures come from, NAME.png of the rows `shown`."""
        names = list(dict.fromkeys(name for row in self.rows for name in row))
        with (self.out / f"{name}.csv").open("w", newline="") as stream:
            writer = csv.DictWriter(stream, names)
            writer.writeheader()
            writer.writerows(self.rows)
        text = json.dumps({"provenance": facts, "rows": self.rows}, indent=1)
        (self.out / f"{name}.json").write_text(text + "\n")
        timed = [row for row in shown if "median_ms" in row]
        if timed:
            plot(self.out / f"{name}.png", timed, case, f"{facts['device']}, torch {facts['torch']}, {title}")


def said(error: Exception) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"


def by_case(rows: list[Row], case: tuple[str, ...]) -> dict[Case, dict[str, Row]]:
    """Case -> column -> row."""
    found: dict[Case, dict[str, Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in case), {})[row["column"]] = row
    return found


def columns_of(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(row["column"] for row in rows))


def show(rows: list[Row], case: tuple[str, ...], title: str) -> None:
    """Print medians, a line a case, a column a way, and how near the best is to the roofline."""
    columns = columns_of(rows)
    shown = Table(title=title)
    for name in (*case, *columns, "roof"):
        shown.add_column(name, justify="right" if name in (*columns, "roof", "batch", "side", "scale") else "left")
    for values, of_column in by_case(rows, case).items():
        medians = {column: row.get("median_ms") for column, row in of_column.items()}
        best = min((m for m in medians.values() if m), default=None)
        floor = next((row["floor_ms"] for row in of_column.values() if row.get("floor_ms")), None)
        cells = ["-" if not medians.get(column) else f"{medians[column]:.3f}" for column in columns]
        shown.add_row(*map(str, values), *cells, f"{floor / best:.0%}" if floor and best else "-")
    Console().print(shown)


def plot(path: Path, rows: list[Row], case: tuple[str, ...], title: str) -> None:
    """Bars for each case and column, the middle 60 percent as whiskers, the roofline's floor as a line."""
    import matplotlib.pyplot as plt
    from matplotlib.figure import Figure

    cases, columns = by_case(rows, case), columns_of(rows)
    across = min(4, len(cases))
    down = math.ceil(len(cases) / across)
    figure = Figure(figsize=(3.6 * across, 2.7 * down), layout="constrained")
    figure.suptitle(f"{title}: ms, dashed: roofline")
    for axes, (values, of_column) in zip(
        figure.subplots(down, across, squeeze=False).flat, cases.items(), strict=False
    ):
        these = list(of_column.values())
        medians = [row["median_ms"] for row in these]
        below = [row["median_ms"] - row["p20_ms"] for row in these]
        above = [row["p80_ms"] - row["median_ms"] for row in these]
        colours = [plt.get_cmap("tab10")(columns.index(row["column"])) for row in these]
        axes.bar([row["column"] for row in these], medians, yerr=[below, above], color=colours)
        if any(row.get("floor_ms") for row in these):
            floor = statistics.median(row["floor_ms"] for row in these if row.get("floor_ms"))
            axes.axhline(floor, color="black", linestyle="--", linewidth=1)
        axes.set_title(", ".join(map(str, values)), fontsize=9)
        axes.tick_params(axis="x", rotation=40, labelsize=7)
    for axes in list(figure.axes)[len(cases) :]:
        axes.set_axis_off()
    figure.savefig(path, dpi=110)
