"""How far long work is: a bar on a terminal, a line each tenth elsewhere; always on stderr."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@contextlib.contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Gives a function to call with how many of `total` images were done since the last call."""
    console, began, done = Console(file=sys.stderr), time.perf_counter(), 0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[speed]}"))
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total, speed="")

        def advance(count: int) -> None:
            nonlocal done
            tenth, done = done * 10 // total, done + count
            speed = f"{done / (time.perf_counter() - began):.3g} images/s"
            bar.update(task, advance=count, speed=speed)
            if not console.is_terminal and done * 10 // total > tenth:
                left = (total - done) * (time.perf_counter() - began) / done
                print(f"{what}: {done:,} / {total:,} images, {speed}, {left:.0f} s left", file=sys.stderr, flush=True)

        yield advance
