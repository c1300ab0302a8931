"""SEGA-FURN's training step as a careful user would write it in plain PyTorch, with nothing from this project.

The same mathematics with the paper's settings: what `sega-dist bench step` compares with, and what a test holds equal.
Parameters stand in the same order as the project's, so that weights can be taken over.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DenseBlock(nn.Module):
    def __init__(self):
        super().__init__()
        sizes = [size for _ in range(4) for size in (64, 128)] + [64]
        self.convs = nn.ModuleList(nn.Conv2d(size, 64, 3, padding=1) for size in sizes)

    def forward(self, r: Tensor) -> Tensor:
        x = r
        for one, two in zip(self.convs[:8:2], self.convs[1:8:2], strict=True):
            f1 = F.leaky_relu(one(x), 0.2)
            f2 = F.leaky_relu(two(torch.cat([x, f1], 1)), 0.2)
            x = x + f1 + f2 + r
        return r + 0.2 * self.convs[8](x)


class Generator(nn.Module):
    def __init__(self, scale: int):
        super().__init__()
        self.first = nn.Conv2d(3, 64, 9, padding=4)
        self.trunk = nn.ModuleList(nn.Sequential(DenseBlock(), DenseBlock(), DenseBlock()) for _ in range(4))
        self.fusion = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64))
        doubling = [(nn.Conv2d(64, 256, 3, padding=1), nn.PixelShuffle(2), nn.LeakyReLU(0.2))
                    for _ in range(scale.bit_length() - 1)]  # fmt: skip
        self.enlarge = nn.Sequential(*(layer for one in doubling for layer in one))
        self.last = nn.Conv2d(64, 3, 9, padding=4)

    def forward(self, lr: Tensor) -> Tensor:
        x = first = self.first(lr)
        for block in self.trunk:
            x = x + 0.2 * block(x)
        return torch.tanh(self.last(self.enlarge(first + self.fusion(x))))


def convolutions(channels: int, widths: list[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i, width in enumerate(widths):
        stride = 2 if i % 2 or i == 8 else 1
        layers += [nn.Conv2d(channels, width, 3, stride, 1, bias=i == 0)]
        layers += [nn.BatchNorm2d(width)] * (i > 0) + [nn.LeakyReLU(0.2)]
        channels = width
    return nn.Sequential(*layers)


class Discriminator(nn.Module):
    def __init__(self, size: int):
        super().__init__()
        self.image = convolutions(3, [64, 64, 128, 128, 256, 256, 512, 512, 512])
        self.dense = nn.Sequential(nn.Conv2d(512, 1024, 1), nn.LeakyReLU(0.2), nn.Conv2d(1024, 1, 1))
        self.semantics = convolutions(512, [128, 128, 64, 64, 32, 32])
        sides = [32 + (size // 32) ** 2, 256, 128, 64, 32, 16]
        self.head = nn.ModuleList(nn.Linear(i, o) for i, o in zip(sides, sides[1:], strict=False))
        self.logit = nn.Linear(16, 1, bias=False)

    def forward(self, image: Tensor, embedding: Tensor, noise: Tensor) -> Tensor:
        x = torch.cat([self.semantics(embedding).flatten(1), self.dense(self.image(image)).flatten(1)], 1)
        with torch.autocast(x.device.type, enabled=False):
            x = x.float() if noise.dtype == torch.float32 else x
            for layer, uniform in zip(self.head, noise.split([256, 128, 64, 32, 16], 1), strict=True):
                x = F.leaky_relu(layer(x), 0.2) * (uniform > 0.5) * 2  # dropout of a half, drawn by the caller
            return self.logit(x)


class Vgg19(nn.Module):
    """Embedding of 8x8 with `convolutions` 16, the features of conv3_3 with 7."""

    def __init__(self, convolutions: int):
        super().__init__()
        widths = [64] * 2 + [128] * 2 + [256] * 4 + [512] * 8
        pairs = list(zip([3, *widths], widths, strict=False))[:convolutions]
        self.layers = nn.ModuleList(nn.Conv2d(i, o, 3, padding=1) for i, o in pairs)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1))

    def forward(self, image: Tensor) -> Tensor:
        x = ((image + 1) / 2 - self.mean) / self.std
        for number, layer in enumerate(self.layers, 1):
            x = layer(x)
            if len(self.layers) == 7 == number:
                return x
            x = F.relu(x)
            if number in (2, 4, 8, 12, 16) and x.shape[-1] > 8:
                x = F.max_pool2d(x, 2)
        return x


class Plain:
    """Both players; `networks` are parameters in the order generator, discriminator, VGG19, to begin with."""

    def __init__(self, scale: int, size: int, networks: Iterable[Iterable[Tensor]], device: str, dtype: torch.dtype,
                 layout: torch.memory_format, autocast: torch.dtype | None = None, compile: str = ""):  # fmt: skip
        self.g, self.d, self.e, self.phi = Generator(scale), Discriminator(size), Vgg19(16), Vgg19(7)
        generator, discriminator, vgg19 = (list(parameters) for parameters in networks)
        for mine, theirs in ((self.g, generator), (self.d, discriminator), (self.e, vgg19), (self.phi, vgg19[:14])):
            mine.to(device=device, dtype=dtype, memory_format=layout)
            for parameter, value in zip(mine.parameters(), theirs, strict=True):
                parameter.data.copy_(value)
            if compile:
                mine.compile(mode=compile)
        self.e.requires_grad_(False)
        self.phi.requires_grad_(False)
        self.opt_g, self.opt_d = (torch.optim.Adam(m.parameters(), 1e-4) for m in (self.g, self.d))
        self.autocast = torch.autocast(device, autocast, enabled=autocast is not None)

    def semantics(self, lr: Tensor, hr: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return self.e(hr), self.e(lr)

    def loss_d(self, sr: Tensor, semantics: tuple[Tensor, Tensor], hr: Tensor, noise: tuple[Tensor, ...]) -> Tensor:
        real, fake = self.d(hr, semantics[0], noise[0]), self.d(sr, semantics[1], noise[1])
        return (real - fake.mean() - 1).square().mean() + (fake - real.mean() + 1).square().mean()

    def loss_a(self, sr: Tensor, semantics: tuple[Tensor, Tensor], hr: Tensor, noise: tuple[Tensor, ...]) -> Tensor:
        real, fake = self.d(hr, semantics[0], noise[2]).detach(), self.d(sr, semantics[1], noise[3])
        return (real - fake.mean() + 1).square().mean() + (fake - real.mean() - 1).square().mean()

    def content(self, phi_hr: Tensor, sr: Tensor) -> Tensor:
        return (phi_hr.to(sr.dtype) - self.phi(sr).to(sr.dtype)).square().mean()

    def step(self, lr: Tensor, hr: Tensor, noise: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Images in [-1,1], uniform noise for dropout (D phase real, fake; G phase real, fake) -> L_D, L_G."""
        with self.autocast:
            sr = self.g(lr).to(hr.dtype)
            semantics = self.semantics(lr, hr)
            loss_d = self.loss_d(sr.detach(), semantics, hr, noise)
        self.opt_d.zero_grad()
        loss_d.backward()
        self.opt_d.step()
        self.d.requires_grad_(False)
        with self.autocast:
            loss_g = self.content(self.phi(hr), sr) + 1e-3 * self.loss_a(sr, semantics, hr, noise)
        self.opt_g.zero_grad()
        loss_g.backward()
        self.opt_g.step()
        self.d.requires_grad_(True)
        return loss_d.detach(), loss_g.detach()
