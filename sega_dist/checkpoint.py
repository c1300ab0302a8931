"""All that is needed to resume: portable checkpoints, whatever the number of ranks or the engine. Never pickle."""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from sega_dist.config import Config, digest, from_dict, to_dict, validate
from sega_dist.data.shards import sync_folder, write_whole
from sega_dist.errors import UserError

FORMAT = 2
READABLE = (1, 2)  # format 1 had no `skipped`
CHECKPOINTS, STATE = "checkpoints", "state.json"
REPLACED = ".replaced"  # ends the name of a checkpoint that another one of its position is about to replace


class DamagedCheckpoint(UserError):
    """A checkpoint whose bytes are not those that were written; an older one may serve."""


@dataclass(frozen=True)
class Checkpoint:
    """What a run is at one moment; when read back, every file matched its digest."""

    nimg: int
    skipped: int  # images left out by rollbacks: image k of the run is number k + skipped of its order
    config: Config
    data_digest: str
    vgg19_digest: str | None  # SHA-256 of the weight file, where VGG19 was used
    tensors: dict[str, dict[str, Tensor]]  # file stem -> tensors by name
    versions: dict[str, Any] = field(default_factory=dict)  # what made it
    folder: Path = Path()  # where it was read from
    is_fallback: bool = False  # taken because newer ones are damaged


def save_checkpoint(run: Path, checkpoint: Checkpoint, keep: int, may_commit: Callable[[], None]) -> Path:
    """Write RUN/checkpoints/NIMG, then drop all but the newest `keep`; a crash leaves the older ones whole.

    `may_commit` is asked before anything becomes visible, and before anything is dropped; it raises what forbids it.
    """
    folder = run / CHECKPOINTS / f"{checkpoint.nimg:012d}"
    with _placed(folder, may_commit) as partial:
        files = {}
        for stem, group in checkpoint.tensors.items():
            data = save(group)
            write_whole(partial / f"{stem}.safetensors", data)
            files[f"{stem}.safetensors"] = hashlib.sha256(data).hexdigest()
        state = {"format": FORMAT, "nimg": checkpoint.nimg, "skipped": checkpoint.skipped,
                 "config": to_dict(checkpoint.config), "data": checkpoint.data_digest,
                 "vgg19": checkpoint.vgg19_digest, "versions": checkpoint.versions, "files": files}  # fmt: skip
        state["sha256"] = digest(state)
        write_whole(partial / STATE, json.dumps(state, indent=1).encode())
    may_commit()
    folders = saved_checkpoints(run)
    abandoned = [other for other in folders if other > folder]  # damaged, or the run would have gone on from them
    for old in abandoned + [other for other in folders if other <= folder][:-keep]:
        _drop(old)
    return folder


class Writer:
    """Saves in a thread of its own, one save at a time: training goes on while bytes reach the disk."""

    def __init__(self) -> None:
        self.thread = ThreadPoolExecutor(1, "checkpoint")
        self.pending: Future[None] | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Begin with `work` when the save before has ended; raises what that one raised."""
        self.settle()
        self.pending = self.thread.submit(work)

    def look(self) -> None:
        """Raise what the last save raised, if it has ended."""
        if self.pending and self.pending.done():
            self.settle()

    def settle(self) -> None:
        """Wait for the save under way; raises what it raised."""
        pending, self.pending = self.pending, None
        if pending:
            pending.result()


def find_checkpoint(run: Path, wanted: str) -> Checkpoint | None:
    """The checkpoint at path `wanted`, or for `latest` and `auto` the newest whole one of the run.

    UserError if there is none; None with `auto`, if none was ever made.
    """
    if wanted not in ("latest", "auto"):
        return read_checkpoint(Path(wanted))
    _put_back(run / CHECKPOINTS)
    folders = saved_checkpoints(run)
    if not folders:
        if wanted == "auto":
            return None
        raise UserError(f"{run} has no checkpoint to resume from; leave --resume away to start a new run")
    for folder in reversed(folders):
        try:
            return dataclasses.replace(read_checkpoint(folder), is_fallback=folder != folders[-1])
        except DamagedCheckpoint as error:
            print(f"warning: {error}; trying the one before", file=sys.stderr, flush=True)
    raise UserError(f"none of the {len(folders)} checkpoints in {run / CHECKPOINTS} is whole")


def newest_checkpoint(run: Path) -> int:
    """The position of a run's last checkpoint, damaged or not; -1 if there is none."""
    return max((int(folder.name) for folder in saved_checkpoints(run)), default=-1)


