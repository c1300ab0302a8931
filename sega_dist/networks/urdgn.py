"""URDGN (Yu and Porikli, ECCV 2016): the networks of its published program."""

import torch.nn.functional as F
from torch import Tensor, nn

from sega_dist.config import DiscriminatorConfig, GeneratorConfig, NormConfig
from sega_dist.networks.discriminator import dropout, full_precision
from sega_dist.networks.enlarging import batch_norm, he_

STAGES = ((1, 3), (4, 3), (8, 5), (16, 5))  # width multiple and filter side of the generator's convolutions
WIDTHS = (1, 2, 4, 3)  # multiples of half of `discriminator.width`
DENSE = 16  # of `discriminator.width`
CHANNEL_DROPOUT = 0.2


class Urdgn(nn.Module):
    """LR (N,3,h,w) in [-1,1] -> SR (N,3,scale*h,scale*w), not bounded; `channels` is 16 in the published network.

    Nearest enlargement stands before the second, third and fourth convolution at x8; at x4 the first is left out.
    """

    def __init__(self, scale: int, config: GeneratorConfig, norm: NormConfig, _: bool = False):
        super().__init__()
        self.doublings, channels = scale.bit_length() - 1, 3
        self.stages = nn.ModuleList()
        for multiple, side in STAGES:
            width = multiple * config.channels
            convolution = nn.Conv2d(channels, width, side, padding=side // 2, bias=norm.conv_bias)
            self.stages.append(nn.Sequential(convolution, batch_norm(width, norm), nn.ReLU(inplace=True)))
            channels = width
        self.last = nn.Conv2d(channels, 3, 5, padding=2)
        he_(self)

    def forward(self, lr: Tensor) -> Tensor:
        x = lr
        for number, stage in enumerate(self.stages):
            if number >= len(self.stages) - self.doublings:
                x = F.interpolate(x, scale_factor=2.0, mode="nearest")
            x = stage(x)
        sr: Tensor = self.last(x)
        return sr


class UrdgnDiscriminator(nn.Module):
    """(image (N,3,S,S) in [-1,1], None, noise (N,`noise_size`)) -> logits (N,1), S a multiple of 16.

    Its sigmoid belongs to the loss. The noise decides which channels and which units are dropped.
    """

    def __init__(self, size: int, has_last_bias: bool, config: DiscriminatorConfig, _: NormConfig, __: bool = False):
        super().__init__()
        widths, dense = [multiple * config.width // 2 for multiple in WIDTHS], DENSE * config.width
        self.config, self.sizes = config, (*widths, dense)
        self.convs = nn.ModuleList(nn.Conv2d(i, o, 5, padding=2) for i, o in zip((3, *widths), widths, strict=False))
        self.dense = nn.Linear(widths[-1] * (size // 16) ** 2, dense)
        self.logit = nn.Linear(dense, 1, bias=has_last_bias)
        he_(self)

    @staticmethod
    def noise_size(width: int) -> int:
        """Uniform numbers that one image needs for its dropout."""
        return sum(multiple * width // 2 for multiple in WIDTHS) + DENSE * width

    def forward(self, image: Tensor, _: Tensor | None, noise: Tensor) -> Tensor:
        *channels, units = noise.split(self.sizes, 1)
        x = image
        for conv, uniform in zip(self.convs, channels, strict=True):
            x = dropout(F.relu(F.max_pool2d(conv(x), 2)), uniform[:, :, None, None], CHANNEL_DROPOUT)
        with full_precision(x.device):
            x = F.relu(self.dense(x.flatten(1).to(noise.dtype)))
            return self.logit(dropout(x, units, self.config.dropout))
