"""One doubling of the upsampler: convolution to four times the channels, pixel shuffle, LeakyReLU."""

import torch.nn.functional as F
from torch import Tensor


def upconv_act(x: Tensor, weight: Tensor, bias: Tensor, slope: float) -> Tensor:
    """The plain-torch reference: x (N,C,h,w), weight (4C,C,3,3) -> (N,C,2h,2w)."""
    return F.leaky_relu(F.pixel_shuffle(F.conv2d(x, weight, bias, padding=1), 2), slope)
