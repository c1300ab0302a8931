"""Every engine plays the same game: one process, DDP and ZeRO-1, 2 and 3, in every precision, with mutants caught."""

import contextlib
import dataclasses
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_ranks, use
from torch import Tensor, nn
from torch.nn import functional

from sega_dist import engines, losses, players
from sega_dist.batches import make_batch
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


# The conformance pair: engines can be compared over many steps without batch norm, which amplifies fp32's round-off,
# and with a smooth LeakyReLU and pixel loss: at a kink round-off flips a sign, on each machine another.
# Dropout stays. Without it D's logits are nearly a constant that the loss does not see, and its gradient is noise.
def without_batch_norm(module: nn.Module) -> nn.Module:
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(parent, name, nn.Identity())
    return module


def smooth(x: Tensor, slope: float = 0.01, inplace: bool = False) -> Tensor:
    """LeakyReLU far from zero, a curve as wide as the tiny networks' activations near it."""
    return slope * x + (1 - slope) * functional.softplus(x, beta=8)


@contextlib.contextmanager
def conformance_pair() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("leaky_relu", "leaky_relu_"):
            patch.setattr(functional, name, smooth)
        patch.setattr(losses, "difference", lambda hr, sr, norm: functional.huber_loss(sr, hr))
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
            mine = images(step).chunk(ranks)[rank]
            batch = make_batch(mine, step * N + rank * len(mine), config, world)
            statistics = both.step(batch, step * N, is_tick=False)
            losses.append(world.mean_of(torch.stack([statistics[key] for key in ("loss_d", "loss_g")])))
    gradients = [p.grad for p in both.discriminator.raw.parameters() if p.grad is not None]
    return {
        "losses": torch.stack(losses),
        "gradients": [g.clone() for g in gradients],
        "state": both.full_state(both.snapshot()),
    }


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
def test_two_ranks_compute_what_one_does_and_no_mutant_does(tmp_path: Path):
    """fp64 to 1e-9 over three steps, by losses, weights, and D's gradient, which the G phase must not touch.

    Three and four ranks, by the whole program, are in test_train.py.
    """
    config = with_train(precision="fp64")
    alone = play(0, 1, config)
    found = on_ranks(partial(play_all, config=config, mutations=list(MUTATIONS)), 2, tmp_path)[0]
    for mutation, result in found.items():
        gradients = max(distance(g, h) for g, h in zip(result["gradients"], alone["gradients"], strict=True))
        distances = distance(result["losses"], alone["losses"]), furthest(result, alone), gradients
        if mutation == "none":
            assert max(distances) < 1e-9, distances
        else:
            assert max(distances) > 1e-5, mutation


def play_traced(rank: int, ranks: int, config: Config) -> tuple[dict[str, Any], dict[str, Any]]:
    """Without and with the compiler, which traces and differentiates but generates no code."""
    generating = nn.Module.compile
    plainly = play(rank, ranks, config, steps=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "compile", lambda self, mode, dynamic: generating(self, backend="aot_eager"))
        return plainly, play(rank, ranks, dataclasses.replace(config, compile="default"), steps=2)


@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.distributed
def test_a_compiled_step_on_two_ranks_is_the_step_itself(tmp_path: Path):
    plainly, traced = on_ranks(partial(play_traced, config=with_train(precision="fp64")), 2, tmp_path)[0]
    assert distance(traced["losses"], plainly["losses"]) < 1e-9
    assert furthest(traced, plainly) < 1e-9


# ZeRO --------------------------------------------------------------------------------------------------------------

ENGINES = ["cpu", "zero1", "zero2", "zero3"]
zero = pytest.mark.parametrize("engine", ENGINES[1:])


def play_conformance(rank: int, ranks: int, config: Config, steps: int, mutation: str = "none") -> dict[str, Any]:
    with conformance_pair():
        return play(rank, ranks, config, steps, mutation)


