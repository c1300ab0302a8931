"""From a photograph's bytes to the bytes of a square HR image."""

import io
import warnings
from typing import Literal

from PIL import Image, ImageOps, UnidentifiedImageError, features
from PIL import __version__ as pillow_version

Crop = Literal["sega", "plain", "square"]
ZOOM = 1.15  # crop `sega` enlarges by this before it cuts, our reading of the paper's panels
MIN_SIDE = 16  # pixels; anything smaller is an icon, not a photograph
MAX_PIXELS = 100_000_000  # larger images are refused from their header, before they are decoded
JPEG = {"format": "JPEG", "quality": 95, "subsampling": 0}
ORIENTATION = 0x0112  # EXIF tag; 1 is upright


class UnusableImage(Exception):
    """An image that cannot be used, and why."""


def hr_bytes(data: bytes, crop: Crop, size: int) -> bytes:
    """JPEG bytes of the `size` x `size` HR image made from one photograph.

    A photograph that has this size and is an upright RGB JPEG already is kept byte for byte. Raises UnusableImage.
    """
    with _opened(data) as image:
        is_upright = image.getexif().get(ORIENTATION, 1) == 1
        if image.size == (size, size) and image.format == "JPEG" and image.mode == "RGB" and is_upright:
            _loaded(image)
            return data
        rgb = _loaded(image)
    out = io.BytesIO()
    (rgb if rgb.size == (size, size) else CROPS[crop](rgb, size)).save(out, **JPEG)  # type: ignore[arg-type]
    return out.getvalue()


def decode(data: bytes, min_side: int = MIN_SIDE) -> Image.Image:
    """An upright 8-bit RGB image from the bytes of a file; raises UnusableImage."""
    with _opened(data, min_side) as image:
        return _loaded(image)


def sega(image: Image.Image, size: int) -> Image.Image:
    """Enlarge to 1.15 x `size`, aspect squashed, and cut the centre."""
    side = round(ZOOM * size)
    corner = (side - size) // 2
    zoomed = image.resize((side, side), Image.Resampling.BICUBIC)
    return zoomed.crop((corner, corner, corner + size, corner + size))


def plain(image: Image.Image, size: int) -> Image.Image:
    """The whole image, aspect squashed."""
    return image.resize((size, size), Image.Resampling.BICUBIC)


def square(image: Image.Image, size: int) -> Image.Image:
    """The largest centred square."""
    return ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)


CROPS = {"sega": sega, "plain": plain, "square": square}


def versions() -> dict[str, str | None]:
    """What made the bytes: another Pillow or libjpeg may round differently."""
    return {"pillow": pillow_version, "libjpeg": features.version("jpg"), "turbo": features.version("libjpeg_turbo")}


def _opened(data: bytes, min_side: int = MIN_SIDE) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # our own limit on pixels stands below
            image = Image.open(io.BytesIO(data))
    except Image.DecompressionBombError:
        raise UnusableImage(f"its header claims far more than the limit of {MAX_PIXELS:,} pixels") from None
    except (OSError, UnidentifiedImageError, ValueError, SyntaxError) as error:
        raise UnusableImage(f"not an image that can be read ({type(error).__name__})") from None
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise UnusableImage(f"{width}x{height} pixels, above the limit of {MAX_PIXELS:,}")
    if min(width, height) < min_side:
        raise UnusableImage(f"{width}x{height} pixels; at least {min_side}x{min_side} are needed")
    return image


def _loaded(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, SyntaxError, IndexError, EOFError, Image.DecompressionBombError) as error:
        raise UnusableImage(f"damaged ({error})") from None
