"""The visual distance: the weighted sum of SSIMULACRA2 in torch, differentiable.

ssimulacra2.py has the metric itself, its source and its constants. Its score is 100 minus a power of this sum. The
exponent is below 1, so that the score's gradient is infinite where the pictures are equal: optimise the sum instead.
Everything is computed in float32, whatever autocast says.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from vqcodec.ssimulacra2 import BLUR, OPSIN, OPSIN_BIAS, SCALE, SCALES, SMALLEST, SSIM_C2, WEIGHTS

# Added under the fourth root, whose gradient is infinite at zero: the fourth power of 1e-6.
FLOOR = 1e-24
REACH = len(BLUR) - 1  # of the blur, in pixels
BLOCK = 32  # pixels of a line that are blurred at a time


def visual_distance(distorted: Tensor, original: Tensor) -> Tensor:
    """The SSIMULACRA2 sum of pictures: 0 if they are equal, about 1 at a score of 83, 2.7 at 70 and 8 at 40.

    Args:
        distorted: float (B, 3, H, W), sRGB in 0..255, clamped to that range. Gets gradients.
        original: the same; gets no gradients.

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
    # `where` differentiates both branches: clamp the power's input where the other branch is taken.
    curved = ((x.clamp(min=0.04045) + 0.055) / 1.055) ** 2.4
    return torch.where(x <= 0.04045, x / 12.92, curved)


def _halve(planes: Tensor) -> Tensor:
    """Average 2 x 2 blocks; an odd last row or column counts twice."""
    height, width = planes.shape[2:]
    return functional.avg_pool2d(functional.pad(planes, (0, width % 2, 0, height % 2), mode="replicate"), 2)


def _positive_xyb(linear: Tensor) -> Tensor:
    mixed = torch.einsum("oc,bchw->bohw", _opsin(linear.device), linear) + float(OPSIN_BIAS)
    mixed = mixed ** (1 / 3) - float(OPSIN_BIAS) ** (1 / 3)
    x, y = (mixed[:, 0] - mixed[:, 1]) / 2, (mixed[:, 0] + mixed[:, 1]) / 2
    return torch.stack([x * 14 + 0.42, y + 0.01, mixed[:, 2] - y + 0.55], 1)


# Constants are cached on their device because a recorded step (train/recording.py) must not copy from the host. They
# are made outside inference mode because autograd refuses inference tensors.


@functools.cache
@torch.inference_mode(False)
def _weights(device: torch.device) -> Tensor:
    return torch.tensor(WEIGHTS, dtype=torch.float32, device=device).flatten()


@functools.cache
@torch.inference_mode(False)
def _opsin(device: torch.device) -> Tensor:
    return torch.from_numpy(OPSIN).to(device)


@functools.cache
@torch.inference_mode(False)
def _blur_matrix(device: torch.device) -> Tensor:
    """What blurs a block of a line, given the block and `REACH` pixels on each side: (BLOCK + 2 REACH, BLOCK)."""
    offsets = (torch.arange(BLOCK + 2 * REACH)[:, None] - REACH - torch.arange(BLOCK)).abs()
    taps = torch.tensor([*BLUR, 0.0], dtype=torch.float32)
    return taps[offsets.clamp(max=len(BLUR))].to(device)


class _Blur(torch.autograd.Function):
    """The blur of planes (..., H, W), with zeros outside. It is symmetric: the gradient is blurred the same way."""

    @staticmethod
    def forward(ctx: Any, planes: Tensor) -> Tensor:
        return _blurred(planes)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return _blurred(grads[0])


def _blurred(planes: Tensor) -> Tensor:
    """Blur block by block, by matrix products: faster than short single-channel convolutions, on CPUs too."""
    height, width = planes.shape[-2:]
    matrix = _blur_matrix(planes.device)
    lines = functional.pad(planes, (REACH, REACH + -width % BLOCK)).unfold(-1, len(matrix), BLOCK)
    across = (lines.reshape(-1, len(matrix)) @ matrix).reshape(*planes.shape[:-1], -1)[..., :width]
    columns = functional.pad(across, (0, 0, REACH, REACH + -height % BLOCK)).unfold(-2, len(matrix), BLOCK)
    return (matrix.T @ columns.mT).flatten(-3, -2)[..., :height, :]


def _blur(planes: Tensor) -> Tensor:
    blurred: Tensor = _Blur.apply(planes)  # type: ignore[no-untyped-call]
    return blurred


def _scale_errors(a: Tensor, b: Tensor) -> Tensor:
    """The error terms of the six columns of WEIGHTS, for each picture and component: (B, 3, 6)."""
    mean_a, mean_b = _blur(a), _blur(b)
    covariance = _blur(a * b) - mean_a * mean_b
    variances = _blur(a * a + b * b) - (mean_a**2 + mean_b**2)  # the sum of both
    luminance = 1 - (mean_a - mean_b) ** 2
    ssim = (1 - luminance * (2 * covariance + SSIM_C2) / (variances + SSIM_C2)).clamp(min=0)
    edges = (1 + (b - mean_b).abs()) / (1 + (a - mean_a).abs()) - 1
    maps = [x.flatten(2) for x in (ssim, edges.clamp(min=0), (-edges).clamp(min=0))]
    squares = [x.square() for x in maps]
    fourths = torch.stack([torch.linalg.vecdot(x, x) for x in squares], 2) / squares[0].shape[2]
    norms = (fourths + FLOOR) ** 0.25 - FLOOR**0.25
    return torch.cat([torch.stack([x.mean(2) for x in maps], 2), norms], 2)
