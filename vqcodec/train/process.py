"""The process of a run: its device, the other processes of a distributed run, settings of the process as a whole."""

import contextlib
import ctypes
import os
import signal
import threading
import warnings
from collections.abc import Iterator
from datetime import timedelta

import torch
from torch import distributed

from vqcodec import caller, signals
from vqcodec.errors import TrainingError

MALLOC_TRIM_THRESHOLD, MALLOC_MMAP_THRESHOLD = -1, -3  # of malloc.h


@contextlib.contextmanager
def joined() -> Iterator[tuple[int, int]]:
    """Join the process group that torchrun announces, if it does.

    Yields:
        the rank of this process, and how many processes there are.
    """
    if not os.environ.keys() >= {"RANK", "WORLD_SIZE"}:
        yield 0, 1
        return
    backends = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    distributed.init_process_group(backends, timeout=timedelta(minutes=20))
    try:
        yield distributed.get_rank(), distributed.get_world_size()
    finally:
        distributed.destroy_process_group()


def device(name: str, rank: int) -> torch.device:
    """The device of a process: "auto", "cpu" or "cuda".

    Raises:
        TrainingError: there is no CUDA device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        if not torch.cuda.is_available():
            raise TrainingError("no CUDA device is available")
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", rank)))
    return torch.device(name)


def first_one(value: float, world: int, device: torch.device) -> float:
    """The value that the first of `world` processes has."""
    if world == 1:
        return value
    shared = torch.tensor([value], device=device)
    distributed.broadcast(shared, 0)
    return float(shared)


@contextlib.contextmanager
def tuned(device: torch.device, world: int, seed: int) -> Iterator[None]:
    """Settings of the process with which training is fast, and is the same whatever the caller has set.

    Afterwards they are as before, and so are the caller's random numbers.

    Args:
        device: of the run. world: number of its processes. seed: of initial weights.
    """
    with contextlib.ExitStack() as settings:
        settings.enter_context(caller.undisturbed())
        settings.enter_context(torch.autocast(device.type, enabled=False))
        settings.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        torch.manual_seed(seed)
        settings.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float32)
        settings.callback(setattr, torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)
        torch.backends.cudnn.benchmark = True  # every step has the same shapes
        settings.callback(torch.set_flush_denormal, _flushes_subnormals())
        torch.set_flush_denormal(True)  # subnormal products slow CPUs down several times and mean nothing here
        if world > 1:
            settings.enter_context(warnings.catch_warnings())
            # A 1x1 weight has the same layout under both names; DistributedDataParallel takes them for different.
            warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        yield


def _flushes_subnormals() -> bool:
    """Whether this thread takes numbers next to zero for zero."""
    return bool(torch.tensor(2e-38, dtype=torch.float32, device="cpu") * 0.1 == 0)


class Interrupted(KeyboardInterrupt):
    """A signal has ended a run, which waits in its checkpoint to be resumed.

    Attributes:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextlib.contextmanager
def held_signals() -> Iterator[list[int]]:
    """In the body, SIGINT and SIGTERM wait until somebody looks at them. A second one raises KeyboardInterrupt.

    Only the main thread can do this, and only to signals for which the caller has no handler.

    Yields:
        the numbers of the signals that came.
    """
    came: list[int] = []

    def hold(number: int, _: object) -> None:
        came.append(number)
        if len(came) > 1:
            raise KeyboardInterrupt

    usual = {signal.SIGINT: (signal.default_int_handler,), signal.SIGTERM: (signal.SIG_DFL, signals.leave)}
    with contextlib.ExitStack() as handlers:
        if threading.current_thread() is threading.main_thread():
            for number, known in usual.items():
                if (handler := signal.getsignal(number)) in known:
                    handlers.callback(signal.signal, number, handler)
                    signal.signal(number, hold)
        yield came


def keep_memory() -> None:
    """Let the process keep what it frees, for good: this is for processes that do nothing but train.

    The C library of Linux would hand large tensors back to the system, which clears their memory again at every step: a
    fifth of the time, where measured.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # of another C library, or none
        for parameter, value in ((MALLOC_MMAP_THRESHOLD, 1 << 25), (MALLOC_TRIM_THRESHOLD, (1 << 31) - 1)):
            ctypes.CDLL(None).mallopt(parameter, value)
