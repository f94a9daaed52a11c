"""Cheap pixel-domain layers around a coarse finest stage: residual blocks, a separable lapped filter and a renderer.

Networks at stride 16 are cheap, but their transform works on separate patches. The lap removes the borders between
patches. Residual blocks on cells of 4 x 4 pixels treat edges alike wherever in a patch they lie. The renderer refines
each cell with pointwise layers that the features of its patch modulate (Jia et al. 2026, "PULSE", section 2, "Synthesis
transform"; modulation as in Peebles & Xie 2023, "Scalable diffusion models with transformers", adaptive layer norm).
"""

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional

from vqcodec.models.config import CELL, FEATURES
from vqcodec.models.layers import Condition, ResidualBlock

STRIP = 1536  # cells that a CPU processes at a time


class SeparableLap(nn.Module):
    """A linear filter across patch borders, the same along rows and columns and for every colour channel.

    Half of the filter's `size` taps lie on each side of a border. The outermost half patch of each line is left as it
    is. Applied before the analysis, and inverted after the synthesis, it turns a block transform into a lapped
    transform (Tran, Liang & Tu 2003, "Lapped transform via time-domain pre- and post-filtering").
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.weight = nn.Parameter(torch.eye(size))

    def forward(self, x: Tensor) -> Tensor:
        """Filter float (B, 3, H, W), H and W multiples of `size`: float32 of the same shape, whatever autocast says."""
        half = self.size // 2
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            if x.shape[3] > self.size:
                lines = x[..., half:-half].reshape(*x.shape[:3], -1, self.size)
                inner = functional.linear(lines, self.weight).flatten(3)
                x = torch.cat([x[..., :half], inner, x[..., -half:]], 3)
            if x.shape[2] > self.size:
                lines = x[:, :, half:-half].reshape(*x.shape[:2], -1, self.size, x.shape[3])
                inner = torch.matmul(self.weight, lines).flatten(2, 3)
                x = torch.cat([x[:, :, :half], inner, x[:, :, -half:]], 2)
        return x


class CellBlocks(nn.Module):
    """Residual blocks on the cells of a picture, which are maps of their principal components.

    Args:
        count: number of blocks. hidden: channels within a block. groups: of their 3x3 convolutions.

    Attributes:
        basis: float (48, 48), principal components of the pixels of a cell as orthonormal rows.
    """

    basis: Tensor

    def __init__(self, count: int, hidden: int, groups: int) -> None:
        super().__init__()
        channels = 3 * CELL**2
        self.register_buffer("basis", torch.eye(channels))
        self.blocks = nn.ModuleList([ResidualBlock(channels, hidden, groups) for _ in range(count)])

    def forward(self, pixels: Tensor, cond: Condition) -> Tensor:
        """Refine pixels, float (B, 3, H, W), centred and scaled to about unit range."""
        cells = functional.pixel_unshuffle(pixels, CELL)
        if len(cond.unit) == 1 and not (self.training or torch.is_grad_enabled()):
            cells = cells.contiguous(memory_format=torch.channels_last)
            for block in self.blocks:
                assert isinstance(block, ResidualBlock)
                cells = block.at_one_quality(cells, cond, overwrite=True, basis=self.basis)
            return functional.pixel_shuffle(cells, CELL)
        x = components = _pointwise(cells, self.basis)
        for block in self.blocks:
            x = block(x, cond)
        # Not the components themselves: weights files round the basis, so that these are not quite the pixels.
        return pixels + functional.pixel_shuffle(_pointwise(x - components, self.basis.T), CELL)

    @property
    def energy(self) -> Tensor:
        """The sum of all blocks' `ResidualBlock.energy`, (B,)."""
        return torch.stack([block.energy for block in self.blocks if isinstance(block, ResidualBlock)]).sum(0)


