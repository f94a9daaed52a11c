"""A model, and the walk over its slices in coding order.

    for piece in walk(model.levels, estimate, context):
        estimate.here           the decoder's estimate of the slice's latents
        context.passes()        the rate model of the slice's codes, pass by pass
        estimate.add(vectors)   correct the estimate by the chosen codes

Encoder, decoder, sampler, search and training all take this walk, with the followers that they need: an `Estimate`
holds what the decoder knows of the latents, a `Context` what the prior knows of the codes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from vqcodec.models.config import Config, SliceConfig, StageConfig
from vqcodec.models.counts import CodeTables, RowTables, Tables
from vqcodec.models.layers import channels_last
from vqcodec.models.prior import LevelPrior, Places, Prior, SlicePrior, rates
from vqcodec.models.quantizer import Codebook, grid, look_up
from vqcodec.models.rates import Rates, RowRates
from vqcodec.models.vqvae import PIXEL_SCALE, VQVAE, SliceQuantizer


@dataclass(frozen=True)
class Slice:
    """One slice of code planes, with the parts of the networks that belong to it.

    Attributes:
        level: number of its level, from the coarsest.
        index: its number within the level.
        config, stage: the configurations of the slice and of its level's stage.
        planes: the range of the level's planes that it covers.
        quantizer: its refinement blocks, steps and codebook.
        prior: its part of the prior; None if only latents are walked.
        tables: its integer tables; None as well while the prior is learning.
    """

    level: int
    index: int
    config: SliceConfig
    stage: StageConfig
    planes: slice
    quantizer: SliceQuantizer
    prior: SlicePrior | None = None
    tables: CodeTables | RowTables | None = None

    @property
    def channels(self) -> slice:
        """The range of the level's latent channels that it covers."""
        return slice(self.quantizer.start, self.quantizer.stop)

    @property
    def codebook(self) -> Codebook:
        return self.quantizer.codebook

    def inputs(self) -> Tensor:
        """What the prior sees of each code: integers, float32 (P, K, 2 D). See `Codebook.inputs`."""
        return self.codebook.inputs() if self.tables is None else self.tables.inputs

    def step(self, quality: Tensor) -> Tensor:
        """The quantiser step of each channel in latent units, (B, P D, 1, 1), for qualities (B,)."""
        return self.quantizer.steps(quality).repeat_interleave(self.config.dim, 1)[:, :, None, None]

    def error_weight(self, lagrangian: float | Tensor, quality: Tensor) -> Tensor:
        """The cost of a squared step in bits, if the decoder is orthonormal: (B, P), without gradient.

        Args:
            lagrangian: lambda in bits per pixel per unit of mean squared error on the 0..255 scale; a number or (B, 1).
            quality: (B,), 1..100.
        """
        steps = self.quantizer.steps(quality).detach()
        return lagrangian * (steps * PIXEL_SCALE) ** 2 / 3

    def rates(self, parameters: Tensor) -> Rates | RowRates:
        """Convert the prior's integer parameters to a rate model in floats, for training and the choice of codes.

        parameters: (N, P, D + 3), or (N, P, 1) with a stored table.
        """
        if not self.config.rows:
            return rates(parameters, self.config.dim)
        table = self.tables.rates if isinstance(self.tables, RowTables) else self.codebook.table()
        return RowRates(parameters[..., 0], table)

    def vectors(self, indices: Tensor) -> Tensor:
        """Look up code vectors: int64 (B, h, w, P) -> float (B, P D, h, w), in steps."""
        batch, height, width, planes = indices.shape
        return grid(self.codebook.lookup(indices.reshape(-1, planes)), batch, height, width)


@dataclass(frozen=True)
class Level:
    """One level of codes.

    Attributes:
        number: from the coarsest.
        stage: the configuration of its stage.
        prior: its part of the prior; None if only latents are walked.
        slices: in coding order.
    """

    number: int
    stage: StageConfig
    prior: LevelPrior | None
    slices: tuple[Slice, ...]


