"""Every file in launchers/ starts training; two machines train as one does; what is wrong is said on every rank."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SMALL, program
from hosts import TIMEOUT, two_hosts
from ranks import free_port, on_ranks
from safetensors.torch import load_file

from sega_dist.data.shards import Manifest
from sega_dist.distributed import World
from sega_dist.errors import UserError

pytestmark = pytest.mark.distributed


def stats(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "stats.jsonl").read_text().splitlines()]


def weights(run: Path, nimg: int) -> dict[str, torch.Tensor]:
    folder = run / "checkpoints" / f"{nimg:012d}"
    return {f"{file.stem} {name}": tensor for file in sorted(folder.glob("*.safetensors"))
            for name, tensor in load_file(file).items()}  # fmt: skip


def wait_for(what: str, holds, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.1)


# Two machines ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher", ["multi_node", pytest.param("zero2", marks=[pytest.mark.deepspeed, pytest.mark.soak])]
)
def test_two_machines_lose_their_cable_say_so_and_go_on(launcher: str, manifest: Manifest, tmp_path: Path):
    """The cable is cut in the middle; every rank names the other within the timeout; the resumed run ends in the same
    bits as one that was left alone."""
    if launcher != "multi_node":
        pytest.importorskip("deepspeed")
    words = [*SMALL, "--data", manifest.folder, "--device", "cpu", "--train.checkpoint-kimg", 0.024]
    resume = [*words[words.index("--data") :], "--resume", "latest"]
    with two_hosts() as hosts:
        run, alone = tmp_path / "run", tmp_path / "alone"
        started = hosts.train(
            launcher, 2, [*words, "--out", run, "--train.images", 120_000], tmp_path / "cut", free_port()
        )
        wait_for("the third checkpoint", lambda: (run / "checkpoints/000000000072").exists(), 90)
        hosts.cut()
        cut_at = time.monotonic()
        assert all(process.wait(3 * TIMEOUT + 30) != 0 for process in started)
        took = time.monotonic() - cut_at
        for host in (0, 1) if hosts.has_cable else (0,):
            log = (tmp_path / "cut" / f"host{host}.log").read_text()
            assert f"lost rank {1 - host} of 2" in log, log[-3000:]
        hosts.mend()
        last = max(int(folder.name) for folder in (run / "checkpoints").iterdir() if folder.name.isdigit())
        more = ["--train.images", last + 24]
        for out, given in ((run, resume), (alone, words)):
            ended = hosts.train(launcher, 2, [*given, "--out", out, *more], tmp_path / f"{out.name}-logs", free_port())
            assert [process.wait(240) for process in ended] == [0, 0], (
                tmp_path / f"{out.name}-logs" / "host0.log"
            ).read_text()[-3000:]
    assert took < 2 * TIMEOUT + 20  # the collective's wait, then that for signs of life, and the launcher's own end
    resumed, expected = weights(run, last + 24), weights(alone, last + 24)
    assert resumed.keys() == expected.keys()
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)


# Files -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_file_for_one_gpu_starts_training(manifest: Manifest, tmp_path: Path):
    """On this machine's CPU; that of several is in the test of a trace, that of several machines in theirs."""
    words = ["train", *SMALL, "--data", manifest.folder, "--device", "cpu", "--out", tmp_path / "run"]
    program(*words, "--train.images", 12, ranks=1, launcher="one_gpu")
    assert len(weights(tmp_path / "run", 12)) > 100


@pytest.mark.slow
@pytest.mark.deepspeed
def test_a_resume_under_zero3_is_no_stop(manifest: Manifest, tmp_path: Path):
    """Bit for bit, for weights, moments, average and snapshot; DDP and ZeRO-2 do so over a cable."""
    pytest.importorskip("deepspeed")
    words = ["train", *SMALL, "--data", manifest.folder, "--device", "cpu"]
    for out, images in (("whole", 36), ("run", 24)):
        program(*words, "--out", tmp_path / out, "--train.images", images, ranks=2, launcher="zero3")
    resume = ["train", "--data", manifest.folder, "--out", tmp_path / "run", "--resume", "latest", "--device", "cpu"]
    program(*resume, "--train.images", 36, ranks=2, launcher="zero3")
    resumed, expected = weights(tmp_path / "run", 36), weights(tmp_path / "whole", 36)
    assert resumed.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(resumed[name], expected[name])] == []
    snapshots = [load_file(tmp_path / run / "snapshots/snapshot-000000000036.safetensors") for run in ("run", "whole")]
    assert all(torch.equal(tensor, snapshots[1][name]) for name, tensor in snapshots[0].items())


