"""The generator of SEGA-FURN: dense nested blocks of residual-in-internal-dense blocks, then pixel shuffle."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sega_dist.config import GeneratorConfig, Kernels, NormConfig
from sega_dist.kernels.ridb import ridb
from sega_dist.kernels.upconv_act import upconv_act
from sega_dist.networks.checkpointing import in_stages
from sega_dist.networks.initial import glorot_, icnr_

IDBS = 4  # internal dense blocks in a RIDB (paper figure 3)
RIDBS = 3  # RIDBs in a dense nested block (paper figure 2)


class InternalDenseBlock(nn.Module):
    """The parameters of an IDB: two convolutions, the second reads the concatenation. A RIDB computes with them."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(2 * channels, channels, 3, padding=1)


class ResidualInternalDenseBlock(nn.Module):
    """RIDB: r + beta * Ct(four IDBs, each of which adds r), as one op."""

    reads_parameters_below = True  # an engine that spreads parameters must gather those of its submodules too

    def __init__(self, channels: int, slope: float, beta: float, kernels: Kernels = "auto"):
        super().__init__()
        self.blocks = nn.ModuleList(InternalDenseBlock(channels) for _ in range(IDBS))
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.slope, self.beta, self.kernels = slope, beta, kernels

    def forward(self, r: Tensor) -> Tensor:
        parameters = [*self.blocks.parameters(), *self.conv.parameters()]  # filter, bias, filter, bias, ...
        return ridb(r, parameters[::2], parameters[1::2], self.slope, self.beta, self.kernels)


class DenseNestedBlock(nn.Module):
    """DNB: x + alpha * (three RIDBs in a row)."""

    def __init__(self, config: GeneratorConfig, kernels: Kernels = "auto"):
        super().__init__()
        block = (config.channels, config.slope, config.beta, kernels)
        self.blocks = nn.Sequential(*(ResidualInternalDenseBlock(*block) for _ in range(RIDBS)))
        self.alpha = config.alpha

    def forward(self, x: Tensor) -> Tensor:
        return x + self.alpha * self.blocks(x)


class UpsamplingStage(nn.Module):
    """One doubling: convolution, pixel shuffle, LeakyReLU; (N,C,h,w) -> (N,C,2h,2w)."""

    reads_parameters_below = True

    def __init__(self, channels: int, slope: float, kernels: Kernels = "auto"):
        super().__init__()
        self.conv = nn.Conv2d(channels, 4 * channels, 3, padding=1)
        self.slope, self.kernels = slope, kernels

    def forward(self, x: Tensor) -> Tensor:
        assert self.conv.bias is not None
        return upconv_act(x, self.conv.weight, self.conv.bias, self.slope, self.kernels)


class OutputConvolution(nn.Conv2d):
    """A convolution with a large filter to few channels, computed as one that is a row high to more of them.

    Three channels leave most of what a processor multiplies at once to nothing: 9x9 to 3 becomes 1x9 to 27, one group
    of 3 for each row of the filter, and the sum of these groups, each shifted by its row.
    """

    def forward(self, x: Tensor) -> Tensor:
        out, inner, rows, columns = self.weight.shape
        filters = self.weight.permute(2, 0, 1, 3).reshape(rows * out, inner, 1, columns)
        groups = F.conv2d(x, filters, padding=(0, columns // 2)).split(out, 1)
        assert self.bias is not None
        y = self.bias.view(1, -1, 1, 1)
        for shift, group in zip(range(rows // 2, -rows // 2, -1), groups, strict=True):
            y = y + F.pad(group, (0, 0, shift, -shift))
        return y


class Generator(nn.Module):
    """LR (N,3,h,w) in [-1,1] -> SR (N,3,scale*h,scale*w) in [-1,1]; any h and w.

    Paper section 3.1 and figures 2 and 3: shallow features (SFM), dense nested blocks (MDBM), global fusion (GFF) with
    the one long skip, upsampling (UM), 9x9 output convolution and tanh.
    """

    def __init__(self, scale: int, config: GeneratorConfig, norm: NormConfig, kernels: Kernels = "auto",
                 is_checkpointing: bool = False):  # fmt: skip
        super().__init__()
        self.is_checkpointing = is_checkpointing  # a dense nested block remembers its input alone
        width, doublings = config.channels, scale.bit_length() - 1
        assert 2**doublings == scale
        self.shallow = nn.Conv2d(3, width, 9, padding=4)
        self.trunk = nn.Sequential(*(DenseNestedBlock(config, kernels) for _ in range(config.nested_blocks)))
        self.fusion = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=norm.conv_bias),
            nn.BatchNorm2d(width, norm.eps, norm.momentum),
        )
        self.upsampling = nn.Sequential(*(UpsamplingStage(width, config.slope, kernels) for _ in range(doublings)))
        self.output = OutputConvolution(width, 3, 9, padding=4)
        glorot_(self)
        for stage in self.upsampling:
            icnr_(stage.conv)  # type: ignore[arg-type]
        if config.zero_fusion:
            nn.init.zeros_(self.fusion[1].weight)  # type: ignore[arg-type]

    def forward(self, lr: Tensor) -> Tensor:
        shallow = self.shallow(lr)
        deep = in_stages(self.trunk, shallow, self.is_checkpointing)
        fused = shallow + self.fusion(deep)
        return torch.tanh(self.output(self.upsampling(fused)))
