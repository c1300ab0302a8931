"""Which image is for training and which for testing."""

from collections import Counter
from collections.abc import Sequence
from typing import Literal

from sega_dist.data import celeba, positions

Split = Literal["sega", "official", "identity", "train", "test"]
SIDES = ("train", "val", "test", "preview")  # what a split may consist of, in the order of the manifest

PAPER = (162_048, 40_511)  # the paper's train and test; they add up to 40 fewer than CelebA, which become previews


def sega(names: Sequence[str], seed: int) -> dict[str, list[str]]:
    """A random split with the paper's counts on CelebA, else 80 % to 20 %; the same person may stand on both sides."""
    n = len(names)
    train, test = PAPER if n == celeba.IMAGES else (round(0.8 * n), n - round(0.8 * n))
    shuffled = [names[i] for i in positions.shuffled(seed, positions.SPLIT, n)]
    sides = {"train": shuffled[:train], "test": shuffled[train : train + test], "preview": shuffled[train + test :]}
    return {side: sorted(part) for side, part in sides.items() if part}


def official(names: Sequence[str], partition: dict[str, int]) -> dict[str, list[str]]:
    """CelebA's own identity-disjoint split; `partition` maps a file's name (without folder) to 0, 1 or 2."""
    sides: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for name in names:
        sides[("train", "val", "test")[celeba.of(name, partition, celeba.PARTITION)]].append(name)
    return {side: part for side, part in sides.items() if part}


def identity(names: Sequence[str], identities: dict[str, int], seed: int) -> dict[str, list[str]]:
    """A random split with the paper's proportions that has every person on one side only."""
    owner = [celeba.of(name, identities, celeba.IDENTITY) for name in names]
    images = Counter(owner)
    people = sorted(images)
    free = round(len(names) * PAPER[0] / sum(PAPER))
    chosen = set()
    for number in positions.shuffled(seed, positions.SPLIT, len(people)):
        if images[people[number]] <= free:
            chosen.add(people[number])
            free -= images[people[number]]
    sides: dict[str, list[str]] = {"train": [], "test": []}
    for name, person in zip(names, owner, strict=True):
        sides["train" if person in chosen else "test"].append(name)
    return {side: part for side, part in sides.items() if part}


def people(sides: dict[str, list[str]], identities: dict[str, int]) -> dict[str, int]:
    """How many persons stand on each side, and how many on both train and test."""
    who = {side: {celeba.of(name, identities, celeba.IDENTITY) for name in part} for side, part in sides.items()}
    return {side: len(found) for side, found in who.items()} | {
        "train and test": len(who.get("train", set()) & who.get("test", set()))
    }
