"""From a configuration to its networks; the values of their weights follow torch's global seed."""

from torch import nn

from sega_dist.config import Config
from sega_dist.networks.discriminator import Discriminator, EncodingDiscriminator
from sega_dist.networks.encoder import TrainableEncoder
from sega_dist.networks.generator import Generator
from sega_dist.networks.vgg19 import ALL, CONV3_3, Vgg19

VGG19_SEMANTICS = 512  # channels of the frozen encoder's embedding


def build_generator(config: Config) -> Generator:
    return Generator(config.scale, config.generator, config.norm, config.kernels, config.train.activation_checkpointing)


def build_discriminator(config: Config) -> nn.Module:
    """The discriminator, with the encoder inside where that is trained with it."""
    semantics = {"vgg19_pool8": VGG19_SEMANTICS, "trainable": 8 * config.encoder.width, "none": 0}[config.encoder.kind]
    bias = {"auto": config.loss.adv == "bce", "yes": True, "no": False}[config.discriminator.last_bias]
    is_checkpointing = config.train.activation_checkpointing
    discriminator = Discriminator(config.hr_size, semantics, bias, config.discriminator, config.norm, is_checkpointing)
    if config.encoder.kind != "trainable":
        return discriminator
    lr_size = config.lr_size if config.discriminator.fake_semantics == "lr" else None
    encoder = TrainableEncoder(config.hr_size, lr_size, config.encoder.width, config.norm, is_checkpointing)
    return EncodingDiscriminator(encoder, discriminator)


def build_vgg19(config: Config) -> Vgg19 | None:
    """As much of VGG19 as the configuration uses, without weights yet; None where it uses none."""
    if config.has_discriminator and config.encoder.kind == "vgg19_pool8":
        return Vgg19(ALL)
    return Vgg19(CONV3_3) if config.loss.w_content else None
