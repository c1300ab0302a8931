"""Tables of a comparison: the paper's or the poster's with their figures beside ours, leads of one method, costs."""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sega_dist.evaluate import HEADINGS
from sega_dist.intervals import interval
from sega_dist.paper import OURS, POSTER_1, POSTER_2, RLSE, TABLE_1, TABLE_3, Printed
from sega_dist.tables import Cell, Row, Table

NOTE = (
    "Ours: mean over images [95 % interval]; +- is the standard deviation over seeds, their number in brackets."
    " * As printed in the {source}, whose protocol is not stated: not to be compared with ours."
)
DIGITS = {"psnr": 2, "psnr_y": 2, "niqe": 3}  # of the others 4
POSTERS = ("psnr", "ssim", "lpips", "niqe")
POSTER_SCALES, WITH_AND_WITHOUT = (8, 16), (16, 32, 64)  # of the poster's two tables
NOT_MEASURED = "not measured"
LOWER = ("lpips", "niqe")  # of which less is better


class Compared(NamedTuple):
    """One method at one scale: each image's scores, the mean over seeds."""

    name: str
    values: NDArray[np.float64]  # (images, metrics)
    seeds: NDArray[np.float64]  # (seeds, metrics): the means over images
    nimg: int
    parameters: int
    images_per_s: float
    data: str = ""  # digest of the data set that it was trained on
    is_searched: bool = False  # made by searching a GAN, not by a network that was trained to enlarge


def make_tables(
    compared: dict[int, list[Compared]], metrics: tuple[str, ...], against: str, images: str
) -> list[Table]:
    """The tables of the paper, or of the poster where a GAN was searched, and for each scale leads and costs.

    Where NIQE is the only metric, as of faces without HR, it has a table of its own.
    """
    of_methods: dict[str, dict[int, Compared]] = {}
    for scale, methods in compared.items():
        for method in methods:
            of_methods.setdefault(method.name, {})[scale] = method
    if metrics == ("niqe",):  # of faces that have no HR
        printed: dict[str, Printed] = {
            name: {scale: values[3:] for scale, values in row.items()} for name, row in POSTER_1.items()
        }
        tables = [_table(f"NIQE: {images}", of_methods, printed, list(compared), metrics, metrics)]
    elif any(method.is_searched for methods in compared.values() for method in methods):
        tables = _poster(of_methods, metrics, images, list(compared))
    else:
        tables = _paper(of_methods, metrics, images, list(compared))
    for scale, methods in compared.items():
        tables += [_leads(scale, methods, metrics, against), _costs(scale, methods)]
    return tables


def _paper(
    rows: dict[str, dict[int, Compared]], metrics: tuple[str, ...], images: str, scales: list[int]
) -> list[Table]:
    """SEGA-FURN's table 1, and 3 where two of its rows are compared."""
    ablations = {name: found for name, found in rows.items() if name in TABLE_3}
    others = {name: found for name, found in rows.items() if name not in TABLE_3 or name == OURS}
    shown = [("Table 1", others, TABLE_1)] + ([("Table 3", ablations, TABLE_3)] if len(ablations) > 1 else [])
    return [
        _table(f"{title}: {images}", rows, printed, scales, metrics, metrics, "paper") for title, rows, printed in shown
    ]


def _poster(
    rows: dict[str, dict[int, Compared]], metrics: tuple[str, ...], images: str, scales: list[int]
) -> list[Table]:
    """RLSE's tables: all methods; and RLSE with and without its semantic loss, which leaves PULSE."""
    shown = (*POSTERS, *(name for name in metrics if name not in POSTERS))
    of_loss = {name: rows[name] for name in POSTER_2 if name in rows}
    tables = [_table(f"Table 1: {images}", rows, POSTER_1, sorted({*scales, *POSTER_SCALES}), shown, metrics)]
    if len(of_loss) == len(POSTER_2):
        title = f"Table 2, without and with the semantic loss: {images}"
        tables.append(_table(title, of_loss, POSTER_2, sorted({*scales, *WITH_AND_WITHOUT}), shown, metrics))
    return tables


