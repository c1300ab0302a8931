"""Everything that only a GPU can tell of the kernels, in one run of under ten minutes: `make gpu`.

Ceilings, the GPU tests, a sweep of launch parameters on the real shapes, the benchmark, the table that `kernels=auto`
reads, and a page of results with the predictions beside them. Each stage is kept in OUT; a run cut off goes on there.
"""

import concurrent.futures
import importlib.util
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sega_dist.arguments import parse
from sega_dist.bench.kernels import (
    COLUMNS,
    MODES,
    Case,
    Column,
    KernelsCommand,
    Level,
    Mode,
    Row,
    bench,
    callable_of,
    errors,
    truth,
)  # fmt: skip
from sega_dist.bench.measure import ceilings, chained, cold, provenance
from sega_dist.errors import UserError, run
from sega_dist.kernels import backend, compat

ROOT = Path(__file__).resolve().parent.parent.parent
SHAPES = ((8, 64), (64, 64), (8, 32), (64, 32))  # images and LR side, of the real runs at 4x and 8x
TILED = ("conv3x3", "weight_grad", "pointwise")
MARGIN = 1.05  # a way is taken only if it beats every simpler one by this much, and by twice the spread
# Order of preference where nothing is gained: the left is simpler.
SIMPLER = ("eager", "compile", "compile_max", "compile_graphs", "hybrid", "triton")

# Milliseconds of the trunk (12 RIDBs) in a CUDA graph, bf16, predicted before anything was measured: the larger of
# FLOP over 240, 300, 220 TFLOP/s (64 and 128 channels, filter gradients) and bytes over 3.6 TB/s, plus 2 us a kernel.
PREDICTED = {
    ("forward", "eager"): (3.71, 22.3, 1.72, 6.35), ("forward", "compile"): (2.35, 15.8, 0.91, 4.28),
    ("forward", "hybrid"): (2.30, 15.4, 0.90, 4.17), ("forward", "triton"): (1.59, 11.2, 0.56, 2.97),
    ("both", "eager"): (9.27, 57.9, 4.06, 16.2), ("both", "compile"): (6.96, 47.2, 2.64, 12.7),
    ("both", "hybrid"): (6.90, 46.8, 2.63, 12.6), ("both", "triton"): (5.34, 36.7, 1.98, 9.8),
}  # fmt: skip
FLOORS = (("compile_max", 1.3, 1.6), ("eager", 1.6, 2.0))  # of trunk forward and backward: floor and stretch


@dataclass(frozen=True)
class GpuCommand:
    """Check, tune and time the kernels on this machine's GPU, and write what came out."""

    out: Path = Path("runs/gpu")  # stages, table, page and figures
    minutes: float = 9.0  # the benchmark starts no comparison after so long
    rehearse: bool = False  # tiny shapes in Triton's interpreter, to try the script itself; installs nothing


def main(argv: list[str] | None = None) -> None:
    command = parse(GpuCommand, argv or [], "python -m sega_dist.bench.gpu")
    if not command.rehearse and not torch.cuda.is_available():
        raise UserError("this machine has no CUDA device; --rehearse tries the script without one")
    if command.rehearse and not compat.IS_INTERPRETING:
        raise UserError("--rehearse needs TRITON_INTERPRET=1")
    command.out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    device = "cpu" if command.rehearse else "cuda"
    shapes = ((1, 5),) if command.rehearse else SHAPES
    name = "rehearsal" if command.rehearse else backend.gpu_name()

    stage(command.out, "machine", lambda: provenance(device) | ceilings(device, torch.bfloat16))
    if not command.rehearse:
        stage(command.out, "compiled", compile_all)
        stage(command.out, "tests", tests)
    launches = stage(command.out, "sweep", lambda: sweep(shapes, device))
    machine = load(command.out, "machine")
    table = {"schema": 1} | {key: machine.get(key) for key in ("device", "torch", "triton", "commit", "date")}
    table |= {"launch": entries(launches), "choices": []}
    install(command, name, table)
    spent = (time.monotonic() - began) / 60
    rows = measure(command, max(1.0, command.minutes - spent))
    is_green = command.rehearse or load(command.out, "tests")["code"] == 0
    table["choices"] = choices(rows) if is_green else []
    install(command, name, table)
    page = report(machine, load(command.out, "tests"), launches, table, rows)
    (command.out / "h200-kernels.md").write_text(page)
    shutil.copy(command.out / "bench/kernels.json", command.out / "h200-kernels.json")
    if not command.rehearse:
        for file in ("h200-kernels.md", "h200-kernels.json"):
            shutil.copy(command.out / file, ROOT / "docs/results" / file)
    print(page)
    if not is_green:
        raise UserError(
            "the GPU tests are red (see OUT/tests.json): no choice was written, auto stays the reference", 1
        )


