"""How far long work is: a bar on a terminal, a line each tenth elsewhere; always on stderr."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@contextlib.contextmanager
def progress(what: str, total: int, unit: str = "images") -> Iterator[Callable[..., None]]:
    """Gives a function to call with how many of `total` were done since the last call, and a note.

    With `seconds`, what was done took so long in an earlier life of the work.
    """
    console, began, done, said = Console(file=sys.stderr), time.perf_counter(), 0, ""
    texts = TextColumn("{task.fields[speed]}"), TextColumn("{task.fields[note]}")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), *texts)
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total, speed="", note="")

        def advance(count: int, note: str = "", seconds: float = 0.0) -> None:
            nonlocal began, done, said
            said, began = note or said, began - seconds
            tenth, done = done * 10 // total, done + count
            speed = f"{done / (time.perf_counter() - began):.3g} {unit}/s"
            if seconds:
                bar.reset(task, completed=done, total=total)  # or its time left is that of a leap
            bar.update(task, completed=done, speed=speed, note=said)
            if not console.is_terminal and done * 10 // total > tenth:
                left = (total - done) * (time.perf_counter() - began) / done
                print(
                    f"{what}: {done:,} / {total:,} {unit}, {speed}, {left:.0f} s left{said and f', {said}'}",
                    file=sys.stderr,
                    flush=True,
                )

        yield advance