@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.deepspeed
def test_a_run_goes_from_engine_to_engine(manifest: Manifest, tmp_path: Path):
    """By the program, one process under ZeRO among them; that no bit is lost on the way is in test_engines.py."""
    pytest.importorskip("deepspeed")
    words = ["--data", manifest.folder, "--device", "cpu", "--out", tmp_path / "run"]
    for launcher, ranks, nimg in (("zero1", 2, 12), ("zero3", 3, 24), ("zero2", 1, 36), ("cpu", 0, 48)):
        given = [*words, "--resume", "latest"] if nimg > 12 else [*SMALL, *words]
        program("train", *given, "--train.images", nimg, ranks=ranks, launcher=launcher)
    assert [line["nimg"] for line in stats(tmp_path / "run")] == [12, 24, 36, 48]
    assert weights(tmp_path / "run", 48)["generator step.shallow.weight"].item() == 4


def test_files_hold_no_hyper_parameters():
    for path in (ROOT / "launchers/deepspeed").glob("*.json"):
        assert list(json.loads(path.read_text())) == ["zero_optimization"]
    for path in (ROOT / "launchers/accelerate").glob("*.yaml"):
        assert not {"gradient_accumulation_steps", "gradient_clipping"} & set(
            path.read_text().replace(":", " ").split()
        )
        assert "mixed_precision: 'no'" in path.read_text() or "DEEPSPEED" in path.read_text()


# What is wrong is said on every rank -------------------------------------------------------------------------------


def launched(rank: int, ranks: int, port: int, **changes: str | None) -> dict[str, str]:
    """What a launcher would tell a process, with changes; None leaves a variable away."""
    told = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **changes}  # fmt: skip
    return {**os.environ, "OMP_NUM_THREADS": "1", **{key: value for key, value in told.items() if value is not None}}


def by_hand(commands: list[list[object]], environments: list[dict[str, str]]) -> list[tuple[int, str]]:
    """Exit code and stderr of `sega-dist train` processes started side by side."""
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "sega_dist.train", *map(str, words), "--timeout", "10"],
            env=environment, cwd=ROOT, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )
        for words, environment in zip(commands, environments, strict=True)
    ]  # fmt: skip
    try:
        return [(process.wait(60), process.stderr.read()) for process in started]
    finally:
        for process in started:
            process.kill()


def test_ranks_with_different_configurations_are_named(manifest: Manifest, tmp_path: Path):
    port = free_port()
    words = [*SMALL, "--data", manifest.folder, "--out", tmp_path / "run", "--device", "cpu"]
    ended = by_hand([words, [*words, "--train.seed", 1]], [launched(rank, 2, port) for rank in range(2)])
    for code, stderr in ended:
        assert code == 2
        assert "rank 1 differs from rank 0 in train.seed" in stderr
        assert "Traceback" not in stderr
    assert not (tmp_path / "run").exists()


def disagree(rank: int, ranks: int) -> list[str]:
    world = World(device="cpu", timeout=20)
    said = []
    for facts in ({"same": 1, "the manifest": "ab"[rank == 2]}, {"same": 1, **({"new": 0} if rank else {})}):
        try:
            world.agree(facts)
        except UserError as error:
            said.append(str(error))
    world.agree({"same": 1})
    return said


def test_agreement_names_ranks_and_facts(tmp_path: Path):
    for said in on_ranks(disagree, 3, tmp_path):
        assert "rank 2 differs from rank 0 in the manifest" in said[0] and "rank 1" not in said[0].split(" (")[0]
        assert "different versions of sega-dist" in said[1]


