"""Pieces of a step recorded as CUDA graphs and replayed, so that the GPU never waits for Python."""

from collections.abc import Callable
from typing import Any

import torch

WARMUP = 3  # ordinary calls before a recording: compilers have run, optimisers have their state

Function = Callable[..., Any]
# Runs the function once without effect and returns its outputs, and what makes their memory anew.
Record = Callable[[Function], tuple[Any, Callable[[], None]]]


class Recorder:
    """Calls functions of tensors: as they stand, or by replaying them once they are recorded.

    A recorded function reads its inputs where they lay when it was recorded, and leaves its outputs where they lay
    then: inputs must be held in one place, outputs used before the next call. It must never ask the device for a value.
    Several functions may hand on tensors, with the graph behind them, if they are always called in the same order.
    """

    def __init__(self, record: Record | None):
        self.record = record
        self.calls: dict[Function, int] = {}
        self.recorded: dict[Function, tuple[Any, Callable[[], None]]] = {}
        self.held: Any = None

    def hold(self, batch: Any) -> Any:
        """The values of `batch`, a named tuple with `tensors`, in the same place in every step."""
        if self.record is None:
            return batch
        if self.held is None:
            self.held = batch
        for place, value in zip(self.held.tensors(), batch.tensors(), strict=True):
            place.copy_(value)
        return self.held

    def __call__(self, function: Function, *inputs: Any) -> Any:
        if self.record is None:
            return function(*inputs)
        self.calls[function] = self.calls.get(function, 0) + 1
        if self.calls[function] <= WARMUP:
            return function(*inputs)
        if function not in self.recorded:
            self.recorded[function] = self.record(lambda: function(*inputs))
        outputs, replay = self.recorded[function]
        replay()
        return outputs


class CudaGraphs:
    """A `Record` with CUDA graphs that share their memory. Everything before must have run on the same stream."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Function) -> tuple[Any, Callable[[], None]]:
        graph = torch.cuda.CUDAGraph()
        # Other threads, as the one that pins batches, may go on as they like.
        with torch.cuda.graph(graph, self.pool, torch.cuda.current_stream(), capture_error_mode="thread_local"):
            outputs = function()
        return outputs, graph.replay
