"""Fused kernels beside what torch does without them: `sega-dist bench kernels`.

Each row is one (level, mode, shape, dtype, column, metric). Before a column is timed, the very callable that will be is
compared with the reference in fp64; a column that fails has no time.
"""

import gc
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sega_dist.arguments import Device, parse
from sega_dist.bench.measure import ceilings, chained, cold, device_for, provenance, quantiles
from sega_dist.bench.results import Results, Row, said, show
from sega_dist.config import GeneratorConfig, Kernels, NormConfig
from sega_dist.errors import run
from sega_dist.kernels.conv3x3_act import conv3x3_act
from sega_dist.kernels.idb import idb
from sega_dist.kernels.rals import rals
from sega_dist.networks.generator import DenseNestedBlock, Generator, ResidualInternalDenseBlock, UpsamplingStage

Level = Literal["conv64", "conv128", "block", "upconv", "rals", "ridb", "trunk", "generator"]
Column = Literal["eager_nchw", "eager", "compile", "compile_max", "compile_graphs", "hybrid", "triton"]
Precision = Literal["bf16", "fp16", "fp32", "tf32"]
Mode = Literal["forward", "both"]

LEVELS: tuple[Level, ...] = ("conv64", "conv128", "block", "upconv", "rals", "ridb", "trunk", "generator")
COLUMNS: tuple[Column, ...] = ("eager_nchw", "eager", "compile", "compile_max", "compile_graphs", "hybrid", "triton")
BATCHES, SIDES = {"cuda": (8, 64), "cpu": (2,)}, {"cuda": (64, 32), "cpu": (16,)}
MODES: tuple[Mode, ...] = ("forward", "both")
COMPILE = {"compile": "default", "compile_max": "max-autotune-no-cudagraphs", "compile_graphs": "reduce-overhead"}
CHANNELS_LAST = torch.channels_last
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
TOLERANCE = {"bf16": 5e-3, "fp16": 1e-3, "tf32": 2e-3, "fp32": 1e-5}  # beside twice the error of torch's own path
KINK = 1e-2
CASE = ("level", "mode", "batch", "side")
KEY = (*CASE, "dtype", "column", "metric", "device", "code")


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
    device = device_for(command.device)
    dtype = command.dtype or ("bf16" if device == "cuda" else "fp32")
    began, facts = time.monotonic(), provenance(device)
    results = Results(command.out, KEY, facts["code"], command.again)
    if device == "cpu":
        print("no GPU in use: the reference paths are timed on the CPU; hybrid and triton are not measured")
    torch.backends.cudnn.benchmark = True  # the fused kernels are tuned to the shape: cuDNN may be as well
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = dtype != "fp32"
    limits = ceilings(device, AUTOCAST.get(dtype, torch.float32))
    sides, batches = command.side or SIDES[device], command.batch or BATCHES[device]
    cases = [Case(level, mode, batch, side, dtype, device) for level in command.levels for side in sides
             for batch in batches for mode in command.modes]  # fmt: skip
    metrics = ("cold", "chained") if device == "cuda" else ("cold",)
    is_late = False
    for case in cases:
        mark = {**asdict(case), "device": facts["device"], "code": facts["code"]}
        missing = [column for column in command.columns if can_run(case, column)
                   and not all(results.has({**mark, "column": column, "metric": m}) for m in metrics)]  # fmt: skip
        is_late = is_late or bool(command.minutes and time.monotonic() - began > command.minutes * 60)
        if not missing or is_late:
            continue
        for row in compare(case, missing, metrics, limits):
            results.add(row | mark | {"commit": facts["commit"]})
            print(line(row), flush=True)
    shown = [row for row in results.rows if row["metric"] == metrics[-1]]
    results.write("kernels", facts | limits, shown, CASE, metrics[-1])
    show(shown, CASE, f"median ms ({metrics[-1]}); roof: floor over the best")
    if is_late:
        print(f"stopped after {command.minutes:g} minutes: not every comparison was made; the same command goes on")
    return results.rows


def can_run(case: Case, column: Column) -> bool:
    """Kernels and the compiler's dearer modes need a GPU."""
    return case.device == "cuda" or column in ("eager_nchw", "eager", "compile")


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


def callable_of(case: Case, column: Column) -> Callable[[], list[Tensor]]:
    """The computation of a column on its own module and input, ready to be called again and again."""
    impl: Kernels = "hybrid" if column == "hybrid" else "triton" if column == "triton" else "reference"
    module, tensors = case.module(impl), case.tensors()
    if column != "eager_nchw" and case.level != "rals":
        module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        tensors = tensors[0].to(memory_format=CHANNELS_LAST), tensors[1].to(memory_format=CHANNELS_LAST)
    forward = torch.compile(module, mode=COMPILE[column]) if column in COMPILE else module
    return lambda: outcome(case, forward, list(module.parameters()), tensors, AUTOCAST.get(case.dtype))


def truth(case: Case) -> list[Tensor]:
    """The same computation by the reference in fp64."""
    module = case.module("reference").double()
    x, gradient = case.tensors()
    return outcome(case, module, list(module.parameters()), (x.double(), gradient.double()), None)


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


if __name__ == "__main__":
    run(main)
