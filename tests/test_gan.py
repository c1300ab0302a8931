"""GANs made elsewhere: NVlabs' StyleGAN2 by its key names, PyTorch's tutorial's DCGAN, and files that are neither."""

from pathlib import Path

import pytest
import torch
from gans import Weights, explored, gan_config, gan_weights, rows, save_gan, small_faces
from safetensors.torch import save_file
from torch import nn

from sega_dist.distributed import World
from sega_dist.errors import UserError
from sega_dist.gan import Gan, load_gan
from sega_dist.latents import to_w
from sega_dist.networks.build import build_discriminator, build_generator
from sega_dist.networks.dcgan import DcganGenerator
from sega_dist.networks.facegan import FaceDiscriminator
from sega_dist.snapshot import newest_snapshot


def nvlabs(weights: Weights, group: int = 0) -> Weights:
    """As a converted pickle of NVlabs' holds them: `G_ema` and `D`, no statistics. Its D compares groups of images."""
    found = {f"G_ema.{name.removeprefix('generator.')}": x for name, x in weights.items() if name.startswith("gen")}
    d = {name.removeprefix("discriminator."): x for name, x in weights.items() if name.startswith("dis")}
    if group:
        torch.manual_seed(1)
        d = FaceDiscriminator(32, 32, 8, group).state_dict()
    return found | {f"D.{name}": x for name, x in d.items()}


def saved(weights: Weights, file: Path) -> Path:
    if file.suffix == ".safetensors":
        save_file({name: x.contiguous() for name, x in weights.items()}, file)
    else:
        torch.save(weights, file)
    return file


def load(file: Path) -> Gan:
    return load_gan(file, World(device="cpu"))


@pytest.fixture(scope="module")
def weights() -> Weights:
    return gan_weights(gan_config())


def images(gan: Gan) -> torch.Tensor:
    g = gan.generator
    torch.manual_seed(3)
    noises = [torch.randn(2, 1, *shape) for shape in g.noise_shapes()]
    return g.synthesis(to_w(torch.randn(2, g.layers, g.w_size), g.gaussian), noises)


# StyleGAN2 ------------------------------------------------------------------------------------------------------------


