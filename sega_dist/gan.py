"""A pretrained GAN to explore: a snapshot of a face GAN, NVlabs' StyleGAN2 weights, or the tutorial's DCGAN."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from torch import Tensor, nn

from sega_dist import latents
from sega_dist.config import Config
from sega_dist.distributed import World
from sega_dist.errors import UserError
from sega_dist.latents import Explorable, Featured
from sega_dist.networks.build import build_discriminator, build_generator
from sega_dist.networks.dcgan import DcganGenerator
from sega_dist.networks.facegan import FaceDiscriminator, FaceGenerator
from sega_dist.snapshot import BROKEN, METADATA, broken, newest_snapshot, read_snapshot
from sega_dist.weights import read_state

# Under which the two networks stand in one file; the first that is there wins.
GENERATORS, DISCRIMINATORS = ("generator.", "G_ema.", "G."), ("discriminator.", "D.")
State = dict[str, Tensor]
N = TypeVar("N", bound=nn.Module)


@dataclass(frozen=True)
class Gan:
    """Networks ready to be searched, on their device, and where they come from."""

    generator: Explorable
    discriminator: Featured | None
    file: Path
    sha256: str  # of the file
    parameters: int  # of the generator
    nimg: int = 0  # images it was trained on, where that is known
    data: str = ""  # digest of the data set it was trained on; "" where that is not known
    remark: str = ""  # what its user should know


def load_gan(path: Path, world: World) -> Gan:
    """From a snapshot, a run's folder (its newest), or a file of foreign weights, which is read without executing it.

    UserError for anything else, in one line.
    """
    file = newest_snapshot(path) if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"--gan {file} does not exist; sega-dist train --preset facegan_64 makes one")
    values, config, state = _read(file)
    found = _dcgan(state, file) if "main.0.weight" in state else _stylegan(state, config, file, world)
    generator, discriminator, remark = found
    for network in (generator, discriminator):
        if network is not None:
            world.place(network.eval().requires_grad_(False))
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    count = sum(parameter.numel() for parameter in generator.parameters())
    of_training = values.get("nimg", 0), str(values.get("data", ""))
    return Gan(generator, discriminator, file, digest, count, *of_training, remark)


def _read(file: Path) -> tuple[dict[str, Any], Config | None, State]:
    """Header and configuration of our own snapshot, nothing of a foreign file; and the weights."""
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, "pt") as opened:
                is_ours = METADATA in (opened.metadata() or {})
            if is_ours:
                values, config, state = read_snapshot(file)
                if not config.is_face_gan:
                    what = f"a snapshot of generator.kind {config.generator.kind}, which makes SR from LR"
                    raise UserError(f"{file} is {what}; --gan wants a face GAN")
                return values, config, state
        except BROKEN as error:
            raise broken(file, error) from None
    state = read_state(file, "--gan FILE")
    if not all(bool(tensor.isfinite().all()) for tensor in state.values()):
        raise UserError(f"{file} holds values that are not finite numbers")
    return {}, None, state


def _dcgan(state: State, file: Path) -> tuple[DcganGenerator, None, str]:
    first, last = state["main.0.weight"], state.get("main.9.weight", torch.empty(0, 0))
    if first.ndim != 4 or last.ndim < 2:
        raise UserError(f"{file} does not hold the weights of DCGAN's generator for 64 pixels")
    return _filled(DcganGenerator(first.shape[0], last.shape[1]), state, file), None, ""


def _stylegan(
    state: State, config: Config | None, file: Path, world: World
) -> tuple[FaceGenerator, FaceDiscriminator | None, str]:
    """StyleGAN2's two networks, the second where the file has it, and the spread of the first one's w."""
    of_generator = _below(state, GENERATORS) or {k: v for k, v in state.items() if k.startswith(("mapping", "synth"))}
    of_discriminator = _below(state, DISCRIMINATORS)
    if not of_generator:
        raise UserError(
            f"{file} holds no generator that is known here: a face GAN's snapshot, NVlabs' StyleGAN2 (keys"
            " G_ema.synthesis.*) or a DCGAN (keys main.*)"
        )
    generator = _filled(build_generator(config) if config else _like(of_generator, file), of_generator, file)
    assert isinstance(generator, FaceGenerator)
    discriminator = None
    if of_discriminator:
        judge = build_discriminator(config) if config else _judge_like(of_discriminator, generator.side, file)
        assert isinstance(judge, FaceDiscriminator)
        discriminator = _filled(judge, of_discriminator, file)
    if "mean" in state and "std" in state:
        mean, std = state["mean"], state["std"]
        if mean.shape != (generator.w_size,) or std.shape != (generator.w_size,):
            raise UserError(f"{file}: its sampling statistics are not of {generator.w_size} numbers")
        remark = ""
    else:
        mean, std, _ = latents.spread(world.place(generator).mapping)
        remark = f"{file} holds no sampling statistics (mean, std): computed from 100,000 random z"
    generator.gaussian = (mean.to(world.device, world.dtype), std.to(world.device, world.dtype))
    return generator, discriminator, remark


def _like(state: State, file: Path) -> FaceGenerator:
    """An empty generator of the size of NVlabs' weights."""
    try:
        channels = {int(found[1]): tensor.shape[0] for name, tensor in state.items()
                    if (found := re.fullmatch(r"synthesis\.b(\d+)\.conv1\.weight", name))}  # fmt: skip
        side, layers = max(channels), sum(re.fullmatch(r"mapping\.fc\d+\.weight", name) is not None for name in state)
        w_size, z_size = state["synthesis.b4.conv1.affine.weight"].shape[1], state["mapping.fc0.weight"].shape[1]
        return FaceGenerator(side, channels[side] * side, max(channels.values()), z_size, w_size, layers)
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(f"{file} is not StyleGAN2's unconditional generator with skips ({error})") from None


def _judge_like(state: State, side: int, file: Path) -> FaceDiscriminator:
    try:
        channels = {int(found[1]): tensor.shape[0] for name, tensor in state.items()
                    if (found := re.fullmatch(r"b(\d+)\.conv0\.weight", name))}  # fmt: skip
        last = state["b4.out.weight"].shape[1]
        group = 4 if state["b4.conv.weight"].shape[1] == last + 1 else 0
        return FaceDiscriminator(side, channels[side] * side, max(last, *channels.values()), group)
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(f"{file} is not StyleGAN2's unconditional residual discriminator ({error})") from None


def _below(state: State, prefixes: tuple[str, ...]) -> State:
    """What stands below the first of the prefixes that there is."""
    for prefix in prefixes:
        found = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        if found:
            return found
    return {}


def _filled(network: N, state: State, file: Path) -> N:
    """The network with these weights, or one line on why they are not its."""
    wanted = network.state_dict()
    missing, strange = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    wrong = [name for name in wanted.keys() & state.keys() if wanted[name].shape != state[name].shape]
    faults = [f"lacks {name}" for name in missing] + [f"has {name} besides" for name in strange]
    faults += [f"has a {name} of another shape" for name in sorted(wrong)]
    if faults:
        raise UserError(f"{file} does not hold the weights of {type(network).__name__}: it {faults[0]}")
    network.load_state_dict(state)
    return network