def levels_of(vqvae: VQVAE, prior: Prior | None = None, tables: Tables | None = None) -> tuple[Level, ...]:
    """Split networks into levels and slices, coarse first."""
    levels = []
    for number, stage in enumerate(vqvae.config.levels):
        own = None if prior is None else prior.level(number)
        slices = tuple(
            Slice(
                number,
                index,
                piece,
                stage,
                span,
                vqvae.slice(number, index),
                None if own is None else own.slice(index),
                None if tables is None else tables.slice(number, index),
            )
            for index, (piece, span) in enumerate(zip(stage.slices, stage.spans, strict=True))
        )
        levels.append(Level(number, stage, own, slices))
    return tuple(levels)


class Model:
    """Trained networks on a device, ready to run.

    Attributes:
        config: the configuration.
        vqvae, prior, tables: the networks and integer tables. Their parameters need no gradient.
        levels: the same, slice by slice.
        id: the four bytes that name these weights in a .vqz file.
        device: where they are.
    """

    def __init__(
        self,
        config: Config,
        vqvae: VQVAE,
        prior: Prior,
        tables: Tables,
        weights_id: bytes,
        device: torch.device,
    ) -> None:
        self.config, self.id, self.device = config, weights_id, device
        self.tables = tables.to(device)
        self.vqvae = channels_last(vqvae.requires_grad_(False).eval(), device)
        self.prior = channels_last(prior.requires_grad_(False).eval(), device)
        self.levels = levels_of(self.vqvae, self.prior, self.tables)
        self._reduced: dict[int, Tensor] = {}

    def reduced(self, scale: int) -> Tensor:
        """See `VQVAE.reduced`; the kernel is computed once."""
        if scale not in self._reduced:
            self._reduced[scale] = self.vqvae.reduced(scale)
        return self._reduced[scale]


class Follower(Protocol):
    """State that a walk keeps up to date."""

    def begin(self, level: Level) -> None:
        """Prepare for a level."""

    def enter(self, piece: Slice) -> None:
        """Prepare for a slice of the level."""


def walk(levels: Sequence[Level], *followers: Follower) -> Iterator[Slice]:
    """Iterate over all slices in coding order, coarse level first. The followers enter a slice before it is yielded."""
    for level in levels:
        for follower in followers:
            follower.begin(level)
        for piece in level.slices:
            for follower in followers:
                follower.enter(piece)
            yield piece


class Estimate:
    """The decoder's knowledge of the latents: predicted, then corrected slice by slice. It is differentiable.

    Args:
        vqvae: the networks. quality: (B,), 1..100.
        height, width: of the picture in pixels, multiples of `Config.multiple`.

    Attributes:
        values: float (B, C, h, w), the estimate of the level's latents.
        step: float (B, P D, 1, 1), the quantiser step of each channel of the slice in latent units.
    """

    values: Tensor
    step: Tensor

    def __init__(self, vqvae: VQVAE, quality: Tensor, height: int, width: int) -> None:
        self.vqvae, self.quality, self.size = vqvae, quality, (height, width)
        self.piece: Slice | None = None

    def begin(self, level: Level) -> None:
        """Predict the level from the coarser one; the coarsest level starts from zeros."""
        if level.number:
            self.values = self.vqvae.descend(level.number - 1, self.values, self.quality)
        else:
            self.values = torch.zeros(self._shape(level), dtype=torch.float32, device=self.quality.device)

    def enter(self, piece: Slice) -> None:
        """Refine the estimate from everything decoded so far."""
        self.piece, self.step = piece, piece.step(self.quality)
        self.values = self.vqvae.refine(piece.level, piece.index, self.values, self.quality).float()

    @property
    def here(self) -> Tensor:
        """The estimate of the slice's channels, (B, P D, h, w)."""
        assert self.piece is not None
        return self.values[:, self.piece.channels]

    def residual(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) minus the estimate, for the slice's channels, in steps: (B, P D, h, w)."""
        assert self.piece is not None
        return (latents[:, self.piece.channels] - self.here) / self.step

    def add(self, vectors: Tensor) -> None:
        """Add vectors, (B, P D, h, w) in steps, to the slice's channels."""
        self.replace(self.here + vectors * self.step)

    def replace(self, latents: Tensor) -> None:
        """Replace the slice's channels by latents (B, P D, h, w)."""
        assert self.piece is not None
        start, stop = self.piece.channels.start, self.piece.channels.stop
        self.values = torch.cat([self.values[:, :start], latents, self.values[:, stop:]], 1)

    def pixels(self) -> Tensor:
        """Decode the finished estimate, after the walk: float32 (B, 3, H, W), 0..255.

        Values beyond are clipped, as in pictures, but their gradients pass.
        """
        x = self.vqvae.descend(len(self.vqvae.config.levels) - 1, self.values, self.quality).float()
        return x + (x.clamp(0, 255) - x).detach()

    def _shape(self, level: Level) -> tuple[int, int, int, int]:
        height, width = self.size
        stride = level.stage.stride
        return len(self.quality), level.stage.channels, height // stride, width // stride


