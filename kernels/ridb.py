"""Residual in internal dense block: r + beta * Ct(x_Q), where x_q = idb(x_{q-1}, r) and x_0 = r (paper figure 3).

One autograd node. With g_q the gradient at x_q and z the inputs of the two activations of block q, the backward is

    g_Q   = beta * Ct'(g)                       dz2_q = g_q * lrelu'(z2_q)        (sign kept as one bit)
    dz1_q = (C2'(dz2_q)|f1 + g_q) * lrelu'(f1)                                    (f1 is kept: C2 reads it)
    g_q-1 = g_q + C2'(dz2_q)|x + C1'(dz1_q)     g_r = g + sum g_q + g_0

where C'(.) is the transposed convolution. Each line is one launch, in whose epilogue the next block's dz2 is made, and
one launch gives the gradients of all filters: nothing in a block's chain waits for those. Kept for backward: f1, x and
the bits, 264 bytes a pixel and block at 64 channels in bf16.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sega_dist.kernels import backend, idb
from sega_dist.kernels.backend import Impl
from sega_dist.kernels.bias_act import (
    LANES,
    conv,
    conv_backward,
    nchw,
    nhwc,
    no_second_derivative,
    run_act_grad,
    run_bias_act,
    wide,
)  # fmt: skip
from sega_dist.kernels.compat import jit, tl
from sega_dist.kernels.conv3x3_act import boxes, numerics, packed, run_forward, run_input_grad, weight_grad


def reference(r: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], slope: float, beta: float) -> Tensor:
    """r (N,C,h,w); filters and biases as C1, C2 of each block, then Ct -> (N,C,h,w)."""
    x = r
    for q in range(0, len(weights) - 1, 2):
        x = idb.reference(x, r, weights[q], biases[q], weights[q + 1], biases[q + 1], slope)
    return r + beta * F.conv2d(x, weights[-1], biases[-1], padding=1)


@jit
def ridb_weight_grad(r, saved, dzs, g, partial, H, W, BOXES, PLANE, TOTAL, BETA: tl.constexpr, Q: tl.constexpr,
                        C: tl.constexpr, SPLITS: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, BC: tl.constexpr,
                        BN: tl.constexpr, ACC: tl.constexpr, PREC: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """All filters of a RIDB: 3 products a block (x with dz1, x with dz2, f1 with dz2), and x_Q with g.

    saved: planes f1_1, x_1, f1_2, ...; dzs: planes dz1_1, dz2_1, ...; partial: SPLITS rows of all filters, then biases.
    """
    each: tl.constexpr = 3 * (C // BC) * (C // BN)
    block, split = tl.program_id(0) % each, tl.program_id(1)
    q, part = tl.program_id(0) // each // 3, tl.program_id(0) // each % 3
    plane = 2 * q - 1 + part // 2
    x = tl.where(plane < 0, r, saved + plane.to(tl.int64) * PLANE)
    z = tl.where(q == Q, g, dzs + (2 * q + tl.minimum(part, 1)).to(tl.int64) * PLANE)
    inputs = tl.where(part == 0, C, 2 * C)
    filters = partial + split.to(tl.int64) * TOTAL
    at = filters + q * (27 * C * C) + tl.where(part == 0, 0, 9 * C * C) + tl.where(part == 2, C, 0)
    bias = filters + (27 * Q + 9) * C * C + (2 * q + tl.minimum(part, 1)) * C
    rest = block // 3
    weight_grad(x, z, at, bias, part < 2, block % 3 - 1, rest % (C // BC) * BC, rest // (C // BC) * BN, split, H, W,
                BOXES, q == Q, 9 * inputs, inputs, BETA, C, C, SPLITS, TH, TW, BC, BN, ACC, PREC,
                UPCAST)  # fmt: skip


def _run_weight_grad(r: Tensor, saved: Tensor, dzs: Tensor, g: Tensor, beta: float) -> Tensor:
    """Gradients of all filters [Co][tap][Ci], then of all biases, flat and in fp32 at least."""
    c, q = r.shape[-1], len(dzs) // 2
    at = backend.launch("weight_grad", [c], r.dtype, r.numel() // c)
    total = (27 * q + 9) * c * c + (2 * q + 1) * c
    partial = torch.empty(at["SPLITS"], total, dtype=wide(r.dtype), device=r.device)
    ridb_weight_grad[((3 * q + 1) * 3 * (c // at["BC"]) * (c // at["BN"]), at["SPLITS"])](
        r, saved, dzs, g, partial, r.shape[1], r.shape[2], boxes(r, at), r.numel(), total, beta, q, c, **at,
        **numerics(r.dtype),
    )  # fmt: skip
    return partial.sum(0)


def run_forward_chain(r: Tensor, w: Sequence[Tensor], biases: Sequence[Tensor], saved: Tensor, masks: Tensor | None,
                   slope: float, beta: float) -> Tensor:  # fmt: skip
    x = r
    for q in range(len(w) // 2):
        f1, out = saved[2 * q % len(saved)], saved[(2 * q + 1) % len(saved)]
        run_forward(x, None, w[2 * q], biases[2 * q], None, f1, None, slope, 1.0)
        mask = None if masks is None else masks[q]
        run_forward(x, f1, w[2 * q + 1], biases[2 * q + 1], r, out, mask, slope, 1.0, add_sources=True)
        x = out
    y = torch.empty_like(r)
    run_forward(x, None, w[-1], biases[-1], r, y, None, 1.0, beta)
    return y


def run_backward(g: Tensor, r: Tensor, w: Sequence[Tensor], saved: Tensor, masks: Tensor, slope: float, beta: float
                    ) -> tuple[Tensor, Tensor]:  # fmt: skip
    c, blocks = r.shape[-1], len(w) // 2
    gs, dzs = saved.new_empty(blocks, *r.shape), saved.new_empty(2 * blocks, *r.shape)
    gr = torch.empty_like(r)
    run_input_grad([(g, w[-1])], gx=gs[-1], dz=dzs[-1], mask=masks[-1], slope=slope, scale=beta)
    for q in reversed(range(blocks)):
        dz1, dz2, w1, w2 = dzs[2 * q], dzs[2 * q + 1], w[2 * q], w[2 * q + 1]
        run_input_grad([(dz2, w2[..., c:])], [gs[q]], dz=dz1, y=saved[2 * q], slope=slope)
        sources = [(dz2, w2[..., :c]), (dz1, w1)]
        if q:
            run_input_grad(sources, [gs[q]], gx=gs[q - 1], dz=dzs[2 * q - 1], mask=masks[q - 1], slope=slope)
        else:
            run_input_grad(sources, [gs[0], g], planes=gs, gx=gr)
    return gr, _run_weight_grad(r, saved, dzs, g, beta)


def _hybrid_forward(r: Tensor, w: Sequence[Tensor], biases: Sequence[Tensor], saved: Tensor, masks: Tensor | None,
                    slope: float, beta: float) -> Tensor:  # fmt: skip
    """cuDNN's convolutions; each epilogue writes its half of a concatenation, and x dense beside it."""
    c, blocks = r.shape[-1], len(w) // 2
    pairs, outs = _pairs(saved, blocks)
    pairs[0][..., :c].copy_(r)
    x = r
    for q in range(blocks):
        pair, f1 = pairs[q % len(pairs)], pairs[q % len(pairs)][..., c:]
        run_bias_act(conv(x, w[2 * q]), biases[2 * q], [], f1, None, slope, 1.0)
        mask, out = None if masks is None else masks[q], outs[q % len(outs)]
        follower = pairs[(q + 1) % len(pairs)][..., :c] if q + 1 < blocks else None
        run_bias_act(conv(pair, w[2 * q + 1]), biases[2 * q + 1], [x, f1, r], out, mask, slope, 1.0, follower)
        x = out
    y = torch.empty_like(r)
    run_bias_act(conv(x, w[-1]), biases[-1], [r], y, None, 1.0, beta)
    return y


