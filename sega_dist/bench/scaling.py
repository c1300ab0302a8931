"""What a step sends between processes, and how its time should grow with them: `sega-dist bench scaling`.

Paper and pencil, not a measurement: the counts are exact (a test compares them with what crosses a cable), the times
follow from them, the links below and the step time on one GPU that is given.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeGuard

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from sega_dist.arguments import parse
from sega_dist.config import Config
from sega_dist.errors import run
from sega_dist.networks.build import build_discriminator, build_generator
from sega_dist.presets import preset

FP32 = 4  # bytes of everything that travels
BACKWARD = 2 / 3  # of a step: the time that gradients can travel in


@dataclass(frozen=True)
class Link:
    """What joins processes: bytes a second that one ring moves, and seconds for a hop of a small message."""

    inside_bandwidth: float  # within a machine of eight
    inside_hop: float
    outside_bandwidth: float  # between machines, for the eight rings of a machine together
    outside_hop: float


# Assumed, from what vendors state for one direction, at 80 %; NCCL's small messages.
LINKS = {
    "NVLink 4, InfiniBand 8 x 400 Gb/s": Link(360e9, 3e-6, 320e9, 6e-6),
    "NVLink 4, Ethernet 1 x 100 Gb/s": Link(360e9, 3e-6, 10e9, 20e-6),
    "NVLink 4, Ethernet 1 x 25 Gb/s": Link(360e9, 3e-6, 2.5e9, 30e-6),
}
LAUNCH = 10e-6  # seconds to start a collective, whatever its size
MACHINE = 8  # GPUs


@dataclass(frozen=True)
class Collective:
    """One kind of message of a step."""

    what: str
    calls: list[int]  # how many values each rank contributes to each call
    is_gathering: bool = False  # all-gather; otherwise all-reduce
    is_hidden: bool = False  # travels while backward computes

    @property
    def size(self) -> int:
        """Bytes that each rank contributes in a step."""
        return FP32 * sum(self.calls)

    def sent(self, ranks: int) -> float:
        """Bytes that one rank sends in a step, by the ring algorithm."""
        return self.size * (ranks - 1 if self.is_gathering else 2 * (ranks - 1) / ranks)


@dataclass(frozen=True)
class ScalingCommand:
    """Print what DDP sends in a step, and the weak scaling that follows from it."""

    preset: str = "sega_x4"  # a named configuration
    step_ms: float = 20.0  # of one GPU alone, at its share of the batch: measure yours


def main(argv: list[str] | None = None) -> None:
    command = parse(ScalingCommand, argv or [], "sega-dist bench scaling")
    messages = list(traffic(preset(command.preset)))
    console = Console()
    sizes = Table(title=f"{command.preset}: what travels in a step of DDP")
    for heading in ("what", "calls", "KB"):
        sizes.add_column(heading, justify="left" if heading == "what" else "right")
    for message in messages:
        sizes.add_row(message.what, str(len(message.calls)), f"{message.size / 1e3:,.2f}")
    console.print(sizes)
    ranks = [8, 16, 32, 64, 128, 256, 512]
    title = f"weak scaling if one GPU takes {command.step_ms:g} ms a step: efficiency, and ms that wait for messages"
    shown = Table(title=title)
    shown.add_column("link")
    for count in ranks:
        shown.add_column(f"{count} GPUs", justify="right")
    for name, link in LINKS.items():
        waits = [waiting(messages, link, count, command.step_ms / 1e3) for count in ranks]
        shown.add_row(name, *(f"{command.step_ms / (command.step_ms + w * 1e3):.0%}  {w * 1e3:.1f}" for w in waits))
    console.print(shown)


def traffic(config: Config) -> Iterator[Collective]:
    """Every collective of a training step under DDP, apart from what a tick adds."""
    with torch.device("meta"):
        generator, discriminator = build_generator(config), build_discriminator(config)
    yield Collective("gradient of G", [_count(generator)], is_hidden=True)
    if config.has_discriminator:
        yield Collective("gradient of D", [_count(discriminator)], is_hidden=True)
        yield from _norms("D", list(_discriminator_norms(config, discriminator)))
        if config.loss.adv != "bce":
            yield Collective("relativistic means", [4] * 4)  # forward and backward, in both phases
    yield from _norms("G", [(layer.num_features, 1, 1) for layer in generator.modules() if _is_norm(layer)])
    yield Collective("shall we stop", [2])  # one whole number of eight bytes, over the host


def waiting(messages: list[Collective], link: Link, ranks: int, step: float) -> float:
    """Seconds of a step of `step` seconds in which a process waits for messages."""
    hidden = sum(seconds(m, link, ranks) for m in messages if m.is_hidden)
    return max(0.0, hidden - BACKWARD * step) + sum(seconds(m, link, ranks) for m in messages if not m.is_hidden)


def seconds(message: Collective, link: Link, ranks: int) -> float:
    """Of all its calls: bytes by the ring within and between machines, hops by a tree."""
    machines = math.ceil(ranks / MACHINE)
    inside, outside = min(ranks, MACHINE), machines
    transfer = message.sent(ranks) / (link.outside_bandwidth if machines > 1 else link.inside_bandwidth)
    hops = 2 * (math.log2(inside) * link.inside_hop + math.log2(outside) * link.outside_hop)
    return transfer + len(message.calls) * (LAUNCH + hops)


def _discriminator_norms(config: Config, discriminator: nn.Module) -> Iterator[tuple[int, int, int]]:
    """Channels of each batch norm of D and its encoder, and how often a step calls it forward and backward.

    Both phases show it real and fake; the G phase goes backward through the fake side alone, and through its semantics
    only where these are SR's.
    """
    is_sr = config.discriminator.fake_semantics == "sr"
    for name, layer in discriminator.named_modules():
        if _is_norm(layer):
            if "encoder.lr" in name:
                times = 2, 1
            elif "encoder.hr" in name:
                times = (4, 3) if is_sr else (2, 1)
            else:
                times = 4, 3 if is_sr or "semantics" not in name else 2
            yield layer.num_features, *times


def _norms(player: str, norms: list[tuple[int, int, int]]) -> Iterator[Collective]:
    """The messages of batch norms, given as (channels, forwards, backwards)."""
    forward = [2 * channels + 1 for channels, times, _ in norms for _ in range(times)]
    backward = [2 * channels for channels, _, times in norms for _ in range(times)]
    yield Collective(f"batch norm of {player}, forward", forward, is_gathering=True)
    yield Collective(f"batch norm of {player}, backward", backward)


def _is_norm(layer: nn.Module) -> TypeGuard[nn.BatchNorm2d]:
    return isinstance(layer, nn.BatchNorm2d)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


if __name__ == "__main__":
    run(main)
