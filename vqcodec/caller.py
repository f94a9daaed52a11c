"""Keeps what the calling program has set in torch away from our computations."""

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Undo the caller's default device, inference mode and disabled gradients in the body.

    Torch keeps these for each thread. The default dtype belongs to the whole process, and other threads may change it
    at any time. So the body must not depend on it: whoever makes a tensor of floats says of which dtype.
    """
    with contextlib.ExitStack() as settings:
        settings.enter_context(torch.inference_mode(False))  # enables gradients as well
        if torch.get_default_device().type != "cpu":
            settings.enter_context(torch.device("cpu"))
        yield


@contextlib.contextmanager
def exact(device: torch.device) -> Iterator[None]:
    """`undisturbed`, without gradients, and without autocast: bfloat16 cannot hold the prior's integers."""
    with undisturbed(), torch.inference_mode(), torch.autocast(device.type, enabled=False):
        yield
