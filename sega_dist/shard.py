"""Photographs to shards: `sega-dist shard SOURCE OUT`, in one process, many, or on many machines."""

import collections
import contextlib
import dataclasses
import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from sega_dist.arguments import OutPath, SourcePath, parse, share
from sega_dist.data import celeba, splits
from sega_dist.data.crops import Crop, versions
from sega_dist.data.packing import Plan, Plans, Written, pack, sample_bytes
from sega_dist.data.shards import MANIFEST, Manifest, Recipe, Shard, open_manifest, read_manifest, write_whole
from sega_dist.data.sources import open_source
from sega_dist.errors import UserError, run, say
from sega_dist.launched import launched_ranks
from sega_dist.progress import progress

ALWAYS_TOLERATED = 10  # unusable images, however few images there are
TAR_BYTES = 2048  # of a sample beside its image: two headers, two paddings, the metadata
ROOM = 1.1  # times what a few images let expect
BEGUN = "begun.json"  # in OUT.partial: which source and recipe it is for
RECORD = ".written.json"  # beside each shard in OUT.partial, written last


class TooManySkipped(UserError):
    """More images cannot be used than --max-skip allows: nothing is left behind."""


@dataclass(frozen=True)
class ShardCommand:
    """Cut photographs to square HR images and pack them into shards; after a stop the same command goes on."""

    source: SourcePath  # a folder of images, a zip such as img_align_celeba.zip, or a parquet file
    out: OutPath  # the folder to make; it must not exist, or be empty
    split: splits.Split = "sega"  # sega: random, as the paper's; official, identity: CelebA's; train, test: all of them
    crop: Crop = "sega"  # sega: 1.15 x size, centre; plain: resize; square: centre square; wild: CelebA's face box
    size: int = 256  # HR side in pixels
    seed: int = 0  # of splits sega and identity
    lists: Path | None = None  # folder of CelebA's lists, if not beside the images
    shard_size: int = 1000  # samples a shard
    max_skip: float = 0.001  # share of images that may be unusable (ten may unless this is 0)
    jobs: int = 0  # processes; 0 = one a core. The output does not depend on it
    part: str = ""  # K/N: write every N-th shard from the K-th; the last part to end makes OUT. Default: rank/ranks
    dry_run: bool = False  # say what would be written, and how much room it takes


def main(argv: list[str] | None = None) -> None:
    command = parse(ShardCommand, argv or [], "sega-dist shard")
    try:
        shard(command)
    except KeyboardInterrupt:
        say("stopped", f"finished shards lie in {_partial(command)}; the same command goes on")
        raise


def shard(command: ShardCommand) -> Manifest | None:
    """The data set, put in place when it is whole; None while other parts are missing, or in a dry run.

    Every part writes into OUT.partial, each file whole or not at all, so that parts need not know of each other.
    """
    command = dataclasses.replace(command, out=command.out.resolve())
    part, parts = _check(command)
    source = open_source(command.source)
    recipe = Recipe(command.split, command.crop, command.size, command.seed, command.shard_size)
    plans, partial = Plans(source, recipe, command.lists), _partial(command)
    if (command.out / MANIFEST).is_file():
        whole = read_manifest(command.out)
        if (whole.recipe, whole.source) == (recipe, plans.digest):
            print(f"{command.out} is there already: {open_manifest(command.out)}")
            return whole
    if command.out.exists() and (not command.out.is_dir() or any(command.out.iterdir())):
        raise UserError(f"{command.out} exists and is not an empty folder; remove it or name another")
    for line in _described(command, plans, part, parts):
        print(line)
    if command.dry_run:
        return None
    _begin(partial, plans)
    try:
        _write(command, plans, partial, range(part, len(plans), parts))
        manifest = _finish(command, plans, partial)
    except TooManySkipped:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    except BrokenProcessPool:
        raise UserError("a worker was killed, for want of memory perhaps; go on with fewer --jobs") from None
    except FileNotFoundError:
        if partial.exists():
            raise
        if not (command.out / MANIFEST).is_file():
            raise UserError(f"{partial} is gone: another part failed, or somebody removed it") from None
        manifest = read_manifest(command.out)  # another part ended last
    if manifest is None:
        print(f"part {part}/{parts} is done; the last part to end makes {command.out}")
    else:
        print(f"{manifest}, {manifest.skipped} skipped -> {command.out}")
    return manifest


