"""What comparison networks share: images between ranges, bicubic enlargement, batch norm that follows the keys."""

import torch.nn.functional as F
from torch import Tensor, nn

from sega_dist.config import NormConfig


def enlarged(lr: Tensor, scale: int) -> Tensor:
    """(N,3,h,w) -> (N,3,scale*h,scale*w), bicubic with a = -0.5 as Pillow's, not rounded."""
    size = (scale * lr.shape[2], scale * lr.shape[3])
    dtype = lr.dtype if lr.dtype.itemsize >= 4 else None  # half precisions have no such kernel on every device
    larger = F.interpolate(lr if dtype else lr.float(), size=size, mode="bicubic", antialias=True, align_corners=False)
    return larger.to(lr.dtype)


def to_01(images: Tensor) -> Tensor:
    """[-1,1] -> [0,1], the range that some of these networks were made for."""
    return (images + 1) / 2


def from_01(images: Tensor) -> Tensor:
    """The inverse of `to_01`."""
    return images * 2 - 1


def batch_norm(channels: int, norm: NormConfig) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, norm.eps, norm.momentum)


def he_(module: nn.Module, gain: float = 1.0) -> None:
    """He-normal filters (arXiv 1502.01852), times `gain`, and zero biases."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight)
            layer.weight.data.mul_(gain)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
