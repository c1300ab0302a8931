"""The face GAN: its layers and networks against plain programs of their definition; split, taps and gradients."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from sega_dist.networks.facegan import (
    Convolution,
    FaceDiscriminator,
    FaceGenerator,
    Resampling,
    StyledConvolution,
    activated,
    with_deviation,
)

Weights = dict[str, Tensor]
FILTER = np.outer([1.0, 3.0, 3.0, 1.0], [1.0, 3.0, 3.0, 1.0]) / 64


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(5)


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def filled(network: nn.Module) -> nn.Module:
    """In fp64; what starts as zeros or ones has other values too."""
    for parameter in network.double().parameters():
        if parameter.dim() < 2:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.3)
    return network


def generator(side: int = 32) -> FaceGenerator:
    """Every map of another width, and w of another size than z."""
    return filled(FaceGenerator(side, channel_base=128, channel_max=9, z_size=5, w_size=7, mapping_layers=3))


def discriminator(group: int = 0, side: int = 32) -> FaceDiscriminator:
    return filled(FaceDiscriminator(side, channel_base=128, channel_max=9, group=group))


def drawn(network: FaceGenerator, count: int = 2) -> tuple[Tensor, list[Tensor]]:
    """w and noises, of which every second is one for all images."""
    noises = [randn(count if i % 2 else 1, 1, *shape) for i, shape in enumerate(network.noise_shapes())]
    return randn(count, network.layers, network.w_size), noises


# Definitions ---------------------------------------------------------------------------------------------------------


def resampled(x: Tensor, up: int, down: int, before: int, after: int) -> Tensor:
    """Zeros between the pixels and around them, the filter (a convolution), every `down`-th pixel."""
    n, c, h, w = x.shape
    wide = x.new_zeros(n, c, up * h, up * w)
    wide[:, :, ::up, ::up] = x
    wide = functional.pad(wide, (before, after, before, after))
    rows, columns = wide.shape[2] - 3, wide.shape[3] - 3
    taps = itertools.product(range(4), repeat=2)
    y = sum(FILTER[3 - i, 3 - j] * wide[:, :, i : i + rows, j : j + columns] for i, j in taps)
    return up**2 * y[:, :, ::down, ::down]


def own_filters(x: Tensor, weight: Tensor, style: Tensor, is_doubling: bool, is_demodulated: bool = True) -> Tensor:
    """Image by image: its own filters, and where the side doubles the filtered enlargement before these."""
    images = []
    for image, s in zip(x.split(1), style, strict=True):
        filters = weight * s.view(1, -1, 1, 1)
        if is_demodulated:
            filters = filters / (filters.square().sum((1, 2, 3), keepdim=True) + 1e-8).sqrt()
        if is_doubling:
            images.append(functional.conv2d(resampled(image, 2, 1, 3, 2), filters.flip(2, 3)))
        else:
            images.append(functional.conv2d(image, filters, padding=weight.shape[2] // 2))
    return torch.cat(images)


def lrelu(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 0.2 * x) * math.sqrt(2)


def dense(weights: Weights, name: str, x: Tensor, multiplier: float = 1.0) -> Tensor:
    weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
    return x @ (weight * (multiplier / math.sqrt(weight.shape[1]))).T + bias * multiplier


def expected_image(weights: Weights, z: Tensor, noises: list[Tensor]) -> Tensor:
    """StyleGAN2's generator with skips, of 32 pixels and three mapping layers."""
    w = z / (z.square().mean(1, keepdim=True) + 1e-8).sqrt()
    for number in range(3):
        w = lrelu(dense(weights, f"mapping.fc{number}", w, 0.01))
    remaining, image = iter(noises), None

    def layer(name: str, x: Tensor, is_doubling: bool) -> Tensor:
        style = dense(weights, f"{name}.affine", w)
        y = own_filters(x, weights[f"{name}.weight"], style, is_doubling)
        y = y + next(remaining) * weights[f"{name}.noise_strength"]
        return lrelu(y + weights[f"{name}.bias"].view(1, -1, 1, 1))

    x = weights["synthesis.b4.const"].repeat(len(z), 1, 1, 1)
    for side in (4, 8, 16, 32):
        block = f"synthesis.b{side}"
        x = layer(f"{block}.conv0", x, True) if side > 4 else x
        x = layer(f"{block}.conv1", x, False)
        style = dense(weights, f"{block}.torgb.affine", w) / math.sqrt(x.shape[1])
        rgb = own_filters(x, weights[f"{block}.torgb.weight"], style, False, is_demodulated=False)
        rgb = rgb + weights[f"{block}.torgb.bias"].view(1, -1, 1, 1)
        image = rgb if image is None else rgb + resampled(image, 2, 1, 2, 1)
    return image


