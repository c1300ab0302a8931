"""Shards: tar files in WebDataset form, a binary index beside each, and one manifest; written, checked, verified."""

import dataclasses
import hashlib
import json
import os
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import webdataset

from sega_dist.config import digest
from sega_dist.errors import UserError, closest

FORMAT = 1
MANIFEST = "manifest.json"
INDEX = np.dtype([("offset", "<u8"), ("length", "<u4"), ("crc32", "<u4")])  # one entry a tar member, in order
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
class Manifest:
    """What a data set consists of; its digest names the data set."""

    folder: Path
    size: int  # HR side
    crop: str
    split: str
    seed: int
    skipped: int
    versions: dict[str, str | None]
    sides: dict[str, tuple[Shard, ...]]

    @property
    def digest(self) -> str:
        return digest(self._values())

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
        (self.folder / MANIFEST).write_text(json.dumps(self._values(), indent=1) + "\n")

    def _values(self) -> dict[str, Any]:
        values = dataclasses.asdict(self)
        del values["folder"]
        return {"format": FORMAT, **values}


def index_name(shard_name: str) -> str:
    return shard_name.removesuffix(".tar") + ".idx"


def open_manifest(folder: Path) -> Manifest:
    """Read a data set's manifest and check that each of its files is there and whole in size; UserError otherwise."""
    path = folder / MANIFEST
    if not path.is_file():
        raise UserError(
            f"{folder} is not a folder of shards: no {MANIFEST}; make one with: sega-dist shard SOURCE {folder}"
        )
    try:
        values = json.loads(path.read_text())
        version = values.pop("format")
        if version != FORMAT:
            raise UserError(f"{path} has format {version}, this version reads {FORMAT}; shard the images again")
        sides = {side: tuple(Shard(**shard) for shard in shards) for side, shards in values.pop("sides").items()}
        manifest = Manifest(folder=folder, sides=sides, **values)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}); shard the images again") from None
    for shard in (shard for side in manifest.sides.values() for shard in side):
        problem = _quick_problem(folder, shard)
        if problem:
            raise UserError(f"{problem}; restore the file, or shard the images again")
    return manifest


def verify(manifest: Manifest) -> Iterator[tuple[Shard, str | None]]:
    """Each shard with what is wrong with it (None: nothing), from the digests of every byte."""
    for shard in (shard for side in manifest.sides.values() for shard in side):
        path, problem = manifest.folder / shard.name, None
        if file_sha256(path) != shard.sha256:
            problem = f"{path} differs from its digest in the manifest"
        elif index_bytes(path) != (manifest.folder / shard.index_name).read_bytes():
            problem = f"{manifest.folder / shard.index_name} does not describe {shard.name}"
        yield shard, problem


def write_shard(path: Path, samples: Iterable[tuple[str, bytes, dict[str, Any]]]) -> Shard:
    """Write (key, JPEG bytes, metadata) samples to a tar and its index: same samples, same bytes."""
    count = 0
    with path.open("wb") as file:
        with webdataset.TarWriter(file, user="sega-dist", group="sega-dist", mode=0o444, mtime=0) as writer:
            for key, image, metadata in samples:
                writer.write({"__key__": key, "jpg": image, "json": json.dumps(metadata, sort_keys=True).encode()})
                count += 1
        file.flush()
        os.fsync(file.fileno())
    index = index_bytes(path)
    (path.parent / index_name(path.name)).write_bytes(index)
    return Shard(path.name, count, path.stat().st_size, file_sha256(path), hashlib.sha256(index).hexdigest())


def index_bytes(path: Path) -> bytes:
    """Offset, length and crc32 of every member of a tar."""
    entries = []
    with tarfile.open(path) as tar, path.open("rb") as file:
        for member in tar:
            file.seek(member.offset_data)
            entries.append((member.offset_data, member.size, zlib.crc32(file.read(member.size))))
    return np.array(entries, dtype=INDEX).tobytes()


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _quick_problem(folder: Path, shard: Shard) -> str | None:
    """What a start can afford to check: names, sizes, and the digest of the small index."""
    path, index = folder / shard.name, folder / shard.index_name
    if Path(shard.name).name != shard.name:
        return f"the manifest of {folder} names a shard outside its folder: {shard.name!r}"
    for file in (path, index):
        if not file.is_file():
            return f"shard file {file} is missing"
    if path.stat().st_size != shard.bytes:
        return f"shard {path} has {path.stat().st_size} bytes instead of {shard.bytes}: it was cut short or replaced"
    data = index.read_bytes()
    if hashlib.sha256(data).hexdigest() != shard.index_sha256 or len(data) != INDEX.itemsize * MEMBERS * shard.samples:
        return f"index {index} is damaged"
    return None
