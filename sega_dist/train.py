"""Training: `sega-dist train`, or `accelerate launch -m sega_dist.train` with the same arguments."""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from sega_dist import config as configuration
from sega_dist.arguments import Device, parse
from sega_dist.checkpoint import Checkpoint, find_checkpoint, newest_checkpoint
from sega_dist.config import Config
from sega_dist.data.remote import open_shards
from sega_dist.data.shards import Manifest
from sega_dist.distributed import WAIT, World
from sega_dist.environment import code_digest, packages
from sega_dist.errors import UserError, run
from sega_dist.launched import launched_ranks
from sega_dist.loop import Options, Training
from sega_dist.owner import FILE as STATUS
from sega_dist.presets import PRESETS, preset


@dataclass(frozen=True)
class TrainCommand:
    data: str = ""  # folder of shards, made by sega-dist shard, or the https address of one
    out: Path | None = None  # the run's folder; new, unless --resume is given
    preset: str = ""  # a named configuration to start from
    config: Path | None = None  # a JSON file of configuration keys, laid over the preset
    resume: str = ""  # latest, or the path of a checkpoint: continue that run; auto: latest, or begin if there is none
    vgg19: Path | None = None  # VGG19 weights; else $SEGA_DIST_VGG19, else torch.hub's cache or a download
    timeout: int = WAIT  # seconds that a process waits for the others, or for a step, before it gives up
    on_nonfinite: Literal["stop", "rollback"] = "stop"  # rollback: to the newest checkpoint, leaving those images out
    profile: bool = False  # write RUN/profile/trace-RANK.json: what the first steps spend their time on
    device: Device = "auto"  # auto: the GPU where there is one; several processes on CPUs beside a GPU need cpu
    dry_run: bool = False  # print the resolved configuration and stop


@dataclass(frozen=True)
class Command:
    """Train a face super-resolution network. Options with a dot are the configuration's keys."""

    command: tyro.conf.OmitArgPrefixes[TrainCommand]
    config: Annotated[Config, tyro.conf.arg(name="")]


def main(argv: list[str] | None = None) -> None:
    command, config, checkpoint = resolve(argv or [])
    if command.dry_run:
        print(json.dumps(configuration.to_dict(config), indent=1))
        return
    if not command.data or command.out is None:
        raise UserError("train needs --data SHARDS and --out RUN")
    manifest = open_shards(command.data)
    # It ended before its first checkpoint, perhaps while it first wrote its status.
    is_begun = command.resume == "auto" and any(STATUS in file.name for file in command.out.glob("*"))
    check(command.out, config, manifest, checkpoint, launched_ranks(), is_begun)
    world = World(config.train.precision, command.device, command.timeout)
    try:
        with world.naming_lost_ranks("start again with --resume latest"):
            world.prove()
            agree(world, config, manifest, checkpoint, command.on_nonfinite)
            options = Options(command.vgg19, command.timeout, command.profile, command.on_nonfinite)
            with Training(world, config, manifest, command.out, options, checkpoint) as training:
                training.run()
    finally:
        world.close()


def resolve(argv: list[str]) -> tuple[TrainCommand, Config, Checkpoint | None]:
    """The command and its configuration: preset or checkpoint, then file, then dotted overrides."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in ("preset", "config", "resume", "out"):
        first.add_argument(f"--{name}", default="", nargs="?")
    known, _ = first.parse_known_args(argv)
    checkpoint, base = None, None
    if known.resume:
        checkpoint = find_checkpoint(Path(known.out or "."), known.resume)
        base = checkpoint.config if checkpoint else None
    if known.preset:
        base = preset(known.preset)
    if known.config:
        values = configuration.load(Path(known.config))
        values = configuration.merge(configuration.to_dict(base or Config()), values)
        base = configuration.from_dict(values, known.config)
    is_help = bool({"-h", "--help"} & set(argv))
    parsed = parse(Command, argv, "sega-dist train", Command(TrainCommand(), base or Config()))
    if base is None and not is_help:
        raise UserError(f"train needs --preset NAME or --config FILE (presets: {', '.join(PRESETS)})")
    return parsed.command, configuration.validate(parsed.config), checkpoint


def check(out: Path, config: Config, manifest: Manifest, checkpoint: Checkpoint | None, ranks: int = 1,
          is_begun: bool = False) -> None:  # fmt: skip
    """Refuse what would fail later: a data set of another size, a used folder, a checkpoint of another run."""
    if manifest.size != config.data.size:
        raise UserError(
            f"{manifest.folder} holds images of side {manifest.size}, data.size is {config.data.size};"
            f" shard with --size {config.data.size}, or train with --data.size {manifest.size}"
        )
    if not manifest.images("train"):
        raise UserError(f"{manifest.folder} holds no image to train on; shard the images again")
    if config.train.batch_size % ranks:
        raise UserError(
            f"train.batch_size {config.train.batch_size} does not divide by {ranks} processes: it is the number of"
            f" images a step over all of them; {-(-config.train.batch_size // ranks) * ranks} would do"
        )
    if checkpoint is None or checkpoint.folder.resolve().parent.parent != out.resolve():
        if out.exists() and not is_begun and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"{out} exists and is not an empty folder; go on with --resume latest, or name another")
    else:
        newest = newest_checkpoint(out)
        if newest > checkpoint.nimg and not checkpoint.is_fallback:
            raise UserError(
                f"{out} has gone on to image {newest:,}, {checkpoint.folder.name} is older;"
                " --resume latest, or name another --out to branch off"
            )
    if checkpoint is None:
        return
    changed = configuration.differences(checkpoint.config, config)
    if changed:
        raise UserError(f"{checkpoint.folder} was made with another configuration: {'; '.join(changed)}")
    if checkpoint.data_digest != manifest.digest:
        raise UserError(
            f"{checkpoint.folder} was trained on data set {checkpoint.data_digest[:12]}, {manifest.folder} is"
            f" {manifest.digest[:12]}: resuming on other images would not continue that run"
        )


def agree(world: World, config: Config, manifest: Manifest, checkpoint: Checkpoint | None, policy: str) -> None:
    """Refuse ranks that would not train the same run."""
    position = checkpoint.nimg if checkpoint else 0
    world.agree(
        configuration.flat(configuration.to_dict(config))
        | {f"the version of {name}": version for name, version in packages().items()}
        | {"the data set's manifest": manifest.digest, "the position to resume from": position}
        | {"the DeepSpeed file": world.zero, "the engine": world.engine_version}
        | {"the code of sega-dist": code_digest(), "--on-nonfinite": policy}
    )


if __name__ == "__main__":
    run(main)
