"""Bounds on memory and work: what a picture, a target or a file may ask for."""

from typing import Any

import models
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vqcodec import coding
from vqcodec.frame import Frame
from vqcodec.models import counts
from vqcodec.weights import load


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that any operator returns, in numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else [result]:
            if isinstance(x, Tensor):
                self.numbers = max(self.numbers, x.numel())
        return result


@pytest.mark.parametrize("rows", [False, True], ids=["computed", "stored"])
def test_range_coding_makes_no_table_of_a_whole_pass(rows: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a single tile no tensor is larger than the networks' own, where K numbers for each symbol would be."""
    model = load(models.fast_weights()) if rows else models.tiny_model()
    frame = Frame(256, 192, 50)
    codes = [c.short() for c in models.random_codes(model.vqvae, 192, 256)]
    with coding.exact(model):
        expected = coding.encode(model, frame, codes)
        monkeypatch.setitem(counts.BLOCK, "cpu", 1 << 12)
        with Largest() as encoding:
            segments = coding.encode(model, frame, codes)
        with Largest() as decoding:
            found = coding.decode(model, frame, segments)
    assert segments == expected
    assert all(torch.equal(a, b) for a, b in zip(found, codes, strict=True))
    most = 256 * 192 * (4 if rows else 1)
    assert encoding.numbers <= most and decoding.numbers <= most