@dataclass
class Pass:
    """Positions of a slice whose codes are conditionally independent given all that is coded before.

    Attributes:
        places: rows and columns of the positions.
        parameters: of their rate model, see `Slice.rates`. N = B h' w', in raster order.
        codes: int64 (N, P). Unless they were given, the caller sets them before it asks for the next pass.
    """

    places: Places
    parameters: Tensor
    codes: Tensor | None = None


class Context:
    """The prior's knowledge of the codes of a batch: all slices before, and the slice's earlier passes.

    Args:
        quality: int64 or float (B,), 1..100. height, width: in pixels, multiples of `Config.multiple`.

    Attributes:
        state: the prior's state, (B, C, h, w).
    """

    def __init__(self, quality: Tensor, height: int, width: int) -> None:
        self.quality, self.size = quality, (height, width)
        self.state: Tensor | None = None
        self.piece: Slice | None = None
        self._codes: Tensor | None = None

    def begin(self, level: Level) -> None:
        """Make the state before the level's first slice from the coarser level's final state."""
        assert level.prior is not None
        height, width = (side // level.stage.stride for side in self.size)
        self.state = level.prior.begin(self.state, self.quality, len(self.quality), height, width)

    def enter(self, piece: Slice) -> None:
        """Note the slice. The prior runs only when its context is asked for."""
        self.piece = piece

    def take_codes(self) -> Tensor:
        """Hand over the slice's codes after its passes, int64 (B, h, w, P): many contexts need not keep theirs."""
        assert self._codes is not None
        codes, self._codes = self._codes, None
        return codes

    def release(self) -> None:
        """Forget everything, after the walk."""
        self.state = self._codes = None

    def passes(self, given: Tensor | None = None) -> Iterator[Pass]:
        """Iterate over the passes of the slice in coding order.

        Args:
            given: int64 (B, h, w, P), the codes, if they are already known (teacher forcing). A prior in raster order
                then takes one pass instead of one for each position.
        """
        assert self.piece is not None and self.piece.prior is not None and self.state is not None
        prior, table = self.piece.prior, self.piece.inputs()
        self.state, context = prior.prepare(self.state, self.quality)  # of all slices before
        batch, _, height, width = context.shape
        planes, _, features = table.shape
        self._codes = codes = torch.zeros(batch, height, width, planes, dtype=torch.int64, device=context.device)
        inputs = torch.zeros(batch, planes * features, height, width, dtype=torch.float32, device=context.device)
        inputs = inputs.contiguous(memory_format=torch.channels_last)

        def write(one: Pass, into: Tensor) -> None:
            assert one.codes is not None
            rows, columns = one.places
            here = codes[:, rows, columns]
            here.copy_(one.codes.reshape(here.shape))
            into[:, :, rows, columns] = grid(look_up(table, one.codes), batch, *here.shape[1:3])

        if prior.at_once and given is None:
            for places, parameters in prior.walk(context, inputs):
                one = Pass(places, parameters)
                yield one
                write(one, inputs)
        else:
            if given is not None and prior.at_once:
                inputs = grid(look_up(table, given.reshape(-1, planes)), batch, height, width)
            for number, places in prior.passes(height, width):
                one = Pass(places, prior.parameters_at(number, context, inputs))
                if given is not None:
                    one.codes = given[(slice(None), *places)].reshape(-1, planes)
                yield one
                if torch.is_grad_enabled():
                    inputs = inputs.clone()  # autograd needs the old values
                write(one, inputs)
        self.state = prior.update(self.state, inputs)
