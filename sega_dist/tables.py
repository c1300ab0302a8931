"""One table, as terminals, Markdown, CSV and LaTeX want it."""

import csv
import io
import re
from typing import NamedTuple

from rich import box, table
from rich.text import Text

ESCAPES = {"\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}"}


class Cell(NamedTuple):
    """A text, the number behind it where there is one, and what narrow places leave out."""

    text: str
    value: float | None = None
    detail: str = ""

    @property
    def full(self) -> str:
        return self.text + self.detail


class Row(NamedTuple):
    name: str
    cells: tuple[Cell, ...]


class Table(NamedTuple):
    title: str
    headings: tuple[str, ...]  # of the names, then of the cells
    rows: tuple[Row, ...]
    note: str
    aside: tuple[str, ...] = ()  # headings that narrow places leave out


def as_terminal(content: Table) -> table.Table:
    """The rows that hold a number, without what is put aside and without details; brackets are no markup."""
    shown = table.Table(title=Text(content.title), caption=content.note, box=box.SIMPLE, title_justify="left")
    columns = [number for number, heading in enumerate(content.headings) if heading not in content.aside]
    for number in columns:
        shown.add_column(Text(content.headings[number]), justify="right" if number else "left", overflow="fold")
    for row in content.rows:
        texts = [row.name, *(cell.text for cell in row.cells)]
        if any(cell.value is not None for cell in row.cells):
            shown.add_row(*(Text(texts[number]) for number in columns))
    return shown


def as_markdown(content: Table) -> str:
    lines = [[*content.headings], ["---", *["---:"] * (len(content.headings) - 1)]]
    lines += [[row.name, *(cell.full for cell in row.cells)] for row in content.rows]
    body = "\n".join("| " + " | ".join(text.replace("|", "\\|") for text in line) + " |" for line in lines)
    return f"**{content.title}**\n\n{body}\n\n{content.note.replace('*', chr(92) + '*')}\n"


def as_csv(content: Table) -> str:
    """Numbers in full where there are any, else the texts."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([content.title])
    writer.writerow(content.headings)
    for row in content.rows:
        writer.writerow([row.name, *(cell.text if cell.value is None else repr(cell.value) for cell in row.cells)])
    return file.getvalue()


def as_latex(content: Table) -> str:
    """A tabular of the booktabs package."""
    columns = "l" + "r" * (len(content.headings) - 1)
    lines = [content.headings, *((row.name, *(cell.full for cell in row.cells)) for row in content.rows)]
    head, *body = (" & ".join(_escaped(text) for text in line) + r" \\" for line in lines)
    rows = "\n".join(["\\toprule", head, "\\midrule", *body, "\\bottomrule"])
    return (f"% {content.note}\n\\begin{{table}}\n\\caption{{{_escaped(content.title)}}}\n"
            f"\\begin{{tabular}}{{{columns}}}\n{rows}\n\\end{{tabular}}\n\\end{{table}}\n")  # fmt: skip


def _escaped(text: str) -> str:
    text = re.sub(r"[\\{}&%$#_~^]", lambda found: ESCAPES.get(found[0], f"\\{found[0]}"), text)
    text = "{}" + text if text.startswith(("[", "*")) else text  # else the argument of the line break before
    return text.replace("+-", "$\\pm$")
