"""The one configuration of a model: frozen dataclasses, stored as JSON inside the weights file."""

import dataclasses
import itertools
import json
import math
from dataclasses import dataclass, replace
from typing import Any

from vqcodec.errors import WeightsError

QUALITIES = 100
# The prior's convolutions have at most this many inputs: see prior.py on exactness.
MAX_INPUTS = (1 << 24) // (127 * 127)  # 1040
# Of stored tables: what the prior gives for a symbol has 255 values.
MAX_ROWS = 128
# Codebooks of more dimensions have no structured start: even the first shells of the lattice are larger than most of them.
LARGEST_LATTICE = 8
# Residual blocks that another look has more in every stage below the codes.
LOOK_BLOCKS = 2


def _check_range(config: object, low: int, *names: str, high: int = 1 << 20) -> None:
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int) or not low <= value <= high:
            raise ValueError(f"{name} must be a whole number from {low} to {high}, got {value!r}")


@dataclass(frozen=True)
class SliceConfig:
    """Code planes that are coded together: equal code length and codebook size.

    Attributes:
        planes: number of code planes P.
        dim: code length D; the slice covers P * D latent channels.
        codes: codebook size K of every plane.
        layer: progressive layer of the file that carries the slice (0 is the coarsest).
        scales: widths that the rate model gives a symbol's distribution: 1 for all dimensions alike, or one for each, D.
        outposts: of a lattice of two or more dimensions, how codes start that lie beyond it: "far" or "near" (`quantizer.OUTPOSTS`).
        rows: of the stored table of probabilities that all planes share: the prior only says which row a symbol has (Jia et al. 2026,
            "PULSE", section 3); 0 if it gives the parameters of a distribution.

    Raises:
        ValueError: a number is out of range.
    """

    planes: int
    dim: int
    codes: int
    layer: int
    scales: int = 1
    outposts: str = "far"
    rows: int = 0

    def __post_init__(self) -> None:
        _check_range(self, 1, "planes", "dim")
        _check_range(self, 0, "layer")
        # The range coder takes no alphabet of one value beside the flag of code 0; codes are kept as int16.
        _check_range(self, 3, "codes", high=1 << 15)
        if self.scales not in (1, self.dim):
            raise ValueError(f"scales must be 1 or dim, {self.dim}, got {self.scales!r}")
        if self.outposts not in ("far", "near"):
            raise ValueError(f"outposts must be far or near, got {self.outposts!r}")
        _check_range(self, 0, "rows", high=MAX_ROWS)
        if self.rows and (self.rows == 1 or self.scales != 1 or not self.structured):
            raise ValueError(
                f"rows must be 0, or from 2 to {MAX_ROWS} with one scale and at most {LARGEST_LATTICE} dimensions"
            )

    @property
    def channels(self) -> int:
        return self.planes * self.dim

    @property
    def parameters(self) -> int:
        """Numbers that the prior gives for each symbol: its row; or means, two for each scale, and odds of code 0."""
        return 1 if self.rows else self.dim + 2 * self.scales + 1

    @property
    def structured(self) -> bool:
        """Whether codebooks start as integers, not from data."""
        return self.dim <= LARGEST_LATTICE


@dataclass(frozen=True)
class StageConfig:
    """One resolution of the encoder and of the decoder.

    Attributes:
        stride: picture pixels per grid position, in each direction.
        channels: channels of the feature map at this resolution.
        hidden: channels inside a residual block.
        encoder_blocks, decoder_blocks: residual blocks on each side. refine_blocks: before each slice.
        slices: the code planes quantised at this resolution; empty for a stage that is only passed through.
        lapped: whether the blocks of the transform from the next finer stage overlap (`vqvae.Lap`).
        renderer: hidden channels of the network that refines pixels behind the finest stage (`pixels.Renderer`); 0 for none.
        groups: of the 3x3 convolutions of residual blocks; as many as `hidden` make them depthwise.
    """

    stride: int
    channels: int
    hidden: int
    encoder_blocks: int
    decoder_blocks: int
    slices: tuple[SliceConfig, ...] = ()
    lapped: bool = False
    refine_blocks: int = 1
    renderer: int = 0
    groups: int = 1

    def __post_init__(self) -> None:
        _check_range(self, 1, "stride", "channels", "hidden", "refine_blocks")
        _check_range(self, 0, "encoder_blocks", "decoder_blocks", "renderer")
        _check_range(self, 1, "groups", high=self.hidden)
        if self.hidden % self.groups:
            raise ValueError(f"groups must divide hidden, {self.hidden}, got {self.groups}")

    @property
    def spans(self) -> tuple[slice, ...]:
        """Of every slice, the range of its planes among all of the stage's."""
        ends = itertools.accumulate(piece.planes for piece in self.slices)
        return tuple(slice(end - piece.planes, end) for piece, end in zip(self.slices, ends, strict=True))


