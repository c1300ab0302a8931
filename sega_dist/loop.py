"""The training loop: clock, statistics and checkpoints; it knows nothing of any loss."""

import json
import math
import platform
import signal
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from sega_dist import config as configuration
from sega_dist.batches import Batches
from sega_dist.checkpoint import Checkpoint, save_checkpoint, save_snapshot
from sega_dist.config import Config
from sega_dist.data.images import HOPELESS
from sega_dist.data.shards import Manifest
from sega_dist.distributed import World
from sega_dist.errors import BAD_DATA, NON_FINITE, PREEMPTED, UserError
from sega_dist.kernels import backend
from sega_dist.kernels.compat import HAS_TRITON
from sega_dist.networks.build import build_vgg19
from sega_dist.players import Players, plan_kernels
from sega_dist.preview import Preview
from sega_dist.stats import Report, Sums, memory_gb
from sega_dist.tracing import traced_steps
from sega_dist.weights import load_vgg19


class Training:
    """One run: clock and reports. The players are asked for steps, the world for agreement."""

    def __init__(self, world: World, config: Config, manifest: Manifest, out: Path, vgg19: Path | None,
                 checkpoint: Checkpoint | None, is_profiled: bool = False):  # fmt: skip
        self.world, self.config, self.manifest, self.out = world, config, manifest, out
        self.nimg = checkpoint.nimg if checkpoint else 0
        self.stop_signal = 0
        self.trace = out / "profile" if is_profiled else None
        self._build(vgg19)
        if checkpoint:
            self._restore(checkpoint)
        self.preview = Preview(manifest, config, self.world)
        of_kernels = {"kernels": self.ops, "kernel_table": backend.table_digest()}
        self.versions = versions(self.world) | of_kernels | {"vgg19_sha256": self.vgg19_digest}
        if self.world.is_main:
            (out / "pictures").mkdir(parents=True, exist_ok=True)
            (out / "config.json").write_text(json.dumps(configuration.to_dict(config), indent=1) + "\n")
            (out / "environment.json").write_text(json.dumps(self.versions, indent=1) + "\n")
        self.report = Report(out if self.world.is_main else None, self.nimg, config.train.images)

    def __enter__(self) -> "Training":
        self.handlers = {s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.report.close()

    def run(self) -> None:
        """Steps until `train.images` are seen, or a signal asks to stop; either way a checkpoint stands at the end."""
        train = self.config.train
        sums, since, began = Sums(), self.nimg, time.perf_counter()
        ranks = f"{self.world.size} x {self.world.device.type}, {self.world.engine}, {train.precision}"
        self.report.say(f"{ranks}: from image {self.nimg:,} to {train.images:,} -> {self.out}")
        ops = ", ".join(f"{op} {impl}" for op, impl in self.ops.items())
        self.report.say(f"kernels {self.config.kernels}: {ops}")
        if self.config.compile != "off":
            self.report.say(f"compile {self.config.compile}: the first steps wait for the compiler")
        self.batches = Batches(self.manifest, self.config, self.world, self.nimg)
        with traced_steps(self.trace, self.world.rank) as step_is_over:
            while self.nimg < train.images:
                batch = next(self.batches)
                is_stopping = self.world.any(self.stop_signal != 0)
                last = self.nimg + train.batch_size >= train.images or is_stopping
                is_saving = last or self._crosses(train.checkpoint_kimg)
                is_grid = last or self._crosses(train.grid_kimg)
                is_tick = is_saving or is_grid or self._crosses(train.tick_kimg)
                sums.add(self.players.step(batch, self.nimg, is_tick))
                self.nimg += train.batch_size
                step_is_over()
                if is_tick:
                    spent = time.perf_counter() - began
                    entry = self._entry(sums, (self.nimg - since) / spent, self.batches.waited / spent)
                    if is_grid:
                        entry |= self.preview.show(self.report, self.players.snapshot(), self.nimg)
                    self.report.tick(entry)
                    if is_saving:
                        self.save()
                        self.report.curves()
                    self.batches.waited, since, began = 0.0, self.nimg, time.perf_counter()
                if is_stopping:
                    self.report.say(f"stopped at {self.nimg:,} images; continue with --resume latest")
                    sys.exit(PREEMPTED)
        self.report.say(f"done: {self.out}")

    def save(self) -> None:
        """A checkpoint and a snapshot at this position, of weights that are finite numbers."""
        for name, player in self.players.by_name.items():
            if not player.is_finite():
                self._refuse(f"a weight or a gradient of the {name}")
        snapshot = self.players.snapshot()
        tensors = self.players.full_state(snapshot)
        if self.world.is_main:
            save_checkpoint(
                self.out, self.nimg, self.config, self.manifest.digest, self.vgg19_digest, self.versions, tensors,
                self.config.train.keep,
            )  # fmt: skip
            save_snapshot(self.out, self.nimg, self.config, snapshot)
        self.world.barrier()

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
        except (KeyError, ValueError) as error:
            raise UserError(f"{checkpoint.folder} does not fit its configuration: {str(error)[:200]}") from None

    def _entry(self, sums: Sums, images_per_s: float, data_wait: float) -> dict[str, Any]:
        """One line of statistics, the same means on every rank; refuses to go on from what is not finite."""
        names, means = sums.take()
        values = dict(zip(names, self.world.mean_of(means).tolist(), strict=True))
        self._refuse(next((name for name, value in values.items() if not math.isfinite(value)), None))
        bad = self.world.total(self.batches.bad_samples)
        if bad > self.config.data.max_bad_samples:
            count = str(bad) if bad < HOPELESS else "more than a thousand"
            raise UserError(
                f"{count} damaged samples in {self.manifest.folder}, more than data.max_bad_samples"
                f" {self.config.data.max_bad_samples}; sega-dist verify names the shards",
                BAD_DATA,
            )
        memory = {"memory_gb": max(memory_gb(self.world.device), *self.players.memory.values(), 0.0)}
        speed = {"images_per_s": images_per_s, "data_wait": data_wait}
        return {"nimg": self.nimg, "time": time.time(), "bad_samples": bad, **speed, **memory, **self.players.memory,
                **values}  # fmt: skip

    def _refuse(self, what: str | None) -> None:
        """End the run because `what` is not a finite number; every rank comes to the same answer."""
        if what:
            raise UserError(
                f"{what} is not finite after {self.nimg:,} images; start a new run with a lower train.learning_rate or"
                " another train.precision (checkpoints were made only before this)",
                NON_FINITE,
            )

    def _crosses(self, kimg: float) -> bool:
        """Whether the step that starts now ends at or beyond the next multiple of `kimg`."""
        interval = kimg * 1000
        return (self.nimg + self.config.train.batch_size) // interval > self.nimg // interval

    def _on_signal(self, number: int, _: object) -> None:
        if self.stop_signal:  # asked twice: do not wait for the step
            raise KeyboardInterrupt
        self.stop_signal = number


def packages() -> dict[str, str]:
    """What computes, by name and version."""
    names = ["sega-dist", "torch", "accelerate", "numpy", "pillow", "webdataset"]
    triton = version("triton") if HAS_TRITON else "absent"
    return {name: version(name) for name in names} | {"triton": triton, "python": platform.python_version()}


def versions(world: World) -> dict[str, Any]:
    """What ran: for the run's folder and its checkpoints."""
    device = torch.cuda.get_device_name() if world.device.type == "cuda" else platform.processor() or platform.machine()
    engine = f"{world.engine} ({world.engine_version})"
    return packages() | {"device": device, "processes": world.size, "engine": engine}
