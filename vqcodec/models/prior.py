"""The integer prior: a conditional gated PixelCNN in four interleaved passes.

    codes of the coarser level -> state            (the condition)
    for each slice of code planes:
        state -> gated residual blocks -> context
        for each phase of a 2 x 2 pattern:         all positions of a phase at once
            context, codes of this slice at earlier phases -> rate model of the slice's symbols at this phase
        state += embedding of the slice's codes

Gated PixelCNN: van den Oord et al. 2016, "Conditional image generation with PixelCNN decoders"; interleaved passes:
Reed et al. 2017, "Parallel multiscale autoregressive density estimation".

Exactness. Every activation is an integer in [-127, 127], every weight an integer in [-127, 127] times a power of two
that belongs to its output channel, and no sum has more than `MAX_INPUTS` terms, so that all partial sums stay below
2^24 and float32 computes them exactly in any order, on any device, with any number of threads. Rescaling is by powers
of two and floor. Training runs the same functions with gradients passed straight through the roundings (fake
quantisation); in float32 both give the same integers.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from vqcodec.models.config import MAX_INPUTS, QUALITIES, Config, SliceConfig
from vqcodec.models.quantizer import Rates

# Order of the passes: each phase is a (row, column) offset on the 2 x 2 pattern.
PHASES = ((0, 0), (1, 1), (0, 1), (1, 0))

# Positions of a pass: rows and columns of the grid.
Places = tuple[slice, slice]

# Activations are multiples of 1/32. The state carries four more bits: its unit is 1/512.
UNIT = 32
STATE_BITS = 4
# Units of the rate model's parameters, in log2: mean 1/16, log2 of square and linear 1/16, log2 odds of zero 1/8.
MEAN_UNIT = SCALE_UNIT = 16
ZERO_UNIT = 8
SQUARE_OFFSET, LINEAR_OFFSET = -4, -3
MAX_EXPONENT = 14


class _Floor(torch.autograd.Function):
    """floor(x + 1/2) is written by callers as floor of a shifted x; the gradient passes straight through."""

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

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, bits: int = 0, scale: float = 1.0) -> None:
        super().__init__(inputs, outputs, kernel, padding=kernel // 2)
        fan_in = inputs * kernel * kernel
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
            x: the input. stride, padding: of the convolution; padding None keeps the size.
        """
        pad = self.kernel_size[0] // 2 if padding is None else padding
        assert self.bias is not None
        if self.frozen:
            out = _convolve_exactly(x, self.weight, stride, pad)
            scale = self.powers[self.exponent.long()]
            return torch.floor(out * scale[:, None, None]) + self.bias[:, None, None]
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
    kernel = weight.shape[2]
    height = (x.shape[2] + 2 * padding - kernel) // stride + 1
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


class SlicePrior(nn.Module):
    """The part of the prior that belongs to one slice of code planes."""

    def __init__(self, config: Config, piece: SliceConfig, last: bool) -> None:
        super().__init__()
        width, embedding = config.prior.channels, config.prior.embedding
        self.planes, self.dim = piece.planes, piece.dim
        inputs = 2 * piece.channels
        self.blocks = nn.ModuleList([GatedBlock(width) for _ in range(config.prior.blocks)])
        self.context = IntegerConv(width, 2 * width)
        self.quality = QualityBias(2 * width)
        self.near = IntegerConv(inputs, embedding)
        self.phases = nn.ModuleList([IntegerConv(embedding, 2 * width, 3) for _ in PHASES[1:]])
        self.head = IntegerConv(width, piece.planes * (piece.dim + 3), scale=0.1)
        # Nothing is coded after the last slice.
        self.absorb = None if last else IntegerConv(inputs, width, bits=STATE_BITS, scale=0.5)

    def prepare(self, state: Tensor, quality: Tensor) -> tuple[Tensor, Tensor]:
        """State (B, C, h, w) -> the state after this slice's blocks, and the context of its symbols (B, 2 C, h, w)."""
        for block in self.blocks:
            assert isinstance(block, GatedBlock)
            state = block.run(state, quality)
        return state, self.context.run(activate(state)) + self.quality.at(quality)

    def passes(self, height: int, width: int) -> Iterator[tuple[int, Places]]:
        """Number and places of every pass over a grid of this size, in coding order."""
        for phase, (row, column) in enumerate(PHASES):
            if row < height and column < width:
                yield phase, (slice(row, None, 2), slice(column, None, 2))

    def parameters_at(self, number: int, context: Tensor, known: Tensor) -> Tensor:
        """Parameters of the rate model at the positions of one pass.

        Args:
            number: of the pass, see `passes`.
            context: from `prepare`.
            known: inputs of this slice's codes (B, 2 P D, h, w), zero at the positions not coded yet.

        Returns:
            integers in [-127, 127], float32 (N, P, D + 3), N = B h' w' in raster order: mean (D), square, linear, zero.
        """
        row, column = PHASES[number]
        hidden = context[:, :, row::2, column::2]
        if number:
            seen = clamp8(self.near.run(known))
            seen = functional.pad(seen, (1, 1, 1, 1))[:, :, row:, column:]
            conv = self.phases[number - 1]
            assert isinstance(conv, IntegerConv)
            near = conv.run(seen, stride=2, padding=0)
            hidden = hidden + near[:, :, : hidden.shape[2], : hidden.shape[3]]
        out = clamp8(self.head.run(gate(hidden)))
        return out.permute(0, 2, 3, 1).reshape(-1, self.planes, self.dim + 3)

    def update(self, state: Tensor, inputs: Tensor) -> Tensor:
        """Absorb the slice's codes, as inputs (B, 2 P D, h, w), into the state."""
        return state if self.absorb is None else state + self.absorb.run(inputs)


