"""What a configuration builds: `sega-dist describe --preset sega_x4` prints parameters, shapes and GFLOP."""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sega_dist import config as configuration
from sega_dist.arguments import parse
from sega_dist.config import Config
from sega_dist.errors import run
from sega_dist.networks.build import build_discriminator, build_generator, noise_size
from sega_dist.networks.discriminator import EncodingDiscriminator
from sega_dist.networks.facegan import noise_shapes
from sega_dist.networks.vgg19 import CONVOLUTIONS, Vgg19
from sega_dist.presets import preset


@dataclass(frozen=True)
class DescribeCommand:
    """Print every network's parameters, shapes and work for one image, forward."""

    preset: str = "sega_x4"  # a named configuration
    config: Path | None = None  # a JSON file of configuration keys, laid over the preset
    json: bool = False  # for programs


def main(argv: list[str] | None = None) -> None:
    command = parse(DescribeCommand, argv or [], "sega-dist describe")
    config = preset(command.preset)
    if command.config:
        values = configuration.merge(configuration.to_dict(config), configuration.load(command.config))
        config = configuration.validate(configuration.from_dict(values, str(command.config)))
    networks = describe(config)
    if command.json:
        print(json.dumps(networks, indent=1))
        return
    shown = Table(title=f"{command.preset}: one image, forward (1 multiply-add = 2 FLOP)")
    for heading in ("network", "parameters", "shapes", "GFLOP"):
        shown.add_column(heading, justify="right" if heading in ("parameters", "GFLOP") else "left")
    for name, values in networks.items():
        shown.add_row(name, f"{values['parameters']:,}", "\n".join(values["shapes"]), "\n".join(
            f"{values[key]:.3f}" for key in ("gflop", "gflop_lr") if key in values))  # fmt: skip
    Console().print(shown)


def describe(config: Config) -> dict[str, dict[str, Any]]:
    """Parameters, shapes and GFLOP of each network the configuration uses.

    The generator is shown on a whole image, the others on what a step trains on (`data.patch`). The encoder's `gflop`
    is that of the HR image, `gflop_lr` that of the LR image.
    """
    with torch.device("meta"):
        return _describe(dataclasses.replace(config, kernels="reference"))


def _describe(config: Config) -> dict[str, dict[str, Any]]:
    if config.is_face_gan:
        return _describe_face_gan(config)
    hr, lr = torch.empty(2, 3, config.hr_size, config.hr_size), torch.empty(2, 3, config.lr_size, config.lr_size)
    noise = torch.empty(2, noise_size(config))
    generator, photograph = build_generator(config).eval(), config.data.size // config.scale
    networks = {"generator": _row(generator, "LR", torch.empty(1, 3, photograph, photograph), generator)}
    if config.has_discriminator:
        discriminator, embedding = build_discriminator(config), None
        if config.encoder.kind != "none":
            encoder, embed = _encoder(discriminator)
            embedding = embed(hr)
            of_hr = _row(encoder, "HR", hr, embed)
            if config.discriminator.fake_semantics == "lr":
                of_lr = _row(encoder, "LR", lr, embed)
                of_hr |= {"shapes": of_hr["shapes"] + of_lr["shapes"], "gflop_lr": of_lr["gflop"]}
            networks["encoder"] = of_hr
        if isinstance(discriminator, EncodingDiscriminator):
            discriminator = discriminator.discriminator
        networks["discriminator"] = _row(discriminator, "image", hr, lambda hr: discriminator(hr, embedding, noise))
    if config.loss.w_content:
        features = Vgg19(CONVOLUTIONS[config.loss.content], config.loss.content)
        networks["features"] = _row(features, "image", hr, features.content)
    return networks


def _describe_face_gan(config: Config) -> dict[str, dict[str, Any]]:
    face, shapes = config.facegan, noise_shapes(config.hr_size)
    generator, discriminator = build_generator(config), build_discriminator(config)
    z, noises = torch.empty(1, face.z_size), [torch.empty(1, 1, *shape) for shape in shapes]
    hr = torch.empty(1, 3, config.hr_size, config.hr_size)
    return {
        "generator": _row(generator, "z", z, lambda z: generator(z, noises)),
        "discriminator": _row(discriminator, "image", hr, discriminator),
    }


def _encoder(discriminator: nn.Module) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    if isinstance(discriminator, EncodingDiscriminator):
        return discriminator.encoder, discriminator.encoder
    vgg19 = Vgg19()
    return vgg19, lambda image: vgg19(image, True)[0]


def _row(module: nn.Module, name: str, image: Tensor, forward: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    with FlopCounterMode(display=False) as counter:
        out = forward(image)
    shapes = " -> ".join("x".join(map(str, tensor.shape[1:])) for tensor in (image, out))
    gflop = counter.get_total_flops() / len(image) / 1e9
    return {"parameters": sum(p.numel() for p in module.parameters()), "shapes": [f"{name} {shapes}"], "gflop": gflop}


if __name__ == "__main__":
    run(main)
