"""Figures 4 and 5 of the paper: faces by every method, with a part of each enlarged."""

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from sega_dist.pictures import Panel, grid
from sega_dist.scoring import Scores

SIDE = 256  # pixels of a shown face
RED, THICK = (220, 40, 40), 2  # of the box


def figure(found: Scores, methods: dict[str, str], zoom: tuple[float, float, float]) -> Image.Image:
    """Rows of faces: HR, LR, then `methods` with PSNR and SSIM below.

    `methods` has a column of the scores by the title it gets; `zoom` is left, top and width of a 2:1 box.
    """
    titles = ["HR", "LR", *methods]
    rows = []
    for i in range(len(found.shown["HR"])):
        captions = {"HR": "", "LR": f"{found.shown['LR'].shape[-1]}x{found.shown['LR'].shape[-2]}"}
        shown = {"HR": "HR", "LR": "LR"} | methods
        for title, method in methods.items():
            psnr, ssim = found.values[i, found.methods.index(method), :2].tolist()
            captions[title] = f"{psnr:.2f} dB / {ssim:.3f}"
        rows.append([Panel(with_detail(found.shown[shown[title]][i], zoom), captions[title]) for title in titles])
    return grid(titles, rows)


def with_detail(image: Tensor, zoom: tuple[float, float, float]) -> Tensor:
    """(3,S,S) uint8 -> (3,384,256): the image with a box drawn, and what is in the box below it; pixels stay hard."""
    left, top, width = (round(SIDE * share) for share in zoom)
    height = max(1, width // 2)
    left, top = min(left, SIDE - width), min(top, SIDE - height)
    large = F.interpolate(image[None].float(), size=(SIDE, SIDE), mode="nearest-exact")[0]
    part = large[None, :, top : top + height, left : left + width]
    detail = F.interpolate(part, size=(SIDE // 2, SIDE), mode="nearest-exact")[0]
    boxed = large.clone()
    color = torch.tensor(RED, dtype=boxed.dtype).view(3, 1, 1)
    inner = large[:, top + THICK : top + height - THICK, left + THICK : left + width - THICK]
    boxed[:, top : top + height, left : left + width] = color
    boxed[:, top + THICK : top + height - THICK, left + THICK : left + width - THICK] = inner
    return torch.cat([boxed, detail], 1).to(torch.uint8)
