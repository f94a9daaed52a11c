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

from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from vqcodec.models.config import Config, StageConfig
from vqcodec.models.pixels import Renderer, SeparableLap
from vqcodec.models.quantizer import Codebook

# Pixels are centred and scaled to about unit range; latents are orthonormal combinations of such pixels.
PIXEL_CENTRE, PIXEL_SCALE = 128.0, 64.0
# Initial quantiser steps, in usual steps. Entropy-constrained choice prefers larger steps than plain rounding.
START_STEP = 1.5
# Factor on the energy of the mean over all positions of what a block adds (`ResidualBlock.energy`). The mean carries no
# information on the picture, but gradient noise lets it drift.
COMMON = 20.0
# Positions that a residual block processes at a time on a CPU, so that its intermediate maps fit the cache.
STRIP = 8192
# Knots of the logarithm of the quantiser step, piecewise linear over t in [0, 1].
KNOTS = 9


def usual_step(config: Config, t: Tensor) -> Tensor:
    """About the best step of a uniform quantiser at each t in [0, 1], in latent units: the usual step.

    It is proportional to 1 / sqrt(lambda). The factor was found by trial on the untrained codec.
    """
    low, high = config.lambda_range
    return (10 / low) ** 0.5 / PIXEL_SCALE * (low / high) ** (t / 2)


@dataclass(frozen=True)
class Condition:
    """The quality as the networks see it.

    Attributes:
        basis: (B, 6), Chebyshev polynomials of degree 0 to 5 at t.
        unit: (B,), scale of the outputs of residual blocks, in proportion to the usual quantiser step. They are of the
            size of the quantisation noise, orders of magnitude below the latents.
    """

    basis: Tensor
    unit: Tensor


