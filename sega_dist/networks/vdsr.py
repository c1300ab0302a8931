"""VDSR (arXiv 1511.04587) on RGB."""

import torch.nn.functional as F
from torch import Tensor, nn

from sega_dist.config import GeneratorConfig, NormConfig
from sega_dist.networks.enlarging import enlarged, from_01, he_, to_01


class Vdsr(nn.Module):
    """LR (N,3,h,w) in [-1,1] -> SR (N,3,scale*h,scale*w): what `blocks` convolutions add to the enlargement."""

    def __init__(self, scale: int, config: GeneratorConfig, _: NormConfig, __: bool = False):
        super().__init__()
        self.scale, width = scale, config.channels
        sides = (3, *[width] * (config.blocks - 1), 3)
        pairs = zip(sides, sides[1:], strict=False)
        self.layers = nn.ModuleList(nn.Conv2d(i, o, 3, padding=1, bias=False) for i, o in pairs)
        he_(self)

    def forward(self, lr: Tensor) -> Tensor:
        x = larger = to_01(enlarged(lr, self.scale))
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return from_01(larger + self.layers[-1](x))
