"""What a search of a generator's latent space is made of: interfaces, latent map, sphere, schedule, losses, resizing.

Losses are of each image, (N,). Sources: PULSE (arXiv 2003.03808) and the RLSE poster (Shi, Zhang, Li, Ge, ICASSP 2022).
"""

import functools
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from sega_dist.data import positions
from sega_dist.networks.facegan import Mapping, activated

Down = Literal["bicubic", "area", "bilinear"]
TINY = 1e-9  # under the roots, as PULSE has it: equal vectors keep a gradient


class Explorable(Protocol):
    """A pretrained generator in eval mode, differentiable in w and noises, that never mixes the images of a batch."""

    side: int  # R, of its images in pixels
    layers: int  # L, how many w an image takes; 1 without a mapping network
    splits: int  # the last layer before which `head` may end
    z_size: int  # of the mapping network's input; without one w_size
    w_size: int  # W
    gaussian: tuple[Tensor, Tensor] | None  # mean and std (W,) of the mapping's last pre-activation; None: w is z

    # Sides of each layer's noise (none without noise); w (N,L,W) and noises (N,1,s,s) to (N,3,R,R) in [-1,1].
    def noise_shapes(self) -> list[tuple[int, int]]: ...
    def synthesis(self, w: Tensor, noises: list[Tensor]) -> Tensor: ...

    # The same in two: what the layers before `layer` make, tensors (N,C,...), and what the others make of that.
    def head(self, w: Tensor, noises: list[Tensor], layer: int) -> tuple[Tensor, ...]: ...
    def tail(self, features: tuple[Tensor, ...], w: Tensor, noises: list[Tensor], layer: int) -> Tensor: ...


class Featured(Protocol):
    """A pretrained discriminator in eval mode."""

    # (N,3,R,R) in [-1,1] to maps (N,C,s,s), the coarse last, none of them behind a layer that mixes the images.
    def features(self, images: Tensor) -> list[Tensor]: ...


def to_w(z: Tensor, gaussian: tuple[Tensor, Tensor] | None) -> Tensor:
    """Standard normal z (...,W) to w as the mapping network spreads them: PULSE's Gaussian fit."""
    return z if gaussian is None else activated(z * gaussian[1] + gaussian[0])


@torch.no_grad()
def spread(mapping: Mapping, samples: int = 100_000) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and deviation (W,) of what the mapping's last activation reads, and the mean w, over random z."""
    first = next(mapping.parameters())
    sums = torch.zeros(3, 1, dtype=torch.float64, device=first.device)
    for start in range(0, samples, 10_000):
        z = positions.normal(0, positions.SPREAD, start, min(10_000, samples - start), first.shape[1], first.device)
        x = mapping.pre_activation(z.to(first.dtype)).double()
        sums = sums + torch.stack([x.sum(0), x.square().sum(0), activated(x).sum(0)])
    mean, square, w = sums / samples
    std = (square - mean.square()).clamp(min=0).sqrt()
    return mean.to(first.dtype), std.to(first.dtype), w.to(first.dtype)


def radius(p: Tensor) -> Tensor:
    """Of each vector (N,V,W) as (N,V,1), of each map (N,1,s,s) as (N,1,1,1)."""
    return (p.square().sum(tuple(range(2, p.ndim)), keepdim=True) + TINY).sqrt()


def linear1cycledrop(step: int, steps: int) -> float:
    """Share of the learning rate: up from 0.1 to 1 and down in nine tenths of the steps, to 0.001 in the last."""
    x = step / steps
    return (9 * (1 - abs(x / 0.9 - 0.5) * 2) + 1) / 10 if x < 0.9 else 0.1 + (x - 0.9) / 0.1 * (0.001 - 0.1)


SCHEDULES = {"linear1cycledrop": linear1cycledrop, "fixed": lambda step, steps: 1.0}


def square_difference(a: Tensor, b: Tensor) -> Tensor:
    """Mean square of each image's difference: PULSE's L2 before its clamp."""
    return (a - b).square().flatten(1).mean(1)


def geodesic(w: Tensor) -> Tensor:
    """PULSE's GEOCROSS of w (N,V,W): mean square angle between all ordered pairs of an image's V, times 512/8.

    The angle knows no W, so 512 stays whatever W is. 0 where V is 1.
    """
    if w.shape[1] == 1:
        return w.new_zeros(len(w))
    x, y = w[:, None], w[:, :, None]
    apart, across = (((x - y).square().sum(3) + TINY).sqrt(), ((x + y).square().sum(3) + TINY).sqrt())
    return (2 * torch.atan2(apart, across)).square().mean((1, 2)) * (512 / 8)


def semantic(a: list[Tensor], b: list[Tensor], norm: Literal["l1", "l2"], is_normalised: bool) -> Tensor:
    """RLSE's L_s between maps of two batches: mean absolute value or mean square of each layer's difference, summed.

    Normalised, the maps of a layer are brought to mean 0 and variance 1 first, image by image.
    """
    total = a[0].new_zeros(len(a[0]))
    for x, y in zip(a, b, strict=True):
        x, y = x.flatten(1), y.flatten(1)
        if is_normalised:
            x, y = (F.layer_norm(maps, maps.shape[1:]) for maps in (x, y))
        total = total + ((x - y).abs() if norm == "l1" else (x - y).square()).mean(1)
    return total


def resize(images: Tensor, side: int, mode: Down, antialias: bool = True) -> Tensor:
    """Squares (N,C,S,S) to (N,C,side,side): the rule of the project's LR, in floating point and never rounded.

    Pillow's filters, bicubic with a = -0.5; taps beyond the edge are left out and the rest sum to 1 (PULSE reflects, so
    its kernel gives other values in the outermost two pixels). Products with a fixed matrix, not `interpolate`, whose
    gradient a GPU adds up in any order. Keep it out of autocast.
    """
    matrix = _matrix(images.shape[-1], side, mode, antialias, images.dtype, images.device)
    return matrix @ images @ matrix.mT


@functools.lru_cache(maxsize=32)
@torch.inference_mode(False)  # a matrix made first while scoring must serve autograd later
def _matrix(old: int, new: int, mode: Down, antialias: bool, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(new,old): what resizing does to a column, read off by resizing the columns of the identity."""
    columns = torch.eye(old, dtype=torch.float64)[None, None]
    if mode == "area":
        resized = F.interpolate(columns, size=(new, old), mode="area")
    else:
        resized = F.interpolate(columns, size=(new, old), mode=mode, antialias=antialias, align_corners=False)
    return resized[0, 0].to(dtype).to(device)
