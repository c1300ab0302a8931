"""Any number of snapshots and classical filters on one split: `sega-dist compare [NAME=]SNAPSHOT ... --data SHARDS`.

Writes the paper's tables 1 and 3 with its own figures beside ours, figures 4 and 5, and every image's scores.
On several processes by `accelerate launch -m sega_dist.compare` with the same arguments.
"""

import io
import itertools
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import tyro
from rich.console import Console
from tyro.conf import Positional

from sega_dist import config as configuration
from sega_dist.arguments import Device, check_folder, parse
from sega_dist.comparison import Compared, make_tables, speeds
from sega_dist.data.images import ShardReader
from sega_dist.data.remote import open_shards
from sega_dist.data.shards import write_whole
from sega_dist.distributed import WAIT, World
from sega_dist.environment import packages
from sega_dist.errors import UserError, closest, run
from sega_dist.evaluate import write_per_image
from sega_dist.figures import figure
from sega_dist.intervals import LEVEL, RESAMPLES, interval
from sega_dist.paper import OURS, TABLE_3, method_name
from sega_dist.scoring import CLASSICAL, Scores, load_metrics, of_snapshot, protocol, score
from sega_dist.snapshot import SNAPSHOTS, Snapshot, load_snapshot
from sega_dist.tables import Table, as_csv, as_latex, as_markdown, as_terminal

CONFIGURATION_FREE = {"train.seed", *configuration.FREE_ON_RESUME} - {"train.images"}


@dataclass(frozen=True)
class CompareCommand:
    """Score snapshots side by side: the paper's tables and figures, on your own split."""

    snapshots: Annotated[Positional[tuple[str, ...]], tyro.conf.arg(metavar="[NAME=]SNAPSHOT")]  # files, runs' folders
    data: str  # folder of shards, or the https address of one
    out: Path = Path("comparison")  # folder for tables, figures and scores
    split: str = "test"  # side of the data set: train, val, test or preview
    baselines: tuple[str, ...] = ("bicubic", "lanczos")  # of bicubic, lanczos, bilinear, nearest
    against: str = (
        ""  # the method whose lead over each other is given with an interval; default SEGA-FURN, or the first
    )
    niqe: Path | None = None  # pristine parameters (.npz with BasicSR's keys): score NIQE as well
    lpips_weights: Path | None = None  # AlexNet's weights with torchvision's keys: score LPIPS as well
    mixed_data: bool = False  # compare snapshots that were trained on different images
    shown: int = 4  # faces in the figures
    zoom: tuple[float, float, float] = (0.28, 0.42, 0.44)  # left, top and width of the box shown larger, of the side
    batch: int = 8  # images at a time
    timeout: int = WAIT  # seconds that a process waits for the others before it gives up
    device: Device = "auto"  # auto: the GPU where there is one


class Entry(NamedTuple):
    """One snapshot to compare."""

    name: str  # of its method: several seeds share it
    path: Path
    snapshot: Snapshot


def main(argv: list[str] | None = None) -> None:
    command = parse(CompareCommand, argv or [], "sega-dist compare")
    world = World(device=command.device, timeout=command.timeout)
    try:
        with world.naming_lost_ranks("start again"):
            tables = compare(command, world)
    finally:
        world.close()
    if world.is_main:
        console = Console()
        for table in tables:
            console.print(as_terminal(table))
        written = sorted(file.name for file in command.out.iterdir() if is_ours(file))
        print(f"results in {command.out}: {', '.join(written)}")


def compare(command: CompareCommand, world: World) -> list[Table]:
    """Score everything, and write the results on the first rank; returns the tables there."""
    _check(command)
    reader = ShardReader(open_shards(command.data), command.split)
    entries = load(command, world)
    _check_names(command, entries)
    scales = sorted({entry.snapshot.config.scale for entry in entries})
    for scale in scales:
        if reader.manifest.size % scale:
            raise UserError(f"images of {reader.manifest.size} pixels do not divide by scale {scale}")
    judge = load_metrics(command.niqe, command.lpips_weights, reader.manifest.size, world)
    stamp = protocol(reader, judge, world.device) | {
        "interval": f"{LEVEL:.0%}, percentile bootstrap over images, {RESAMPLES} resamples", "versions": packages(),
    }  # fmt: skip
    world.agree(stamp | {"the snapshots": [str(entry.path) for entry in entries], "--batch": command.batch})
    found: dict[int, Scores] = {}
    compared: dict[int, list[Compared]] = {}
    pictured: dict[int, dict[str, str]] = {}
    for scale in scales:
        here = [entry for entry in entries if entry.snapshot.config.scale == scale]
        methods = {name: CLASSICAL[name] for name in command.baselines}
        columns = {_column(entry, here): entry for entry in here}
        methods |= {column: of_snapshot(entry.snapshot, str(entry.path)) for column, entry in columns.items()}
        found[scale] = score(world, reader, scale, methods, judge, command.batch, command.shown)
        compared[scale] = summarise(found[scale], columns, world.size)
        pictured[scale] = {entry.name: column for column, entry in reversed(columns.items())}  # the first seed's
    if not world.is_main:
        return []
    tables = make_tables(compared, judge.names, command.against, described(reader, entries))
    command.out.mkdir(parents=True, exist_ok=True)
    for file in filter(is_ours, list(command.out.iterdir())):
        file.unlink(missing_ok=True)  # of an earlier comparison: half of it would pass for ours
    for scale in scales if command.shown else ():
        draw(command, scale, found[scale], dict(reversed(pictured[scale].items())))
    write(command, tables, found, compared, stamp)
    return [*tables, speeds(compared)]


