"""How the benchmarks time, and what they say of the machine: the same for every benchmark."""

import hashlib
import math
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from sega_dist.arguments import Device
from sega_dist.errors import UserError

Call = Callable[[], Any]
WARM, LONG = 0.025, 0.2  # seconds a call is repeated before and while it is timed


def device_for(asked: Device) -> str:
    """`cuda` or `cpu`; UserError if the asked one is not there."""
    has_gpu = torch.cuda.is_available()
    if asked == "cuda" and not has_gpu:
        raise UserError("--device cuda: this machine has no CUDA device; use --device cpu")
    return ("cuda" if has_gpu else "cpu") if asked == "auto" else asked


def cold(call: Call, device: str) -> list[float]:
    """Milliseconds of single calls; on a GPU with its L2 cache flushed before each."""
    if device == "cuda":
        from triton.testing import do_bench

        return do_bench(call, warmup=WARM * 1000, rep=LONG * 1000, return_mode="all")
    return _repeat(call)


def chained(call: Call) -> tuple[Any, list[float]]:
    """Milliseconds of replays of a CUDA graph that holds one call: as inside a captured step, without launch costs.

    Also what a replay leaves, for a check: the memory it writes is overwritten with NaN before.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outcome = call()
    for tensor in outcome:
        tensor.fill_(float("nan"))
    graph.replay()
    replayed = [tensor.clone() for tensor in outcome]

    return replayed, in_a_row(graph.replay, "cuda")


def in_a_row(call: Call, device: str, group_ms: float = 5) -> list[float]:
    """Milliseconds of a call among its like, as in a loop: on a GPU in groups that the host does not wait within.

    `group_ms`: how long a group takes at least, far above the timers' grain.
    """
    if device == "cpu":
        times: list[float] = []
        began = time.perf_counter()
        while not times or time.perf_counter() - began < LONG:
            start = time.perf_counter()
            call()
            times.append((time.perf_counter() - start) * 1000)
        return times
    once = statistics.median(_synchronised(call, device))
    count = max(1, math.ceil(group_ms / once))
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for _ in range(max(5, int(LONG * 1000 / (once * count)))):
        begin.record()
        for _ in range(count):
            call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / count)
    return times


def _repeat(call: Call) -> list[float]:
    times: list[float] = []
    began, is_warm = time.perf_counter(), False
    call()
    while len(times) < 3 or time.perf_counter() - began < (LONG if is_warm else WARM):
        if not is_warm and time.perf_counter() - began >= WARM:
            times, began, is_warm = [], time.perf_counter(), True
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1000)
    return times


def quantiles(times: list[float]) -> dict[str, float]:
    """Median and the middle 60 percent."""
    ordered = sorted(times)
    low, high = (ordered[round(q * (len(ordered) - 1))] for q in (0.2, 0.8))
    return {"median_ms": statistics.median(ordered), "p20_ms": low, "p80_ms": high}


def ceilings(device: str, dtype: torch.dtype) -> dict[str, float]:
    """What this machine reaches at its best: a matrix product in FLOP/s and a copy in bytes/s, on random numbers."""
    side, count = (8192, 2**30) if device == "cuda" else (1024, 2**26)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    product = min(_synchronised(lambda: a @ b, device))
    source = torch.randn(count, device=device)
    target = torch.empty_like(source)
    copy = min(_synchronised(lambda: target.copy_(source), device))
    return {"flop_per_s": 2 * side**3 / product * 1000, "bytes_per_s": 2 * source.nbytes / copy * 1000}


def _synchronised(call: Call, device: str) -> list[float]:
    def whole() -> None:
        call()
        if device == "cuda":
            torch.cuda.synchronize()

    return _repeat(whole)


def provenance(device: str) -> dict[str, Any]:
    """Machine, versions, commit and command, to stand beside every figure."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    facts: dict[str, Any] = {"date": now, "command": " ".join(sys.argv), "python": platform.python_version(),
                             "commit": _commit(), "code": code_digest()}  # fmt: skip
    for name in ("torch", "triton"):
        try:
            facts[name] = version(name)
        except PackageNotFoundError:
            facts[name] = None
    facts |= {"threads": torch.get_num_threads(), "device": platform.processor() or platform.machine()}
    if device == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem,power.draw", "--format=csv,noheader"]
        facts |= {"device": torch.cuda.get_device_name(), "nvidia_smi": _said(query), "cuda": torch.version.cuda,
                  "cudnn": torch.backends.cudnn.version(), "cudnn_benchmark": torch.backends.cudnn.benchmark,
                  "cudnn_tf32": torch.backends.cudnn.allow_tf32}  # fmt: skip
    return facts


def code_digest() -> str:
    """Of the code that decides the figures: kernels, networks, what a step is made of, benchmarks."""
    package = Path(__file__).resolve().parent.parent
    files = [f for part in ("kernels", "networks", "bench") for f in sorted((package / part).rglob("*.py"))]
    step = ("batches", "batchnorm", "config", "distributed", "ema", "engines", "losses", "objectives", "players",
            "presets", "recording")  # fmt: skip
    files += [package / f"{name}.py" for name in step]
    files += [file for file in (package.parent / "tests/plain.py",) if file.exists()]
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()[:12]


def _commit() -> str:
    folder = str(Path(__file__).resolve().parent)
    commit = _said(["git", "-C", folder, "rev-parse", "--short", "HEAD"])
    return commit + ("+" if commit and _said(["git", "-C", folder, "status", "--porcelain"]) else "")


def _said(words: list[str]) -> str:
    try:
        return subprocess.run(words, capture_output=True, text=True, timeout=20).stdout.strip()
    except OSError:
        return ""
