"""Chooses the data type that training and search compute in: bfloat16 where it is fast, else float32."""

import functools
import time

import torch
from torch.nn import functional

# Speed-up from which bfloat16 is used. CPUs with bfloat16 instructions are at least twice as fast with it; others
# emulate it about 50 times slower.
WORTHWHILE = 1.25
TRIALS = 5


def autocast(device: torch.device) -> torch.autocast:
    """A context in which networks compute in bfloat16 if that is fast on this device, else in float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=bfloat16_pays(device))


@functools.cache
def bfloat16_pays(device: torch.device) -> bool:
    """Whether convolutions are worthwhile in bfloat16 on this device.

    A CPU is timed, once per process: its flags do not say which instructions the libraries use.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return WORTHWHILE * _seconds(torch.bfloat16) < _seconds(torch.float32)


def _seconds(kind: torch.dtype) -> float:
    """The time of a small convolution on the CPU: the minimum of a few trials."""
    layout = torch.channels_last
    with torch.inference_mode(), torch.autocast("cpu", enabled=False):
        x = torch.ones(1, 64, 32, 32, dtype=kind).contiguous(memory_format=layout)
        kernel = torch.ones(64, 64, 3, 3, dtype=kind).contiguous(memory_format=layout)
        times = []
        for _ in range(1 + TRIALS):  # the library chooses its algorithm in the first one
            start = time.perf_counter()
            functional.conv2d(x, kernel, padding=1)
            times.append(time.perf_counter() - start)
    return min(times[1:])
