"""Ranks, devices and engines: the only file that knows accelerate."""

import contextlib
import os
import warnings
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, parse_flag_from_env
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sega_dist.arguments import Device
from sega_dist.errors import UserError

WAIT = timedelta(minutes=10)  # for any collective; then the process group names what it waited for
PARAMETERS, FIRST, SECOND, STEP = "parameter.", "exp_avg.", "exp_avg_sq.", "step."  # prefixes in a player's state


class World:
    """This process among the ranks, its device and its precision. One a process."""

    def __init__(self, precision: str = "fp32", device: Device = "auto"):
        if device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: this machine has no CUDA device; use --device cpu")
        # accelerate tells its launcher's use_cpu only to a single process: several need to be told by --device cpu.
        wants_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") if device == "auto" else device == "cpu"
        use_cpu = wants_cpu or not torch.cuda.is_available()
        handlers = [
            # A second forward of the discriminator before its backward must not broadcast over what backward needs.
            DistributedDataParallelKwargs(
                broadcast_buffers=False, find_unused_parameters=False, gradient_as_bucket_view=True
            ),
            InitProcessGroupKwargs(timeout=WAIT),
        ]
        self.accelerator = Accelerator(cpu=use_cpu, mixed_precision="no", kwargs_handlers=handlers)
        self.rank: int = self.accelerator.process_index
        self.size: int = self.accelerator.num_processes
        self.device: torch.device = self.accelerator.device
        self.precision = precision
        asked = int(os.environ.get("WORLD_SIZE", "1"))
        if asked != self.size:
            raise UserError(
                f"the launcher asked for {asked} processes but {self.size} found each other; see launchers/"
            )
        tf32 = precision == "tf32"
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
        # Flags and signals travel over the host, so that asking never waits for the device.
        self._host_group = dist.new_group(backend="gloo", timeout=WAIT) if self.size > 1 else None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def dtype(self) -> torch.dtype:
        """Of weights, images and losses."""
        return torch.float64 if self.precision == "fp64" else torch.float32

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Around forwards: convolutions and linear layers in bf16 where that was asked for."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def place(self, module: nn.Module) -> nn.Module:
        """`module` on this device, in this precision, channels last."""
        return module.to(device=self.device, dtype=self.dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def global_means(self, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
        """Mean of each over the elements of all ranks, with gradient; one collective of two sums and two counts."""
        if self.size == 1:
            return real.mean(), fake.mean()
        counts = real.new_tensor([real.numel(), fake.numel()])
        sums = AllReduceSum.apply(torch.cat([torch.stack([real.sum(), fake.sum()]), counts]))
        return sums[0] / sums[2], sums[1] / sums[3]

    @torch.no_grad()
    def mean_of(self, values: Tensor) -> Tensor:
        """Elementwise mean over ranks of a small tensor, for statistics."""
        if self.size > 1:
            dist.all_reduce(values)
            values /= self.size
        return values

    def any(self, flag: bool) -> bool:
        """Whether `flag` holds on some rank; every rank gets the same answer."""
        if self.size == 1:
            return flag
        agreed = torch.tensor(int(flag))
        dist.all_reduce(agreed, dist.ReduceOp.MAX, group=self._host_group)
        return bool(agreed)

    def total(self, count: int) -> int:
        """Sum of a host's integer over all ranks."""
        if self.size == 1:
            return count
        summed = torch.tensor(count)
        dist.all_reduce(summed, group=self._host_group)
        return int(summed)

    @contextlib.contextmanager
    def local_main_first(self) -> Iterator[None]:
        """The first process of each machine goes through the block before the others: one download a machine."""
        with self.accelerator.local_main_process_first():
            yield

    def barrier(self) -> None:
        """Wait for every rank, at most WAIT."""
        if self.size > 1:
            dist.barrier(group=self._host_group)

    def close(self) -> None:
        """Leave the process group, so that no rank waits for this one."""
        if dist.is_initialized():
            dist.destroy_process_group()


class Player:
    """One side of the game: a module, its Adam optimiser and the engine that runs both."""

    def __init__(self, world: World, module: nn.Module, learning_rate: float, betas: tuple[float, float]):
        self.world = world
        self.raw = with_global_batch_norm(world.place(module), world)
        with warnings.catch_warnings():  # newer torch calls this flag otherwise, accelerate does not yet
            warnings.filterwarnings("ignore", message=".*broadcast_buffers")
            self.forward = world.accelerator.prepare_model(self.raw) if world.size > 1 else self.raw
        self.optimizer = torch.optim.Adam(self.raw.parameters(), learning_rate, betas, fused=True)

    def backward_and_step(self, loss: Tensor) -> None:
        """One update from the mean over ranks of `loss`'s gradient."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()

    @contextlib.contextmanager
    def frozen(self) -> Iterator[nn.Module]:
        """The module itself, without gradient for its parameters but with gradient through it."""
        self.raw.requires_grad_(False)
        try:
            yield self.raw
        finally:
            self.raw.requires_grad_(True)

    @torch.no_grad()
    def is_finite(self) -> bool:
        """Whether every parameter is a finite number; asks the device once."""
        return bool(torch.stack([p.sum() * 0 for p in self.raw.parameters()]).sum() == 0)

    def full_state(self) -> dict[str, Tensor]:
        """Parameters, buffers and Adam moments by name, on the host, whatever the number of ranks."""
        state = {PARAMETERS + name: tensor for name, tensor in self.raw.state_dict().items()}
        for name, parameter in self.raw.named_parameters():
            adam = self.optimizer.state.get(parameter)
            if adam:
                state |= {FIRST + name: adam["exp_avg"], SECOND + name: adam["exp_avg_sq"], STEP + name: adam["step"]}
        return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}

    def load_full_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of `full_state`."""
        prefixed = {name: tensor for name, tensor in state.items() if name.startswith(PARAMETERS)}
        self.raw.load_state_dict({name.removeprefix(PARAMETERS): tensor for name, tensor in prefixed.items()})
        for name, parameter in self.raw.named_parameters():
            if FIRST + name not in state:
                continue  # never updated: a run stopped within its warm-up
            moments = (torch.empty_like(parameter).copy_(state[prefix + name]) for prefix in (FIRST, SECOND))
            step = state[STEP + name].to(parameter.device)
            self.optimizer.state[parameter] = dict(zip(("exp_avg", "exp_avg_sq"), moments, strict=True)) | {
                "step": step
            }


class AllReduceSum(torch.autograd.Function):
    """Sum over ranks in the forward and in the backward, so that gradient flows through a global statistic."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].clone()
        dist.all_reduce(total)
        return total


def with_global_batch_norm(module: nn.Module, world: World) -> nn.Module:
    """Batch norm over the batch of all ranks: torch's SyncBatchNorm on GPUs, which refuses CPUs; ours there."""
    if world.size == 1:
        return module
    if world.device.type == "cuda":
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