def _hybrid_backward(g: Tensor, r: Tensor, w: Sequence[Tensor], saved: Tensor, masks: Tensor, slope: float, beta: float
                     ) -> tuple[Tensor, Tensor]:  # fmt: skip
    c, blocks = r.shape[-1], len(w) // 2
    pairs, outs = _pairs(saved, blocks)
    filters, biases, past = [], [], [g]
    dz = torch.empty_like(g)
    biases.append(run_act_grad([g], None, None, dz, 1.0, beta))
    gx, gw = conv_backward(dz, outs[-1], w[-1])
    filters.append(gw)
    parts = [gx]  # of the gradient at the block's output
    for q in reversed(range(blocks)):
        total, dz2, dz1 = torch.empty_like(g), torch.empty_like(g), torch.empty_like(g)
        biases.append(run_act_grad(parts, None, masks[q], dz2, slope, 1.0, total))
        gpair, gw = conv_backward(dz2, pairs[q], w[2 * q + 1])
        filters.append(gw)
        biases.append(run_act_grad([gpair[..., c:], total], pairs[q][..., c:], None, dz1, slope, 1.0))
        gx, gw = conv_backward(dz1, outs[q - 1] if q else r, w[2 * q])
        filters.append(gw)
        past.append(total)
        parts = [total, gpair[..., :c], gx]
    flat = [*reversed(filters), *reversed(biases)]
    return functools.reduce(torch.add, [*past, *parts]), torch.cat([t.flatten().to(wide(g.dtype)) for t in flat])


