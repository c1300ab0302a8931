"""Faces from a few pixels by searching a pretrained GAN: `sega-dist explore IN OUT --gan SNAPSHOT`.

On several processes by `accelerate launch -m sega_dist.explore` with the same arguments. Each batch is on the disk when
it is done, and a stopped one every half minute: the same command goes on.
"""

import contextlib
import csv
import dataclasses
import io
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor

from sega_dist import config as configuration
from sega_dist.arguments import Device, InPath, OutPath, check_folder, parse
from sega_dist.data.pairs import to_uint8
from sega_dist.data.shards import write_whole
from sega_dist.distributed import WAIT, World
from sega_dist.environment import packages
from sega_dist.errors import UserError, run
from sega_dist.faces import Faces, TinyFaceConfig, open_faces
from sega_dist.gan import Gan, load_gan
from sega_dist.latents import resize, square_difference
from sega_dist.networks.vgg19 import CONV3_3, Vgg19
from sega_dist.pictures import Panel, grid, to_image, to_tensor
from sega_dist.progress import progress
from sega_dist.search import Found, MganConfig, Perceptual, RlseConfig, Search, check_mgan, check_rlse, mganprior, rlse
from sega_dist.searched import HEADER, IMAGES, RESULTS, png
from sega_dist.weights import UNREADABLE, load_vgg19

Method = Literal["rlse", "pulse", "mganprior"]
STRIPS, PARTS = "steps", ".batches"
STATE = {"search", "restart", "done", "frames", "spent", "best"}  # of a batch that was stopped
SAVED_EACH = 30  # seconds of a batch that a stop may cost
SHOWN = 8  # faces of the grid
LARGE = 256  # side of a GAN for scales above 16
MOST = 1 << 30  # bytes of film strips that a batch may keep
COLUMNS = ("loss", "residual", "consistency_psnr", "is_reached", "step", "non_finite")  # of per_image.csv


@dataclass(frozen=True)
class ExploreCommand:
    """Search a GAN for the face that looks like each small one when it is made as small.

    Options with a dot are the searches' keys; those of rlse hold for pulse, which is rlse with lambda_s 0.
    """

    source: InPath  # small faces: an image, a folder of images, or shards whose images are made small
    out: OutPath  # the folder for the faces found; what stands there of the same search is not searched again
    gan: Path  # a face GAN's snapshot or run, NVlabs' StyleGAN2 as .safetensors, or a DCGAN as .pth
    method: Method = "rlse"  # pulse and mganprior need no discriminator
    scale: Literal[8, 16, 32, 64] = 8  # the GAN's side over the small face's
    split: str = "test"  # of shards: train, val, test or preview
    images: int = 0  # the first so many; 0 = all
    batch: int = 16  # faces in one search: bounds memory
    restarts: int = 1  # searches of each face from other random starts, the best of which counts
    seed: int = 0  # of the starts, with each face's name
    save_steps: int = 0  # keep the best face of every so many steps, as a film strip in OUT/steps; 0 = none
    vgg19: Path | None = None  # VGG19 weights: mganprior's perceptual term, which is left out without them
    precision: Literal["fp32", "tf32", "bf16", "fp64"] = "fp32"  # of the networks; losses and latents stay fp32
    compile: bool = False  # torch.compile both networks; the compiler's minutes count as the faces'
    timeout: int = WAIT  # seconds that a process waits for the others before it gives up
    device: Device = "auto"  # auto: the GPU where there is one
    rlse: RlseConfig = field(default_factory=RlseConfig)
    mgan: MganConfig = field(default_factory=MganConfig)
    tinyface: TinyFaceConfig = field(default_factory=TinyFaceConfig)


def main(argv: list[str] | None = None) -> None:
    command = parse(ExploreCommand, argv or [], "sega-dist explore")
    world = World(command.precision, command.device, command.timeout)
    try:
        with world.naming_lost_ranks("start again: what is done is kept"):
            results = explore(command, world)
    finally:
        world.close()
    if world.is_main:
        Console().print(table(results))
        print(f"results in {command.out}: {IMAGES}/, per_image.csv, {RESULTS}, grid.png")


