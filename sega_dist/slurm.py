"""`sega-dist slurm`: a script of launchers/slurm, filled in and ready for sbatch."""

import re
import shlex
import sys
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional

from sega_dist.arguments import parse, split
from sega_dist.errors import UserError
from sega_dist.launch import LAUNCHERS, accelerate_file

MODULES = ("compare", "explore")  # that evaluate.sbatch starts as well
ARRAYS = ("shard", "sweep")
NAME = re.compile(r"[A-Za-z0-9._-]+")  # of what stands on an #SBATCH line, which no quotes protect


@dataclass(frozen=True)
class Slurm:
    """Print a script for sbatch.

    JOB is train, sweep, shard, evaluate, compare or explore. What follows its own options is given to it: for train RUN
    and train's options.
    """

    job: Annotated[
        Positional[Literal["train", "sweep", "shard", "evaluate", "compare", "explore"]], tyro.conf.arg(metavar="JOB")
    ]
    nodes: int = 0  # 0, here and below: as in launchers/slurm/JOB.sbatch
    gpus: int = -1  # a node; with 0 give --processes
    cpus: int = 0  # a task
    parts: int = 0  # of the array, for shard and sweep
    time: str = ""  # D-HH:MM:SS
    name: str = ""  # of the job
    partition: str = ""
    account: str = ""
    engine: str = ""  # a file of launchers/accelerate, without .yaml
    processes: int = 0  # a node, where it has no GPUs


def main(argv: list[str] | None = None) -> None:
    words = argv or []
    ours, theirs = split(Slurm, words[1:])
    print(script(parse(Slurm, [*words[:1], *ours], "sega-dist slurm"), theirs), end="")


def script(slurm: Slurm, words: list[str]) -> str:
    """The script, with `words` as its arguments; UserError for what must not stand in it."""
    for option in ("time", "name", "partition", "account", "engine"):
        value = getattr(slurm, option)
        if value and not NAME.fullmatch(value.replace(":", "-") if option == "time" else value):
            raise UserError(f"--{option} is {value!r}; letters, digits, dots, hyphens and underscores only")
    if any("\0" in word for word in words):
        raise UserError("an argument holds a zero byte")
    if slurm.engine:
        accelerate_file(slurm.engine)
    if slurm.parts and slurm.job not in ARRAYS:
        raise UserError(f"--parts: {slurm.job} has none; {' and '.join(ARRAYS)} have")
    if slurm.nodes > 1 and slurm.job != "train":
        raise UserError(f"--nodes is {slurm.nodes}; {slurm.job} runs on one node, with as many --gpus as it has")
    is_module = slurm.job in MODULES
    text = (LAUNCHERS / f"slurm/{'evaluate' if is_module else slurm.job}.sbatch").read_text()
    text = _replaced(text, "job-name", f"sega-dist-{slurm.job}") if is_module else text
    for option, value in _sbatch(slurm).items():
        text = _replaced(text, option, value)
    variables = {"PYTHON": sys.executable, "LAUNCHERS": str(LAUNCHERS), "ENGINE": slurm.engine}
    variables["PROCESSES"] = str(slurm.processes) if slurm.processes else ""
    variables["MODULE"] = slurm.job if is_module else ""
    given = [f"export {name}={shlex.quote(value)}" for name, value in variables.items() if value]
    return text.replace(
        "set -euo pipefail\n", "\n".join(["set -euo pipefail", *given, f"set -- {shlex.join(words)}\n"])
    )


def _sbatch(slurm: Slurm) -> dict[str, str]:
    """Options of sbatch; what is empty comes out of the script, for GPUs that there are none of."""
    values = {"job-name": slurm.name, "time": slurm.time, "partition": slurm.partition, "account": slurm.account}
    values |= {"nodes": str(slurm.nodes or ""), "cpus-per-task": str(slurm.cpus or "")}
    values |= {"array": f"1-{slurm.parts}" if slurm.parts else ""}
    values = {option: value for option, value in values.items() if value}
    return values | ({"gpus-per-node": str(slurm.gpus or "")} if slurm.gpus >= 0 else {})


def _replaced(text: str, option: str, value: str) -> str:
    """With one #SBATCH line set, added at the end of them, or taken out."""
    line = f"#SBATCH --{option}={value}\n" if value else ""
    text, count = re.subn(rf"#SBATCH --{option}=.*\n", line, text)
    return text if count or not line else text.replace("set -euo", f"{line}set -euo", 1)
