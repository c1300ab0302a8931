"""Internal dense block: x + f1 + f2 + r with f1 = lrelu(C1 x), f2 = lrelu(C2 [x, f1])."""

import torch
import torch.nn.functional as F
from torch import Tensor


def idb(x: Tensor, r: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, slope: float) -> Tensor:
    """The plain-torch reference of one internal dense block (paper figure 3, inner skips added).

    x, r: (N,C,h,w), the block's input and the input of the RIDB around it; w1: (C,C,3,3); w2: (C,2C,3,3).
    """
    f1 = F.leaky_relu(F.conv2d(x, w1, b1, padding=1), slope)
    f2 = F.leaky_relu(F.conv2d(torch.cat([x, f1], 1), w2, b2, padding=1), slope)
    return x + f1 + f2 + r