def explore(command: ExploreCommand, world: World) -> dict[str, Any]:
    """Search for every face, and write the results on the first rank; returns what stands in results.json there."""
    _check(command)
    torch.backends.cudnn.deterministic = True  # else the order in which a GPU adds up gradients is any
    torch.backends.cuda.matmul.allow_tf32 = False  # of convolutions alone: matrices make images small
    with world.together():
        gan = load_gan(command.gan, world)
        _check_gan(command, gan)
        exploration = Exploration(command, world, gan)
        faces = open_faces(command.source, command.split, command.scale, gan.generator.side, command.tinyface,
                           command.images)  # fmt: skip
    header = describe(exploration, faces)
    world.agree(header)
    with world.together():
        if world.is_main:
            _begin(command.out, header)
            for line in (*faces.remarks, *([gan.remark] if gan.remark else [])):
                print(line)
    batches = [range(first, min(first + command.batch, len(faces))) for first in range(0, len(faces), command.batch)]
    mine = list(enumerate(batches))[world.rank :: world.size]
    with world.together(is_long=True):
        _search_all(exploration, faces, mine)
    results = {}
    with world.together():
        if world.is_main:
            results = _finish(command, faces, batches, header)
    return results


class Exploration:
    """One search's settings and networks: from LR faces to what was found for them."""

    def __init__(self, command: ExploreCommand, world: World, gan: Gan):
        self.command, self.world, self.gan = command, world, gan
        self.perceptual, self.vgg19 = None, ""  # and the SHA-256 of its weights
        if command.method == "mganprior" and command.vgg19:
            features = world.place(Vgg19(CONV3_3))
            self.vgg19 = load_vgg19(features, command.vgg19)
            self.perceptual = perceptual_of(features)
        if command.compile:
            torch._dynamo.config.cache_size_limit = 64
            for network in (gan.generator, gan.discriminator):
                if isinstance(network, torch.nn.Module):
                    compiled(network)

    def search(self, lr: Tensor, names: list[str], restart: int, is_begun: bool = False) -> Search:
        """Of one start for each face; lr (N,3,h,h) uint8. One that is begun chooses no start again."""
        command, config = self.command, settings(self.command)
        small = lr.to(self.world.device).to(self.world.dtype) / 255
        shared = command.seed, restart
        if command.method == "mganprior":
            return mganprior(self.gan.generator, small, names, command.mgan, *shared, self.perceptual,
                             self.world.autocast)  # fmt: skip
        config = dataclasses.replace(config, init_candidates=1) if is_begun else config
        return rlse(self.gan.generator, self.gan.discriminator, small, names, config, *shared, self.world.autocast,
                    self.world.beat)  # fmt: skip


class Batch:
    """The search of one batch, which a stop may interrupt."""

    def __init__(self, exploration: Exploration, lr: Tensor, names: list[str], file: Path, advance: Any):
        self.exploration, self.lr, self.names, self.file, self.advance = exploration, lr, names, file, advance
        self.best: Found | None = None
        self.frames: list[Tensor] = []  # (N,3,R,R) uint8 each, of the film strip
        self.spent, self.saved = 0.0, time.monotonic()

    def run(self) -> Found:
        """The best of all restarts, going on where a stop left off."""
        state = read_whole_state(self.file)
        if state:
            self.best = Found.on(self.exploration.world.device, state["best"]) if state["best"] else None
            self.frames, self.spent = state["frames"], state["spent"]
            self.advance(len(self.names) * state["done"], seconds=self.spent)
        for restart in range(state.get("restart", 0), self.exploration.command.restarts):
            began = time.perf_counter()
            search = self.exploration.search(self.lr, self.names, restart, is_begun=bool(state))
            if state:
                search.load_state(state["search"])
                state = {}
            self._run(search, restart, began)
        assert self.best is not None
        return self.best

    def _run(self, search: Search, restart: int, began: float) -> None:
        steps, each = search.steps, self.exploration.command.save_steps

        def on_step(step: int, losses: Tensor, images: Tensor) -> None:
            nonlocal began
            if each and (step % each == 0 or step == steps - 1):
                self.frames.append(to_uint8(2 * images - 1).cpu())
            is_told = step % 10 == 9 or step == steps - 1  # asking a GPU for a value makes it wait
            self.advance(len(self.names), f"loss {losses.mean():.3g}" if is_told else "")
            self.exploration.world.beat()
            if time.monotonic() - self.saved > SAVED_EACH:
                self.spent += time.perf_counter() - began
                self._save(search, restart, restart * steps + step + 1)
                began = time.perf_counter()

        found = search.run(on_step)
        if self.exploration.world.device.type == "cuda":
            torch.cuda.synchronize()
        self.spent += time.perf_counter() - began
        self.best = found if self.best is None else self.best.or_better(found)

    def _save(self, search: Search, restart: int, done: int) -> None:
        state = {"search": search.state(), "restart": restart, "done": done, "frames": self.frames,
                 "spent": self.spent, "best": vars(self.best) if self.best else None}  # fmt: skip
        torch.save(state, buffer := io.BytesIO())
        write_whole(self.file, buffer.getvalue())
        self.saved = time.monotonic()


