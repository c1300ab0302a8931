"""Who writes into a run's folder, and how that ended: RUN/status.json, which a job's script reads as well.

One process writes. Whoever starts while it lives is refused; one that was thought dead and was not finds another's name
in the file, and commits nothing more.
"""

import contextlib
import json
import os
import secrets
import socket
import sys
import time
from pathlib import Path
from typing import Any, Literal

import psutil  # accelerate brings it

from sega_dist.data.shards import write_whole
from sega_dist.errors import TAKEN_OVER, UserError

FILE = "status.json"
SIGN = 5.0  # seconds between signs of life
SILENCE = 60.0  # seconds without one, after which a writer on another machine counts as gone
State = Literal["running", "done", "preempted", "stopped", "failed"]


class Owner:
    """The right to write into `run`, from `take` until `end`; `name` is that of the file that says so."""

    def __init__(self, run: Path, name: str = FILE):
        self.run, self.file, self.name = run, run / name, name
        process = psutil.Process()
        self.me = {
            "token": secrets.token_hex(8), "host": socket.gethostname(), "pid": process.pid,
            "born": process.create_time(), "job": os.environ.get("SLURM_JOB_ID", ""),
            "restart": _number(os.environ.get("SLURM_RESTART_COUNT", "0")),
        }  # fmt: skip
        self.has_lost = False  # another one took over
        self.signed = 0.0

    def take(self) -> None:
        """Become the writer; UserError while another one lives. A minute is the longest that it takes to tell."""
        end = time.monotonic() + SILENCE + SIGN
        while (other := read_status(self.run, self.name)) and self._lives(other):
            is_here = other.get("host") == self.me["host"]
            job = f", job {other['job']!s:.40}" if other.get("job") else ""
            who = f"process {other.get('pid')} on {other.get('host')}{job}"
            if is_here or time.monotonic() > end:
                raise UserError(f"{self.run} is being written by {who}: wait for its end, or touch {self.run}/stop")
            if end - time.monotonic() > SILENCE:
                print(f"{who} wrote into {self.run}: waiting up to {SILENCE:.0f} s for a sign of life", file=sys.stderr)
            time.sleep(SIGN / 2)
        for pattern in (f".{self.name}.*", ".clock.*"):  # by a process that was killed
            for abandoned in self.run.glob(pattern):
                abandoned.unlink(missing_ok=True)
        self.write("running")

    def check(self) -> None:
        """UserError if another process has taken over: asked before anything is committed."""
        other = read_status(self.run, self.name)
        self.has_lost = other is not None and other.get("token") != self.me["token"]
        if self.has_lost and other:
            raise UserError(
                f"process {other.get('pid')} on {other.get('host')} writes into {self.run} now; this one ends and"
                " leaves it alone",
                TAKEN_OVER,
            )

    def sign(self) -> None:
        """A sign of life, every few seconds."""
        if time.monotonic() - self.signed < SIGN or self.has_lost:
            return
        self.signed = time.monotonic()
        with contextlib.suppress(UserError):
            self.check()
            os.utime(self.file)

    def end(self, state: State, nimg: int, code: int, message: str) -> None:
        """Write down how the run ended, unless it is another's now."""
        with contextlib.suppress(UserError):
            self.check()
            self.write(state, nimg=nimg, code=code, message=message)

    def write(self, state: State, **more: Any) -> None:
        """The file, whole at any moment."""
        self.run.mkdir(parents=True, exist_ok=True)
        values = {"state": state, "time": time.time(), **self.me, **more}
        write_whole(self.file, (json.dumps(values, indent=1) + "\n").encode())

    def _lives(self, other: dict[str, Any]) -> bool:
        if other.get("state") != "running":
            return False
        if self.me["job"] and other.get("job") == self.me["job"] and _number(other.get("restart")) < self.me["restart"]:
            return False  # the scheduler started this job anew: the life before is over
        if other.get("host") == self.me["host"]:
            return _runs(other.get("pid"), other.get("born"))
        return abs(self._silence()) < SILENCE

    def _silence(self) -> float:
        """Seconds since the last sign of life, by the clock of the file system that both see."""
        probe = self.run / f".clock.{self.me['token']}"
        try:
            probe.touch()
            return probe.stat().st_mtime - self.file.stat().st_mtime
        finally:
            probe.unlink(missing_ok=True)


def read_status(run: Path, name: str = FILE) -> dict[str, Any] | None:
    """RUN/status.json; None where there is none, or it holds nothing that makes sense."""
    file = run / name
    try:
        values = json.loads(file.read_text()) if file.is_file() else None  # a pipe would be waited for
    except (OSError, ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None


def _runs(pid: Any, born: Any) -> bool:
    """Whether the process that was born then still runs; another one may have its number by now."""
    if not isinstance(pid, int) or not isinstance(born, (int, float)):
        return False
    try:
        process = psutil.Process(pid)
        return abs(process.create_time() - born) < 2 and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.Error, ValueError, OverflowError):
        return False


def _number(text: Any) -> int:
    return int(text) if str(text).isdecimal() and len(str(text)) < 10 else 0
