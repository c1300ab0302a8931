"""A skeptic's tests: whatever became of a run's files, one clear line or an exact count; nothing lost, run or hung."""

import dataclasses
import io
import itertools
import json
import os
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path

import psutil
import pytest
import torch
from conftest import ROOT, SMALL, program
from safetensors.torch import load, load_file, save_file

from sega_dist import owner, train
from sega_dist.checkpoint import Checkpoint, find_checkpoint, newest_checkpoint, save_checkpoint, saved_checkpoints
from sega_dist.config import Config, DataConfig, GeneratorConfig, digest, to_dict
from sega_dist.data.shards import Manifest, open_manifest
from sega_dist.errors import DISK, TAKEN_OVER, UserError, exit_code
from sega_dist.networks.build import build_generator
from sega_dist.owner import Owner
from sega_dist.resume import checkpoints_main
from sega_dist.snapshot import load_snapshot, newest_snapshot, save_snapshot
from sega_dist.stats import Report

CONFIG = Config(data=DataConfig(size=64), generator=GeneratorConfig(channels=4, nested_blocks=1))


def save(run: Path, nimg: int, keep: int = 2, may_commit: Callable = lambda: None, size: int = 3, data: str = "d"):
    """As a run's writer does: a snapshot, then a checkpoint; every weight is `nimg`."""
    weights = {"w": torch.full((size,), float(nimg))}
    save_snapshot(run, nimg, CONFIG, weights)
    tensors = {"generator": weights, "discriminator": weights}
    return save_checkpoint(run, Checkpoint(nimg, 0, CONFIG, data, None, tensors, {"engine": "x"}), keep, may_commit)


def latest(run: Path) -> int:
    """The position of what a run would go on from; its weights are those of that position, every snapshot is whole."""
    found = find_checkpoint(run, "latest")
    snapshots = {int(file.stem[9:]): load(file.read_bytes()) for file in run.glob("snapshots/snapshot-*")}
    for tensors in (found.tensors["generator"], found.tensors["discriminator"], snapshots[found.nimg]):
        assert set(tensors["w"].tolist()) == {float(found.nimg)}
    return found.nimg


def debris(run: Path) -> list[Path]:
    return [*run.glob("checkpoints/.*"), *run.glob("snapshots/.*")]


@dataclasses.dataclass
class End:
    kind: str  # fine, one line, traceback, hang, killed
    text: str = ""  # of the error, or what came back
    said: str = ""  # on stderr
    code: int = 0

    @property
    def is_clear(self) -> bool:
        return (self.kind, self.code) == ("one line", 2) and "\n" not in self.text and len(self.text) < 2_000