def test_a_snapshot_comes_back_with_both_networks_and_its_statistics(weights: Weights, tmp_path: Path):
    gan = load(save_gan(tmp_path / "run", data="d" * 64))
    assert gan.file == newest_snapshot(tmp_path / "run") and (gan.nimg, gan.data, gan.remark) == (8, "d" * 64, "")
    for network, prefix in ((gan.generator, "generator."), (gan.discriminator, "discriminator.")):
        for name, x in network.state_dict().items():
            assert torch.equal(x, weights[prefix + name]), name
        assert not network.training and not any(p.requires_grad for p in network.parameters())
    assert torch.equal(gan.generator.gaussian[0], weights["mean"])
    assert torch.equal(gan.generator.gaussian[1], weights["std"])
    assert gan.parameters == sum(p.numel() for p in build_generator(gan_config()).parameters())


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("group", [0, 4])
def test_nvlabs_weights_make_the_same_images_and_maps(weights: Weights, suffix: str, group: int, tmp_path: Path):
    layout = nvlabs(weights, group)
    gan = load(saved(layout, tmp_path / f"ffhq{suffix}"))
    g, d = build_generator(gan_config()), build_discriminator(gan_config()) if not group else FaceDiscriminator(
        32, 32, 8, group)  # fmt: skip
    g.load_state_dict({name.removeprefix("G_ema."): x for name, x in layout.items() if name.startswith("G_ema.")})
    d.load_state_dict({name.removeprefix("D."): x for name, x in layout.items() if name.startswith("D.")})
    w, faces = torch.randn(3, g.layers, g.w_size), torch.randn(3, 3, 32, 32)
    noises = [torch.randn(3, 1, *shape) for shape in g.noise_shapes()]
    with torch.no_grad():
        torch.testing.assert_close(gan.generator.synthesis(w, noises), g.synthesis(w, noises), rtol=1e-5, atol=1e-5)
        for mine, theirs in zip(gan.discriminator.features(faces), d.features(faces), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    assert (gan.nimg, gan.data) == (0, "")


def test_missing_statistics_are_computed_and_said(weights: Weights, tmp_path: Path):
    gan = load(saved(nvlabs(weights), tmp_path / "ffhq.pt"))
    assert gan.remark.endswith("ffhq.pt holds no sampling statistics (mean, std): computed from 100,000 random z")
    z = torch.randn(200_000, 8)
    x = gan.generator.mapping.pre_activation(z)
    mean, std = gan.generator.gaussian
    torch.testing.assert_close(mean, x.mean(0), rtol=0, atol=5 * float(x.std()) / 250)
    torch.testing.assert_close(std, x.std(0), rtol=0.02, atol=1e-6)
    again = load(saved(nvlabs(weights), tmp_path / "ffhq.pt"))
    assert torch.equal(again.generator.gaussian[0], mean)


def test_statistics_in_a_foreign_file_are_taken(weights: Weights, tmp_path: Path):
    given = {"mean": torch.arange(8.0), "std": torch.ones(8)}
    gan = load(saved(nvlabs(weights) | given, tmp_path / "ffhq.pt"))
    assert gan.remark == "" and torch.equal(gan.generator.gaussian[0], given["mean"])


def test_a_gan_of_half_precision_is_read_as_single(weights: Weights, tmp_path: Path):
    gan = load(saved({name: x.half() for name, x in nvlabs(weights).items()}, tmp_path / "half.pt"))
    assert {p.dtype for p in gan.generator.parameters()} == {torch.float32}
    assert images(gan).isfinite().all()


def test_without_a_discriminator_pulse_searches_and_rlse_is_refused(weights: Weights, tmp_path: Path, capsys):
    layout = {name: x for name, x in nvlabs(weights).items() if name.startswith("G_ema.")}
    file, faces = saved(layout, tmp_path / "lone.safetensors"), small_faces(tmp_path / "faces")
    assert load(file).discriminator is None
    with pytest.raises(UserError, match=r"lone.safetensors holds no discriminator, .* --method pulse does without"):
        explored(faces, tmp_path / "out", "--gan", file)
    for method in ("pulse", "mganprior"):
        explored(faces, tmp_path / method, "--gan", file, "--method", method)
        assert "computed from 100,000 random z" in capsys.readouterr().out
    explored(faces, tmp_path / "zero", "--gan", file, "--rlse.lambda-s", 0)
    assert [row["loss"] for row in rows(tmp_path / "zero")] == [row["loss"] for row in rows(tmp_path / "pulse")]


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize(("name", "change", "said"), [
    ("G_ema.synthesis.b8.conv0.weight", None, "it lacks synthesis.b8.conv0.weight"),
    ("G_ema.synthesis.b8.conv0.bias", torch.zeros(3), "has a synthesis.b8.conv0.bias of another shape"),
    ("G_ema.synthesis.b8.skip.weight", torch.zeros(3), "has synthesis.b8.skip.weight besides"),
    ("G_ema.synthesis.b4.conv1.affine.weight", torch.zeros(3), "is not StyleGAN2's unconditional generator"),
    ("G_ema.synthesis.b32.conv1.weight", torch.zeros(()), "is not StyleGAN2's unconditional generator"),
    ("G_ema.synthesis.b8.conv1.weight", torch.full((8, 8, 3, 3), torch.nan), "not finite"),
    ("G_ema.mapping.embed.weight", torch.zeros(8, 10), "has mapping.embed.weight besides"),
    ("D.b8.conv0.weight", torch.zeros(3), "has a b8.conv0.weight of another shape"),
    ("D.b4.out.weight", torch.zeros(3), "is not StyleGAN2's unconditional residual discriminator"),
    ("D.b32.conv0.weight", None, "is not StyleGAN2's unconditional residual discriminator"),
    ("D.b4.cmap.weight", torch.zeros(3), "has b4.cmap.weight besides"),
    ("mean", torch.zeros(3), "sampling statistics are not of 8 numbers"),
])  # fmt: skip
def test_other_shapes_are_one_line(name: str, change: torch.Tensor | None, said: str, suffix: str, weights: Weights,
                                   tmp_path: Path):  # fmt: skip
    layout = nvlabs(weights) | {name: change}
    if name == "mean":
        layout["std"] = torch.ones(8)
    file = saved({key: x for key, x in layout.items() if x is not None}, tmp_path / f"odd{suffix}")
    with pytest.raises(UserError, match=said) as caught:
        load(file)
    assert caught.value.code == 2 and "\n" not in str(caught.value) and f"odd{suffix}" in str(caught.value)


# DCGAN ----------------------------------------------------------------------------------------------------------------


def tutorial(z: int = 100, ngf: int = 64) -> nn.Module:
    """The generator as PyTorch's tutorial on DCGAN writes it."""
    network = nn.Module()
    network.main = nn.Sequential(
        nn.ConvTranspose2d(z, ngf * 8, 4, 1, 0, bias=False), nn.BatchNorm2d(ngf * 8), nn.ReLU(True),
        nn.ConvTranspose2d(ngf * 8, ngf * 4, 4, 2, 1, bias=False), nn.BatchNorm2d(ngf * 4), nn.ReLU(True),
        nn.ConvTranspose2d(ngf * 4, ngf * 2, 4, 2, 1, bias=False), nn.BatchNorm2d(ngf * 2), nn.ReLU(True),
        nn.ConvTranspose2d(ngf * 2, ngf, 4, 2, 1, bias=False), nn.BatchNorm2d(ngf), nn.ReLU(True),
        nn.ConvTranspose2d(ngf, 3, 4, 2, 1, bias=False), nn.Tanh(),
    )  # fmt: skip
    for module in network.main:
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1, 0.2), nn.init.normal_(module.bias, 0, 0.2)
            module.running_mean.normal_(0, 0.1), module.running_var.uniform_(0.5, 1.5)
    return network.eval()