def _table(title: str, rows: dict[str, dict[int, Compared]], printed: dict[str, Printed], scales: list[int],
           shown: tuple[str, ...], metrics: tuple[str, ...], source: str = "poster") -> Table:  # fmt: skip
    """What was printed, its rows in its order, then those it does not know; of the `shown` `metrics` were measured."""
    headings = ["method"]
    for scale in scales:
        headings += [f"x{scale} {HEADINGS[name]}" for name in shown] + [f"x{scale} {source}*"]
    body = []
    for name in [*printed, *(name for name in rows if name not in printed)]:
        cells: list[Cell] = []
        for scale in scales:
            method = rows.get(name, {}).get(scale)
            if method is None and source == "poster" and name in rows:  # its other scales were
                cells += [Cell(NOT_MEASURED)] * len(shown)
            else:
                cells += [_mean(method, metric, metrics) for metric in shown]
            cells.append(_printed(printed.get(name, {}).get(scale), 4 if printed is TABLE_3 else 2))
        body.append(Row(name, tuple(cells)))
    measured = {
        heading for row in body for heading, cell in zip(headings[1:], row.cells, strict=True) if cell.value is not None
    }
    compared = {heading.partition(" ")[0] for heading in measured}  # scales
    aside = [h for h in headings[1:] if "-Y" in h or h.partition(" ")[0] not in compared]
    aside += [h for h in headings[1:] if h not in measured and not h.endswith("*")]
    return Table(title, tuple(headings), tuple(body), NOTE.format(source=source), tuple(aside))


def _mean(method: Compared | None, metric: str, metrics: tuple[str, ...]) -> Cell:
    if method is None:
        return Cell("")
    if metric not in metrics:
        return Cell(NOT_MEASURED)
    number = metrics.index(metric)
    digits, values = DIGITS.get(metric, 4), method.values[:, number]
    values, failed = scored(values), int(np.isnan(values).sum())
    if not len(values):
        return Cell("no score")
    detail, (low, high) = "", interval(values)
    if math.isfinite(low):
        detail += f" [{low:.{digits}f}, {high:.{digits}f}]"
    if len(method.seeds) > 1 and np.isfinite(method.seeds[:, number]).all():
        detail += f" +-{method.seeds[:, number].std(ddof=1):.{digits}f} ({len(method.seeds)})"
    detail += f", {failed} without" if failed else ""
    return Cell(f"{values.mean():.{digits}f}", float(values.mean()), detail)


def scored(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Those of the images (images,...) that have every score: NIQE is no number where an image is flat."""
    return values[~np.isnan(values).reshape(len(values), -1).any(1)]


def means(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of each metric over the images that have it, (images, metrics) to (metrics,); no number where none has."""
    columns = map(scored, values.T)
    return np.array([column.mean() if len(column) else np.nan for column in columns])


def _printed(values: tuple[float | None, ...] | None, digits: int) -> Cell:
    """PSNR, SSIM and what follows."""
    texts = (
        "-" if value is None else f"{value:.{digits if number == 1 else 2}f}"
        for number, value in enumerate(values or ())
    )
    return Cell(" / ".join(texts))


def _leads(scale: int, methods: list[Compared], metrics: tuple[str, ...], against: str) -> Table:
    """How far one method is above each other one, image by image."""
    names, measured = [method.name for method in methods], [name for name in POSTERS if name in metrics]
    likely = [name for name in (OURS, RLSE) if name in names] + [m.name for m in methods if m.parameters] + names
    default = likely[0]
    first = against if against in names else default  # it may be compared at another scale alone
    ours = methods[names.index(first)]
    rows = [Row(other.name, _lead(ours, other, {name: metrics.index(name) for name in measured}))
            for other in methods if other is not ours]  # fmt: skip
    headings = (f"{first} minus", *(HEADINGS[name] for name in measured), "images won")
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
    return Table(
        "speed",
        ("method", "images/s"),
        tuple(rows),
        "On the machine that scored; of a searched GAN, on the one that searched.",
    )


def _lead(ours: Compared, other: Compared, columns: dict[str, int]) -> tuple[Cell, ...]:
    """Differences of the scores in these columns, and how often ours is better by the first of them."""
    cells = []
    for name, number in columns.items():
        digits = DIGITS.get(name, 4)
        both = scored(np.stack([ours.values[:, number], other.values[:, number]], 1))
        with np.errstate(invalid="ignore"):  # of two infinite scores: no lead
            lead = both[:, 0] - both[:, 1]
        low, high = interval(lead)
        if not math.isfinite(low):
            cells.append(Cell("-"))
            continue
        cells.append(Cell(f"{lead.mean():+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]", float(lead.mean())))
    name, number = next(iter(columns.items()))
    first, second = scored(np.stack([ours.values[:, number], other.values[:, number]], 1)).T
    won = float(((first < second) if name in LOWER else (first > second)).mean()) if len(first) else 0.0
    return (*cells, Cell(f"{won:.0%}", won))
