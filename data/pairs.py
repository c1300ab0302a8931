"""HR bytes to training pairs on the device: patch, flip, bicubic LR, and the way between 8 bits and [-1,1]."""

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor


def bicubic(images: Tensor, height: int, width: int) -> Tensor:
    """Resize (N,3,H,W) uint8 to (N,3,height,width) uint8 as Pillow's BICUBIC does for squares, to one level.

    Antialiased when shrinking, a = -0.5; rows first, then columns, rounded to 8 bits between: without that, overshoot
    at hard edges differs by several levels. (Of images thrice as high as wide Pillow does columns first.) CPUs shrink
    in integers, twenty times as fast; all else is done in fp32. The one function that makes LR images, for training,
    evaluation and the command line alike.
    """
    if images.device.type == "cpu" and images.shape[2] >= 2 * height and images.shape[3] >= 2 * width:
        images = images.contiguous(memory_format=torch.channels_last)
        return F.interpolate(images, size=(height, width), mode="bicubic", antialias=True, align_corners=False)
    for size in ((images.shape[2], width), (height, width)):
        resized = F.interpolate(images.float(), size=size, mode="bicubic", antialias=True, align_corners=False)
        images = (resized + 0.5).floor().clamp(0, 255).to(torch.uint8)  # halves go up, as in Pillow
    return images


def to_unit(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 -> [-1,1], channels last in memory."""
    images = images.contiguous(memory_format=torch.channels_last).to(dtype)
    return images.div_(127.5).sub_(1)


def to_uint8(images: Tensor) -> Tensor:
    """[-1,1] -> uint8, clamped and rounded."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def patches(images: Tensor, side: int, corners: NDArray[np.float64]) -> Tensor:
    """The square of `side` pixels of each image (N,3,H,W) at its own corner, (N,2) in [0,1) of the free range."""
    rows, columns = (int(images.shape[d]) - side + 1 for d in (2, 3))
    return torch.stack([
        image[:, (y := int(v * rows)) : y + side, (x := int(u * columns)) : x + side]
        for image, (v, u) in zip(images, corners, strict=True)
    ])  # fmt: skip


def make_pair(hr: Tensor, flips: NDArray[np.bool_], scale: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """HR (N,3,H,W) uint8 -> (LR (N,3,H/scale,W/scale), HR) in [-1,1], both flipped where `flips` says so."""
    images = [image.flip(1) if is_flipped else image
              for image, is_flipped in zip(hr.permute(0, 2, 3, 1), flips, strict=True)]  # fmt: skip
    hr = torch.stack(images).permute(0, 3, 1, 2)  # as the decoder lays them: whole images are copied
    lr = bicubic(hr, hr.shape[2] // scale, hr.shape[3] // scale)
    return to_unit(lr, dtype), to_unit(hr, dtype)