class _Moments(torch.autograd.Function):
    """Moments of y (B, C, h, w) over positions, in float32: mean square summed over channels, (B,), and mean (B, C).

    The gradient is written by hand. Autograd's has another memory layout than y, which made a training step a sixth
    slower.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(y)
        flat = y.permute(0, 2, 3, 1).flatten(1, 2)
        length = torch.linalg.vector_norm(flat, dim=(1, 2), dtype=torch.float32)
        return length.square() / flat.shape[1], flat.mean(1, dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        square, mean = (grad.to(y.dtype) / (y.shape[2] * y.shape[3]) for grad in grads)
        return torch.addcmul(mean[:, :, None, None], y, 2 * square[:, None, None, None])


class ResidualBlock(nn.Module):
    """x + unit * 1x1(f(3x3(f(1x1(x / size))))), where the quality scales and shifts the hidden channels.

    `size` normalises the channels: the standard deviation of each, or the unit if that is larger. So a block sees weak
    channels as well as strong ones, but its output is never larger than the next block's usual input, which keeps
    chains of blocks stable. Outside training the sum is in float32, because latents are large compared to their steps.

    Attributes:
        deviation: float (C,), standard deviations of the input channels.
        energy: float (B,), set in training: mean over positions of the squares that the last call added, summed over
            channels. The part that is common to all positions counts `COMMON` times.
    """

    deviation: Tensor
    energy: Tensor

    def __init__(self, config: StageConfig) -> None:
        super().__init__()
        channels, hidden = config.channels, config.hidden
        self.register_buffer("deviation", torch.ones(channels))
        self.reduce = nn.Conv2d(channels, hidden, 1)
        self.spatial = nn.Conv2d(hidden, hidden, 3, padding=1, groups=config.groups)
        self.expand = nn.Conv2d(hidden, channels, 1)
        self.quality = nn.Linear(6, 2 * hidden)
        for weight in (self.expand.weight, self.expand.bias, self.quality.weight, self.quality.bias):
            assert weight is not None
            nn.init.zeros_(weight)

    def forward(self, x: Tensor, cond: Condition) -> Tensor:
        """x: float (B, C, h, w); the result has the same shape."""
        if len(x) == 1 and not self.training:
            return self._of_one(x, cond)
        gain, shift = self.quality(cond.basis)[:, :, None, None].chunk(2, 1)
        size = torch.maximum(self.deviation, cond.unit[:, None])
        y = functional.leaky_relu(self.reduce(x * (1 / size)[:, :, None, None].to(x.dtype)), 0.1)
        y = functional.leaky_relu(torch.addcmul(shift, self.spatial(y), 1 + gain), 0.1)
        y = self.expand(y)
        if self.training:
            energy, mean = _Moments.apply(y)  # type: ignore[no-untyped-call]
            common = (cond.unit[:, None] * mean).mean(0).square().sum()
            self.energy = cond.unit.square() * energy + (COMMON - 1) * common
        return x + (cond.unit[:, None, None, None] * y).to(x.dtype)

    def _of_one(self, x: Tensor, cond: Condition) -> Tensor:
        """`forward` for one picture, with the modulation folded into the kernels.

        Without gradients a CPU processes strips of rows that fit the cache, which is twice as fast at stride 4.
        """
        gain, shift = self.quality(cond.basis)[0].chunk(2)
        reduce = self.reduce.weight / torch.maximum(self.deviation, cond.unit)[:, None, None]
        spatial = self.spatial.weight * (1 + gain)[:, None, None, None]
        expand = self.expand.weight * cond.unit
        assert self.spatial.bias is not None and self.expand.bias is not None
        spatial_bias, expand_bias = self.spatial.bias * (1 + gain) + shift, self.expand.bias * cond.unit

        def added(start: int, stop: int) -> Tensor:
            above = min(start, 1)
            y = functional.conv2d(x[:, :, start - above : stop + 1], reduce, self.reduce.bias)
            y = functional.conv2d(
                functional.leaky_relu_(y, 0.1), spatial, spatial_bias, padding=1, groups=self.spatial.groups
            )
            y = functional.leaky_relu_(y[:, :, above : above + stop - start], 0.1)
            return functional.conv2d(y, expand, expand_bias)

        if torch.is_grad_enabled() or x.is_cuda:
            return x + added(0, x.shape[2])
        out = torch.empty_like(x)
        rows = max(1, STRIP // x.shape[3])
        for start in range(0, x.shape[2], rows):
            strip = slice(start, min(start + rows, x.shape[2]))
            torch.add(x[:, :, strip], added(strip.start, strip.stop), out=out[:, :, strip])
        return out


class Linear1x1(nn.Linear):
    """A 1x1 convolution without bias, in float32 whatever autocast says, except in training.

    In training the error of bfloat16, a quarter of a pixel level, is small compared to that of the quantisers.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and torch.is_autocast_enabled(x.device.type):
            y = functional.linear(x.permute(0, 2, 3, 1), self.weight)
        else:
            with torch.autocast(x.device.type, enabled=False):
                y = functional.linear(x.float().permute(0, 2, 3, 1), self.weight)
        return y.permute(0, 3, 1, 2)  # channels-last in memory


