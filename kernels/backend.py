"""Which implementation of an op runs, and with which launch parameters: decided from committed tables, never tuned."""

import contextlib
import functools
import hashlib
import json
import logging
import math
import operator
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from sega_dist.kernels import compat

Impl = Literal["auto", "triton", "hybrid", "reference"]
Entry = dict[str, Any]

TABLES = Path(__file__).parent / "configs"
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}
OPTIONS = {"enable_fp_fusion": True}  # Triton's default has changed between versions: results should not
MOST = 2**31  # elements; kernels index with 32 bits

log = logging.getLogger(__name__)
_forced: dict[str, Entry] = {}


def choose(impl: Impl, op: str, x: Tensor, slope: float = 0.0, widest: int = 0) -> Impl:
    """`impl`, or for `auto` what the table of this GPU says for this shape; ValueError where `impl` cannot run.

    x: the op's input (N,C,h,w), or rals' logits (N,1); widest: channels of the widest map where that is not known of
    the op. Empty batches have nothing to fuse: they take the reference.
    """
    if impl == "reference":
        return impl
    # Plain integers: a compiled graph is specialised to the shape that the choice was made for.
    return _choose(impl, op, [operator.index(n) for n in x.shape], x.dtype, x.device.type, slope, widest)


def plan(impl: Impl, shapes: dict[str, list[int]], dtype: torch.dtype, device: str, slope: float) -> dict[str, Impl]:
    """What `choose` will answer for these ops' inputs; ValueError where it will refuse."""
    return {op: _choose(impl, op, shape, dtype, device, slope) for op, shape in shapes.items()}


def _choose(impl: Impl, op: str, shape: list[int], dtype: torch.dtype, device: str, slope: float, widest: int = 0
            ) -> Impl:  # fmt: skip
    if impl == "reference" or math.prod(shape) == 0:
        return "reference"
    found = obstacle(op, shape, dtype, device, slope, widest)
    if impl != "auto":
        if found:
            raise ValueError(f"kernels={impl} cannot run {op}: {found}; use kernels=auto or kernels=reference")
        return impl
    chosen = "reference" if found else _measured_choice(op, shape, dtype)
    _log_once(f"kernels=auto: {op} on {'x'.join(map(str, shape))} {dtype} on {device} takes {chosen}")
    return chosen


# As torch.compiler.assume_constant_result does; but that imports the compiler: a second at the start of every command.
_choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


def obstacle(op: str, shape: Sequence[int], dtype: torch.dtype, device: str, slope: float, widest: int = 0
             ) -> str | None:  # fmt: skip
    """Why the kernels cannot run this, or None."""
    if not compat.HAS_TRITON:
        return "triton is not installed"
    if device != "cuda" and not compat.IS_INTERPRETING:
        return f"its tensors are on {device}, kernels need a GPU (or TRITON_INTERPRET=1, for tests)"
    legal = [*DTYPES] if compat.IS_INTERPRETING else [*DTYPES][:3]
    if dtype not in legal:
        return f"its dtype is {dtype}, not one of {', '.join(DTYPES[one] for one in legal)}"
    if op != "rals" and shape[1] % 16:
        return f"{shape[1]} channels are not a multiple of 16"
    # The upsampler's output, a block's concatenation.
    widest = widest or shape[1] * {"upconv_act": 4, "ridb": 2, "idb": 2}.get(op, 1)
    elements = math.prod(shape) // shape[1] * widest
    if elements >= MOST:
        return f"{elements:,} elements are not below {MOST:,}"
    if slope < 0:
        return f"slope {slope} is below 0, the sign of an activation must tell that of its input"
    return None


def check_together(**tensors: Tensor | None) -> None:
    """ValueError unless all tensors that are there share device and, weights in fp32 apart, dtype."""
    there = {name: t for name, t in tensors.items() if t is not None}
    first, x = next(iter(there.items()))
    for name, t in there.items():
        is_master = name.startswith(("weight", "bias")) and t.dtype == torch.float32
        if t.device != x.device or (t.dtype != x.dtype and not is_master):
            raise ValueError(f"{first} is {x.dtype} on {x.device}, but {name} is {t.dtype} on {t.device}")


