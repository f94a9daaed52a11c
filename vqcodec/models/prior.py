"""The integer prior: a conditional gated PixelCNN, in four interleaved passes or in raster order.

    codes of the coarser level -> state            (the condition)
    for each slice of code planes:
        state -> gated residual blocks -> context
        for each phase of a 2 x 2 pattern:         all positions of a phase at once; or for each position
            context, codes of this slice at earlier phases -> rate model of the slice's symbols at this phase
        state += embedding of the slice's codes

Gated PixelCNN: van den Oord et al. 2016, "Conditional image generation with PixelCNN decoders"; interleaved passes:
Reed et al. 2017, "Parallel multiscale autoregressive density estimation".

Everything is integers, so that every machine computes the same (integers.py).
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from vqcodec.models.config import Config, SliceConfig
from vqcodec.models.integers import (
    MAX_EXPONENT,
    STATE_BITS,
    GatedBlock,
    IntegerConv,
    QualityBias,
    activate,
    clamp8,
    gate,
)
from vqcodec.models.quantizer import Rates

# Order of the interleaved passes: each phase is a (row, column) offset on the 2 x 2 pattern.
PHASES = ((0, 0), (1, 1), (0, 1), (1, 0))
# Positions of a pass: rows and columns of the grid.
Places = tuple[slice, slice]

# Units of the rate model's parameters, in log2: mean 1/16, log2 of square and linear 1/16, log2 odds of zero 1/8.
MEAN_UNIT = SCALE_UNIT = 16
ZERO_UNIT = 8
SQUARE_OFFSET, LINEAR_OFFSET = -4, -3


class SlicePrior(nn.Module):
    """The part of the prior that belongs to one slice of code planes, in four interleaved passes.

    Attributes:
        at_once: whether the one pass covers all positions and sees the codes of each position's predecessors in `inputs`: codes
            are chosen before their bits are known, and decoding must `walk`.
    """

    at_once = False

    def __init__(self, config: Config, piece: SliceConfig, last: bool) -> None:
        super().__init__()
        width = config.prior.channels
        self.piece = piece
        inputs = 2 * piece.channels
        self.blocks = nn.ModuleList([GatedBlock(width) for _ in range(config.prior.blocks)])
        self.context = IntegerConv(width, 2 * width)
        self.quality = QualityBias(2 * width)
        self._see_neighbours(config, inputs)
        self.head = IntegerConv(width, piece.planes * piece.parameters, scale=0.1)
        # Nothing is coded after the last slice.
        self.absorb = None if last else IntegerConv(inputs, width, bits=STATE_BITS, scale=0.5)

    def _see_neighbours(self, config: Config, inputs: int) -> None:
        """Make the layers that see this slice's own codes, of so many inputs a position."""
        width, embedding = config.prior.channels, config.prior.embedding
        self.near = IntegerConv(inputs, embedding)
        self.phases = nn.ModuleList([IntegerConv(embedding, 2 * width, 3) for _ in PHASES[1:]])

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

    def parameters_at(self, number: int, context: Tensor, inputs: Tensor) -> Tensor:
        """Parameters of the rate model at the positions of one pass.

        Args:
            number: of the pass, see `passes`.
            context: from `prepare`.
            inputs: of this slice's codes (B, 2 P D, h, w), zero at the positions not coded yet if not `at_once`.

        Returns:
            integers in [-127, 127], float32 (N, P, D + 2 S + 1), N = B h' w' in raster order: mean (D), square (S), linear (S), zero.
        """
        row, column = PHASES[number]
        hidden = context[:, :, row::2, column::2]
        if number:
            seen = clamp8(self.near.run(inputs))
            seen = functional.pad(seen, (1, 1, 1, 1))[:, :, row:, column:]
            conv = self.phases[number - 1]
            assert isinstance(conv, IntegerConv)
            near = conv.run(seen, stride=2, padding=0)
            hidden = hidden + near[:, :, : hidden.shape[2], : hidden.shape[3]]
        return self.finish(hidden)

    def walk(self, context: Tensor, inputs: Tensor) -> Iterator[tuple[Places, Tensor]]:
        """Places and parameters in coding order, as decoding needs them, without gradient.

        Args: as of `parameters_at`; the caller writes the codes of these places into `inputs` before asking for the next ones.
        """
        for number, places in self.passes(*inputs.shape[2:]):
            yield places, self.parameters_at(number, context, inputs)

    def finish(self, hidden: Tensor) -> Tensor:
        """(B, 2 C, h, w) -> the parameters of its positions (B h w, P, D + 2 S + 1)."""
        out = clamp8(self.head.run(gate(hidden)))
        return out.permute(0, 2, 3, 1).reshape(-1, self.piece.planes, self.piece.parameters)

    def update(self, state: Tensor, inputs: Tensor) -> Tensor:
        """Absorb the slice's codes, as inputs (B, 2 P D, h, w), into the state."""
        return state if self.absorb is None else state + self.absorb.run(inputs)


