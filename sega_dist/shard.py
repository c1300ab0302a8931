"""Photographs to shards: `sega-dist shard SOURCE OUT`, and `sega-dist verify SHARDS`."""

import contextlib
import dataclasses
import json
import multiprocessing
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sega_dist.arguments import OutPath, ShardsPath, SourcePath, parse
from sega_dist.data import splits
from sega_dist.data.crops import Crop, UnusableImage, hr_bytes, versions
from sega_dist.data.shards import Manifest, Shard, open_manifest, verify, write_shard
from sega_dist.data.sources import Source, open_source, read_images, read_partition, sample_keys
from sega_dist.errors import UserError, run
from sega_dist.progress import progress

ALWAYS_TOLERATED = 10  # unusable images, however few images there are


@dataclass(frozen=True)
class ShardCommand:
    """Cut photographs to square HR images and pack them into shards."""

    source: SourcePath  # a folder of images (with sub-folders), or a zip such as img_align_celeba.zip
    out: OutPath  # the folder to make; it must not exist, or be empty
    split: splits.Split = "sega"  # sega: random, as the paper's; official: CelebA's; train, test: all of them
    crop: Crop = "sega"  # sega: resize to 1.15 x size, centre; plain: resize; square: centre square
    size: int = 256  # HR side in pixels
    seed: int = 0  # of split sega
    lists: Path | None = None  # folder of CelebA's list_eval_partition.txt, if not beside the images
    shard_size: int = 1000  # samples a shard
    max_skip: float = 0.001  # share of images that may be unusable (ten may unless this is 0)
    jobs: int = os.cpu_count() or 1  # processes; the output does not depend on it


@dataclass(frozen=True)
class Plan:
    """One shard to write: where from, what, and how."""

    source: Path
    side: str
    path: Path
    samples: tuple[tuple[str, str], ...]  # name in the source, key in the shard
    crop: Crop
    size: int


@dataclass(frozen=True)
class Written:
    """One shard, and the images that could not go into it."""

    shard: Shard
    skipped: list[dict[str, str]]


def main(argv: list[str] | None = None) -> None:
    command = parse(ShardCommand, argv or [], "sega-dist shard")
    manifest = shard(command)
    print(f"{summary(manifest)}, {manifest.skipped} skipped -> {command.out}")


def verify_main(argv: list[str] | None = None) -> None:
    """Check every byte of a folder of shards."""

    @dataclass(frozen=True)
    class VerifyCommand:
        """Check every byte of a folder of shards against its manifest."""

        shards: ShardsPath  # a folder made by sega-dist shard

    folder = parse(VerifyCommand, argv or [], "sega-dist verify").shards
    manifest = open_manifest(folder)
    problems = [problem for _, problem in verify(manifest) if problem]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UserError(f"{problems[0]}{more}; restore the file, or shard the images again")
    print(f"{summary(manifest)}: every byte as written; data set {manifest.digest[:12]}")


def shard(command: ShardCommand) -> Manifest:
    """Write the data set to a temporary folder beside OUT and put it in place when it is whole."""
    _check(command)
    source = open_source(command.source)
    sides = _split(command, source)
    command.out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{command.out.name}.", dir=command.out.parent))
    try:
        partial.chmod(0o755)
        manifest = _write(command, source, sides, partial)
        partial.rename(command.out)  # replaces an empty folder, refuses any other
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return dataclasses.replace(manifest, folder=command.out)


def summary(manifest: Manifest) -> str:
    """`3,000 images (train 2,400, test 600) in 4 shards`."""
    sides = ", ".join(f"{side} {manifest.images(side):,}" for side in manifest.sides)
    total = sum(manifest.images(side) for side in manifest.sides)
    return f"{total:,} images ({sides}) in {sum(map(len, manifest.sides.values()))} shards"


