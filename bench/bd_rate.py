"""Bjontegaard delta rate: how many bits one codec needs more or less than another at equal quality, on average.

G. Bjontegaard, "Calculation of average PSNR differences between RD-curves", VCEG-M33, 2001. The logarithm of the rate
is interpolated over quality and the mean of the difference taken over the range of qualities that both curves reach.
Instead of one cubic polynomial through four points, which swings when there are more, the interpolation is a monotone
piecewise cubic (PCHIP: F. N. Fritsch and J. Butland, SIAM J. Sci. Stat. Comput. 5, 1984), as JCT-VC's and later
reference tools do.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import PchipInterpolator

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Curve:
    """A rate-distortion curve.

    Attributes:
        rate: bits per pixel, positive, strictly rising.
        quality: any measure of which more is better, strictly rising.
    """

    rate: Array
    quality: Array

    @staticmethod
    def of(rate: Sequence[float | None], quality: Sequence[float | None]) -> "Curve | None":
        """The curve through measured points in any order.

        Points with a missing or infinite value are left out, and so is a point that costs at least as many bits as
        another one without being better: no one would use it, and a curve that turns back has no value at a given
        quality.

        Returns:
            None if fewer than two points remain.
        """
        points = [(r, q) for r, q in zip(rate, quality, strict=True) if r is not None and q is not None]
        kept: list[tuple[float, float]] = []
        for r, q in sorted((p for p in points if p[0] > 0 and np.isfinite(p).all()), key=lambda p: (p[0], -p[1])):
            if not kept or q > kept[-1][1]:
                kept.append((r, q))
        if len(kept) < 2:
            return None
        return Curve(np.array([r for r, _ in kept]), np.array([q for _, q in kept]))

    def rate_at(self, quality: Array | float) -> Array:
        """Rate in bits per pixel at a quality inside the curve's range."""
        return np.exp(self.log_rate(quality))

    def quality_at(self, rate: Array | float) -> Array:
        """Quality at a rate inside the curve's range."""
        return PchipInterpolator(np.log(self.rate), self.quality)(np.log(rate))

    @cached_property
    def log_rate(self) -> PchipInterpolator:
        """The natural logarithm of the rate as a function of the quality."""
        return PchipInterpolator(self.quality, np.log(self.rate))


@dataclass(frozen=True)
class BdRate:
    """Mean difference in rate, in percent (negative: fewer bits), over the qualities from `low` to `high`."""

    percent: float
    low: float
    high: float


def bd_rate(anchor: Curve, test: Curve, *, rates: tuple[float, float] | None = None) -> BdRate | None:
    """Rate of `test` compared with `anchor` at equal quality.

    Args:
        anchor: the curve to compare with.
        test: the curve compared.
        rates: only where `test` has a rate from rates[0] to rates[1] bits per pixel; everywhere if None.

    Returns:
        The difference and the range of qualities it was taken over; None if the curves share no range.
    """
    low = max(anchor.quality[0], test.quality[0])
    high = min(anchor.quality[-1], test.quality[-1])
    if rates is not None:
        first, last = np.clip(rates, test.rate[0], test.rate[-1])
        if first >= last:
            return None
        low, high = max(low, float(test.quality_at(first))), min(high, float(test.quality_at(last)))
    if low >= high:
        return None
    mean = (test.log_rate.integrate(low, high) - anchor.log_rate.integrate(low, high)) / (high - low)
    return BdRate(float(100 * np.expm1(mean)), float(low), float(high))
