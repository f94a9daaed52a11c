"""Integer layers: the building blocks of the prior.

Exactness. Every activation is an integer in [-127, 127]. Every weight is an integer in [-127, 127] times a power of two
that belongs to its output channel. No sum has more than `MAX_INPUTS` terms. So all partial sums stay below 2^24, and
float32 computes them exactly in any order, on any device, with any number of threads. Rescaling uses powers of two and
floor.

Training runs the same functions with straight-through estimators for the roundings (fake quantisation). In float32 it
computes the same integers.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vqcodec.errors import WeightsError
from vqcodec.models.config import MAX_INPUTS, QUALITIES

UNIT = 32  # activations are multiples of 1/32
STATE_BITS = 4  # additional bits of the state: multiples of 1/512
MAX_EXPONENT = 14  # of the power of two of a channel's weights
WITHOUT_NNPACK = 15  # pictures of the largest batch that torch never gives to NNPACK


class _Floor(torch.autograd.Function):
    """floor(x) with a straight-through estimator of the gradient."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return torch.floor(x)

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> Tensor:
        return grads[0]


def floor(x: Tensor) -> Tensor:
    """floor(x) with a straight-through estimator of the gradient."""
    if x.requires_grad:
        y: Tensor = _Floor.apply(x)  # type: ignore[no-untyped-call]
        return y
    return torch.floor(x)


def _rounded(x: Tensor) -> Tensor:
    """round(x) with a straight-through estimator of the gradient."""
    return x + (x.round() - x).detach()


def clamp8(x: Tensor) -> Tensor:
    """Clamp to [-127, 127]."""
    return x.clamp(-127, 127)


class IntegerConv(nn.Conv2d):
    """A convolution of integers: the weights are 8-bit integers times a power of two for each output channel.

    Training rounds float weights on the fly, with a straight-through estimator; `freeze` replaces them by integers.
    Biases learn in the unit of floats, UNIT * 2^bits integers: an optimiser's steps are far less than one of these.
    The output is floor(sum * 2^(bits - exponent)) + bias: integers in the input's unit divided by 2^bits.

    Args:
        inputs, outputs: channels. kernel: size.
        bits: how many bits finer the output's unit is than the input's.
        gain: standard deviation of the initial weights times the square root of the fan-in.

    Raises:
        ValueError: the fan-in exceeds MAX_INPUTS.
    """

    exponent: Tensor
    powers: Tensor
    frozen: bool

    def __init__(
        self, inputs: int, outputs: int, kernel: int | tuple[int, int] = 1, bits: int = 0, gain: float = 1.0
    ) -> None:
        super().__init__(inputs, outputs, kernel)
        fan_in = self.weight[0].numel()
        if fan_in > MAX_INPUTS:
            raise ValueError(f"{fan_in} inputs: sums of more than {MAX_INPUTS} are not exact in float32")
        nn.init.normal_(self.weight, std=gain / math.sqrt(fan_in))
        assert self.bias is not None
        nn.init.zeros_(self.bias)
        self.bits, self.unit = bits, UNIT * 2.0**bits
        self.frozen = False
        self.register_buffer("exponent", torch.zeros(outputs, dtype=torch.int32))
        # 2^(bits - exponent) as a table, because exp2 and pow need not be exact on every device.
        powers = torch.tensor([2.0 ** (bits - e) for e in range(MAX_EXPONENT + 1)])
        self.register_buffer("powers", powers, persistent=False)
        self._scaled: Tensor | None = None

    def _apply(self, fn: Any, recurse: bool = True) -> "IntegerConv":
        self._scaled = None  # it would be left behind
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _scaled_weight(self) -> Tensor:
        """The frozen weights times 2^(bits - exponent), which is exact; made once."""
        if self._scaled is None:
            self._scaled = self.weight.detach() * self.powers[self.exponent.long()][:, None, None, None]
        return self._scaled

    def _integers(self) -> tuple[Tensor, Tensor]:
        """The 8-bit integer weights, as float32, and the exponent of each output channel."""
        largest = self.weight.detach().flatten(1).abs().amax(1)
        exponent = torch.floor(torch.log2(127 / largest.clamp(min=1e-9))).clamp(self.bits, MAX_EXPONENT)
        multiplier = 2.0**self.bits / self.powers[exponent.long()][:, None, None, None]
        return (self.weight.detach() * multiplier).round().clamp(-127, 127), exponent

    def freeze(self) -> None:
        """Replace weights and biases by the integers that training rounds them to, in place."""
        if not self.frozen:
            integers, exponent = self._integers()
            assert self.bias is not None
            self.weight.data, self.bias.data = integers, (self.bias.data * self.unit).round()
            self.exponent = exponent.int()
            self.frozen, self._scaled = True, None

    def thaw(self) -> None:
        """Restore trainable floats, which round to the same integers, in place."""
        if self.frozen:
            assert self.bias is not None
            self.bias.data = self.bias.data / self.unit
            self.weight.data = (
                self.weight.data * 2.0**-self.bits * self.powers[self.exponent.long()][:, None, None, None]
            )
            self.frozen = False

    def run(self, x: Tensor, stride: int = 1, padding: int | None = None) -> Tensor:
        """Convolve.

        Args:
            x: integers in [-127, 127], any float dtype, (B, inputs, h, w).
            stride, padding: of the convolution. padding None keeps the size, for square kernels and stride 1.

        Returns:
            Integers, float32 (B, outputs, h', w').
        """
        pad = self.kernel_size[0] // 2 if padding is None else padding
        assert self.bias is not None
        if self.frozen:
            return floor(_convolve_exactly(x, self._scaled_weight(), stride, pad)) + self.bias[:, None, None]
        integers, exponent = self._integers()
        rounded = integers * self.powers[exponent.long()][:, None, None, None] * 2.0**-self.bits
        weight = self.weight + (rounded - self.weight.detach())
        out = functional.conv2d(x, weight, None, stride, pad).float()
        return floor(out * 2.0**self.bits) + _rounded(self.bias * self.unit)[:, None, None]


