"""How good an image is: PSNR and SSIM by torchmetrics, on 8-bit RGB and on luminance."""

from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

# Stamped into every result.
PROTOCOL = {
    "color": "RGB, all channels; psnr_y and ssim_y on BT.601 studio-range luminance, not rounded",
    "quantise": "SR clamped and rounded to 8 bits, data range 255",
    "crop": 0,
    "ssim": "Gaussian window 11x11, sigma 1.5, population covariance, window inside the image, mean over channels",
    "averaging": "mean over images of each image's value",
}
RADIUS = 5  # of the SSIM window: 3.5 sigma, rounded
NAMES = ("psnr", "ssim", "psnr_y", "ssim_y")


def luminance(images: Tensor) -> Tensor:
    """BT.601 studio-range Y in [16,235] of RGB (N,3,H,W) in [0,255]: (N,1,H,W)."""
    weights = images.new_tensor([65.481, 128.553, 24.966]).view(1, 3, 1, 1) / 255
    return 16 + (images * weights).sum(1, keepdim=True)


def scores(hr: Tensor, sr: Tensor) -> dict[str, Tensor]:
    """Each image's `NAMES` (N,); both (N,3,H,W) uint8. PSNR of identical images is infinite.

    In fp32: SSIM's windows in fp64 take twenty times as long on a CPU and change the fifth decimal.
    """
    hr, sr = hr.float(), sr.float()
    hr_y, sr_y = luminance(hr), luminance(sr)
    return {"psnr": psnr(hr, sr), "ssim": _ssim(hr, sr), "psnr_y": psnr(hr_y, sr_y), "ssim_y": _ssim(hr_y, sr_y)}


def psnr(hr: Tensor, sr: Tensor) -> Tensor:
    """Each image's PSNR in dB (N,); both (N,C,H,W) in [0,255]."""
    values = peak_signal_noise_ratio(sr.float(), hr.float(), data_range=255.0, reduction="none", dim=(1, 2, 3))
    return values.reshape(len(hr))


def _ssim(hr: Tensor, sr: Tensor) -> Tensor:
    """Mean over windows inside the image (Wang et al. 2004); torchmetrics' own mean counts mirrored borders too."""
    _, per_pixel = structural_similarity_index_measure(
        sr, hr, sigma=1.5, data_range=255.0, reduction="none", return_full_image=True
    )
    return per_pixel[:, :, RADIUS:-RADIUS, RADIUS:-RADIUS].mean((1, 2, 3))
