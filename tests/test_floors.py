"""The drawing of the house: a module imports only from floors below its own."""

import ast
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

FLOORS: list[set[str]] = [
    {"errors"},
    {"config", "arguments", "progress"},
    {"presets"},
    {"kernels.compat"},
    {"kernels.backend"},
    {"kernels.bias_act"},
    {"kernels.conv3x3_act", "kernels.rals"},
    {"kernels.idb", "kernels.upconv_act"},
    {"kernels.ridb"},
    {"kernels.aot"},
    {"data.positions", "data.crops", "data.sources", "data.pairs", "data.synthetic"},
    {"data.celeba"},
    {"data.splits"},
    {"data.shards"},
    {"data.images", "data.packing", "data.remote"},
    {"networks.initial", "networks.vgg19", "networks.checkpointing", "networks.enlarging"},
    {"networks.generator", "networks.encoder", "networks.srcnn", "networks.vdsr", "networks.fsrnet"},
    {"networks.discriminator"},
    {"networks.srgan", "networks.esrgan", "networks.urdgn", "networks.facegan", "networks.dcgan"},
    {"networks.build"},
    {"paper", "intervals", "losses", "metrics", "pictures", "lpips", "latents"},
    {"objectives", "niqe", "search"},
    {"batchnorm", "exported", "launch", "launched"},
    {"distributed"},
    {"engines"},
    {"checkpoint", "snapshot", "ema", "stats", "weights", "tracing", "recording", "batches"},
    {"owner", "preemption", "watchdog", "environment"},
    {"preview", "runs", "gan"},
    {"players"},
    {"loop"},
    {"trials", "bench.measure", "bench.results", "bench.work"},
    {"scoring", "tables"},
    {"figures", "faces", "searched"},
    {
        "shard",
        "verify",
        "train",
        "evaluate",
        "export",
        "foreign",
        "upscale",
        "explore",
        "describe",
        "synthetic",
        "doctor",
        "slurm",
        "report",
    },
    {"comparison", "resume", "bench.kernels", "bench.scaling", "bench.step", "bench.data"},
    {"bench.gpu", "compare"},
    {"bench.gpu_step", "sweep"},
    {"cli"},
    {"__main__"},
]


def modules() -> dict[str, Path]:
    found = {}
    for folder, prefix in ((ROOT / "sega_dist", ""), (ROOT / "kernels", "kernels."), (ROOT / "data", "data.")):
        for path in folder.rglob("*.py"):
            if not any(parent.is_symlink() for parent in path.parents if ROOT in parent.parents):
                found[prefix + ".".join(path.relative_to(folder).with_suffix("").parts)] = path
    return found


def floor(module: str) -> int:
    for number, rooms in enumerate(FLOORS):
        if module in rooms or f"{module.split('.')[0]}.*" in rooms:
            return number
    raise AssertionError(f"{module} stands on no floor: add it to FLOORS")


def imported(path: Path) -> list[str]:
    """The project's modules that a file imports, without `sega_dist.`."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "sega_dist":
            module = (node.module or "").removeprefix("sega_dist").lstrip(".")
            known = modules()
            names += [module] if module in known else [f"{module}.{a.name}".lstrip(".") for a in node.names]
        elif isinstance(node, ast.Import):
            names += [a.name.removeprefix("sega_dist.") for a in node.names if a.name.startswith("sega_dist.")]
    return names


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_only_from_below(module: str):
    for other in imported(modules()[module]):
        assert floor(other) < floor(module), f"{module} climbs to {other}"


def test_links_and_packages():
    for name in ("kernels", "data"):
        link = ROOT / "sega_dist" / name
        assert link.is_symlink()
        assert link.resolve() == ROOT / name
        assert not (ROOT / name / "__init__.py").exists()
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert {m.rpartition(".")[0] for m in modules()} == {p.removeprefix("sega_dist").lstrip(".") for p in packages}


def test_only_distributed_knows_accelerate_and_no_room_is_called_utils():
    for module, path in modules().items():
        tree = ast.walk(ast.parse(path.read_text()))
        roots = {(node.module or "").split(".")[0] for node in tree if isinstance(node, ast.ImportFrom)}
        assert module in {"distributed", "engines"} or not roots & {"accelerate", "deepspeed"}
        assert not roots & {"kernels", "data", "launchers", "torchvision"}
        assert module.split(".")[-1] not in {"utils", "common", "helpers", "base", "manager", "factory"}
    assert not list((ROOT / "launchers").rglob("*.py"))


def test_a_command_starts_without_what_takes_seconds_to_import():
    """Up to six seconds on every rank of a run, and before a misspelt option is told."""
    heavy = {"torch._dynamo", "torchmetrics", "matplotlib", "deepspeed", "scipy", "transformers", "sympy"}
    program = f"""
import importlib, json, sys
from sega_dist.cli import COMMANDS
for module in sorted({{module for module, *_ in COMMANDS.values()}}):
    importlib.import_module(module)
print(json.dumps([sorted({heavy} & set(sys.modules)), "torch" in sys.modules]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert json.loads(done.stdout) == [[], True]
