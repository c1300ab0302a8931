"""Both players with what they minimise: one step of the game, apart from clock, data and reports."""

import copy

import torch
from torch import Tensor
from torch.profiler import record_function

from sega_dist.config import Config
from sega_dist.distributed import World
from sega_dist.ema import Ema
from sega_dist.engines import Player, make_player, on_host
from sega_dist.kernels import backend
from sega_dist.networks.build import build_discriminator, build_generator
from sega_dist.networks.generator import Generator
from sega_dist.networks.vgg19 import Vgg19
from sega_dist.objectives import Batch, SegaObjective, Statistics


class Players:
    """Generator, discriminator where there is one, their objective, and the average of the generator's weights.

    `features` is VGG19 with its weights where the configuration uses it.
    """

    def __init__(self, world: World, config: Config, features: Vgg19 | None):
        self.world, self.config, train = world, config, config.train
        generator = build_generator(config)
        self.shown = copy.deepcopy(world.place(generator)).eval().requires_grad_(False)
        self.generator = make_player(world, generator, train.learning_rate, train.betas)
        self.discriminator = None
        if config.has_discriminator:
            self.discriminator = make_player(world, build_discriminator(config), train.learning_rate, train.betas)
        if features is not None:
            world.place(features)
        self.objective = SegaObjective(config, features, world.global_means)
        self.ema = Ema(self.generator.parts, train.ema_kimg * 1000) if train.ema_kimg else None

    def step(self, batch: Batch, nimg: int, is_tick: bool) -> Statistics:
        """One update of both players at image `nimg`: one generator forward, D phase, then G phase with D frozen."""
        is_warmup = nimg < self.config.train.content_warmup_kimg * 1000 or self.discriminator is None
        with self.world.autocast(), record_function("generator"):
            sr = self.generator.forward(batch.lr).to(self.world.dtype)  # (N,3,H,W) in [-1,1]
        with self.world.autocast():
            targets = self.objective.targets(batch, is_warmup)
        statistics: Statistics = {}
        if self.discriminator is None or is_warmup:
            with self.world.autocast():
                loss, statistics = self.objective.g_loss(None, batch, targets, sr)
            self.generator.backward_and_step(loss)
        else:
            with record_function("D phase"):
                with self.world.autocast():
                    loss, statistics = self.objective.d_loss(self.discriminator.forward, batch, targets, sr.detach())
                self.discriminator.backward_and_step(loss)
            # Frozen until the end of backward, where activation checkpointing calls D again.
            with record_function("G phase"), self.discriminator.frozen() as frozen:
                with self.world.autocast():
                    if is_tick:
                        statistics |= self.objective.diagnose(frozen, batch, targets, sr.detach())
                    loss, of_generator = self.objective.g_loss(frozen, batch, targets, sr)
                self.generator.backward_and_step(loss)
            statistics |= of_generator
        if self.ema:
            batch_size = self.config.train.batch_size
            self.ema.update(batch_size, nimg + batch_size)
        return statistics

    @property
    def by_name(self) -> dict[str, Player]:
        """The players there are."""
        return {"generator": self.generator} | ({"discriminator": self.discriminator} if self.discriminator else {})

    @torch.no_grad()
    def snapshot(self) -> Generator:
        """What users get: the averaged weights where there are any. All ranks call it together."""
        weights = self.generator.whole(self.ema.averages if self.ema else self.generator.parts())
        torch._foreach_copy_(list(self.shown.parameters()), weights)
        for mine, its in zip(self.shown.buffers(), self.generator.raw.buffers(), strict=True):
            mine.copy_(its)
        return self.shown

    def full_state(self, snapshot: Generator) -> dict[str, dict[str, Tensor]]:
        """All that training changes, by file of a checkpoint; on the first rank, but all call it together."""
        state = {name: player.full_state() for name, player in self.by_name.items()}
        if self.ema:
            state["ema"] = {name: on_host(tensor) for name, tensor in snapshot.state_dict().items()}
        return state

    def load_full_state(self, state: dict[str, dict[str, Tensor]]) -> None:
        """The inverse of `full_state`, whatever the number of ranks or the engine that made it."""
        for name, player in self.by_name.items():
            player.load_full_state(state[name])
        if self.ema:
            averages = [state["ema"][name] for name, _ in self.generator.raw.named_parameters()]
            self.generator.spread(averages, self.ema.averages)


def plan_kernels(config: Config, world: World) -> dict[str, backend.Impl]:
    """Which implementation each fused op of a step will take; ValueError where the configuration asks in vain."""
    count, side, channels = config.train.batch_size // world.size, config.lr_size, config.generator.channels
    trunk = {op: [count, channels, side, side] for op in ("ridb", "upconv_act")}
    logits = {"rals": [count, 1]} if config.has_discriminator and config.loss.adv == "rals" else {}
    device = world.device.type
    of_trunk = backend.plan(config.kernels, trunk, world.compute_dtype, device, config.generator.slope)
    return of_trunk | backend.plan(config.kernels, logits, world.dtype, device, 0.0)
