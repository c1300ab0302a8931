"""Shards: tar files in WebDataset form, a binary index beside each, and one manifest; written, opened, verified."""

import contextlib
import dataclasses
import hashlib
import json
import os
import socket
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import webdataset

from sega_dist.config import digest
from sega_dist.data.crops import Crop
from sega_dist.data.splits import Split
from sega_dist.errors import UserError, closest

FORMAT = 2
MANIFEST = "manifest.json"
INDEX = np.dtype([("offset", "<u8"), ("length", "<u4"), ("crc32", "<u4")])  # one entry a tar member, in order
HEADER = {"user": "sega-dist", "group": "sega-dist", "mode": 0o444, "mtime": 0}  # of every member
MEMBERS = 2  # of a sample: its image and its JSON


@dataclass(frozen=True)
class Shard:
    """One tar of a data set."""

    name: str
    samples: int
    bytes: int
    sha256: str
    index_sha256: str

    @property
    def index_name(self) -> str:
        return index_name(self.name)


@dataclass(frozen=True)
class Recipe:
    """How photographs become a data set: the same source and recipe give the same bytes."""

    split: Split = "sega"
    crop: Crop = "sega"
    size: int = 256  # HR side
    seed: int = 0
    shard_size: int = 1000


@dataclass(frozen=True)
class Manifest:
    """What a data set consists of; its digest names the data set."""

    folder: Path
    recipe: Recipe
    source: str  # sha256 of which image stands where; not of their contents
    skipped: int
    identities: dict[str, int]  # people on each side, and on two, where that is known
    versions: dict[str, str | None]
    sides: dict[str, tuple[Shard, ...]]

    @property
    def digest(self) -> str:
        return digest(self._values())

    @property
    def size(self) -> int:
        return self.recipe.size

    @property
    def shards(self) -> list[Shard]:
        """Those of all sides."""
        return [shard for side in self.sides.values() for shard in side]

    def __str__(self) -> str:
        """`3,000 images (train 2,400, test 600) in 4 shards`."""
        sides = ", ".join(f"{side} {self.images(side):,}" for side in self.sides)
        return f"{sum(shard.samples for shard in self.shards):,} images ({sides}) in {len(self.shards)} shards"

    def images(self, side: str) -> int:
        """How many images stand on one side of the split."""
        return sum(shard.samples for shard in self.side(side))

    def side(self, name: str) -> tuple[Shard, ...]:
        """The shards of one side; raises UserError where the data set has no such side."""
        if name not in self.sides:
            have = ", ".join(self.sides)
            raise UserError(f"{self.folder} has no split {name!r}{closest(name, list(self.sides))} (it has: {have})")
        return self.sides[name]

    def save(self) -> None:
        write_whole(self.folder / MANIFEST, (json.dumps(self._values(), indent=1) + "\n").encode())

    def _values(self) -> dict[str, Any]:
        values = dataclasses.asdict(self)
        del values["folder"]
        return {"format": FORMAT, **values}


def index_name(shard_name: str) -> str:
    return shard_name.removesuffix(".tar") + ".idx"


def open_manifest(folder: Path) -> Manifest:
    """Read a data set's manifest and check that each of its files is there and whole in size; UserError otherwise."""
    manifest = read_manifest(folder)
    for _, problem in verify(manifest, is_quick=True):
        if problem:
            raise UserError(f"{problem}; sega-dist repair {folder} SOURCE writes it anew")
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """A data set's manifest, whatever became of its shards; UserError where it is missing or damaged."""
    path = folder / MANIFEST
    if not path.is_file():
        raise UserError(
            f"{folder} is not a folder of shards: no {MANIFEST}; make one with: sega-dist shard SOURCE {folder}"
        )
    return parse_manifest(path.read_bytes(), folder)


def parse_manifest(text: bytes, folder: Path) -> Manifest:
    """The data set that `text` describes; raises UserError."""
    path = folder / MANIFEST
    try:
        values = json.loads(text)
        version = values.pop("format")
        if version != FORMAT:
            raise UserError(f"{path} has format {version}, this version reads {FORMAT}; shard the images again")
        sides = {side: tuple(Shard(**shard) for shard in shards) for side, shards in values.pop("sides").items()}
        manifest = Manifest(folder=folder, recipe=Recipe(**values.pop("recipe")), sides=sides, **values)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}); shard the images again") from None
    for shard in manifest.shards:
        words = shard.name, shard.sha256, shard.index_sha256
        numbers = shard.samples, shard.bytes, manifest.size
        if not all(isinstance(word, str) for word in words) or not all(isinstance(number, int) for number in numbers):
            raise UserError(f"{path} is damaged (at {shard}); shard the images again")
        if Path(shard.name).name != shard.name:
            raise UserError(f"the manifest of {folder} names a shard outside its folder: {shard.name!r}")
    return manifest


def verify(manifest: Manifest, is_quick: bool = False) -> Iterator[tuple[Shard, str]]:
    """Each shard with what is wrong with it (empty: nothing): by sizes and its index, or by every byte."""
    for shard in manifest.shards:
        path = manifest.folder / shard.name
        try:
            problem = _quick_problem(manifest.folder, shard)
            if not problem and not is_quick and file_sha256(path) != shard.sha256:
                problem = f"shard {path} differs from its digest in the manifest"
        except OSError as error:  # a bad sector
            problem = f"shard {path} cannot be read: {error.strerror}"
        yield shard, problem


def write_shard(path: Path, samples: Iterable[tuple[str, bytes, dict[str, Any]]]) -> Shard:
    """Write (key, JPEG bytes, metadata) samples to a tar and its index, same samples, same bytes."""
    entries = []
    with _made_whole(path) as file, webdataset.TarWriter(file, **HEADER, encoder=False) as writer:
        writer.tarstream.format = tarfile.USTAR_FORMAT  # one header a member
        for key, image, metadata in samples:
            text, header = json.dumps(metadata, sort_keys=True).encode(), writer.tarstream.offset
            writer.write({"__key__": key, "jpg": image, "json": text})
            for data in (image, text):
                entries.append((header + tarfile.BLOCKSIZE, len(data), zlib.crc32(data)))
                header += tarfile.BLOCKSIZE * (1 - (-len(data) // tarfile.BLOCKSIZE))
    index = np.array(entries, INDEX).tobytes()
    write_whole(path.parent / index_name(path.name), index)
    samples_written = len(entries) // MEMBERS
    return Shard(path.name, samples_written, path.stat().st_size, file_sha256(path), hashlib.sha256(index).hexdigest())


def write_whole(path: Path, data: bytes) -> None:
    """Write a file that is whole whenever it is seen, whoever else writes the same."""
    with _made_whole(path) as file:
        file.write(data)


@contextlib.contextmanager
def _made_whole(path: Path) -> Iterator[BinaryIO]:
    """A file beside `path` to write to, which takes its place at the end."""
    partial = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk does not say where
        raise
    finally:
        partial.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Put on the disk which names stand in `folder`."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _quick_problem(folder: Path, shard: Shard) -> str:
    """What a start can afford to check: sizes, and the digest of the small index."""
    path, index = folder / shard.name, folder / shard.index_name
    for file in (path, index):
        if not file.is_file():
            return f"shard file {file} is missing"
    if path.stat().st_size != shard.bytes:
        return f"shard {path} has {path.stat().st_size} bytes instead of {shard.bytes}: it was cut short or replaced"
    data = index.read_bytes()
    if hashlib.sha256(data).hexdigest() != shard.index_sha256 or len(data) != INDEX.itemsize * MEMBERS * shard.samples:
        return f"index {index} is damaged"
    return ""
