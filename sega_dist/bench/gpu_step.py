"""What only a GPU can tell of a training step, in three parts of under nine minutes each: `make gpu-step PART=...`.

`check` proves that captured, compiled and plain steps agree; `bench` times them; `train` trains sega_x4 on faces and
scores it beside bicubic. Each part goes on where an earlier call of it stopped.
"""

import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from sega_dist.arguments import parse
from sega_dist.bench.gpu import ROOT, stage, tests
from sega_dist.bench.measure import code_digest, provenance
from sega_dist.bench.results import Row
from sega_dist.bench.step import STEP, Column, StepCommand, bench
from sega_dist.errors import PREEMPTED, UserError, run

RESULTS = ROOT / "docs/results"
SIMPLE: tuple[Column, ...] = ("plain_fp32", "plain_bf16", "plain_compile", "ours_bf16", "ours_compile")
DEAR: tuple[Column, ...] = ("plain_graphs", "plain_max", "ours_max")  # tuned at length, at batch 8 alone

# Milliseconds of a step at x4, batch 8, bf16 on an H200, before anything was measured. Plain: some 4,500 launches of
# 5 us are more than the arithmetic; compiled, half as many. Ours: floors of the parts at the shares that their shapes
# reach in public figures, trunk 5.3, D 2.6, VGG and E 2.0, upsampler and output 1.2, Adam 0.2.
PREDICTED = {"plain_bf16": 23.0, "plain_compile": 14.0, "ours_bf16": 21.0, "ours_compile": 11.3}
# Against which columns, floor and stretch.
FLOORS: tuple[tuple[tuple[Column, ...], float, float], ...] = (
    (("plain_bf16",), 1.5, 2.0), (("plain_compile", "plain_graphs", "plain_max"), 1.15, 1.25))  # fmt: skip


COLUMNS_SHOWN = {"ms": ("median_ms", ".2f"), "GFLOP": ("gflop", ".0f"), "GB to move": ("gbytes", ".2f"),
                 "floor ms": ("floor_ms", ".2f"), "of roof": ("roof_share", ".0%"), "GB used": ("memory_gb", ".2f"),
                 "GB counted": ("computed_gb", ".2f")}  # fmt: skip


@dataclass(frozen=True)
class GpuStepCommand:
    """Check, time or train whole steps on this machine's GPU."""

    part: Literal["check", "bench", "train"]
    out: Path = Path("runs/gpu-step")  # what each part keeps
    minutes: float = 7.0  # nothing new is begun after so long; the same command goes on
    faces: Path | None = None  # train: a folder or zip of 256-pixel faces
    test: Path | None = None  # train: other faces, to score
    vgg19: Path | None = None  # train: VGG19's weights
    rehearse: bool = False  # on a CPU, with small networks, to try the script itself; writes no results


def main(argv: list[str] | None = None) -> None:
    command = parse(GpuStepCommand, argv or [], "python -m sega_dist.bench.gpu_step")
    if not command.rehearse and not torch.cuda.is_available():
        raise UserError("this machine has no CUDA device; --rehearse tries the script without one")
    command.out.mkdir(parents=True, exist_ok=True)
    {"check": check, "bench": measure, "train": train}[command.part](command)


def check(command: GpuStepCommand) -> None:
    """The tests of a step, and their verdict."""
    seconds, code = int(command.minutes * 60) + 60, code_digest()
    tested = stage(command.out, "check", lambda: tests(("tests/test_gpu_step.py",), seconds),
                   lambda result: result["code"] == 0 and result["of"] == code)  # fmt: skip
    if tested["code"]:
        raise UserError(f"the tests of a step are red: {command.out}/check.json", 1)


def measure(command: GpuStepCommand) -> None:
    """Rows that docs/results/h200-step.json has not, and a page of all of them."""
    base = StepCommand(out=command.out / "bench", scale=(4,), batch=(8,))
    kept, known = base.out / "rows.jsonl", RESULTS / "h200-step.json"
    if not kept.exists() and known.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text("".join(json.dumps(row) + "\n" for row in json.loads(known.read_text())["rows"]))
    at8 = [replace(base, columns=SIMPLE), replace(base, columns=SIMPLE, scale=(8,))]
    at8 += [replace(base, columns=(column,)) for column in DEAR]
    rest = [replace(base, columns=SIMPLE, scale=scale, batch=(n,)) for n in (64, 16, 32) for scale in ((4,), (8,))]
    if command.rehearse:
        at8, rest = [replace(base, columns=("plain_fp32", "ours_fp32"), batch=(2,), quick=True)], []
    began = time.monotonic()
    for one in [*at8, *rest]:
        if time.monotonic() - began > command.minutes * 60:
            print("stopped: the same command goes on with what is missing")
            break
        bench(one)
        made = json.loads((base.out / "step.json").read_text())
        (base.out / "page.md").write_text(page(made["provenance"], made["rows"]))
        if not command.rehearse:
            known.write_text(json.dumps(made, indent=1) + "\n")
            (RESULTS / "h200-step.md").write_text(page(made["provenance"], made["rows"]))
    print((base.out / "page.md").read_text())


