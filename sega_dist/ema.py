"""The generator's weights averaged over training, by images seen."""

from collections.abc import Callable

import torch
from torch import Tensor


class Ema:
    """An exponential moving average of what this rank holds of a player's parameters."""

    def __init__(self, parts: Callable[[], list[Tensor]], half_life: float):
        self.parts = parts
        self.half_life = half_life  # images
        self.averages = [part.detach().clone() for part in parts()]

    @torch.no_grad()
    def update(self, images: int, seen: int) -> None:
        """Move towards the parameters after a step of `images`, the run having seen `seen`.

        At the start the half-life is a twentieth of what was seen, so that the random first weights fade.
        """
        half_life = min(self.half_life, seen / 20)
        decay = 0.5 ** (images / half_life) if half_life else 0.0
        torch._foreach_lerp_(self.averages, self.parts(), 1 - decay)