def described(reader: ShardReader, entries: list[Entry]) -> str:
    """What was scored, and whether somebody learned from it."""
    is_seen = reader.side == "train" and any(entry.snapshot.data == reader.manifest.digest for entry in entries)
    return f"{len(reader)} images" + (", on which these networks were trained" if is_seen else "")


def is_ours(file: Path) -> bool:
    """Whether it is a result of this command."""
    return re.fullmatch(r"comparison\.(md|csv|tex|json)|per_image-x\d+\.csv|fig[45]-x\d+\.png", file.name) is not None


def _check(command: CompareCommand) -> None:
    check_folder(command.out)
    left, top, width = command.zoom
    if command.batch < 1 or command.shown < 0:
        raise UserError("--batch must be 1 or more, --shown 0 or more")
    if not (0 <= left <= 1 and 0 <= top <= 1 and 0.02 <= width <= 1):
        raise UserError("--zoom: left and top must be from 0 to 1, width from 0.02 to 1, in sides of a face")
    for name in command.baselines:
        if name not in CLASSICAL:
            raise UserError(f"--baselines: unknown {name!r}{closest(name, list(CLASSICAL))} ({', '.join(CLASSICAL)})")


def load(command: CompareCommand, world: World) -> list[Entry]:
    """The snapshots; UserError for what must not be compared."""
    if not command.snapshots:
        raise UserError("compare needs snapshots: sega-dist compare [NAME=]SNAPSHOT ... --data SHARDS")
    entries = []
    for word in command.snapshots:
        name, path = _name_and_path(word)
        snapshot = load_snapshot(Path(path), world.device)
        entries.append(Entry(name or method_name(snapshot.config) or _stem(Path(path)), Path(path), snapshot))
    for one, other in itertools.combinations(entries, 2):
        _check_pair(one, other, command.mixed_data)
    return entries


def _name_and_path(word: str) -> tuple[str, str]:
    """NAME=PATH or PATH; both may hold signs of equality, so that what exists decides."""
    if Path(word).exists():
        return "", word
    cuts = [number for number, character in enumerate(word) if character == "="]
    at = next((cut for cut in cuts if word[cut + 1 :] and Path(word[cut + 1 :]).exists()), max(cuts, default=-1))
    return word[: max(at, 0)], word[at + 1 :]


def _check_names(command: CompareCommand, entries: list[Entry]) -> None:
    """A name must stand for one row of the tables, one column of the scores and one of the figures."""
    names = [entry.name for entry in entries]
    for name in names:
        if name.lower() in (*CLASSICAL, "hr", "lr"):
            raise UserError(f"the name {name} stands for something else; give another: NAME=PATH")
    for scale in {entry.snapshot.config.scale for entry in entries}:
        here = [entry for entry in entries if entry.snapshot.config.scale == scale]
        columns = [_column(entry, here) for entry in here]
        for column in columns:
            if columns.count(column) > 1:
                raise UserError(f"the name {column} stands for two snapshots at x{scale}; give another: NAME=PATH")
    known = [*dict.fromkeys(names), *(name.capitalize() for name in command.baselines)]
    if command.against and command.against not in known:
        near = closest(command.against, known)
        raise UserError(f"--against {command.against!r} is not compared{near} ({', '.join(known)})")


