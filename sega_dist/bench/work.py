"""What a computation costs, counted without doing it: FLOP, bytes that must move, and the most memory alive at once."""

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


class Work(TorchDispatchMode):
    """Counts while it is on.

    `flop` is that of convolutions and matrix products, 2 for a multiply-add; `bytes` what those read and write if
    nothing stays in a cache and all else is fused into them; `live` and `peak` the bytes of tensors made inside that
    something still refers to, as PyTorch's allocator sees them but for its rounding and libraries' work space.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flop = self.bytes = self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outcome = func(*args, **(kwargs or {}))
        made = _tensors(outcome)
        if func._overloadpacket in flop_registry:
            self.flop += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=outcome)
            self.bytes += sum(t.nbytes for t in (*_tensors((args, kwargs)), *made))
        for tensor in made:
            self._hold(tensor)
        return outcome

    def _hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def counted(call: Callable[[], Any]) -> Work:
    """The work of a call, whose tensors are real but are not touched: it runs on tensors without data."""
    with FakeTensorMode(allow_non_fake_inputs=True), Work() as work:
        call()
    return work


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
