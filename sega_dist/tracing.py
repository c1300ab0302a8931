"""Where the time of a step goes: a trace of a few steps by PyTorch's profiler, for Perfetto or chrome://tracing."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

SKIPPED, WARMUP, TRACED = 2, 1, 3  # steps


@contextmanager
def traced_steps(folder: Path | None, rank: int) -> Iterator[Callable[[], None]]:
    """Yields what to call after every step; writes FOLDER/trace-RANK.json after a few. Without a folder: nothing."""
    if folder is None:
        yield lambda: None
        return
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"trace-{rank}.json"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    with profile(
        activities=activities,
        schedule=schedule(wait=SKIPPED, warmup=WARMUP, active=TRACED, repeat=1),
        on_trace_ready=lambda trace: trace.export_chrome_trace(str(file)),
    ) as profiler:
        yield profiler.step
    if not file.exists():
        steps = SKIPPED + WARMUP + TRACED
        print(f"warning: no trace in {folder}: the run ended before its step {steps}", file=sys.stderr, flush=True)
