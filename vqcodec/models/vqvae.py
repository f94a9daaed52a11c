"""The hierarchical VQ-VAE: pixels -> latents per level, codes -> pixels (Razavi et al. 2019, "VQ-VAE-2").

    encoder                                   decoder
    pixels                                    pixels
      |                                         ^ renderer
      | unshuffle, 1x1, blocks   stride 16      ^ blocks, 1x1, shuffle
      |------------------ z bottom ---------> estimate <- slice <- slice <- ...   (codes of z - estimate)
      | unshuffle, 1x1, blocks   stride 64      ^ blocks, 1x1, shuffle
      '------------------ z top ------------> estimate <- slice <- slice <- 0

A level's estimate starts from the coarser level, or from zero at the coarsest. Before each slice of code planes, a
residual block refines the estimate from everything decoded so far. The slice then codes the difference between the
latents and the estimate in its channels, divided by a quantiser step that depends on the quality. All of this works on
floats; only code indices reach the prior.

The 1x1 convolutions are the linear part of the model. Training initialises them as a hierarchical Karhunen-Loeve
transform, and the last layer of every residual block as zero.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from vqcodec.models.config import CELL, CellConfig, Config, StageConfig
from vqcodec.models.layers import STRIP, Condition, Linear1x1, ResidualBlock
from vqcodec.models.pixels import CellBlocks, Renderer, SeparableLap
from vqcodec.models.quantizer import Codebook

# Pixels are centred and scaled to about unit range; latents are orthonormal combinations of such pixels.
PIXEL_CENTRE, PIXEL_SCALE = 128.0, 64.0
# Initial quantiser steps, in usual steps. Entropy-constrained choice prefers larger steps than plain rounding.
START_STEP = 1.5
# Scale of the residual blocks' outputs, in usual steps.
RESIDUAL_UNIT = 1.5
# The smallest pictures that are decoded have one pixel for SMALLEST x SMALLEST.
SMALLEST = 8
# Knots of the logarithm of the quantiser step, piecewise linear over t in [0, 1].
KNOTS = 9


def usual_step(config: Config, t: Tensor) -> Tensor:
    """About the best step of a uniform quantiser at each t in [0, 1], in latent units: the usual step.

    It is proportional to 1 / sqrt(lambda). The factor was found by trial on the untrained codec.
    """
    low, high = config.lambda_range
    return (10 / low) ** 0.5 / PIXEL_SCALE * (low / high) ** (t / 2)


class Stage(nn.Module):
    """One resolution of encoder and decoder. `ratio` is its stride divided by that of the next finer stage."""

    def __init__(self, config: StageConfig, finer: StageConfig | None) -> None:
        super().__init__()
        self.ratio = config.stride // (finer.stride if finer else 1)
        channels = finer.channels if finer else 3
        inputs = channels * self.ratio**2
        cells = config.cells or CellConfig(1, 0, 0)
        self.cell_encoder = _cell_blocks(cells.encoder_blocks, cells.hidden, cells.encoder_groups)
        self.lap = SeparableLap(config.stride) if config.lapped else None
        self.analysis = Linear1x1(inputs, config.channels)
        self.encoder = nn.ModuleList([_block(config) for _ in range(config.encoder_blocks)])
        self.decoder = nn.ModuleList([_block(config) for _ in range(config.decoder_blocks)])
        self.synthesis = Linear1x1(config.channels, inputs)
        self.unlap = SeparableLap(config.stride) if config.lapped else None
        self.cell_decoder = _cell_blocks(cells.decoder_blocks, cells.hidden, cells.decoder_groups)
        self.renderer = Renderer(config.channels, config.renderer, config.stride) if config.renderer else None

    def analyse(self, x: Tensor) -> Tensor:
        """The next finer stage's features (B, C', h * ratio, w * ratio), or pixels, -> (B, C, h, w); linear."""
        x = x if self.lap is None else self.lap(x)
        if torch.is_grad_enabled():
            y: Tensor = self.analysis(functional.pixel_unshuffle(x, self.ratio))
            return y
        rows = self.ratio * max(1, STRIP[x.device.type] // (len(x) * x.shape[3]))  # without a copy of all of x
        parts = [self.analysis(functional.pixel_unshuffle(part, self.ratio)) for part in x.split(rows, 2)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)

    def encode(self, x: Tensor, cond: Condition) -> Tensor:
        """What `analyse` gave, which may be overwritten -> the stage's features, (B, C, h, w) each."""
        for block in self.encoder:
            x = block(x, cond, overwrite=True)
        return x

    def decode(self, x: Tensor, cond: Condition) -> Tensor:
        """The stage's features, (B, C, h, w) -> what `synthesise` takes, of the same shape."""
        for number, block in enumerate(self.decoder):
            x = block(x, cond, overwrite=number > 0)
        return x

    def synthesise(self, x: Tensor, cond: Condition) -> Tensor:
        """(B, C, h, w) -> the next finer stage's features (B, C', h * ratio, w * ratio), or pixels."""
        finer = self.linear(x)
        if self.cell_decoder is not None:
            finer = self.cell_decoder(finer, cond)
        return finer if self.renderer is None else self.renderer(finer, x, cond.unit)

    def linear(self, x: Tensor) -> Tensor:
        """The linear part of `synthesise`."""
        finer = functional.pixel_shuffle(self.synthesis(x), self.ratio)
        return finer if self.unlap is None else self.unlap(finer)