def stage(out: Path, name: str, make: Callable[[], Any]) -> Any:
    """The result of a stage, made now or in an earlier run."""
    path = out / f"{name}.json"
    if not path.exists():
        began = time.monotonic()
        value = make()
        path.write_text(json.dumps(value, indent=1) + "\n")
        print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
    return load(out, name)


def load(out: Path, name: str) -> Any:
    path = out / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def candidates(kernel: str, dtype: str = "bf16") -> list[dict[str, Any]]:
    """Launch parameters to try: the start points, and what the table of candidates adds for this chip."""
    capability = 10 * torch.cuda.get_device_capability()[0] if torch.cuda.is_available() else 0
    found = []
    for name in ("start", "candidates"):
        for entry in json.loads((backend.TABLES / f"{name}.json").read_text())["launch"]:
            if entry["kernel"] == kernel and dtype in entry["dtypes"] and entry.get("cc", 0) <= capability:
                found.append(entry["parameters"])
    return found


def once(parameters: dict[str, dict[str, Any]]) -> str:
    """Run every op once with these launch parameters, so that its kernels lie compiled in the cache."""
    try:
        with backend.forced(**parameters):
            levels: tuple[Level, ...] = ("ridb", "upconv")
            columns: tuple[Column, ...] = ("triton", "hybrid")
            for level in levels:
                for column in columns:
                    callable_of(Case(level, "both", 8, 64, "bf16", "cuda"), column)()
        torch.cuda.synchronize()
    except Exception as error:  # a set of parameters that fails is found again, and named, by the sweep
        return f"{type(error).__name__}: {str(error)[:200]}"
    return ""


