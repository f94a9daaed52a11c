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
from vqcodec.models.prior import Prior, rates
from vqcodec.models.quantizer import Codebook, Rates, grid, look_up, rows
from vqcodec.models.vqvae import PIXEL_SCALE, VQVAE, Slice
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
        batch, _, height, width = pixels.shape
        t = (quality.float() - 1) / 99
        low, high = self.config.lambda_range
        weight = low * (high / low) ** t
        balance = (weight / (low * high) ** 0.5) ** -BALANCE
        nothing = torch.zeros((), device=pixels.device)
        bits = torch.zeros(batch, len(self.config.levels), device=pixels.device)
        run = _Pass(
            quality, balance, rate_weight, self._only_prior(rate_weight), height * width, bits, nothing, nothing
        )
        state = estimate = None
        latents = self.vqvae.analyse(pixels, quality)
        for level, z in enumerate(latents):
            z = z.float()
            h, w = z.shape[2:]
            estimate = torch.zeros_like(z) if estimate is None else self.vqvae.descend(level - 1, estimate, quality)
            if self.rounding is None:
                state = self.prior.level(level).begin(state, quality, batch, h, w)
            for index, piece in enumerate(self.vqvae.level_slices(level)):
                estimate = self.vqvae.refine(level, index, estimate, quality).float()
                steps = piece.steps(quality)  # (B, P)
                scale = steps.repeat_interleave(piece.dim, 1)[:, :, None, None]
                importance = (weight[:, None] * (steps.detach() * PIXEL_SCALE) ** 2 / 3).float()
                part = slice(piece.start, piece.stop)
                target = _Target(level, index, piece, z[:, part], estimate[:, part], scale, importance)
                if self.rounding is not None:
                    log_scale = self.rounding.log_scale(level, index, estimate, self.vqvae.condition(quality))
                    v = self._round(run, target, log_scale)
                else:
                    assert state is not None
                    v, state = self._quantise(run, target, state)
                decoded = estimate[:, part] + v * scale
                estimate = torch.cat([estimate[:, : piece.start], decoded, estimate[:, piece.stop :]], 1)
        bpp = bits.sum(1) / (height * width)
        if run.only_prior and self.training:
            unknown = torch.full_like(bpp, math.nan)
            return Losses(run.rate, bits, bpp, unknown, unknown, unknown, torch.full_like(pixels, math.nan))
        assert estimate is not None
        reconstruction = self.vqvae.descend(len(latents) - 1, estimate, quality).float()
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

    def _round(self, run: "_Pass", target: "_Target", log_scale: Tensor) -> Tensor:
        """What the decoder gets of one slice, in steps, by `Rounding`: integers, with a gradient passed straight through."""
        v, dim = target.residual(), target.piece.dim
        wide = target.importance.repeat_interleave(dim, 1)[:, :, None, None]
        bias = self.config.choice_bias * run.rate_weight
        chosen, spent = round_off(v, log_scale.exp() / target.scale, wide, bias, self.training)
        spent = spent.sum((1, 2, 3))
        run.rate = run.rate + (run.balance * spent).mean() * run.rate_weight / run.area
        run.bits[:, target.level] += spent.detach()
        return v + (chosen - v).detach()

    def _quantise(self, run: "_Pass", target: "_Target", state: Tensor) -> tuple[Tensor, Tensor]:
        """The same by codebook and prior, and the prior's state (B, C, h, w) after the slice."""
        piece, book, importance = target.piece, target.piece.codebook, target.importance
        part = self.prior.level(target.level).slice(target.index)
        state, context = part.prepare(state, run.quality)
        v = target.residual()
        batch, _, h, w = v.shape
        flat = rows(v, piece.planes)
        if self.maintain is not None:
            self.maintain(book, flat.detach())
        table = book.inputs()
        indices = torch.zeros(batch, h, w, piece.planes, dtype=torch.int64, device=v.device)
        known = torch.zeros(batch, table.shape[0] * table.shape[2], h, w, device=v.device)
        if part.at_once:
            known = grid(look_up(table, book.nearest(flat)), batch, h, w)
        for number, places in part.passes(h, w):
            at = (slice(None), slice(None), *places)
            here = v[at]
            sought = rows(here, piece.planes)
            if self.config.rate == "after" and not run.only_prior:
                shape = sought.shape[:2]
                model = Rates(sought.new_zeros(*shape, part.piece.parameters - 1), sought.new_zeros(shape))
            else:
                model = rates(part.parameters_at(number, context, known), piece.dim)
            count = here.shape[2] * here.shape[3]
            share = (run.balance * run.rate_weight / (batch * run.area)).repeat_interleave(count)
            importances = importance.repeat_interleave(count, 0)
            bias = self.config.choice_bias * run.rate_weight
            rate, k, spent = quantise(
                book, sought.detach() if run.only_prior else sought, model, importances, bias, share
            )
            run.rate = run.rate + rate
            run.bits[:, target.level] += spent.reshape(batch, -1).sum(1)
            indices[:, places[0], places[1]] = k.reshape(batch, here.shape[2], here.shape[3], -1)
            known = known.clone()
            known[at] = grid(look_up(table, k), batch, here.shape[2], here.shape[3])
        chosen = book.lookup(indices.reshape(-1, piece.planes))
        scaled = run.balance[:, None] * importance / (batch * run.area)  # (B, P)
        # The straight-through gradient to the estimate is zero: what is added behind the quantiser was taken
        # away before it. Without a loss of its own the estimate drifts, and codes go along, until they saturate.
        gap = (target.latents.detach() - target.estimate) / target.scale.detach()
        wide = scaled.repeat_interleave(piece.dim, 1)[:, :, None, None]
        run.loss = run.loss + ESTIMATE_WEIGHT * (wide * gap.square()).sum()
        # Codebook and commitment loss, van den Oord et al. 2017, eq. 3, second and third term.
        scaled = scaled.repeat_interleave(h * w, 0)[..., None]
        if book.learn == "gradient":
            run.loss = run.loss + (scaled * (flat.detach() - chosen).square()).sum()
        if self.config.commitment:
            run.loss = run.loss + self.config.commitment * (scaled * (flat - chosen.detach()).square()).sum()
        if self.training and not run.only_prior:
            update_averages(book, flat.detach(), indices.reshape(-1, piece.planes))
        # Straight-through: the decoder sees the code, the encoder gets the decoder's gradient.
        straight = grid(flat + (chosen - flat).detach(), batch, h, w)
        return straight, part.update(state, known)


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


@dataclass
class _Target:
    """What one slice has to code.

    Attributes:
        level, index: of the slice. piece: its steps and codebook.
        latents, estimate: of its channels, (B, P D, h, w). scale: (B, P D, 1, 1), steps in latent units.
        importance: (B, P), bits per unit of squared error in steps, no gradient.
    """

    level: int
    index: int
    piece: Slice
    latents: Tensor
    estimate: Tensor
    scale: Tensor
    importance: Tensor

    def residual(self) -> Tensor:
        """In steps."""
        return (self.latents - self.estimate) / self.scale
