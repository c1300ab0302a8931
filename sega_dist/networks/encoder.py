"""The small semantic encoder that is trained with the discriminator."""

from torch import Tensor, nn

from sega_dist.config import NormConfig
from sega_dist.networks.checkpointing import in_stages
from sega_dist.networks.initial import glorot_
from sega_dist.networks.vgg19 import EMBEDDING_SIDE

SLOPE = 0.2
# Widths of the stride-2 stages, in units of `encoder.width`, by how many are needed to reach 8x8.
STAGES = {0: (8,), 1: (8,), 2: (2, 8), 3: (2, 4, 8), 4: (1, 2, 4, 8), 5: (1, 2, 4, 8, 8)}


def encoder_branch(side: int, width: int, norm: NormConfig) -> nn.Sequential:
    """Images (N,3,side,side) in [-1,1] -> embedding (N,8*width,8,8) by halving; statistics are always the batch's."""
    stages = (side // EMBEDDING_SIDE).bit_length() - 1
    layers: list[nn.Module] = []
    channels = 3
    for multiple in STAGES[stages]:
        stride = 2 if stages else 1  # an input of 8x8 is embedded without shrinking
        layers += [
            nn.Conv2d(channels, multiple * width, 3, stride, 1, bias=norm.conv_bias),
            nn.BatchNorm2d(multiple * width, norm.eps, track_running_stats=False),
            nn.LeakyReLU(SLOPE, inplace=True),
        ]
        channels = multiple * width
    return nn.Sequential(*layers)


class TrainableEncoder(nn.Module):
    """Two branches, one for HR and one for LR images, to embeddings of the same shape (N,8*width,8,8).

    Without `lr_size` there is no LR branch: nothing is ever embedded by it where the fake tuple shows SR's semantics.
    """

    def __init__(self, hr_size: int, lr_size: int | None, width: int, norm: NormConfig, is_checkpointing: bool = False):
        super().__init__()
        self.is_checkpointing = is_checkpointing  # a stage remembers its input alone
        self.hr_size = hr_size
        self.hr = encoder_branch(hr_size, width, norm)
        if lr_size is not None:
            self.lr = encoder_branch(lr_size, width, norm)
        glorot_(self)

    def forward(self, image: Tensor) -> Tensor:
        branch = self.hr if image.shape[-1] == self.hr_size else self.lr
        return in_stages(branch, image, self.is_checkpointing)
