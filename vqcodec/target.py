"""Targets: the setting at which a file comes to a size, or a picture to a PSNR or SSIMULACRA2.

All of these grow with the quality, the logarithm of the size and the others nearly linearly, so a secant needs few
probes; the bracket around the target makes sure that it ends. What lies between two qualities is reached by the emphasis.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from vqcodec.errors import TargetError

LOWEST, HIGHEST = 1, 100
# Probes of the emphasis at most; its largest logarithm either way, and the logarithm that moves as much as a step of quality, about.
TUNING_PROBES, MOST_EMPHASIS, STEP_EMPHASIS = 3, 0.4, 0.15
CLOSE = 0.03  # steps of quality from the goal, at which it is left alone


class Setting(NamedTuple):
    """What the encoder is asked for.

    Attributes:
        quality: 1..100, written in the file.
        emphasis: what the weight of the squared error is multiplied by when codes are chosen. Decoders need not know of it. Near 1 it costs
            nothing: size and error move along the same curve.
    """

    quality: int
    emphasis: float = 1.0


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
    """What a file should come to.

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

    def find(self, measure: Callable[[Setting], float]) -> Setting:
        """The setting whose measure comes to the value.

        Args:
            measure: what a setting comes to; called a few times.

        Raises:
            TargetError: even the lowest or the highest quality misses the value.
        """
        kind = MEASURES[self.measure]
        logarithmic = self.measure in ("size", "bpp")
        scale = math.log if logarithmic else float
        goal = scale(self.value)

        def scaled(setting: Setting) -> float:
            return scale(measure(setting))

        low, high, found = bracket(lambda q: scaled(Setting(q)), goal, kind.slope, (LOWEST + HIGHEST) // 2)
        quality = min((q for q in (low, high) if q in found), key=lambda q: abs(found[q] - goal))
        setting, reached = tune(scaled, quality, found[quality], goal, kind.slope)
        if not abs(reached - goal) <= kind.tolerance and (low < LOWEST or high > HIGHEST):
            end = "least" if low < LOWEST else "most"
            limit = kind.text.format(math.exp(reached) if logarithmic else reached)
            raise TargetError(f"no quality comes to {kind.text.format(self.value)}: the {end} is {limit}")
        return setting


def largest_within(size: Callable[[Setting], int], limit: int, top: Setting) -> Setting:
    """The best setting up to `top` whose file has at most `limit` bytes.

    Args:
        size: bytes of the file at a setting; called a few times.

    Raises:
        TargetError: every file is larger.
    """
    excess = math.log(size(top) / limit)
    if excess <= 0:
        return top
    slope, goal = MEASURES["size"].slope, math.log(limit)

    def scaled(setting: Setting) -> float:
        return math.log(size(setting))

    guess = top.quality - math.ceil(excess / slope)
    low, _, found = bracket(lambda q: scaled(Setting(q)), goal, slope, guess, top.quality)
    low = max(low, LOWEST)
    setting, reached = tune(scaled, low, found[low], goal, slope, within=True)
    if reached > goal:
        raise TargetError(f"no file has at most {limit:,} bytes: the least is {math.exp(reached):,.0f}")
    return setting


def tune(
    measure: Callable[[Setting], float], quality: int, value: float, goal: float, slope: float, within: bool = False
) -> tuple[Setting, float]:
    """The emphasis with which a quality comes nearest to a goal.

    Args:
        measure: grows with the emphasis; called a few times. value: its value without emphasis. goal, slope: as of `bracket`,
            on the scale of the measure.
        within: whether what is above the goal is only taken if nothing else was found, and then the least.

    Returns:
        The setting, without emphasis if none helps, and its measure.
    """
    aim = goal - CLOSE * slope if within else goal
    tried = {0.0: value}
    change = (aim - value) / slope * STEP_EMPHASIS
    for _ in range(TUNING_PROBES):
        if not min(abs(v - aim) for v in tried.values()) > CLOSE * slope:
            break
        change = min(max(change, -MOST_EMPHASIS), MOST_EMPHASIS)
        if change in tried:
            break
        tried[change] = measure(Setting(quality, math.exp(change)))
        first, second = sorted(tried, key=lambda x: abs(tried[x] - aim))[:2]
        rise = tried[second] - tried[first]
        if not math.isfinite(rise):
            break
        # The sizes of small files move in steps.
        change = first + (aim - tried[first]) * (second - first) / rise if rise else 2 * change
    best = min(tried, key=lambda x: (within and tried[x] > goal, abs(tried[x] - goal)))
    return Setting(quality, math.exp(best)), tried[best]


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
    leap = 1  # at least so far, while one side is open: what does not change with the quality may be most of a file
    while high - low > 1:
        guess = min(max(guess, low + 1), high - 1)
        value = found[guess] = measure(guess)
        low, high = (guess, high) if value <= goal else (low, guess)
        if low in found and high in found and math.isfinite(found[high]):
            step = (high - low) / (found[high] - found[low])
            creeps = len(found) % 3 == 0  # perhaps, where the curve is bent much: halves are safe now and then
            guess = (low + high) // 2 if creeps else low + round((goal - found[low]) * step)
        elif math.isfinite(value):
            change = round((goal - value) / slope)
            guess += max(change, leap) if value <= goal else min(change, -leap)
            leap *= 2
        else:
            guess = (low + high) // 2
    return low, high, found
