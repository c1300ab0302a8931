"""`sega-dist bench data`: training pairs a second beside other ways to read them, and what each stage takes."""

import collections
import contextlib
import dataclasses
import functools
import io
import json
import multiprocessing
import random
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import webdataset
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from sega_dist.arguments import parse
from sega_dist.bench.measure import provenance, quantiles
from sega_dist.bench.results import Results, Row, show
from sega_dist.data.crops import hr_pixels
from sega_dist.data.images import RankPositions, ShardReader, TrainingImages, training_loader
from sega_dist.data.packing import Plans, pack
from sega_dist.data.pairs import bicubic, make_pair
from sega_dist.data.shards import INDEX, MEMBERS, Manifest, Recipe, Shard, file_sha256, open_manifest
from sega_dist.data.sources import open_source
from sega_dist.data.synthetic import write_folder
from sega_dist.errors import UserError
from sega_dist.shard import ShardCommand, shard

SCALE, SIZE, BATCH = 4, 256, 8
FLIPS = np.arange(BATCH) % 2 == 0
CASE = ("part",)
Pair = tuple[Tensor, Tensor]  # LR (3,h,w) and HR (3,S,S), fp32 in [-1,1]
Call = Callable[[], Any]


@dataclass(frozen=True)
class DataCommand:
    """Time a training's input beside other ways to read it, stage by stage, and sharding beside plain Pillow."""

    data: Path | None = None  # folder of shards of 256 pixels; default: procedural faces
    out: Path = Path("runs/bench-data")  # rows.jsonl, data.csv, data.json, data.png
    images: int = 400  # how many of them
    workers: int = 0  # processes that decode; 0 = everything on one core
    turns: int = 5  # each way in turn, forwards and backwards, so that drift meets all alike
    json: bool = False  # print the rows as JSON and nothing else


def main(argv: list[str] | None = None) -> None:
    command = parse(DataCommand, argv or [], "sega-dist bench data")
    rows = bench(command)
    if command.json:
        print(json.dumps(rows, indent=1))


def bench(command: DataCommand) -> list[Row]:
    """Every row of the command; writes the results and prints a table."""
    if command.images < BATCH or command.workers < 0 or command.turns < 1:
        raise UserError(f"--images must be {BATCH} or more, --workers 0 or more, --turns 1 or more")
    facts = provenance("cpu")
    results = Results(command.out, (*CASE, "column"), facts["code"], again=True)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        reader = ShardReader(_shards(command, Path(folder)), "train")
        count = min(command.images, len(reader)) // BATCH * BATCH
        if not count:
            raise UserError(f"{command.data} must hold {BATCH} training images or more")
        files = _stored(reader, Path(folder), count)
        times = timed({**inputs(reader, files, count, command.workers), **stages(reader, count),
                       **sharding(files, Path(folder))}, command.turns, count)  # fmt: skip
        rows = [{"part": part, "column": column, **quantiles(taken)} for (part, column), taken in times.items()]
        rows += [in_a_process_of_its_own(_many, Path(folder) / str(entries), entries, reader.pixels(0))
                 for entries in (1_000, 1_000_000)]  # fmt: skip
    for row in rows:
        results.add({"why": "", "code": facts["code"], "commit": facts["commit"], **row})
    results.write("data", facts, results.rows, CASE, f"one image, {command.workers} workers")
    if not command.json:
        show([row for row in results.rows if "median_ms" in row], CASE, "median ms an image")
        for row in results.rows[-2:]:
            print(f"{row['column']} entries: first batch after {row['first_batch_s']:.2f} s, {row['memory_mb']:.1f} MB")
    return results.rows


def timed(calls: dict[tuple[str, str], Call], turns: int, count: int) -> dict[tuple[str, str], list[float]]:
    """Milliseconds an image of each call, which does `count` of them."""
    times: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    for turn in range(turns):
        for key in list(calls)[:: -1 if turn % 2 else 1]:
            start = time.perf_counter()
            calls[key]()
            times[key].append((time.perf_counter() - start) * 1000 / count)
    return times


