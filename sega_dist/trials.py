"""What `sega-dist doctor` tries for real: torch, disk, shards, weights, and in processes of their own what may crash.

Each trial returns ok, absent (optional, and not there) or failed, and what it found; it may raise as well.
"""

import json
import math
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch

from sega_dist.arguments import Device
from sega_dist.data.images import DamagedSample, ShardReader
from sega_dist.data.shards import open_manifest
from sega_dist.errors import UserError
from sega_dist.kernels import backend, compat, upconv_act
from sega_dist.launched import LAUNCHED
from sega_dist.networks.build import build_discriminator, build_generator
from sega_dist.networks.vgg19 import Vgg19
from sega_dist.presets import preset
from sega_dist.weights import URL, VARIABLE, load_vgg19

Verdict = tuple[Literal["ok", "absent", "failed"], str]
PROBE, IMAGES = 1 << 24, 64  # bytes of a trial file and of a vector to sum; images read from shards
SUM = 3.0  # over two processes, of 1 and 2
OURS = "from sega_dist import trials; trials."  # before what a process is to call
OF_LAUNCHERS = ("ACCELERATE_", "LOCAL_", "OMPI_", "PMI", "TORCHELASTIC_")  # with their variables it would join a job


def try_torch() -> Verdict:
    build = f"{torch.__version__}, " + (f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA in it")
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        devices = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
        bf16 = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no bf16"
        return "ok", f"{build}, NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}, {devices}, {bf16}"
    if any(Path("/dev").glob("nvidia[0-9]*")) and "CUDA_VISIBLE_DEVICES" not in os.environ:
        return "failed", f"{build}: cannot use this machine's GPU"
    return "ok", f"{build}, CPU alone, bf16 slow"


def try_disk(out: Path) -> Verdict:
    """Room for two checkpoints, and a real write."""
    folder = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    free, checkpoint, data = shutil.disk_usage(folder).free, checkpoint_bytes(), os.urandom(PROBE)
    room = f"{free / 1e9:.1f} GB free in {folder}, a checkpoint of sega_x4 takes {checkpoint / 1e9:.2f}"
    if free < 2 * checkpoint:
        return "failed", f"{room} and stands beside the one before"
    began = time.perf_counter()
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor.") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return "failed", f"{folder} cannot be written: {error.strerror}"
    return "ok", f"{room}, writes {PROBE / 1e6 / (time.perf_counter() - began):.0f} MB/s"


def checkpoint_bytes() -> int:
    """Of both players of sega_x4 with Adam's two moments."""
    with torch.device("meta"):
        players = build_generator(preset("sega_x4")), build_discriminator(preset("sega_x4"))
    return 3 * 4 * sum(p.numel() for player in players for p in player.parameters())


def try_shards(data: Path | None) -> Verdict:
    """The first and last sample of each side, and others evenly between."""
    if data is None:
        return "absent", "none named, none read"
    manifest, began = open_manifest(data), time.perf_counter()
    each = -(-IMAGES // len(manifest.sides))
    for reader in (ShardReader(manifest, side) for side in manifest.sides):
        try:
            for i in range(each):
                reader.pixels(i * (len(reader) - 1) // (each - 1))
        except DamagedSample as error:
            return "failed", f"damaged: {error}"
    speed = each * len(manifest.sides) / (time.perf_counter() - began)
    return "ok", f"{manifest}, {speed:,.0f} images/s by one process"


def try_vgg19() -> Verdict:
    named = os.environ.get(VARIABLE)
    file = Path(named or Path(torch.hub.get_dir(), "checkpoints", URL.rpartition("/")[2]))
    if not named and not file.is_file():
        return "absent", f"no {file}: for the sega presets, tiny_x4 needs none"
    return "ok", f"{file}, sha256 {load_vgg19(Vgg19(), file)[:12]}"


def try_kernels() -> Verdict:
    """A fused op beside its reference, where kernels can run."""
    if not compat.HAS_TRITON:
        return "absent", "for fused kernels on GPUs; the reference implementation runs instead"
    version, device = compat.triton.__version__, "cuda" if torch.cuda.is_available() else "cpu"
    if backend.obstacle("upconv_act", [2, 16, 8, 8], torch.float16, device, 0.2):
        return "ok", f"{version}, without a GPU kernels run in the reference implementation"
    error = in_processes(OURS + f"run_kernel({device!r})", 20)[0]["error"]
    return "ok" if error < 1e-2 else "failed", f"{version}, upconv_act on {device} is {error:.0e} from its reference"


def try_zero() -> Verdict:
    """DeepSpeed, transformers (accelerate's way to it imports that undeclared), and what compiles its ops on CPUs."""
    missing, versions = [tool for tool in ("g++", "ninja") if not shutil.which(tool)], []
    for name in ("deepspeed", "transformers"):
        try:
            versions.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            missing.append(name)
    if len(versions) == 2:
        in_processes("import deepspeed, transformers; print('{}')", 15)
    why = [f"no {', '.join(missing)}: for ZeRO" + (" on CPUs" if len(versions) == 2 else "")] if missing else []
    return "absent" if missing else "ok", ", ".join(versions + why)


def try_two(seconds: float = 20) -> Verdict:
    """A sum over two processes, by the backends that training takes."""
    gpus = torch.cuda.device_count()
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    ranks = [shared | {"RANK": rank, "LOCAL_RANK": rank} for rank in ("0", "1")]
    answers = in_processes(OURS + f"run_sums({'cuda' if gpus > 1 else 'cpu'!r})", seconds, ranks)
    sums, backend = {value for answer in answers for value in answer["sums"]}, answers[0]["backend"]
    if sums != {SUM}:
        return "failed", f"{backend} summed to {', '.join(map(str, sorted(sums)))}, right is {SUM}"
    found = f"{backend} sums right, {PROBE >> 20} MiB in {answers[0]['ms']:.0f} ms"
    return "ok", found + ("; NCCL would need a second GPU" if gpus == 1 else "")


def try_step() -> Verdict:
    """An update of both players."""
    found = in_processes(OURS + "run_step()", 20)[0]
    d, g = found["loss_d"], found["loss_g"]
    is_finite = math.isfinite(d) and math.isfinite(g)
    where = f"tiny_x4 on {found['device']}: L_D {d:.3g}, L_G {g:.3g}, {found['s']:.2f} s for the first"
    return "ok" if is_finite else "failed", where


def in_processes(code: str, seconds: float, environments: Sequence[dict[str, str]] = ({},)) -> list[dict[str, Any]]:
    """What `code` prints as a JSON object in a process for each environment; UserError with its last words."""
    names = [name for name in os.environ if name not in LAUNCHED and not name.startswith(OF_LAUNCHERS)]
    inherited, command = {name: os.environ[name] for name in names}, [sys.executable, "-c", code]

    def one(own: dict[str, str]) -> Any:
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=inherited | own)
        except subprocess.TimeoutExpired:
            raise UserError(f"its process did not end within {seconds:g} s") from None
        if done.returncode:
            words = [line for line in done.stderr.splitlines() if "error" in line.lower()] or ["without a word"]
            raise UserError(f"its process ended with {done.returncode}: {words[-1][:300]}")
        return json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1])

    with ThreadPoolExecutor(len(environments)) as pool:
        return list(pool.map(one, environments))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_sums(device: Device) -> None:
    """In one of two processes: sums of rank + 1 over both by the device's backend, and by that of the hosts."""
    from sega_dist.distributed import World

    world = World(device=device, timeout=10)
    first, second = torch.full((2, PROBE // 4), world.rank + 1.0, device=world.device)
    sums = [float(world.sum_of(first)[0]), world.total(world.rank + 1)]
    began = time.perf_counter()
    sums += [float(end) for end in world.sum_of(second).aminmax()]
    ms, backend = (time.perf_counter() - began) * 1000, torch.distributed.get_backend()
    print(json.dumps({"sums": sums, "ms": ms, "backend": backend}))
    world.close()


def run_kernel(device: str) -> None:
    """How far a fused op is from its reference, relative to it."""
    torch.manual_seed(0)
    x, w, b = (torch.randn(shape).half().to(device) for shape in ((2, 16, 8, 8), (64, 16, 3, 3), (64,)))
    right = upconv_act.reference(x.float(), w.float(), b.float(), 0.2)
    error = (upconv_act.upconv_act(x, w, b, 0.2, "triton") - right).norm() / right.norm()
    print(json.dumps({"error": float(error)}))


def run_step() -> None:
    """A step past the warm-up, on random pixels."""
    from sega_dist.batches import make_batch
    from sega_dist.distributed import World
    from sega_dist.players import Players

    config = preset("tiny_x4")
    world, size, count = World(config.train.precision), config.data.size, config.train.batch_size
    torch.manual_seed(config.train.seed)
    images = torch.randint(256, (count, 3, size, size), dtype=torch.uint8)
    players, batch, began = Players(world, config, None), make_batch(images, 0, config, world), time.perf_counter()
    found = players.step(batch, config.train.images, is_tick=False)
    losses = {name: float(found[name]) for name in ("loss_d", "loss_g")}
    print(json.dumps(losses | {"s": time.perf_counter() - began, "device": str(world.device)}))