class Lap(nn.Module):
    """x + a linear map of blocks of `ratio` x `ratio` positions, which are half a block off those of the stage's KLT.

    Applied before the analysis, and inverted after the synthesis, it turns a block transform into a lapped transform
    (Tran, Liang & Tu 2003, "Lapped transform via time-domain pre- and post-filtering"). The outermost half blocks are
    left as they are.
    """

    def __init__(self, ratio: int, channels: int) -> None:
        super().__init__()
        self.ratio = ratio
        self.change = Linear1x1(channels * ratio**2, channels * ratio**2)
        nn.init.zeros_(self.change.weight)

    def macs_per_pixel(self, positions: int) -> float:
        """Multiply-accumulate operations per picture pixel, for blocks of `positions` pixels."""
        return self.change.weight.numel() / positions

    def forward(self, x: Tensor) -> Tensor:
        if min(x.shape[2:]) <= self.ratio:
            return x  # all of it is outermost
        half = self.ratio // 2
        blocks = functional.pixel_unshuffle(x[:, :, half:-half, half:-half], self.ratio)
        return x + functional.pad(functional.pixel_shuffle(self.change(blocks), self.ratio), (half, half, half, half))


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
        """The linear part of `encode`: (B, C', h * ratio, w * ratio) -> (B, C, h, w)."""
        x = x if self.lap is None else self.lap(x)
        y: Tensor = self.analysis(functional.pixel_unshuffle(x, self.ratio))
        return y

    def encode(self, x: Tensor, cond: Condition) -> Tensor:
        """The next finer stage's features (B, C', h * ratio, w * ratio), or pixels, -> (B, C, h, w)."""
        x = self.analyse(x)
        for block in self.encoder:
            x = block(x, cond)
        return x

    def decode(self, x: Tensor, cond: Condition) -> Tensor:
        """(B, C, h, w) -> the next finer stage's features (B, C', h * ratio, w * ratio), or pixels."""
        for block in self.decoder:
            x = block(x, cond)
        finer = functional.pixel_shuffle(self.synthesis(x), self.ratio)
        finer = finer if self.unlap is None else self.unlap(finer)
        return finer if self.renderer is None else self.renderer(finer, x, cond.unit)


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
        steps = START_STEP * usual_step(config, torch.arange(KNOTS) / (KNOTS - 1))
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
        basis = torch.stack([torch.cos(n * angles) for n in range(6)], 1)
        return Condition(basis, self.config.residual_unit * usual_step(self.config, t))

    def analyse(self, pixels: Tensor, quality: Tensor) -> list[Tensor]:
        """Encode pixels to latents.

        Args:
            pixels: float (B, 3, H, W), 0..255, H and W multiples of `Config.multiple`. quality: (B,), 1..100.

        Returns:
            For each level, coarse first, float (B, C, h, w).
        """
        cond = self.condition(quality)
        x = (pixels - PIXEL_CENTRE) / PIXEL_SCALE
        latents = []
        for stage, config in zip(self.stages, self.config.stages, strict=True):
            assert isinstance(stage, Stage)
            x = stage.encode(x, cond)
            if config.slices:
                latents.append(x)
        return latents[::-1]

    def refine(self, level: int, index: int, estimate: Tensor, quality: Tensor) -> Tensor:
        """Refine the estimate of a level's latents, float (B, C, h, w), before slice `index` is coded."""
        cond = self.condition(quality)
        for block in self.slice(level, index).blocks():
            estimate = block(estimate, cond)
        return estimate

    def descend(self, level: int, estimate: Tensor, quality: Tensor) -> Tensor:
        """Decode a level's final estimate, float (B, C, h, w).

        Returns:
            The first estimate of the next finer level; from the finest level pixels (B, 3, H, W), 0..255, not clipped.
        """
        cond = self.condition(quality)
        x = estimate
        for index in self._below(level):
            x = self.stage(index).decode(x, cond)
        finest = level == len(self.config.levels) - 1
        return x * PIXEL_SCALE + PIXEL_CENTRE if finest else x

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

    def _below(self, level: int) -> range:
        """The stages that `descend` runs, in order: from the level's own down to the next finer level, exclusive."""
        start = self.config.stages.index(self.config.levels[level])
        finer = [i for i in range(start) if self.config.stages[i].slices]
        return range(start, finer[-1] if finer else -1, -1)

    def macs_per_pixel(self) -> dict[str, float]:
        """Multiply-accumulate operations per picture pixel of the "encoder", the "refinement" and the "decoder"."""

        def once(*modules: nn.Module | None) -> int:
            convs = (c for m in modules if m for c in m.modules() if isinstance(c, nn.Conv2d | Linear1x1))
            return sum(c.weight.numel() for c in convs)

        found = dict.fromkeys(("encoder", "refinement", "decoder"), 0.0)
        for index, config in enumerate(self.config.stages):
            stage, positions = self.stage(index), config.stride**2
            laps = 0 if stage.lap is None else stage.lap.macs_per_pixel(positions)
            found["encoder"] += once(stage.encoder, stage.analysis) / positions + laps
            found["decoder"] += once(stage.decoder, stage.synthesis) / positions + laps
            if stage.renderer is not None:
                found["decoder"] += stage.renderer.macs_per_pixel()
        for level, config in enumerate(self.config.levels):
            found["refinement"] += once(*self.level_slices(level)) / config.stride**2
        return found


ModuleT = TypeVar("ModuleT", bound=nn.Module)


def channels_last(module: ModuleT, device: torch.device) -> ModuleT:
    """Move a module to a device, with kernels in channels-last memory, which is several times faster on CPUs."""
    return module.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
