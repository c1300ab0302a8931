"""A face GAN that can be explored: StyleGAN2 (arXiv 1912.04958) with skips in G and residual blocks in D.

Names and shapes of weights, and the gains at which these are used, are those of NVlabs' stylegan2-ada-pytorch, so that
state dicts of its unconditional networks load as they are. Its clamp of activations to 256, a guard of half precision,
is not here.
"""

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sega_dist.config import FACE_SIDES
from sega_dist.networks.discriminator import full_precision

EPS = 1e-8

Features = tuple[Tensor, Tensor]  # a map (N,C,s,s), and the image so far, (N,3,s,s) or (N,3,s/2,s/2)


def widths(side: int, channel_base: int, channel_max: int) -> dict[int, int]:
    """Channels of the maps of sides 4, 8, ... `side`. ValueError for another side than `FACE_SIDES`."""
    if side not in FACE_SIDES:
        raise ValueError(f"side is {side}; it must be one of {', '.join(map(str, FACE_SIDES))}")
    return {s: min(channel_base // s, channel_max) for s in (2**i for i in range(2, side.bit_length()))}


def activated(x: Tensor) -> Tensor:
    """LeakyReLU, with a gain that about keeps the second moment."""
    return F.leaky_relu(x, 0.2) * 2**0.5


class Dense(nn.Module):
    """Fully connected. Weights of unit deviation are scaled when used, so that all learn alike (arXiv 1710.10196)."""

    def __init__(self, inputs: int, outputs: int, bias: float = 0.0, learning_rate: float = 1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / learning_rate)
        self.bias = nn.Parameter(torch.full((outputs,), bias))
        self.weight_gain, self.bias_gain = learning_rate / inputs**0.5, learning_rate

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.weight_gain, self.bias * self.bias_gain)


class Resampling(nn.Module):
    """What keeps a low-pass filter (4,4), symmetric and of sum 1."""

    resample_filter: Tensor

    def __init__(self) -> None:
        super().__init__()
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0])
        self.register_buffer("resample_filter", taps.outer(taps) / taps.sum() ** 2)

    def blurred(self, x: Tensor, padding: int, stride: int = 1) -> Tensor:
        """(N,C,s,s) between borders of zeros -> every `stride`-th pixel of what passes the filter."""
        channels = x.shape[1]
        return F.conv2d(x, self.resample_filter.expand(channels, 1, 4, 4), None, stride, padding, groups=channels)

    def doubled(self, x: Tensor) -> Tensor:
        """(N,C,s,s) -> (N,C,2s,2s): zeros between the pixels, then the filter."""
        channels = x.shape[1]
        return F.conv_transpose2d(x, 4 * self.resample_filter.expand(channels, 1, 4, 4), None, 2, 1, groups=channels)


class Mapping(nn.Module):
    """z (N,Z) -> w (N,W). `w_avg` (W,) is the place for their mean."""

    def __init__(self, z_size: int, w_size: int, layers: int):
        super().__init__()
        for number in range(layers):
            self.add_module(f"fc{number}", Dense(w_size if number else z_size, w_size, learning_rate=0.01))
        self.register_buffer("w_avg", torch.zeros(w_size))

    def pre_activation(self, z: Tensor) -> Tensor:
        """(N,W): what the last LeakyReLU reads; w is `activated` of it."""
        first, *rest = self.children()
        x: Tensor = first(z * (z.square().mean(1, keepdim=True) + EPS).rsqrt())
        for layer in rest:
            x = layer(activated(x))
        return x

    def forward(self, z: Tensor) -> Tensor:
        return activated(self.pre_activation(z))


