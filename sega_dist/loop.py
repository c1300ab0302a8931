"""The training loop: clock, statistics and checkpoints; it knows nothing of any loss."""

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from sega_dist import config as configuration
from sega_dist.batches import Batches
from sega_dist.checkpoint import Checkpoint, Writer, find_checkpoint, save_checkpoint
from sega_dist.config import Config
from sega_dist.data import positions
from sega_dist.data.images import HOPELESS
from sega_dist.data.shards import Manifest, write_whole
from sega_dist.distributed import WAIT, World
from sega_dist.environment import versions
from sega_dist.errors import BAD_DATA, PREEMPTED, NonFinite, UserError, exit_code, in_words, note
from sega_dist.kernels import backend
from sega_dist.networks.build import build_vgg19
from sega_dist.owner import Owner
from sega_dist.players import Players, plan_kernels
from sega_dist.preemption import STOPS, Stop, StopRequests
from sega_dist.preview import make_preview
from sega_dist.snapshot import save_snapshot
from sega_dist.stats import Report, Sums, memory_gb
from sega_dist.tracing import traced_steps
from sega_dist.watchdog import Watchdog
from sega_dist.weights import load_vgg19

ERRORS = "errors"  # folder of a run: tracebacks, stacks, images that led to what is not finite
ROLLBACKS = 3  # to the same checkpoint, before a run gives up


@dataclass(frozen=True)
class Options:
    """How a run is driven, apart from what it computes."""

    vgg19: Path | None = None
    timeout: int = WAIT
    profile: bool = False
    on_nonfinite: Literal["stop", "rollback"] = "stop"