@pytest.mark.parametrize(("z", "ngf"), [(100, 8), (7, 5)])
def test_a_dcgan_makes_the_tutorials_images(z: int, ngf: int, tmp_path: Path):
    theirs = tutorial(z, ngf)
    torch.save(theirs.state_dict(), tmp_path / "dcgan.pth")
    gan = load(tmp_path / "dcgan.pth")
    g, code = gan.generator, torch.randn(3, z)
    assert (g.side, g.layers, g.w_size, g.noise_shapes(), gan.discriminator) == (64, 1, z, [], None)
    with torch.no_grad():
        expected = theirs.main(code[:, :, None, None])
        w = to_w(code[:, None], g.gaussian)
        torch.testing.assert_close(g.synthesis(w, []), expected, rtol=1e-5, atol=1e-6)
        for layer in range(g.splits + 1):
            torch.testing.assert_close(g.tail(g.head(w, [], layer), w, [], layer), expected, rtol=1e-5, atol=1e-6)


def test_a_dcgan_is_searched_by_pulse_and_mganprior(tmp_path: Path):
    torch.save(tutorial(10, 4).state_dict(), file := tmp_path / "dcgan.pth")
    faces = small_faces(tmp_path / "faces", side=8)
    for method, words in (("pulse", ()), ("mganprior", ("--mgan.layer", 3))):
        explored(faces, tmp_path / method, "--gan", file, "--method", method, *words)
        assert all(float(row["loss"]) > 0 for row in rows(tmp_path / method))
    for method, said in (("rlse", "holds no discriminator"), ("mganprior", "mgan.layer is 6; it must be at most 5")):
        with pytest.raises(UserError, match=said):
            explored(faces, tmp_path / "out", "--gan", file, "--method", method)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("change", "said"), [
    ({"main.9.weight": None}, "lacks main"), ({"main.9.weight": torch.zeros(3)}, "does not hold the weights of DCGAN"),
    ({"main.0.weight": torch.zeros(7)}, "does not hold the weights of DCGAN"),
    ({"main.15.weight": torch.zeros(7)}, "has main.15.weight besides"),
    ({"main.3.weight": torch.zeros(7, 7, 4, 4)}, "has a main.3.weight of another shape"),
    ({"main.3.weight": torch.full((32, 16, 4, 4), torch.inf)}, "not finite"),
])  # fmt: skip
def test_a_dcgan_of_other_layers_is_one_line(change: Weights, said: str, tmp_path: Path):
    state = {name: x for name, x in (tutorial(10, 4).state_dict() | change).items() if x is not None}
    torch.save(state, tmp_path / "dcgan.pth")
    with pytest.raises(UserError, match=said):
        load(tmp_path / "dcgan.pth")


def test_files_that_are_no_gan_are_one_line(tmp_path: Path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    torch.save({"main.0.weight": Evil()}, tmp_path / "evil.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"epoch": 3}, tmp_path / "number.pth")
    torch.save({"features.0.weight": torch.zeros(3)}, tmp_path / "vgg.pth")
    (tmp_path / "empty.pth").touch()
    (tmp_path / "empty.safetensors").touch()
    (tmp_path / "text.pt").write_text("weights")
    for name in ("evil.pth", "list.pth", "number.pth", "vgg.pth", "empty.pth", "empty.safetensors", "text.pt"):
        with pytest.raises(UserError, match=name.replace(".", r"\.")) as caught:
            load(tmp_path / name)
        assert caught.value.code == 2 and "\n" not in str(caught.value)
    assert not (tmp_path / "executed").exists()


def test_the_real_dcgan_makes_faces(real_data: Path):
    """Of the middle of the range, unlike each other, about symmetric, and smooth as photographs are."""
    file = real_data / "weights/dcgan_digiface.pth"
    if not file.is_file():
        pytest.skip(f"{file.name} is not there")
    gan = load(file)
    g = gan.generator
    assert isinstance(g, DcganGenerator) and (g.z_size, gan.parameters) == (100, 3_576_704)
    with torch.no_grad():
        faces = g.synthesis(torch.randn(64, 1, 100), [])
    assert faces.shape == (64, 3, 64, 64) and -0.6 < faces.mean() < 0.3
    assert 0.2 < faces.std() < 0.8 and (faces.abs() > 0.99).float().mean() < 0.2
    assert faces.std(0).mean() > 0.1
    steps = (faces[..., 1:] - faces[..., :-1]).abs().mean()
    assert 0.005 < steps < faces.std() / 3
    mean = faces.mean(0)
    symmetry = torch.corrcoef(torch.stack([mean.flatten(), mean.flip(2).flatten()]))[0, 1]
    assert symmetry > 0.9
