"""Work on a GPU, recorded once and replayed: a step of training is thousands of small kernels, which take longer to launch than to run."""

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

WARM_UP = 3  # runs before the recording, in which libraries choose their algorithms

T = TypeVar("T")


class Recording(Generic[T]):
    """A function of CUDA tensors as a CUDA graph; see "CUDA Graphs" in PyTorch's notes for what such a function may not do.

    Args:
        function: what to record; it is run a few times. inputs: of the shapes and types of all inputs to come.
    """

    def __init__(self, function: Callable[..., T], inputs: Sequence[Tensor]) -> None:
        self._inputs = [x.clone() for x in inputs]
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                function(*self._inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        # The thread that prepares the next crops may go on meanwhile.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._outputs = function(*self._inputs)

    def __call__(self, *inputs: Tensor) -> T:
        """The function of other inputs, on any device; what it returned before is overwritten."""
        for own, given in zip(self._inputs, inputs, strict=True):
            own.copy_(given, non_blocking=True)
        self._graph.replay()
        return self._outputs
