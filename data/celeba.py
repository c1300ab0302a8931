"""What is known of CelebA: its published archive, and the official lists that stand beside it, each line checked."""

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from sega_dist.data.sources import Source
from sega_dist.errors import UserError

T = TypeVar("T")
IMAGES = 202_599
IDENTITIES = 10_177
ARCHIVE = ("img_align_celeba.zip", 1_443_490_838, "00d2c5bc6d35e252742224ab0c1e8fcb")  # name, bytes, md5
PARTITION, IDENTITY, BOXES = "list_eval_partition.txt", "identity_CelebA.txt", "list_bbox_celeba.txt"

Box = tuple[int, int, int, int]  # left, top, width, height in pixels


def doubt(source: Source) -> str:
    """Why a file that bears the name of CelebA's archive is not the published one; empty where nothing is wrong."""
    name, size, md5 = ARCHIVE
    if source.path.name != name or len(source.names) != IMAGES:
        return ""
    found = source.path.stat().st_size
    if found != size:
        return f"{source.path} has {found:,} bytes, the published {name} has {size:,}"
    with source.path.open("rb") as file:
        found_md5 = hashlib.file_digest(file, "md5").hexdigest()
    return "" if found_md5 == md5 else f"{source.path} has md5 {found_md5}, the published {name} has {md5}"


def read_partition(source: Path, lists: Path | None) -> dict[str, int]:
    """CelebA's official split, file name -> 0 train, 1 val, 2 test."""
    return _read(_found(PARTITION, source, lists, "split official"), r"([012])", int, "name 0|1|2")


def read_identities(source: Path, lists: Path | None) -> dict[str, int]:
    """Who is shown, file name -> number of a person from 1."""
    identities = _read(_found(IDENTITY, source, lists, "split identity"), r"([1-9]\d{0,8})", int, "name identity")
    if len(identities) == IMAGES and max(identities.values()) > IDENTITIES:
        raise UserError(f"{IDENTITY} names identity {max(identities.values())}; CelebA has {IDENTITIES}")
    return identities


def read_boxes(source: Path, lists: Path | None) -> dict[str, Box]:
    """The face of each image in the wild, file name -> box."""

    def box(text: str) -> Box:
        left, top, width, height = map(int, text.split())
        return left, top, width, height

    path = _found(BOXES, source, lists, "crop wild")
    return _read(path, r"(\d{1,6}\s+\d{1,6}\s+\d{1,6}\s+\d{1,6})", box, "name left top width height", head=2)


def has_identities(source: Path, lists: Path | None) -> bool:
    return any((folder / IDENTITY).is_file() for folder in _folders(source, lists))


def of(name: str, values: dict[str, T], file: str) -> T:
    """The value of an image by the name of its file; UserError where the list lacks it."""
    found = values.get(name.rsplit("/", 1)[-1])
    if found is None:
        raise UserError(f"{name} does not stand in {file}; this option is for CelebA's own files only")
    return found


def _folders(source: Path, lists: Path | None) -> list[Path]:
    return [lists] if lists else [source, source.parent]


def _found(name: str, source: Path, lists: Path | None, purpose: str) -> Path:
    folders = _folders(source, lists)
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"{purpose} needs {name}, not found in {', '.join(map(str, folders))}; give --lists DIR")


def _read(path: Path, pattern: str, value: Callable[[str], T], form: str, head: int = 0) -> dict[str, T]:
    """Lines of a name and its value; with a head, its first line says how many there are."""
    lines = path.read_text(errors="replace").splitlines()
    found: dict[str, T] = {}
    for number, line in enumerate(lines[head:], head + 1):
        match = re.fullmatch(rf"\s*(\S+)\s+{pattern}\s*", line)
        if match is None or match[1] in found:
            raise UserError(f"{path}, line {number}: expected '{form}', each name once, got {line[:60]!r}")
        found[match[1]] = value(match[2])
    if head and lines and lines[0].strip() != str(len(found)):
        raise UserError(f"{path} announces {lines[0].strip()[:20]} images and lists {len(found)}; fetch it again")
    if not found:
        raise UserError(f"{path} is empty; fetch it again")
    return found