def _block(config: StageConfig) -> ResidualBlock:
    return ResidualBlock(config.channels, config.hidden, config.groups)


def _cell_blocks(count: int, hidden: int, groups: int) -> CellBlocks | None:
    return CellBlocks(count, hidden, groups) if count else None


class SliceQuantizer(nn.Module):
    """Refinement, steps and codebooks of one slice of code planes, which covers channels `start` to `stop`.

    Attributes:
        refine: the residual block that refines the estimate before the slice is coded; None for the very first slice,
            whose estimate is zero.
    """

    def __init__(self, config: Config, stage: StageConfig, index: int) -> None:
        super().__init__()
        piece = stage.slices[index]
        self.start = sum(s.channels for s in stage.slices[:index])
        self.stop = self.start + piece.channels
        self.planes, self.dim = piece.planes, piece.dim
        first = stage is config.levels[0] and index == 0
        self.refine = None if first else _block(stage)
        self.codebook = Codebook(piece, config.codebook)
        steps = START_STEP * usual_step(config, torch.arange(KNOTS, dtype=torch.float32) / (KNOTS - 1))
        self.log_steps = nn.Parameter(steps.log()[:, None].repeat(1, piece.planes))

    def steps(self, quality: Tensor) -> Tensor:
        """The quantiser step of each plane in latent units, (B, P), for qualities (B,) in 1..100."""
        position = (quality.float() - 1) / 99 * (KNOTS - 1)
        low = position.long().clamp(max=KNOTS - 2)
        fraction = (position - low)[:, None]
        return torch.lerp(self.log_steps[low], self.log_steps[low + 1], fraction).exp()


