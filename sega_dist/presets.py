"""Named configurations: each a function that returns one."""

from collections.abc import Callable

from sega_dist.config import (
    Config,
    DataConfig,
    DiscriminatorConfig,
    EncoderConfig,
    GeneratorConfig,
    LossConfig,
    NormConfig,
    Scale,
    TrainConfig,
)
from sega_dist.errors import UserError, closest


def sega(scale: Scale) -> Config:
    """SEGA-FURN as in the paper: Adam 1e-4, batch 8, 30,000 steps, content loss and 1e-3 RaLS."""
    return Config(scale=scale)


def tiny(scale: Scale) -> Config:
    """A few minutes on two CPU cores and no VGG19: narrow networks, a trained encoder, a pixel loss first.

    It should end above bicubic's PSNR on faces it never saw; `docs/results/first-light.md` has figures.
    """
    return Config(
        scale=scale,
        data=DataConfig(patch=64, workers=1),
        generator=GeneratorConfig(channels=32, nested_blocks=1, zero_fusion=True),
        norm=NormConfig(momentum=0.01),  # over ten steps of four small patches statistics are noise: first-light.md
        encoder=EncoderConfig(kind="trainable", width=8),
        discriminator=DiscriminatorConfig(width=8),
        loss=LossConfig(w_content=0.0, w_pixel=1.0),
        train=TrainConfig(
            images=8_600,
            batch_size=4,
            learning_rate=1e-3,
            betas=(0.9, 0.99),
            ema_kimg=0.3,
            content_warmup_kimg=8.2,
            tick_kimg=0.4,
            grid_kimg=2.0,
            checkpoint_kimg=4.3,
        ),
    )


PRESETS: dict[str, Callable[[], Config]] = {
    "sega_x4": lambda: sega(4),
    "sega_x8": lambda: sega(8),
    "tiny_x4": lambda: tiny(4),
}


def preset(name: str) -> Config:
    """The configuration called `name`; raises UserError with the nearest name."""
    if name not in PRESETS:
        raise UserError(f"unknown preset {name!r}{closest(name, list(PRESETS))} (known: {', '.join(PRESETS)})")
    return PRESETS[name]()
