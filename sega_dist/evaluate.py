"""Scores of a snapshot on a split, with bicubic always beside it: `sega-dist evaluate SNAPSHOT --data SHARDS`.

On several processes by `accelerate launch -m sega_dist.evaluate` with the same arguments.
"""

import contextlib
import csv
import dataclasses
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from sega_dist.arguments import Device, SnapshotPath, parse
from sega_dist.data.images import DamagedSample, ShardReader
from sega_dist.data.pairs import bicubic, to_uint8, to_unit
from sega_dist.data.remote import open_shards
from sega_dist.distributed import WAIT, World
from sega_dist.errors import UserError, run
from sega_dist.metrics import NAMES, PROTOCOL, scores
from sega_dist.pictures import Panel, grid, to_image
from sega_dist.progress import progress
from sega_dist.snapshot import EVAL, Snapshot, load_snapshot, run_of

SHOWN = 8  # rows of the picture grid
METHODS = ("bicubic", "model")


@dataclass(frozen=True)
class EvaluateCommand:
    """Score a snapshot's super-resolved images on every image of a split."""

    snapshot: SnapshotPath  # a .safetensors or .onnx file, or a run's folder (its newest snapshot)
    data: str  # folder of shards, or the https address of one
    split: str = "test"  # side of the data set: train, val, test or preview
    out: Path | None = None  # folder for the results; default RUN/eval
    batch: int = 8  # images at a time
    save: int = 0  # write LR and SR of the first so many images as PNG to OUT/lr and OUT/sr
    timeout: int = WAIT  # seconds that a process waits for the others before it gives up
    device: Device = "auto"  # auto: the GPU where there is one


@dataclass(frozen=True)
class Row:
    """One image of the split: its name and the scores of each method."""

    name: str
    scores: dict[str, dict[str, float]]  # method -> metric -> value


def main(argv: list[str] | None = None) -> None:
    command = parse(EvaluateCommand, argv or [], "sega-dist evaluate")
    command = dataclasses.replace(command, out=command.out or run_of(command.snapshot) / EVAL)
    world = World(device=command.device, timeout=command.timeout)
    try:
        with world.naming_lost_ranks("start again"):
            results = evaluate(command, world)
    finally:
        world.close()
    if world.is_main:
        Console().print(table(results))
        print(f"results in {command.out}: metrics.json, per_image.csv, grid.png")


def evaluate(command: EvaluateCommand, world: World) -> dict[str, Any]:
    """Evaluate and write metrics.json, per_image.csv and grid.png; returns what stands in metrics.json.

    Ranks share the batches, not the images of one, so that the scores are the same bits for any number of ranks.
    """
    assert command.out is not None
    if command.batch < 1:
        raise UserError("--batch must be 1 or more")
    snapshot = load_snapshot(command.snapshot, world.device)
    manifest, scale = open_shards(command.data), snapshot.config.scale
    reader = ShardReader(manifest, command.split)
    protocol = PROTOCOL | {
        "scale": scale, "split": command.split, "data": manifest.digest, "data_split": manifest.recipe.split,
        "crop_of_source": manifest.recipe.crop, "nimg": snapshot.nimg, "device": snapshot.device.type,
        "lr": "bicubic, antialiased, a = -0.5, rounded to 8 bits",
    }  # fmt: skip
    world.agree(protocol | {"--batch": command.batch, "--save": command.save})
    command.out.mkdir(parents=True, exist_ok=True)
    values, shown = _score(command, world, snapshot, reader)
    rows = [Row(reader.name(i), {m: dict(zip(NAMES, v, strict=True)) for m, v in zip(METHODS, row, strict=True)})
            for i, row in enumerate(values.tolist())] if world.is_main else []  # fmt: skip
    if not world.is_main:
        return {}
    results = {"protocol": protocol, "images": len(rows), "methods": means(rows)}
    _write(command.out, results, rows, _pictures(reader, scale, shown.cpu(), rows))
    return results


def _score(command: EvaluateCommand, world: World, snapshot: Snapshot, reader: ShardReader) -> tuple[Tensor, Tensor]:
    """Scores (images, methods, metrics) of the whole split and the first SR images, the same on every rank."""
    assert command.out is not None
    count, side = len(reader), reader.manifest.size
    values = torch.zeros(count, len(METHODS), len(NAMES), dtype=torch.float64, device=world.device)
    shown = torch.zeros(min(SHOWN, count), 3, side, side, dtype=torch.uint8, device=world.device)
    seen = torch.zeros(count, dtype=torch.int32, device=world.device)
    mine = [range(start, min(start + command.batch, count)) for start in range(0, count, command.batch)]
    mine = mine[world.rank :: world.size]
    share = f", share 1 of {world.size}" if world.size > 1 else ""
    bar = progress(f"evaluating {command.split}{share}", sum(map(len, mine)))
    failure = None
    try:
        with bar if world.is_main else contextlib.nullcontext(lambda _: None) as advance:
            for numbers in mine:
                start, rows = numbers[0], slice(numbers[0], numbers[-1] + 1)
                hr, names = read_whole(reader, numbers)
                lr, methods = super_resolve(snapshot.generator, snapshot.config.scale, hr.to(world.device))
                for m, method in enumerate(METHODS):
                    by_metric = scores(hr.to(world.device), methods[method])
                    values[rows, m] = torch.stack([by_metric[name].double() for name in NAMES], 1)
                seen[rows] += 1
                shown[rows] = methods["model"][: len(shown[rows])]
                for i in numbers[: max(0, command.save - start)]:
                    _save(command.out, names[i - start], {"lr": lr[i - start], "sr": methods["model"][i - start]})
                advance(len(names))
    except UserError as error:
        failure = error
    if world.any(failure is not None):
        raise failure or UserError("another process could not read its share of the split; it says what is wrong")
    assert bool((world.sum_of(seen) == 1).all()), "every image is scored exactly once"
    return world.sum_of(values), world.sum_of(shown)


