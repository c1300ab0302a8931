"""A real SLURM on the loopback: one controller and several nodes with two fake GPUs each, all below one folder."""

import contextlib
import os
import pwd
import random
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

PROGRAMS = ["slurmctld", "slurmd", "sbatch", "srun", "scontrol"]
SEARCH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])  # not in every user's PATH
HOST = socket.gethostname().split(".")[0]
NODE = "NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=64 RealMemory=512000 Gres=gpu:2"
# MinJobAge lets tests look at jobs that ended; the scheduler is asked not to dawdle.
SETTINGS = [
    "AuthType=auth/none", "CredType=cred/none", "MailProg=/bin/true", "TaskPlugin=task/none", "MpiDefault=none",
    "ProctrackType=proctrack/linuxproc", "SwitchType=switch/none", "JobAcctGatherType=jobacct_gather/none",
    "AccountingStorageType=accounting_storage/none", "SelectType=select/cons_tres", "SelectTypeParameters=CR_Core",
    "GresTypes=gpu", "SlurmdParameters=config_overrides", "ReturnToService=2", "SlurmdTimeout=10", "KillWait=5",
    "MinJobAge=3600", "SchedulerParameters=batch_sched_delay=0,sched_min_interval=0", "JobRequeue=1",
    "PreemptType=preempt/partition_prio", "PreemptMode=REQUEUE",
]  # fmt: skip
CONFIG = """\
ClusterName=sega{port}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
{settings}
StateSaveLocation="{folder}/state"
SlurmdSpoolDir="{folder}/%n"
SlurmctldPidFile="{folder}/slurmctld.pid"
SlurmdPidFile="{folder}/%n.pid"
PlugStackConfig="{folder}/plugstack.conf"
{nodes}
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF
"""


