"""How different two pictures look, with gradients: the weighted sum of SSIMULACRA2 in torch.

`ssimulacra2.py` has the metric itself, its source and its constants. The score is 100 less a power of this sum, below
1, whose slope is infinite where pictures are equal; the sum is what can be optimised. Everything is float32 whatever
autocast says.
"""

import functools

import torch
from torch import Tensor
from torch.nn import functional

from vqcodec.ssimulacra2 import BLUR, OPSIN, OPSIN_BIAS, SCALE, SCALES, SMALLEST, SSIM_C2, WEIGHTS

# Added below fourth roots, which have no slope at zero: a 4-norm of a millionth.
FLOOR = 1e-24


def visual_distance(distorted: Tensor, original: Tensor) -> Tensor:
    """The SSIMULACRA2 sum of pictures, zero where they are equal; about 2.7 at a score of 70, 1 at 83 and 8 at 40.

    Args:
        distorted: float (B, 3, H, W), sRGB in 0..255; what lies outside counts as the nearest bound. Gradients reach
            it.
        original: the same; no gradients reach it.

    Returns:
        float32 (B,).

    Raises:
        ValueError: the shapes differ, or a side is shorter than 8 pixels.
    """
    if distorted.shape != original.shape or min(distorted.shape[2:]) < SMALLEST:
        raise ValueError(f"pictures of one shape, at least 8 x 8, expected: {distorted.shape} and {original.shape}")
    with torch.autocast(distorted.device.type, enabled=False):
        a, b = _linear(original.detach().float()), _linear(distorted.float())
        errors = []  # (B, 3, 6) of every scale
        for scale in range(SCALES):
            if min(a.shape[2:]) < SMALLEST:
                break
            if scale:
                a, b = _halve(a), _halve(b)
            errors.append(_scale_errors(_positive_xyb(a), _positive_xyb(b)))
        table = torch.stack(errors, 2).flatten(1)  # (B, 3 * scales * 6)
        return table @ _weights(table.device)[: table.shape[1]] * SCALE


def _linear(pixels: Tensor) -> Tensor:
    x = pixels.contiguous().clamp(0, 255) / 255
    # Of both branches only the one that is taken may see a value at which its slope is infinite.
    curved = ((x.clamp(min=0.04045) + 0.055) / 1.055) ** 2.4
    return torch.where(x <= 0.04045, x / 12.92, curved)


def _halve(planes: Tensor) -> Tensor:
    """Means of 2 x 2 blocks; an odd last row or column counts twice."""
    height, width = planes.shape[2:]
    return functional.avg_pool2d(functional.pad(planes, (0, width % 2, 0, height % 2), mode="replicate"), 2)


def _positive_xyb(linear: Tensor) -> Tensor:
    mixed = torch.einsum("oc,bchw->bohw", _opsin(linear.device), linear) + float(OPSIN_BIAS)
    mixed = mixed ** (1 / 3) - float(OPSIN_BIAS) ** (1 / 3)
    x, y = (mixed[:, 0] - mixed[:, 1]) / 2, (mixed[:, 0] + mixed[:, 1]) / 2
    return torch.stack([x * 14 + 0.42, y + 0.01, mixed[:, 2] - y + 0.55], 1)


# Constants are kept on their device: a step that is recorded (recording.py) may not copy them there. They are not made
# in inference mode, whose tensors no gradient may pass.


@functools.cache
@torch.inference_mode(False)
def _weights(device: torch.device) -> Tensor:
    return torch.tensor(WEIGHTS, dtype=torch.float32, device=device).flatten()


@functools.cache
@torch.inference_mode(False)
def _opsin(device: torch.device) -> Tensor:
    return torch.from_numpy(OPSIN).to(device)


@functools.lru_cache(maxsize=32)
@torch.inference_mode(False)
def _blur_matrix(size: int, device: torch.device) -> Tensor:
    """The filter along a line of `size` pixels, zeros outside: (size, size), symmetric."""
    offsets = (torch.arange(size)[:, None] - torch.arange(size)).abs()
    taps = torch.tensor([*BLUR, 0.0], dtype=torch.float32)
    return taps[offsets.clamp(max=len(BLUR))].to(device)


def _blur(planes: Tensor) -> Tensor:
    """As matrix products, which are faster than short convolutions of single planes, on CPUs as well."""
    height, width = planes.shape[2:]
    return _blur_matrix(height, planes.device) @ (planes @ _blur_matrix(width, planes.device))


def _scale_errors(a: Tensor, b: Tensor) -> Tensor:
    """The six columns of WEIGHTS for each picture and component, (B, 3, 6)."""
    mean_a, mean_b = _blur(a), _blur(b)
    covariance = _blur(a * b) - mean_a * mean_b
    variances = (_blur(a * a) - mean_a**2) + (_blur(b * b) - mean_b**2)
    luminance = 1 - (mean_a - mean_b) ** 2
    ssim = (1 - luminance * (2 * covariance + SSIM_C2) / (variances + SSIM_C2)).clamp(min=0)
    edges = (1 + (b - mean_b).abs()) / (1 + (a - mean_a).abs()) - 1
    maps = torch.stack([ssim, edges.clamp(min=0), (-edges).clamp(min=0)], 2)
    norms = (maps.square().square().mean((3, 4)) + FLOOR) ** 0.25 - FLOOR**0.25
    return torch.cat([maps.mean((3, 4)), norms], 2)
