"""Small rooms: EMA, pictures, statistics, weight files, the reference ops."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import photographs, portraits
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

from sega_dist.config import Config, DataConfig, GeneratorConfig, LossConfig, TrainConfig
from sega_dist.data.pairs import bicubic
from sega_dist.distributed import World
from sega_dist.ema import Ema
from sega_dist.errors import UserError
from sega_dist.kernels.upconv_act import upconv_act
from sega_dist.networks.vgg19 import CONV3_3, Vgg19
from sega_dist.pictures import Panel, curves, grid
from sega_dist.players import Players
from sega_dist.stats import Report, Sums
from sega_dist.weights import VARIABLE, load_vgg19


def test_ema_halves_the_distance_in_its_half_life():
    weight = torch.ones(2)
    ema = Ema(lambda: [weight], half_life=100)
    weight += 2
    for _ in range(10):
        ema.update(images=10, seen=10**9)
    torch.testing.assert_close(ema.averages, [torch.full((2,), 2.0)])


def test_a_snapshot_is_the_average_with_the_latest_statistics():
    config = Config(data=DataConfig(size=32), generator=GeneratorConfig(channels=8, nested_blocks=1),
                    loss=LossConfig(w_content=0, w_pixel=1, w_adv=0), train=TrainConfig(ema_kimg=1))  # fmt: skip
    both = Players(World(device="cpu"), config, None)
    trained = both.generator.raw
    nn.init.constant_(trained.shallow.bias, 3.0)
    trained.fusion[1].running_mean.fill_(7.0)
    shown = both.snapshot()
    assert not shown.shallow.bias.any()
    assert torch.equal(shown.fusion[1].running_mean, torch.full((8,), 7.0))
    assert not shown.training and not any(p.requires_grad for p in shown.parameters())


def test_grid_and_curves_are_pictures(tmp_path: Path):
    hr = portraits(2, 96)
    row = [Panel(bicubic(hr[:1], 24, 24)[0], "24x24"), Panel(hr[0], "1 dB")]
    sheet = grid(["LR", "HR"], [row, row], side=96)
    assert np.asarray(sheet)[40, 150].tolist() == hr[0, :, 40 - 26, 150 - 6 - 96 - 6].tolist()
    curves([{"nimg": 8, "loss_g": 1.0}, {"nimg": 16, "loss_g": 0.5, "preview_psnr": 20.0}], tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").size[0] > 500


def test_curves_show_r1_in_the_place_of_psnr(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    drawn: list[dict[str, dict[str, list]]] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: drawn.append(
        {axis.get_title(): {line.get_label(): list(line.get_xydata().tolist()) for line in axis.lines}
         for axis in self.axes}))  # fmt: skip
    curves([{"nimg": 8, "loss_d": 1.0, "r1": 0.5}, {"nimg": 16, "loss_d": 2.0}], tmp_path / "curves.png")
    curves([{"nimg": 8, "loss_d": 1.0}], tmp_path / "curves.png")
    assert drawn[0]["R1"] == {"r1": [[0.008, 0.5]]}
    assert drawn[0]["discriminator"] == {"loss_d": [[0.008, 1.0], [0.016, 2.0]]}
    assert "preview PSNR, dB" not in drawn[0] and list(drawn[1])[-1] == "preview PSNR, dB"


def test_sums_are_means_since_the_last_take():
    sums = Sums()
    for value in (1.0, 3.0):
        sums.add({"a": torch.tensor(value)})
    sums.add({"b": torch.tensor(5.0)})
    names, means = sums.take()
    assert (names, means.tolist()) == (["a", "b"], [2.0, 5.0])
    assert sums.take()[0] == []


def test_report_forgets_lines_beyond_the_checkpoint(tmp_path: Path):
    lines = [json.dumps({"nimg": n}) for n in (8, 16, 24)]
    (tmp_path / "stats.jsonl").write_text("\n".join(lines) + '\n{"nimg": 3')
    report = Report(tmp_path, 16, 100)
    report.tick({"nimg": 24, "images_per_s": 1.0})
    report.close()
    assert [json.loads(line)["nimg"] for line in (tmp_path / "stats.jsonl").read_text().splitlines()] == [8, 16, 24]


def test_vgg19_weights_by_path_and_by_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    donor = Vgg19(CONV3_3)
    for parameter in donor.parameters():
        nn.init.normal_(parameter)
    state = {**donor.state_dict(), "classifier.0.weight": torch.zeros(3)}
    torch.save({name: tensor.half() for name, tensor in state.items()}, tmp_path / "vgg19.pth")
    network = Vgg19(CONV3_3)
    digest = load_vgg19(network, tmp_path / "vgg19.pth")
    torch.testing.assert_close(network.features["14"].weight, donor.features["14"].weight.half().float())
    monkeypatch.setenv(VARIABLE, str(tmp_path / "vgg19.pth"))
    assert load_vgg19(Vgg19(CONV3_3), None) == digest


class Trap:
    """Pickled, this would run a command when read."""

    def __reduce__(self):
        return (print, ("the trap was sprung",))


def test_unusable_weight_files_say_so(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "text.pth").write_text("not weights")
    torch.save({"features.0.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "part.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"features.0.weight": Trap()}, tmp_path / "trap.pth")
    wrong = {name: torch.zeros(1) for name in Vgg19(CONV3_3).state_dict()}
    torch.save(wrong, tmp_path / "wrong.pth")
    nan = Vgg19(CONV3_3).state_dict()
    torch.save(nan, tmp_path / "nan.pth")
    for name, said in (
        ("none.pth", "does not exist"),
        ("text.pth", "cannot read"),
        ("part.pth", "has no features.0.bias"),
        ("list.pth", "not a state dict"),
        ("trap.pth", "cannot read"),
        ("wrong.pth", r"is \(1,\)"),
        ("nan.pth", "not finite"),
    ):
        with pytest.raises(UserError, match=said) as caught:
            load_vgg19(Vgg19(CONV3_3), tmp_path / name)
        assert "\n" not in str(caught.value)
    assert "sprung" not in capsys.readouterr().out


def test_no_bytes_of_a_weight_file_end_in_a_traceback(tmp_path: Path):
    """Any first byte: torch reads what is no zip as a pickle, operation by operation."""
    generator = random.Random(0)
    for first in range(256):
        (tmp_path / "a.pth").write_bytes(bytes([first]) + generator.randbytes(40))
        with pytest.raises(UserError, match=r"cannot read|is not a state dict"):
            load_vgg19(Vgg19(CONV3_3), tmp_path / "a.pth")


def _no_network(*_: object, **__: object) -> None:
    raise OSError("no network")


def test_absent_weights_are_never_random(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", _no_network)
    with pytest.raises(UserError, match="could not be fetched"):
        load_vgg19(Vgg19(CONV3_3), None)


def test_real_vgg19_weights_give_the_stated_content_loss(real_data: Path):
    """The data's README states about 28 between a face and its x8 bicubic with these weights."""
    network = Vgg19(CONV3_3)
    load_vgg19(network, real_data / "weights/vgg19-features-fp16.pth")
    hr = photographs(real_data, 12)
    sr = bicubic(bicubic(hr, 32, 32), 256, 256)
    phi_hr, phi_sr = (network.content(images.float() / 127.5 - 1) for images in (hr, sr))
    assert (phi_hr - phi_sr).square().mean().item() == pytest.approx(28, rel=0.15)


def test_upconv_act_is_convolution_shuffle_activation():
    x, weight, bias = torch.randn(2, 4, 5, 3), torch.randn(16, 4, 3, 3), torch.randn(16)
    y = nn.functional.conv2d(x, weight, bias, padding=1)
    expected = torch.empty(2, 4, 10, 6)
    for i in range(2):
        for j in range(2):
            expected[:, :, i::2, j::2] = y[:, 2 * i + j :: 4]
    torch.testing.assert_close(upconv_act(x, weight, bias, 0.2), nn.functional.leaky_relu(expected, 0.2))
