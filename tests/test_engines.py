"""Every engine plays the same game: one process, DDP and ZeRO-1, 2 and 3, in every precision, with mutants caught."""

import contextlib
import dataclasses
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_ranks
from torch import Tensor, nn
from torch.multiprocessing import ProcessRaisedException

from sega_dist import engines, players
from sega_dist.config import (
    Config,
    DataConfig,
    DiscriminatorConfig,
    EncoderConfig,
    GeneratorConfig,
    LossConfig,
    TrainConfig,
)
from sega_dist.distributed import World
from sega_dist.engines import Player, make_player
from sega_dist.loop import make_batch
from sega_dist.players import Players

N = 12
TINY = Config(
    data=DataConfig(size=32, workers=0),
    generator=GeneratorConfig(channels=8, nested_blocks=1),
    encoder=EncoderConfig(kind="trainable", width=2),
    discriminator=DiscriminatorConfig(width=4),
    loss=LossConfig(w_content=0.0, w_pixel=1.0, w_adv=0.1),
    train=TrainConfig(batch_size=N, learning_rate=1e-4, ema_kimg=0.1),
)


def with_train(**changes: Any) -> Config:
    return dataclasses.replace(TINY, train=dataclasses.replace(TINY.train, **changes))


# The conformance pair: without batch norm, which amplifies fp32's round-off, engines can be compared over many steps.
# Dropout stays. Without it D's logits are nearly a constant that the loss does not see, and its gradient is noise.
def without_batch_norm(module: nn.Module) -> nn.Module:
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(parent, name, nn.Identity())
    return module


@contextlib.contextmanager
def conformance_pair() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("build_generator", "build_discriminator"):
            build = getattr(players, name)
            patch.setattr(players, name, lambda config, build=build: without_batch_norm(build(config)))
        yield


# What must turn the tests red: each changes the gradient that an update is made of.
@contextlib.contextmanager
def unfrozen(self: Player) -> Iterator[nn.Module]:
    yield self.raw


def detached_means(self: World, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    means = real.mean().detach(), fake.mean().detach()
    return tuple(self.mean_of(mean.clone()) for mean in means)


MUTATIONS: dict[str, tuple[Any, str, Any]] = {
    "none": (Player, "frozen", Player.frozen),
    "unfrozen discriminator": (Player, "frozen", unfrozen),
    "local means": (World, "global_means", lambda self, real, fake: (real.mean(), fake.mean())),
    "detached means": (World, "global_means", detached_means),
    "local batch norm": (engines, "with_global_batch_norm", lambda module, ranks, is_cuda: module),
}


def images(seed: int) -> Tensor:
    """A global batch of pixels."""
    return torch.randint(256, (N, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def play(rank: int, ranks: int, config: Config, steps: int = 3, mutation: str = "none") -> dict[str, Any]:
    """Some steps on this rank's part of a global batch: losses of each step, D's last gradient, and the end state."""
    world = World(config.train.precision, "cpu", timeout=60)
    torch.manual_seed(0)
    target, name, value = MUTATIONS[mutation]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target, name, value)
        both = Players(world, config, None)
        losses = []
        for step in range(steps):
            images = torch.randint(
                256, (N, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(step)
            )
            mine = images.chunk(ranks)[rank]
            batch = make_batch(mine, step * N + rank * len(mine), config, world.dtype)
            statistics = both.step(batch, step * N, is_tick=False)
            losses.append(world.mean_of(torch.stack([statistics[key] for key in ("loss_d", "loss_g")])))
    gradients = [p.grad for p in both.discriminator.raw.parameters() if p.grad is not None]
    return {"losses": torch.stack(losses), "gradients": [g.clone() for g in gradients], "state": both.full_state()}


def play_all(rank: int, ranks: int, config: Config, mutations: list[str]) -> dict[str, Any]:
    return {mutation: play(rank, ranks, config, mutation=mutation) for mutation in mutations}


def distance(ours: Tensor, theirs: Tensor) -> float:
    """Relative, in fp64."""
    return float((ours.double() - theirs.double()).norm() / (theirs.double().norm() + 1e-300))


def furthest(ours: dict[str, Any], theirs: dict[str, Any], prefix: str = "parameter.") -> float:
    """The largest relative distance of two end states' tensors whose names start so."""
    found = {}
    for player in ("generator", "discriminator"):
        assert ours["state"][player].keys() == theirs["state"][player].keys()
        found |= {
            f"{player} {name}": distance(tensor, theirs["state"][player][name])
            for name, tensor in ours["state"][player].items()
            if name.startswith(prefix) and tensor.is_floating_point()
        }
    return max(found.values())


def apart(ours: dict[str, Any], theirs: dict[str, Any], prefix: str) -> float:
    """The relative distance of two end states, each player's tensors taken together."""
    found = []
    for player in ("generator", "discriminator"):
        joined = [torch.cat([t.double().flatten() for name, t in sorted(end["state"][player].items())
                             if name.startswith(prefix)]) for end in (ours, theirs)]  # fmt: skip
        found.append(distance(*joined))
    return max(found)


# World size --------------------------------------------------------------------------------------------------------


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)])
def test_any_number_of_ranks_computes_what_one_does_and_no_mutant_does(ranks: int, tmp_path: Path):
    """fp64 to 1e-9 over three steps, by losses, weights, and D's gradient, which the G phase must not touch."""
    config = with_train(precision="fp64")
    alone = play(0, 1, config)
    found = on_ranks(partial(play_all, config=config, mutations=list(MUTATIONS)), ranks, tmp_path)[0]
    for mutation, result in found.items():
        gradients = max(distance(g, h) for g, h in zip(result["gradients"], alone["gradients"], strict=True))
        distances = distance(result["losses"], alone["losses"]), furthest(result, alone), gradients
        if mutation == "none":
            assert max(distances) < 1e-9, distances
        else:
            assert max(distances) > 1e-5, mutation


