"""One page about one or several training runs, whole in itself: `sega-dist report RUN...`."""

import base64
import contextlib
import io
import itertools
import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

from PIL import Image

from sega_dist.arguments import RunPaths, parse
from sega_dist.config import LARGEST, flat, load
from sega_dist.data.crops import UnusableImage, decode
from sega_dist.data.shards import write_whole
from sega_dist.errors import UserError, run
from sega_dist.owner import FILE as STATUS
from sega_dist.owner import read_status
from sega_dist.pictures import cut
from sega_dist.stats import read_stats

TEMPLATE, PLACE = Path(__file__).with_name("report.html"), "DATA_OF_THE_PAGE"
POINTS, TIMES, FACES = 500, 8, 6  # at most: points of a curve, sheets of a run, faces of a sheet
QUALITY = 90  # of the page's pictures; LR's pixels are kept as they are
COLUMNS = ("LR", "bicubic", "SR", "HR")  # of a preview sheet
METRICS = {"psnr": "PSNR, dB", "ssim": "SSIM", "psnr_y": "PSNR-Y, dB", "ssim_y": "SSIM-Y", "lpips": "LPIPS",
           "niqe": "NIQE"}  # fmt: skip

# A chart's title, and its lines: the key in stats.jsonl and the name. A dashed line belongs to the one before it.
CHARTS = {
    "Preview PSNR, dB": {"preview_psnr": "generator", "preview_psnr_bicubic": "bicubic"},
    "Generator's loss": {"loss_g": "total", "loss_content": "content", "loss_pixel": "pixel"},
    "Adversarial loss": {"loss_d": "discriminator", "loss_adv": "generator"},
    "Discriminator's score": {"d_real": "D(real)", "d_fake": "D(fake)"},
    "Discriminator's accuracy": {"d_accuracy": "as it is", "d_accuracy_exchanged": "images exchanged"},
    "R1, squared gradient at real images": {"r1": "R1"},
    "Share of the adversarial gradient": {"adv_gradient_ratio": "adv_gradient_ratio"},
    "Throughput, images/s": {"images_per_s": "images/s"},
    "Waiting for data, share of time": {"data_wait": "data wait"},
    "Peak memory, GB": {"memory_gb": "memory"},
}
DASHED = ["preview_psnr_bicubic", "d_fake", "d_accuracy_exchanged"]

Entries = list[dict[str, Any]]
Points = list[tuple[float, float]]  # kimg, value
Facts = dict[str, tuple[str, str]]  # what -> how much, and a remark
S = TypeVar("S")


@dataclass(frozen=True)
class ReportCommand:
    """Write one HTML page about training runs: curves, faces over time, scores, settings. It needs no network."""

    runs: RunPaths  # folders that train's --out named
    out: Path | None = None  # the page; default RUN/report.html, for several runs ./report.html
    comparison: Path | None = None  # folder that compare wrote: its scores and figures stand on the page as well


def main(argv: list[str] | None = None) -> None:
    command = parse(ReportCommand, argv or [], "sega-dist report")
    if not command.runs:
        raise UserError("report needs the folder of a run, or of several: sega-dist report RUN...")
    out = command.out or (command.runs[0] if len(command.runs) == 1 else Path()) / "report.html"
    if out.is_dir():
        raise UserError(f"--out {out} is a folder; name a file, as {out / 'report.html'}")
    page = report(command.runs, command.comparison)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, page.encode())
    print(f"report in {out}")


