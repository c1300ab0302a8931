"""What runs a player's optimiser step: one process, DDP, or DeepSpeed's ZeRO-1, 2 and 3."""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from sega_dist.batchnorm import with_global_batch_norm
from sega_dist.config import TrainConfig
from sega_dist.distributed import World
from sega_dist.errors import UserError

PARAMETERS, FIRST, SECOND, STEP = "parameter.", "exp_avg.", "exp_avg_sq.", "step."  # prefixes in a player's state
MOMENTS = ((FIRST, "exp_avg"), (SECOND, "exp_avg_sq"))  # of Adam
SQUARES = ("exp_avg_sq", "square_avg")  # of Adam and RMSprop
KEPT = ("exp_avg", *SQUARES, "momentum_buffer", "step")  # what an optimiser remembers of a parameter
SCALE, GROWTH = "scaler.scale", "scaler.growth"  # fp16's loss scale, and steps since it last changed


def on_host(tensor: Tensor) -> Tensor:
    """A copy that later steps do not change."""
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def make_optimizer(module: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    parameters, (first, second) = list(module.parameters()), config.betas
    shared: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, **shared, momentum=first, fused=True)
    if config.optimizer == "rmsprop":
        return torch.optim.RMSprop(parameters, **shared, alpha=second)
    return torch.optim.Adam(parameters, **shared, betas=config.betas, fused=True)


class Player:
    """One side of the game: a module, its optimiser and the engine of both; here one process, or DDP.

    `forward` is the engine's, for the phase that trains this player; `raw` the module itself.
    """

    def __init__(self, world: World, module: nn.Module, config: TrainConfig):
        self.world, self.config = world, config
        self.raw = with_global_batch_norm(world.place(module), world.size, world.device.type == "cuda")
        self.optimizer = make_optimizer(self.raw, config)
        self.scaler = torch.amp.GradScaler(world.device.type) if world.precision == "fp16" else None
        self.forward = self._engine()

    def _engine(self) -> nn.Module:
        if self.world.size == 1:
            return self.raw
        with warnings.catch_warnings():  # newer torch calls this flag otherwise, accelerate does not yet
            warnings.filterwarnings("ignore", message=".*broadcast_buffers")
            engine: nn.Module = self.world.accelerator.prepare_model(self.raw)
        self._settle_buckets(engine)
        return engine

    def _settle_buckets(self, engine: nn.Module) -> None:
        """Let DDP divide the gradients now, not after the first step: a resumed run begins with another first step.

        In which order three ranks add depends on where a gradient lies in what travels. DDP takes the order in which
        it first saw gradients become ready: here that of the parameters, last to first.
        """
        self.raw.forward = lambda: sum(parameter.sum() for parameter in self.raw.parameters())
        engine().backward()
        del self.raw.forward  # the class's own again
        self.optimizer.zero_grad(set_to_none=True)

    def backward_and_step(self, loss: Tensor) -> None:
        """One update from the mean over ranks of `loss`'s gradient; with fp16 none if that is not finite."""
        self.optimizer.zero_grad(set_to_none=True)
        if self.scaler is None:
            loss.backward()
            self._clip()
            self.optimizer.step()
        else:
            self.scaler.scale(loss).backward()
            if self.config.clip:
                self.scaler.unscale_(self.optimizer)
                self._clip()
            self.scaler.step(self.optimizer)
            self.scaler.update()

    def _clip(self) -> None:
        if self.config.clip:
            nn.utils.clip_grad_norm_(self.raw.parameters(), self.config.clip)

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The optimiser's groups of parameters, whose learning rate may be set."""
        groups: list[dict[str, Any]] = self.optimizer.param_groups
        return groups

    @contextlib.contextmanager
    def frozen(self) -> Iterator[nn.Module]:
        """The module itself, without gradient for its parameters but with gradient through it."""
        self.raw.requires_grad_(False)
        try:
            yield self.raw
        finally:
            self.raw.requires_grad_(True)

    def parts(self) -> list[Tensor]:
        """What this rank holds of each parameter."""
        return list(self.raw.parameters())

    def whole(self, parts: list[Tensor]) -> list[Tensor]:
        """From every rank's `parts`, or an average of them, to whole tensors. All ranks call it together."""
        return parts

    @torch.no_grad()
    def spread(self, whole: list[Tensor], parts: list[Tensor]) -> None:
        """The inverse of `whole`: fill this rank's `parts`."""
        for part, tensor in zip(parts, whole, strict=True):
            part.copy_(tensor)

    @torch.no_grad()
    def is_finite(self) -> bool:
        """Whether every parameter and second moment is finite on every rank; asks the device once.

        A gradient whose square overflows leaves its weight as it is, now and ever after.
        """
        is_here = bool(torch.stack([part.sum() * 0 for part in [*self._own(), *self._second_moments()]]).sum() == 0)
        return not self.world.any(not is_here)

    def _own(self) -> list[Tensor]:
        return self.parts()

    def _second_moments(self) -> list[Tensor]:
        return [state[key] for state in self.optimizer.state.values() for key in SQUARES if state.get(key) is not None]

    def full_state(self) -> dict[str, Tensor]:
        """Parameters, buffers, Adam moments and loss scale by name, on the host, whatever the engine.

        All ranks call it together; the first gets the state, the others nothing.
        """
        state = self._gathered()
        if not self.world.is_main:
            return {}
        if self.scaler:
            values = self.scaler.state_dict()
            state |= {SCALE: torch.tensor(values["scale"]), GROWTH: torch.tensor(values["_growth_tracker"])}
        return {name: on_host(tensor) for name, tensor in state.items()}

    def load_full_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of `full_state`, from any engine's; KeyError or ValueError if it does not fit."""
        named = (*self.raw.named_parameters(), *self.raw.named_buffers())
        shapes = {PARAMETERS + name: getattr(tensor, "ds_shape", tensor.shape) for name, tensor in named}
        if shapes != {name: tensor.shape for name, tensor in state.items() if name.startswith(PARAMETERS)}:
            raise ValueError("names or shapes of its weights are not this network's")
        self._scatter(state)
        if self.scaler:
            values = {"scale": state[SCALE].item(), "_growth_tracker": int(state[GROWTH])}
            self.scaler.load_state_dict(self.scaler.state_dict() | values)

    def _gathered(self) -> dict[str, Tensor]:
        if not self.world.is_main:
            return {}
        state = {PARAMETERS + name: tensor for name, tensor in self.raw.state_dict().items()}
        for name, parameter in self.raw.named_parameters():
            held = self.optimizer.state.get(parameter) or {}
            state |= {f"{key}.{name}": held[key] for key in KEPT if held.get(key) is not None}
        return state

    def _scatter(self, state: dict[str, Tensor]) -> None:
        prefixed = {name: tensor for name, tensor in state.items() if name.startswith(PARAMETERS)}
        self.raw.load_state_dict({name.removeprefix(PARAMETERS): tensor for name, tensor in prefixed.items()})
        for name, parameter in self.raw.named_parameters():
            held = {key: state[f"{key}.{name}"] for key in KEPT if f"{key}.{name}" in state}
            if not held:
                continue  # never updated: a run stopped within its warm-up
            self.optimizer.state[parameter] = {
                key: value.to(parameter.device, copy=True) if key == "step"
                else torch.empty_like(parameter).copy_(value) for key, value in held.items()
            }  # fmt: skip


