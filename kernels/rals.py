"""Relativistic average least squares, both losses and their gradients in closed form, in one program.

L = mean (cr - m_f - s)^2 + mean (cf - m_r + s)^2 with s = +1 for D and -1 for G (paper section 3.4). The means m_r, m_f
are those of the global batch and depend on every logit; with a = m_r - m_f - s the gradient through them is

    dL/dcr = 2/n (cr - m_f - s + a)        dL/dcf = 2/m (cf - m_r + s - a)

for n and m logits on this rank, such that the mean over ranks of these is the gradient of the global loss. This needs
as many logits on every rank. No collective is differentiated, nothing waits for the host.
"""

from typing import Any

import torch
from torch import Tensor

from sega_dist.kernels import backend
from sega_dist.kernels.backend import Impl
from sega_dist.kernels.bias_act import accumulator, no_second_derivative
from sega_dist.kernels.compat import jit, tl

BLOCK = 1024  # logits a turn


def reference(real: Tensor, fake: Tensor, mean_real: Tensor, mean_fake: Tensor, sign: float) -> Tensor:
    """The loss alone; its gradient flows through the means as they are given."""
    return (real - mean_fake - sign).square().mean() + (fake - mean_real + sign).square().mean()


@jit
def rals_both(real, fake, mean_real, mean_fake, loss, grad_real, grad_fake, N, M, SIGN: tl.constexpr,
              BLOCK: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    m_r, m_f = tl.load(mean_real).to(ACC), tl.load(mean_fake).to(ACC)
    through = m_r - m_f - SIGN
    total = tl.zeros([BLOCK], dtype=ACC)
    for first in range(0, N, BLOCK):
        i = first + tl.arange(0, BLOCK)
        off = tl.load(real + i, mask=i < N, other=0.0).to(ACC) - m_f - SIGN
        total += tl.where(i < N, off * off / N, 0.0)
        tl.store(grad_real + i, 2.0 * (off + through) / N, mask=i < N)
    for first in range(0, M, BLOCK):
        i = first + tl.arange(0, BLOCK)
        off = tl.load(fake + i, mask=i < M, other=0.0).to(ACC) - m_r + SIGN
        total += tl.where(i < M, off * off / M, 0.0)
        tl.store(grad_fake + i, 2.0 * (off - through) / M, mask=i < M)
    tl.store(loss, tl.sum(total, 0))


def run_rals(real: Tensor, fake: Tensor, mean_real: Tensor, mean_fake: Tensor, sign: float
             ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(loss, its gradient to real, its gradient to fake) from dense logits and scalar means."""
    loss = real.new_empty(())
    grad_real, grad_fake = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (real, fake))
    rals_both[(1,)](real.contiguous(), fake.contiguous(), mean_real, mean_fake, loss, grad_real, grad_fake,
                    real.numel(), fake.numel(), sign, BLOCK, accumulator(real.dtype), num_warps=1,
                    **backend.OPTIONS)  # fmt: skip
    return loss, grad_real, grad_fake


@torch.library.custom_op("sega_dist::rals", mutates_args=())
def _forward(real: Tensor, fake: Tensor, mean_real: Tensor, mean_fake: Tensor, sign: float
             ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return run_rals(real, fake, mean_real, mean_fake, sign)


@_forward.register_fake
def _(real: Tensor, fake: Tensor, mean_real: Tensor, mean_fake: Tensor, sign: float) -> tuple[Tensor, Tensor, Tensor]:
    grad_real, grad_fake = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (real, fake))
    return real.new_empty(()), grad_real, grad_fake


@torch.library.custom_op("sega_dist::rals_backward", mutates_args=())
def _backward(g: Tensor, grad: Tensor) -> Tensor:
    return g * grad


@_backward.register_fake
def _(g: Tensor, grad: Tensor) -> Tensor:
    return torch.empty_like(grad)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, grad_real, grad_fake = output
    ctx.mark_non_differentiable(grad_real, grad_fake)
    ctx.save_for_backward(grad_real, grad_fake)


def _gradients(ctx: Any, g: Tensor, *_: object) -> tuple[Any, ...]:
    grads = zip(ctx.saved_tensors[:2], ctx.needs_input_grad[:2], strict=True)
    return *(torch.ops.sega_dist.rals_backward(g, grad) if needed else None for grad, needed in grads), None, None, None


_forward.register_autograd(_gradients, setup_context=_setup)
_backward.register_autograd(no_second_derivative)


def rals(real: Tensor, fake: Tensor, mean_real: Tensor, mean_fake: Tensor, sign: float, impl: Impl = "auto") -> Tensor:
    """One of the two losses from logits (N,1), (M,1) in fp32 and the global means; a scalar.

    `reference` differentiates through the means as they come (which must carry gradient to be the same); the kernel
    knows their gradient and takes them as numbers. `hybrid` is the kernel as well. ValueError where it cannot run.
    """
    backend.check_together(real=real, fake=fake, mean_real=mean_real, mean_fake=mean_fake)
    if fake.numel() == 0 or backend.choose(impl, "rals", real) == "reference":
        return reference(real, fake, mean_real, mean_fake, sign)
    return torch.ops.sega_dist.rals(real, fake, mean_real.detach(), mean_fake.detach(), sign)[0]