class LevelPrior(nn.Module):
    """The prior of one level."""

    def __init__(self, config: Config, level: int) -> None:
        super().__init__()
        width = config.prior.channels
        stage = config.levels[level]
        self.start = QualityBias(width)
        self.ratio = config.levels[level - 1].stride // stage.stride if level else 0
        if level:
            # From the coarser level's state: every coarse position becomes ratio x ratio finer ones.
            self.expand = IntegerConv(width, width * self.ratio**2, bits=STATE_BITS)
        finest = level == len(config.levels) - 1
        self.slices = nn.ModuleList(
            [SlicePrior(config, piece, finest and piece is stage.slices[-1]) for piece in stage.slices]
        )

    def slice(self, index: int) -> SlicePrior:
        part = self.slices[index]
        assert isinstance(part, SlicePrior)
        return part

    def begin(self, coarser: Tensor | None, quality: Tensor, batch: int, height: int, width: int) -> Tensor:
        """The state before the first slice, (B, C, h, w); `coarser` is the final state of the coarser level."""
        bias = self.start.at(quality) * 2.0**STATE_BITS
        if coarser is None:
            return bias.expand(batch, -1, height, width)
        up = functional.pixel_shuffle(self.expand.run(activate(coarser)), self.ratio)
        return up[:, :, :height, :width] + bias


class Prior(nn.Module):
    """The prior of all levels, coarse first; see the module's drawing."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.levels = nn.ModuleList([LevelPrior(config, level) for level in range(len(config.levels))])

    def check(self) -> None:
        """Make sure that frozen weights are what exact sums need.

        Raises:
            ValueError: a weight is outside -127..127 or an exponent outside bits..MAX_EXPONENT.
        """
        for part in self.modules():
            if isinstance(part, IntegerConv) and (
                part.weight.abs().max() > 127 or part.exponent.min() < part.bits or part.exponent.max() > MAX_EXPONENT
            ):
                raise ValueError("a weight or exponent of the prior is out of range")

    def level(self, index: int) -> LevelPrior:
        level = self.levels[index]
        assert isinstance(level, LevelPrior)
        return level

    def freeze(self) -> None:
        """Turn fake quantisation into integers, in place."""
        for part in self.modules():
            if isinstance(part, IntegerConv | QualityBias):
                part.freeze()

    def thaw(self) -> None:
        """The inverse of `freeze`, for training on from a weights file."""
        for part in self.modules():
            if isinstance(part, IntegerConv | QualityBias):
                part.thaw()

    def macs_per_pixel(self, config: Config) -> float:
        """Multiply-accumulate operations per picture pixel."""
        total = 0.0
        for index, stage in enumerate(config.levels):
            level = self.level(index)
            for name, part in level.named_modules():
                if isinstance(part, IntegerConv):
                    once = part.weight.numel() / stage.stride**2
                    if name == "expand":
                        once /= level.ratio**2
                    # Each phase convolution runs at a quarter of the positions; `near` runs before three phases.
                    total += once / 4 if "phases" in name else once * 3 if name.endswith("near") else once
        return total


def rates(parameters: Tensor) -> Rates:
    """The rate model, in floats, that integer parameters stand for: what training and the encoder's choice use.

    Args:
        parameters: (N, P, D + 3) from `SlicePrior.parameters_at`.
    """
    dim = parameters.shape[-1] - 3
    square = parameters[..., dim] / SCALE_UNIT + SQUARE_OFFSET
    drift = parameters[..., :dim] * (2 / MEAN_UNIT) * torch.exp2(square / 2)[..., None]
    linear = torch.exp2(parameters[..., dim + 1] / SCALE_UNIT + LINEAR_OFFSET)
    theta = torch.cat([drift, -torch.exp2(square)[..., None], -linear[..., None]], -1)
    return Rates(theta, parameters[..., dim + 2] / ZERO_UNIT)