@pytest.mark.distributed
def test_first_losses_agree_in_fp32(tmp_path: Path):
    alone = play(0, 1, TINY, steps=1)
    assert distance(on_ranks(partial(play, config=TINY, steps=1), 2, tmp_path)[0]["losses"], alone["losses"]) < 1e-6


# ZeRO --------------------------------------------------------------------------------------------------------------


def play_conformance(rank: int, ranks: int, config: Config, steps: int, mutation: str = "none") -> dict[str, Any]:
    with conformance_pair():
        return play(rank, ranks, config, steps, mutation)


@pytest.fixture(scope="module")
def under_ddp(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return on_ranks(partial(play_conformance, config=TINY, steps=20), 2, tmp_path_factory.mktemp("ddp"))[0]


@pytest.mark.distributed
@pytest.mark.deepspeed
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_is_ddp_over_twenty_steps(stage: int, under_ddp: dict[str, Any], tmp_path: Path):
    """Losses, weights, both moments and the average to 1e-5 in fp32, on the pair without batch norm."""
    found = on_ranks(partial(play_conformance, config=TINY, steps=20), 2, tmp_path, f"zero{stage}")[0]
    assert distance(found["losses"], under_ddp["losses"]) < 1e-5
    for prefix in ("parameter.", "exp_avg.", "exp_avg_sq.", "step."):
        assert apart(found, under_ddp, prefix) < 1e-5, prefix
        assert furthest(found, under_ddp, prefix) < 1e-2, prefix  # a bias alone may be mostly round-off
    for name, tensor in found["state"]["ema"].items():
        assert distance(tensor, under_ddp["state"]["ema"][name]) < 1e-5


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.deepspeed
@pytest.mark.parametrize(("stage", "ranks"), [(1, 2), (2, 2), (3, 3)])
def test_zero_with_batch_norm_starts_as_one_process_does(stage: int, ranks: int, tmp_path: Path):
    """The real pair's first gradients, as Adam's first moment keeps them; three ranks divide no weight evenly."""
    alone = play(0, 1, TINY, steps=1)
    found = on_ranks(partial(play, config=TINY, steps=1), ranks, tmp_path, f"zero{stage}")[0]
    assert furthest(found, alone, "exp_avg.") < 0.05
    assert distance(found["losses"], alone["losses"]) < 1e-6


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.deepspeed
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_notices_a_discriminator_that_is_not_frozen(stage: int, tmp_path: Path):
    """ZeRO-1 would silently be wrong, 2 and 3 fail."""
    alone = play_conformance(0, 1, TINY, 3)
    work = partial(play_conformance, config=TINY, steps=3, mutation="unfrozen discriminator")
    if stage == 1:
        assert apart(on_ranks(work, 2, tmp_path, "zero1")[0], alone, "exp_avg.") > 0.1
    else:
        with pytest.raises(ProcessRaisedException, match=r"AssertionError|RuntimeError"):
            on_ranks(work, 2, tmp_path, f"zero{stage}")


def offloaded(rank: int, ranks: int) -> dict[str, Any]:
    return play_conformance(rank, ranks, TINY, 3)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.deepspeed
def test_offloaded_optimiser_state_trains(tmp_path: Path):
    """DeepSpeed's own Adam on the host: another order of additions, so the tolerance is wider."""
    alone = play_conformance(0, 1, TINY, 3)
    found = on_ranks(offloaded, 2, tmp_path, "zero2_offload")[0]
    assert distance(found["losses"], alone["losses"]) < 1e-5
    assert furthest(found, alone) < 1e-4


# Precision ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 0.02), ("fp16", 0.01)])
def test_lower_precision_tracks_fp32(precision: str, tolerance: float):
    """Every loss of ten steps on the pair without batch norm; measured 0.4 % and 0.1 %."""
    config = dataclasses.replace(TINY, train=dataclasses.replace(TINY.train, precision=precision))
    full, low = play_conformance(0, 1, TINY, 10), play_conformance(0, 1, config, 10)
    print(precision, float(((low["losses"] - full["losses"]) / full["losses"]).abs().max()))
    assert ((low["losses"] - full["losses"]) / full["losses"]).abs().max() < tolerance
    assert not torch.equal(low["losses"], full["losses"])


def dtypes_of(module: nn.Module) -> Iterator[tuple[dict[str, set[torch.dtype]], Any]]:
    """Records the dtype that each layer computes in, by name."""
    seen: dict[str, set[torch.dtype]] = {}
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear | nn.BatchNorm2d):
            layer.register_forward_hook(lambda _, __, y, name=name: seen.setdefault(name, set()).add(y.dtype))
    return seen


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_what_stays_fp32(precision: str):
    """Weights, moments, average, losses, and D's fully connected layers; all convolutions are in the lower one."""
    config = with_train(precision=precision)
    world = World(precision, "cpu")
    both = Players(world, config, None)
    seen = dtypes_of(both.discriminator.raw)
    batch = make_batch(images(0), 0, config, world.dtype)
    statistics = both.step(batch, 0, is_tick=True)
    assert {value.dtype for value in statistics.values()} == {torch.float32}
    for name, dtypes in seen.items():
        is_head = ".head." in name or name.endswith("logit")
        assert dtypes == {torch.float32 if is_head else world.compute_dtype}, name
    for tensors in both.full_state().values():
        assert {t.dtype for name, t in tensors.items() if not name.endswith("num_batches_tracked")} <= {
            torch.float32, *([torch.int64, torch.float64] if precision == "fp16" else [])
        }  # fmt: skip


