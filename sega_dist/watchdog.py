"""A thread that looks on: a step that takes too long ends the process, and every rank's stack is written down."""

import contextlib
import faulthandler
import os
import threading
from collections.abc import Callable
from pathlib import Path

from sega_dist.distributed import World
from sega_dist.errors import HANG, say

PATIENCE = 3  # times the limit for the first step, which may wait for a compiler
GRACE = 15  # seconds that giving up may take itself, where the disk hangs or Python's lock is held


class Watchdog:
    """From `with` on: `each_second` is called each second, and `limit` seconds without a new section end the process.

    What the process does it says by `world.enter`.
    """

    def __init__(self, world: World, folder: Path, limit: float, each_second: Callable[[], None]):
        self.world, self.each_second = world, each_second
        self.limit, self.patience = limit, PATIENCE
        self.file = folder / f"stack-rank-{world.rank}.txt"
        self.is_over = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.stacks = self.file.open("a")
        self._arm()
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.is_over.set()
        self.thread.join(GRACE)
        faulthandler.cancel_dump_traceback_later()
        self.stacks.close()
        if self.file.stat().st_size == 0:
            self.file.unlink()
            with contextlib.suppress(OSError):  # something else lies there
                self.file.parent.rmdir()

    def _watch(self) -> None:
        while not self.is_over.wait(1.0):
            self._arm()
            if self.world.seconds_in_section() > self.limit * self.patience:
                self._give_up()
            with contextlib.suppress(OSError):
                self.each_second()

    def _arm(self) -> None:
        """Python's own timer needs no lock: the last resort where a library never gives it back."""
        faulthandler.dump_traceback_later(self.limit * self.patience + GRACE, exit=True, file=self.stacks)

    def _give_up(self) -> None:
        last_resort = threading.Timer(GRACE, os._exit, [HANG])
        last_resort.daemon = True
        last_resort.start()
        seconds = self.world.seconds_in_section()
        say("error", f"no progress for {seconds:.0f} s while {self.world.section}; stacks in {self.file}")
        faulthandler.dump_traceback(self.stacks, all_threads=True)
        for line in self.world.sections_of_others():
            say("error", line)
        os._exit(HANG)
