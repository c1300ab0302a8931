"""VGG19's convolutions: the feature extractor of the content loss, and the frozen semantic encoder."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import record_function

CHANNELS = ((64, 64), (128, 128), (256,) * 4, (512,) * 4, (512,) * 4)  # of each block's convolutions
CONV3_3 = 7  # convolutions up to and including conv3_3
ALL = 16
EMBEDDING_SIDE = 8  # a block's pool is kept only while its map is larger than this (paper figure 1)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet, for RGB in [0,1]


class Vgg19(nn.Module):
    """The first `convolutions` of VGG19 (arXiv 1409.1556, configuration E), frozen.

    State-dict keys are torchvision's (`features.0.weight` ... `features.34.bias`). Without loaded weights the values
    are not a number, so that forgetting to load them cannot go unseen.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, convolutions: int = ALL):
        super().__init__()
        self.features = nn.ModuleDict()
        self.ends: list[list[str]] = []  # names of each block's convolutions
        index, channels = 0, 3
        for block in CHANNELS:
            names = []
            for width in block[: max(0, convolutions - len(self.features))]:
                self.features[str(index)] = nn.Conv2d(channels, width, 3, padding=1)
                names.append(str(index))
                channels, index = width, index + 2  # a ReLU stands between
            self.ends.append(names)
            index += 1  # the pool
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1), persistent=False)
        for parameter in self.parameters():
            nn.init.constant_(parameter, float("nan"))
        self.requires_grad_(False).eval()

    def normalise(self, image: Tensor) -> Tensor:
        """[-1,1] -> ImageNet's mean and standard deviation."""
        return ((image + 1) / 2 - self.mean) / self.std

    @record_function("vgg19")
    def conv3_3(self, image: Tensor) -> Tensor:
        """Features before the ReLU of conv3_3 (paper section 3.4): (N,3,H,W) in [-1,1] -> (N,256,H/4,W/4)."""
        x = self.normalise(image)
        for block in self.ends[:2]:
            x = F.max_pool2d(self._block(x, block), 2)
        first, second, third = self.ends[2][:3]
        return self.features[third](self._block(x, [first, second]))

    @record_function("vgg19")
    def embed(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Embedded semantics (N,512,8,8) and, from the same pass, conv3_3 before its ReLU (N,256,h,w).

        One rule gives every shape of paper figure 1: the pool after a block is kept only while the map is larger
        than 8x8, so sides 256, 64 and 32 all end at 8.
        """
        x = self.normalise(image)
        conv3_3 = x
        for number, block in enumerate(self.ends):
            if number == 2:
                conv3_3 = self.features[block[2]](self._block(x, block[:2]))
                x = self._block(F.relu(conv3_3), block[3:])
            else:
                x = self._block(x, block)
            if x.shape[-1] > EMBEDDING_SIDE:
                x = F.max_pool2d(x, 2)
        return x, conv3_3

    def _block(self, x: Tensor, names: list[str]) -> Tensor:
        for name in names:
            x = F.relu(self.features[name](x))
        return x
