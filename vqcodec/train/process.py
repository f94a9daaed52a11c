"""The process of a run: its device, the other processes of a distributed run, settings of the process as a whole."""

import contextlib
import ctypes
import os
import warnings
from collections.abc import Iterator
from datetime import timedelta

import torch
from torch import distributed

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
def tuned() -> Iterator[None]:
    """Settings of the whole process with which training is fast.

    Afterwards they are as before. What `_keep_memory` does cannot be undone.
    """
    benchmark, flushed = torch.backends.cudnn.benchmark, _flushes_subnormals()
    with warnings.catch_warnings():
        # A 1x1 weight has the same layout under both names; DistributedDataParallel takes them for different.
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        torch.backends.cudnn.benchmark = True  # every step has the same shapes
        torch.set_flush_denormal(True)  # subnormal products slow CPUs down several times and mean nothing here
        _keep_memory()
        try:
            yield
        finally:
            torch.backends.cudnn.benchmark = benchmark
            torch.set_flush_denormal(flushed)


def _flushes_subnormals() -> bool:
    """Whether this thread takes numbers next to zero for zero."""
    return bool(torch.tensor(2e-38) * 0.1 == 0)


def _keep_memory() -> None:
    """Let the process keep what it frees.

    The C library of Linux would hand large tensors back to the system, which clears their memory again at every step: a
    fifth of the time, where measured.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # of another C library, or none
        for parameter, value in ((MALLOC_MMAP_THRESHOLD, 1 << 25), (MALLOC_TRIM_THRESHOLD, (1 << 31) - 1)):
            ctypes.CDLL(None).mallopt(parameter, value)
