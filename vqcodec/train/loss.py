"""The rate-distortion loss that VQ-VAE and prior are trained on.

    loss = bits per pixel + lambda(quality) * distortion        (for each picture)

The distortion is on the scale of the mean squared error of pixels in 0..255. It is the squared error alone or a mixture
of squared error and visual distance (distortion.py).

A look learns on squared error and a perceptual distance. Penalties keep it from inventing texture (`pattern`) and from
changing colours (`colour`).
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
from vqcodec.models.quantizer import Codebook, grid, rows
from vqcodec.models.rates import RowRates
from vqcodec.models.vqvae import VQVAE
from vqcodec.train.codebooks import update_averages
from vqcodec.train.distortion import Distortion
from vqcodec.train.quantise import quantise
from vqcodec.train.rounding import Rounding, round_off

# A picture's loss is multiplied by lambda^-BALANCE. At the optimum losses grow about as lambda^0.4 to lambda^0.5, so
# all qualities get about the same weight.
BALANCE = 0.4
# Weight of the estimate's squared error, relative to the distortion that it would cause without any codes.
ESTIMATE_WEIGHT = 0.1
# In the loss of a look: weight of the perceptual distance, of `colour`, and of `pattern` relative to distortion.
PERCEPTUAL_WEIGHT, COLOUR_WEIGHT, PATTERN_WEIGHT = 8.0, 0.1, 64.0
COLOUR_SIDES = (4, 8, 16, 32)  # of the squares whose mean colours are compared, in pixels
PATTERN_PERIODS = 8  # side of the neighbourhood in which a pattern is sought, in periods
# The energy that residual blocks add is penalised at 0.5 % of the distortion weight; without it training diverges.
ADDED_WEIGHT = 0.005


@dataclass
class Losses:
    """The results of one forward pass.

    Only `total` and `reconstruction` have gradients. If only the prior learns, nothing is decoded, and what depends on
    pixels is nan.

    Attributes:
        total: the loss to minimise, a scalar.
        level_bits: (B, levels), bits of each level's codes, coarse first.
        bpp: (B,), bits per pixel.
        mse: (B,), mean squared error on the 0..255 scale.
        cost: (B,), bpp + lambda * mse.
        perceptual: (B,), perceptual distance; nan if it is not part of the loss.
        reconstruction: pixels, float (B, 3, H, W), 0..255.
    """

    total: Tensor
    level_bits: Tensor
    bpp: Tensor
    mse: Tensor
    cost: Tensor
    perceptual: Tensor
    reconstruction: Tensor


class RateDistortion(nn.Module):
    """The whole codec as one differentiable function.

    Args:
        config: of the model. vqvae, prior: networks to train; None for new ones.
        visual_share: share of the visual distance in the distortion, 0..1.

    Attributes:
        rounding: if set, used in place of codebooks and prior.
        maintain: if set, called with each codebook and its vectors, float (N, P, D), before they are quantised: for
            k-means initialisation and revival of dead codes.
        perceptual: if set, part of the loss: a distance of restored and original pictures, (B, 3, H, W) in 0..255 each,
            -> (B,).
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
        self.rounding: Rounding | None = None
        self.maintain: Callable[[Codebook, Tensor], object] | None = None
        self.perceptual: Callable[[Tensor, Tensor], Tensor] | None = None

    def forward(self, pixels: Tensor, quality: Tensor, rate_weight: float | Tensor = 1.0) -> Losses:
        """Run encoder, quantisers, prior and decoder.

        Args:
            pixels: float (B, 3, H, W), 0..255, H and W multiples of `Config.multiple`.
            quality: float or int (B,), 1..100.
            rate_weight: weight of the bits in the loss and in the choice of codes, below 1 during warm-up. If the prior
                learns after the rest (`Config.joint`), 0 trains all but the prior and any other weight only the prior.
        """
        height, width = pixels.shape[2:]
        t = (quality.float() - 1) / 99
        low, high = self.config.lambda_range
        lagrangian = low * (high / low) ** t
        balance = (lagrangian / (low * high) ** 0.5) ** -BALANCE
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
            step_cost = piece.error_weight(lagrangian[:, None], quality).float()
            if self.rounding is not None:
                log_scale = self.rounding.log_scale(piece, estimate.values, self.vqvae.condition(quality))
                v = self._round(run, piece, estimate, z, step_cost, log_scale)
            else:
                v = self._quantise(run, piece, estimate, context, z, step_cost)
            estimate.add(v)
        bpp = bits.sum(1) / (height * width)
        if run.only_prior and self.training:
            unknown = torch.full_like(bpp, math.nan)
            return Losses(run.rate, bits, bpp, unknown, unknown, unknown, torch.full_like(pixels, math.nan))
        reconstruction = estimate.pixels()
        mse = (reconstruction - pixels).square().mean((1, 2, 3))
        # Validation does without the visual distance: it measures the looks of rounded pixels on its own.
        distortion = self.distortion(reconstruction, pixels, quality) if self.training else mse
        loss = run.loss + (balance * lagrangian * distortion).mean()
        distance = torch.full_like(mse, math.nan)
        if self.perceptual is not None:
            distance = self.perceptual(reconstruction, pixels)
            loss = loss + PERCEPTUAL_WEIGHT * distance.mean() + COLOUR_WEIGHT * colour(reconstruction - pixels).mean()
            repeated = pattern(reconstruction - pixels, self.config.stages[0].stride)
            loss = loss + PATTERN_WEIGHT * (balance * lagrangian * repeated).mean()
        elif self.training:
            # What the encoder adds, the estimate can predict for no bits and the decoder can subtract again. Nothing
            # else in the loss keeps these terms from growing without bound.
            loss = loss + ADDED_WEIGHT * (balance * lagrangian * self.vqvae.added_error()).mean()
        total = run.rate if run.only_prior else run.rate + loss
        mse, distance = mse.detach(), distance.detach()
        return Losses(total, bits, bpp, mse, bpp + lagrangian * mse, distance, reconstruction)

    def _only_prior(self, rate_weight: float | Tensor) -> bool:
        """Whether only the prior and its rate model learn, so that nothing needs decoding."""
        if not self.config.joint:
            return bool(rate_weight > 0)
        renderer = self.vqvae.renderer().values()
        return self.training and not any(p.requires_grad for part in renderer for p in part.parameters())

    def _round(
        self, run: "_Pass", piece: Slice, estimate: Estimate, latents: Tensor, step_cost: Tensor, log_scale: Tensor
    ) -> Tensor:
        """Quantise one slice by `Rounding`.

        Args: as `_quantise`. log_scale: (B, P D, h, w), see `Rounding`.

        Returns:
            Integers (B, P D, h, w), in steps, with the gradient of `round_off`.
        """
        v = estimate.residual(latents)
        channel_costs = step_cost.repeat_interleave(piece.config.dim, 1)[:, :, None, None]
        rate_factor = self.config.rate_factor * run.rate_weight
        chosen, spent = round_off(v, log_scale.exp() / estimate.step, channel_costs, rate_factor)
        run.spend(piece.level, spent.sum((1, 2, 3)))
        return chosen

    def _quantise(
        self, run: "_Pass", piece: Slice, estimate: Estimate, context: Context, latents: Tensor, step_cost: Tensor
    ) -> Tensor:
        """Quantise one slice by codebook and prior.

        Args:
            run: the pass, to which bits and losses are added. piece: the slice.
            estimate, context: at the slice.
            latents: of the level, (B, C, h, w).
            step_cost: (B, P), cost of a squared step in bits.

        Returns:
            Code vectors (B, P D, h, w), in steps, with a straight-through estimator of the gradient.
        """
        book, config = piece.codebook, piece.config
        v = estimate.residual(latents)
        batch, _, h, w = v.shape
        flat = rows(v, config.planes)
        if self.maintain is not None:
            self.maintain(book, flat.detach())
        if self.config.joint:
            indices = self._choose(run, piece, context, v.detach() if run.only_prior else v, step_cost)
        else:
            indices = book.nearest(flat)
            self._learn_after(run, piece, context, indices.reshape(batch, h, w, -1))
        chosen = book.lookup(indices)
        loss_per_step = run.balance[:, None] * step_cost / (batch * run.area)  # (B, P)
        # The straight-through gradient of the estimate is zero: it is subtracted before the quantiser and added again
        # behind it. Without a loss of its own the estimate drifts, and the codes with it, until they saturate.
        gap = (latents[:, piece.channels].detach() - estimate.here) / estimate.step.detach()
        per_channel = loss_per_step.repeat_interleave(config.dim, 1)[:, :, None, None]
        run.loss = run.loss + ESTIMATE_WEIGHT * (per_channel * gap.square()).sum()
        # Codebook and commitment losses: van den Oord et al. 2017, eq. 3, second and third term.
        per_row = loss_per_step.repeat_interleave(h * w, 0)[..., None]
        if book.learn == "gradient":
            run.loss = run.loss + (per_row * (flat.detach() - chosen).square()).sum()
        if self.config.commitment:
            run.loss = run.loss + self.config.commitment * (per_row * (flat - chosen.detach()).square()).sum()
        if self.training and not run.only_prior:
            update_averages(book, flat.detach(), indices)
        # Straight-through estimator: the decoder sees the code vector, the encoder gets the decoder's gradient.
        return grid(flat + (chosen - flat).detach(), batch, h, w)

    def _choose(self, run: "_Pass", piece: Slice, context: Context, v: Tensor, step_cost: Tensor) -> Tensor:
        """Choose the codes of one slice pass by pass, and add their bits to the pass; int64 (B h w, P).

        v: (B, P D, h, w), in steps. The other arguments are those of `_quantise`.
        """
        for one in context.passes():
            here = v[(slice(None), slice(None), *one.places)]
            count = here.shape[2] * here.shape[3]
            share = (run.balance * run.rate_weight / (len(v) * run.area)).repeat_interleave(count)
            model = piece.rates(one.parameters)
            assert isinstance(model, RowRates)
            rate, one.codes, spent = quantise(
                piece.codebook,
                rows(here, piece.config.planes),
                model,
                step_cost.repeat_interleave(count, 0),
                self.config.rate_factor * run.rate_weight,
                share,
            )
            run.rate = run.rate + rate
            run.bits[:, piece.level] += spent.reshape(len(v), -1).sum(1)
        return context.take_codes().reshape(-1, piece.config.planes)

    def _learn_after(self, run: "_Pass", piece: Slice, context: Context, codes: Tensor) -> None:
        """Add the bits of given codes, int64 (B, h, w, P): the prior's if it is its turn, else of plain numbers."""
        config = piece.config
        if run.only_prior:
            (one,) = context.passes(codes)
            spent = piece.rates(one.parameters).bits(piece.codebook, codes.reshape(-1, config.planes))
            run.spend(piece.level, spent.reshape(len(codes), -1).sum(1))
        else:
            run.bits[:, piece.level] += codes[0].numel() * math.log2(config.codes)


