"""Scalar rounding with a logistic entropy model, in place of codebooks and prior: the first phase of training.

A training step takes half the time, and transforms, estimates and steps learn for the rate without waiting for the
prior. Scales around an estimate are those of neural codecs (Balle et al. 2018, "Variational image compression with a
scale hyperprior"), but bits and distortion are those of the integers that an encoder would choose. Bits of values with
uniform noise, by which such codecs learn, are twice as many at low qualities, because noise moves values that are
rounded to 0.

Codebooks start as integers, so they can take over at any time. Rounding is for training only: there is no file format
for it.
"""

import itertools
import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from vqcodec.models.config import Config, StageConfig
from vqcodec.models.layers import Condition
from vqcodec.models.model import Estimate, Slice, levels_of, walk
from vqcodec.models.rates import MOST_BITS
from vqcodec.models.vqvae import VQVAE

# Least scale of a distribution, in quantiser steps. Smaller scales give almost only zeros too.
LEAST_SCALE = 0.03
# Standard deviation of a logistic distribution of scale 1.
LOGISTIC_DEVIATION = math.pi / 3**0.5


class Scale(nn.Module):
    """Predicts the logistic scale of one slice's residuals from the estimate of all channels.

    Args:
        stage: of the slice's level. outputs: channels of the slice.

    Attributes:
        deviation: float (C,), standard deviations that normalise the estimate.
        usual: float (outputs,), log of the scale before training, in latent units.
    """

    deviation: Tensor

    def __init__(self, stage: StageConfig, outputs: int) -> None:
        super().__init__()
        self.register_buffer("deviation", torch.ones(stage.channels))
        self.usual = nn.Parameter(torch.zeros(outputs))
        self.reduce = nn.Conv2d(stage.channels, stage.hidden, 1)
        self.spatial = nn.Conv2d(stage.hidden, stage.hidden, 3, padding=1, groups=stage.groups)
        self.quality = nn.Linear(6, 2 * stage.hidden)
        self.out = nn.Conv2d(stage.hidden, outputs, 1)
        for part in (self.quality, self.out):
            nn.init.zeros_(part.weight)
            assert part.bias is not None
            nn.init.zeros_(part.bias)

    def forward(self, estimate: Tensor, cond: Condition) -> Tensor:
        """The estimate (B, C, h, w) -> log of the scale in latent units, float32 (B, outputs, h, w)."""
        gain, shift = self.quality(cond.basis)[:, :, None, None].chunk(2, 1)
        y = functional.leaky_relu_(self.reduce(estimate / self.deviation[:, None, None]), 0.1)
        y = functional.leaky_relu_(torch.addcmul(shift, self.spatial(y), 1 + gain), 0.1)
        return self.out(y).float() + self.usual[:, None, None]


class Rounding(nn.Module):
    """The logistic scales of all slices."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.levels = nn.ModuleList(
            [nn.ModuleList([Scale(stage, piece.channels) for piece in stage.slices]) for stage in config.levels]
        )

    def log_scale(self, piece: Slice, estimate: Tensor, cond: Condition) -> Tensor:
        """The log of the scale for a slice; see `Scale.forward`."""
        scale: Tensor = self.levels[piece.level][piece.index](estimate, cond)  # type: ignore[index]
        return scale

    @torch.no_grad()
    def start_from_pictures(self, vqvae: VQVAE, pixels: Tensor) -> None:
        """Initialise the scales for the present transforms, trained or not.

        Args:
            vqvae: the networks. pixels: training crops, float (B, 3, H, W), 0..255.
        """
        quality = torch.full((len(pixels),), 50)
        latents = vqvae.analyse(pixels, quality)
        estimate = Estimate(vqvae, quality, *pixels.shape[2:])
        for piece in walk(levels_of(vqvae), estimate):
            z = latents[piece.level]
            rest = (z[:, piece.channels] - estimate.here).square().mean((0, 2, 3)).sqrt() / LOGISTIC_DEVIATION
            scale = self.levels[piece.level][piece.index]  # type: ignore[index]
            assert isinstance(scale, Scale)
            scale.usual.copy_(rest.clamp(min=0.02).log())
            scale.deviation.copy_(z.square().mean((0, 2, 3)).sqrt().clamp(min=0.3))
            estimate.replace(z[:, piece.channels])


def round_off(v: Tensor, scale: Tensor, weight: Tensor, bias: float | Tensor) -> tuple[Tensor, Tensor]:
    """Round values by rate and distortion, and count the bits.

    Of the nearest integer and the next one towards zero, take the one of lower weight * squared error + bias * bits,
    as codebooks choose (`quantizer.Codebook.choose`).

    Args:
        v: float32, residuals in steps.
        scale: of the logistic distribution, in steps.
        weight: cost of a squared step in bits.
        bias: factor on the bits in the choice.

    Returns:
        The integers and the bits, both of the shape of v. Their gradients with respect to v are those of their means
        over a uniform dither of one step: what is chosen half a step above v, less what is chosen half a step below.
        The gradient with respect to the scale is that of the bits of the integers.
    """
    scale = scale.clamp(min=LEAST_SCALE)
    with torch.no_grad():
        x, sign = v.abs(), v.sign()
        low = x.floor()
        # Of the integers low - 1, low and low + 1.
        edges = [torch.sigmoid((side - low) / scale) for side in (1.5, 0.5, -0.5, -1.5)]
        below, here, above = (_bits_of(inner - outer) for inner, outer in itertools.pairwise(edges))
        # From where on `low` wins against the integer below it, and low + 1 against `low`.
        first = torch.where(low == 0, -1.0, low - 0.5 + bias / (2 * weight) * (here - below))
        second = low + 0.5 + bias / (2 * weight) * (above - here)
        chosen = low + torch.where(x - low < 0.5, (x >= first).float() - 1, (x >= second).float())
        rises, falls = x + 0.5 >= second, x - 0.5 < first
        jump = rises.float() + falls.float()
        added = torch.where(rises, above, here) - torch.where(falls, below, here)
    moved = v - v.detach()
    codes = chosen * sign
    return codes + jump * moved, _bits(codes, scale) + added * sign * moved


def _bits(at: Tensor, scale: Tensor) -> Tensor:
    """Bits of the unit interval around a point, under a logistic distribution about 0. All in steps."""
    distance = at.abs()  # in this tail both sigmoids are small and their difference is exact
    return _bits_of(torch.sigmoid((0.5 - distance) / scale) - torch.sigmoid((-0.5 - distance) / scale))


def _bits_of(mass: Tensor) -> Tensor:
    return -torch.log2(mass.clamp(min=2**-MOST_BITS))
