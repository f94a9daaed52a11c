"""The visual distance: the weighted sum of SSIMULACRA2 in torch, differentiable.

ssimulacra2.py has the metric itself, its source and its constants. Its score is 100 minus a power of this sum. The
exponent is below 1, so that the score's gradient is infinite where the pictures are equal: optimise the sum instead.
Everything is computed in float32, whatever autocast says.
"""

import functools
import itertools
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from vqcodec.ssimulacra2 import BLUR, OPSIN, OPSIN_BIAS, SCALE, SCALES, SMALLEST, SSIM_C2, WEIGHTS

# Added under the fourth root, whose gradient is infinite at zero: the fourth power of 1e-6.
FLOOR = 1e-24
BIAS = float(OPSIN_BIAS)
# Planes whose weights add up to less are left out: of the finest scale of a photo all but brightness. Scores change by
# less than 0.003.
LEAST = 0.01
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
    side = min(distorted.shape[2:])
    count = sum(-(-side >> max(0, scale - 1)) >= SMALLEST for scale in range(SCALES))  # the last may be half as small
    with torch.autocast(distorted.device.type, enabled=False):
        a, b = _linear(original.detach().float()), _linear(distorted.float())
        total = torch.zeros(len(a), device=a.device)
        for scale in range(count):
            if scale:
                a, b = _halve(a), _halve(b)
            if planes := _planes(scale, count):
                pair = _positive_xyb(a, planes), _positive_xyb(b, planes)
                errors = _ScaleErrors.apply(*pair)  # type: ignore[no-untyped-call]
                total = total + (errors * _weights(scale, count, a.device)).sum((1, 2))
        return total


def _linear(pixels: Tensor) -> Tensor:
    x = pixels.contiguous().clamp(0, 255) / 255
    # `where` differentiates both branches: clamp the power's input where the other branch is taken.
    curved = _power((x.clamp(min=0.04045) + 0.055) / 1.055, 2.4)
    return torch.where(x <= 0.04045, x / 12.92, curved)


def _power(x: Tensor, exponent: float) -> Tensor:
    """x ** exponent for x > 0, in a third of the time of `pow` on a CPU."""
    return (x.log() * exponent).exp()


def _halve(planes: Tensor) -> Tensor:
    """Average 2 x 2 blocks; an odd last row or column counts twice."""
    height, width = planes.shape[2:]
    if height % 2 or width % 2:
        planes = functional.pad(planes, (0, width % 2, 0, height % 2), mode="replicate")
    return functional.avg_pool2d(planes, 2)


def _positive_xyb(linear: Tensor, planes: tuple[int, ...]) -> Tensor:
    """Linear RGB (B, 3, H, W) -> planes of XYB, numbered 0 to 2, made positive."""
    cones = 3 if 2 in planes else 2
    mixed = torch.einsum("oc,bchw->bohw", _opsin(linear.device)[:cones], linear) + BIAS
    root = _power(mixed, 1 / 3) - BIAS ** (1 / 3)
    y = (root[:, 0] + root[:, 1]) / 2
    found = []
    if 0 in planes:
        found.append((root[:, 0] - root[:, 1]) * 7 + 0.42)
    if 1 in planes:
        found.append(y + 0.01)
    if 2 in planes:
        found.append(root[:, 2] - y + 0.55)
    return torch.stack(found, 1)


# Constants are cached on their device because a recorded step (train/recording.py) must not copy from the host. They
# are made outside inference mode because autograd refuses inference tensors.


def _row(plane: int, scale: int, scales: int) -> tuple[float, ...]:
    """The weights of a plane of one of so many scales. A smaller picture takes the first ones, as the metric does."""
    return tuple(itertools.chain(*WEIGHTS))[6 * (plane * scales + scale) :][:6]


def _planes(scale: int, scales: int) -> tuple[int, ...]:
    """The planes that count at a scale."""
    return tuple(plane for plane in range(3) if sum(_row(plane, scale, scales)) > LEAST)


@functools.cache
@torch.inference_mode(False)
def _weights(scale: int, scales: int, device: torch.device) -> Tensor:
    """Those of the planes that count at a scale: (P, 6)."""
    rows = [_row(plane, scale, scales) for plane in _planes(scale, scales)]
    return torch.tensor(rows, dtype=torch.float32, device=device) * SCALE


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


