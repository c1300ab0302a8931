"""Compile every kernel for chips that are not there, and read the machine code: fits, no spills, matrix instructions.

    python -m sega_dist.kernels.aot --arch sm_90 sm_80 --dtype bf16

The launches are those that the ops make on the real shapes, recorded on meta tensors, with every set of launch
parameters in the committed tables.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from sega_dist.kernels import backend, compat
from sega_dist.kernels.bias_act import run_act_grad, run_bias_act
from sega_dist.kernels.conv3x3_act import run_forward, run_input_grad, run_weight_grad
from sega_dist.kernels.rals import run_rals
from sega_dist.kernels.ridb import run_backward, run_forward_chain

# Shared memory a program may have, in bytes, and the instruction that shows tensor cores at work. The compiler checks
# neither: a launch would fail, or be slow. Source: CUDA C++ programming guide, technical specifications by capability.
CHIPS = {
    "sm_80": (166_912, r"\bHMMA"), "sm_89": (101_376, r"\bHMMA"), "sm_90": (232_448, r"\bHGMMA"),
    "sm_100": (232_448, r"\bUTC\w*MMA"), "gfx942": (65_536, r"\bv_mfma"),
}  # fmt: skip
DTYPES = {name: dtype for dtype, name in backend.DTYPES.items() if dtype != torch.float64}
PRODUCTS = (
    "conv3x3_forward",
    "conv3x3_input_grad",
    "conv3x3_weight_grad",
    "ridb_weight_grad",
)  # those that multiply matrices


def launches(dtype: torch.dtype, batch: int = 8, side: int = 64, channels: int = 64) -> list[compat.Launch]:
    """Each different launch of a training step's ops on these shapes, with the parameters now in force."""
    n, h, c = batch, side, channels
    kind: dict[str, Any] = {"dtype": dtype, "device": "meta"}
    masters: dict[str, Any] = {"dtype": torch.float32, "device": "meta"}
    x, wide = torch.empty(n, h, h, c, **kind), torch.empty(n, h, h, 4 * c, **kind)
    big = torch.empty(n, 2 * h, 2 * h, c, **kind)
    filters = [torch.empty(c, 3, 3, ci, **kind) for ci in [c, 2 * c] * 4 + [c]]
    biases = [torch.empty(c, **masters) for _ in filters]
    saved, masks = (
        torch.empty(8, n, h, h, c, **kind),
        torch.empty(4, n, h, h, c // 16, dtype=torch.int16, device="meta"),
    )
    up, of_up = torch.empty(4 * c, 3, 3, c, **kind), torch.empty(4 * c, **masters)
    logits, mean = torch.empty(n, 1, **masters), torch.empty((), **masters)
    with compat.recording() as found:
        run_forward_chain(x, filters, biases, saved, masks, 0.2, 0.2)
        run_backward(x, x, filters, saved, masks, 0.2, 0.2)
        run_forward(x, None, up, of_up, None, big, None, 0.2, 1.0, shuffle=True)
        run_act_grad([big], big, None, wide, 0.2, 1.0, shuffle=True)
        run_input_grad([(wide, up)], gx=x)
        run_weight_grad([x], wide)
        run_bias_act(x, biases[0], [x, x, x], x, masks[0], 0.2, 1.0, y2=saved[:2].view(n, h, h, 2 * c)[..., :c])
        run_act_grad([x, x, x], None, masks[0], x, 0.2, 1.0, total=x)
        run_rals(logits, logits, mean, mean, 1.0)
    return list({repr(launch): launch for launch in found}.values())


def tables(dtype: str, architecture: str, names: Sequence[str] = ()) -> Iterator[dict[str, backend.Entry]]:
    """Every set of launch parameters in the committed tables that may be used on this chip: kernel -> parameters."""
    capability = int(architecture[3:]) if architecture.startswith("sm_") else 0
    paths = [path for path in sorted(backend.TABLES.glob("*.json")) if not names or path.stem in names]
    for path in paths:
        for entry in json.loads(path.read_text())["launch"]:
            fits = entry.get("cc", 0) <= capability and dtype in entry["dtypes"]
            if path.stem != "interpreter" and fits:
                yield {entry["kernel"]: entry["parameters"]}


def check(launch: compat.Launch, architecture: str) -> dict[str, Any]:
    """What the compiler made of a launch, and under `faults` what is wrong with it."""
    compiled = launch.compile(architecture)
    limit, matrix = CHIPS[architecture]
    row = {"kernel": launch.kernel.fn.__name__, "arch": architecture, "shared": compiled.metadata.shared}
    row |= _of_nvidia(compiled) if "ptx" in compiled.asm else _of_amd(compiled)
    code = row.pop("code")
    row["matrix"] = len(re.findall(matrix, code))
    wrong = {
        f"{row['shared']:,} bytes of shared memory, the chip has {limit:,}": row["shared"] > limit,
        f"{row['spills']} bytes of registers spilled": row["spills"] > 0,
        "no matrix instructions": row["kernel"] in PRODUCTS and not row["matrix"],
        "wgmma serialised": row["serialised"],
    }
    return row | {"faults": [fault for fault, is_so in wrong.items() if is_so]}


def _of_nvidia(compiled: Any) -> dict[str, Any]:
    """Registers, spills and warnings by the assembler that Triton carries, and its disassembly."""
    folder = Path(compat.triton.__file__).parent / "backends/nvidia/bin"
    target = re.search(r"\.target (\w+)", compiled.asm["ptx"])[1]  # type: ignore[index]
    assembler = compat.assembler(int(re.sub(r"\D", "", target)))
    with tempfile.TemporaryDirectory() as name:
        ptx, cubin = Path(name) / "kernel.ptx", Path(name) / "kernel.cubin"
        ptx.write_text(compiled.asm["ptx"])
        cubin.write_bytes(compiled.asm["cubin"])
        usage, code = (_output(folder / tool, option, cubin)
                       for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c")))  # fmt: skip
        log = _output(assembler, "-v", "-lineinfo", f"--gpu-name={target}", ptx, "-o", Path(name) / "again.cubin")
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())  # type: ignore[union-attr]
    spilled = max(stack, len(re.findall(r"\b(?:LDL|STL)\b", code)))
    return {"registers": registers, "spills": spilled, "serialised": "C75" in log, "code": code}


def _output(*words: str | Path) -> str:
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def _of_amd(compiled: Any) -> dict[str, Any]:
    code = compiled.asm["amdgcn"]
    registers = max(map(int, re.findall(r"\.vgpr_count:\s+(\d+)", code)))
    spilled = sum(map(int, re.findall(r"\.vgpr_spill_count:\s+(\d+)", code)))
    return {"registers": registers, "spills": spilled, "serialised": False, "code": code}


def report(architectures: list[str], dtypes: list[str], names: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """A row for every kernel, chip, dtype and set of parameters in the tables of these names, or in all."""
    seen = set()
    for architecture in architectures:
        for name in dtypes:
            # Kernels that an entry does not speak of are launched with the start points, seen once.
            start = {kernel: p for table in tables(name, architecture, ["start"]) for kernel, p in table.items()}
            for parameters in tables(name, architecture, names):
                with backend.forced(**start | parameters):
                    found = launches(DTYPES[name])
                for launch in found:
                    if (key := (architecture, repr(launch))) not in seen:
                        seen.add(key)
                        yield {"dtype": name, "parameters": parameters, **check(launch, architecture)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", nargs="+", default=["sm_90"], choices=list(CHIPS))
    parser.add_argument("--dtype", nargs="+", default=["bf16"], choices=list(DTYPES))
    parser.add_argument("--table", nargs="+", default=[], help="of kernels/configs; default: all")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    arguments = parser.parse_args()
    rows = []
    for row in report(arguments.arch, arguments.dtype, arguments.table):
        rows.append(row)
        faults = "; ".join(row["faults"]) or "ok"
        print(f"{row['arch']:7} {row['dtype']:5} {row['kernel']:22} {row['registers']:4} registers"
              f" {row['shared']:7,} B shared {row['matrix']:3} matrix instructions  {faults}", flush=True)  # fmt: skip
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))
    sys.exit(any(row["faults"] for row in rows))


if __name__ == "__main__":
    main()
