"""Layers of integers: the building blocks of the prior.

Exactness. Every activation is an integer in [-127, 127], every weight an integer in [-127, 127] times a power of two
that belongs to its output channel, and no sum has more than `MAX_INPUTS` terms, so that all partial sums stay below
2^24 and float32 computes them exactly in any order, on any device, with any number of threads. Rescaling is by powers
of two and floor. Training runs the same functions with gradients passed straight through the roundings (fake
quantisation); in float32 both give the same integers.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from vqcodec.models.config import MAX_INPUTS, QUALITIES

# Activations are multiples of 1/32. The state carries four more bits: its unit is 1/512.
UNIT = 32
STATE_BITS = 4
MAX_EXPONENT = 14


class _Floor(torch.autograd.Function):
    """floor(x); the gradient passes straight through."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return torch.floor(x)

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> Tensor:
        return grads[0]


def floor(x: Tensor) -> Tensor:
    if x.requires_grad:
        y: Tensor = _Floor.apply(x)  # type: ignore[no-untyped-call]
        return y
    return torch.floor(x)


def clamp8(x: Tensor) -> Tensor:
    return x.clamp(-127, 127)


class IntegerConv(nn.Conv2d):
    """A convolution of integers: weights are 8-bit integers times a power of two per output channel.

    In training the float weights are rounded on the way (straight-through); `freeze` replaces them by integers.
    The output is floor(sum * 2^-exponent) + bias: an integer in the unit of the input refined by `bits` bits.
    """

    exponent: Tensor
    powers: Tensor
    frozen: bool

    def __init__(
        self, inputs: int, outputs: int, kernel: int | tuple[int, int] = 1, bits: int = 0, scale: float = 1.0
    ) -> None:
        super().__init__(inputs, outputs, kernel)
        fan_in = self.weight[0].numel()
        if fan_in > MAX_INPUTS:
            raise ValueError(f"{fan_in} inputs: sums of more than {MAX_INPUTS} are not exact in float32")
        nn.init.normal_(self.weight, std=scale / math.sqrt(fan_in))
        assert self.bias is not None
        nn.init.zeros_(self.bias)
        self.bits = bits
        self.frozen = False
        self.register_buffer("exponent", torch.zeros(outputs, dtype=torch.int32))
        # 2^(bits - exponent): a table, because exp2 and pow need not be exact on every device.
        powers = torch.tensor([2.0 ** (bits - e) for e in range(MAX_EXPONENT + 1)])
        self.register_buffer("powers", powers, persistent=False)

    def _integers(self) -> tuple[Tensor, Tensor]:
        """8-bit integer weights, as float32, and the exponent of each output channel."""
        largest = self.weight.detach().flatten(1).abs().amax(1)
        exponent = torch.floor(torch.log2(127 / largest.clamp(min=1e-9))).clamp(self.bits, MAX_EXPONENT)
        scale = 2.0**self.bits / self.powers[exponent.long()][:, None, None, None]
        return (self.weight.detach() * scale).round().clamp(-127, 127), exponent

    def freeze(self) -> None:
        """Replace weights and biases by the integers that training rounded them to."""
        if not self.frozen:
            integers, exponent = self._integers()
            assert self.bias is not None
            self.weight.data, self.bias.data = integers, self.bias.data.round()
            self.exponent = exponent.int()
            self.frozen = True

    def thaw(self) -> None:
        """Back to trainable floats that round to the same integers."""
        if self.frozen:
            self.weight.data = (
                self.weight.data * 2.0**-self.bits * self.powers[self.exponent.long()][:, None, None, None]
            )
            self.frozen = False

    def run(self, x: Tensor, stride: int = 1, padding: int | None = None) -> Tensor:
        """Integers (B, inputs, h, w), float dtype, in [-127, 127] -> integers (B, outputs, h', w'), float32.

        Args:
            x: the input. stride, padding: of the convolution; padding None keeps the size, for square kernels.
        """
        pad = self.kernel_size[0] // 2 if padding is None else padding
        assert self.bias is not None
        if self.frozen:
            out = _convolve_exactly(x, self.weight, stride, pad)
            scale = self.powers[self.exponent.long()]
            return floor(out * scale[:, None, None]) + self.bias[:, None, None]
        integers, exponent = self._integers()
        rounded = integers * self.powers[exponent.long()][:, None, None, None] * 2.0**-self.bits
        weight = self.weight + (rounded - self.weight.detach())
        out = functional.conv2d(x, weight, None, stride, pad).float()
        bias = self.bias + (self.bias.detach().round() - self.bias.detach())
        return floor(out * 2.0**self.bits) + bias[:, None, None]


