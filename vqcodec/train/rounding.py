"""Rounding and a logistic distribution in the place of codebooks and prior: what a run begins with.

The usual quantiser of neural codecs (Balle et al. 2018, "Variational image compression with a scale hyperprior"): a step of training costs half
as much, and transforms, estimates and steps learn for the rate without waiting for a prior that learns as well. Rates
are of values with uniform noise, distortion is of rounded ones (Minnen & Singh 2020, "Channel-wise autoregressive entropy models", section 3.3).
Codebooks start as integers, so that they can take over at any time. Nothing can be compressed with it.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from vqcodec.models.config import Config, StageConfig
from vqcodec.models.model import Estimate, Slice, levels_of, walk
from vqcodec.models.quantizer import MOST_BITS
from vqcodec.models.vqvae import VQVAE, Condition

# In quantiser steps, of a distribution: below, all but nothing is a 0 anyway.
LEAST_SCALE = 0.03
# A logistic distribution of scale 1 has this standard deviation.
LOGISTIC_DEVIATION = math.pi / 3**0.5


class Scale(nn.Module):
    """How far latents of one slice are from their estimate, given the estimate of all channels."""

    deviation: Tensor

    def __init__(self, stage: StageConfig, outputs: int) -> None:
        super().__init__()
        self.register_buffer("deviation", torch.ones(stage.channels))
        self.usual = nn.Parameter(torch.zeros(outputs))  # log, in latent units
        self.reduce = nn.Conv2d(stage.channels, stage.hidden, 1)
        self.spatial = nn.Conv2d(stage.hidden, stage.hidden, 3, padding=1)
        self.quality = nn.Linear(6, 2 * stage.hidden)
        self.out = nn.Conv2d(stage.hidden, outputs, 1)
        for part in (self.quality, self.out):
            nn.init.zeros_(part.weight)
            assert part.bias is not None
            nn.init.zeros_(part.bias)

    def forward(self, estimate: Tensor, cond: Condition) -> Tensor:
        """(B, C, h, w) -> log of the scale of the slice's channels, latent units."""
        gain, shift = self.quality(cond.basis)[:, :, None, None].chunk(2, 1)
        y = functional.leaky_relu(self.reduce(estimate / self.deviation[:, None, None]), 0.1)
        y = functional.leaky_relu(torch.addcmul(shift, self.spatial(y), 1 + gain), 0.1)
        return self.out(y).float() + self.usual[:, None, None]


class Rounding(nn.Module):
    """The scales of all slices."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.levels = nn.ModuleList(
            [nn.ModuleList([Scale(stage, piece.channels) for piece in stage.slices]) for stage in config.levels]
        )

    def log_scale(self, piece: Slice, estimate: Tensor, cond: Condition) -> Tensor:
        """As of `Scale`, for a slice."""
        scale: Tensor = self.levels[piece.level][piece.index](estimate, cond)  # type: ignore[index]
        return scale

    @torch.no_grad()
    def start_from_pictures(self, vqvae: VQVAE, pixels: Tensor) -> None:
        """Scales for transforms as they are, untrained or trained, from training crops (B, 3, H, W), 0..255."""
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


def round_off(v: Tensor, scale: Tensor, weight: Tensor, bias: float | Tensor, noisy: bool) -> tuple[Tensor, Tensor]:
    """Integers for v, and the bits they cost.

    Of the nearest integer and the next one towards zero, the one of less weight * squared error + bias * bits: what
    codebooks will choose by (quantizer.py).

    Args:
        v: float32, in steps, less its mean. scale: of the logistic distribution, in steps. weight: bits per unit of squared
            error in steps. bias: how much of the bits counts. noisy: whether bits are those of v with uniform noise, with a gradient.

    Returns:
        integers, and bits; both of the shape of v.
    """
    scale = scale.clamp(min=LEAST_SCALE)
    with torch.no_grad():
        near = v.round()
        less = near - near.sign()
        saved = _bits(near, scale) - _bits(less, scale)
        chosen = torch.where(bias * saved > weight * ((v - less).square() - (v - near).square()), less, near)
    return chosen, _bits(v + torch.rand_like(v) - 0.5 if noisy else chosen, scale)


def _bits(at: Tensor, scale: Tensor) -> Tensor:
    """Of the interval of length 1 about a point of the logistic distribution."""
    distance = at.abs()  # the upper tail, where differences of small numbers are exact
    mass = torch.sigmoid((0.5 - distance) / scale) - torch.sigmoid((-0.5 - distance) / scale)
    return -torch.log2(mass.clamp(min=2**-MOST_BITS))
