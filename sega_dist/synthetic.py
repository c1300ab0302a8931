"""Procedural faces to try everything with: `sega-dist synthetic OUT`."""

from dataclasses import dataclass

from sega_dist.arguments import OutPath, parse
from sega_dist.data.synthetic import write_folder
from sega_dist.errors import UserError, run


@dataclass(frozen=True)
class SyntheticCommand:
    """Draw procedural portraits into OUT/img_align_celeba."""

    out: OutPath  # a new or empty folder
    images: int = 400  # how many
    seed: int = 0  # which ones
    size: int = 256  # side in pixels


def main(argv: list[str] | None = None) -> None:
    command = parse(SyntheticCommand, argv or [], "sega-dist synthetic")
    if command.images < 1 or command.size < 16 or command.seed < 0:
        raise UserError("--images must be 1 or more, --size 16 or more, and --seed 0 or more")
    write_folder(command.out, command.images, command.seed, command.size)
    print(f"{command.images:,} faces -> {command.out}")


if __name__ == "__main__":
    run(main)
