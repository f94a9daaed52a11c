"""Layers of the float networks: residual blocks that see the quality, and linear maps of channels."""

from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

# Factor on the energy of the mean over all positions of what a block adds (`ResidualBlock.energy`). The mean carries no
# information on the picture, but gradient noise lets it drift.
COMMON = 20.0
# Positions that a residual block processes at a time, by the type of device: what fits the cache of a CPU, or memory.
STRIP = {"cpu": 1 << 13, "cuda": 1 << 17}


@dataclass(frozen=True)
class Condition:
    """The quality as the networks see it.

    Attributes:
        basis: (B, 6), Chebyshev polynomials of degree 0 to 5 at t.
        unit: (B,), scale of the outputs of residual blocks, in proportion to the usual quantiser step. They are of the
            size of the quantisation noise, orders of magnitude below the latents.
    """

    basis: Tensor
    unit: Tensor


class _Moments(torch.autograd.Function):
    """Moments of y (B, C, h, w) over positions, in float32: mean square summed over channels, (B,), and mean (B, C).

    The gradient is written by hand. Autograd's has another memory layout than y, which made a training step a sixth
    slower.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(y)
        flat = y.permute(0, 2, 3, 1).flatten(1, 2)
        length = torch.linalg.vector_norm(flat, dim=(1, 2), dtype=torch.float32)
        return length.square() / flat.shape[1], flat.mean(1, dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        square, mean = (grad.to(y.dtype) / (y.shape[2] * y.shape[3]) for grad in grads)
        return torch.addcmul(mean[:, :, None, None], y, 2 * square[:, None, None, None])


class ResidualBlock(nn.Module):
    """x + unit * 1x1(f(3x3(f(1x1(x / size))))), where the quality scales and shifts the hidden channels.

    `size` normalises the channels: the standard deviation of each, or the unit if that is larger. So a block sees weak
    channels as well as strong ones, but its output is never larger than the next block's usual input, which keeps
    chains of blocks stable. Outside training the sum is in float32, because latents are large compared to their steps.

    Args:
        channels: of the map, C. hidden: channels within the block. groups: of the 3x3 convolution.

    Attributes:
        deviation: float (C,), standard deviations of the input channels.
        energy: float (B,), set in training: mean over positions of the squares that the last call added, summed over
            channels. The part that is common to all positions counts `COMMON` times.
    """

    deviation: Tensor
    energy: Tensor

    def __init__(self, channels: int, hidden: int, groups: int = 1) -> None:
        super().__init__()
        self.register_buffer("deviation", torch.ones(channels))
        self.reduce = nn.Conv2d(channels, hidden, 1)
        self.spatial = nn.Conv2d(hidden, hidden, 3, padding=1, groups=groups)
        self.expand = nn.Conv2d(hidden, channels, 1)
        self.quality = nn.Linear(6, 2 * hidden)
        for weight in (self.expand.weight, self.expand.bias, self.quality.weight, self.quality.bias):
            assert weight is not None
            nn.init.zeros_(weight)

    def forward(self, x: Tensor, cond: Condition, overwrite: bool = False) -> Tensor:
        """Refine a map.

        Args:
            x: float (B, C, h, w); the result has the same shape.
            overwrite: x is not needed any more: the result may take its place in memory.
        """
        if len(cond.unit) == 1 and not self.training:
            return self.at_one_quality(x, cond, overwrite)
        gain, shift = self.quality(cond.basis)[:, :, None, None].chunk(2, 1)
        size = torch.maximum(self.deviation, cond.unit[:, None])
        y = functional.leaky_relu_(self.reduce(x * (1 / size)[:, :, None, None].to(x.dtype)), 0.1)
        y = functional.leaky_relu_(torch.addcmul(shift, self.spatial(y), 1 + gain), 0.1)
        y = self.expand(y)
        if self.training:
            energy, mean = _Moments.apply(y)  # type: ignore[no-untyped-call]
            common = (cond.unit[:, None] * mean).mean(0).square().sum()
            self.energy = cond.unit.square() * energy + (COMMON - 1) * common
        return x + (cond.unit[:, None, None, None] * y).to(x.dtype)

    def at_one_quality(
        self, x: Tensor, cond: Condition, overwrite: bool = False, basis: Tensor | None = None
    ) -> Tensor:
        """`forward` for pictures of one quality, with the modulation folded into the kernels.

        Without gradients it processes strips of rows. If they fit the cache, that is twice as fast at stride 4.

        Args:
            x, cond, overwrite: as of `forward`.
            basis: orthonormal rows, (C, C), by which x becomes the map that the block refines; None where it is that.
        """
        with torch.autocast(x.device.type, enabled=False):  # it is for the convolutions
            gain, shift = self.quality(cond.basis)[0].chunk(2)
            reduce = self.reduce.weight / torch.maximum(self.deviation, cond.unit)[:, None, None]
            spatial = self.spatial.weight * (1 + gain)[:, None, None, None]
            expand = self.expand.weight * cond.unit
            assert self.spatial.bias is not None and self.expand.bias is not None
            spatial_bias, expand_bias = self.spatial.bias * (1 + gain) + shift, self.expand.bias * cond.unit
            if basis is not None:
                reduce = torch.einsum("hcyx,cd->hdyx", reduce, basis)
                expand, expand_bias = torch.einsum("chyx,cd->dhyx", expand, basis), expand_bias @ basis

        def added(start: int, stop: int) -> Tensor:
            above = min(start, 1)
            y = functional.conv2d(x[:, :, start - above : stop + 1], reduce, self.reduce.bias)
            y = functional.conv2d(
                functional.leaky_relu_(y, 0.1), spatial, spatial_bias, padding=1, groups=self.spatial.groups
            )
            y = functional.leaky_relu_(y[:, :, above : above + stop - start], 0.1)
            return functional.conv2d(y, expand, expand_bias)

        height = x.shape[2]
        if torch.is_grad_enabled():
            return x + added(0, height)
        out = x if overwrite else torch.empty_like(x)
        rows = max(1, STRIP[x.device.type] // (len(x) * x.shape[3]))
        waiting: list[tuple[slice, Tensor]] = []  # a strip that the next one must see as it was
        for start in range(0, height, rows):
            stop = min(start + rows, height)
            waiting.append((slice(start, stop), added(start, stop)))
            while len(waiting) > (overwrite and stop < height):
                strip, y = waiting.pop(0)
                torch.add(x[:, :, strip], y, out=out[:, :, strip])
        return out


class Linear1x1(nn.Linear):
    """A 1x1 convolution without bias, in float32 whatever autocast says, except in training.

    In training the error of bfloat16, a quarter of a pixel level, is small compared to that of the quantisers.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and torch.is_autocast_enabled(x.device.type):
            y = functional.linear(x.permute(0, 2, 3, 1), self.weight)
        else:
            with torch.autocast(x.device.type, enabled=False):
                y = functional.linear(x.float().permute(0, 2, 3, 1), self.weight)
        return y.permute(0, 3, 1, 2)  # channels-last in memory


ModuleT = TypeVar("ModuleT", bound=nn.Module)


def channels_last(module: ModuleT, device: torch.device) -> ModuleT:
    """Move a module to a device, with kernels in channels-last memory, which is several times faster on CPUs."""
    return module.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
