"""What a run reports: sums on the device between ticks, then a progress bar, stats.jsonl and TensorBoard."""

import json
import math
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from sega_dist.data.shards import write_whole
from sega_dist.pictures import curves, to_tensor

FILE = "stats.jsonl"


class Sums:
    """Means of scalars over the steps since the last tick, without asking the device before it."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def add(self, statistics: dict[str, Tensor]) -> None:
        for name, value in statistics.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value.clone()
            self.counts[name] = self.counts.get(name, 0) + 1

    def take(self) -> tuple[list[str], Tensor]:
        """Names and means, and begin anew."""
        names = sorted(self.sums)
        values = [self.sums[name] / self.counts[name] for name in names]
        means = torch.stack(values) if values else torch.zeros(0)
        self.sums, self.counts = {}, {}
        return names, means


class Report:
    """The main process's reports; every other process has none and passes `run=None`."""

    def __init__(self, run: Path | None, nimg: int, images: int):
        self.run, self.images = run, images
        self.task = TaskID(0)
        self.progress: Progress | None = None
        if run is None:
            return
        _drop_after(run / FILE, nimg)
        self.writer = SummaryWriter(run / "tensorboard", purge_step=nimg + 1)
        self.file = (run / FILE).open("a")
        console = Console(file=sys.stderr)
        if console.is_terminal:
            columns = (BarColumn(), "{task.percentage:>3.0f}%", TimeElapsedColumn(), "ETA", TimeRemainingColumn(),
                       TextColumn("{task.fields[speed]}"))  # fmt: skip
            self.progress = Progress(*columns, console=console)
            self.task = self.progress.add_task("training", total=images, completed=nimg, speed="")
            self.progress.start()

    def tick(self, entry: dict[str, Any]) -> None:
        """One line of statistics; `entry` holds nimg and speed among the rest."""
        if self.run is None:
            return
        self.file.write(json.dumps(entry) + "\n")
        self.file.flush()
        for name, value in entry.items():
            if isinstance(value, (int, float)) and name != "nimg":
                self.writer.add_scalar(name, value, entry["nimg"])
        left = (self.images - entry["nimg"]) / max(entry["images_per_s"], 1e-9)
        clock = time.strftime("%H:%M:%S", time.gmtime(left))
        self.say(f"{entry['nimg']:>9,} / {self.images:,}  {self._line(entry)}  ETA {clock}")
        if self.progress:
            speed = f"{entry['images_per_s']:.3g} images/s"
            self.progress.update(self.task, completed=entry["nimg"], speed=speed)

    def picture(self, name: str, image: Image.Image, nimg: int) -> None:
        """A PNG in RUN/pictures and the same in TensorBoard."""
        if self.run is None:
            return
        folder = self.run / "pictures"
        folder.mkdir(exist_ok=True)
        image.save(folder / f"{name}-{nimg:012d}.png")
        self.writer.add_image(name, to_tensor(image), nimg)

    def curves(self) -> None:
        """RUN/curves.png, from all lines so far."""
        if self.run is not None:
            curves(read_stats(self.run), self.run / "curves.png")

    def say(self, message: str) -> None:
        """A sentence for the person who watches."""
        if self.run is not None:
            if self.progress:
                self.progress.console.print(message, highlight=False, markup=False)
            else:
                print(message, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.run is None:
            return
        if self.progress:
            self.progress.stop()
        self.file.close()
        self.writer.close()

    @staticmethod
    def _line(entry: dict[str, Any]) -> str:
        shown = {"images/s": "images_per_s", "loss_d": "loss_d", "loss_g": "loss_g", "D(real)": "d_real",
                 "D(fake)": "d_fake", "R1": "r1", "data": "data_wait", "PSNR": "preview_psnr",
                 "GB": "memory_gb"}  # fmt: skip
        parts = []
        for label, name in shown.items():
            if name in entry:
                value = f"{entry[name]:.0%}" if name == "data_wait" else f"{entry[name]:.3g}"
                parts.append(f"{label} {entry[name]:.2f}" if name == "preview_psnr" else f"{label} {value}")
        return "  ".join(parts)


def read_stats(run: Path) -> list[dict[str, Any]]:
    """The lines of RUN/stats.jsonl that are whole: the last one may be half written. None where there is no file."""
    file = run / FILE
    lines = file.read_text(errors="replace").splitlines() if file.is_file() else []
    return [json.loads(line) for line in lines if math.isfinite(_position(line))]


def memory_gb(device: torch.device) -> float:
    """Peak memory: of the device on a GPU, of this process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e9 if sys.platform == "darwin" else 1e6)  # bytes there, kilobytes elsewhere


def _drop_after(file: Path, nimg: int) -> None:
    """Forget lines beyond `nimg`: the run goes on from an older checkpoint and will write them again."""
    if file.is_file():
        lines = [line for line in file.read_text(errors="replace").splitlines() if _position(line) <= nimg]
        write_whole(file, "".join(line + "\n" for line in lines).encode())


def _position(line: str) -> float:
    try:
        return float(json.loads(line)["nimg"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return float("inf")  # a line cut short by a crash