def _convolve_exactly(x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    """Convolve integers without transform-domain algorithms, whose intermediate values are not integers.

    CPU libraries sum the products directly, but for NNPACK, which torch falls back to for large batches. CUDA's may
    choose Winograd or FFT, so there the inputs are unfolded for a matrix product. Operands are exact in TF32 and in
    bfloat16, and their sums are float32 everywhere, so the caller's precision of products does not matter.

    Raises:
        WeightsError: nobody has shown that this type of device computes exactly.
    """
    if x.is_cpu:
        parts = [functional.conv2d(part, weight, None, stride, padding) for part in torch.split(x, WITHOUT_NNPACK)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)
    if not x.is_cuda:
        raise WeightsError(f"codes are exact on CPUs and CUDA devices only, not on {x.device.type!r}")
    kernel = weight.shape[2:]
    height = (x.shape[2] + 2 * padding - kernel[0]) // stride + 1
    columns = functional.unfold(x, kernel, padding=padding, stride=stride)
    return (weight.flatten(1) @ columns).reshape(len(x), len(weight), height, -1)


class QualityBias(nn.Module):
    """An integer bias for each channel and each quality 1..100: a smooth curve in training, a table once frozen."""

    table: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.curve = nn.Parameter(torch.zeros(4, channels))
        self.register_buffer("table", torch.zeros(QUALITIES, channels))
        self.frozen = False

    def freeze(self) -> None:
        """Tabulate the curve, rounded to integers."""
        if not self.frozen:
            every = torch.arange(1, QUALITIES + 1, device=self.curve.device)
            self.table = (_basis(every) @ self.curve.detach() * UNIT).round()
            self.frozen = True

    def thaw(self) -> None:
        """Fit the curve to the table, by least squares. It is the curve that made the table, but for rounding."""
        if self.frozen:
            every = torch.arange(1, QUALITIES + 1, device=self.table.device)
            self.curve.data = torch.linalg.lstsq(_basis(every), self.table / UNIT).solution
            self.frozen = False

    def at(self, quality: Tensor) -> Tensor:
        """The biases (B, channels, 1, 1) for qualities (B,) in 1..100. A frozen bias needs int64 qualities."""
        if self.frozen:
            return self.table[quality - 1][:, :, None, None]
        with torch.autocast(self.curve.device.type, enabled=False):
            bias = _basis(quality) @ self.curve * UNIT
        return _rounded(bias)[:, :, None, None]


def _basis(quality: Tensor) -> Tensor:
    """Chebyshev polynomials of degree 1 to 4 of the quality: (B,) -> (B, 4)."""
    angle = torch.acos((2 * (quality.float() - 1) / (QUALITIES - 1) - 1).clamp(-1, 1))
    return torch.cos(angle[:, None] * torch.arange(1, 5, device=quality.device))


def gate(x: Tensor) -> Tensor:
    """The gated activation unit in integers: clamp(a) * hard sigmoid(g) for the two halves a, g of the channels.

    A variant of van den Oord et al. 2016, "Conditional image generation with PixelCNN decoders", eq. 2.
    """
    a, g = x.chunk(2, 1)
    return floor(clamp8(a) * (g + 64).clamp(0, 128) * (1 / 128))


class GatedBlock(nn.Module):
    """A gated residual block: state += 1x1(gate(3x3(state)))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.spread = IntegerConv(channels, 2 * channels, 3)
        self.quality = QualityBias(2 * channels)
        self.merge = IntegerConv(channels, channels, 1, bits=STATE_BITS, gain=0.5)

    def run(self, state: Tensor, quality: Tensor) -> Tensor:
        """state: integers (B, C, h, w). quality: (B,)."""
        hidden = gate(self.spread.run(activate(state)) + self.quality.at(quality))
        return state + self.merge.run(hidden)


def activate(state: Tensor) -> Tensor:
    """Reduce the state to activations: integers in [-127, 127]."""
    return clamp8(floor(state * 2.0**-STATE_BITS))
