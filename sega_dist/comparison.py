"""Tables of a comparison: the paper's 1 and 3 with its own figures beside ours, leads of one method, costs."""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sega_dist.evaluate import HEADINGS
from sega_dist.intervals import interval
from sega_dist.paper import OURS, TABLE_1, TABLE_3, Printed
from sega_dist.tables import Cell, Row, Table

NOTE = (
    "Ours: mean over images [95 % interval]; +- is the standard deviation over seeds, their number in brackets."
    " * As printed in the paper, whose protocol is not stated: not to be compared with ours."
)
DIGITS = {"psnr": 2, "psnr_y": 2, "niqe": 3}  # of the others 4


class Compared(NamedTuple):
    """One method at one scale: each image's scores, the mean over seeds."""

    name: str
    values: NDArray[np.float64]  # (images, metrics)
    seeds: NDArray[np.float64]  # (seeds, metrics): the means over images
    nimg: int
    parameters: int
    images_per_s: float
    data: str = ""  # digest of the data set that it was trained on


def make_tables(
    compared: dict[int, list[Compared]], metrics: tuple[str, ...], against: str, images: str
) -> list[Table]:
    """Table 1, table 3 where two of its rows are compared, and for each scale leads and costs."""
    of_methods: dict[str, dict[int, Compared]] = {}
    for scale, methods in compared.items():
        for method in methods:
            of_methods.setdefault(method.name, {})[scale] = method
    ablations = {name: scales for name, scales in of_methods.items() if name in TABLE_3}
    others = {name: scales for name, scales in of_methods.items() if name not in TABLE_3 or name == OURS}
    shown = [("Table 1", others, TABLE_1)] + ([("Table 3", ablations, TABLE_3)] if len(ablations) > 1 else [])
    tables = [_table(f"{title}: {images}", rows, printed, list(compared), metrics)
              for title, rows, printed in shown]  # fmt: skip
    for scale, methods in compared.items():
        tables += [_leads(scale, methods, against), _costs(scale, methods)]
    return tables


def _table(title: str, rows: dict[str, dict[int, Compared]], printed: dict[str, Printed], scales: list[int],
           metrics: tuple[str, ...]) -> Table:  # fmt: skip
    """The paper's rows in its order, then those it does not know."""
    headings = ["method"]
    for scale in scales:
        headings += [f"x{scale} {HEADINGS[name]}" for name in metrics] + [f"x{scale} paper*"]
    body = []
    for name in [*printed, *(name for name in rows if name not in printed)]:
        cells: list[Cell] = []
        for scale in scales:
            method = rows.get(name, {}).get(scale)
            cells += [_mean(method, i, metric) if method else Cell("") for i, metric in enumerate(metrics)]
            cells.append(_printed(printed.get(name, {}).get(scale), 4 if printed is TABLE_3 else 2))
        body.append(Row(name, tuple(cells)))
    return Table(title, tuple(headings), tuple(body), NOTE, tuple(h for h in headings if "-Y" in h))


def _mean(method: Compared, number: int, metric: str) -> Cell:
    digits, values = DIGITS.get(metric, 4), method.values[:, number]
    detail, (low, high) = "", interval(values)
    if math.isfinite(low):
        detail += f" [{low:.{digits}f}, {high:.{digits}f}]"
    if len(method.seeds) > 1 and np.isfinite(method.seeds[:, number]).all():
        detail += f" +-{method.seeds[:, number].std(ddof=1):.{digits}f} ({len(method.seeds)})"
    return Cell(f"{values.mean():.{digits}f}", float(values.mean()), detail)


def _printed(values: tuple[float, float | None] | None, digits: int) -> Cell:
    if values is None:
        return Cell("")
    return Cell(f"{values[0]:.2f} / " + ("-" if values[1] is None else f"{values[1]:.{digits}f}"))


def _leads(scale: int, methods: list[Compared], against: str) -> Table:
    """How far one method is above each other one, image by image."""
    names = [method.name for method in methods]
    default = OURS if OURS in names else next((m.name for m in methods if m.parameters), names[0])
    first = against if against in names else default  # it may be compared at another scale alone
    ours = methods[names.index(first)]
    rows = [Row(method.name, _lead(ours, method)) for method in methods if method is not ours]
    headings = (f"{first} minus", "PSNR dB", "SSIM", "images won")
    return Table(f"x{scale}: leads of {first}", headings, tuple(rows),
                 "Paired differences, mean over images [95 % interval].")  # fmt: skip


def _costs(scale: int, methods: list[Compared]) -> Table:
    """What each method took and takes."""
    rows = [Row(m.name, (Cell(f"{m.nimg:,}", m.nimg), Cell(f"{m.parameters:,}", m.parameters))) for m in methods]
    return Table(f"x{scale}: costs", ("method", "images seen", "parameters"), tuple(rows), "Images seen in training.")


def speeds(compared: dict[int, list[Compared]]) -> Table:
    """For terminals alone: files hold what is the same bits each time."""
    rows = [Row(f"x{scale} {m.name}", (Cell(f"{m.images_per_s:.3g}", m.images_per_s),))
            for scale, methods in compared.items() for m in methods]  # fmt: skip
    return Table("speed", ("method", "images/s"), tuple(rows), "Super-resolving alone, on the machine that scored.")


def _lead(ours: Compared, other: Compared) -> tuple[Cell, ...]:
    cells = []
    for number, digits in ((0, 2), (1, 4)):
        with np.errstate(invalid="ignore"):  # of two infinite scores: no lead
            lead = ours.values[:, number] - other.values[:, number]
        low, high = interval(lead)
        if not math.isfinite(low):
            cells.append(Cell("-"))
            continue
        cells.append(Cell(f"{lead.mean():+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]", float(lead.mean())))
    won = float((ours.values[:, 0] > other.values[:, 0]).mean())
    return (*cells, Cell(f"{won:.0%}", won))
