"""Weights made elsewhere: where they are found, and reading them without executing anything."""

import hashlib
import importlib.resources
import os
import pickle
import re
import struct
import urllib.error
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, hub, nn

from sega_dist.errors import UserError
from sega_dist.lpips import CHANNELS, Lpips
from sega_dist.networks.vgg19 import Vgg19

VARIABLE = "SEGA_DIST_VGG19"
WRAPPERS = ("params_ema", "params", "ema_state_dict", "state_dict")  # under which programs save weights; the first wins
UNREADABLE = (  # what torch.load raises, by where the damage is
    OSError, RuntimeError, ValueError, LookupError, EOFError, TypeError, AttributeError, AssertionError, struct.error,
    pickle.UnpicklingError,
)  # fmt: skip
URL = "https://download.pytorch.org/models/vgg19-dcbb9e9d.pth"  # torchvision's VGG19_Weights.IMAGENET1K_V1, 548 MB


def load_vgg19(network: Vgg19, path: Path | None) -> str:
    """Fill `network` from `path`, else from $SEGA_DIST_VGG19, else from torch.hub's cache or a download.

    Returns the SHA-256 of the file. Raises UserError if there are no weights, or they do not fit.
    """
    file = path or (Path(os.environ[VARIABLE]) if os.environ.get(VARIABLE) else _downloaded())
    _fill(network, "VGG19", file, f"--vgg19 PATH or ${VARIABLE}")
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def load_lpips(weights: Path) -> Lpips:
    """LPIPS on AlexNet's `weights`, .pth or .safetensors with torchvision's key names; torchmetrics brings the rest.

    Raises UserError if there are no weights, or they do not fit.
    """
    package = importlib.resources.files("torchmetrics.functional.image")
    linear = read_state(Path(str(package / "lpips_models/alex.pth")), "torchmetrics >= 1.6")
    network = Lpips(torch.cat([linear[f"lin{number}.model.1.weight"].flatten() for number in range(len(CHANNELS))]))
    _fill(network, "AlexNet", weights, "--lpips-weights PATH")
    return network


def _fill(network: nn.Module, kind: str, file: Path, option: str) -> None:
    """Fill `network` from a file that may hold more, or say in one line why it cannot."""
    state, wanted = read_state(file, option), network.state_dict()
    missing = [key for key in wanted if key not in state]
    if missing:
        raise UserError(f"{file} has no {missing[0]}: it must hold {kind} with torchvision's key names")
    wrong = [key for key in wanted if state[key].shape != wanted[key].shape]
    if wrong:
        raise UserError(
            f"{file}: {wrong[0]} is {tuple(state[wrong[0]].shape)}, {kind}'s is {tuple(wanted[wrong[0]].shape)}"
        )
    if not all(bool(torch.isfinite(state[key]).all()) for key in wanted):
        raise UserError(f"{file} holds values that are not finite numbers")
    network.load_state_dict({key: state[key].to(wanted[key].dtype) for key in wanted})


def read_state(file: Path, option: str) -> dict[str, Tensor]:
    """The tensors of a .pth or .safetensors file, or of the best that a training program's file holds."""
    if not file.is_file():
        raise UserError(f"weight file {file} does not exist; give it by {option}")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (*UNREADABLE, SafetensorError) as error:
        reason = str(error).splitlines()[0][:100] if str(error) else type(error).__name__
        raise UserError(f"cannot read weight file {file}: {reason}") from None
    if isinstance(state, dict):
        state = next((state[key] for key in WRAPPERS if isinstance(state.get(key), dict)), state)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{file} is not a state dict of tensors")
    return state


def _downloaded() -> Path:
    name = URL.rsplit("/", 1)[1]
    file = Path(hub.get_dir()) / "checkpoints" / name
    if not file.is_file():
        prefix = re.findall(r"-([0-9a-f]{8,})\.", name)[0]  # torchvision writes the start of the digest into the name
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            hub.download_url_to_file(URL, str(file), hash_prefix=prefix)
        except (OSError, urllib.error.URLError, RuntimeError) as error:
            raise UserError(
                f"VGG19's weights are needed, and {URL} could not be fetched ({error}); give them by --vgg19 PATH"
                f" or ${VARIABLE}, or train a preset that needs none, such as tiny_x4"
            ) from None
    return file