def twenty_steps(rank: int, ranks: int) -> dict[str, dict[str, Any]]:
    found = {}
    for engine in ENGINES:
        use(engine)
        found[engine] = play_conformance(rank, ranks, TINY, 20)
        if rank:
            found[engine] = {}
    return found


@pytest.fixture(scope="module")
def after_twenty(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    pytest.importorskip("deepspeed")
    return on_ranks(twenty_steps, 2, tmp_path_factory.mktemp("twenty"))[0]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.deepspeed
@zero
def test_zero_is_ddp_over_twenty_steps(engine: str, after_twenty: dict[str, dict[str, Any]]):
    """Losses, weights, both moments and the average to 1e-5 in fp32, on the pair without batch norm."""
    found, expected = after_twenty[engine], after_twenty["cpu"]
    assert distance(found["losses"], expected["losses"]) < 1e-5
    for prefix in ("parameter.", "exp_avg.", "exp_avg_sq.", "step."):
        assert apart(found, expected, prefix) < 1e-5, prefix
        assert furthest(found, expected, prefix) < 1e-5, prefix
    for name, tensor in found["state"]["ema"].items():
        assert distance(tensor, expected["state"]["ema"][name]) < 1e-5


LOWER = {"bf16": 1, "fp16": 2}  # steps; fp16's first scale is too large for the generator, which skips one


def hostile(rank: int, ranks: int, engines: list[str], moved: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What else is asked of each engine, in one start of the processes."""
    asked = {
        "first": partial(play, config=TINY, steps=1),
        "moved": partial(move, state=moved),
        "checkpointed": partial(play_conformance, config=with_train(activation_checkpointing=True), steps=3),
        "bf16 steps": partial(play_conformance, config=with_train(precision="bf16"), steps=LOWER["bf16"]),
        "fp16 steps": partial(play_conformance, config=with_train(precision="fp16"), steps=LOWER["fp16"]),
        "fp16": partial(overflow, precision="fp16"),
        "fp32": partial(overflow, precision="fp32"),
        "mutant": partial(play_conformance, config=TINY, steps=3, mutation="unfrozen discriminator"),
    }
    found: dict[str, dict[str, Any]] = {engine: {} for engine in engines}
    for engine in engines:
        for name, work in asked.items():
            use(engine)
            try:
                found[engine][name] = work(rank, ranks)
            except (AssertionError, RuntimeError) as error:  # what the mutant should end in
                found[engine][name] = repr(error)
    return found


def move(rank: int, ranks: int, state: dict[str, Any]) -> dict[str, Any]:
    """A run's state as another engine takes it over, and after one more step."""
    world = World("fp32", "cpu", timeout=60)
    with conformance_pair():
        both = Players(world, TINY, None)
        both.load_full_state(state)
        both.load_full_state(state)  # a second time, as a rollback would
        taken = both.full_state(both.snapshot())
        mine = images(3).chunk(ranks)[rank]
        both.step(make_batch(mine, 3 * N + rank * len(mine), TINY, world), 3 * N, is_tick=False)
        return {"taken": taken, "state": both.full_state(both.snapshot())}


def overflow(rank: int, ranks: int, precision: str) -> dict[str, Any]:
    """One rank's loss is infinite in one step, and not in the next."""
    world = World(precision, "cpu", timeout=60)
    player = make_player(world, nn.Linear(2, 1), TrainConfig(learning_rate=0.1))
    loss = player.forward(torch.ones(1, 2)).sum()
    player.backward_and_step(loss * float("inf") if rank == 1 else loss)
    player.backward_and_step(player.forward(torch.ones(1, 2)).sum())
    return {"state": player.full_state(), "is_finite": player.is_finite()}


@pytest.fixture(scope="module")
def after_hostility(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Any]]]:
    pytest.importorskip("deepspeed")
    moved = play_conformance(0, 1, TINY, 3)["state"]
    return on_ranks(partial(hostile, engines=ENGINES, moved=moved), 2, tmp_path_factory.mktemp("hostile"))


