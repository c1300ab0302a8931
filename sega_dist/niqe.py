"""NIQE: how far an image's statistics lie from those of pristine photographs, without a reference; less is better.

A. Mittal, R. Soundararajan, A. C. Bovik, "Making a 'Completely Blind' Image Quality Analyzer", IEEE SPL 20(3), 2013.
Where the paper leaves a choice, this is BasicSR's, whose `niqe_pris_params.npz` holds the pristine model: BT.601
studio-range luminance rounded to whole levels (the authors' MATLAB takes full-range grey of RGB).
"""

import functools
import tokenize
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sega_dist.errors import UserError
from sega_dist.metrics import luminance

SIDE = 96  # of a block, pixels at full size
SMALLEST = 2 * SIDE  # four blocks
SHAPES = {"mu_pris_param": (1, 36), "cov_pris_param": (36, 36), "gaussian_window": (7, 7)}
# What numpy raises on damaged files.
UNREADABLE = (
    OSError,
    EOFError,
    RuntimeError,
    TypeError,
    ValueError,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)
ROUNDING = 1e-9  # levels: smaller deviations from the local mean are rounding errors of fp64, not contrast
NEIGHBOURS = ((0, 1), (1, 0), (1, 1), (1, -1))  # rows and columns to those whose products are looked at


@dataclass(frozen=True)
class Niqe:
    """Statistics of pristine photographs, fp64."""

    mean: Tensor  # (36,) of the features
    covariance: Tensor  # (36,36)
    window: Tensor  # (7,7) of local mean and contrast, sums to one


def load_niqe(path: Path) -> Niqe:
    """The pristine model from an .npz in BasicSR's layout (`SHAPES`). Raises UserError if it is not one."""
    if not path.is_file():
        raise UserError(f"NIQE's parameters {path} do not exist; give BasicSR's niqe_pris_params.npz")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: np.asarray(file[key], np.float64) for key in SHAPES if key in file}
    except UNREADABLE as error:
        raise UserError(
            f"{path} is not an .npz of numbers ({type(error).__name__}); give niqe_pris_params.npz"
        ) from None
    for key, shape in SHAPES.items():
        if key not in arrays:
            raise UserError(f"{path} holds no {key}: it must be BasicSR's niqe_pris_params.npz")
        if arrays[key].shape != shape:
            raise UserError(f"{path}: {key} is {arrays[key].shape}, NIQE's is {shape}")
        if not np.isfinite(arrays[key]).all():
            raise UserError(f"{path}: {key} holds values that are not finite numbers")
    mean, covariance, window = map(torch.from_numpy, arrays.values())
    return Niqe(mean[0], covariance, window)


