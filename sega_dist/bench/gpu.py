"""Everything that only a GPU can tell of the kernels, in one run of under ten minutes: `make gpu`.

Ceilings, the GPU tests, a sweep of launch parameters on the real shapes, the benchmark, the table that `kernels=auto`
reads, and a page of results with the predictions beside them. Each stage is kept in OUT; a run cut off goes on there.
"""

import concurrent.futures
import functools
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
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
    bench,
    callable_of,
    errors,
    limits_of,
    truth,
)  # fmt: skip
from sega_dist.bench.measure import ceilings, chained, code_digest, cold, provenance
from sega_dist.bench.results import Row, said
from sega_dist.errors import UserError, run
from sega_dist.kernels import backend, compat

ROOT = Path(__file__).resolve().parent.parent.parent
SHAPES = ((8, 64), (64, 64), (8, 32), (64, 32))  # images and LR side, of the real runs at 4x and 8x
TILED = ("conv3x3", "weight_grad", "pointwise")
MARGIN = 1.05  # a way is taken only if it beats every simpler one by this much, and by twice the spread

# Milliseconds of the trunk (12 RIDBs) in a CUDA graph, bf16, predicted before anything was measured: the larger of
# FLOP over 240, 300, 220 TFLOP/s (64 and 128 channels, filter gradients) and bytes over 3.6 TB/s, plus 2 us a kernel.
PREDICTED = {
    ("forward", "eager"): (3.71, 22.3, 1.72, 6.35), ("forward", "compile"): (2.35, 15.8, 0.91, 4.28),
    ("forward", "hybrid"): (2.30, 15.4, 0.90, 4.17), ("forward", "triton"): (1.59, 11.2, 0.56, 2.97),
    ("both", "eager"): (9.27, 57.9, 4.06, 16.2), ("both", "compile"): (6.96, 47.2, 2.64, 12.7),
    ("both", "hybrid"): (6.90, 46.8, 2.63, 12.6), ("both", "triton"): (5.34, 36.7, 1.98, 9.8),
}  # fmt: skip
# Of the trunk, forward and backward: against the best of these ways, floor and stretch.
FLOORS = ((("compile", "compile_max"), 1.3, 1.6), (("eager",), 1.6, 2.0))


@dataclass(frozen=True)
class GpuCommand:
    """Check, tune and time the kernels on this machine's GPU, and write what came out."""

    out: Path = Path("runs/gpu")  # stages, table, page and figures
    minutes: float = 7.0  # no comparison is begun after so long; what is missing is done by running again
    rehearse: bool = False  # tiny shapes in Triton's interpreter, to try the script itself; installs nothing
    once: str = ""  # used by the script itself: launch parameters as JSON, to compile in a process of their own


def main(argv: list[str] | None = None) -> None:
    command = parse(GpuCommand, argv or [], "python -m sega_dist.bench.gpu")
    if not command.rehearse and not torch.cuda.is_available():
        raise UserError("this machine has no CUDA device; --rehearse tries the script without one")
    if command.rehearse and not compat.IS_INTERPRETING:
        raise UserError("--rehearse needs TRITON_INTERPRET=1")
    if command.once:
        return once(json.loads(command.once))
    command.out.mkdir(parents=True, exist_ok=True)
    torch.backends.cudnn.benchmark = True
    began = time.monotonic()
    device = "cpu" if command.rehearse else "cuda"
    code = code_digest()
    machine = stage(command.out, "machine", lambda: provenance(device) | ceilings(device, torch.bfloat16),
                    lambda facts: facts["code"] == code)  # fmt: skip
    tested: dict[str, Any] = {"code": 0}
    failed: list[dict[str, Any]] = []
    if not command.rehearse:
        files = ("tests/test_kernels.py", "tests/test_gpu.py")
        failed = compile_all([(row["kernel"], row["parameters"]) for row in swept(command.out)])
        tested = stage(
            command.out,
            "tests",
            lambda: tests(files, 280),
            lambda result: result["code"] == 0 and result["of"] == code,
        )
    launches = sweep(command, ((1, 5),) if command.rehearse else SHAPES, device, failed)
    table = {"schema": 1} | {key: machine.get(key) for key in ("device", "torch", "triton", "commit", "date")}
    table |= {"launch": entries(launches), "choices": []}
    finish(command, machine, tested, launches, table, [])
    for rows in measure(command, max(1.0, command.minutes - (time.monotonic() - began) / 60)):
        table["choices"] = choices(rows) if tested["code"] == 0 else []
        page = finish(command, machine, tested, launches, table, rows)
    print(page)
    if tested["code"]:
        raise UserError(f"the GPU tests are red (see {command.out}/tests.json): auto stays the reference", 1)


