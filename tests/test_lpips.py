"""LPIPS against its formula and against torchmetrics with the same AlexNet; weight files that do not fit."""

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import portraits
from safetensors.torch import save_file
from torch import Tensor, nn
from torchmetrics.functional.image import lpips as torchmetrics_lpips

from sega_dist.errors import UserError
from sega_dist.lpips import Lpips
from sega_dist.weights import load_lpips

NEAR = 1e-6  # relative, in fp64: the networks hold the images' mean and deviation in fp32
KEYS = [f"features.{number}.{part}" for number in (0, 3, 6, 8, 10) for part in ("weight", "bias")]


def alexnet() -> nn.Sequential:
    """The features of AlexNet as torchvision lays them out, with random weights."""
    relu, pool = nn.ReLU(inplace=True), nn.MaxPool2d(3, 2)
    return nn.Sequential(nn.Conv2d(3, 64, 11, 4, 2), relu, pool, nn.Conv2d(64, 192, 5, padding=2), relu, pool,
                         nn.Conv2d(192, 384, 3, padding=1), relu, nn.Conv2d(384, 256, 3, padding=1), relu,
                         nn.Conv2d(256, 256, 3, padding=1), relu, pool)  # fmt: skip


def state_of(features: nn.Module) -> dict[str, Tensor]:
    return {f"features.{name}": tensor for name, tensor in features.state_dict().items()}


def images() -> tuple[Tensor, Tensor]:
    hr, draw = portraits(3, 96)[:, :, :90], torch.Generator().manual_seed(1)
    return hr, (hr + 20 * torch.randn(hr.shape, generator=draw)).clamp(0, 255).to(torch.uint8)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    torch.save({**state_of(alexnet()), "classifier.1.weight": torch.zeros(3)}, tmp_path / "alexnet.pth")
    return tmp_path / "alexnet.pth"


def reference(state: dict[str, Tensor], linear: dict[str, Tensor], hr: Tensor, sr: Tensor) -> Tensor:
    """Equation 1 of the paper, image by image."""
    mean, std = (torch.tensor(v).double().view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    distances = []
    for pair in zip(hr, sr, strict=True):
        maps, total = [(image.double() / 255 - mean) / std for image in pair], torch.zeros((), dtype=torch.float64)
        for layer, (number, stride, padding) in enumerate([(0, 4, 2), (3, 1, 2), (6, 1, 1), (8, 1, 1), (10, 1, 1)]):
            if number in (3, 6):
                maps = [F.max_pool2d(x, 3, 2) for x in maps]
            filters, bias = (state[f"features.{number}.{part}"].double() for part in ("weight", "bias"))
            maps = [F.conv2d(x, filters, bias, stride, padding).clamp(min=0) for x in maps]
            a, b = (x / x.norm(dim=0) for x in maps)
            of_channel = (a - b).square().flatten(1).mean(1)
            total += of_channel @ linear[f"lin{layer}.model.1.weight"].double().flatten()
        distances.append(total)
    return torch.stack(distances)


@pytest.fixture
def linear() -> dict[str, Tensor]:
    """The linear layers that torchmetrics ships, found by another way than the program's."""
    folder = Path(torchmetrics_lpips.__file__).parent
    return torch.load(folder / "lpips_models/alex.pth", weights_only=True, map_location="cpu")


def test_lpips_is_its_formula(weights: Path, linear: dict[str, Tensor]):
    hr, sr = images()
    network = load_lpips(weights)
    found = network(hr, sr)
    assert found.shape == (3,) and found.dtype == torch.float32 and not found.requires_grad
    expected = reference(torch.load(weights), linear, hr, sr)
    torch.testing.assert_close(network.double()(hr, sr), expected, rtol=NEAR, atol=0)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=0)  # fp32 through five layers


def torchmetrics_of(features: nn.Sequential, patch: pytest.MonkeyPatch) -> nn.Module:
    """torchmetrics' own network, which asks torchvision for nothing but these features."""
    patch.setattr(torchmetrics_lpips, "_get_tv_model_features", lambda net, pretrained: features)
    return torchmetrics_lpips._LPIPS(pretrained=True, net="alex")


