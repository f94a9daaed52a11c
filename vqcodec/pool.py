"""A pool of processes, each of which may die alone. Standard library only.

`concurrent.futures.ProcessPoolExecutor` gives up as a whole when one of its processes dies, as happens when memory runs
out. Here that costs the task of this process, and another process takes its place.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing import connection, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any, Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")

_SPAWN = multiprocessing.get_context("spawn")  # the threads of torch do not survive a fork


@dataclass(frozen=True)
class Lost:
    """Stands for the answer to a task whose process died; `reason` says how."""

    reason: str


@dataclass
class _Worker(Generic[T]):
    process: SpawnProcess
    connection: "Connection[Any, Any]"
    task: T

    def do(self, task: T) -> None:
        self.task = task
        with contextlib.suppress(OSError):  # of a process that is dead, as the next look at its connection shows
            self.connection.send(task)

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


def cores() -> int:
    """How many processor cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def each(
    function: Callable[[T], R], tasks: Iterable[T], count: int, *, begin: Callable[[], None]
) -> Generator[tuple[T, R | Lost]]:
    """Answer tasks in spawned processes, which end with the iterator (close it if it is left early).

    Args:
        function: answers a task; may be killed at any time and must not raise. It, `begin`, tasks and answers are
            pickled.
        tasks: what to give to it.
        count: the largest number of processes.
        begin: called once in each process, before its first task.

    Yields:
        Each task with its answer, in the order in which they come.
    """
    waiting = deque(tasks)
    workers: list[_Worker[T]] = []
    try:
        while waiting or workers:
            while waiting and len(workers) < count:
                try:
                    worker = _start(function, begin, waiting[0])
                except OSError as error:
                    if workers:  # they do the rest
                        count = len(workers)
                    else:
                        yield waiting.popleft(), Lost(f"no process could be started: {error.strerror}")
                else:
                    workers.append(worker)
                    worker.do(waiting.popleft())
            ready = connection.wait([worker.connection for worker in workers]) if workers else []
            for worker in [worker for worker in workers if worker.connection in ready]:
                task, answer = worker.task, _answer(worker)
                if waiting and not isinstance(answer, Lost):
                    worker.do(waiting.popleft())
                else:
                    workers.remove(worker)
                    worker.end()
                yield task, answer
    finally:
        for worker in workers:
            worker.end()


def _answer(worker: _Worker[Any]) -> Any:
    """The answer that a process has sent, or Lost if it has died."""
    try:
        return worker.connection.recv()
    except (EOFError, OSError):
        worker.process.join()
    code = worker.process.exitcode or 0
    if code < 0:
        return Lost(f"its process was killed by signal {-code}" + (", maybe for lack of memory" if code == -9 else ""))
    return Lost(f"its process ended with exit code {code}")


def _start(function: Callable[[T], R], begin: Callable[[], None], first: T) -> _Worker[T]:
    """Start a process.

    Raises:
        OSError: the system starts no more of them.
    """
    ours, theirs = _SPAWN.Pipe()
    process = _SPAWN.Process(target=_serve, args=(theirs, function, begin), daemon=True)
    with _interrupts_blocked():
        process.start()
    theirs.close()  # so that `ours` ends when the process does
    return _Worker(process, ours, first)


def _serve(asked: "Connection[Any, Any]", function: Callable[[Any], Any], begin: Callable[[], None]) -> None:
    """What a process does: answer tasks until it is killed, or until its parent dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes of a terminal: the parent acts on it
    threading.Thread(target=_end_with_parent, daemon=True).start()
    begin()
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            asked.send(function(asked.recv()))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@contextlib.contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Let processes that start in the body inherit that SIGINT is blocked, or it would stop their start noisily."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # else the first process starts it, which unblocks SIGINT
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
