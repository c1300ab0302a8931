"""LPIPS v0.1: how different two images look, by AlexNet's features; less is nearer.

R. Zhang, P. Isola, A. A. Efros, E. Shechtman, O. Wang, "The Unreasonable Effectiveness of Deep Features as a
Perceptual Metric", CVPR 2018, section 3.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sega_dist.networks.vgg19 import MEAN, STD

CHANNELS = (64, 192, 384, 256, 256)  # of AlexNet's five maps
POOLED = ("3", "6")  # convolutions before which a pool stands
EPSILON = 1e-8  # under the root of a feature's length, as in torchmetrics: zero has no direction


class Lpips(nn.Module):
    """AlexNet's convolutions, frozen, and the `linear` weights (1152,) of its five maps' channels, one after another.

    State-dict keys are those of torchvision's AlexNet (`features.0.weight` ... `features.10.bias`). Without loaded
    weights the values are not a number, so that forgetting to load them cannot go unseen.
    """

    centre: Tensor
    gain: Tensor
    linear: Tensor

    def __init__(self, linear: Tensor):
        super().__init__()
        self.features = nn.ModuleDict({
            "0": nn.Conv2d(3, 64, 11, stride=4, padding=2),
            "3": nn.Conv2d(64, 192, 5, padding=2),
            "6": nn.Conv2d(192, 384, 3, padding=1),
            "8": nn.Conv2d(384, 256, 3, padding=1),
            "10": nn.Conv2d(256, 256, 3, padding=1),
        })  # fmt: skip
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
        self.register_buffer("centre", 255 * mean, persistent=False)
        self.register_buffer("gain", 1 / (255 * std), persistent=False)
        self.register_buffer("linear", linear.view(-1, 1, 1), persistent=False)
        for parameter in self.parameters():
            nn.init.constant_(parameter, float("nan"))
        self.requires_grad_(False).eval()

    def forward(self, hr: Tensor, sr: Tensor) -> Tensor:
        """Each pair's distance (N,) fp32; both (N,3,H,W) uint8, H and W 31 or more."""
        pairs = zip(self.linear.split(CHANNELS), self._directions(hr), self._directions(sr), strict=True)
        distances = [((of_hr - of_sr).square() * linear).sum(1).mean((1, 2)) for linear, of_hr, of_sr in pairs]
        return torch.stack(distances).sum(0)

    def _directions(self, images: Tensor) -> Iterator[Tensor]:
        """The five maps after their ReLUs, each position's features divided by their length."""
        x = (images.float() - self.centre) * self.gain
        for name, layer in self.features.items():
            x = F.relu(layer(F.max_pool2d(x, 3, stride=2) if name in POOLED else x))
            yield x / (x.square().sum(1, keepdim=True) + EPSILON).sqrt()