def _partial(command: ShardCommand) -> Path:
    out = command.out.resolve()
    return out.with_name(f"{out.name}.partial")


def _check(command: ShardCommand) -> tuple[int, int]:
    """Which part of how many this process is."""
    if command.size < 32 or command.size % 32:
        raise UserError(f"--size is {command.size}; it must be a multiple of 32")
    if not 0 <= command.seed < 2**63 or not 0 <= command.max_skip <= 1:
        raise UserError("--seed must be 0 or more and fit 63 bits, and --max-skip a share between 0 and 1")
    if command.shard_size < 1 or command.jobs < 0:
        raise UserError("--shard-size must be 1 or more, and --jobs 0 or more")
    ranks = launched_ranks()
    return share(command.part or f"{os.environ['RANK'] if ranks > 1 else 0}/{ranks}")


def _described(command: ShardCommand, plans: Plans, part: int, parts: int) -> Iterator[str]:
    """What will be written, line by line; UserError where there is no room for it."""
    doubt = celeba.doubt(plans.source)
    if doubt:
        say("warning", f"{doubt}; fetch it again unless you repacked it")
    sides = ", ".join(f"{side} {len(names):,}" for side, names in plans.sides.items())
    yield f"source  {plans.source.path}: {len(plans.source.names):,} images"
    yield f"split   {command.split}: {sides}"
    if plans.identities:
        yield "people  " + ", ".join(f"{where} {count:,}" for where, count in plans.identities.items())
    of_part = f", of which part {part}/{parts} writes {len(range(part, len(plans), parts))}" if parts > 1 else ""
    yield f"shards  {len(plans)} of up to {command.shard_size:,} images: {command.size} pixels, {command.crop}{of_part}"
    parent = next(folder for folder in command.out.absolute().parents if folder.exists())
    written = sum(file.stat().st_size for file in _partial(command).glob("*.tar"))
    needed = int((sample_bytes(plans) + TAR_BYTES) * len(plans.source.names) * ROOM) - written
    free = shutil.disk_usage(parent).free
    yield f"disk    about {max(needed, 0) / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free in {parent}"
    if needed > free:
        raise UserError(f"{parent} has {free / 1e9:.2f} GB free, about {needed / 1e9:.2f} GB are needed")


def _begin(partial: Path, plans: Plans) -> None:
    """Make the folder for what is unfinished; UserError where one stands that was begun otherwise."""
    ours = {"source": plans.digest, **dataclasses.asdict(plans.recipe), **versions()}
    partial.mkdir(parents=True, exist_ok=True)
    begun = partial / BEGUN
    theirs = json.loads(begun.read_text()) if begun.is_file() else ours
    changed = [key for key, value in ours.items() if theirs.get(key) != value]
    if changed:
        raise UserError(f"{partial} was begun with another {', '.join(changed)}; finish that, or remove it")
    write_whole(begun, json.dumps(ours).encode())


def _write(command: ShardCommand, plans: Plans, partial: Path, mine: range) -> None:
    """This part's shards that are not yet there; UserError as soon as too many images turned out unusable."""
    missing = [index for index in mine if not _record(partial, plans.name(index)).is_file()]
    skipped = [skip for written in _written(partial) for skip in written.skipped]
    jobs = command.jobs or max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    with progress("sharding", sum(map(plans.count, mine))) as advance, _packer(min(jobs, len(missing))) as packed:
        advance(sum(map(plans.count, mine)) - sum(map(plans.count, missing)))
        for plan, written in packed((plans[index] for index in missing), partial):
            skipped += written.skipped
            _limit(command, plans, skipped)
            write_whole(_record(partial, plan.name), json.dumps(dataclasses.asdict(written)).encode())
            advance(len(plan.samples))


