"""Fused kernels beside what torch does without them: `sega-dist bench kernels`.

Each row is one (level, mode, shape, dtype, column, metric). Before a column is timed, the very callable that will be is
compared with the reference in fp64; a column that fails has no time. Rows are kept as they come, so that a run that was
stopped goes on.
"""

import csv
import dataclasses
import gc
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sega_dist.arguments import Device, parse
from sega_dist.bench.measure import ceilings, chained, cold, provenance, quantiles
from sega_dist.config import GeneratorConfig, Kernels, NormConfig
from sega_dist.distributed import World
from sega_dist.errors import UserError, run
from sega_dist.kernels.conv3x3_act import conv3x3_act
from sega_dist.kernels.idb import idb
from sega_dist.kernels.rals import rals
from sega_dist.loop import make_batch
from sega_dist.networks.build import build_vgg19
from sega_dist.networks.generator import DenseNestedBlock, Generator, ResidualInternalDenseBlock, UpsamplingStage
from sega_dist.players import Players
from sega_dist.presets import preset

Level = Literal["conv64", "conv128", "block", "upconv", "rals", "ridb", "trunk", "generator", "step"]
Column = Literal["eager_nchw", "eager", "compile", "compile_max", "compile_graphs", "hybrid", "triton"]
Precision = Literal["bf16", "fp16", "fp32", "tf32"]
Mode = Literal["forward", "both"]
Row = dict[str, Any]

LEVELS: tuple[Level, ...] = ("conv64", "conv128", "block", "upconv", "rals", "ridb", "trunk", "generator", "step")
COLUMNS: tuple[Column, ...] = ("eager_nchw", "eager", "compile", "compile_max", "compile_graphs", "hybrid", "triton")
BATCHES, SIDES = {"cuda": (8, 64), "cpu": (2,)}, {"cuda": (64, 32), "cpu": (16,)}
MODES: tuple[Mode, ...] = ("forward", "both")
COMPILE = {"compile": "default", "compile_max": "max-autotune-no-cudagraphs", "compile_graphs": "reduce-overhead"}
CHANNELS_LAST = torch.channels_last
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
TOLERANCE = {"bf16": 5e-3, "fp16": 1e-3, "tf32": 2e-3, "fp32": 1e-5}  # beside twice the error of torch's own path
KINK = 1e-2
KEY = ("level", "mode", "batch", "side", "dtype", "column", "metric", "device", "code")


@dataclass(frozen=True)
class KernelsCommand:
    """Time the fused kernels against eager torch and torch.compile."""

    out: Path = Path("runs/bench-kernels")  # rows.jsonl, kernels.csv, kernels.json, kernels.png
    levels: tuple[Level, ...] = LEVELS  # what is timed, from one convolution to the whole generator
    modes: tuple[Mode, ...] = MODES  # forward; forward and backward
    columns: tuple[Column, ...] = COLUMNS  # ways to compute it; eager, compile* and the fused ones are channels last
    batch: tuple[int, ...] = ()  # images; default: 8 and 64 on a GPU, 2 on a CPU
    side: tuple[int, ...] = ()  # of the LR maps; default: 64 (4x) and 32 (8x) on a GPU, 16 on a CPU
    dtype: Precision | None = None  # default: bf16 on a GPU, fp32 on a CPU
    device: Device = "auto"
    minutes: float = 0  # start no new comparison after so long; 0 = no limit
    again: bool = False  # time what has been timed already, too


class Conv(nn.Module):
    """The convolution of a dense block: one source of 64 channels, or two, then bias and LeakyReLU."""

    def __init__(self, sources: int, impl: Kernels):
        super().__init__()
        self.conv, self.impl = nn.Conv2d(64 * sources, 64, 3, padding=1), impl
        self.other = nn.Parameter(torch.empty(0)) if sources == 2 else None  # filled by the case

    def forward(self, x: Tensor) -> Tensor:
        return conv3x3_act(x, self.other, self.conv.weight, self.conv.bias, None, 0.2, impl=self.impl)


class Block(nn.Module):
    """One internal dense block."""

    def __init__(self, impl: Kernels):
        super().__init__()
        self.one, self.two, self.impl = nn.Conv2d(64, 64, 3, padding=1), nn.Conv2d(128, 64, 3, padding=1), impl
        self.other = nn.Parameter(torch.empty(0))  # r, filled by the case

    def forward(self, x: Tensor) -> Tensor:
        one, two = self.one, self.two
        assert one.bias is not None and two.bias is not None
        return idb(x, self.other, one.weight, one.bias, two.weight, two.bias, 0.2, self.impl)


