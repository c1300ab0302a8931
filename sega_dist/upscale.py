"""Super-resolve photographs: `sega-dist upscale SNAPSHOT IN OUT` for a file or a folder."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from sega_dist.arguments import Device, InPath, OutPath, SnapshotPath, parse
from sega_dist.data.crops import UnusableImage, decode
from sega_dist.data.pairs import to_uint8, to_unit
from sega_dist.data.sources import SUFFIXES
from sega_dist.errors import UserError, run
from sega_dist.pictures import to_image, to_tensor
from sega_dist.progress import progress
from sega_dist.snapshot import load_snapshot

MIN_SIDE = 8  # pixels; below that there is no face to see
OVERLAP = 16  # LR pixels at which neighbouring tiles see each other's content before they are cut


@dataclass(frozen=True)
class UpscaleCommand:
    """Enlarge a photograph, or every photograph of a folder, by the snapshot's scale."""

    snapshot: SnapshotPath  # a .safetensors or .onnx file, or a run's folder (its newest snapshot)
    source: InPath  # an image, or a folder of images (with sub-folders)
    out: OutPath  # the image to write, or the folder for images of the same names
    batch: int = 8  # images of equal size at a time
    tile: int = 256  # larger inputs are done in tiles of this many pixels, to bound memory; 0 = always whole
    device: Device = "auto"  # auto: the GPU where there is one


def main(argv: list[str] | None = None) -> None:
    command = parse(UpscaleCommand, argv or [], "sega-dist upscale")
    done, skipped = upscale(command)
    print(f"{done} images -> {command.out}" + (f", {skipped} skipped" if skipped else ""))


def upscale(command: UpscaleCommand) -> tuple[int, int]:
    """Returns how many images were written and how many could not be read."""
    if command.batch < 1 or (command.tile != 0 and command.tile <= 2 * OVERLAP):
        raise UserError(f"--batch must be 1 or more, and --tile 0 or above {2 * OVERLAP}")
    targets = plan(command.source, command.out)
    snapshot = load_snapshot(command.snapshot, command.device)
    done, problems = 0, list[str]()
    with progress("upscaling", len(targets)) as advance:
        for names, images in batches(list(targets), command.batch, command.tile, problems):
            lr = torch.stack(images).to(snapshot.device)
            for name, sr in zip(
                names, enlarge(snapshot.generator, lr, snapshot.config.scale, command.tile), strict=True
            ):
                try:
                    targets[name].parent.mkdir(parents=True, exist_ok=True)
                    to_image(sr).save(targets[name], quality=95, subsampling=0)
                    done += 1
                except ValueError as error:  # WebP ends at 16,383 pixels a side
                    targets[name].unlink(missing_ok=True)
                    problems.append(f"{name}: cannot be written as {targets[name].suffix}: {error}")
            advance(len(names))
    for problem in problems:
        print(f"skipped {problem}")
    if not done:
        raise UserError(f"none of the images in {command.source} can be used: {problems[0]}")
    return done, len(problems)


def plan(source: Path, out: Path) -> dict[Path, Path]:
    """Each input with its output; raises UserError for what is missing, or would be overwritten."""
    if source.is_file():
        target = out / source.name if out.is_dir() else out
        if target.suffix.lower() not in SUFFIXES:
            raise UserError(f"{target} does not name an image; use one of {', '.join(sorted(SUFFIXES))}")
        targets = {source: target}
    elif source.is_dir():
        if out.is_file():
            raise UserError(f"{out} is a file; name a folder for the images of {source}")
        found = sorted(p for p in source.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        targets = {path: out / path.relative_to(source) for path in found}
    else:
        raise UserError(f"{source} does not exist; give an image or a folder of images")
    if not targets:
        raise UserError(f"{source} holds no images ({', '.join(sorted(SUFFIXES))})")
    taken = next((target for target in targets.values() if target.exists()), None)
    if taken:
        raise UserError(f"{taken} exists; remove it or name another place")
    return targets


def batches(files: list[Path], size: int, tile: int, problems: list[str]) -> Iterator[tuple[list[Path], list[Tensor]]]:
    """Neighbouring images of equal size together; what cannot be read goes to `problems`."""
    names: list[Path] = []
    images: list[Tensor] = []
    for file in files:
        try:
            pixels = to_tensor(decode(file.read_bytes(), MIN_SIDE))
        except (UnusableImage, OSError) as error:
            problems.append(f"{file}: {error}")
            continue
        is_tiled = tile and max(pixels.shape) > tile  # these go one by one, to bound memory
        if names and (len(names) == size or is_tiled or pixels.shape != images[0].shape):
            yield names, images
            names, images = [], []
        names.append(file)
        images.append(pixels)
    if names:
        yield names, images


@torch.no_grad()
def enlarge(generator: nn.Module, lr: Tensor, scale: int, tile: int) -> Tensor:
    """(N,3,h,w) uint8 -> (N,3,scale*h,scale*w) uint8, in overlapping tiles where h or w is above `tile`."""
    height, width = lr.shape[2:]
    if not tile or max(height, width) <= tile:
        return to_uint8(generator(to_unit(lr)))
    out = lr.new_empty(len(lr), 3, height * scale, width * scale)
    step = tile - 2 * OVERLAP
    for top in range(0, height, step):
        for left in range(0, width, step):
            y, x = max(top - OVERLAP, 0), max(left - OVERLAP, 0)  # where the tile begins
            part = lr[:, :, y : top + step + OVERLAP, x : left + step + OVERLAP]
            large = to_uint8(generator(to_unit(part)))
            bottom, right = min(top + step, height), min(left + step, width)
            inner = large[:, :, (top - y) * scale : (bottom - y) * scale, (left - x) * scale : (right - x) * scale]
            out[:, :, top * scale : bottom * scale, left * scale : right * scale] = inner
    return out


if __name__ == "__main__":
    run(main)
