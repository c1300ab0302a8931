"""Activation checkpointing: less memory for one more forward, and the same result."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def in_stages(stages: Sequence[nn.Module], x: Tensor, is_checkpointing: bool) -> Tensor:
    """`stages` one after another; where checkpointing, each keeps its input only and backward computes it again.

    arXiv 1604.06174. Nothing in the networks draws random numbers, so the second forward is the first.
    """
    for stage in stages:
        if is_checkpointing and torch.is_grad_enabled():
            x = checkpoint(stage, x, use_reentrant=False, preserve_rng_state=False)
        else:
            x = stage(x)
    return x


def stages_of(layers: nn.Sequential) -> list[nn.Module]:
    """A sequence cut before every convolution."""
    starts = [i for i, layer in enumerate(layers) if isinstance(layer, nn.Conv2d)]
    return [layers[a:b] for a, b in zip(starts, [*starts[1:], len(layers)], strict=True)]