class Rals(nn.Module):
    """The discriminator's loss of real and fake logits."""

    def __init__(self, impl: Kernels):
        super().__init__()
        self.impl = impl

    def forward(self, x: Tensor) -> Tensor:
        real, fake = x[:, :1], x[:, 1:]
        return rals(real, fake, real.mean(), fake.mean(), 1.0, self.impl)[None]


BUILD: dict[Level, Callable[[Kernels], nn.Module]] = {
    "conv64": lambda impl: Conv(1, impl),
    "conv128": lambda impl: Conv(2, impl),
    "block": Block,
    "upconv": lambda impl: UpsamplingStage(64, 0.2, impl),
    "rals": Rals,
    "ridb": lambda impl: ResidualInternalDenseBlock(64, 0.2, 0.2, impl),
    "trunk": lambda impl: nn.Sequential(*(DenseNestedBlock(GeneratorConfig(), impl) for _ in range(4))),
    "generator": lambda impl: Generator(4, GeneratorConfig(), NormConfig(), impl),
}


@dataclass(frozen=True)
class Case:
    """What one comparison is about."""

    level: Level
    mode: Mode  # both: forward and backward
    batch: int
    side: int
    dtype: Precision
    device: str

    def module(self, impl: Kernels) -> nn.Module:
        torch.manual_seed(0)
        module = BUILD[self.level](impl)
        if isinstance(module, (Conv, Block)) and module.other is not None:  # a second map, of its own in memory
            module.other.data = torch.randn(self.batch, 64, self.side, self.side).to(self.narrow)
        return module.to(self.device)

    @property
    def narrow(self) -> torch.dtype:
        """Of maps between convolutions."""
        return AUTOCAST.get(self.dtype, torch.float32)

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Input (LR-sized maps of 64 channels, images for the generator, pairs of logits), and output's gradient."""
        channels = {"generator": 3, "rals": 2}.get(self.level, 64)
        shape = (self.batch, channels) if self.level == "rals" else (self.batch, channels, self.side, self.side)
        grown = {"generator": (self.batch, 3, 4 * self.side, 4 * self.side), "rals": (1,),
                 "upconv": (self.batch, 64, 2 * self.side, 2 * self.side)}  # fmt: skip
        draw = torch.Generator().manual_seed(1)
        x, gradient = (torch.randn(s, generator=draw).to(self.device) for s in (shape, grown.get(self.level, shape)))
        if self.level == "rals":
            return x, gradient
        return x if self.level == "generator" else x.to(self.narrow), gradient.to(self.narrow)


def main(argv: list[str] | None = None) -> None:
    command = parse(KernelsCommand, argv or [], "sega-dist bench kernels")
    bench(command)