class Training:
    """One run: clock and reports. The players are asked for steps, the world for agreement."""

    def __init__(self, world: World, config: Config, manifest: Manifest, out: Path, options: Options,
                 checkpoint: Checkpoint | None):  # fmt: skip
        self.world, self.config, self.manifest, self.out, self.options = world, config, manifest, out, options
        self.nimg, self.skipped = 0, 0
        self.rolled_back: list[int] = []  # positions to which the run went back
        self._build(options.vgg19)
        if checkpoint:
            self._restore(checkpoint)
        self.preview = make_preview(manifest, config, self.world)
        of_kernels = {"kernels": self.ops, "kernel_table": backend.table_digest()}
        self.versions = versions(self.world) | of_kernels | {"vgg19_sha256": self.vgg19_digest}
        self.writer, self.owner = Writer(), Owner(out)
        self.stop = StopRequests(out if world.is_main else None)
        # After a collective gives up by itself: who waits for a lost machine says which, and who hangs where.
        self.watchdog = Watchdog(world, out / ERRORS, 1.1 * options.timeout, self._each_second)

    def __enter__(self) -> "Training":
        with self.world.together():
            if self.world.is_main:
                self.owner.take()
                (self.out / "pictures").mkdir(exist_ok=True)
                for name, values in (("config", configuration.to_dict(self.config)), ("environment", self.versions)):
                    write_whole(self.out / f"{name}.json", (json.dumps(values, indent=1) + "\n").encode())
        self.report = Report(self.out if self.world.is_main else None, self.nimg, self.config.train.images)
        self.stop.__enter__()
        self.watchdog.__enter__()
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        with contextlib.suppress(UserError, OSError):
            self.writer.settle()
        self.watchdog.__exit__()
        self.stop.__exit__()
        self.report.close()
        self.world.in_hurry = bool(self.stop.kind)
        if error and not isinstance(error, SystemExit):
            note(self.out / ERRORS / f"rank-{self.world.rank}.txt", error, f"while {self.world.section}")
        if self.world.is_main and error is None:
            self.owner.end("done", self.nimg, 0, "")
        elif self.world.is_main and error and not isinstance(error, SystemExit):
            self.owner.end("failed", self.nimg, exit_code(error), in_words(error))

    def run(self) -> None:
        """Steps until `train.images` are seen, or something asks to stop; either way a checkpoint stands at the end."""
        self._announce()
        with traced_steps(self.out / "profile" if self.options.profile else None, self.world.rank) as step_is_over:
            while True:
                first = self.nimg + self.skipped
                try:
                    with contextlib.closing(Batches(self.manifest, self.config, self.world, first)) as self.batches:
                        self._train(step_is_over)
                    break
                except NonFinite as error:
                    self._roll_back(error)
        self.report.say(f"done: {self.out}")

    def _train(self, step_is_over: Callable[[], None]) -> None:
        train = self.config.train
        sums, since, began = Sums(), self.nimg, time.perf_counter()
        while self.nimg < train.images:
            self._enter("reading images")
            batch = next(self.batches)
            self._enter("waiting for the other ranks")
            stop = self._asked_to_stop()
            last = self.nimg + train.batch_size >= train.images or bool(stop)
            is_saving = last or self._crosses(train.checkpoint_kimg)
            is_grid = last or self._crosses(train.grid_kimg)
            is_tick = is_saving or is_grid or self._crosses(train.tick_kimg)
            self._enter("computing a step")
            sums.add(self.players.step(batch, self.nimg, is_tick))
            self.nimg += train.batch_size
            step_is_over()
            if is_tick:
                self._enter("gathering statistics")
                spent = time.perf_counter() - began
                entry = self._entry(sums, since, (self.nimg - since) / spent, self.batches.waited / spent)
                if is_grid:
                    self._enter("drawing previews")
                    entry |= self.preview.show(self.report, self.players.snapshot(), self.nimg)
                self.report.tick(entry)
                if is_saving:
                    self.save()
                if last:
                    self._settle()
                self.batches.waited, since, began = 0.0, self.nimg, time.perf_counter()
            self.watchdog.patience = 1
            if stop:
                self._stop(stop)

    def save(self) -> None:
        """Give a checkpoint and a snapshot of this position to the writer, who puts them on the disk meanwhile."""
        self._enter("saving")
        snapshot = self.players.snapshot()
        tensors = self.players.full_state(snapshot)
        state = Checkpoint(self.nimg, self.skipped, self.config, self.manifest.digest, self.vgg19_digest, tensors,
                           self.versions)  # fmt: skip
        with self.world.together():
            if self.world.is_main:
                weights = self.players.for_users(snapshot, tensors)
                self.writer.start(lambda: self._write(state, weights))

    def _write(self, state: Checkpoint, weights: dict[str, torch.Tensor]) -> None:
        """In the writer's thread; the snapshot first, so that no checkpoint ever stands without its own."""
        self.owner.check()
        save_snapshot(self.out, state.nimg, self.config, weights, state.data_digest)
        save_checkpoint(self.out, state, self.config.train.keep, self.owner.check)
        self.report.curves()

    def _settle(self) -> None:
        """Wait until what was given to the writer stands on the disk."""
        self._enter("waiting for the checkpoint to be written")
        with self.world.together():
            self.writer.settle()

    def _asked_to_stop(self) -> Stop:
        """What any rank was asked, the same on every rank; UserError if another run took this folder over."""
        asked = self.world.most(len(STOPS) if self.owner.has_lost else STOPS.index(self.stop.kind))
        if asked == len(STOPS):
            with self.world.together():
                self.owner.check()
        return STOPS[asked]

    def _stop(self, state: Stop) -> None:
        if self.world.is_main and state:
            self.owner.end(state, self.nimg, PREEMPTED, "a checkpoint was saved")
        self.report.say(f"{state} at {self.nimg:,} images; continue with --resume latest")
        # torch's launcher starts anew whatever does not exit with 0: that would undo the stop.
        has_restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
        sys.exit(0 if has_restarts else PREEMPTED)

    def _roll_back(self, error: NonFinite) -> None:
        """Go on from the newest checkpoint without the images since then; raises `error` where that may not be."""
        if self.options.on_nonfinite == "stop":
            raise error
        self._settle()
        with self.world.together():
            checkpoint = find_checkpoint(self.out, "auto")
        self.world.agree({"the position to go back to": checkpoint.nimg if checkpoint else -1})
        if checkpoint is None or self.rolled_back.count(checkpoint.nimg) == ROLLBACKS:
            why = f"{ROLLBACKS} rollbacks did not help" if checkpoint else "there is no checkpoint to go back to"
            raise NonFinite(f"{error}; {why}") from None
        self.rolled_back.append(checkpoint.nimg)
        skipped = self.skipped + self.nimg - checkpoint.nimg
        self.report.say(f"{error}; rolled back to {checkpoint.nimg:,}, leaving out {skipped - self.skipped:,} images")
        self._restore(checkpoint)
        self.skipped = skipped
        self.report.close()
        self.report = Report(self.out if self.world.is_main else None, self.nimg, self.config.train.images)

    def _announce(self) -> None:
        ranks = f"{self.world.size} x {self.world.device.type}, {self.world.engine}, {self.config.train.precision}"
        self.report.say(f"{ranks}: from image {self.nimg:,} to {self.config.train.images:,} -> {self.out}")
        ops = ", ".join(f"{op} {impl}" for op, impl in self.ops.items())
        if ops:
            self.report.say(f"kernels {self.config.kernels}: {ops}")
        if self.config.compile != "off":
            self.report.say(f"compile {self.config.compile}: the first steps wait for the compiler")

    def _enter(self, what: str) -> None:
        self.world.enter(f"{what} at image {self.nimg:,}")

    def _each_second(self) -> None:
        """In the watchdog's thread."""
        if self.world.is_main:
            self.stop.look()
            self.owner.sign()

    def _build(self, vgg19: Path | None) -> None:
        try:
            self.ops = plan_kernels(self.config, self.world)
        except ValueError as error:
            raise UserError(str(error)) from None
        features, self.vgg19_digest = build_vgg19(self.config), None
        if features is not None:
            with self.world.local_main_first():
                self.vgg19_digest = load_vgg19(features, vgg19)
            self.world.agree({"the VGG19 weight file": self.vgg19_digest})
        torch.manual_seed(self.config.train.seed)
        self.players = Players(self.world, self.config, features)

    def _restore(self, checkpoint: Checkpoint) -> None:
        if checkpoint.vgg19_digest != self.vgg19_digest:
            raise UserError(
                f"{checkpoint.folder} was trained with other VGG19 weights ({str(checkpoint.vgg19_digest)[:12]}, now"
                f" {str(self.vgg19_digest)[:12]}): give the same file by --vgg19"
            )
        try:
            self.players.load_full_state(checkpoint.tensors)
            self.nimg, self.skipped = checkpoint.nimg, checkpoint.skipped
        except (KeyError, ValueError, RuntimeError) as error:
            raise UserError(f"{checkpoint.folder} does not fit its configuration: {str(error)[:200]}") from None

    def _entry(self, sums: Sums, since: int, images_per_s: float, data_wait: float) -> dict[str, Any]:
        """One line of statistics, the same means on every rank; refuses to go on from what is not finite."""
        with self.world.together():
            self.writer.look()
        names, means = sums.take()
        values = dict(zip(names, self.world.mean_of(means).tolist(), strict=True))
        bad = self.world.total(self.batches.bad_samples)
        if bad > self.config.data.max_bad_samples:
            count = str(bad) if bad < HOPELESS else "more than a thousand"
            raise UserError(
                f"{count} damaged samples in {self.manifest.folder}, more than data.max_bad_samples"
                f" {self.config.data.max_bad_samples}; sega-dist verify names the shards",
                BAD_DATA,
            )
        wrong = [name for name, value in values.items() if not math.isfinite(value)]
        wrong += [f"a weight or a gradient of the {name}" for name, player in self.players.by_name.items()
                  if not player.is_finite()]  # fmt: skip
        if wrong:
            self._refuse(wrong, since)
        memory = {"memory_gb": max(memory_gb(self.world.device), *self.players.memory.values(), 0.0)}
        speed = {"images_per_s": images_per_s, "data_wait": data_wait}
        return {"nimg": self.nimg, "time": time.time(), "bad_samples": bad, "skipped": self.skipped, **speed, **memory,
                **self.players.memory, **values}  # fmt: skip

    def _refuse(self, wrong: list[str], since: int) -> None:
        """What is not a finite number, on every rank alike: write down which images the steps since then saw."""
        if self.world.is_main:
            first, end = since + self.skipped, self.nimg + self.skipped
            file, n = self.out / ERRORS / f"nonfinite-{end:012d}.json", self.manifest.images("train")
            numbers = [positions.sample_at(self.config.train.seed, number, n) for number in range(first, end)]
            write_whole(file, json.dumps({"wrong": wrong, "after": since, "until": self.nimg, "skipped": self.skipped,
                                          "samples of the train side": numbers}).encode())  # fmt: skip
        raise NonFinite(
            f"{wrong[0]} is not finite after {self.nimg:,} images; --on-nonfinite rollback goes back and leaves these"
            " images out; or start a new run with a lower train.learning_rate or another train.precision"
            " (checkpoints were made only before this)"
        )

    def _crosses(self, kimg: float) -> bool:
        """Whether the step that starts now ends at or beyond the next multiple of `kimg`."""
        interval = kimg * 1000
        return (self.nimg + self.config.train.batch_size) // interval > self.nimg // interval