# Input ---------------------------------------------------------------------------------------------------------------


def inputs(reader: ShardReader, files: dict[str, list[Path]], count: int, workers: int) -> dict[tuple[str, str], Call]:
    """Each way to give `count` training pairs on the device, shuffled and flipped; each was seen to give the same."""
    shuffled = functools.partial(DataLoader, batch_size=BATCH, num_workers=workers, shuffle=True)
    tars = [str(reader.manifest.folder / shard.name) for shard in reader.shards]
    in_order = webdataset.WebDataset(tars, shardshuffle=False, empty_check=False).decode("pil").to_tuple("jpg")
    streamed = [_pillow_pair(sample[0], is_flipped=False) for sample in in_order.slice(BATCH)]
    ways: dict[str, tuple[Call, Callable[[int], Pair]]] = {
        "ours": (lambda: _ours(reader, count, workers), lambda i: _our_pair(reader.pixels(i))),
        "pairs_jpeg": (lambda: _drained(shuffled(StoredPairs(files["jpeg"], files["lr"]))),
                       lambda i: _unflipped(StoredPairs(files["jpeg"], files["lr"]), i)),
        "pairs_png": (lambda: _drained(shuffled(StoredPairs(files["png"], files["lr"]))),
                      lambda i: _unflipped(StoredPairs(files["png"], files["lr"]), i)),
        "image_folder": (lambda: _drained(shuffled(ImageFolder(files["jpeg"]))),
                         lambda i: _unflipped(ImageFolder(files["jpeg"]), i)),
        "webdataset": (lambda: _drained(_streamed(tars, count, workers)), streamed.__getitem__),
    }  # fmt: skip
    for name, (_, pair) in ways.items():
        for number in range(BATCH):
            for found, wanted in zip(pair(number), _our_pair(reader.pixels(number)), strict=True):
                off = float((found - wanted).abs().max()) * 127.5
                if off > 1.01:
                    raise RuntimeError(f"{name} gives another pair: {off:.1f} grey levels off")
    return {("input", name): call for name, (call, _) in ways.items()}


