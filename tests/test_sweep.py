"""A list of runs: shared out, skipped, gone on with, stopped. Most runs here are small programs that act as one."""

import functools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, SMALL
from rich.console import Console
from test_launchers import wait_for
from test_train import equal, losses, stats

from sega_dist import preemption, runs, sweep
from sega_dist.arguments import split
from sega_dist.config import differences, flat, shortened, to_dict
from sega_dist.data.shards import Manifest
from sega_dist.errors import PREEMPTED, UserError
from sega_dist.owner import Owner, read_status
from sega_dist.presets import PRESETS, preset

FEW = SMALL[2:]  # without --preset
TWO = ["--presets", "tiny_x4", "wide_x4", "--seeds", "0", "1"]
NAMES = ["tiny_x4-s0", "wide_x4-s0", "tiny_x4-s1", "wide_x4-s1"]
KIMG = ("content_warmup_kimg", "ema_kimg", "tick_kimg", "grid_kimg", "checkpoint_kimg")

# What stands for a run: arguments are its folder, its length and its action.
RUN = """
import json, os, pathlib, signal, sys, time
run, images, action = pathlib.Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
with run.with_name(run.name + ".lives").open("a") as file:
    print(os.getpid(), os.environ.get("CUDA_VISIBLE_DEVICES"), file=file)
def end(state, code, nimg):
    run.mkdir(exist_ok=True)
    (run / "status.json").write_text(json.dumps({"state": state, "code": code, "nimg": nimg, "token": os.getpid()}))
def asked(*_):
    end("preempted", 85, 12), sys.exit(85)
print("begun", file=sys.stderr)
if action == "obey":
    signal.signal(signal.SIGTERM, asked)
    end("running", None, 0)
    while not (run / "stop").exists():
        time.sleep(0.01)
    end("stopped", 85, 12), sys.exit(85)
if action == "launched":  # the launcher says 1
    end("preempted", 85, 12), sys.exit(1)
if action == "fail":
    print("error: no luck", file=sys.stderr), sys.exit(65)
if action == "die":
    print("last word", file=sys.stderr, flush=True), os.kill(os.getpid(), 9)
if action == "wait":
    time.sleep(0.5)
(run / "snapshots").mkdir(exist_ok=True, parents=True)
(run / "stats.jsonl").write_text(json.dumps({"nimg": images, "images_per_s": 2.0, "preview_psnr": 21.5}) + "\\n")
if action != "bare":
    (run / f"snapshots/snapshot-{images:012d}.safetensors").touch()
end("done", 0, images)
"""


@pytest.fixture(autouse=True)
def two_presets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "wide_x4", PRESETS["tiny_x4"])


