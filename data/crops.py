"""From a photograph's bytes to the bytes of a square HR image."""

import contextlib
import io
import struct
import warnings
import zlib
from typing import Literal

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageOps, features
from PIL import __version__ as pillow_version

Crop = Literal["sega", "plain", "square", "wild"]
ZOOM = 1.15  # crop `sega` enlarges by this before it cuts, our reading of the paper's panels
MIN_SIDE = 16  # pixels; anything smaller is an icon, not a photograph
FORMATS = ("JPEG", "PNG", "WEBP", "BMP")  # whatever a file's name says; some other decoders run programs
MAX_PIXELS = 100_000_000  # larger images are refused from their header, before they are decoded
EXACT = {"fastdct": False, "fastupsample": False}
JPEG = {"format": "JPEG", "quality": 95, "subsampling": 0}
# What Pillow's decoders raise on bytes that are not what they claim (UnidentifiedImageError is an OSError).
BROKEN = (OSError, ValueError, SyntaxError, EOFError, OverflowError, struct.error, zlib.error)
ORIENTATION = 0x0112  # EXIF tag; 1 is upright


class UnusableImage(Exception):
    """An image that cannot be used, and why."""


def hr_bytes(data: bytes, crop: Crop, size: int, box: tuple[int, int, int, int] | None = None) -> bytes:
    """JPEG bytes of the `size` x `size` HR image made from one photograph; crop wild takes the face in `box`.

    A photograph that has this size and is a faultless upright RGB JPEG already is kept byte for byte. Raises
    UnusableImage.
    """
    if _is_hr(data, size):
        return data
    with _opened(data) as image:
        rgb = _loaded(image, data)
    if rgb.size != (size, size):
        rgb = wild(rgb, size, box) if box else CROPS[crop](rgb, size)
    out = io.BytesIO()
    rgb.save(out, **JPEG)  # type: ignore[arg-type]
    return out.getvalue()


def hr_pixels(data: bytes) -> NDArray[np.uint8]:
    """(S,S,3) of a stored HR image: Pillow's pixels, in half its time; raises UnusableImage."""
    try:
        return np.asarray(simplejpeg.decode_jpeg(data, "RGB", **EXACT))
    except ValueError as error:
        raise UnusableImage(f"damaged ({error})") from None


def decode(data: bytes, min_side: int = MIN_SIDE) -> Image.Image:
    """An upright 8-bit RGB image from the bytes of a file; raises UnusableImage."""
    with _opened(data, min_side) as image:
        return _loaded(image, data)


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


def wild(image: Image.Image, size: int, box: tuple[int, int, int, int]) -> Image.Image:
    """The square around the middle of `box` (left, top, width, height) that holds it, moved inside the image."""
    left, top, width, height = box
    side = min(max(width, height), *image.size)
    if min(width, height) < MIN_SIDE or left + width > image.width or top + height > image.height:
        raise UnusableImage(f"its face box {box} is too small, or outside its {image.width}x{image.height} pixels")
    x, y = (min(max(start + (length - side) // 2, 0), whole - side)
            for start, length, whole in ((left, width, image.width), (top, height, image.height)))  # fmt: skip
    return image.resize((size, size), Image.Resampling.BICUBIC, box=(x, y, x + side, y + side))


CROPS = {"sega": sega, "plain": plain, "square": square}


def versions() -> dict[str, str | None]:
    """What made the bytes: another Pillow or libjpeg may round differently."""
    return {"pillow": pillow_version, "libjpeg": features.version("jpg"), "turbo": features.version("libjpeg_turbo")}


def _opened(data: bytes, min_side: int = MIN_SIDE) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # our own limit on pixels stands below
            image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError:
        raise UnusableImage(f"its header claims far more than the limit of {MAX_PIXELS:,} pixels") from None
    except BROKEN as error:
        raise UnusableImage(f"not an image that can be read ({type(error).__name__})") from None
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise UnusableImage(f"{width}x{height} pixels, above the limit of {MAX_PIXELS:,}")
    if min(width, height) < min_side:
        raise UnusableImage(f"{width}x{height} pixels; at least {min_side}x{min_side} are needed")
    return image


def _is_plain_jpeg(image: Image.Image) -> bool:
    """RGB, and upright."""
    return image.format == "JPEG" and image.mode == "RGB" and image.getexif().get(ORIENTATION, 1) == 1


def _is_hr(data: bytes, size: int) -> bool:
    """An upright RGB JPEG of this size that can be read to its end; an eighth of the side in grey shows it soonest."""
    with contextlib.suppress(ValueError):
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if (height, width) == (size, size) and colours in ("YCbCr", "RGB"):
            simplejpeg.decode_jpeg(data, "GRAY", min_height=1, min_width=1, min_factor=8)
            return b"Exif" not in data or _is_plain_jpeg(_opened(data))
    return False


def _loaded(image: Image.Image, data: bytes) -> Image.Image:
    """The pixels, upright and RGB."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a strange EXIF tag is no news to whoever shards a million images
            if _is_plain_jpeg(image):
                with contextlib.suppress(UnusableImage):  # Pillow forgives more
                    return Image.fromarray(hr_pixels(data))
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I;16"):  # Pillow's own conversion would clip all but the darkest to white
                upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
            return upright.convert("RGB")
    except (*BROKEN, LookupError, TypeError) as error:
        raise UnusableImage(f"damaged ({type(error).__name__}: {error})") from None
