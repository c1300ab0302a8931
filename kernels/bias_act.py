"""The epilogue of a convolution on its own: y = scale * lrelu(z + bias) + addends, for use behind cuDNN.

The kernels may write into a slice of a wider buffer and may store pixel-shuffled, so that neither a concatenation nor
a shuffle is a pass of its own. Where the sign of z + bias cannot be read off y (addends lie on top) one bit keeps it.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sega_dist.kernels import backend
from sega_dist.kernels.backend import Impl
from sega_dist.kernels.compat import jit, tl

LANES = 16  # signs in one mask word


def reference(z: Tensor, bias: Tensor | None, addends: Sequence[Tensor], slope: float, scale: float) -> Tensor:
    """z (N,C,h,w), bias (C,), addends like z -> (N,C,h,w)."""
    y = z if bias is None else z + bias.to(z.dtype).view(1, -1, 1, 1)
    return sum(addends, start=scale * F.leaky_relu(y, slope))


@jit
def pack_signs(positive, BM: tl.constexpr, BN: tl.constexpr):
    """(BM,BN) booleans -> (BM,BN/16) words, bit j of word i for column 16 i + j."""
    bits = tl.reshape(positive.to(tl.int32), [BM, BN // 16, 16]) << tl.arange(0, 16)[None, None, :]
    return tl.sum(bits, 2).to(tl.int16)


@jit
def unpack_signs(words, BM: tl.constexpr, BN: tl.constexpr):
    """The inverse of `pack_signs`."""
    bits = (words.to(tl.int32)[:, :, None] >> tl.arange(0, 16)[None, None, :]) & 1
    return tl.reshape(bits, [BM, BN]) != 0


@jit
def _place(m, n, W, C: tl.constexpr, SHUFFLE: tl.constexpr):
    """Where pixel m, channel n of a dense (M,C) map lies; with SHUFFLE in its pixel-shuffled form (2H,2W,C/4)."""
    if SHUFFLE:
        row, column = 2 * (m // W)[:, None] + (n % 4 // 2)[None, :], 2 * (m % W)[:, None] + (n % 2)[None, :]
        return (row * (2 * W) + column) * (C // 4) + (n // 4)[None, :]
    return m[:, None] * C + n[None, :]


@jit
def bias_act_epilogue(z, bias, a0, a1, a2, y, y2, mask, M, W, SLOPE: tl.constexpr, SCALE: tl.constexpr, C: tl.constexpr,
              ROWA: tl.constexpr, ROWB: tl.constexpr, ROWC: tl.constexpr, ROW: tl.constexpr, ROW2: tl.constexpr,
              SHUFFLE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """ROW...: elements from one pixel's row to the next, of the addends and of y and y2; SHUFFLE concerns y alone."""
    m, n = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
    inside = (m < M)[:, None]
    dense = m[:, None] * C + n[None, :]
    value = tl.load(z + dense, mask=inside, other=0.0).to(ACC)
    if bias is not None:
        value += tl.load(bias + n).to(ACC)[None, :]
    positive = value > 0
    value = tl.where(positive, value, value * SLOPE) * SCALE
    if a0 is not None:
        value += tl.load(a0 + m[:, None] * ROWA + n[None, :], mask=inside, other=0.0).to(ACC)
    if a1 is not None:
        value += tl.load(a1 + m[:, None] * ROWB + n[None, :], mask=inside, other=0.0).to(ACC)
    if a2 is not None:
        value += tl.load(a2 + m[:, None] * ROWC + n[None, :], mask=inside, other=0.0).to(ACC)
    if SHUFFLE:
        tl.store(y + _place(m, n, W, C, True), value.to(y.dtype.element_ty), mask=inside)
    else:
        tl.store(y + m[:, None] * ROW + n[None, :], value.to(y.dtype.element_ty), mask=inside)
    if y2 is not None:
        tl.store(y2 + m[:, None] * ROW2 + n[None, :], value.to(y2.dtype.element_ty), mask=inside)
    if mask is not None:
        word = tl.program_id(1) * (BN // 16) + tl.arange(0, BN // 16)
        tl.store(mask + m[:, None] * (C // 16) + word[None, :], pack_signs(positive, BM, BN), mask=inside)


@jit
def act_grad(g0, g1, g2, y, mask, total, dz, partial, M, W, SLOPE: tl.constexpr, SCALE: tl.constexpr, C: tl.constexpr,
              ROW0: tl.constexpr, ROW1: tl.constexpr, ROW2: tl.constexpr, ROWY: tl.constexpr, SHUFFLE: tl.constexpr,
              BM: tl.constexpr, BN: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """total = g0 + g1 + g2; dz = SCALE * total * lrelu'(sign by mask or y), and its column sums, one row a program.

    SHUFFLE: g0 and y lie pixel-shuffled.
    """
    m, n = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
    inside = (m < M)[:, None]
    dense = m[:, None] * C + n[None, :]
    if SHUFFLE:
        value = tl.load(g0 + _place(m, n, W, C, True), mask=inside, other=0.0).to(ACC)
    else:
        value = tl.load(g0 + m[:, None] * ROW0 + n[None, :], mask=inside, other=0.0).to(ACC)
    if g1 is not None:
        value += tl.load(g1 + m[:, None] * ROW1 + n[None, :], mask=inside, other=0.0).to(ACC)
    if g2 is not None:
        value += tl.load(g2 + m[:, None] * ROW2 + n[None, :], mask=inside, other=0.0).to(ACC)
    if total is not None:
        tl.store(total + dense, value.to(total.dtype.element_ty), mask=inside)
    if mask is not None:
        word = tl.program_id(1) * (BN // 16) + tl.arange(0, BN // 16)
        words = tl.load(mask + m[:, None] * (C // 16) + word[None, :], mask=inside, other=0)
        value = tl.where(unpack_signs(words, BM, BN), value, value * SLOPE)
    elif y is not None:
        at = _place(m, n, W, C, True) if SHUFFLE else m[:, None] * ROWY + n[None, :]
        value = tl.where(tl.load(y + at, mask=inside, other=0.0).to(ACC) > 0, value, value * SLOPE)
    value *= SCALE
    tl.store(dz + dense, value.to(dz.dtype.element_ty), mask=inside)
    if partial is not None:
        tl.store(partial + tl.program_id(0) * C + n, tl.sum(value, 0))


def accumulator(dtype: torch.dtype) -> Any:
    """What sums are made in."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def wide(dtype: torch.dtype) -> torch.dtype:
    """The same as a torch dtype, for partial sums."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def run_bias_act(z: Tensor, bias: Tensor | None, addends: Sequence[Tensor], y: Tensor, mask: Tensor | None,
                 slope: float, scale: float, y2: Tensor | None = None, shuffle: bool = False) -> None:  # fmt: skip
    """Fill y (and its second copy y2, and mask) from z; maps are (N,h,w,C), all but z may be channel slices."""
    c, m = z.shape[-1], z.numel() // z.shape[-1]
    at = backend.launch("pointwise", [c], z.dtype, m)
    a0, a1, a2 = [*addends, None, None, None][:3]
    rows = [0 if t is None else t.stride(2) for t in (a0, a1, a2, y, y2)]
    bias_act_epilogue[(-(-m // at["BM"]), c // at["BN"])](
        z, bias, a0, a1, a2, y, y2, mask, m, z.shape[2], slope, scale, c, *rows, shuffle,
        ACC=accumulator(z.dtype), **at,
    )  # fmt: skip


def run_act_grad(gradients: Sequence[Tensor], y: Tensor | None, mask: Tensor | None, dz: Tensor, slope: float,
                 scale: float, total: Tensor | None = None, shuffle: bool = False) -> Tensor:  # fmt: skip
    """Fill dz (and total) from up to three gradients, and return dz's column sums (C,); maps are (N,h,w,C)."""
    c, m = dz.shape[-1], dz.numel() // dz.shape[-1]
    at = backend.launch("pointwise", [c], dz.dtype, m)
    programs = -(-m // at["BM"])
    partial = torch.empty(programs, c, dtype=wide(dz.dtype), device=dz.device)
    g0, g1, g2 = [*gradients, None, None][:3]
    rows = [0 if t is None else t.stride(2) for t in (g0, g1, g2, y)]
    act_grad[(programs, c // at["BN"])](
        g0, g1, g2, y, mask, total, dz, partial, m, dz.shape[2], slope, scale, c, *rows, shuffle,
        ACC=accumulator(dz.dtype), **at,
    )  # fmt: skip
    return partial.sum(0)


def nhwc(x: Tensor) -> Tensor:
    """Logical (N,C,h,w) as a dense (N,h,w,C) map; a copy unless it lies channels last."""
    rows = x.permute(0, 2, 3, 1).contiguous()
    _, h, w, c = rows.shape
    # A 1x1 map is dense whatever the strides of its sides say, and these are what the kernels are told.
    return rows.as_strided(rows.shape, (h * w * c, w * c, c, 1))


def nchw(x: Tensor) -> Tensor:
    """The inverse: a channels-last view."""
    return x.permute(0, 3, 1, 2)


def conv(x: Tensor, w: Tensor) -> Tensor:
    """torch's convolution without bias between dense (N,h,w,C) maps."""
    return nhwc(F.conv2d(nchw(x), nchw(w), padding=1))


def conv_backward(dz: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Its gradients, of x as a map and of the filter as [Co][tap][Ci]."""
    one, none = [1, 1], [0, 0]
    gx, gw, _ = torch.ops.aten.convolution_backward(
        nchw(dz), nchw(x), nchw(w), None, one, one, one, False, none, 1, [True, True, False]
    )
    return nhwc(gx), nhwc(gw)


def empty_mask(x: Tensor, is_needed: bool) -> Tensor:
    """Room for the signs of a (N,h,w,C) map, or an empty tensor."""
    shape = (*x.shape[:3], x.shape[3] // LANES) if is_needed else (0,)
    return torch.empty(shape, dtype=torch.int16, device=x.device)


def needs_mask(has_addends: bool, slope: float, scale: float) -> bool:
    """Whether the sign of the activation's input cannot be read off the output."""
    return slope != 1 and (has_addends or scale <= 0)


@torch.library.custom_op("sega_dist::bias_act", mutates_args=())
def _forward(z: Tensor, bias: Tensor | None, addends: Sequence[Tensor], slope: float, scale: float
             ) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y, mask): mask is empty where y tells the sign."""
    rows = nhwc(z)
    y, mask = torch.empty_like(rows), empty_mask(rows, needs_mask(bool(addends), slope, scale))
    run_bias_act(rows, bias, [nhwc(a) for a in addends], y, mask if mask.numel() else None, slope, scale)
    return nchw(y), mask


@_forward.register_fake
def _(z: Tensor, bias: Tensor | None, addends: Sequence[Tensor], slope: float, scale: float) -> tuple[Tensor, Tensor]:
    rows = nhwc(z)
    return nchw(torch.empty_like(rows)), empty_mask(rows, needs_mask(bool(addends), slope, scale))


@torch.library.custom_op("sega_dist::bias_act_backward", mutates_args=())
def _backward(gy: Tensor, y: Tensor, mask: Tensor, slope: float, scale: float) -> tuple[Tensor, Tensor]:
    """(gz, its sums over pixels)."""
    rows = nhwc(gy)
    dz = torch.empty_like(rows)
    sign = nhwc(y) if slope != 1 and not mask.numel() else None
    sums = run_act_grad([rows], sign, mask if mask.numel() else None, dz, slope, scale)
    return nchw(dz), sums


@_backward.register_fake
def _(gy: Tensor, y: Tensor, mask: Tensor, slope: float, scale: float) -> tuple[Tensor, Tensor]:
    return nchw(torch.empty_like(nhwc(gy))), gy.new_empty(gy.shape[1], dtype=wide(gy.dtype))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    y, mask = output
    _, bias, addends, ctx.slope, ctx.scale = inputs
    ctx.save_for_backward(y, mask)
    ctx.mark_non_differentiable(mask)
    ctx.addends, ctx.bias_dtype = len(addends), None if bias is None else bias.dtype


def _gradients(ctx: Any, gy: Tensor, _: object) -> tuple[Any, ...]:
    y, mask = ctx.saved_tensors
    gz, sums = torch.ops.sega_dist.bias_act_backward(gy, y, mask, ctx.slope, ctx.scale)
    return gz, None if ctx.bias_dtype is None else sums.to(ctx.bias_dtype), [gy] * ctx.addends, None, None


def no_second_derivative(ctx: Any, *_: object) -> None:
    """What ops here do when asked for a derivative of their gradient."""
    raise RuntimeError("the fused kernels have no second derivative; use kernels=reference where one is needed")


_forward.register_autograd(_gradients, setup_context=_setup)
_backward.register_autograd(no_second_derivative)


def bias_act(z: Tensor, bias: Tensor | None, addends: Sequence[Tensor], slope: float, scale: float = 1.0,
             impl: Impl = "auto") -> Tensor:  # fmt: skip
    """scale * lrelu(z + bias) + addends.

    z: (N,C,h,w), best channels last; bias (C,) like z or fp32; up to three addends like z; slope 1 is no activation.
    ValueError where the asked `impl` cannot run, or dtypes and devices differ.
    """
    backend.check_together(z=z, bias=bias, **{f"addend{i}": a for i, a in enumerate(addends)})
    if len(addends) > 3:
        raise ValueError(f"bias_act takes at most 3 addends, not {len(addends)}")
    if backend.choose(impl, "bias_act", z, slope) == "reference":
        return reference(z, bias, addends, slope, scale)
    return torch.ops.sega_dist.bias_act(z, bias, addends, slope, scale)[0]