@pytest.fixture
def act(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What the run of a name does instead of training."""
    actions: dict[str, str] = {}

    def stand_in(words: list[str], *_: object) -> list[str]:
        out, images = words[words.index("--out") + 1], words[::-1][words[::-1].index("--train.images") - 1]
        return [sys.executable, "-c", RUN, out, images, actions.get(Path(out).name, "")]

    monkeypatch.setattr(sweep, "training", stand_in)
    monkeypatch.setattr(sweep, "POLL", 0.02)
    return actions


@pytest.fixture(autouse=True)
def concluded(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """With what compare and report were called, after runs that made nothing to compare."""
    calls: list[list[str]] = []
    monkeypatch.setattr(sweep.compare, "main", lambda words: calls.append(["compare", *words]))
    monkeypatch.setattr(sweep.report, "main", lambda words: calls.append(["report", *words]))
    return calls


@pytest.fixture
def words(manifest: Manifest, tmp_path: Path) -> list[str]:
    rest = ["--train.images", "48", "--data", str(manifest.folder), "--device", "cpu"]
    return [str(tmp_path / "out"), *TWO, *FEW, *rest]


def lives(out: Path) -> dict[str, list[list[str]]]:
    """Of each run that began: process and GPUs."""
    return {file.stem: [line.split() for line in file.read_text().splitlines()] for file in out.glob("*.lives")}


def shown(out: Path, name: str = "sweep.json") -> dict[str, str]:
    return {row["run"]: row["state"] for row in json.loads((out / name).read_text())["runs"]}


def listed(words: list[str]) -> list[runs.Run]:
    ours, theirs = split(sweep.Sweep, words[1:])
    return sweep.listed(sweep.parse(sweep.Sweep, [words[0], *ours], "sweep"), theirs)[0]


def refused(words: list[str], code: int = 2) -> str:
    with pytest.raises(UserError) as caught:
        sweep.main(words)
    assert caught.value.code == code
    return str(caught.value)


# What is to be trained ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sega_x4", "tiny_x4"])
@pytest.mark.parametrize("images", [1, 48, 7_777, 10_000_000])
def test_a_shortened_schedule_keeps_its_proportions(name: str, images: int):
    whole = preset(name)
    short = shortened(whole, images)
    assert short.train.images == images
    for key in KIMG:
        one, other = getattr(whole.train, key), getattr(short.train, key)
        assert other == pytest.approx(one * images / whole.train.images, rel=1e-5)  # rounded to six digits
        assert (other > 0) == (one > 0)
    before, after = flat(to_dict(whole)), flat(to_dict(short))
    changed = {key.removeprefix("train.") for key in before if before[key] != after[key]}
    assert changed <= {"images", *KIMG}
    assert shortened(whole, whole.train.images) == whole
    assert whole == preset(name)


def test_no_length_is_refused():
    with pytest.raises(UserError, match=r"train\.images is 0"):
        shortened(preset("tiny_x4"), 0)


def test_images_set_the_schedule_but_for_what_a_person_gave(manifest: Manifest, tmp_path: Path):
    size = ["--data.size", "64", "--data", str(manifest.folder)]
    [run] = listed([str(tmp_path / "o"), "--presets", "tiny_x4", "--images", "860", "--train.tick-kimg", "0.3", *size])
    train = run.config.train
    assert (train.images, train.content_warmup_kimg, train.ema_kimg, train.checkpoint_kimg) == (860, 0.82, 0.03, 0.43)
    assert (train.tick_kimg, train.grid_kimg) == (0.3, 0.2)
    assert not differences(run.config, sweep.resolve(run.command[run.command.index("--preset") :][:-2])[1])
    [run] = listed([str(tmp_path / "o"), "--presets", "tiny_x4", *size])
    assert run.config.train.images == preset("tiny_x4").train.images


def test_after_the_first_seed_every_preset_has_a_run(words: list[str], tmp_path: Path):
    found = listed(words)
    assert [run.folder for run in found] == [tmp_path / "out" / name for name in NAMES]
    assert [run.config.train.seed for run in found] == [0, 0, 1, 1]
    assert [run.command[1:3] for run in found] == [["-m", "sega_dist.train"]] * 4
    assert all(run.command[-2:] == ["--resume", "auto"] for run in found)


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 5])
def test_parts_share_out_the_list(act: dict, words: list[str], tmp_path: Path, parts: int):
    for part in reversed(range(parts)):
        sweep.main([*words, "--part", f"{part}/{parts}"])
    assert {name: len(each) for name, each in lives(tmp_path / "out").items()} == dict.fromkeys(NAMES, 1)
    files = [f"sweep-{part}-of-{parts}.json" for part in range(parts)] if parts > 1 else ["sweep.json"]
    told = [name for file in files for name in shown(tmp_path / "out", file)]
    assert sorted(told) == sorted(NAMES) and sorted(f.name for f in (tmp_path / "out").glob("*.json")) == sorted(files)


def test_several_processes_are_started_by_a_launcher(words: list[str]):
    command = listed([*words, "--processes", "2"])[0].command
    assert command[1:3] == ["-m", "accelerate.commands.launch"]
    assert command[3:9] == ["--config_file", command[4], "--num_processes", "2", "-m", "sega_dist.train"]
    assert Path(command[4]).name == "cpu.yaml"
    assert Path(listed([*words, "--engine", "zero2"])[0].command[4]).name == "zero2.yaml"


def test_an_option_takes_its_values_and_no_more():
    words = "--seeds 0 1 --data S --dry-run --train.images 5 --part=1/2 x --images 4 y --presets a b"
    ours, theirs = split(sweep.Sweep, shlex.split(words))
    assert shlex.join(ours) == "--seeds 0 1 --dry-run --part=1/2 --images 4 --presets a b"
    assert shlex.join(theirs) == "--data S --train.images 5 x y"


# What is refused before anything starts -----------------------------------------------------------------------------


@pytest.mark.parametrize(("more", "complaint"), [
    (["--presets"], "--presets is empty"), (["--seeds"], "--seeds is empty"),
    (["--presets", "tiny_x4", "wide_x4", "tiny_x4"], "none of them twice"),
    (["--seeds", "3", "3"], "none of them twice"),
    (["--presets", "tiny_x4", "tiny_x5"], "unknown preset 'tiny_x5'; did you mean tiny_x4?"),
    (["--seeds", "0", "-1"], "-1"), (["--seeds", "one"], "seeds"),
    (["--part", "2/2"], "write K/N"), (["--part", "1"], "write K/N"), (["--part", "0/0"], "write K/N"),
    (["--part", "-1/2"], "write K/N"),
    (["--images", "-5"], "--images"), (["--jobs", "0"], "--jobs"), (["--processes", "0"], "--processes"),
    (["--processes", "5"], "does not divide by 5"), (["--engine", "cpus"], "'cpus'"),
    (["--train.imagess", "5"], "did you mean --train.images?"), (["--data.size", "128"], "shard with --size 128"),
    (["--out", "x"], "--out"), (["--resume=latest"], "--resume"), (["--train.seed", "3"], "--train.seed"),
    (["--preset", "tiny_x4"], "--preset"), (["--data", "nowhere"], "nowhere"),
], ids=lambda value: value if isinstance(value, str) else " ".join(value))  # fmt: skip
def test_bad_input_is_one_line_and_nothing_begins(act: dict, words: list[str], tmp_path: Path, more: list[str],
                                                  complaint: str):  # fmt: skip
    said = refused([*words, *more])
    assert complaint in said and "\n" not in said
    assert not (tmp_path / "out").exists()


def test_a_file_is_no_folder_for_runs(act: dict, words: list[str], tmp_path: Path):
    (tmp_path / "out").touch()
    assert "not a folder" in refused(words)
    assert "OUT" in refused([])
    assert "needs --data" in refused([str(tmp_path / "new"), "--presets", "tiny_x4"])


def test_a_run_that_was_begun_otherwise_is_named_with_its_keys(act: dict, words: list[str], tmp_path: Path):
    sweep.main(words)
    last = tmp_path / "out" / NAMES[-1]
    (last / "config.json").write_text(json.dumps(to_dict(listed(words)[-1].config)))
    changed = ["--generator.channels", "12", "--train.learning-rate", "0.5", "--train.tick-kimg", "9"]
    said = refused([*words, *changed])
    assert NAMES[-1] in said and "generator.channels: 8 -> 12; train.learning_rate: 0.001 -> 0.5;" in said
    assert "tick_kimg" not in said  # free to change
    sweep.main([*words, "--train.tick-kimg", "9"])
    assert {len(each) for each in lives(tmp_path / "out").values()} == {1}


def test_a_run_on_other_images_is_refused_done_or_not(act: dict, words: list[str], tmp_path: Path):
    sweep.main(words)
    folder = tmp_path / "out" / NAMES[1] / "checkpoints/000000000048"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(json.dumps({"data": "another"}))
    assert "data set: another -> " in refused(words)
    (folder / "state.json").write_text("no JSON")  # for train to judge
    sweep.main(words)


def test_a_folder_that_is_no_run_is_left_alone(act: dict, words: list[str], tmp_path: Path):
    mine = tmp_path / "out" / NAMES[2] / "mine"
    mine.parent.mkdir(parents=True)
    mine.touch()
    assert "is not an empty folder" in refused(words)
    assert list((tmp_path / "out").rglob("*")) == [mine.parent, mine]


def test_a_dry_run_lists_and_writes_nothing(act: dict, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture):
    sweep.main([*words, "--dry-run"])
    said = capsys.readouterr().out
    assert [name for name in NAMES if name in said] == NAMES and said.count("waiting") == 4
    assert not (tmp_path / "out").exists()
    sweep.main([*words, "--seeds", "1"])
    capsys.readouterr()
    sweep.main([*words, "--dry-run", "--part", "1/2"])
    said = capsys.readouterr().out
    assert said.count("waiting") == 1 and said.count("done") == 1 and "tiny_x4" not in said


# What becomes of runs -----------------------------------------------------------------------------------------------


def test_done_is_skipped_and_what_is_not_quite_done_is_not(act: dict, words: list[str], tmp_path: Path):
    out = tmp_path / "out"
    sweep.main(words)
    assert shown(out) == dict.fromkeys(NAMES, "done") and (read_status(out, "sweep.json") or {})["state"] == "done"
    row = json.loads((out / "sweep.json").read_text())["runs"][0]
    assert (row["nimg"], row["seconds"], row["preview_psnr"]) == (48, 24.0, 21.5)
    next((out / NAMES[0] / "snapshots").iterdir()).unlink()
    (out / NAMES[1] / "status.json").unlink()
    status = json.loads((out / NAMES[2] / "status.json").read_text())
    (out / NAMES[2] / "status.json").write_text(json.dumps(status | {"state": "stopped"}))
    (out / NAMES[1] / "checkpoints/000000000012").mkdir(parents=True)  # begun, though its status is gone
    sweep.main(words)
    assert [len(lives(out)[name]) for name in NAMES] == [2, 2, 2, 1]
    sweep.main([*words, "--train.images", "49"])  # longer than what is done
    assert [len(lives(out)[name]) for name in NAMES] == [3, 3, 3, 2]


@pytest.mark.parametrize("status", ["[]", '{"state": "done"}', '{"state": "done", "nimg": "99"}', "{"])
def test_a_status_that_makes_no_sense_is_not_done(act: dict, words: list[str], tmp_path: Path, status: str):
    sweep.main(words)
    (tmp_path / "out" / NAMES[0] / "status.json").write_text(status)
    assert [run.state for run in listed(words)] == ["waiting", "done", "done", "done"]


def test_what_fails_does_not_hold_up_the_others(act: dict, words: list[str], tmp_path: Path,
                                                capsys: pytest.CaptureFixture):  # fmt: skip
    act |= {NAMES[0]: "fail", NAMES[2]: "die", NAMES[3]: "bare"}
    assert refused(words, 1).startswith("3 of 4 runs failed")
    said = " ".join(capsys.readouterr().err.split())
    assert f"{NAMES[0]} with 65: error: no luck; see" in said and f"{NAMES[2]} with -9: last word; see" in said
    assert f"{NAMES[3]} with 0: begun; see" in said  # it says that it is done, and has no snapshot
    assert list(shown(tmp_path / "out").values()) == ["failed", "done", "failed", "failed"]
    assert (read_status(tmp_path / "out", "sweep.json") or {})["state"] == "failed"
    log = tmp_path / "out" / f"{NAMES[0]}.log"
    assert log.read_text() == "begun\nerror: no luck\n"
    act.clear()
    sweep.main(words)
    assert [len(lives(tmp_path / "out")[name]) for name in NAMES] == [2, 1, 2, 2]
    assert log.read_text() == "begun\nerror: no luck\nbegun\n"


def test_a_run_that_was_preempted_ends_the_sweep(act: dict, words: list[str], tmp_path: Path):
    act[NAMES[1]] = "launched"
    with pytest.raises(SystemExit) as end:
        sweep.main(words)
    assert end.value.code == PREEMPTED
    assert list(shown(tmp_path / "out").values()) == ["done", "preempted", "waiting", "waiting"]
    assert list(lives(tmp_path / "out")) and len(lives(tmp_path / "out")) == 2
    assert (read_status(tmp_path / "out", "sweep.json") or {})["state"] == "preempted"
    act.clear()
    sweep.main(words)
    assert set(shown(tmp_path / "out").values()) == {"done"}


def test_beside_one_that_was_preempted_the_others_stop_and_none_begins(act: dict, words: list[str], tmp_path: Path):
    act |= {NAMES[0]: "obey", NAMES[1]: "launched"}
    with pytest.raises(SystemExit) as end:
        sweep.main([*words, "--jobs", "2"])
    assert end.value.code == PREEMPTED
    assert list(shown(tmp_path / "out").values()) == ["stopped", "preempted", "waiting", "waiting"]
    assert set(lives(tmp_path / "out")) == set(NAMES[:2])


def test_what_an_earlier_life_left_is_not_this_lifes(act: dict, words: list[str], tmp_path: Path):
    """A process that dies before it writes its status leaves that of the life before."""
    act[NAMES[0]] = "launched"
    with pytest.raises(SystemExit):
        sweep.main(words)
    act[NAMES[0]] = "fail"
    assert "1 of 4" in refused(words, 1)
    act[NAMES[0]] = "die"
    refused(words, 1)
    rows = json.loads((tmp_path / "out/sweep.json").read_text())["runs"]
    assert (rows[0]["code"], rows[0]["message"]) == (-9, "last word")  # not the error of the life before


@pytest.fixture
def later() -> Iterator[Callable]:
    """Act in a thread as soon as something holds; whatever goes wrong there fails the test."""
    threads, wrong = [], []

    def start(holds: Callable[[], bool], action: Callable[[], object]) -> None:
        def work() -> None:
            end = time.monotonic() + 20
            while not holds():
                if time.monotonic() > end:
                    wrong.append("it never came to that")
                    os.kill(os.getpid(), signal.SIGTERM)
                    return
                time.sleep(0.02)
            action()

        threads.append(threading.Thread(target=work))
        threads[-1].start()

    yield start
    for thread in threads:
        thread.join(25)
    assert not wrong


@pytest.mark.parametrize(("what", "state"), [("SIGINT", "stopped"), ("SIGTERM", "preempted"), ("SIGUSR1", "preempted"),
                                             ("stop", "stopped"), ("stop..0", "preempted")])  # fmt: skip
def test_a_request_reaches_the_run_and_the_sweep_ends(act: dict, words: list[str], tmp_path: Path, later: Callable,
                                                      monkeypatch: pytest.MonkeyPatch, what: str,
                                                      state: str):  # fmt: skip
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    out, act[NAMES[1]] = tmp_path / "out", "obey"
    request = (out / what).touch if what.startswith("stop") else lambda: os.kill(os.getpid(), getattr(signal, what))
    later((out / f"{NAMES[1]}.lives").exists, request)
    with pytest.raises(SystemExit) as end:
        sweep.main(words)
    assert end.value.code == PREEMPTED
    assert list(shown(out).values()) == ["done", "stopped", "waiting", "waiting"]
    assert (read_status(out, "sweep.json") or {})["state"] == state
    assert (read_status(out / NAMES[1]) or {})["code"] == PREEMPTED


def test_who_has_not_begun_is_interrupted_not_failed(act: dict, words: list[str], tmp_path: Path, later: Callable):
    """A job's signal reaches all its processes, and ends those that still import; the last run of the list, too."""
    out, act[NAMES[3]] = tmp_path / "out", "obey"

    def end_all() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(int(lives(out)[NAMES[3]][0][0]), signal.SIGKILL)

    later((out / f"{NAMES[3]}.lives").exists, end_all)
    with pytest.raises(SystemExit) as end:
        sweep.main(words)
    assert end.value.code == PREEMPTED and shown(out)[NAMES[3]] == "preempted"


def test_ctrl_c_twice_does_not_wait(act: dict, words: list[str], tmp_path: Path, later: Callable,
                                    monkeypatch: pytest.MonkeyPatch):  # fmt: skip
    """The run is left to save by itself."""
    monkeypatch.setattr(preemption, "TWICE", 0.1)
    monkeypatch.setattr(runs.Run, "ask_to_stop", lambda run: None)
    out, act[NAMES[0]] = tmp_path / "out", "obey"

    def ask() -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.3)

    later((out / NAMES[0] / "status.json").exists, ask)
    with pytest.raises(KeyboardInterrupt):
        sweep.main(words)
    wait_for("the run", lambda: (read_status(out / NAMES[0]) or {}).get("code") == PREEMPTED, 10)
    assert set(lives(out)) == {NAMES[0]}


