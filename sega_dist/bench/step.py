"""A whole training step and its parts, beside what a user would write in plain PyTorch: `sega-dist bench step`.

Every way starts from the same weights and trains on the same random images. Before one is timed, its losses and its
generator's gradient are compared with those of the plain loop in fp64. The plain loop is `tests/plain.py`.
"""

import dataclasses
import functools
import gc
import importlib.util
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sega_dist.arguments import Device, parse
from sega_dist.batches import make_batch
from sega_dist.bench.measure import ceilings, device_for, in_a_row, provenance, quantiles
from sega_dist.bench.results import Results, Row, said, show
from sega_dist.bench.work import counted
from sega_dist.config import Config, Scale
from sega_dist.distributed import AUTOCAST, World
from sega_dist.ema import Ema
from sega_dist.errors import UserError, run
from sega_dist.networks.build import build_discriminator, build_generator, build_vgg19
from sega_dist.objectives import Batch
from sega_dist.players import MODES, Players
from sega_dist.presets import preset
from sega_dist.recording import WARMUP

Call = Callable[[], Any]
PLAIN = Path(__file__).resolve().parents[2] / "tests/plain.py"
SIZE = 256  # HR side


class Way(NamedTuple):
    """How a column computes."""

    is_ours: bool
    precision: str
    compile: Literal["off", "default", "max", "graphs"] = "off"  # graphs: torch.compile's own CUDA graphs


Column = Literal["plain_fp32", "plain_bf16", "plain_compile", "plain_graphs", "plain_max",
                 "ours_fp32", "ours_bf16", "ours_compile", "ours_max"]  # fmt: skip
WAYS: dict[Column, Way] = {
    "plain_fp32": Way(False, "fp32"),  # NCHW, as PyTorch lays images by itself, without TF32; the others: channels last
    "plain_bf16": Way(False, "bf16"),
    "plain_compile": Way(False, "bf16", "default"),
    "plain_graphs": Way(False, "bf16", "graphs"),
    "plain_max": Way(False, "bf16", "max"),
    "ours_fp32": Way(True, "fp32"),
    "ours_bf16": Way(True, "bf16"),
    "ours_compile": Way(True, "bf16", "default"),
    "ours_max": Way(True, "bf16", "max"),
}
ON_CPU: tuple[Column, ...] = ("plain_fp32", "plain_bf16", "ours_fp32", "ours_bf16")
QUICK: dict[str, tuple[Column, ...]] = {"cpu": ("plain_fp32", "ours_fp32"), "cuda": ("plain_bf16", "ours_compile")}
CASE = ("part", "scale", "batch")
KEY = (*CASE, "column", "device", "code")
STEP = "step"
UNCOUNTED = ("data", "EMA")  # parts without products
# How far L_D, L_G and the gradient may be from fp64, beside three times what the plain loop in this precision is: batch
# norm over a few images and activations at their kink make both of them differ at random.
LIMITS = {"fp32": (1e-3, 1e-3, 2e-2), "bf16": (5e-2, 5e-2, 1e-1)}


@dataclass(frozen=True)
class StepCommand:
    """Time training steps of sega_x4 and sega_x8: whole, and part by part."""

    out: Path = Path("runs/bench-step")  # rows.jsonl, step.csv, step.json, step.png
    scale: tuple[Scale, ...] = ()  # default: 4 and 8 on a GPU, 4 on a CPU
    batch: tuple[int, ...] = ()  # images a step; default: 8, 16, 32, 64 on a GPU, 2 on a CPU
    columns: tuple[Column, ...] = ()  # ways to compute it; default: all on a GPU, those that do not compile on a CPU
    device: Device = "auto"
    minutes: float = 0  # start no new case after so long; 0 = no limit
    again: bool = False  # time what has been timed already, too
    quick: bool = False  # the first scale and batch, a plain way and ours, few repetitions
    json: bool = False  # print the rows as JSON and nothing else


def main(argv: list[str] | None = None) -> None:
    command = parse(StepCommand, argv or [], "sega-dist bench step")
    rows = bench(command)
    if command.json:
        print(json.dumps(rows, indent=1))


