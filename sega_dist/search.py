"""Latent space exploration: RLSE, PULSE and mGANprior as batched optimisations that stop and resume at any step.

Each image is searched as if alone: losses are (N,), summed for the gradient only, and starts depend on its key.
"""

import copy
import functools
import hashlib
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from sega_dist import latents
from sega_dist.errors import UserError
from sega_dist.latents import Down, Explorable, Featured, resize

Autocast = Callable[[], AbstractContextManager[Any]]  # entered around generator and discriminator alone
Seen = tuple[Tensor, Tensor, Tensor]  # loss (N,), images (N,3,R,R) in [0,1], residual (N,)
OnStep = Callable[[int, Tensor, Tensor], None]  # step, its losses (N,), the best images so far (N,3,R,R)
Perceptual = Callable[[Tensor, Tensor], Tensor]  # two (N,3,h,h) in [-1,1] to (N,)


@dataclass(frozen=True)
class RlseConfig:
    steps: int = 100  # the poster's one stated number
    latent: Literal["w18", "z1"] = "w18"  # a vector for each layer of the generator, or one for all
    learning_rate: float = 0.4  # of Adam
    learning_rate_schedule: Literal["linear1cycledrop", "fixed"] = "linear1cycledrop"
    w_pixel: float = 100.0  # weight of the mean square difference from the LR input, images in [0,1]
    lambda_s: float = 1.0  # weight of the discriminator semantic loss; 0 is PULSE and needs no discriminator
    w_geo: float = 0.05  # weight of the mean square angle between an image's vectors
    eps: float = 2e-3  # a difference below this is not reduced further; 0 = no such floor
    d_layers: int = 0  # of the discriminator's maps: the last so many; 0 = all of side 8 and above
    d_norm: Literal["l1", "l2"] = "l1"  # mean absolute value or mean square of a layer's difference
    d_layer_norm: bool = False  # bring each layer's maps to mean 0 and variance 1 before they are compared
    init_candidates: int = 1  # random starts, the best of which by semantic loss (PULSE: pixel loss) is searched from
    noise_layers: int = 5  # first noises that are searched too; the others are fixed, the last is zero
    down: Down = "bicubic"  # how an image becomes LR


PULSE = RlseConfig(lambda_s=0.0)


@dataclass(frozen=True)
class MganConfig:
    codes: int = 20  # latents an image is made of
    layer: int = 6  # of the generator, before which their features are mixed
    steps: int = 2000
    learning_rate: float = 1.0  # of plain SGD
    w_vgg: float = 1e-3  # weight of the perceptual distance, where one is given


def check_rlse(config: RlseConfig) -> None:
    """UserError for a key that cannot be."""
    for name in ("learning_rate", "steps", "init_candidates"):
        _check(f"rlse.{name}", getattr(config, name), getattr(config, name) > 0, "above 0")
    for name in ("w_pixel", "lambda_s", "w_geo", "eps", "d_layers", "noise_layers"):
        _check(f"rlse.{name}", getattr(config, name), getattr(config, name) >= 0, "0 or more")
    is_lost = config.w_pixel == config.lambda_s == 0
    _check("rlse.w_pixel", config.w_pixel, not is_lost, "above 0 where rlse.lambda_s is 0: nothing else sees LR")


def check_mgan(config: MganConfig) -> None:
    """UserError for a key that cannot be."""
    for name in ("codes", "steps", "learning_rate"):
        _check(f"mgan.{name}", getattr(config, name), getattr(config, name) > 0, "above 0")
    for name in ("layer", "w_vgg"):
        _check(f"mgan.{name}", getattr(config, name), getattr(config, name) >= 0, "0 or more")


def _check(key: str, value: float, is_legal: bool, legal: str) -> None:
    if not is_legal or not math.isfinite(value):
        raise UserError(f"{key} is {value}; it must be {legal}")


@dataclass(frozen=True)
class Found:
    """The best of each image so far. One whose loss never was finite has loss inf, step -1 and its LR enlarged."""

    image: Tensor  # (N,3,R,R) in [0,1], not clamped
    loss: Tensor  # (N,) the least of the trace
    residual: Tensor  # (N,) mean square difference from the LR input, images in [0,1]
    is_reached: Tensor  # (N,) whether the residual is at most eps (mGANprior has none)
    step: Tensor  # (N,) at which it was met
    latents: list[Tensor]  # (N,...) each: what was searched
    non_finite: Tensor  # (N,) steps whose loss or gradient was not finite: the search went back to the best
    trace: Tensor  # (steps,N) losses, inf where not finite

    @classmethod
    def on(cls, device: torch.device, values: dict[str, Any]) -> "Found":
        """From its `vars`, wherever these lie."""
        points = [point.to(device) for point in values["latents"]]
        return cls(**{name: x.to(device) for name, x in values.items() if name != "latents"}, latents=points)

    def or_better(self, other: "Found") -> "Found":
        """Of each image the one of less loss, this one where equal; both traces, the other's last."""
        is_better = other.loss < self.loss
        best = {name: _chosen(is_better, getattr(other, name), getattr(self, name))
                for name in ("image", "loss", "residual", "is_reached", "step")}  # fmt: skip
        points = [_chosen(is_better, a, b) for a, b in zip(other.latents, self.latents, strict=True)]
        trace = torch.cat([self.trace, other.trace])
        return Found(**best, latents=points, non_finite=self.non_finite + other.non_finite, trace=trace)