def _check_pair(one: Entry, other: Entry, is_mixed_allowed: bool) -> None:
    a, b = one.snapshot, other.snapshot
    is_one_row = one.name == other.name and a.config.scale == b.config.scale
    if a.data and b.data and a.data != b.data and (is_one_row or not is_mixed_allowed):
        way = "give them names: NAME=PATH" if is_mixed_allowed else "--mixed-data compares them all the same"
        raise UserError(f"{one.path} was trained on data set {a.data[:12]}, {other.path} on {b.data[:12]}:"
                        f" not the same split; {way}")  # fmt: skip
    if not is_one_row:
        return
    before, after = (configuration.flat(configuration.to_dict(config)) for config in (a.config, b.config))
    apart = [key for key in before if key not in CONFIGURATION_FREE and before[key] != after[key]]
    if a.nimg != b.nimg:
        apart.append("the images seen")
    if apart:
        raise UserError(f"{one.path} and {other.path} are both {one.name} x{a.config.scale} but differ in {apart[0]};"
                        " give them names: NAME=PATH")  # fmt: skip
    if before["train.seed"] == after["train.seed"]:
        raise UserError(f"{one.path} and {other.path} are both {one.name} x{a.config.scale} of seed"
                        f" {before['train.seed']}: name one only, or give them names: NAME=PATH")  # fmt: skip


def summarise(found: Scores, columns: dict[str, Entry], ranks: int) -> list[Compared]:
    """Each method at one scale, classical ones first; seeds of one method are put together."""
    values = dict(zip(found.methods, found.values.numpy().swapaxes(0, 1), strict=True))  # name -> (images, metrics)
    speeds = {name: speed * ranks for name, speed in found.images_per_s.items()}
    rows = [Compared(name.capitalize(), values[name], values[name].mean(0)[None], 0, 0, speeds[name])
            for name in found.methods if name not in columns]  # fmt: skip
    for name in dict.fromkeys(entry.name for entry in columns.values()):
        mine = [column for column, entry in columns.items() if entry.name == name]
        of_seeds = np.stack([values[column] for column in mine])  # (seeds, images, metrics)
        snapshot = columns[mine[0]].snapshot
        count = sum(parameter.numel() for parameter in snapshot.generator.parameters())
        speed = float(np.mean([speeds[column] for column in mine]))
        rows.append(Compared(name, of_seeds.mean(0), of_seeds.mean(1), snapshot.nimg, count, speed, snapshot.data))
    return rows


def write(command: CompareCommand, tables: list[Table], found: dict[int, Scores],
          compared: dict[int, list[Compared]], stamp: dict[str, Any]) -> None:  # fmt: skip
    """All files of the results but figures; the JSON, which programs wait for, last."""
    out = command.out
    for suffix, render in (("md", as_markdown), ("csv", as_csv), ("tex", as_latex)):
        write_whole(out / f"comparison.{suffix}", "\n\n".join(render(table) for table in tables).encode())
    for scale, scores in found.items():
        write_per_image(out / f"per_image-x{scale}.csv", scores)
    rows = [{"scale": scale, "method": method.name, "seeds": len(method.seeds), "nimg": method.nimg,
             "parameters": method.parameters, "trained_on": method.data} | _json(method, found[scale].metrics)
            for scale, methods in compared.items() for method in methods]  # fmt: skip
    values = {"protocol": stamp, "images": len(next(iter(found.values())).names), "rows": rows}
    write_whole(out / "comparison.json", (json.dumps(values, indent=1, allow_nan=False) + "\n").encode())


def _json(method: Compared, metrics: tuple[str, ...]) -> dict[str, Any]:
    """Means, intervals and each seed's mean; null for what is not finite."""
    values: dict[str, Any] = {}
    for number, name in enumerate(metrics):
        numbers = [float(method.values[:, number].mean()), *interval(method.values[:, number])]
        mean, low, high, *seeds = (
            value if math.isfinite(value) else None for value in [*numbers, *method.seeds[:, number].tolist()]
        )
        values[name] = {"mean": mean, "low": low, "high": high, "seeds": seeds}
    return values


def draw(command: CompareCommand, scale: int, found: Scores, columns: dict[str, str]) -> None:
    """Figure 4: the methods; figure 5: the ablations. `columns` has a column of the scores for each method."""
    classical = [name for name in found.methods if name in CLASSICAL]
    ablations = [name for name in TABLE_3 if name in columns]
    others = [*classical, *(name for name in columns if name not in TABLE_3 or name == OURS)]
    for number, names in ((4, others), (5, ablations if len(ablations) > 1 else [])):
        if names:
            shown = {name: columns.get(name, name) for name in names}
            figure(found, shown, command.zoom).save(png := io.BytesIO(), "png")
            write_whole(command.out / f"fig{number}-x{scale}.png", png.getvalue())


def _column(entry: Entry, entries: list[Entry]) -> str:
    """A method's name, with the seed where there are several."""
    seeds = sum(other.name == entry.name for other in entries)
    return f"{entry.name} s{entry.snapshot.config.train.seed}" if seeds > 1 else entry.name


def _stem(path: Path) -> str:
    """The run's folder, or the file's name without its ending."""
    if path.is_file() and path.parent.name != SNAPSHOTS:
        return path.stem
    return (path if path.is_dir() else path.parent.parent).resolve().name


if __name__ == "__main__":
    run(main)
