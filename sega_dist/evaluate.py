"""Scores of a snapshot on a split, with bicubic always beside it: `sega-dist evaluate SNAPSHOT --data SHARDS`.

On several processes by `accelerate launch -m sega_dist.evaluate` with the same arguments.
"""

import csv
import dataclasses
import io
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import Tensor

from sega_dist.arguments import Device, SnapshotPath, check_folder, parse
from sega_dist.data.images import ShardReader
from sega_dist.data.remote import open_shards
from sega_dist.data.shards import write_whole
from sega_dist.distributed import WAIT, World
from sega_dist.errors import UserError, run
from sega_dist.pictures import Panel, grid, to_image
from sega_dist.scoring import CLASSICAL, Scores, load_metrics, of_snapshot, protocol, score
from sega_dist.snapshot import EVAL, load_snapshot, run_of

SHOWN = 8  # rows of the picture grid
HEADINGS = {"psnr": "PSNR dB", "ssim": "SSIM", "psnr_y": "PSNR-Y dB", "ssim_y": "SSIM-Y", "lpips": "LPIPS",
            "niqe": "NIQE"}  # fmt: skip


@dataclass(frozen=True)
class EvaluateCommand:
    """Score a snapshot's super-resolved images on every image of a split."""

    snapshot: SnapshotPath  # a .safetensors or .onnx file, or a run's folder (its newest snapshot)
    data: str  # folder of shards, or the https address of one
    split: str = "test"  # side of the data set: train, val, test or preview
    out: Path | None = None  # folder for the results; default RUN/eval
    niqe: Path | None = None  # pristine parameters (.npz with BasicSR's keys): score NIQE as well
    lpips_weights: Path | None = None  # AlexNet's weights with torchvision's keys: score LPIPS as well
    batch: int = 8  # images at a time
    save: int = 0  # write LR and SR of the first so many images as PNG to OUT/lr and OUT/sr
    timeout: int = WAIT  # seconds that a process waits for the others before it gives up
    device: Device = "auto"  # auto: the GPU where there is one


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
    """Evaluate and write metrics.json, per_image.csv and grid.png; returns what stands in metrics.json, and speeds."""
    assert command.out is not None
    out = check_folder(command.out)
    if command.batch < 1:
        raise UserError("--batch must be 1 or more")
    snapshot = load_snapshot(command.snapshot, world.device)
    reader, scale = ShardReader(open_shards(command.data), command.split), snapshot.config.scale
    judge = load_metrics(command.niqe, command.lpips_weights, reader.manifest.size, world)
    stamp = protocol(reader, judge, snapshot.device) | {"scale": scale, "nimg": snapshot.nimg}
    world.agree(stamp | {"--batch": command.batch, "--save": command.save})
    saved = {reader.name(i) for i in range(min(command.save, len(reader)))}
    methods = {"bicubic": CLASSICAL["bicubic"], "model": of_snapshot(snapshot, str(command.snapshot))}
    found = score(world, reader, scale, methods, judge, command.batch, SHOWN,
                  lambda name, images: _save(out, name, images) if name in saved else None)  # fmt: skip
    if not world.is_main:
        return {}
    out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"protocol": stamp, "images": len(found.names), "methods": means(found)}
    write_whole(out / "metrics.json", (json.dumps(results, indent=1, allow_nan=False) + "\n").encode())
    write_per_image(out / "per_image.csv", found)
    _picture(found).save(out / "grid.png")
    speeds = {
        name: speed * world.size for name, speed in found.images_per_s.items()
    }  # in no file: those are the same bits
    return results | {"images_per_s": speeds}


def means(found: Scores) -> dict[str, dict[str, float | None]]:
    """Mean over images by method and metric; None stands for infinite or no number, which JSON cannot hold."""
    methods = {}
    for method, row in zip(found.methods, found.values.mean(0).tolist(), strict=True):
        pairs = zip(found.metrics, row, strict=True)
        methods[method] = {name: value if math.isfinite(value) else None for name, value in pairs}
    return methods


def write_per_image(path: Path, found: Scores) -> None:
    """One line an image, all its scores by all methods."""
    writer = csv.writer(file := io.StringIO())
    writer.writerow(["name", *(f"{method}_{name}" for method in found.methods for name in found.metrics)])
    writer.writerows([name, *row] for name, row in zip(found.names, found.values.flatten(1).tolist(), strict=True))
    write_whole(path, file.getvalue().encode(errors="surrogateescape"))  # as names of files are read


def cell(name: str, value: float | None) -> str:
    """A score as people read it."""
    return ("inf" if "psnr" in name else "-") if value is None else f"{value:.2f}" if "psnr" in name else f"{value:.4f}"


def table(results: dict[str, Any]) -> Table:
    """The results as people read them."""
    shown = Table(title=f"{results['images']} images of split {results['protocol']['split']},"
                        f" x{results['protocol']['scale']}")  # fmt: skip
    names = results["protocol"]["metrics"]
    for heading in ("method", *(HEADINGS[name] for name in names), "images/s"):
        shown.add_column(heading, justify="left" if heading == "method" else "right")
    for method, values in results["methods"].items():
        cells = [cell(name, values[name]) for name in names]
        shown.add_row(method, *cells, f"{results['images_per_s'][method]:.3g}")
    return shown


def _picture(found: Scores) -> Any:
    rows = []
    for i, (lr, hr) in enumerate(zip(found.shown["LR"], found.shown["HR"], strict=True)):
        captions = [f"{row[0]:.2f} dB / {row[1]:.3f}" for row in found.values[i].tolist()]
        made = [Panel(found.shown[m][i], text) for m, text in zip(found.methods, captions, strict=True)]
        rows.append([Panel(lr, f"{lr.shape[1]}x{lr.shape[2]}"), *made, Panel(hr)])
    return grid(["LR", "bicubic", "SR", "HR"], rows)


def _save(out: Path, name: str, images: dict[str, Tensor]) -> None:
    for kind in ("lr", "sr"):
        (out / kind).mkdir(parents=True, exist_ok=True)
        flat = str(Path(name).with_suffix(".png")).replace("/", "-")  # names of two folders may have one stem
        to_image(images[kind]).save(out / kind / flat)


if __name__ == "__main__":
    run(main)