def end_of(work: Callable[[], object], seconds: float = 20, is_nobody: bool = False) -> End:
    """What `work` comes to, in a process of its own with bounds on time and memory."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        end, said = End("killed"), io.StringIO()
        try:
            room = psutil.Process().memory_info().vms + 2**31
            resource.setrlimit(resource.RLIMIT_AS, (room, room))
            if is_nobody and os.getuid() == 0:
                os.seteuid(65534)
            with redirect_stderr(said), redirect_stdout(io.StringIO()):
                end = End("fine", str(work()))
        except (UserError, OSError) as error:
            end = End("one line", str(error), code=exit_code(error))
        except BaseException as error:
            end = End("traceback", f"{type(error).__name__}: {error}")
        finally:
            told = json.dumps([end.kind, end.text[:5_000], said.getvalue()[:5_000], end.code])
            os.write(writing, told.encode())
            os._exit(0)
    os.close(writing)
    is_ready = bool(select.select([reading], [], [], seconds)[0])
    if not is_ready:
        os.kill(child, signal.SIGKILL)
    with open(reading, "rb") as stream:
        told = stream.read()
    os.waitpid(child, 0)
    return End(*json.loads(told)) if told else End("killed" if is_ready else "hang")


def is_killed_at(n: int, work: Callable[[], object]) -> bool:
    """Whether `work`, in a process of its own, comes as far as its n-th touch of the disk, where it is killed."""
    child = os.fork()
    if not child:
        count, fsync = itertools.count(1), os.fsync

        def touch(event: str, arguments: tuple) -> None:
            if event.startswith(("open", "fsync", "os.mk", "os.re", "os.rm", "shutil.")) and next(count) == n:
                with suppress(OSError):  # a folder
                    os.ftruncate(*arguments) if event == "fsync" else None
                os.kill(os.getpid(), signal.SIGKILL)

        os.fsync = lambda file: (touch("fsync", (file, os.fstat(file).st_size // 2)), fsync(file))
        try:
            sys.addaudithook(touch)
            work()
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), status
    return status != 0


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that everybody may enter, in memory where that can be."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


BEFORE = [("whole", 24), ("newest damaged", 16), ("newest damaged", 12), ("killed before", 24), ("whole", 16)]


@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize(("before", "nimg"), BEFORE)
def test_a_kill_at_any_touch_of_the_disk_loses_nothing(place: Path, before: str, nimg: int, keep: int):
    begun, lost = place / "begun", []
    begun.mkdir()
    for position in (8, 16):
        save(begun, position)
    if before == "newest damaged":
        (begun / "checkpoints/000000000016/generator.safetensors").write_bytes(b"cut")
    if before == "killed before":
        assert is_killed_at(12, lambda: save(begun, 20)) and len(debris(begun)) == 1
        shutil.copytree(begun / "checkpoints/000000000008", begun / "checkpoints/.old.dropped")
    committed = latest(begun)
    for n in itertools.count(1):
        run = place / str(n)
        shutil.copytree(begun, run)
        was_killed = is_killed_at(n, lambda run=run: save(run, nimg, keep))
        position = latest(run) if saved_checkpoints(run) else None
        if position not in ({committed, nimg} if was_killed else {nimg}):
            lost.append((n, position))
        save(run, 32, keep)
        assert (latest(run), debris(run), len(saved_checkpoints(run))) == (32, [], keep)
        shutil.rmtree(run)
        if not was_killed:
            break
    assert n > 30 and not lost


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KB and 64 inodes."""
    (folder := tmp_path / "disk").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k,nr_inodes=64", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a tmpfs may not be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("what", ["bytes", "inodes"])
def test_a_disk_that_fills_up_at_any_moment_of_a_save_costs_nothing(disk: Path, what: str):
    save(disk, 8, size=5_000)
    for free in itertools.count():
        (ballast := disk / "ballast").mkdir()
        room = os.statvfs(disk)
        if what == "bytes":
            (ballast / "x").write_bytes(bytes((room.f_bavail - free) * room.f_bsize))
        for i in range((room.f_favail - free) * (what == "inodes")):
            (ballast / str(i)).touch()
        end = end_of(lambda: save(disk, 16, size=5_000))
        if end.kind == "fine":
            break
        assert end.code == DISK and latest(disk) == 8 and not debris(disk)
        shutil.rmtree(ballast)
    assert latest(disk) == 16 and free >= {"bytes": 10, "inodes": 3}[what]


def test_a_limit_on_file_sizes_costs_nothing(tmp_path: Path):
    save(tmp_path, 8)
    for limit in (0, 1, 100, 2_000):
        work = (lambda n: (resource.setrlimit(resource.RLIMIT_FSIZE, (n, n)), save(tmp_path, 16, size=5_000)), limit)
        assert end_of(lambda work=work: work[0](work[1])).code == DISK
        assert latest(tmp_path) == 8 and not debris(tmp_path)


def test_a_disk_that_may_not_be_written_any_more_costs_nothing(disk: Path):
    save(disk, 8)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    for work in (lambda: save(disk, 16), Owner(disk).take):
        end = end_of(work)
        assert end.code == DISK and "Read-only" in end.text
    assert latest(disk) == 8 and not debris(disk)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "is_any"), [("256k", False), ("4m", True)])
def test_a_run_whose_disk_is_full_ends_in_one_line_that_names_it(disk: Path, manifest: Manifest, size: str,
                                                                 is_any: bool):  # fmt: skip
    subprocess.run(["mount", "-o", f"remount,size={size},nr_inodes=1k", str(disk)], check=True)
    words = ["--data", manifest.folder, "--out", disk / "run", "--train.checkpoint-kimg", 0.012, "--train.images", 1200]
    said = program("train", *SMALL, *words, code=DISK).stderr
    assert "Traceback" not in said and said.count("error") == 1
    status = json.loads((disk / "run/status.json").read_text())
    assert (status["state"], status.get("code")) in (("failed", DISK), ("running", None))
    assert not debris(disk / "run")
    assert not is_any or find_checkpoint(disk / "run", "latest").nimg >= 12
    assert str(disk / "run") in said.splitlines()[-1]


