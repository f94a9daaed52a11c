"""A model as everything that codes sees it: levels of slices, coarse first, and the walk over them.

    for piece in walk(model.levels, estimate, context):
        estimate.here           the slice's latents as the decoder expects them
        context.passes()        what the prior says of the slice's codes, pass by pass
        estimate.add(vectors)   what the chosen codes change

Encoder, decoder, sampler, search and training all take this walk; each brings along what it needs. An `Estimate` is
what the decoder knows of the latents, a `Context` what the prior knows of the codes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from vqcodec.models.config import Config, SliceConfig, StageConfig
from vqcodec.models.counts import CodeTables, RowTables, Tables
from vqcodec.models.prior import LevelPrior, Places, Prior, SlicePrior, rates
from vqcodec.models.quantizer import Codebook, Rates, grid, look_up
from vqcodec.models.vqvae import PIXEL_SCALE, VQVAE, SliceQuantizer, channels_last


@dataclass(frozen=True)
class Slice:
    """One slice of code planes, with all that belongs to it.

    Attributes:
        level, index: of the slice; levels count from the coarsest.
        config: its planes and codes. stage: of its level.
        planes: which of the level's planes it covers. channels: which of the level's latent channels.
        quantizer: its refinement, steps and codebook.
        prior, tables: of its codes; None where only latents are walked, and where a prior is still learning.
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
        return slice(self.quantizer.start, self.quantizer.stop)

    @property
    def codebook(self) -> Codebook:
        return self.quantizer.codebook

    def inputs(self) -> Tensor:
        """What the prior sees of each code: integers, float32 (P, K, 2 D)."""
        return self.codebook.inputs() if self.tables is None else self.tables.inputs

    def scale(self, quality: Tensor) -> Tensor:
        """The quantiser step of every channel: (B, P D, 1, 1), in latent units."""
        return self.quantizer.steps(quality).repeat_interleave(self.config.dim, 1)[:, :, None, None]

    def error_weight(self, weight: float | Tensor, quality: Tensor) -> Tensor:
        """What a squared step weighs, in bits, behind an orthonormal decoder: (B, P), without gradient.

        weight: bits per pixel per unit of squared error on the 0..255 scale; a number or (B, 1).
        """
        steps = self.quantizer.steps(quality).detach()
        return weight * (steps * PIXEL_SCALE) ** 2 / 3

    def rates(self, parameters: Tensor) -> Rates:
        """The rate model, in floats, that the prior's integers (N, P, F) stand for: what the encoder's choice uses."""
        if self.config.rows:
            return self.codebook.row_rates(parameters[..., 0])
        return rates(parameters, self.config.dim)

    def vectors(self, indices: Tensor) -> Tensor:
        """Code vectors on the grid, in steps: int64 (B, h, w, P) -> (B, P D, h, w)."""
        batch, height, width, planes = indices.shape
        return grid(self.codebook.lookup(indices.reshape(-1, planes)), batch, height, width)


@dataclass(frozen=True)
class Level:
    """One level of codes: its number from the coarsest, its stage, its prior (or None) and its slices."""

    number: int
    stage: StageConfig
    prior: LevelPrior | None
    slices: tuple[Slice, ...]


def levels_of(vqvae: VQVAE, prior: Prior | None = None, tables: Tables | None = None) -> tuple[Level, ...]:
    """The levels of networks that belong together, coarse first."""
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
    """Trained networks, ready to run.

    Attributes:
        config: the configuration.
        vqvae, prior, tables: the networks and integer tables, on `device`, not trainable.
        levels: the same, slice by slice.
        id: the four bytes that name these weights in a .vqz file.
        looks: whether pixels are rendered by another look of them.
    """

    def __init__(
        self,
        config: Config,
        vqvae: VQVAE,
        prior: Prior,
        tables: Tables,
        weights_id: bytes,
        device: torch.device,
        looks: bool = False,
    ) -> None:
        self.config, self.id, self.device, self.looks = config, weights_id, device, looks
        self.tables = tables.to(device)
        self.vqvae = channels_last(vqvae.requires_grad_(False).eval(), device)
        self.prior = channels_last(prior.requires_grad_(False).eval(), device)
        self.levels = levels_of(self.vqvae, self.prior, self.tables)


class Follower(Protocol):
    """What comes along on a walk."""

    def begin(self, level: Level) -> None:
        """A level begins."""

    def enter(self, piece: Slice) -> None:
        """It is the turn of a slice."""


def walk(levels: Sequence[Level], *followers: Follower) -> Iterator[Slice]:
    """All slices in coding order: levels coarse first. Followers are told before the caller is."""
    for level in levels:
        for follower in followers:
            follower.begin(level)
        for piece in level.slices:
            for follower in followers:
                follower.enter(piece)
            yield piece


