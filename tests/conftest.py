"""What the tests share: small procedural faces, their shards, and ways to run the program as a user does."""

import io
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image

# Decided when kernels are imported: without a GPU they run in Triton's interpreter.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic algorithms ask for on a GPU

# The program imports these where they are used; tests fork, and count what a process opens: here once for all.
import matplotlib.figure  # noqa: F401
import torch._dynamo
import torchmetrics.functional.image  # noqa: F401

from sega_dist.data.shards import Manifest, open_manifest
from sega_dist.data.synthetic import face, write_folder
from sega_dist.pictures import to_tensor
from sega_dist.shard import ShardCommand, shard

ROOT = Path(__file__).resolve().parent.parent

# A network of a few thousand weights on 64-pixel faces, with every part of the real one.
SMALL = [
    "--preset", "tiny_x4", "--data.size", "64", "--data.patch", "0", "--data.workers", "0",
    "--generator.channels", "8", "--encoder.width", "2", "--discriminator.width", "4",
    "--train.batch-size", "12", "--train.content-warmup-kimg", "0", "--train.tick-kimg", "0.012",
    "--train.grid-kimg", "1", "--train.checkpoint-kimg", "1", "--train.ema-kimg", "0.1",
]  # fmt: skip


@pytest.fixture(scope="session")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 30 procedural faces of 64 pixels in CelebA's layout."""
    folder = tmp_path_factory.mktemp("source") / "faces"
    write_folder(folder, images=30, seed=7, size=64)
    return folder


@pytest.fixture(scope="session")
def manifest(faces: Path, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Those faces as shards: 24 to train, 6 to test, in shards of 10."""
    out = tmp_path_factory.mktemp("data") / "shards"
    shard(ShardCommand(faces, out, size=64, shard_size=10, jobs=1))
    return open_manifest(out)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real faces and weights, or a skip that says what is missing."""
    folder = os.environ.get("SEGA_DIST_TEST_DATA")
    if not folder:
        pytest.skip("SEGA_DIST_TEST_DATA is not set: no real faces and no VGG19 weights")
    return Path(folder)


def photographs(real_data: Path, count: int) -> torch.Tensor:
    """The first real test faces, (count,3,256,256) uint8."""
    with zipfile.ZipFile(real_data / "celeba256-test.zip") as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".jpg"))[:count]
        return torch.stack([to_tensor(Image.open(io.BytesIO(archive.read(name)))) for name in names])


def portraits(count: int, size: int) -> torch.Tensor:
    """Procedural faces, (count,3,size,size) uint8."""
    return torch.stack([to_tensor(Image.fromarray(face(2, i, size))) for i in range(count)])


def program(*words: object, ranks: int = 0, timeout: float = 240, env: dict[str, str] | None = None,
            code: int = 0, launcher: str = "cpu") -> subprocess.CompletedProcess[str]:  # fmt: skip
    """Run `sega-dist WORDS`, or with `ranks` the same under accelerate launch; check the exit code."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    python = [sys.executable, "-m"]
    if ranks:
        yaml = ROOT / f"launchers/accelerate/{launcher}.yaml"
        start = [*python, "accelerate.commands.launch", "--config_file", str(yaml), "--num_processes", str(ranks), "-m"]
        command = [*start, f"sega_dist.{words[0]}", *map(str, words[1:])]
        environment.pop("ACCELERATE_USE_CPU", None)  # the launcher's file and --device decide
    else:
        command = [*python, "sega_dist", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment, cwd=ROOT)
    assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """As the programs that tests start: on the CPU, and with the same order of additions."""
    os.environ["ACCELERATE_USE_CPU"] = "true"
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _one_seed() -> None:
    torch.manual_seed(0)