def report(folders: Sequence[Path], comparison: Path | None = None) -> str:
    """The page about these runs' folders, in ASCII but for the template; UserError for what is not a run."""
    try:
        runs = [_run(folder, label) for label, folder in labelled(folders).items()]
    except RecursionError:
        raise UserError("a config.json, or another JSON file of these runs, is nested deeper than any run's") from None
    settings = {key: [one["config"].get(key, "") for one in runs] for one in runs for key in one["config"]}
    page = {
        "version": version("sega-dist"), "made": _clock(time.time()), "charts": CHARTS, "dashed": DASHED, "runs": runs,
        "comparison": _comparison(comparison) if comparison else None, "sides": COLUMNS,
        "differing": [[key, *values] for key, values in settings.items() if len(set(values)) > 1],
    }  # fmt: skip
    # Names come from files: none may end the page's script element. The page shows them as text, never as HTML.
    data = json.dumps(page, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return TEMPLATE.read_text().replace(PLACE, data)


def labelled(folders: Sequence[Path]) -> dict[str, Path]:
    """Each folder once, by as many of its path's last parts as tell all of them apart."""
    distinct, depth = {folder.resolve(): folder for folder in folders}, 1
    while len({path.parts[-depth:] for path in distinct}) < len(distinct):
        depth += 1
    return {"/".join(path.parts[-depth:]): folder for path, folder in distinct.items()}


def thinned(points: Points) -> Points:
    """At most POINTS of them: the first, the last, and of each stretch between the lowest and the highest."""
    if len(points) <= POINTS:
        return points
    inner, stretches, kept = points[1:-1], POINTS // 2 - 1, points[:1]
    for i in range(stretches):
        stretch = inner[len(inner) * i // stretches : len(inner) * (i + 1) // stretches]
        kept += sorted({extreme(stretch, key=lambda point: point[1]) for extreme in (min, max)})
    return [*kept, points[-1]]


def _run(folder: Path, label: str) -> dict[str, Any]:
    if not (folder / "config.json").is_file():
        what = "holds no config.json" if folder.exists() else "does not exist"
        raise UserError(f"{folder} {what}: report needs the folder of a run, as train's --out named it")
    entries = sorted((e for e in read_stats(folder) if _is_number(e["nimg"])), key=lambda e: float(e["nimg"]))
    notes = [] if entries else ["No statistics yet: stats.jsonl holds no line."]
    config, environment = _texts(load(folder / "config.json")), _texts(_read(folder / "environment.json", notes))
    status = _texts(read_status(folder) or {})
    return {
        "label": label, "config": config, "environment": environment, "status": status, "notes": notes,
        "facts": _state(folder, status, environment) | _measured(entries, config) | _trouble(folder, entries),
        "series": {key: thinned(_points(entries, key)) for lines in CHARTS.values() for key in lines},
        "metrics": _metrics(_read(folder / "eval" / "metrics.json", notes)),
        "errors": sorted(file.name for file in folder.glob("errors/*") if file.is_file() and file.stat().st_size),
        **_faces(folder / "pictures", notes),
    }  # fmt: skip


def _state(folder: Path, status: dict[str, str], environment: dict[str, str]) -> Facts:
    state, remark = status.get("state", "not recorded"), status.get("message", "")
    if state == "running":  # or killed: the last sign of life tells
        remark = f"last sign of life {_clock((folder / STATUS).stat().st_mtime)}"
    device = f"{environment.get('processes', '?')} x {environment.get('device', 'not recorded')}"
    return {"state": (state, remark), "device": (device, environment.get("engine", ""))}


def _measured(entries: Entries, config: dict[str, str]) -> Facts:
    """What the lines say of progress, speed and memory, as far as they hold it."""
    facts: Facts = {}
    of = {key: [value for _, value in _points(entries, key)] for lines in CHARTS.values() for key in lines}
    if entries:
        facts["images seen"] = (
            f"{entries[-1]['nimg'] / 1000:,g} kimg",
            f"of {config.get('train.images', '?')} images{_duration(entries)}",
        )
    if of["preview_psnr"] and of["preview_psnr_bicubic"]:
        facts["preview PSNR"] = f"{of['preview_psnr'][-1]:.2f} dB", f"bicubic {of['preview_psnr_bicubic'][-1]:.2f} dB"
    if speed := of["images_per_s"]:
        facts["throughput"] = f"{median(speed):,.4g} img/s", f"median; last {speed[-1]:,.4g}"
    if wait := of["data_wait"]:
        facts["data wait"] = f"{median(wait):.1%}", f"median; last {wait[-1]:.1%}"
    if memory := of["memory_gb"]:
        facts["peak memory"] = f"{max(memory):,.4g} GB", ""
    return facts


def _duration(entries: Entries) -> str:
    """From the first line to the last, and how much of it went into steps rather than pictures, saving and stops."""
    timed = [e for e in entries if _is_number(e.get("time")) and _is_number(e.get("images_per_s"))]
    wall = timed[-1]["time"] - timed[0]["time"] if timed else 0
    if wall <= 0:
        return ""
    steps = sum((b["nimg"] - a["nimg"]) / max(b["images_per_s"], 1e-9) for a, b in itertools.pairwise(timed))
    spent = f"{wall / 3600:.1f} h" if wall > 7200 else f"{wall / 60:.1f} min"
    return f"; {spent}, {min(steps / wall, 1):.0%} of it in steps"


def _trouble(folder: Path, entries: Entries) -> Facts:
    """TensorBoard numbers its files within a process: a name that ends in 0 is that of a process's first."""
    starts = len(list((folder / "tensorboard").glob("events.out.tfevents.*.0")))
    restarts = (f"{starts - 1}", "derived: starts in tensorboard/, less one") if starts else ("not recorded", "")
    counts = {"left out by rollbacks": _points(entries, "skipped"), "damaged samples": _points(entries, "bad_samples")}
    return {"restarts": restarts} | {what: (f"{count[-1][1]:,g}", "images") for what, count in counts.items() if count}


def _metrics(values: dict[str, Any]) -> dict[str, Any] | None:
    """The table of eval/metrics.json, whatever metrics it holds; None where there is none."""
    methods = values.get("methods")
    rows = {name: row for name, row in methods.items() if isinstance(row, dict)} if isinstance(methods, dict) else {}
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    protocol = values["protocol"] if isinstance(values.get("protocol"), dict) else {}
    return {
        "head": ["method", *(METRICS.get(name, name) for name in names)],
        "rows": [[method, *(_score(name, row[name]) if name in row else "" for name in names)]
                 for method, row in rows.items()],
        "protocol": _texts({"images": values.get("images", "not recorded"), **protocol}),
    } if rows else None  # fmt: skip


def _comparison(folder: Path) -> dict[str, Any]:
    """A table a scale: each method's means with their intervals; and the figures."""
    file, notes = folder / "comparison.json", list[str]()
    values = _read(file, notes)
    rows = [row for row in values.get("rows", []) if isinstance(row, dict)]
    if notes or not rows:
        raise UserError(f"{file} holds no comparison; sega-dist compare makes one")
    tables = []
    for scale in sorted({_text(row.get("scale")) for row in rows}):
        here = [row for row in rows if _text(row.get("scale")) == scale]
        names = list(dict.fromkeys(key for row in here for key, value in row.items() if isinstance(value, dict)))
        body = [[_text(row.get("method")), *(_mean(name, row.get(name), row.get("seeds")) for name in names)]
                for row in here]  # fmt: skip
        tables.append({"title": f"x{scale}", "head": ["method", *(METRICS.get(n, n) for n in names)], "rows": body})
    figures = {}
    for picture in sorted(folder.glob("fig[45]-x*.png")):
        with contextlib.suppress(UnusableImage, OSError):
            figures[picture.stem.replace("fig", "Figure ").replace("-", ", ")] = _address(decode(picture.read_bytes()))
    return {"tables": tables, "figures": figures, "protocol": _texts(values.get("protocol", {}))}


def _mean(name: str, score: Any, seeds: Any) -> tuple[str, str]:
    """A mean, and how sure it is."""
    if not isinstance(score, dict):
        return "", ""
    mean, low, high = (_score(name, score.get(key)) for key in ("mean", "low", "high"))
    return mean, f"{low} to {high}" + (f", {seeds} seeds" if isinstance(seeds, int) and seeds > 1 else "")


def _score(name: str, value: Any) -> str:
    """JSON holds no infinity: null stands for the PSNR of identical images."""
    if value is None:
        return "∞"
    return f"{value:.{2 if 'psnr' in name else 4}f}" if _is_number(value) else _text(value)


def _faces(folder: Path, notes: list[str]) -> dict[str, Any]:
    """Times in kimg, and for each face its LR, bicubic and HR once and its SR at each time, as addresses of images.

    Of a face GAN, whose sheets hold its own faces: times, and each sheet at half its size.
    """
    sheets, samples = _sheets(folder, "preview", _compared, notes), _sheets(folder, "faces", _halved, notes)
    count = min([FACES, *(len(sheet) for _, sheet in sheets)]) if sheets else 0
    faces = [_face([sheet[i] for _, sheet in sheets]) for i in range(count)]
    times = [kimg for kimg, _ in sheets or samples]
    return {"times": times, "faces": faces, "samples": [sheet for _, sheet in samples]}


def _sheets(folder: Path, name: str, use: Callable[[Image.Image], S], notes: list[str]) -> list[tuple[float, S]]:
    """Time in kimg, and what `use` makes of NAME-*.png, of at most TIMES evenly over time; notes on what is damaged."""
    named = ((re.fullmatch(rf"{name}-(\d{{1,15}})\.png", file.name), file) for file in folder.glob(f"{name}-*.png"))
    found = sorted((int(match[1]), file) for match, file in named if match and file.is_file())
    chosen = sorted({round(i * (len(found) - 1) / (TIMES - 1)) for i in range(TIMES)}) if found else []
    sheets = list[tuple[float, S]]()
    for nimg, file in (found[i] for i in chosen):
        try:
            sheets.append((nimg / 1000, use(decode(file.read_bytes()))))
        except (OSError, UnusableImage, ValueError) as error:
            notes.append(f"pictures/{file.name} is left out: {error.strerror if isinstance(error, OSError) else error}")
    return sheets


def _compared(sheet: Image.Image) -> list[list[Image.Image]]:
    rows = cut(sheet)
    if len(rows[0]) != len(COLUMNS):
        raise ValueError(f"{len(rows[0])} columns, not {', '.join(COLUMNS)}")
    return rows


def _halved(sheet: Image.Image) -> str:
    return _address(sheet.reduce(2))


def _face(rows: list[list[Image.Image]]) -> dict[str, Any]:
    lr, bicubic, _, hr = rows[-1]
    return {"LR": _address(lr, True), "bicubic": _address(bicubic), "SR": [_address(row[2]) for row in rows],
            "HR": _address(hr)}  # fmt: skip


def _address(picture: Image.Image, is_exact: bool = False) -> str:
    """The picture within its own address, as WebP."""
    file = io.BytesIO()
    picture.save(file, "WEBP", quality=QUALITY, lossless=is_exact)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


def _read(file: Path, notes: list[str]) -> dict[str, Any]:
    """A JSON object; empty where there is no such file, or, with a note, what is damaged."""
    try:
        return load(file) if file.is_file() else {}
    except UserError:
        notes.append(f"{file.parent.name}/{file.name} is left out: it cannot be read, or holds no JSON object")
        return {}


def _points(entries: Entries, key: str) -> Points:
    """A curve, its values to six digits."""
    return [(round(e["nimg"] / 1000, 3), float(f"{e[key]:.6g}")) for e in entries if _is_number(e.get(key))]


def _is_number(value: Any) -> bool:
    """Whether it can be drawn: JSON also brings booleans, NaN and infinities."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < LARGEST


def _texts(values: dict[str, Any]) -> dict[str, str]:
    return {key: _text(value) for key, value in flat(values).items()}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))


if __name__ == "__main__":
    run(main)