class VQVAE(nn.Module):
    """Encoder, decoder and codebooks; see the module's drawing. Levels are numbered coarse first."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        finer = (None, *config.stages)
        self.stages = nn.ModuleList([Stage(s, f) for s, f in zip(config.stages, finer, strict=False)])
        self.slices = nn.ModuleList(
            [
                nn.ModuleList([SliceQuantizer(config, stage, index) for index in range(len(stage.slices))])
                for stage in config.levels
            ]
        )

    def stage(self, index: int) -> Stage:
        """Stage `index`, counted fine to coarse."""
        stage = self.stages[index]
        assert isinstance(stage, Stage)
        return stage

    def stage_of(self, level: int) -> Stage:
        """The stage of a level."""
        return self.stage(len(self.stages) - 1 - level)

    def slice(self, level: int, index: int) -> SliceQuantizer:
        """Slice `index` of a level."""
        piece = self.slices[level][index]  # type: ignore[index]
        assert isinstance(piece, SliceQuantizer)
        return piece

    def level_slices(self, level: int) -> list[SliceQuantizer]:
        """All slices of a level, in coding order."""
        return [self.slice(level, index) for index in range(len(self.config.levels[level].slices))]

    def condition(self, quality: Tensor) -> Condition:
        """The condition for qualities, int64 or float (B,), in 1..100."""
        t = (quality.float() - 1) / 99
        angles = torch.acos((2 * t - 1).clamp(-1, 1))
        basis = torch.cos(angles[:, None] * torch.arange(6, device=angles.device))
        return Condition(basis, RESIDUAL_UNIT * usual_step(self.config, t))

    def analyse(self, pixels: Tensor, quality: Tensor) -> list[Tensor]:
        """Encode pixels to latents.

        Args:
            pixels: float (B, 3, H, W), 0..255, H and W multiples of `Config.multiple`. quality: (B,), 1..100.

        Returns:
            For each level, coarse first, float (B, C, h, w).
        """
        return self.encode(self.transform(pixels, quality), quality)

    def transform(self, pixels: Tensor, quality: Tensor) -> Tensor:
        """The first step of `analyse`, which is local: pixels -> (B, C, h, w) of the finest stage."""
        stage, x = self.stage(0), (pixels - PIXEL_CENTRE) / PIXEL_SCALE
        return stage.analyse(x if stage.cell_encoder is None else stage.cell_encoder(x, self.condition(quality)))

    def encode(self, x: Tensor, quality: Tensor) -> list[Tensor]:
        """The other steps of `analyse`: what `transform` gives, which is overwritten -> the latents of every level."""
        cond = self.condition(quality)
        latents = []
        for index in range(len(self.stages)):
            stage = self.stage(index)
            x = stage.encode(stage.analyse(x) if index else x, cond)
            latents.append(x)
        return latents[::-1]

    def refine(self, level: int, index: int, estimate: Tensor, quality: Tensor, overwrite: bool = False) -> Tensor:
        """Refine the estimate of a level's latents, float (B, C, h, w), before slice `index` is coded.

        overwrite: whether the result may take its place in memory.
        """
        block = self.slice(level, index).refine
        return estimate if block is None else block(estimate, self.condition(quality), overwrite)

    def descend(self, level: int, estimate: Tensor, quality: Tensor) -> Tensor:
        """Decode a level's final estimate, float (B, C, h, w).

        Returns:
            The first estimate of the next finer level; from the finest level pixels (B, 3, H, W), 0..255, not clipped.
        """
        if level == len(self.config.levels) - 1:
            return self.render(self.features(estimate, quality), quality)
        cond, stage = self.condition(quality), self.stage_of(level)
        return stage.synthesise(stage.decode(estimate, cond), cond)

    def features(self, estimate: Tensor, quality: Tensor, scale: int = 1) -> Tensor:
        """The first step of `descend` from the finest level: its estimate -> what `render` takes.

        Its residual blocks add detail. For a smaller picture they are left out where a pixel stands for a position, and
        at the smallest scale, where they matter least and cost most.
        """
        if scale in (SMALLEST, self.config.stages[0].stride):
            return estimate
        return self.stage(0).decode(estimate, self.condition(quality))

    def render(self, features: Tensor, quality: Tensor, reduced: Tensor | None = None) -> Tensor:
        """The last step of `descend`, local: features -> pixels.

        Args:
            features: from `features`. quality: (B,), 1..100.
            reduced: the kernel of `reduced`, if the features are for a smaller picture.
        """
        if reduced is None:
            x = self.stage(0).synthesise(features, self.condition(quality))
        else:
            x = functional.conv2d(functional.pad(features, (1, 1, 1, 1), mode="replicate"), reduced)
            x = functional.pixel_shuffle(x, math.isqrt(len(reduced) // 3))
        return x * PIXEL_SCALE + PIXEL_CENTRE

    def reduced(self, scale: int) -> Tensor:
        """The linear decoder from `features` on, followed by means of scale x scale pixels.

        It leaves out what the renderer adds, which is detail, for the most part.

        Args:
            scale: at most the finest stride.

        Returns:
            A kernel, float (3 n n, C, 3, 3), where n is the finest stride over `scale`; features need a border of 1.
            The channels of its result are in the order of `pixel_shuffle`. Laps reach into neighbours, not beyond.
        """
        stage, config = self.stage(0), self.config.stages[0]
        channels, side = config.channels, config.stride // scale
        weight = stage.synthesis.weight
        x = torch.zeros(channels, channels, 3, 3, dtype=weight.dtype, device=weight.device)
        x[range(channels), range(channels), 1, 1] = 1
        response = functional.avg_pool2d(stage.linear(x), scale).reshape(channels, 3, 3, side, 3, side)
        # A position's neighbour below responds to it as it responds to its neighbour above.
        return response.flip(2, 4).permute(1, 3, 5, 0, 2, 4).reshape(3 * side**2, channels, 3, 3).contiguous()

    def renderer(self) -> dict[str, nn.Module]:
        """The modules, by name, that only decode the finest level's estimate to pixels: what a look replaces."""
        names = ("decoder", "synthesis", "unlap", "cell_decoder", "renderer")
        named = ((name, getattr(self.stage(0), name)) for name in names)
        return {f"stages.0.{name}": part for name, part in named if part is not None}

    def added_error(self) -> Tensor:
        """The energy that all residual blocks added in the last training pass, as a mean squared error; float (B,).

        It is the error on the 0..255 scale if all additions were noise; see `ResidualBlock.energy`.
        """
        total = torch.zeros(())
        for level, config in enumerate(self.config.levels):
            stage = self.stage_of(level)
            blocks = [*stage.encoder, *stage.decoder, *(piece.refine for piece in self.level_slices(level))]
            energy = sum(block.energy for block in blocks if isinstance(block, ResidualBlock))
            total = total + energy * PIXEL_SCALE**2 / (3 * config.stride**2)
            for cells in (stage.cell_encoder, stage.cell_decoder):
                if cells is not None:
                    total = total + cells.energy * PIXEL_SCALE**2 / (3 * CELL**2)
        return total

    def decoder_reach(self, level: int) -> int:
        """The reach of `descend`: how many pixels away its result still depends on a position of a level's estimate."""
        c = self.config.levels[level]
        return c.decoder_blocks * c.stride + self._local_pixels(level, decoder=True)

    def refinement_reach(self, level: int) -> int:
        """The reach of all refinement of a level: how many pixels away its final estimate depends on its first one."""
        blocks = sum(piece.refine is not None for piece in self.level_slices(level))
        return blocks * self.config.levels[level].stride

    def local_reach(self, decoder: bool) -> int:
        """The reach of `transform`, or of `render`, in positions of the finest stage."""
        pixels = self._local_pixels(len(self.config.levels) - 1, decoder)
        return -(-pixels // self.config.stages[0].stride)

    def _local_pixels(self, level: int, decoder: bool) -> int:
        """The reach in pixels of a level's lap and blocks on cells."""
        c = self.config.levels[level]
        blocks = 0 if c.cells is None else c.cells.decoder_blocks if decoder else c.cells.encoder_blocks
        return c.lapped * c.stride // 2 + CELL * blocks
