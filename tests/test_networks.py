"""The oracles of the specification: parameter counts, shapes, work, and what blocks of known weights compute."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from sega_dist.config import DiscriminatorConfig, GeneratorConfig, NormConfig
from sega_dist.networks.build import build_discriminator, build_generator, build_vgg19
from sega_dist.networks.discriminator import NOISE, Discriminator, EncodingDiscriminator, dropout
from sega_dist.networks.encoder import TrainableEncoder
from sega_dist.networks.generator import (
    DenseNestedBlock,
    Generator,
    InternalDenseBlock,
    OutputConvolution,
    ResidualInternalDenseBlock,
)
from sega_dist.networks.vgg19 import CONV3_3, Vgg19
from sega_dist.presets import preset

EVERY_BIAS = NormConfig(conv_bias=True)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def fill(module: nn.Module) -> None:
    """Weights that are numbers, for a VGG19 that must not be used without."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.05)


@pytest.mark.parametrize(("scale", "expected"), [(4, 6_121_347), (8, 6_269_059)])
def test_generator_parameters(scale: int, expected: int):
    assert count(Generator(scale, GeneratorConfig(), EVERY_BIAS)) == expected
    assert count(build_generator(preset(f"sega_x{scale}"))) == expected - 64


def test_block_parameters():
    assert count(InternalDenseBlock(64)) == 110_720
    assert count(ResidualInternalDenseBlock(64, 0.2, 0.2)) == 479_808
    assert count(DenseNestedBlock(GeneratorConfig())) == 1_439_424
    generator = Generator(4, GeneratorConfig(), EVERY_BIAS)
    parts = {"shallow": 15_616, "trunk": 5_757_696, "fusion": 37_056, "upsampling": 295_424, "output": 15_555}
    assert {name: count(getattr(generator, name)) for name in parts} == parts


def test_discriminator_parameters():
    joint = Discriminator(256, 512, True, DiscriminatorConfig(), EVERY_BIAS)
    parts = {"image": 7_049_920, "dense": 526_337, "semantics": 876_608}
    assert {name: count(getattr(joint, name)) for name in parts} == parts
    assert count(joint.head) + count(joint.logit) == 68_609
    assert count(joint) == 8_521_474
    assert count(Discriminator(256, 0, True, DiscriminatorConfig(), EVERY_BIAS)) == 7_636_674
    assert count(build_discriminator(preset("sega_x4"))) == 8_518_785
    assert sum(isinstance(m, nn.BatchNorm2d) for m in joint.modules()) == 13


def test_vgg19_parameters():
    assert count(Vgg19()) == 20_024_384
    assert count(Vgg19(CONV3_3)) == 1_735_488
    assert list(Vgg19().state_dict())[-1] == "features.34.bias"
    assert not any(p.requires_grad for p in Vgg19().parameters())


@pytest.mark.parametrize(("scale", "lr"), [(4, (9, 13)), (8, (5, 4)), (16, (3, 2))])
def test_generator_shapes(scale: int, lr: tuple[int, int]):
    generator = Generator(scale, GeneratorConfig(channels=8, nested_blocks=1), NormConfig())
    sr = generator(torch.rand(2, 3, *lr) * 2 - 1)
    assert sr.shape == (2, 3, scale * lr[0], scale * lr[1])
    assert sr.abs().max() <= 1


