"""FSRNet (arXiv 1711.10703) without the heads of its prior network, which want labels that CelebA has not."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sega_dist.config import GeneratorConfig, NormConfig
from sega_dist.networks.checkpointing import in_stages
from sega_dist.networks.enlarging import batch_norm, enlarged

DEPTH = 3  # halvings in an hourglass
MULTIPLE = 2 ** (DEPTH + 1)  # what the sides of its input divide by
STD = 0.02  # of the initial filters


def convolution(ins: int, outs: int, norm: NormConfig, side: int = 3, stride: int = 1) -> nn.Sequential:
    """Convolution, batch norm, ReLU."""
    layer = nn.Conv2d(ins, outs, side, stride, side // 2, bias=False)
    return nn.Sequential(layer, batch_norm(outs, norm), nn.ReLU(inplace=True))


class ResidualBlock(nn.Module):
    """x + two convolutions with reflected borders and batch norm."""

    def __init__(self, width: int, norm: NormConfig):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, padding_mode="reflect", bias=False),
            batch_norm(width, norm),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, padding=1, padding_mode="reflect", bias=False),
            batch_norm(width, norm),
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.layers(x)
        return y


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions, each behind batch norm and ReLU, and a skip (1x1 where widths differ)."""

    def __init__(self, ins: int, outs: int, norm: NormConfig):
        super().__init__()
        layers: list[nn.Module] = []
        for i, o, side in ((ins, outs // 2, 1), (outs // 2, outs // 2, 3), (outs // 2, outs, 1)):
            layers += [batch_norm(i, norm), nn.ReLU(), nn.Conv2d(i, o, side, padding=side // 2)]
        self.layers = nn.Sequential(*layers)
        self.skip = nn.Conv2d(ins, outs, 1) if ins != outs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.skip(x) + self.layers(x)
        return y


class Hourglass(nn.Module):
    """At half the side the same again, `depth` times; in the middle one bottleneck more (arXiv 1603.06937)."""

    def __init__(self, width: int, depth: int, norm: NormConfig):
        super().__init__()
        self.beside, self.down, self.up = (Bottleneck(width, width, norm) for _ in range(3))
        self.inner = Hourglass(width, depth - 1, norm) if depth > 1 else Bottleneck(width, width, norm)

    def forward(self, x: Tensor) -> Tensor:
        low = self.up(self.inner(self.down(F.max_pool2d(x, 2))))
        y: Tensor = self.beside(x) + F.interpolate(low, scale_factor=2.0, mode="nearest")
        return y


class FsrNet(nn.Module):
    """LR (N,3,h,w) in [-1,1] -> SR (N,3,scale*h,scale*w) in [-1,1]; while training (SR, coarse SR). Figure 2.

    Works on the bicubic enlargement: a coarse network, an encoder and a prior network on what that makes, a decoder.
    The published program repeats one residual block with shared weights; here each is its own, as in the paper.
    """

    def __init__(self, scale: int, config: GeneratorConfig, norm: NormConfig, is_checkpointing: bool = False):
        super().__init__()
        self.scale, self.is_checkpointing, width = scale, is_checkpointing, config.channels
        self.coarse = nn.Sequential(
            convolution(3, width, norm), *self._blocks(3, width, norm), self._image(width, 3)
        )  # fmt: skip
        self.encoder = nn.Sequential(
            convolution(3, width, norm, stride=2), *self._blocks(12, width, norm), self._image(width, width)
        )  # fmt: skip
        self.prior = nn.Sequential(
            convolution(3, width, norm, side=7, stride=2), Bottleneck(width, 2 * width, norm),
            *self._blocks(2, 2 * width, norm), *(Hourglass(2 * width, DEPTH, norm) for _ in range(2)),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            convolution(3 * width, width, norm),
            nn.Sequential(  # one stage of activation checkpointing: its ReLU overwrites what a stage must keep
                nn.ConvTranspose2d(width, width, 3, 2, 1, output_padding=1, bias=False),
                batch_norm(width, norm), nn.ReLU(inplace=True),
            ),
            *self._blocks(3, width, norm), self._image(width, 3),
        )  # fmt: skip
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
                nn.init.normal_(layer.weight, std=STD)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    @staticmethod
    def _blocks(count: int, width: int, norm: NormConfig) -> list[nn.Module]:
        return [ResidualBlock(width, norm) for _ in range(count)]

    @staticmethod
    def _image(width: int, outs: int) -> nn.Module:
        layer = nn.Conv2d(width, outs, 3, padding=1, padding_mode="reflect", bias=False)
        return nn.Sequential(layer, nn.Tanh())

    def forward(self, lr: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        larger = enlarged(lr, self.scale)
        height, width = larger.shape[2:]
        padded = F.pad(larger, (0, -width % MULTIPLE, 0, -height % MULTIPLE), mode="replicate")
        coarse = in_stages(self.coarse, padded, self.is_checkpointing)
        features = [in_stages(part, coarse, self.is_checkpointing) for part in (self.encoder, self.prior)]
        sr = in_stages(self.decoder, torch.cat(features, 1), self.is_checkpointing)[:, :, :height, :width]
        return (sr, coarse[:, :, :height, :width]) if self.training else sr
