"""The codecs of Pillow that a .vqz file is compared with, at its size."""

import contextlib
import importlib
import io
import math
import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vqcodec.target import MEASURES, bracket

_FORMATS = {"AVIF": "AVIF", "JPEG XL": "JXL"}  # Pillow's names


def available() -> list[str]:
    """The names of the codecs that can be used here: JPEG XL needs the plugin pillow-jxl-plugin."""
    with contextlib.suppress(ImportError):
        importlib.import_module("pillow_jxl")  # which adds its format to Pillow
    Image.init()
    return [name for name, form in _FORMATS.items() if form in Image.SAVE]


def encode(
    codec: str, pixels: NDArray[np.uint8], size: float, check: Callable[[], None] = lambda: None
) -> tuple[bytes, float]:
    """Encode at the quality whose file comes nearest to a size.

    Args:
        codec: a name that `available` lists. All of its settings but the quality are Pillow's defaults.
        pixels: uint8 (H, W, 3), sRGB.
        size: bytes that the file should have.
        check: called before each trial; what it raises ends the search.

    Returns:
        (file, seconds): the file, and how long it took to encode without the other trials.
    """
    picture = Image.fromarray(pixels)
    trials: list[tuple[bytes, float]] = []

    def log_size(quality: int) -> float:
        check()
        start, out = time.perf_counter(), io.BytesIO()
        picture.save(out, _FORMATS[codec], quality=quality)
        trials.append((out.getvalue(), time.perf_counter() - start))
        return math.log(out.tell())

    bracket(log_size, math.log(size), MEASURES["size"].slope, 50)
    return min(trials, key=lambda trial: abs(len(trial[0]) - size))


def decode(data: bytes) -> NDArray[np.uint8]:
    """Decode a file of `encode` to uint8 (H, W, 3)."""
    with Image.open(io.BytesIO(data)) as picture:
        return np.asarray(picture.convert("RGB"))
