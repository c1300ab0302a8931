"""Requests to stop: signals to this process, and files in the run's folder."""

import os
import signal
import time
from pathlib import Path
from typing import Any, Literal

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
TWICE = 2.0  # seconds; a launcher hands on a signal that this process got itself, and that is one request

Stop = Literal["", "preempted", "stopped"]
STOPS: tuple[Stop, ...] = ("", "preempted", "stopped")  # where ranks were asked differently, the last counts


class StopRequests:
    """What asked this process to stop, if anything did: the scheduler (`preempted`), or a person (`stopped`).

    A person touches RUN/stop, or presses Ctrl-C; a job's script touches RUN/stop.JOB.RESTART, which no later life of
    the job obeys.
    """

    def __init__(self, run: Path | None):
        """`run` is the folder to look into, on the first rank; the others leave that to it."""
        self.kind: Stop = ""
        self.since = 0.0
        life = f"{os.environ.get('SLURM_JOB_ID', '')}.{os.environ.get('SLURM_RESTART_COUNT') or 0}"
        self.run = run
        self.files: dict[str, Stop] = {"stop": "stopped", f"stop.{life}": "preempted"} if run else {}

    def __enter__(self) -> "StopRequests":
        self.handlers = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        for file in self.run.glob("stop*") if self.run else ():
            if self.files.get(file.name) != "preempted":  # meant for whoever ran before
                file.unlink(missing_ok=True)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def look(self) -> None:
        """Whether one of the files appeared."""
        for name, kind in self.files.items():
            if not self.kind and self.run and (self.run / name).exists():
                self.kind = kind

    def _on_signal(self, number: int, _: Any) -> None:
        now = time.monotonic()
        if self.kind and number == signal.SIGINT and now - self.since > TWICE:
            raise KeyboardInterrupt  # asked again: do not wait for the step
        self.kind = self.kind or ("stopped" if number == signal.SIGINT else "preempted")
        self.since = self.since or now