def expected_logits(weights: Weights, images: Tensor, group: int) -> Tensor:
    """StyleGAN2's residual discriminator of 32 pixels."""

    def layer(name: str, x: Tensor, padding: int, stride: int = 1) -> Tensor:
        weight, bias = weights[f"{name}.weight"], weights.get(f"{name}.bias")
        return functional.conv2d(x, weight / math.sqrt(weight[0].numel()), bias, stride, padding)

    x = lrelu(layer("b32.fromrgb", images, 0))
    for side in (32, 16, 8):
        skip = layer(f"b{side}.skip", resampled(x, 1, 2, 1, 1), 0)
        x = lrelu(layer(f"b{side}.conv0", x, 1))
        x = lrelu(layer(f"b{side}.conv1", resampled(x, 1, 1, 2, 2), 0, stride=2))
        x = x * math.sqrt(0.5) + skip * math.sqrt(0.5)
    if group:
        deviations = [(x[i :: len(x) // group].var(0, correction=0) + 1e-8).sqrt() for i in range(len(x) // group)]
        means = torch.stack([deviations[i % len(deviations)].mean() for i in range(len(x))])
        x = torch.cat([x, means.view(-1, 1, 1, 1).expand(-1, 1, 4, 4)], 1)
    x = lrelu(layer("b4.conv", x, 1))
    return dense(weights, "b4.out", lrelu(dense(weights, "b4.fc", x.flatten(1))))


# Layers --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_doubling", [False, True])
def test_modulation_is_a_convolution_with_own_filters(is_doubling: bool):
    """Values and gradients of maps, styles and weights."""
    layer = StyledConvolution(3, 5, 4, 12, is_doubling).double()
    x, style = randn(4, 3, 6, 6).requires_grad_(), randn(4, 3).requires_grad_()
    found, expected = layer.modulated(x, style), own_filters(x, layer.weight, style, is_doubling)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert_gradients(found, expected, [x, style, layer.weight], 1e-12)


def test_styles_of_any_size_are_demodulated_in_fp16():
    """Whose squares end at 65,504."""
    layer, x, style = StyledConvolution(3, 5, 4, 12, False), randn(4, 3, 6, 6).float(), 300 * randn(4, 3).float()
    with torch.autocast("cpu", torch.float16):
        found = layer.modulated(x, style)
    torch.testing.assert_close(found.float(), layer.modulated(x, style), rtol=0.02, atol=0.02)


def assert_gradients(found: Tensor, expected: Tensor, inputs: list[Tensor], tolerance: float) -> None:
    side = torch.randn_like(found)
    ours, theirs = (torch.autograd.grad(y, inputs, side) for y in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def looped(plane: np.ndarray, up: int, down: int, before: int, after: int) -> np.ndarray:
    """One plane, pixel by pixel: zeros between and around the pixels, convolution, every `down`-th."""
    wide = np.zeros([up * n for n in plane.shape])
    wide[::up, ::up] = plane
    wide = np.pad(wide, (before, after))
    found = np.zeros([n - 3 for n in wide.shape])
    for row, column in np.ndindex(*found.shape):
        for i, j in np.ndindex(4, 4):
            found[row, column] += wide[row + i, column + j] * FILTER[3 - i, 3 - j]
    return up**2 * found[::down, ::down]


@pytest.mark.parametrize(
    ("method", "arguments"),
    [("doubled", (2, 1, 2, 1)), ("blurred", (1, 1, 1, 1)), ("padded", (1, 1, 2, 2)), ("halved", (1, 2, 1, 1))],
)
def test_resampling_is_its_loops(method: str, arguments: tuple[int, int, int, int]):
    layer, x = Resampling().double(), randn(2, 3, 6, 4)
    keys = {"blurred": {"padding": 1}, "padded": {"padding": 2}, "halved": {"padding": 1, "stride": 2}}
    found = layer.doubled(x) if method == "doubled" else layer.blurred(x, **keys[method])
    for planes, expected in zip(found.flatten(0, 1), x.flatten(0, 1), strict=True):
        np.testing.assert_allclose(planes.numpy(), looped(expected.numpy(), *arguments), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [1, 3])
def test_resampling_keeps_constants(size: int):
    """Away from borders: enlarged, and halved by a convolution whose filters have sum 1."""
    x = torch.ones(1, 2, 16, 16, dtype=torch.float64)
    halving = Convolution(2, 1, size, is_halving=True).double()
    nn.init.constant_(halving.weight, 1 / (halving.gain * halving.weight.numel()))
    for y in (halving.doubled(x), halving(x)):
        torch.testing.assert_close(y[..., 2:-2, 2:-2], torch.ones_like(y[..., 2:-2, 2:-2]))
    assert halving(x).shape[2:] == (8, 8)


# Networks ------------------------------------------------------------------------------------------------------------


def test_the_generator_is_its_definition():
    network, z = generator(), randn(3, 5).requires_grad_()
    noises = [noise.requires_grad_() for noise in drawn(network, 3)[1]]
    found, expected = network(z, noises), expected_image(network.state_dict(keep_vars=True), z, noises)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert_gradients(found, expected, [z, *noises, *network.parameters()], 1e-10)
    w = network.mapping(z)
    torch.testing.assert_close(activated(network.mapping.pre_activation(z)), w)
    assert (network.mapping.pre_activation(z) < 0).any()
    torch.testing.assert_close(
        network.synthesis(w[:, None].repeat(1, network.layers, 1), noises), network(z, noises), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("group", [0, 2, 4])
def test_the_discriminator_is_its_definition(group: int):
    network, images = discriminator(group), randn(4, 3, 32, 32).requires_grad_()
    found, expected = network(images), expected_logits(network.state_dict(keep_vars=True), images, group)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert_gradients(found, expected, [images, *network.parameters()], 1e-10)


def test_a_last_small_batch_is_one_group():
    x = randn(3, 2, 4, 4)
    assert torch.equal(with_deviation(x, 8), with_deviation(x, 3))


def shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def test_names_of_the_generator():
    expected: dict[str, tuple[int, ...]] = {"mapping.w_avg": (7,), "synthesis.b4.const": (9, 4, 4)}
    for number, inputs in enumerate((5, 7, 7)):
        expected |= {f"mapping.fc{number}.weight": (7, inputs), f"mapping.fc{number}.bias": (7,)}
    channels = {4: 9, 8: 9, 16: 8, 32: 4}
    for side, width in channels.items():
        block = f"synthesis.b{side}"
        for name, inputs in (("conv0", channels.get(side // 2)), ("conv1", width), ("torgb", width)):
            if inputs is None:
                continue
            outputs, size = (3, 1) if name == "torgb" else (width, 3)
            layer = {"affine.weight": (inputs, 7), "affine.bias": (inputs,), "bias": (outputs,)}
            layer["weight"] = (outputs, inputs, size, size)
            if name != "torgb":
                layer |= {"noise_const": (side, side), "noise_strength": (), "resample_filter": (4, 4)}
            expected |= {f"{block}.{name}.{tensor}": shape for tensor, shape in layer.items()}
        expected[f"{block}.resample_filter"] = (4, 4)
    assert shapes(generator()) == expected
    assert not generator().mapping.w_avg.any()


@pytest.mark.parametrize("group", [0, 4])
def test_names_of_the_discriminator(group: int):
    channels = {4: 9, 8: 9, 16: 8, 32: 4}
    convolutions = {"b32.fromrgb": (4, 3, 1), "b4.conv": (9, 9 + (group > 0), 3)}
    for side in (32, 16, 8):
        width, outputs = channels[side], channels[side // 2]
        convolutions |= {f"b{side}.conv0": (width, width, 3), f"b{side}.conv1": (outputs, width, 3),
                         f"b{side}.skip": (outputs, width, 1)}  # fmt: skip
    expected: dict[str, tuple[int, ...]] = {f"b{side}.resample_filter": (4, 4) for side in (32, 16, 8)}
    for name, (outputs, inputs, size) in convolutions.items():
        expected |= {f"{name}.weight": (outputs, inputs, size, size), f"{name}.resample_filter": (4, 4)}
        expected |= {} if name.endswith("skip") else {f"{name}.bias": (outputs,)}
    expected |= {"b4.fc.weight": (9, 16 * 9), "b4.fc.bias": (9,), "b4.out.weight": (1, 9), "b4.out.bias": (1,)}
    assert shapes(discriminator(group)) == expected


def test_parameters_at_256_pixels():
    """Base 16384, at most 512: widths 512 up to side 32, then 256, 128, 64; z and w of 512, eight mapping layers.

    A dense layer of 512 to n has 513n. So a styled convolution of i to o has 9io + o + 1 + 513i with affine, bias and
    strength of noise, and one to RGB 3i + 3 + 513i.
      mapping 8 * 262,656 = 2,101,248, constant 16 * 512 = 8,192                          2,109,440
      seven of 512 to 512, 7 * 2,622,465                                                 18,357,255
      side 64: 1,442,561 + 721,409, 128: 426,369 + 213,249, 256: 139,457 + 69,761         3,012,806
      to RGB 4 * 264,195 + 132,099 + 66,051 + 33,027                                      1,287,957 = 24,767,458
    A residual block of i to o has 9ii + i + 9io + o + io.
      from RGB 4 * 64, 64 to 128: 118,976, 128 to 256: 475,520, 256 to 512: 1,901,312     2,496,064
      three of 512 to 512, 3 * 4,981,760                                                 14,945,280
      9 * 513 * 512 + 512 with a group, then 8,193 * 512 and 513                          6,559,745 = 24,001,089
    """
    with torch.device("meta"):
        assert count(FaceGenerator(256)) == 24_767_458
        assert count(FaceDiscriminator(256, group=4)) == 24_001_089
        assert count(FaceDiscriminator(256)) == 24_001_089 - 9 * 512


def test_parameters_at_64_pixels():
    """Base 4096, at most 256: widths 256 up to side 16, then 128, 64; z and w of 256, four mapping layers.

    mapping 4 * 65,792 = 263,168, constant 4,096                                          267,264
    five of 256 to 256, 5 * (589,824 + 257 + 65,792)                                    3,279,365
    side 32: 360,833 + 180,481, 64: 106,689 + 53,377                                      701,380
    to RGB 3 * 66,563 + 33,283 + 16,643                                                   249,615 = 4,497,624
      from RGB 256, 64 to 128: 118,976, 128 to 256: 475,520, two of 256 to 256: 1,245,696 3,086,144
      590,080, 4,097 * 256 and 257                                                        1,639,169 = 4,725,313
    """
    with torch.device("meta"):
        assert count(FaceGenerator(64, 4096, 256, 256, 256, 4)) == 4_497_624
        assert count(FaceDiscriminator(64, 4096, 256)) == 4_725_313


@pytest.mark.parametrize("build", [FaceGenerator, FaceDiscriminator])
@pytest.mark.parametrize("side", [0, 16, 48, 100, 2048])
def test_a_wrong_side(build: type[nn.Module], side: int):
    with pytest.raises(ValueError, match=rf"side is {side}; it must be one of 32, 64, 128, 256, 512, 1024"):
        build(side)


def test_the_start_is_equalised():
    """Unit Gaussian weights, and yet no second moment vanishes or explodes; blurs and sums take it away from one."""
    network, judge = FaceGenerator(32, 2048, 64, 64, 64, 8), FaceDiscriminator(32, 2048, 64)
    z, noises = torch.randn(16, 64), [torch.randn(16, 1, *shape) for shape in network.noise_shapes()]
    with torch.no_grad():
        w = network.mapping(z)
        x, _ = network.head(w[:, None].expand(-1, network.layers, -1), noises, network.layers)
        maps = judge.features(torch.randn(16, 3, 1, 1).expand(-1, -1, 32, 32))
    for values in (w, x, *maps):
        assert 0.1 < values.square().mean() < 3
    starts = {"affine.bias": 1, "noise_strength": 0}
    for name, parameter in network.named_parameters():
        assert all((parameter == start).all() for end, start in starts.items() if name.endswith(end)), name
    assert network.mapping.fc0.weight.std().item() == pytest.approx(100, rel=0.1)


# Exploring -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [32, 64])
def test_noise_shapes_fit(side: int):
    network = generator(side)
    w, noises = drawn(network)
    assert network.side == side
    assert (network.layers, network.z_size, network.w_size) == (2 * int(math.log2(side)) - 2, 5, 7)
    assert network.noise_shapes() == [(s, s) for s in (4, 8, 8, 16, 16, 32, 32, 64, 64)][: network.layers - 1]
    assert network.synthesis(w, noises).shape == (2, 3, side, side)
    kept = [m.noise_const.shape for m in network.modules() if isinstance(m, StyledConvolution)]
    assert kept == network.noise_shapes()


@pytest.mark.parametrize("layer", range(9))
def test_head_and_tail_are_synthesis(layer: int):
    """Bit by bit; each reads its own styles and noises alone, of which the other's are not numbers."""
    network = generator()
    w, noises = drawn(network)
    expected = network.synthesis(w, noises)
    of_head, of_tail = w.clone(), w.clone()
    of_head[:, layer:] = of_tail[:, :layer] = math.nan
    nans = [torch.full_like(noise, math.nan) for noise in noises]
    features = network.head(of_head, [*noises[:layer], *nans[layer:]], layer)
    assert torch.equal(network.tail(features, of_tail, [*nans[:layer], *noises[layer:]], layer), expected)


def test_every_style_and_noise_counts():
    network = generator()
    w, noises = drawn(network)
    inputs = [tensor.requires_grad_() for tensor in (w, *noises)]
    gradients = torch.autograd.grad(network.synthesis(w, noises)[0].square().sum(), inputs)
    assert (gradients[0][0].abs().sum(1) > 0).all(), "a style that nothing reads"
    assert not gradients[0][1].any(), "an image depends on another's style"
    assert all(gradient.any() for gradient in gradients)


def features_alone(network: FaceDiscriminator, images: Tensor) -> list[Tensor]:
    """Of each image on its own."""
    return [torch.cat(maps) for maps in zip(*map(network.features, images.split(1)), strict=True)]


@pytest.mark.parametrize("group", [0, 4])
def test_features_depend_on_their_image_alone(group: int):
    network, images = discriminator(group, 64), randn(4, 3, 64, 64)
    maps = network.features(images)
    assert [tuple(m.shape) for m in maps] == [(4, 4, 32, 32), (4, 8, 16, 16), (4, 9, 8, 8), (4, 9, 4, 4)]
    for found, alone in zip(maps, features_alone(network, images), strict=True):
        torch.testing.assert_close(found, alone, rtol=1e-12, atol=1e-12)


def test_only_a_group_mixes_images():
    images = randn(4, 3, 32, 32)
    for group in (0, 4):
        network = discriminator(group)
        together, alone = network(images), torch.cat([network(image) for image in images.split(1)])
        assert together.shape == (4, 1)
        assert torch.allclose(together, alone, rtol=1e-12, atol=1e-12) == (group == 0)


# Training ------------------------------------------------------------------------------------------------------------


def r1(network: nn.Module, images: Tensor) -> Tensor:
    """The mean square of the gradient of an image's logit (arXiv 1801.04406)."""
    images = images.requires_grad_()
    (gradient,) = torch.autograd.grad(network(images).sum(), images, create_graph=True)
    return gradient.square().sum((1, 2, 3)).mean()


@pytest.mark.parametrize("group", [0, 2])
def test_the_gradient_of_r1_is_its_slope(group: int):
    """Along one direction through all weights; so short a way that no unit changes its sign on it."""
    network, images = discriminator(group), randn(2, 3, 32, 32)
    weights = list(network.parameters())
    gradients = torch.autograd.grad(r1(network, images), weights, allow_unused=True)
    ways = [torch.randn_like(w) for w in weights]
    slope = sum((g * way).sum() for g, way in zip(gradients, ways, strict=True) if g is not None)
    ends = []
    for length in (1e-7, -2e-7):
        for weight, way in zip(weights, ways, strict=True):
            weight.data.add_(way, alpha=length)
        ends.append(r1(network, images).item())
    assert slope.item() == pytest.approx((ends[0] - ends[1]) / 2e-7, rel=1e-5)
    unused = [name for (name, _), g in zip(network.named_parameters(), gradients, strict=True) if g is None]
    assert unused == ["b4.out.bias"]


def test_gradients_of_gradients_through_the_generator():
    """Of a w that all layers share, as a penalty on the path length takes them."""
    network = generator()
    _, noises = drawn(network, 1)
    w = randn(1, 7).requires_grad_()

    def pulled(w: Tensor) -> Tensor:
        (gradient,) = torch.autograd.grad(
            network.synthesis(w[:, None].expand(-1, network.layers, -1), noises).square().sum(), w, create_graph=True
        )
        return gradient.square().sum()

    (gradient,) = torch.autograd.grad(pulled(w), w)
    way = 1e-7 * randn(1, 7)
    expected = (pulled(w + way) - pulled(w - way)).item() / 2
    assert (gradient * way).sum().item() == pytest.approx(expected, rel=1e-5)


def test_half_precision_ends_where_sums_begin():
    """The image is a sum over sides, and logits differ by little: neither is rounded to half precision."""
    network, judge = (build(32, channel_base=128, channel_max=8) for build in (FaceGenerator, FaceDiscriminator))
    noises = [torch.randn(2, 1, *shape) for shape in network.noise_shapes()]
    with torch.autocast("cpu", torch.bfloat16):
        image = network(torch.randn(2, 512), noises)
        logits = judge(image)
    assert image.dtype == logits.dtype == torch.float32
    assert not torch.equal(image, image.bfloat16().float())
    assert not torch.equal(logits, logits.bfloat16().float())