def read_whole_state(file: Path) -> dict[str, Any]:
    """What a stop left of a batch; nothing where that is damaged, for the batch can begin anew."""
    try:
        state: dict[str, Any] = torch.load(file, "cpu", weights_only=True)  # another rank's GPU may have made it
        if set(state) != STATE:
            raise ValueError("it is of something else")
        return state
    except FileNotFoundError:
        return {}
    except UNREADABLE:
        print(f"{file} is damaged: its faces are searched for from the first step")
        return {}


def settings(command: ExploreCommand) -> RlseConfig:
    """PULSE is RLSE without the discriminator's loss."""
    return dataclasses.replace(command.rlse, lambda_s=0.0) if command.method == "pulse" else command.rlse


def compiled(network: torch.nn.Module) -> None:
    """Compile what a search calls of a network, in place."""
    for name in ("synthesis", "features", "head", "tail"):
        if hasattr(network, name):
            setattr(network, name, torch.compile(getattr(network, name), dynamic=False))


def describe(exploration: Exploration, faces: Faces) -> dict[str, Any]:
    """What decides the results: who goes on must have the same."""
    command, world, gan = exploration.command, exploration.world, exploration.gan
    keys: dict[str, Any] = {"rlse": settings(command)} if command.method != "mganprior" else {"mgan": command.mgan}
    return {
        "method": command.method, "scale": command.scale, "side": gan.generator.side, "gan": gan.sha256,
        "gan_file": gan.file.name, "nimg": gan.nimg, "data": gan.data, "parameters": gan.parameters,
        "faces": faces.digest, "images": len(faces), "seed": command.seed, "restarts": command.restarts,
        "batch": command.batch, "precision": command.precision, "save_steps": command.save_steps,
        "compile": command.compile, "vgg19": exploration.vgg19, "device": world.device.type,
        "tinyface": dataclasses.asdict(command.tinyface),
    } | {name: dataclasses.asdict(values) for name, values in keys.items()}  # fmt: skip


def perceptual_of(vgg19: Vgg19) -> Perceptual:
    """mGANprior's: mean absolute difference of features, of images enlarged to 256; it takes VGG16's relu3_3."""

    def distance(a: Tensor, b: Tensor) -> Tensor:
        enlarged = (F.interpolate(images, size=256, mode="nearest") for images in (a, b))
        x, y = (F.relu(vgg19.content(images)) for images in enlarged)
        return (x - y).abs().flatten(1).mean(1)

    return distance


def _check(command: ExploreCommand) -> None:
    check_folder(command.out)
    for name, least in (("batch", 1), ("restarts", 1), ("images", 0), ("save_steps", 0), ("seed", 0)):
        if getattr(command, name) < least:
            raise UserError(f"--{name.replace('_', '-')} must be {least} or more")
    if command.source.resolve() in command.out.resolve().parents:
        raise UserError(f"{command.out} lies in {command.source}, whose images it would join; name another folder")
    check_rlse(settings(command))
    check_mgan(command.mgan)


