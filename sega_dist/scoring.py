"""Scores of methods on a split: each image once, shared by ranks, the same bits for any number of them."""

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor

from sega_dist import metrics
from sega_dist.data.images import DamagedSample, ShardReader
from sega_dist.data.pairs import bicubic, to_uint8, to_unit
from sega_dist.distributed import World
from sega_dist.errors import UserError
from sega_dist.lpips import Lpips
from sega_dist.niqe import SMALLEST, Niqe, load_niqe, niqe
from sega_dist.pictures import to_image, to_tensor
from sega_dist.progress import progress
from sega_dist.snapshot import Snapshot
from sega_dist.weights import load_lpips

# LR (N,3,h,w) uint8, scale, the images' names -> SR (N,3,scale*h,scale*w) uint8
SuperResolve = Callable[[Tensor, int, list[str]], Tensor]
T = TypeVar("T")
LR = "bicubic, antialiased, a = -0.5, rounded to 8 bits"


@dataclass(frozen=True)
class Metrics:
    """Which scores an image gets."""

    niqe: Niqe | None = None
    lpips: Lpips | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return (*metrics.NAMES, *(("lpips",) if self.lpips else ()), *(("niqe",) if self.niqe else ()))

    def __call__(self, hr: Tensor, sr: Tensor) -> Tensor:
        """Of each image and in the order of `names`; both (N,3,H,W) uint8."""
        found = metrics.scores(hr, sr)
        if self.lpips:
            found["lpips"] = self.lpips(hr, sr)
        if self.niqe:
            found["niqe"] = niqe(sr.cpu(), self.niqe)  # the same bits wherever SR was made
        return torch.stack([found[name].double().to(hr.device) for name in self.names], 1)


def load_metrics(niqe_file: Path | None, lpips_weights: Path | None, size: int, world: World) -> Metrics:
    """The metrics beyond PSNR and SSIM for which there are files; UserError for what cannot be."""
    if niqe_file and size < SMALLEST:
        raise UserError(f"--niqe: images of {size} pixels have too few blocks; NIQE wants {SMALLEST} or more")
    lpips = load_lpips(lpips_weights) if lpips_weights else None
    return Metrics(load_niqe(niqe_file) if niqe_file else None, world.place(lpips).eval() if lpips else None)


def of_snapshot(snapshot: Snapshot, name: str) -> SuperResolve:
    """The snapshot's generator; UserError for one that makes what is no number."""

    @torch.no_grad()
    def super_resolve(lr: Tensor, _: int, __: list[str]) -> Tensor:
        sr = snapshot.generator(to_unit(lr))
        if not bool(sr.isfinite().all()):
            raise UserError(f"{name} makes images with values that are not numbers: its training went astray")
        return to_uint8(sr)

    return super_resolve


def _by_pillow(resampling: Image.Resampling) -> SuperResolve:
    def enlarge(lr: Tensor, scale: int, _: list[str]) -> Tensor:
        size = (scale * lr.shape[3], scale * lr.shape[2])
        return torch.stack([to_tensor(to_image(image).resize(size, resampling)) for image in lr]).to(lr.device)

    return enlarge


CLASSICAL: dict[str, SuperResolve] = {
    "bicubic": lambda lr, scale, _: bicubic(lr, scale * lr.shape[2], scale * lr.shape[3]),
    "lanczos": _by_pillow(Image.Resampling.LANCZOS),
    "bilinear": _by_pillow(Image.Resampling.BILINEAR),
    "nearest": _by_pillow(Image.Resampling.NEAREST),
}


@dataclass(frozen=True)
class Scores:
    """Of every image of a split by every method."""

    methods: tuple[str, ...]
    metrics: tuple[str, ...]
    names: list[str]  # of the images
    values: Tensor  # (images, methods, metrics) float64
    shown: dict[str, Tensor]  # the first images: "LR", each method, "HR"; (n,3,h,w) uint8
    images_per_s: dict[str, float]  # of this rank, the method alone


