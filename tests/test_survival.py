"""What is promised to those who leave a run alone for days: here it is stopped, killed, hung and fed what is no number.

SEGA_DIST_KILLS="20 50" asks for as many kills in training, and while saving.
"""

import contextlib
import ctypes
import dataclasses
import faulthandler
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from conftest import ROOT, SMALL, program
from ranks import free_port
from test_launchers import launched, wait_for, weights
from test_train import losses, stats

from sega_dist import errors, resume, train
from sega_dist.batches import Batches
from sega_dist.checkpoint import find_checkpoint, newest_checkpoint, read_checkpoint, save_checkpoint, saved_checkpoints
from sega_dist.data import positions
from sega_dist.data.images import TrainingImages
from sega_dist.data.shards import Manifest
from sega_dist.distributed import World
from sega_dist.engines import Player
from sega_dist.errors import HANG, LOST_RANK, NON_FINITE, PREEMPTED
from sega_dist.loop import Options, Training
from sega_dist.objectives import Objective
from sega_dist.owner import read_status
from sega_dist.players import Players

EACH = ("--train.checkpoint-kimg", 0.012, "--train.keep", 99)  # a checkpoint after each step
ROLL = ("--train.checkpoint-kimg", 0.024, "--train.keep", 99, "--on-nonfinite", "rollback")
AUTO, UNTIL, ENDLESS = ("--resume", "auto"), "--train.images", ("--train.images", 120_000)
slow, distributed, soak = pytest.mark.slow, pytest.mark.distributed, pytest.mark.soak


def around(owner: type, name: str, change: Callable[..., Any]) -> None:
    """From now on `change(original, ...)` is called instead."""
    original = getattr(owner, name)
    setattr(owner, name, lambda *given: change(original, *given))


def befall(owner: type, name: str, place: int, first: str, act: Callable[[], None]) -> None:
    """Act before each call whose argument at `place`, a number of images, is `first` or more."""
    around(owner, name, lambda original, *given: (given[place] >= int(first) and act()) or original(*given))


def sleep_for_ever() -> None:
    time.sleep(1000)


def hold_pythons_lock() -> None:
    ctypes.PyDLL(None).sleep(1000)


def die_once(rank: str, note: Path) -> None:
    if os.environ["RANK"] == rank and not note.exists():
        note.write_text(str(time.time()))
        os.kill(os.getpid(), signal.SIGKILL)


def poison(what: str, first: str, last: str = "inf", factor: str = "nan") -> None:
    """While a step's batch begins at `first` ... `last` of the run's order."""
    begins = [-1]

    def spoil(value: torch.Tensor) -> torch.Tensor:
        return value * float(factor) if float(first) <= begins[0] <= float(last) else value

    def lose(original: Callable, *given: Any) -> Any:
        loss, statistics = original(*given)
        return spoil(loss), statistics | {what: spoil(loss).detach()}

    def make(original: Callable, player: Player, *given: Any) -> None:
        original(player, *given)
        player.parts()[0].register_hook(spoil)

    def step(original: Callable, players: Players, *given: Any) -> Any:
        statistics, part = original(players, *given), players.generator.parts()[0].data
        part.copy_(spoil(part))
        return statistics

    around(Batches, "__next__", lambda original, self: begins.__setitem__(0, self.nimg) or original(self))
    around(*{"loss_g": (Objective, "g_loss", lose), "loss_d": (Objective, "d_loss", lose),
             "gradient": (Player, "__init__", make), "weight": (Players, "step", step)}[what])  # fmt: skip


FAULTS: dict[str, Callable[..., None]] = {  # in the process that they befall
    "": lambda: None,
    "sleep_for_ever": lambda first: befall(Players, "step", 2, first, sleep_for_ever),
    "hold_pythons_lock": lambda first: befall(Players, "step", 2, first, hold_pythons_lock),
    "die": lambda first, rank, note: befall(Players, "step", 2, first, lambda: die_once(rank, Path(note))),
    "no_image": lambda first: befall(TrainingImages, "__getitem__", 1, first, sleep_for_ever),
    "poison": poison,
    "other_code": lambda: setattr(train, "code_digest", lambda: "another"),
    "wrong_sum": lambda: around(World, "sum_of", lambda original, self, values: original(self, values) + 1),
}


def main(fault: str, words: list[str]) -> None:
    """`sega-dist train WORDS` as it is under `fault`."""
    name, *arguments = fault.split() or [""]
    FAULTS[name](*arguments)
    errors.run(train.main, words)