def bench(command: StepCommand) -> list[Row]:
    """Every row of the command, timed now or before; writes the results and prints a table."""
    device = device_for(command.device)
    say: Callable[[str], None] = (lambda _: None) if command.json else functools.partial(print, flush=True)
    every = QUICK[device] if command.quick else tuple(WAYS) if device == "cuda" else ON_CPU
    columns = command.columns or every
    scales: tuple[Scale, ...] = command.scale or ((4, 8) if device == "cuda" else (4,))
    batches = command.batch or ((8, 16, 32, 64) if device == "cuda" else (2,))
    if min(batches) < 2:
        raise UserError("--batch must be 2 or more: batch norm needs two samples")
    if command.quick:
        scales, batches = scales[:1], batches[:1]
    torch.backends.cudnn.benchmark = True
    began, facts = time.monotonic(), provenance(device)
    results = Results(command.out, KEY, facts["code"], command.again)
    limits = {precision: ceilings(device, dtype) for precision, dtype in (("fp32", torch.float32), *AUTOCAST.items())
              if precision in {WAYS[column].precision for column in columns}}  # fmt: skip
    is_late = False
    for scale in scales:
        for batch in batches:
            mark = {"scale": scale, "batch": batch, "device": facts["device"], "code": facts["code"]}
            missing = [c for c in columns if not results.has({**mark, "column": c, "part": STEP})]
            is_late = is_late or bool(command.minutes and time.monotonic() - began > command.minutes * 60)
            if not missing or is_late:
                continue
            for row in compare(config_of(scale, batch), missing, device, limits, command.quick):
                row = mark | row | {"commit": facts["commit"]}
                results.add(row)
                say(line(row))
    shown = [row for row in results.rows if row["scale"] in scales and row["batch"] in batches]
    facts |= {"ceilings": limits}
    if not command.quick:
        facts["fits"] = {f"x{scale} {precision}": fits(scale, precision) for scale in scales for precision in limits}
    results.write("step", facts, shown, CASE, f"{SIZE} pixels")
    if not command.json:
        show(shown, CASE, "median ms; roof: floor over the best")
        for what, largest in facts.get("fits", {}).items():
            print(f"{what} fits, by count: " + ", ".join(f"{gb} GB {batch}" for gb, batch in largest.items()))
        if is_late:
            print(f"stopped after {command.minutes:g} minutes: not every case was timed; the same command goes on")
    return shown


def config_of(scale: Scale, batch: int) -> Config:
    """The paper's training at another batch.

    At a learning rate of zero: Adam's work is the same, and any step, however late, can still be checked.
    """
    base = preset(f"sega_x{scale}")
    data = dataclasses.replace(base.data, size=SIZE)
    train = dataclasses.replace(base.train, batch_size=batch, learning_rate=0.0)
    return dataclasses.replace(base, data=data, train=train)


def compare(config: Config, columns: list[Column], device: str, limits: dict[str, dict[str, float]], is_quick: bool
            ) -> list[Row]:  # fmt: skip
    """All columns of a case: checked, then timed in turn, forwards and backwards, so that drift meets all alike."""
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = 64  # counted for all ways together; beyond it a way would run uncompiled
    countable.cache_clear()
    gc.collect()
    try:
        exact = outcome(Plain(config, Way(False, "fp64"), device))
    except RuntimeError as error:  # without the truth no column can be judged: rows say so, the other cases go on
        return [{"column": column, "part": STEP, "why": f"no reference: {said(error)}"} for column in columns]
    of_torch: dict[str, list[float]] = {}
    rows: dict[tuple[Column, str], Row] = {}
    subjects: dict[Column, Subject] = {}
    for column in sorted(columns, key=lambda column: WAYS[column].is_ours):
        way, start = WAYS[column], time.perf_counter()
        try:
            before = begin_memory(device)
            subject = (Ours if way.is_ours else Plain)(config, way, device)
            found = errors(outcome(subject), exact)
            first_s, memory = time.perf_counter() - start, memory_since(before, device)
            if device == "cuda":  # what is timed is a replay: that has to be right as well
                for _ in range(WARMUP + 1):
                    subject.step()
                found = [max(pair) for pair in zip(found, errors(outcome(subject), exact), strict=True)]
        except (RuntimeError, ImportError) as error:  # the row says so and the others go on
            rows[column, STEP] = {"why": said(error)}
            continue
        row = rows[column, STEP] = {"error": max(found), "first_step_s": first_s, "why": "wrong", **memory}
        if way.precision not in of_torch:
            is_it = way == Way(False, way.precision)
            of_torch[way.precision] = (
                found if is_it else errors(outcome(Plain(config, Way(False, way.precision), device)), exact)
            )
        if is_right(found, of_torch[way.precision], way.precision):
            subjects[column], row["why"] = subject, ""
    times: dict[tuple[Column, str], list[float]] = {}
    in_detail = [column for column in subjects if not is_quick or WAYS[column].is_ours][: 1 if is_quick else None]
    for turn in range(3):
        for column in list(subjects)[:: -1 if turn % 2 else 1]:
            try:
                for part, call in subjects[column].parts.items():
                    if part == STEP or (column in in_detail and not (is_quick and turn)):
                        group_ms = 100 if part == STEP else 5
                        times.setdefault((column, part), []).extend(in_a_row(call, device, group_ms))
            except RuntimeError as error:  # out of memory, most likely: the others go on
                rows[column, STEP]["why"] = said(error)
                del subjects[column]
                times = {key: taken for key, taken in times.items() if key[0] != column}
    for (column, part), taken in times.items():
        row = rows.setdefault((column, part), {"why": ""})
        row |= quantiles(taken)
        row |= against_roofline(config, WAYS[column].precision, part, row["median_ms"], limits)
        if part == STEP:
            row |= {"images_per_s": config.train.batch_size / row["median_ms"] * 1000}
    return [{"column": column, "part": part, **row} for (column, part), row in rows.items()]