def niqe(images: Tensor, model: Niqe) -> Tensor:
    """Each image's distance from `model`, (N,) fp64; images (N,3,H,W) uint8. Raises ValueError for sides below 192.

    The rest of an image beyond whole blocks is cut off, right and below. Not a number where fewer than two blocks
    have statistics, as in a constant image. Image by image, so that a value does not depend on its batch.
    """
    height, width = images.shape[2:]
    if min(height, width) < SMALLEST:
        raise ValueError(f"NIQE needs images of {SMALLEST} pixels or more; these are {height}x{width}")
    images = images[:, :, : height // SIDE * SIDE, : width // SIDE * SIDE]
    model = Niqe(*(tensor.to(images.device) for tensor in (model.mean, model.covariance, model.window)))
    return torch.stack([_distance(features(image, model.window), model) for image in levels(images)])


def features(luma: Tensor, window: Tensor) -> Tensor:
    """18 statistics at each of two scales of every block of luminance (H,W): (blocks, 36)."""
    scales = (luma, SIDE), (halved(luma), SIDE // 2)
    return torch.cat([_statistics(_blocks(normalised(pixels, window), side)) for pixels, side in scales], 1)


def halved(pixels: Tensor) -> Tensor:
    """(H,W), both even -> (H/2,W/2) as MATLAB's imresize: bicubic, a = -0.5, antialiased, edges mirrored, not rounded.

    The kernel is stretched by two, and output pixels lie midway between two inputs: always the same eight taps.
    """
    x = torch.tensor([1.75, 1.25, 0.75, 0.25], dtype=pixels.dtype, device=pixels.device)
    taps = torch.where(x < 1, (1.5 * x - 2.5) * x**2 + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2) / 2
    taps = torch.cat([taps, taps.flip(0)])
    for _ in range(2):  # rows, then columns
        mirrored = torch.cat([pixels[:3].flip(0), pixels, pixels[-3:].flip(0)])
        pixels = (mirrored.unfold(0, 8, 2) @ taps).T
    return pixels


def normalised(pixels: Tensor, window: Tensor) -> Tensor:
    """Mean-subtracted contrast-normalised coefficients of (H,W), paper equations 1 to 3; edges repeated.

    Deviations that are rounding errors become zero: their signs, which the statistics of both sides count, would
    differ between processors wherever an image is flat or a straight slope.
    """
    padded = F.pad(pixels[None, None], (3, 3, 3, 3), mode="replicate")
    mean, square = F.conv2d(torch.cat([padded, padded.square()]), window[None, None])[:, 0]
    deviation = pixels - mean
    return deviation.where(deviation.abs() > ROUNDING, 0) / ((square - mean.square()).abs().sqrt() + 1)


def levels(images: Tensor) -> Tensor:
    """Luminance (N,H,W) fp64 in whole levels. Halves, about one pixel of an image, go up however sums are rounded.

    They are multiples of 1/255000, so that a millionth moves nothing else.
    """
    return (luminance(images.double())[:, 0] + (0.5 + 1e-6)).floor()


def _blocks(pixels: Tensor, side: int) -> Tensor:
    """(H,W) -> (blocks, side, side)."""
    return pixels.unfold(0, side, side).unfold(1, side, side).flatten(0, 1)


def _statistics(blocks: Tensor) -> Tensor:
    """(blocks, 18): shape and mean scale of the coefficients; shape, mean and scales of products with neighbours."""
    products = [blocks * blocks.roll(shift, (1, 2)) for shift in NEIGHBOURS]  # around the block's edge, as published
    shape, left, right = asymmetric_fit(torch.stack([blocks, *products], 1).flatten(2))  # each (blocks, 5)
    mean = (right - left) * ((2 / shape).lgamma() - (1 / shape).lgamma()).exp()  # paper equation 8
    of_products = torch.stack([shape, mean, left, right], 2)[:, 1:].flatten(1)
    return torch.cat([shape[:, :1], (left + right)[:, :1] / 2, of_products], 1)


def asymmetric_fit(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Shape and the scales left and right of zero of an asymmetric generalised Gaussian, by its moments.

    (..., n) -> three (...), paper equation 7 after Lasmar et al. 2009. Without values on both sides the scales are
    not a number, and the shape is the smallest, as in both published programs.
    """
    squares = values.square()
    left, right = (((squares * side).sum(-1) / side.sum(-1)).sqrt() for side in (values < 0, values > 0))
    ratio = left / right
    moment = values.abs().mean(-1).square() / squares.mean(-1)
    moment = moment * (ratio**3 + 1) * (ratio + 1) / (ratio.square() + 1).square()
    shape = _nearest_shape(moment)
    scale = (((1 / shape).lgamma() - (3 / shape).lgamma()) / 2).exp()
    return shape, left * scale, right * scale


def _nearest_shape(moment: Tensor) -> Tensor:
    """The shape of the published table, 0.2 to 10 in thousandths, whose moment is nearest."""
    shapes, moments = (column.to(moment.device) for column in _table())
    moment = moment.nan_to_num(0)
    above = torch.searchsorted(moments, moment).clamp(1, len(moments) - 1)
    is_below_nearer = moment - moments[above - 1] <= moments[above] - moment
    return shapes[above - is_below_nearer.long()]


@functools.cache
def _table() -> tuple[Tensor, Tensor]:
    """Shapes, and the squared mean magnitude over mean square of a generalised Gaussian, which grows with the shape."""
    shapes = torch.arange(200, 10001, dtype=torch.float64) / 1000
    return shapes, (2 * (2 / shapes).lgamma() - (1 / shapes).lgamma() - (3 / shapes).lgamma()).exp()


def _distance(found: Tensor, model: Niqe) -> Tensor:
    """Paper equation 10 for the features (blocks, 36) of one image."""
    whole = found[~found.isnan().any(1)]
    if len(whole) < 2:
        return found.new_tensor(torch.nan)
    difference = model.mean - found.nanmean(0)
    return (difference @ torch.linalg.pinv((model.covariance + whole.T.cov()) / 2) @ difference).sqrt()