def _check_gan(command: ExploreCommand, gan: Gan) -> None:
    g, searched = gan.generator, settings(command)
    if command.method == "rlse" and searched.lambda_s and gan.discriminator is None:
        raise UserError(
            f"{gan.file} holds no discriminator, which rlse's semantic loss needs; --method pulse does without"
        )
    if command.method == "mganprior" and command.mgan.layer > g.splits:
        raise UserError(f"mgan.layer is {command.mgan.layer}; it must be at most {g.splits} for {gan.file}")
    if g.side % command.scale:
        raise UserError(f"the GAN's {g.side} pixels do not divide by --scale {command.scale}")
    if command.scale > 16 and g.side < LARGE:
        raise UserError(
            f"--scale {command.scale} wants a GAN of {LARGE} pixels or more, and {command.gan} makes {g.side}: too few"
            " pixels would be left to go by"
        )
    steps = command.mgan.steps if command.method == "mganprior" else command.rlse.steps
    frames = -(-steps // command.save_steps) * command.restarts if command.save_steps else 0
    if frames * command.batch * 3 * g.side**2 > MOST:
        raise UserError(
            f"--save-steps {command.save_steps} would keep {frames:,} pictures of each of {command.batch} faces in"
            f" memory, above {MOST >> 30} GiB: keep fewer, or lower --batch"
        )


def _begin(out: Path, header: dict[str, Any]) -> None:
    """A folder for these results; UserError where it holds others."""
    file = out / HEADER
    if file.is_file():
        try:
            before = configuration.flat(json.loads(file.read_text()))
        except (ValueError, AttributeError):
            raise UserError(f"{file} is damaged; name another folder, or remove {out}") from None
        now = configuration.flat(json.loads(json.dumps(header)))
        keys = (key for key in (*now, *before) if key != "gan_file")  # which may have been renamed: its digest stands
        apart = next((key for key in keys if before.get(key) != now.get(key)), None)
        if apart:
            values = f"{apart}: {before.get(apart)} -> {now.get(apart)}"
            raise UserError(f"{out} holds the results of another search ({values}); name another folder")
    elif out.is_dir() and any(not path.name.startswith(".") for path in out.iterdir()):  # of a stop just here
        raise UserError(f"{out} is not empty and holds no search; name another folder")
    (out / PARTS).mkdir(parents=True, exist_ok=True)
    write_whole(file, (json.dumps(header, indent=1) + "\n").encode())


def _search_all(exploration: Exploration, faces: Faces, batches: list[tuple[int, range]]) -> None:
    """This rank's batches: those that are not done."""
    command, world = exploration.command, exploration.world
    parts = command.out / PARTS
    missing = [(number, part) for number, part in batches if not _is_done(command, number, faces, part)]
    steps = command.mgan.steps if command.method == "mganprior" else command.rlse.steps
    total = sum(len(part) for _, part in missing) * steps * command.restarts
    share = f", share {world.rank + 1} of {world.size}" if world.size > 1 else ""
    bar = progress(f"{command.method} x{command.scale}{share}", total, "steps of a face")
    with bar if world.is_main else contextlib.nullcontext(lambda *_: None) as advance:
        for number, part in missing:
            world.enter(f"searching for faces {part[0]} to {part[-1]}")
            lr, names = faces.lr(part), [faces.names[i] for i in part]
            state = parts / f"{number:06d}.pt"
            batch = Batch(exploration, lr, names, state, advance)
            try:
                found = batch.run()
            except torch.OutOfMemoryError:
                raise UserError(f"{world.device} has too little memory for --batch {command.batch}: lower it") from None
            made = to_uint8(2 * found.image - 1).cpu()
            _keep(command.out, lr, made, names, batch.frames)
            rows = [dict(zip(("name", *COLUMNS), row, strict=True)) for row in _rows(names, found, lr, made)]
            values = {"seconds": batch.spent, "rows": rows}
            write_whole(parts / f"{number:06d}.json", json.dumps(values).encode())
            state.unlink(missing_ok=True)


def _is_done(command: ExploreCommand, number: int, faces: Faces, part: range) -> bool:
    """Whether all of a batch stands on the disk, and its numbers can be read."""
    folders = [command.out / IMAGES, *([command.out / STRIPS] if command.save_steps else [])]
    try:
        values = json.loads((command.out / PARTS / f"{number:06d}.json").read_text())
        is_whole = [row["name"] for row in values["rows"]] == [faces.names[i] for i in part]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return False
    return is_whole and all((folder / png(faces.names[i])).is_file() for folder in folders for i in part)


def _keep(out: Path, lr: Tensor, made: Tensor, names: list[str], frames: list[Tensor]) -> None:
    """The faces found, (N,3,R,R) uint8, and their film strips, as PNG."""
    for i, name in enumerate(names):
        _save(to_image(made[i]), out / IMAGES / png(name))
        if frames:
            small = F.interpolate(lr[i : i + 1].float(), size=made.shape[-1], mode="nearest").to(torch.uint8)[0]
            strip = torch.cat([small, *(frame[i] for frame in frames), made[i]], 2)
            _save(to_image(strip), out / STRIPS / png(name))


def _save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(buffer := io.BytesIO(), "png")
    write_whole(path, buffer.getvalue())


def _rows(names: list[str], found: Found, lr: Tensor, made: Tensor) -> Iterator[tuple[Any, ...]]:
    """One for each face, in the order of `COLUMNS`; None where there is no finite number.

    `residual` is what the search saw, by its own filter and before rounding; the PSNR is that of the picture as it is
    kept, made small as LR is elsewhere, and of all methods alike.
    """
    again = resize(made.double() / 255, lr.shape[-1], "bicubic")
    apart = square_difference(again, lr.double() / 255)
    columns = (found.loss, found.residual, apart, found.is_reached, found.step, found.non_finite)
    for name, loss, residual, mse, *rest in zip(names, *(column.tolist() for column in columns), strict=True):
        psnr = -10 * math.log10(mse) if mse else None
        yield name, *(x if math.isfinite(x) else None for x in (loss, residual)), psnr, *rest


def _finish(command: ExploreCommand, faces: Faces, batches: list[range], header: dict[str, Any]) -> dict[str, Any]:
    """The results of all ranks: per_image.csv, the grid, results.json last."""
    parts = [json.loads((command.out / PARTS / f"{number:06d}.json").read_text()) for number in range(len(batches))]
    rows = [row for part in parts for row in part["rows"]]
    writer = csv.DictWriter(file := io.StringIO(), ["name", *COLUMNS])
    writer.writeheader()
    writer.writerows(rows)
    write_whole(command.out / "per_image.csv", file.getvalue().encode(errors="surrogateescape"))
    shown = range(min(SHOWN, len(faces)))
    captions = [f"{rows[i]['consistency_psnr'] or math.nan:.1f} dB from LR" for i in shown]
    _save(_picture(command.out, faces, shown, captions), command.out / "grid.png")
    results = header | {
        "versions": packages(),
        "seconds_a_face": sum(part["seconds"] for part in parts) / len(faces),
        "mean": {name: _mean([row[name] for row in rows]) for name in COLUMNS},
    }
    write_whole(command.out / RESULTS, (json.dumps(results, indent=1, allow_nan=False) + "\n").encode())
    return results


def _mean(values: list[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return sum(found) / len(found) if found else None


def _picture(out: Path, faces: Faces, shown: range, captions: list[str]) -> Image.Image:
    lr, hr = faces.lr(shown), faces.hr(shown)
    rows = []
    for i, caption in zip(shown, captions, strict=True):
        found = to_tensor(Image.open(out / IMAGES / png(faces.names[i])).convert("RGB"))
        row = [Panel(lr[i], f"{lr.shape[-1]}x{lr.shape[-1]}"), Panel(found, caption)]
        rows.append(row if hr is None else [*row, Panel(hr[i])])
    return grid(["LR", "found"] if hr is None else ["LR", "found", "HR"], rows)


def table(results: dict[str, Any]) -> Table:
    """The results as people read them."""
    shown = Table(
        title=f"{results['images']} faces, {results['method']} x{results['scale']}, to {results['side']} pixels"
    )
    mean, has_eps = results["mean"], bool(results.get("rlse", {}).get("eps"))
    cells = {
        "loss": mean["loss"], "PSNR from LR, dB": mean["consistency_psnr"],
        "residual within eps": mean["is_reached"] if has_eps else None,
        "seconds a face": results["seconds_a_face"],
    }  # fmt: skip
    for name in cells:
        shown.add_column(name, justify="right")
    shown.add_row(*("-" if value is None else f"{value:.4g}" for value in cells.values()))
    return shown


if __name__ == "__main__":
    run(main)
