"""A real SLURM on the loopback runs launchers/slurm as they stand: fake GPUs, real preemption, lost nodes."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from cluster import Cluster, cluster, missing, until
from conftest import ROOT, SMALL
from safetensors.torch import load_file

from sega_dist import train
from sega_dist.data.shards import Manifest
from sega_dist.errors import UserError
from sega_dist.resume import _distance, _losses
from sega_dist.slurm import Slurm, script

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.distributed]
SCRIPTS = sorted((ROOT / "launchers/slurm").glob("*.sbatch"))
SHARED = ROOT / "launchers/slurm/requeue.sh"
ODD = "a b;c 'd' \"e\" $(touch hacked) `touch hacked`\n#SBATCH --nodes=9"
LONG = ["--train.images", "120000"]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if missing():
        pytest.skip(missing())
    with cluster(tmp_path_factory.mktemp("slurm") / "c") as running:
        (running.work / "launchers").symlink_to(ROOT / "launchers")  # jobs are submitted from the repository's root
        yield running
        folder = str(running.folder)
    left = [process.pid for process in psutil.process_iter() if folder in " ".join(_words(process))]
    assert not left, f"processes left behind: {left}"


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


@pytest.fixture
def of_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What sbatch hands on to jobs."""
    monkeypatch.setenv("PYTHON", sys.executable)
    monkeypatch.setenv("PROCESSES", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)


def words(manifest: Manifest, *more: object) -> list[str]:
    return [*SMALL, "--train.precision", "fp64", "--train.ema-kimg", "0", "--data", str(manifest.folder),
            "--device", "cpu", "--timeout", "60", *map(str, more)]  # fmt: skip


def submit(slurm: Cluster, run: Path, *options: str, given: list[str], nodes: int = 2,
           file: Path = ROOT / "launchers/slurm/train.sbatch") -> int:  # fmt: skip
    size = [f"--nodes={nodes}", "--gpus-per-node=2", "--cpus-per-task=2", "--time=10"]
    return int(slurm.run("sbatch", "--parsable", *size, *options, str(file), str(run), *given))


def status(run: Path) -> dict:
    file = run / "status.json"
    return json.loads(file.read_text()) if file.exists() else {}


def steps(run: Path) -> int:
    file = run / "stats.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


def begun(slurm: Cluster, job: int, run: Path, least: int = 2) -> None:
    def complaint() -> str:
        log = Path(slurm.job(job)["StdOut"])
        return f"no step of {run}: " + (log.read_text()[-2000:] if log.is_file() else slurm.job(job)["JobState"])

    until(lambda: steps(run) >= least, 90, complaint)


def log_of(slurm: Cluster, job: int) -> str:
    return Path(slurm.job(job)["StdOut"]).read_text()


def same_weights(one: Path, two: Path, nimg: int) -> bool:
    folders = [run / f"checkpoints/{nimg:012d}" for run in (one, two)]
    files = [{file.name: load_file(file) for file in folder.glob("*.safetensors")} for folder in folders]
    assert files[0] and files[0].keys() == files[1].keys()
    return all(files[0][file][name].equal(files[1][file][name]) for file in files[0] for name in files[0][file])


# What needs no cluster ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", [*SCRIPTS, SHARED], ids=lambda file: file.name)
def test_scripts_are_sound(file: Path):
    subprocess.run(["bash", "-n", str(file)], check=True)
    if shutil.which("shellcheck") is None:
        pytest.skip("no shellcheck")
    subprocess.run(["shellcheck", str(file)], check=True)


def test_a_printed_script_quotes_what_it_is_given(tmp_path: Path):
    for job in ("train", "sweep", "shard", "evaluate", "compare", "explore"):
        nodes, parts = 3 if job == "train" else 1, 5 if job in ("shard", "sweep") else 0
        given = Slurm(job, nodes=nodes, gpus=2, time="1-00:00:00", name="x4.b", parts=parts)
        text = script(given, [ODD, "--data", ODD])
        head = text.partition("set -euo")[0]
        assert "#SBATCH --job-name=x4.b" in head and "hacked" not in head
        assert head.count(f"#SBATCH --nodes={nodes}\n") == 1
        assert head.count("#SBATCH --array=") == (1 if parts else 0)
        file = tmp_path / f"{job}.sh"
        file.write_text(text.split("\nset -- ")[0] + "\nset -- " + text.split("\nset -- ")[1].split("\n\n")[0]
                        + '\nprintf "%s\\0" "$@"\n')  # fmt: skip
        shown = subprocess.run(["bash", str(file)], capture_output=True, cwd=tmp_path, check=True).stdout.decode()
        assert shown.split("\0")[:-1] == [ODD, "--data", ODD]
    assert not (tmp_path / "hacked").exists()


