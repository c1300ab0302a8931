"""Losses as pure functions: relativistic average least squares, binary cross-entropy, content, pixel.

Logits are (N,1). The relativistic losses take the means of both sides as arguments, because these are statistics of the
global batch: whoever knows the ranks computes them, with gradient.
"""

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


def content(phi_hr: Tensor, phi_sr: Tensor) -> Tensor:
    """Mean squared distance of conv3_3 features over N, C, H and W (paper section 3.4, L_content)."""
    return (phi_hr - phi_sr).square().mean()


def pixel(hr: Tensor, sr: Tensor) -> Tensor:
    """Mean absolute difference over N, C, H and W."""
    return (hr - sr).abs().mean()
