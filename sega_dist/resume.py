"""What a person asks about going on: which checkpoints are whole, and whether a stop changes anything."""

import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from sega_dist.arguments import Device, RunPath, parse, split
from sega_dist.checkpoint import Checkpoint, DamagedCheckpoint, find_checkpoint, read_checkpoint, saved_checkpoints
from sega_dist.config import Config, to_dict
from sega_dist.errors import BAD_DATA, INTERNAL, UserError
from sega_dist.launch import training
from sega_dist.owner import read_status
from sega_dist.stats import FILE as STATS
from sega_dist.train import resolve

# Between numbers of ranks, between engines, and on a GPU, whose additions have no fixed order: of the losses, relative.
TOLERANCE = 1e-2


@dataclass(frozen=True)
class CheckpointsCommand:
    """List a run's checkpoints and check every byte of them."""

    run: RunPath  # the run's folder
    json: bool = False  # print JSON


def checkpoints_main(argv: list[str] | None = None) -> None:
    command = parse(CheckpointsCommand, argv or [], "sega-dist checkpoints")
    if not command.run.is_dir():
        raise UserError(f"{command.run} is not a run's folder")
    rows = [_row(folder) for folder in saved_checkpoints(command.run)]
    status = read_status(command.run) or {}
    if command.json:
        print(json.dumps({"status": status, "checkpoints": rows}, indent=1))
    else:
        shown = Table(title=f"{escape(str(command.run))}: {status.get('state', 'never begun')}")
        for name in ("images", "MB", "saved", "state", "made by"):
            shown.add_column(name, justify="right" if name in ("images", "MB") else "left", overflow="fold")
        for row in rows:
            shown.add_row(*(f"{row[name]:,}" if name == "images" else escape(str(row[name])) for name in row))
        Console().print(shown)
    damaged = [row for row in rows if row["state"] != "whole"]
    if damaged or not rows:
        what = f"{len(damaged)} of {len(rows)} checkpoints are damaged" if rows else "there is no checkpoint"
        raise UserError(f"{command.run}: {what}", BAD_DATA if rows else 2)


def _row(folder: Path) -> dict[str, object]:
    files = list(folder.iterdir())
    saved = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(folder.lstat().st_mtime))
    row = {"images": int(folder.name), "MB": round(sum(f.lstat().st_size for f in files) / 1e6, 1), "saved": saved}
    try:
        made_by = read_checkpoint(folder).versions
    except (DamagedCheckpoint, UserError) as error:
        return row | {"state": str(error), "made by": ""}
    return row | {"state": "whole", "made by": f"{made_by.get('processes', '?')} x {made_by.get('engine', '?')}"}


@dataclass(frozen=True)
class Proof:
    """Train without a stop, and with one, and compare. All other options are those of train."""

    steps: int = 6  # of the run that is not stopped
    stop_after: int = 3  # steps of the run that is
    processes: int = 1  # started by accelerate launch where there is more than one, or --launcher
    launcher: Path | None = None  # an accelerate file, such as launchers/accelerate/zero2.yaml; none: DDP
    resume_processes: int = 0  # 0: the same as before the stop
    resume_launcher: Path | None = None  # none: the same as before the stop
    keep: Path | None = None  # a new folder to keep the runs in; else they are removed
    tolerance: float = -1.0  # of the losses, relative; below 0: none on a CPU with equal processes, else 0.01


def verify_main(argv: list[str] | None = None) -> None:
    ours, theirs = split(Proof, argv or [])
    proof = parse(Proof, ours, "sega-dist verify-resume")
    command, config, checkpoint = resolve(theirs)
    if not 0 < proof.stop_after < proof.steps:
        raise UserError(f"--stop-after is {proof.stop_after}; it must lie between 0 and --steps, {proof.steps}")
    if checkpoint or command.out or not command.data:
        raise UserError("verify-resume needs --data SHARDS and a configuration; it makes folders of its own (--keep)")
    if proof.keep and proof.keep.exists():
        raise UserError(f"{proof.keep} exists; name a new folder")
    rest = ["--data", command.data, "--device", command.device, "--timeout", str(command.timeout)]
    rest += ["--vgg19", str(command.vgg19)] if command.vgg19 else []
    with tempfile.TemporaryDirectory() as temporary:
        folder = proof.keep or Path(temporary)
        folder.mkdir(exist_ok=True, parents=True)
        _prove(proof, config, command.device, rest, folder)


