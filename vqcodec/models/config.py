"""The configuration of a model: frozen dataclasses, stored as JSON in the metadata of the weights file."""

import dataclasses
import itertools
import json
import math
import reprlib
from dataclasses import dataclass
from typing import Any

from vqcodec.errors import WeightsError

QUALITIES = 100
# Largest fan-in of the prior's convolutions, for exact sums in float32 (integers.py): 1040.
MAX_INPUTS = (1 << 24) // (127 * 127)
# Most rows of a stored table of probabilities: about half of the 255 values that the prior can choose a row with.
MAX_ROWS = 128
CELL = 4  # side in pixels of the cells that `pixels.Renderer` works on
FEATURES = 24  # features that each cell gets from its patch
# Largest code length of codebooks that start as a lattice. In more dimensions the first shells of the integer lattice
# hold more points than most codebooks.
LARGEST_LATTICE = 8
# Largest stride: tiles are multiples of 64 pixels, and large training crops of 128.
MAX_STRIDE = 128
# Bounds of what weights files may ask for, far above what any model needs; a .vqz header has 255 layers at most.
MOST_CHANNELS, MOST_BLOCKS, MOST_LAYERS = 1 << 13, 1 << 8, 255


def _check_range(config: object, low: int, *names: str, high: int) -> None:
    for name in names:
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ValueError(f"{name} must be a whole number from {low} to {high}, got {reprlib.repr(value)}")