class Trap:
    """Pickled, it makes a folder when it is read."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def flipped(data: bytes, at: int, bit: int = 0) -> bytes:
    return data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]


def other_bytes(change: Callable[[bytes], bytes]) -> Callable[[Path, Path], object]:
    return lambda file, other: file.write_bytes(change(file.read_bytes()))


def instead(make: Callable[[Path], object]) -> Callable[[Path, Path], object]:
    return lambda file, other: (file.unlink(), make(file))


def link_to_fifo(file: Path) -> None:
    os.mkfifo(pipe := file.parent.parent.parent / "fifo")
    file.symlink_to(pipe)


# What may befall a file; the second argument is one of another run.
DAMAGE = {
    "empty": other_bytes(lambda data: b""),
    "one byte short": other_bytes(lambda data: data[:-1]),
    "half": other_bytes(lambda data: data[: len(data) // 2]),
    "one byte long": other_bytes(lambda data: data + b"0"),
    "zeros": other_bytes(lambda data: bytes(len(data))),
    "first bit": other_bytes(lambda data: flipped(data, 0)),
    "middle bit": other_bytes(lambda data: flipped(data, len(data) // 2)),
    "last bit": other_bytes(lambda data: flipped(data, len(data) - 1)),
    "pickle": lambda file, other: torch.save(Trap(file.with_name("executed")), file),
    "another run's": lambda file, other: shutil.copy(other, file),
    "folder": instead(Path.mkdir),
    "endless": instead(lambda file: file.symlink_to("/dev/zero")),
    "fifo": instead(os.mkfifo),
    "link to a fifo": instead(link_to_fifo),
    "dangling link": instead(lambda file: file.symlink_to("nowhere")),
    "link to itself": instead(lambda file: file.symlink_to(file)),
    "deleted": lambda file, other: file.unlink(),
    "unreadable": lambda file, other: file.chmod(0),
}


@pytest.mark.parametrize("file", ["generator.safetensors", "discriminator.safetensors", "state.json"])
def test_whatever_befell_a_file_the_checkpoint_before_is_taken(place: Path, file: str):
    (place / "other").mkdir()
    save(place / "other", 16, size=4)
    ends = {}
    for name, damage in DAMAGE.items():
        (run := place / name).mkdir()
        folders = [save(run, nimg) for nimg in (8, 16)]
        damage(folders[1] / file, place / "other/checkpoints/000000000016" / file)
        tasks = [
            lambda r=run: latest(r),
            lambda f=folders[1]: find_checkpoint(Path(), f),
            lambda r=run: checkpoints_main([str(r)]),
        ]
        ends[name] = []
        for task in tasks:
            end = end_of(task, 3, name == "unreadable")
            ends[name].append((end.kind, end.code, "\n" in end.text, end.said.count("trying the one before")))
            if end.kind == "hang":
                break
        assert not list(run.rglob("executed"))
    passed_over = [("fine", 0, False, 1), ("one line", 2, False, 0), ("one line", 65, False, 0)]
    assert len(ends) == 18 and {name: end for name, end in ends.items() if end != passed_over} == {}


def test_every_flipped_bit_of_a_checkpoint_is_noticed(place: Path):
    """One bit of each byte, another one from byte to byte."""
    folder, noticed = save(place, 8), 0
    for file in sorted(folder.iterdir()):
        data = file.read_bytes()
        for at in range(len(data)):
            file.write_bytes(flipped(data, at, at % 8))
            with pytest.raises(UserError):
                find_checkpoint(place, str(folder))
            noticed += 1
        file.write_bytes(data)
    assert noticed == sum(file.stat().st_size for file in folder.iterdir()) > 1_000


def nested(depth: int) -> list:
    return [nested(depth - 1)] if depth else []


PASSED, REFUSED, FINE = "the one before", "one line", "taken"
STATES = [
    *(({"format": value}, REFUSED) for value in (99, "2", None)),
    *(({"nimg": value}, PASSED) for value in (-1, 16.0, "16", None, float("nan"), float("inf"), True, 4, 400, 10**30)),
    *(({"skipped": value}, PASSED) for value in (-1, "x", 0.5, False)),
    *(({"files": value}, PASSED) for value in ([], "generator", None)), ({"files": {}}, FINE),
    *(({"files": {name: "x"}}, PASSED) for name in ("../../x.safetensors", "/etc/passwd", "..", "", "a\0b", "x" * 300)),
    *(({"files": {"generator.safetensors": value}}, PASSED) for value in (7, None, {}, "x")),
    *(({"config": value}, PASSED) for value in ([], "x", None)),
    *(({"config": value}, REFUSED) for value in (
        {"x": {}}, {"[/red]": 1}, {"scale": 5}, {"scale": "x" * 10**6}, {"generator": 3}, {"train": {"keep": 0}},
        {"norm": {"eps": "1"}}, {"norm": {"eps": 10**400}}, {"train": {"betas": nested(500)}})),
    ({"versions": []}, PASSED), ({"versions": None}, PASSED), ({"versions": {"engine": "[/red]"}}, FINE),
    ({"data": 7}, PASSED), ({"vgg19": 7}, FINE), ({"padding": "x" * 50_000_000}, FINE), ({"x": float("nan")}, FINE),
    *(({key: ...}, PASSED) for key in ("nimg", "config", "data", "vgg19", "versions", "files")),
]  # fmt: skip


@pytest.mark.parametrize(("change", "expected"), STATES, ids=range(len(STATES)))
def test_a_state_that_lies_under_a_valid_digest(place: Path, manifest: Manifest, change: dict, expected: str):
    """`...` stands for a missing key; what is taken must serve the commands that come next."""
    save(place, 8, data=manifest.digest)
    folder = save(place, 16, data=manifest.digest)
    state = {**json.loads((folder / "state.json").read_text()), **change}
    state = {key: value for key, value in state.items() if key != "sha256" and value is not ...}
    (folder / "state.json").write_text(json.dumps({**state, "sha256": digest(state)}))

    def use() -> int:
        found = find_checkpoint(place, "latest")
        train.check(place, found.config, manifest, found)
        return found.nimg

    end, listed = end_of(use), end_of(lambda: checkpoints_main([str(place)]))
    assert (
        end.is_clear if expected is REFUSED else (end.kind, end.text) == ("fine", "8" if expected is PASSED else "16")
    )
    assert listed.code == (0 if expected is FINE else 65) and listed.kind != "traceback", listed


NOT_JSON = ["", "{", "[]", "null", "7", '"x"', "NaN", "\0", "\ud800", "[" * 100_000, '{"a":' * 100_000]


@pytest.mark.parametrize("text", [*NOT_JSON, "{}"], ids=range(len(NOT_JSON) + 1))
def test_a_state_that_is_none_is_passed_over(tmp_path: Path, text: str):
    save(tmp_path, 8)
    (save(tmp_path, 16) / "state.json").write_bytes(text.encode(errors="surrogatepass"))
    assert end_of(lambda: latest(tmp_path)).text == "8"


def test_checkpoints_that_cannot_be_listed_are_not_taken_for_none(place: Path):
    """Else `--resume auto` begins anew, and the first save drops whatever is newer."""
    save(place, 8)
    (place / "checkpoints").chmod(0)
    for wanted in ("auto", "latest"):
        end = end_of(lambda wanted=wanted: find_checkpoint(place, wanted), is_nobody=True)
        assert end.is_clear and "Permission denied" in end.text, end


@pytest.mark.parametrize("make", [Path.touch, lambda path: path.symlink_to("nowhere"), Path.mkdir])
@pytest.mark.parametrize("name", ["checkpoints/.DS_Store", "checkpoints/.x.dropped", "snapshots/.snapshot-x"])
def test_what_lies_about_never_stops_a_save(tmp_path: Path, name: str, make: Callable):
    save(tmp_path, 8)
    make(tmp_path / name)
    save(tmp_path, 16)
    assert latest(tmp_path) == 16


def test_a_checkpoint_behind_a_link_never_stops_a_save(tmp_path: Path):
    """Moved to another disk by hand, to make room."""
    (folder := save(tmp_path, 8)).rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    for nimg in (16, 24, 32):
        save(tmp_path, nimg)
    assert latest(tmp_path) == 32 and not debris(tmp_path)


HEADERS = [
    *NOT_JSON, "{}", *({"format": value} for value in (99, None)),
    *({"nimg": value} for value in (float("inf"), None, [], -1, "x")),
    *({"config": value} for value in ([], None, "x", {"x": 1}, {"scale": 5}, {"norm": {"eps": 10**400}})),
    *({"config": {"generator": {key: value}}} for key in ("channels", "nested_blocks") for value in (0, 10**6, 10**30)),
]  # fmt: skip


@pytest.fixture
def snapshot(place: Path) -> Path:
    return save_snapshot(place, 8, CONFIG, build_generator(CONFIG).state_dict())


@pytest.mark.parametrize("change", HEADERS, ids=range(len(HEADERS)))
def test_a_snapshot_whose_header_lies_is_one_line(snapshot: Path, change: dict | str):
    values = {"format": 1, "nimg": 8, "config": to_dict(CONFIG)}
    header = change if isinstance(change, str) else json.dumps({**values, **change})
    try:
        save_file(load_file(snapshot), snapshot, {"sega_dist": header})
    except UnicodeEncodeError:
        return
    end = end_of(lambda: load_snapshot(snapshot), 5)
    assert end.is_clear, end


def test_whatever_befell_a_snapshot_is_one_line(place: Path, snapshot: Path):
    (place / "other").mkdir()
    other, ends = save(place / "other", 8) / "generator.safetensors", {}
    for name, damage in DAMAGE.items():
        shutil.copytree(place / "snapshots", (run := place / name / "run") / "snapshots")
        damage(file := newest_snapshot(run), other)
        for path in (file, run):
            end = end_of(lambda path=path: load_snapshot(path), 3, name == "unreadable")
            ends[name, path.name] = end.is_clear
        assert not list(run.rglob("executed"))
    assert len(ends) == 36 and [name for name, is_clear in ends.items() if not is_clear] == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_snapshot_that_is_not_finite_is_one_line(place: Path, snapshot: Path, value: float):
    (weights := load_file(snapshot))["shallow.weight"].view(-1)[0] = value
    file = save_snapshot(place, 16, CONFIG, weights)
    with pytest.raises(UserError):
        load_snapshot(file)


@pytest.mark.slow
def test_the_program_says_in_one_line_that_a_snapshot_is_damaged(snapshot: Path, faces: Path, tmp_path: Path):
    torch.save(Trap(tmp_path / "executed"), snapshot)
    done = program("upscale", snapshot, next(faces.rglob("*.jpg")), tmp_path / "out.png", code=2)
    assert done.stderr.count("\n") == 1 and str(snapshot) in done.stderr and not list(tmp_path.iterdir())


VALUES = (-1, 2**70, 10**400, 1e308, float("nan"), None, True, "x", "²", "9" * 5_000, [], {})
STATUSES = [*NOT_JSON, "{}", "[" + "7," * 10**7 + "7]", '{"pid": ' + "9" * 5_000 + "}",
            *({key: value} for key in ("pid", "born", "job", "restart", "state", "token", "host")
              for value in VALUES)]  # fmt: skip


@pytest.mark.parametrize("status", STATUSES, ids=range(len(STATUSES)))
def test_a_status_that_makes_no_sense_is_taken_over_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                               status: dict | str):  # fmt: skip
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    monkeypatch.setattr(owner, "SILENCE", 0.1)
    monkeypatch.setattr(owner, "SIGN", 0.05)
    mine = Owner(tmp_path)
    text = status if isinstance(status, str) else json.dumps({"state": "running", **mine.me, "token": "x", **status})
    (tmp_path / "status.json").write_bytes(text.encode(errors="surrogatepass"))
    end = end_of(lambda: (mine.take(), mine.check()), 3)
    assert end.is_clear or (end.kind == "fine" and len(list(tmp_path.iterdir())) == 1), end


@pytest.mark.parametrize("name", list(DAMAGE))
def test_whatever_befell_the_status_it_is_taken_over_or_refused(place: Path, name: str):
    (run := place / "a/b").mkdir(parents=True)
    Owner(run).write("done")
    shutil.copy(run / "status.json", place / "other")
    DAMAGE[name](run / "status.json", place / "other")
    end = end_of(Owner(run).take, 3)
    assert (end.kind == "fine" or end.is_clear) and not list(place.rglob("executed")), end


@pytest.fixture
def first(tmp_path: Path) -> Iterator[int]:
    """Another process that writes into the folder."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        with suppress(BaseException):
            Owner(tmp_path).take()
            os.write(writing, b"x")
            time.sleep(60)
        os._exit(1)
    assert select.select([reading], [], [], 20)[0]
    yield child
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_a_second_writer_is_refused_until_the_first_is_killed(tmp_path: Path, first: int):
    before = (tmp_path / "status.json").read_text()
    with pytest.raises(UserError, match=f"process {first} on") as caught:
        Owner(tmp_path).take()
    assert caught.value.code == 2 and (tmp_path / "status.json").read_text() == before
    os.kill(first, signal.SIGKILL)
    os.waitid(os.P_PID, first, os.WEXITED | os.WNOWAIT)
    Owner(tmp_path).take()
    assert json.loads((tmp_path / "status.json").read_text())["pid"] == os.getpid()