def test_an_overflow_halves_one_players_scale_and_leaves_its_weights():
    world = World("fp16", "cpu")
    player, other = (make_player(world, nn.Linear(2, 1), 0.1, (0.9, 0.999)) for _ in range(2))
    before = player.raw.weight.clone()
    player.backward_and_step(player.forward(torch.ones(1, 2)).sum() * float("inf"))
    assert torch.equal(player.raw.weight, before)
    assert [p.full_state()["scaler.scale"].item() for p in (player, other)] == [32768.0, 65536.0]
    other.load_full_state(player.full_state())
    assert other.scaler.get_scale() == 32768.0
    player.backward_and_step(player.forward(torch.ones(1, 2)).sum())
    assert not torch.equal(player.raw.weight, before)
    assert player.full_state()["scaler.growth"].item() == 1


def overflow(rank: int, ranks: int, precision: str) -> dict[str, Any]:
    """One rank's loss is infinite."""
    world = World(precision, "cpu", timeout=60)
    torch.manual_seed(0)
    player = make_player(world, nn.Linear(2, 1), 0.1, (0.9, 0.999))
    before = player.full_state()
    loss = player.forward(torch.ones(1, 2)).sum()
    player.backward_and_step(loss * float("inf") if rank == 1 else loss)
    player.backward_and_step(player.forward(torch.ones(1, 2)).sum())
    return {"before": before, "after": player.full_state(), "is_finite": player.is_finite()}


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.deepspeed
@pytest.mark.parametrize("engine", ["cpu", "zero1", "zero2", "zero3"])
def test_an_overflow_on_one_rank_is_agreed_on_by_all(engine: str, tmp_path: Path):
    """fp16 skips that step on every rank and goes on; other precisions have no such excuse and say not finite."""
    results = on_ranks(partial(overflow, precision="fp16"), 2, tmp_path, engine)
    assert results[0]["after"]["scaler.scale"].item() == 32768.0
    assert results[0]["after"]["scaler.growth"].item() == 1
    assert results[0]["after"]["step.weight"].item() == 1
    assert all(result["is_finite"] for result in results)
    results = on_ranks(partial(overflow, precision="fp32"), 2, tmp_path, engine)
    assert not any(result["is_finite"] for result in results)


# Activation checkpointing ------------------------------------------------------------------------------------------


def saved_bytes(config: Config) -> tuple[int, dict[str, Any]]:
    """What autograd keeps during a step at most at a time, summed over what it was given to keep."""
    kept = 0

    def keep(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = play(0, 1, config, steps=1)
    return kept, result


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=[pytest.mark.slow, pytest.mark.distributed])])
def test_activation_checkpointing_changes_nothing(ranks: int, tmp_path: Path):
    """fp64, to the last bit in one process."""
    plain, saving = with_train(precision="fp64"), with_train(precision="fp64", activation_checkpointing=True)
    expected = play(0, 1, plain)
    found = play(0, 1, saving) if ranks == 1 else on_ranks(partial(play, config=saving), 2, tmp_path)[0]
    if ranks == 1:
        assert torch.equal(found["losses"], expected["losses"])
        assert furthest(found, expected) == 0
    else:
        assert distance(found["losses"], expected["losses"]) < 1e-9
        assert furthest(found, expected) < 1e-9


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.deepspeed
def test_activation_checkpointing_under_zero3(tmp_path: Path):
    config = dataclasses.replace(TINY, train=with_train(activation_checkpointing=True).train)
    alone = play_conformance(0, 1, TINY, 3)
    found = on_ranks(partial(play_conformance, config=config, steps=3), 2, tmp_path, "zero3")[0]
    assert distance(found["losses"], alone["losses"]) < 1e-5
