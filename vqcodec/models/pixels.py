"""What happens on pixels where the finest stage is coarse: a separable lapped filter, and a renderer of details.

Networks at a stride of 16 cost little for each pixel, but they see only whole patches. The lap takes the borders between patches
out of the transform for a tenth of the work of a dense one; the renderer refines each cell of 4 x 4 pixels by pointwise layers that a
patch's features steer (Jia et al. 2026, "PULSE", section 2, "Synthesis transform"; Peebles & Xie 2023, "Scalable diffusion models with
transformers", adaptive layer norm).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

# Side of the cells that the renderer works on, in pixels.
CELL = 4
# Features that every cell gets from its patch.
FEATURES = 24


class SeparableLap(nn.Module):
    """A linear filter of `size` pixels across the borders of patches, along rows and columns alike, for each colour.

    As `vqvae.Lap`, of which it is the case for pixels: half of the filter lies on each side of a border, and the outermost half patches
    of the picture stay as they are in that direction.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.weight = nn.Parameter(torch.eye(size))

    def forward(self, x: Tensor) -> Tensor:
        """x: float (B, 3, H, W), H and W multiples of `size` -> the same shape, float32 whatever autocast says."""
        with torch.autocast(x.device.type, enabled=False):
            for _ in range(2):
                x = self._along_rows(x.float()).transpose(2, 3)
        return x

    def macs_per_pixel(self, positions: int) -> float:
        """Multiply-accumulate operations per picture pixel; `positions` as of `vqvae.Lap`."""
        return 2 * 3 * self.size

    def _along_rows(self, x: Tensor) -> Tensor:
        if x.shape[3] <= self.size:
            return x
        half = self.size // 2
        inner = x[:, :, :, half:-half].reshape(*x.shape[:3], -1, self.size)
        return torch.cat([x[:, :, :, :half], functional.linear(inner, self.weight).flatten(3), x[:, :, :, -half:]], 3)


class Renderer(nn.Module):
    """pixels + a pointwise network on cells of 4 x 4 pixels, shifted and scaled by the features of the cell's patch.

    Args:
        channels: of the features. hidden: of the network. stride: pixels a side of a patch.

    Attributes:
        deviation: float (channels,), typical size of the features, by which they are divided; see `ResidualBlock`.
        basis: float (48, 48), orthonormal rows: principal components of the pixels of a cell. detail: float (48,), typical sizes of
            those.
    """

    deviation: Tensor
    basis: Tensor
    detail: Tensor

    def __init__(self, channels: int, hidden: int, stride: int) -> None:
        super().__init__()
        self.ratio = stride // CELL
        self.register_buffer("deviation", torch.ones(channels))
        self.register_buffer("basis", torch.eye(3 * CELL**2))
        self.register_buffer("detail", torch.ones(3 * CELL**2))
        self.features = nn.Conv2d(channels, FEATURES * self.ratio**2, 1)
        self.modulation = nn.Conv2d(channels, 2 * hidden, 1)
        self.reduce = nn.Conv2d(3 * CELL**2 + FEATURES, hidden, 1)
        self.mix = nn.Conv2d(hidden, hidden, 1)
        self.expand = nn.Conv2d(hidden, 3 * CELL**2, 1)
        for layer in (self.modulation, self.expand):
            nn.init.zeros_(layer.weight)
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)

    def forward(self, pixels: Tensor, x: Tensor, unit: Tensor) -> Tensor:
        """Refine pixels.

        Args:
            pixels: float (B, 3, H, W), about unit range. x: the patches' features, (B, C, h, w). unit: (B,), see `Condition`.

        Returns:
            (B, 3, H, W).
        """
        x = x * (1 / torch.maximum(self.deviation, unit[:, None]))[:, :, None, None].to(x.dtype)
        cells = _pointwise(functional.pixel_unshuffle(pixels, CELL), self.basis)
        sized = cells * (1 / torch.maximum(self.detail, unit[:, None]))[:, :, None, None]
        own = functional.pixel_shuffle(self.features(x), self.ratio)
        gain, shift = self._spread(self.modulation(functional.leaky_relu(x, 0.1))).chunk(2, 1)
        y = functional.leaky_relu(self.reduce(torch.cat([sized.to(own.dtype), own], 1)), 0.1)
        y = functional.leaky_relu(torch.addcmul(shift, self.mix(y), 1 + gain), 0.1)
        y = _pointwise(self.expand(y), self.basis.T) * unit[:, None, None, None]
        return pixels + functional.pixel_shuffle(y, CELL)

    def _spread(self, x: Tensor) -> Tensor:
        """Give every cell what its patch has."""
        return functional.interpolate(x, scale_factor=float(self.ratio), mode="nearest")

    def macs_per_pixel(self) -> float:
        """Multiply-accumulate operations per picture pixel."""
        patch = (self.features.weight.numel() + self.modulation.weight.numel()) / (CELL * self.ratio) ** 2
        cell = 2 * self.basis.numel() + sum(part.weight.numel() for part in (self.reduce, self.mix, self.expand))
        return patch + cell / CELL**2


def _pointwise(x: Tensor, matrix: Tensor) -> Tensor:
    """A matrix on the channels of every position, in float32 whatever autocast says: (B, C, h, w) -> (B, C', h, w)."""
    with torch.autocast(x.device.type, enabled=False):
        return functional.linear(x.float().permute(0, 2, 3, 1), matrix).permute(0, 3, 1, 2)