def test_a_writer_whose_number_another_process_has_by_now_is_gone(tmp_path: Path, first: int):
    status = json.loads((tmp_path / "status.json").read_text())
    (tmp_path / "status.json").write_text(json.dumps({**status, "born": status["born"] - 1000}))
    Owner(tmp_path).take()


@pytest.mark.parametrize(("moment", "is_before"), [(1, True), (2, True), (3, True), (1, False), (2, False)])
def test_a_writer_that_was_taken_over_commits_and_drops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int, is_before: bool
):
    """The scheduler started the job anew although its first life goes on; that happens around one of three checks."""
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    older, calls = Owner(tmp_path), itertools.count(1)
    older.take()
    save(tmp_path, 16, 1, older.check)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    newer = Owner(tmp_path)

    def check() -> None:
        is_now = next(calls) == moment
        if not is_before:
            older.check()
        if is_now:
            newer.take()
            save(tmp_path, 20, 1, newer.check)
        if is_before:
            older.check()

    with pytest.raises(UserError, match="writes into") as caught:
        save(tmp_path, 24, 1, check)
    assert caught.value.code == TAKEN_OVER
    older.end("failed", 24, TAKEN_OVER, "x")
    newer.check()
    assert latest(tmp_path) == newest_checkpoint(tmp_path) == 20 and not debris(tmp_path)


