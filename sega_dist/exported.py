"""A generator that onnxruntime runs, from an ONNX file of `sega-dist export`."""

import importlib
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sega_dist.errors import UserError

SUFFIX = ".onnx"
INPUT, OUTPUT = "lr", "sr"  # the model's ends
# TensorFloat-32 is on by default there, and off where torch computes: scores would differ.
PROVIDERS: dict[str, tuple[str, dict[str, str]]] = {
    "cpu": ("CPUExecutionProvider", {}),
    "cuda": ("CUDAExecutionProvider", {"use_tf32": "0"}),
}
QUIET = 4  # fatal errors alone: others come back as exceptions


class OnnxGenerator(nn.Module):
    """LR (N,3,h,w) in [-1,1] -> SR (N,3,scale*h,scale*w) in [-1,1], both fp32; any N, h and w.

    UserError where onnxruntime is absent, cannot use the device, or cannot read the file.
    """

    metadata: dict[str, str]  # what the file says of itself

    def __init__(self, file: Path, device: torch.device):
        super().__init__()
        onnxruntime, state = required("onnxruntime"), required("onnxruntime.capi.onnxruntime_pybind11_state")
        options = onnxruntime.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = QUIET, torch.get_num_threads()
        self.refusals = (state.Fail, state.InvalidArgument, state.InvalidGraph, state.InvalidProtobuf, state.NoSuchFile,
                         state.NotImplemented, state.RuntimeException, ValueError)  # fmt: skip
        try:
            with warnings.catch_warnings(action="ignore"):  # of an absent provider, which is found out below
                self.session = onnxruntime.InferenceSession(
                    file, options, providers=[PROVIDERS[device.type]], enable_fallback=0
                )
        except self.refusals as error:
            raise UserError(f"{file} is not an ONNX model that onnxruntime can read{_reason(error)}") from None
        if PROVIDERS[device.type][0] not in self.session.get_providers():
            raise UserError(f"this onnxruntime cannot use {device.type}; use --device cpu, or install onnxruntime-gpu")
        self.eval()
        self.metadata = self.session.get_modelmeta().custom_metadata_map

    def forward(self, lr: Tensor) -> Tensor:
        try:
            (sr,) = self.session.run([OUTPUT], {INPUT: lr.float().cpu().numpy()})
        except self.refusals as error:
            raise UserError(f"onnxruntime cannot run the model on {tuple(lr.shape)}{_reason(error)}") from None
        return torch.from_numpy(sr).to(lr.device)


def required(package: str) -> Any:
    """A package of the extra `export`, or a UserError that names it."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise UserError(f"{package} is not installed; pip install 'sega-dist[export]'") from None


def _reason(error: Exception) -> str:
    return f" ({' '.join(str(error).rpartition(' : ')[2].split())[:160]})"
