"""Losses as pure functions: relativistic average least squares, cross-entropies, content, pixel.

Logits are (N,1). The relativistic losses take the means of both sides as arguments, because these are statistics of the
global batch: whoever knows the ranks computes them, with gradient.
"""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from sega_dist.kernels.backend import Impl
from sega_dist.kernels.rals import rals


def rals_d(real: Tensor, fake: Tensor, mean_real: Tensor, mean_fake: Tensor, impl: Impl = "reference") -> Tensor:
    """L_D of paper section 3.4: real should score one above the mean fake, fake one below the mean real."""
    return rals(real, fake, mean_real, mean_fake, 1.0, impl)


def rals_g(real: Tensor, fake: Tensor, mean_real: Tensor, mean_fake: Tensor, impl: Impl = "reference") -> Tensor:
    """L_G of paper section 3.4: the discriminator's roles exchanged."""
    return rals(real, fake, mean_real, mean_fake, -1.0, impl)


def bce_d(real: Tensor, fake: Tensor) -> Tensor:
    """Binary cross-entropy of D (ablations A and C): real is 1, fake is 0."""
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def bce_g(fake: Tensor) -> Tensor:
    """Binary cross-entropy of G, not saturating: fake should pass for 1."""
    return F.softplus(-fake).mean()


def ragan_d(real: Tensor, fake: Tensor, mean_real: Tensor, mean_fake: Tensor) -> Tensor:
    """ESRGAN's relativistic average cross-entropy of D (arXiv 1809.00219 section 3.2), the mean of its two halves."""
    return (F.softplus(mean_fake - real).mean() + F.softplus(fake - mean_real).mean()) / 2


def ragan_g(real: Tensor, fake: Tensor, mean_real: Tensor, mean_fake: Tensor) -> Tensor:
    """ESRGAN's of G: the roles exchanged."""
    return ragan_d(fake, real, mean_fake, mean_real)


def difference(a: Tensor, b: Tensor, norm: Literal["l1", "mse", "sse"]) -> Tensor:
    """Of features or images (N,C,H,W): mean absolute value, mean square, or sum of squares of one of the N.

    "mse" of conv3_3 features is L_content of paper section 3.4.
    """
    if norm == "l1":
        return (a - b).abs().mean()
    square = (a - b).square()
    return square.mean() if norm == "mse" else square.sum() / len(square)