def bench(command: KernelsCommand) -> list[Row]:
    """Every row of the command, timed now or before; writes the results and prints a table."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if command.device == "cuda" and device == "cpu":
        raise UserError("--device cuda: this machine has no CUDA device; use --device cpu")
    device = device if command.device == "auto" else command.device
    dtype = command.dtype or ("bf16" if device == "cuda" else "fp32")
    began, facts = time.monotonic(), provenance(device)
    name = facts["device"]
    command.out.mkdir(parents=True, exist_ok=True)
    kept = command.out / "rows.jsonl"
    rows = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    known = (
        {}
        if command.again
        else {key_of(row): row for row in rows if not row["why"] and row.get("code") == facts["code"]}
    )
    if device == "cpu":
        print("no GPU in use: the reference paths are timed on the CPU; hybrid and triton are not measured")
    torch.backends.cudnn.benchmark = True  # the fused kernels are tuned to the shape: cuDNN may be as well
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = dtype != "fp32"
    limits = ceilings(device, AUTOCAST.get(dtype, torch.float32))
    sides, batches = command.side or SIDES[device], command.batch or BATCHES[device]
    cases = [Case(level, mode, batch, side, dtype, device) for level in command.levels for side in sides
             for batch in batches for mode in command.modes if level != "step" or mode == "both"]  # fmt: skip
    is_late = False
    for case in cases:
        # A step as it stands synchronises with the host and cannot be captured.
        metrics = ("cold", "chained") if device == "cuda" and case.level != "step" else ("cold",)
        wanted = [column for column in command.columns if can_run(case, column)]
        mark = {**asdict(case), "device": name, "code": facts["code"]}
        missing = [column for column in wanted
                   if any(key_of({**mark, "column": column, "metric": m}) not in known for m in metrics)]  # fmt: skip
        is_late = is_late or bool(command.minutes and time.monotonic() - began > command.minutes * 60)
        if not missing or is_late:
            continue
        for row in compare(case, missing, metrics, limits):
            row |= {"device": name, "commit": facts["commit"], "code": facts["code"]}
            known[key_of(row)] = row
            with kept.open("a") as stream:
                stream.write(json.dumps(row) + "\n")
            print(line(row), flush=True)
    found = list(known.values())
    write(command.out, found, facts | limits)
    Console().print(table(found))
    if is_late:
        print(f"stopped after {command.minutes:g} minutes: not every comparison was made; the same command goes on")
    return found


def can_run(case: Case, column: Column) -> bool:
    """Kernels and the compiler's dearer modes need a GPU; a step is channels last, and bears no compiler's graphs."""
    if case.level == "step" and column in ("eager_nchw", "compile_graphs"):
        return False
    return case.device == "cuda" or column in ("eager_nchw", "eager", "compile")


def key_of(row: Row) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in KEY)


def compare(case: Case, columns: list[Column], metrics: tuple[str, ...], limits: dict[str, float]) -> list[Row]:
    """All columns of a case: checked, then timed in turn, forwards and backwards, so that drift meets all alike."""
    torch._dynamo.reset()
    flop, size = work(case)
    try:
        exact, own = truth(case), callable_of(case, "eager")
        of_torch = errors(own(), exact, case.level)
    except Exception as error:  # without the truth no column can be judged: rows say so, the other cases go on
        return [{**asdict(case), "column": column, "metric": metric, "why": f"no reference: {said(error)}"}
                for column in columns for metric in metrics]  # fmt: skip

    def judge(outcome: list[Tensor]) -> dict[str, Any]:
        of_column = errors(outcome, exact, case.level)
        is_right = all(e <= limit for e, limit in zip(of_column, limits_of(of_torch, case.dtype), strict=True))
        return {"error": max(of_column), "error_eager": max(of_torch), "why": "" if is_right else "wrong"}

    calls: dict[Column, Callable[[], list[Tensor]]] = {}
    rows: list[Row] = []
    times: dict[tuple[str, str], list[float]] = {(column, metric): [] for column in columns for metric in metrics}
    found: dict[tuple[str, str], Row] = {}
    for column in columns:
        try:
            calls[column] = own if column == "eager" else callable_of(case, column)
            verdict = {"error": max(of_torch), "error_eager": max(of_torch), "why": ""}
            if column != "eager":
                verdict = judge(calls[column]())
        except Exception as error:  # whatever it is, the row says so and the others go on
            verdict = {"why": said(error)}
        found |= {(column, metric): dict(verdict) for metric in metrics}
    for turn in (columns, columns[::-1]):
        for column in turn:
            for metric in metrics:
                if found[column, metric]["why"]:
                    continue
                try:
                    if metric == "chained":
                        replayed, more = chained(calls[column])
                        found[column, metric] = judge(replayed)
                    else:
                        more = cold(calls[column], case.device)
                    times[column, metric] += more
                except Exception as error:
                    found[column, metric]["why"] = said(error)
    floor = max(flop / limits["flop_per_s"], size / limits["bytes_per_s"]) * 1000
    for column in columns:
        for metric in metrics:
            row = {**asdict(case), "column": column, "metric": metric, "gflop": flop / 1e9, "mbytes": size / 1e6,
                   "floor_ms": floor, **found[column, metric]}  # fmt: skip
            if not row["why"]:
                row |= quantiles(times[column, metric])
                row |= {"roof_share": floor / row["median_ms"], "peak_mb": peak(case, calls[column])}
            rows.append(row)
    calls.clear()
    gc.collect()
    return rows


def said(error: Exception) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"


def callable_of(case: Case, column: Column) -> Callable[[], list[Tensor]]:
    """The computation of a column on its own module and input, ready to be called again and again."""
    impl: Kernels = "hybrid" if column == "hybrid" else "triton" if column == "triton" else "reference"
    if case.level == "step":
        return step_of(case, impl, case.dtype, COMPILE.get(column))
    module, tensors = case.module(impl), case.tensors()
    if column != "eager_nchw" and case.level != "rals":
        module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        tensors = tensors[0].to(memory_format=CHANNELS_LAST), tensors[1].to(memory_format=CHANNELS_LAST)
    forward = torch.compile(module, mode=COMPILE[column]) if column in COMPILE else module
    return lambda: outcome(case, forward, list(module.parameters()), tensors, AUTOCAST.get(case.dtype))


def truth(case: Case) -> list[Tensor]:
    """The same computation by the reference in fp64."""
    if case.level == "step":
        return step_of(case, "reference", "fp64", None)()
    module = case.module("reference").double()
    x, gradient = case.tensors()
    return outcome(case, module, list(module.parameters()), (x.double(), gradient.double()), None)


def step_of(case: Case, impl: Kernels, precision: str, mode: str | None) -> Callable[[], list[Tensor]]:
    """Training steps of sega_x4 (or x8, by the side) on random images: both losses, and the generator's gradient.

    The gradient as one vector: through batch norm over a few samples single filters' gradients are mostly rounding.
    """
    base = preset("sega_x4" if case.side == 64 else "sega_x8")
    base = dataclasses.replace(base, data=dataclasses.replace(base.data, size=case.side * base.scale), kernels=impl)
    train = dataclasses.replace(base.train, batch_size=case.batch, precision=precision)  # type: ignore[arg-type]
    config = dataclasses.replace(base, train=train)
    world = World(precision, case.device)  # type: ignore[arg-type]
    torch.manual_seed(0)
    features = build_vgg19(config)
    assert features is not None
    for parameter in features.parameters():
        nn.init.normal_(parameter, std=0.03)
    players = Players(world, config, features)
    assert players.discriminator is not None
    if mode:
        players.generator.raw.compile(mode=mode)
        players.discriminator.raw.compile(mode=mode)
    images = torch.randint(0, 256, (case.batch, 3, config.data.size, config.data.size), dtype=torch.uint8)
    batch = make_batch(images.to(case.device), 0, config, world.dtype)

    def call() -> list[Tensor]:
        statistics = players.step(batch, 0, is_tick=False)
        gradients = [p.grad.flatten() for p in players.generator.raw.parameters() if p.grad is not None]
        return [statistics["loss_d"], statistics["loss_g"], torch.cat(gradients)]

    return call


def outcome(case: Case, forward: Callable[[Tensor], Tensor], parameters: list[nn.Parameter],
            tensors: tuple[Tensor, Tensor], dtype: torch.dtype | None) -> list[Tensor]:  # fmt: skip
    """The output; in mode `both` the gradients of input and parameters as well."""
    is_training, (x, gradient) = case.mode == "both", tensors
    x = x.detach().requires_grad_(is_training)
    narrow = torch.autocast(case.device, dtype or torch.bfloat16, enabled=dtype is not None)
    with narrow, torch.set_grad_enabled(is_training):
        y = forward(x)
    if not is_training:
        return [y]
    return [y.detach(), *torch.autograd.grad(y, [x, *parameters], gradient)]


def errors(found: list[Tensor], exact: list[Tensor], level: Level = "ridb") -> list[float]:
    """Relative errors in the norm, of each tensor; infinite where a number is not finite.

    Of deep networks all parameters' gradients count as one vector: rounding turns a few activations over their kink,
    which moves single filters' gradients of any implementation by more than its own error.
    """
    pairs = [(a.double().flatten(), b.double().flatten()) for a, b in zip(found, exact, strict=True)]
    if level in ("trunk", "generator") and len(pairs) > 2:
        mine, true = zip(*pairs[2:], strict=True)
        pairs = [*pairs[:2], (torch.cat(mine), torch.cat(true))]
    raw = [float((a - b).norm() / b.norm().clamp_min(1e-30)) for a, b in pairs]
    return [e if math.isfinite(e) else math.inf for e in raw]


def limits_of(of_torch: list[float], dtype: Precision) -> list[float]:
    """How far each tensor may be from fp64, given how far eager torch is: the output, then gradients.

    In fp32 one activation that rounding turned over its kink moves a RIDB's gradients by up to 6.5e-3 (counted on 3
    images of 17x17), in torch as well as here, though not the same one; a wrong tap would move them far more.
    """
    of_gradients = TOLERANCE[dtype] if dtype in AUTOCAST else KINK
    return [2 * t + (of_gradients if i else TOLERANCE[dtype]) for i, t in enumerate(of_torch)]


def work(case: Case) -> tuple[float, float]:
    """FLOP, and the bytes that must move at the least: input, parameters and output once each way.

    A backward does twice the work of its forward: one product for the input's gradient, one for the filter's.
    """
    if case.level == "step":  # an image at 4x from 64 pixels, and at 8x from 32
        return case.batch * (385e9 if case.side == 64 else 278e9 * (case.side / 32) ** 2), 0.0
    module, tensors = case.module("reference"), case.tensors()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module.float()(tensors[0].float())
    width = 2 if case.dtype in AUTOCAST else 4
    size = sum(t.numel() for t in tensors) * width + sum(p.numel() for p in module.parameters()) * 4
    is_training = case.mode == "both"
    return counter.get_total_flops() * (3 if is_training else 1), size * (2 if is_training else 1)


def peak(case: Case, call: Callable[[], list[Tensor]]) -> float | None:
    """Megabytes that a call allocates at its highest, on a GPU."""
    if case.device != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def line(row: Row) -> str:
    what = f"{row['level']} {row['mode']} {row['batch']}x{row['side']} {row['dtype']} {row['column']} {row['metric']}"
    if row["why"]:
        return f"{what}: {row['why']}"
    return (
        f"{what}: {row['median_ms']:.3f} ms [{row['p20_ms']:.3f}, {row['p80_ms']:.3f}], {row['roof_share']:.0%} of roof"
    )


def table(rows: list[Row]) -> Table:
    """Medians, a line a case, a column a way; chained times where there are any."""
    metric = "chained" if any(row["metric"] == "chained" for row in rows) else "cold"
    columns = [column for column in COLUMNS if any(row["column"] == column for row in rows)]
    shown = Table(title=f"median ms ({metric}); roof: floor over the best")
    for name in ("level", "mode", "batch", "side", *columns, "roof"):
        shown.add_column(name, justify="left" if name in ("level", "mode") else "right")
    cases: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        if row["metric"] == metric:
            cases.setdefault(tuple(row[name] for name in KEY[:4]), {})[row["column"]] = row
    for case, of_column in cases.items():
        medians = {column: row.get("median_ms") for column, row in of_column.items()}
        best = min((m for m in medians.values() if m), default=None)
        cells = ["-" if not medians.get(c) else f"{medians[c]:.3f}" for c in columns]
        roof = f"{next(r['floor_ms'] for r in of_column.values() if 'floor_ms' in r) / best:.0%}" if best else "-"
        shown.add_row(*map(str, case), *cells, roof)
    return shown


def write(out: Path, rows: list[Row], facts: dict[str, Any]) -> None:
    """The rows as CSV and, with where they come from, as JSON; a picture of them."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    with (out / "kernels.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, names)
        writer.writeheader()
        writer.writerows(rows)
    (out / "kernels.json").write_text(json.dumps({"provenance": facts, "rows": rows}, indent=1) + "\n")
    if any("median_ms" in row for row in rows):
        plot(out / "kernels.png", rows, facts)


