"""PSNR and SSIM, on RGB and on luminance, are scikit-image's in fp64."""

import math
from pathlib import Path

import pytest
import torch
from conftest import photographs, portraits
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from sega_dist.data.pairs import bicubic
from sega_dist.metrics import luminance, scores

NEAR = {"psnr": 1e-4, "ssim": 1e-9, "psnr_y": 1e-4, "ssim_y": 1e-9}  # PSNR in dB: a sum of squares in fp32
WINDOW = {"data_range": 255, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
BT601 = torch.tensor([65.481, 128.553, 24.966], dtype=torch.float64) / 255


def enlarged(hr: torch.Tensor) -> torch.Tensor:
    """Bicubic x4 SR."""
    side = hr.shape[2]
    return bicubic(bicubic(hr, side // 4, side // 4), side, side)


def check(hr: torch.Tensor, sr: torch.Tensor) -> None:
    found = scores(hr, sr)
    for i in range(len(hr)):
        a, b = (images[i].permute(1, 2, 0).double() for images in (hr, sr))
        a_y, b_y = (16 + image @ BT601 for image in (a, b))
        expected = {
            "psnr": peak_signal_noise_ratio(a.numpy(), b.numpy(), data_range=255),
            "ssim": structural_similarity(a.numpy(), b.numpy(), channel_axis=2, **WINDOW),
            "psnr_y": peak_signal_noise_ratio(a_y.numpy(), b_y.numpy(), data_range=255),
            "ssim_y": structural_similarity(a_y.numpy(), b_y.numpy(), **WINDOW),
        }
        for name, value in expected.items():
            assert found[name][i].item() == pytest.approx(value, abs=NEAR[name], rel=0), name


@pytest.mark.parametrize("size", [96, 256])
def test_scores_are_scikit_images_on_procedural_faces(size: int):
    hr = portraits(3, size)
    check(hr, enlarged(hr))


def test_scores_are_scikit_images_on_real_faces(real_data: Path):
    hr = photographs(real_data, 8)
    check(hr, enlarged(hr))


@pytest.mark.parametrize("level", [2, 128, 253])
def test_scores_are_scikit_images_where_fp32_would_err(level: int):
    """The variance of a bright image with little contrast is a small difference of large squares."""
    hr, noise = torch.full((1, 3, 96, 80), level, dtype=torch.uint8), torch.randint(-2, 3, (1, 3, 96, 80))
    check(hr, (hr + noise).to(torch.uint8))
    check((hr + noise).to(torch.uint8), (hr - noise).to(torch.uint8))


@pytest.mark.parametrize(("error", "psnr"), [(1, 48.1308), (10, 28.1308)])
def test_psnr_of_a_constant_error(error: int, psnr: float):
    hr = torch.full((1, 3, 32, 32), 100, dtype=torch.uint8)
    assert scores(hr, hr + error)["psnr"].item() == pytest.approx(psnr, abs=1e-4)
    assert math.isinf(scores(hr, hr)["psnr"].item())
    assert scores(hr, hr)["ssim"].item() == pytest.approx(1)


def test_luminance_is_studio_range():
    black_white = torch.tensor([0.0, 255.0]).view(2, 1, 1, 1).expand(2, 3, 1, 1)
    torch.testing.assert_close(luminance(black_white).flatten(), torch.tensor([16.0, 235.0]), atol=1e-3, rtol=0)
