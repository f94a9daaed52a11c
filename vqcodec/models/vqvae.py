"""The hierarchical VQ-VAE: pixels -> latents per level, codes -> pixels (Razavi et al. 2019, "VQ-VAE-2").

    encoder                                   decoder
    pixels                                    pixels
      | unshuffle, 1x1, blocks   stride 4       ^ blocks, 1x1, shuffle
      | unshuffle, 1x1, blocks   stride 8       ^ blocks, 1x1, shuffle
      | unshuffle, 1x1, blocks   stride 16      ^ blocks
      |------------------ z bottom ---------> estimate <- slice <- slice <- ...   (codes of z - estimate)
      | unshuffle, 1x1, blocks   stride 64      ^ 1x1, shuffle, blocks
      '------------------ z top ------------> estimate <- slice <- slice <- 0

A level's estimate starts from the coarser level, or from zero at the coarsest. Before each slice of code planes,
residual blocks refine the estimate from everything decoded so far. The slice then codes the difference between the
latents and the estimate in its channels, divided by a quantiser step that depends on the quality. All of this works on
floats; only code indices reach the prior.

The 1x1 convolutions are the linear part of the model. Training initialises them as a hierarchical Karhunen-Loeve
transform, and the last layer of every residual block as zero.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional

from vqcodec.models.config import Config, StageConfig
from vqcodec.models.layers import STRIP, Condition, Lap, Linear1x1, ResidualBlock
from vqcodec.models.pixels import Renderer, SeparableLap
from vqcodec.models.quantizer import Codebook

# Pixels are centred and scaled to about unit range; latents are orthonormal combinations of such pixels.
PIXEL_CENTRE, PIXEL_SCALE = 128.0, 64.0
# Initial quantiser steps, in usual steps. Entropy-constrained choice prefers larger steps than plain rounding.
START_STEP = 1.5
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
        self.lap = self._new_lap(config, finer)
        self.analysis = Linear1x1(inputs, config.channels)
        self.encoder = nn.ModuleList([ResidualBlock(config) for _ in range(config.encoder_blocks)])
        self.decoder = nn.ModuleList([ResidualBlock(config) for _ in range(config.decoder_blocks)])
        self.synthesis = Linear1x1(config.channels, inputs)
        self.unlap = self._new_lap(config, finer)
        self.renderer = Renderer(config.channels, config.renderer, config.stride) if config.renderer else None

    @staticmethod
    def _new_lap(config: StageConfig, finer: StageConfig | None) -> Lap | SeparableLap | None:
        if not config.lapped:
            return None
        return Lap(config.stride // finer.stride, finer.channels) if finer else SeparableLap(config.stride)

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
        return finer if self.renderer is None else self.renderer(finer, x, cond.unit)

    def linear(self, x: Tensor) -> Tensor:
        """The linear part of `synthesise`."""
        finer = functional.pixel_shuffle(self.synthesis(x), self.ratio)
        return finer if self.unlap is None else self.unlap(finer)


class SliceQuantizer(nn.Module):
    """Refinement blocks, steps and codebooks of one slice of code planes, which covers channels `start` to `stop`."""

    def __init__(self, config: Config, stage: StageConfig, index: int) -> None:
        super().__init__()
        piece = stage.slices[index]
        self.start = sum(s.channels for s in stage.slices[:index])
        self.stop = self.start + piece.channels
        self.planes, self.dim = piece.planes, piece.dim
        # The estimate of the very first slice is zero: there is nothing to refine.
        first = stage is config.levels[0] and index == 0
        self.refine = None if first else ResidualBlock(stage)
        more = 0 if first else stage.refine_blocks - 1
        self.further = nn.ModuleList([ResidualBlock(stage) for _ in range(more)])
        self.codebook = Codebook(piece, config.codebook)
        steps = START_STEP * usual_step(config, torch.arange(KNOTS, dtype=torch.float32) / (KNOTS - 1))
        self.log_steps = nn.Parameter(steps.log()[:, None].repeat(1, piece.planes))

    def blocks(self) -> list[ResidualBlock]:
        """The residual blocks that refine the estimate before the slice is coded."""
        return [block for block in (self.refine, *self.further) if isinstance(block, ResidualBlock)]

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
        return Condition(basis, self.config.residual_unit * usual_step(self.config, t))

    def analyse(self, pixels: Tensor, quality: Tensor) -> list[Tensor]:
        """Encode pixels to latents.

        Args:
            pixels: float (B, 3, H, W), 0..255, H and W multiples of `Config.multiple`. quality: (B,), 1..100.

        Returns:
            For each level, coarse first, float (B, C, h, w).
        """
        return self.encode(self.transform(pixels), quality)

    def transform(self, pixels: Tensor) -> Tensor:
        """The first step of `analyse`, linear and local: pixels -> (B, C, h, w) of the finest stage."""
        return self.stage(0).analyse((pixels - PIXEL_CENTRE) / PIXEL_SCALE)

    def encode(self, x: Tensor, quality: Tensor) -> list[Tensor]:
        """The other steps of `analyse`: what `transform` gives, which is overwritten -> the latents of every level."""
        cond = self.condition(quality)
        latents = []
        for index, config in enumerate(self.config.stages):
            stage = self.stage(index)
            x = stage.encode(stage.analyse(x) if index else x, cond)
            if config.slices:
                latents.append(x)
        return latents[::-1]

    def refine(self, level: int, index: int, estimate: Tensor, quality: Tensor, overwrite: bool = False) -> Tensor:
        """Refine the estimate of a level's latents, float (B, C, h, w), before slice `index` is coded.

        overwrite: whether the result may take its place in memory.
        """
        cond = self.condition(quality)
        for block in self.slice(level, index).blocks():
            estimate = block(estimate, cond, overwrite)
        return estimate

    def descend(self, level: int, estimate: Tensor, quality: Tensor) -> Tensor:
        """Decode a level's final estimate, float (B, C, h, w).

        Returns:
            The first estimate of the next finer level; from the finest level pixels (B, 3, H, W), 0..255, not clipped.
        """
        if level == len(self.config.levels) - 1:
            return self.render(self.features(estimate, quality), quality)
        return self._decode(self._below(level), estimate, quality)

    def features(self, estimate: Tensor, quality: Tensor, scale: int = 1) -> Tensor:
        """The first steps of `descend` from the finest level: its estimate -> features of `last_stage`.

        Its residual blocks add detail. They are left out where a pixel of the smaller picture stands for a position,
        and at the smallest scale, where they matter least and cost most.
        """
        last = self.last_stage(scale)
        stages = [index for index in self._below(len(self.config.levels) - 1) if index > last]
        x = self._decode(stages, estimate, quality)
        if scale == SMALLEST or self.config.stages[last].stride == scale:
            return x
        return self.stage(last).decode(x, self.condition(quality))

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

    def last_stage(self, scale: int) -> int:
        """The finest stage that matters for a picture reduced by `scale`, at most the finest level's stride."""
        return next(index for index, config in enumerate(self.config.stages) if config.stride >= scale)

    def reduced(self, scale: int) -> Tensor:
        """The linear decoder from the features of `last_stage(scale)` on, followed by means of scale x scale pixels.

        It leaves out what residual blocks and renderers of finer stages add, which is detail, for the most part.

        Returns:
            A kernel, float (3 n n, C, 3, 3), where n is the stage's stride over `scale`; features need a border of 1.
            The channels of its result are in the order of `pixel_shuffle`. Laps reach into neighbours, not beyond.
        """
        last = self.last_stage(scale)
        channels, side = self.config.stages[last].channels, self.config.stages[last].stride // scale
        weight = self.stage(last).synthesis.weight
        x = torch.zeros(channels, channels, 3, 3, dtype=weight.dtype, device=weight.device)
        x[range(channels), range(channels), 1, 1] = 1
        for index in range(last, -1, -1):
            x = self.stage(index).linear(x)
        response = functional.avg_pool2d(x, scale).reshape(channels, 3, 3, side, 3, side)
        # A position's neighbour below responds to it as it responds to its neighbour above.
        return response.flip(2, 4).permute(1, 3, 5, 0, 2, 4).reshape(3 * side**2, channels, 3, 3).contiguous()

    def _decode(self, stages: Iterable[int], x: Tensor, quality: Tensor) -> Tensor:
        cond = self.condition(quality)
        for index in stages:
            stage = self.stage(index)
            x = stage.synthesise(stage.decode(x, cond), cond)
        return x

    def renderer(self) -> dict[str, nn.Module]:
        """The modules, by name, that only decode the finest level's estimate to pixels: what a look replaces."""
        parts: dict[str, nn.Module] = {}
        for index in self._below(len(self.config.levels) - 1):
            stage = self.stage(index)
            for name in ("decoder", "synthesis", "unlap", "renderer"):
                part: nn.Module | None = getattr(stage, name)
                if part is not None:
                    parts[f"stages.{index}.{name}"] = part
        return parts

    def added_error(self) -> Tensor:
        """The energy that all residual blocks added in the last training pass, as a mean squared error; float (B,).

        It is the error on the 0..255 scale if all additions were noise; see `ResidualBlock.energy`.
        """
        total = torch.zeros(())
        for stage, config in zip(self.stages, self.config.stages, strict=True):
            assert isinstance(stage, Stage)
            pieces = self.level_slices(self.config.levels.index(config)) if config.slices else []
            blocks = [*stage.encoder, *stage.decoder, *(block for piece in pieces for block in piece.blocks())]
            energy = sum(block.energy for block in blocks if isinstance(block, ResidualBlock))
            total = total + energy * PIXEL_SCALE**2 / (3 * config.stride**2)
        return total

    def encoder_reach(self) -> int:
        """The reach of the encoder: how many pixels away a latent still depends on the picture."""
        return sum(c.encoder_blocks * c.stride + c.lapped * c.stride // 2 for c in self.config.stages)

    def decoder_reach(self, level: int) -> int:
        """The reach of `descend`: how many pixels away its result still depends on a position of a level's estimate."""
        stages = (self.config.stages[i] for i in self._below(level))
        return sum(c.decoder_blocks * c.stride + c.lapped * c.stride // 2 for c in stages)

    def refinement_reach(self, level: int) -> int:
        """The reach of all refinement of a level: how many pixels away its final estimate depends on its first one."""
        return sum(len(piece.blocks()) for piece in self.level_slices(level)) * self.config.levels[level].stride

    def local_reach(self) -> int:
        """The reach of `transform` and of `render`, in positions of the finest stage."""
        return int(self.config.stages[0].lapped)

    def _below(self, level: int) -> range:
        """The stages that `descend` runs, in order: from the level's own down to the next finer level, exclusive."""
        start = self.config.stages.index(self.config.levels[level])
        finer = [i for i in range(start) if self.config.stages[i].slices]
        return range(start, finer[-1] if finer else -1, -1)
