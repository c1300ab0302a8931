"""Several ranks inside one test: processes over gloo on the loopback, each running the same function."""

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from accelerate.state import AcceleratorState

ROOT = Path(__file__).resolve().parent.parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def on_ranks(work: Callable[[int, int], Any], ranks: int, out: Path, engine: str = "cpu") -> list[Any]:
    """What `work(rank, ranks)` returned on each rank; `engine` is a DeepSpeed file's name, or `cpu` for DDP."""
    if engine != "cpu":
        pytest.importorskip("deepspeed")
    mp.spawn(_enter, (work, ranks, free_port(), out, engine), nprocs=ranks)
    return [torch.load(out / f"{rank}.pt") for rank in range(ranks)]


def use(engine: str) -> None:
    """What is made from now on in this process runs under `engine`."""
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "false" if engine == "cpu" else "true"
    os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(ROOT / f"launchers/deepspeed/{engine}.json")


def _enter(rank: int, work: Callable[[int, int], Any], ranks: int, port: int, out: Path, engine: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": str(ranks)}  # fmt: skip
    use(engine)
    torch.save(work(rank, ranks), out / f"{rank}.pt")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