def _check_number(name: str, value: object, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ValueError(f"{name} must be a number from {low:g} to {high:g}, got {reprlib.repr(value)}")


@dataclass(frozen=True)
class SliceConfig:
    """Code planes that are coded together, with equal code length and codebook size.

    Attributes:
        planes: number of code planes P.
        dim: code length D. The slice covers P * D latent channels.
        codes: codebook size K of each plane.
        layer: progressive layer of the file that carries the slice; 0 is the coarsest.
        rows: rows R of a stored table of probabilities, shared by all planes, from which a prior of interleaved passes
            chooses a row for each symbol (Jia et al. 2026, "PULSE", section 3). 0 for a prior in raster order, which
            gives the parameters of a distribution.

    Raises:
        ValueError: a field is out of range.
    """

    planes: int
    dim: int
    codes: int
    layer: int
    rows: int = 0

    def __post_init__(self) -> None:
        _check_range(self, 1, "planes", "dim", high=MAX_INPUTS)
        _check_range(self, 0, "layer", high=MOST_LAYERS - 1)
        # The range coder needs at least two values besides code 0. Codes are stored as int16.
        _check_range(self, 3, "codes", high=1 << 15)
        _check_range(self, 0, "rows", high=MAX_ROWS)
        if self.rows and (self.rows == 1 or not self.structured):
            raise ValueError(f"rows must be 0, or from 2 to {MAX_ROWS} with at most {LARGEST_LATTICE} dimensions")

    @property
    def channels(self) -> int:
        return self.planes * self.dim

    @property
    def parameters(self) -> int:
        """Number of parameters that the prior gives for each symbol: 1, its row, or D + 3.

        The latter are D means, a square, a linear and the odds of code 0.
        """
        return 1 if self.rows else self.dim + 3

    @property
    def structured(self) -> bool:
        """Whether codebooks start as a lattice, not from data."""
        return self.dim <= LARGEST_LATTICE


@dataclass(frozen=True)
class CellConfig:
    """Residual blocks at the pixels, in cells of 4 x 4 (`pixels.CellBlocks`).

    Attributes:
        hidden: channels within a block.
        encoder_blocks, decoder_blocks: number of blocks on each side.
        encoder_groups, decoder_groups: groups of their 3x3 convolutions; divisors of `hidden`.
    """

    hidden: int
    encoder_blocks: int
    decoder_blocks: int
    encoder_groups: int = 1
    decoder_groups: int = 1

    def __post_init__(self) -> None:
        _check_range(self, 1, "hidden", high=MOST_CHANNELS)
        _check_range(self, 0, "encoder_blocks", "decoder_blocks", high=MOST_BLOCKS)
        _check_range(self, 1, "encoder_groups", "decoder_groups", high=self.hidden)
        for name in ("encoder_groups", "decoder_groups"):
            if self.hidden % getattr(self, name):
                raise ValueError(f"{name} must divide hidden, {self.hidden}, got {getattr(self, name)}")


@dataclass(frozen=True)
class StageConfig:
    """One resolution of the encoder and the decoder.

    Attributes:
        stride: picture pixels per grid position, in each direction.
        channels: channels of the feature map at this resolution.
        hidden: channels within a residual block.
        encoder_blocks, decoder_blocks: number of residual blocks on each side.
        slices: the code planes quantised at this resolution.
        lapped: whether the blocks of the finest stage's transform overlap (`pixels.SeparableLap`).
        renderer: hidden channels of the network that refines pixels after the finest stage (`pixels.Renderer`); 0 for
            none.
        groups: groups of the 3x3 convolutions of residual blocks; a divisor of `hidden`, which makes them depthwise.
        cells: residual blocks before the finest stage's transform and behind its inverse; None for none.
    """

    stride: int
    channels: int
    hidden: int
    encoder_blocks: int
    decoder_blocks: int
    slices: tuple[SliceConfig, ...]
    lapped: bool = False
    renderer: int = 0
    groups: int = 1
    cells: CellConfig | None = None

    def __post_init__(self) -> None:
        _check_range(self, 1, "stride", high=MAX_STRIDE)
        _check_range(self, 1, "channels", "hidden", high=MOST_CHANNELS)
        _check_range(self, 0, "encoder_blocks", "decoder_blocks", high=MOST_BLOCKS)
        _check_range(self, 0, "renderer", high=MOST_CHANNELS)
        _check_range(self, 1, "groups", high=self.hidden)
        if self.hidden % self.groups:
            raise ValueError(f"groups must divide hidden, {self.hidden}, got {self.groups}")
        if type(self.lapped) is not bool:
            raise ValueError(f"lapped must be true or false, got {reprlib.repr(self.lapped)}")

    @property
    def spans(self) -> tuple[slice, ...]:
        """For each slice, the range of its planes among all planes of the stage."""
        ends = itertools.accumulate(piece.planes for piece in self.slices)
        return tuple(slice(end - piece.planes, end) for piece, end in zip(self.slices, ends, strict=True))


@dataclass(frozen=True)
class PriorConfig:
    """Size of the integer PixelCNN.

    Attributes:
        channels: channels of the state.
        embedding: with interleaved passes, channels to which a slice's own codes are reduced for its later passes.
        blocks: gated residual blocks before each slice.
        layers: layers of the Gated PixelCNN in raster order; 0 for four interleaved passes instead.
    """

    channels: int = 96
    embedding: int = 64
    blocks: int = 1
    layers: int = 0

    def __post_init__(self) -> None:
        _check_range(self, 1, "channels", "embedding", high=MAX_INPUTS // 9)
        _check_range(self, 0, "blocks", "layers", high=MOST_BLOCKS)


@dataclass(frozen=True)
class Config:
    """Everything that determines the shape of a model.

    Attributes:
        name: for people; it also selects the training schedule (train/schedule.py).
        stages: fine to coarse. Each stride is a whole multiple of the one before.
        prior: size of the entropy model.
        lambda_range: distortion weights of quality 1 and of quality 100, in bits per pixel per unit of mean squared
            error on the 0..255 scale. The qualities between are spaced evenly in log(lambda).
        codebook: how codebooks learn: "gradient" (van den Oord et al. 2017, eq. 3) or "ema", exponential moving
            averages (their appendix A.1).
        commitment: weight beta of the commitment loss (van den Oord et al. 2017, eq. 3).

    Raises:
        ValueError: a field is out of range, or fields contradict each other.
    """

    name: str
    stages: tuple[StageConfig, ...]
    prior: PriorConfig = PriorConfig()
    lambda_range: tuple[float, float] = (0.0005, 0.1)
    codebook: str = "gradient"
    commitment: float = 0.0

    def __post_init__(self) -> None:
        if type(self.name) is not str:
            raise ValueError(f"name must be text, got {reprlib.repr(self.name)}")
        strides = [1, *(stage.stride for stage in self.stages)]
        if any(b % a or b <= a for a, b in itertools.pairwise(strides)):
            raise ValueError(f"strides must grow by whole factors, got {strides[1:]}")
        if not self.stages:
            raise ValueError("there must be a stage")
        for stage in self.stages:
            covered = sum(s.channels for s in stage.slices)
            if covered != stage.channels:
                raise ValueError(f"slices cover {covered} of {stage.channels} channels at stride {stage.stride}")
        layers = [s.layer for stage in self.levels for s in stage.slices]
        if layers != sorted(layers) or sorted(set(layers)) != list(range(self.layers)):
            raise ValueError(f"layers must be 0, 1, 2, ... in coding order, got {layers}")
        if any(2 * s.channels > MAX_INPUTS for stage in self.stages for s in stage.slices):
            raise ValueError(f"a slice must not cover more than {MAX_INPUTS // 2} channels")
        low, high = self.lambda_range
        for number in self.lambda_range:
            _check_number("lambda_range", number, 1e-9, 1e9)
        if not low < high:
            raise ValueError(f"lambda_range must be two growing positive numbers, got {self.lambda_range}")
        if MAX_STRIDE % self.multiple:
            raise ValueError(f"the coarsest stride must divide {MAX_STRIDE}, got {self.multiple}")
        finest = self.stages[0]
        for name in ("renderer", "cells"):
            elsewhere = any(getattr(stage, name) for stage in self.stages[1:])
            if elsewhere or (getattr(finest, name) and finest.stride % CELL):
                raise ValueError(f"{name}: only the finest stage can have it, with a stride that {CELL} divides")
        if any(stage.lapped for stage in self.stages[1:]):
            raise ValueError("only the finest stage can be lapped")
        _check_number("commitment", self.commitment, 0, 1e6)
        if any(bool(s.rows) == bool(self.prior.layers) for stage in self.stages for s in stage.slices):
            raise ValueError("every slice needs rows with interleaved passes, and none in raster order")
        if self.codebook not in ("gradient", "ema"):
            raise ValueError(f"codebook must be gradient or ema, got {self.codebook!r}")

    @property
    def levels(self) -> tuple[StageConfig, ...]:
        """The stages, coarse first: the order of coding."""
        return self.stages[::-1]

    @property
    def joint(self) -> bool:
        """Whether the prior learns jointly with the rest, on rate and distortion.

        A prior in raster order learns after the rest, on codes that were chosen for the distortion alone (Razavi et al.
        2019).
        """
        return not self.prior.layers

    @property
    def structured(self) -> bool:
        """Whether all codebooks start as a lattice, not from data."""
        return all(piece.structured for stage in self.levels for piece in stage.slices)

    @property
    def layers(self) -> int:
        """Number of progressive layers."""
        return max(s.layer for stage in self.stages for s in stage.slices) + 1

    @property
    def rate_factor(self) -> float:
        """Factor on the bits in the choice of a code, see `quantizer.Codebook.choose`.

        It is below 1 because a code is also context for later codes, which its own bits do not tell.
        """
        return 0.82 if self.joint else 0.0

    @property
    def multiple(self) -> int:
        """Pictures are padded to multiples of this many pixels: the coarsest stride."""
        return self.stages[-1].stride

    def lambda_of(self, t: float) -> float:
        """The distortion weight at t = (quality - 1) / 99; see `lambda_range`."""
        low, high = self.lambda_range
        return low * math.exp(t * math.log(high / low))

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @staticmethod
    def from_json(text: str) -> "Config":
        """The inverse of `to_json`.

        Raises:
            WeightsError: the text is not a valid configuration.
        """
        try:
            fields: dict[str, Any] = json.loads(text)
            stages = tuple(_stage(s) for s in fields.pop("stages"))
            prior = PriorConfig(**fields.pop("prior"))
            fields["lambda_range"] = tuple(fields["lambda_range"])
            return Config(stages=stages, prior=prior, **fields)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise WeightsError(f"not a model configuration: {error}") from None


def _stage(fields: dict[str, Any]) -> StageConfig:
    """A stage from what JSON says of it."""
    slices = tuple(SliceConfig(**piece) for piece in fields["slices"])
    cells = fields.get("cells")
    return StageConfig(**{**fields, "slices": slices, "cells": None if cells is None else CellConfig(**cells)})
