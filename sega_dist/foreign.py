"""Weights that other programs trained, as snapshots: `sega-dist import FILE OUT.safetensors --preset esrgan_x4`."""

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sega_dist.arguments import InPath, OutPath, parse
from sega_dist.config import Config, validate
from sega_dist.data.shards import write_whole
from sega_dist.errors import UserError
from sega_dist.networks.build import build_generator
from sega_dist.presets import preset
from sega_dist.snapshot import to_bytes
from sega_dist.weights import read_state

# Theirs -> ours, by generator; in ours {0} is theirs' first number, {1:-1} the second less one, and so on.
LAYOUTS: dict[str, dict[str, list[tuple[str, str]]]] = {
    "esrgan": {
        "BasicSR": [
            (r"conv_first", "first"), (r"body\.(\d+)\.rdb(\d)\.conv(\d)", "trunk.{0}.blocks.{1:-1}.convs.{2:-1}"),
            (r"conv_body", "fusion"), (r"conv_up(\d)", "upsampling.{0:-1}"), (r"conv_hr", "hr"), (r"conv_last", "last"),
        ],
        "ESRGAN's own": [
            (r"conv_first", "first"), (r"RRDB_trunk\.(\d+)\.RDB(\d)\.conv(\d)", "trunk.{0}.blocks.{1:-1}.convs.{2:-1}"),
            (r"trunk_conv", "fusion"), (r"upconv(\d)", "upsampling.{0:-1}"), (r"HRconv", "hr"), (r"conv_last", "last"),
        ],
    },
    "srresnet": {
        "SRGAN-PyTorch": [
            (r"conv(?:_block)?1\.(\d)", "first.{0}"), (r"trunk\.(\d+)\.rcb\.(\d)", "trunk.{0}.layers.{1}"),
            (r"conv(?:_block)?2\.(\d)", "fusion.{0}"), (r"conv(?:_block)?3", "last"),
            (r"upsampling\.(\d)\.upsample_block\.(\d)", "upsampling.{0}.{1}"),
        ],
    },
}  # fmt: skip


@dataclass(frozen=True)
class ImportCommand:
    """Turn a generator's weights from BasicSR, ESRGAN or SRGAN-PyTorch into a snapshot."""

    source: InPath  # .pth (read without executing anything) or .safetensors
    out: OutPath  # the snapshot to write, .safetensors
    preset: str  # whose generator it is: srresnet_x4, srgan_x8, esrgan_x4 ...; width and blocks are the file's


def main(argv: list[str] | None = None) -> None:
    command = parse(ImportCommand, argv or [], "sega-dist import")
    if command.out.suffix != ".safetensors" or command.out.exists():
        raise UserError(f"{command.out} must end with .safetensors and not exist yet")
    config, layout, weights = imported(command.source, preset(command.preset))
    write_whole(command.out, to_bytes(0, config, weights))
    print(f"{command.source} ({layout}) -> {command.out}, {sum(w.numel() for w in weights.values()):,} values")


def imported(file: Path, config: Config) -> tuple[Config, str, dict[str, Tensor]]:
    """The configuration with the file's width and blocks, the layout's name, and the weights under our names."""
    kind = config.generator.kind
    if kind not in LAYOUTS:
        raise UserError(
            f"weights of generator.kind {kind} have no layout known here; presets of {', '.join(LAYOUTS)} do"
        )
    state = {name.removeprefix("module."): tensor for name, tensor in read_state(file, "IN").items()}
    named = {layout: dict(_renamed(state, rules)) for layout, rules in LAYOUTS[kind].items()}
    layout, weights = max(named.items(), key=lambda pair: len(pair[1]))
    unknown = sorted(set(state) - _understood(state, LAYOUTS[kind][layout]))
    if unknown or not weights:
        raise UserError(
            f"{file}: {(unknown or ['nothing'])[0]} is in no layout of {kind} known here ({', '.join(named)})"
        )
    blocks = 1 + max((int(name.split(".")[1]) for name in weights if name.startswith("trunk.")), default=-1)
    first = weights.get("first.weight", weights.get("first.0.weight"))
    if first is None or blocks < 1:
        raise UserError(f"{file} has no first convolution, or no residual block: it is not a whole generator")
    generator = dataclasses.replace(config.generator, blocks=blocks, channels=first.shape[0])
    config = validate(dataclasses.replace(config, generator=generator))
    _check(file, config, weights)
    return config, layout, weights


def _check(file: Path, config: Config, weights: dict[str, Tensor]) -> None:
    """UserError where the weights are not those of the configuration's generator."""
    with torch.device("meta"):
        wanted = build_generator(config).state_dict()
    # How many batches a norm has seen decides nothing, and older files lack it.
    for name in wanted:
        if name.endswith("num_batches_tracked"):
            weights.setdefault(name, torch.tensor(0))
    apart = sorted(set(wanted) ^ set(weights))
    if apart:
        of_file = "lacks" if apart[0] in wanted else "has also"
        raise UserError(f"{file} {of_file} {apart[0]}: a generator for x{config.scale} has {len(wanted)} tensors,"
                        f" this one {len(weights)}; was it made for another scale?")  # fmt: skip
    for name, tensor in weights.items():
        if tensor.shape != wanted[name].shape:
            raise UserError(f"{file}: {name} is {tuple(tensor.shape)}, should be {tuple(wanted[name].shape)}")
        if not bool(tensor.isfinite().all()):
            raise UserError(f"{file}: {name} holds values that are not finite numbers")


def _renamed(state: dict[str, Tensor], rules: list[tuple[str, str]]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in state.items():
        layer, _, leaf = name.rpartition(".")
        for theirs, ours in rules:
            found = re.fullmatch(theirs, layer)
            if found:
                yield f"{_filled(ours, found.groups())}.{leaf}", tensor
                break


def _understood(state: dict[str, Tensor], rules: list[tuple[str, str]]) -> set[str]:
    return {name for name in state if any(re.fullmatch(theirs, name.rpartition(".")[0]) for theirs, _ in rules)}


def _filled(pattern: str, numbers: tuple[str, ...]) -> str:
    """`pattern` with {i} as number i and {i:-1} as that less one."""
    return re.sub(r"\{(\d)(:-1)?\}", lambda m: str(int(numbers[int(m[1])]) - bool(m[2])), pattern)
