"""Internal dense block: x + f1 + f2 + r with f1 = lrelu(C1 x), f2 = lrelu(C2 [x, f1]) (paper figure 3)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from sega_dist.kernels import backend
from sega_dist.kernels.backend import Impl
from sega_dist.kernels.conv3x3_act import conv3x3_act


def reference(x: Tensor, r: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, slope: float) -> Tensor:
    """x, r (N,C,h,w), w1 (C,C,3,3), b1 (C,), w2 (C,2C,3,3), b2 (C,) -> (N,C,h,w)."""
    f1 = F.leaky_relu_(F.conv2d(x, w1, b1, padding=1), slope)
    f2 = F.leaky_relu_(F.conv2d(torch.cat([x, f1], 1), w2, b2, padding=1), slope)
    return (x + f1).add_(f2).add_(r)


def idb(x: Tensor, r: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, slope: float, impl: Impl = "auto"
        ) -> Tensor:  # fmt: skip
    """One internal dense block; r is the input of the block of blocks around it and may be x itself.

    Two fused convolutions. Inside a `ridb` the backward runs across the borders of its blocks as well.
    """
    cast, past = backend.autocast(x), backend.autocast(r)
    backend.check_together(x=cast, r=past, weight1=w1, bias1=b1, weight2=w2, bias2=b2)
    chosen = backend.choose(impl, "idb", cast, slope)
    if chosen == "reference":
        return reference(x, r, w1, b1, w2, b2, slope)
    x, r = cast, past
    f1 = conv3x3_act(x, None, w1, b1, None, slope, impl=chosen)
    return conv3x3_act(x, f1, w2, b2, r, slope, add_sources=True, impl=chosen)
