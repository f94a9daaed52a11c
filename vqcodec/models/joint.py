"""VQ-VAE and prior together: the rate-distortion loss that both are trained on.

loss = bits per pixel + lambda(quality) * squared error        (per picture, squared error on the 0..255 scale)

A second look of the same codes learns on squared error and a perceptual distance.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vqcodec.models.config import Config
from vqcodec.models.prior import Prior, rates
from vqcodec.models.quantizer import Codebook, Rates, grid, look_up, rows
from vqcodec.models.rounding import Rounding, round_off
from vqcodec.models.vqvae import PIXEL_SCALE, VQVAE, Slice

# At an optimum the loss grows about as lambda^0.4 or lambda^0.5; this exponent lets all qualities count alike.
BALANCE = 0.4
# Weight of the estimate's squared error, in units of the distortion that it would be without any code.
ESTIMATE_WEIGHT = 0.1
# Weight of the perceptual distance beside them.
PERCEPTUAL_WEIGHT = 2.0
# Weight of all that residual blocks add, as if it were distortion: what is useful gains fifty times as much.
ADDED_WEIGHT = 0.02


@dataclass
class Losses:
    """What one forward pass yields; tensors (B,) are detached.

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
    """The whole codec as one differentiable function; of new networks, or of those given."""

    def __init__(self, config: Config, vqvae: VQVAE | None = None, prior: Prior | None = None) -> None:
        super().__init__()
        self.config = config
        self.vqvae = vqvae or VQVAE(config)
        self.prior = prior or Prior(config)
        # Set, and called for instead of codebooks and prior, in the first part of a run.
        self.rounding: Rounding | None = None
        # Called with every codebook and its vectors, float (N, P, D), before they are quantised: k-means start, revival.
        self.maintain: Callable[[Codebook, Tensor], object] | None = None
        # A distance of pictures (B, 3, H, W) in 0..255, restored and original, -> (B,): part of the loss of another look.
        self.perceptual: Callable[[Tensor, Tensor], Tensor] | None = None

    def forward(self, pixels: Tensor, quality: Tensor, rate_weight: float = 1.0) -> Losses:
        """One pass of encoder, quantisers, prior and decoder.

        Args:
            pixels: float (B, 3, H, W), 0..255, H and W multiples of `Config.multiple`.
            quality: float or int (B,), 1..100.
            rate_weight: weight of the rate in the loss and in the choice of codes; below 1 while warming up. If the rate is
                learned after the rest (`Config.rate`), 0 leaves the prior out and any other weight leaves only the prior.
        """
        after = self.config.rate == "after"
        only_prior = after and rate_weight > 0
        bias = self.config.choice_bias * rate_weight
        batch, _, height, width = pixels.shape
        t = (quality.float() - 1) / 99
        low, high = self.config.lambda_range
        weight = low * (high / low) ** t
        balance = (weight / (low * high) ** 0.5) ** -BALANCE
        bits = torch.zeros(batch, len(self.config.levels), device=pixels.device)
        loss, rates_loss = torch.zeros((), device=pixels.device), torch.zeros((), device=pixels.device)
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
                book = piece.codebook
                steps = piece.steps(quality)  # (B, P)
                scale = steps.repeat_interleave(piece.dim, 1)[:, :, None, None]
                v = (z[:, piece.start : piece.stop] - estimate[:, piece.start : piece.stop]) / scale
                importance = (weight[:, None] * (steps.detach() * PIXEL_SCALE) ** 2 / 3).float()  # (B, P)
                if self.rounding is not None:
                    log_scale = self.rounding.log_scale(level, index, estimate, self.vqvae.condition(quality))
                    wide = importance.repeat_interleave(piece.dim, 1)[:, :, None, None]
                    chosen, spent = round_off(v, log_scale.exp() / scale, wide, bias, self.training)
                    spent = spent.sum((1, 2, 3))
                    rates_loss = rates_loss + (balance * spent).mean() * rate_weight / (height * width)
                    bits[:, level] += spent.detach()
                    estimate = _decoded(estimate, piece, v + (chosen - v).detach(), scale)
                    continue
                assert state is not None
                part = self.prior.level(level).slice(index)
                state, context = part.prepare(state, quality)
                flat = rows(v, piece.planes)
                if self.maintain is not None:
                    self.maintain(book, flat.detach())
                table = book.inputs()
                indices = torch.zeros(batch, h, w, piece.planes, dtype=torch.int64, device=z.device)
                known = torch.zeros(batch, table.shape[0] * table.shape[2], h, w, device=z.device)
                if part.at_once:
                    known = grid(look_up(table, book.nearest(flat)), batch, h, w)
                for number, places in part.passes(h, w):
                    at = (slice(None), slice(None), *places)
                    here = v[at]
                    target = rows(here, piece.planes)
                    if after and not only_prior:
                        model = Rates(
                            target.new_zeros(*target.shape[:2], piece.dim + 2), target.new_zeros(target.shape[:2])
                        )
                    else:
                        model = rates(part.parameters_at(number, context, known))
                    count = here.shape[2] * here.shape[3]
                    share = (balance * rate_weight / (batch * height * width)).repeat_interleave(count)
                    importances = importance.repeat_interleave(count, 0)
                    if only_prior:
                        target = target.detach()
                    rate, k, spent = book.quantise(target, model, importances, bias, share)
                    rates_loss = rates_loss + rate
                    bits[:, level] += spent.reshape(batch, -1).sum(1)
                    indices[:, places[0], places[1]] = k.reshape(batch, here.shape[2], here.shape[3], -1)
                    known = known.clone()
                    known[at] = grid(look_up(table, k), batch, here.shape[2], here.shape[3])
                chosen = book.lookup(indices.reshape(-1, piece.planes))
                scaled = (balance[:, None] * importance).repeat_interleave(h * w, 0) / (batch * height * width)
                # The straight-through gradient to the estimate is zero: what is added behind the quantiser was taken
                # away before it. Without a loss of its own the estimate drifts, and codes go along, until they saturate.
                gap = z.detach()[:, piece.start : piece.stop] - estimate[:, piece.start : piece.stop]
                wide = scaled.reshape(batch, -1, piece.planes)[:, 0].repeat_interleave(piece.dim, 1)[:, :, None, None]
                loss = loss + ESTIMATE_WEIGHT * (wide * (gap / scale.detach()).square()).sum()
                # Codebook and commitment loss, van den Oord et al. 2017, eq. 3, second and third term.
                if book.learn == "gradient":
                    loss = loss + (scaled[..., None] * (flat.detach() - chosen).square()).sum()
                if self.config.commitment:
                    gap = (flat - chosen.detach()).square()
                    loss = loss + self.config.commitment * (scaled[..., None] * gap).sum()
                if self.training and not only_prior:
                    book.update_averages(flat.detach(), indices.reshape(-1, piece.planes))
                # Straight-through: the decoder sees the code, the encoder gets the decoder's gradient.
                straight = grid(flat + (chosen - flat).detach(), batch, h, w)
                estimate = _decoded(estimate, piece, straight, scale)
                state = part.update(state, known)
        assert estimate is not None
        reconstruction = self.vqvae.descend(len(latents) - 1, estimate, quality).float()
        mse = (reconstruction - pixels).square().mean((1, 2, 3))
        loss = loss + (balance * weight * mse).mean()
        distance = torch.full_like(mse, math.nan)
        if self.perceptual is not None:
            distance = self.perceptual(reconstruction, pixels)
            loss = loss + PERCEPTUAL_WEIGHT * distance.mean()
        elif self.training:
            # What the encoder adds and the estimate predicts costs no bits, and the decoder can take it back: nothing else
            # keeps all of them from growing without end.
            loss = loss + ADDED_WEIGHT * (balance * weight * self.vqvae.added_error()).mean()
        total = rates_loss if only_prior else rates_loss + loss
        bpp = bits.sum(1) / (height * width)
        mse, distance = mse.detach(), distance.detach()
        return Losses(total, bits, bpp, mse, bpp + weight * mse, distance, reconstruction)


def _decoded(estimate: Tensor, piece: Slice, v: Tensor, scale: Tensor) -> Tensor:
    """The estimate (B, C, h, w) with the vectors of one slice, in steps, added to its channels."""
    decoded = estimate[:, piece.start : piece.stop] + v * scale
    return torch.cat([estimate[:, : piece.start], decoded, estimate[:, piece.stop :]], 1)
