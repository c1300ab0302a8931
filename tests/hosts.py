"""Two hosts on one machine: network namespaces joined by a cable that can be cut, or else two loopback addresses."""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT = 12  # seconds that ranks wait for each other


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=20)


def kill(process: subprocess.Popen) -> None:
    """A launcher with its workers, which have sessions of their own."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
    process.kill()
    process.wait(20)


class Hosts:
    """`start` runs a command on a host, `cut` and `mend` treat the cable between them."""

    def __init__(self, names: list[str], interfaces: list[str], addresses: list[str]):
        self.names, self.interfaces, self.addresses = names, interfaces, addresses
        self.started: list[subprocess.Popen[str]] = []

    @property
    def has_cable(self) -> bool:
        return bool(self.names)

    def start(self, host: int, command: list[str], log: Path) -> subprocess.Popen[str]:
        inside = ["ip", "netns", "exec", self.names[host]] if self.has_cable else []
        environment = {key: value for key, value in os.environ.items() if key != "ACCELERATE_USE_CPU"}
        with log.open("w") as file:
            process = subprocess.Popen(
                [*inside, *command], stdout=file, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
                env=environment | {"OMP_NUM_THREADS": "1"}, start_new_session=True,
            )  # fmt: skip
        self.started.append(process)
        return process

    def cut(self) -> None:
        """Take the cable out; without one, kill everything on the second host, which its peer cannot tell apart."""
        if self.has_cable:
            ip("-n", self.names[1], "link", "set", self.interfaces[1], "down")
        else:
            kill(self.started[-1])

    def mend(self) -> None:
        if self.has_cable:
            ip("-n", self.names[1], "link", "set", self.interfaces[1], "up")

    def train(self, launcher: str, ranks: int, words: list[object], logs: Path, port: int) -> list[subprocess.Popen]:
        """`accelerate launch` on each host, as someone would type it there."""
        logs.mkdir(parents=True, exist_ok=True)
        started = []
        for host in (0, 1):
            launch = ["--config_file", ROOT / f"launchers/accelerate/{launcher}.yaml", "--num_machines", 2,
                      "--num_processes", ranks, "--machine_rank", host, "--main_process_ip", self.addresses[0],
                      "--main_process_port", port, "-m", "sega_dist.train", "--timeout", TIMEOUT]  # fmt: skip
            command = [sys.executable, "-m", "accelerate.commands.launch", *map(str, launch), *map(str, words)]
            started.append(self.start(host, command, logs / f"host{host}.log"))
        return started


@contextlib.contextmanager
def two_hosts() -> Iterator[Hosts]:
    """Hosts that vanish with all their processes at the end."""
    tag = f"sd{os.getpid() % 100000}"
    names, interfaces, addresses = [f"{tag}a", f"{tag}b"], [f"{tag}v0", f"{tag}v1"], ["10.213.7.1", "10.213.7.2"]
    try:
        if shutil.which("ip") is None:
            raise FileNotFoundError("iproute2")
        for name in names:
            ip("netns", "add", name)
        ip(
            "link",
            "add",
            interfaces[0],
            "netns",
            names[0],
            "type",
            "veth",
            "peer",
            "name",
            interfaces[1],
            "netns",
            names[1],
        )
        for name, interface, address in zip(names, interfaces, addresses, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", interface)
            for link in (interface, "lo"):
                ip("-n", name, "link", "set", link, "up")
        hosts = Hosts(names, interfaces, addresses)
    except (OSError, subprocess.SubprocessError) as error:
        print(f"no network namespaces ({error}): two loopback addresses instead", file=sys.stderr)
        hosts = Hosts([], [], ["127.0.0.1", "127.0.0.2"])
    try:
        yield hosts
    finally:
        for process in hosts.started:
            kill(process)
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, timeout=20)
