"""Weights of other programs: every layout computes what its program computes, and what does not fit is one line."""

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sega_dist import foreign
from sega_dist.config import Config, GeneratorConfig
from sega_dist.errors import UserError
from sega_dist.networks.build import build_generator
from sega_dist.presets import preset
from sega_dist.snapshot import load_snapshot


class TheirRdb(nn.Module):
    def __init__(self, width: int, growth: int):
        super().__init__()
        for i in range(5):
            setattr(self, f"conv{i + 1}", nn.Conv2d(width + i * growth, growth if i < 4 else width, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        maps = [x]
        for i in range(1, 5):
            maps.append(F.leaky_relu(getattr(self, f"conv{i}")(torch.cat(maps, 1)), 0.2))
        return x + 0.2 * self.conv5(torch.cat(maps, 1))


class TheirRrdbNet(nn.Module):
    """BasicSR's names, or those of ESRGAN's own program."""

    def __init__(self, width: int, blocks: int, is_old: bool):
        super().__init__()
        names = ("RRDB_trunk", "RDB", "trunk_conv", "upconv", "HRconv") if is_old else (
            "body", "rdb", "conv_body", "conv_up", "conv_hr")  # fmt: skip
        body, rdb, self.after, self.up, self.hr = names
        self.conv_first = nn.Conv2d(3, width, 3, 1, 1)
        self.blocks = [{f"{rdb}{k}": TheirRdb(width, width // 2) for k in (1, 2, 3)} for _ in range(blocks)]
        setattr(self, body, nn.ModuleList(nn.ModuleDict(block) for block in self.blocks))
        for name in (self.after, f"{self.up}1", f"{self.up}2", self.hr):
            setattr(self, name, nn.Conv2d(width, width, 3, 1, 1))
        self.conv_last = nn.Conv2d(width, 3, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:  # [0,1] to [0,1]
        first = x = self.conv_first(x)
        for block in self.blocks:
            y = x
            for rdb in block.values():
                y = rdb(y)
            x = x + 0.2 * y
        x = first + getattr(self, self.after)(x)
        for k in (1, 2):
            x = F.leaky_relu(getattr(self, f"{self.up}{k}")(F.interpolate(x, scale_factor=2)), 0.2)
        return self.conv_last(F.leaky_relu(getattr(self, self.hr)(x), 0.2))


class TheirSrResNet(nn.Module):
    """SRGAN-PyTorch's names, newer (`conv1`) and older (`conv_block1`)."""

    def __init__(self, width: int, blocks: int, prefix: str):
        super().__init__()
        self.prefix = prefix
        setattr(self, f"{prefix}1", nn.Sequential(nn.Conv2d(3, width, 9, 1, 4), nn.PReLU()))
        self.trunk = nn.ModuleList(nn.ModuleDict({"rcb": nn.Sequential(
            nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.PReLU(),
            nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width))}) for _ in range(blocks))  # fmt: skip
        norm = nn.BatchNorm2d(width)
        setattr(self, f"{prefix}2", nn.Sequential(nn.Conv2d(width, width, 3, 1, 1, bias=False), norm))
        self.upsampling = nn.ModuleList(nn.ModuleDict({"upsample_block": nn.Sequential(
            nn.Conv2d(width, 4 * width, 3, 1, 1), nn.PixelShuffle(2), nn.PReLU())}) for _ in range(2))  # fmt: skip
        setattr(self, f"{prefix}3", nn.Conv2d(width, 3, 9, 1, 4))

    def forward(self, x: Tensor) -> Tensor:
        first = x = getattr(self, f"{self.prefix}1")(x)
        for block in self.trunk:
            x = x + block["rcb"](x)
        x = first + getattr(self, f"{self.prefix}2")(x)
        for block in self.upsampling:
            x = block["upsample_block"](x)
        return getattr(self, f"{self.prefix}3")(x)


THEIRS = {
    "BasicSR": ("esrgan_x4", lambda: TheirRrdbNet(8, 3, is_old=False)),
    "old ESRGAN": ("esrgan_x4", lambda: TheirRrdbNet(8, 3, is_old=True)),
    "SRGAN": ("srgan_x4", lambda: TheirSrResNet(8, 4, "conv_block")),
    "newer SRGAN": ("srresnet_x4", lambda: TheirSrResNet(8, 4, "conv")),
}


@pytest.mark.parametrize("layout", THEIRS)
@pytest.mark.parametrize("wrapper", ["", "params_ema", "state_dict"])
def test_a_snapshot_computes_what_their_network_does(layout: str, wrapper: str, tmp_path: Path):
    name, build = THEIRS[layout]
    theirs = build()
    for buffer in theirs.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)  # as trained: statistics are not those of a new network
    state = theirs.eval().state_dict()
    wrong = {key: torch.zeros_like(tensor) for key, tensor in state.items()}
    torch.save({wrapper: state, "params": wrong} if wrapper == "params_ema" else {wrapper: state} if wrapper else state,
               tmp_path / "net.pth")  # fmt: skip
    foreign.main([str(tmp_path / "net.pth"), str(tmp_path / "net.safetensors"), "--preset", name])
    snapshot = load_snapshot(tmp_path / "net.safetensors")
    lr = torch.rand(2, 3, 9, 11)
    with torch.no_grad():
        torch.testing.assert_close((snapshot.generator(lr * 2 - 1) + 1) / 2, theirs(lr), rtol=1e-4, atol=1e-5)
    assert snapshot.data == ""


@pytest.mark.parametrize(("change", "said"), [
    (lambda state: {k: v for k, v in state.items() if "conv_hr" not in k}, "lacks hr"),
    (lambda state: state | {"conv_up3.weight": torch.zeros(8, 8, 3, 3)}, "another scale"),
    (lambda state: state | {"attention.weight": torch.zeros(1)}, "attention.weight is in no layout"),
    (lambda state: state | {"conv_hr.weight": torch.zeros(8, 8, 1, 1)}, "hr.weight is (8, 8, 1, 1)"),
    (lambda state: state | {"conv_hr.bias": torch.full((8,), torch.nan)}, "not finite"),
    (lambda state: {"x": 3}, "not a state dict"),
    (lambda state: {}, "nothing is in no layout"),
])  # fmt: skip
def test_what_does_not_fit_is_one_line(change, said: str, tmp_path: Path):
    torch.save(change(TheirRrdbNet(8, 2, is_old=False).state_dict()), tmp_path / "net.pth")
    with pytest.raises(UserError) as error:
        foreign.main([str(tmp_path / "net.pth"), str(tmp_path / "out.safetensors"), "--preset", "esrgan_x4"])
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out.safetensors").exists()


def test_methods_without_a_known_layout_say_so(tmp_path: Path):
    with pytest.raises(UserError, match=r"generator\.kind sega"):
        foreign.imported(tmp_path / "x.pth", preset("sega_x4"))
    with pytest.raises(UserError, match="does not exist"):
        foreign.imported(tmp_path / "x.pth", preset("srgan_x4"))


def test_published_sizes_are_the_presets():
    config = preset("esrgan_x4")
    assert (config.generator.channels, config.generator.blocks) == (64, 23)
    small = dataclasses.replace(config, generator=GeneratorConfig(kind="esrgan", channels=8, blocks=2))
    assert isinstance(config, Config) and len(build_generator(small).state_dict()) == 2 * (2 * 15 + 1 + 1 + 2 + 1 + 1)
