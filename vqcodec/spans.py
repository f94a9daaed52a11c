"""Timing of the codec's stages: the code names them with `span`, and `collect` adds up the seconds of each.

>>> with collect() as seconds:
...     with span("prior"), span("range coder"):
...         pass
>>> sorted(seconds)
['prior', 'range coder']
"""

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from contextvars import ContextVar
from types import TracebackType
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

_NOTHING: AbstractContextManager[None] = contextlib.nullcontext()


class _Collector:
    """Adds up seconds by name. `inner` is the time spent in spans nested within the open one."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.seconds: dict[str, float] = {}
        self.inner = 0.0
        self.lock = threading.Lock()

    def add(self, name: str, seconds: float) -> None:
        with self.lock:
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds


class _Span:
    def __init__(self, collector: _Collector, name: str) -> None:
        self.collector, self.name = collector, name

    def __enter__(self) -> None:
        self.inner_before, self.collector.inner = self.collector.inner, 0.0
        self.start = self.collector.clock()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        collector = self.collector
        elapsed = collector.clock() - self.start
        own = elapsed - collector.inner
        collector.add(self.name, own)
        collector.inner = self.inner_before + elapsed


_collector: ContextVar[_Collector | None] = ContextVar("vqcodec.spans", default=None)


def span(name: str) -> AbstractContextManager[None]:
    """Count the time of the body under a name if a `collect` is open; else do nothing.

    Time counts for the innermost open span only, so the seconds of all names add up to the time spent in spans.
    """
    collector = _collector.get()
    return _NOTHING if collector is None else _Span(collector, name)


def timed(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator that makes every call of the function a `span`."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            with span(name):
                return function(*args, **kwargs)

        return call

    return decorate


def carried(function: Callable[P, None]) -> Callable[P, None]:
    """A function for other threads, whose spans there count for the `collect` that is open here.

    The seconds of threads that run at one time add up.
    """
    collector = _collector.get()
    if collector is None:
        return function

    def call(*args: P.args, **kwargs: P.kwargs) -> None:
        with collect(collector.clock) as own:
            function(*args, **kwargs)
        for name, seconds in own.items():
            collector.add(name, seconds)

    return call


@contextlib.contextmanager
def collect(clock: Callable[[], float] = time.perf_counter) -> Iterator[dict[str, float]]:
    """Collect the seconds of the spans that this thread enters in the body.

    Spans within a nested `collect` count there only.

    Args:
        clock: returns the time in seconds. GPU work is asynchronous: to time it, pass a function that synchronises with
            the GPU before it reads the clock.

    Yields:
        Seconds by name, updated while the body runs, in the order in which spans of these names first ended.
    """
    collector = _Collector(clock)
    token = _collector.set(collector)
    try:
        yield collector.seconds
    finally:
        _collector.reset(token)
