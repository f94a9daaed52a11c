"""CUDA graphs: GPU work that is recorded once and replayed.

A training step is thousands of small kernels, which take longer to launch than to run.
"""

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

WARM_UP = 3  # runs before the recording, for libraries to choose their algorithms

T = TypeVar("T")


class Recording(Generic[T]):
    """A function of CUDA tensors as a CUDA graph. PyTorch's note "CUDA Graphs" lists what the function must not do.

    Args:
        function: the function to record. It is run a few times.
        inputs: examples. All later inputs must have the same shapes and dtypes.
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
        # Other threads, which prepare the next crops, may use CUDA during the capture.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._outputs = function(*self._inputs)

    def __call__(self, *inputs: Tensor) -> T:
        """Run the function on inputs from any device. The tensors that earlier calls returned are overwritten."""
        for own, given in zip(self._inputs, inputs, strict=True):
            own.copy_(given, non_blocking=True)
        self._graph.replay()
        return self._outputs
