"""Activation checkpointing: less memory for one more forward, and the same result."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def in_stages(layers: nn.Sequential, x: Tensor, is_checkpointing: bool) -> Tensor:
    """`layers(x)`; where checkpointing, each stage keeps its input only and backward computes it again.

    A stage is a convolution with what follows it; of larger blocks, each is one. arXiv 1604.06174. Nothing in the
    networks draws random numbers, so the second forward is the first.
    """
    if not (is_checkpointing and torch.is_grad_enabled()):
        y: Tensor = layers(x)
        return y
    starts = [i for i, layer in enumerate(layers) if isinstance(layer, nn.Conv2d)] or list(range(len(layers)))
    for start, end in zip(starts, [*starts[1:], len(layers)], strict=True):
        x = checkpoint(layers[start:end], x, use_reentrant=False, preserve_rng_state=False)
    return x
