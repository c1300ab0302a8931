"""`sega-dist sweep`: presets x seeds, each a run in a process of its own, compared at the end.

The same command goes on after a stop.
"""

import os
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from sega_dist import compare, report
from sega_dist import config as configuration
from sega_dist.arguments import OutPath, check_folder, parse, share, split
from sega_dist.checkpoint import data_of, newest_checkpoint
from sega_dist.config import Config
from sega_dist.data.images import ShardReader
from sega_dist.data.remote import open_shards
from sega_dist.data.shards import Manifest
from sega_dist.distributed import World
from sega_dist.errors import PREEMPTED, UserError, say
from sega_dist.launch import accelerate_file, training
from sega_dist.owner import FILE as STATUS
from sega_dist.owner import Owner
from sega_dist.paper import method_name
from sega_dist.preemption import StopRequests
from sega_dist.runs import Board, Run, table
from sega_dist.scoring import load_metrics
from sega_dist.train import TrainCommand, check, resolve

GIVEN = ("--preset", "--train.seed", "--out", "--resume")  # by the sweep to each run
COMPARISON = "comparison"  # in OUT
POLL = 0.5  # seconds between looks at what runs


@dataclass(frozen=True)
class Sweep:
    """Train each of several presets with each of several seeds, and compare them. All other options are train's."""

    out: OutPath  # the folder of all runs, each in OUT/PRESET-sSEED
    presets: tuple[str, ...] = ()  # all of them with the first seed, then all with the next
    seeds: tuple[int, ...] = (0,)
    images: int = 0  # length of every run, its schedule in proportion; 0: what the preset says
    processes: int = 1  # a run's; started by accelerate launch where there is more than one, or --engine
    engine: str = ""  # a file of launchers/accelerate, without .yaml; none: gpu or cpu
    part: str = "0/1"  # K/N: every N-th run of the list from the K-th, as shard's; parts may share OUT
    jobs: int = 1  # runs at a time on this machine, which share out its GPUs
    compare: bool = True  # once all are done: OUT/comparison, as compare's, of all but face GANs, and OUT/report.html
    test: str = ""  # shards whose test side they are compared on; default those of --data, where they have one
    niqe: Path | None = None  # as compare's
    lpips_weights: Path | None = None  # as compare's
    dry_run: bool = False  # list the runs with their state and stop


def main(argv: list[str] | None = None) -> None:
    words = argv or []
    for word in words:
        if word.partition("=")[0].replace("_", "-") in GIVEN:
            raise UserError(f"{word}: a sweep gives each run its own; it takes OUT, --presets and --seeds")
    ours, theirs = split(Sweep, words[1:])
    sweep = parse(Sweep, [*words[:1], *ours], "sega-dist sweep")
    part, parts = share(sweep.part)
    everything, comparison = listed(sweep, theirs)
    runs = everything[part::parts]
    if sweep.dry_run:
        Console().print(table([run.row for run in runs]))
        return
    owner = Owner(sweep.out, f"sweep-{part}-of-{parts}.json" if parts > 1 else "sweep.json")
    owner.take()
    with StopRequests(sweep.out) as stop, Board(owner, runs) as board:
        _train(runs, sweep.jobs, stop, board)
    _end(runs, stop, owner)
    if not all(run.is_done() for run in everything):
        return  # other parts are at work; the last of them compares
    compared = [run for run in everything if not run.config.is_face_gan]  # which has no LR to be scored by
    if not comparison:
        if compared:
            print(f"next: sega-dist compare {shlex.quote(str(sweep.out))}/*-s*/ --data TEST_SHARDS")
        return
    if compared:
        compare.main([*(f"{name}={run.folder}" for name, run in zip(names(compared), compared, strict=True)),
                      *comparison])  # fmt: skip
    of_comparison = ["--comparison", str(sweep.out / COMPARISON)] if compared else []
    report.main([*(str(run.folder) for run in everything), *of_comparison, "--out", str(sweep.out / "report.html")])


def listed(sweep: Sweep, theirs: list[str]) -> tuple[list[Run], list[str]]:
    """All runs in order, and the options of the comparison, none where there shall be none.

    UserError, before anything is written, for whatever would fail once they are started.
    """
    for name, values in (("presets", sweep.presets), ("seeds", sweep.seeds)):
        if not values or len(set(values)) < len(values):
            given = " ".join(map(str, values)) or "empty"
            raise UserError(f"--{name} is {given}; name one or more, and none of them twice")
    if min(sweep.jobs, sweep.processes) < 1 or sweep.images < 0:
        raise UserError("--jobs and --processes must be 1 or more, and --images 0 or more")
    check_folder(sweep.out)
    file = accelerate_file(sweep.engine) if sweep.engine else None
    manifest, runs, comparison = None, [], list[str]()
    for folder, words in _words(sweep, theirs):
        command, config, _ = resolve(words)
        if not command.data:
            raise UserError("sweep needs --data SHARDS")
        if manifest is None:
            manifest = open_shards(command.data)
            comparison = _comparison(sweep, manifest, command)
        _check(folder, config, manifest, sweep.processes)
        start = training([*words, "--resume", "auto"], sweep.processes, file, command.device)
        runs.append(Run(folder, start, config))
    return runs, comparison