def _blurred(planes: Tensor) -> Tensor:
    """Blur block by block, by matrix products: faster than short single-channel convolutions, on CPUs too."""
    height, width = planes.shape[-2:]
    matrix = _blur_matrix(planes.device)
    lines = functional.pad(planes, (REACH, REACH + -width % BLOCK)).unfold(-1, len(matrix), BLOCK)
    across = (lines.reshape(-1, len(matrix)) @ matrix).reshape(*planes.shape[:-1], -1)[..., :width]
    columns = functional.pad(across, (0, 0, REACH, REACH + -height % BLOCK)).unfold(-2, len(matrix), BLOCK)
    return (matrix.T @ columns.mT).flatten(-3, -2)[..., :height, :]


class _ScaleErrors(torch.autograd.Function):
    """The error terms of the six columns of WEIGHTS at one scale: planes (B, P, H, W) of two pictures -> (B, P, 6).

    The gradient, of the second picture alone, is written by hand: autograd's takes twice as long and keeps every map.
    The blur is symmetric, so its gradient is blurred the same way.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        mean_a, mean_b = _blurred(a), _blurred(b)
        # Without multiplications fused with additions: for equal pictures everything below is rounded alike.
        covariance = _blurred(a * b).sub_(mean_a * mean_b)
        variances = _blurred((a * a).add_(b * b)).sub_((mean_a * mean_a).add_(mean_b * mean_b)).add_(SSIM_C2)  # the sum
        structure = covariance.mul_(2).add_(SSIM_C2).div_(variances)
        ssim = (1 - _luminance(mean_a, mean_b) * structure).clamp_(min=0)
        detail = (a - mean_a).abs_().add_(1)
        edges = (b - mean_b).abs_().add_(1).div_(detail).sub_(1)
        maps = (ssim, edges.clamp(min=0), (-edges).clamp_(min=0))
        norms = torch.stack([_norm(x) for x in maps], 2)
        ctx.save_for_backward(a, b, mean_a, mean_b, variances, structure, ssim, detail, edges, norms)
        return torch.cat([torch.stack([x.mean((2, 3)) for x in maps], 2), norms], 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        a, b, mean_a, mean_b, variances, structure, ssim, detail, edges, norms = ctx.saved_tensors
        area = a.shape[2] * a.shape[3]
        # Of a map x whose mean and norm have gradients: first + second * x^3.
        first = (grads[0][..., :3] / area)[..., None, None].unbind(2)
        second = (grads[0][..., 3:] / area / (norms + FLOOR**0.25) ** 3)[..., None, None].unbind(2)
        of_ssim = (ssim > 0) * torch.addcmul(first[0], ssim.square().mul_(ssim), second[0])
        cubes = edges.square().mul_(edges)
        ringing = torch.addcmul(first[1], cubes, second[1])
        smoothing = torch.addcmul(-first[2], cubes, second[2])
        of_edges = torch.where(edges > 0, ringing, smoothing).div_(detail).mul_((b - mean_b).sign_())
        of_variances = (_luminance(mean_a, mean_b) * of_ssim).mul_(structure).div_(variances)
        of_covariance = (_luminance(mean_a, mean_b) * of_ssim).div_(variances).mul_(-2)
        of_mean = (mean_a - mean_b).mul_(structure).mul_(of_ssim).mul_(-2).sub_(of_edges)
        of_mean = of_mean.addcmul_(of_covariance, mean_a, value=-1).addcmul_(of_variances, mean_b, value=-2)
        total = of_edges.add_(_blurred(of_mean))
        return None, total.addcmul_(a, _blurred(of_covariance)).addcmul_(b, _blurred(of_variances), value=2)


def _luminance(mean_a: Tensor, mean_b: Tensor) -> Tensor:
    return (mean_a - mean_b).square_().neg_().add_(1)


def _norm(x: Tensor) -> Tensor:
    """The 4-norm of maps (B, P, H, W), divided by the fourth root of their size: (B, P)."""
    squares = x.square().flatten(2)
    return (torch.linalg.vecdot(squares, squares) / squares.shape[2] + FLOOR) ** 0.25 - FLOOR**0.25