def _pictures(reader: ShardReader, scale: int, sr: Tensor, rows: list[Row]) -> list[list[Panel]]:
    """Rows of the picture grid for the first images of the split, whose SR is given."""
    hr, _ = read_whole(reader, range(len(sr)))
    lr, enlarged = downscaled(hr, scale)
    return [list(_panels(hr[i], lr[i], {"bicubic": enlarged[i], "model": sr[i]}, rows[i].scores))
            for i in range(len(sr))]  # fmt: skip


def read_whole(reader: ShardReader, numbers: range) -> tuple[Tensor, list[str]]:
    """Images (N,3,S,S) and their names; a damaged one ends the evaluation, since scores must cover the whole split."""
    try:
        return torch.stack([reader.image(i) for i in numbers]), [reader.name(i) for i in numbers]
    except DamagedSample as error:
        raise UserError(f"{reader.manifest.folder} is damaged: {error}; sega-dist verify names every shard") from None


def downscaled(hr: Tensor, scale: int) -> tuple[Tensor, Tensor]:
    """LR of HR (N,3,S,S) uint8, and its bicubic enlargement."""
    height, width = hr.shape[2:]
    lr = bicubic(hr, height // scale, width // scale)
    return lr, bicubic(lr, height, width)


@torch.no_grad()
def super_resolve(generator: torch.nn.Module, scale: int, hr: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """LR of HR (N,3,S,S) uint8, and each method's SR at HR's size, all uint8."""
    lr, enlarged = downscaled(hr, scale)
    return lr, {"bicubic": enlarged, "model": to_uint8(generator(to_unit(lr)))}


def means(rows: list[Row]) -> dict[str, dict[str, float | None]]:
    """Mean over images; None stands for infinite, which JSON cannot hold."""
    methods = {}
    for method in rows[0].scores:
        averages = {name: sum(row.scores[method][name] for row in rows) / len(rows) for name in NAMES}
        methods[method] = {name: value if math.isfinite(value) else None for name, value in averages.items()}
    return methods


def table(results: dict[str, Any]) -> Table:
    """The results as people read them."""
    shown = Table(title=f"{results['images']} images of split {results['protocol']['split']},"
                        f" x{results['protocol']['scale']}")  # fmt: skip
    for heading in ("method", "PSNR dB", "SSIM", "PSNR-Y dB", "SSIM-Y"):
        shown.add_column(heading, justify="left" if heading == "method" else "right")
    for method, values in results["methods"].items():
        cells = [
            "inf" if values[n] is None else f"{values[n]:.2f}" if "psnr" in n else f"{values[n]:.4f}" for n in NAMES
        ]
        shown.add_row(method, *cells)
    return shown


def _save(out: Path, name: str, images: dict[str, Tensor]) -> None:
    for kind, pixels in images.items():
        (out / kind).mkdir(parents=True, exist_ok=True)
        flat = str(Path(name).with_suffix(".png")).replace("/", "-")  # names of two folders may have one stem
        to_image(pixels).save(out / kind / flat)


def _panels(hr: Tensor, lr: Tensor, methods: dict[str, Tensor], row: dict[str, dict[str, float]]) -> Iterator[Panel]:
    yield Panel(lr, f"{lr.shape[1]}x{lr.shape[2]}")
    for method, sr in methods.items():
        yield Panel(sr, f"{row[method]['psnr']:.2f} dB / {row[method]['ssim']:.3f}")
    yield Panel(hr)


def _write(out: Path, results: dict[str, Any], rows: list[Row], pictures: list[list[Panel]]) -> None:
    (out / "metrics.json").write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
    methods = list(results["methods"])
    with (out / "per_image.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["name", *(f"{method}_{name}" for method in methods for name in NAMES)])
        writer.writerows([row.name, *(row.scores[m][name] for m in methods for name in NAMES)] for row in rows)
    grid(["LR", "bicubic", "SR", "HR"], pictures).save(out / "grid.png")


if __name__ == "__main__":
    run(main)