def enter(log: Path, environment: dict[str, str], fault: str, words: list[str]) -> None:
    """In a process with a session of its own, as if it had been started by hand."""
    os.setsid()
    file = os.open(log, os.O_CREAT | os.O_WRONLY)
    os.dup2(file, 1), os.dup2(file, 2)
    os.environ |= environment
    multiprocessing.set_start_method("fork", force=True)  # of data workers
    torch.set_num_threads(1)
    main(fault, words)


FORKS = multiprocessing.get_context("forkserver")
# Imported once, also what the program waits with: a life takes two seconds, not ten.
FORKS.set_forkserver_preload(["sega_dist.train", "torch._dynamo", "torchmetrics.functional.image", "matplotlib.figure"])


class Ranks:
    """One life of a run."""

    def __init__(self, words: list[str], logs: str, faults: dict[int, str], ranks: int, environment: dict[str, str]):
        self.logs, self.processes, port = [Path(f"{logs}-{rank}.log") for rank in range(ranks)], [], free_port()
        for rank, log in enumerate(self.logs):
            told = (launched(rank, ranks, port) if ranks > 1 else {}) | {"ACCELERATE_USE_CPU": "true", **environment}
            self.processes.append(FORKS.Process(target=enter, args=(log, told, faults.get(rank, ""), words)))
            self.processes[-1].start()

    def ended(self, seconds: float = 120) -> list[tuple[int, str]]:
        """Exit code and output of each rank."""
        end = time.monotonic() + seconds
        for process, log in zip(self.processes, self.logs, strict=True):
            process.join(max(0, end - time.monotonic()))
            assert process.exitcode is not None, f"still there after {seconds} s: {log.read_text()[-3000:]}"
        return [(process.exitcode, log.read_text()) for process, log in zip(self.processes, self.logs, strict=True)]

    def well(self) -> None:
        assert {code for code, _ in self.ended()} == {0}, self.logs[0].read_text()[-3000:]


@pytest.fixture
def begin(manifest: Manifest, tmp_path: Path):
    """Begin a life of the run tmp_path/NAME; no process of its sessions outlives the test."""
    lives: list[Ranks] = []

    def start(name: str, *words: Any, faults: dict[int, str] | None = None, ranks: int = 1, **env: str) -> Ranks:
        always = [*SMALL, "--data", manifest.folder, "--out", tmp_path / name, "--device", "cpu", "--timeout", 60]
        told = [*map(str, [*always, *words])]
        lives.append(Ranks(told, f"{tmp_path / name}-{len(lives)}", faults or {}, ranks, env))
        return lives[-1]

    yield start
    for process in (process for life in lives for process in life.processes):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def reached(out: Path, steps: int) -> None:
    """Wait until the run has made as many."""
    wait_for(f"{steps} steps", lambda: not steps or ((out / "stats.jsonl").exists() and len(stats(out)) >= steps), 90)


def same(one: Path, two: Path, *at: int) -> bool:
    """Every loss and, at those images, every weight, moment and average, bit for bit."""
    for nimg in at:
        first, second = weights(one, nimg), weights(two, nimg)
        assert first.keys() == second.keys() and len(first) > 100
        assert [name for name in first if not torch.equal(first[name], second[name])] == []
    return losses(one) == losses(two)


def saved(out: Path) -> list[int]:
    """Positions of checkpoints, each of them whole and of finite numbers."""
    checkpoints = [read_checkpoint(folder) for folder in saved_checkpoints(out)]
    files = [file for checkpoint in checkpoints for file in checkpoint.tensors.values()]
    assert all(bool(tensor.isfinite().all()) for file in files for tensor in file.values())
    return [checkpoint.nimg for checkpoint in checkpoints]


@pytest.mark.parametrize(
    "ranks",
    [
        pytest.param(1, marks=slow),
        pytest.param(2, marks=[slow, soak, distributed]),
        pytest.param(3, marks=[slow, distributed]),
    ],
)
def test_a_stop_after_every_step_is_no_stop_with_any_data_workers(begin, tmp_path: Path, ranks: int):
    begin("whole", *EACH, UNTIL, 60, ranks=ranks).well()
    for nimg, workers in ((12, 0), (24, 1), (36, 0), (48, 2), (60, 0)):
        begin("run", *EACH, *AUTO, UNTIL, nimg, "--data.workers", workers, ranks=ranks).well()
    assert same(tmp_path / "run", tmp_path / "whole", 12, 24, 36, 48, 60)


