"""What became of shards and what is in them: `sega-dist verify`, `repair`, `inspect` and `stats`."""

import contextlib
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image
from tyro.conf import Positional

from sega_dist.arguments import ShardsPath, SourcePath, parse
from sega_dist.data.images import DamagedSample, ShardReader
from sega_dist.data.packing import Plans, pack
from sega_dist.data.shards import INDEX, MEMBERS, Manifest, Shard, open_manifest, read_manifest, verify
from sega_dist.data.sources import open_source
from sega_dist.errors import UserError
from sega_dist.pictures import Panel, grid
from sega_dist.progress import progress

COLUMNS = 8  # faces of each side in the contact sheet


@dataclass(frozen=True)
class VerifyCommand:
    """Check every byte of a folder of shards against its manifest."""

    shards: ShardsPath  # a folder made by sega-dist shard
    quick: bool = False  # sizes and indexes only


@dataclass(frozen=True)
class RepairCommand:
    """Write missing and damaged shards anew from their source; whole ones are not touched."""

    shards: ShardsPath  # a folder made by sega-dist shard
    source: SourcePath  # what it was made from
    lists: Path | None = None  # folder of CelebA's lists, if not beside the images


@dataclass(frozen=True)
class InspectCommand:
    """Find one sample of a folder of shards."""

    shards: ShardsPath  # a folder made by sega-dist shard
    key: Positional[str]  # as the members of the tar are called, without suffix
    save: Path | None = None  # write its image here


@dataclass(frozen=True)
class StatsCommand:
    """What a folder of shards holds: counts, people, sizes, and some of its faces."""

    shards: ShardsPath  # a folder made by sega-dist shard
    sheet: Path | None = None  # write a PNG with some faces of each side
    json: bool = False  # print JSON and nothing else


def verify_main(argv: list[str] | None = None) -> None:
    command = parse(VerifyCommand, argv or [], "sega-dist verify")
    manifest = read_manifest(command.shards)
    problems = [problem for _, problem in _verified(manifest, command.quick) if problem]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UserError(f"{problems[0]}{more}; sega-dist repair {command.shards} SOURCE writes it anew")
    how = "sizes and indexes as written" if command.quick else "every byte as written"
    print(f"{manifest}: {how}; data set {manifest.digest[:12]}")


def repair_main(argv: list[str] | None = None) -> None:
    command = parse(RepairCommand, argv or [], "sega-dist repair")
    manifest = read_manifest(command.shards)
    damaged = {shard.name: shard for shard, problem in _verified(manifest, is_quick=False) if problem}
    if damaged:
        plans = Plans(open_source(command.source), manifest.recipe, command.lists)
        if plans.digest != manifest.source:
            raise UserError(f"{command.source}, with its lists, is not what {command.shards} was made from")
        numbers = [index for index in range(len(plans)) if plans.name(index) in damaged]
        with (TemporaryDirectory(dir=command.shards, prefix=".repair.") as folder,
              progress("repairing", sum(map(plans.count, numbers))) as advance):  # fmt: skip
            for index in numbers:
                _replace(pack(plans[index], Path(folder)).shard, damaged[plans.name(index)], Path(folder), manifest)
                advance(plans.count(index))
    print(f"{len(damaged)} of {len(manifest.shards)} shards written anew{''.join(f', {name}' for name in damaged)}")


def inspect_main(argv: list[str] | None = None) -> None:
    command = parse(InspectCommand, argv or [], "sega-dist inspect")
    manifest = open_manifest(command.shards)
    for side in manifest.sides:
        reader = ShardReader(manifest, side)
        for number in range(len(reader)):
            with contextlib.suppress(DamagedSample):  # of another sample
                if reader.key(number) == command.key:
                    _show(reader, side, number, command)
                    return
    raise UserError(f"{command.shards} has no sample {command.key!r}; keys are names of members without suffix")


