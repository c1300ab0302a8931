"""DCGAN's generator (arXiv 1511.06434) with the layer names of PyTorch's tutorial, to be explored."""

from collections.abc import Sequence

from torch import Tensor, nn

STAGES = 5  # convolutions; each but the last is followed by batch norm and ReLU


class DcganGenerator(nn.Module):
    """z (N,Z) -> faces (N,3,64,64) in [-1,1]. It has no mapping network and no noise: w is z, the same for all layers.

    State-dict keys are `main.0.weight`, `main.1.weight` ... `main.12.weight`.
    """

    side, layers, splits = 64, 1, STAGES
    gaussian: tuple[Tensor, Tensor] | None = None

    def __init__(self, z_size: int = 100, width: int = 64):
        super().__init__()
        self.z_size = self.w_size = z_size
        stages: list[nn.Module] = []
        channels = z_size
        for number, multiple in enumerate((8, 4, 2, 1)):
            stride, padding = (2, 1) if number else (1, 0)
            stages += [nn.ConvTranspose2d(channels, width * multiple, 4, stride, padding, bias=False),
                       nn.BatchNorm2d(width * multiple), nn.ReLU()]  # fmt: skip
            channels = width * multiple
        self.main = nn.Sequential(*stages, nn.ConvTranspose2d(channels, 3, 4, 2, 1, bias=False), nn.Tanh())

    def noise_shapes(self) -> list[tuple[int, int]]:
        return []

    def synthesis(self, w: Tensor, noises: Sequence[Tensor]) -> Tensor:
        """w (N,1,Z) -> (N,3,64,64)."""
        return self.tail(self.head(w, noises, 0), w, noises, 0)

    def head(self, w: Tensor, noises: Sequence[Tensor], layer: int) -> tuple[Tensor]:
        """What the stages before number `layer` make of w (N,1,Z): (N,C,s,s)."""
        made: Tensor = self.main[: 3 * layer](w[:, 0, :, None, None])
        return (made,)

    def tail(self, features: tuple[Tensor, ...], w: Tensor, noises: Sequence[Tensor], layer: int) -> Tensor:
        """From what `head` returned to images."""
        images: Tensor = self.main[3 * layer :](features[0])
        return images
