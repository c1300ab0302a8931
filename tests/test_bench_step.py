"""The benchmark of a step: counts are exact, nothing wrong is timed, nothing is timed twice."""

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from sega_dist import cli
from sega_dist.bench import gpu_step, measure, step
from sega_dist.bench.step import StepCommand, bench, work
from sega_dist.bench.work import counted
from sega_dist.errors import UserError
from sega_dist.objectives import Objective

TWO: tuple[step.Column, ...] = ("plain_fp32", "ours_fp32")


def forget() -> None:
    for cached in (step.setting, step.work, step.countable):
        cached.cache_clear()


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(step, "SIZE", 32)
    monkeypatch.setattr(measure, "LONG", 0.0)
    forget()
    yield
    forget()


def test_flop_bytes_and_memory_of_a_convolution():
    x, w = torch.randn(2, 3, 8, 8), torch.randn(5, 3, 3, 3)
    found = counted(lambda: F.conv2d(x, w, padding=1).relu().sum())
    out = 2 * 5 * 8 * 8
    assert found.flop == 2 * out * 3 * 9
    assert found.bytes == 4 * (x.numel() + w.numel() + out)
    assert 2 * 4 * out <= found.peak <= 2 * 4 * out + 8, "the convolution's output and the activation's"
    in_place = counted(lambda: F.conv2d(x, w, padding=1).relu_().sum())
    assert in_place.peak <= 4 * out + 8


def test_memory_is_given_back_when_nothing_refers_to_it():
    x = torch.randn(1000)

    def three() -> None:
        kept = [x + 1, x + 2]
        weakref.ref(kept[0])
        del kept
        (x + 3).sum()

    found = counted(three)
    assert 8000 <= found.peak <= 8010 and found.live == 0


@pytest.mark.parametrize(("scale", "gflop"), [(4, 385), (8, 278)])
def test_work_of_a_step_is_what_the_papers_networks_ask_for(scale: Any, gflop: float, monkeypatch: pytest.MonkeyPatch):
    """At 256 pixels; E of LR at 8x8 from 32 or 64 pixels is what keeps small images from scaling alike."""
    monkeypatch.setattr(step, "SIZE", 256)
    whole = work(scale, 2, "fp32")["flop"]
    assert whole / 2e9 == pytest.approx(gflop, rel=3e-3)
    named = ("G forward, backward", "E, VGG of HR, LR", "D phase", "VGG of SR", "D of G phase")
    found = {part: work(scale, 2, "fp32", part)["flop"] for part in ("G forward", *named)}
    assert sum(found[part] for part in named) == pytest.approx(whole, rel=1e-9)
    assert found["G forward"] * 3 > found["G forward, backward"] > found["G forward"] * 2.9


@pytest.mark.slow
def test_rows_files_and_going_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    command = StepCommand(out=tmp_path, columns=TWO, batch=(2,), device="cpu")
    rows = bench(command)
    wholes = {row["column"]: row for row in rows if row["part"] == "step"}
    assert wholes.keys() == set(TWO)
    assert all(row["median_ms"] > 0 and row["images_per_s"] > 0 and row["error"] < 1e-2 for row in wholes.values())
    assert all(row["roof_share"] > 0 for row in wholes.values())
    parts = {row["part"] for row in rows if row["column"] == "ours_fp32"}
    assert {"G forward", "D phase", "E, VGG of HR, LR", "VGG of SR", "D of G phase", "Adam", "EMA", "data"} < parts
    facts = json.loads((tmp_path / "step.json").read_text())["provenance"]
    largest = facts["fits"]["x4 fp32"]
    assert 0 < largest["24"] < largest["40"] < largest["80"] < largest["141"]
    assert (tmp_path / "step.png").stat().st_size > 10_000 and (tmp_path / "step.csv").exists()
    before = (tmp_path / "rows.jsonl").read_text()
    bench(command)
    assert (tmp_path / "rows.jsonl").read_text() == before, "what was timed is not timed again"
    page = gpu_step.page(facts, rows)
    assert page.count("not measured") == 6 and "| step | 4 | 2 | ours_fp32 |" in page


@pytest.mark.slow
def test_a_wrong_column_has_no_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(Objective, "content", lambda self, targets, sr: sr.square().mean())
    cli.main(["bench", "step", "--quick", "--json", "--device", "cpu", "--out", str(tmp_path), "--columns", *TWO])
    rows = json.loads(capsys.readouterr().out)
    assert [row["why"] for row in rows if row["column"] == "ours_fp32"] == ["wrong"]
    assert all("median_ms" in row for row in rows if row["column"] == "plain_fp32")
    monkeypatch.undo()
    monkeypatch.setattr(step, "SIZE", 32)
    monkeypatch.setattr(measure, "LONG", 0.0)
    again = bench(StepCommand(out=tmp_path, columns=TWO, batch=(2,), device="cpu", quick=True))
    assert not any(row["why"] for row in again), "what failed is tried again"


def test_mistakes_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(UserError, match="2 or more"):
        cli.main(["bench", "step", "--batch", "1", "--device", "cpu", "--out", str(tmp_path)])
    with pytest.raises(UserError, match="ours_bf61"):
        cli.main(["bench", "step", "--columns", "ours_bf61"])
    monkeypatch.setattr(step, "PLAIN", tmp_path / "plain.py")
    step.plain_loop.cache_clear()
    with pytest.raises(UserError, match="checkout"):
        bench(StepCommand(out=tmp_path, columns=TWO, device="cpu", quick=True))
    with pytest.raises(UserError, match="--faces"):
        gpu_step.main(["--part", "train", "--rehearse", "--out", str(tmp_path)])


@pytest.mark.slow
@pytest.mark.soak
def test_the_gpu_script_trains_goes_on_and_scores(faces: Path, tmp_path: Path):
    words = ["--part", "train", "--rehearse", "--out", str(tmp_path), "--faces", str(faces), "--test", str(faces)]
    for _ in range(2):
        gpu_step.main(words)
    assert "| bicubic |" in (tmp_path / "train/page.md").read_text()
