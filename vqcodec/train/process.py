"""The process of a run: its device, the other processes of a distributed run, settings of the process as a whole."""

import contextlib
import ctypes
import gc
import importlib
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
from torch import Tensor, distributed

from vqcodec import caller, signals
from vqcodec.errors import TrainingError

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

MALLOC_TRIM_THRESHOLD, MALLOC_MMAP_THRESHOLD = -1, -3  # of malloc.h
PATIENCE = timedelta(minutes=20)  # with other processes: the first one validates while they wait


@contextlib.contextmanager
def joined() -> Iterator[tuple[int, int]]:
    """Join the process group that torchrun announces, if it does.

    When one process fails, the others fail at what they would do together. Only the first error is raised.

    Yields:
        the rank of this process, and how many processes there are.

    Raises:
        SystemExit: with code 1, in place of an error in the body, if another process has failed before this one.
    """
    if not os.environ.keys() >= {"RANK", "WORLD_SIZE"}:
        yield 0, 1
        return
    from torch.distributed.rendezvous import rendezvous  # not every build of torch has it

    # Optimisers import this. Its defaults would keep the group that is there by then, and so the threads of that.
    importlib.import_module("torch.distributed.nn.functional")

    nccl = torch.cuda.is_available() and distributed.is_nccl_available()
    store, rank, world = next(rendezvous("env://", timeout=PATIENCE))
    backends = "cpu:gloo,cuda:nccl" if nccl else "gloo"
    try:
        distributed.init_process_group(backends, store=store, rank=rank, world_size=world, timeout=PATIENCE)
        yield rank, world
    except Interrupted:  # which all of them are
        raise
    except BaseException as error:
        if not _fails_first(store) and isinstance(error, Exception):
            raise SystemExit(1) from None
        raise
    finally:
        if distributed.is_initialized():
            gc.collect()  # the group's threads end with the last reference to it
            distributed.destroy_process_group()


def _fails_first(store: "Store") -> bool:
    """Whether no other process has asked this before."""
    try:
        return store.add("failures", 1) == 1
    except RuntimeError:  # the process that keeps the store has ended
        return False


def is_first() -> bool:
    """Whether this process speaks for those that torchrun has started, or is the only one."""
    return os.environ.get("RANK", "0") == "0"


def sum_over_processes(x: Tensor) -> Tensor:
    """Add up x in place over the processes of a distributed run."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(x)
    return x


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
    shared = torch.tensor([value], dtype=torch.float64, device=device)
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

    See `_handled` for when this can be done.

    Yields:
        the numbers of the signals that came.
    """
    came: list[int] = []

    def hold(number: int, _: object) -> None:
        came.append(number)
        if len(came) > 1:
            raise KeyboardInterrupt

    with _handled(hold):
        yield came


@contextlib.contextmanager
def raised_signals() -> Iterator[None]:
    """In the body, SIGINT and SIGTERM raise `Interrupted`: for what follows the last checkpoint.

    See `_handled` for when this can be done.
    """

    def end(number: int, _: object) -> None:
        raise Interrupted(number)

    with _handled(end):
        yield


@contextlib.contextmanager
def _handled(handler: Callable[[int, object], None]) -> Iterator[None]:
    """In the body, `handler` gets SIGINT and SIGTERM.

    Only the main thread can do this, and only to signals for which the caller has no handler.
    """
    usual = {signal.SIGINT: (signal.default_int_handler,), signal.SIGTERM: (signal.SIG_DFL, signals.leave)}
    with contextlib.ExitStack() as handlers:
        if threading.current_thread() is threading.main_thread():
            for number, known in usual.items():
                if (before := signal.getsignal(number)) in known:
                    handlers.callback(signal.signal, number, before)
                    signal.signal(number, handler)
        yield


def keep_memory() -> None:
    """Let the process keep what it frees, for good: this is for processes that do nothing but train.

    The C library of Linux would hand large tensors back to the system, which clears their memory again at every step: a
    fifth of the time, where measured.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # of another C library, or none
        for parameter, value in ((MALLOC_MMAP_THRESHOLD, 1 << 25), (MALLOC_TRIM_THRESHOLD, (1 << 31) - 1)):
            ctypes.CDLL(None).mallopt(parameter, value)