def with_identity_tails(module: nn.Module) -> None:
    """All weights zero, except that each RIDB's last convolution hands its input through."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    for block in module.modules():
        if isinstance(block, ResidualInternalDenseBlock):
            nn.init.dirac_(block.conv.weight)


def test_blocks_of_known_weights():
    config = GeneratorConfig(channels=8)
    x = torch.randn(2, 8, 5, 7, dtype=torch.float64)
    ridb = ResidualInternalDenseBlock(8, config.slope, config.beta).double()
    trunk = nn.Sequential(*(DenseNestedBlock(config) for _ in range(4))).double()
    for parameter in [*ridb.parameters(), *trunk.parameters()]:
        nn.init.zeros_(parameter)
    torch.testing.assert_close(ridb(x), x)
    torch.testing.assert_close(trunk[0](x), 1.2 * x)
    torch.testing.assert_close(trunk(x), 2.0736 * x)
    with_identity_tails(ridb)
    with_identity_tails(trunk)
    torch.testing.assert_close(ridb(x), 2.0 * x)
    torch.testing.assert_close(trunk[0](x), 2.6 * x)
    torch.testing.assert_close(trunk(x), 2.6**4 * x)


def test_residual_block_is_its_equations():
    block = ResidualInternalDenseBlock(4, 0.2, 0.3).double()
    x = r = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    lrelu = nn.LeakyReLU(0.2)
    for inner in block.blocks:
        f1 = lrelu(inner.conv1(x))
        f2 = lrelu(inner.conv2(torch.cat([x, f1], 1)))
        x = x + f1 + f2 + r
    torch.testing.assert_close(block(r), r + 0.3 * block.conv(x), rtol=0, atol=0)


def test_upsampling_starts_as_nearest():
    generator = Generator(4, GeneratorConfig(channels=8, nested_blocks=1), NormConfig())
    out = generator.upsampling[0](torch.randn(1, 8, 6, 6))
    assert torch.equal(out[:, :, ::2, ::2], out[:, :, 1::2, 1::2])
    assert out.std() > 0


@pytest.mark.parametrize("shape", [(2, 4, 13, 10), (1, 3, 5, 3)])
def test_the_output_convolution_is_a_convolution(shape: tuple[int, ...]):
    """By rows and in one piece: values, and gradients of image, filter and bias; also where the filter is larger."""
    ours = OutputConvolution(shape[1], 3, 9, padding=4).double()
    plain = nn.Conv2d(shape[1], 3, 9, padding=4).double()
    nn.init.normal_(ours.bias)
    plain.load_state_dict(ours.state_dict())
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    found, expected = ours(x), plain(x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    gradient = torch.randn_like(expected)
    pairs = zip(torch.autograd.grad(found, [x, ours.weight, ours.bias], gradient),
                torch.autograd.grad(expected, [x, plain.weight, plain.bias], gradient), strict=True)  # fmt: skip
    for mine, theirs in pairs:
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("side", [256, 64, 32, 16])
def test_embedding_is_8x8_from_every_side(side: int):
    vgg19 = Vgg19()
    fill(vgg19)
    embedding, conv3_3 = vgg19(torch.rand(1, 3, side, side) * 2 - 1, True)
    assert embedding.shape == (1, 512, 8, 8)
    assert torch.isfinite(embedding).all()
    if side == 256:
        assert conv3_3.shape == (1, 256, 64, 64)


def test_vgg19_is_torchvisions_sequence():
    """The same weights in the layer list that torchvision writes: features[:15] and, for 256, features[:37].

    On ImageNet's normalisation, which the network folds into its first filter: borders must not notice.
    """
    vgg19 = Vgg19().double()
    fill(vgg19)
    layers: list[nn.Module] = []
    for block in ((64, 64), (128, 128), (256,) * 4, (512,) * 4, (512,) * 4):
        for width in block:
            layers += [nn.Conv2d(1, width, 3, padding=1), nn.ReLU()]
            layers[-2] = vgg19.features[str(len(layers) - 2)]
        layers.append(nn.MaxPool2d(2))
    image = torch.rand(1, 3, 256, 256, dtype=torch.float64) * 2 - 1
    embedding, conv3_3 = vgg19(image, True)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    x = ((image + 1) / 2 - mean) / std
    for expected, found in ((nn.Sequential(*layers[:15])(x), conv3_3), (nn.Sequential(*layers[:37])(x), embedding)):
        assert float((expected - found).norm() / expected.norm()) < 1e-6  # the constants are rounded to fp32
    torch.testing.assert_close(vgg19.content(image), conv3_3)
    assert len(layers) == 37


def test_vgg19_without_weights_is_not_silently_random():
    assert torch.isnan(Vgg19(CONV3_3).content(torch.zeros(1, 3, 16, 16))).all()


def test_discriminator_branches_and_batch_norm():
    discriminator = Discriminator(256, 512, False, DiscriminatorConfig(width=8), NormConfig())
    image, embedding, noise = torch.rand(2, 3, 256, 256), torch.rand(2, 512, 8, 8), torch.rand(2, NOISE)
    assert discriminator.semantics(embedding).flatten(1).shape == (2, 4)
    assert discriminator.dense(discriminator.image(image)).flatten(1).shape == (2, 64)
    assert discriminator(image, embedding, noise).shape == (2, 1)
    with pytest.raises(ValueError, match="more than 1 value"):
        discriminator(image[:1], embedding[:1], noise[:1])
    wide = Discriminator(256, 512, False, DiscriminatorConfig(), NormConfig())
    assert wide.semantics(embedding).flatten(1).shape == (2, 32)


def test_dropout_is_decided_by_the_noise():
    x, noise = torch.ones(1000, NOISE), torch.rand(1000, NOISE)
    dropped = dropout(x, noise, 0.5)
    assert torch.equal(dropped, (noise > 0.5) * 2.0)
    assert dropout(x, noise, 0.0) is x
    discriminator = Discriminator(64, 0, False, DiscriminatorConfig(width=4), NormConfig())
    image = torch.rand(2, 3, 64, 64)
    assert torch.equal(discriminator(image, None, noise[:2]), discriminator(image, None, noise[:2]))
    assert not torch.equal(discriminator(image, None, noise[:2]), discriminator(image, None, noise[2:4]))


@pytest.mark.parametrize(("hr", "lr"), [(256, 64), (256, 32), (256, 16), (64, 16), (64, 8)])
def test_trainable_encoder_embeds_both_sides_alike(hr: int, lr: int):
    encoder = TrainableEncoder(hr, lr, 2, NormConfig())
    assert encoder(torch.rand(2, 3, hr, hr)).shape == encoder(torch.rand(2, 3, lr, lr)).shape == (2, 16, 8, 8)


def test_trained_encoder_belongs_to_the_discriminator():
    module = build_discriminator(preset("tiny_x4"))
    assert isinstance(module, EncodingDiscriminator)
    lr, hr, noise = torch.rand(2, 3, 16, 16), torch.rand(2, 3, 64, 64), torch.rand(2, NOISE)
    (module(hr, hr, noise) + module(hr, lr, noise)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.encoder.parameters())


def test_last_bias_is_absent_with_rals_only():
    config = preset("sega_x4")
    assert build_discriminator(config).logit.bias is None
    assert build_discriminator(replace(config, loss=replace(config.loss, adv="bce"))).logit.bias is not None


def test_presets_use_as_much_of_vgg19_as_they_need():
    assert count(build_vgg19(preset("sega_x4"))) == 20_024_384
    assert build_vgg19(preset("tiny_x4")) is None
