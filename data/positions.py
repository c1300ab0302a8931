"""Randomness as a function of (seed, position): order, flips, patches and dropout noise.

Only the raw output of the counter-based generator Philox is used, which numpy promises never to change; nothing depends
on ranks, workers or on how often a run was stopped.
"""

import functools

import numpy as np
from numpy.typing import NDArray

# One independent stream of numbers for each purpose.
SPLIT, ORDER, FLIP, PATCH, D_REAL, D_FAKE, G_REAL, G_FAKE = range(8)


def raw(seed: int, stream: int, row: int, first: int, count: int) -> NDArray[np.uint64]:
    """`count` 64-bit numbers of (seed, stream, row), starting with block `first` of four numbers."""
    key = np.array([seed, stream], dtype=np.uint64)
    counter = np.array([first, row, 0, 0], dtype=np.uint64)
    return np.asarray(np.random.Philox(key=key, counter=counter).random_raw(count), dtype=np.uint64)


def permutation(seed: int, stream: int, row: int, n: int) -> NDArray[np.int64]:
    """A random order of range(n)."""
    return np.argsort(raw(seed, stream, row, 0, n), kind="stable")


@functools.lru_cache(maxsize=2)  # the passes at either side of a boundary
def order(seed: int, number: int, n: int) -> NDArray[np.int64]:
    """The order in which pass `number` visits the n samples."""
    return permutation(seed, ORDER, number, n)


def sample_at(seed: int, position: int, n: int) -> int:
    """Which of the n samples is image number `position` of a run: every n images visit each exactly once."""
    return int(order(seed, position // n, n)[position % n])


def uniform(seed: int, stream: int, first: int, count: int, width: int) -> NDArray[np.float64]:
    """(count, width) numbers in [0,1): `width` for each of the images first ... first + count - 1."""
    blocks = -(-width // 4)  # Philox makes four numbers at a time; each image owns whole blocks
    numbers = raw(seed, stream, 0, first * blocks, count * blocks * 4).reshape(count, blocks * 4)
    return np.asarray((numbers[:, :width] >> np.uint64(11)) * 2.0**-53, dtype=np.float64)