@slow
@distributed
def test_in_fp64_any_number_of_ranks_goes_on_with_the_same_losses(begin, tmp_path: Path):
    exact = ("--train.precision", "fp64", "--train.ema-kimg", 0, *AUTO)
    begin("whole", *exact, UNTIL, 48).well()
    for nimg, ranks in ((12, 1), (24, 2), (36, 3), (48, 1)):
        begin("run", *exact, UNTIL, nimg, ranks=ranks).well()
    for one, two in zip(losses(tmp_path / "whole"), losses(tmp_path / "run"), strict=True):
        assert one == pytest.approx(two, rel=1e-9)


@slow
@distributed
@soak
def test_verify_resume_finds_it_exact(manifest: Manifest):
    words = [*SMALL, "--data", manifest.folder, "--device", "cpu", "--steps", 3, "--stop-after", 2]
    assert "exact, bit for bit" in program("verify-resume", *words).stdout


def test_verify_resume_notices_one_moment_of_one_weight(manifest: Manifest, monkeypatch: pytest.MonkeyPatch, capsys):
    def tampering(what: str, _: object, __: int, words: list[str]) -> None:
        if what == "after the stop":
            out = Path(words[words.index("--out") + 1])
            checkpoint = find_checkpoint(out, "latest")
            next(t for n, t in checkpoint.tensors["generator"].items() if n.startswith("exp_avg.")).view(-1)[0] += 1e-3
            save_checkpoint(out, checkpoint, 3, lambda: None)  # its digests say that all is well
        train.main(words)

    monkeypatch.setattr(resume, "_train", tampering)
    with pytest.raises(SystemExit) as caught:
        errors.run(resume.verify_main, [*SMALL, "--data", str(manifest.folder), "--steps", "3", "--stop-after", "1"])
    assert caught.value.code == errors.INTERNAL and "resuming is not exact" in capsys.readouterr().err


@distributed
@pytest.mark.parametrize("what", ["weight", *(pytest.param(w, marks=slow) for w in ("loss_g", "loss_d", "gradient"))])
def test_what_is_not_a_number_on_one_rank_ends_all_in_the_same_tick(begin, tmp_path: Path, what: str):
    words = ("--train.tick-kimg", 0.024, "--train.checkpoint-kimg", 0.024, UNTIL, 72)
    for code, said in begin("run", *words, ranks=2, faults={1: f"poison {what} 36"}).ended():
        assert code == NON_FINITE and "not finite after 48 images" in said and "Traceback" not in said
    assert saved(tmp_path / "run") == [24] and read_status(tmp_path / "run")["code"] == NON_FINITE
    [noted] = [json.loads(file.read_text()) for file in (tmp_path / "run/errors").glob("nonfinite-*.json")]
    assert (noted["after"], noted["until"]) == (24, 48)
    assert noted["samples of the train side"] == [positions.sample_at(0, number, 24) for number in range(24, 48)]


def test_a_gradient_whose_square_overflows_is_not_saved(begin, tmp_path: Path):
    """Adam's second moment would stay infinite and its weight as it is, for the rest of the run."""
    [(code, _)] = begin("run", *EACH, UNTIL, 36, faults={0: "poison gradient 12 12 1e25"}).ended()
    assert saved(tmp_path / "run") == [12] and code == NON_FINITE


@slow
@distributed
def test_a_rollback_leaves_images_out_and_is_part_of_the_state(begin, tmp_path: Path):
    out, never, fault = tmp_path / "run", tmp_path / "never", {1: "poison weight 36 36"}
    begin("run", *ROLL, UNTIL, 72, ranks=2, faults=fault).well()
    expected = [(12, 0), (24, 0), (36, 24), (48, 24), (60, 24), (72, 24)]
    assert [(entry["nimg"], entry["skipped"]) for entry in stats(out)] == expected and saved(out) == [24, 48, 72]
    begin("stopped", *ROLL, UNTIL, 48, ranks=2, faults=fault).well()
    begin("stopped", *ROLL, *AUTO, UNTIL, 72, ranks=2).well()
    begin("never", *ROLL, UNTIL, 24, ranks=2).well()  # as if those images had never been
    save_checkpoint(never, dataclasses.replace(find_checkpoint(never, "latest"), skipped=24), 3, lambda: None)
    begin("never", *ROLL, *AUTO, UNTIL, 72, ranks=2).well()
    assert same(tmp_path / "stopped", out, 48, 72) and same(never, out, 48, 72)


