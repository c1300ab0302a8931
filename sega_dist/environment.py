"""What computes: packages, device, engine, and the program's own code."""

import hashlib
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from sega_dist.distributed import World
from sega_dist.kernels.compat import HAS_TRITON


def code_digest() -> str:
    """SHA-256 of every Python file of this installation, by name."""
    root, digest = Path(__file__).parent, hashlib.sha256()
    folders = [root, *(root / name for name in ("networks", "bench", "kernels", "data"))]
    for file in sorted(file for folder in folders for file in folder.glob("*.py")):
        digest.update(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def packages() -> dict[str, str]:
    """What computes, by name and version."""
    names = ["sega-dist", "torch", "accelerate", "numpy", "pillow", "webdataset"]
    triton = version("triton") if HAS_TRITON else "absent"
    return {name: version(name) for name in names} | {"triton": triton, "python": platform.python_version()}


def versions(world: World) -> dict[str, Any]:
    """What ran: for the run's folder and its checkpoints."""
    device = torch.cuda.get_device_name() if world.device.type == "cuda" else platform.processor() or platform.machine()
    engine = f"{world.engine} ({world.engine_version})"
    return packages() | {"device": device, "processes": world.size, "engine": engine}