def states_are_equal(ours: dict[str, dict[str, Tensor]], theirs: dict[str, dict[str, Tensor]]) -> bool:
    assert {file: set(tensors) for file, tensors in ours.items()} == {f: set(tensors) for f, tensors in theirs.items()}
    return all(torch.equal(tensor, theirs[file][name]) for file in ours for name, tensor in ours[file].items())


def move_and_compare(found: dict[str, Any]) -> None:
    """The state is taken over bit for bit, the next step is one process's, and the way back is open."""
    alone = play_conformance(0, 1, TINY, 3)["state"]
    assert states_are_equal(found["taken"], alone)
    expected = play_conformance(0, 1, TINY, 4)
    assert apart(found, expected, "parameter.") < 1e-6
    assert apart(found, expected, "exp_avg") < 1e-5
    assert states_are_equal(move(0, 1, found["state"])["taken"], found["state"])


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.deepspeed
@pytest.mark.parametrize("engine", ENGINES)
def test_a_state_moves_between_engines_bit_for_bit(engine: str, after_hostility: list):
    move_and_compare(after_hostility[0][engine]["moved"])


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.deepspeed
def test_a_state_moves_to_three_ranks_that_divide_no_weight_evenly(tmp_path: Path):
    moved = play_conformance(0, 1, TINY, 3)["state"]
    found = on_ranks(partial(move, state=moved), 3, tmp_path, "zero3")[0]
    move_and_compare(found)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.deepspeed
@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_with_batch_norm_starts_as_one_process_does(engine: str, after_hostility: list):
    """The real pair's first losses, and its first gradients, as Adam's first moment keeps them."""
    found, alone = after_hostility[0][engine]["first"], play(0, 1, TINY, steps=1)
    assert distance(found["losses"], alone["losses"]) < 1e-6
    assert furthest(found, alone, "exp_avg.") < 0.05


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.deepspeed
@zero
def test_zero_notices_a_discriminator_that_is_not_frozen(engine: str, after_hostility: list):
    """ZeRO-1 is silently wrong, 2 and 3 fail."""
    found = after_hostility[0][engine]["mutant"]
    if engine == "zero1":
        assert apart(found, play_conformance(0, 1, TINY, 3), "exp_avg.") > 0.01
    else:
        assert isinstance(found, str)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.deepspeed
@pytest.mark.parametrize("engine", ENGINES)
def test_an_overflow_on_one_rank_is_agreed_on_by_all(engine: str, after_hostility: list):
    """fp16 skips that step on every rank and goes on; other precisions have no such excuse and say not finite."""
    state = after_hostility[0][engine]["fp16"]["state"]
    assert [state[name].item() for name in ("scaler.scale", "scaler.growth", "step.weight")] == [32768.0, 1, 1]
    assert [rank[engine]["fp16"]["is_finite"] for rank in after_hostility] == [True, True]
    assert [rank[engine]["fp32"]["is_finite"] for rank in after_hostility] == [False, False]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.deepspeed
@zero
@pytest.mark.parametrize("precision", LOWER)
def test_lower_precision_under_zero_is_that_under_ddp(engine: str, precision: str, after_hostility: list):
    """The same scale, the same autocast: gradients to half a unit in the last place, and not those of fp32.

    ZeRO-3 alone is not equal bit by bit: it adds the two gradients of the shallow features in another order.
    """
    found, expected = (after_hostility[0][name][f"{precision} steps"] for name in (engine, "cpu"))
    assert distance(found["losses"], expected["losses"]) < (1e-5 if precision == "fp16" else 1e-7)
    off = apart(found, expected, "exp_avg.")
    assert off < torch.finfo({"bf16": torch.bfloat16, "fp16": torch.float16}[precision]).eps / 2
    assert apart(found, play_conformance(0, 1, TINY, LOWER[precision]), "exp_avg.") > max(2 * off, 1e-4)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.deepspeed
