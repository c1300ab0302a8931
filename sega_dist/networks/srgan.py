"""SRResNet, which is SRGAN's generator, and SRGAN's discriminator (arXiv 1609.04802)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sega_dist.config import DiscriminatorConfig, GeneratorConfig, NormConfig
from sega_dist.networks.checkpointing import in_stages
from sega_dist.networks.discriminator import full_precision, stages
from sega_dist.networks.enlarging import batch_norm, from_01, he_, to_01

STAGES = ((1, 1), (1, 2), (2, 1), (2, 2), (4, 1), (4, 2), (8, 1), (8, 2))  # width multiple, stride
POOLED = 6  # side of the map that is flattened: that of the paper's crops of 96 pixels


class ResidualBlock(nn.Module):
    """x + two convolutions with batch norm, PReLU between."""

    def __init__(self, width: int, norm: NormConfig):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            batch_norm(width, norm),
            nn.PReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            batch_norm(width, norm),
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.layers(x)
        return y


class SrResNet(nn.Module):
    """LR (N,3,h,w) in [-1,1] -> SR (N,3,scale*h,scale*w); figure 4, upper half. A PReLU has one slope."""

    def __init__(self, scale: int, config: GeneratorConfig, norm: NormConfig, is_checkpointing: bool = False):
        super().__init__()
        self.is_checkpointing, width = is_checkpointing, config.channels
        self.first = nn.Sequential(nn.Conv2d(3, width, 9, padding=4), nn.PReLU())
        self.trunk = nn.Sequential(*(ResidualBlock(width, norm) for _ in range(config.blocks)))
        self.fusion = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), batch_norm(width, norm))
        doublings = scale.bit_length() - 1
        self.upsampling = nn.Sequential(
            *(nn.Sequential(nn.Conv2d(width, 4 * width, 3, padding=1), nn.PixelShuffle(2), nn.PReLU())
              for _ in range(doublings))
        )  # fmt: skip
        self.last = nn.Conv2d(width, 3, 9, padding=4)
        he_(self)

    def forward(self, lr: Tensor) -> Tensor:
        first = self.first(to_01(lr))
        deep = in_stages(self.trunk, first, self.is_checkpointing)
        return from_01(self.last(self.upsampling(first + self.fusion(deep))))


class SrganDiscriminator(nn.Module):
    """Image (N,3,S,S) in [-1,1] -> logits (N,1); figure 4, lower half. Reads neither semantics nor noise.

    Flattening 256 pixels' map would take 134 million weights: it is pooled to the 6x6 of the paper's crops instead.
    """

    def __init__(self, _: int, has_last_bias: bool, config: DiscriminatorConfig, norm: NormConfig,
                 is_checkpointing: bool = False):  # fmt: skip
        super().__init__()
        self.is_checkpointing, width = is_checkpointing, config.width
        without_bias = NormConfig(norm.momentum, norm.eps, conv_bias=False)
        self.image = stages(3, [(multiple * width, s) for multiple, s in STAGES], config.slope, without_bias)
        self.dense = nn.Linear(8 * width * POOLED**2, 16 * width)
        self.logit = nn.Linear(16 * width, 1, bias=has_last_bias)
        self.slope = config.slope
        he_(self)

    def forward(self, image: Tensor, _: Tensor | None, noise: Tensor) -> Tensor:
        x = in_stages(self.image, image, self.is_checkpointing)
        x = torch.flatten(F.adaptive_avg_pool2d(x, POOLED), 1)
        with full_precision(x.device):
            return self.logit(F.leaky_relu(self.dense(x.to(noise.dtype)), self.slope))