def plot(path: Path, rows: list[Row], facts: dict[str, Any]) -> None:
    """Bars for each case and column, the middle 60 percent as whiskers, the roofline's floor as a line."""
    import matplotlib.pyplot as plt
    from matplotlib.figure import Figure

    metric = "chained" if any(row["metric"] == "chained" for row in rows) else "cold"
    timed = [row for row in rows if row["metric"] == metric and "median_ms" in row]
    cases = list(dict.fromkeys(tuple(row[name] for name in KEY[:4]) for row in timed))
    across = min(4, len(cases))
    down = math.ceil(len(cases) / across)
    figure = Figure(figsize=(3.6 * across, 2.7 * down), layout="constrained")
    figure.suptitle(f"{facts['device']}, torch {facts['torch']}, {metric}: ms, dashed: roofline")
    for axes, case in zip(figure.subplots(down, across, squeeze=False).flat, cases, strict=False):
        these = [row for row in timed if tuple(row[name] for name in KEY[:4]) == case]
        medians = [row["median_ms"] for row in these]
        spread = [
            [row["median_ms"] - row["p20_ms"] for row in these],
            [row["p80_ms"] - row["median_ms"] for row in these],
        ]
        colours = [plt.get_cmap("tab10")(COLUMNS.index(row["column"])) for row in these]
        axes.bar([row["column"] for row in these], medians, yerr=spread, color=colours)
        axes.axhline(statistics.median(row["floor_ms"] for row in these), color="black", linestyle="--", linewidth=1)
        axes.set_title(f"{case[0]} {case[1]}, {case[2]} x {case[3]}²", fontsize=9)
        axes.tick_params(axis="x", rotation=40, labelsize=7)
    for axes in list(figure.axes)[len(cases) :]:
        axes.set_axis_off()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    run(main)
