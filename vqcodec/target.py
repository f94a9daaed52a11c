"""Targets: the quality at which a file comes to a size, or a picture to a PSNR or SSIMULACRA2.

All of these grow with the quality, the logarithm of the size and the others nearly linearly, so a secant needs few
probes; the bracket around the target makes sure that it ends.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from vqcodec.errors import TargetError

LOWEST, HIGHEST = 1, 100


@dataclass(frozen=True)
class _Measure:
    """slope: what one step of quality adds, about. tolerance: how far the ends of the range may be from a target."""

    slope: float
    tolerance: float
    text: str


# Of the file size the logarithm is looked at.
MEASURES = {
    "size": _Measure(0.034, math.log(1.02), "{:,.0f} bytes"),
    "bpp": _Measure(0.034, math.log(1.02), "{:.4f} bits per pixel"),
    "psnr": _Measure(0.12, 0.1, "{:.2f} dB PSNR"),
    "ssimulacra2": _Measure(0.9, 1.0, "SSIMULACRA2 {:.1f}"),
}


@dataclass(frozen=True)
class Target:
    """What a file should come to, as nearly as whole qualities allow.

    Attributes:
        measure: "size" (bytes of the file), "bpp" (its bits per pixel), "psnr" (dB over R, G and B) or "ssimulacra2".
        value: the number wanted; positive, except for SSIMULACRA2, which is below 100.

    Raises:
        ValueError: no such measure, or a value out of range.
    """

    measure: str
    value: float

    def __post_init__(self) -> None:
        if self.measure not in MEASURES:
            raise ValueError(f"measure must be one of {', '.join(MEASURES)}, got {self.measure!r}")
        below = 100 if self.measure == "ssimulacra2" else math.inf
        above = -math.inf if self.measure == "ssimulacra2" else 0
        if not above < self.value < below:
            raise ValueError(f"{self.measure} must be above {above} and below {below}, got {self.value!r}")

    def find(self, measure: Callable[[int], float]) -> int:
        """The quality whose measure is nearest to the value.

        Args:
            measure: what a quality comes to; called a few times.

        Raises:
            TargetError: even the lowest or the highest quality misses the value.
        """
        kind = MEASURES[self.measure]
        logarithmic = self.measure in ("size", "bpp")
        scale = math.log if logarithmic else float
        goal = scale(self.value)
        low, high, found = bracket(lambda quality: scale(measure(quality)), goal, kind.slope, (LOWEST + HIGHEST) // 2)
        quality = min((q for q in (low, high) if q in found), key=lambda q: abs(found[q] - goal))
        if not abs(found[quality] - goal) <= kind.tolerance and (low < LOWEST or high > HIGHEST):
            reached = kind.text.format(math.exp(found[quality]) if logarithmic else found[quality])
            raise TargetError(f"no quality comes to {kind.text.format(self.value)}: {quality} gives {reached}")
        return quality


def largest_within(size: Callable[[int], int], limit: int, top: int = HIGHEST) -> int:
    """The best quality up to `top` whose file has at most `limit` bytes.

    Args:
        size: bytes of the file at a quality; called a few times.

    Raises:
        TargetError: every file is larger.
    """
    excess = math.log(size(top) / limit)
    if excess <= 0:
        return top
    slope = MEASURES["size"].slope
    guess = top - math.ceil(excess / slope)
    low, _, found = bracket(lambda quality: math.log(size(quality)), math.log(limit), slope, guess, top)
    if low < LOWEST:
        raise TargetError(f"no file has at most {limit:,} bytes: quality {LOWEST} takes {math.exp(found[LOWEST]):,.0f}")
    return low


def bracket(
    measure: Callable[[int], float], goal: float, slope: float, guess: int, top: int = HIGHEST
) -> tuple[int, int, dict[int, float]]:
    """Neighbouring qualities around a goal.

    Args:
        measure: grows with the quality, nearly linearly; called once for each quality that is looked at. goal: its value
            wanted. slope: what one step adds, about. guess: where to begin. top: the highest quality.

    Returns:
        (low, high, found): low + 1 == high; what was measured at low is at most the goal, at high above it. LOWEST - 1 and
        top + 1 stand for values out of reach. found: all values measured.
    """
    low, high = LOWEST - 1, top + 1
    found: dict[int, float] = {}
    while high - low > 1:
        guess = min(max(guess, low + 1), high - 1)
        value = found[guess] = measure(guess)
        low, high = (guess, high) if value <= goal else (low, guess)
        if low in found and high in found and math.isfinite(found[high]):
            step = (high - low) / (found[high] - found[low])
            guess = low + round((goal - found[low]) * step)
        elif math.isfinite(value):
            guess += round((goal - value) / slope)
        else:
            guess = (low + high) // 2
    return low, high, found
