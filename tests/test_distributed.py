"""Global batch norm against torch's over the whole batch, gradients through global means, players' state."""

import copy
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from torch import nn

from sega_dist.batchnorm import GlobalBatchNorm
from sega_dist.config import TrainConfig
from sega_dist.distributed import World
from sega_dist.engines import Player
from sega_dist.errors import LOST_RANK, UserError
from sega_dist.losses import rals_d, rals_g

N = 12


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, upstream = torch.randn(2, N, 3, 4, 5, dtype=torch.float64, generator=generator)
    return x * 3 + 100, upstream  # a mean far from zero: where a sum of squares would cancel


def batch_norm(rank: int, ranks: int) -> tuple[torch.Tensor, ...]:
    World(device="cpu", timeout=60)
    x, upstream = (t.chunk(ranks)[rank].clone() for t in inputs())
    norm = nn.BatchNorm2d(3).double()
    nn.init.constant_(norm.weight, 1.3)
    module = GlobalBatchNorm(norm).train()
    y = module(x.requires_grad_())
    (y * upstream).sum().backward()
    for p in module.parameters():
        dist.all_reduce(p.grad)
    return (y.detach(), x.grad, module.weight.grad, module.bias.grad, module.running_mean, module.running_var,
            norm.running_var)  # fmt: skip


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [2, 3])
def test_global_batch_norm_is_batch_norm_over_all_ranks(ranks: int, tmp_path: Path):
    found = on_ranks(batch_norm, ranks, tmp_path)
    x, upstream = inputs()
    norm = nn.BatchNorm2d(3).double()
    nn.init.constant_(norm.weight, 1.3)
    y = norm(x.requires_grad_())
    (y * upstream).sum().backward()
    torch.testing.assert_close(torch.cat([f[0] for f in found]), y, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(torch.cat([f[1] for f in found]), x.grad, rtol=1e-9, atol=1e-11)
    for part in found:
        expected = (norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var, norm.running_var)
        for mine, theirs in zip(part[2:], expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-11)


def relativistic(rank: int, ranks: int, impl: str) -> tuple[torch.Tensor, ...]:
    world = World(device="cpu", timeout=60)
    scores = torch.randn(2, N, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    real, fake = (s.chunk(ranks)[rank].clone().requires_grad_() for s in scores)
    means = world.global_means(real, fake)
    loss = rals_d(real, fake, *means, impl) + 3 * rals_g(real, fake, *means, impl)
    gradients = torch.autograd.grad(loss, [real, fake])
    return loss.detach(), *gradients


@pytest.mark.distributed
@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_relativistic_loss_and_gradient_are_those_of_the_global_batch(ranks: int, impl: str, tmp_path: Path):
    """By autograd through the global means, and by the kernel's closed form, which differentiates no collective."""
    found = on_ranks(partial(relativistic, impl=impl), ranks, tmp_path)
    real, fake = torch.randn(2, N, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    real.requires_grad_(), fake.requires_grad_()
    means = real.mean(), fake.mean()
    loss = rals_d(real, fake, *means) + 3 * rals_g(real, fake, *means)
    of_real, of_fake = torch.autograd.grad(loss, [real, fake])
    torch.testing.assert_close(sum(f[0] for f in found) / ranks, loss, rtol=1e-12, atol=0)
    # Data-parallel engines take the mean over ranks of what each rank's own loss gives.
    torch.testing.assert_close(torch.cat([f[1] for f in found]) / ranks, of_real, rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(torch.cat([f[2] for f in found]) / ranks, of_fake, rtol=1e-11, atol=1e-14)


def test_player_state_is_by_name_and_comes_back():
    world = World(device="cpu")
    player = Player(world, nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), TrainConfig(learning_rate=1e-2))
    player.backward_and_step(player.forward(torch.randn(2, 3, 5, 5)).square().sum())
    state = {name: tensor.clone() for name, tensor in player.full_state().items()}
    assert {name.split(".")[0] for name in state} == {"parameter", "exp_avg", "exp_avg_sq", "step"}
    other = Player(world, nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), TrainConfig(learning_rate=1e-2))
    other.load_full_state(state)
    x = torch.randn(2, 3, 5, 5)
    for p in (player, other):
        p.backward_and_step(p.forward(x).square().sum())
    for name, tensor in player.full_state().items():
        assert torch.equal(tensor, other.full_state()[name]), name


def test_frozen_gives_gradient_through_but_none_to_the_parameters():
    player = Player(World(device="cpu"), nn.Conv2d(3, 1, 3), TrainConfig(learning_rate=1e-2))
    x = torch.randn(1, 3, 5, 5, requires_grad=True)
    with player.frozen() as module:
        module(x).sum().backward()
    assert x.grad is not None
    assert all(p.grad is None and p.requires_grad for p in player.raw.parameters())


def test_global_batch_norm_shares_what_it_replaces():
    norm = nn.BatchNorm2d(3)
    replaced = GlobalBatchNorm(norm)
    assert replaced.weight is norm.weight
    assert replaced.running_mean is norm.running_mean
    assert list(replaced.state_dict()) == list(copy.deepcopy(norm).state_dict())


def long_work(rank: int, ranks: int, how: str) -> tuple[int, str, float]:
    """The code and words that each rank ends with, and after how many seconds; rank 1 works thrice the timeout."""
    world = World(device="cpu", timeout=3)
    world.barrier()
    began = time.monotonic()
    try:
        with world.naming_lost_ranks("start again"):
            for work in range(2):
                with world.together(is_long=True):
                    for _ in range(18 if rank == 1 and work == 0 else 0):
                        time.sleep(0.5)
                        if how != "silent":
                            world.beat()
                    if rank == 1 and how == "failing":
                        raise UserError("no faces", 65)
        return 0, "", time.monotonic() - began
    except UserError as error:
        return error.code, str(error), time.monotonic() - began


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("how", ["well", "failing", "silent"])
def test_ranks_wait_for_long_work_as_long_as_it_says_that_it_goes_on(how: str, tmp_path: Path):
    found = on_ranks(partial(long_work, how=how), 3, tmp_path)
    codes = [code for code, _, _ in found]
    if how == "silent":
        assert codes[0] == codes[2] == LOST_RANK and found[0][2] < 15  # never without end
        return
    assert all(seconds > 8.5 for _, _, seconds in found)
    assert codes == ([0] * 3 if how == "well" else [65] * 3)
    assert how == "well" or (found[1][1] == "no faces" and "another rank cannot go on" in found[0][1])