@pytest.mark.parametrize(("is_signing", "ahead"), [(True, 0), (False, 0), (False, 3600)])
def test_a_writer_on_another_machine_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_signing: bool, ahead: int
):
    """Silent it is taken over, even where a clock that was wrong dated its last sign in the future."""
    monkeypatch.setattr(owner, "SILENCE", 0.6)
    monkeypatch.setattr(owner, "SIGN", 0.1)
    other = Owner(tmp_path)
    other.me["host"] = "elsewhere"
    other.write("running")
    os.utime(other.file, (time.time() + ahead,) * 2)
    is_over, began = threading.Event(), time.monotonic()
    signs = threading.Thread(target=lambda: [other.sign() for _ in iter(lambda: is_over.wait(0.02), True)], daemon=True)
    if is_signing:
        signs.start()
    end = end_of(Owner(tmp_path).take)
    is_over.set()
    assert ahead or 0.5 < time.monotonic() - began < 5
    assert end.is_clear if is_signing else end.kind == "fine", end


CONFIGS = [
    *NOT_JSON, "\ufeff{}", '{"train": {"images": ' + "9" * 5_000 + "}}", {"trane": {}},
    {"train": 3}, {"scale": True}, {"scale": nested(500)}, {"compile": None},
    {"generator": {"channels": 10**30}}, {"generator": {"nested_blocks": 10**9}},
    *({"train": {"learning_rate": value}} for value in (10**400, float("nan"), "x" * 10**6, None)),
    *({"train": {"betas": value}} for value in ([1], ["x", {}], [0, 10**400])),
    *({"train": {key: value}} for key, value in (("keep", "2"), ("images", 1.5), ("images", True), ("seed", 2**70))),
]  # fmt: skip


