"""Named configurations: each a function of the scale that returns one."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

from sega_dist.config import (
    Config,
    DataConfig,
    DiscriminatorConfig,
    EncoderConfig,
    FaceGanConfig,
    GeneratorConfig,
    LossConfig,
    NormConfig,
    Scale,
    TrainConfig,
)
from sega_dist.errors import UserError, closest

IMAGES = TrainConfig().images  # the paper's 30,000 steps of 8: every method gets as many


def sega(scale: Scale) -> Config:
    """SEGA-FURN as in the paper: Adam 1e-4, batch 8, 30,000 steps, content loss and 1e-3 RaLS; ablation D."""
    return Config(scale=scale)


def ablation(scale: Scale, adv: Literal["rals", "bce"], has_semantics: bool) -> Config:
    """The paper's A to C (table 2): SEGA-FURN with another adversarial loss, or with a D that sees the image alone."""
    encoder = EncoderConfig(kind="vgg19_pool8" if has_semantics else "none")
    return Config(scale=scale, encoder=encoder, loss=LossConfig(adv=adv))


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


def regression(scale: Scale, generator: GeneratorConfig, loss: LossConfig, **train: Any) -> Config:
    """A generator that is trained on pixels alone."""
    loss = dataclasses.replace(loss, w_content=0.0, w_adv=0.0)
    return Config(scale=scale, generator=generator, encoder=EncoderConfig(kind="none"), loss=loss,
                  train=TrainConfig(**train))  # fmt: skip


def srcnn(scale: Scale) -> Config:
    """Adam 1e-4 throughout: that the last layer learns ten times more slowly is not built."""
    return regression(scale, GeneratorConfig(kind="srcnn"), LossConfig(w_pixel=1.0, pixel="mse"))


def vdsr(scale: Scale) -> Config:
    """SGD at 0.1, a tenth of it after each fifth of the run, gradients clipped to 0.4 as in its paper's section 3.2."""
    generator = GeneratorConfig(kind="vdsr", blocks=20)
    loss = LossConfig(w_pixel=0.25, pixel="sse")  # a quarter: a sum of squares in [0,1], which the clip refers to
    return regression(scale, generator, loss, optimizer="sgd", learning_rate=0.1, weight_decay=1e-4, clip=0.4,
                      milestones=(0.2, 0.4, 0.6, 0.8), decay=0.1)  # fmt: skip


def srresnet(scale: Scale) -> Config:
    return regression(scale, GeneratorConfig(kind="srresnet"), LossConfig(w_pixel=1.0, pixel="mse"))


def srgan(scale: Scale) -> Config:
    """Half of the images as SRResNet, half against D; a quarter for squares in [0,1]."""
    return _adversarial(
        scale, GeneratorConfig(kind="srresnet"), DiscriminatorConfig(kind="srgan"),
        LossConfig(adv="bce", content="relu5_4", w_pixel=0.25, pixel="mse", w_adv=1e-3, warmup="pixel"),
        content_warmup_kimg=IMAGES / 2000, milestones=(0.75,),
    )  # fmt: skip


def esrgan(scale: Scale) -> Config:
    """Half of the images on L1, half against D with its learning rate's milestones; a half for differences in [0,1]."""
    return _adversarial(
        scale, GeneratorConfig(kind="esrgan", blocks=23), DiscriminatorConfig(kind="esrgan"),
        LossConfig(adv="ragan", content="conv5_4", content_norm="l1", w_pixel=0.5e-2, w_adv=5e-3, warmup="pixel"),
        content_warmup_kimg=IMAGES / 2000, learning_rate=2e-4, betas=(0.9, 0.99),
        milestones=(0.5, 0.5625, 0.625, 0.75, 0.875),
    )  # fmt: skip


def urdgn(scale: Scale) -> Config:
    """Its rule that lets the weaker player alone is not built."""
    return _adversarial(
        scale, GeneratorConfig(kind="urdgn", channels=16), DiscriminatorConfig(kind="urdgn"),
        LossConfig(adv="bce", w_content=0.0, w_pixel=1.0, pixel="mse", w_adv=1e-2),
        optimizer="rmsprop", learning_rate=1e-3, betas=(0.0, 0.9),
    )  # fmt: skip


def fsrnet(scale: Scale) -> Config:
    loss = LossConfig(w_pixel=1.0, pixel="mse")
    return regression(scale, GeneratorConfig(kind="fsrnet"), loss, optimizer="rmsprop", learning_rate=2.5e-4,
                      betas=(0.0, 0.99))  # fmt: skip


def facegan(side: int, channel_base: int, size: int, layers: int, images: int) -> Config:
    """A compact StyleGAN2 for `sega-dist explore`: R1 as its authors scale it, 2e-4 times pixels over the batch.

    Its discriminator does not look at how images of a batch differ, so the loss is the same on any number of ranks.
    """
    batch_size = 32
    return Config(
        data=DataConfig(size=side),
        generator=GeneratorConfig(kind="facegan"),
        encoder=EncoderConfig(kind="none"),
        discriminator=DiscriminatorConfig(kind="facegan"),
        facegan=FaceGanConfig(size, size, layers, channel_base, size, r1_gamma=2e-4 * side**2 / batch_size),
        loss=LossConfig(adv="bce", w_content=0.0, w_adv=1.0),
        train=TrainConfig(
            images=images,
            batch_size=batch_size,
            learning_rate=2e-3,
            betas=(0.0, 0.99),
            ema_kimg=10.0,
            tick_kimg=4.0,
            grid_kimg=50.0,
            checkpoint_kimg=100.0,
        ),
    )


def _adversarial(
    scale: Scale, generator: GeneratorConfig, discriminator: DiscriminatorConfig, loss: LossConfig, **train: Any
) -> Config:
    return Config(scale=scale, generator=generator, encoder=EncoderConfig(kind="none"), discriminator=discriminator,
                  loss=loss, train=TrainConfig(**train))  # fmt: skip


METHODS: dict[str, Callable[[Scale], Config]] = {
    "sega": sega,
    "ridb": lambda scale: ablation(scale, "bce", has_semantics=False),
    "ridb_rals": lambda scale: ablation(scale, "rals", has_semantics=False),
    "ridb_se": lambda scale: ablation(scale, "bce", has_semantics=True),
    "srcnn": srcnn, "vdsr": vdsr, "srresnet": srresnet, "srgan": srgan, "esrgan": esrgan, "urdgn": urdgn,
    "fsrnet": fsrnet,
}  # fmt: skip
SCALES: tuple[Scale, ...] = (4, 8)
PRESETS: dict[str, Callable[[], Config]] = {
    f"{name}_x{scale}": lambda method=method, scale=scale: method(scale)
    for name, method in METHODS.items()
    for scale in SCALES
} | {
    "tiny_x4": lambda: tiny(4),
    "facegan_64": lambda: facegan(64, 4096, 128, 4, 1_000_000),
    "facegan_128": lambda: facegan(128, 8192, 256, 4, 5_000_000),
    "facegan_256": lambda: facegan(256, 16384, 256, 8, 10_000_000),
}


def preset(name: str) -> Config:
    """The configuration called `name`; raises UserError with the nearest name."""
    if name not in PRESETS:
        raise UserError(f"unknown preset {name!r}{closest(name, list(PRESETS))} (known: {', '.join(PRESETS)})")
    return PRESETS[name]()