class ZeroPlayer(Player):
    """A player whose optimiser state (ZeRO-1), gradients (2) and parameters (3) are spread over the ranks.

    Its engine steps within backward. Weights, gradients and what travels are fp32 in every precision, as with DDP.
    """

    def _engine(self) -> nn.Module:
        from deepspeed.utils import set_z3_leaf_module

        self.skipped = 0  # steps without update, though nothing but fp16's scale may ask for that
        for module in self.raw.modules():
            if getattr(module, "reads_parameters_below", False):
                set_z3_leaf_module(module, True)
        self.accelerator = Accelerator()  # one for each engine; all share the process's state
        self.engine, _ = self.accelerator.prepare(_Autocasting(self.raw, self.world), self.optimizer)
        self.zero = self.engine.optimizer
        engine: nn.Module = self.engine
        return engine

    def backward_and_step(self, loss: Tensor) -> None:
        """One update from the mean over ranks of `loss`'s gradient; none if that is not finite."""
        if self.scaler is None:
            self.accelerator.backward(loss)
            self.skipped += bool(self.zero.overflow)
            return
        # DeepSpeed's own scalers cast the weights, or never hear of an overflow; its engine takes ours.
        scale, growth = self.scaler.get_scale(), self.scaler.state_dict()["_growth_tracker"] + 1
        self.zero.override_loss_scale(scale)
        self.accelerator.backward(loss)
        if self.zero.overflow:
            scale, growth = scale * self.scaler.get_backoff_factor(), 0
        elif growth == self.scaler.get_growth_interval():
            scale, growth = scale * self.scaler.get_growth_factor(), 0
        self.scaler.load_state_dict(self.scaler.state_dict() | {"scale": scale, "_growth_tracker": growth})

    @property
    def groups(self) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = self.zero.param_groups
        return groups

    def parts(self) -> list[Tensor]:
        return [getattr(parameter, "ds_tensor", parameter) for parameter in self.raw.parameters()]

    def whole(self, parts: list[Tensor]) -> list[Tensor]:
        if not self._is_partitioned:
            return parts
        mine = torch.cat([part.flatten() for part in parts])
        everyone = [torch.empty_like(mine) for _ in range(self.world.size)]
        dist.all_gather(everyone, mine)
        pieces = zip(*(theirs.split([part.numel() for part in parts]) for theirs in everyone), strict=True)
        return [
            torch.cat(piece)[: parameter.ds_numel].view(parameter.ds_shape)  # type: ignore[attr-defined]
            for piece, parameter in zip(pieces, self.raw.parameters(), strict=True)
        ]

    def spread(self, whole: list[Tensor], parts: list[Tensor]) -> None:
        if not self._is_partitioned:
            super().spread(whole, parts)
            return
        super().spread([self._slice(tensor) for tensor in whole], parts)

    def _slice(self, tensor: Tensor) -> Tensor:
        """What this rank holds of a whole tensor under ZeRO-3; the last ranks' end in zeros if it does not divide."""
        padding = -tensor.numel() % self.world.size
        return F.pad(tensor.flatten(), (0, padding)).view(self.world.size, -1)[self.world.rank]

    def _own(self) -> list[Tensor]:
        """Without the padding, which may hold anything."""
        if not self._is_partitioned:
            return self.parts()
        pairs = zip(self.raw.parameters(), self.parts(), strict=True)
        return [part[: max(0, p.ds_numel - self.world.rank * part.numel())] for p, part in pairs]  # type: ignore[attr-defined]

    def _second_moments(self) -> list[Tensor]:
        state = self.zero.optimizer.state
        return [state[flat][MOMENTS[1][1]] for flat in self._flat if state.get(flat)]

    def is_finite(self) -> bool:
        return self.skipped == 0 and super().is_finite()

    @property
    def _is_partitioned(self) -> bool:
        return self.world.zero is not None and self.world.zero["stage"] == 3

    @property
    def _flat(self) -> list[Tensor]:
        """The fp32 weights that this rank's Adam updates."""
        name = "fp32_partitioned_groups_flat" if self._is_partitioned else "single_partition_of_fp32_groups"
        flat: list[Tensor] = getattr(self.zero, name)
        return flat

    def _gathered(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_optimizer_state

        self.engine.empty_partition_cache()  # what a frozen forward gathered stands in the way
        state = {PARAMETERS + name: buffer for name, buffer in self.raw.named_buffers()}
        adam = self.zero.optimizer.state.get(self._flat[0])
        for (name, parameter), weight in zip(self.raw.named_parameters(), self.whole(self.parts()), strict=True):
            state[PARAMETERS + name] = weight
            if adam:
                for prefix, key in MOMENTS:
                    moment = safe_get_full_optimizer_state(parameter, key)
                    if self.world.is_main:  # one at a time: together they may not fit the device
                        state[prefix + name] = moment.cpu()
                state[STEP + name] = torch.tensor(float(adam["step"]))
        return state

    @torch.no_grad()
    def _scatter(self, state: dict[str, Tensor]) -> None:
        self.skipped = 0
        named = list(self.raw.named_parameters())
        for name, buffer in self.raw.named_buffers():
            buffer.copy_(state[PARAMETERS + name])
        self.spread([state[PARAMETERS + name] for name, _ in named], self.parts())
        has_moments = FIRST + named[0][0] in state
        if has_moments:
            self._make_moments(state[STEP + named[0][0]])
        for name, parameter in named:
            self._fill_fp32(parameter, None, state[PARAMETERS + name])
            for prefix, key in MOMENTS if has_moments else ():
                self._fill_fp32(parameter, key, state[prefix + name])

    def _make_moments(self, step: Tensor) -> None:
        """Give Adam its state, which it would make in its first step; what stands already DeepSpeed has linked."""
        adam = self.zero.optimizer
        for flat in self._flat:
            moments = adam.state[flat] or {key: torch.zeros_like(flat) for _, key in MOMENTS}
            # DeepSpeed's own Adam counts on the host.
            count: Any = step.to(flat.device, copy=True) if isinstance(adam, torch.optim.Adam) else int(step)
            adam.state[flat] = moments | {"step": count}
        if not self._is_partitioned:
            self.zero._lazy_init_hp_params_optimizer_state()

    def _fill_fp32(self, parameter: nn.Parameter, key: str | None, value: Tensor) -> None:
        """This rank's part of the weight that Adam updates, or of its moment `key`."""
        from deepspeed import utils

        value = value.to(self.world.device)
        if self._is_partitioned and key:
            utils.safe_set_local_optimizer_state(parameter, self._slice(value), key)
        elif self._is_partitioned:
            utils.safe_set_local_fp32_param(parameter, self._slice(value))
        elif key:
            utils.safe_set_full_optimizer_state(parameter, value, key)
        else:
            utils.safe_set_full_fp32_param(parameter, value)


class _Autocasting(nn.Module):
    """A module under its own autocast: DeepSpeed's engine leaves any other before it calls."""

    def __init__(self, module: nn.Module, world: World):
        super().__init__()
        self.module, self._autocast = module, world.autocast

    def forward(self, *inputs: Any) -> Any:
        with self._autocast():
            return self.module(*inputs)


def make_player(world: World, module: nn.Module, config: TrainConfig) -> Player:
    """The player for the engine that the launcher chose."""
    if world.zero is not None and (config.optimizer != "adam" or config.clip):
        raise UserError("DeepSpeed's engine works with train.optimizer adam and train.clip 0 only; use DDP")
    return (Player if world.zero is None else ZeroPlayer)(world, module, config)