def _ours(reader: ShardReader, count: int, workers: int) -> None:
    loader = iter(training_loader(TrainingImages(reader, 0), RankPositions(0, BATCH, 0, 1), workers))
    for _ in range(count // BATCH):
        make_pair(next(loader).image.permute(0, 3, 1, 2), FLIPS, SCALE, torch.float32)


def _our_pair(pixels: NDArray[np.uint8]) -> Pair:
    lr, hr = make_pair(torch.from_numpy(pixels)[None].permute(0, 3, 1, 2), np.array([False]), SCALE, torch.float32)
    return lr[0], hr[0]


def _drained(batches: Iterable[Any]) -> None:
    for _ in batches:
        pass


def _as_tensor(pixels: NDArray[np.uint8]) -> Tensor:
    """As such loaders do it: floats, then channels first."""
    return torch.from_numpy(np.ascontiguousarray((pixels.astype(np.float32) / 127.5 - 1).transpose(2, 0, 1)))


class StoredPairs(Dataset[Pair]):
    """Folders of HR and LR images, as BasicSR reads them; decoded by ours, which is as fast as its OpenCV."""

    def __init__(self, hr: list[Path], lr: list[Path]):
        self.hr, self.lr, self.flip = hr, lr, 0.5

    def __len__(self) -> int:
        return len(self.hr)

    def __getitem__(self, number: int) -> Pair:
        pixels = [_decoded(path) for path in (self.lr[number], self.hr[number])]
        if random.random() < self.flip:
            pixels = [image[:, ::-1] for image in pixels]
        lr, hr = map(_as_tensor, pixels)
        return lr, hr


def _decoded(path: Path) -> NDArray[np.uint8]:
    data = path.read_bytes()
    return hr_pixels(data) if path.suffix == ".jpg" else np.asarray(Image.open(io.BytesIO(data)))


class ImageFolder(Dataset[Pair]):
    """A folder of images decoded and reduced by Pillow, as with torchvision's transforms."""

    def __init__(self, files: list[Path]):
        self.files, self.flip = files, 0.5

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> Pair:
        return _pillow_pair(Image.open(self.files[number]), random.random() < self.flip)


def _pillow_pair(image: Image.Image, is_flipped: bool) -> Pair:
    rgb = image.convert("RGB")
    if is_flipped:
        rgb = rgb.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    lr = rgb.resize((SIZE // SCALE, SIZE // SCALE), Image.Resampling.BICUBIC)
    return _as_tensor(np.asarray(lr)), _as_tensor(np.asarray(rgb))


def _unflipped(dataset: Any, number: int) -> Pair:
    dataset.flip = -1.0
    pair: Pair = dataset[number]
    return pair


def _streamed(tars: list[str], count: int, workers: int) -> Iterable[Any]:
    """webdataset's own way: a stream with a shuffle buffer."""
    stream = webdataset.WebDataset(tars, shardshuffle=100, empty_check=False, nodesplitter=webdataset.split_by_node)
    pairs = stream.shuffle(1000).decode("pil").to_tuple("jpg").map(_streamed_pair).batched(BATCH, default_collate)
    return webdataset.WebLoader(pairs, batch_size=None, num_workers=workers).slice(count // BATCH)


def _streamed_pair(sample: tuple[Image.Image]) -> Pair:
    return _pillow_pair(sample[0], random.random() < 0.5)


# Stages --------------------------------------------------------------------------------------------------------------


def stages(reader: ShardReader, count: int) -> dict[tuple[str, str], Call]:
    """What one of our images goes through, one after another."""
    data = [reader._member(number, 0) for number in range(count)]
    images = [torch.from_numpy(hr_pixels(jpeg)) for jpeg in data[:BATCH]]
    batch = torch.stack(images).permute(0, 3, 1, 2)

    def repeated(call: Call) -> Call:
        return lambda: collections.deque((call() for _ in range(count // BATCH)), maxlen=0)  # keeps none of them

    def for_each(call: Callable[[Any], Any], given: Iterable[Any]) -> Call:
        return lambda: collections.deque(map(call, given), maxlen=0)

    return {
        ("read", "ours"): for_each(lambda number: reader._member(number, 0), range(count)),
        ("decode", "ours"): for_each(hr_pixels, data),
        ("decode", "pillow"): for_each(lambda jpeg: np.asarray(Image.open(io.BytesIO(jpeg))), data),
        ("collate", "ours"): repeated(lambda: torch.stack(images)),
        ("resize", "ours"): repeated(lambda: bicubic(batch, SIZE // SCALE, SIZE // SCALE)),
        ("pair", "ours"): repeated(lambda: make_pair(batch, FLIPS, SCALE, torch.float32)),
    }


# Sharding ------------------------------------------------------------------------------------------------------------


def sharding(files: dict[str, list[Path]], folder: Path) -> dict[tuple[str, str], Call]:
    """Ours beside a loop of Pillow that writes the same images to a folder: CelebA's size, and as they are stored."""
    calls: dict[tuple[str, str], Call] = {}
    for part, kind in (("shard 178x218", "aligned"), ("shard 256x256", "jpeg")):
        recipe = Recipe(split="train", size=SIZE, shard_size=10**6)
        plan = Plans(open_source(files[kind][0].parent), recipe, None)[0]
        out = folder / f"{kind}-plain"
        out.mkdir()
        calls[part, "ours"] = functools.partial(pack, plan, folder)
        calls[part, "pillow"] = functools.partial(_plain_loop, files[kind], out)
    return calls


def _plain_loop(files: list[Path], out: Path) -> None:
    for file in files:
        rgb = Image.open(file).convert("RGB")
        side, corner = 294, 19
        zoomed = rgb.resize((side, side), Image.Resampling.BICUBIC)
        face = zoomed.crop((corner, corner, corner + SIZE, corner + SIZE))
        face.save(out / file.name, quality=95, subsampling=0)


# What is read --------------------------------------------------------------------------------------------------------


def _shards(command: DataCommand, folder: Path) -> Manifest:
    if command.data:
        manifest = open_manifest(command.data)
        if manifest.size != SIZE or "train" not in manifest.sides:
            raise UserError(f"{command.data} must hold training images of {SIZE} pixels")
        return manifest
    write_folder(folder / "faces", images=command.images, seed=0, size=SIZE)
    with contextlib.redirect_stdout(sys.stderr):
        made = shard(ShardCommand(folder / "faces", folder / "shards", split="train"))
    assert made is not None
    return made


def _stored(reader: ShardReader, folder: Path, count: int) -> dict[str, list[Path]]:
    """The same images as other ways want them: files of HR as JPEG and PNG, of LR as PNG, and of CelebA's size."""
    files: dict[str, list[Path]] = {kind: [] for kind in ("jpeg", "png", "lr", "aligned")}
    for kind in files:
        (folder / kind).mkdir()
    for number in range(count):
        hr = Image.fromarray(reader.pixels(number))
        lr = hr.resize((SIZE // SCALE, SIZE // SCALE), Image.Resampling.BICUBIC)
        for kind, suffix in (("jpeg", "jpg"), ("png", "png"), ("lr", "png"), ("aligned", "jpg")):
            files[kind].append(folder / kind / f"{number:06d}.{suffix}")
        files["jpeg"][-1].write_bytes(reader._member(number, 0))
        hr.save(files["png"][-1])
        lr.save(files["lr"][-1])
        hr.resize((178, 218), Image.Resampling.BICUBIC).save(files["aligned"][-1], quality=95)
    return files


# Memory --------------------------------------------------------------------------------------------------------------


def in_a_process_of_its_own(call: Callable[..., Row], *given: Any) -> Row:
    """So that nothing else counts."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(call, given)


def _many(folder: Path, entries: int, pixels: NDArray[np.uint8]) -> Row:
    """The first batch of a data set of so many images, and the memory that its reading takes beyond torch itself."""
    manifest = large(folder, entries, pixels)
    before, start = psutil.Process().memory_full_info().uss, time.perf_counter()
    reader = ShardReader(open_manifest(manifest.folder), "train")
    loader = iter(training_loader(TrainingImages(reader, 0), RankPositions(0, BATCH, 0, 1), 0))
    next(loader)
    first_s = time.perf_counter() - start
    for _ in range(200):
        next(loader)
    memory = (psutil.Process().memory_full_info().uss - before) / 1e6
    return {"part": "memory", "column": str(entries), "first_batch_s": first_s, "memory_mb": memory}


def large(folder: Path, entries: int, pixels: NDArray[np.uint8]) -> Manifest:
    """A data set whose every entry is the same image."""
    folder.mkdir()
    jpeg = io.BytesIO()
    Image.fromarray(pixels).save(jpeg, "JPEG", quality=95, subsampling=0)
    data = jpeg.getvalue()
    index = np.array([(0, len(data), zlib.crc32(data))] * MEMBERS * 1000, INDEX)
    shards = []
    for number in range(entries // 1000):
        shard = Shard(f"train-{number:05d}.tar", 1000, len(data), "", "")
        (folder / shard.name).write_bytes(data)
        (folder / shard.index_name).write_bytes(index.tobytes())
        shards.append(dataclasses.replace(shard, index_sha256=file_sha256(folder / shard.index_name)))
    manifest = Manifest(folder, Recipe(split="train", size=len(pixels)), "", 0, {}, {}, {"train": tuple(shards)})
    manifest.save()
    return manifest