def _pairs(saved: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    """The hybrid's planes as concatenations (P,N,h,w,2C) and dense block outputs (P,N,h,w,C)."""
    kept = min(len(saved) // 3, blocks)
    planes = saved[: 2 * kept]
    return planes.view(kept, *planes.shape[1:-1], 2 * planes.shape[-1]), saved[2 * kept :]


def _planes(impl: str, blocks: int, is_kept: bool) -> int:
    """Maps that the forward needs room for: all that backward reads, or what the chain of blocks can do with."""
    if impl == "triton":
        return 2 * blocks if is_kept else 4
    return 3 * blocks if is_kept else 6


@torch.library.custom_op("sega_dist::ridb", mutates_args=())
def _forward(r: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], slope: float, beta: float,
             is_kept: bool, impl: str) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(y, saved, masks); the last two are empty unless is_kept."""
    rows, blocks = nhwc(r), len(weights) // 2
    saved = rows.new_empty(_planes(impl, blocks, is_kept), *rows.shape)
    masks = _masks(rows, blocks, is_kept)
    forward = run_forward_chain if impl == "triton" else _hybrid_forward
    y = forward(rows, packed(weights, r.dtype), biases, saved, masks if is_kept else None, slope, beta)
    return nchw(y), saved if is_kept else rows.new_empty(0), masks


@_forward.register_fake
def _(r: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], slope: float, beta: float, is_kept: bool,
      impl: str) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    rows, blocks = nhwc(r), len(weights) // 2
    saved = rows.new_empty((_planes(impl, blocks, True), *rows.shape) if is_kept else 0)
    return nchw(torch.empty_like(rows)), saved, _masks(rows, blocks, is_kept)


def _masks(rows: Tensor, blocks: int, is_kept: bool) -> Tensor:
    n, h, w, c = rows.shape
    return rows.new_empty((blocks, n, h, w, c // LANES) if is_kept else 0, dtype=torch.int16)


@torch.library.custom_op("sega_dist::ridb_backward", mutates_args=())
def _backward(gy: Tensor, r: Tensor, weights: Sequence[Tensor], saved: Tensor, masks: Tensor, slope: float,
              beta: float, impl: str) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(gr, all filters' gradients [Co][tap][Ci] and then all biases', flat and in fp32 at least)."""
    backward = run_backward if impl == "triton" else _hybrid_backward
    gr, total = backward(nhwc(gy), nhwc(r), packed(weights, r.dtype), saved, masks, slope, beta)
    return nchw(gr), total


@_backward.register_fake
def _(gy: Tensor, r: Tensor, weights: Sequence[Tensor], saved: Tensor, masks: Tensor, slope: float, beta: float,
      impl: str) -> tuple[Tensor, Tensor]:  # fmt: skip
    total = sum(w.numel() + w.shape[0] for w in weights)
    return nchw(torch.empty_like(nhwc(r))), r.new_empty(total, dtype=wide(r.dtype))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    r, weights, biases, ctx.slope, ctx.beta, is_kept, ctx.impl = inputs
    assert is_kept
    _, saved, masks = output
    ctx.mark_non_differentiable(saved, masks)
    ctx.save_for_backward(r, saved, masks, *weights)
    ctx.bias_dtypes = [b.dtype for b in biases]


def _gradients(ctx: Any, gy: Tensor, *_: object) -> tuple[Any, ...]:
    r, saved, masks, *weights = ctx.saved_tensors
    gr, total = torch.ops.sega_dist.ridb_backward(gy, r, weights, saved, masks, ctx.slope, ctx.beta, ctx.impl)
    pieces = total.split([w.numel() for w in weights] + [len(w) for w in weights])
    filters = [
        piece.view(w.shape[0], 3, 3, w.shape[1]).permute(0, 3, 1, 2).to(w.dtype)
        for piece, w in zip(pieces, weights, strict=False)
    ]
    biases = [b.to(dtype) for b, dtype in zip(pieces[len(weights) :], ctx.bias_dtypes, strict=True)]
    return gr, filters, biases, None, None, None, None


_forward.register_autograd(_gradients, setup_context=_setup)
_backward.register_autograd(no_second_derivative)


def ridb(r: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], slope: float, beta: float, impl: Impl = "auto"
         ) -> Tensor:  # fmt: skip
    """A whole residual-in-internal-dense block as one node.

    r: (N,C,h,w), best channels last, C a multiple of 16; weights and biases: C1 (C,C,3,3) and C2 (C,2C,3,3) of each
    block, then Ct (C,C,3,3), in r's dtype or fp32. `hybrid` is cuDNN's convolutions with one kernel behind each.
    ValueError where shapes, dtypes or devices do not go together, or the asked `impl` cannot run.
    """
    named = {f"weight{i}": w for i, w in enumerate(weights)} | {f"bias{i}": b for i, b in enumerate(biases)}
    backend.check_together(r=r, **named)
    c = r.shape[1]
    legal = [(c, c, 3, 3), (c, 2 * c, 3, 3)] * (len(weights) // 2) + [(c, c, 3, 3)]
    if [tuple(w.shape) for w in weights] != legal or len(biases) != len(weights):
        raise ValueError(f"ridb of {c} channels needs filters {legal}, not {[tuple(w.shape) for w in weights]}")
    x = backend.autocast(r)
    chosen = backend.choose(impl, "ridb", x, slope)
    if chosen == "reference":
        return reference(r, weights, biases, slope, beta)
    is_kept = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *weights, *biases))
    return torch.ops.sega_dist.ridb(x, list(weights), list(biases), slope, beta, is_kept, chosen)[0]
