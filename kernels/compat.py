"""The one place that knows Triton's version: its import, its interpreter and its ahead-of-time compiler."""

from typing import Any

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


def compile_ahead(kernel: Any, types: dict[str, str], constants: dict[str, Any], target: Any, options: dict[str, Any]
                  ) -> Any:  # fmt: skip
    """Compile `kernel` for `target` on a machine without it; `types` of run-time arguments, `constants` of the rest.

    Pointers and what strides maps (PLANE, TOTAL) are declared divisible by 16, as a launch finds them.
    """
    from triton.compiler import ASTSource

    names = kernel.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    aligned = [
        (index,)
        for index, name in enumerate(names)
        if signature[name][0] == "*" or (name in ("PLANE", "TOTAL") and name in types)
    ]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={path: [["tt.divisibility", 16]] for path in aligned},
    )
    return triton.compile(source, target=target, options=options)


def gpu_target(architecture: str) -> Any:
    """`sm_90` -> GPUTarget("cuda", 90, 32), `gfx942` -> GPUTarget("hip", "gfx942", 64)."""
    from triton.backends.compiler import GPUTarget

    if architecture.startswith("sm_"):
        return GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
    return GPUTarget("hip", architecture, 64)
