"""The integer prior: a conditional gated PixelCNN, in four interleaved passes or in raster order.

    codes of the coarser level -> state
    for each slice of code planes:
        state -> gated residual blocks -> context
        for each phase of a 2 x 2 pattern:         (in raster order: for each position)
            context, codes of this slice at earlier phases -> rate model of the slice's symbols at this phase
        state += embedding of the slice's codes

Gated PixelCNN: van den Oord et al. 2016, "Conditional image generation with PixelCNN decoders"; interleaved passes:
Reed et al. 2017, "Parallel multiscale autoregressive density estimation".

All arithmetic is on integers, so that every machine computes the same probabilities (integers.py).
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
from vqcodec.models.rates import Rates

# The interleaved passes in coding order, as (row, column) offsets in the 2 x 2 pattern.
PHASES = ((0, 0), (1, 1), (0, 1), (1, 0))
# Rows and columns of the positions of a pass.
Places = tuple[slice, slice]

# Fixed-point units of the rate model's parameters: means are multiples of 1/16, log2 of squares and linears of 1/16,
# and log2 odds of code 0 of 1/8.
MEAN_UNIT = LOG_UNIT = 16
ZERO_UNIT = 8
SQUARE_OFFSET, LINEAR_OFFSET = -4, -3  # log2 of squares and linears where the parameter is 0


class SlicePrior(nn.Module):
    """The prior of one slice of code planes, in four interleaved passes.

    Attributes:
        at_once: whether `parameters_at` takes all codes of the slice at once and covers all positions in one pass
            (teacher forcing). Then the encoder chooses codes before it knows their bits, and the decoder must `walk`.
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
        self.head = IntegerConv(width, piece.planes * piece.parameters, gain=0.1)
        # No slice is left to use the codes of the last one.
        self.absorb = None if last else IntegerConv(inputs, width, bits=STATE_BITS, gain=0.5)

    def _see_neighbours(self, config: Config, inputs: int) -> None:
        """Make the layers that see this slice's own codes, with `inputs` numbers for each position."""
        width, embedding = config.prior.channels, config.prior.embedding
        self.near = IntegerConv(inputs, embedding)
        self.phases = nn.ModuleList([IntegerConv(embedding, 2 * width, 3) for _ in PHASES[1:]])

    def prepare(self, state: Tensor, quality: Tensor) -> tuple[Tensor, Tensor]:
        """Run this slice's blocks.

        Args:
            state: integers (B, C, h, w). quality: (B,), 1..100.

        Returns:
            The new state, and the context of the slice's symbols, (B, 2 C, h, w).
        """
        for block in self.blocks:
            assert isinstance(block, GatedBlock)
            state = block.run(state, quality)
        return state, self.context.run(activate(state)) + self.quality.at(quality)

    def passes(self, height: int, width: int) -> Iterator[tuple[int, Places]]:
        """The number and the places of each pass over a grid of this size, in coding order."""
        for phase, (row, column) in enumerate(PHASES):
            if row < height and column < width:
                yield phase, (slice(row, None, 2), slice(column, None, 2))

    def parameters_at(self, number: int, context: Tensor, inputs: Tensor) -> Tensor:
        """Parameters of the rate model at the positions of one pass.

        Args:
            number: of the pass, see `passes`.
            context: from `prepare`.
            inputs: this slice's codes as the prior sees them, (B, 2 P D, h, w). Positions that are not coded yet must
                be zero, unless the prior is `at_once`.

        Returns:
            float32 (N, P, D + 3), integers in [-127, 127]: mean (D), square, linear, zero; with a
            stored table (N, P, 1), see `rates.row_of`. The N = B h' w' positions are in raster order.
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
        """Iterate over places and their parameters in the order of decoding, without gradient.

        Args: as `parameters_at`. The caller writes the codes of the yielded places into `inputs` before it goes on.
        """
        for number, places in self.passes(*inputs.shape[2:]):
            yield places, self.parameters_at(number, context, inputs)

    def finish(self, hidden: Tensor) -> Tensor:
        """Hidden activations (B, 2 C, h, w) -> parameters (B h w, P, D + 3)."""
        out = clamp8(self.head.run(gate(hidden)))
        return out.permute(0, 2, 3, 1).reshape(-1, self.piece.planes, self.piece.parameters)

    def update(self, state: Tensor, inputs: Tensor) -> Tensor:
        """Add the slice's codes, as the prior sees them, (B, 2 P D, h, w), to the state (B, C, h, w)."""
        return state if self.absorb is None else state + self.absorb.run(inputs)