def test_a_request_for_an_earlier_sweep_is_none(act: dict, words: list[str], tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/stop").touch()
    sweep.main(words)
    assert set(shown(tmp_path / "out").values()) == {"done"}


def test_one_sweep_at_a_time_writes_a_file(act: dict, words: list[str], tmp_path: Path):
    Owner(tmp_path / "out", "sweep.json").take()  # by this process, which lives
    assert "is being written by process" in refused(words)
    assert not lives(tmp_path / "out")
    sweep.main([*words, "--part", "0/2"])
    assert len(lives(tmp_path / "out")) == 2


def test_some_at_a_time_share_the_gpus(act: dict, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [sweep._shares(jobs) for jobs in (1, 2, 4)] == [[""], ["0,2", "1"], ["0", "1", "2", "0"]]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-7,9")
    assert sweep._shares(2) == ["5,9", "GPU-7"]
    show, at_once = runs.Board.show, []

    def count(board: runs.Board) -> None:
        at_once.append([run.state for run in board.runs].count("training"))
        show(board)

    monkeypatch.setattr(runs.Board, "show", count)
    act |= dict.fromkeys(NAMES, "wait")
    sweep.main([*words, "--jobs", "3"])
    assert max(at_once) == 3 and at_once[-1] == 0
    assert {each[0][1] for each in lives(tmp_path / "out").values()} == {"5", "GPU-7", "9"}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert sweep._shares(2) == ["", ""]


def test_a_terminal_gets_a_table(act: dict, words: list[str], monkeypatch: pytest.MonkeyPatch,
                                 capsys: pytest.CaptureFixture):  # fmt: skip
    monkeypatch.setattr(runs, "Console", functools.partial(Console, force_terminal=True, width=100))
    act[NAMES[0]] = "wait"
    sweep.main([*words, "--presets", "tiny_x4", "--seeds", "0"])
    said = capsys.readouterr().err
    assert "┃" in said and "training" in said


# What comes after all of them -----------------------------------------------------------------------------------------


def test_what_is_done_is_compared_and_shown(act: dict, words: list[str], concluded: list[list[str]], tmp_path: Path):
    out = tmp_path / "out"
    sweep.main(words)
    data = words[words.index("--data") + 1]
    assert concluded == [
        ["compare", *(f"{name[:7]}={out / name}" for name in NAMES), "--data", data, "--out", str(out / "comparison"),
         "--device", "cpu"],
        ["report", *(str(out / name) for name in NAMES), "--comparison", str(out / "comparison"), "--out",
         str(out / "report.html")],
    ]  # fmt: skip
    concluded.clear()
    sweep.main([*words, "--no-compare"])
    assert not concluded


def test_face_gans_are_shown_and_not_compared(act: dict, words: list[str], concluded: list[list[str]], tmp_path: Path,
                                              monkeypatch: pytest.MonkeyPatch,
                                              capsys: pytest.CaptureFixture):  # fmt: skip
    monkeypatch.setitem(PRESETS, "face", PRESETS["facegan_64"])
    out, rest = tmp_path / "out", words[1 + len(TWO) :]
    sweep.main([str(out), "--presets", "face", "tiny_x4", *rest])
    data = words[words.index("--data") + 1]
    both = [str(out / name) for name in ("face-s0", "tiny_x4-s0")]
    assert concluded == [
        ["compare", f"tiny_x4={both[1]}", "--data", data, "--out", str(out / "comparison"), "--device", "cpu"],
        ["report", *both, "--comparison", str(out / "comparison"), "--out", str(out / "report.html")],
    ]
    concluded.clear()
    sweep.main([str(out), "--presets", "face", *rest])
    assert concluded == [["report", both[0], "--out", str(out / "report.html")]]
    sweep.main([str(out), "--presets", "face", *rest, "--no-compare"])
    assert "sega-dist compare" not in capsys.readouterr().out


def test_only_when_all_are_done(act: dict, words: list[str], concluded: list[list[str]]):
    act[NAMES[3]] = "fail"
    refused(words, 1)
    assert not concluded
    act.clear()
    sweep.main(words)
    assert len(concluded) == 2


def test_the_last_part_compares(act: dict, words: list[str], concluded: list[list[str]]):
    sweep.main([*words, "--part", "1/2"])
    assert not concluded
    sweep.main([*words, "--part", "0/2"])
    assert [call[0] for call in concluded] == ["compare", "report"] and len(concluded[1]) == 9


def without_test(manifest: Manifest, folder: Path) -> Path:
    """The same images, none of them for testing."""
    shutil.copytree(manifest.folder, folder, dirs_exist_ok=True)
    file = folder / "manifest.json"
    file.write_text(file.read_text().replace('"test"', '"val"'))
    return folder


def test_on_whose_test_side(act: dict, words: list[str], concluded: list[list[str]], manifest: Manifest,
                            capsys: pytest.CaptureFixture):  # fmt: skip
    other = shutil.copytree(manifest.folder, Path(words[0]).with_name("other"))
    sweep.main([*words, "--test", str(other)])
    assert concluded[0][concluded[0].index("--data") + 1] == str(other)
    concluded.clear()
    sweep.main([str(Path(words[0]).with_name("alone")), *words[1:], "--data", str(without_test(manifest, other))])
    assert not concluded and "next: sega-dist compare" in capsys.readouterr().out


def test_what_would_fail_at_the_end_is_refused_at_the_beginning(act: dict, words: list[str], manifest: Manifest,
                                                                tmp_path: Path):  # fmt: skip
    small = shutil.copytree(manifest.folder, tmp_path / "small")
    for file in small.glob("manifest.json"):
        file.write_text(file.read_text().replace('"size": 64', '"size": 32'))
    bare = without_test(manifest, tmp_path / "bare")
    for more, said in [
        (["--test", str(tmp_path / "none")], "none"), (["--test", str(small)], "images of 32 pixels"),
        (["--niqe", str(tmp_path / "none.npz")], "64 pixels"), (["--test", str(bare)], "no split 'test'"),
        (["--lpips-weights", str(tmp_path / "none.pth")], "none.pth"),
    ]:  # fmt: skip
        assert said in refused([*words, *more])
    assert not (tmp_path / "out").exists()


def test_names_are_the_literatures_where_they_are_one_presets(act: dict, words: list[str],
                                                              monkeypatch: pytest.MonkeyPatch):  # fmt: skip
    monkeypatch.setitem(PRESETS, "deep_x4", PRESETS["srcnn_x4"])
    presets = ["tiny_x4", "srcnn_x4", "deep_x4", "vdsr_x4", "srcnn_x8"]
    found = listed([words[0], "--presets", *presets, "--seeds", "0", "1", *words[1 + len(TWO) :]])
    assert sweep.names(found) == 2 * ["tiny_x4", "srcnn_x4", "deep_x4", "VDSR", "SRCNN"]


# Whole runs ---------------------------------------------------------------------------------------------------------


def start(*words: object) -> subprocess.Popen[str]:
    environment = {key: value for key, value in os.environ.items() if key != "ACCELERATE_USE_CPU"}
    return subprocess.Popen(
        [sys.executable, "-m", "sega_dist", "sweep", *map(str, words)], env=environment | {"OMP_NUM_THREADS": "1"},
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def ended(process: subprocess.Popen[str], seconds: float = 180) -> SimpleNamespace:
    try:
        said = process.communicate(timeout=seconds)[0]
    finally:
        if process.poll() is None:  # it lets its runs save
            process.terminate()
    return SimpleNamespace(code=process.returncode, said=said)


def steps(run: Path) -> int:
    return len(stats(run)) if (run / "stats.jsonl").exists() else 0


def real(manifest: Manifest, images: int = 360) -> list[object]:
    """Thirty steps, three seconds."""
    return ["--presets", "tiny_x4", *FEW, "--train.images", images, "--data", manifest.folder, "--device", "cpu"]


@pytest.mark.slow
@pytest.mark.soak
def test_a_sweep_that_is_terminated_goes_on_to_the_same_bits(manifest: Manifest, tmp_path: Path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    words = [*real(manifest), "--seeds", 0, 1]
    undisturbed = ended(start(whole, *words, "--jobs", 2))
    assert undisturbed.code == 0, undisturbed.said
    process = start(broken, *words)
    wait_for("the run", lambda: steps(broken / "tiny_x4-s0") >= 5, 60)
    process.send_signal(signal.SIGTERM)
    stopped = ended(process)
    assert stopped.code == PREEMPTED, stopped.said
    status = read_status(broken / "tiny_x4-s0") or {}
    assert status["code"] == PREEMPTED and 60 <= status["nimg"] < 360 and not (broken / "tiny_x4-s1").exists()
    again = ended(start(broken, *words))
    assert again.code == 0, again.said
    for name in ("tiny_x4-s0", "tiny_x4-s1"):
        assert losses(whole / name) == losses(broken / name) and len(stats(whole / name)) == 30
        assert equal(whole / name, broken / name)
    assert not equal(whole / "tiny_x4-s0", whole / "tiny_x4-s1")
    both = [(out / "comparison/comparison.json").read_bytes() for out in (whole, broken)]
    assert both[0] == both[1] and json.loads(both[0])["rows"][-1]["seeds"] == 2
    assert (broken / "comparison/fig4-x4.png").is_file() and "tiny_x4-s1" in (broken / "report.html").read_text()
    skipped = ended(start(broken, *words))
    assert skipped.code == 0 and skipped.said.count("done") == 4 and ": training" not in skipped.said


@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.distributed
def test_a_request_goes_through_the_launcher(manifest: Manifest, tmp_path: Path):
    """Which hands on no signal without ending its processes half a minute later, and hides their exit code."""
    out, words = tmp_path / "out", [*real(manifest), "--processes", 2]
    process = start(out, *words)
    wait_for("the run", lambda: steps(out / "tiny_x4-s0") >= 2, 90)
    process.send_signal(signal.SIGUSR1)
    stopped = ended(process)
    assert stopped.code == PREEMPTED, stopped.said
    status = read_status(out / "tiny_x4-s0") or {}
    assert (status["state"], status["code"]) == ("stopped", PREEMPTED) and status["nimg"] < 360
    again = ended(start(out, *words))
    assert again.code == 0, again.said
    assert json.loads((out / "tiny_x4-s0/environment.json").read_text())["processes"] == 2


@pytest.mark.slow
@pytest.mark.distributed
def test_a_failure_below_a_launcher_is_told_in_its_own_words(manifest: Manifest, tmp_path: Path):
    words = [*real(manifest), "--processes", 2, "--train.learning-rate", "1e30"]
    failed = ended(start(tmp_path / "out", *words))
    assert failed.code == 1 and " with 71: error" in failed.said and "is not finite" in failed.said, failed.said