@pytest.mark.parametrize("values", CONFIGS, ids=range(len(CONFIGS)))
def test_a_configuration_file_that_makes_no_sense_is_one_line(tmp_path: Path, values: dict | str):
    text = values if isinstance(values, str) else json.dumps(values)
    (tmp_path / "c.json").write_bytes(text.encode(errors="surrogatepass"))
    end = end_of(lambda: train.resolve(["--config", str(tmp_path / "c.json")]))
    assert end.is_clear, end


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch, lambda path: path.symlink_to(path)])
def test_a_configuration_that_is_no_file_is_one_line(tmp_path: Path, make: Callable):
    make(tmp_path / "c")
    for path in (tmp_path / "c", tmp_path / ("x" * 300), tmp_path / "c/below"):
        assert end_of(lambda path=path: train.resolve(["--config", str(path)])).is_clear


NASTY = "a b'\";$(touch pwned)`touch pwned`|touch pwned&\n*[x]\\#~%s{}"
NAMES = ["a b", NASTY, "-x", "--help", "ünï—\U0001f600", "x" * 255, "\udcff"]


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_a_run_may_bear_any_name(tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch, name: str):
    monkeypatch.chdir(tmp_path)
    command, config, _ = train.resolve([*SMALL, f"--out={name}"])
    train.check(command.out, config, manifest, None)
    Owner(command.out).take()
    save(command.out, 12)
    assert latest(Path(name)) == 12 and [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["x" * 256, "é" * 128, "file", "dangling", "file/below", "itself", "itself/below"])