def stats_main(argv: list[str] | None = None) -> None:
    command = parse(StatsCommand, argv or [], "sega-dist stats")
    if command.sheet and command.sheet.suffix.lower() != ".png":
        raise UserError(f"--sheet is {command.sheet}; it must end in .png")
    manifest = open_manifest(command.shards)
    facts = stats(manifest)
    if command.json:
        print(json.dumps(facts, indent=1))
    else:
        for name, value in facts.items():
            shown = ", ".join(f"{k} {v:,}" for k, v in value.items()) if isinstance(value, dict) else value
            print(f"{name:<12} {shown if shown != '' else 'not known: no identity_CelebA.txt beside the images'}")
    if command.sheet:
        sheet(manifest).save(command.sheet)


def stats(manifest: Manifest) -> dict[str, object]:
    """What a person asks first."""
    lengths = np.concatenate([np.fromfile(manifest.folder / shard.index_name, INDEX)["length"][::MEMBERS]
                              for shard in manifest.shards])  # fmt: skip
    low, middle, high = np.quantile(lengths, [0.0, 0.5, 1.0], method="nearest").tolist()
    recipe = manifest.recipe
    return {
        "images": {side: manifest.images(side) for side in manifest.sides},
        "skipped": manifest.skipped,
        "people": manifest.identities,
        "shards": len(manifest.shards),
        "GB": round(sum(shard.bytes for shard in manifest.shards) / 1e9, 3),
        "JPEG bytes": {"least": low, "median": middle, "most": high, "mean": round(float(lengths.mean()))},
        "recipe": f"{recipe.size} pixels, crop {recipe.crop}, split {recipe.split}, seed {recipe.seed}",
        "versions": ", ".join(f"{name} {version}" for name, version in manifest.versions.items()),
        "digest": manifest.digest,
    }


def sheet(manifest: Manifest) -> Image.Image:
    """A few faces of each side, evenly spread."""
    rows = []
    for side in manifest.sides:
        reader = ShardReader(manifest, side)
        numbers = [i * len(reader) // COLUMNS for i in range(COLUMNS)]
        try:
            rows.append([Panel(reader.image(number), f"{side} {reader.key(number)}") for number in numbers])
        except DamagedSample as error:
            raise UserError(f"damaged: {error}; sega-dist repair {manifest.folder} SOURCE writes it anew") from None
    return grid([""] * COLUMNS, rows, side=128)


def _verified(manifest: Manifest, is_quick: bool) -> list[tuple[Shard, str]]:
    """Each shard and its problem, with progress where every byte is read."""
    found = []
    with progress("verifying", sum(shard.samples for shard in manifest.shards)) as advance:
        for shard, problem in verify(manifest, is_quick):
            found.append((shard, problem))
            advance(shard.samples)
    return found


def _replace(ours: Shard, theirs: Shard, folder: Path, manifest: Manifest) -> None:
    """Put a shard in the place of a damaged one, if it is what the manifest asks for to the byte."""
    if ours != theirs:
        made_by = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
        raise UserError(f"{ours.name} made anew differs from the manifest: the images changed, or not {made_by}")
    for name in (ours.index_name, ours.name):
        (folder / name).replace(manifest.folder / name)


def _show(reader: ShardReader, side: str, number: int, command: InspectCommand) -> None:
    shard, offset, length, crc32 = reader.place(number, 0)
    with (reader.manifest.folder / reader.shards[shard].name).open("rb") as file:
        file.seek(offset)
        data = file.read(length)
    print(f"{command.key}: {side} sample {number} of {len(reader):,}, {reader.shards[shard].name} at byte {offset:,}")
    try:
        print(f"name    {reader.name(number)}")
        print(f"image   {length:,} bytes, {'x'.join(map(str, reader.image(number).shape[1:]))}, crc32 {crc32:08x}")
    except DamagedSample:
        raise UserError(f"{command.key} is damaged; sega-dist repair {command.shards} SOURCE writes it anew") from None
    print(f"sha256  {hashlib.sha256(data).hexdigest()}")
    if command.save:
        command.save.write_bytes(data)