def _comparison(sweep: Sweep, manifest: Manifest, command: TrainCommand) -> list[str]:
    """The options of compare; none without a test side, unless one was named."""
    if not sweep.compare or not (sweep.test or "test" in manifest.sides):
        return []
    test = ShardReader(open_shards(sweep.test) if sweep.test else manifest, "test").manifest
    if test.size != manifest.size:
        raise UserError(f"--test {sweep.test} has images of {test.size} pixels, --data of {manifest.size}")
    load_metrics(sweep.niqe, sweep.lpips_weights, test.size, World(device="cpu"))
    given = {"niqe": sweep.niqe, "lpips-weights": sweep.lpips_weights, "device": command.device}
    return ["--data", sweep.test or command.data, "--out", str(sweep.out / COMPARISON),
            *(word for name, value in given.items() if value for word in (f"--{name}", str(value)))]  # fmt: skip


def names(runs: list[Run]) -> list[str]:
    """Of the methods: the literature's where only one preset is it, else the preset's."""
    presets = [run.folder.name.rpartition("-s")[0] for run in runs]
    methods = [(method_name(run.config), run.config.scale) for run in runs]
    of_method = {method: {p for p, m in zip(presets, methods, strict=True) if m == method} for method in methods}
    return [method[0] if method[0] and len(of_method[method]) == 1 else preset
            for preset, method in zip(presets, methods, strict=True)]  # fmt: skip


def _words(sweep: Sweep, theirs: list[str]) -> list[tuple[Path, list[str]]]:
    """Each run's folder and the options of train; those that a person gave come last, and win."""
    found = []
    for name, seed in ((name, seed) for seed in sweep.seeds for name in sweep.presets):
        folder = sweep.out / f"{name}-s{seed}"
        words = ["--preset", name, "--train.seed", str(seed), "--out", str(folder)]
        if sweep.images:
            config = resolve([*words, *theirs])[1]
            shorter = configuration.shortened(config, sweep.images)
            before, after = (configuration.flat(configuration.to_dict(one)) for one in (config, shorter))
            changed = [key for key in after if before[key] != after[key]]
            words += [word for key in changed for word in (f"--{key.replace('_', '-')}", str(after[key]))]
        found.append((folder, [*words, *theirs]))
    return found


def _check(folder: Path, config: Config, manifest: Manifest, ranks: int) -> None:
    """Refuse what train would, and a run, done or not, of another configuration or of other images."""
    is_begun = any(folder.glob(f"*{STATUS}*")) or newest_checkpoint(folder) >= 0
    check(folder, config, manifest, None, ranks, is_begun)
    file, data = folder / "config.json", data_of(folder) or manifest.digest
    old = configuration.from_dict(configuration.load(file), str(file)) if file.is_file() else config
    changed = configuration.differences(old, config)
    if data != manifest.digest:
        changed.append(f"data set: {data:.12} -> {manifest.digest:.12}")
    if changed:
        raise UserError(f"{folder} was begun otherwise: {'; '.join(changed)}; name another OUT, or remove that run")


def _train(runs: list[Run], jobs: int, stop: StopRequests, board: Board) -> None:
    """One run after another, `jobs` at a time, until all have ended or something asks to stop."""
    waiting, active, gpus = [run for run in runs if run.state == "waiting"], dict[int, Run](), _shares(jobs)
    try:
        while active or (waiting and not stop.kind):
            for place in range(jobs):
                if place not in active and waiting and not stop.kind:
                    waiting[0].start(gpus[place])
                    active[place] = waiting.pop(0)
            board.show()
            time.sleep(POLL)
            stop.look()
            for place, run in list(active.items()):
                if stop.kind:
                    run.ask_to_stop()
                run.look(stop.kind)
                if run.state != "training":
                    del active[place]
                if run.state in ("preempted", "stopped"):
                    stop.kind = stop.kind or run.state
        board.show()
    finally:
        for run in active.values():  # asked twice, or no room for the sweep's own file
            run.abandon()


def _shares(jobs: int) -> list[str]:
    """CUDA_VISIBLE_DEVICES of each of the runs at a time; empty: as it is."""
    count = torch.cuda.device_count() if jobs > 1 else 0
    names = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")[:count]
    return [",".join(names[place::jobs] or [names[place % count]]) if count else "" for place in range(jobs)]


def _end(runs: list[Run], stop: StopRequests, owner: Owner) -> None:
    """Say what became of the runs, and exit with what says so."""
    rows, failed = [run.row for run in runs], [run for run in runs if run.state == "failed"]
    kind = stop.kind if any(run.state not in ("done", "failed") for run in runs) else ""
    owner.check()
    owner.write(kind or ("failed" if failed else "done"), runs=rows)
    Console().print(table(rows))
    for run in failed:
        say("failed", f"{run.folder} with {run.code}: {run.message}; see {run.log}")
    if kind:
        say(kind, "the same command goes on")
        sys.exit(PREEMPTED)
    if failed:
        raise UserError(f"{len(failed)} of {len(runs)} runs failed; the same command tries them again", 1)
