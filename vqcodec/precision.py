"""Chooses the data type that training, search and encoder compute in: bfloat16 where it is fast, else float32."""

import contextlib
import functools
import platform
import time
from pathlib import Path

import torch
from torch.nn import functional

X86, AMD = ("x86_64", "AMD64"), "AuthenticAMD"
CPU_INFO = Path("/proc/cpuinfo")  # of Linux
# Speed-up from which bfloat16 is used where that is timed. CPUs with bfloat16 instructions are about twice as fast with
# it; others emulate it, up to 50 times slower.
WORTHWHILE = 1.25
TRIALS = 5


def autocast(device: torch.device) -> torch.autocast:
    """A context in which networks compute in bfloat16 if that is fast on this device, else in float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=bfloat16_pays(device))


@functools.cache
def bfloat16_pays(device: torch.device) -> bool:
    """Whether convolutions are worthwhile in bfloat16 on this device.

    x86 CPUs are believed, so that all runs on one machine do the same, however busy it is: those with AMX, and AMD's
    with bfloat16 in AVX-512. Intel's take 1.5 times as long with the latter as in float32, and others emulate it. CPUs
    of other kinds that the library can use bfloat16 on are timed, once per process.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    library = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not (library and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return False
    if platform.machine() in X86:
        return torch.cpu._is_amx_tile_supported() or (torch.cpu._is_avx512_bf16_supported() and _by_amd())
    return WORTHWHILE * _seconds(torch.bfloat16) < _seconds(torch.float32)


def _by_amd() -> bool:
    """Whether AMD made the CPU; on Linux and Windows."""
    with contextlib.suppress(OSError):
        return AMD in CPU_INFO.read_text(encoding="utf-8", errors="replace")
    return AMD in platform.processor()


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
