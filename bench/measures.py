"""The quality measures of the benchmark: how each is computed, averaged and plotted."""

import importlib
import math
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from vqcodec.errors import WeightsError
from vqcodec.metrics import ms_ssim, psnr
from vqcodec.ssimulacra2 import ssimulacra2
from vqcodec.torchvision_compat import import_torchvision
from vqcodec.train import perceptual

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
        digits: after the point, of values in tables.
    """

    key: str
    column: str
    title: str
    axis: str
    unit: str
    scale: Callable[[float], float]
    digits: int = 2


def _decibel(x: float) -> float:
    return -10 * math.log10(x) if x > 0 else math.inf


MEASURES = {
    measure.key: measure
    for measure in (
        Measure("psnr", "psnr-rgb", "PSNR", "PSNR-RGB, dB", "dB", lambda x: x),
        Measure(
            "ms-ssim", "ms-ssim-rgb", "MS-SSIM", "MS-SSIM, dB: -10 log10(1 - x)", "dB", lambda x: _decibel(1 - x), 4
        ),
        Measure("ssimulacra2", "ssimulacra2", "SSIMULACRA2", "SSIMULACRA2, points", "points", lambda x: x),
        Measure("lpips", "lpips-alex", "LPIPS", "LPIPS (AlexNet), dB: -10 log10(x)", "dB", _decibel, 4),
        Measure("gmsd", "gmsd", "GMSD", "GMSD, dB: -10 log10(x)", "dB", _decibel, 4),
        Measure("haarpsi", "haarpsi", "HaarPSI", "HaarPSI, dB: -10 log10(1 - x)", "dB", lambda x: _decibel(1 - x), 4),
        Measure(
            "butteraugli", "butteraugli-3norm", "Butteraugli", "Butteraugli (3-norm), dB: -10 log10(x)", "dB", _decibel
        ),
        Measure("cvvdp", "cvvdp-fhd", "ColorVideoVDP", "ColorVideoVDP (Full HD), JOD", "JOD", lambda x: x, 3),
    )
}


class MeasureUnavailableError(Exception):
    """A measure cannot be computed here; the message says why in one line."""


def function(key: str, lpips_folder: Path | None) -> Function:
    """The function that computes the measure called `key`.

    Args:
        key: one of MEASURES. "gmsd" and "haarpsi" come from the package piq, "cvvdp" from the package cvvdp,
            "butteraugli" from the program butteraugli_main.
        lpips_folder: holds alexnet_features.safetensors; needed by "lpips" alone.

    Raises:
        MeasureUnavailableError: packages, programs or weights are missing.
        ValueError: no measure is called so.
    """
    if key == "lpips":
        return _lpips(lpips_folder)
    if key in ("gmsd", "haarpsi"):
        return _piq(key)
    if key == "butteraugli":
        return _butteraugli()
    if key == "cvvdp":
        return _cvvdp()
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
        network = perceptual.lpips(path, "alex")
    except (ImportError, WeightsError) as error:
        hint = " (pip install -e '.[natural]')" if isinstance(error, ImportError) else ""
        raise MeasureUnavailableError(f"{error}{hint}") from error

    def tensor(pixels: Pixels) -> torch.Tensor:
        return torch.from_numpy(pixels.transpose(2, 0, 1)[None].astype(np.float32) / 127.5 - 1)

    def measure(original: Pixels, decoded: Pixels) -> float:
        with torch.inference_mode():
            return float(network(tensor(original), tensor(decoded)))

    return measure


def _piq(name: str) -> Function:
    """GMSD (Xue et al. 2014) or HaarPSI (Reisenhofer et al. 2018) by the package piq: no trained network."""
    try:
        import_torchvision()
        measured: Callable[..., torch.Tensor] = getattr(importlib.import_module("piq"), name)  # untyped
    except ImportError as error:
        raise MeasureUnavailableError(f"{error} (pip install piq)") from error

    def measure(original: Pixels, decoded: Pixels) -> float:
        a, b = (torch.from_numpy(x.transpose(2, 0, 1)[None].astype(np.float32) / 255) for x in (original, decoded))
        with torch.inference_mode():
            return float(measured(a, b, data_range=1.0))

    return measure


def _butteraugli() -> Function:
    """Butteraugli by libjxl's reference program: the 3-norm of the map of distances, on a screen of 80 cd/m2.

    The program's first number, the maximum of the map, is not used: the worst spot alone decides it. The function
    returns NaN for pictures with a side below 8 pixels, which the program takes for equal, and raises
    subprocess.CalledProcessError if the program fails.
    """
    program = shutil.which("butteraugli_main")
    if program is None:
        raise MeasureUnavailableError("the program butteraugli_main is missing (Debian's package libjxl-devtools)")

    def measure(original: Pixels, decoded: Pixels) -> float:
        if min(original.shape[:2]) < 8:
            return math.nan
        with tempfile.TemporaryDirectory() as folder:
            files = [Path(folder) / name for name in ("original.png", "decoded.png")]
            for file, pixels in zip(files, (original, decoded), strict=True):
                Image.fromarray(pixels).save(file, compress_level=1)
            command = [program, *map(str, files), "--pnorm", "3"]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
        return float(done.stdout.rpartition("3-norm:")[2])

    return measure


def _cvvdp() -> Function:
    """ColorVideoVDP (Mantiuk et al., SIGGRAPH 2024) by the package cvvdp: JOD, 10 where no difference is seen.

    Its display "standard_fhd": 24 inches, 1920 x 1080, 200 cd/m2, seen from 0.6 m (38 pixels a degree). The package's
    default is a 4K display of 75 pixels a degree, on which coding errors are half as large to the eye.
    """
    try:
        import_torchvision()
        metric = importlib.import_module("pycvvdp").cvvdp("standard_fhd", device=torch.device("cpu"), quiet=True)
    except ImportError as error:
        raise MeasureUnavailableError(f"{error} (pip install cvvdp)") from error

    def measure(original: Pixels, decoded: Pixels) -> float:
        with torch.inference_mode():
            jod, _ = metric.predict(decoded, original, dim_order="HWC")
        return float(jod)

    return measure