def against_roofline(config: Config, precision: str, part: str, ms: float, limits: dict[str, dict[str, float]]) -> Row:
    """Work of a part, the time it takes at least, and the shares of that and of the products alone in `ms`."""
    if part in UNCOUNTED:
        return {}
    found = work(config.scale, config.train.batch_size, precision, part)
    of_flop = found["flop"] / limits[precision]["flop_per_s"] * 1000
    floor = max(of_flop, found["bytes"] / limits[precision]["bytes_per_s"] * 1000)
    return {"gflop": found["flop"] / 1e9, "gbytes": found["bytes"] / 1e9, "computed_gb": found["peak"] / 1e9,
            "floor_ms": floor, "roof_share": floor / ms, "flop_use": of_flop / ms}  # fmt: skip


@functools.cache
def work(scale: Scale, batch: int, precision: str, part: str = STEP) -> dict[str, float]:
    """FLOP, bytes and peak memory of a part, counted with the reference ops."""
    subject = countable(scale, batch, precision)
    held = sum(t.nbytes for network in subject.networks for t in (*network.parameters(), *network.buffers()))
    count = counted(subject.parts[part])
    return {"flop": count.flop, "bytes": count.bytes, "peak": count.peak + held}


@functools.cache
def countable(scale: Scale, batch: int, precision: str) -> "Ours":
    config = dataclasses.replace(config_of(scale, batch), kernels="reference")
    return Ours(config, Way(True, precision), "cuda" if torch.cuda.is_available() else "cpu")


def fits(scale: Scale, precision: str) -> dict[int, int]:
    """The largest batch for a GPU of so many GB, by count; a tenth is left to CUDA, work spaces and fragments.

    Memory is linear in the batch; the fused kernels keep less of the trunk than the reference ops counted here.
    """
    two, four = (work(scale, batch, precision)["peak"] for batch in (2, 4))
    image = (four - two) / 2
    return {gb: int((0.9e9 * gb - two) / image) + 2 for gb in (24, 40, 80, 141)}


def begin_memory(device: str) -> int:
    """Bytes that the GPU's allocator holds now, from where its peak is counted."""
    if device == "cpu":
        return 0
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def memory_since(before: int, device: str) -> Row:
    """What a way took at the highest, weights and all, in the first step: replays allocate nothing."""
    return {} if device == "cpu" else {"memory_gb": (torch.cuda.max_memory_allocated() - before) / 1e9}


def outcome(subject: "Subject") -> list[Tensor]:
    """Both losses and the generator's gradient of a step; every step is the first, since nothing is learnt."""
    found = [loss.double().flatten() for loss in subject.step()]
    gradient = torch.cat([p.grad.flatten() for p in subject.networks[0].parameters() if p.grad is not None])
    return [*found, gradient.double()]