def page(facts: dict[str, Any], rows: list[Row]) -> str:
    """Figures to reach, whole steps, and the budget of every part beside what it took."""
    text = [f"# A training step on {facts['device']}", "", f"`{facts['command']}`, {facts['date']}, commit"
            f" {facts['commit']}, torch {facts['torch']}, triton {facts['triton']}. Measured ceilings:"]  # fmt: skip
    for precision, limit in facts["ceilings"].items():
        text.append(f"{precision} {limit['flop_per_s'] / 1e12:.3g} TFLOP/s, {limit['bytes_per_s'] / 1e12:.3g} TB/s.")
    text += ["", "## Figures to reach: x4, batch 8", ""]
    ms = {(row["scale"], row["batch"], row["column"]): row.get("median_ms") for row in rows if row["part"] == STEP}
    mine = min((m for column in ("ours_compile", "ours_max") if (m := ms.get((4, 8, column)))), default=None)
    for columns, floor, stretch in FLOORS:
        others = [m for column in columns if (m := ms.get((4, 8, column)))]
        ratio = f"{min(others) / mine:.2f}x" if others and mine else "not measured"
        without = [column for column in columns if mine and not ms.get((4, 8, column))]
        failed = f"; no time for {', '.join(without)}" if without else ""
        text.append(f"* against the best of {', '.join(columns)}: {ratio} (floor {floor}x, stretch {stretch}x){failed}")
    for column, expected in PREDICTED.items():
        found = ms.get((4, 8, column))
        text.append(f"* {column}: predicted {expected} ms, {f'{found:.2f} ms' if found else 'not measured'}")
    for title, shown in (("Whole steps", [r for r in rows if r["part"] == STEP]),
                         ("Parts", [r for r in rows if r["part"] != STEP])):  # fmt: skip
        head = ("part", "x", "batch", "column", *COLUMNS_SHOWN, "failed")
        text += ["", f"## {title}", "", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
        for row in shown:
            figures = [format(row[key], how) if key in row else "" for key, how in COLUMNS_SHOWN.values()]
            cells = [row["part"], row["scale"], row["batch"], row["column"], *figures, row["why"]]
            text.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join([*text, ""])


def train(command: GpuStepCommand) -> None:
    """sega_x4 for as much of the paper's 240,000 images as the time allows, then its scores."""
    if not (command.faces and command.test and (command.vgg19 or command.rehearse)):
        raise UserError("train needs --faces and --test (folders or zips of faces), and --vgg19 (weights)")
    entered, out, run_folder = time.monotonic(), command.out / "train", command.out / "train/run"
    for name, source in (("train", command.faces), ("test", command.test)):
        if not (out / name / "manifest.json").exists():
            program("shard", source, out / name, "--split", name)
    words = ["--data", out / "train", "--out", run_folder]
    if command.vgg19:
        words += ["--vgg19", command.vgg19]
    if run_folder.exists() and not list(run_folder.glob("checkpoints/*/state.json")):
        shutil.rmtree(run_folder)  # it ended before its first checkpoint
    if run_folder.exists():
        words += ["--resume", "latest"]
    elif command.rehearse:
        words += ["--preset", "tiny_x4", "--train.images", 16, "--compile", "off"]
    else:
        words += ["--preset", "sega_x4", "--train.precision", "bf16", "--compile", "default", "--train.ema-kimg", 2]
    began, taken = time.time(), out / "seconds.json"
    spent = json.loads(taken.read_text()) if taken.exists() else 0.0
    code = program("train", *words, seconds=max(60, command.minutes * 60 - (time.monotonic() - entered)))
    taken.write_text(json.dumps(spent + time.time() - began))
    program("evaluate", run_folder, "--data", out / "test", "--out", out / "eval")
    write_training(command, out, spent + time.time() - began, code == 0)


def write_training(command: GpuStepCommand, out: Path, seconds: float, is_done: bool) -> None:
    """A page with wall time, scores and the curve's picture."""
    scores = json.loads((out / "eval/metrics.json").read_text())
    last = json.loads((out / "run/stats.jsonl").read_text().splitlines()[-1])
    facts = provenance("cpu" if command.rehearse else "cuda")
    text = ["# sega_x4 trained on one GPU", "", f"{facts['device']}, torch {facts['torch']}, commit {facts['commit']},"
            f" {facts['date']}: {last['nimg']:,} of 240,000 images in {seconds / 60:.1f} minutes of wall time, start,"
            f" compiler and pictures included; {last['images_per_s']:.1f} images/s at the end, data wait"
            f" {last['data_wait']:.1%}, {last['memory_gb']:.1f} GB. {'Done.' if is_done else 'It can go on.'}",
            "", f"| {scores['images']} test images | PSNR dB | SSIM |", "|---|---:|---:|"]  # fmt: skip
    text += [f"| {name} | {m['psnr']:.2f} | {m['ssim']:.4f} |" for name, m in scores["methods"].items()]
    (out / "page.md").write_text("\n".join([*text, ""]))
    if not command.rehearse:
        (RESULTS / "h200-train.md").write_text("\n".join([*text, ""]))
    print((out / "page.md").read_text())


def program(*words: object, seconds: float = 600) -> int:
    """`sega-dist WORDS`, asked to stop and save after `seconds`; its exit code, 0 or that of a run stopped in time."""
    process = subprocess.Popen([sys.executable, "-m", "sega_dist", *map(str, words)], cwd=ROOT)
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        try:
            code = process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            raise UserError(f"sega-dist {words[0]} did not end within a minute of being asked", 1) from None
    if code not in (0, PREEMPTED):
        raise UserError(f"sega-dist {words[0]} ended with {code}", 1)
    return code


if __name__ == "__main__":
    run(main, sys.argv[1:])