def autocast(x: Tensor) -> Tensor:
    """`x` as autocast wants it: an op here casts weights by itself and returns their gradients in their own dtype."""
    device = x.device.type
    if device in ("cuda", "cpu") and x.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return x.to(torch.get_autocast_dtype(device))
    return x


def launch(kernel: str, widths: Sequence[int], dtype: torch.dtype, pixels: int) -> Entry:
    """The launch parameters of `kernel` between `widths` channels on `pixels`: measured on this GPU, else start points.

    Of the entries that fit, those of the nearest pixel count; blocks that do not divide the widths are halved.
    """
    if kernel in _forced:
        return _fitted(_forced[kernel], widths)
    return dict(_launch(kernel, tuple(widths), DTYPES[dtype], pixels))


@contextlib.contextmanager
def forced(**parameters: Entry) -> Iterator[None]:
    """Inside, kernels of these names are launched with these parameters: for sweeps and checks."""
    before = dict(_forced)
    _forced.update(parameters)
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


@functools.cache
def _launch(kernel: str, widths: tuple[int, ...], dtype: str, pixels: int) -> Entry:
    return _fitted(_entry(kernel, dtype, pixels)["parameters"], widths)


def _fitted(parameters: Entry, widths: Sequence[int]) -> Entry:
    blocks = ("BN", "BK", "BC")
    fitted = {key: math.gcd(value, *widths) if key in blocks else value for key, value in parameters.items()}
    return fitted | OPTIONS


def _entry(kernel: str, dtype: str, pixels: int) -> Entry:
    if compat.IS_INTERPRETING:
        entries, architecture = _table("interpreter"), 0
    else:
        entries = _measured(kernel, dtype) or _table("start")
        architecture = 0 if torch.version.hip else torch.cuda.get_device_capability()[0] * 10
    fitting = [e for e in entries if e["kernel"] == kernel and dtype in e["dtypes"] and e.get("cc", 0) <= architecture]
    if not fitting:
        raise ValueError(f"no launch parameters for {kernel} in {dtype} on compute capability {architecture / 10}")
    return min(fitting, key=lambda e: (-e.get("cc", 0), abs(math.log(pixels / e.get("pixels", pixels)))))


def _measured(kernel: str, dtype: str) -> list[Entry]:
    """What the table of this GPU holds for a kernel and dtype."""
    return [e for e in _table(gpu_name()) if e["kernel"] == kernel and dtype in e["dtypes"]]


def _measured_choice(op: str, shape: Sequence[int], dtype: torch.dtype) -> Impl:
    """What beat everything else on this GPU at the nearest shape; the reference where nobody measured."""
    choices = [e for e in _table(gpu_name(), "choices")
               if (e["op"], e["channels"], e["dtype"]) == (op, shape[1], DTYPES[dtype])]  # fmt: skip
    if not choices:
        return "reference"
    pixels = math.prod(shape) // shape[1]
    return min(choices, key=lambda e: abs(math.log(pixels / e["pixels"])))["impl"]


@functools.cache
def _table(name: str, part: str = "launch") -> list[Entry]:
    path = TABLES / f"{name}.json"
    return json.loads(path.read_text())[part] if path.exists() else []


def gpu_name() -> str:
    """`NVIDIA H200` -> `nvidia-h200`."""
    return torch.cuda.get_device_name().lower().replace(" ", "-") if torch.cuda.is_available() else "none"


def table_digest() -> str | None:
    """SHA-256 of the table that this GPU's launches and choices come from; None where nobody has measured."""
    path = TABLES / f"{gpu_name()}.json"
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None


def forget() -> None:
    """Read the tables anew."""
    _table.cache_clear()
    _launch.cache_clear()


@functools.cache
def _log_once(line: str) -> None:
    log.info(line)