def errors(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    """Relative, in the norm; the gradient as one vector, since single filters' gradients may be mostly rounding."""
    return [float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]


def is_right(found: list[float], of_torch: list[float], precision: str) -> bool:
    return all(e <= 3 * t + limit for e, t, limit in zip(found, of_torch, LIMITS[precision], strict=True))


@functools.cache
def setting(scale: Scale, batch: int) -> tuple[list[list[Tensor]], Tensor]:
    """Weights of generator, discriminator and VGG19, and images (N,3,S,S) uint8: the same for every way."""
    config = config_of(scale, batch)
    torch.manual_seed(0)
    features = build_vgg19(config)
    assert features is not None
    for parameter in features.parameters():
        nn.init.kaiming_normal_(parameter) if parameter.dim() > 1 else nn.init.zeros_(parameter)
    networks = [build_generator(config), build_discriminator(config), features]
    # Smooth images unlike each other: between patches of noise batch norm would amplify every rounding.
    smooth = F.interpolate(torch.rand(batch, 3, 8, 8), size=SIZE, mode="bicubic")
    images = (smooth * 255).clamp(0, 255).to(torch.uint8)
    return [[p.detach() for p in network.parameters()] for network in networks], images


class Subject:
    """A way ready to be called: a step, and what it is made of."""

    batch: Batch
    networks: list[nn.Module]  # generator, discriminator, VGG19
    optimizers: tuple[torch.optim.Optimizer, torch.optim.Optimizer]  # of generator and discriminator

    def step(self) -> tuple[Tensor, Tensor]:
        """One update of both players -> L_D, L_G."""
        raise NotImplementedError

    def pieces(self) -> dict[str, Call]:
        """What only this way has."""
        return {}

    def generate(self) -> Tensor:
        raise NotImplementedError

    def targets(self) -> Any:
        """Of HR and LR, what both phases need."""
        raise NotImplementedError

    def d_loss(self, targets: Any, sr: Tensor) -> Tensor:
        raise NotImplementedError

    def content(self, targets: Any, sr: Tensor) -> Tensor:
        raise NotImplementedError

    def adversarial(self, targets: Any, sr: Tensor) -> Tensor:
        """The generator's, D being frozen."""
        raise NotImplementedError

    @functools.cached_property
    def parts(self) -> dict[str, Call]:
        """The step, then its parts, each with its backward; gradients stay where the next call forgets them."""
        sr, gradient = torch.randn_like(self.batch.hr), torch.randn_like(self.batch.hr)
        targets = self.targets()
        of_g, of_d = self.optimizers

        def back(optimizer: torch.optim.Optimizer, loss: Tensor, gradient: Tensor | None = None) -> None:
            optimizer.zero_grad(set_to_none=True)
            loss.backward(gradient)

        def of_image(loss: Callable[[Any, Tensor], Tensor]) -> None:
            x = sr.detach().requires_grad_()
            self.networks[1].requires_grad_(False)
            torch.autograd.grad(loss(targets, x), x)
            self.networks[1].requires_grad_(True)

        return {
            STEP: self.step,
            "G forward": self.generate,
            "G forward, backward": lambda: back(of_g, self.generate(), gradient),
            "E, VGG of HR, LR": self.targets,
            "D phase": lambda: back(of_d, self.d_loss(targets, sr)),
            "VGG of SR": lambda: of_image(self.content),
            "D of G phase": lambda: of_image(self.adversarial),
            "Adam": lambda: (of_g.step(), of_d.step()),
        } | self.pieces()


class Ours(Subject):
    """This program's."""

    def __init__(self, config: Config, way: Way, device: str):
        weights, self.images = setting(config.scale, config.train.batch_size)
        train = dataclasses.replace(config.train, precision=way.precision)  # type: ignore[arg-type]
        self.config = dataclasses.replace(config, compile=way.compile, train=train)  # type: ignore[arg-type]
        self.world = World(way.precision, device)  # type: ignore[arg-type]
        features = build_vgg19(config)
        assert features is not None
        _adopt([features], weights[2:])
        self.players = Players(self.world, self.config, features)
        assert self.players.discriminator is not None
        self.g, self.d = self.players.generator, self.players.discriminator
        self.networks, self.optimizers = [self.g.raw, self.d.raw, features], (self.g.optimizer, self.d.optimizer)
        _adopt(self.networks[:2], weights)
        self.batch = make_batch(self.images, 0, self.config, self.world)
        self.average = Ema(self.g.parts, 1e4)

    def step(self) -> tuple[Tensor, Tensor]:
        found = self.players.step(self.batch, 0, is_tick=False)
        return found["loss_d"], found["loss_g"]

    def pieces(self) -> dict[str, Call]:
        return {"data": lambda: make_batch(self.images, 0, self.config, self.world),
                "EMA": lambda: self.average.update(self.config.train.batch_size, 100_000)}  # fmt: skip

    def generate(self) -> Tensor:
        with self.world.autocast():
            return self.g.forward(self.batch.lr).to(self.world.dtype)

    def targets(self) -> Any:
        with self.world.autocast():
            return self.players.objective.targets(self.batch, is_warmup=False)

    def d_loss(self, targets: Any, sr: Tensor) -> Tensor:
        with self.world.autocast():
            return self.players.objective.d_loss(self.d.forward, self.batch, targets, sr)[0]

    def content(self, targets: Any, sr: Tensor) -> Tensor:
        with self.world.autocast():
            return self.players.objective.content(targets, sr)

    def adversarial(self, targets: Any, sr: Tensor) -> Tensor:
        with self.world.autocast():
            return self.players.objective.adversarial(self.d.raw, self.batch, targets, sr)


class Plain(Subject):
    """The loop of `tests/plain.py`: NCHW in fp32 and fp64, as PyTorch lays images by itself, else channels last."""

    def __init__(self, config: Config, way: Way, device: str):
        weights, images = setting(config.scale, config.train.batch_size)
        world = World("fp64" if way.precision == "fp64" else "fp32", device)  # type: ignore[arg-type]
        narrow = AUTOCAST.get(way.precision)
        layout = torch.channels_last if narrow else torch.contiguous_format
        self.loop = plain_loop().Plain(config.scale, SIZE, weights, device, world.dtype, layout, narrow,
                                       {"off": "", "graphs": "reduce-overhead", **MODES}[way.compile])  # fmt: skip
        batch = make_batch(images, 0, config, world)
        lr, hr = (x.contiguous(memory_format=layout) for x in (batch.lr, batch.hr))
        self.batch = Batch(lr, hr, batch.noise, batch.normals)
        self.networks = [self.loop.g, self.loop.d, self.loop.e]
        self.optimizers = (self.loop.opt_g, self.loop.opt_d)
        for optimizer in self.optimizers:
            optimizer.param_groups[0]["lr"] = config.train.learning_rate

    def step(self) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = self.loop.step(*self.batch[:3])
        return found

    def generate(self) -> Tensor:
        with self.loop.autocast:
            return self.loop.g(self.batch.lr)

    def targets(self) -> Any:
        with self.loop.autocast, torch.no_grad():
            return self.loop.semantics(*self.batch[:2]), self.loop.phi(self.batch.hr)

    def d_loss(self, targets: Any, sr: Tensor) -> Tensor:
        with self.loop.autocast:
            return self.loop.loss_d(sr, targets[0], *self.batch[1:3])

    def content(self, targets: Any, sr: Tensor) -> Tensor:
        with self.loop.autocast:
            return self.loop.content(targets[1], sr)

    def adversarial(self, targets: Any, sr: Tensor) -> Tensor:
        with self.loop.autocast:
            return self.loop.loss_a(sr, targets[0], *self.batch[1:3])


def _adopt(networks: list[nn.Module], weights: list[list[Tensor]]) -> None:
    with torch.no_grad():
        for network, values in zip(networks, weights, strict=False):
            for parameter, value in zip(network.parameters(), values, strict=True):
                parameter.copy_(value)


@functools.cache
def plain_loop() -> Any:
    """The module `tests/plain.py` of the checkout that this package is installed from."""
    if not PLAIN.exists():
        raise UserError(f"{PLAIN} is not there: the plain loop to compare with comes with a checkout, not with a wheel")
    spec = importlib.util.spec_from_file_location("plain", PLAIN)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def line(row: Row) -> str:
    what = f"x{row['scale']} batch {row['batch']} {row['column']} {row['part']}"
    if row["why"]:
        return f"{what}: {row['why']}"
    roof = f", {row['roof_share']:.0%} of roof" if "roof_share" in row else ""
    return f"{what}: {row['median_ms']:.2f} ms [{row['p20_ms']:.2f}, {row['p80_ms']:.2f}]{roof}"


if __name__ == "__main__":
    run(main)
