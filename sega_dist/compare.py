"""Any number of methods on one split: `sega-dist compare [NAME=]SNAPSHOT ... --data SHARDS`.

Methods are snapshots, folders of explore, and classical filters. Writes SEGA-FURN's tables 1 and 3 or, where a GAN was
searched, RLSE's 1 and 2, with their own figures beside ours; figures 4 and 5; every image's scores.
On several processes by `accelerate launch -m sega_dist.compare` with the same arguments.
"""

import io
import itertools
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import tyro
from rich.console import Console
from tyro.conf import Positional

from sega_dist import config as configuration
from sega_dist.arguments import Device, check_folder, parse
from sega_dist.comparison import Compared, make_tables, means, scored, speeds
from sega_dist.data.images import ShardReader
from sega_dist.data.remote import open_shards
from sega_dist.data.shards import write_whole
from sega_dist.distributed import WAIT, World
from sega_dist.environment import packages
from sega_dist.errors import UserError, closest, run
from sega_dist.evaluate import write_per_image
from sega_dist.faces import TinyFaceConfig, open_faces
from sega_dist.figures import figure
from sega_dist.intervals import LEVEL, RESAMPLES, interval
from sega_dist.paper import OURS, TABLE_3, method_name
from sega_dist.scoring import CLASSICAL, Scores, SuperResolve, load_metrics, of_snapshot, protocol, score, score_native
from sega_dist.searched import is_search, read_search
from sega_dist.snapshot import SNAPSHOTS, load_snapshot
from sega_dist.tables import Table, as_csv, as_latex, as_markdown, as_terminal

CONFIGURATION_FREE = {"train.seed", *configuration.FREE_ON_RESUME} - {"train.images"}


@dataclass(frozen=True)
class CompareCommand:
    """Score methods side by side: the papers' tables and figures, on your own split."""

    # Snapshots' files, runs' folders, and what explore made of the same split.
    snapshots: Annotated[Positional[tuple[str, ...]], tyro.conf.arg(metavar="[NAME=]SNAPSHOT")]
    data: str = ""  # folder of shards, or the https address of one
    faces: Path | None = None  # instead: a folder of native small faces, of which nothing but NIQE can be scored
    out: Path = Path("comparison")  # folder for tables, figures and scores
    split: str = "test"  # side of the data set: train, val, test or preview
    baselines: tuple[str, ...] = ("bicubic", "lanczos")  # of bicubic, lanczos, bilinear, nearest
    against: str = (
        ""  # the method whose lead over each other is given with an interval; default SEGA-FURN, or the first
    )
    niqe: Path | None = None  # pristine parameters (.npz with BasicSR's keys): score NIQE as well
    lpips_weights: Path | None = None  # AlexNet's weights with torchvision's keys: score LPIPS as well
    images: int = 0  # score the first so many; 0 = all
    mixed_data: bool = False  # compare snapshots that were trained on different images
    shown: int = 4  # faces in the figures
    zoom: tuple[float, float, float] = (0.28, 0.42, 0.44)  # left, top and width of the box shown larger, of the side
    batch: int = 8  # images at a time
    timeout: int = WAIT  # seconds that a process waits for the others before it gives up
    device: Device = "auto"  # auto: the GPU where there is one
    tinyface: TinyFaceConfig = field(default_factory=TinyFaceConfig)  # of --faces, as explore had it


class Entry(NamedTuple):
    """One snapshot to compare, or what explore found."""

    name: str  # of its method: several seeds share it
    path: Path
    scale: int
    side: int  # of its images
    seed: int
    settings: dict[str, Any]  # what those of one name must have in common
    super_resolve: SuperResolve
    nimg: int = 0  # images the network was trained on
    parameters: int = 0
    data: str = ""  # digest of the data set it was trained on
    images_per_s: float | None = None  # where that was measured before
    faces: str = ""  # which ones were searched for; "" of a network, which takes any

    @property
    def is_searched(self) -> bool:
        return bool(self.faces)


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
    entries = load(command, world)
    _check_names(command, entries)
    if command.faces:
        return compare_native(command, entries, world)
    reader = ShardReader(open_shards(command.data), command.split)
    scales = sorted({entry.scale for entry in entries})
    for entry in entries:
        if entry.is_searched and not entry.faces.startswith(f"{reader.manifest.digest} {reader.side} "):
            raise UserError(f"{entry.path} was searched for other faces than split {reader.side} of {command.data}")
    for scale in scales:
        if reader.manifest.size % scale:
            raise UserError(f"images of {reader.manifest.size} pixels do not divide by scale {scale}")
    judge = load_metrics(command.niqe, command.lpips_weights, reader.manifest.size, world)
    stamp = protocol(reader, judge, world.device) | {
        "interval": f"{LEVEL:.0%}, percentile bootstrap over images, {RESAMPLES} resamples", "versions": packages(),
    }  # fmt: skip
    inputs = {"the snapshots": [str(entry.path) for entry in entries], "--batch": command.batch}
    world.agree(stamp | inputs | {"--images": command.images})
    found: dict[int, Scores] = {}
    compared: dict[int, list[Compared]] = {}
    pictured: dict[int, dict[str, str]] = {}
    for scale in scales:
        methods, columns = _methods(command, entries, scale)
        found[scale] = score(world, reader, scale, methods, judge, command.batch, command.shown, images=command.images)
        compared[scale] = summarise(found[scale], columns, world.size)
        pictured[scale] = {entry.name: column for column, entry in reversed(columns.items())}  # the first seed's
    if not world.is_main:
        return []
    count = len(found[scales[0]].names)
    tables = make_tables(compared, judge.names, command.against, described(reader, entries, count))
    _clear(command.out)
    for scale in scales if command.shown else ():
        draw(command, scale, found[scale], dict(reversed(pictured[scale].items())))
    write(command, tables, found, compared, stamp)
    return [*tables, speeds(compared)]