def missing() -> str:
    """Why there can be no cluster here, or nothing."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=SEARCH) is None]
    return f"no {', '.join(absent)}: apt-get install slurmctld slurmd slurm-client" if absent else ""


def free_ports(count: int) -> list[int]:
    """Above those that the kernel gives to clients, and those that jobs make of their numbers."""
    free: list[int] = []
    for port in random.sample(range(61000, 65536), 200):
        with contextlib.suppress(OSError), socket.socket() as server:
            server.bind(("", port))
            free.append(port)
    return free[:count]


def until(done: Callable[[], bool], seconds: float, complaint: Callable[[], str]) -> None:
    end = time.monotonic() + seconds
    while not done():
        if time.monotonic() > end:
            raise AssertionError(f"after {seconds} s: {complaint()}")
        time.sleep(0.2)


class Cluster:
    """`run` is a SLURM command; `submit`, `job` and `wait` treat a job, `lose` and `restore` a node."""

    def __init__(self, folder: Path, nodes: int):
        self.folder, self.config, self.work = folder, folder / "slurm.conf", folder / "work"
        self.nodes = [f"n{i + 1}" for i in range(nodes)]
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def environment(self) -> dict[str, str]:
        """Without the variables of a job in which the tests themselves may run."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "SBATCH_"))}
        return kept | {"SLURM_CONF": str(self.config), "PATH": SEARCH}

    def run(self, *words: str) -> str:
        """In the folder `work`, where jobs start too and leave their output unless told otherwise."""
        done = subprocess.run(words, env=self.environment, cwd=self.work, capture_output=True, text=True, timeout=60)
        if done.returncode:
            raise RuntimeError(f"exit {done.returncode} from {' '.join(words)}: {done.stderr.strip()}")
        return done.stdout

    def submit(self, script: Path, *words: str) -> int:
        return int(self.run("sbatch", "--parsable", *words, str(script)).split(";")[0])

    def job(self, job: int) -> dict[str, str]:
        """What `scontrol show job` says; of two equal keys the first, for a name or command may hold another."""
        line = self.run("scontrol", "-o", "show", "job", str(job))
        found = re.findall(r"(?:^| )([A-Z][\w/:]*)=(.*?)(?= [A-Z][\w/:]*=|\s*$)", line)
        return {key: value.strip() for key, value in reversed(found)}

    def wait(self, job: int, states: set[str], seconds: float) -> str:
        """Until the job is in one of the states, at once if it never will; a requeued one is spared its two minutes."""
        shown, spared = dict[str, str](), set[str]()

        def arrived() -> bool:
            shown.update(self.job(job))
            is_waiting = shown["JobState"] == "PENDING" and shown["Reason"] == "BeginTime" and shown["Restarts"] != "0"
            if is_waiting and shown["Restarts"] not in spared:
                spared.add(shown["Restarts"])
                # A node takes no credential that was made in the second in which it ended the life before.
                self.run("scontrol", "update", f"jobid={job}", "StartTime=now+2")
            return shown["JobState"] in states | {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"}

        def complaint() -> str:
            log = Path(shown["StdOut"])
            tail = log.read_text(errors="replace")[-2000:] if log.is_file() else "(no output)"
            return f"job {job} is {shown['JobState']} ({shown['Reason']}), not {sorted(states)}\n{tail}"

        until(arrived, seconds, complaint)
        assert shown["JobState"] in states, complaint()
        return shown["JobState"]

    def lose(self, node: str) -> None:
        """As if its power went: the daemon and all that ran on the node are gone, and nobody was told."""
        self._kill({node})

    def restore(self, node: str) -> None:
        self._start(node, "slurmd", "-D", "-c", "-N", node)
        self._await_nodes({node})

    def start(self) -> None:
        controller, *ports = free_ports(1 + len(self.nodes))
        for name in ("state", "work"):
            (self.folder / name).mkdir(parents=True)
        pairs = zip(self.nodes, ports, strict=True)
        nodes = "\n".join(NODE.format(node=node, host=HOST, port=port) for node, port in pairs)
        user = pwd.getpwuid(os.geteuid()).pw_name
        self.config.write_text(CONFIG.format(
            folder=self.folder, host=HOST, port=controller, user=user, nodes=nodes, settings="\n".join(SETTINGS)
        ))  # fmt: skip
        (self.folder / "gres.conf").write_text("AutoDetect=off\nName=gpu File=/dev/null,/dev/zero\n")
        (self.folder / "plugstack.conf").touch()  # not the host's own plugins
        self._start("state", "slurmctld", "-D", "-c")
        for node in self.nodes:
            self._start(node, "slurmd", "-D", "-c", "-N", node)
        self._await_nodes(set(self.nodes))

    def stop(self) -> None:
        """The controller first, lest it give the nodes something to do."""
        self._kill({"state"})
        self._kill({"state", "", *self.nodes})

    def _start(self, place: str, *words: str) -> None:
        """A daemon in a folder of its own: the steps that it starts stay there, and are known by it."""
        (self.folder / place).mkdir(exist_ok=True)
        with (self.folder / f"{place}.log").open("ab") as log:
            self.daemons[place] = subprocess.Popen(
                [*words, "-f", str(self.config)], env=self.environment, cwd=self.folder / place,
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def _await_nodes(self, nodes: set[str]) -> None:
        def ready() -> bool:
            with contextlib.suppress(RuntimeError):  # the controller does not answer yet
                shown = self.run("sinfo", "-hN", "-p", "low", "-t", "idle,mixed,allocated", "-o", "%N %t")
                return nodes <= {line.split()[0] for line in shown.splitlines() if "*" not in line}
            return False

        until(ready, 30, lambda: "".join(log.read_text()[-1000:] for log in self.folder.glob("*.log")))

    def _place(self, process: psutil.Process) -> str | None:
        """The node of a process of this cluster, empty for a client; a step wipes its environment, a job moves away."""
        with contextlib.suppress(psutil.Error):
            cwd = Path(process.cwd())
            if cwd.parent == self.folder and cwd.name in self.daemons and process.name().startswith("slurm"):
                return cwd.name
            environment = process.environ()
            if environment.get("SLURM_CONF") == str(self.config):
                return environment.get("SLURMD_NODENAME", "")
        return None

    def _kill(self, places: set[str]) -> None:
        """Whoever is the parent by now; again until nothing is left, because the dying may still start something."""

        def none_left() -> bool:
            found = [process for process in psutil.process_iter() if self._place(process) in places]
            for process in found:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            for place in places & self.daemons.keys():
                self.daemons[place].wait(5)
            return not found

        until(none_left, 20, lambda: f"processes of {places} in {self.folder} do not end")


@contextlib.contextmanager
def cluster(folder: Path, nodes: int = 4) -> Iterator[Cluster]:
    """A cluster in a new folder, gone at the end with all its processes; sockets want a path below 80 bytes."""
    slurm = Cluster(folder.resolve(), nodes)
    try:
        slurm.start()
        yield slurm
    finally:
        slurm.stop()
