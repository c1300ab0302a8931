"""What only a GPU can show: training and scores there are those of the CPU, and compiled kernels are right."""

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import SMALL, program
from PIL import Image
from ranks import on_ranks
from torch import Tensor

from sega_dist import evaluate
from sega_dist.batchnorm import GlobalBatchNorm
from sega_dist.bench.kernels import Case, callable_of, errors, limits_of, truth
from sega_dist.bench.measure import chained
from sega_dist.config import Config, DataConfig, GeneratorConfig
from sega_dist.data.pairs import bicubic
from sega_dist.data.shards import Manifest
from sega_dist.kernels import backend, conv3x3_act
from sega_dist.networks.build import build_generator
from sega_dist.networks.generator import ResidualInternalDenseBlock
from sega_dist.pictures import to_tensor
from sega_dist.snapshot import save_snapshot

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


ON_GPU = {"ACCELERATE_USE_CPU": "false"}  # a process trains on one device; the other tests chose the CPU


def stats(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "stats.jsonl").read_text().splitlines()]


def test_first_losses_are_the_cpus(manifest: Manifest, tmp_path: Path):
    for device in ("cpu", "cuda"):
        words = ["--data", manifest.folder, "--out", tmp_path / device, "--device", device]
        program("train", *SMALL, *words, "--train.images", 12, env=ON_GPU)
    cpu, cuda = (stats(tmp_path / device)[0] for device in ("cpu", "cuda"))
    for name in ("loss_d", "loss_g", "loss_pixel", "loss_adv"):
        assert cuda[name] == pytest.approx(cpu[name], rel=1e-3)


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
def test_runs_stop_and_go_on(manifest: Manifest, tmp_path: Path, precision: str):
    words = ["--data", manifest.folder, "--out", tmp_path / "run", "--device", "cuda"]
    program("train", *SMALL, *words, "--train.images", 12, "--train.precision", precision, env=ON_GPU)
    program("train", *words, "--resume", "latest", "--train.images", 36, env=ON_GPU)
    assert [entry["nimg"] for entry in stats(tmp_path / "run")] == [12, 24, 36]


def test_scores_are_the_cpus(manifest: Manifest, tmp_path: Path):
    config = Config(data=DataConfig(size=64), generator=GeneratorConfig(channels=8, nested_blocks=1))
    snapshot = save_snapshot(tmp_path, 8, config, build_generator(config).state_dict())
    found = {}
    for device in ("cpu", "cuda"):
        out = tmp_path / device
        evaluate.main([str(snapshot), "--data", str(manifest.folder), "--out", str(out), "--device", device])
        found[device] = json.loads((out / "metrics.json").read_text())["methods"]
    for method in ("bicubic", "model"):
        assert found["cuda"][method] == pytest.approx(found["cpu"][method], abs=2e-3)


# Kernels -----------------------------------------------------------------------------------------------------------


def table_entries() -> list[tuple[str, dict[str, Any]]]:
    """Every set of launch parameters in the committed tables that this chip may use, with its file's name."""
    if not torch.cuda.is_available():
        return []
    capability = 0 if torch.version.hip else 10 * torch.cuda.get_device_capability()[0]
    found = []
    for path in sorted(backend.TABLES.glob("*.json")):
        entries = [] if path.stem == "interpreter" else json.loads(path.read_text())["launch"]
        found += [(f"{path.stem}-{i}", e) for i, e in enumerate(entries) if e.get("cc", 0) <= capability]
    return found


ENTRIES = table_entries()


@pytest.mark.parametrize("entry", [e for _, e in ENTRIES], ids=[name for name, _ in ENTRIES])
def test_every_table_entry_is_right(entry: dict[str, Any]):
    """Forward and every gradient of a RIDB and of an upsampling stage, against fp64, beside torch's own error.

    Maps that fill no box of pixels; the real sizes are checked where they are timed.
    """
    column = "hybrid" if entry["kernel"] == "pointwise" else "triton"
    torch.backends.cudnn.allow_tf32 = False
    for dtype in {"bf16", "fp32"} & set(entry["dtypes"]):
        for level in ("ridb", "upconv"):
            case = Case(level, "both", 3, 17, dtype, "cuda")
            exact = truth(case)
            own = errors(callable_of(case, "eager")(), exact)
            with backend.forced(**{entry["kernel"]: entry["parameters"]}):
                mine = errors(callable_of(case, column)(), exact)
            limits = limits_of(own, dtype)
            assert all(e <= limit for e, limit in zip(mine, limits, strict=True)), max(mine)


