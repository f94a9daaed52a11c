"""The type that training and search compute in: bfloat16 where it is fast, float32 elsewhere."""

import functools
import time

import torch
from torch.nn import functional

# How much faster bfloat16 has to be. Where a CPU has instructions for it, it is at least twice as fast; where it has
# none, bfloat16 is emulated, and about 50 times slower.
WORTHWHILE = 1.25
TRIALS = 5


def autocast(device: torch.device) -> torch.autocast:
    """A context in which networks compute in bfloat16 if that is fast on this device, and in float32 if not."""
    return torch.autocast(device.type, torch.bfloat16, enabled=bfloat16_pays(device))


@functools.cache
def bfloat16_pays(device: torch.device) -> bool:
    """Whether convolutions are faster in bfloat16 than in float32.

    On a CPU both are timed, once: neither its name nor its flags say what the libraries were told to use.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return WORTHWHILE * _seconds(torch.bfloat16) < _seconds(torch.float32)


def _seconds(kind: torch.dtype) -> float:
    """Of a small convolution, the least of a few trials."""
    layout = torch.channels_last
    with torch.inference_mode(), torch.autocast("cpu", enabled=False):
        x = torch.ones(1, 64, 32, 32, dtype=kind).contiguous(memory_format=layout)
        kernel = torch.ones(64, 64, 3, 3, dtype=kind).contiguous(memory_format=layout)
        found = []
        for _ in range(1 + TRIALS):  # the first one chooses an implementation
            start = time.perf_counter()
            functional.conv2d(x, kernel, padding=1)
            found.append(time.perf_counter() - start)
    return min(found[1:])
