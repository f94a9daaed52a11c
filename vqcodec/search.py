"""Encoder-side search for latents whose codes cost less. Decoders need not know: the files are ordinary.

An encoder trained once for all pictures leaves an amortisation gap to each one (Yang, Bamler & Mandt 2020, "Improving
inference for neural image compression"). So the search changes the latents of one picture, and the encoder chooses
their codes again, by bits and error as always. Every round looks at what the decoder makes of the codes and moves each
latent z, in quantiser steps, by

    -rate * m / sqrt(1 + sum of m^2 so far)        m = gradient / curvature + STAY * (z - decoded latent)

The gradient is that of lambda * distortion by the decoded latent. The curvature is that of the squared error behind an
orthonormal decoder. Decoders are flatter: at m = 0 the latent is Newton's step away from what it decodes to, at STAY
times this curvature. The root slows down latents that swing (Duchi, Hazan & Singer 2011, "Adaptive subgradient
methods"). The rate falls to zero, and the faster the more rounds have found nothing better: close latents may have
different codes, so that only small steps settle.

Every round begins with counting bits as the range coder writes them. If bits + lambda * distortion fell to the end, the
last round's latents are taken without a look: with its small step they are hardly ever worse. Else the best ones are.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vqcodec import coding, encoder, precision, synthesis, tuning
from vqcodec.frame import Frame
from vqcodec.models.model import Estimate, Model, Slice, walk
from vqcodec.spans import timed
from vqcodec.ssimulacra2 import SMALLEST
from vqcodec.synthesis import Box
from vqcodec.tuning import Importance
from vqcodec.visual import visual_distance

# Rounds of effort 1, 2, ..., 9.
ROUNDS = (0, 1, 2, 3, 4, 6, 8, 12, 16)
# Large pictures are searched window by window: side of a window, and of the context around it, in pixels.
WINDOW, MARGIN = 768, 64
# The rate of the first round, for squared error alone and with the visual distance, whose gradients depend far more on
# neighbouring latents.
RATE, VISUAL_RATE = 0.8, 0.2
STAY = 0.6
ON_NOTHING = 0.7  # factor on the rate after a round that found nothing better


@dataclass
class _Decoded:
    """What the codes of a slice become in the decoder.

    Attributes:
        piece: the slice.
        step: float (1, P D, 1, 1), the quantiser step of each channel in latent units.
        cost: float (1, P D, h, w), or of sides that broadcast to it: bits for a squared step behind an orthonormal
            decoder.
        vectors: float (1, P D, h, w), the code vectors in steps. A leaf of the graph.
        latents: float (1, P D, h, w), estimate and vectors together.
    """

    piece: Slice
    step: Tensor
    cost: Tensor
    vectors: Tensor
    latents: Tensor


@timed("search")
def improve(
    model: Model,
    frame: Frame,
    pixels: NDArray[np.uint8],
    latents: list[Tensor],
    rounds: int,
    importance: Importance | None = None,
    on_round: Callable[[float], None] | None = None,
) -> list[Tensor]:
    """Search for latents of a picture whose codes have a lower rate-distortion cost.

    Args:
        model: the weights. frame: that of the picture.
        pixels: uint8 (H, W, 3).
        latents: the encoder's, from `synthesis.analyse`, of this one picture.
        rounds: how many times latents move, in each window.
        importance: weights of the errors; None for plain squared error.
        on_round: called after every round with the fraction of the work done, 0..1.

    Returns:
        New latents, for `encoder.choose` with the same importance. On one machine, equal arguments give equal latents.
    """
    importance = (importance or tuning.flat(model.config, frame.quality)).to(model.device)
    found = [z.clone() for z in latents]
    unit = model.config.multiple
    coarse = latents[0].shape[2], latents[0].shape[3]
    parts = list(windows(*coarse, max(1, WINDOW // unit), -(-MARGIN // unit)))
    for number, (inner, outer, part) in enumerate(parts):

        def done(count: int, number: int = number) -> None:
            if on_round is not None:
                on_round((number + count / rounds) / len(parts))

        boxes = [synthesis.finer(outer, unit // stage.stride) for stage in model.config.levels]
        places = importance.of_places(True, (slice(None), *boxes[-1][2:]))
        height, width = (
            min(span.stop * unit, length) - span.start * unit
            for span, length in zip(outer, (frame.height, frame.width), strict=True)
        )
        window = Frame(width, height, frame.quality)
        seen = synthesis.cut(model, pixels[None], outer, unit)[:, :, :height, :width]  # without padding
        given = [z[box].clone() for z, box in zip(latents, boxes, strict=True)]
        improved = _improve(model, window, seen, given, replace(importance, places=places), rounds, done)
        for level, stage in enumerate(model.config.levels):
            ratio = unit // stage.stride
            found[level][synthesis.finer(inner, ratio)] = improved[level][synthesis.finer(part, ratio)]
    return found


def _improve(
    model: Model,
    frame: Frame,
    pixels: Tensor,
    latents: list[Tensor],
    importance: Importance,
    rounds: int,
    on_round: Callable[[int], None],
) -> list[Tensor]:
    """Search in one window: pixels float (1, 3, H, W). Overwrites the latents."""
    rate = VISUAL_RATE if importance.visual else RATE
    swings = [torch.zeros_like(z) for z in latents]
    best, least, falling = [z.clone() for z in latents], math.inf, True
    for count in range(rounds):
        coders = coding.new_coders(model, frame, 1)
        with coding.exact(model):
            codes = encoder.choose(model, frame, latents, importance, coders)
        bits = 8 * sum(map(len, coding.in_file_order(coders)[0]))
        distortion, slices = _decode(model, codes, pixels, frame.quality, importance)
        cost = bits + float(distortion.detach())
        falling = cost < least
        if falling:
            least = cost
            for kept, z in zip(best, latents, strict=True):
                kept.copy_(z)
        else:
            rate *= ON_NOTHING
        _move(latents, swings, distortion, slices, rate * (1 - count / rounds) ** 2)
        on_round(count + 1)
    return latents if falling else best


def _decode(
    model: Model, codes: list[Tensor], pixels: Tensor, quality: int, importance: Importance
) -> tuple[Tensor, list[_Decoded]]:
    """lambda * distortion of codes in bits, a scalar, and what slices become, in coding order."""
    at = torch.tensor([quality], device=pixels.device)
    height, width = pixels.shape[2:]
    slices: list[_Decoded] = []
    estimate = Estimate(model.vqvae, at, *Frame(width, height, quality).padded(model.config.multiple))
    with precision.autocast(pixels.device):
        for piece in walk(model.levels, estimate):
            indices = codes[piece.level][..., piece.planes].to(pixels.device, torch.int64)
            vectors = piece.vectors(indices).detach().requires_grad_()
            estimate.add(vectors)
            cost = encoder.step_costs(piece, at, importance).repeat_interleave(piece.config.dim, 1)[:, :, None, None]
            places = importance.places if piece.level == len(codes) - 1 else None
            cost = cost if places is None else cost * places[:, None]
            slices.append(_Decoded(piece, estimate.step.detach(), cost, vectors, estimate.here.detach()))
        restored = estimate.pixels()[:, :, :height, :width]
    error = (restored - pixels).square().sum() / 3
    if importance.visual and min(height, width) >= SMALLEST:
        distance = height * width * visual_distance(restored, pixels).sum()
        error = importance.squared * error + importance.visual * distance
    return importance.weight * error, slices


def _move(latents: list[Tensor], swings: list[Tensor], distortion: Tensor, slices: list[_Decoded], rate: float) -> None:
    """Move the latents by the module's equation, in place.

    Args:
        swings: for each level the sum of m^2 so far, to which this round's is added.
        distortion, slices: from `_decode`, whose graph this frees.
    """
    gradients = torch.autograd.grad(distortion, [one.vectors for one in slices])
    for one, gradient in zip(slices, gradients, strict=True):
        z, swing = (levels[one.piece.level][:, one.piece.channels] for levels in (latents, swings))
        m = gradient / (2 * one.cost) + STAY * (z - one.latents) / one.step
        swing.addcmul_(m, m)
        z.sub_(rate * one.step * m / (1 + swing).sqrt())


def windows(height: int, width: int, size: int, reach: int) -> Iterator[tuple[Box, Box, Box]]:
    """Cover a grid with windows.

    Args:
        height, width: of the grid, in positions. size: side of a window. A grid of no more than size * size positions
            is one window. reach: by how many positions windows are widened on each side.

    Yields:
        (inner, outer, part): the window, the window widened within the grid, and the place of `inner` in `outer`.
    """
    if height * width <= size * size:
        size = max(height, width)

    def spans(length: int) -> list[tuple[slice, slice, slice]]:
        found = []
        for start in range(0, length, size):
            stop = min(start + size, length)
            low, high = max(0, start - reach), min(length, stop + reach)
            found.append((slice(start, stop), slice(low, high), slice(start - low, stop - low)))
        return found

    for y in spans(height):
        for x in spans(width):
            yield (y[0], x[0]), (y[1], x[1]), (y[2], x[2])