def colour(error: Tensor) -> Tensor:
    """How far off colours are: the mean absolute error of averages over squares, over several sizes of them.

    Perceptual distances hardly see that a surface as a whole is a little paler.

    Args:
        error: float (B, 3, H, W), restored minus original.

    Returns:
        (B,).
    """
    means = (functional.avg_pool2d(error, side, ceil_mode=True) for side in COLOUR_SIDES)
    return torch.stack([mean.abs().mean((1, 2, 3)) for mean in means]).mean(0)


def pattern(error: Tensor, period: int) -> Tensor:
    """The energy of the part of an error that repeats periodically.

    Where codes carry no detail, a decoder can only add the same texture to every position, and perceptual distances
    prefer any texture to none.

    Args:
        error: float (B, 3, H, W), restored minus original. period: in pixels, a divisor of H and W.

    Returns:
        (B,): mean square of the average period over a neighbourhood of 8 x 8 periods, without its mean; about 1/64 of
        the energy of white noise.
    """
    periods = functional.pixel_unshuffle(error, period)
    alike = functional.avg_pool2d(periods, PATTERN_PERIODS, ceil_mode=True).reshape(len(error), 3, period**2, -1)
    return (alike - alike.mean(2, keepdim=True)).square().mean((1, 2, 3))


@dataclass
class _Pass:
    """One forward pass: constants of all slices, and sums over them.

    Attributes:
        quality: (B,), 1..100.
        balance: (B,), factor on each picture's loss.
        rate_weight: see `RateDistortion.forward`.
        only_prior: whether only the prior learns.
        area: number of pixels of a picture.
        bits: (B, levels), bits so far, without gradient.
        rate: scalar, the loss of the bits so far.
        loss: scalar, the losses of estimates and codebooks so far.
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
        """Add the bits of a slice, (B,), to both sums."""
        self.rate = self.rate + (self.balance * bits).mean() * self.rate_weight / self.area
        self.bits[:, level] += bits.detach()