@pytest.mark.parametrize("job", ["evaluate", "compare", "explore"])
def test_one_script_starts_three_programs(job: str, tmp_path: Path):
    file, python = tmp_path / "job.sh", tmp_path / "python"
    python.write_text('#!/bin/sh\nprintf "%s " "$@"\n')
    python.chmod(0o755)
    file.write_text(
        re.sub("export PYTHON=.*", f"export PYTHON={python}", script(Slurm(job, processes=2), ["in", "out"]))
    )
    assert f"--job-name=sega-dist-{job}\n" in file.read_text()
    environment = {**os.environ, "SLURM_JOB_ID": "7"}
    shown = subprocess.run(["bash", str(file)], capture_output=True, check=True, env=environment).stdout.decode()
    assert shown.endswith(f"-m sega_dist.{job} in out ")


@pytest.mark.parametrize("changes", [{"name": "a b"}, {"name": "a\n#SBATCH"}, {"partition": "$(id)"}, {"time": "1;2"},
                                     {"engine": "none"}])  # fmt: skip
def test_what_no_quotes_protect_is_refused(changes: dict):
    with pytest.raises(UserError):
        script(Slurm("train", **changes), ["run"])


@pytest.mark.parametrize("job", ["evaluate", "compare", "explore"])
def test_one_node_does_it_all_or_nothing(job: str):
    """Tasks of an array would do the same work in the same folder, and a second node would idle."""
    for changes in ({"parts": 2}, {"nodes": 2}):
        with pytest.raises(UserError, match=f"--{next(iter(changes))}"):
            script(Slurm(job, **changes), ["found"])


# On a cluster ------------------------------------------------------------------------------------------------------


def test_sbatch_accepts_every_script(slurm: Cluster):
    for file in SCRIPTS:
        slurm.run("sbatch", "--test-only", "--gpus-per-node=2", str(file), "RUN", "--data", "SHARDS")


