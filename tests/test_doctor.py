"""The doctor: content with a healthy machine, and whatever is broken is named with its fix, in time."""

import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from sega_dist import doctor, trials
from sega_dist.data.shards import Manifest
from sega_dist.errors import UserError

NAMES = ["python", "packages", "accelerate", "open files", "shared memory", "memory", "clock", "host", "launcher",
         "SLURM", "torch", "disk", "shards", "VGG19", "triton", "deepspeed", "two processes", "step"]  # fmt: skip


def finding(look: Callable[[], doctor.Verdict], seconds: float = 30, total: float = 100) -> doctor.Finding:
    return doctor.examine("it", seconds, look, "the fix", time.monotonic() + total)


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Make one check alone."""
    every = doctor.checks
    return lambda name: monkeypatch.setattr(doctor, "checks", lambda c: [one for one in every(c) if one[0] == name])


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MB."""
    (folder := tmp_path / "small").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.distributed
@pytest.mark.slow
def test_a_healthy_machine_in_under_a_minute(manifest: Manifest, tmp_path: Path, capsys):
    began = time.monotonic()
    doctor.main(["--data", str(manifest.folder), "--out", str(tmp_path / "new/run"), "--json"])
    assert time.monotonic() - began < 60
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    assert [one["name"] for one in found] == NAMES
    states = {one["name"]: one["state"] for one in found}
    assert "failed" not in states.values() and {states[name] for name in ("shards", "two processes", "step")} == {"ok"}
    assert all(one["found"] and bool(one["fix"]) == (one["state"] != "ok") for one in found)
    assert not list(tmp_path.iterdir())  # nothing is left behind


def test_a_package_that_is_optional_is_absent_and_one_that_is_needed_fails(only, monkeypatch, capsys):
    def version(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    only("deepspeed")
    doctor.main([])
    shown = capsys.readouterr().out
    assert "absent" in shown and "transformers" in shown and "pip install 'sega-dist[deepspeed]'" in shown
    only("packages")
    with pytest.raises(UserError, match="failed: packages"):
        doctor.main([])
    assert "webdataset" in capsys.readouterr().out


@pytest.mark.parametrize("length", [None, 5000])
def test_damaged_shards_fail(length: int | None, only, manifest: Manifest, tmp_path: Path, capsys):
    folder = shutil.copytree(manifest.folder, tmp_path / "shards")
    tar = folder / manifest.side("test")[0].name
    data = bytearray(tar.read_bytes())
    data[600] ^= 1  # in the first image
    tar.write_bytes(data[:length])
    only("shards")
    with pytest.raises(UserError, match="failed: shards") as error:
        doctor.main(["--data", str(folder), "--json"])
    (found,) = json.loads(capsys.readouterr().out)
    assert error.value.code == 2 and found["state"] == "failed"
    assert f"sega-dist verify {folder}" in found["fix"] and tar.name in found["found"]


def test_a_folder_that_cannot_be_written_or_is_full_fails(small_disk: Path, tmp_path: Path, monkeypatch):
    (file := tmp_path / "file").touch()
    assert finding(lambda: trials.try_disk(file / "run")).found == f"{file} cannot be written: Not a directory"
    full = finding(lambda: trials.try_disk(small_disk / "run"))
    assert full.state == "failed" and "stands beside the one before" in full.found
    monkeypatch.setattr(trials, "checkpoint_bytes", lambda: 0)
    assert "cannot be written: No space left" in finding(lambda: trials.try_disk(small_disk)).found


@pytest.mark.distributed
def test_processes_that_do_not_meet_are_reported_in_time(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        monkeypatch.setattr(trials, "free_port", lambda: stranger.getsockname()[1])
        began = time.monotonic()
        found = finding(lambda: trials.try_two(9))
    assert found.state == "failed" and "process" in found.found and time.monotonic() - began < 11


@pytest.mark.distributed
def test_a_wrong_sum_fails(monkeypatch):
    monkeypatch.setattr(trials, "SUM", 4.0)
    assert "summed to 3.0, right is 4.0" in finding(trials.try_two).found


def test_what_hangs_or_breaks_hides_no_other(monkeypatch):
    monkeypatch.setattr(doctor, "GRACE", 0.0)
    assert "no answer within" in finding(lambda: time.sleep(60), seconds=0.1).found
    assert finding(lambda: 1 / 0).found == "ZeroDivisionError: division by zero"
    assert "not begun" in finding(lambda: ("ok", ""), total=1).found
    with pytest.raises(UserError, match="ended with 3: some error"):
        trials.in_processes("import sys; print('some error', file=sys.stderr); sys.exit(3)", 10)
