"""One doubling of the upsampler: convolution to four times the channels, pixel shuffle, LeakyReLU.

LeakyReLU commutes with the shuffle, so bias, activation and shuffle all happen in the convolution's store; the sign of
the activation's input is read off its output.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sega_dist.kernels import backend
from sega_dist.kernels.backend import Impl
from sega_dist.kernels.bias_act import (
    conv,
    conv_backward,
    nchw,
    nhwc,
    no_second_derivative,
    run_act_grad,
    run_bias_act,
    wide,
)
from sega_dist.kernels.conv3x3_act import as_gradients, packed, run_forward, run_input_grad, run_weight_grad


def reference(x: Tensor, weight: Tensor, bias: Tensor, slope: float) -> Tensor:
    """x (N,C,h,w), weight (4C,C,3,3), bias (4C,) -> (N,C,2h,2w)."""
    return F.leaky_relu_(F.pixel_shuffle(F.conv2d(x, weight, bias, padding=1), 2), slope)


@torch.library.custom_op("sega_dist::upconv_act", mutates_args=())
def _forward(x: Tensor, weight: Tensor, bias: Tensor, slope: float, impl: str) -> Tensor:
    rows = nhwc(x)
    n, h, w, c = rows.shape
    y = rows.new_empty(n, 2 * h, 2 * w, c)
    (filters,) = packed([weight], x.dtype)
    if impl == "triton":
        run_forward(rows, None, filters, bias, None, y, None, slope, 1.0, shuffle=True)
    else:
        run_bias_act(conv(rows, filters), bias, [], y, None, slope, 1.0, shuffle=True)
    return nchw(y)


@_forward.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, slope: float, impl: str) -> Tensor:
    n, c, h, w = x.shape
    return nchw(x.new_empty(n, 2 * h, 2 * w, c))


@torch.library.custom_op("sega_dist::upconv_act_backward", mutates_args=())
def _backward(gy: Tensor, y: Tensor, x: Tensor, weight: Tensor, slope: float, impl: str) -> tuple[Tensor, Tensor]:
    """(gx, gradients [Co][tap][Ci] of the filter and then of the bias, flat and in fp32 at least)."""
    rows = nhwc(x)
    dz = rows.new_empty(*rows.shape[:3], weight.shape[0])
    sums = run_act_grad([nhwc(gy)], nhwc(y) if slope != 1 else None, None, dz, slope, 1.0, shuffle=True)
    (filters,) = packed([weight], x.dtype)
    if impl == "triton":
        gx = torch.empty_like(rows)
        run_input_grad([(dz, filters)], gx=gx)
        return nchw(gx), run_weight_grad([rows], dz)
    gx, gw = conv_backward(dz, rows, filters)
    return nchw(gx), torch.cat([gw.flatten().to(sums.dtype), sums])


@_backward.register_fake
def _(gy: Tensor, y: Tensor, x: Tensor, weight: Tensor, slope: float, impl: str) -> tuple[Tensor, Tensor]:
    return nchw(torch.empty_like(nhwc(x))), x.new_empty(weight.numel() + len(weight), dtype=wide(x.dtype))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, ctx.slope, ctx.impl = inputs
    ctx.save_for_backward(x, weight, bias, output)


def _gradients(ctx: Any, gy: Tensor) -> tuple[Any, ...]:
    x, weight, bias, y = ctx.saved_tensors
    gx, total = torch.ops.sega_dist.upconv_act_backward(gy, y, x, weight, ctx.slope, ctx.impl)
    return gx, *as_gradients(total, weight, bias), None, None


_forward.register_autograd(_gradients, setup_context=_setup)
_backward.register_autograd(no_second_derivative)


def upconv_act(x: Tensor, weight: Tensor, bias: Tensor, slope: float, impl: Impl = "auto") -> Tensor:
    """x (N,C,h,w), best channels last, weight (4C,C,3,3), bias (4C,) -> (N,C,2h,2w); C a multiple of 16.

    ValueError where shapes, dtypes or devices do not go together, or the asked `impl` cannot run.
    """
    backend.check_together(x=x, weight=weight, bias=bias)
    c = x.shape[1]
    if weight.shape != (4 * c, c, 3, 3):
        raise ValueError(f"upconv_act of {c} channels needs a filter {(4 * c, c, 3, 3)}, not {tuple(weight.shape)}")
    cast = backend.autocast(x)
    chosen = backend.choose(impl, "upconv_act", cast, slope)
    if chosen == "reference":
        return reference(x, weight, bias, slope)
    return torch.ops.sega_dist.upconv_act(cast, weight, bias, slope, chosen)