def _prove(proof: Proof, config: Config, device: Device, rest: list[str], folder: Path) -> None:
    tick = config.train.batch_size / 1000
    # Milestones are shares of a run's length, which a stop by --train.images changes.
    every_step = dataclasses.replace(config.train, tick_kimg=tick, checkpoint_kimg=1e9, grid_kimg=1e9, milestones=())
    (folder / "config.json").write_text(json.dumps(to_dict(dataclasses.replace(config, train=every_step)), indent=1))
    whole, stopped, n = folder / "whole", folder / "stopped", config.train.batch_size
    launcher = proof.resume_launcher or proof.launcher
    begin = ["--config", str(folder / "config.json"), *rest]
    first, then = (proof.launcher, proof.processes), (launcher, proof.resume_processes or proof.processes)
    _train("without a stop", *first, [*begin, "--out", str(whole), "--train.images", str(proof.steps * n)])
    _train("up to a stop", *first, [*begin, "--out", str(stopped), "--train.images", str(proof.stop_after * n)])
    again = ["--out", str(stopped), "--resume", "latest", "--train.images", str(proof.steps * n)]
    _train("after the stop", *then, [*rest, *again])
    is_exact = first == then and not (device != "cpu" and torch.cuda.is_available())
    _judge(whole, stopped, proof.tolerance if proof.tolerance >= 0 else 0.0 if is_exact else TOLERANCE)


def _train(what: str, launcher: Path | None, processes: int, words: list[str]) -> None:
    """A run in processes of its own; ends by itself, since every wait in it has a bound."""
    is_cpu = words[words.index("--device") + 1] == "cpu"
    command = training(words, processes, launcher, "cpu" if is_cpu else "auto")
    print(f"training {what}, {processes} process(es) ...", file=sys.stderr, flush=True)
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    if done.returncode:
        said = [line for line in done.stderr.decode(errors="replace").splitlines() if "error" in line] or ["no word"]
        raise UserError(f"training {what} ended with {done.returncode}: {said[0]}")


def _judge(whole: Path, stopped: Path, tolerance: float) -> None:
    """Print how far the two runs are apart; UserError where that is more than `tolerance`."""
    apart = [_distance(one, two) for one, two in zip(_losses(whole), _losses(stopped), strict=True)]
    one, two = (_last(run) for run in (whole, stopped))
    groups = {name: _furthest(one.tensors[name], two.tensors[name]) for name in one.tensors}
    shown = Table(title="Resumed beside never stopped")
    for name in ("what", "largest relative difference"):
        shown.add_column(name)
    for name, value in ({f"losses of {len(apart)} steps": max(apart)} | groups).items():
        shown.add_row(name, f"{value:.2g}" if value else "none, bit for bit")
    Console().print(shown)
    if max(apart) > tolerance or (tolerance == 0 and any(groups.values())):
        raise UserError(f"resuming is not exact: more than {tolerance:g} apart; please report it", INTERNAL)
    print("exact, bit for bit" if tolerance == 0 else f"losses within {tolerance:g}")


def _last(run: Path) -> Checkpoint:
    checkpoint = find_checkpoint(run, "latest")
    assert checkpoint
    return checkpoint


def _losses(run: Path) -> list[dict[str, float]]:
    entries = [json.loads(line) for line in (run / STATS).read_text().splitlines()]
    return [{key: value for key, value in entry.items() if key.startswith(("loss", "d_"))} for entry in entries]


def _distance(one: dict[str, float], two: dict[str, float]) -> float:
    return max(abs(one[key] - two[key]) / max(abs(one[key]), 1e-12) if key in two else float("inf") for key in one)


def _furthest(one: dict[str, Tensor], two: dict[str, Tensor]) -> float:
    """The largest distance of two tensors of one name, beside the largest element; not a number if names differ."""
    if one.keys() != two.keys():
        return float("inf")
    pairs = [(tensor.double(), two[name].double()) for name, tensor in one.items()]
    return max(float((a - b).abs().max() / a.abs().max().clamp(min=1e-30)) for a, b in pairs)