def _convolve_exactly(x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    """A convolution of integers without transform-domain algorithms, whose intermediate values are not integers.

    CPU libraries sum products directly. CUDA libraries may choose Winograd or FFT, so there the sum is a matrix product
    of unfolded inputs, whose operands are exact in TF32 as well.
    """
    if not x.is_cuda:
        return functional.conv2d(x, weight, None, stride, padding)
    kernel = weight.shape[2:]
    height = (x.shape[2] + 2 * padding - kernel[0]) // stride + 1
    columns = functional.unfold(x, kernel, padding=padding, stride=stride)
    return (weight.flatten(1) @ columns).reshape(len(x), len(weight), height, -1)


class QualityBias(nn.Module):
    """An integer bias per channel for each quality 1..100: a smooth curve in training, a table once frozen."""

    table: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.curve = nn.Parameter(torch.zeros(4, channels))
        self.register_buffer("table", torch.zeros(QUALITIES, channels))
        self.frozen = False

    def freeze(self) -> None:
        if not self.frozen:
            every = torch.arange(1, QUALITIES + 1, device=self.curve.device)
            self.table = (_basis(every) @ self.curve.detach() * UNIT).round()
            self.frozen = True

    def thaw(self) -> None:
        """Fit the curve to the table; the table was made by such a curve, so it comes back up to its rounding."""
        if self.frozen:
            every = torch.arange(1, QUALITIES + 1, device=self.table.device)
            self.curve.data = torch.linalg.lstsq(_basis(every), self.table / UNIT).solution
            self.frozen = False

    def at(self, quality: Tensor) -> Tensor:
        """Bias for qualities, int64 (B,) in 1..100: (B, channels, 1, 1)."""
        if self.frozen:
            return self.table[quality - 1][:, :, None, None]
        with torch.autocast(self.curve.device.type, enabled=False):
            bias = _basis(quality) @ self.curve * UNIT
        return (bias + (bias.round() - bias).detach())[:, :, None, None]


def _basis(quality: Tensor) -> Tensor:
    """Smooth functions of the quality, (B,) -> (B, 4): Chebyshev polynomials of degree 1 to 4."""
    angle = torch.acos((2 * (quality.float() - 1) / (QUALITIES - 1) - 1).clamp(-1, 1))
    return torch.cos(angle[:, None] * torch.arange(1, 5, device=quality.device))


def gate(x: Tensor) -> Tensor:
    """clamp(a) * hard sigmoid(g) of the two halves a, g of the channels (van den Oord et al. 2016, eq. 2)."""
    a, g = x.chunk(2, 1)
    return floor(clamp8(a) * (g + 64).clamp(0, 128) * (1 / 128))


class GatedBlock(nn.Module):
    """state += 1x1(gate(3x3(state)))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.spread = IntegerConv(channels, 2 * channels, 3)
        self.quality = QualityBias(2 * channels)
        self.merge = IntegerConv(channels, channels, 1, bits=STATE_BITS, scale=0.5)

    def run(self, state: Tensor, quality: Tensor) -> Tensor:
        hidden = gate(self.spread.run(activate(state)) + self.quality.at(quality))
        return state + self.merge.run(hidden)


def activate(state: Tensor) -> Tensor:
    """The state as integers in [-127, 127]."""
    return clamp8(floor(state * 2.0**-STATE_BITS))
