"""Small faces to enlarge without a training: of shards, made small, or native ones of a folder."""

import hashlib
import io
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from sega_dist.data.crops import UnusableImage, decode
from sega_dist.data.images import ShardReader
from sega_dist.data.pairs import bicubic
from sega_dist.data.shards import MANIFEST, open_manifest
from sega_dist.data.sources import SUFFIXES
from sega_dist.errors import UserError
from sega_dist.pictures import to_tensor
from sega_dist.scoring import read_whole, whole

SAID = 5  # skipped images that are named one by one
GREY = ("1", "L", "LA", "I", "I;16", "I;16B", "F")  # modes of Pillow


@dataclass(frozen=True)
class TinyFaceConfig:
    subset: int = 0  # so many of a folder's faces, the same random ones each time; 0 = all
    resize: Literal["refuse", "squash"] = "refuse"  # of faces of another size: bring them to it, aspect squashed


class Faces:
    """LR faces by number, all of one side; HR of those that were made small."""

    def __init__(self, names: list[str], digest: str, small: Tensor | None = None, reader: ShardReader | None = None,
                 scale: int = 1, remarks: tuple[str, ...] = ()):  # fmt: skip
        self.names, self.digest, self.remarks = names, digest, remarks
        self._small, self._reader, self._scale = small, reader, scale

    def __len__(self) -> int:
        return len(self.names)

    def lr(self, numbers: range) -> Tensor:
        """(N,3,h,h) uint8."""
        if self._small is not None:
            return self._small[numbers.start : numbers.stop]
        hr = self.hr(numbers)
        assert hr is not None
        side = hr.shape[-1] // self._scale
        return bicubic(hr, side, side)

    def hr(self, numbers: range) -> Tensor | None:
        """(N,3,H,H) uint8; None of native ones."""
        return None if self._reader is None else read_whole(self._reader, numbers)[0]


def open_faces(source: Path, split: str, scale: int, side: int, tinyface: TinyFaceConfig, images: int) -> Faces:
    """The faces to be enlarged `scale` times to `side` pixels; UserError where there are none of that size."""
    if tinyface.subset < 0:
        raise UserError("tinyface.subset must be 0 or more")
    if (source / MANIFEST).is_file():
        return _of_shards(source, split, scale, side, images)
    return _of_folder(source, side // scale, tinyface, images, f"of {side} pixels at x{scale}")


def _of_shards(source: Path, split: str, scale: int, side: int, images: int) -> Faces:
    reader = ShardReader(open_manifest(source), split)
    if reader.manifest.size != side:
        size = reader.manifest.size
        raise UserError(
            f"{source} holds images of side {size}, the GAN makes {side}: shard with --size {side}, or another GAN"
        )
    names = whole(reader, reader.name, range(min(images or len(reader), len(reader))))
    _check_names(source, names)
    return Faces(names, f"{reader.manifest.digest} {split} {len(names)}", reader=reader, scale=scale)


def _of_folder(source: Path, side: int, tinyface: TinyFaceConfig, images: int, what: str) -> Faces:
    files = _files(source)
    if tinyface.subset:
        files = sorted(random.Random(0).sample(files, min(tinyface.subset, len(files))))
    names, small, problems, grey = list[str](), list[Tensor](), list[str](), 0
    for file in files[: images or None]:
        name = str(file.relative_to(source)) if source.is_dir() else file.name
        if any("\ud800" <= character <= "\udfff" for character in name):
            problems.append(f"{name!r}: its name is not UTF-8; rename it")
            continue
        try:
            image, is_grey = _opened(file, side, tinyface.resize == "squash", what)
        except (UnusableImage, OSError) as error:
            problems.append(f"{file}: {error}")
            continue
        grey += is_grey
        names.append(name)
        small.append(image)
    if not names:
        raise UserError(problems[0])
    _check_names(source, names)
    pixels = torch.stack(small)
    digest = hashlib.sha256(pixels.numpy().tobytes() + "\n".join(names).encode()).hexdigest()
    return Faces(names, digest, pixels, remarks=tuple(_remarks(problems, grey)))


def _check_names(source: Path, names: list[str]) -> None:
    """UserError where results under these names would stand in one place, or outside their folder."""
    for name in names:
        if not Path(name).name or Path(name).is_absolute() or ".." in Path(name).parts:
            raise UserError(f"{source} holds an image called {name!r}: its result would stand in another folder")
    stems = Counter(str(Path(name).with_suffix("")) for name in names)
    if (stem := stems.most_common(1)[0])[1] > 1:
        raise UserError(f"{source} holds two images called {stem[0]}: their results would have one name")


def _files(source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise UserError(f"{source} does not exist; give an image, a folder of images, or shards")
    files = sorted(path for path in source.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not files:
        raise UserError(f"{source} holds no images ({', '.join(sorted(SUFFIXES))})")
    return files


def _opened(file: Path, side: int, is_squashed: bool, what: str) -> tuple[Tensor, bool]:
    """(3,side,side) uint8 and whether it is grey; UnusableImage for another size or shape, and for transparency."""
    data = file.read_bytes()
    image = decode(data, min_side=1)
    with Image.open(io.BytesIO(data)) as whole:
        mode = whole.mode
        is_clear = whole.has_transparency_data and whole.convert("RGBA").getchannel("A").getextrema() != (255, 255)
    if is_clear:
        raise UnusableImage("it has transparent pixels; lay it on a background first")
    if image.size != (side, side):
        if not is_squashed:
            width, height = image.size
            shape = "is not square" if width != height else "is of another size"
            raise UnusableImage(
                f"{width}x{height} pixels, which {shape}: a GAN {what} wants {side}x{side}; or give"
                " --tinyface.resize squash"
            )
        image = image.resize((side, side), Image.Resampling.BICUBIC)
    return to_tensor(image), mode in GREY


def _remarks(problems: list[str], grey: int) -> list[str]:
    said = [f"skipped {problem}" for problem in problems[:SAID]]
    if len(problems) > SAID:
        said.append(f"skipped {len(problems) - SAID} more")
    return said + ([f"{grey} of the faces are grey: searched as grey RGB"] if grey else [])
