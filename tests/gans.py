"""Face GANs of a few thousand weights that no one trained: enough to be searched."""

import csv
import dataclasses
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sega_dist import explore
from sega_dist.config import Config
from sega_dist.latents import spread
from sega_dist.networks.build import build_discriminator, build_generator
from sega_dist.networks.facegan import FaceGenerator
from sega_dist.presets import preset
from sega_dist.snapshot import save_snapshot

Weights = dict[str, Tensor]


def gan_config(side: int = 32, channels: int = 8) -> Config:
    config = preset("facegan_64")
    widths = {"channel_base": max(4 * channels, side), "channel_max": channels}
    small = dataclasses.replace(config.facegan, z_size=8, w_size=8, mapping_layers=2, **widths)
    return dataclasses.replace(config, facegan=small, data=dataclasses.replace(config.data, size=side))


def gan_weights(config: Config, seed: int = 0) -> Weights:
    """As a snapshot holds them: both networks' and the spread of w. Their faces have noise and colour."""
    torch.manual_seed(seed)
    g, d = build_generator(config), build_discriminator(config)
    assert isinstance(g, FaceGenerator)
    for name, parameter in g.named_parameters():
        if name.endswith(("noise_strength", "bias")) and "affine" not in name:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    mean, std, g.mapping.w_avg = spread(g.mapping, 10_000)
    weights = {f"generator.{name}": tensor for name, tensor in g.state_dict().items()}
    weights |= {f"discriminator.{name}": tensor for name, tensor in d.state_dict().items()}
    return weights | {"mean": mean, "std": std}


def save_gan(run: Path, side: int = 32, channels: int = 8, seed: int = 0, nimg: int = 8, data: str = "") -> Path:
    """Its run's folder."""
    run.mkdir(parents=True)
    config = gan_config(side, channels)
    save_snapshot(run, nimg, config, gan_weights(config, seed), data)
    return run


def small_faces(folder: Path, count: int = 5, side: int = 4) -> Path:
    """A folder of native small faces: smooth random colours."""
    (folder / "b").mkdir(parents=True)
    generator = np.random.default_rng(1)
    for number in range(count):
        pixels = generator.integers(60, 200, (2, 2, 3), dtype=np.uint8)
        image = Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC)
        image.save(folder / ("b" if number % 2 else "") / f"{number}.png")
    return folder


def explored(*words: object) -> None:
    """Run explore in this process; RLSE and mGANprior take few steps unless told otherwise."""
    given = [str(word) for word in words]
    for key, value in (("--rlse.steps", "4"), ("--mgan.steps", "4"), ("--mgan.codes", "3"), ("--device", "cpu")):
        given += [] if key in given else [key, value]
    explore.main(given)


def result(out: Path) -> dict[str, bytes]:
    """The files of the result that are the same bits each time."""
    files = [*out.rglob("*.png"), out / "per_image.csv"]
    return {str(file.relative_to(out)): file.read_bytes() for file in sorted(files)}


def rows(out: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((out / "per_image.csv").open(newline="")))
