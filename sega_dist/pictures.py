"""Pictures that people look at: rows of faces side by side, with titles and scores."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

MARGIN, TITLE, CAPTION = 6, 26, 20  # pixels
INK, PAPER, GREY = (20, 20, 20), (255, 255, 255), (110, 110, 110)


@dataclass(frozen=True)
class Panel:
    """One picture of a row: (3,h,w) uint8 and a short line below it."""

    image: Tensor
    caption: str = ""


def grid(titles: list[str], rows: list[list[Panel]], side: int = 256) -> Image.Image:
    """Rows of panels, `side` wide, under titles; small images keep hard pixel edges, so that LR looks like LR."""
    high = max((panel.image.shape[1] * side // panel.image.shape[2] for row in rows for panel in row), default=side)
    height, width = TITLE + len(rows) * (high + CAPTION + MARGIN), MARGIN + len(titles) * (side + MARGIN)
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    title_font, caption_font = ImageFont.load_default(16), ImageFont.load_default(13)
    for column, title in enumerate(titles):
        x, _ = _corner(0, column, side, high)
        draw.text((x + side // 2, TITLE // 2), title, INK, title_font, anchor="mm")
        for number, row in enumerate(rows):
            _, y = _corner(number, column, side, high)
            sheet.paste(_shown(row[column].image, side), (x, y))
            draw.text((x + side // 2, y + high + CAPTION // 2), row[column].caption, GREY, caption_font, anchor="mm")
    return sheet


def cut(sheet: Image.Image, side: int = 256) -> list[list[Image.Image]]:
    """The inverse of `grid`: its panels as they are shown, row by row; ValueError for what is not such a sheet."""
    columns, right = divmod(sheet.width - MARGIN, side + MARGIN)
    rows, below = divmod(sheet.height - TITLE, side + CAPTION + MARGIN)
    if right or below or columns < 1 or rows < 1:
        raise ValueError(f"{sheet.width}x{sheet.height} pixels are no grid of panels of {side}")
    corners = [[_corner(row, column, side, side) for column in range(columns)] for row in range(rows)]
    return [[sheet.crop((x, y, x + side, y + side)) for x, y in row] for row in corners]


def curves(entries: list[dict[str, Any]], path: Path) -> None:
    """Losses, logits, and preview PSNR or R1 against thousands of images, from the lines of stats.jsonl, to a PNG."""
    panels = {
        "generator": ["loss_g", "loss_content", "loss_pixel"],
        "discriminator": ["loss_d", "loss_adv"],
        "logits": ["d_real", "d_fake"],
    }
    if any("r1" in entry for entry in entries):  # of a face GAN, which has no PSNR
        panels["R1"] = ["r1"]
    else:
        panels["preview PSNR, dB"] = ["preview_psnr", "preview_psnr_bicubic"]
    from matplotlib.figure import Figure  # half a second: only where curves are drawn

    figure = Figure(figsize=(12, 3.2), layout="constrained")
    for axis, (title, names) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for name in names:
            points = [(entry["nimg"] / 1000, entry[name]) for entry in entries if name in entry]
            if points:
                axis.plot(*zip(*points, strict=True), label=name, marker="." if len(points) < 20 else None)
        axis.set_title(title)
        axis.set_xlabel("kimg")
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize="small")
    figure.savefig(path, dpi=110)


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB image as (3,H,W) uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def to_image(pixels: Tensor) -> Image.Image:
    """(3,H,W) uint8 as an RGB image."""
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().contiguous().numpy())


def _corner(row: int, column: int, side: int, high: int) -> tuple[int, int]:
    """Where a panel of a sheet, `side` wide and `high`, begins, in pixels from the left and from above."""
    return MARGIN + column * (side + MARGIN), TITLE + row * (high + CAPTION + MARGIN)


def _shown(pixels: Tensor, side: int) -> Image.Image:
    size = (pixels.shape[1] * side // pixels.shape[2], side)
    enlarged = F.interpolate(pixels[None].float().cpu(), size=size, mode="nearest-exact")
    return to_image(enlarged[0].to(torch.uint8))
