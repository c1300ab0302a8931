"""The joint discriminator of SEGA-FURN: an image branch, a semantic branch, and a head over both."""

import contextlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sega_dist.config import DiscriminatorConfig, NormConfig
from sega_dist.networks.checkpointing import in_stages
from sega_dist.networks.encoder import TrainableEncoder
from sega_dist.networks.initial import glorot_

HEAD = (256, 128, 64, 32, 16)  # widths of the fully connected module (paper figure 2, FCM)
NOISE = sum(HEAD)  # uniform numbers one image needs for its dropout: 496
IMAGE_STAGES = ((1, 1), (1, 2), (2, 1), (2, 2), (4, 1), (4, 2), (8, 1), (8, 2), (8, 2))  # width multiple, stride
SEMANTIC_STAGES = ((2.0, 1), (2.0, 2), (1.0, 1), (1.0, 2), (0.5, 1), (0.5, 2))


def dropout(x: Tensor, noise: Tensor, p: float) -> Tensor:
    """Inverted dropout from explicit `noise`, uniform in [0,1) and of x's shape."""
    return x * (noise > p).to(x.dtype) / (1 - p) if p else x


def stages(channels: int, widths: list[tuple[int, int]], slope: float, norm: NormConfig) -> nn.Sequential:
    """3x3 convolution, batch norm (not in the first stage), LeakyReLU for each (width, stride).

    Batch norm keeps no running statistics: the discriminator is never used outside training.
    """
    layers: list[nn.Module] = []
    for number, (width, stride) in enumerate(widths):
        layers.append(nn.Conv2d(channels, width, 3, stride, 1, bias=number == 0 or norm.conv_bias))
        if number:
            layers.append(nn.BatchNorm2d(width, norm.eps, track_running_stats=False))
        layers.append(nn.LeakyReLU(slope, inplace=True))
        channels = width
    return nn.Sequential(*layers)


def full_precision(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """No autocast: logits differ from their mean by little, and the layers that make them cost nothing."""
    has_autocast = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if has_autocast else contextlib.nullcontext()


class Discriminator(nn.Module):
    """(image, embedding, noise) -> logits, relativistic or not; paper section 3.3 and figure 2.

    image (N,3,S,S) in [-1,1] with S = `size`, a multiple of 32; embedding (N,`semantics`,8,8), or None where
    `semantics` is 0 (image-only ablations); noise (N,496) uniform in [0,1) decides the dropout. Logits (N,1).
    The dense layers of the image branch act on each position, as 1x1 convolutions, since they are drawn before Flatten.
    """

    def __init__(self, size: int, semantics: int, has_last_bias: bool, config: DiscriminatorConfig, norm: NormConfig,
                 is_checkpointing: bool = False):  # fmt: skip
        super().__init__()
        self.is_checkpointing = is_checkpointing  # a stage remembers its input alone
        width = config.width
        self.config = config
        self.image = stages(3, [(multiple * width, s) for multiple, s in IMAGE_STAGES], config.slope, norm)
        self.dense = nn.Sequential(
            nn.Conv2d(8 * width, 16 * width, 1), nn.LeakyReLU(config.slope, inplace=True), nn.Conv2d(16 * width, 1, 1)
        )
        features = (size // 32) ** 2
        if semantics:
            widths = [(int(multiple * width), s) for multiple, s in SEMANTIC_STAGES]
            self.semantics = stages(semantics, widths, config.slope, norm)
            features += widths[-1][0]  # the strides end at 1x1
        sides = (features, *HEAD)
        self.head = nn.ModuleList(nn.Linear(i, o) for i, o in zip(sides, sides[1:], strict=False))
        self.logit = nn.Linear(HEAD[-1], 1, bias=has_last_bias)
        glorot_(self)

    def forward(self, image: Tensor, embedding: Tensor | None, noise: Tensor) -> Tensor:
        x = self.dense(in_stages(self.image, image, self.is_checkpointing)).flatten(1)
        if embedding is not None:
            semantics = in_stages(self.semantics, embedding, self.is_checkpointing)
            x = torch.cat([semantics.flatten(1), x], 1)
        with full_precision(x.device):
            x = x.to(noise.dtype)
            for layer, uniform in zip(self.head, noise.split(HEAD, 1), strict=True):
                x = dropout(F.leaky_relu(layer(x), self.config.slope), uniform, self.config.dropout)
            return self.logit(x)


class EncodingDiscriminator(nn.Module):
    """A discriminator with the encoder that is trained beside it: (image, what to embed, noise) -> logits (N,1)."""

    def __init__(self, encoder: TrainableEncoder, discriminator: Discriminator):
        super().__init__()
        self.encoder = encoder
        self.discriminator = discriminator

    def forward(self, image: Tensor, source: Tensor, noise: Tensor) -> Tensor:
        return self.discriminator(image, self.encoder(source), noise)
