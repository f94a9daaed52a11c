"""Encoder-side search for cheaper codes of one picture. Decoders need not know: the files are ordinary.

The encoder chooses each code once, greedily, by its own bits and the error of its own latent. It ignores what a code
does to the bits of later codes and what the decoder makes of it. An encoder trained once for all pictures leaves this
amortisation gap to each one (Yang, Bamler & Mandt 2020, "Improving inference for neural image compression").

Every step evaluates the true cost of the picture, bits + lambda * distortion. One forward and backward pass yields its
gradients with respect to two things: what the prior sees of each code (`inputs`) and what the decoder gets of it
(`e`, the code vector). Each symbol then takes the nearby code k that minimises a local model of the cost:

    bits_k + prior gradient . (inputs_k - inputs) + decoder gradient . (e_k - e) + damping * curvature * |e_k - e|^2

Curvature: bits per squared quantiser step. It starts at the value behind an orthonormal decoder. Every accepted step
then updates it for each code plane, from the change of the gradients over the change of the vectors (Barzilai & Borwein
1988, "Two-point step size gradient methods").

Damping: falls after a step that improves the best cost and rises after any other (Marquardt 1963, "An algorithm for
least-squares estimation of nonlinear parameters").

Of the symbols with a predicted gain only a random fraction changes: neighbours that change together invalidate each
other's prediction. A step may raise the cost a little, and less towards the end (Dueck & Scheuer 1990, "Threshold
accepting"); the best codes seen are returned.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vqcodec import precision, synthesis, tuning
from vqcodec.frame import Frame
from vqcodec.models.model import Context, Estimate, Model, Slice, walk
from vqcodec.models.quantizer import Codebook, grid, look_up, rows
from vqcodec.models.rates import Rates, RowRates
from vqcodec.spans import timed
from vqcodec.ssimulacra2 import SMALLEST
from vqcodec.synthesis import Box
from vqcodec.tuning import Importance
from vqcodec.visual import visual_distance

# Search steps of effort 1, 2, ..., 9.
ROUNDS = (0, 1, 2, 4, 6, 9, 16, 28, 48)
# Large pictures are searched window by window: side of a window, and of the context around it, in pixels.
WINDOW, MARGIN = 768, 64
LEAST_GAIN = 0.25  # predicted gain below which a symbol stays, in bits
NEARBY = 1.5  # largest move of a symbol in one step, in quantiser steps
NEAR_INPUT = 32  # largest change of the prior's inputs in such a move, about
# Initial damping at quality 0 and at quality 100, linear between them; and the upper bound.
DAMPING, MOST_DAMPING = (2.0, 1.0), 4.0
# The same with the visual distance in the cost, whose gradients depend far more on neighbouring symbols.
VISUAL_DAMPING, MOST_VISUAL_DAMPING = (8.0, 4.0), 32.0
# Factors on the damping after a step that improved the best cost, was accepted without that, or was rejected.
ON_GAIN, ON_ACCEPT, ON_REJECT = 0.93, 1.07, 1.3
ON_IDLE = 0.7  # the factor if no symbol changed: the damping is too high to learn from
CURVATURE_DECAY = 0.7  # decay of the curvature statistics per step
# Prior belief about the curvature: a fraction of an orthonormal decoder's, worth as much as this many squared steps.
USUAL, USUAL_STEPS = 0.8, 5.0
LEAST_CURVATURE = 0.1  # lower bound of the estimate, as a fraction of an orthonormal decoder's
# Fraction of the symbols with a predicted gain that change in one step, without and with the visual distance.
FRACTION, VISUAL_FRACTION = 0.5, 0.2
TOLERANCE = 0.003  # relative rise of the cost that the first step may cause


@dataclass
class _Symbols:
    """The symbols of one slice at one point of the search: N positions, P planes.

    Attributes:
        piece: the slice, with its steps and codebook.
        indices: int64 (N, P), the present codes.
        rate_model: the rate model of the symbols.
        weight: float (P,), distortion cost of one squared step behind an orthonormal decoder, in bits.
        factors: float (N,), what the distortion cost of each position is multiplied by.
        inputs: float (1, P * 2 D, h, w), what the prior sees of the codes. A leaf of the graph.
        vectors: float (1, P D, h, w), what the decoder gets of them, in steps. A leaf of the graph.
    """

    piece: Slice
    indices: Tensor
    rate_model: Rates | RowRates
    weight: Tensor
    factors: Tensor
    inputs: Tensor
    vectors: Tensor


@dataclass
class _Point:
    """Evaluated codes: their cost in bits, a scalar with its graph, and the symbols of all slices in coding order."""

    cost: Tensor
    symbols: list[_Symbols]

    @property
    def total(self) -> float:
        return float(self.cost.detach())


@dataclass
class _Slopes:
    """Gradients of the cost for one slice: with respect to `inputs`, (N, P, 2 D), and to `vectors`, (N, P, D)."""

    by_prior: Tensor
    by_decoder: Tensor


class _Curvature:
    """Running estimate of the cost of a squared step in each plane of a slice: float (P,), bits."""

    def __init__(self, orthonormal: Tensor) -> None:
        """orthonormal: the cost behind an orthonormal decoder, float (P,)."""
        self.orthonormal = self.estimate = orthonormal
        self.bent, self.moved = torch.zeros_like(orthonormal), torch.zeros_like(orthonormal)

    def learn(self, change: Tensor, bend: Tensor, factors: Tensor) -> None:
        """Update the estimate after an accepted step.

        Args:
            change: float (N, P, D), how far the vectors moved, in steps.
            bend: float (N, P, D), how much the decoder gradients changed.
            factors: float (N,), see `_Symbols`.
        """
        self.bent = CURVATURE_DECAY * self.bent + (change * bend).sum((0, 2)) / 2
        self.moved = CURVATURE_DECAY * self.moved + factors @ change.square().sum(2)
        measured = (self.bent + USUAL_STEPS * USUAL * self.orthonormal) / (self.moved + USUAL_STEPS)
        self.estimate = torch.maximum(measured, LEAST_CURVATURE * self.orthonormal)


@timed("search")
def improve(
    model: Model,
    frame: Frame,
    pixels: NDArray[np.uint8],
    codes: list[Tensor],
    rounds: int,
    importance: Importance | None = None,
    on_round: Callable[[float], None] | None = None,
) -> list[Tensor]:
    """Search for codes of a picture with a lower rate-distortion cost.

    Args:
        model: the weights.
        frame: the picture's frame.
        pixels: uint8 (H, W, 3).
        codes: the encoder's choice, as of coding.py, of this one picture.
        rounds: search steps in each window.
        importance: weights of the errors; None for plain squared error.
        on_round: called after every step with the fraction of the work done, 0..1.

    Returns:
        New codes in the form of `codes`. On one machine, equal arguments give equal codes.
    """
    importance = (importance or tuning.flat(model.config, frame.quality)).to(model.device)
    codes = [c.clone() for c in codes]
    unit = model.config.multiple
    coarse = codes[0].shape[1], codes[0].shape[2]
    parts = list(windows(*coarse, max(1, WINDOW // unit), -(-MARGIN // unit)))
    for number, (inner, outer, part) in enumerate(parts):

        def done(step: int, number: int = number) -> None:
            if on_round is not None:
                on_round((number + step / rounds) / len(parts))

        given = []
        for level, stage in enumerate(model.config.levels):
            box = synthesis.finer(outer, unit // stage.stride)[2:]
            given.append(codes[level][(0, *box)].to(model.device, torch.int64))
        seen = synthesis.cut(model, pixels[None], outer, unit)
        finest = synthesis.finer(outer, unit // model.config.levels[-1].stride)[2:]
        local = replace(importance, places=importance.of_places(True, (slice(None), *finest)))
        improved = _improve(model, seen, given, frame.quality, local, rounds, done)
        for level, stage in enumerate(model.config.levels):
            ratio = unit // stage.stride
            here, there = synthesis.finer(inner, ratio)[2:], synthesis.finer(part, ratio)[2:]
            codes[level][(0, *here)] = improved[level][there].to("cpu", torch.int16)
    return codes


def _improve(
    model: Model,
    pixels: Tensor,
    codes: list[Tensor],
    quality: int,
    importance: Importance,
    rounds: int,
    on_round: Callable[[int], None],
) -> list[Tensor]:
    """Search in one window: pixels float (1, 3, H, W), codes int64 (h, w, P) for each level."""
    generator = torch.Generator().manual_seed(0)
    initial, most, fraction = DAMPING, MOST_DAMPING, FRACTION
    if importance.visual:
        initial, most, fraction = VISUAL_DAMPING, MOST_VISUAL_DAMPING, VISUAL_FRACTION
    damping = initial[0] + (initial[1] - initial[0]) * quality / 100
    point = _evaluate(model, pixels, codes, quality, importance)
    present = best = codes
    least = point.total
    slopes = _slopes(point)
    curvatures = [_Curvature(s.weight) for s in point.symbols]
    for step in range(rounds):
        progress = step / max(1, rounds - 1)
        changed = iter(_change(point, slopes, [damping * c.estimate for c in curvatures], fraction, generator))
        candidate = [torch.cat([next(changed) for _ in stage.slices], 2) for stage in model.config.levels]
        if all(torch.equal(a, b) for a, b in zip(present, candidate, strict=True)):
            damping *= ON_IDLE
            on_round(step + 1)
            continue
        trial = _evaluate(model, pixels, candidate, quality, importance)
        factor = ON_REJECT
        if trial.total < least * (1 + TOLERANCE * (1 - progress)):
            factor = ON_ACCEPT
            if step + 1 < rounds:
                before, slopes = slopes, _slopes(trial)
                for index, curvature in enumerate(curvatures):
                    moved = trial.symbols[index].vectors.detach() - point.symbols[index].vectors.detach()
                    bend = slopes[index].by_decoder - before[index].by_decoder
                    curvature.learn(rows(moved, bend.shape[1]), bend, trial.symbols[index].factors)
            point, present = trial, candidate
        if trial.total < least:
            factor, best, least = ON_GAIN, candidate, trial.total
        damping = min(most, damping * factor)
        on_round(step + 1)
    return best


@torch.enable_grad()
def _evaluate(model: Model, pixels: Tensor, codes: list[Tensor], quality: int, importance: Importance) -> _Point:
    """The cost of codes: bits + lambda * distortion."""
    at = torch.tensor([quality], device=pixels.device)
    height, width = pixels.shape[2:]
    bits = torch.zeros((), dtype=torch.float32, device=pixels.device)
    symbols: list[_Symbols] = []
    estimate, context = Estimate(model.vqvae, at, height, width), Context(at, height, width)
    with precision.autocast(pixels.device):
        for piece in walk(model.levels, estimate, context):
            h, w = estimate.values.shape[2:]
            given = codes[piece.level][None, :, :, piece.planes]
            indices = given[0].flatten(0, 1)
            inputs = grid(look_up(piece.inputs(), indices), 1, h, w).contiguous().requires_grad_()
            vectors = piece.vectors(given).contiguous().requires_grad_()
            rate_model = _rate_model(piece, context.prepare(), inputs)
            with torch.autocast(pixels.device.type, enabled=False):
                bits = bits + rate_model.bits(piece.codebook, indices).sum()
            estimate.add(vectors)
            context.absorb(inputs)
            step_cost = piece.error_weight(importance.weight, at)[0] * importance.of_planes(piece.level, piece.planes)
            local = importance.places if piece.level == len(codes) - 1 else None
            factors = torch.ones(h * w, dtype=torch.float32, device=pixels.device) if local is None else local.flatten()
            symbols.append(_Symbols(piece, indices, rate_model, step_cost, factors, inputs, vectors))
        restored = estimate.pixels()
    error = (restored - pixels).square().sum() / 3
    distortion = error
    if importance.visual and min(height, width) >= SMALLEST:
        distance = height * width * visual_distance(restored, pixels).sum()
        distortion = importance.squared * error + importance.visual * distance
    return _Point(bits + importance.weight * distortion, symbols)


def _rate_model(piece: Slice, context: Tensor, inputs: Tensor) -> Rates | RowRates:
    """The rate model of all symbols of a slice, in raster order, by teacher forcing.

    context: from `Context.prepare`. inputs: what the prior sees of all the slice's codes, (1, P * 2 D, h, w).
    """
    prior = piece.prior
    assert prior is not None
    height, width = inputs.shape[2:]
    coded = torch.zeros(1, 1, height, width, dtype=torch.float32, device=inputs.device)
    everywhere: Tensor | None = None
    for number, places in prior.passes(height, width):
        parameters = prior.parameters_at(number, context, inputs if prior.at_once else inputs * coded)
        if everywhere is None:
            everywhere = parameters.new_zeros(height, width, *parameters.shape[1:])
        everywhere[places] = parameters.reshape(everywhere[places].shape)
        coded = coded.clone()
        coded[:, :, places[0], places[1]] = 1
    assert everywhere is not None
    return piece.rates(everywhere.flatten(0, 1))


def _slopes(point: _Point) -> list[_Slopes]:
    """The gradients for every slice. Frees the graph of the point."""
    leaves = [leaf for s in point.symbols for leaf in (s.inputs, s.vectors)]
    # Nothing sees the codes of a last slice with a single pass: their gradient is None.
    gradients = torch.autograd.grad(point.cost, leaves, allow_unused=True)
    pairs = iter(
        [torch.zeros_like(leaf) if slope is None else slope for leaf, slope in zip(leaves, gradients, strict=True)]
    )
    return [_Slopes(*(rows(next(pairs), s.indices.shape[1]) for _ in range(2))) for s in point.symbols]


@torch.no_grad()
def _change(
    point: _Point, slopes: list[_Slopes], penalties: list[Tensor], fraction: float, generator: torch.Generator
) -> list[Tensor]:
    """New codes of all slices, (h, w, P): a random fraction of the symbols with a predicted gain has changed."""
    changed = []
    for s, slope, penalty in zip(point.symbols, slopes, penalties, strict=True):
        best, gains = _best(s, slope, penalty)
        moves = (gains > LEAST_GAIN) & (
            torch.rand(gains.shape, generator=generator, dtype=torch.float32).to(gains.device) < fraction
        )
        changed.append(torch.where(moves, best, s.indices).reshape(*s.inputs.shape[2:], -1))
    return changed


def _best(s: _Symbols, slopes: _Slopes, penalty: Tensor) -> tuple[Tensor, Tensor]:
    """The best code of every symbol by the module's equation.

    Args:
        s: the symbols. slopes: their gradients.
        penalty: float (P,), damping * curvature: bits per squared step in each plane where `_Symbols.factors` is 1.

    Returns:
        The codes, int64 (N, P), and their predicted gain over the present codes in bits, float (N, P).
    """
    curved = s.factors[:, None] * penalty
    book: Codebook = s.piece.codebook
    vectors, inputs = book.vectors.detach(), book.inputs()
    lengths = vectors.square().sum(-1)
    # Symbols with code 0 are skipped if leaving it costs more bits than the gradients can promise at best.
    hope = slopes.by_decoder.square().sum(2) / (4 * curved) + NEAR_INPUT * slopes.by_prior.abs().sum(2)
    free = ((s.indices > 0) | (s.rate_model.zero < hope)).T
    given = (s.indices, slopes.by_prior, slopes.by_decoder, curved)
    k, by_prior, by_decoder, curved = (x.transpose(0, 1)[free] for x in given)
    chosen, gained = torch.empty_like(k), torch.empty_like(curved)
    for block, parts, logp in s.rate_model.some(free).blocks(book, free.sum(1).tolist()):
        distances, costs = torch.empty_like(logp), torch.empty_like(logp)
        for plane, part, here in parts:
            own = k[part]
            torch.addmm(lengths[plane], vectors[plane][own], vectors[plane].T, alpha=-2, out=distances[here])
            distances[here] += lengths[plane][own, None]
            torch.mm(by_decoder[part], vectors[plane].T, out=costs[here]).addmm_(by_prior[part], inputs[plane].T)
            costs[here].addcmul_(distances[here], curved[part, None])
        costs -= logp
        costs.masked_fill_(distances > NEARBY**2, math.inf)
        least, chosen[block] = costs.min(1)
        gained[block] = costs.gather(1, k[block, None])[:, 0] - least
    best, gains = s.indices.clone(), torch.zeros(s.indices.shape, dtype=torch.float32, device=s.indices.device)
    best.T[free], gains.T[free] = chosen, gained
    return best, gains


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
