"""3x3 convolution with all that surrounds it: y = scale * lrelu(conv([x0, x1]) + bias) + x0 + x1 + res.

An implicit matrix product over boxes of TH x TW pixels: nine taps times the channels of one or two sources, so that a
concatenation never exists. The backward is the same product over gradients with the filter turned round, whose epilogue
goes on into the layer before: it adds what flows past and applies that layer's LeakyReLU, so that no elementwise kernel
remains. The filter's gradient is split over pixels into partial sums, added in a fixed order: no atomics.

Maps are dense (N,h,w,C) inside; a filter (Co,Ci,3,3) lies channels last, that is [Co][tap][Ci], for both directions.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sega_dist.kernels import backend, compat
from sega_dist.kernels.backend import Impl
from sega_dist.kernels.bias_act import (
    accumulator,
    bias_act,
    empty_mask,
    nchw,
    needs_mask,
    nhwc,
    no_second_derivative,
    pack_signs,
    run_act_grad,
    unpack_signs,
    wide,
)  # fmt: skip
from sega_dist.kernels.compat import IS_INTERPRETING, jit, tl


def reference(x0: Tensor, x1: Tensor | None, weight: Tensor, bias: Tensor | None, res: Tensor | None, slope: float,
              scale: float, add_sources: bool) -> Tensor:  # fmt: skip
    """x0 (N,C0,h,w), x1 (N,C1,h,w), weight (Co,C0+C1,3,3), bias (Co,), res (N,Co,h,w) -> (N,Co,h,w)."""
    sources = [x0] if x1 is None else [x0, x1]
    y = scale * F.leaky_relu(F.conv2d(torch.cat(sources, 1), weight, bias, padding=1), slope)
    return sum([*(sources if add_sources else []), *([] if res is None else [res])], start=y)


@jit
def box(pid, H, W, TH: tl.constexpr, TW: tl.constexpr):
    """The image and the first row and column of box number `pid`."""
    across = tl.cdiv(W, TW)
    boxes = across * tl.cdiv(H, TH)
    inner = pid % boxes
    return pid // boxes, inner // across * TH, inner % across * TW


@jit
def accumulate(acc, x, box_of_x, w, n, row0, column0, columns, H, W, C: tl.constexpr, TAP: tl.constexpr,
               K: tl.constexpr, N: tl.constexpr, FLIP: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr,
               BK: tl.constexpr, SWAP: tl.constexpr, PREC: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """acc (pixels, columns) plus one source's product; TAP, K, N: the filter's strides; FLIP turns it round.

    With SWAP acc is (columns, pixels): pixels become the wide side of Hopper's matrix instruction.
    """
    i = tl.arange(0, TH * TW)
    row, column = row0 + i // TW, column0 + i % TW
    pixel = (n * H + row) * W + column
    for step in range(9 * (C // BK)):
        tap, first = step // (C // BK), step % (C // BK) * BK
        down, right = tap // 3 - 1, tap % 3 - 1
        k = first + tl.arange(0, BK)
        if box_of_x is not None:
            a = tl.reshape(box_of_x.load([n, row0 + down, column0 + right, first]), [TH * TW, BK])
        else:
            inside = (row + down >= 0) & (row + down < H) & (column + right >= 0) & (column + right < W)
            a = tl.load(x + (pixel + down * W + right)[:, None] * C + k[None, :], mask=inside[:, None], other=0.0)
        at = w + (8 - tap if FLIP else tap) * TAP
        if SWAP:
            b = tl.load(at + columns[:, None] * N + k[None, :] * K)
        else:
            b = tl.load(at + k[:, None] * K + columns[None, :] * N)
        if UPCAST:  # the interpreter multiplies bf16 wrongly
            a, b = a.to(acc.dtype), b.to(acc.dtype)
        if SWAP:
            acc = tl.dot(b, tl.trans(a), acc, input_precision=PREC, out_dtype=acc.dtype)
        else:
            acc = tl.dot(a, b, acc, input_precision=PREC, out_dtype=acc.dtype)
    return acc


@jit
def conv3x3_forward(x0, x1, box0, box1, w, bias, res, y, mask, H, W, SLOPE: tl.constexpr, SCALE: tl.constexpr,
                    ADD: tl.constexpr, SHUFFLE: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr, CO: tl.constexpr,
                    TH: tl.constexpr, TW: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SWAP: tl.constexpr,
                    ACC: tl.constexpr, PREC: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """Boxes by blocks of BN outputs; with SHUFFLE a block holds one sub-pixel's channels and is stored in its place."""
    n, row0, column0 = box(tl.program_id(0), H, W, TH, TW)
    block = tl.program_id(1)
    lanes = tl.arange(0, BN)
    if SHUFFLE:  # torch's order of a shuffle's channels: 4 c + 2 i + j
        part = block % 4
        channels = block // 4 * BN + lanes
        columns = channels * 4 + part
    else:
        columns = block * BN + lanes
    acc = tl.zeros([BN, TH * TW] if SWAP else [TH * TW, BN], dtype=ACC)
    acc = accumulate(acc, x0, box0, w, n, row0, column0, columns, H, W, C0, C0 + C1, 1, 9 * (C0 + C1), False,
                     TH, TW, BK, SWAP, PREC, UPCAST)  # fmt: skip
    if C1 > 0:
        acc = accumulate(acc, x1, box1, w + C0, n, row0, column0, columns, H, W, C1, C0 + C1, 1, 9 * (C0 + C1), False,
                         TH, TW, BK, SWAP, PREC, UPCAST)  # fmt: skip
    if SWAP:
        acc = tl.trans(acc)
    i = tl.arange(0, TH * TW)
    row, column = row0 + i // TW, column0 + i % TW
    inside = ((row < H) & (column < W))[:, None]
    pixel = (n * H + row) * W + column
    at = pixel[:, None] * CO + columns[None, :]
    if bias is not None:
        acc += tl.load(bias + columns).to(ACC)[None, :]
    positive = acc > 0
    if SLOPE != 1.0:
        acc = tl.where(positive, acc, acc * SLOPE)
    acc *= SCALE
    if ADD:
        acc += tl.load(x0 + at, mask=inside, other=0.0).to(ACC)
        if C1 > 0:
            acc += tl.load(x1 + at, mask=inside, other=0.0).to(ACC)
    if res is not None:
        acc += tl.load(res + at, mask=inside, other=0.0).to(ACC)
    if SHUFFLE:
        wider = (2 * (n * H + row) + part // 2) * (2 * W) + 2 * column + part % 2
        at = wider[:, None] * (CO // 4) + channels[None, :]
    tl.store(y + at, acc.to(y.dtype.element_ty), mask=inside)
    if mask is not None:
        word = block * (BN // 16) + tl.arange(0, BN // 16)
        words = pack_signs(positive, TH * TW, BN)
        tl.store(mask + pixel[:, None] * (CO // 16) + word[None, :], words, mask=inside)


@jit
def conv3x3_input_grad(z0, z1, box0, box1, w0, w1, g, past, planes, gx, dz, y, mask, H, W, PLANE, SLOPE: tl.constexpr,
                       SCALE: tl.constexpr, PLANES: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr, CI0: tl.constexpr,
                       CI1: tl.constexpr, CO: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, BN: tl.constexpr,
                       BK: tl.constexpr, SWAP: tl.constexpr, ACC: tl.constexpr, PREC: tl.constexpr,
                       UPCAST: tl.constexpr):  # fmt: skip
    """gx = SCALE * conv'(z0, z1) + g + past + the PLANES maps at `planes`; dz = gx * lrelu'(sign by y or mask).

    conv' is the transposed convolution: z0 (C0 channels) came out of a filter with CI0 inputs, z1 likewise.
    """
    n, row0, column0 = box(tl.program_id(0), H, W, TH, TW)
    block = tl.program_id(1)
    columns = block * BN + tl.arange(0, BN)
    acc = tl.zeros([BN, TH * TW] if SWAP else [TH * TW, BN], dtype=ACC)
    acc = accumulate(acc, z0, box0, w0, n, row0, column0, columns, H, W, C0, CI0, 9 * CI0, 1, True,
                     TH, TW, BK, SWAP, PREC, UPCAST)  # fmt: skip
    if C1 > 0:
        acc = accumulate(acc, z1, box1, w1, n, row0, column0, columns, H, W, C1, CI1, 9 * CI1, 1, True,
                         TH, TW, BK, SWAP, PREC, UPCAST)  # fmt: skip
    if SWAP:
        acc = tl.trans(acc)
    acc *= SCALE
    i = tl.arange(0, TH * TW)
    row, column = row0 + i // TW, column0 + i % TW
    inside = ((row < H) & (column < W))[:, None]
    pixel = (n * H + row) * W + column
    at = pixel[:, None] * CO + columns[None, :]
    if g is not None:
        acc += tl.load(g + at, mask=inside, other=0.0).to(ACC)
    if past is not None:
        acc += tl.load(past + at, mask=inside, other=0.0).to(ACC)
    if PLANES > 0:
        plane = planes
        for _ in range(PLANES):  # not unrolled: with all loads in flight at once registers would spill
            acc += tl.load(plane + at, mask=inside, other=0.0).to(ACC)
            plane += PLANE
    if gx is not None:
        tl.store(gx + at, acc.to(gx.dtype.element_ty), mask=inside)
    if dz is not None:
        if mask is not None:
            word = block * (BN // 16) + tl.arange(0, BN // 16)
            words = tl.load(mask + pixel[:, None] * (CO // 16) + word[None, :], mask=inside, other=0)
            positive = unpack_signs(words, TH * TW, BN)
        else:
            positive = tl.load(y + at, mask=inside, other=0.0).to(ACC) > 0
        tl.store(dz + at, tl.where(positive, acc, acc * SLOPE).to(dz.dtype.element_ty), mask=inside)


@jit
def weight_grad(x, z, partial, bias, has_bias, down, c0, n0, split, H, W, BOXES, is_scaled, ROW, TAP,
                SCALE: tl.constexpr, C: tl.constexpr, CO: tl.constexpr, SPLITS: tl.constexpr, TH: tl.constexpr,
                TW: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr, ACC: tl.constexpr, PREC: tl.constexpr,
                UPCAST: tl.constexpr):  # fmt: skip
    """Three taps (one row of the filter) of d loss / d filter, and of the bias, over every SPLITS-th box.

    partial, bias: where this split's sums go, of the bias only if has_bias; ROW, TAP: strides of an output channel and
    of a tap in partial; is_scaled: times SCALE.
    """
    c, k = c0 + tl.arange(0, BC), n0 + tl.arange(0, BN)
    i = tl.arange(0, TH * TW)
    left, middle, right = (tl.zeros([BN, BC], dtype=ACC), tl.zeros([BN, BC], dtype=ACC), tl.zeros([BN, BC], dtype=ACC))
    sums = tl.zeros([TH * TW, BN], dtype=ACC)
    for index in range(split, BOXES, SPLITS):
        n, row0, column0 = box(index, H, W, TH, TW)
        row, column = row0 + i // TW, column0 + i % TW
        pixel = (n * H + row) * W + column
        inside = (row < H) & (column < W)
        dz = tl.load(z + pixel[:, None] * CO + k[None, :], mask=inside[:, None], other=0.0)
        sums += dz.to(ACC)
        shifted = (row + down >= 0) & (row + down < H)
        at = x + (pixel + down * W)[:, None] * C + c[None, :]
        a = tl.load(at - C, mask=(shifted & (column >= 1) & (column <= W))[:, None], other=0.0)
        b = tl.load(at, mask=(shifted & (column < W))[:, None], other=0.0)
        d = tl.load(at + C, mask=(shifted & (column < W - 1))[:, None], other=0.0)
        if UPCAST:
            dz, a, b, d = dz.to(ACC), a.to(ACC), b.to(ACC), d.to(ACC)
        turned = tl.trans(dz)
        left = tl.dot(turned, a, left, input_precision=PREC, out_dtype=ACC)
        middle = tl.dot(turned, b, middle, input_precision=PREC, out_dtype=ACC)
        right = tl.dot(turned, d, right, input_precision=PREC, out_dtype=ACC)
    total = tl.sum(sums, 0)
    if is_scaled:
        left, middle, right, total = left * SCALE, middle * SCALE, right * SCALE, total * SCALE
    at = partial + (down + 1) * 3 * TAP + k[:, None] * ROW + c[None, :]
    tl.store(at, left)
    tl.store(at + TAP, middle)
    tl.store(at + 2 * TAP, right)
    if has_bias & (down == 0) & (c0 == 0):
        tl.store(bias + k, total)


@jit
def conv3x3_weight_grad(x, z, partial, bias, H, W, BOXES, TOTAL, ROW, TAP, FIRST: tl.constexpr, SCALE: tl.constexpr,
                        C: tl.constexpr, CO: tl.constexpr, SPLITS: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr,
                        BC: tl.constexpr, BN: tl.constexpr, ACC: tl.constexpr, PREC: tl.constexpr,
                        UPCAST: tl.constexpr):  # fmt: skip
    """Program (block, split); TOTAL: elements from one split's sums to the next's."""
    block, split = tl.program_id(0), tl.program_id(1)
    rest = block // 3
    weight_grad(x, z, partial + split * TOTAL, bias + split * TOTAL, FIRST, block % 3 - 1, rest % (C // BC) * BC,
                rest // (C // BC) * BN, split, H, W, BOXES, SCALE != 1.0, ROW, TAP, SCALE, C, CO, SPLITS, TH, TW, BC,
                BN, ACC, PREC, UPCAST)  # fmt: skip


def numerics(dtype: torch.dtype) -> dict[str, Any]:
    """How products are made: TF32 only where torch's convolutions may use it."""
    tf32 = dtype == torch.float32 and torch.backends.cudnn.allow_tf32
    return {"ACC": accumulator(dtype), "PREC": "tf32" if tf32 else "ieee",
            "UPCAST": IS_INTERPRETING and dtype in (torch.bfloat16, torch.float16)}  # fmt: skip


def boxes(x: Tensor, at: dict[str, Any]) -> int:
    """How many TH x TW boxes cover the maps (N,h,w,C)."""
    return x.shape[0] * -(-x.shape[1] // at["TH"]) * -(-x.shape[2] // at["TW"])


def _descriptors(sources: Sequence[Tensor | None], at: dict[str, Any]) -> list[Any]:
    """For the sources' boxes where the launch parameters ask for the bulk copy engine; takes TMA out of them."""
    use = at.pop("TMA")
    return [compat.descriptor(x, [1, at["TH"], at["TW"], at["BK"]]) if use and x is not None else None for x in sources]


def run_forward(x0: Tensor, x1: Tensor | None, w: Tensor, bias: Tensor | None, res: Tensor | None, y: Tensor,
                mask: Tensor | None, slope: float, scale: float, add_sources: bool = False, shuffle: bool = False
                ) -> None:  # fmt: skip
    """Fill y (and mask); maps are dense (N,h,w,C), w is [Co,3,3,C0+C1] in their dtype."""
    c0, c1, co = x0.shape[-1], 0 if x1 is None else x1.shape[-1], w.shape[0]
    narrow = co // 4 if shuffle else co
    at = backend.launch("conv3x3", [c0, narrow, *([c1] if c1 else [])], x0.dtype, x0.numel() // c0)
    tensor_maps = _descriptors([x0, x1], at)
    conv3x3_forward[(boxes(x0, at), co // at["BN"])](
        x0, x1, *tensor_maps, w, bias, res, y, mask, x0.shape[1], x0.shape[2], slope, scale, add_sources, shuffle,
        c0, c1, co, **at, **numerics(x0.dtype),
    )  # fmt: skip


def run_input_grad(sources: Sequence[tuple[Tensor, Tensor]], past: Sequence[Tensor] = (), planes: Tensor | None = None,
                   gx: Tensor | None = None, dz: Tensor | None = None, y: Tensor | None = None,
                   mask: Tensor | None = None, slope: float = 1.0, scale: float = 1.0) -> None:  # fmt: skip
    """Fill gx and dz (N,h,w,C) from up to two (gradient, filter) and what flows past.

    A filter is a slice [Co,3,3,C] of its channels-last tensor's inputs; planes (P,N,h,w,C) are added up.
    """
    z0, w0 = sources[0]
    z1, w1 = sources[1] if len(sources) > 1 else (None, None)
    g, other = [*past, None, None][:2]
    c0, c1, c = z0.shape[-1], 0 if z1 is None else z1.shape[-1], w0.shape[-1]
    at = backend.launch("conv3x3", [c0, c, *([c1] if c1 else [])], z0.dtype, z0.numel() // c0)
    tensor_maps = _descriptors([z0, z1], at)
    conv3x3_input_grad[(boxes(z0, at), c // at["BN"])](
        z0, z1, *tensor_maps, w0, w1, g, other, planes, gx, dz, y, mask, z0.shape[1], z0.shape[2],
        0 if planes is None else planes.stride(0), slope, scale, 0 if planes is None else len(planes),
        c0, c1, w0.stride(2), 0 if w1 is None else w1.stride(2), c, **at, **numerics(z0.dtype),
    )  # fmt: skip


def run_weight_grad(sources: Sequence[Tensor], dz: Tensor, scale: float = 1.0) -> Tensor:
    """The filter's gradient [Co][tap][C0+C1], then the bias's (Co,), flat and in fp32 at least; maps are (N,h,w,C)."""
    ci, co = sum(x.shape[-1] for x in sources), dz.shape[-1]
    filters = co * 9 * ci
    partial, first = None, 0
    for x in sources:
        c = x.shape[-1]
        at = backend.launch("weight_grad", [c, co], dz.dtype, dz.numel() // co)
        if partial is None:
            partial = torch.empty(at["SPLITS"], filters + co, dtype=wide(dz.dtype), device=dz.device)
        conv3x3_weight_grad[(3 * (c // at["BC"]) * (co // at["BN"]), at["SPLITS"])](
            x, dz, partial[:, first:], partial[:, filters:], dz.shape[1], dz.shape[2], boxes(dz, at), filters + co,
            9 * ci, ci, first == 0, scale, c, co, **at, **numerics(dz.dtype),
        )  # fmt: skip
        first += c
    assert partial is not None
    return partial.sum(0)


def as_gradients(total: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Views of `run_weight_grad`'s result as gradients of `weight` (Co,Ci,3,3), channels last, and of `bias`."""
    co, ci = weight.shape[:2]
    gw = total[: weight.numel()].view(co, 3, 3, ci).permute(0, 3, 1, 2).to(weight.dtype)
    return gw, None if bias is None else total[weight.numel() :].to(bias.dtype)


def packed(weights: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Filters (Co,Ci,3,3) as dense [Co,3,3,Ci] in `dtype`, in one launch where they lie channels last already."""
    rows = [w.detach().permute(0, 2, 3, 1) for w in weights]
    if all(w.dtype == dtype and w.is_contiguous() for w in rows):
        return rows
    copies = [torch.empty(w.shape, dtype=dtype, device=w.device) for w in rows]
    torch._foreach_copy_(copies, rows)
    return copies


@torch.library.custom_op("sega_dist::conv3x3_act", mutates_args=())
def _forward(x0: Tensor, x1: Tensor | None, weight: Tensor, bias: Tensor | None, res: Tensor | None, slope: float,
             scale: float, add_sources: bool) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y, mask): mask is empty where y tells the sign."""
    rows0, rows1, past = nhwc(x0), None if x1 is None else nhwc(x1), None if res is None else nhwc(res)
    y = rows0.new_empty(*rows0.shape[:3], weight.shape[0])
    mask = empty_mask(y, needs_mask(add_sources or res is not None, slope, scale))
    (w,) = packed([weight], x0.dtype)
    run_forward(rows0, rows1, w, bias, past, y, mask if mask.numel() else None, slope, scale, add_sources)
    return nchw(y), mask


@_forward.register_fake
def _(x0: Tensor, x1: Tensor | None, weight: Tensor, bias: Tensor | None, res: Tensor | None, slope: float,
      scale: float, add_sources: bool) -> tuple[Tensor, Tensor]:  # fmt: skip
    y = x0.new_empty(x0.shape[0], *x0.shape[2:], weight.shape[0])
    return nchw(y), empty_mask(y, needs_mask(add_sources or res is not None, slope, scale))


@torch.library.custom_op("sega_dist::conv3x3_act_backward", mutates_args=())
def _backward(gy: Tensor, y: Tensor, mask: Tensor, x0: Tensor, x1: Tensor | None, weight: Tensor, slope: float,
              scale: float, add_sources: bool) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(gx0, gx1, gradients of filter and bias as `run_weight_grad` returns them); gx1 is empty without x1."""
    g, sources = nhwc(gy), [nhwc(x) for x in (x0, x1) if x is not None]
    dz = g
    if slope != 1:
        dz, has_mask = torch.empty_like(g), mask.numel() > 0
        run_act_grad([g], None if has_mask else nhwc(y), mask if has_mask else None, dz, slope, scale)
    rest = scale if slope == 1 else 1.0
    (w,) = packed([weight], dz.dtype)
    gx, first = [], 0
    for x in sources:
        gx.append(torch.empty_like(x))
        part = w[..., first : first + x.shape[-1]]
        run_input_grad([(dz, part)], [g] if add_sources else [], gx=gx[-1], scale=rest)
        first += x.shape[-1]
    total = run_weight_grad(sources, dz, rest)
    return nchw(gx[0]), nchw(gx[1]) if x1 is not None else gy.new_empty(0), total


@_backward.register_fake
def _(gy: Tensor, y: Tensor, mask: Tensor, x0: Tensor, x1: Tensor | None, weight: Tensor, slope: float, scale: float,
      add_sources: bool) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    gx0, gx1 = (nchw(torch.empty_like(nhwc(x))) if x is not None else gy.new_empty(0) for x in (x0, x1))
    return gx0, gx1, gy.new_empty(weight.numel() + len(weight), dtype=wide(gy.dtype))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    y, mask = output
    x0, x1, weight, bias, res, *ctx.constants = inputs
    slope = ctx.constants[0]
    ctx.save_for_backward(x0, x1, weight, bias, y if slope != 1 and not mask.numel() else None, mask)
    ctx.mark_non_differentiable(mask)
    ctx.has_res = res is not None


def _gradients(ctx: Any, gy: Tensor, _: object) -> tuple[Any, ...]:
    x0, x1, weight, bias, y, mask = ctx.saved_tensors
    y = mask if y is None else y
    gx0, gx1, total = torch.ops.sega_dist.conv3x3_act_backward(gy, y, mask, x0, x1, weight, *ctx.constants)
    past = gy if ctx.has_res else None
    return gx0, None if x1 is None else gx1, *as_gradients(total, weight, bias), past, None, None, None


_forward.register_autograd(_gradients, setup_context=_setup)
_backward.register_autograd(no_second_derivative)


def conv3x3_act(x0: Tensor, x1: Tensor | None, weight: Tensor, bias: Tensor | None, res: Tensor | None = None,
                slope: float = 1.0, scale: float = 1.0, add_sources: bool = False, impl: Impl = "auto"
                ) -> Tensor:  # fmt: skip
    """scale * lrelu(conv([x0, x1]) + bias) + x0 + x1 (with add_sources) + res; slope 1 is no activation.

    x0 (N,C0,h,w) and x1 (N,C1,h,w), best channels last; weight (Co,C0+C1,3,3); res (N,Co,h,w); channels multiples of
    16. `hybrid` is torch's convolution and one kernel behind it. ValueError where shapes, dtypes or devices do not go
    together, or the asked `impl` cannot run.
    """
    cast = {name: x if x is None else backend.autocast(x) for name, x in (("x0", x0), ("x1", x1), ("res", res))}
    backend.check_together(**cast, weight=weight, bias=bias)
    channels = [x.shape[1] for x in (x0, x1) if x is not None]
    if weight.shape[1:] != (sum(channels), 3, 3):
        raise ValueError(f"the filter is {tuple(weight.shape)}, the sources have {sum(channels)} channels")
    if add_sources and {*channels, weight.shape[0]} != {weight.shape[0]}:
        raise ValueError(f"sources of {channels} channels cannot be added to an output of {weight.shape[0]}")
    widths = (weight.shape[0], *channels)
    assert cast["x0"] is not None
    chosen = backend.choose(impl, "conv3x3_act", cast["x0"], slope, max(widths))
    for width in widths:
        if chosen != "reference" and width % 16:
            if impl != "auto":
                raise ValueError(f"kernels={impl} cannot run conv3x3_act: {width} channels are not a multiple of 16")
            chosen = "reference"
    if chosen == "reference":
        return reference(x0, x1, weight, bias, res, slope, scale, add_sources)
    x0, x1, res = cast["x0"], cast["x1"], cast["res"]
    if chosen == "hybrid":
        sources = [x for x in (x0, x1) if x is not None]
        z = F.conv2d(torch.cat(sources, 1), weight.to(x0.dtype), padding=1)
        addends = [*(sources if add_sources else []), *([] if res is None else [res])]
        return bias_act(z, bias, addends, slope, scale, "hybrid")
    return torch.ops.sega_dist.conv3x3_act(x0, x1, weight, bias, res, slope, scale, add_sources)[0]
