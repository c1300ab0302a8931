"""VGG19's convolutions: the feature extractor of the content loss, and the frozen semantic encoder."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import record_function

from sega_dist.config import ContentLayer

CHANNELS = (64,) * 2 + (128,) * 2 + (256,) * 4 + (512,) * 8
BLOCK_ENDS = (2, 4, 8, 12, 16)  # convolutions after which a pool may stand
CONVOLUTIONS = {"conv3_3": 7, "conv5_4": 16, "relu5_4": 16}  # up to and including each layer of a content loss
CONV3_3, ALL = 7, 16
EMBEDDING_SIDE = 8  # a block's pool is kept only while its map is larger than this (paper figure 1)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet, for RGB in [0,1]


class Vgg19(nn.Module):
    """The first `convolutions` of VGG19 (arXiv 1409.1556, configuration E), frozen.

    State-dict keys are torchvision's (`features.0.weight` ... `features.34.bias`). Without loaded weights the values
    are not a number, so that forgetting to load them cannot go unseen.
    """

    centre: Tensor
    gain: Tensor

    def __init__(self, convolutions: int = ALL, content: ContentLayer = "conv3_3"):
        super().__init__()
        self.content_layer = content
        self.features = nn.ModuleDict()
        index, channels = 0, 3
        for number, width in enumerate(CHANNELS[:convolutions], 1):
            self.features[str(index)] = nn.Conv2d(channels, width, 3, padding=1)
            channels, index = width, index + 2 + (number in BLOCK_ENDS)  # a ReLU stands between, or ReLU and pool
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
        self.register_buffer("centre", 2 * mean - 1, persistent=False)
        self.register_buffer("gain", 1 / (2 * std), persistent=False)
        for parameter in self.parameters():
            nn.init.constant_(parameter, float("nan"))
        self.requires_grad_(False).eval()

    def round_to(self, dtype: torch.dtype) -> None:
        """Filters in `dtype` at rest: of a network that is not trained autocast would round them in every call.

        The first remains, which has to be scaled before it is rounded.
        """
        for layer in list(self.features.values())[1:]:
            layer.to(dtype)

    def forward(self, image: Tensor, is_embedding: bool) -> tuple[Tensor, Tensor]:
        """(N,3,H,W) in [-1,1] -> last map, and the content loss's layer, (N,256,H/4,W/4) where that is conv3_3.

        The last map is the embedded semantics (N,512,8,8), or the layer again where these are not wanted. One rule
        gives every shape of paper figure 1: for these a block's pool is kept only while the map is larger than 8x8, so
        that sides 256, 64 and 32 all end at 8. Features before the ReLU: paper section 3.4.
        """
        with record_function("vgg19"):
            content = CONVOLUTIONS[self.content_layer]
            first, *rest = self.features.values()
            assert isinstance(first, nn.Conv2d)
            # The mean is taken off before the border is padded with zeros; the deviation is in the filter.
            x = F.relu_(F.conv2d(image - self.centre, first.weight * self.gain, first.bias, padding=1))
            for number, layer in enumerate(rest, 2):
                x = layer(x)
                if number == content:
                    features = F.relu(x) if self.content_layer.startswith("relu") else x
                    if not is_embedding:
                        return features, features
                x = F.relu(x, inplace=number != content)
                if number in BLOCK_ENDS and (x.shape[-1] > EMBEDDING_SIDE or not is_embedding):
                    x = F.max_pool2d(x, 2)
            return x, features

    def content(self, image: Tensor) -> Tensor:
        """The content loss's features alone."""
        features: Tensor = self(image, False)[1]
        return features