def _check(command: ShardCommand) -> None:
    if command.out.exists() and (not command.out.is_dir() or any(command.out.iterdir())):
        raise UserError(f"{command.out} exists and is not an empty folder; remove it or name another")
    if command.size < 32 or command.size % 32:
        raise UserError(f"--size is {command.size}; it must be a multiple of 32")
    if command.seed < 0 or not 0 <= command.max_skip <= 1:
        raise UserError("--seed must be 0 or more, and --max-skip a share between 0 and 1")
    for name in ("shard_size", "jobs"):
        if getattr(command, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be 1 or more")


def _split(command: ShardCommand, source: Source) -> dict[str, list[str]]:
    if command.split == "sega":
        return splits.sega(source.names, command.seed)
    if command.split == "official":
        return splits.official(source.names, read_partition(source.path, command.lists))
    return {command.split: list(source.names)}


def _write(command: ShardCommand, source: Source, sides: dict[str, list[str]], folder: Path) -> Manifest:
    plans = _plans(command, source, sides, folder)
    written = _write_all(command, plans)
    skipped = [skip for result in written for skip in result.skipped]
    for result in written:
        if not result.shard.samples:
            (folder / result.shard.name).unlink()
            (folder / result.shard.index_name).unlink()
    whole = {side: tuple(result.shard for plan, result in zip(plans, written, strict=True)
                         if plan.side == side and result.shard.samples) for side in splits.SIDES}  # fmt: skip
    if not any(whole.values()):
        first = skipped[0]
        raise UserError(f"none of the images of {command.source} can be used; {first['name']}: {first['reason']}")
    if skipped:
        (folder / "skipped.jsonl").write_text("".join(json.dumps(skip) + "\n" for skip in skipped))
    shards = {side: parts for side, parts in whole.items() if parts}
    settings = (command.size, command.crop, command.split, command.seed)
    manifest = Manifest(folder, *settings, len(skipped), versions(), shards)
    manifest.save()
    return manifest


def _plans(command: ShardCommand, source: Source, sides: dict[str, list[str]], folder: Path) -> list[Plan]:
    keys = sample_keys(source.names)
    plans = []
    for side, names in sides.items():
        for number, start in enumerate(range(0, len(names), command.shard_size)):
            samples = tuple((name, keys[name]) for name in names[start : start + command.shard_size])
            path = folder / f"{side}-{number:05d}.tar"
            plans.append(Plan(source.path, side, path, samples, command.crop, command.size))
    return plans


def _write_all(command: ShardCommand, plans: list[Plan]) -> list[Written]:
    """Every shard in order, with progress; UserError as soon as too many images turned out unusable."""
    images = sum(len(plan.samples) for plan in plans)
    limit = max(ALWAYS_TOLERATED, int(command.max_skip * images)) if command.max_skip > 0 else 0
    written: list[Written] = []
    skipped: list[dict[str, str]] = []
    with _mapper(command.jobs) as write_each, progress("sharding", images) as advance:
        for plan, result in zip(plans, write_each(plans), strict=True):
            written.append(result)
            skipped += result.skipped
            if len(skipped) > limit:
                raise UserError(
                    f"{len(skipped)} images cannot be used, more than the {limit} allowed by --max-skip"
                    f" {command.max_skip}; the first is {skipped[0]['name']}: {skipped[0]['reason']}"
                )
            advance(len(plan.samples))
    return written


@contextlib.contextmanager
def _mapper(jobs: int) -> Iterator[Callable[[list[Plan]], Iterable[Written]]]:
    """How to write many shards: one after another, or in processes; either way in order."""
    if jobs == 1:
        yield lambda plans: map(write_planned, plans)
        return
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(jobs, spawn, signal.signal, (signal.SIGINT, signal.SIG_IGN))  # Ctrl-C is the parent's
    try:
        yield lambda plans: pool.map(write_planned, plans)
    finally:
        pool.shutdown(cancel_futures=True)


def write_planned(plan: Plan) -> Written:
    """Write one shard; runs in a process of its own."""
    skipped: list[dict[str, str]] = []
    keys = dict(plan.samples)

    def samples() -> Iterator[tuple[str, bytes, dict[str, Any]]]:
        for name, data in read_images(plan.source, keys):
            try:
                if data is None:
                    raise UnusableImage("cannot be read from its source")
                yield keys[name], hr_bytes(data, plan.crop, plan.size), {"name": name}
            except UnusableImage as error:
                skipped.append({"name": name, "split": plan.side, "reason": str(error)})

    return Written(write_shard(plan.path, samples()), skipped)


if __name__ == "__main__":
    run(main)
