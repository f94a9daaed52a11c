"""Spans: seconds by name, each moment counted once, and nothing at all where nobody collects."""

import doctest
import threading

import pytest

from vqcodec import spans
from vqcodec.spans import collect, span


class Clock:
    """A clock that stands still until it is told to advance."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_seconds_add_up_by_name(clock: Clock) -> None:
    with collect(clock) as seconds:
        for length in (1, 2):
            with span("a"):
                clock.sleep(length)
            clock.sleep(8)
        with span("b"):
            clock.sleep(4)
    assert seconds == {"a": 3, "b": 4}


def test_each_moment_counts_for_the_innermost_span(clock: Clock) -> None:
    with collect(clock) as seconds, span("outer"):
        clock.sleep(1)
        with span("inner"):
            clock.sleep(2)
            with span("innermost"), span("outer"):
                clock.sleep(4)
            clock.sleep(8)
        with span("inner"):
            clock.sleep(16)
        clock.sleep(32)
    assert seconds == {"innermost": 0, "inner": 26, "outer": 37}


def test_an_exception_ends_a_span(clock: Clock) -> None:
    with collect(clock) as seconds, span("outer"):
        with pytest.raises(ZeroDivisionError), span("inner"):
            clock.sleep(1)
            raise ZeroDivisionError
        clock.sleep(2)
    assert seconds == {"inner": 1, "outer": 2}


def test_without_a_collector_nothing_is_made() -> None:
    assert span("a") is span("b")
    with span("a"), span("a"):
        pass
    with collect():
        assert span("a") is not span("a")
    with pytest.raises(ZeroDivisionError), collect():
        raise ZeroDivisionError
    assert span("a") is span("b")


def test_the_inner_of_two_collectors_has_its_spans_to_itself(clock: Clock) -> None:
    with collect(clock) as outer, span("a"):
        with collect(clock) as inner, span("b"):
            clock.sleep(1)
        clock.sleep(2)
    assert (outer, inner) == ({"a": 3}, {"b": 1})


def test_other_threads_are_not_collected(clock: Clock) -> None:
    def work() -> None:
        with span("a"):
            clock.sleep(1)

    with collect(clock) as seconds:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert seconds == {}


def test_example() -> None:
    found = doctest.testmod(spans)
    assert found.attempted and not found.failed