def compare_native(command: CompareCommand, entries: list[Entry], world: World) -> list[Table]:
    """Faces without HR: their NIQE by each method, with intervals."""
    assert command.faces is not None
    side, scales = entries[0].side, sorted({entry.scale for entry in entries})
    strange = next((entry for entry in entries if entry.side != side), None)
    if strange:
        raise UserError(f"{strange.path} makes images of side {strange.side}, {entries[0].path} of {side}")
    judge = load_metrics(command.niqe, None, side, world)
    if judge.niqe is None:
        raise UserError("--faces have no HR: --niqe is what they can be scored by")
    found: dict[int, Scores] = {}
    compared: dict[int, list[Compared]] = {}
    for scale in scales:
        whole, faces = (
            open_faces(command.faces, "", scale, side, command.tinyface, images) for images in (0, command.images)
        )
        strange = next((e for e in entries if e.is_searched and e.scale == scale
                        and e.faces not in (whole.digest, faces.digest)), None)  # fmt: skip
        if strange:
            raise UserError(f"{strange.path} was searched for other faces than those of {command.faces}: give the same"
                            " --images and --tinyface keys as explore had")  # fmt: skip
        methods, columns = _methods(command, entries, scale)
        found[scale] = score_native(world, faces.names, faces.lr, scale, methods, judge.niqe, command.batch)
        compared[scale] = summarise(found[scale], columns, world.size)
    if not world.is_main:
        return []
    for line in faces.remarks:
        print(line)
    count = len(found[scales[0]].names)
    tables = make_tables(compared, ("niqe",), command.against, f"{count} small faces without HR")
    _clear(command.out)
    stamp = {"metrics": ["niqe"], "faces": str(command.faces.name), "versions": packages()}
    write(command, tables, found, compared, stamp)
    return [*tables, speeds(compared)]


def _methods(
    command: CompareCommand, entries: list[Entry], scale: int
) -> tuple[dict[str, SuperResolve], dict[str, Entry]]:
    """What is compared at one scale: by the column of its scores, classical filters first."""
    here = [entry for entry in entries if entry.scale == scale]
    classical = dict.fromkeys((*command.baselines, *(["bilinear"] if any(e.is_searched for e in here) else [])))
    columns = {_column(entry, here): entry for entry in here}
    of_entries = {column: entry.super_resolve for column, entry in columns.items()}
    return {name: CLASSICAL[name] for name in classical} | of_entries, columns


def _clear(out: Path) -> None:
    """A folder without the results of an earlier comparison: half of them would pass for ours."""
    out.mkdir(parents=True, exist_ok=True)
    for file in filter(is_ours, list(out.iterdir())):
        file.unlink(missing_ok=True)


def described(reader: ShardReader, entries: list[Entry], count: int) -> str:
    """What was scored, and whether somebody learned from it."""
    is_seen = reader.side == "train" and any(entry.data == reader.manifest.digest for entry in entries)
    return f"{count} images" + (", on which these networks were trained" if is_seen else "")


def is_ours(file: Path) -> bool:
    """Whether it is a result of this command."""
    return re.fullmatch(r"comparison\.(md|csv|tex|json)|per_image-x\d+\.csv|fig[45]-x\d+\.png", file.name) is not None


def _check(command: CompareCommand) -> None:
    check_folder(command.out)
    if bool(command.data) == (command.faces is not None):
        raise UserError("compare needs --data SHARDS, or --faces FOLDER of faces that have no HR")
    if command.images < 0:
        raise UserError("--images must be 0 or more")
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
    entries = [_entry(word, world) for word in command.snapshots]
    for one, other in itertools.combinations(entries, 2):
        _check_pair(one, other, command.mixed_data)
    return entries


