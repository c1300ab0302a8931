"""ESRGAN's generator of residual-in-residual dense blocks, and its discriminator (arXiv 1809.00219)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sega_dist.config import DiscriminatorConfig, GeneratorConfig, NormConfig
from sega_dist.networks.checkpointing import in_stages
from sega_dist.networks.discriminator import full_precision
from sega_dist.networks.enlarging import from_01, he_, to_01

SLOPE = 0.2  # of LeakyReLU
RESIDUAL = 0.2  # times what a block adds, at both levels
DENSE = 100  # units of the discriminator's hidden layer
LEVELS = (1, 2, 4, 8, 8, 8)  # width multiples of its pairs of convolutions


class ResidualDenseBlock(nn.Module):
    """RDB: five convolutions, each reading all before it."""

    def __init__(self, width: int):
        super().__init__()
        growth = width // 2
        outs = (growth, growth, growth, growth, width)
        self.convs = nn.ModuleList(nn.Conv2d(width + i * growth, o, 3, padding=1) for i, o in enumerate(outs))

    def forward(self, x: Tensor) -> Tensor:
        maps = [x]
        for conv in self.convs[:-1]:
            maps.append(F.leaky_relu(conv(torch.cat(maps, 1)), SLOPE))
        y: Tensor = x + RESIDUAL * self.convs[-1](torch.cat(maps, 1))
        return y


class ResidualInResidualDenseBlock(nn.Module):
    """RRDB: x + 0.2 * three RDBs in a row, as ESRGAN's authors compute it (figure 4)."""

    def __init__(self, width: int):
        super().__init__()
        self.blocks = nn.Sequential(*(ResidualDenseBlock(width) for _ in range(3)))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + RESIDUAL * self.blocks(x)
        return y


class RrdbNet(nn.Module):
    """LR (N,3,h,w) in [-1,1] -> SR (N,3,scale*h,scale*w); the published networks are those with 23 `blocks`, x4."""

    def __init__(self, scale: int, config: GeneratorConfig, _: NormConfig, is_checkpointing: bool = False):
        super().__init__()
        self.is_checkpointing, width = is_checkpointing, config.channels
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.trunk = nn.Sequential(*(ResidualInResidualDenseBlock(width) for _ in range(config.blocks)))
        self.fusion = nn.Conv2d(width, width, 3, padding=1)
        doublings = scale.bit_length() - 1
        self.upsampling = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(doublings))
        self.hr = nn.Conv2d(width, width, 3, padding=1)
        self.last = nn.Conv2d(width, 3, 3, padding=1)
        he_(self)
        he_(self.trunk, 0.1)

    def forward(self, lr: Tensor) -> Tensor:
        first = self.first(to_01(lr))
        x = first + self.fusion(in_stages(self.trunk, first, self.is_checkpointing))
        for conv in self.upsampling:
            x = F.leaky_relu(conv(F.interpolate(x, scale_factor=2.0, mode="nearest")), SLOPE)
        return from_01(self.last(F.leaky_relu(self.hr(x), SLOPE)))


class EsrganDiscriminator(nn.Module):
    """Image (N,3,S,S) in [-1,1], S a multiple of 64 -> logits (N,1); reads neither semantics nor noise.

    Batch norm keeps no running statistics: the discriminator is never used outside training.
    """

    def __init__(self, size: int, has_last_bias: bool, config: DiscriminatorConfig, norm: NormConfig,
                 is_checkpointing: bool = False):  # fmt: skip
        super().__init__()
        self.is_checkpointing = is_checkpointing
        layers: list[nn.Module] = []
        channels = 3
        for multiple in LEVELS:
            width = multiple * config.width
            for side, stride in ((3, 1), (4, 2)):
                layers.append(nn.Conv2d(channels, width, side, stride, 1, bias=not layers))
                if len(layers) > 1:
                    layers.append(nn.BatchNorm2d(width, norm.eps, track_running_stats=False))
                layers.append(nn.LeakyReLU(config.slope, inplace=True))
                channels = width
        self.image, self.slope = nn.Sequential(*layers), config.slope
        self.dense = nn.Linear(channels * (size // 2 ** len(LEVELS)) ** 2, DENSE)
        self.logit = nn.Linear(DENSE, 1, bias=has_last_bias)
        he_(self)

    def forward(self, image: Tensor, _: Tensor | None, noise: Tensor) -> Tensor:
        x = in_stages(self.image, image, self.is_checkpointing).flatten(1)
        with full_precision(x.device):
            return self.logit(F.leaky_relu(self.dense(x.to(noise.dtype)), self.slope))
