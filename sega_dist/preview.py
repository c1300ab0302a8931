"""A few fixed faces, super-resolved now and then, to see how far a run is."""

import torch
from torch import nn

from sega_dist.config import Config
from sega_dist.data import positions
from sega_dist.data.images import DamagedSample, ShardReader
from sega_dist.data.pairs import bicubic, to_uint8, to_unit
from sega_dist.data.shards import Manifest
from sega_dist.distributed import World
from sega_dist.errors import UserError
from sega_dist.metrics import psnr
from sega_dist.networks.facegan import draws, from_normals
from sega_dist.pictures import Panel, grid
from sega_dist.stats import Report

PREVIEWS = 6  # faces in the picture grid
SAMPLES = (4, 8)  # rows and columns of a face GAN's


class Preview:
    """A few fixed faces that show how far the generator is."""

    def __init__(self, manifest: Manifest, config: Config, world: World):
        side = next(side for side in ("preview", "val", "test", "train") if side in manifest.sides)
        reader = ShardReader(manifest, side)
        numbers = sorted({round(i * (len(reader) - 1) / max(PREVIEWS - 1, 1)) for i in range(PREVIEWS)})
        self.world, self.scale = world, config.scale
        try:
            self.hr = torch.stack([reader.image(number) for number in numbers]).to(world.device)
        except DamagedSample as error:
            raise UserError(f"{manifest.folder} is damaged: {error}; sega-dist verify names every shard") from None
        height, width = self.hr.shape[2:]
        self.lr = bicubic(self.hr, height // config.scale, width // config.scale)
        self.bicubic = bicubic(self.lr, height, width)

    @torch.no_grad()
    def show(self, report: Report, generator: nn.Module, nimg: int) -> dict[str, float]:
        """A picture grid, each rank making its share of the faces; to the main one, the mean PSNR for the tick."""
        mine = slice(self.world.rank, None, self.world.size)
        sr = torch.zeros_like(self.hr)
        with self.world.autocast():
            if len(self.lr[mine]):
                sr[mine] = to_uint8(generator(to_unit(self.lr[mine], self.world.dtype)))
        sr = self.world.sum_of(sr)
        if not self.world.is_main:
            return {}
        sr_psnr, bicubic_psnr = (psnr(self.hr, images).tolist() for images in (sr, self.bicubic))
        rows = [
            [
                Panel(lr, f"{lr.shape[1]}x{lr.shape[2]}"),
                Panel(low, f"{a:.2f} dB"),
                Panel(high, f"{b:.2f} dB"),
                Panel(hr),
            ]
            for lr, low, a, high, b, hr in zip(self.lr, self.bicubic, bicubic_psnr, sr, sr_psnr, self.hr, strict=True)
        ]
        report.picture("preview", grid(["LR", "bicubic", f"SR, {nimg / 1000:g} kimg", "HR"], rows), nimg)
        mean = sum(sr_psnr) / len(sr_psnr)
        return {"preview_psnr": mean, "preview_psnr_bicubic": sum(bicubic_psnr) / len(bicubic_psnr)}


class FacePreview:
    """A few fixed latents that show how far a face GAN is: nothing is measured on them."""

    def __init__(self, config: Config, world: World):
        self.world, (self.rows, self.columns) = world, SAMPLES
        face, count = config.facegan, self.rows * self.columns
        width = draws(config.hr_size, face.z_size)
        normals = positions.normal(config.train.seed, positions.SHOWN, 0, count, width, world.device).to(world.dtype)
        self.z, self.noises, *_ = from_normals(normals, config.hr_size, face.z_size, 0.0)

    @torch.no_grad()
    def show(self, report: Report, generator: nn.Module, nimg: int) -> dict[str, float]:
        """A picture of all, each rank making its share of them."""
        mine = slice(self.world.rank, None, self.world.size)
        side = self.noises[-1].shape[-1]
        faces = torch.zeros(len(self.z), 3, side, side, dtype=torch.uint8, device=self.z.device)
        if len(self.z[mine]):
            with self.world.autocast():
                faces[mine] = to_uint8(generator(self.z[mine], [noise[mine] for noise in self.noises]))
        panels = [[Panel(face) for face in row] for row in self.world.sum_of(faces).unflatten(0, SAMPLES)]
        report.picture("faces", grid([f"{nimg / 1000:g} kimg", *[""] * (self.columns - 1)], panels), nimg)
        return {}


def make_preview(manifest: Manifest, config: Config, world: World) -> Preview | FacePreview:
    """The configuration's."""
    return FacePreview(config, world) if config.is_face_gan else Preview(manifest, config, world)