@dataclass(frozen=True)
class PriorConfig:
    """Widths of the integer PixelCNN.

    Attributes:
        channels: channels of the context state.
        embedding: channels that the codes of one slice are reduced to before the within-slice context, in interleaved passes.
        blocks: gated residual blocks before each slice.
        layers: of the Gated PixelCNN in raster order; 0 for four interleaved passes.
    """

    channels: int = 96
    embedding: int = 64
    blocks: int = 1
    layers: int = 0

    def __post_init__(self) -> None:
        _check_range(self, 1, "channels", "embedding", high=MAX_INPUTS // 9)
        _check_range(self, 0, "blocks", "layers")


@dataclass(frozen=True)
class Config:
    """Everything that determines the shape of a model.

    Attributes:
        name: for people, and of the schedule that training takes (schedule.py).
        stages: fine to coarse; strides grow by whole factors.
        prior: the entropy model.
        lambda_range: distortion weights of quality 1 and 100, in bits per pixel per unit of squared error on the
            0..255 scale; qualities between are spaced evenly in log(lambda).
        codebook: how codebooks learn, "gradient" (van den Oord et al. 2017, eq. 3) or "ema" (their appendix A.1).
        commitment: weight beta of the commitment loss.
        rate: how the prior is learned, "joint" with the rest on rate and distortion, or "after" it, from codes that were
            chosen for the distortion alone (Razavi et al. 2019); in raster order always after.
        residual_unit: what 1 at the output of a residual block means, in usual quantiser steps (`vqvae.usual_step`).
    """

    name: str
    stages: tuple[StageConfig, ...]
    prior: PriorConfig = PriorConfig()
    lambda_range: tuple[float, float] = (0.0005, 0.1)
    codebook: str = "gradient"
    commitment: float = 0.0
    rate: str = "joint"
    residual_unit: float = 1.5

    def __post_init__(self) -> None:
        strides = [1, *(stage.stride for stage in self.stages)]
        if any(b % a or b <= a for a, b in itertools.pairwise(strides)):
            raise ValueError(f"strides must grow by whole factors, got {strides[1:]}")
        if not self.stages or not self.stages[-1].slices:
            raise ValueError("the coarsest stage must have code planes")
        for stage in self.stages:
            covered = sum(s.channels for s in stage.slices)
            if stage.slices and covered != stage.channels:
                raise ValueError(f"slices cover {covered} of {stage.channels} channels at stride {stage.stride}")
        layers = [s.layer for stage in self.levels for s in stage.slices]
        if layers != sorted(layers) or sorted(set(layers)) != list(range(self.layers)):
            raise ValueError(f"layers must be 0, 1, 2, ... in coding order, got {layers}")
        if any(2 * s.channels > MAX_INPUTS for stage in self.stages for s in stage.slices):
            raise ValueError(f"a slice must not cover more than {MAX_INPUTS // 2} channels")
        low, high = self.lambda_range
        if not 0 < low < high:
            raise ValueError(f"lambda_range must be two growing positive numbers, got {self.lambda_range}")
        # Tiles are multiples of 64 pixels, large crops of 128, and a grid of one position has no neighbours.
        if 128 % self.multiple:
            raise ValueError(f"the coarsest stride must divide 128, got {self.multiple}")
        if not (isinstance(self.commitment, int | float) and 0 <= self.commitment < math.inf):
            raise ValueError(f"commitment must be a number from 0, got {self.commitment!r}")
        if not (isinstance(self.residual_unit, int | float) and 0 < self.residual_unit < math.inf):
            raise ValueError(f"residual_unit must be a positive number, got {self.residual_unit!r}")
        if self.rate not in ("joint", "after"):
            raise ValueError(f"rate must be joint or after, got {self.rate!r}")
        if self.rate == "joint" and self.prior.layers:
            raise ValueError("a prior in raster order cannot be learned jointly: rate must be after")
        if self.codebook not in ("gradient", "ema"):
            raise ValueError(f"codebook must be gradient or ema, got {self.codebook!r}")

    @property
    def levels(self) -> tuple[StageConfig, ...]:
        """The stages that carry codes, coarse first: the order of coding."""
        return tuple(stage for stage in reversed(self.stages) if stage.slices)

    @property
    def structured(self) -> bool:
        """Whether all codebooks start as integers, not from data."""
        return all(piece.structured for stage in self.levels for piece in stage.slices)

    @property
    def layers(self) -> int:
        return max(s.layer for stage in self.stages for s in stage.slices) + 1

    @property
    def choice_bias(self) -> float:
        """How much of its bits counts in the choice of a code: 1 would ignore that codes are context for later ones."""
        return 0.82 if self.rate == "joint" else 0.0

    @property
    def multiple(self) -> int:
        """Pictures are padded to a multiple of this many pixels."""
        return self.stages[-1].stride

    def look(self) -> "Config":
        """For another look: more residual blocks in the decoder's stages below the finest codes."""
        finest = self.levels[-1].stride
        stages = (replace(s, decoder_blocks=s.decoder_blocks + LOOK_BLOCKS * (s.stride < finest)) for s in self.stages)
        return replace(self, stages=tuple(stages))

    def lambda_of(self, t: float) -> float:
        """Distortion weight at t = (quality - 1) / 99; see `lambda_range`."""
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
            stages = tuple(
                StageConfig(**{**s, "slices": tuple(SliceConfig(**p) for p in s["slices"])})
                for s in fields.pop("stages")
            )
            prior = PriorConfig(**fields.pop("prior"))
            fields["lambda_range"] = tuple(fields["lambda_range"])
            return Config(stages=stages, prior=prior, **fields)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise WeightsError(f"not a model configuration: {error}") from None