def test_lpips_is_torchmetrics(weights: Path, monkeypatch: pytest.MonkeyPatch):
    features = alexnet()
    torch.save(state_of(features), weights)
    hr, sr = images()
    expected = torchmetrics_of(features, monkeypatch).double()(hr.double() / 127.5 - 1, sr.double() / 127.5 - 1)
    torch.testing.assert_close(load_lpips(weights).double()(hr, sr), expected.flatten(), rtol=NEAR, atol=0)


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="torchvision is not installed")
def test_lpips_takes_torchvisions_own_network(weights: Path, monkeypatch: pytest.MonkeyPatch):
    import torchvision

    network = torchvision.models.alexnet(weights=None)
    torch.save(network.state_dict(), weights)
    hr, sr = images()
    expected = torchmetrics_of(network.features, monkeypatch)(hr / 127.5 - 1, sr / 127.5 - 1)
    torch.testing.assert_close(load_lpips(weights)(hr, sr), expected.flatten(), rtol=1e-4, atol=0)


def test_the_network_is_alexnets(weights: Path):
    """Its sizes as published: 2,469,696 values in convolutions, maps of 55, 27 and 13 pixels for images of 224."""
    network = load_lpips(weights)
    assert list(network.state_dict()) == KEYS
    assert sum(parameter.numel() for parameter in network.parameters()) == 2_469_696
    assert not any(parameter.requires_grad for parameter in network.parameters())
    maps = network._directions(torch.zeros(1, 3, 224, 224, dtype=torch.uint8))
    assert [tuple(x.shape[1:]) for x in maps] == [
        (64, 55, 55),
        (192, 27, 27),
        (384, 13, 13),
        (256, 13, 13),
        (256, 13, 13),
    ]


def test_identical_images_are_at_zero_and_the_order_does_not_matter(weights: Path):
    network, (hr, sr) = load_lpips(weights), images()
    assert not network(hr, hr).any()
    assert torch.equal(network(hr, sr), network(sr, hr)) and (network(hr, sr) > 0).all()


def test_features_that_are_all_zero_have_no_direction(weights: Path):
    """A zero length is divided by as well: without a bound the distance would not be a number."""
    state = torch.load(weights)
    state["features.10.bias"].fill_(-1e6)
    torch.save(state, weights)
    assert load_lpips(weights)(*images()).isfinite().all()


def test_forgotten_weights_cannot_go_unseen():
    assert Lpips(torch.ones(1152))(*images()).isnan().all()


def test_safetensors_hold_the_same(weights: Path):
    state = torch.load(weights)
    save_file(state, weights.with_suffix(".safetensors"))
    assert torch.equal(load_lpips(weights)(*images()), load_lpips(weights.with_suffix(".safetensors"))(*images()))


def test_weights_that_do_not_fit_say_so(weights: Path):
    state = {key: tensor for key, tensor in torch.load(weights).items() if key in KEYS}
    files = {
        "none.pth": (None, "does not exist; give it by --lpips-weights"),
        "text.pth": ("not weights", "cannot read"),
        "text.safetensors": ("not weights", "cannot read"),
        "part.pth": ({KEYS[0]: state[KEYS[0]]}, "has no features.0.bias: it must hold AlexNet"),
        "renamed.pth": ({f"net.{key}": tensor for key, tensor in state.items()}, "has no features.0.weight"),
        "shape.pth": (
            state | {KEYS[0]: torch.zeros(64, 3, 3, 3)},
            r"is \(64, 3, 3, 3\), AlexNet's is \(64, 3, 11, 11\)",
        ),
        "nan.pth": (state | {KEYS[1]: torch.full((64,), torch.nan)}, "not finite"),
    }
    for name, (content, said) in files.items():
        file = weights.with_name(name)
        if isinstance(content, str):
            file.write_text(content)
        elif content:
            torch.save(content, file)
        with pytest.raises(UserError, match=said) as caught:
            load_lpips(file)
        assert "\n" not in str(caught.value)