class Estimate:
    """The latents as the decoder knows them: predicted, and corrected slice by slice. Gradients pass through.

    Args:
        quality: (B,), 1..100. height, width: of the picture in pixels, multiples of `Config.multiple`.

    Attributes:
        values: the level's latents, float (B, C, h, w).
        scale: the step of every channel of the slice, (B, P D, 1, 1).
    """

    values: Tensor
    scale: Tensor

    def __init__(self, vqvae: VQVAE, quality: Tensor, height: int, width: int) -> None:
        self.vqvae, self.quality, self.size = vqvae, quality, (height, width)
        self.level: Level | None = None
        self.piece: Slice | None = None

    def begin(self, level: Level) -> None:
        """Predict the level from the coarser one; the coarsest from nothing."""
        if level.number:
            self.values = self.vqvae.descend(level.number - 1, self.values, self.quality)
        else:
            self.values = torch.zeros(self._shape(level), device=self.quality.device)

    def enter(self, piece: Slice) -> None:
        """Refine the estimate from everything decoded so far."""
        self.piece, self.scale = piece, piece.scale(self.quality)
        self.values = self.vqvae.refine(piece.level, piece.index, self.values, self.quality).float()

    @property
    def here(self) -> Tensor:
        """The estimate of the slice's channels, (B, P D, h, w)."""
        assert self.piece is not None
        return self.values[:, self.piece.channels]

    def residual(self, latents: Tensor) -> Tensor:
        """What is left to code of the slice's channels, in steps: latents (B, C, h, w) -> (B, P D, h, w)."""
        assert self.piece is not None
        return (latents[:, self.piece.channels] - self.here) / self.scale

    def add(self, vectors: Tensor) -> None:
        """Correct the slice's channels by vectors in steps, (B, P D, h, w)."""
        self.replace(self.here + vectors * self.scale)

    def replace(self, latents: Tensor) -> None:
        """Put latents, (B, P D, h, w), in the place of the slice's channels."""
        assert self.piece is not None
        start, stop = self.piece.channels.start, self.piece.channels.stop
        self.values = torch.cat([self.values[:, :start], latents, self.values[:, stop:]], 1)

    def pixels(self) -> Tensor:
        """After the walk: the picture that the decoder makes, float (B, 3, H, W), not clipped."""
        return self.vqvae.descend(len(self.vqvae.config.levels) - 1, self.values, self.quality).float()

    def _shape(self, level: Level) -> tuple[int, int, int, int]:
        height, width = self.size
        stride = level.stage.stride
        return len(self.quality), level.stage.channels, height // stride, width // stride


@dataclass
class Pass:
    """Positions of a slice whose codes are independent of each other given what the prior knows.

    Attributes:
        places: rows and columns of the positions.
        parameters: of their rate model, (N, P, D + 2 S + 1), N = B h' w' in raster order; see `SlicePrior`.
        codes: int64 (N, P). The walker has to set them before it asks for the next pass, unless they were given.
    """

    places: Places
    parameters: Tensor
    codes: Tensor | None = None


class Context:
    """What the prior knows of the codes of a batch of grids: of all slices before, and of a slice's earlier passes.

    Args:
        quality: int64 or float (B,), 1..100. height, width: in pixels, multiples of `Config.multiple`.

    Attributes:
        state: of the prior, (B, C, h, w).
        codes: of the slice, after its passes: int64 (B, h, w, P).
    """

    codes: Tensor

    def __init__(self, quality: Tensor, height: int, width: int) -> None:
        self.quality, self.size = quality, (height, width)
        self.state: Tensor | None = None
        self.piece: Slice | None = None

    def begin(self, level: Level) -> None:
        """What is known of the coarser level becomes the state before the first slice."""
        assert level.prior is not None
        height, width = (side // level.stage.stride for side in self.size)
        self.state = level.prior.begin(self.state, self.quality, len(self.quality), height, width)

    def enter(self, piece: Slice) -> None:
        """Nothing happens until the slice is looked at: not every one is."""
        self.piece = piece

    def prepare(self) -> Tensor:
        """Look at what was coded before the slice: the context of its symbols, (B, 2 C, h, w)."""
        assert self.piece is not None and self.piece.prior is not None and self.state is not None
        self.state, context = self.piece.prior.prepare(self.state, self.quality)
        return context

    def absorb(self, inputs: Tensor) -> None:
        """Take the slice's codes into the state, as the prior sees them, (B, 2 P D, h, w)."""
        assert self.piece is not None and self.piece.prior is not None and self.state is not None
        self.state = self.piece.prior.update(self.state, inputs)

    def passes(self, given: Tensor | None = None) -> Iterator[Pass]:
        """The passes of the slice in coding order.

        Args:
            given: the codes, int64 (B, h, w, P), where they are known before their rate model is. A prior in raster order needs
                one pass then instead of one for each position.
        """
        assert self.piece is not None and self.piece.prior is not None
        prior, table = self.piece.prior, self.piece.inputs()
        context = self.prepare()
        batch, _, height, width = context.shape
        planes, _, features = table.shape
        self.codes = torch.zeros(batch, height, width, planes, dtype=torch.int64, device=context.device)
        inputs = torch.zeros(batch, planes * features, height, width, device=context.device)
        inputs = inputs.contiguous(memory_format=torch.channels_last)

        def ready(one: Pass) -> Pass:
            if given is not None:
                one.codes = given[:, one.places[0], one.places[1]].reshape(-1, planes)
            return one

        def write(one: Pass, into: Tensor) -> None:
            assert one.codes is not None
            rows, columns = one.places
            here = self.codes[:, rows, columns]
            here.copy_(one.codes.reshape(here.shape))
            into[:, :, rows, columns] = grid(look_up(table, one.codes), batch, *here.shape[1:3])

        if prior.at_once and given is None:
            for places, parameters in prior.walk(context, inputs):
                one = Pass(places, parameters)
                yield one
                write(one, inputs)
        else:
            if prior.at_once and given is not None:
                inputs = grid(look_up(table, given.reshape(-1, planes)), batch, height, width)
            for number, places in prior.passes(height, width):
                one = ready(Pass(places, prior.parameters_at(number, context, inputs)))
                yield one
                if torch.is_grad_enabled():
                    inputs = inputs.clone()  # the backward pass needs it as it was
                write(one, inputs)
        self.absorb(inputs)
