"""The generator's weights averaged over training, by images seen."""

import copy

import torch
from torch import Tensor, nn


class Ema:
    """An exponential moving average of a module's parameters, with its buffers copied."""

    def __init__(self, module: nn.Module, half_life: float):
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        self.half_life = half_life  # images
        self.averages: list[Tensor] = list(self.module.parameters())
        self.parameters: list[Tensor] = list(module.parameters())
        self.buffers = list(zip(self.module.buffers(), module.buffers(), strict=True))

    @torch.no_grad()
    def update(self, images: int, seen: int) -> None:
        """Move towards the module after a step of `images`, the run having seen `seen`.

        At the start the half-life is a twentieth of what was seen, so that the random first weights fade.
        """
        half_life = min(self.half_life, seen / 20)
        decay = 0.5 ** (images / half_life) if half_life else 0.0
        torch._foreach_lerp_(self.averages, self.parameters, 1 - decay)
        for mine, its in self.buffers:
            mine.copy_(its)
