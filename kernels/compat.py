"""The one place that knows Triton's version: its import, its interpreter and its ahead-of-time compiler."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:  # every op then runs on its plain-torch reference

    class _Absent:
        """Stands where `triton.language` would, so that files with kernels can be imported without it."""

        constexpr = Any

        def __getattr__(self, name: str) -> Any:
            raise AttributeError(f"triton.language.{name}: triton is not installed")

    triton, tl, HAS_TRITON = None, _Absent(), False

# Decided when kernels are decorated: with TRITON_INTERPRET=1 they run as numpy on the CPU, for tests.
IS_INTERPRETING: bool = HAS_TRITON and bool(triton.knobs.runtime.interpret)


def jit(kernel: Any) -> Any:
    """`triton.jit`, or the plain function where there is no Triton."""
    return triton.jit(kernel) if HAS_TRITON else kernel


def descriptor(x: Any, box: list[int]) -> Any:
    """A tensor-map descriptor over dense `x`, read in blocks of `box`; zero outside (Hopper's bulk copy engine)."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(x, list(x.shape), list(x.stride()), box)


@dataclass(frozen=True)
class Launch:
    """One launch as it would have been: what decides the machine code, without any tensor's values."""

    kernel: Any
    types: dict[str, str]  # of run-time arguments
    aligned: tuple[str, ...]  # those divisible by 16
    constants: dict[str, Any]
    options: dict[str, Any]  # num_warps, num_stages

    def compile(self, architecture: str) -> Any:
        """Triton's compiled kernel for `sm_90`, `gfx942`, ..., on a machine without one."""
        from triton.compiler import ASTSource

        names = self.kernel.arg_names
        source = ASTSource(
            fn=self.kernel,
            signature={name: self.types.get(name, "constexpr") for name in names},
            constexprs={(names.index(name),): value for name, value in self.constants.items()},
            attrs={(names.index(name),): [["tt.divisibility", 16]] for name in self.aligned},
        )
        return triton.compile(source, target=gpu_target(architecture), options=self.options)


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Inside, kernels are not launched but noted, so that ops may be run on meta tensors."""
    launches: list[Launch] = []

    def record(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        options = {name: value for name, value in kwargs.items() if name not in kernel.arg_names}
        bound = kernel.signature.bind(*args, **{n: v for n, v in kwargs.items() if n in kernel.arg_names}).arguments
        fixed = {p.name for p in kernel.params if p.is_constexpr}
        constants = {name: value for name, value in bound.items() if name in fixed or value is None}
        moving = {name: value for name, value in bound.items() if name not in constants}
        types = {name: triton.runtime.jit.mangle_type(value) for name, value in moving.items()}
        aligned = tuple(name for name, value in moving.items() if not isinstance(value, int) or value % 16 == 0)
        aligned = tuple(name for name in aligned if not types[name].startswith("tensordesc"))
        launches.append(Launch(kernel, types, aligned, constants, options))

    with mock.patch.object(triton.runtime.jit.JITFunction, "run", record):
        yield launches


def gpu_target(architecture: str) -> Any:
    """`sm_90` -> GPUTarget("cuda", 90, 32), `gfx942` -> GPUTarget("hip", "gfx942", 64)."""
    from triton.backends.compiler import GPUTarget

    if architecture.startswith("sm_"):
        return GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
    return GPUTarget("hip", architecture, 64)


def assembler(capability: int) -> str:
    """The path of the ptxas that Triton uses for compute capability 80, 90, ..."""
    from triton.backends.nvidia.compiler import get_ptxas

    return str(get_ptxas(capability).path)