@distributed
@pytest.mark.parametrize(("first", "why", "skipped"), [(36, "3 rollbacks did not help", [0, 24, 36, 48]),
                                                       (0, "there is no checkpoint to go back to", [0])])  # fmt: skip
def test_a_fault_that_always_comes_ends_the_run(begin, tmp_path: Path, first: int, why: str, skipped: list[int]):
    for code, said in begin("run", *ROLL, UNTIL, 72, ranks=2, faults={1: f"poison loss_d {first}"}).ended():
        assert code == NON_FINITE and why in said
    noted = [json.loads(file.read_text())["skipped"] for file in (tmp_path / "run/errors").glob("nonfinite-*.json")]
    assert sorted(noted) == skipped and saved(tmp_path / "run") == [24][: len(skipped) - 1]


@slow
@soak
@distributed
@pytest.mark.deepspeed
def test_a_rollback_helps_under_zero_as_well(begin, tmp_path: Path):
    pytest.importorskip("deepspeed")
    file = str(ROOT / "launchers/deepspeed/zero2.json")
    zero = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": file}
    begin("run", *ROLL, UNTIL, 48, ranks=2, faults={1: "poison loss_g 36 36"}, **zero).well()
    assert stats(tmp_path / "run")[-1]["skipped"] == 24 and saved(tmp_path / "run") == [24, 48]


def stopped(life: Ranks, out: Path, state: str) -> int:
    """Where every rank ended in good order."""
    for code, said in life.ended():
        assert code == PREEMPTED and "Traceback" not in said and "error" not in said, said
    assert read_status(out)["state"] == state and saved(out) == [read_status(out)["nimg"]]
    return read_status(out)["nimg"]