class StyledConvolution(Resampling):
    """x (N,I,s,s), w (N,W), noise (N or 1,1,`side`,`side`) -> (N,O,side,side), where s is `side` or half of it."""

    def __init__(self, inputs: int, outputs: int, w_size: int, side: int, is_doubling: bool):
        super().__init__()
        self.is_doubling = is_doubling
        self.affine = Dense(w_size, inputs, bias=1.0)
        self.weight = nn.Parameter(torch.randn(outputs, inputs, 3, 3))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.noise_strength = nn.Parameter(torch.zeros(()))
        self.register_buffer("noise_const", torch.randn(side, side))

    def modulated(self, x: Tensor, style: Tensor) -> Tensor:
        """Each image's own filters, weight * style, brought to norm 1 for each output: equations 1 and 3.

        A style belongs to an input and a norm to an output: the maps are scaled, and one convolution serves all images.
        """
        x = x * style[..., None, None]
        if self.is_doubling:
            y = 4 * self.blurred(F.conv_transpose2d(x, self.weight.transpose(0, 1), stride=2), padding=1)
        else:
            y = F.conv2d(x, self.weight, padding=1)
        with full_precision(x.device):  # in fp16 the squares would overflow, and EPS be nothing
            filters = self.weight.square().sum((2, 3))
            norm = (style.to(filters.dtype).square() @ filters.T + EPS).rsqrt()
        return y * norm.to(y.dtype)[..., None, None]

    def forward(self, x: Tensor, w: Tensor, noise: Tensor) -> Tensor:
        y = self.modulated(x, self.affine(w)) + self.noise_strength * noise
        return activated(y + self.bias.view(-1, 1, 1))


class ToRgb(nn.Module):
    """x (N,I,s,s), w (N,W) -> (N,3,s,s)."""

    def __init__(self, inputs: int, w_size: int):
        super().__init__()
        self.affine = Dense(w_size, inputs, bias=1.0)
        self.weight = nn.Parameter(torch.randn(3, inputs, 1, 1))
        self.bias = nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        style = self.affine(w) / self.weight.shape[1] ** 0.5
        return F.conv2d(x * style[..., None, None], self.weight, self.bias)


class SynthesisBlock(Resampling):
    """The layers of one side. The first block has no inputs but a learned constant."""

    def __init__(self, inputs: int, outputs: int, w_size: int, side: int):
        super().__init__()
        if inputs:
            self.conv0 = StyledConvolution(inputs, outputs, w_size, side, is_doubling=True)
        else:
            self.const = nn.Parameter(torch.randn(outputs, side, side))
        self.conv1 = StyledConvolution(outputs, outputs, w_size, side, is_doubling=False)
        self.torgb = ToRgb(outputs, w_size)


