"""Randomness as a function of (seed, position): order, flips, patches, dropout noise and latents.

Only the raw output of the counter-based generator Philox is used, which numpy promises never to change; nothing depends
on ranks, workers or on how often a run was stopped.
"""

import functools
import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15  # 2**64 over the golden ratio
# One independent stream of numbers for each purpose.
SPLIT, ORDER, FLIP, PATCH, D_REAL, D_FAKE, G_REAL, G_FAKE, LATENT, SHOWN, SPREAD = range(11)


def raw(seed: int, stream: int, row: int, first: int, count: int) -> NDArray[np.uint64]:
    """`count` 64-bit numbers of (seed, stream, row), starting with block `first` of four numbers."""
    key = np.array([seed, stream], dtype=np.uint64)
    counter = np.array([first, row, 0, 0], dtype=np.uint64)
    return np.asarray(np.random.Philox(key=key, counter=counter).random_raw(count), dtype=np.uint64)


def shuffled(seed: int, stream: int, n: int) -> NDArray[np.int64]:
    """range(n) in a random order."""
    return np.argsort(raw(seed, stream, 0, 0, n), kind="stable")


def sample_at(seed: int, position: int, n: int) -> int:
    """Which of the n samples is image number `position` of a run: every n images visit each exactly once.

    Each pass over the samples has its own order, which is computed image by image and never held: a Feistel network on
    two digits, a x b >= n, whose few values above n are sent through again (Black and Rogaway 2002, method 3).
    """
    keys = _keys(seed, position // n)
    b = -(-n // (a := math.isqrt(n - 1) + 1 if n > 1 else 1))
    x = position % n
    while True:
        high, low = divmod(x, b)
        for even, odd in keys:
            high = (high + _mixed(low, even)) % a
            low = (low + _mixed(high, odd)) % b
        x = high * b + low
        if x < n:
            return x


@functools.lru_cache(maxsize=4)  # the passes at either side of a boundary
def _keys(seed: int, number: int) -> list[tuple[int, int]]:
    """Of each round of pass `number`."""
    numbers = raw(seed, ORDER, number, 0, 8).tolist()
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def _mixed(digit: int, key: int) -> int:
    """64 bits that depend on every bit of both (the finaliser of SplitMix64, Steele and others 2014)."""
    z = (digit * GOLDEN + key) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def uniform(seed: int, stream: int, first: int, count: int, width: int) -> NDArray[np.float64]:
    """(count, width) numbers in [0,1): `width` for each of the images first ... first + count - 1."""
    blocks = -(-width // 4)  # Philox makes four numbers at a time; each image owns whole blocks
    numbers = raw(seed, stream, 0, first * blocks, count * blocks * 4).reshape(count, blocks * 4)
    return np.asarray((numbers[:, :width] >> np.uint64(11)) * 2.0**-53, dtype=np.float64)


def normal(seed: int, stream: int, first: int, count: int, width: int, device: torch.device | str) -> Tensor:
    """(count, width) standard normal numbers, fp64: `width` for each of the images first ... first + count - 1.

    Each image has its own SplitMix64, computed where the numbers are wanted: there may be 200,000 for an image. The
    integers are the same on every device, and logarithm and cosine to a rounding.
    """
    if not width:
        return torch.empty(count, 0, dtype=torch.float64, device=device)
    key = int(raw(seed, stream, 0, 0, 1)[0])
    numbers = [_signed(_mixed(number, key)) for number in range(first, first + count)]
    starts = torch.tensor(numbers, dtype=torch.int64)
    if torch.device(device).type == "cuda":
        starts = starts.pin_memory()  # else the host would wait for the copy, and for all that was asked for before it
    starts = starts.to(device, non_blocking=True)
    half = -(-width // 2)
    z = starts[:, None] + torch.arange(1, 2 * half + 1, device=device) * _signed(GOLDEN)
    z = (z ^ _shifted(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shifted(z, 27)) * _signed(0x94D049BB133111EB)
    u = _shifted(z ^ _shifted(z, 31), 11).double() * 2.0**-53  # uniform in [0,1)
    radius, angle = (-2 * (1 - u[:, :half]).log()).sqrt(), 2 * math.pi * u[:, half:]  # Box and Muller 1958
    return torch.cat([radius * angle.cos(), radius * angle.sin()], 1)[:, :width]


def _signed(x: int) -> int:
    """The 64 bits of x, as torch holds them."""
    return x - (x >> 63 << 64)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """To the right, zeros coming in."""
    return (x >> bits) & ((1 << 64 - bits) - 1)
