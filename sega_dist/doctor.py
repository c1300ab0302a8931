"""Whether this node is fit for a long job: `sega-dist doctor`, in under a minute, with the fix for what is not.

This file imports nothing that may be broken: a package that is fails the checks that need it, and no others.
"""

import json
import math
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import psutil
from rich.console import Console
from rich.table import Table

from sega_dist.arguments import parse
from sega_dist.errors import UserError, run
from sega_dist.launched import launched_ranks, zero_optimization

State = Literal["ok", "absent", "failed"]  # absent: optional, and not there
Verdict = tuple[State, str]  # and what was found
TOTAL, LEAST = 59.0, 4.0  # seconds for all checks, and what must be left of them to begin one
GRACE = 1.0  # seconds more for a check: its processes, bounded by its seconds, should speak first


@dataclass(frozen=True)
class DoctorCommand:
    """Try all that training needs of this node; exit code 2 where something that is installed does not work."""

    data: Path | None = None  # a folder of shards to read from
    out: Path = Path()  # where runs will be written; need not exist yet
    json: bool = False  # print a list of findings and nothing else


@dataclass(frozen=True)
class Finding:
    """The outcome of a check; `fix` is empty where all is well."""

    name: str
    state: State
    found: str
    fix: str


def main(argv: list[str] | None = None) -> None:
    command, until = parse(DoctorCommand, argv or [], "sega-dist doctor"), time.monotonic() + TOTAL
    findings = [examine(*check, until) for check in checks(command)]
    if command.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=1))
    else:
        table = Table("check", "state", "found", "fix")
        for one in findings:
            table.add_row(one.name, one.state, one.found, one.fix)
        Console(markup=False, width=None if sys.stdout.isatty() else 240).print(table)
    failed = [finding.name for finding in findings if finding.state == "failed"]
    if failed:
        raise UserError(f"failed: {', '.join(failed)}; the fix of each stands beside it")


def checks(command: DoctorCommand) -> list[tuple[str, float, Callable[[], Verdict], str]]:
    """Name, seconds at most, what to call, and the fix; the cheap ones first."""
    data, out, reinstall = command.data, command.out, "pip install --force-reinstall sega-dist"
    return [
        ("python", 5, see_python, reinstall),
        ("packages", 5, lambda: see("webdataset", "torchmetrics", "simplejpeg"), reinstall),
        ("accelerate", 5, lambda: see("accelerate"), reinstall),
        ("open files", 5, see_open_files, "ulimit -n 65536"),
        ("shared memory", 5, see_shared_memory, "mount -o remount,size=8G /dev/shm, or docker run --shm-size=8g"),
        ("memory", 5, see_memory, "end what else runs here, or ask SLURM for more by --mem"),
        ("clock", 5, see_clock, "timedatectl set-ntp true"),
        ("host", 5, see_host, "give this host's name an address that other nodes reach, in /etc/hosts or DNS"),
        ("launcher", 5, see_launcher, "for several processes: accelerate launch with a file of launchers/accelerate"),
        ("SLURM", 6, see_slurm, "on a cluster scontrol ping must say UP: tell its administrator; elsewhere nothing"),
        ("torch", 20, lambda: trial("torch"), "install a torch that the GPU's driver supports: nvidia-smi shows which"),
        ("disk", 15, lambda: trial("disk", out), "name a folder with room that can be written: --out DIR"),
        ("shards", 15, lambda: trial("shards", data), f"give --data; sega-dist verify {data or 'SHARDS'} finds damage"),
        ("VGG19", 10, lambda: trial("vgg19"), "export SEGA_DIST_VGG19=FILE, whole and with torchvision's key names"),
        ("triton", 20, lambda: trial("kernels"), "pip install triton, apt install gcc; or use --kernels reference"),
        ("deepspeed", 15, lambda: trial("zero"), "pip install 'sega-dist[deepspeed]'; apt install g++ ninja-build"),
        ("two processes", 20, lambda: trial("two"), "ip link set lo up; unset GLOO_SOCKET_IFNAME NCCL_SOCKET_IFNAME"),
        ("step", 20, lambda: trial("step"), "mend torch first; then try sega-dist train --kernels reference"),
    ]


def examine(name: str, seconds: float, look: Callable[[], Verdict], fix: str, until: float) -> Finding:
    """Make a check within its seconds and before `until`; one that hangs is left behind in its thread."""
    if until - time.monotonic() < LEAST:
        return Finding(name, "failed", "not begun: those before took too long", "mend those first")
    answer: list[Verdict] = []
    began = time.monotonic()

    def attempt() -> None:
        try:
            answer.append(look())
        except Exception as error:  # the one guard: whatever a broken part raises, the other checks are made as well
            kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            answer.append(("failed", " ".join(f"{kind}{error}".split())[:300]))

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(min(seconds + GRACE, until - time.monotonic()))
    state, found = answer[0] if answer else ("failed", f"no answer within {time.monotonic() - began:.0f} s")
    return Finding(name, state, found, "" if state == "ok" else fix)


def trial(name: str, *arguments: object) -> Verdict:
    """What is tried for real, with all that it imports."""
    from sega_dist import trials

    verdict: Verdict = getattr(trials, f"try_{name}")(*arguments)
    return verdict


def see_python() -> Verdict:
    return "ok", f"{platform.python_version()}, sega-dist {metadata.version('sega-dist')}, {platform.platform()}"


def see(*names: str) -> Verdict:
    """Packages that nothing works without; one that is missing raises PackageNotFoundError."""
    return "ok", ", ".join(f"{name} {metadata.version(name)}" for name in names)


def enough(have: float, least: float, wanted: float, what: str) -> Verdict:
    state: State = "ok" if have >= wanted else "absent" if have >= least else "failed"
    return state, f"{have:,.6g} {what}, {wanted:,.6g} wanted"


def see_open_files() -> Verdict:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return enough(math.inf if limit == resource.RLIM_INFINITY else limit, 1024, 1024, "files at a time")


def see_shared_memory() -> Verdict:
    return enough(shutil.disk_usage("/dev/shm").free / 1e9, 0.064, 1, "GB free in /dev/shm for data workers")


def see_memory() -> Verdict:
    return enough(psutil.virtual_memory().available / 1e9, 2, 2, "GB free")


def see_clock() -> Verdict:
    is_late = time.time() > Path(__file__).stat().st_mtime
    return "ok" if is_late else "failed", time.ctime() + ("" if is_late else " is before this was installed")


def see_host() -> Verdict:
    name = socket.gethostname()
    address = str(socket.getaddrinfo(name, None)[0][4][0])
    if address.startswith("127.") or address == "::1":
        return "absent", f"{name} is {address}: no MASTER_ADDR for several nodes"
    return "ok", f"{name} is {address}"


def see_launcher() -> Verdict:
    ranks, zero = launched_ranks(), zero_optimization()
    if "RANK" not in os.environ:
        return "absent", "none started this process"
    rank, address, port = (os.environ[name] for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"))
    return "ok", f"process {rank} of {ranks} at {address}:{port}, " + (f"ZeRO-{zero['stage']}" if zero else "DDP")


def see_slurm() -> Verdict:
    if not shutil.which("scontrol"):
        return "absent", "no scontrol: only for clusters"
    asked = subprocess.run(["scontrol", "ping"], capture_output=True, text=True, timeout=5)
    if "configuration source" in asked.stderr:
        return "absent", "scontrol knows of no cluster"
    return "ok" if " UP" in asked.stdout else "failed", " ".join((asked.stdout or asked.stderr).split())[-200:]


if __name__ == "__main__":
    run(main)
