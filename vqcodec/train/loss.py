"""VQ-VAE and prior together: the rate-distortion loss that both are trained on.

loss = bits per pixel + lambda(quality) * distortion        (per picture, on the scale of squared errors of 0..255)

The distortion is the squared error, or half of it how different the pictures look: see distortion.py.

A second look of the same codes learns on squared error and a perceptual distance, and is kept from wallpaper (`pattern`).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from vqcodec.models.config import Config
from vqcodec.models.model import Context, Estimate, Follower, Slice, levels_of, walk
from vqcodec.models.prior import Prior
from vqcodec.models.quantizer import Codebook, Rates, grid, rows
from vqcodec.models.vqvae import VQVAE
from vqcodec.train.codebooks import update_averages
from vqcodec.train.distortion import Distortion
from vqcodec.train.quantise import quantise
from vqcodec.train.rounding import Rounding, round_off

# At an optimum the loss grows about as lambda^0.4 or lambda^0.5; this exponent lets all qualities count alike.
BALANCE = 0.4
# Weight of the estimate's squared error, in units of the distortion that it would be without any code.
ESTIMATE_WEIGHT = 0.1
# Weights beside them in another look: of the perceptual distance, and of `pattern`, as distortion.
PERCEPTUAL_WEIGHT, PATTERN_WEIGHT = 8.0, 64.0
# Over how many periods each way a pattern is sought.
PATTERN_PERIODS = 8
# Weight of all that residual blocks add, as if it were distortion: what is useful gains fifty times as much.
ADDED_WEIGHT = 0.02


@dataclass
class Losses:
    """What one forward pass yields; tensors (B,) are detached. Where only the prior learns there is no picture, and what
    depends on it is nan.

    Attributes:
        total: scalar to minimise.
        level_bits: (B, levels), bits of each level's codes, coarse first.
        bpp: bits per pixel of each picture. mse: squared error of each, 0..255 scale.
        cost: bpp + lambda * mse of each.
        perceptual: perceptual distance of each; nan if it is not part of the loss.
        reconstruction: pixels (B, 3, H, W), float, not clipped.
    """

    total: Tensor
    level_bits: Tensor
    bpp: Tensor
    mse: Tensor
    cost: Tensor
    perceptual: Tensor
    reconstruction: Tensor


class RateDistortion(nn.Module):
    """The whole codec as one differentiable function; of new networks, or of those given.

    Args:
        visual_share: of the visual distance in the distortion, 0..1.
    """

    def __init__(
        self, config: Config, vqvae: VQVAE | None = None, prior: Prior | None = None, visual_share: float = 0.0
    ) -> None:
        super().__init__()
        self.config = config
        self.vqvae = vqvae or VQVAE(config)
        self.prior = prior or Prior(config)
        self.levels = levels_of(self.vqvae, self.prior)
        self.distortion = Distortion(visual_share)
        # Set, and called for instead of codebooks and prior, in the first part of a run.
        self.rounding: Rounding | None = None
        # Called with every codebook and its vectors, float (N, P, D), before they are quantised: k-means start, revival.
        self.maintain: Callable[[Codebook, Tensor], object] | None = None
        # A distance of pictures (B, 3, H, W) in 0..255, restored and original, -> (B,): part of the loss of another look.
        self.perceptual: Callable[[Tensor, Tensor], Tensor] | None = None

    def forward(self, pixels: Tensor, quality: Tensor, rate_weight: float | Tensor = 1.0) -> Losses:
        """One pass of encoder, quantisers, prior and decoder.

        Args:
            pixels: float (B, 3, H, W), 0..255, H and W multiples of `Config.multiple`.
            quality: float or int (B,), 1..100.
            rate_weight: weight of the rate in the loss and in the choice of codes; below 1 while warming up. If the rate is
                learned after the rest (`Config.rate`), 0 leaves the prior out and any other weight leaves only the prior.
        """
        height, width = pixels.shape[2:]
        t = (quality.float() - 1) / 99
        low, high = self.config.lambda_range
        weight = low * (high / low) ** t
        balance = (weight / (low * high) ** 0.5) ** -BALANCE
        nothing = torch.zeros((), device=pixels.device)
        bits = torch.zeros(len(pixels), len(self.config.levels), device=pixels.device)
        run = _Pass(
            quality, balance, rate_weight, self._only_prior(rate_weight), height * width, bits, nothing, nothing
        )
        latents = [z.float() for z in self.vqvae.analyse(pixels, quality)]
        estimate, context = Estimate(self.vqvae, quality, height, width), Context(quality, height, width)
        followers: tuple[Follower, ...] = (estimate,) if self.rounding is not None else (estimate, context)
        for piece in walk(self.levels, *followers):
            z = latents[piece.level]
            importance = piece.error_weight(weight[:, None], quality).float()
            if self.rounding is not None:
                log_scale = self.rounding.log_scale(piece, estimate.values, self.vqvae.condition(quality))
                v = self._round(run, piece, estimate, z, importance, log_scale)
            else:
                v = self._quantise(run, piece, estimate, context, z, importance)
            estimate.add(v)
        bpp = bits.sum(1) / (height * width)
        if run.only_prior and self.training:
            unknown = torch.full_like(bpp, math.nan)
            return Losses(run.rate, bits, bpp, unknown, unknown, unknown, torch.full_like(pixels, math.nan))
        reconstruction = estimate.pixels()
        mse = (reconstruction - pixels).square().mean((1, 2, 3))
        # Only in training: validation looks at pictures as they are restored.
        distortion = self.distortion(reconstruction, pixels, quality) if self.training else mse
        loss = run.loss + (balance * weight * distortion).mean()
        distance = torch.full_like(mse, math.nan)
        if self.perceptual is not None:
            distance = self.perceptual(reconstruction, pixels)
            loss = loss + PERCEPTUAL_WEIGHT * distance.mean()
            repeated = pattern(reconstruction - pixels, self.config.stages[0].stride)
            loss = loss + PATTERN_WEIGHT * (balance * weight * repeated).mean()
        elif self.training:
            # What the encoder adds and the estimate predicts costs no bits, and the decoder can take it back: nothing else
            # keeps all of them from growing without end.
            loss = loss + ADDED_WEIGHT * (balance * weight * self.vqvae.added_error()).mean()
        total = run.rate if run.only_prior else run.rate + loss
        mse, distance = mse.detach(), distance.detach()
        return Losses(total, bits, bpp, mse, bpp + weight * mse, distance, reconstruction)

    def _only_prior(self, rate_weight: float | Tensor) -> bool:
        """Whether nothing but the prior and its rate model learns: codes are all that it needs of pictures."""
        if self.config.rate == "after":
            return bool(rate_weight > 0)
        renderer = self.vqvae.renderer().values()
        return self.training and not any(p.requires_grad for part in renderer for p in part.parameters())

    def _round(
        self, run: "_Pass", piece: Slice, estimate: Estimate, latents: Tensor, importance: Tensor, log_scale: Tensor
    ) -> Tensor:
        """What the decoder gets of one slice by `Rounding`: integers, in steps, with a straight-through gradient.

        Args: as of `_quantise`. log_scale: of the slice's channels, latent units.
        """
        v = estimate.residual(latents)
        wide = importance.repeat_interleave(piece.config.dim, 1)[:, :, None, None]
        bias = self.config.choice_bias * run.rate_weight
        chosen, spent = round_off(v, log_scale.exp() / estimate.scale, wide, bias, self.training)
        run.spend(piece.level, spent.sum((1, 2, 3)))
        return v + (chosen - v).detach()

    def _quantise(
        self, run: "_Pass", piece: Slice, estimate: Estimate, context: Context, latents: Tensor, importance: Tensor
    ) -> Tensor:
        """The same by codebook and prior.

        Args:
            latents: of the level, (B, C, h, w). importance: (B, P), bits per unit of squared error in steps.
        """
        book, prior, config = piece.codebook, piece.prior, piece.config
        assert prior is not None
        v = estimate.residual(latents)
        batch, _, h, w = v.shape
        flat = rows(v, config.planes)
        if self.maintain is not None:
            self.maintain(book, flat.detach())
        nearest = book.nearest(flat).reshape(batch, h, w, -1) if prior.at_once else None
        for one in context.passes(nearest):
            here = v[(slice(None), slice(None), *one.places)]
            sought = rows(here, config.planes)
            if self.config.rate == "after" and not run.only_prior:
                shape = sought.shape[:2]
                model = Rates(sought.new_zeros(*shape, config.parameters - 1), sought.new_zeros(shape))
            else:
                model = piece.rates(one.parameters)
            count = here.shape[2] * here.shape[3]
            share = (run.balance * run.rate_weight / (batch * run.area)).repeat_interleave(count)
            importances = importance.repeat_interleave(count, 0)
            bias = self.config.choice_bias * run.rate_weight
            rate, one.codes, spent = quantise(
                book, sought.detach() if run.only_prior else sought, model, importances, bias, share
            )
            run.rate = run.rate + rate
            run.bits[:, piece.level] += spent.reshape(batch, -1).sum(1)
        indices = context.codes.reshape(-1, config.planes)
        chosen = book.lookup(indices)
        scaled = run.balance[:, None] * importance / (batch * run.area)  # (B, P)
        # The straight-through gradient to the estimate is zero: what is added behind the quantiser was taken
        # away before it. Without a loss of its own the estimate drifts, and codes go along, until they saturate.
        gap = (latents[:, piece.channels].detach() - estimate.here) / estimate.scale.detach()
        wide = scaled.repeat_interleave(config.dim, 1)[:, :, None, None]
        run.loss = run.loss + ESTIMATE_WEIGHT * (wide * gap.square()).sum()
        # Codebook and commitment loss, van den Oord et al. 2017, eq. 3, second and third term.
        scaled = scaled.repeat_interleave(h * w, 0)[..., None]
        if book.learn == "gradient":
            run.loss = run.loss + (scaled * (flat.detach() - chosen).square()).sum()
        if self.config.commitment:
            run.loss = run.loss + self.config.commitment * (scaled * (flat - chosen.detach()).square()).sum()
        if self.training and not run.only_prior:
            update_averages(book, flat.detach(), indices)
        # Straight-through: the decoder sees the code, the encoder gets the decoder's gradient.
        return grid(flat + (chosen - flat).detach(), batch, h, w)


def pattern(error: Tensor, period: int) -> Tensor:
    """How much of an error is a texture that repeats: the only one that a decoder can make where codes say nothing, and a perceptual distance
    likes any better than none.

    Args:
        error: (B, 3, H, W), restored less original. period: in pixels, a divisor of H and W.

    Returns:
        (B,): mean square of what is alike, up to its mean, in all periods of a neighbourhood; of white noise 1/64.
    """
    periods = functional.pixel_unshuffle(error, period)
    alike = functional.avg_pool2d(periods, PATTERN_PERIODS, ceil_mode=True).reshape(len(error), 3, period**2, -1)
    return (alike - alike.mean(2, keepdim=True)).square().mean((1, 2, 3))


@dataclass
class _Pass:
    """One forward pass: what holds for all slices, and what they add to.

    Attributes:
        quality: (B,). balance: (B,), what each picture's part of the loss is multiplied by. rate_weight: as of `forward`.
        only_prior: whether nothing else learns. area: pixels of a picture.
        bits: (B, levels), spent so far, no gradient. rate, loss: scalars, the loss of the rate and of estimates and codebooks.
    """

    quality: Tensor
    balance: Tensor
    rate_weight: float | Tensor
    only_prior: bool
    area: int
    bits: Tensor
    rate: Tensor
    loss: Tensor

    def spend(self, level: int, bits: Tensor) -> None:
        """Count the bits of a slice, (B,)."""
        self.rate = self.rate + (self.balance * bits).mean() * self.rate_weight / self.area
        self.bits[:, level] += bits.detach()