def test_a_batch_that_does_not_divide_is_refused_on_every_rank(manifest: Manifest, tmp_path: Path):
    """More ranks than images is a case of it."""
    words = [*SMALL, "--data", manifest.folder, "--out", tmp_path / "run", "--device", "cpu", "--train.batch-size", 2]
    port = free_port()
    for code, stderr in by_hand([words] * 3, [launched(rank, 3, port) for rank in range(3)]):
        assert code == 2
        assert "train.batch_size 2 does not divide by 3 processes" in stderr and "3 would do" in stderr
        assert len(stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"MASTER_ADDR": None}, "the launcher did not set MASTER_ADDR"),
        ({"RANK": "2"}, "do not fit"),
        ({"WORLD_SIZE": "many"}, "do not fit"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "gradient accumulation is not possible here: batch norm"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed was asked for without a file"),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": "FILE"}, "zero_optimization alone"),
        (
            {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": "none.json"},
            "cannot read DeepSpeed",
        ),
    ],
)
def test_what_a_launcher_got_wrong_is_one_line(
    changes: dict, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    file = tmp_path / "zero.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}))
    for key, value in launched(0, 2, 29500, **changes).items():
        monkeypatch.setenv(key, str(file) if value == "FILE" else value)
    if changes.get("MASTER_ADDR", "") is None:
        monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UserError, match=message):
        World(device="cpu")


def test_accumulation_in_a_deepspeed_file_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    file = tmp_path / "zero.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 2}, "gradient_accumulation_steps": 2}))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(file))
    with pytest.raises(UserError, match="activation-checkpointing"):
        World(device="cpu")


@pytest.mark.slow
def test_a_port_in_use_is_one_line_on_every_rank(manifest: Manifest, tmp_path: Path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        words = [*SMALL, "--data", manifest.folder, "--out", tmp_path / "run", "--device", "cpu"]
        for code, stderr in by_hand([words] * 2, [launched(rank, 2, port) for rank in range(2)]):
            assert code == 75
            assert f"did not find each other at 127.0.0.1:{port}" in stderr and "--main_process_port" in stderr
            assert "Traceback" not in stderr


@pytest.mark.slow
@pytest.mark.soak
def test_a_rank_that_never_comes_is_waited_for_and_no_longer(manifest: Manifest, tmp_path: Path):
    words = [*SMALL, "--data", manifest.folder, "--out", tmp_path / "run", "--device", "cpu"]
    [(code, stderr)] = by_hand([words], [launched(0, 2, free_port())])
    assert code == 75
    assert "the 2 processes did not find each other" in stderr


@pytest.mark.slow
@pytest.mark.soak
def test_of_three_ranks_the_two_that_live_name_the_one_that_died(manifest: Manifest, tmp_path: Path):
    run, port = tmp_path / "run", free_port()
    words = [*SMALL, "--data", manifest.folder, "--out", run, "--device", "cpu", "--train.images", 120_000,
             "--train.checkpoint-kimg", 0.024, "--timeout", 20]  # fmt: skip
    command = [sys.executable, "-m", "sega_dist.train", *map(str, words)]
    started = [subprocess.Popen(command, env=launched(rank, 3, port), cwd=ROOT, text=True, stderr=subprocess.PIPE)
               for rank in range(3)]  # fmt: skip
    try:
        wait_for("a checkpoint", lambda: (run / "checkpoints/000000000024").exists(), 90)
        started[1].kill()
        for rank in (0, 2):
            said = started[rank].communicate(timeout=90)[1]
            assert started[rank].returncode == 75, said
            assert "lost rank 1 of 3" in said and "--resume latest" in said
            assert "Traceback" not in said
    finally:
        for process in started:
            process.kill()


@pytest.mark.slow
def test_a_trace_names_what_a_step_is_made_of(manifest: Manifest, tmp_path: Path):
    words = ["--data", manifest.folder, "--out", tmp_path / "run", "--device", "cpu", "--train.images", 72]
    program("train", *SMALL, *words, "--profile", ranks=2, launcher="gpu")
    for rank in (0, 1):
        trace = json.loads((tmp_path / "run/profile" / f"trace-{rank}.json").read_text())
        names = {event.get("name") for event in trace["traceEvents"]}
        assert {"data", "generator", "D phase", "G phase", "gloo:all_reduce"} <= names
    short = program("train", *SMALL, "--data", manifest.folder, "--out", tmp_path / "short", "--device", "cpu",
                    "--train.images", 12, "--profile")  # fmt: skip
    assert "warning: no trace" in short.stderr
