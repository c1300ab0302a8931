"""How sure a mean over images is: percentile bootstrap."""

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 4000
LEVEL = 0.95


def interval(values: NDArray[np.float64], seed: int = 0) -> tuple[float, float]:
    """The middle 95 % of the means of `RESAMPLES` samples of `values` (images,) with replacement (Efron 1979).

    Of a difference between two methods image by image it is the paired interval. The same seed draws the same samples.
    Not a number where a value is infinite.
    """
    if not np.isfinite(values).all():
        return float("nan"), float("nan")
    draws = np.random.default_rng(seed).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.quantile(values[draws].mean(1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