def compile_all() -> dict[str, Any]:
    """Compile all candidates side by side; the sweep then only loads them."""
    start = {kernel: candidates(kernel)[-1 if kernel == "weight_grad" else 0] for kernel in TILED}
    jobs = [start | {kernel: parameters} for kernel in TILED for parameters in candidates(kernel)]
    workers = max(1, min(8, (os.cpu_count() or 2) // 2))
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        return {"jobs": len(jobs), "failed": [why for why in pool.map(once, jobs) if why]}


def tests() -> dict[str, Any]:
    """The kernel and GPU tests, compiled; their verdict and the end of what they said."""
    words = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider",
             "tests/test_kernels.py", "tests/test_gpu.py"]  # fmt: skip
    if importlib.util.find_spec("xdist"):
        words += ["-n", str(min(8, os.cpu_count() or 1))]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    try:
        done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    except subprocess.TimeoutExpired as late:
        return {"code": -1, "said": f"not done after {late.timeout:.0f} s"}
    print(done.stdout[-3000:], flush=True)
    return {"code": done.returncode, "said": done.stdout[-6000:]}


def sweep(shapes: tuple[tuple[int, int], ...], device: str) -> list[dict[str, Any]]:
    """For each shape and kernel every candidate: its error against fp64 and its time within a RIDB, both ways."""
    found: list[dict[str, Any]] = []
    for batch, side in shapes:
        case = Case("ridb", "both", batch, side, "bf16" if device == "cuda" else "fp32", device)
        small = case if device == "cpu" else replace(case, batch=8, side=32)
        exact = truth(small)
        own = errors(callable_of(small, "eager")(), exact)
        best: dict[str, Any] = {}
        for kernel in TILED:
            column: Column = "hybrid" if kernel == "pointwise" else "triton"
            tried = []
            for parameters in candidates(kernel)[: None if device == "cuda" else 1]:
                row: dict[str, Any] = {
                    "kernel": kernel,
                    "batch": batch,
                    "side": side,
                    "parameters": parameters,
                    "why": "",
                }
                try:
                    with backend.forced(**best | {kernel: parameters}):
                        wrong = errors(callable_of(small, column)(), exact)
                        call = callable_of(case, column)
                        if any(e > 2 * t + 5e-3 for e, t in zip(wrong, own, strict=True)):
                            row["why"] = f"wrong: {max(wrong):.2g}"
                        else:
                            row["ms"] = statistics.median(chained(call) if device == "cuda" else cold(call, device))
                except Exception as error:
                    row["why"] = f"{type(error).__name__}: {str(error)[:160]}"
                tried.append(row)
                came = row["why"] or f"{row['ms']:.3f} ms"
                print(f"sweep {batch}x{side} {kernel} {parameters}: {came}", flush=True)
            right = [row for row in tried if "ms" in row]
            if right:
                best[kernel] = min(right, key=lambda row: row["ms"])["parameters"]
            found += tried
    return found


def entries(launches: list[dict[str, Any]]) -> list[backend.Entry]:
    """The fastest right parameters of each kernel and shape, as a table has them; fp32 keeps its start points."""
    made: list[backend.Entry] = []
    cases = dict.fromkeys((row["kernel"], row["batch"], row["side"]) for row in launches)
    for kernel, batch, side in cases:
        right = [r for r in launches if (r["kernel"], r["batch"], r["side"]) == (kernel, batch, side) and "ms" in r]
        if right:
            best = min(right, key=lambda row: row["ms"])
            made.append({"kernel": kernel, "dtypes": ["fp16", "bf16"], "pixels": batch * side * side, "ms": best["ms"],
                         "parameters": best["parameters"]})  # fmt: skip
    start = json.loads((backend.TABLES / "start.json").read_text())["launch"]
    return made + [entry | {"dtypes": ["fp32"]} for entry in start if "fp32" in entry["dtypes"]]


def install(command: GpuCommand, name: str, table: dict[str, Any]) -> None:
    """Write the table to OUT and, of a real run, to where the kernels read it."""
    text = json.dumps({k: v for k, v in table.items() if k not in ("launch", "choices")}, indent=1)[:-2]
    for part in ("launch", "choices"):
        text += f',\n "{part}": [' + ",".join("\n  " + json.dumps(entry) for entry in table[part]) + "\n ]"
    (command.out / f"{name}.json").write_text(text + "\n}\n")
    if not command.rehearse:
        (backend.TABLES / f"{name}.json").write_text(text + "\n}\n")
        backend.forget()


def measure(command: GpuCommand, minutes: float) -> list[Row]:
    """The benchmark, what decides first: the RIDB and the trunk, then the rest as far as time goes."""
    base = KernelsCommand(out=command.out / "bench", minutes=minutes)
    if command.rehearse:
        return bench(replace(base, levels=("rals", "conv64"), columns=("eager_nchw", "eager"), side=(4,)))
    began, rows = time.monotonic(), []
    few: tuple[Column, ...] = ("eager", "compile", "compile_max", "hybrid", "triton")
    plain: tuple[Column, ...] = ("eager", "hybrid", "triton")
    both: tuple[Mode, ...] = ("both",)
    at = replace(base, columns=few, modes=both)
    plan = [
        replace(at, levels=("ridb", "upconv", "rals")),  # what auto is decided by
        *(replace(at, levels=("trunk",), batch=(n,), side=(side,)) for n, side in SHAPES[:2]),  # the figures to reach
        replace(at, levels=("generator", "step"), columns=plain),
        replace(at, levels=("trunk", "ridb"), modes=MODES),
        replace(at, levels=("block", "conv64", "conv128", "upconv", "generator"), modes=MODES, columns=COLUMNS),
    ]
    for command_of_level in plan:
        left = minutes - (time.monotonic() - began) / 60
        rows = bench(replace(command_of_level, minutes=max(left, 0.01)))
    return rows


def choices(rows: list[Row]) -> list[backend.Entry]:
    """What `auto` shall take for each op and shape, by forward and backward in a CUDA graph."""
    made = []
    for level, op in (("ridb", "ridb"), ("upconv", "upconv_act"), ("rals", "rals")):
        cases: dict[tuple[int, int, str], dict[str, Row]] = {}
        for row in rows:
            if (row["level"], row["mode"], row["metric"]) == (level, "both", "chained") and "median_ms" in row:
                cases.setdefault((row["batch"], row["side"], row["dtype"]), {})[row["column"]] = row
        for (batch, side, dtype), of_column in cases.items():
            impl = decide(of_column)
            pixels = batch if op == "rals" else batch * side * side
            entry = {"op": op, "channels": 1 if op == "rals" else 64, "dtype": "fp32" if op == "rals" else dtype,
                     "pixels": pixels, "impl": impl}  # fmt: skip
            made.append(entry | {"ms": {c: round(r["median_ms"], 4) for c, r in of_column.items()}})
    return made


def decide(of_column: dict[str, Row]) -> backend.Impl:
    """Triton or the hybrid where it beats everything simpler by the margin and by twice the spread, else the reference.

    A measurement is only of use beside one of plain torch: without that, the reference.
    """
    if "eager" not in of_column:
        return "reference"
    taken = "eager"
    for column in SIMPLER[1:]:
        row, other = of_column.get(column), of_column[taken]
        if row is None:
            continue
        spread = max(r["p80_ms"] - r["p20_ms"] for r in (row, other))
        is_kernel = column in ("hybrid", "triton")
        gain = other["median_ms"] - row["median_ms"]
        if gain > 0 and (not is_kernel or (other["median_ms"] >= MARGIN * row["median_ms"] and gain > 2 * spread)):
            taken = column
    return taken if taken in ("hybrid", "triton") else "reference"  # type: ignore[return-value]


def report(machine: dict[str, Any], tested: dict[str, Any], launches: list[dict[str, Any]], table: dict[str, Any],
           rows: list[Row]) -> str:  # fmt: skip
    """The page: predictions beside measurements, figures to reach, choices, what failed."""
    medians = {(r["level"], r["mode"], r["batch"], r["side"], r["column"]): r["median_ms"] for r in rows
               if r["metric"] == "chained" and "median_ms" in r}  # fmt: skip
    lines = [f"# Kernels on {machine['device']}", "", f"`{machine['command']}`, {machine['date']}, commit"
             f" {machine['commit']}, torch {machine['torch']}, triton {machine['triton']}. Matrix product"
             f" {machine['flop_per_s'] / 1e12:.0f} TFLOP/s, copy {machine['bytes_per_s'] / 1e12:.2f} TB/s.",
             f"GPU tests: {'green' if tested.get('code') == 0 else 'RED' if tested else 'not run'}.", "",
             "## Trunk, milliseconds in a CUDA graph: predicted / measured", "",
             "| | " + " | ".join(f"{n} x {s}²" for n, s in SHAPES) + " |", "|---|" + "---:|" * len(SHAPES)]  # fmt: skip
    for (mode, column), predicted in PREDICTED.items():
        found = [medians.get(("trunk", mode, *shape, column)) for shape in SHAPES]
        cells = [f"{p} / {'not measured' if m is None else f'{m:.2f}'}" for p, m in zip(predicted, found, strict=True)]
        lines.append(
            f"| {'forward' if mode == 'forward' else 'forward and backward'}, {column} | {' | '.join(cells)} |"
        )
    lines += ["", "## Figures to reach: trunk, forward and backward, triton against", ""]
    for column, floor, stretch in FLOORS:
        for n, s in SHAPES[:2]:
            pair = [medians.get(("trunk", "both", n, s, c)) for c in (column, "triton")]
            ratio = f"{pair[0] / pair[1]:.2f}x" if pair[0] and pair[1] else "not measured"
            lines.append(f"* {column}, {n} images of {s}²: {ratio} (floor {floor}x, stretch {stretch}x)")
    lines += ["", "## What auto takes", "", "| op | pixels | dtype | takes | ms |", "|---|---:|---|---|---|"]
    lines += [f"| {e['op']} | {e['pixels']:,} | {e['dtype']} | {e['impl']} | {e['ms']} |" for e in table["choices"]]
    failed = [f"* sweep {r['kernel']} {r['batch']} x {r['side']}² {r['parameters']}: {r['why']}"
              for r in launches if r["why"]]  # fmt: skip
    failed += sorted({f"* {r['level']} {r['mode']} {r['batch']} x {r['side']}² {r['column']}: {r['why']}"
                      for r in rows if r["why"]})  # fmt: skip
    return "\n".join([*lines, "", "## What failed", "", *(failed or ["Nothing."]), ""])


if __name__ == "__main__":
    run(main, sys.argv[1:])