def data_of(run: Path) -> str | None:
    """Digest of the data set that a run's last checkpoint names, unchecked; None where there is none to be read."""
    try:
        digest_of_data: str = json.loads(_bytes(saved_checkpoints(run)[-1] / STATE))["data"]
    except (IndexError, OSError, DamagedCheckpoint, ValueError, KeyError, TypeError, RecursionError):
        return None
    return digest_of_data


def saved_checkpoints(run: Path) -> list[Path]:
    """A run's checkpoints, damaged or not, oldest first."""
    try:
        found = list((run / CHECKPOINTS).iterdir())  # a folder that cannot be read is not one without checkpoints
    except FileNotFoundError:
        return []
    return sorted(folder for folder in found if folder.is_dir() and folder.name.isdecimal())


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint after checking the digest of every file."""
    try:
        state = json.loads(_bytes(folder / STATE))
        if state.pop("sha256") != digest(state):
            raise DamagedCheckpoint(f"checkpoint {folder} is damaged: {STATE} differs from its digest")
        if state["format"] not in READABLE:
            raise UserError(f"checkpoint {folder} has format {state['format']}, this version reads up to {FORMAT}")
        tensors = {}
        for name, expected in state["files"].items():
            data = _bytes(folder / Path(name).name)
            if hashlib.sha256(data).hexdigest() != expected:
                raise DamagedCheckpoint(f"checkpoint {folder} is damaged: {name} differs from its digest")
            tensors[Path(name).stem] = load(data)
        if folder.name.isdecimal() and int(folder.name) != state["nimg"]:
            raise ValueError(f"it is of image {state['nimg']}")
        if not isinstance(state["data"], str) or not isinstance(state["versions"], dict):
            raise ValueError("data or versions make no sense")
        config = validate(from_dict(state["config"], str(folder / STATE)))
        return Checkpoint(_count(state["nimg"]), _count(state.get("skipped", 0)), config, state["data"],
                          state["vgg19"], tensors, state["versions"], folder)  # fmt: skip
    except OSError as error:
        raise DamagedCheckpoint(f"cannot read checkpoint {folder}: {error.strerror}: {error.filename}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError, SafetensorError) as error:
        raise DamagedCheckpoint(f"checkpoint {folder} is damaged ({type(error).__name__}: {error})") from None


def _bytes(file: Path) -> bytes:
    if not file.is_file():  # a pipe would be waited for
        raise DamagedCheckpoint(f"checkpoint {file.parent} is damaged: {file.name} is missing, or no file")
    return file.read_bytes()


def _count(value: object) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is no number of images")
    return value


@contextlib.contextmanager
def _placed(folder: Path, may_commit: Callable[[], None]) -> Iterator[Path]:
    """A temporary folder that takes the place of `folder` when the block ends well, and vanishes otherwise."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    may_commit()
    _put_back(folder.parent)
    for abandoned in folder.parent.glob(".*"):  # by a process that was killed
        _remove(abandoned)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}")
    partial.mkdir()
    try:
        yield partial
        may_commit()
        replaced = folder.with_name(f".{folder.name}{REPLACED}")
        if folder.exists():  # damaged, or of a writer that has been taken over
            folder.rename(replaced)
        partial.rename(folder)
        sync_folder(folder.parent)
        if replaced.exists():
            _remove(replaced)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        may_commit()  # another writer may have swept this one's files away
        raise


def _drop(folder: Path) -> None:
    """Remove a checkpoint; half removed it no longer bears a checkpoint's name."""
    dropped = folder.with_name(f".{folder.name}.dropped")
    folder.rename(dropped)
    _remove(dropped)


def _put_back(folder: Path) -> None:
    """What a killed process was about to replace takes its place again."""
    for replaced in folder.glob(f".*{REPLACED}"):
        place = folder / replaced.name[1:].removesuffix(REPLACED)
        if not place.exists():
            with contextlib.suppress(FileNotFoundError):  # another rank did it
                replaced.rename(place)


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