class StackLayer(nn.Module):
    """One layer of the Gated PixelCNN (van den Oord et al. 2016, figure 2): a vertical and a horizontal stack.

    The vertical stack sees the rows above. The horizontal stack sees the positions to the left and, through a link, the
    vertical stack. Together they see all earlier positions, without a blind spot.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.vertical = IntegerConv(width, 2 * width, (2, 3))
        self.horizontal = IntegerConv(width, 2 * width, (1, 2))
        self.link = IntegerConv(2 * width, 2 * width)
        self.merge = IntegerConv(width, width, bits=STATE_BITS, gain=0.5)

    def down(self, above: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """Run the vertical stack.

        Args:
            above: activations (B, C, 1 + h, w); the first row is context only. context: the condition (B, 2 C, h, w).

        Returns:
            The next layer's activations (B, C, h, w), and the link to the horizontal stack (B, 2 C, h, w).
        """
        rows = self.vertical.run(functional.pad(above, (1, 1, 0, 0)), padding=0) + context
        return gate(rows), self.link.run(clamp8(rows)) + context

    def right(self, state: Tensor, active: Tensor, link: Tensor) -> Tensor:
        """Run the horizontal stack.

        Args:
            state: (B, C, h, w).
            active: (B, C, h, 1 + w), `activate(state)` with one more column on the left, which is context only.
            link: from `down`.

        Returns:
            The next layer's state, (B, C, h, w).
        """
        return state + self.merge.run(gate(self.horizontal.run(active, padding=0) + link))


class RasterSlice(SlicePrior):
    """The prior of a slice in raster order: the Gated PixelCNN, conditional on all slices before.

    It decodes position by position, much slower than in four passes: use it for small grids only.
    """

    at_once = True

    def _see_neighbours(self, config: Config, inputs: int) -> None:
        width = config.prior.channels
        self.near = IntegerConv(inputs, width)
        self.layers = nn.ModuleList([StackLayer(width) for _ in range(config.prior.layers)])
        self.out = IntegerConv(width, 2 * width)

    def stack(self) -> Iterator[StackLayer]:
        """The layers in order."""
        for layer in self.layers:
            assert isinstance(layer, StackLayer)
            yield layer

    def passes(self, height: int, width: int) -> Iterator[tuple[int, Places]]:
        """A single pass over all positions."""
        yield 0, (slice(0, height), slice(0, width))

    def parameters_at(self, number: int, context: Tensor, inputs: Tensor) -> Tensor:
        """See `SlicePrior.parameters_at`. The parameters of a position depend only on the codes before it."""
        seen = clamp8(self.near.run(inputs))
        above = functional.pad(seen, (0, 0, 1, 0))[:, :, :-1]  # shifted down: the stack must not see its own row
        state = functional.pad(seen, (1, 0))[:, :, :, :-1] * 2.0**STATE_BITS
        for layer in self.stack():
            above, link = layer.down(functional.pad(above, (0, 0, 1, 0)), context)
            state = layer.right(state, functional.pad(activate(state), (1, 0)), link)
        return self.finish(context + self.out.run(activate(state)))

    def walk(self, context: Tensor, inputs: Tensor) -> Iterator[tuple[Places, Tensor]]:
        """See `SlicePrior.walk`. Caches the last row of each vertical, the last position of each horizontal stack."""
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
            # Every position of the coarser level becomes ratio x ratio positions.
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
        """The state before the level's first slice, (B, C, h, w).

        Args:
            coarser: the final state of the coarser level; None for the coarsest. quality: (B,), 1..100.
            batch, height, width: B, h and w.
        """
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

    @torch.no_grad()
    def check(self) -> None:
        """Check that the frozen weights allow exact sums.

        The largest numbers that all layers can give must not add up to more than float32 holds exactly: no sum of the
        prior, of its state over all slices for one, has more terms.

        Raises:
            ValueError: a weight is outside -127..127, an exponent outside bits..MAX_EXPONENT, or sums can be too large.
        """
        total = 0.0
        for part in self.modules():
            if isinstance(part, IntegerConv):
                exponents = part.exponent
                if part.weight.abs().max() > 127 or exponents.min() < part.bits or exponents.max() > MAX_EXPONENT:
                    raise ValueError("a weight or exponent of the prior is out of range")
                assert part.bias is not None
                sums = 127 * part.weight.abs().flatten(1).sum(1) * part.powers[exponents.long()]
                total += float((sums.double() + part.bias.abs()).max())
            elif isinstance(part, QualityBias):
                total += float(part.table.abs().max()) * 2**STATE_BITS
        if total >= 2**24:
            raise ValueError("the numbers of the prior are too large for exact sums")

    def level(self, index: int) -> LevelPrior:
        level = self.levels[index]
        assert isinstance(level, LevelPrior)
        return level

    def freeze(self) -> None:
        """Replace the fake-quantised weights by integers, in place."""
        for part in self.modules():
            if isinstance(part, IntegerConv | QualityBias):
                part.freeze()

    def thaw(self) -> None:
        """Undo `freeze`, in place, to train on from a weights file (warm start)."""
        for part in self.modules():
            if isinstance(part, IntegerConv | QualityBias):
                part.thaw()


def rates(parameters: Tensor, dim: int) -> Rates:
    """Convert integer parameters to a rate model in floats, for training and the choice of codes.

    Args:
        parameters: (N, P, D + 3) from `SlicePrior.parameters_at`. dim: D.
    """
    mean, square, linear, zero = torch.split(parameters, [dim, 1, 1, 1], -1)
    square = square / LOG_UNIT + SQUARE_OFFSET
    drift = mean * (2 / MEAN_UNIT) * torch.exp2(square / 2)
    theta = torch.cat([drift, -torch.exp2(square), -torch.exp2(linear / LOG_UNIT + LINEAR_OFFSET)], -1)
    return Rates(theta, zero[..., 0] / ZERO_UNIT)
