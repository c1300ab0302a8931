"""What only a GPU can show of a training step: recorded, compiled and fused, it is the plain one. `make gpu-step`."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import SMALL, program
from test_step import batch_of, players_of, small, weights

from sega_dist.batches import Batches, make_batch
from sega_dist.bench.step import Ours, Plain, Way, config_of, errors, is_right, outcome
from sega_dist.config import Config
from sega_dist.data.shards import Manifest
from sega_dist.distributed import World
from sega_dist.players import Players
from sega_dist.recording import WARMUP

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

ON_GPU = {"ACCELERATE_USE_CPU": "false"}  # a process trains on one device; the other tests chose the CPU


@pytest.fixture(autouse=True)
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Worlds of this process are on the GPU, as `World` itself makes sure of."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "false")
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def setting(precision: str, **changed: object) -> Config:
    config = small("sega_x4", **changed)
    train = dataclasses.replace(config.train, precision=precision, ema_kimg=0.01)
    return dataclasses.replace(config, train=train)


def run(players: Players, config: Config, first: int, steps: int) -> list[dict[str, float]]:
    found = []
    for step in range(first, first + steps):
        statistics = players.step(batch_of(config, step, "cuda"), step * 2, is_tick=step % 4 == 3)
        found.append({name: float(value) for name, value in statistics.items()})
    return found


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_a_recorded_step_is_the_step_itself(precision: str):
    """The same bits over replays, where cuDNN is deterministic."""
    config = setting(precision)
    plainly, recorded = players_of(config, "cuda"), players_of(config, "cuda")
    recorded.record()
    with torch.backends.cudnn.flags(deterministic=True, allow_tf32=precision == "tf32", enabled=True):
        assert run(recorded, config, 0, WARMUP + 6) == run(plainly, config, 0, WARMUP + 6)
    assert len(recorded.recorder.recorded) == 2
    assert all(map(torch.equal, weights(recorded), weights(plainly)))


@pytest.mark.parametrize("kernels", ["reference", "triton"])
def test_a_compiled_step_is_the_step_itself(kernels: str):
    """fp32, to what compilers may reorder: the first losses, and all losses before batch norm has amplified that."""
    config = setting("fp32", kernels=kernels)
    plainly = players_of(config, "cuda")
    compiled = players_of(dataclasses.replace(config, compile="default"), "cuda")
    for step, (mine, theirs) in enumerate(zip(run(compiled, config, 0, 6), run(plainly, config, 0, 6), strict=True)):
        for name in ("loss_d", "loss_g"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-4 if step == 0 else 2e-2), f"{name} at step {step}"


def test_a_recorded_step_never_waits_for_the_host():
    config = setting("bf16")
    players = players_of(dataclasses.replace(config, compile="default"), "cuda")
    run(players, config, 0, WARMUP + 2)
    assert len(players.recorder.recorded) == 2
    batch = batch_of(config, 9, "cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        players.step(batch, 18, is_tick=False)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_batches_made_beside_the_step_are_those_made_before_it(manifest: Manifest, monkeypatch: pytest.MonkeyPatch):
    """Each is made late, on its own stream, and dropped as soon as the main stream has been told to read it."""
    config = small("tiny_x4")
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, precision="fp32"))
    world = World("fp32", "cuda")
    expected = []
    batches = Batches(manifest, config, world, 0)
    for _ in range(6):
        expected.append([t.clone() for t in next(batches).tensors()])
        torch.cuda.synchronize()

    def late(*arguments: Any) -> Any:
        torch.cuda._sleep(20_000_000)
        return make_batch(*arguments)

    monkeypatch.setattr("sega_dist.batches.make_batch", late)
    batches = Batches(manifest, config, world, 0)
    assert batches.beside is not None
    found = []
    for _ in range(6):
        batch = next(batches)
        torch.cuda._sleep(20_000_000)
        found.append([t.clone() for t in batch.tensors()])
        del batch
    torch.cuda.synchronize()
    for mine, theirs in zip(found, expected, strict=True):
        assert all(map(torch.equal, mine, theirs))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_plain_loop_computes_the_same(precision: str):
    config = config_of(4, 4)
    exact = outcome(Plain(config, Way(False, "fp64"), "cuda"))
    of_torch = errors(outcome(Plain(config, Way(False, precision), "cuda")), exact)
    for way in (Way(True, precision), Way(True, precision, "default")):
        found = errors(outcome(Ours(config, way, "cuda")), exact)
        assert is_right(found, of_torch, precision), f"{way}: {found}, torch {of_torch}"


def test_a_compiled_run_stops_and_goes_on(manifest: Manifest, tmp_path: Path):
    words = ["--data", manifest.folder, "--out", tmp_path / "run", "--device", "cuda"]
    program("train", *SMALL, *words, "--train.images", 120, "--compile", "default", env=ON_GPU)
    program("train", *words, "--resume", "latest", "--train.images", 240, env=ON_GPU)
    last = json.loads((tmp_path / "run/stats.jsonl").read_text().splitlines()[-1])
    assert last["nimg"] == 240 and "memory_g_phase_gb" in last
