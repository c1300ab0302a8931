"""From a configuration to its networks; the values of their weights follow torch's global seed."""

from torch import nn

from sega_dist.config import Config
from sega_dist.networks.discriminator import NOISE, Discriminator, EncodingDiscriminator
from sega_dist.networks.encoder import TrainableEncoder
from sega_dist.networks.esrgan import EsrganDiscriminator, RrdbNet
from sega_dist.networks.facegan import FaceDiscriminator, FaceGenerator, draws
from sega_dist.networks.fsrnet import FsrNet
from sega_dist.networks.generator import Generator
from sega_dist.networks.srcnn import Srcnn
from sega_dist.networks.srgan import SrganDiscriminator, SrResNet
from sega_dist.networks.urdgn import Urdgn, UrdgnDiscriminator
from sega_dist.networks.vdsr import Vdsr
from sega_dist.networks.vgg19 import ALL, CONVOLUTIONS, Vgg19

VGG19_SEMANTICS = 512  # channels of the frozen encoder's embedding
GENERATORS = {
    "srcnn": Srcnn, "vdsr": Vdsr, "srresnet": SrResNet, "esrgan": RrdbNet, "urdgn": Urdgn, "fsrnet": FsrNet,
}  # fmt: skip
DISCRIMINATORS = {"srgan": SrganDiscriminator, "esrgan": EsrganDiscriminator, "urdgn": UrdgnDiscriminator}


def build_generator(config: Config) -> nn.Module:
    """LR (N,3,h,w) in [-1,1] -> SR (N,3,scale*h,scale*w); of a face GAN, z and noises -> faces."""
    face = config.facegan
    if config.is_face_gan:
        return FaceGenerator(config.hr_size, face.channel_base, face.channel_max, face.z_size, face.w_size,
                             face.mapping_layers)  # fmt: skip
    scale, generator, norm, is_checkpointing = (
        config.scale, config.generator, config.norm, config.train.activation_checkpointing,
    )  # fmt: skip
    if generator.kind == "sega":
        return Generator(scale, generator, norm, config.kernels, is_checkpointing)
    return GENERATORS[generator.kind](scale, generator, norm, is_checkpointing)


def build_discriminator(config: Config) -> nn.Module:
    """(image, semantics, noise) -> logits, with the encoder inside where that is trained with it.

    That of a face GAN reads images alone.
    """
    if config.is_face_gan:
        return FaceDiscriminator(config.hr_size, config.facegan.channel_base, config.facegan.channel_max)
    semantics = {"vgg19_pool8": VGG19_SEMANTICS, "trainable": 8 * config.encoder.width, "none": 0}[config.encoder.kind]
    bias = {"auto": config.loss.adv == "bce", "yes": True, "no": False}[config.discriminator.last_bias]
    is_checkpointing = config.train.activation_checkpointing
    if config.discriminator.kind != "sega":
        judge = DISCRIMINATORS[config.discriminator.kind]
        return judge(config.hr_size, bias, config.discriminator, config.norm, is_checkpointing)
    discriminator = Discriminator(config.hr_size, semantics, bias, config.discriminator, config.norm, is_checkpointing)
    if config.encoder.kind != "trainable":
        return discriminator
    lr_size = config.lr_size if config.discriminator.fake_semantics == "lr" else None
    encoder = TrainableEncoder(config.hr_size, lr_size, config.encoder.width, config.norm, is_checkpointing)
    return EncodingDiscriminator(encoder, discriminator)


def noise_size(config: Config) -> int:
    """Uniform numbers that one image needs for the dropout of its discriminator."""
    of_urdgn = UrdgnDiscriminator.noise_size(config.discriminator.width)
    return {"sega": NOISE, "urdgn": of_urdgn}.get(config.discriminator.kind, 0)


def normals_size(config: Config) -> int:
    """Normal numbers that one image of a face GAN is made from."""
    return draws(config.hr_size, config.facegan.z_size) if config.is_face_gan else 0


def build_vgg19(config: Config) -> Vgg19 | None:
    """As much of VGG19 as the configuration uses, without weights yet; None where it uses none."""
    content = config.loss.content
    if config.has_discriminator and config.encoder.kind == "vgg19_pool8":
        return Vgg19(ALL, content)
    return Vgg19(CONVOLUTIONS[content], content) if config.loss.w_content else None
