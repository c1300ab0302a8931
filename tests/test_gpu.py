"""What only a GPU can show: training and scores there are those of the CPU."""

import json
from pathlib import Path

import pytest
import torch
from conftest import SMALL, program

from sega_dist import evaluate
from sega_dist.checkpoint import save_snapshot
from sega_dist.config import Config, DataConfig, GeneratorConfig
from sega_dist.data.shards import Manifest
from sega_dist.networks.build import build_generator

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


ON_GPU = {"ACCELERATE_USE_CPU": "false"}  # a process trains on one device; the other tests chose the CPU


def stats(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "stats.jsonl").read_text().splitlines()]


def test_first_losses_are_the_cpus(manifest: Manifest, tmp_path: Path):
    for device in ("cpu", "cuda"):
        words = ["--data", manifest.folder, "--out", tmp_path / device, "--device", device]
        program("train", *SMALL, *words, "--train.images", 12, env=ON_GPU)
    cpu, cuda = (stats(tmp_path / device)[0] for device in ("cpu", "cuda"))
    for name in ("loss_d", "loss_g", "loss_pixel", "loss_adv"):
        assert cuda[name] == pytest.approx(cpu[name], rel=1e-3)


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_runs_stop_and_go_on(manifest: Manifest, tmp_path: Path, precision: str):
    words = ["--data", manifest.folder, "--out", tmp_path / "run", "--device", "cuda"]
    program("train", *SMALL, *words, "--train.images", 12, "--train.precision", precision, env=ON_GPU)
    program("train", *words, "--resume", "latest", "--train.images", 36, env=ON_GPU)
    assert [entry["nimg"] for entry in stats(tmp_path / "run")] == [12, 24, 36]


def test_scores_are_the_cpus(manifest: Manifest, tmp_path: Path):
    config = Config(data=DataConfig(size=64), generator=GeneratorConfig(channels=8, nested_blocks=1))
    snapshot = save_snapshot(tmp_path, 8, config, build_generator(config))
    found = {}
    for device in ("cpu", "cuda"):
        out = tmp_path / device
        evaluate.main([str(snapshot), "--data", str(manifest.folder), "--out", str(out), "--device", device])
        found[device] = json.loads((out / "metrics.json").read_text())["methods"]
    for method in ("bicubic", "model"):
        assert found["cuda"][method] == pytest.approx(found["cpu"][method], abs=2e-3)
