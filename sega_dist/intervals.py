"""How sure a mean over images is: percentile bootstrap."""

import numpy as np
from numpy.typing import NDArray

RESAMPLES, AT_ONCE = 4000, 100  # all at once would be 1.3 GB for CelebA's 19,962 test images
LEVEL = 0.95


def interval(values: NDArray[np.float64], seed: int = 0) -> tuple[float, float]:
    """The middle 95 % of the means of `RESAMPLES` samples of `values` (images,) with replacement (Efron 1979).

    Of a difference between two methods image by image it is the paired interval. The same seed draws the same samples.
    Not a number where a value is infinite, or there is none.
    """
    if not len(values) or not np.isfinite(values).all():
        return float("nan"), float("nan")
    generator, size = np.random.default_rng(seed), (AT_ONCE, len(values))
    means = [values[generator.integers(len(values), size=size)].mean(1) for _ in range(RESAMPLES // AT_ONCE)]
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
