"""How often a GPU would be given work and waited for, counted on a CPU.

    python -m bench.launches [--weights WEIGHTS] [--sizes 1024x1024,3000x2000] [--all]

The codec takes the path that it takes on a GPU. Every operator of torch that computes or copies counts as a kernel
launch (some launch more than one, such as sorting). Every copy between host and device, and every operator whose result
the host must read, counts as a synchronisation.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from bench.speed import sample, sizes
from vqcodec import codec, coding, synthesis
from vqcodec.errors import VqcodecError
from vqcodec.models import layers

QUALITY = 50
# Operators that only allocate memory; those that only look at it differently are views.
_ALLOCATING = ("aten.empty", "aten.new_empty", "aten.detach", "aten.alias", "aten.lift_fresh")
# Functions that copy between host and device, or whose result the host reads.
_WAITING = (
    *(torch.tensor, Tensor.cpu, Tensor.nonzero, Tensor.tolist, Tensor.item),
    *(Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__),
)


class _Launches(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operators that compute or copy, by their names."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = str(func)
        if not func.is_view and not name.startswith(_ALLOCATING):
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


class _Synchronisations(TorchFunctionMode):
    """Counts what makes the host wait for a GPU, and says of every tensor that it is on one."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func == Tensor.is_cuda.__get__ or func == Tensor.is_cpu.__get__:  # type: ignore[attr-defined]
            return func == Tensor.is_cuda.__get__  # type: ignore[attr-defined]
        if func in _WAITING or (func is Tensor.to and _names_a_device(args[1:], kwargs)):
            self.seen[func.__name__] += 1
        elif func in (Tensor.__getitem__, Tensor.__setitem__) and _has_mask(args[1]):
            self.seen["mask"] += 1
        return func(*args, **kwargs)


def _names_a_device(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return any(isinstance(x, str | torch.device) for x in (*args, *kwargs.values()))


def _has_mask(index: Any) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(part, Tensor) and part.dtype is torch.bool for part in parts)


def count(work: Callable[[], object]) -> tuple[Counter[str], Counter[str]]:
    """Launches and synchronisations of some work, by their names."""
    launches, synchronisations = _Launches(), _Synchronisations()
    with ExitStack() as stack:
        # What is done at a time, by the type of device.
        for amounts in (coding.BATCH_PIXELS, synthesis.BAND_PIXELS, layers.STRIP):
            stack.callback(amounts.update, dict(amounts))
            amounts["cpu"] = amounts["cuda"]
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)  # the modes count in this thread alone
        stack.enter_context(synchronisations)
        stack.enter_context(launches)
        work()
    return launches.seen, synchronisations.seen


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Kernel launches and synchronisations per megapixel.")
    parser.add_argument("--weights", help="a path or the name of packaged weights (default: the photo model)")
    parser.add_argument("--sizes", type=sizes, default="1024x1024,3000x2000", help="default: %(default)s")
    parser.add_argument("--all", action="store_true", help="print how often each operator ran")
    options = parser.parse_args(arguments)
    try:
        for width, height in options.sizes:
            pixels = sample(width, height)
            data = codec.compress(pixels, quality=QUALITY, weights=options.weights, device="cpu")  # also warms up
            work = {
                "encode": lambda pixels=pixels: codec.compress(
                    pixels, quality=QUALITY, weights=options.weights, device="cpu"
                ),
                "decode": lambda data=data: codec.decompress(data, weights=options.weights, device="cpu"),
            }
            for direction, call in work.items():
                launches, waits = count(call)
                area = width * height / 1e6
                print(
                    f"{width}x{height} {direction}: {launches.total() / area:.0f} launches and"
                    f" {waits.total() / area:.0f} synchronisations per megapixel"
                )
                for name, number in (launches + waits).most_common() if options.all else ():
                    print(f"  {number:6} {name}")
    except VqcodecError as error:
        print(f"launches: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