class Synthesis(nn.Module):
    """w (N,L,W), L-1 noises (N or 1,1,s,s) -> images (N,3,side,side), about in [-1,1]."""

    def __init__(self, channels: dict[int, int], w_size: int):
        super().__init__()
        self.layers = 2 * len(channels)
        for side, width in channels.items():
            self.add_module(f"b{side}", SynthesisBlock(channels.get(side // 2, 0), width, w_size, side))

    def start(self, count: int) -> Features:
        """Before the first step: the constant, and an image of zeros that is half as large."""
        const = cast(SynthesisBlock, next(self.children())).const
        return const.expand(count, -1, -1, -1), const.new_zeros(count, 3, const.shape[1] // 2, const.shape[2] // 2)

    def steps(self, features: Features, w: Tensor, noises: Sequence[Tensor], steps: range) -> Features:
        """Step i is all that reads w[:, i]: a block's last convolution, or its image and the next one's first."""
        x, image = features
        blocks = cast(list[SynthesisBlock], list(self.children()))
        for step in steps:
            block = blocks[step // 2]
            if step % 2 == 0:
                x = block.conv1(x, w[:, step], noises[step])
                continue
            with full_precision(x.device):  # the image is a sum over all sides, which would be rounded at each
                image = block.doubled(image)
            image = image + block.torgb(x, w[:, step])
            if step + 1 < self.layers:
                x = blocks[step // 2 + 1].conv0(x, w[:, step], noises[step])
        return x, image

    def forward(self, w: Tensor, noises: Sequence[Tensor]) -> Tensor:
        return self.steps(self.start(len(w)), w, noises, range(self.layers))[1]


def noise_shapes(side: int) -> list[tuple[int, int]]:
    """Sides of the noises of a generator, in their order: two of each side but the first."""
    return [(4, 4)] + [(s, s) for s in (2**i for i in range(3, side.bit_length())) for _ in range(2)]


def draws(side: int, z_size: int) -> int:
    """Normal numbers that one image takes: two z, two for the crossover, the noises."""
    return 2 * z_size + 2 + sum(height * width for height, width in noise_shapes(side))


def from_normals(
    normals: Tensor, side: int, z_size: int, style_mixing: float
) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    """(N, `draws`) standard normal numbers to what `FaceGenerator` reads: z, noises, another z, the crossover.

    With probability `style_mixing` it lies anywhere between two layers, else behind the last (arXiv 1812.04948, 3.1).
    """
    shapes = noise_shapes(side)
    z, other, chances, *maps = normals.split([z_size, z_size, 2, *(height * width for height, width in shapes)], 1)
    is_mixed, where = torch.special.ndtr(chances.float()).split(1, 1)
    layers = len(shapes) + 1
    anywhere = 1 + (where * (layers - 1)).long().clamp(max=layers - 2)
    crossover = torch.where(is_mixed < style_mixing, anywhere, layers)
    return z, [x.view(-1, 1, *shape) for x, shape in zip(maps, shapes, strict=True)], other, crossover


class FaceGenerator(nn.Module):
    """z (N,Z), noises -> images (N,3,side,side), about in [-1,1]. ValueError for another side than `FACE_SIDES`.

    Noises are L-1 maps (N or 1,1,s,s) that the caller draws; w is (N,L,W) elsewhere, here the same for every layer, or
    that of `other` from layer `crossover` (N,1) on.
    """

    def __init__(self, side: int, channel_base: int = 16384, channel_max: int = 512, z_size: int = 512,
                 w_size: int = 512, mapping_layers: int = 8):  # fmt: skip
        super().__init__()
        channels = widths(side, channel_base, channel_max)
        self.side, self.z_size, self.w_size, self.layers = side, z_size, w_size, 2 * len(channels)
        self.splits = self.layers
        self.gaussian: tuple[Tensor, Tensor] | None = None  # mean and std (W,) of the mapping's last pre-activation
        self.mapping = Mapping(z_size, w_size, mapping_layers)
        self.synthesis = Synthesis(channels, w_size)

    def noise_shapes(self) -> list[tuple[int, int]]:
        """Sides of the L-1 noises, in their order."""
        return noise_shapes(self.side)

    def forward(self, z: Tensor, noises: Sequence[Tensor], other: Tensor | None = None,
                crossover: Tensor | None = None) -> Tensor:  # fmt: skip
        w = self.mapping(z).unsqueeze(1).expand(-1, self.layers, -1)
        if other is not None and crossover is not None:
            is_first = torch.arange(self.layers, device=z.device) < crossover
            w = torch.where(is_first.unsqueeze(2), w, self.mapping(other).unsqueeze(1))
        image: Tensor = self.synthesis(w, noises)
        return image

    def head(self, w: Tensor, noises: Sequence[Tensor], layer: int) -> Features:
        """What reads w[:, :layer] and noises[:layer] alone; 0 <= layer <= L."""
        return self.synthesis.steps(self.synthesis.start(len(w)), w, noises, range(layer))

    def tail(self, features: tuple[Tensor, ...], w: Tensor, noises: Sequence[Tensor], layer: int) -> Tensor:
        """From what `head` returned to images, (N,3,side,side): reads w[:, layer:] and noises[layer:] alone."""
        maps, image = features
        return self.synthesis.steps((maps, image), w, noises, range(layer, self.layers))[1]


class Convolution(Resampling):
    """(N,I,s,s) -> (N,O,s,s) or (N,O,s/2,s/2); filters are 1 or 3 pixels wide and scaled as in `Dense`."""

    def __init__(self, inputs: int, outputs: int, size: int, is_halving: bool = False, has_bias: bool = True):
        super().__init__()
        self.size, self.is_halving, self.gain = size, is_halving, 1 / (inputs**0.5 * size)
        self.weight = nn.Parameter(torch.randn(outputs, inputs, size, size))
        self.bias = nn.Parameter(torch.zeros(outputs)) if has_bias else None

    def forward(self, x: Tensor) -> Tensor:
        filters = self.weight * self.gain
        if not self.is_halving:
            return F.conv2d(x, filters, self.bias, padding=self.size // 2)
        early = 2 if self.size == 1 else 1  # what one pixel's filter passes over need not be blurred
        return F.conv2d(self.blurred(x, self.size // 2 + 1, stride=early), filters, self.bias, stride=2 // early)


class ResidualBlock(Resampling):
    """(N,I,s,s), or for the first block images, -> (N,O,s/2,s/2)."""

    def __init__(self, inputs: int, outputs: int, is_first: bool):
        super().__init__()
        self.fromrgb = Convolution(3, inputs, 1) if is_first else None
        self.conv0 = Convolution(inputs, inputs, 3)
        self.conv1 = Convolution(inputs, outputs, 3, is_halving=True)
        self.skip = Convolution(inputs, outputs, 1, is_halving=True, has_bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.fromrgb is not None:
            x = activated(self.fromrgb(x))
        y: Tensor = activated(self.conv1(activated(self.conv0(x)))) + self.skip(x)
        return y * 0.5**0.5


def with_deviation(x: Tensor, group: int) -> Tensor:
    """(N,C,s,s) -> (N,C+1,s,s): the mean deviation in each image's group (arXiv 1710.10196, section 3).

    There are N / group of these, or one where N is less, and neighbours are of different ones.
    """
    group = min(group, len(x))
    deviation = (x.unflatten(0, (group, -1)).var(0, correction=0) + EPS).sqrt().mean((1, 2, 3)).repeat(group)
    return torch.cat([x, deviation.view(-1, 1, 1, 1).expand_as(x[:, :1])], 1)


class FaceDiscriminator(nn.Module):
    """Images (N,3,side,side) in [-1,1] -> logits (N,1). ValueError for another side than `FACE_SIDES`.

    A logit depends on its own image alone, unless the last layers see how the images of a `group` differ: N is then
    a multiple of it, or less, and the loss depends on which images are judged together.
    """

    def __init__(self, side: int, channel_base: int = 16384, channel_max: int = 512, group: int = 0):
        super().__init__()
        self.side, self.group, channels = side, group, widths(side, channel_base, channel_max)
        for s in sorted(channels)[:0:-1]:
            self.add_module(f"b{s}", ResidualBlock(channels[s], channels[s // 2], is_first=s == side))
        last = channels[4]
        conv, fc, out = Convolution(last + bool(group), last, 3), Dense(16 * last, last), Dense(last, 1)
        self.b4 = nn.ModuleDict({"conv": conv, "fc": fc, "out": out})

    def features(self, images: Tensor) -> list[Tensor]:
        """What each residual block returns, of sides `side`/2 to 4: each image's depend on that image alone."""
        maps = [images]
        for block in list(self.children())[:-1]:
            maps.append(block(maps[-1]))
        return maps[1:]

    def forward(self, images: Tensor) -> Tensor:
        coarsest, (conv, fc, out) = self.features(images)[-1], self.b4.values()
        with full_precision(coarsest.device):
            x = coarsest.to(images.dtype)
            x = activated(conv(with_deviation(x, self.group) if self.group else x))
            logits: Tensor = out(activated(fc(x.flatten(1))))
            return logits