def score(world: World, reader: ShardReader, scale: int, methods: dict[str, SuperResolve], judge: Metrics, batch: int,
          shown: int, keep: Callable[[str, dict[str, Tensor]], None] | None = None,
          images: int = 0) -> Scores:  # fmt: skip
    """Score the whole split or its first `images`, the same on every rank; `keep` sees each image's name, LR and
    SR by the last method, on the rank that has it.

    Ranks share the batches, not the images of one, so that the scores are the same bits for any number of ranks.
    """
    count, side = min(images or len(reader), len(reader)), reader.manifest.size
    values = torch.zeros(count, len(methods), len(judge.names), dtype=torch.float64, device=world.device)
    pictures = torch.zeros(len(methods), min(shown, count), 3, side, side, dtype=torch.uint8, device=world.device)
    seconds = dict.fromkeys(methods, 0.0)
    parts = [range(start, min(start + batch, count)) for start in range(0, count, batch)][world.rank :: world.size]
    share = f", share 1 of {world.size}" if world.size > 1 else ""
    bar = progress(f"scoring {reader.side} x{scale}{share}", sum(map(len, parts)))
    with world.together(), bar if world.is_main else contextlib.nullcontext(lambda _: None) as advance:
        for part in parts:
            rows = slice(part[0], part[-1] + 1)
            hr, names = read_whole(reader, part)
            hr = hr.to(world.device)
            lr = bicubic(hr, side // scale, side // scale)
            for number, (method, super_resolve) in enumerate(methods.items()):
                sr, spent = timed(world, partial(super_resolve, lr, scale, names))
                seconds[method] += spent
                values[rows, number] = judge(hr, sr)
                pictures[number, rows] = sr[: len(pictures[number, rows])]
            for i, name in enumerate(names) if keep else ():
                keep(name, {"lr": lr[i], "sr": sr[i]})  # type: ignore[misc]
            advance(len(names))
    pictures, names = world.sum_of(pictures).cpu(), [reader.name(i) for i in range(count)]
    made = sum(map(len, parts))
    speeds = {method: made / spent if spent else 0.0 for method, spent in seconds.items()}
    seen_faces = _faces(reader, scale, pictures, tuple(methods)) if world.is_main and shown else {}
    return Scores(tuple(methods), judge.names, names, world.sum_of(values).cpu(), seen_faces, speeds)


def score_native(world: World, names: list[str], small: Callable[[range], Tensor], scale: int,
                 methods: dict[str, SuperResolve], judge: Niqe, batch: int) -> Scores:  # fmt: skip
    """NIQE of faces that have no HR, the same on every rank; `small` gives LR (N,3,h,h) uint8 by number."""
    values = torch.zeros(len(names), len(methods), 1, dtype=torch.float64)
    seconds, made = dict.fromkeys(methods, 0.0), 0
    parts = [range(start, min(start + batch, len(names))) for start in range(0, len(names), batch)]
    mine = parts[world.rank :: world.size]
    bar = progress(f"scoring NIQE x{scale}", sum(map(len, mine)))
    with world.together(), bar if world.is_main else contextlib.nullcontext(lambda _: None) as advance:
        for part in mine:
            lr, here = small(part).to(world.device), [names[i] for i in part]
            for number, (method, super_resolve) in enumerate(methods.items()):
                sr, spent = timed(world, partial(super_resolve, lr, scale, here))
                seconds[method] += spent
                values[part.start : part.stop, number, 0] = niqe(sr.cpu(), judge).double()
            made += len(part)
            advance(len(part))
    speeds = {method: made / spent if spent else 0.0 for method, spent in seconds.items()}
    return Scores(tuple(methods), ("niqe",), names, world.sum_of(values.to(world.device)).cpu(), {}, speeds)


def protocol(reader: ShardReader, judge: Metrics, device: torch.device) -> dict[str, Any]:
    """What a score means: stamped into every result."""
    manifest = reader.manifest
    return metrics.PROTOCOL | {
        "lr": LR, "split": reader.side, "data": manifest.digest, "data_split": manifest.recipe.split,
        "crop_of_source": manifest.recipe.crop, "metrics": list(judge.names), "device": device.type,
    }  # fmt: skip


def read_whole(reader: ShardReader, numbers: range) -> tuple[Tensor, list[str]]:
    """Images (N,3,S,S) and their names; a damaged one ends the evaluation, since scores must cover the whole split."""
    return torch.stack(whole(reader, reader.image, numbers)), whole(reader, reader.name, numbers)


def whole(reader: ShardReader, read: Callable[[int], T], numbers: range) -> list[T]:
    """What `read`, a method of the reader, gives for these numbers; UserError where one is damaged."""
    try:
        return [read(number) for number in numbers]
    except DamagedSample as error:
        raise UserError(f"{reader.manifest.folder} is damaged: {error}; sega-dist verify names every shard") from None


def timed(world: World, make: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """What it makes, and in how many seconds."""
    began = time.perf_counter()
    sr = make()
    if world.device.type == "cuda":
        torch.cuda.synchronize()
    return sr, time.perf_counter() - began


def _faces(reader: ShardReader, scale: int, pictures: Tensor, methods: tuple[str, ...]) -> dict[str, Tensor]:
    hr, _ = read_whole(reader, range(pictures.shape[1]))
    side = reader.manifest.size // scale
    return {"LR": bicubic(hr, side, side)} | dict(zip(methods, pictures, strict=True)) | {"HR": hr}
