"""Benchmarks: nothing wrong is timed, nothing is timed twice, and what auto takes follows from the figures."""

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sega_dist import cli
from sega_dist.bench import gpu, kernels, measure
from sega_dist.bench.kernels import Case, KernelsCommand, bench
from sega_dist.errors import UserError
from sega_dist.kernels import backend, compat

SMALL = KernelsCommand(levels=("rals", "conv64"), columns=("eager_nchw", "eager"), batch=(2,), side=(8,), device="cpu")


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]


def test_rows_files_and_going_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    command = KernelsCommand(**{**vars(SMALL), "out": tmp_path})
    rows = bench(command)
    assert len(rows) == len(lines(tmp_path)) == 8
    assert {row["mode"] for row in rows} == {"forward", "both"}
    for row in rows:
        assert row["why"] == "" and row["error"] <= 1e-5
        assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        assert row["floor_ms"] > 0 and row["roof_share"] == pytest.approx(row["floor_ms"] / row["median_ms"])
    said = capsys.readouterr().out
    assert "hybrid and triton are not measured" in said
    results = json.loads((tmp_path / "kernels.json").read_text())
    assert results["provenance"]["torch"] == torch.__version__ and len(results["provenance"]["code"]) == 12
    assert results["provenance"]["flop_per_s"] > 1e8
    assert (tmp_path / "kernels.png").stat().st_size > 5000
    assert len((tmp_path / "kernels.csv").read_text().splitlines()) == 9
    assert bench(command) == rows
    assert len(lines(tmp_path)) == 8, "what was timed is not timed again"


def test_a_wrong_column_has_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    right = kernels.callable_of

    def callable_of(case: Case, column: str) -> Any:
        call = right(case, column)
        return (lambda: [1.01 * t for t in call()]) if column == "eager_nchw" else call

    monkeypatch.setattr(kernels, "callable_of", callable_of)
    rows = bench(KernelsCommand(**{**vars(SMALL), "out": tmp_path, "levels": ("conv64",)}))
    wrong = [row for row in rows if row["column"] == "eager_nchw"]
    assert [row["why"] for row in wrong] == ["wrong", "wrong"]
    assert not any("median_ms" in row for row in wrong)
    assert all("median_ms" in row for row in rows if row["column"] == "eager")


def test_a_column_that_fails_says_so_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    right = kernels.callable_of

    def callable_of(case: Case, column: str) -> Any:
        if column == "eager_nchw":
            raise RuntimeError("out of registers")
        return right(case, column)

    monkeypatch.setattr(kernels, "callable_of", callable_of)
    rows = bench(KernelsCommand(**{**vars(SMALL), "out": tmp_path, "levels": ("rals",)}))
    assert {row["why"] for row in rows} == {"", "RuntimeError: out of registers"}


@pytest.mark.parametrize("level", ["conv64", "conv128", "block", "upconv", "rals", "ridb"])
def test_every_level_is_right_in_every_way(level: str):
    """The callables that a GPU will time, in the interpreter: each agrees with fp64."""
    if not compat.IS_INTERPRETING:
        pytest.skip("the GPU tests do this with a GPU")
    mode = "forward" if level == "ridb" else "both"
    case = Case(level, mode, 1, 5, "fp32", "cpu")
    exact = kernels.truth(case)
    for column in ("hybrid", "triton"):
        assert max(kernels.errors(kernels.callable_of(case, column)(), exact)) <= 1e-5


def test_work_is_counted():
    flop, size = kernels.work(Case("conv64", "forward", 2, 8, "bf16", "cpu"))
    assert flop == 2 * 2 * 64 * 64 * 9 * 64
    assert size == 2 * 2 * 64 * 64 * 2 + (64 * 64 * 9 + 64) * 4
    assert kernels.work(Case("conv64", "both", 2, 8, "bf16", "cpu"))[0] == 3 * flop
    assert kernels.work(Case("ridb", "forward", 1, 64, "bf16", "cpu"))[0] == pytest.approx(47.11e9 / 12, rel=1e-3)


def row(median: float, spread: float = 0.01) -> dict[str, Any]:
    return {"median_ms": median, "p20_ms": median - spread / 2, "p80_ms": median + spread / 2}


@pytest.mark.parametrize(
    ("milliseconds", "taken"),
    [
        ({"eager": 2.0, "compile": 1.5, "hybrid": 1.3, "triton": 1.0}, "triton"),
        ({"eager": 2.0, "hybrid": 1.3, "triton": 1.27}, "hybrid"),  # triton within 5 percent
        ({"eager": 1.0, "hybrid": 0.98, "triton": 1.1}, "reference"),
        ({"eager": 2.0, "compile": 0.5, "triton": 1.0}, "triton"),  # training does not compile
        ({"eager": 2.0, "hybrid": 1.99}, "reference"),
        ({"hybrid": 2.0, "triton": 1.0}, "reference"),  # nothing to compare with
    ],
)
def test_what_auto_takes(milliseconds: dict[str, float], taken: str):
    assert gpu.decide({column: row(ms) for column, ms in milliseconds.items()}) == taken


def test_a_gain_within_the_spread_is_none():
    assert gpu.decide({"eager": row(2.0, 0.6), "triton": row(1.5, 0.6)}) == "reference"
    assert gpu.decide({"eager": row(2.0, 0.1), "triton": row(1.5, 0.1)}) == "triton"


