"""Batch norm over the batch of all ranks: torch's SyncBatchNorm on GPUs, which refuses CPUs; ours there."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def with_global_batch_norm(module: nn.Module, ranks: int, is_cuda: bool) -> nn.Module:
    """`module` with every batch norm's statistics taken over all ranks; state-dict keys and values stay."""
    if ranks == 1:
        return module
    if is_cuda:
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, _BatchNorm):
                setattr(parent, name, GlobalBatchNorm(child))
    return module


class GlobalBatchNorm(_BatchNorm):
    """Batch norm over the global batch on any backend; shares the parameters and buffers of the norm it replaces."""

    def __init__(self, norm: _BatchNorm):
        super().__init__(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        self._parameters.update(norm._parameters)
        self._buffers.update(norm._buffers)

    def _check_input_dim(self, input: Tensor) -> None:
        assert input.dim() >= 2

    def forward(self, x: Tensor) -> Tensor:
        if not self.training and self.track_running_stats:
            return super().forward(x)
        y, mean, variance, count = _GlobalNormalise.apply(x, self.weight, self.bias, self.eps)
        if self.track_running_stats and self.training:
            assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
            assert self.num_batches_tracked is not None
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            unbiased = variance * (count / (count - 1))
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
            self.num_batches_tracked += 1
        return y


class _GlobalNormalise(torch.autograd.Function):
    """(x - mean) / sqrt(var + eps) * weight + bias with statistics of all ranks, in fp32 at least.

    One all-gather of each rank's (mean, centred sum of squares, count) forward, combined without cancellation, and one
    all-reduce of two sums backward. arXiv 1502.03167, section 3, over the global batch.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        wide = x if x.dtype == torch.float64 else x.float()
        axes = [axis for axis in range(x.dim()) if axis != 1]
        count = wide.numel() // wide.shape[1]
        mean = wide.mean(axes)
        squares = (wide - _column(mean, x)).square().sum(axes)
        mine = torch.cat([mean, squares, mean.new_tensor([count])])
        gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, mine)
        means, sums, counts = torch.stack(gathered).split([len(mean), len(mean), 1], 1)
        total = counts.sum()
        mean = (means * counts).sum(0) / total
        variance = (sums + counts * (means - mean).square()).sum(0) / total
        scale = (variance + eps).rsqrt()
        normalised = (wide - _column(mean, x)) * _column(scale, x)
        ctx.save_for_backward(normalised, weight, scale, total)
        ctx.mark_non_differentiable(mean, variance, total)
        y = normalised * _column(weight, x) + _column(bias, x)
        return y.to(x.dtype), mean, variance, total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        normalised, weight, scale, total = ctx.saved_tensors
        gradient = grads[0].to(normalised.dtype)
        axes = [axis for axis in range(gradient.dim()) if axis != 1]
        of_bias, of_weight = gradient.sum(axes), (gradient * normalised).sum(axes)
        sums = torch.cat([of_bias, of_weight])  # local ones are the parameters' gradients: DDP takes their mean
        dist.all_reduce(sums)
        mean_bias, mean_weight = (sums / total).split(len(of_bias))
        centred = gradient - _column(mean_bias, gradient) - normalised * _column(mean_weight, gradient)
        return (centred * _column(weight * scale, gradient)).to(grads[0].dtype), of_weight, of_bias, None


def _column(values: Tensor, like: Tensor) -> Tensor:
    """(C,) -> (1,C,1,...) to go with `like`."""
    return values.view(1, -1, *[1] * (like.dim() - 2))
