"""Measures the eye's sensitivity to coding errors of given weights, on pictures: makes a `Tuning`.

Pictures are compressed and decoded. One forward and backward pass yields the gradients of squared error and of visual
distance with respect to every code vector. The error of a code vector is its difference to the residual that it stands
for. Gradient times error, summed over the symbols of a plane or of a position, is what these errors contribute to each
of the two, and the ratio of the contributions is the sensitivity.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from vqcodec import coding, synthesis, tuning
from vqcodec.encoder import encode
from vqcodec.frame import Frame
from vqcodec.models.model import Estimate, Model, walk
from vqcodec.tuning import LEAST_VARIANCE, Tuning
from vqcodec.visual import visual_distance

QUALITIES = (1, 8, 25, 50, 75, 95)
# Bounds of the sensitivities, because those of planes that hardly matter are noisy.
LEAST, MOST = 0.05, 40.0
NEIGHBOURS = 3  # side of the window in which contributions are averaged, in positions
# Iterations that equalise file sizes with and without tuning, and the change of log weight per change of log size.
BALANCING_ROUNDS, WEIGHT_FOR_SIZE = 2, 3.5
LEAST_BALANCE, MOST_BALANCE = 0.4, 2.5

Pixels = NDArray[np.uint8]


def measure(model: Model, pictures: Sequence[Pixels]) -> Tuning:
    """Measure the tuning of weights.

    Args:
        model: the weights.
        pictures: uint8 (H, W, 3), at least 64 x 64 pixels. A few megapixels in all are enough. Do not use pictures of
            a test set.
    """
    found = [_contributions(model, pictures, quality) for quality in QUALITIES]
    untuned = Tuning(
        QUALITIES,
        unit=torch.tensor([f.unit for f in found]),
        masking=torch.tensor([_masking(model, f, pictures) for f in found]),
        balance=torch.ones(len(QUALITIES)),
        planes=tuple(torch.stack(levels) for levels in zip(*(f.planes for f in found), strict=True)),
    )
    return _balanced(model, untuned, pictures)


@dataclass
class _Contributions:
    """Measurements at one quality.

    Attributes:
        unit: see `Tuning`.
        planes: for each level float (P,), sensitivity to errors in each plane.
        places: for each picture float (h, w), sensitivity at the positions of the finest level.
    """

    unit: float
    planes: list[Tensor]
    places: list[Tensor]


def _contributions(model: Model, pictures: Sequence[Pixels], quality: int) -> _Contributions:
    at = torch.tensor([quality], device=model.device)
    squares = [torch.zeros(sum(p.planes for p in stage.slices)) for stage in model.config.levels]
    visuals = [x.clone() for x in squares]
    ratios: list[float] = []
    places: list[Tensor] = []
    for pixels in pictures:
        height, width = (side - side % model.config.multiple for side in pixels.shape[:2])
        pixels = pixels[:height, :width]
        frame = Frame(width, height, quality)
        with coding.exact(model):
            codes = encode(model, frame, pixels[None])[1]
            latents = synthesis.analyse(model, pixels[None], at)
        original = torch.from_numpy(pixels.copy()).to(model.device).permute(2, 0, 1)[None].float()
        errors, leaves, restored = _restore(model, codes, latents, at)
        square = (restored - original).square().mean()
        visual = visual_distance(restored, original).sum()
        ratios.append(float(square.detach() / visual.detach().clamp(min=1e-6)))
        slopes = [torch.autograd.grad(x, leaves, retain_graph=x is square) for x in (square, visual)]
        parts = iter(zip(errors, *slopes, strict=True))
        for level in model.levels:
            at_places: tuple[list[Tensor], list[Tensor]] = ([], [])
            for piece in level.slices:
                error, *by_leaf = next(parts)
                for total, at_place, slope in zip((squares, visuals), at_places, by_leaf, strict=True):
                    share = (slope * error)[0].cpu().unflatten(0, (piece.config.planes, -1)).sum(1)
                    total[level.number][piece.planes] += share.sum((1, 2))
                    at_place.append(share.sum(0))
        square_places, visual_places = (_smooth(torch.stack(x).sum(0)) for x in at_places)
        places.append(visual_places / square_places.clamp(min=1e-12))
    unit = float(np.exp(np.mean(np.log(ratios))))
    # A plane without measurable contribution to the squared error keeps the neutral sensitivity 1.
    planes = [torch.where(s > 0, unit * v / s, 1.0).clamp(LEAST, MOST) for v, s in zip(visuals, squares, strict=True)]
    return _Contributions(unit, planes, [unit * p for p in places])


def _restore(
    model: Model, codes: list[Tensor], latents: list[Tensor], quality: Tensor
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Decode codes.

    Args:
        model: the weights. codes: of one picture, as of coding.py. latents: what they stand for, from
            `synthesis.analyse`. quality: (1,), 1..100.

    Returns:
        For each slice the errors of its vectors, float (1, P D, h, w) in steps; for each slice its vectors, of the same
        shape, leaves of the graph; and the pixels, float (1, 3, H, W), with the graph.
    """
    errors, leaves = [], []
    height, width = (side * model.config.multiple for side in codes[0].shape[1:3])
    estimate = Estimate(model.vqvae, quality, height, width)
    for piece in walk(model.levels, estimate):
        indices = codes[piece.level][..., piece.planes].to(model.device, torch.int64)
        vectors = piece.vectors(indices)
        errors.append((vectors - estimate.residual(latents[piece.level])).detach())
        leaves.append(vectors.requires_grad_())
        estimate.add(leaves[-1])
    return errors, leaves, estimate.pixels()