def test_choices_are_read_back_by_auto(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rows = [{"level": "ridb", "mode": "both", "metric": "cold", "batch": n, "side": 64, "dtype": "bf16",
             "column": column, **row(ms)}
            for n, times in ((8, {"eager": 2.0, "triton": 1.0}), (64, {"eager": 2.0, "triton": 2.5}))
            for column, ms in times.items()]  # fmt: skip
    monkeypatch.setattr(backend, "TABLES", tmp_path)
    monkeypatch.setattr(backend, "gpu_name", lambda: "some-gpu")
    monkeypatch.setattr(backend, "obstacle", lambda *_: None)
    backend.forget()
    machine = {"schema": 1, "device": "some GPU", "launch": [], "choices": gpu.choices(rows)}
    gpu.install(gpu.GpuCommand(out=tmp_path), "some-gpu", machine)
    for images, taken in ((8, "triton"), (64, "reference"), (7, "triton")):
        plan = backend.plan("auto", {"ridb": [images, 64, 64, 64]}, torch.bfloat16, "cuda", 0.2)
        assert plan == {"ridb": taken}
    assert backend.plan("auto", {"ridb": [8, 64, 64, 64]}, torch.float32, "cuda", 0.2) == {"ridb": "reference"}
    backend.forget()


def test_launch_parameters_follow_chip_dtype_and_shape(monkeypatch: pytest.MonkeyPatch):
    entries = [{"kernel": "conv3x3", "dtypes": ["bf16"], "pixels": pixels, "parameters": {"BN": 64, "num_warps": warps}}
               for pixels, warps in ((1024, 4), (65536, 8))]  # fmt: skip
    entries.append({"kernel": "conv3x3", "cc": 90, "dtypes": ["fp16"], "parameters": {"BN": 64, "num_warps": 2}})
    entries.append({"kernel": "conv3x3", "dtypes": ["fp16"], "parameters": {"BN": 64, "num_warps": 1}})
    monkeypatch.setattr(backend, "_table", functools.cache(lambda name, part="launch": entries))
    monkeypatch.setattr(compat, "IS_INTERPRETING", False)
    capability = (9, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(backend, "OPTIONS", {})
    backend.forget()
    find = backend.launch
    assert find("conv3x3", [64, 64], torch.bfloat16, 900)["num_warps"] == 4
    assert find("conv3x3", [64, 48], torch.bfloat16, 30_000) == {"BN": 16, "num_warps": 8}
    assert find("conv3x3", [32], torch.float16, 900) == {"BN": 32, "num_warps": 2}
    capability = (8, 9)
    backend.forget()
    assert find("conv3x3", [64], torch.float16, 900)["num_warps"] == 1
    with pytest.raises(ValueError, match="conv3x3 in fp32"):
        find("conv3x3", [64], torch.float32, 900)
    with backend.forced(conv3x3={"BN": 128}):
        assert find("conv3x3", [64], torch.float32, 900) == {"BN": 64}
    backend.forget()


def test_quantiles():
    found = measure.quantiles([5.0, 1.0, 2.0, 3.0, 4.0])
    assert found == {"median_ms": 3.0, "p20_ms": 2.0, "p80_ms": 4.0}


def test_mistakes_are_one_line():
    for words, said in [
        (["bench"], "there are bench kernels, bench step, bench data, bench scaling"),
        (["bench", "kernel"], "there are bench kernels, bench step, bench data, bench scaling"),
        (["bench", "kernels", "--levels", "everything"], "everything"),
        (["bench", "kernels", "--device", "cuda"], "no CUDA device"),
    ]:
        if torch.cuda.is_available() and "cuda" in words:
            continue
        with pytest.raises(UserError, match=said):
            cli.main(words)


@pytest.mark.slow
def test_the_gpu_script_runs_through_and_goes_on(tmp_path: Path):
    """Rehearsed in the interpreter: every stage but the GPU's own tests, and a second run that repeats none."""
    if not compat.IS_INTERPRETING:
        pytest.skip("a GPU runs the script itself")
    before = {path.name for path in backend.TABLES.iterdir()}
    gpu.main(["--rehearse", "--out", str(tmp_path)])
    page = (tmp_path / "rehearsal.md").read_text()
    assert "not measured" in page and "Nothing." in page
    text = (tmp_path / "sweep.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    assert {row["kernel"] for row in rows} == set(gpu.TILED) and all("ms" in row for row in rows)
    table = json.loads((tmp_path / "rehearsal.json").read_text())
    assert {entry["kernel"] for entry in table["launch"]} == set(gpu.TILED) and {
        c["impl"] for c in table["choices"]
    } <= {"reference"}
    gpu.main(["--rehearse", "--out", str(tmp_path)])
    assert (tmp_path / "sweep.jsonl").read_text() == text, "what was timed is not timed again"
    assert {path.name for path in backend.TABLES.iterdir()} == before, "a rehearsal installs nothing"


def test_a_red_stage_is_made_again(tmp_path: Path):
    results = [{"code": 1}, {"code": 0}, {"code": 2}]
    codes = [gpu.stage(tmp_path, "tests", lambda: results.pop(0), lambda r: r["code"] == 0)["code"] for _ in range(3)]
    assert codes == [1, 0, 0]


def test_without_a_reference_rows_say_so_and_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    right = kernels.truth

    def truth(case: Case) -> Any:
        if case.level == "rals":
            raise RuntimeError
        return right(case)

    monkeypatch.setattr(kernels, "truth", truth)
    rows = bench(KernelsCommand(**{**vars(SMALL), "out": tmp_path}))
    assert {row["why"] for row in rows if row["level"] == "rals"} == {"no reference: RuntimeError: "}
    assert all("median_ms" in row for row in rows if row["level"] == "conv64")
    monkeypatch.setattr(kernels, "truth", right)
    again = bench(KernelsCommand(**{**vars(SMALL), "out": tmp_path}))
    assert not any(row["why"] for row in again), "what failed is tried again"
