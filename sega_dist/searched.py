"""What a search of a GAN left in its folder, as a method that can be compared with others."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sega_dist import config as configuration
from sega_dist.data.crops import UnusableImage, decode
from sega_dist.errors import UserError
from sega_dist.paper import MGANPRIOR, PULSE, RLSE
from sega_dist.pictures import to_tensor

HEADER, RESULTS, IMAGES = "search.json", "results.json", "sr"  # what was asked, what came of it, the faces


def png(name: str) -> Path:
    """Where the face of that name stands, below the folder of faces."""
    return Path(name).with_suffix(".png")


@dataclass(frozen=True)
class Searched:
    """What a folder of results holds, as a method that can be compared with others."""

    folder: Path
    header: dict[str, Any]

    @property
    def name(self) -> str:
        """The literature's."""
        method = self.header["method"]
        if method == "rlse" and not self.header["rlse"]["lambda_s"]:
            method = "pulse"
        return {"rlse": RLSE, "pulse": PULSE, "mganprior": MGANPRIOR}[method]

    @property
    def settings(self) -> dict[str, Any]:
        """All that makes two searches another method."""
        free = {"method", "seed", "batch", "faces", "images", "gan_file", "device", "compile", "save_steps"}
        results = {"seconds_a_face", "versions", "mean"}
        kept = {name: value for name, value in self.header.items() if name not in free | results}
        return configuration.flat(kept)

    def super_resolve(self, lr: Tensor, scale: int, names: list[str]) -> Tensor:
        """The faces that were found for these."""
        side = self.header["side"]
        faces = []
        for name in names:
            file = self.folder / IMAGES / png(name)
            if not file.is_file():
                raise UserError(
                    f"{file} is missing: search for all faces that are compared, or compare fewer: --images"
                )
            try:
                face = to_tensor(decode(file.read_bytes()))
            except UnusableImage as error:
                raise UserError(f"{file}: {error}; remove it, and give explore the same command again") from None
            if face.shape != (3, side, side):
                raise UserError(f"{file} is not of {side}x{side} pixels")
            faces.append(face)
        return torch.stack(faces).to(lr.device)


def is_search(folder: Path) -> bool:
    """Whether explore wrote it."""
    return (folder / HEADER).is_file()


def read_search(folder: Path) -> Searched:
    """What explore found; UserError where it is not at its end, or was changed."""
    file = folder / RESULTS
    if not file.is_file():
        raise UserError(f"{folder} holds a search that is not at its end; give explore the same command again")
    try:
        found = Searched(folder, json.loads(file.read_text()))
        numbers = [found.header[name] for name in ("scale", "side", "seed", "nimg", "parameters", "seconds_a_face")]
        texts = [found.header[name] for name in ("faces", "data")]
        is_typed = all(isinstance(x, (int, float)) for x in numbers) and all(isinstance(x, str) for x in texts)
        if not is_typed or not found.name:
            raise TypeError("a value is of another type")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged ({error}); remove it, and give explore the same command again") from None
    return found