@pytest.mark.parametrize("engine", ENGINES)
def test_activation_checkpointing_under_every_engine(engine: str, after_hostility: list):
    alone = play_conformance(0, 1, TINY, 3)
    assert distance(after_hostility[0][engine]["checkpointed"]["losses"], alone["losses"]) < 1e-5


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.deepspeed
@pytest.mark.soak
def test_offloaded_optimiser_state_trains(tmp_path: Path):
    """DeepSpeed's own Adam on the host: another order of additions, so the tolerance is wider."""
    alone = play_conformance(0, 1, TINY, 3)
    found = on_ranks(partial(play_conformance, config=TINY, steps=3), 2, tmp_path, "zero2_offload")[0]
    assert distance(found["losses"], alone["losses"]) < 1e-5
    assert apart(found, alone, "parameter.") < 1e-4


# Precision ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precision_tracks_fp32(precision: str):
    """Every loss of ten steps on the pair without batch norm; measured 0.07 % and 0.06 %."""
    config = dataclasses.replace(TINY, train=dataclasses.replace(TINY.train, precision=precision))
    full, low = play_conformance(0, 1, TINY, 10), play_conformance(0, 1, config, 10)
    print(precision, float(((low["losses"] - full["losses"]) / full["losses"]).abs().max()))
    assert ((low["losses"] - full["losses"]) / full["losses"]).abs().max() < 0.005
    assert not torch.equal(low["losses"], full["losses"])


def dtypes_of(module: nn.Module) -> dict[str, set[torch.dtype]]:
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
    batch = make_batch(images(0), 0, config, world)
    statistics = both.step(batch, 0, is_tick=True)
    assert {value.dtype for value in statistics.values()} == {torch.float32}
    for name, dtypes in seen.items():
        is_head = ".head." in name or name.endswith("logit")
        assert dtypes == {torch.float32 if is_head else world.compute_dtype}, name
    for tensors in both.full_state(both.snapshot()).values():
        assert {t.dtype for name, t in tensors.items() if not name.endswith("num_batches_tracked")} <= {
            torch.float32, *([torch.int64, torch.float64] if precision == "fp16" else [])
        }  # fmt: skip


def test_an_overflow_halves_one_players_scale_and_leaves_its_weights():
    world = World("fp16", "cpu")
    player, other = (make_player(world, nn.Linear(2, 1), TrainConfig(learning_rate=0.1)) for _ in range(2))
    before = player.raw.weight.clone()
    player.backward_and_step(player.forward(torch.ones(1, 2)).sum() * float("inf"))
    assert torch.equal(player.raw.weight, before)
    assert [p.full_state()["scaler.scale"].item() for p in (player, other)] == [32768.0, 65536.0]
    other.load_full_state(player.full_state())
    assert other.scaler.get_scale() == 32768.0
    player.backward_and_step(player.forward(torch.ones(1, 2)).sum())
    assert not torch.equal(player.raw.weight, before)
    assert player.full_state()["scaler.growth"].item() == 1


# Activation checkpointing ------------------------------------------------------------------------------------------


def kept_bytes(config: Config) -> int:
    """What autograd is given to keep in a step."""
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.nbytes), t)[1], lambda t: t):
        play(0, 1, config, steps=1)
    return sum(sizes)


def test_activation_checkpointing_keeps_less_and_changes_nothing():
    """fp64, to the last bit; counted is what autograd keeps during the first step."""
    kept, ended = [], []
    for is_saving in (False, True):
        config = with_train(precision="fp64", activation_checkpointing=is_saving)
        kept.append(kept_bytes(config))
        ended.append(play(0, 1, config))
    assert torch.equal(ended[0]["losses"], ended[1]["losses"])
    assert furthest(ended[1], ended[0]) == 0
    assert kept[1] < 0.6 * kept[0]