def _chosen(mask: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Image by image a where mask (N,) is true, else b, both (N,...)."""
    return torch.where(_by_image(mask, a), a, b)


def _by_image(mask: Tensor, x: Tensor) -> Tensor:
    """mask (N,) with as many dimensions as x (N,...)."""
    return mask.view(-1, *[1] * (x.ndim - 1))


@dataclass(frozen=True)
class _Exploration:
    """RLSE's loss as a function of z (N,V,W) and the searched noises."""

    g: Explorable
    d: Featured | None
    lr: Tensor
    fixed: list[Tensor]  # the noises that are not searched
    config: RlseConfig
    autocast: Autocast

    def __call__(self, variables: list[Tensor]) -> Seen:
        w, image, small = self._shown(variables)
        residual = latents.square_difference(small, self.lr)
        loss = self.config.w_pixel * residual.clamp(min=self.config.eps) + self.config.w_geo * latents.geodesic(w)
        return loss + self.config.lambda_s * self._semantic(small) if self.target else loss, image, residual

    @torch.no_grad()
    def score(self, variables: list[Tensor]) -> Tensor:
        """(N,) what a start is chosen by."""
        small = self._shown(variables)[2]
        return self._semantic(small) if self.target else latents.square_difference(small, self.lr)

    @functools.cached_property
    def target(self) -> list[Tensor]:
        """The discriminator's maps of the LR input; none for PULSE."""
        if not self.config.lambda_s:
            return []
        with torch.no_grad():
            return self._features(self.lr)

    def _shown(self, variables: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """w (N,V,W), its images (N,3,R,R) in [0,1], and these as LR."""
        w = latents.to_w(variables[0], self.g.gaussian)
        with self.autocast():
            y = self.g.synthesis(w.expand(-1, self.g.layers, -1), [*variables[1:], *self.fixed])
        image = (y.to(self.lr.dtype) + 1) / 2
        return w, image, resize(image, self.lr.shape[-1], self.config.down)

    def _semantic(self, small: Tensor) -> Tensor:
        return latents.semantic(self._features(small), self.target, self.config.d_norm, self.config.d_layer_norm)

    def _features(self, small: Tensor) -> list[Tensor]:
        """The discriminator's maps of LR images enlarged to its side: both images of a pair go this way."""
        if self.d is None:
            raise UserError("lambda_s > 0 needs a discriminator: give one, or search as PULSE with lambda_s 0")
        enlarged = 2 * resize(small, self.g.side, "bilinear") - 1
        with self.autocast():
            maps = self.d.features(enlarged)
        taken = maps[-self.config.d_layers :] if self.config.d_layers else [x for x in maps if x.shape[-1] >= 8]
        if not taken:
            raise UserError(
                "no map of the discriminator has side 8 or more: say with d_layers how many of the last count"
            )
        return [x.to(small.dtype) for x in taken]


@dataclass(frozen=True)
class _Mixture:
    """mGANprior's loss as a function of z (N,K,W) and the weights (N,K,C) of the features' channels."""

    g: Explorable
    lr: Tensor
    noises: list[Tensor]
    config: MganConfig
    perceptual: Perceptual | None
    autocast: Autocast

    def __call__(self, variables: list[Tensor]) -> Seen:
        z, *weights = variables
        w, maps = self.features(z)
        mixed = tuple((a.view(*a.shape, *[1] * (f.ndim - 3)) * f).mean(1) for a, f in zip(weights, maps, strict=True))
        share = weights[0].mean(2, keepdim=True)  # (N,K,1) of a code in the styles of the layers that follow
        mean = (share * w).sum(1, keepdim=True) / share.sum(1, keepdim=True)
        with self.autocast():
            y = self.g.tail(mixed, mean.expand(-1, self.g.layers, -1), self.noises, self.config.layer)
        image = (y.to(self.lr.dtype) + 1) / 2
        small = resize(image, self.lr.shape[-1], "bilinear", antialias=False)
        residual = latents.square_difference(small, self.lr)
        loss = 4 * residual  # the mean square of images in [-1,1], which the learning rate is for
        if self.perceptual:
            loss = loss + self.config.w_vgg * self.perceptual(2 * small - 1, 2 * self.lr - 1)
        return loss, image, residual

    def features(self, z: Tensor) -> tuple[Tensor, list[Tensor]]:
        """w (N,K,W) and what the head makes of each: tensors (N,K,C,...)."""
        w, codes = latents.to_w(z, self.g.gaussian), z.shape[1]
        noises = [noise.repeat_interleave(codes, 0) for noise in self.noises]
        with self.autocast():
            maps = self.g.head(w.flatten(0, 1)[:, None].expand(-1, self.g.layers, -1), noises, self.config.layer)
        return w, [x.to(z.dtype).unflatten(0, (-1, codes)) for x in maps]


class Search:
    """A descent from `start`, (N,...) each, with the best of every image; on spheres each vector keeps its radius."""

    def __init__(self, evaluate: _Exploration | _Mixture, start: list[Tensor],
                 optimizer: Callable[..., torch.optim.Optimizer], rate: Callable[[int], float],
                 eps: float, on_spheres: bool):  # fmt: skip
        self.evaluate, self.rate, self.eps, self.step, self.steps = evaluate, rate, eps, 0, evaluate.config.steps
        self.variables = [variable.clone().requires_grad_() for variable in start]
        self.optimizer = optimizer(self.variables, lr=rate(0))
        self.radii = [latents.radius(variable) for variable in start] if on_spheres else []
        lr, n = evaluate.lr, len(evaluate.lr)
        never, none = lr.new_full((n,), torch.inf), torch.zeros(n, dtype=torch.long, device=lr.device)
        enlarged = resize(lr, evaluate.g.side, "bilinear")
        self.found = Found(enlarged, never, never, none > 0, none - 1, start, none, lr.new_empty(0, n))

    def run(self, on_step: OnStep | None = None, until: int | None = None) -> Found:
        """The steps up to `until`, or all that are left. Never raises because nothing good was found."""
        while self.step < min(self.steps, self.steps if until is None else until):
            loss = self._descend()
            if on_step:
                on_step(self.step - 1, loss, self.found.image)
        return self.found

    def state(self) -> dict[str, Any]:
        """All that a search made with the same arguments needs to go on from here: a copy, for torch.save."""
        variables = [variable.detach() for variable in self.variables]
        state = {"step": self.step, "variables": variables, "radii": self.radii, "found": vars(self.found)}
        return copy.deepcopy(state | {"optimizer": self.optimizer.state_dict()})

    @torch.no_grad()
    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from `state`, to the bit; it is copied."""
        state = copy.deepcopy(state)
        for variable, value in zip(self.variables, state["variables"], strict=True):
            variable.copy_(value)
        self.radii = [radius.to(self.evaluate.lr.device) for radius in state["radii"]]
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.found = state["step"], Found.on(self.evaluate.lr.device, state["found"])

    def _descend(self) -> Tensor:
        """One step: look, remember, move. The losses (N,) of where it looked, inf where not finite."""
        loss, image, residual = self.evaluate(self.variables)
        gradients = torch.autograd.grad(loss.sum(), self.variables, allow_unused=True, materialize_grads=True)
        loss, image, residual = (x.detach() for x in (loss, image, residual))
        largest = [torch.linalg.vector_norm(x.flatten(1), torch.inf, 1) for x in (loss[:, None], *gradients)]
        is_finite = torch.stack(largest).isfinite().all(0)
        loss = loss.where(loss.isfinite(), torch.inf)
        points = [variable.detach().clone() for variable in self.variables]
        here = torch.full_like(self.found.step, self.step)
        seen = Found(image, loss, residual, residual <= self.eps, here, points, (~is_finite).long(), loss[None])
        self.found = self.found.or_better(seen)
        self._move(gradients, is_finite)
        self.step += 1
        return loss

    @torch.no_grad()
    def _move(self, gradients: tuple[Tensor, ...], is_finite: Tensor) -> None:
        """Along the gradients, back to the spheres; an image that is not finite to its best, its momentum forgotten."""
        self.optimizer.param_groups[0]["lr"] = self.rate(self.step)
        for variable, gradient in zip(self.variables, gradients, strict=True):
            variable.grad = gradient
        self.optimizer.step()
        for variable, start in zip(self.variables, self.radii, strict=bool(self.radii)):
            variable.div_(latents.radius(variable)).mul_(start)
        for variable, best in zip(self.variables, self.found.latents, strict=True):
            variable.copy_(_chosen(is_finite, variable, best))
            for moment in self.optimizer.state[variable].values():
                if isinstance(moment, Tensor) and moment.shape == variable.shape:
                    moment.masked_fill_(_by_image(~is_finite, moment), 0)


def rlse(g: Explorable, d: Featured | None, lr: Tensor, keys: list[str], config: RlseConfig, seed: int = 0,
         restart: int = 0, autocast: Autocast = nullcontext,
         on_candidate: Callable[[], None] = lambda: None) -> Search:  # fmt: skip
    """The search for faces that look like lr (N,3,h,h) in [0,1] when made as small; with lambda_s 0 it is PULSE's.

    Latents, radii and losses have the type of lr, fp32 or fp64. Only z is chosen among candidates, not the noises;
    `on_candidate` is called when one is scored. A search that will go on from a state needs one candidate only.
    """
    lr, vectors = lr.detach(), g.layers if config.latent == "w18" else 1
    noises, candidates = _drawn(g, lr, keys, seed, restart, [(vectors, g.w_size)] * config.init_candidates)
    searched = noises[: min(config.noise_layers, max(len(noises) - 1, 0))]
    evaluate = _Exploration(g, d, lr, noises[len(searched) :], config, autocast)

    def score(z: Tensor) -> Tensor:
        on_candidate()
        return evaluate.score([z, *searched])

    z = _best_start(candidates, score)
    share = latents.SCHEDULES[config.learning_rate_schedule]

    def rate(step: int) -> float:
        return config.learning_rate * share(step, config.steps)

    return Search(evaluate, [z, *searched], torch.optim.Adam, rate, config.eps, on_spheres=True)


def mganprior(g: Explorable, lr: Tensor, keys: list[str], config: MganConfig, seed: int = 0, restart: int = 0,
              perceptual: Perceptual | None = None, autocast: Autocast = nullcontext) -> Search:  # fmt: skip
    """The search for `codes` latents whose mixed features make faces that look like lr (N,3,h,h) in [0,1].

    Gu, Shen, Zhou (arXiv 1912.07116): features weighted channel by channel, summed, divided by the number of codes;
    weights start at 1/codes. The layers after take the codes' mean w, weighted alike (our reading for style GANs).
    """
    lr = lr.detach()
    noises, (z,) = _drawn(g, lr, keys, seed, restart, [(config.codes, g.w_size)])
    evaluate = _Mixture(g, lr, noises, config, perceptual, autocast)
    with torch.no_grad():
        weights = [lr.new_full(maps.shape[:3], 1 / config.codes) for maps in evaluate.features(z)[1]]
    return Search(evaluate, [z, *weights], torch.optim.SGD, lambda _: config.learning_rate, 0.0, on_spheres=False)


def restarted(search: Callable[[int], Search], restarts: int, on_step: OnStep | None = None) -> Found:
    """The best of each image over `restarts` searches, each made by `search` of its number."""
    return functools.reduce(Found.or_better, (search(number).run(on_step) for number in range(restarts)))


def starts(keys: list[str], seed: int, restart: int, shapes: list[tuple[int, ...]]) -> list[Tensor]:
    """Standard normal fp32 on the CPU, (N, *shape) for each shape: of image i by (seed, restart, keys[i]) alone.

    They are drawn one after the other: more shapes leave the first as they are.
    """
    drawn = []
    for key in keys:
        digest = hashlib.sha256(f"{seed} {restart} {key}".encode(errors="surrogateescape")).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
        drawn.append([torch.randn(shape, generator=generator) for shape in shapes])
    return [torch.stack(column) for column in zip(*drawn, strict=True)]


def _drawn(g: Explorable, lr: Tensor, keys: list[str], seed: int, restart: int,
           shapes: list[tuple[int, ...]]) -> tuple[list[Tensor], list[Tensor]]:  # fmt: skip
    """Each image's noises, the last zero, and tensors of `shapes`, of LR's type and on its device."""
    of_noises = [(1, *shape) for shape in g.noise_shapes()]
    drawn = [x.to(lr) for x in starts(keys, seed, restart, [*of_noises, *shapes])]
    noises, rest = drawn[: len(of_noises)], drawn[len(of_noises) :]
    return [*noises[:-1], *(torch.zeros_like(noise) for noise in noises[-1:])], rest


def _best_start(candidates: list[Tensor], score: Callable[[Tensor], Tensor]) -> Tensor:
    """Of each image the candidate (N,...) of least score; one alone needs none."""
    if len(candidates) == 1:
        return candidates[0]
    best = torch.stack([score(z) for z in candidates]).nan_to_num(nan=torch.inf).argmin(0)
    return torch.stack(candidates)[best, torch.arange(len(best), device=best.device)]
