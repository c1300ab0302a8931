"""SRCNN (arXiv 1501.00092), its 9-5-5 form, on RGB."""

import torch.nn.functional as F
from torch import Tensor, nn

from sega_dist.config import GeneratorConfig, NormConfig
from sega_dist.networks.enlarging import enlarged, from_01, to_01


class Srcnn(nn.Module):
    """LR (N,3,h,w) in [-1,1] -> SR (N,3,scale*h,scale*w): three convolutions over the bicubic enlargement."""

    def __init__(self, scale: int, config: GeneratorConfig, _: NormConfig, __: bool = False):
        super().__init__()
        self.scale, width = scale, config.channels
        self.conv1 = nn.Conv2d(3, width, 9, padding=4)
        self.conv2 = nn.Conv2d(width, width // 2, 5, padding=2)
        self.conv3 = nn.Conv2d(width // 2, 3, 5, padding=2)
        for layer in (self.conv1, self.conv2, self.conv3):  # section 4.1, where the last learns ten times more slowly
            nn.init.normal_(layer.weight, std=1e-3)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, lr: Tensor) -> Tensor:
        x = F.relu(self.conv1(to_01(enlarged(lr, self.scale))))
        return from_01(self.conv3(F.relu(self.conv2(x))))
