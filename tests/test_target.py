"""Targets: which setting is found, with how few probes, and what is said where there is none."""

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vqcodec.errors import TargetError
from vqcodec.target import (
    CLOSE,
    EMPHASIS_TRIALS,
    MEASURES,
    MOST_EMPHASIS,
    Setting,
    Target,
    bracket,
    fit_emphasis,
    largest_within,
)

SLOPE = MEASURES["size"].slope


class Curve:
    """Sizes that grow like the codec's, and a count of who asks; `elastic` is how strongly they follow the emphasis."""

    def __init__(self, first: float = 3000, growth: float = 0.034, bend: float = 0.0, elastic: float = 0.2) -> None:
        self.first, self.growth, self.bend, self.elastic = first, growth, bend, elastic
        self.calls = 0

    def __call__(self, setting: Setting) -> int:
        assert 1 <= setting.quality <= 100
        self.calls += 1
        x = (setting.quality - 1) / 99
        grown = math.exp(99 * self.growth * (x + self.bend * x * (1 - x)))
        return round(self.first * grown * setting.emphasis**self.elastic)


@given(st.floats(3100, 80_000), st.floats(-0.5, 0.5))
def test_the_nearest_quality_is_found_in_a_few_probes(wanted: float, bend: float) -> None:
    curve = Curve(bend=bend)
    quality = Target("size", wanted).find(curve).quality
    assert curve.calls <= 10 + EMPHASIS_TRIALS
    reached = curve(Setting(quality))
    others = [curve(Setting(q)) for q in (quality - 1, quality + 1) if 1 <= q <= 100]
    assert all(abs(math.log(reached / wanted)) <= abs(math.log(other / wanted)) + 1e-9 for other in others)


@given(st.floats(10_000, 80_000), st.floats(0.09, 0.5))
def test_what_is_between_two_qualities_is_found(wanted: float, elastic: float) -> None:
    curve = Curve(elastic=elastic)
    assert abs(curve(Target("size", wanted).find(curve)) / wanted - 1) < 0.003


def test_probes_are_few_where_the_codec_is_as_usual() -> None:
    counts = []
    for wanted in range(4000, 80_000, 4000):
        curve = Curve(growth=0.036, bend=0.2)
        Target("size", wanted).find(curve)
        counts.append(curve.calls)
    assert max(counts) <= 8 and sum(counts) / len(counts) <= 6


def test_psnr() -> None:
    found = Target("psnr", 33.3).find(lambda s: 25 + 0.12 * s.quality + math.log(s.emphasis))
    assert found.quality == 69
    assert math.log(found.emphasis) == pytest.approx(0.02, abs=CLOSE * 0.12)


@pytest.mark.parametrize(
    "measure",
    [lambda _: 5.0, lambda s: 5.0 if s.emphasis == 1 else math.inf, lambda s: 5 - abs(math.log(s.emphasis))],
    ids=["constant", "infinite", "worse"],
)
def test_an_emphasis_that_does_not_help_is_left_alone(measure: Callable[[Setting], float]) -> None:
    assert fit_emphasis(measure, 50, 5.0, 5.02, SLOPE) == (Setting(50), 5.0)


def test_emphasis_stays_small() -> None:
    asked = []

    def hardly(setting: Setting) -> float:
        asked.append(setting.emphasis)
        return 5 + 0.001 * math.log(setting.emphasis)

    for goal in (5.03, 4.97):
        fit_emphasis(hardly, 50, 5.0, goal, SLOPE)
    assert max(asked) == pytest.approx(math.exp(MOST_EMPHASIS)) and min(asked) == pytest.approx(
        math.exp(-MOST_EMPHASIS)
    )


def test_sizes_that_move_in_steps() -> None:
    def steps(setting: Setting) -> float:
        return math.log(500 + 16 * round(10 * math.log(setting.emphasis)))

    setting, reached = fit_emphasis(steps, 50, math.log(500), math.log(516), SLOPE)
    assert reached == math.log(516) == steps(setting)


@given(st.floats(0.001, 0.033), st.floats(0.05, 1.0))
def test_tuned_within(gap: float, elastic: float) -> None:
    goal, asked = 5 + gap, []

    def measure(setting: Setting) -> float:
        asked.append(5 + elastic * math.log(setting.emphasis))
        return asked[-1]

    _, reached = fit_emphasis(measure, 50, 5.0, goal, SLOPE, within=True)
    assert reached == max([5.0, *(value for value in asked if value <= goal)])