@pytest.fixture(scope="module")
def alone(manifest: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference: one process, without SLURM."""
    run = tmp_path_factory.mktemp("reference") / "alone"
    train.main([*words(manifest), "--train.images", "36", "--out", str(run)])
    return run


@pytest.mark.usefixtures("of_jobs")
def test_two_nodes_train_what_one_process_trains_under_an_odd_name(slurm: Cluster, manifest: Manifest, alone: Path,
                                                                   tmp_path: Path):  # fmt: skip
    run = tmp_path / ODD
    job = submit(slurm, run, given=words(manifest, "--train.images", 36))
    slurm.wait(job, {"COMPLETED"}, 120)
    assert max(map(_distance, _losses(alone), _losses(run))) < 1e-9
    assert status(run)["state"] == "done" and status(run)["job"] == str(job)
    assert not list(slurm.work.rglob("hacked")) and not list(tmp_path.rglob("hacked"))
    environment = json.loads((run / "environment.json").read_text())
    assert environment["processes"] == 2


@pytest.mark.usefixtures("of_jobs")
def test_a_preempted_job_comes_back_and_ends_as_if_left_alone(slurm: Cluster, manifest: Manifest, tmp_path: Path):
    """A job of a higher partition takes all nodes; the lower one saves, waits, goes on."""
    run, undisturbed = tmp_path / "run", tmp_path / "undisturbed"
    job = submit(slurm, run, given=words(manifest, *LONG))
    begun(slurm, job, run)
    asked = time.monotonic()
    script_of_high = tmp_path / "high.sh"
    script_of_high.write_text("#!/bin/sh\nsleep 3\n")
    high = slurm.submit(script_of_high, "--nodes=4", "--gpus-per-node=2", "--partition=high", f"--output={tmp_path}/h")
    slurm.wait(high, {"COMPLETED"}, 120)
    until(lambda: slurm.job(job)["Restarts"] == "1", 60, lambda: log_of(slurm, job)[-3000:])
    stopped = status(run)
    assert (stopped["state"], stopped["code"]) == ("preempted", 85), log_of(slurm, job)[-3000:]
    slurm.wait(job, {"RUNNING"}, 120)
    begun(slurm, job, run, stopped["nimg"] // 12 + 2)
    print(f"preempted, queued again and going on after {time.monotonic() - asked:.0f} s")
    (run / "stop").touch()
    slurm.wait(job, {"FAILED"}, 90)  # a person's stop ends the job: it is not queued again
    end = status(run)
    assert (end["state"], end["restart"]) == ("stopped", 1)
    images = ["--train.images", str(end["nimg"])]
    again = submit(slurm, undisturbed, given=words(manifest, *images))
    slurm.wait(again, {"COMPLETED"}, 240)
    assert same_weights(run, undisturbed, end["nimg"])
    assert _losses(run) == _losses(undisturbed)


@pytest.mark.usefixtures("of_jobs")
def test_a_time_limit_saves_and_queues_again(slurm: Cluster, manifest: Manifest, tmp_path: Path):
    run = tmp_path / "run"
    job = submit(slurm, run, "--time=1", "--signal=B:USR1@10", given=words(manifest, *LONG), nodes=1)
    begun(slurm, job, run)
    until(lambda: slurm.job(job)["Restarts"] == "1", 100, lambda: log_of(slurm, job)[-3000:])
    assert (status(run)["state"], status(run)["code"]) == ("preempted", 85)
    assert max(int(folder.name) for folder in (run / "checkpoints").iterdir()) == status(run)["nimg"]
    slurm.run("scancel", str(job))


@pytest.mark.usefixtures("of_jobs")
def test_a_cancelled_job_is_saved_and_stays_cancelled(slurm: Cluster, manifest: Manifest, tmp_path: Path):
    run = tmp_path / "run"
    job = submit(slurm, run, given=words(manifest, *LONG))
    begun(slurm, job, run)
    slurm.run("scancel", str(job))
    until(lambda: slurm.job(job)["JobState"] == "CANCELLED", 60, lambda: log_of(slurm, job)[-3000:])
    time.sleep(3)
    assert slurm.job(job)["JobState"] == "CANCELLED"
    assert (run / "checkpoints").is_dir() or status(run)["state"] == "running"


@pytest.mark.usefixtures("of_jobs")
def test_a_lost_node_costs_what_was_not_saved(slurm: Cluster, manifest: Manifest, tmp_path: Path):
    run = tmp_path / "run"
    job = submit(slurm, run, given=words(manifest, *LONG, "--train.checkpoint-kimg", 0.012))
    begun(slurm, job, run, 4)
    lost = slurm.run("scontrol", "show", "hostnames", slurm.job(job)["NodeList"]).split()[1]
    slurm.lose(lost)
    went = time.monotonic()
    slurm.run("scontrol", "update", f"nodename={lost}", "state=down", "reason=lost")
    until(lambda: slurm.job(job)["Restarts"] == "1", 90, lambda: log_of(slurm, job)[-3000:])
    saved = max(int(folder.name) for folder in (run / "checkpoints").iterdir() if folder.name.isdigit())
    slurm.wait(job, {"RUNNING"}, 120)
    begun(slurm, job, run, saved // 12 + 2)
    print(f"going on {time.monotonic() - went:.0f} s after a node was lost")
    assert f"from image {saved:,}" in log_of(slurm, job)
    slurm.run("scancel", str(job))
    slurm.restore(lost)


@pytest.mark.usefixtures("of_jobs")
def test_one_failing_rank_ends_the_job_at_once(slurm: Cluster, manifest: Manifest, tmp_path: Path):
    run = tmp_path / "run"
    job = submit(slurm, run, "--no-requeue", given=words(manifest, *LONG))
    begun(slurm, job, run)
    [rank] = [process for process in psutil.process_iter() if "accelerate.commands.launch" not in _words(process)
              and (environment := _environment(process)).get("SLURM_JOB_ID") == str(job)
              and environment.get("RANK") == "1"]  # fmt: skip
    rank.kill()
    killed = time.monotonic()
    slurm.wait(job, {"FAILED"}, 30)
    took = time.monotonic() - killed
    print(f"ended {took:.1f} s after a rank was killed")
    assert took < 5, log_of(slurm, job)[-3000:]


def _environment(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except psutil.Error:
        return {}


@pytest.mark.usefixtures("of_jobs")
def test_a_wrong_number_of_processes_is_refused(slurm: Cluster, manifest: Manifest, tmp_path: Path,
                                                monkeypatch: pytest.MonkeyPatch):  # fmt: skip
    """A script that was changed in one place only: accelerate starts another number than the job is for."""
    text = (ROOT / "launchers/slurm/train.sbatch").read_text()
    changed = tmp_path / "changed.sbatch"
    changed.write_text(text.replace('--num_processes "$SEGA_DIST_RANKS"', '--num_processes "$SLURM_JOB_NUM_NODES"'))
    assert changed.read_text() != text
    monkeypatch.setenv("PROCESSES", "2")
    job = submit(slurm, tmp_path / "run", given=words(manifest, *LONG), file=changed)
    slurm.wait(job, {"FAILED"}, 60)
    assert "the job is for 4 processes, the launcher started 2" in log_of(slurm, job)
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("of_jobs")
def test_an_array_shards_and_a_job_evaluates(slurm: Cluster, faces: Path, manifest: Manifest, alone: Path,
                                             tmp_path: Path):  # fmt: skip
    out = tmp_path / "shards"
    arguments = [str(faces), str(out), "--size", "64", "--shard-size", "10"]
    file = tmp_path / "shard.sh"
    file.write_text(script(Slurm("shard", cpus=1, parts=3), arguments))
    job = slurm.submit(file)
    until(lambda: (out / "manifest.json").exists(), 90, lambda: slurm.run("squeue"))
    assert (
        json.loads((out / "manifest.json").read_text())["sides"]
        == json.loads((manifest.folder / "manifest.json").read_text())["sides"]
    )
    assert job
    scores = tmp_path / "scores"
    file = tmp_path / "evaluate.sh"
    file.write_text(script(Slurm("evaluate", gpus=2, cpus=1, processes=2, engine="cpu"),
                           [str(alone), "--data", str(out), "--out", str(scores)]))  # fmt: skip
    slurm.wait(slurm.submit(file), {"COMPLETED"}, 90)
    assert json.loads((scores / "metrics.json").read_text())["images"] == 6


@pytest.mark.usefixtures("of_jobs")
def test_an_array_trains_a_list_and_one_task_comes_back_alone(slurm: Cluster, manifest: Manifest, tmp_path: Path):
    """Time runs out in the middle of a run, for that task of the array which has the number of the whole array."""
    out, alone = tmp_path / "out", tmp_path / "alone"
    given = words(manifest, "--train.images", 600)[2:]
    file = tmp_path / "sweep.sh"
    arguments = [str(out), "--presets", "tiny_x4", "--seeds", "0", "1", "2", "3", *given]
    file.write_text(script(Slurm("sweep", gpus=1, cpus=1, parts=2, time="10"), arguments))
    job = slurm.submit(file)
    runs, tasks = [out / f"tiny_x4-s{seed}" for seed in range(4)], [f"{job}_{task}" for task in (1, 2)]
    until(lambda: min(map(steps, runs[:2])) >= 3, 120, lambda: slurm.run("squeue"))
    numbers = [slurm.job(task)["JobId"] for task in tasks]
    first = numbers.index(str(job))
    slurm.run("scancel", "--batch", "--signal=USR1", tasks[first])
    until(lambda: slurm.job(tasks[first])["Restarts"] == "1", 60, lambda: log_of(slurm, tasks[first])[-3000:])
    stopped = status(runs[first])
    assert stopped["code"] == 85 and stopped["nimg"] < 600, log_of(slurm, tasks[first])[-3000:]
    for task in (tasks[first], tasks[1 - first]):  # who waits for the one that was queued again spares it two minutes
        slurm.wait(task, {"COMPLETED"}, 180)
    assert [slurm.job(task)["Restarts"] for task in tasks] == (["1", "0"] if first == 0 else ["0", "1"])
    assert all((status(run)["state"], status(run)["nimg"]) == ("done", 600) for run in runs)
    for part in (0, 1):
        rows = json.loads((out / f"sweep-{part}-of-2.json").read_text())["runs"]
        assert [(row["run"], row["state"]) for row in rows] == [(run.name, "done") for run in runs[part::2]]
    [_, _, compared] = json.loads((out / "comparison/comparison.json").read_text())["rows"]  # by whichever was last
    assert (compared["method"], compared["seeds"]) == ("tiny_x4", 4) and (out / "report.html").is_file()
    train.main([*words(manifest, "--train.images", 600, "--train.seed", first), "--out", str(alone)])
    assert same_weights(runs[first], alone, 600) and _losses(runs[first]) == _losses(alone)
