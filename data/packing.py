"""From a source and a recipe to shards: the plan of each shard, which any process can carry out, in any order."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sega_dist.data import celeba, splits
from sega_dist.data.celeba import Box
from sega_dist.data.crops import Crop, UnusableImage, hr_bytes
from sega_dist.data.shards import Recipe, Shard, write_shard
from sega_dist.data.sources import Source, key_function, read_images


@dataclass(frozen=True)
class Plan:
    """One shard to write: where from, what, and how."""

    source: Path
    side: str
    name: str
    samples: tuple[tuple[str, str, Box | None], ...]  # name in the source, key in the shard, face box of crop wild
    crop: Crop
    size: int


@dataclass(frozen=True)
class Written:
    """One shard, and the images that could not go into it."""

    shard: Shard
    skipped: list[dict[str, str]]


class Plans:
    """The shards of a data set in order; each is made when it is asked for."""

    def __init__(self, source: Source, recipe: Recipe, lists: Path | None):
        self.source, self.recipe = source, recipe
        self.key = key_function(source.names)
        self.boxes = celeba.read_boxes(source.path, lists) if recipe.crop == "wild" else None
        self.sides = _split(source, recipe, lists)
        self.places = [(side, number) for side, names in self.sides.items()
                       for number in range(-(-len(names) // recipe.shard_size))]  # fmt: skip
        self.identities: dict[str, int] = {}
        if celeba.has_identities(source.path, lists):
            identities = celeba.read_identities(source.path, lists)
            if all(name.rsplit("/", 1)[-1] in identities for name in source.names):
                self.identities = splits.people(self.sides, identities)
        self.digest = self._digest()

    def _digest(self) -> str:
        """sha256 of what stands where, and of the boxes: sources and lists that give the same data set agree in it."""
        total = hashlib.sha256()
        for side, names in self.sides.items():
            for name in names:
                total.update(f"{side} {name} {self.box(name)}\n".encode(errors="surrogateescape"))
        return total.hexdigest()

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Plan:
        side, number = self.places[index]
        start = number * self.recipe.shard_size
        names = self.sides[side][start : start + self.recipe.shard_size]
        samples = tuple((name, self.key(name), self.box(name)) for name in names)
        return Plan(self.source.path, side, self.name(index), samples, self.recipe.crop, self.recipe.size)

    def name(self, index: int) -> str:
        """Of the tar."""
        side, number = self.places[index]
        return f"{side}-{number:05d}.tar"

    def count(self, index: int) -> int:
        """How many images should stand in it."""
        side, number = self.places[index]
        return min(self.recipe.shard_size, len(self.sides[side]) - number * self.recipe.shard_size)

    def box(self, name: str) -> Box | None:
        """Of the face, for crop wild; UserError where CelebA's list lacks the image."""
        return None if self.boxes is None else celeba.of(name, self.boxes, celeba.BOXES)


def pack(plan: Plan, folder: Path) -> Written:
    """Write one shard into `folder`."""
    skipped: list[dict[str, str]] = []
    how = {name: (key, box) for name, key, box in plan.samples}

    def samples() -> Iterator[tuple[str, bytes, dict[str, Any]]]:
        for name, data in read_images(plan.source, how):
            key, box = how[name]
            try:
                if data is None:
                    raise UnusableImage("cannot be read from its source")
                yield key, hr_bytes(data, plan.crop, plan.size, box), {"name": name}
            except UnusableImage as error:
                skipped.append({"name": name, "split": plan.side, "reason": str(error)})

    return Written(write_shard(folder / plan.name, samples()), skipped)


def sample_bytes(plans: Plans, count: int = 12) -> float:
    """Mean bytes of an image as it will stand in a shard, from a few images of the source."""
    names = plans.source.names[:: max(1, len(plans.source.names) // count)]
    sizes = []
    for name, data in read_images(plans.source.path, names):
        try:
            if data is not None:
                sizes.append(len(hr_bytes(data, plans.recipe.crop, plans.recipe.size, plans.box(name))))
        except UnusableImage:
            continue
    return sum(sizes) / len(sizes) if sizes else 0.0


def _split(source: Source, recipe: Recipe, lists: Path | None) -> dict[str, list[str]]:
    names = source.names
    if recipe.split == "sega":
        return splits.sega(names, recipe.seed)
    if recipe.split == "official":
        return splits.official(names, celeba.read_partition(source.path, lists))
    if recipe.split == "identity":
        return splits.identity(names, celeba.read_identities(source.path, lists), recipe.seed)
    return {recipe.split: list(names)}
