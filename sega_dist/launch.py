"""How training is started in processes of its own: by this interpreter, or for several by accelerate's launcher."""

import sys
from pathlib import Path

from sega_dist.arguments import Device
from sega_dist.errors import UserError

LAUNCHERS = Path(__file__).resolve().parent / "launchers"


def accelerate_file(engine: str) -> Path:
    """launchers/accelerate/ENGINE.yaml; UserError with the known names."""
    file = LAUNCHERS / f"accelerate/{engine}.yaml"
    if not file.is_file():
        known = ", ".join(sorted(other.stem for other in file.parent.glob("*.yaml")))
        raise UserError(f"--engine is {engine!r}; there are {known}")
    return file


def training(words: list[str], processes: int = 1, file: Path | None = None, device: Device = "auto") -> list[str]:
    """The command that trains with `words`; `file` is accelerate's, by itself the one for this machine's devices."""
    start = ["-m", "sega_dist.train", *words]
    if file or processes > 1:
        import torch

        is_cpu = device == "cpu" or not torch.cuda.is_available()
        file = file or accelerate_file("cpu" if is_cpu else "gpu")
        launch = ["-m", "accelerate.commands.launch", "--config_file", str(file), "--num_processes", str(processes)]
        start = [*launch, *start]
    return [sys.executable, *start]
