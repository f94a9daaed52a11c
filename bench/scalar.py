"""The control of the quantiser: rounding and a Gaussian, in the place of codebooks and their rate model.

Everything else stays: transforms, estimates, contexts, steps, and the parameters that the prior puts out. It is the usual
quantiser of neural codecs (Balle et al. 2018, "Variational image compression with a scale hyperprior"; rate with uniform
noise, distortion with rounded values: Minnen & Singh 2020, "Channel-wise autoregressive entropy models", section 3.3). It shows what vector
quantisation costs or brings, per step and per minute; nothing can be compressed with it.
"""

import math

import torch
from torch import Tensor

from vqcodec.models.config import SliceConfig
from vqcodec.models.quantizer import MOST_BITS, Codebook, Rates


class RoundingBook(Codebook):
    """Codes are the integers 0, 1, -1, 2, -2, ...; planes have one dimension."""

    def __init__(self, config: SliceConfig, learn: str = "gradient", decay: float = 0.99) -> None:
        super().__init__(config, learn, decay)
        if config.dim != 1:
            raise ValueError(f"rounding works on one dimension, not on {config.dim}")
        k = torch.arange(config.codes)
        integers = (k + 1) // 2 * torch.where(k % 2 == 1, 1, -1)
        self.vectors.data = integers.float()[None, :, None].repeat(config.planes, 1, 1)
        self.vectors.requires_grad_(False)
        self.bias.requires_grad_(False)

    def quantise(
        self, v: Tensor, rates: Rates, weight: Tensor, bias: float, share: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `Codebook.quantise`; the nearest code whatever it costs, so `weight` and `bias` do not count."""
        with torch.autocast(v.device.type, enabled=False):
            v = v.float()[..., 0]
            # log2 p = drift x - square x^2 up to a constant, x = v / spread: mean and variance of a Gaussian.
            drift, square = rates.theta[..., 0].float(), -rates.theta[..., 1].float()
            mean = self.spread * drift / (2 * square)
            deviation = self.spread / torch.sqrt(2 * math.log(2) * square)
            furthest = (self.config.codes - 1) // 2
            rounded = v.detach().round().clamp(-furthest, furthest)
            loss = (share * _bits(v + torch.rand_like(v) - 0.5, mean, deviation).sum(1)).sum()
            with torch.no_grad():
                bits = _bits(rounded, mean, deviation).sum(1)
            magnitude = rounded.abs().long()
            indices = torch.where(rounded > 0, 2 * magnitude - 1, 2 * magnitude)
        return loss, indices, bits


def _bits(x: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """-log2 of the probability of the unit interval around x under a Gaussian."""
    gap = (x - mean).abs()  # the upper tail, where differences of small numbers are exact
    scale = deviation * math.sqrt(2)
    mass = (torch.erfc((gap - 0.5) / scale) - torch.erfc((gap + 0.5) / scale)) / 2
    return -torch.log2(mass.clamp(min=2**-MOST_BITS))
