"""Activation checkpointing: less memory for one more forward, and the same result."""

import contextlib
import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
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
        stage = layers[start:end]
        contexts: dict[str, Any] = {"context_fn": functools.partial(_contexts, stage)} if _norms(stage) else {}
        x = checkpoint(stage, x, use_reentrant=False, preserve_rng_state=False, **contexts)
    return x


def _norms(stage: nn.Module) -> list[_BatchNorm]:
    """What holds running statistics."""
    return [layer for layer in stage.modules() if isinstance(layer, _BatchNorm) and layer.track_running_stats]


def _contexts(stage: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Of the first forward and of the second."""
    return contextlib.nullcontext(), _statistics_kept(stage)


@contextlib.contextmanager
def _statistics_kept(stage: nn.Module) -> Iterator[None]:
    """Running statistics have seen this batch: the second forward shows it to copies.

    Batch norm without them would remember fewer tensors for backward than it did the first time, which torch refuses.
    """
    norms = _norms(stage)
    kept = [dict(norm._buffers) for norm in norms]
    for norm in norms:
        norm._buffers.update({name: buffer.clone() for name, buffer in norm.named_buffers(recurse=False)})
    try:
        yield
    finally:
        for norm, buffers in zip(norms, kept, strict=True):
            norm._buffers.update(buffers)
