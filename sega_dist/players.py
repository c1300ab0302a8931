"""Both players with what they minimise: one step of the game, apart from clock, data and reports."""

import copy
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from sega_dist import latents
from sega_dist.config import Config, learning_rate
from sega_dist.distributed import World
from sega_dist.ema import Ema
from sega_dist.engines import PARAMETERS, Player, make_player, on_host
from sega_dist.errors import UserError
from sega_dist.kernels import backend
from sega_dist.networks.build import build_discriminator, build_generator
from sega_dist.networks.facegan import FaceGenerator
from sega_dist.networks.vgg19 import Vgg19
from sega_dist.objectives import Batch, Output, Statistics, Targets, make_objective
from sega_dist.recording import CudaGraphs, Recorder

# torch.compile's modes; the graphs of a step are recorded here, around what it compiles.
MODES = {"default": "default", "max": "max-autotune-no-cudagraphs"}


class Players:
    """Generator, discriminator where there is one, their objective, and the average of the generator's weights.

    `features` is VGG19 with its weights where the configuration uses it.
    """

    def __init__(self, world: World, config: Config, features: Vgg19 | None):
        if config.compile != "off" and world.zero is not None:
            raise UserError(f"compile is {config.compile}: DeepSpeed's engine works with compile off only; or use DDP")
        if config.is_face_gan and world.zero is not None:  # it takes R1's inner gradient for the whole, ZeRO-3 parts it
            raise UserError("generator.kind is facegan: DeepSpeed's engine goes backward once, R1 twice; use DDP")
        self.world, self.config = world, config
        generator = build_generator(config)
        self.shown = copy.deepcopy(world.place(generator)).eval().requires_grad_(False)
        self.generator = make_player(world, generator, config.train)
        self.discriminator = None
        if config.has_discriminator:
            self.discriminator = make_player(world, build_discriminator(config), config.train)
        if features is not None:
            world.place(features).round_to(world.compute_dtype)
        self.objective = make_objective(config, features, world.global_means)
        self.ema = Ema(self.generator.parts, config.train.ema_kimg * 1000) if config.train.ema_kimg else None
        self.memory: dict[str, float] = {}  # GB at the most in each piece of a step, on a GPU
        self.recorder = Recorder(None)
        if self._can_be_recorded:
            self.record()
        if config.compile != "off":
            torch.backends.cudnn.benchmark = True  # every shape comes again and again
            for network in (*(player.raw for player in self.by_name.values()), *([features] if features else [])):
                network.compile(mode=MODES[config.compile], dynamic=False)

    def record(self) -> None:
        """From now on the pieces of a step are CUDA graphs."""
        self.recorder = Recorder(CudaGraphs())
        warnings.filterwarnings("ignore", message=".*capturable=True")  # of the steps before the recording
        for player in self.by_name.values():
            for group in player.optimizer.param_groups:
                if "capturable" in group:
                    group["capturable"] = True

    @property
    def _can_be_recorded(self) -> bool:
        """One process on a GPU; fp16's scaler and collectives ask the host."""
        is_alone_on_gpu = self.world.device.type == "cuda" and self.world.size == 1
        return self.config.compile != "off" and is_alone_on_gpu and self.world.precision != "fp16"

    def step(self, batch: Batch, nimg: int, is_tick: bool) -> Statistics:
        """One update of both players at image `nimg`: one generator forward, D phase, then G phase with D frozen.

        The statistics may lie where the next step will leave its own.
        """
        self._set_learning_rate(learning_rate(self.config.train, nimg))
        batch, regularised = self.recorder.hold(batch), dict[str, Tensor]()
        if self.objective.is_regularised(nimg):
            # Other pieces, recorded before it, compute where its outputs lie.
            regularised = {name: value.clone() for name, value in self._piece(self.regularise, batch).items()}
        if self.discriminator is None or nimg < self.config.train.content_warmup_kimg * 1000:
            statistics = self._piece(self.content_step, batch)
        else:
            output, targets, statistics = self._piece(self.d_phase, batch)
            diagnosis: Statistics = {}
            if is_tick:
                with self.world.autocast(), self.discriminator.frozen() as frozen:
                    sr = output.sr.detach()
                    diagnosis = self.objective.diagnose(frozen, batch, targets, sr)
                    diagnosis |= self.objective.gradient_ratio(frozen, batch, targets, sr)
            statistics = regularised | statistics | diagnosis | self._piece(self.g_phase, batch, targets, output)
        if self.ema:
            batch_size = self.config.train.batch_size
            self.ema.update(batch_size, nimg + batch_size)
        return statistics

    def content_step(self, batch: Batch) -> Statistics:
        """An update of the generator alone: the warm-up, and training without a discriminator."""
        with self.world.autocast():
            targets = self.objective.targets(batch, is_warmup=True)
            loss, statistics = self.objective.g_loss(None, batch, targets, self._made(batch))
        self.generator.backward_and_step(loss)
        return statistics

    def regularise(self, batch: Batch) -> Statistics:
        """An update of the discriminator by its regularisation alone, eagerly: compiled graphs go backward once."""
        assert self.discriminator is not None
        eagerly = torch.compiler.set_stance("force_eager") if self.config.compile != "off" else nullcontext()
        with record_function("R1"), eagerly:
            loss, statistics = self.objective.regularisation(self.discriminator.forward, batch)
            self.discriminator.backward_and_step(loss)
        return statistics

    def d_phase(self, batch: Batch) -> tuple[Output, Targets, Statistics]:
        """SR with its graph, what both phases need of HR and LR, and an update of the discriminator."""
        assert self.discriminator is not None
        with self.world.autocast():
            output = self._made(batch)
            targets = self.objective.targets(batch, is_warmup=False)
        with record_function("D phase"):
            with self.world.autocast():
                loss, statistics = self.objective.d_loss(self.discriminator.forward, batch, targets, output.sr.detach())
            self.discriminator.backward_and_step(loss)
        return output, targets, statistics

    def g_phase(self, batch: Batch, targets: Targets, output: Output) -> Statistics:
        """An update of the generator, against the discriminator as it now is."""
        assert self.discriminator is not None
        # Frozen until the end of backward, where activation checkpointing calls D again.
        with record_function("G phase"), self.discriminator.frozen() as frozen:
            with self.world.autocast():
                loss, statistics = self.objective.g_loss(frozen, batch, targets, output)
            self.generator.backward_and_step(loss)
        return statistics

    def _made(self, batch: Batch) -> Output:
        with record_function("generator"):
            made = self.generator.forward(*self.objective.inputs(batch))
            images = made if isinstance(made, tuple) else (made,)
            return Output(*(image.to(self.world.dtype) for image in images))  # (N,3,H,W) in [-1,1]

    def _set_learning_rate(self, value: float) -> None:
        """Of the coming steps; what was recorded with another is recorded anew."""
        groups = [group for player in self.by_name.values() for group in player.groups]
        if any(group["lr"] != value for group in groups):
            self.recorder = Recorder(self.recorder.record)
            for group in groups:
                group["lr"] = value

    def _piece(self, function: Callable[..., Any], *inputs: Any) -> Any:
        """Call it, or replay it; on a GPU note the memory of a call."""
        if self.world.device.type != "cuda":
            return self.recorder(function, *inputs)
        torch.cuda.reset_peak_memory_stats()
        outputs = self.recorder(function, *inputs)
        name = f"memory_{function.__name__}_gb"
        self.memory[name] = max(self.memory.get(name, 0.0), torch.cuda.max_memory_allocated() / 1e9)
        return outputs

    @property
    def by_name(self) -> dict[str, Player]:
        """The players there are."""
        return {"generator": self.generator} | ({"discriminator": self.discriminator} if self.discriminator else {})

    @torch.no_grad()
    def snapshot(self) -> nn.Module:
        """What users get: the averaged weights where there are any. All ranks call it together."""
        weights = self.generator.whole(self.ema.averages if self.ema else self.generator.parts())
        torch._foreach_copy_(list(self.shown.parameters()), weights)
        for mine, its in zip(self.shown.buffers(), self.generator.raw.buffers(), strict=True):
            mine.copy_(its)
        return self.shown

    def full_state(self, snapshot: nn.Module) -> dict[str, dict[str, Tensor]]:
        """All that training changes, by file of a checkpoint; on the first rank, but all call it together."""
        state = {name: player.full_state() for name, player in self.by_name.items()}
        if self.ema:
            state["ema"] = {name: on_host(tensor) for name, tensor in snapshot.state_dict().items()}
        return state

    def for_users(self, snapshot: nn.Module, state: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
        """What a snapshot's file holds of `state`; on the first rank.

        A search reads both networks of a face GAN, and how the mapping network spreads its w.
        """
        weights = state.get("ema") or {name: on_host(tensor) for name, tensor in snapshot.state_dict().items()}
        if not isinstance(snapshot, FaceGenerator):
            return weights
        mean, std, w_avg = latents.spread(snapshot.mapping)
        weights = {f"generator.{name}": tensor for name, tensor in weights.items()}
        weights |= {f"discriminator.{name.removeprefix(PARAMETERS)}": tensor
                    for name, tensor in state["discriminator"].items() if name.startswith(PARAMETERS)}  # fmt: skip
        return weights | {"generator.mapping.w_avg": on_host(w_avg), "mean": on_host(mean), "std": on_host(std)}

    def load_full_state(self, state: dict[str, dict[str, Tensor]]) -> None:
        """The inverse of `full_state`, whatever the number of ranks or the engine that made it."""
        self.recorder = Recorder(self.recorder.record)  # what was recorded updates tensors that are now replaced
        for name, player in self.by_name.items():
            player.load_full_state(state[name])
        if self.ema:
            averages = [state["ema"][name] for name, _ in self.generator.raw.named_parameters()]
            self.generator.spread(averages, self.ema.averages)


def plan_kernels(config: Config, world: World) -> dict[str, backend.Impl]:
    """Which implementation each fused op of a step will take; ValueError where the configuration asks in vain."""
    count, side, channels = config.train.batch_size // world.size, config.lr_size, config.generator.channels
    is_sega = config.generator.kind == "sega"
    trunk = {op: [count, channels, side, side] for op in ("ridb", "upconv_act")} if is_sega else {}
    logits = {"rals": [count, 1]} if config.has_discriminator and config.loss.adv == "rals" else {}
    device = world.device.type
    of_trunk = backend.plan(config.kernels, trunk, world.compute_dtype, device, config.generator.slope)
    return of_trunk | backend.plan(config.kernels, logits, world.dtype, device, 0.0)
