"""A snapshot as one file to give away: `sega-dist export SNAPSHOT OUT` writes safetensors or ONNX, with its scores."""

import json
import logging
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sega_dist.arguments import OutPath, SnapshotPath, parse
from sega_dist.data.shards import write_whole
from sega_dist.errors import UserError, run
from sega_dist.exported import INPUT, OUTPUT, SUFFIX, OnnxGenerator, required
from sega_dist.snapshot import EVAL, METADATA, Snapshot, header, load_snapshot, run_of, to_bytes

OPSET = 18  # the first whose Resize knows antialiasing, and the one that torch's exporter speaks without translation
TOLERANCE = 1e-4  # largest difference between torch and onnxruntime in [-1,1]; a grey level is 8e-3


@dataclass(frozen=True)
class ExportCommand:
    """Write a snapshot with its protocol and scores to one file, .safetensors or .onnx."""

    snapshot: SnapshotPath  # a .safetensors file, or a run's folder (its newest snapshot)
    out: OutPath  # the file to write: NAME.safetensors, or NAME.onnx, which onnxruntime must agree on with torch
    metrics: Path | None = None  # a metrics.json of evaluate; default RUN/eval/metrics.json if of this snapshot


def main(argv: list[str] | None = None) -> None:
    command = parse(ExportCommand, argv or [], "sega-dist export")
    check_words(command)
    snapshot = load_snapshot(command.snapshot, kernels="reference")
    evaluated = find_scores(command, snapshot)
    command.out.parent.mkdir(parents=True, exist_ok=True)
    if command.out.suffix == SUFFIX:
        write_onnx(command.out, snapshot, evaluated)
    else:
        weights = snapshot.generator.state_dict()
        write_whole(command.out, to_bytes(snapshot.nimg, snapshot.config, weights, data=snapshot.data, **evaluated))
    said = "with its scores" if evaluated["scores"] else "no scores: run sega-dist evaluate first"
    print(f"{command.snapshot} -> {command.out}, {said}")


def check_words(command: ExportCommand) -> None:
    """UserError for what cannot end well, before any work."""
    if command.out.suffix not in (".safetensors", SUFFIX):
        raise UserError(f"{command.out} must end with .safetensors or {SUFFIX}")
    if command.out.exists():
        raise UserError(f"{command.out} exists; remove it or name another place")
    if command.snapshot.suffix == SUFFIX:
        raise UserError(f"{command.snapshot} is exported already; name the .safetensors snapshot it was made from")
    for package in ("onnx", "onnxscript", "onnxruntime") if command.out.suffix == SUFFIX else ():
        required(package)


def find_scores(command: ExportCommand, snapshot: Snapshot) -> dict[str, Any]:
    """Protocol and scores of this very snapshot: those asked for, or those evaluate left in the run, or None."""
    found = run_of(command.snapshot) / EVAL / "metrics.json"
    if command.metrics or found.exists():
        try:
            return read_scores(command.metrics or found, snapshot)
        except UserError as error:
            if command.metrics:
                raise
            print(f"ignored: {error}")
    return {"protocol": None, "scores": None}


def read_scores(file: Path, snapshot: Snapshot) -> dict[str, Any]:
    """What a metrics.json holds; UserError where it is none, or another snapshot's."""
    try:
        results = json.loads(file.read_text())
        protocol, scores = results["protocol"], {"images": results["images"], **results["methods"]}
        theirs = protocol["nimg"], protocol["scale"]
    except (KeyError, RecursionError, TypeError, ValueError):
        raise UserError(f"{file} is no metrics.json of sega-dist evaluate") from None
    if theirs != (ours := (snapshot.nimg, snapshot.config.scale)):
        raise UserError(f"{file} is of nimg {theirs[0]} and scale {theirs[1]}, the snapshot of {ours[0]} and {ours[1]}")
    return {"protocol": protocol, "scores": scores}


def write_onnx(out: Path, snapshot: Snapshot, evaluated: dict[str, Any]) -> None:
    """The generator as an ONNX model with its weights inside, once onnxruntime has shown that it computes the same."""
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
        program, file = to_onnx(snapshot.generator), Path(folder) / out.name
        program.save(file, external_data=False)
        check, weights = compare(OnnxGenerator(file, torch.device("cpu")), snapshot), snapshot.generator.state_dict()
        values = header(snapshot.nimg, snapshot.config, weights, data=snapshot.data, opset=OPSET, check=check,
                        **evaluated)  # fmt: skip
        program.model.metadata_props[METADATA] = json.dumps(values)
        program.save(file, external_data=False)
        write_whole(out, file.read_bytes())


def to_onnx(generator: nn.Module) -> Any:
    """A torch.onnx.ONNXProgram with any batch, height and width, of a generator that is plain torch."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns of torchvision, which nothing here needs
    example = (torch.zeros(2, 3, 24, 20),)  # three sizes that differ: none is taken for another, or for a constant 1
    with warnings.catch_warnings(action="ignore"), torch.no_grad():
        program: Any = torch.onnx.export(
            generator, example, dynamo=True, input_names=[INPUT], output_names=[OUTPUT], opset_version=OPSET,
            dynamic_shapes=({0: "batch", 2: "height", 3: "width"},), verbose=False)  # fmt: skip
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # the exporter's stack traces, with paths of this machine
    return program


def compare(exported: nn.Module, snapshot: Snapshot) -> dict[str, Any]:
    """The largest difference on noise of four shapes, one of them odd; UserError where it is above the tolerance."""
    noise, side, worst = torch.Generator().manual_seed(0), snapshot.config.lr_size, 0.0
    shapes = [(1, 3, 16, 16), (3, 3, 24, 40), (2, 3, 17, 23), (1, 3, side, side)]  # a branch on sizes shows at odd ones
    for shape in shapes:
        lr = torch.rand(shape, generator=noise) * 2 - 1
        expected, found = snapshot.generator(lr), exported(lr)
        difference = float((found - expected).abs().max()) if found.shape == expected.shape else float("inf")
        if not difference <= TOLERANCE:  # nor where it is not a number
            raise UserError(f"not written: of noise {shape} onnxruntime makes {tuple(found.shape)}, which differs from"
                            f" torch's {tuple(expected.shape)} by {difference:.2g}, more than {TOLERANCE}")  # fmt: skip
        worst = max(worst, difference)
    print(f"onnxruntime differs from torch by {worst:.2g} at most, on {len(shapes)} shapes")
    return {"difference": worst, "lr": ["x".join(map(str, shape)) for shape in shapes]}


if __name__ == "__main__":
    run(main)