def test_a_step_over_the_goal_is_not_taken() -> None:
    assert fit_emphasis(lambda s: 6.0 if s.emphasis > 1 else 5.0, 50, 5.0, 5.02, SLOPE, within=True) == (
        Setting(50),
        5.0,
    )


@pytest.mark.parametrize(
    ("target", "line"),
    [
        (Target("size", 2000), "no quality gives 2,000 bytes: the least is 2,769 bytes"),
        (Target("size", 1e6), "no quality gives 1,000,000 bytes: the most is 94,1"),
    ],
)
def test_out_of_reach(target: Target, line: str) -> None:
    with pytest.raises(TargetError, match=line):
        target.find(Curve())


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_measure_that_is_no_number(value: float) -> None:
    with pytest.raises(TargetError, match=f"no quality gives 40.00 dB PSNR: the least is {value} dB PSNR"):
        Target("psnr", 40).find(lambda _: value)


def test_ends_count_where_they_are_close() -> None:
    assert Target("size", 2990).find(Curve()).quality == 1
    assert Target("size", 3000).find(Curve()) == Setting(1)
    assert Target("size", 88_000).find(Curve()).quality == 100


def test_constant_measure() -> None:
    low, high, _ = bracket(lambda _: 5.0, 5.0, 0.1, 50)
    assert (low, high) == (100, 101)
    assert Target("ssimulacra2", 5.0).find(lambda _: 5.0) == Setting(100)


@pytest.mark.parametrize("top", [100, 60, 2, 1])
def test_largest_within(top: int) -> None:
    curve = Curve()
    sizes = [curve(Setting(q)) for q in range(1, top + 1)]
    for limit in {3000, 3001, 10_000, sizes[-1] - 1, sizes[-1], 10**9} - set(range(3000)):
        best = largest_within(curve, limit, Setting(top))
        assert best.quality == sum(size <= limit for size in sizes)
        assert curve(best) <= limit
        assert best == Setting(top) or curve(best) >= 0.995 * limit


def test_a_target_that_is_too_large_with_its_emphasis() -> None:
    curve = Curve()
    limit = curve(Setting(60))
    assert largest_within(curve, limit, Setting(60, 1.2)) == Setting(60)


def test_less_than_the_lowest_quality_takes() -> None:
    curve = Curve()
    assert 2890 <= curve(largest_within(curve, 2900, Setting(100))) <= 2900
    assert 2890 <= curve(Target("size", 2900).find(curve)) <= 2910


@pytest.mark.parametrize("limit", [2799, 2801, 2900, 2999])
def test_a_limit_that_small_files_jump_over(limit: int) -> None:
    """Sizes move in steps of 100 bytes, so that a small change of the emphasis changes nothing."""

    def size(setting: Setting) -> int:
        return 100 * round(curve(setting) / 100)

    curve = Curve()
    if limit < 2800:
        with pytest.raises(TargetError, match=f"no file has at most {limit:,} bytes: the smallest has 2,800"):
            largest_within(size, limit, Setting(100))
    else:
        assert size(largest_within(size, limit, Setting(100))) == limit // 100 * 100


def test_nothing_within() -> None:
    with pytest.raises(TargetError, match="no file has at most 2,700 bytes: the smallest has 2,769"):
        largest_within(Curve(), 2700, Setting(100))


@pytest.mark.parametrize("wanted", [20_100, 20_500, 21_000, 22_500])
def test_probes_are_few_where_most_of_a_file_is_something_else(wanted: int) -> None:
    curve = Curve(first=100)
    assert abs(20_000 + curve(Target("size", wanted).find(lambda s: 20_000 + curve(s))) - wanted) < 0.02 * wanted
    assert curve.calls <= 15
    curve.calls = 0
    largest_within(lambda s: 20_000 + curve(s), wanted, Setting(100))
    assert curve.calls <= 15


@pytest.mark.parametrize(
    ("measure", "value", "line"),
    [
        ("weight", 1, "measure must be one of size, bpp, psnr, ssimulacra2, got 'weight'"),
        ("size", 0, "size must be above 0"),
        ("bpp", -1, "bpp must be above 0"),
        ("psnr", math.nan, "psnr must be above 0"),
        ("psnr", math.inf, "psnr must be above 0 and below inf, got inf"),
        ("ssimulacra2", 100, "ssimulacra2 must be above -inf and below 100, got 100"),
    ],
)
def test_not_a_target(measure: str, value: float, line: str) -> None:
    with pytest.raises(ValueError, match=line):
        Target(measure, value)