class StackLayer(nn.Module):
    """One layer of the Gated PixelCNN (van den Oord et al. 2016, figure 2): a vertical and a horizontal stack.

    The vertical stack sees the rows above, the horizontal one what is left of it in its row and, through a link, the
    vertical stack: together all that comes before, without a blind spot.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.vertical = IntegerConv(width, 2 * width, (2, 3))
        self.horizontal = IntegerConv(width, 2 * width, (1, 2))
        self.link = IntegerConv(2 * width, 2 * width)
        self.merge = IntegerConv(width, width, bits=STATE_BITS, scale=0.5)

    def down(self, above: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """The vertical stack, of which the first row is only seen.

        Args:
            above: activations (B, C, 1 + h, w). context: the condition (B, 2 C, h, w).

        Returns:
            the next layer's activations (B, C, h, w), and what the horizontal stack gets (B, 2 C, h, w).
        """
        rows = self.vertical.run(functional.pad(above, (1, 1, 0, 0)), padding=0) + context
        return gate(rows), self.link.run(clamp8(rows)) + context

    def right(self, state: Tensor, active: Tensor, link: Tensor) -> Tensor:
        """The horizontal stack, of which the first column is only seen.

        Args:
            state: (B, C, h, w). active: `activate(state)`, one column earlier as well, (B, C, h, 1 + w). link: from `down`.

        Returns:
            the next layer's state.
        """
        return state + self.merge.run(gate(self.horizontal.run(active, padding=0) + link))


class RasterSlice(SlicePrior):
    """A slice in raster order, position by position: the Gated PixelCNN, conditional on what is coded before the slice.

    Much slower to decode than four passes: meant for small grids.
    """

    at_once = True

    def _see_neighbours(self, config: Config, inputs: int) -> None:
        width = config.prior.channels
        self.near = IntegerConv(inputs, width)
        self.layers = nn.ModuleList([StackLayer(width) for _ in range(config.prior.layers)])
        self.out = IntegerConv(width, 2 * width)

    def stack(self) -> Iterator[StackLayer]:
        """The layers, first to last."""
        for layer in self.layers:
            assert isinstance(layer, StackLayer)
            yield layer

    def passes(self, height: int, width: int) -> Iterator[tuple[int, Places]]:
        """All positions."""
        yield 0, (slice(0, height), slice(0, width))

    def parameters_at(self, number: int, context: Tensor, inputs: Tensor) -> Tensor:
        """As of `SlicePrior`; the parameters of a position depend only on the codes before it."""
        seen = clamp8(self.near.run(inputs))
        above = functional.pad(seen, (0, 0, 1, 0))[:, :, :-1]  # a row down: this stack does not know its own row
        state = functional.pad(seen, (1, 0))[:, :, :, :-1] * 2.0**STATE_BITS
        for layer in self.stack():
            above, link = layer.down(functional.pad(above, (0, 0, 1, 0)), context)
            state = layer.right(state, functional.pad(activate(state), (1, 0)), link)
        return self.finish(context + self.out.run(activate(state)))

    def walk(self, context: Tensor, inputs: Tensor) -> Iterator[tuple[Places, Tensor]]:
        """As of `SlicePrior`; keeps the vertical stack's last row and the horizontal stack's last position of each layer."""
        batch, _, height, width = inputs.shape
        seen = context.new_zeros(batch, self.near.out_channels, 1, width)  # of the row above
        last = [seen] * len(self.layers)
        for row in range(height):
            links = []
            above = seen
            for index, layer in enumerate(self.stack()):
                rows = torch.cat([last[index], above], 2)
                last[index] = above
                above, link = layer.down(rows, context[:, :, row : row + 1])
                links.append(link)
            left = seen.new_zeros(batch, seen.shape[1], 1, 1)
            actives = [left] * len(self.layers)
            seen = torch.zeros_like(seen)
            for column in range(width):
                at = slice(column, column + 1)
                state = left * 2.0**STATE_BITS
                for index, layer in enumerate(self.stack()):
                    active = activate(state)
                    both = torch.cat([actives[index], active], 3)
                    actives[index] = active
                    state = layer.right(state, both, links[index][:, :, :, at])
                places = (slice(row, row + 1), at)
                yield places, self.finish(context[:, :, places[0], at] + self.out.run(activate(state)))
                left = clamp8(self.near.run(inputs[:, :, places[0], at]))
                seen[:, :, :, at] = left


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
        kind = RasterSlice if config.prior.layers else SlicePrior
        self.slices = nn.ModuleList(
            [kind(config, piece, finest and piece is stage.slices[-1]) for piece in stage.slices]
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
                    runs_before_each_phase = name.endswith("near") and not config.prior.layers
                    total += once / 4 if "phases" in name else once * 3 if runs_before_each_phase else once
        return total


def rates(parameters: Tensor, dim: int) -> Rates:
    """The rate model, in floats, that integer parameters stand for: what training and the encoder's choice use.

    Args:
        parameters: (N, P, D + 2 S + 1) from `SlicePrior.parameters_at`. dim: D.
    """
    scales = (parameters.shape[-1] - 1 - dim) // 2
    mean, square, linear, zero = torch.split(parameters, [dim, scales, scales, 1], -1)
    square = square / SCALE_UNIT + SQUARE_OFFSET
    drift = mean * (2 / MEAN_UNIT) * torch.exp2(square / 2)
    theta = torch.cat([drift, -torch.exp2(square), -torch.exp2(linear / SCALE_UNIT + LINEAR_OFFSET)], -1)
    return Rates(theta, zero[..., 0] / ZERO_UNIT)
