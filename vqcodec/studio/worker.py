"""One thread that does jobs in turn, of which only the newest counts."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
Check = Callable[[], None]


class SupersededError(Exception):
    """A newer job has come, so nobody waits for this one any more."""


class Worker:
    """Does one job at a time. A new job supersedes the one that runs, and all that wait."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "vqcodec-worker")
        self._superseded = threading.Event()  # of the newest job

    def submit(self, job: Callable[[Check], T]) -> Future[T]:
        """Do a job as soon as the present one ends. Always call this from the same thread.

        Args:
            job: takes a function to call now and then, which raises SupersededError once there is a newer job.

        Returns:
            What comes of the job: a result, or an error, which is SupersededError for a job that never began.
        """
        self._superseded.set()
        self._superseded = superseded = threading.Event()

        def check() -> None:
            if superseded.is_set():
                raise SupersededError

        def work() -> T:
            check()
            return job(check)

        return self._pool.submit(work)

    def close(self) -> None:
        """Take no more jobs, and end the present one at its next check."""
        self._superseded.set()
        self._pool.shutdown(wait=False, cancel_futures=True)