@contextlib.contextmanager
def _packer(jobs: int) -> Iterator[Callable[[Iterable[Plan], Path], Iterator[tuple[Plan, Written]]]]:
    """How to write many shards: one after another, or in processes with a few waiting; either way in order."""
    if jobs <= 1:
        yield lambda plans, folder: ((plan, pack(plan, folder)) for plan in plans)
        return
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(jobs, spawn, _begin_worker)

    def packed(plans: Iterable[Plan], folder: Path) -> Iterator[tuple[Plan, Written]]:
        waiting: collections.deque[tuple[Plan, Future[Written]]] = collections.deque()
        for plan in plans:
            waiting.append((plan, pool.submit(pack, plan, folder)))
            if len(waiting) > 2 * jobs:
                first, result = waiting.popleft()
                yield first, result.result()
        for plan, result in waiting:
            yield plan, result.result()

    try:
        yield packed
    finally:
        pool.shutdown(cancel_futures=True)


def _begin_worker() -> None:
    """Ctrl-C is the parent's to answer; a worker ends with its parent, however that ended."""

    def watch() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=watch, daemon=True).start()


def _finish(command: ShardCommand, plans: Plans, partial: Path) -> Manifest | None:
    """Put the data set in place, whichever part ends last: should two do so at once, they write the same."""
    written = {result.shard.name: result for result in _written(partial)}
    if len(written) < len(plans):
        return None
    skipped = [skip for result in written.values() for skip in result.skipped]
    _limit(command, plans, skipped)
    sides = {side: tuple(found.shard for index, (of, _) in enumerate(plans.places)
                         if of == side and (found := written[plans.name(index)]).shard.samples)
             for side in splits.SIDES}  # fmt: skip
    if not any(sides.values()):
        raise TooManySkipped(
            f"none of the images of {command.source} can be used; {skipped[0]['name']}: {skipped[0]['reason']}"
        )
    whole = {side: shards for side, shards in sides.items() if shards}
    manifest = Manifest(partial, plans.recipe, plans.digest, len(skipped), plans.identities, versions(), whole)
    if skipped:
        write_whole(partial / "skipped.jsonl", "".join(json.dumps(skip) + "\n" for skip in skipped).encode())
    manifest.save()
    partial.rename(command.out)  # replaces an empty folder, refuses any other
    manifest = dataclasses.replace(manifest, folder=command.out)
    kept = {MANIFEST, "skipped.jsonl", *(name for shard in manifest.shards for name in (shard.name, shard.index_name))}
    for file in command.out.iterdir():  # records, empty shards, what a killed process left
        if file.name not in kept:
            file.unlink(missing_ok=True)
    return manifest


def _limit(command: ShardCommand, plans: Plans, skipped: list[dict[str, str]]) -> None:
    limit = max(ALWAYS_TOLERATED, int(command.max_skip * len(plans.source.names))) if command.max_skip > 0 else 0
    if len(skipped) > limit:
        raise TooManySkipped(
            f"{len(skipped)} images cannot be used, more than the {limit} allowed by --max-skip {command.max_skip};"
            f" the first is {skipped[0]['name']}: {skipped[0]['reason']}"
        )


def _record(partial: Path, name: str) -> Path:
    return partial / (name + RECORD)


def _written(partial: Path) -> list[Written]:
    """What is finished, by any part."""
    records = [json.loads(path.read_text()) for path in sorted(partial.glob(f"*{RECORD}"))]
    return [Written(Shard(**record["shard"]), record["skipped"]) for record in records]


if __name__ == "__main__":
    run(main)
