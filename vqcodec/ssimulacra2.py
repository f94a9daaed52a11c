"""SSIMULACRA2 of two 8-bit pictures, in numpy.

The metric of Jon Sneyers (Cloudinary), version 2.1 of April 2023. In the XYB colour space, at six scales, it computes
maps of SSIM, ringing and smoothing errors, pools each by its mean and its 4-norm, and takes a weighted sum of these 108
numbers. Definition, weights and constants: https://github.com/cloudinary/ssimulacra2 (BSD 3-Clause).

A score of 100 is a perfect copy. About 90 is visually lossless, 70 is high, 50 medium and 30 low quality; very bad
pictures score below 0.

The code follows the reference program, including its borders (zeros outside the picture). It agrees to within 0.2 with
the published reference scores of JPEGs of quality 20 to 90; the reference rounds to single precision.
"""

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
Plane = NDArray[np.float32]  # (H, W)
Planes = NDArray[np.float32]  # (3, H, W)

SCALES = 6
BYTES_A_PIXEL = 62  # of memory, at most
MOST_PIXELS = 64_000_000  # that commands compare, in 4 GB
SMALLEST = 8  # side in pixels of the smallest picture, and of the smallest scale that has a coarser one
SCALE = 0.9562382616834844  # factor on the weighted sum
SSIM_C2 = 0.0009  # stabilises the structure term in flat areas

# Linear sRGB -> mixed cone responses; every row sums to 1.
OPSIN = np.array(
    [
        [0.30, 1 - 0.30 - 0.078, 0.078],
        [0.23, 1 - 0.23 - 0.078, 0.078],
        [0.24342268924547819, 0.20476744424496821, 1 - 0.24342268924547819 - 0.20476744424496821],
    ],
    np.float32,
)
OPSIN_BIAS = np.float32(0.0037930732552754493)

# The impulse response of libjxl's recursive Gaussian (Charalampidis 2016), sigma 1.5: offsets 0 to 4, symmetric.
BLUR = (0.2646211054881985, 0.2129285920104222, 0.1093353727774603, 0.0360111146583644, 0.00941436780965374)

# Columns: SSIM, ringing and smoothing pooled by mean, then the same three by 4-norm. Rows: one for each scale.
WEIGHTS = (
    # X, red minus green
    (0, 0.0007376606707406586, 0, 0, 0.0007793481682867309, 0),
    (0, 0.0004371155730107379, 0, 1.1041726426657346, 0.00066284834129271, 0.00015231632783718752),
    (0, 0.0016406437456599754, 0, 1.8422455520539298, 11.441172603757666, 0),
    (0.0007989109436015163, 0.000176816438078653, 0, 1.8787594979546387, 10.94906990605142, 0),
    (0.0007289346991508072, 0.9677937080626833, 0, 0.00014003424285435884, 0.9981766977854967, 0.00031949755934435053),
    (0.0004550992113792063, 0, 0, 0.0013648766163243398, 0, 0),
    # Y, brightness
    (0, 0, 0, 7.466890328078848, 0, 17.445833984131262),
    (0.0006235601634041466, 0, 0, 6.683678146179332, 0.00037724407979611296, 1.027889937768264),
    (225.20515300849274, 0, 0, 19.213238186143016, 0.0011401524586618361, 0.001237755635509985),
    (176.39317598450694, 0, 0, 24.43300999870476, 0.28520802612117757, 0.0004485436923833408),
    (0, 0, 0, 34.77906344483772, 44.835625328877896, 0),
    (0, 0, 0, 0, 0, 0),
    # B, blue minus brightness
    (0, 0.0008680556573291698, 0, 0, 0, 0),
    (0, 0.0005313191874358747, 0, 0.00016533814161379112, 0, 0),
    (0, 0, 0, 0.0004179171803251336, 0.0017290828234722833, 0),
    (0.0020827005846636437, 0, 0, 8.826982764996862, 23.19243343998926, 0),
    (
        95.1080498811086,
        0.9863978034400682,
        0.9834382792465353,
        0.0012286405048278493,
        171.2667255897307,
        0.9807858872435379,
    ),
    (0, 0, 0, 0.0005130064588990679, 0, 0.00010854057858411537),
)


