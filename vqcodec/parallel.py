"""Batches of tiles in several threads: while one is with the range coder, the networks of others run.

The range coder holds Python's lock, the kernels of torch do not. Threads also use the processors better than operators
that are each split among them: kernels for a tile are too short for that to pay.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

import torch

from vqcodec import caller, spans

ON_CUDA = 2  # threads: one waits for the range coder while the other launches kernels
T = TypeVar("T")


class Each(Protocol):
    """Calls a function for each of some batches, in any order, and returns when all calls have."""

    def __call__(self, work: Callable[[T], None], batches: Sequence[T]) -> None: ...


@contextlib.contextmanager
def threads(device: torch.device, most: int) -> Iterator[Each]:
    """Start threads that share the processors that torch may use.

    If a call raises an exception, those that have not begun are left out, and the exception is raised.

    Args:
        device: that the networks run on. most: how many batches there are at most at a time.
    """
    processors = torch.get_num_threads()
    count = min(most, ON_CUDA if device.type == "cuda" else processors)
    if count <= 1:
        yield _one_by_one
        return
    pool = ThreadPoolExecutor(count, "vqcodec", torch.set_num_threads, (processors // count,))

    def each(work: Callable[[T], None], batches: Sequence[T]) -> None:
        def alone(batch: T) -> None:
            with caller.exact(device):
                work(batch)

        for _ in pool.map(spans.carried(alone), batches):
            pass

    try:
        yield each
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(processors)  # also for threads to come, whose number those of the pool have changed


def _one_by_one(work: Callable[[T], None], batches: Sequence[T]) -> None:
    for batch in batches:
        work(batch)
