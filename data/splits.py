"""Which image is for training and which for testing."""

from collections.abc import Sequence
from typing import Literal

from sega_dist.data import positions
from sega_dist.errors import UserError

Split = Literal["sega", "official", "train", "test"]
SIDES = ("train", "val", "test", "preview")  # what a split may consist of, in the order of the manifest

CELEBA = 202_599  # images of CelebA
PAPER = (162_048, 40_511)  # the paper's train and test; they add up to 40 fewer, which become previews


def sega(names: Sequence[str], seed: int) -> dict[str, list[str]]:
    """A random split with the paper's counts on CelebA, else 80 % to 20 %; the same person may stand on both sides."""
    n = len(names)
    train, test = PAPER if n == CELEBA else (round(0.8 * n), n - round(0.8 * n))
    shuffled = [names[i] for i in positions.permutation(seed, positions.SPLIT, 0, n)]
    sides = {"train": shuffled[:train], "test": shuffled[train : train + test], "preview": shuffled[train + test :]}
    return {side: sorted(part) for side, part in sides.items() if part}


def official(names: Sequence[str], partition: dict[str, int]) -> dict[str, list[str]]:
    """CelebA's own identity-disjoint split; `partition` maps a file's name (without folder) to 0, 1 or 2."""
    sides: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for name in names:
        number = partition.get(name.rsplit("/", 1)[-1])
        if number is None:
            raise UserError(f"{name} does not stand in CelebA's partition list; --split official is for CelebA only")
        sides[("train", "val", "test")[number]].append(name)
    return {side: part for side, part in sides.items() if part}