@pytest.mark.parametrize("column", ["triton", "hybrid"])
def test_a_hundred_repeats_give_the_same_bits(column: str):
    """Races show as differences; and nothing is added in an order that changes."""
    call = callable_of(Case("ridb", "both", 8, 64, "bf16", "cuda"), column)
    torch.backends.cudnn.deterministic = True
    first = call()
    for _ in range(100):
        assert all(torch.equal(a, b) for a, b in zip(first, call(), strict=True))


def test_an_image_alone_is_that_image_in_a_batch():
    block = ResidualInternalDenseBlock(64, 0.2, 0.2, "triton").cuda()
    x = torch.randn(5, 64, 32, 32, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(block(x)[3:4], block(x[3:4]))


@pytest.mark.parametrize("column", ["triton", "hybrid"])
@pytest.mark.parametrize("level", ["ridb", "upconv", "rals"])
def test_ops_live_in_cuda_graphs(level: str, column: str):
    """What a replay leaves, in memory overwritten before, is what a call gives."""
    call = callable_of(Case(level, "both", 2, 16, "bf16", "cuda"), column)
    torch.backends.cudnn.deterministic = True
    replayed, times = chained(call)
    assert min(times) > 0
    for mine, eager in zip(replayed, call(), strict=True):
        torch.testing.assert_close(mine, eager)


def test_ops_live_in_compiled_training():
    """Inductor around the fused ops: the generator's losses fall as those of the reference do."""

    def train(impl: str, is_compiled: bool) -> list[float]:
        torch.manual_seed(0)
        config = Config(generator=GeneratorConfig(channels=32, nested_blocks=1), kernels=impl)
        generator = build_generator(config).cuda().to(memory_format=torch.channels_last)
        if is_compiled:
            generator.compile(fullgraph=True)
        optimizer = torch.optim.Adam(generator.parameters(), 1e-3)
        lr, hr = torch.randn(4, 3, 16, 16, device="cuda"), torch.rand(4, 3, 64, 64, device="cuda")
        losses = []
        for _ in range(30):
            with torch.autocast("cuda", torch.bfloat16):
                loss = (generator(lr).float() - hr).abs().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    reference = train("reference", False)
    for impl in ("triton", "hybrid"):
        assert train(impl, True) == pytest.approx(reference, rel=0.03)


def test_index_arithmetic_near_the_limit_is_right_or_refused():
    """The largest maps that pass are computed rightly at their far end; beyond, one clear error."""
    side = 4096
    x = torch.randn(1, 32, side, 2 * side - 16, device="cuda", dtype=torch.bfloat16)  # nearly 2**30 elements
    weight: Tensor = torch.randn(32, 32, 3, 3, device="cuda") / 17
    with torch.no_grad():
        y = conv3x3_act.conv3x3_act(x, None, weight, None, impl="triton")
        expected = torch.nn.functional.conv2d(x[..., -64:, -64:].float(), weight, padding=1)
    assert torch.linalg.norm(y[..., -32:, -32:].float() - expected[..., -32:, -32:]) < 0.02 * expected.norm()
    with pytest.raises(ValueError, match="not below 2,147,483,648"):
        backend.plan("triton", {"ridb": [1, 32, side, 2 * side]}, torch.bfloat16, "cuda", 0.2)


# Batch norm --------------------------------------------------------------------------------------------------------


def sync_and_ours(rank: int, ranks: int) -> list[list[Tensor]]:
    """Two forwards and one backward of torch's SyncBatchNorm and of ours, two ranks sharing one GPU over gloo."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    found = []
    for make in (torch.nn.SyncBatchNorm, lambda *given, **more: GlobalBatchNorm(torch.nn.BatchNorm2d(*given, **more))):
        norm = make(8, track_running_stats=False).to("cuda", torch.float64)
        torch.manual_seed(rank)
        x = torch.randn(2, 3, 8, 6, 5, device="cuda", dtype=torch.float64).requires_grad_()
        y = torch.stack([norm(part.contiguous(memory_format=torch.channels_last)) for part in x])
        (y * torch.arange(y.numel(), device="cuda").view_as(y)).sum().backward()
        found.append([tensor.detach().cpu() for tensor in (y, x.grad, norm.weight.grad, norm.bias.grad)])
    return found


def test_our_global_batch_norm_is_torchs(tmp_path: Path):
    for torchs, ours in on_ranks(sync_and_ours, 2, tmp_path):
        for expected, found in zip(torchs, ours, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scale", [2, 4, 8, 16])
def test_bicubic_is_pillows_on_the_device(scale: int):
    pixels = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    small = Image.fromarray(pixels).resize((256 // scale, 256 // scale), Image.Resampling.BICUBIC)
    for images in (torch.from_numpy(pixels)[None].permute(0, 3, 1, 2), to_tensor(Image.fromarray(pixels))[None]):
        ours = bicubic(images.cuda(), 256 // scale, 256 // scale)[0].cpu()
        assert (ours.int() - to_tensor(small).int()).abs().max() <= 1


TINY_FACES = ("--preset", "facegan_64", "--facegan.channel-base", 1024, "--facegan.channel-max", 64,
              "--train.batch-size", 16, "--train.images", 512, "--train.tick-kimg", 0.256)  # fmt: skip


@pytest.fixture(scope="module")
def face_gan(tmp_path_factory: pytest.TempPathFactory, manifest: Manifest) -> Path:
    run = tmp_path_factory.mktemp("gan") / "run"
    program("train", *TINY_FACES, "--data", manifest.folder, "--data.size", manifest.size, "--out", run, env=ON_GPU)
    return run


def explored(gan: Path, lr: Path, out: Path, *words: Any) -> dict[str, Any]:
    program("explore", lr, out, "--gan", gan, "--device", "cuda", *words, env=ON_GPU)
    return json.loads((out / "results.json").read_text())


@pytest.fixture(scope="module")
def small_faces(tmp_path_factory: pytest.TempPathFactory, manifest: Manifest) -> Path:
    folder = tmp_path_factory.mktemp("lr")
    for number in range(32):
        pixels = np.random.default_rng(number).integers(0, 256, (manifest.size // 8, manifest.size // 8, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02d}.png")
    return folder


@pytest.mark.parametrize("words", [(), ("--precision", "bf16"), ("--compile",)])
def test_a_search_on_the_device_is_the_hosts(face_gan: Path, small_faces: Path, tmp_path: Path, words: tuple[str, ...]):
    host = tmp_path / "host"
    program("explore", small_faces, host, "--gan", face_gan, "--images", 4, "--rlse.steps", 5, "--device", "cpu")
    mine = explored(face_gan, small_faces, tmp_path / "device", "--images", 4, "--rlse.steps", 5, *words)
    theirs = json.loads((host / "results.json").read_text())
    assert mine["mean"]["loss"] == pytest.approx(theirs["mean"]["loss"], rel=0.05 if "bf16" in words else 1e-3)


def test_sixteen_faces_at_once_are_four_times_cheaper_each(face_gan: Path, small_faces: Path, tmp_path: Path):
    seconds: dict[int, list[float]] = {1: [], 16: []}
    for number in range(3):
        for batch, found in seconds.items():
            words = ("--batch", batch, "--images", 32 if batch == 16 else 3)
            found.append(explored(face_gan, small_faces, tmp_path / f"{batch}-{number}", *words)["seconds_a_face"])
    assert sorted(seconds[1])[1] >= 4 * sorted(seconds[16])[1], seconds