class Renderer(nn.Module):
    """pixels + a pointwise network on cells of 4 x 4 pixels, modulated by the features of the cell's patch.

    Args:
        channels: of the features. hidden: channels of the network. stride: side of a patch in pixels.

    Attributes:
        deviation: float (channels,), standard deviations that normalise the features; see `ResidualBlock`.
        basis: float (48, 48), principal components of the pixels of a cell as orthonormal rows.
        detail: float (48,), standard deviations of the components.
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
            pixels: float (B, 3, H, W), centred and scaled to about unit range.
            x: float (B, C, h, w), the features of the patches.
            unit: float (B,), see `layers.Condition`.

        Returns:
            float (B, 3, H, W).
        """
        if len(unit) == 1 and not (torch.is_grad_enabled() or pixels.is_cuda):
            return self._at_one_quality(pixels, x, unit)
        x = x * (1 / torch.maximum(self.deviation, unit[:, None]))[:, :, None, None].to(x.dtype)
        cells = _pointwise(functional.pixel_unshuffle(pixels, CELL), self.basis)
        normalised = cells * (1 / torch.maximum(self.detail, unit[:, None]))[:, :, None, None]
        own = functional.pixel_shuffle(self.features(x), self.ratio)
        gain, shift = self.modulation(functional.leaky_relu(x, 0.1))[:, :, :, None, :, None].chunk(2, 1)
        y = functional.leaky_relu_(self.reduce(torch.cat([normalised.to(own.dtype), own], 1)), 0.1)
        y = self.mix(y)
        shape = y.shape
        y = y.view(*shape[:2], x.shape[2], self.ratio, x.shape[3], self.ratio)  # the cells of each patch
        y = functional.leaky_relu_(torch.addcmul(shift, y, 1 + gain), 0.1).view(shape)
        y = _pointwise(self.expand(y), self.basis.T) * unit[:, None, None, None]
        return pixels + functional.pixel_shuffle(y, CELL)

    def _at_one_quality(self, pixels: Tensor, x: Tensor, unit: Tensor) -> Tensor:
        """`forward` for pictures of one quality without gradients, with bases and sizes folded into the matrices.

        A CPU processes strips of patches whose cells fit the cache.
        """
        with torch.autocast(pixels.device.type, enabled=False):
            size = 1 / torch.maximum(self.deviation, unit)
            features, reduce, mix, expand = (
                part.weight.flatten(1) for part in (self.features, self.reduce, self.mix, self.expand)
            )
            assert self.features.bias is not None and self.expand.bias is not None
            # Features in the order of the cells of a patch, not of `pixel_shuffle`.
            order = torch.arange(len(features), device=x.device).reshape(FEATURES, -1).T.flatten()
            from_cells, from_features = reduce[:, :-FEATURES], reduce[:, -FEATURES:]
            from_cells = (from_cells / torch.maximum(self.detail, unit)) @ self.basis
            expand, expand_bias = unit * (self.basis.T @ expand), unit * (self.basis.T @ self.expand.bias)

            height, width = x.shape[2:]
            patches = x.permute(0, 2, 3, 1).float()
            out = torch.empty_like(pixels)
            rows = max(1, STRIP // (width * self.ratio**2))
            for picture, start in itertools.product(range(len(x)), range(0, height, rows)):
                some = patches[picture, start : start + rows] * size
                count = len(some)
                own = functional.linear(some, features[order], self.features.bias[order])
                own = own.view(count, width, self.ratio, -1).transpose(1, 2).reshape(-1, FEATURES)
                modulation = functional.linear(
                    functional.leaky_relu(some, 0.1), self.modulation.weight.flatten(1), self.modulation.bias
                )
                gain, shift = modulation[:, None, :, None].chunk(2, -1)
                side = CELL * self.ratio
                strip = slice(start * side, (start + count) * side)
                before, after = (_cells(p[picture, :, strip]) for p in (pixels, out))
                y = functional.linear(before.reshape(-1, len(self.basis)), from_cells, self.reduce.bias)
                y = functional.leaky_relu_(y.addmm_(own, from_features.T), 0.1)
                y = functional.linear(y, mix, self.mix.bias).reshape(count, self.ratio, width, self.ratio, -1)
                y = functional.leaky_relu_(torch.addcmul(shift, y, 1 + gain), 0.1)
                y = functional.linear(y.reshape(-1, len(mix)), expand, expand_bias)
                torch.add(before, y.reshape(before.shape), out=after)
        return out


def _cells(pixels: Tensor) -> Tensor:
    """A view of pixels (3, H, W) by cells: (H / CELL, W / CELL, 3, CELL, CELL)."""
    _, height, width = pixels.shape
    return pixels.view(3, height // CELL, CELL, width // CELL, CELL).permute(1, 3, 0, 2, 4)


def _pointwise(x: Tensor, matrix: Tensor) -> Tensor:
    """Apply a matrix (C', C) to the channels, in float32 whatever autocast says: (B, C, h, w) -> (B, C', h, w)."""
    with torch.autocast(x.device.type, enabled=False):
        return functional.linear(x.float().permute(0, 2, 3, 1), matrix).permute(0, 3, 1, 2)