def test_a_file_stops_whom_it_is_meant_for_and_no_later_run(begin, tmp_path: Path):
    out = tmp_path / "run"
    life = begin("run", *ENDLESS)
    reached(out, 1)
    (out / "stop").touch()
    nimg = stopped(life, out, "stopped")
    (out / "stop").touch()  # nobody runs
    life = begin("run", *AUTO, *ENDLESS, "--train.keep", 1, SLURM_JOB_ID="7", SLURM_RESTART_COUNT="1")
    reached(out, nimg // 12 + 1)
    for other in ("7", "7.0", "7.2", "8.1", ".1", "17.1"):
        (out / f"stop.{other}").touch()
    time.sleep(3)  # it looks each second
    assert read_status(out)["state"] == "running"
    (out / "stop.7.1").touch()
    assert stopped(life, out, "preempted") > nimg


@distributed
@pytest.mark.parametrize(("number", "to"), [("SIGUSR1", [1]), pytest.param("SIGTERM", [0, 1] * 2, marks=slow)])
def test_signals_to_ranks_and_their_data_workers_are_one_orderly_stop(begin, tmp_path: Path, number: str, to: list):
    life = begin("run", *ENDLESS, "--data.workers", 1, ranks=2)
    reached(tmp_path / "run", 2)
    for rank in to:
        os.killpg(life.processes[rank].pid, signal.Signals[number])
        time.sleep(0.2)
    stopped(life, tmp_path / "run", "preempted")


def test_control_c_pressed_again_ends_at_once(begin, tmp_path: Path):
    life = begin("run", *ENDLESS, *EACH, faults={0: "sleep_for_ever 36"})
    wait_for("three checkpoints", lambda: newest_checkpoint(tmp_path / "run") == 36, 90)
    os.killpg(life.processes[0].pid, signal.SIGINT)
    time.sleep(2.5)
    assert life.processes[0].is_alive()  # it waits for the step
    os.killpg(life.processes[0].pid, signal.SIGINT)
    assert life.ended(15)[0][0] == 128 + signal.SIGINT and saved(tmp_path / "run") == [12, 24, 36]


@slow
@distributed
@pytest.mark.parametrize(
    ("how", "at", "bound"), [("sleep_for_ever", 24, 40), pytest.param("hold_pythons_lock", 0, 60, marks=soak)]
)
def test_a_rank_that_hangs_ends_all_and_says_where(begin, tmp_path: Path, how: str, at: int, bound: float):
    """The first step is given three times as long, and who holds Python's lock some grace."""
    life = begin("run", *ENDLESS, "--timeout", 10, ranks=2, faults={1: f"{how} {at}"})
    reached(tmp_path / "run", at // 12)
    began = time.monotonic()
    (waiting, _), (hanging, said) = life.ended(90)
    print(f"\n{how}: both ended after {time.monotonic() - began:.0f} s with {waiting} and {hanging}")
    assert time.monotonic() - began < bound and waiting in (HANG, LOST_RANK) and hanging > 0
    assert how in (tmp_path / "run/errors/stack-rank-1.txt").read_text()
    assert "Traceback" in (tmp_path / "run/errors/rank-0.txt").read_text() or waiting == HANG
    if at:  # who holds the lock can say nothing
        assert hanging == HANG and "(rank 1): no progress for" in said and "computing a step at image 24" in said


@slow
@distributed
def test_a_data_worker_that_hangs_is_named_and_does_not_outlive_its_rank(begin, tmp_path: Path):
    life = begin("run", *ENDLESS, "--timeout", 10, "--data.workers", 1, faults={0: "no_image 24"})
    reached(tmp_path / "run", 1)
    [worker] = psutil.Process(life.processes[0].pid).children()
    [(code, said)] = life.ended()
    assert code == HANG and "while reading images at image 24" in said
    assert psutil.wait_procs([worker], 15)[1] == []


@distributed
@pytest.mark.parametrize("dead", [0, pytest.param(1, marks=slow)])
def test_a_dead_rank_is_named_by_the_other(begin, tmp_path: Path, dead: int):
    life = begin("run", *ENDLESS, "--timeout", 10, ranks=2)
    reached(tmp_path / "run", 2)
    life.processes[dead].kill()
    began = time.monotonic()
    code, said = life.ended(60)[1 - dead]
    print(f"\nrank {dead} died: the other ended after {time.monotonic() - began:.0f} s of a timeout of 10")
    assert code == LOST_RANK and f"lost rank {dead} of 2 while " in said and "at image" in said


@slow
@distributed
def test_a_launcher_brings_a_dead_rank_back(manifest: Manifest, begin, tmp_path: Path):
    launch = ["accelerate.commands.launch", "--config_file", "launchers/accelerate/cpu.yaml", "--max_restarts", 1]
    words = [*SMALL, "--data", manifest.folder, "--out", tmp_path / "run", "--device", "cpu", *EACH, *AUTO, UNTIL, 60]
    command = [*map(str, [sys.executable, "-m", *launch, __file__, f"die 24 1 {tmp_path / 'note'}", *words])]
    environment = {key: value for key, value in os.environ.items() if key != "ACCELERATE_USE_CPU"}
    environment |= {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    begin("whole", *EACH, UNTIL, 60, ranks=2).well()
    assert same(tmp_path / "run", tmp_path / "whole", 12, 24, 36, 48, 60)
    killed = float((tmp_path / "note").read_text())
    took = min(entry["time"] for entry in stats(tmp_path / "run") if entry["time"] > killed) - killed
    print(f"\nfrom a kill to the next line of statistics: {took:.1f} s")
    assert took < 30


def test_auto_begins_goes_on_ends_and_refuses(begin, tmp_path: Path):
    out = tmp_path / "run"

    def auto(nimg: int) -> tuple[int, str]:
        return begin("run", *EACH, *AUTO, UNTIL, nimg).ended()[0]

    def everything() -> dict[Path, int]:
        return {file: file.stat().st_mtime_ns for file in out.glob("[cs]*/**/*")}

    assert [auto(12)[0], auto(24)[0], len(stats(out))] == [0, 0, 2]
    before = everything()
    assert auto(24)[0] == 0 and everything() == before  # it has ended already
    for folder in saved_checkpoints(out):
        (folder / "ema.safetensors").write_bytes(b"x")
    code, said = auto(36)
    assert [code, len(stats(out))] == [2, 2] and "none of the 2 checkpoints" in said
    shutil.rmtree(out / "checkpoints")  # as if it had ended before the first
    assert [auto(12)[0], [entry["nimg"] for entry in stats(out)]] == [0, [12]]
    shutil.rmtree(out)
    out.mkdir()
    (out / "other.txt").touch()
    assert auto(12)[0] == 2 and len([*out.iterdir()]) == 1
    (out / "other.txt").rename(out / ".status.json.0123456789abcdef")  # killed while it first wrote its status
    assert auto(12)[0] == 0


@distributed
@pytest.mark.parametrize(("fault", "said"), [("other_code", "rank 1 differs from rank 0 in the code"),
                                             ("wrong_sum", "the 2 ranks add up to")])  # fmt: skip
def test_ranks_that_compute_otherwise_are_refused_at_once(begin, tmp_path: Path, fault: str, said: str):
    began = time.monotonic()
    ended = begin("run", *ENDLESS, ranks=2, faults={1: fault}).ended()
    assert [code for code, _ in ended] == [2, 2] and [len(text.splitlines()) for _, text in ended] == [1, 1]
    assert said in ended[1][1] and not (tmp_path / "run").exists()
    assert time.monotonic() - began < 30  # forks and all; far from the timeout of 60


@slow
@distributed
def test_no_kill_loses_a_checkpoint_or_changes_the_run(begin, tmp_path: Path):
    """Of kills while saving only those count that left a half-written folder behind."""
    in_training, while_saving = map(int, os.environ.get("SEGA_DIST_KILLS", "2 3").split())
    left, lives = ["training"] * in_training + ["saving"] * while_saving, 0
    words, out = ("--train.checkpoint-kimg", 0.024, "--train.keep", 2, *AUTO), tmp_path / "run"
    chance = random.Random(1)
    chance.shuffle(left)
    while left and (lives := lives + 1) < 10 + 4 * (in_training + while_saving):
        old, steps = set(out.glob("checkpoints/.*")), len(stats(out)) if lives > 1 else 0
        life = begin("run", *words, *ENDLESS)
        reached(out, steps + 1)
        end = time.monotonic() + 60
        while left[-1] == "saving" and not set(out.glob("checkpoints/.*")) - old and time.monotonic() < end:
            time.sleep(0.0005)
        time.sleep(chance.uniform(0, 1.0 if left[-1] == "training" else 0.01))
        stood = saved_checkpoints(out)[-1:]
        life.processes[0].kill()
        assert life.ended()[0][0] == -signal.SIGKILL and all(read_checkpoint(folder) for folder in stood)
        if left[-1] == "training" or any(out.glob("checkpoints/.*")):
            left.pop()
    last = newest_checkpoint(out) + 24
    begin("run", *words, UNTIL, last).well()
    begin("alone", *words, UNTIL, last).well()
    print(f"\n{in_training} kills in training, {while_saving} in a save, {lives} lives, {last // 12} steps: none lost")
    assert same(out, tmp_path / "alone", last) and not left


def test_looking_on_costs_less_than_a_hundredth(manifest: Manifest, tmp_path: Path):
    """Of a step of this tiny network; of a real one far less."""
    config, world = train.resolve([*SMALL])[1], World("fp32", "cpu")
    with Training(world, config, manifest, tmp_path / "run", Options(), None) as training:
        batch = next(Batches(manifest, config, world, 0))

        def check() -> None:
            for what in ("reading images", "waiting for the other ranks", "computing a step", "gathering statistics"):
                training._enter(what)
            training._asked_to_stop()

        def look() -> None:  # what the watchdog does each second, and the sign of life of each fifth
            training.owner.signed = 0
            training._each_second()
            faulthandler.dump_traceback_later(100, file=training.watchdog.stacks)

        step = min(timeit.repeat(lambda: training.players.step(batch, 0, False), number=1, repeat=5))
        a_step, a_second = (min(timeit.repeat(act, number=1, repeat=99)) for act in (check, look))
    world.close()
    share = a_step / step + a_second
    print(f"\n{a_step * 1e6:.0f} us a step of {step * 1e3:.0f} ms, {a_second * 1e6:.0f} us a second: {share:.3%}")
    assert share < 0.01


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])


@pytest.mark.parametrize("ranks", [2, 24, 200, 1024])
def test_the_known_sum_is_exact_for_any_number_of_ranks(ranks: int, monkeypatch: pytest.MonkeyPatch):
    """As a backend adds, one rank after the other, in the dtype that it is given."""
    world = World("fp32", "cpu")

    def add(_: World, mine: torch.Tensor) -> torch.Tensor:
        first = torch.tensor([0.0, 0.0], dtype=mine.dtype)
        for rank in range(ranks):
            first = first + torch.tensor([rank + 1.0, 2.0 ** (rank % 24)], dtype=mine.dtype)
        return first

    monkeypatch.setattr(World, "sum_of", add)
    monkeypatch.setattr(World, "total", lambda *_: ranks * (ranks + 1) // 2)
    monkeypatch.setattr(World, "most", lambda _, number: number)
    world.size = ranks
    world.prove()
