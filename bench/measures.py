"""The quality measures of the benchmark: how each is computed, averaged and plotted."""

import importlib
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.torchvision_compat import import_torchvision
from vqcodec.metrics import ms_ssim, psnr
from vqcodec.ssimulacra2 import ssimulacra2

Pixels = NDArray[np.uint8]  # (H, W, 3), sRGB
Function = Callable[[Pixels, Pixels], float]  # (original, decoded)


@dataclass(frozen=True)
class Measure:
    """One quality measure.

    Attributes:
        key: the name on the command line.
        column: the name in results files; CompressAI's where it has one.
        title: the name in tables.
        axis: the label of the plot.
        unit: of a value on the quality scale.
        scale: mean over pictures -> the scale of plots and BD-rates, on which more is better.
    """

    key: str
    column: str
    title: str
    axis: str
    unit: str
    scale: Callable[[float], float]


def _decibel(x: float) -> float:
    return -10 * math.log10(x) if x > 0 else math.inf


MEASURES = {
    measure.key: measure
    for measure in (
        Measure("psnr", "psnr-rgb", "PSNR", "PSNR-RGB, dB", "dB", lambda x: x),
        Measure("ms-ssim", "ms-ssim-rgb", "MS-SSIM", "MS-SSIM, dB: -10 log10(1 - x)", "dB", lambda x: _decibel(1 - x)),
        Measure("ssimulacra2", "ssimulacra2", "SSIMULACRA2", "SSIMULACRA2, points", "points", lambda x: x),
        Measure("lpips", "lpips-alex", "LPIPS", "LPIPS (AlexNet), dB: -10 log10(x)", "dB", _decibel),
    )
}


class MeasureUnavailableError(Exception):
    """A measure cannot be computed here; the message says why in one line."""


def function(key: str, lpips_folder: Path | None) -> Function:
    """The function that computes the measure called `key`.

    Args:
        key: one of MEASURES.
        lpips_folder: holds alexnet_features.safetensors; needed by "lpips" alone.

    Raises:
        MeasureUnavailableError: packages or weights are missing.
        ValueError: no measure is called so.
    """
    if key == "lpips":
        return _lpips(lpips_folder)
    functions: dict[str, Function] = {"psnr": psnr, "ms-ssim": ms_ssim, "ssimulacra2": ssimulacra2}
    if key not in functions:
        raise ValueError(f"unknown metric '{key}': expected one of {', '.join(MEASURES)}")
    return functions[key]


def _lpips(folder: Path | None) -> Function:
    """LPIPS 0.1 (Zhang et al., CVPR 2018) on AlexNet, with the network's weights from a file instead of a download."""
    if folder is None:
        raise MeasureUnavailableError("give --lpips FOLDER with alexnet_features.safetensors")
    path = folder / "alexnet_features.safetensors"
    if not path.is_file():
        raise MeasureUnavailableError(f"{path} is missing")
    try:
        import safetensors.torch
        import torch

        import_torchvision()
        lpips = importlib.import_module("lpips")  # untyped
    except ImportError as error:
        raise MeasureUnavailableError(f"{error} (pip install lpips)") from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the package calls torchvision in an old way
        network: Any = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    features = safetensors.torch.load_file(path)
    # "slice2.3.weight" in the package is "features.3.weight" in torchvision
    names = {name: "features." + name.partition(".")[2] for name in network.net.state_dict()}
    network.net.load_state_dict({name: features[source] for name, source in names.items()})

    def tensor(pixels: Pixels) -> torch.Tensor:
        return torch.from_numpy(pixels.transpose(2, 0, 1)[None].astype(np.float32) / 127.5 - 1)

    def measure(original: Pixels, decoded: Pixels) -> float:
        with torch.inference_mode():
            return float(network(tensor(original), tensor(decoded)))

    return measure