def test_a_run_that_cannot_be_made_is_one_line(tmp_path: Path, manifest: Manifest, name: str):
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "itself").symlink_to("itself")

    def begin() -> None:
        command, config, _ = train.resolve([*SMALL, "--out", str(tmp_path / name)])
        train.check(command.out, config, manifest, None)
        Owner(command.out).take()

    end = end_of(begin)
    assert end.is_clear and len(list(tmp_path.iterdir())) == 3, end


def places(values: object, way: tuple = ()) -> Iterator[tuple]:
    """Of every value within nested ones."""
    if isinstance(values, (dict, list)):
        for key in values if isinstance(values, dict) else range(len(values)):
            yield (*way, key)
            yield from places(values[key], (*way, key))


def test_whatever_a_manifest_says_it_opens_or_is_one_line(tmp_path: Path, manifest: Manifest):
    """Every value of it in turn, and texts that are none."""
    folder = tmp_path / "shards"
    shutil.copytree(manifest.folder, folder)
    right, config, said = json.loads((folder / "manifest.json").read_text()), train.resolve(SMALL)[1], []
    texts = ["", "[", "[]", "null", "{}", '{"format": 2}', '{"format": 2, "sides": {}}', "[" * 100_000, "\0"]
    for *way, key in places(right):
        for lie in (None, True, -1, 10**30, 1.5, "x", "../../x", "/etc/passwd", [], {}, [[]], {"a": 1}, float("nan")):
            values = json.loads(json.dumps(right))
            inner = values
            for step in way:
                inner = inner[step]
            inner[key] = lie
            texts.append(json.dumps(values))
    for text in texts:
        (folder / "manifest.json").write_text(text)
        try:
            train.check(tmp_path / "run", config, open_manifest(folder), None)
        except UserError as error:
            said.append((str(error), error.code))
    assert len(texts) > 500 and len(said) > 300
    assert [line for line, code in said if code != 2 or "\n" in line or len(line) > 2_000] == []


def test_nothing_in_a_runs_name_is_executed(tmp_path: Path, manifest: Manifest):
    program("train", *SMALL, "--data", manifest.folder, "--out", tmp_path / NASTY, "--train.images", 24)
    checkpoints_main([str(tmp_path / NASTY)])
    assert newest_checkpoint(tmp_path / NASTY) == 24 and list(tmp_path.iterdir()) == [tmp_path / NASTY]
    assert not (ROOT / "pwned").exists()


def test_statistics_with_a_flipped_bit_never_stop_a_run_that_goes_on(tmp_path: Path):
    lines = b"".join(json.dumps({"nimg": nimg, "loss_g": 1.0}).encode() + b"\n" for nimg in (8, 16))
    for at in range(len(lines)):
        (tmp_path / "stats.jsonl").write_bytes(flipped(lines, at, 7))
        Report(tmp_path, 16, 24).close()
