"""How good an image is: PSNR by torchmetrics and SSIM, on 8-bit RGB and on luminance."""

import math

import torch
from torch import Tensor

# Stamped into every result.
PROTOCOL = {
    "color": "RGB, all channels; psnr_y and ssim_y on BT.601 studio-range luminance, not rounded",
    "quantise": "SR clamped and rounded to 8 bits, data range 255",
    "crop": 0,
    "ssim": "Gaussian window 11x11, sigma 1.5, population covariance, window inside the image, mean over channels",
    "averaging": "mean over images of each image's value",
}
RADIUS, SIGMA = 5, 1.5  # of the SSIM window: 3.5 sigma, rounded
C1, C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
NAMES = ("psnr", "ssim", "psnr_y", "ssim_y")


def luminance(images: Tensor) -> Tensor:
    """BT.601 studio-range Y in [16,235] of RGB (N,3,H,W) in [0,255]: (N,1,H,W)."""
    weights = images.new_tensor([65.481, 128.553, 24.966]).view(1, 3, 1, 1) / 255
    return 16 + (images * weights).sum(1, keepdim=True)


def scores(hr: Tensor, sr: Tensor) -> dict[str, Tensor]:
    """Each image's `NAMES` (N,); both (N,3,H,W) uint8. PSNR of identical images is infinite."""
    hr_y, sr_y = luminance(hr.double()), luminance(sr.double())
    return {"psnr": psnr(hr, sr), "ssim": ssim(hr, sr), "psnr_y": psnr(hr_y, sr_y), "ssim_y": ssim(hr_y, sr_y)}


def psnr(hr: Tensor, sr: Tensor) -> Tensor:
    """Each image's PSNR in dB (N,); both (N,C,H,W) in [0,255]."""
    from torchmetrics.functional.image import peak_signal_noise_ratio  # seconds: only where one is asked for

    values = peak_signal_noise_ratio(sr.float(), hr.float(), data_range=255.0, reduction="none", dim=(1, 2, 3))
    return values.reshape(len(hr))


def ssim(hr: Tensor, sr: Tensor) -> Tensor:
    """Each image's SSIM (N,) (Wang et al. 2004, equation 13), mean over windows inside it; both (N,C,H,W) in [0,255].

    In fp64: a window's variance is a small difference of large squares, and fp32 errs by 7e-4 where an image is bright
    and smooth. Image by image, which stays in a CPU's cache: a third of the time of torchmetrics' fp32.
    """
    return torch.stack([_similarity(a.double(), b.double()) for a, b in zip(hr, sr, strict=True)])


def _similarity(hr: Tensor, sr: Tensor) -> Tensor:
    """SSIM of one image (C,H,W)."""
    mean_hr, mean_sr, square_hr, square_sr, product = _windows(torch.stack([hr, sr, hr * hr, sr * sr, hr * sr]))
    means, squared_means = mean_hr * mean_sr, mean_hr * mean_hr + mean_sr * mean_sr
    structure = (2 * (product - means) + C2) / (square_hr + square_sr - squared_means + C2)
    return ((2 * means + C1) / (squared_means + C1) * structure).mean()


def _windows(maps: Tensor) -> Tensor:
    """Gaussian-weighted means over the windows inside (...,H,W): (...,H-10,W-10)."""
    weights = [math.exp(-0.5 * (k / SIGMA) ** 2) for k in range(-RADIUS, RADIUS + 1)]
    for axis in (-1, -2):
        size = maps.shape[axis] - 2 * RADIUS
        means = torch.zeros_like(maps.narrow(axis, 0, size))
        for k, weight in enumerate(weights):
            means.add_(maps.narrow(axis, k, size), alpha=weight / sum(weights))
        maps = means
    return maps