def ssimulacra2(original: Pixels, distorted: Pixels) -> float:
    """Score `distorted` against `original`.

    Args:
        original: uint8 (H, W, 3), sRGB.
        distorted: uint8 (H, W, 3), sRGB.

    Returns:
        The score: at most 100, higher is better; nan if a side is shorter than 8 pixels.

    Raises:
        ValueError: the shapes differ or are not (H, W, 3).
    """
    if original.shape != distorted.shape or original.ndim != 3 or original.shape[2] != 3:
        raise ValueError(f"two pictures of one shape (H, W, 3) expected, found {original.shape} and {distorted.shape}")
    first, second = _linear(original), _linear(distorted)
    errors: list[NDArray[np.float64]] = []  # (3, 6) for each scale
    side = min(original.shape[:2])  # of the scale before
    while len(errors) < SCALES and side >= SMALLEST:
        side = min(first.shape[1:])
        halves = _halve(first), _halve(second)
        first = _positive_xyb(first)  # each in the place of what it is made of: a large picture fills the memory
        second = _positive_xyb(second)
        errors.append(np.stack([_scale_errors(a, b) for a, b in zip(first, second, strict=True)]))
        first, second = halves
    if not errors:
        return float("nan")
    # The reference takes weights in sequence, so that a picture too small for all scales uses the first ones.
    table = np.stack(errors, axis=1).ravel()  # component, scale, column
    return score(float(np.asarray(WEIGHTS).ravel()[: table.size] @ table) * SCALE)


def score(x: float) -> float:
    """Map a weighted sum to the score, at most 100; nan to nan."""
    x = 2.326765642916932 * x - 0.020884521182843837 * x**2 + 6.248496625763138e-05 * x**3
    return 100.0 if x <= 0 else float(100 - 10 * x**0.6276336467831387)


def _linear(pixels: Pixels) -> Planes:
    levels = np.arange(256) / 255
    table = np.where(levels <= 0.04045, levels / 12.92, ((levels + 0.055) / 1.055) ** 2.4).astype(np.float32)
    planes = np.empty((3, *pixels.shape[:2]), np.float32)
    for component, plane in enumerate(planes):
        plane[:] = table[pixels[..., component]]
    return planes


def _halve(planes: Planes) -> Planes:
    """Average 2 x 2 blocks; an odd last row or column counts twice."""
    return np.stack([_halved(plane) for plane in planes])


def _halved(plane: Plane) -> Plane:
    height, width = plane.shape
    padded = np.pad(plane, ((0, height % 2), (0, width % 2)), mode="edge") if height % 2 or width % 2 else plane
    return (padded[::2, ::2] + padded[::2, 1::2] + padded[1::2, ::2] + padded[1::2, 1::2]) / np.float32(4)


def _positive_xyb(linear: Planes) -> Planes:
    """Linear sRGB -> XYB, shifted and scaled to about 0..1, with B as blue minus brightness."""
    mixed = np.tensordot(OPSIN, linear, 1)
    mixed += OPSIN_BIAS
    np.cbrt(mixed, out=mixed)
    mixed -= np.cbrt(OPSIN_BIAS)
    x, y = (mixed[0] - mixed[1]) / 2, (mixed[0] + mixed[1]) / 2
    mixed[0] = x * np.float32(14) + np.float32(0.42)
    mixed[1] = y + np.float32(0.01)
    mixed[2] = mixed[2] - y + np.float32(0.55)
    return mixed


def _blur(plane: Plane) -> Plane:
    for axis in (0, 1):
        out = plane * np.float32(BLUR[0])
        moved, target = np.moveaxis(plane, axis, 0), np.moveaxis(out, axis, 0)
        for offset, tap in enumerate(BLUR[1:], 1):
            target[offset:] += moved[:-offset] * np.float32(tap)
            target[:-offset] += moved[offset:] * np.float32(tap)
        plane = out
    return plane


def _scale_errors(a: Plane, b: Plane) -> NDArray[np.float64]:
    """The error terms of one component, for the six columns of WEIGHTS: (6,)."""
    mean_a, mean_b = _blur(a), _blur(b)
    ssim = _pooled(_ssim_errors(a, b, mean_a, mean_b))
    edges = (1 + np.abs(b - mean_b)) / (1 + np.abs(a - mean_a)) - 1
    return np.array([ssim, _pooled(np.maximum(edges, 0)), _pooled(np.maximum(-edges, 0))]).T.ravel()


def _ssim_errors(a: Plane, b: Plane, mean_a: Plane, mean_b: Plane) -> Plane:
    covariance = _blur(a * b) - mean_a * mean_b
    variances = (_blur(a * a) - mean_a**2) + (_blur(b * b) - mean_b**2)
    luminance = 1 - (mean_a - mean_b) ** 2  # no denominator as in SSIM: XYB is already perceptually uniform
    return np.maximum(1 - luminance * (2 * covariance + SSIM_C2) / (variances + SSIM_C2), 0)


def _pooled(errors: Plane) -> tuple[float, float]:
    """The mean and the 4-norm."""
    return float(errors.mean(dtype=np.float64)), float(
        np.sqrt(np.sqrt(np.square(errors * errors).mean(dtype=np.float64)))
    )
