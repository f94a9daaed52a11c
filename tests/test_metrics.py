import math
import time
import tracemalloc

import numpy as np
import pytest
from numpy.typing import NDArray

from vqcodec import metrics

WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)


def noisy(photo: NDArray[np.uint8], sigma: float) -> NDArray[np.uint8]:
    noise = np.random.default_rng(1).normal(0, sigma, photo.shape)
    return np.clip(np.rint(photo + noise), 0, 255).astype(np.uint8)


def naive_ms_ssim(a: NDArray[np.uint8], b: NDArray[np.uint8], scales: int) -> float:
    """Straight from the definition: a loop over window positions, two-dimensional weights, central moments."""
    offsets = np.arange(11) - 5
    window = np.exp(-(offsets[:, None] ** 2 + offsets[None, :] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    total = 0.0
    for channel in range(3):
        x, y = a[..., channel].astype(float), b[..., channel].astype(float)
        product = 1.0
        for scale in range(scales):
            luminance, structure = [], []
            for i in range(x.shape[0] - 10):
                for j in range(x.shape[1] - 10):
                    p, q = x[i : i + 11, j : j + 11], y[i : i + 11, j : j + 11]
                    mean_p, mean_q = (window * p).sum(), (window * q).sum()
                    var_p, var_q = (window * (p - mean_p) ** 2).sum(), (window * (q - mean_q) ** 2).sum()
                    cov = (window * (p - mean_p) * (q - mean_q)).sum()
                    c1, c2 = 2.55**2, 7.65**2
                    luminance.append((2 * mean_p * mean_q + c1) / (mean_p**2 + mean_q**2 + c1))
                    structure.append((2 * cov + c2) / (var_p + var_q + c2))
            last = scale == scales - 1
            value = np.mean(np.multiply(luminance, structure) if last else structure)
            product *= value ** (WEIGHTS[scale] / sum(WEIGHTS[:scales]))
            halves = []
            for z in (x, y):
                h, w = z.shape
                half = np.empty(((h + 1) // 2, (w + 1) // 2))
                for i, j in np.ndindex(half.shape):
                    rows, columns = [2 * i, min(2 * i + 1, h - 1)], [2 * j, min(2 * j + 1, w - 1)]
                    half[i, j] = z[np.ix_(rows, columns)].mean()
                halves.append(half)
            x, y = halves
        total += product
    return total / 3


def test_psnr_of_a_known_error():
    a = np.full((4, 5, 3), 100, np.uint8)
    b = a.copy()
    b[0, 0, 0] = 110
    assert metrics.psnr(a, b) == pytest.approx(10 * math.log10(255**2 / (100 / 60)))
    assert metrics.psnr(b, a) == metrics.psnr(a, b)


def test_psnr_of_extremes():
    black, white = np.zeros((3, 3, 3), np.uint8), np.full((3, 3, 3), 255, np.uint8)
    assert metrics.psnr(black, white) == pytest.approx(0, abs=1e-12)
    assert metrics.psnr(black, black) == math.inf


@pytest.mark.parametrize(("height", "width", "scales"), [(11, 13, 1), (24, 21, 2), (43, 47, 3)])
def test_ms_ssim_is_the_definition(make_photo, height, width, scales):
    photo = make_photo(height, width)
    other = noisy(photo, 15)
    assert metrics.ms_ssim(photo, other) == pytest.approx(naive_ms_ssim(photo, other, scales), abs=1e-9)


def test_ms_ssim_of_large_pictures_takes_little_memory(make_photo):
    """Strips are cut, and join to the same value."""
    photo = make_photo(400, 300)
    other = noisy(photo, 15)
    tracemalloc.start()
    value = metrics.ms_ssim(photo, other)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40 * 400 * 300
    assert value == pytest.approx(
        np.mean([metrics.ms_ssim(photo[:, :, [c] * 3], other[:, :, [c] * 3]) for c in range(3)])
    )


def test_ms_ssim_uses_five_scales_from_161_pixels_on(make_photo, monkeypatch):
    photo = make_photo(161, 161)
    other = noisy(photo, 15)
    five = metrics.ms_ssim(photo, other)
    four = metrics.ms_ssim(photo[:160], other[:160])
    monkeypatch.setattr(metrics, "_EXPONENTS", WEIGHTS[:4])
    assert metrics.ms_ssim(photo[:160], other[:160]) == four
    assert metrics.ms_ssim(photo, other) != five


def test_ms_ssim_of_equal_pictures_is_one(make_photo):
    photo = make_photo(176, 200)
    assert metrics.ms_ssim(photo, photo) == pytest.approx(1, abs=1e-12)


def test_ms_ssim_falls_with_noise(make_photo):
    photo = make_photo(180, 170)
    values = [metrics.ms_ssim(photo, noisy(photo, sigma)) for sigma in (0, 2, 5, 10, 20, 40, 80)]
    assert values == sorted(values, reverse=True)
    assert values[0] == pytest.approx(1) and values[-1] < 0.8


def test_ms_ssim_of_the_negative_is_zero(make_photo):
    photo = make_photo(64, 64)
    assert metrics.ms_ssim(photo, 255 - photo) == 0


@pytest.mark.parametrize("shape", [(1, 1, 3), (10, 300, 3), (300, 10, 3)])
def test_ms_ssim_of_tiny_pictures_is_undefined(shape):
    picture = np.zeros(shape, np.uint8)
    assert math.isnan(metrics.ms_ssim(picture, picture))


def test_ms_ssim_is_fast_enough(make_photo):
    photo = make_photo(512, 768)
    start = time.process_time()
    metrics.ms_ssim(photo, noisy(photo, 5))
    assert time.process_time() - start < 3  # 0.6 s as a rule; the margin is for busy machines


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (np.zeros((12, 12, 3), np.uint8), np.zeros((12, 13, 3), np.uint8)),
        (np.zeros((12, 12), np.uint8), np.zeros((12, 12), np.uint8)),
        (np.zeros((12, 12, 4), np.uint8), np.zeros((12, 12, 4), np.uint8)),
        (np.zeros((12, 12, 3)), np.zeros((12, 12, 3))),
    ],
)
def test_other_arrays_are_refused(a, b):
    for metric in (metrics.psnr, metrics.ms_ssim):
        with pytest.raises(ValueError, match="expected uint8"):
            metric(a, b)


def test_bits_per_pixel():
    assert metrics.bits_per_pixel(100, 20, 10) == 4.0
