"""PSNR and MS-SSIM of uint8 pictures, and bits per pixel.

MS-SSIM: Wang, Simoncelli & Bovik, "Multi-scale structural similarity for image quality assessment", 2003.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

_EXPONENTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # from the paper, finest scale first
_WINDOW = 11
_SIGMA = 1.5
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
_ROWS = 64  # of a strip

_Channel = NDArray[np.uint8] | NDArray[np.float64]

_taps = np.exp(-((np.arange(_WINDOW) - _WINDOW // 2) ** 2) / (2 * _SIGMA**2))
_KERNEL = tuple(float(tap) for tap in _taps / _taps.sum())


def psnr(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    """Compute the peak signal-to-noise ratio over all channels together.

    Args:
        a, b: uint8 (H, W, 3), RGB.

    Returns:
        10 log10(255^2 / MSE) in dB; infinity if the pictures are equal.

    Raises:
        ValueError: the arrays have another type or shape, or different sizes.
    """
    _check(a, b)
    # Row by row: a picture of 100 megapixels in wider integers would take gigabytes.
    squares = sum(int(np.square(x.astype(np.int32) - y).sum(dtype=np.int64)) for x, y in zip(a, b, strict=True))
    return math.inf if squares == 0 else 10 * math.log10(255**2 * a.size / squares)


def ms_ssim(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    """Compute the multi-scale structural similarity of each channel, and return the mean of the three.

    There are five scales. Each is the mean over 2 x 2 pixels of the one before; an odd last row or column is repeated.
    The Gaussian window has 11 x 11 pixels and sigma 1.5, and stays inside the picture. Negative contrast terms count as
    0. If the short side is below 161 pixels, the window does not fit on the coarsest scales: they are left out, and the
    remaining exponents are divided by their sum.

    Args:
        a, b: uint8 (H, W, 3), RGB.

    Returns:
        At most 1, the value of equal pictures; nan if the short side is below 11 pixels.

    Raises:
        ValueError: the arrays have another type or shape, or different sizes.
    """
    _check(a, b)
    scales, side = 0, min(a.shape[:2])
    while side >= _WINDOW and scales < len(_EXPONENTS):
        scales, side = scales + 1, (side + 1) // 2
    if scales == 0:
        return math.nan
    exponents = np.array(_EXPONENTS[:scales])
    exponents /= exponents.sum()
    return float(np.mean([_channel_ms_ssim(a[..., c], b[..., c], exponents) for c in range(3)]))


def bits_per_pixel(nbytes: int, width: int, height: int) -> float:
    """Return the bits that a file of `nbytes` bytes takes per pixel of its width x height picture."""
    return 8 * nbytes / (width * height)


def _check(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> None:
    if a.shape != b.shape or a.ndim != 3 or a.shape[2] != 3 or a.dtype != np.uint8 or b.dtype != np.uint8:
        raise ValueError(
            f"pictures are {a.dtype} {a.shape} and {b.dtype} {b.shape}, expected uint8 (H, W, 3) of the same size"
        )


def _channel_ms_ssim(a: NDArray[np.uint8], b: NDArray[np.uint8], exponents: NDArray[np.float64]) -> float:
    x: _Channel = a
    y: _Channel = b
    product = 1.0
    for scale, exponent in enumerate(exponents):
        if scale > 0:
            x, y = _halved(x), _halved(y)
        # In strips: all of a large picture would take a hundred bytes a pixel.
        rows, last = x.shape[0] - _WINDOW + 1, scale == len(exponents) - 1
        strips = [slice(top, min(top + _ROWS, rows) + _WINDOW - 1) for top in range(0, rows, _ROWS)]
        total = sum(float(_similarity(x[strip], y[strip], luminance=last).sum()) for strip in strips)
        product *= max(total / (rows * (x.shape[1] - _WINDOW + 1)), 0.0) ** float(exponent)
    return product


def _similarity(a: _Channel, b: _Channel, *, luminance: bool) -> NDArray[np.float64]:
    """Contrast and structure, and the luminance as well if asked for: (H, W) -> (H - 10, W - 10)."""
    x, y = a.astype(np.float64), b.astype(np.float64)
    mean_x, mean_y = _blurred(x), _blurred(y)
    both = mean_x * mean_y
    squares = mean_x**2 + mean_y**2
    covariance = _blurred(x * y) - both
    variances = _blurred(x**2 + y**2) - squares
    term: NDArray[np.float64] = (2 * covariance + _C2) / (variances + _C2)
    if luminance:  # on the coarsest scale only
        term *= (2 * both + _C1) / (squares + _C1)
    return term


def _blurred(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Filter (H, W) -> (H - 10, W - 10) with the Gaussian window, along one axis after the other."""
    rows = x.shape[0] - _WINDOW + 1
    down = sum((tap * x[i : i + rows] for i, tap in enumerate(_KERNEL)), start=np.zeros((rows, x.shape[1])))
    columns = x.shape[1] - _WINDOW + 1
    return sum((tap * down[:, i : i + columns] for i, tap in enumerate(_KERNEL)), start=np.zeros((rows, columns)))


def _halved(x: _Channel) -> NDArray[np.float64]:
    """Average 2 x 2 pixels: (H, W) -> (ceil(H / 2), ceil(W / 2))."""
    even: NDArray[Any] = np.pad(x, ((0, x.shape[0] % 2), (0, x.shape[1] % 2)), mode="edge")
    quarters: NDArray[np.float64] = np.add(even[::2, ::2], even[1::2, ::2], dtype=np.float64)
    quarters += even[::2, 1::2]
    quarters += even[1::2, 1::2]
    return quarters / 4
