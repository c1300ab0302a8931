"""Snapshots: the generator for users, one safetensors or ONNX file with its configuration in the header."""

import dataclasses
import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from sega_dist.arguments import Device
from sega_dist.config import Config, Kernels, from_dict, to_dict, validate
from sega_dist.data.shards import write_whole
from sega_dist.errors import UserError
from sega_dist.exported import SUFFIX, OnnxGenerator
from sega_dist.networks.build import build_generator

FORMAT = 1
SNAPSHOTS = "snapshots"
EVAL = "eval"  # a run's scores
# What a file raises that is not what it claims to be.
BROKEN = (ArithmeticError, AttributeError, KeyError, OSError, RuntimeError, SafetensorError, TypeError, ValueError)
METADATA = "sega_dist"  # key in the safetensors header, and in the metadata of an ONNX model


def save_snapshot(run: Path, nimg: int, config: Config, weights: dict[str, Tensor], data: str = "") -> Path:
    """RUN/snapshots/snapshot-NIMG.safetensors: the generator's state in fp32 with its configuration in the header."""
    folder = run / SNAPSHOTS
    folder.mkdir(exist_ok=True)
    for abandoned in folder.glob(".snapshot-*"):  # by a process that was killed
        shutil.rmtree(abandoned) if abandoned.is_dir() else abandoned.unlink(missing_ok=True)
    path = folder / f"snapshot-{nimg:012d}.safetensors"
    write_whole(path, to_bytes(nimg, config, weights, data=data))
    return path


def to_bytes(nimg: int, config: Config, weights: dict[str, Tensor], **more: Any) -> bytes:
    """A snapshot file: the weights in fp32, and a header that holds `more` as well."""
    return save(_plain(weights), metadata={METADATA: json.dumps(header(nimg, config, weights, **more))})


def header(nimg: int, config: Config, weights: dict[str, Tensor], **more: Any) -> dict[str, Any]:
    """What stands in a file beside the weights."""
    return {"format": FORMAT, "nimg": nimg, "config": to_dict(config), "sha256": _digest(weights)} | more


@dataclass(frozen=True)
class Snapshot:
    """A generator ready for use, and where it comes from."""

    generator: nn.Module  # in eval mode, on `device`; an OnnxGenerator where the file is an ONNX model
    config: Config
    nimg: int  # images it was trained on
    device: torch.device
    data: str = ""  # digest of the data set it was trained on; "" where that is not known


def load_snapshot(path: Path, device: Device | torch.device = "cpu", kernels: Kernels = "auto") -> Snapshot:
    """Read a snapshot, its ONNX export, or the newest snapshot of a run's folder, to a device; `auto`: a GPU if any.

    What made it does not bind who uses it: a snapshot trained with kernels=triton serves on a CPU.
    """
    device = _device(device) if isinstance(device, str) else device
    file = newest_snapshot(path) if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"snapshot {file} does not exist; train makes them in RUN/{SNAPSHOTS}")
    try:
        if file.suffix == SUFFIX:
            model = OnnxGenerator(file, device)
            values, config = _read(model.metadata, file)
            return Snapshot(model, config, values["nimg"], device, str(values.get("data", "")))
        values, config, state = read_snapshot(file)
        if config.is_face_gan:
            raise UserError(f"{file} is a face GAN, which makes faces from nothing: sega-dist explore --gan {file}")
        generator = build_generator(dataclasses.replace(config, kernels=kernels))
        generator.load_state_dict(state)
        generator.eval().requires_grad_(False).to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        return Snapshot(generator, config, values["nimg"], device, str(values.get("data", "")))
    except BROKEN as error:
        raise broken(file, error) from None


def read_snapshot(file: Path) -> tuple[dict[str, Any], Config, dict[str, Tensor]]:
    """The header's values, the configuration in it, and the weights; `BROKEN` where these are not whole."""
    with safe_open(file, "pt") as opened:
        values, config = _read(opened.metadata() or {}, file)
    state = load_file(file)
    if values.get("sha256", _digest(state)) != _digest(state):
        raise ValueError("its weights differ from their digest")
    if not all(bool(tensor.isfinite().all()) for tensor in state.values()):
        raise ValueError("a weight is not finite")
    return values, config, state


def broken(file: Path, error: Exception) -> UserError:
    """One line on a file that raised one of `BROKEN`."""
    if isinstance(error, OSError):
        return UserError(f"cannot read snapshot {file}: {error.strerror or error}")
    reason = str(error).splitlines()[0][:120]
    return UserError(f"{file} is not a whole snapshot ({type(error).__name__}: {reason})")


def _read(metadata: dict[str, str], file: Path) -> tuple[dict[str, Any], Config]:
    """The header's values and the configuration in it."""
    if METADATA not in metadata:
        raise UserError(f"{file} was not written by sega-dist: its header holds no configuration")
    values = json.loads(metadata[METADATA])
    if values["format"] != FORMAT or type(values["nimg"]) is not int or values["nimg"] < 0:
        raise ValueError(f"format {values['format']!r:.20}, nimg {values['nimg']!r:.20}")
    return values, validate(from_dict(values["config"], str(file)))


def run_of(path: Path) -> Path:
    """The run's folder of a snapshot, or of a folder with snapshots: where evaluate writes and export reads."""
    folder = path if path.is_dir() else path.parent
    return folder.parent if folder.name == SNAPSHOTS else folder


def newest_snapshot(run: Path) -> Path:
    """The last snapshot of a run's folder."""
    found = sorted((run / SNAPSHOTS).glob("snapshot-*.safetensors"))
    if not found:
        raise UserError(f"{run} holds no snapshot; name a .safetensors file, or a run's folder with {SNAPSHOTS}/ in it")
    return found[-1]


def _digest(tensors: dict[str, Tensor]) -> str:
    return hashlib.sha256(save(_plain(tensors))).hexdigest()


def _plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As they stand in a file."""
    return {name: (tensor.float() if tensor.is_floating_point() else tensor).contiguous()
            for name, tensor in tensors.items()}  # fmt: skip


def _device(name: Device) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no CUDA device; use --device cpu")
    torch.backends.cudnn.allow_tf32 = False  # on by default; scores would differ from those made on a CPU
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