def stage(out: Path, name: str, make: Callable[[], Any], is_kept: Callable[[Any], bool] = lambda _: True) -> Any:
    """The result of a stage, made now or in an earlier run that left one worth keeping."""
    path = out / f"{name}.json"
    if path.exists():
        value = json.loads(path.read_text())
        if is_kept(value):
            return value
    began = time.monotonic()
    value = make()
    path.write_text(json.dumps(value, indent=1) + "\n")
    print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
    return value


def finish(command: GpuCommand, machine: dict[str, Any], tested: dict[str, Any], launches: list[dict[str, Any]],
           table: dict[str, Any], rows: list[Row]) -> str:  # fmt: skip
    """Table and page as far as they are known: to OUT and, of a real run, to where they belong."""
    name = "rehearsal" if command.rehearse else backend.gpu_name()
    install(command, name, table)
    page = report(machine, tested, launches, table, rows)
    (command.out / f"{name}.md").write_text(page)
    results = {"machine": machine, "tests": tested, "sweep": launches, "rows": rows}
    (command.out / f"{name}-results.json").write_text(json.dumps(results, indent=1) + "\n")
    if not command.rehearse:
        for mine, theirs in ((f"{name}.md", "h200-kernels.md"), (f"{name}-results.json", "h200-kernels.json")):
            shutil.copy(command.out / mine, ROOT / "docs/results" / theirs)
    return page


def candidates(kernel: str, dtype: str = "bf16") -> list[dict[str, Any]]:
    """Launch parameters to try: the start points, and what the table of candidates adds for this chip."""
    capability = 10 * torch.cuda.get_device_capability()[0] if torch.cuda.is_available() else 0
    found = []
    for name in ("start", "candidates"):
        for entry in json.loads((backend.TABLES / f"{name}.json").read_text())["launch"]:
            if entry["kernel"] == kernel and dtype in entry["dtypes"] and entry.get("cc", 0) <= capability:
                found.append(entry["parameters"])
    return found


def once(parameters: dict[str, dict[str, Any]]) -> None:
    """Run every op once with these launch parameters, so that its kernels lie compiled in the cache."""
    levels: tuple[Level, ...] = ("ridb", "upconv")
    columns: tuple[Column, ...] = ("triton", "hybrid")
    with backend.forced(**parameters):
        for level in levels:
            for column in columns:
                callable_of(Case(level, "both", 8, 64, "bf16", "cuda"), column)()
    torch.cuda.synchronize()


