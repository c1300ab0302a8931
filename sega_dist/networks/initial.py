"""Initial weights: Glorot-uniform, zero bias, and ICNR for pixel shuffle."""

import torch
from torch import nn


def glorot_(module: nn.Module) -> None:
    """Glorot-uniform weights and zero biases in every convolution and linear layer of `module`."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


@torch.no_grad()
def icnr_(convolution: nn.Conv2d) -> None:
    """Start pixel shuffle as nearest enlargement: its four sub-pixel filters equal (arXiv 1707.02937, section 3)."""
    out_channels, *rest = convolution.weight.shape
    filters = nn.init.xavier_uniform_(convolution.weight.new_empty(out_channels // 4, *rest))
    convolution.weight.copy_(filters.repeat_interleave(4, dim=0))
