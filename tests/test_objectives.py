"""Which tuples the losses see, what carries gradient, and that one VGG19 pass serves both its uses."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from sega_dist import losses
from sega_dist.config import Config, DataConfig, DiscriminatorConfig, EncoderConfig, GeneratorConfig, LossConfig
from sega_dist.networks.build import build_discriminator, build_generator, build_vgg19
from sega_dist.networks.discriminator import NOISE
from sega_dist.objectives import Batch, Noise, Objective, Output

CONFIG = Config(
    data=DataConfig(size=64),
    generator=GeneratorConfig(channels=4, nested_blocks=1),
    discriminator=DiscriminatorConfig(width=4),
)


def setting(config: Config) -> tuple[Objective, nn.Module, Batch, Tensor]:
    vgg19 = build_vgg19(config)
    if vgg19:
        for parameter in vgg19.parameters():
            nn.init.normal_(parameter, std=0.05)
    batch = Batch(
        torch.rand(4, 3, 16, 16), torch.rand(4, 3, 64, 64), Noise(*torch.rand(4, 4, NOISE)), torch.empty(4, 0)
    )
    sr = build_generator(config)(batch.lr)
    return (
        Objective(config, vgg19, lambda real, fake: (real.mean(), fake.mean())),
        build_discriminator(config),
        batch,
        sr,
    )


def test_sega_losses_are_the_papers_formulas():
    objective, discriminator, batch, sr = setting(CONFIG)
    targets = objective.targets(batch, is_warmup=False)
    vgg19 = objective.vgg19
    e_hr, e_lr = vgg19(batch.hr, True)[0], vgg19(batch.lr, True)[0]
    torch.testing.assert_close(targets.real, e_hr)
    torch.testing.assert_close(targets.fake, e_lr)

    loss_d, _ = objective.d_loss(discriminator, batch, targets, sr.detach())
    real, fake = discriminator(batch.hr, e_hr, batch.noise.d_real), discriminator(sr.detach(), e_lr, batch.noise.d_fake)
    torch.testing.assert_close(loss_d, losses.rals_d(real, fake, real.mean(), fake.mean()))

    loss_g, parts = objective.g_loss(discriminator, batch, targets, Output(sr))
    real, fake = discriminator(batch.hr, e_hr, batch.noise.g_real), discriminator(sr, e_lr, batch.noise.g_fake)
    content = nn.functional.mse_loss(vgg19.content(sr), vgg19.content(batch.hr))
    torch.testing.assert_close(loss_g, content + 1e-3 * losses.rals_g(real, fake, real.mean(), fake.mean()))
    assert set(parts) == {"loss_g", "loss_content", "loss_adv"}
    assert not any(value.requires_grad for value in parts.values())


def test_warmup_has_no_adversarial_term():
    objective, _, batch, sr = setting(dataclasses.replace(CONFIG, loss=LossConfig(w_pixel=0.5)))
    targets = objective.targets(batch, is_warmup=True)
    assert targets.real is None
    loss, parts = objective.g_loss(None, batch, targets, Output(sr))
    torch.testing.assert_close(loss.detach(), parts["loss_content"] + 0.5 * parts["loss_pixel"])


@pytest.mark.parametrize("kind", ["vgg19_pool8", "trainable", "none"])
@pytest.mark.parametrize("fake_semantics", ["lr", "sr"])
@pytest.mark.parametrize("adv", ["rals", "bce"])
def test_every_reading_trains_both_players(kind: str, fake_semantics: str, adv: str):
    config = dataclasses.replace(
        CONFIG,
        encoder=EncoderConfig(kind=kind, width=2),
        discriminator=DiscriminatorConfig(width=4, fake_semantics=fake_semantics),
        loss=LossConfig(adv=adv, w_content=0.0),
    )
    objective, discriminator, batch, sr = setting(config)
    targets = objective.targets(batch, is_warmup=False)
    loss, _ = objective.d_loss(discriminator, batch, targets, sr.detach())
    of_d = torch.autograd.grad(loss, list(discriminator.parameters()), allow_unused=False)
    assert all(torch.isfinite(g).all() for g in of_d)
    loss, _ = objective.g_loss(discriminator, batch, targets, Output(sr))
    (of_sr,) = torch.autograd.grad(loss, sr)
    assert of_sr.abs().sum() > 0


def test_semantics_of_sr_carry_gradient_to_the_generator():
    """With fake_semantics=sr the embedding depends on SR: zeroing the image branch must leave a gradient."""
    config = dataclasses.replace(CONFIG, discriminator=DiscriminatorConfig(width=4, fake_semantics="sr", dropout=0.0))
    objective, discriminator, batch, sr = setting(config)
    nn.init.zeros_(discriminator.dense[2].weight)
    targets = objective.targets(batch, is_warmup=False)
    fake = discriminator(sr, objective._fake(targets, sr), batch.noise.g_fake)
    assert torch.autograd.grad(fake.sum(), sr)[0].abs().sum() > 0
    fake = discriminator(sr, targets.real, batch.noise.g_fake)
    assert torch.autograd.grad(fake.sum(), sr)[0].abs().sum() == 0


def test_diagnosis_tells_whether_semantics_alone_decide():
    """A judge that reads only the semantics keeps its accuracy when images are exchanged; one of images loses it."""
    objective, _, batch, sr = setting(CONFIG)
    targets = objective.targets(batch, is_warmup=False)

    def by_semantics(image: Tensor, embedding: Tensor, noise: Tensor) -> Tensor:
        is_real = (embedding == targets.real).flatten(1).all(1, keepdim=True)
        return is_real.float() * 2 - 1

    def by_image(image: Tensor, embedding: Tensor, noise: Tensor) -> Tensor:
        return (image == batch.hr).flatten(1).all(1, keepdim=True).float() * 2 - 1

    found = objective.diagnose(by_semantics, batch, targets, sr)
    assert (found["d_accuracy"], found["d_accuracy_exchanged"]) == (1, 1)
    found = objective.diagnose(by_image, batch, targets, sr)
    assert (found["d_accuracy"], found["d_accuracy_exchanged"]) == (1, 0)