def compile_all(known: list[tuple[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Compile candidates side by side, each in a process of its own: one that crashes or hangs is only left out.

    Those that the sweep knows for every shape are compiled where they are used, if at all.
    """
    start = {kernel: candidates(kernel)[-1 if kernel == "weight_grad" else 0] for kernel in TILED}
    jobs = [(kernel, parameters) for kernel in TILED for parameters in candidates(kernel)
            if known.count((kernel, parameters)) < len(SHAPES)]  # fmt: skip

    def job(kernel: str, parameters: dict[str, Any]) -> str:
        words = [sys.executable, "-m", "sega_dist.bench.gpu", "--once", json.dumps(start | {kernel: parameters})]
        try:
            done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120)
        except subprocess.TimeoutExpired:
            return "not done after 120 s"
        return "" if done.returncode == 0 else f"exit {done.returncode}: {done.stderr.strip()[-200:]}"

    began = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(max(1, min(8, (os.cpu_count() or 2) // 2))) as pool:
        came = list(pool.map(lambda one: job(*one), jobs))
    failed = [{"kernel": k, "parameters": p, "why": why} for (k, p), why in zip(jobs, came, strict=True) if why]
    print(f"compiled {len(jobs)} candidates, {len(failed)} failed: {time.monotonic() - began:.0f} s", flush=True)
    return failed


def tests(files: tuple[str, ...], seconds: int) -> dict[str, Any]:
    """Their tests with kernels compiled; their verdict and the end of what they said."""
    words = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider", *files]
    if importlib.util.find_spec("xdist"):
        words += ["-n", str(min(8, os.cpu_count() or 1))]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    try:
        done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired as late:
        return {"code": -1, "of": code_digest(), "said": f"not done after {late.timeout:.0f} s"}
    print(done.stdout[-3000:], flush=True)
    return {"code": done.returncode, "of": code_digest(), "said": done.stdout[-6000:]}


def sweep(command: GpuCommand, shapes: tuple[tuple[int, int], ...], device: str, failed: list[dict[str, Any]]
          ) -> list[dict[str, Any]]:  # fmt: skip
    """For each shape and kernel every candidate: its error against fp64 and its time within a RIDB, both ways.

    Rows are kept as they come. A candidate that takes the CUDA context with it ends the run; the next leaves it out.
    """
    kept, code = command.out / "sweep.jsonl", code_digest()
    found = swept(command.out)
    for batch, side in shapes:
        case = Case("ridb", "both", batch, side, "bf16" if device == "cuda" else "fp32", device)
        small = case if device == "cpu" else replace(case, batch=8, side=32)
        best: dict[str, Any] = {}
        for kernel in TILED:
            for parameters in candidates(kernel)[: None if device == "cuda" else 1]:
                row: dict[str, Any] = {
                    "kernel": kernel,
                    "batch": batch,
                    "side": side,
                    "parameters": parameters,
                    "why": "",
                    "code": code,
                }
                if any(all(row[k] == old[k] for k in ("kernel", "batch", "side", "parameters")) for old in found):
                    continue
                known = [f["why"] for f in failed if (f["kernel"], f["parameters"]) == (kernel, parameters)]
                row |= {"why": known[0]} if known else timed(case, small, best, kernel, parameters)
                found.append(row)
                with kept.open("a") as stream:
                    stream.write(json.dumps(row) + "\n")
                came = row["why"] or f"{row['ms']:.3f} ms"
                print(f"sweep {batch}x{side} {kernel} {parameters}: {came}", flush=True)
                if "CUDA error" in row["why"]:
                    raise UserError(
                        f"{row['why']}: the device is lost to this process; run again, that one is left out", 1
                    )
            right = [row for row in found if "ms" in row
                     and (row["kernel"], row["batch"], row["side"]) == (kernel, batch, side)]  # fmt: skip
            if right:
                best[kernel] = min(right, key=lambda row: row["ms"])["parameters"]
    return found


def swept(out: Path) -> list[dict[str, Any]]:
    """The rows of earlier runs of this very code."""
    kept, code = out / "sweep.jsonl", code_digest()
    found = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    return [row for row in found if row["code"] == code]


def timed(case: Case, small: Case, best: dict[str, Any], kernel: str, parameters: dict[str, Any]) -> dict[str, Any]:
    """One candidate, right and in how many milliseconds, or why not."""
    column: Column = "hybrid" if kernel == "pointwise" else "triton"
    exact, own = judged_by(small)
    try:
        with backend.forced(**best | {kernel: parameters}):
            wrong = errors(callable_of(small, column)(), exact)
            if any(e > limit for e, limit in zip(wrong, limits_of(own, case.dtype), strict=True)):
                return {"why": f"wrong: {max(wrong):.2g}"}
            call = callable_of(case, column)
            return {"ms": statistics.median(chained(call)[1] if case.device == "cuda" else cold(call, case.device))}
    except Exception as error:  # whatever it is, the row says so and the others go on
        return {"why": said(error)}


@functools.cache
def judged_by(case: Case) -> tuple[list[torch.Tensor], list[float]]:
    """The truth in fp64, and how far eager torch is from it."""
    exact = truth(case)
    return exact, errors(callable_of(case, "eager")(), exact)


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


def measure(command: GpuCommand, minutes: float) -> Iterator[list[Row]]:
    """The benchmark's rows so far, again and again: first what decides, then the figures to reach, then the rest."""
    base = KernelsCommand(out=command.out / "bench", minutes=minutes)
    if command.rehearse:
        yield bench(replace(base, levels=("rals", "conv64"), columns=("eager_nchw", "eager"), side=(4,)))
        return
    began = time.monotonic()
    plain: tuple[Column, ...] = ("eager", "hybrid", "triton")
    compiled: tuple[Column, ...] = ("compile", "compile_max")
    both: tuple[Mode, ...] = ("both",)
    at = replace(base, columns=plain, modes=both)
    trunks = [replace(at, levels=("trunk",), columns=(*plain, *compiled), batch=(n,), side=(64,)) for n in (8, 64)]
    plan = [
        replace(at, levels=("ridb", "upconv")),
        replace(at, levels=("rals",), side=(64,)),
        *trunks,
        replace(at, levels=("generator",), columns=(*plain, "compile"), side=(64,), batch=(8,)),
        replace(at, levels=("ridb", "trunk"), modes=MODES, columns=(*plain, *compiled)),
        replace(at, levels=("block", "conv64", "conv128", "upconv", "generator"), modes=MODES, columns=COLUMNS),
    ]
    for one in plan:
        left = minutes - (time.monotonic() - began) / 60
        yield bench(replace(one, minutes=max(left, 0.01)))


def choices(rows: list[Row]) -> list[backend.Entry]:
    """What `auto` shall take for each op and shape: as training runs it, by single calls forward and backward."""
    made = []
    for level, op in (("ridb", "ridb"), ("upconv", "upconv_act"), ("rals", "rals")):
        cases: dict[tuple[int, int, str], dict[str, Row]] = {}
        for row in rows:
            if (row["level"], row["mode"], row["metric"]) == (level, "both", "cold") and "median_ms" in row:
                cases.setdefault((row["batch"], row["side"], row["dtype"]), {})[row["column"]] = row
        for (batch, side, dtype), of_column in cases.items():
            shape = {"channels": 1, "dtype": "fp32", "pixels": batch} if op == "rals" else {
                "channels": 64, "dtype": dtype, "pixels": batch * side * side}  # fmt: skip
            found = {column: round(row["median_ms"], 4) for column, row in of_column.items()}
            made.append({"op": op, **shape, "impl": decide(of_column), "ms": found})
    return made


def decide(of_column: dict[str, Row]) -> backend.Impl:
    """Triton or the hybrid where it beats everything simpler by the margin and by twice the spread, else the reference.

    Training runs eagerly: against that it is decided. How the fused ops stand beside torch.compile is on the page.
    """
    if "eager" not in of_column:
        return "reference"
    taken = "eager"
    ways: tuple[backend.Impl, ...] = ("hybrid", "triton")
    for column in ways:
        row, other = of_column.get(column), of_column[taken]
        if row is None:
            continue
        spread = max(r["p80_ms"] - r["p20_ms"] for r in (row, other))
        gain = other["median_ms"] - row["median_ms"]
        if other["median_ms"] >= MARGIN * row["median_ms"] and gain > 2 * spread:
            taken = column
    return "reference" if taken == "eager" else taken  # type: ignore[return-value]


def report(machine: dict[str, Any], tested: dict[str, Any], launches: list[dict[str, Any]], table: dict[str, Any],
           rows: list[Row]) -> str:  # fmt: skip
    """The page: predictions beside measurements, figures to reach, choices, what failed."""
    medians = {(r["level"], r["mode"], r["batch"], r["side"], r["column"]): r["median_ms"] for r in rows
               if r["metric"] == "chained" and "median_ms" in r}  # fmt: skip
    lines = [f"# Kernels on {machine['device']}", "", f"`{machine['command']}`, {machine['date']}, commit"
             f" {machine['commit']}, torch {machine['torch']}, triton {machine['triton']}. Matrix product"
             f" {machine['flop_per_s'] / 1e12:.0f} TFLOP/s, copy {machine['bytes_per_s'] / 1e12:.2f} TB/s.",
             f"GPU tests: {'green' if tested['code'] == 0 else 'RED'}.", "",
             "## Trunk, milliseconds in a CUDA graph: predicted / measured", "",
             "| | " + " | ".join(f"{n} x {s}²" for n, s in SHAPES) + " |", "|---|" + "---:|" * len(SHAPES)]  # fmt: skip
    for (mode, column), predicted in PREDICTED.items():
        found = [medians.get(("trunk", mode, *shape, column)) for shape in SHAPES]
        cells = [f"{p} / {'not measured' if m is None else f'{m:.2f}'}" for p, m in zip(predicted, found, strict=True)]
        lines.append(
            f"| {'forward' if mode == 'forward' else 'forward and backward'}, {column} | {' | '.join(cells)} |"
        )
    lines += ["", "## Figures to reach: trunk, forward and backward, triton against", ""]
    for columns, floor, stretch in FLOORS:
        for n, s in SHAPES[:2]:
            others = [m for column in columns if (m := medians.get(("trunk", "both", n, s, column)))]
            mine = medians.get(("trunk", "both", n, s, "triton"))
            ratio = f"{min(others) / mine:.2f}x" if others and mine else "not measured"
            lines.append(
                f"* best of {', '.join(columns)}, {n} images of {s}²: {ratio} (floor {floor}x, stretch {stretch}x)"
            )
    lines += ["", "## What auto takes", "", "| op | pixels | dtype | takes | ms |", "|---|---:|---|---|---|"]
    lines += [f"| {e['op']} | {e['pixels']:,} | {e['dtype']} | {e['impl']} | {e['ms']} |" for e in table["choices"]]
    failed = [f"* sweep {r['kernel']} {r['batch']} x {r['side']}² {r['parameters']}: {r['why']}"
              for r in launches if r["why"]]  # fmt: skip
    failed += sorted({f"* {r['level']} {r['mode']} {r['batch']} x {r['side']}² {r['column']}: {r['why']}"
                      for r in rows if r["why"]})  # fmt: skip
    return "\n".join([*lines, "", "## What failed", "", *(failed or ["Nothing."]), ""])


if __name__ == "__main__":
    run(main, sys.argv[1:])
