"""A CUDA graph acted on a CPU: what ran once is run again on the very same memory, and Python is not asked."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Ops(TorchDispatchMode):
    """Keeps every operation with its tensors; refuses what would ask the device for a value."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[tuple[Any, Any, Any, list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise RuntimeError("operation not permitted when stream is capturing")
        outcome = func(*args, **(kwargs or {}))
        self.kept.append((func, args, kwargs or {}, tensors(outcome)))
        return outcome

    def again(self) -> None:
        for func, args, kwargs, places in self.kept:
            for place, value in zip(places, tensors(func(*args, **kwargs)), strict=True):
                if place.untyped_storage().data_ptr() != value.untyped_storage().data_ptr():
                    place.copy_(value)


def tensors(outcome: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(outcome) if isinstance(leaf, Tensor)]


def record(function: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
    """As `sega_dist.recording.CudaGraphs`; recording runs the operations, so the first replay is that run."""
    with Ops() as ops:
        outputs = function()
    is_first = True

    def replay() -> None:
        nonlocal is_first
        if not is_first:
            with torch.no_grad():
                ops.again()
        is_first = False

    return outputs, replay
