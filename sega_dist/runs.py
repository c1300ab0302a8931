"""The runs of a sweep: how far each is, the process that trains it, and how all that is shown."""

import contextlib
import os
import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from sega_dist.config import Config
from sega_dist.errors import PREEMPTED
from sega_dist.owner import Owner, read_status
from sega_dist.preemption import Stop
from sega_dist.snapshot import SNAPSHOTS
from sega_dist.stats import read_stats


class Run:
    """RUN is its folder, from which all comes that it shows; what its process prints goes to RUN.log."""

    process: subprocess.Popen[bytes]

    def __init__(self, folder: Path, command: list[str], config: Config):
        self.folder, self.command, self.config = folder, command, config
        self.log = folder.with_name(f"{folder.name}.log")
        self.code, self.message = 0, ""
        self.state: Literal["waiting", "training", "done", "failed", "preempted", "stopped"] = "waiting"
        if self.is_done():
            self.state = "done"
        self.row = self._row()

    def is_done(self) -> bool:
        """Whether all its images were seen and its last snapshot stands."""
        status = read_status(self.folder) or {}
        nimg = status.get("nimg")
        if status.get("state") != "done" or not isinstance(nimg, int) or nimg < self.config.train.images:
            return False
        return (self.folder / SNAPSHOTS / f"snapshot-{nimg:012d}.safetensors").is_file()

    def start(self, gpus: str = "") -> None:
        """In a session of its own: Ctrl-C is for the sweep, which lets the run save. `gpus`: CUDA_VISIBLE_DEVICES."""
        environment = os.environ | ({"CUDA_VISIBLE_DEVICES": gpus} if gpus else {})
        self.token = self._status().get("token")
        with self.log.open("ab") as log:
            self.said = log.tell()
            self.process = subprocess.Popen(self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                            env=environment, start_new_session=True)  # fmt: skip
        self.state, self.row = "training", self._row() | {"state": "training"}

    def ask_to_stop(self) -> None:
        """To be repeated until it ends: it looks for requests only once it has begun, and ranks below a launcher get no
        signals but by their death."""
        if self.folder.is_dir():
            (self.folder / "stop").touch()

    def abandon(self) -> None:
        """It saves by itself, and ends."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)

    def look(self, asked: Stop = "") -> None:
        """How far it is, or how it ended; `asked` is what it was asked to do meanwhile."""
        code = self.process.poll()
        if code is not None:
            self._end(code, asked)
        self.row = self._row()

    def _end(self, code: int, asked: Stop) -> None:
        status = self._status()
        if code and status.get("token") != self.token and isinstance(status.get("code"), int):
            code = status["code"] or code  # a launcher ends with a code of its own
        if code == PREEMPTED:
            self.state = "stopped" if status.get("state") == "stopped" else "preempted"
        elif code == 0 and self.is_done():
            self.state = "done"
        elif asked:  # a signal to all processes of a job ends one that has not begun yet
            self.state = asked
        else:
            self.state, self.message = "failed", self._last_words()
        self.code = code

    def _last_words(self) -> str:
        """The first line that is an error, after which a launcher says more; else the last one."""
        with self.log.open("rb") as log:
            log.seek(self.said)
            lines = [line for line in log.read().decode(errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith(("error", "internal error"))]
        return [*errors[:1], *lines[-1:], "without a word"][0][:300]

    def _row(self) -> dict[str, Any]:
        entries, images = read_stats(self.folder), self.config.train.images
        last = entries[-1] if entries else {"nimg": 0, "images_per_s": 0.0}
        seconds, position = 0.0, 0
        for entry in entries:
            seconds, position = seconds + (entry["nimg"] - position) / entry["images_per_s"], entry["nimg"]
        left = max(images - last["nimg"], 0) / last["images_per_s"] if entries else None
        score = next((entry["preview_psnr"] for entry in reversed(entries) if "preview_psnr" in entry), None)
        return {"run": self.folder.name, "state": self.state, "nimg": last["nimg"], "images": images,
                "images_per_s": last["images_per_s"], "left_s": left, "seconds": seconds, "preview_psnr": score,
                "code": self.code, "message": self.message}  # fmt: skip

    def _status(self) -> dict[str, Any]:
        return read_status(self.folder) or {}


class Board:
    """What is seen of a sweep: its file for programs; a table on a terminal, elsewhere a line each tenth of a run."""

    def __init__(self, owner: Owner, runs: list[Run]):
        console = Console(file=sys.stderr)
        self.owner, self.runs, self.rows, self.shown = owner, runs, list[dict[str, Any]](), dict[str, tuple[str, int]]()
        self.live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None

    def __enter__(self) -> "Board":
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.stop()

    def show(self) -> None:
        self.owner.sign()
        rows = [run.row for run in self.runs]
        if rows == self.rows:
            return
        self.rows = rows
        self.owner.check()
        self.owner.write("running", runs=rows)
        if self.live:
            self.live.update(table(rows), refresh=True)
        for row in rows if self.live is None else ():
            step = row["state"], 10 * row["nimg"] // row["images"]
            if row["state"] != "waiting" and self.shown.get(row["run"]) != step:
                state, images, speed, left, *_ = _cells(row)
                speed = f", {speed} images/s, {left} left" if left else ""
                print(f"{row['run']}: {state}, {images} images{speed}", file=sys.stderr, flush=True)
            self.shown[row["run"]] = step


def table(rows: list[dict[str, Any]]) -> Table:
    """A line a run."""
    shown = Table()
    for name in ("run", "state", "images", "images/s", "left", "seconds", "PSNR"):
        shown.add_column(name, justify="left" if name in ("run", "state") else "right")
    for row in rows:
        shown.add_row(escape(row["run"]), *_cells(row))
    return shown


def _cells(row: dict[str, Any]) -> list[str]:
    left = str(timedelta(seconds=round(row["left_s"]))) if row["state"] == "training" and row["nimg"] else ""
    score = f"{row['preview_psnr']:.2f}" if row["preview_psnr"] is not None else ""
    images = f"{row['nimg']:,} of {row['images']:,}"
    return [row["state"], images, f"{row['images_per_s']:.3g}", left, f"{row['seconds']:.0f}", score]
