"""Targets: finds the setting at which a file reaches a size, or its picture a PSNR or an SSIMULACRA2.

All of these grow nearly linearly with the quality, if sizes are taken as logarithms. So a secant search needs few trial
encodings, and a bracket around the target makes sure that it ends. The emphasis then reaches values between those of
two qualities.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from vqcodec.errors import TargetError

LOWEST, HIGHEST = 1, 100
EMPHASIS_TRIALS = 3  # most trial encodings in the search for an emphasis
MOST_EMPHASIS = 0.4  # largest absolute value of its logarithm
STEP_EMPHASIS = 0.15  # logarithm of the emphasis that changes a file about as much as a step of quality
CLOSE = 0.03  # distance from the goal, in steps of quality, at which the search for an emphasis ends


class Setting(NamedTuple):
    """How a picture is encoded.

    Attributes:
        quality: 1 to 100; the file states it.
        emphasis: a factor, above 0, on the weight of the distortion when the encoder chooses codes. Decoders do not
            need it. Near 1 it costs nothing: size and distortion move along the same curve.
    """

    quality: int
    emphasis: float = 1.0


@dataclass(frozen=True)
class _Measure:
    """A property of files that a target can be set for.

    Attributes:
        slope: about how much one step of quality adds to it; for sizes, to the logarithm.
        tolerance: how far the lowest and the highest quality may miss a target, in the same unit.
        text: format of a value in error messages.
    """

    slope: float
    tolerance: float
    text: str


MEASURES = {
    "size": _Measure(0.034, math.log(1.02), "{:,.0f} bytes"),
    "bpp": _Measure(0.034, math.log(1.02), "{:.4f} bits per pixel"),
    "psnr": _Measure(0.12, 0.1, "{:.2f} dB PSNR"),
    "ssimulacra2": _Measure(0.9, 1.0, "SSIMULACRA2 {:.1f}"),
}


@dataclass(frozen=True)
class Target:
    """A size or a likeness that a file should reach.

    Attributes:
        measure: "size" (bytes of the file), "bpp" (its bits per pixel), "psnr" (dB over R, G and B) or "ssimulacra2".
        value: the number to reach: above 0, or for SSIMULACRA2 below 100.

    Raises:
        ValueError: there is no such measure, or the value is out of range.
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

    def find(self, evaluate: Callable[[Setting], float]) -> Setting:
        """Find the setting that comes closest to the value.

        Args:
            evaluate: encodes with a setting and returns the measure of the result; called a few times.

        Raises:
            TargetError: even the lowest or the highest quality misses the value.
        """
        measure = MEASURES[self.measure]
        logarithmic = self.measure in ("size", "bpp")
        transform = math.log if logarithmic else float
        goal = transform(self.value)

        def transformed(setting: Setting) -> float:
            return transform(evaluate(setting))

        low, high, found = bracket(lambda q: transformed(Setting(q)), goal, measure.slope, (LOWEST + HIGHEST) // 2)
        quality = min((q for q in (low, high) if q in found), key=lambda q: abs(found[q] - goal))
        setting, reached = fit_emphasis(transformed, quality, found[quality], goal, measure.slope)
        if not abs(reached - goal) <= measure.tolerance and (low < LOWEST or high > HIGHEST):
            end = "least" if low < LOWEST else "most"
            limit = measure.text.format(math.exp(reached) if logarithmic else reached)
            raise TargetError(f"no quality gives {measure.text.format(self.value)}: the {end} is {limit}")
        return setting


def largest_within(size: Callable[[Setting], int], limit: int, top: Setting) -> Setting:
    """Find the best setting whose file has at most `limit` bytes.

    Args:
        size: encodes with a setting and returns the bytes of the file; called a few times.
        limit: most bytes of the file.
        top: the setting to use if its file is small enough. No higher quality is tried.

    Raises:
        TargetError: every file is larger.
    """
    excess = math.log(size(top) / limit)
    if excess <= 0:
        return top
    slope, goal = MEASURES["size"].slope, math.log(limit)

    def log_size(setting: Setting) -> float:
        return math.log(size(setting))

    guess = top.quality - math.ceil(excess / slope)
    low, _, found = bracket(lambda q: log_size(Setting(q)), goal, slope, guess, top.quality)
    low = max(low, LOWEST)
    setting, reached = fit_emphasis(log_size, low, found[low], goal, slope, within=True)
    if reached > goal:
        return _smallest_within(size, limit, setting)
    return setting


def _smallest_within(size: Callable[[Setting], int], limit: int, too_large: Setting) -> Setting:
    """Find the strongest emphasis below that of `too_large` with which a file has at most `limit` bytes.

    `fit_emphasis` may miss it: small files change in steps of four bytes.

    Raises:
        TargetError: every file is larger.
    """
    quality = too_large.quality
    low, high = -MOST_EMPHASIS, math.log(too_large.emphasis)
    smallest = size(Setting(quality, math.exp(low)))
    if smallest > limit:
        raise TargetError(f"no file has at most {limit:,} bytes: the smallest has {smallest:,}")
    for _ in range(EMPHASIS_TRIALS):
        middle = (low + high) / 2
        low, high = (middle, high) if size(Setting(quality, math.exp(middle))) <= limit else (low, middle)
    return Setting(quality, math.exp(low))


def fit_emphasis(
    evaluate: Callable[[Setting], float], quality: int, value: float, goal: float, slope: float, within: bool = False
) -> tuple[Setting, float]:
    """Find the emphasis with which a quality comes closest to a goal.

    Args:
        evaluate: returns the value of a setting, which grows with the emphasis; called a few times.
        quality: the quality of all settings tried.
        value: its value at emphasis 1.
        goal: the value to reach.
        slope: about how much one step of quality adds to the value.
        within: whether to stay at or below the goal, if any value found does.

    Returns:
        (setting, value): the closest setting, with emphasis 1 if no other comes closer, and its value.
    """
    aim = goal - CLOSE * slope if within else goal
    tried = {0.0: value}  # values by the logarithm of the emphasis
    change = (aim - value) / slope * STEP_EMPHASIS
    for _ in range(EMPHASIS_TRIALS):
        if not min(abs(v - aim) for v in tried.values()) > CLOSE * slope:
            break
        change = min(max(change, -MOST_EMPHASIS), MOST_EMPHASIS)
        if change in tried:
            break
        tried[change] = evaluate(Setting(quality, math.exp(change)))
        first, second = sorted(tried, key=lambda x: abs(tried[x] - aim))[:2]
        rise = tried[second] - tried[first]
        if not math.isfinite(rise):
            break
        # Small files change in whole bytes: if the value stayed the same, the next change is twice as large.
        change = first + (aim - tried[first]) * (second - first) / rise if rise else 2 * change
    best = min(tried, key=lambda x: (within and tried[x] > goal, abs(tried[x] - goal)))
    return Setting(quality, math.exp(best)), tried[best]


def bracket(
    evaluate: Callable[[int], float], goal: float, slope: float, guess: int, top: int = HIGHEST
) -> tuple[int, int, dict[int, float]]:
    """Find the neighbouring qualities on both sides of a goal.

    Args:
        evaluate: returns the value of a quality, which grows nearly linearly; called once for each quality tried.
        goal: the value to reach.
        slope: about how much one step of quality adds to the value.
        guess: the quality to try first.
        top: the highest quality to try.

    Returns:
        (low, high, found): high is low + 1. The value at low is at most the goal, the value at high is above it. If
        there is no such quality, low is LOWEST - 1 or high is top + 1. found has the values of all qualities tried.
    """
    low, high = LOWEST - 1, top + 1
    found: dict[int, float] = {}
    leap = 1  # smallest step while one side is open: most of a file may be metadata, whose size does not change
    while high - low > 1:
        guess = min(max(guess, low + 1), high - 1)
        value = found[guess] = evaluate(guess)
        low, high = (guess, high) if value <= goal else (low, guess)
        if low in found and high in found and math.isfinite(found[high]):
            step = (high - low) / (found[high] - found[low])
            bisect = len(found) % 3 == 0  # now and then, because secants creep where the curve bends much
            guess = (low + high) // 2 if bisect else low + round((goal - found[low]) * step)
        elif math.isfinite(value):
            change = round((goal - value) / slope)
            guess += max(change, leap) if value <= goal else min(change, -leap)
            leap *= 2
        else:
            guess = (low + high) // 2
    return low, high, found