def _smooth(contributions: Tensor) -> Tensor:
    window = functional.avg_pool2d(contributions[None, None], NEIGHBOURS, 1, NEIGHBOURS // 2, count_include_pad=False)
    return window[0, 0].clamp(min=0)


def _masking(model: Model, found: _Contributions, pictures: Sequence[Pixels]) -> float:
    """Fit the exponent of masking: the slope of log sensitivity over log variance, by least squares."""
    variances, sensitivities = [], []
    for pixels, places in zip(pictures, found.places, strict=True):
        height, width = places.shape
        variances.append(tuning.activity(pixels[None], model.config)[0, :height, :width].flatten())
        sensitivities.append(places.flatten())
    x = (torch.cat(variances) + LEAST_VARIANCE).log()
    y = torch.cat(sensitivities)
    usable = (y > LEAST) & (y < MOST)
    x, y = x[usable], y[usable].log()
    x = x - x.mean()
    return float((x * y).sum() / x.square().sum().clamp(min=1e-6)) if len(x) else 0.0


def _balanced(model: Model, tuned: Tuning, pictures: Sequence[Pixels]) -> Tuning:
    """Adjust `Tuning.balance` until files are as large as without tuning."""

    def size(quality: int, how: Tuning | None) -> int:
        total = 0
        for pixels in pictures:
            height, width = pixels.shape[:2]
            frame = Frame(width, height, quality)
            importance = None if how is None else how.importance(model.config, pixels[None], quality)
            with coding.exact(model):
                total += sum(map(len, encode(model, frame, pixels[None], importance)[0][0]))
        return total

    wanted = [size(quality, None) for quality in QUALITIES]
    for _ in range(BALANCING_ROUNDS):
        sizes = [size(quality, tuned) for quality in QUALITIES]
        change = torch.tensor([np.log(a / b) for a, b in zip(wanted, sizes, strict=True)], dtype=torch.float32)
        balance = tuned.balance * (WEIGHT_FOR_SIZE * change).exp()
        tuned = replace(tuned, balance=balance.clamp(LEAST_BALANCE, MOST_BALANCE))
    return tuned
