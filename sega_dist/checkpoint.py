"""State on disk: portable checkpoints to resume from, and snapshots for users. Safetensors and JSON, never pickle."""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from sega_dist.arguments import Device
from sega_dist.config import Config, digest, from_dict, to_dict, validate
from sega_dist.data.shards import file_sha256
from sega_dist.errors import UserError
from sega_dist.networks.build import build_generator
from sega_dist.networks.generator import Generator

FORMAT = 1
CHECKPOINTS, SNAPSHOTS, STATE = "checkpoints", "snapshots", "state.json"
METADATA = "sega_dist"  # key in a snapshot's safetensors header


class DamagedCheckpoint(UserError):
    """A checkpoint whose bytes are not those that were written; an older one may serve."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint read back whole: every file matched its digest."""

    folder: Path
    nimg: int
    config: Config
    data_digest: str
    vgg19_digest: str | None  # SHA-256 of the weight file, where VGG19 was used
    tensors: dict[str, dict[str, Tensor]]  # file stem -> tensors by name
    is_fallback: bool = False  # taken because newer ones are damaged


def save_checkpoint(run: Path, nimg: int, config: Config, data_digest: str, vgg19_digest: str | None,
                    versions: dict[str, Any], tensors: dict[str, dict[str, Tensor]], keep: int) -> Path:  # fmt: skip
    """Write RUN/checkpoints/NIMG, then drop all but the newest `keep`; a crash leaves the older ones whole."""
    folder = run / CHECKPOINTS / f"{nimg:012d}"
    with _placed(folder) as partial:
        files = {}
        for stem, group in tensors.items():
            data = save(group)
            _write_durably(partial / f"{stem}.safetensors", data)
            files[f"{stem}.safetensors"] = hashlib.sha256(data).hexdigest()
        state = {"format": FORMAT, "nimg": nimg, "config": to_dict(config), "data": data_digest,
                 "vgg19": vgg19_digest, "versions": versions, "files": files}  # fmt: skip
        state["sha256"] = digest(state)
        _write_durably(partial / STATE, json.dumps(state, indent=1).encode())
    folders = _folders(run)
    abandoned = [other for other in folders if other > folder]  # damaged, or the run would have gone on from them
    for old in abandoned + [other for other in folders if other <= folder][:-keep]:
        shutil.rmtree(old)
    return folder


def find_checkpoint(run: Path, wanted: str) -> Checkpoint:
    """The checkpoint at path `wanted`, or for `latest` the newest whole one of the run; UserError if there is none."""
    if wanted != "latest":
        return read_checkpoint(Path(wanted))
    folders = _folders(run)
    if not folders:
        raise UserError(f"{run} has no checkpoint to resume from; leave --resume away to start a new run")
    for folder in reversed(folders):
        try:
            return dataclasses.replace(read_checkpoint(folder), is_fallback=folder != folders[-1])
        except DamagedCheckpoint as error:
            print(f"warning: {error}; trying the one before", file=sys.stderr, flush=True)
    raise UserError(f"none of the {len(folders)} checkpoints in {run / CHECKPOINTS} is whole")


def newest_checkpoint(run: Path) -> int:
    """The position of a run's last checkpoint, damaged or not; -1 if there is none."""
    return max((int(folder.name) for folder in _folders(run)), default=-1)


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint after checking the digest of every file."""
    try:
        state = json.loads((folder / STATE).read_text())
        if state.pop("sha256") != digest(state):
            raise DamagedCheckpoint(f"checkpoint {folder} is damaged: {STATE} differs from its digest")
        if state["format"] != FORMAT:
            raise UserError(f"checkpoint {folder} has format {state['format']}, this version reads {FORMAT}")
        tensors = {}
        for name, expected in state["files"].items():
            file = folder / Path(name).name
            if file_sha256(file) != expected:
                raise DamagedCheckpoint(f"checkpoint {folder} is damaged: {name} differs from its digest")
            tensors[file.stem] = load_file(file)
        config = validate(from_dict(state["config"], str(folder / STATE)))
        return Checkpoint(folder, state["nimg"], config, state["data"], state["vgg19"], tensors)
    except OSError as error:
        raise DamagedCheckpoint(f"cannot read checkpoint {folder}: {error.strerror}: {error.filename}") from None
    except (ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise DamagedCheckpoint(f"checkpoint {folder} is damaged ({type(error).__name__}: {error})") from None


def save_snapshot(run: Path, nimg: int, config: Config, generator: Generator) -> Path:
    """RUN/snapshots/snapshot-NIMG.safetensors: the generator in fp32 with its configuration in the header."""
    path = run / SNAPSHOTS / f"snapshot-{nimg:012d}.safetensors"
    path.parent.mkdir(exist_ok=True)
    tensors = {name: (tensor.float() if tensor.is_floating_point() else tensor).cpu().contiguous()
               for name, tensor in generator.state_dict().items()}  # fmt: skip
    header = json.dumps({"format": FORMAT, "nimg": nimg, "config": to_dict(config)})
    partial = path.with_name(f".{path.name}.partial")
    try:
        _write_durably(partial, save(tensors, metadata={METADATA: header}))
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


@dataclass(frozen=True)
class Snapshot:
    """A generator ready for use, and where it comes from."""

    generator: Generator  # in eval mode, on `device`
    config: Config
    nimg: int  # images it was trained on
    device: torch.device


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
        config, state = validate(from_dict(values["config"], str(file))), load_file(file)
        # What made it does not bind who uses it: a snapshot trained with kernels=triton serves on a CPU.
        generator = build_generator(dataclasses.replace(config, kernels="auto"))
        generator.load_state_dict(state)
        generator.eval().requires_grad_(False).to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        return Snapshot(generator, config, int(values["nimg"]), device)
    except OSError as error:
        raise UserError(f"cannot read snapshot {file}: {error.strerror or error}") from None
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        reason = str(error).splitlines()[0][:120]
        raise UserError(f"{file} is not a whole snapshot ({type(error).__name__}: {reason})") from None


def newest_snapshot(run: Path) -> Path:
    """The last snapshot of a run's folder."""
    found = sorted((run / SNAPSHOTS).glob("snapshot-*.safetensors"))
    if not found:
        raise UserError(f"{run} holds no snapshot; name a .safetensors file, or a run's folder with {SNAPSHOTS}/ in it")
    return found[-1]


def _device(name: Device) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no CUDA device; use --device cpu")
    torch.backends.cudnn.allow_tf32 = False  # on by default; scores would differ from those made on a CPU
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def _folders(run: Path) -> list[Path]:
    """A run's checkpoints, oldest first."""
    return sorted(f for f in (run / CHECKPOINTS).glob("*") if f.is_dir() and f.name.isdigit())


@contextlib.contextmanager
def _placed(folder: Path) -> Iterator[Path]:
    """A temporary folder that takes the place of `folder` when the block ends well, and vanishes otherwise."""
    partial = folder.with_name(f".{folder.name}.partial")
    folder.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        if folder.exists():  # the same position saved again, after a resume
            shutil.rmtree(folder)
        partial.rename(folder)
        _sync(folder.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _write_durably(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