def _entry(word: str, world: World) -> Entry:
    name, path = _name_and_path(word)
    if is_search(Path(path)):
        found = read_search(Path(path))
        of = found.header
        return Entry(
            name or found.name, Path(path), of["scale"], of["side"], of["seed"], found.settings, found.super_resolve,
            of["nimg"], of["parameters"], of["data"], 1 / max(of["seconds_a_face"], 1e-9), of["faces"],
        )  # fmt: skip
    snapshot = load_snapshot(Path(path), world.device)
    config = snapshot.config
    settings = {key: value for key, value in configuration.flat(configuration.to_dict(config)).items()
                if key not in CONFIGURATION_FREE}  # fmt: skip
    count = sum(parameter.numel() for parameter in snapshot.generator.parameters())
    name = name or method_name(config) or _stem(Path(path))
    return Entry(name, Path(path), config.scale, config.data.size, config.train.seed, settings,
                 of_snapshot(snapshot, path), snapshot.nimg, count, snapshot.data)  # fmt: skip


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
    for scale in {entry.scale for entry in entries}:
        here = [entry for entry in entries if entry.scale == scale]
        columns = [_column(entry, here) for entry in here]
        for column in columns:
            if columns.count(column) > 1:
                raise UserError(f"the name {column} stands for two snapshots at x{scale}; give another: NAME=PATH")
    known = [*dict.fromkeys(names), *(name.capitalize() for name in command.baselines)]
    if command.against and command.against not in known:
        near = closest(command.against, known)
        raise UserError(f"--against {command.against!r} is not compared{near} ({', '.join(known)})")


def _check_pair(one: Entry, other: Entry, is_mixed_allowed: bool) -> None:
    is_one_row = one.name == other.name and one.scale == other.scale
    if one.data and other.data and one.data != other.data and (is_one_row or not is_mixed_allowed):
        way = "give them names: NAME=PATH" if is_mixed_allowed else "--mixed-data compares them all the same"
        raise UserError(f"{one.path} was trained on data set {one.data[:12]}, {other.path} on {other.data[:12]}:"
                        f" not the same split; {way}")  # fmt: skip
    if not is_one_row:
        return
    before, after = one.settings, other.settings
    apart = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    if one.nimg != other.nimg:
        apart.append("the images seen")
    if apart:
        raise UserError(f"{one.path} and {other.path} are both {one.name} x{one.scale} but differ in {apart[0]};"
                        " give them names: NAME=PATH")  # fmt: skip
    if one.seed == other.seed:
        raise UserError(f"{one.path} and {other.path} are both {one.name} x{one.scale} of seed"
                        f" {one.seed}: name one only, or give them names: NAME=PATH")  # fmt: skip


def summarise(found: Scores, columns: dict[str, Entry], ranks: int) -> list[Compared]:
    """Each method at one scale, classical ones first; seeds of one method are put together."""
    values = dict(zip(found.methods, found.values.numpy().swapaxes(0, 1), strict=True))  # name -> (images, metrics)
    speeds = {name: speed * ranks for name, speed in found.images_per_s.items()}
    speeds |= {name: entry.images_per_s for name, entry in columns.items() if entry.images_per_s is not None}
    rows = [Compared(name.capitalize(), values[name], means(values[name])[None], 0, 0, speeds[name])
            for name in found.methods if name not in columns]  # fmt: skip
    for name in dict.fromkeys(entry.name for entry in columns.values()):
        mine = [column for column, entry in columns.items() if entry.name == name]
        of_seeds = np.stack([values[column] for column in mine])  # (seeds, images, metrics)
        entry, speed = columns[mine[0]], float(np.mean([speeds[column] for column in mine]))
        rows.append(Compared(name, of_seeds.mean(0), np.stack([*map(means, of_seeds)]), entry.nimg, entry.parameters,
                             speed, entry.data, entry.is_searched))  # fmt: skip
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
    found: dict[str, Any] = {}
    for number, name in enumerate(metrics):
        values = scored(method.values[:, number])
        numbers = [float(means(method.values)[number]), *interval(values)]
        mean, low, high, *seeds = (
            value if math.isfinite(value) else None for value in [*numbers, *method.seeds[:, number].tolist()]
        )
        found[name] = {"mean": mean, "low": low, "high": high, "seeds": seeds, "images": len(values)}
    return found


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
    return f"{entry.name} s{entry.seed}" if seeds > 1 else entry.name


def _stem(path: Path) -> str:
    """The run's folder, or the file's name without its ending."""
    if path.is_file() and path.parent.name != SNAPSHOTS:
        return path.stem
    return (path if path.is_dir() else path.parent.parent).resolve().name


if __name__ == "__main__":
    run(main)
