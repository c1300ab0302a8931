"""Snapshots: the generator for users, one safetensors file with its configuration in the header."""

import dataclasses
import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from sega_dist.arguments import Device
from sega_dist.config import Config, from_dict, to_dict, validate
from sega_dist.data.shards import write_whole
from sega_dist.errors import UserError
from sega_dist.networks.build import build_generator

FORMAT = 1
SNAPSHOTS = "snapshots"
METADATA = "sega_dist"  # key in the safetensors header


def save_snapshot(run: Path, nimg: int, config: Config, weights: dict[str, Tensor], data: str = "") -> Path:
    """RUN/snapshots/snapshot-NIMG.safetensors: the generator's state in fp32 with its configuration in the header."""
    folder = run / SNAPSHOTS
    folder.mkdir(exist_ok=True)
    for abandoned in folder.glob(".snapshot-*"):  # by a process that was killed
        shutil.rmtree(abandoned) if abandoned.is_dir() else abandoned.unlink(missing_ok=True)
    tensors = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in weights.items()}
    values = {"format": FORMAT, "nimg": nimg, "config": to_dict(config), "sha256": _digest(tensors), "data": data}
    path = folder / f"snapshot-{nimg:012d}.safetensors"
    write_whole(path, save(tensors, metadata={METADATA: json.dumps(values)}))
    return path


@dataclass(frozen=True)
class Snapshot:
    """A generator ready for use, and where it comes from."""

    generator: nn.Module  # in eval mode, on `device`
    config: Config
    nimg: int  # images it was trained on
    device: torch.device
    data: str = ""  # digest of the data set it was trained on; "" where that is not known


def load_snapshot(path: Path, device: Device | torch.device = "cpu") -> Snapshot:
    """Read a snapshot, or the newest one of a run's folder, to a device, where `auto` is the GPU if there is one."""
    device = _device(device) if isinstance(device, str) else device
    file = newest_snapshot(path) if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"snapshot {file} does not exist; train makes them in RUN/{SNAPSHOTS}")
    try:
        with safe_open(file, "pt") as opened:
            header = (opened.metadata() or {}).get(METADATA)
        if header is None:
            raise UserError(f"{file} was not written by sega-dist: its header holds no configuration")
        values = json.loads(header)
        if values["format"] != FORMAT or type(values["nimg"]) is not int or values["nimg"] < 0:
            raise ValueError(f"format {values['format']!r:.20}, nimg {values['nimg']!r:.20}")
        config, state = validate(from_dict(values["config"], str(file))), load_file(file)
        if values.get("sha256", _digest(state)) != _digest(state):
            raise ValueError("its weights differ from their digest")
        if not all(bool(tensor.isfinite().all()) for tensor in state.values()):
            raise ValueError("a weight is not finite")
        # What made it does not bind who uses it: a snapshot trained with kernels=triton serves on a CPU.
        generator = build_generator(dataclasses.replace(config, kernels="auto"))
        generator.load_state_dict(state)
        generator.eval().requires_grad_(False).to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        return Snapshot(generator, config, int(values["nimg"]), device, str(values.get("data", "")))
    except OSError as error:
        raise UserError(f"cannot read snapshot {file}: {error.strerror or error}") from None
    except (ArithmeticError, AttributeError, KeyError, RuntimeError, SafetensorError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0][:120]
        raise UserError(f"{file} is not a whole snapshot ({type(error).__name__}: {reason})") from None


def newest_snapshot(run: Path) -> Path:
    """The last snapshot of a run's folder."""
    found = sorted((run / SNAPSHOTS).glob("snapshot-*.safetensors"))
    if not found:
        raise UserError(f"{run} holds no snapshot; name a .safetensors file, or a run's folder with {SNAPSHOTS}/ in it")
    return found[-1]


def _digest(tensors: dict[str, Tensor]) -> str:
    return hashlib.sha256(save(tensors)).hexdigest()


def _device(name: Device) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no CUDA device; use --device cpu")
    torch.backends.cudnn.allow_tf32 = False  # on by default; scores would differ from those made on a CPU
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
