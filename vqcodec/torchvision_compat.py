"""Import torchvision where its compiled operators do not fit the installed torch.

A torchvision wheel built for CUDA cannot be imported beside a CPU build of torch ("operator torchvision::nms does not
exist"): its library is not loaded, yet it registers a second implementation for two operators. Declaring their
signatures first is enough for everything that needs no compiled operator, such as the network definitions that LPIPS
uses.
"""

import importlib
import sys
from typing import Any

import torch

_declared: list[Any] = []  # a declaration lives as long as this object does


def import_torchvision() -> None:
    """Import torchvision, with the operators declared if the plain import fails.

    Raises:
        ImportError: torchvision is not installed.
    """
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]  # half imported
        library: Any = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.append(library)
        importlib.import_module("torchvision")
