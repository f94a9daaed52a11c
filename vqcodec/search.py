"""Encoder search: other codes for the same picture, with a lower cost in fact. Files stay ordinary files.

The encoder chooses every code once, by its own bits and the error of its latent. What the code does to the bits of later
codes, and what the decoder makes of it, it does not see. Here both are asked of the networks: one pass forward and backward gives,
for all symbols at once, the slopes of the picture's cost by what the prior sees of a code and by what the decoder gets of it. Every
symbol is chosen again, among codes nearby, by

    bits_k + prior's slope . (inputs_k - inputs) + decoder's slope . (e_k - e) + caution * weight * |e_k - e|^2

where the weight is what a squared step costs: at first behind an orthonormal decoder, then, plane by plane, as slopes have changed
where symbols had (Barzilai & Borwein 1988, "Two-point step size gradient methods"). Of the symbols that would gain, a random part
changes, because neighbours that move together undo what each was promised. Caution falls with every step that gains and rises with
every other (Marquardt 1963, "An algorithm for least-squares estimation of nonlinear parameters").
A step may make the picture a little worse, ever less so (Dueck & Scheuer 1990, "Threshold accepting"); the best codes of all are kept. That an encoder which is trained once leaves so much to each picture: Yang, Bamler & Mandt 2020, "Improving
inference for neural image compression".
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vqcodec import precision, synthesis, tuning
from vqcodec.frame import Frame
from vqcodec.models.model import Context, Estimate, Model, Slice, walk
from vqcodec.models.quantizer import MOST_BITS, Codebook, Rates, grid, look_up, rate_blocks, rows, softplus2
from vqcodec.spans import timed
from vqcodec.ssimulacra2 import SMALLEST
from vqcodec.tuning import Importance
from vqcodec.visual import visual_distance

# Steps of each effort from 1.
ROUNDS = (0, 1, 2, 4, 6, 9, 16, 28, 48)
# Sides of the parts of a picture that are searched on their own, in pixels, and what is seen around them.
WINDOW, MARGIN = 768, 64
LEAST_GAIN = 0.25  # in bits, below which no symbol changes
NEARBY = 1.5  # how far a symbol moves in one step, in quantiser steps
NEAR_INPUT = 32
# Of the first step, at quality 0 and 100; and the most.
CAUTION, MOST_CAUTION = (2.0, 1.0), 4.0
# With the visual distance in the cost: what a step costs there depends on its neighbours far more.
VISUAL_CAUTION, MOST_VISUAL_CAUTION = (8.0, 4.0), 32.0
# What it is multiplied by after a step that gained, one that was taken all the same, and one that was not.
GAINED, TAKEN, REFUSED = 0.93, 1.07, 1.3
IDLE = 0.7  # the same where no symbol moved: too much caution to learn anything
# Of what is known of a plane's curvature, how much counts again at the next step; and what it is held for before anything is known,
# as a share of an orthonormal decoder's, and with the evidence of how many squared steps.
REMEMBERED = 0.7
USUAL, EVIDENCE = 0.8, 5.0
LEAST_CURVATURE = 0.1  # of an orthonormal decoder's
# Of the symbols that would gain, the share that changes in one step; the same with the visual distance.
SHARE, VISUAL_SHARE = 0.5, 0.2
TOLERANCE = 0.003  # of the cost, by which the first step may raise it


@dataclass
class _Symbols:
    """One slice's symbols at one point of the search: N positions, P planes.

    Attributes:
        piece: steps and codebook. indices: int64 (N, P). model: their rate model. weight: float (P,), bits per squared step
            behind an orthonormal decoder. places: float (N,), factors on it for each position.
        inputs: what the prior sees, float (1, P * 2 D, h, w), and vectors: what the decoder gets, (1, P D, h, w), in steps; the
            leaves of the slopes.
    """

    piece: Slice
    indices: Tensor
    model: Rates
    weight: Tensor
    places: Tensor
    inputs: Tensor
    vectors: Tensor


@dataclass
class _Point:
    """Codes, evaluated: their cost, a scalar with a graph, and all slices in coding order."""

    cost: Tensor
    symbols: list[_Symbols]

    @property
    def total(self) -> float:
        return float(self.cost.detach())


@dataclass
class _Slopes:
    """Of one slice at one point: derivatives of the cost by `inputs` and `vectors`, (N, P, 2 D) and (N, P, D)."""

    by_prior: Tensor
    by_decoder: Tensor


class _Curvature:
    """What a squared step costs in each plane of a slice: float (P,), bits."""

    def __init__(self, weight: Tensor) -> None:
        """weight: that of an orthonormal decoder, float (P,)."""
        self.weight = self.estimate = weight
        self.bent, self.moved = torch.zeros_like(weight), torch.zeros_like(weight)

    def learn(self, change: Tensor, bend: Tensor, places: Tensor) -> None:
        """Symbols have moved by `change`, in steps, and slopes have changed by `bend` at that; both float (N, P, D). places: as of `_Symbols`."""
        self.bent = REMEMBERED * self.bent + (change * bend).sum((0, 2)) / 2
        self.moved = REMEMBERED * self.moved + places @ change.square().sum(2)
        measured = (self.bent + EVIDENCE * USUAL * self.weight) / (self.moved + EVIDENCE)
        self.estimate = torch.maximum(measured, LEAST_CURVATURE * self.weight)


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
    """Search for better codes.

    Args:
        pixels: uint8 (H, W, 3). codes: those of the encoder, as `coding.decode` returns them. rounds: steps of each window.
        importance: what errors count; None for their squares. on_round: called after every step with the share of the work that is done.

    Returns:
        as `codes`; equal input gives equal output on one machine.
    """
    importance = (importance or tuning.flat(model.config, frame.quality)).to(model.device)
    codes = [c.clone() for c in codes]
    unit = model.config.multiple
    coarse = codes[0].shape[0], codes[0].shape[1]
    windows = list(synthesis.windows(*coarse, max(1, WINDOW // unit), -(-MARGIN // unit)))
    for number, (inner, outer, part) in enumerate(windows):

        def done(step: int, number: int = number) -> None:
            if on_round is not None:
                on_round((number + step / rounds) / len(windows))

        given = []
        for level, stage in enumerate(model.config.levels):
            box = synthesis.finer(outer, unit // stage.stride)[2:]
            given.append(codes[level][box].to(model.device, torch.int64))
        seen = synthesis.cut(model, pixels, outer)
        finest = synthesis.finer(outer, unit // model.config.levels[-1].stride)[2:]
        local = replace(importance, places=importance.of_places(True, finest))
        found = _improve(model, seen, given, frame.quality, local, rounds, done)
        for level, stage in enumerate(model.config.levels):
            ratio = unit // stage.stride
            here, there = synthesis.finer(inner, ratio)[2:], synthesis.finer(part, ratio)[2:]
            codes[level][here] = found[level][there].to("cpu", torch.int16)
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
    """The search in one window: float (1, 3, H, W) and int64 (h, w, P) a level."""
    chance = torch.Generator().manual_seed(0)
    first, most, moving = CAUTION, MOST_CAUTION, SHARE
    if importance.visual:
        first, most, moving = VISUAL_CAUTION, MOST_VISUAL_CAUTION, VISUAL_SHARE
    caution = first[0] + (first[1] - first[0]) * quality / 100
    point = _evaluate(model, pixels, codes, quality, importance)
    here = best = codes
    least = point.total
    slopes = _slopes(point)
    curvatures = [_Curvature(s.weight) for s in point.symbols]
    for step in range(rounds):
        share = step / max(1, rounds - 1)
        changed = iter(_change(point, slopes, [caution * c.estimate for c in curvatures], moving, chance))
        other = [torch.cat([next(changed) for _ in stage.slices], 2) for stage in model.config.levels]
        if all(torch.equal(a, b) for a, b in zip(here, other, strict=True)):
            caution *= IDLE
            on_round(step + 1)
            continue
        found = _evaluate(model, pixels, other, quality, importance)
        change = REFUSED
        if found.total < least * (1 + TOLERANCE * (1 - share)):
            change = TAKEN
            if step + 1 < rounds:
                before, slopes = slopes, _slopes(found)
                for index, curvature in enumerate(curvatures):
                    moved = found.symbols[index].vectors.detach() - point.symbols[index].vectors.detach()
                    bend = slopes[index].by_decoder - before[index].by_decoder
                    curvature.learn(rows(moved, bend.shape[1]), bend, found.symbols[index].places)
            point, here = found, other
        if found.total < least:
            change, best, least = GAINED, other, found.total
        caution = min(most, caution * change)
        on_round(step + 1)
    return best


@torch.enable_grad()
def _evaluate(model: Model, pixels: Tensor, codes: list[Tensor], quality: int, importance: Importance) -> _Point:
    """Bits + weight * distortion of the codes."""
    at = torch.tensor([quality], device=pixels.device)
    height, width = pixels.shape[2:]
    bits = torch.zeros((), device=pixels.device)
    found: list[_Symbols] = []
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
                theta, zero = rate_model.theta.float(), rate_model.zero.float()
                spent: Tensor = _Spent.apply(theta, zero, piece.codebook, indices)  # type: ignore[no-untyped-call]
            bits = bits + spent
            estimate.add(vectors)
            context.absorb(inputs)
            weight = piece.error_weight(importance.weight, at)[0] * importance.of_planes(piece.level, piece.planes)
            places = importance.places if piece.level == len(codes) - 1 else None
            factors = torch.ones(h * w, device=pixels.device) if places is None else places.flatten()
            found.append(_Symbols(piece, indices, rate_model, weight, factors, inputs, vectors))
        restored = estimate.pixels()
    error = (restored - pixels).square().sum() / 3
    distortion = error
    if importance.visual and min(height, width) >= SMALLEST:
        distance = height * width * visual_distance(restored, pixels).sum()
        distortion = importance.squared * error + importance.visual * distance
    return _Point(bits + importance.weight * distortion, found)


def _rate_model(piece: Slice, context: Tensor, inputs: Tensor) -> Rates:
    """The rate model of all symbols of a slice, rows in raster order, from the codes as the prior sees them."""
    prior = piece.prior
    assert prior is not None
    height, width = inputs.shape[2:]
    coded = torch.zeros(1, 1, height, width, device=inputs.device)
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
    """Of all slices; the point's graph is gone afterwards."""
    leaves = [leaf for s in point.symbols for leaf in (s.inputs, s.vectors)]
    found = torch.autograd.grad(point.cost, leaves, allow_unused=True)  # nothing sees the last codes
    pairs = iter(
        [torch.zeros_like(leaf) if slope is None else slope for leaf, slope in zip(leaves, found, strict=True)]
    )
    return [_Slopes(*(rows(next(pairs), s.indices.shape[1]) for _ in range(2))) for s in point.symbols]


@torch.no_grad()
def _change(
    point: _Point, slopes: list[_Slopes], dampings: list[Tensor], share: float, chance: torch.Generator
) -> list[Tensor]:
    """New codes of all slices, (h, w, P), where a random share of the symbols that would gain has changed."""
    changed = []
    for s, slope, damping in zip(point.symbols, slopes, dampings, strict=True):
        best, gains = _best(s, slope, damping)
        moves = (gains > LEAST_GAIN) & (torch.rand(gains.shape, generator=chance).to(gains.device) < share)
        changed.append(torch.where(moves, best, s.indices).reshape(*s.inputs.shape[2:], -1))
    return changed


def _best(s: _Symbols, slopes: _Slopes, damping: Tensor) -> tuple[Tensor, Tensor]:
    """The best code of every symbol by the equation of the module, int64 (N, P), and what it gains on the present one, in bits.

    damping: what a squared step is held to cost in each plane, float (P,), where `_Symbols.places` is 1.
    """
    curved = s.places[:, None] * damping
    book: Codebook = s.piece.codebook
    vectors, inputs, features = book.vectors.detach(), book.inputs(), book.features()
    lengths = vectors.square().sum(-1)
    # Code 0 stays where leaving it costs more than the slopes promise at most (near codes have inputs of about NEAR_INPUT).
    hope = slopes.by_decoder.square().sum(2) / (4 * curved) + NEAR_INPUT * slopes.by_prior.abs().sum(2)
    free = ((s.indices > 0) | (s.model.zero < hope)).T
    given = (s.indices, s.model.theta.float(), s.model.zero.float(), slopes.by_prior, slopes.by_decoder, curved)
    k, theta, zero, by_prior, by_decoder, curved = (x.transpose(0, 1)[free] for x in given)
    found, gained = torch.empty_like(k), torch.empty_like(zero)
    for block, parts, logp, _ in rate_blocks(features, book.biases(), theta, zero, free.sum(1).tolist()):
        distances, costs = torch.empty_like(logp), torch.empty_like(logp)
        for plane, part, here in parts:
            own = k[part]
            torch.addmm(lengths[plane], vectors[plane][own], vectors[plane].T, alpha=-2, out=distances[here])
            distances[here] += lengths[plane][own, None]
            torch.mm(by_decoder[part], vectors[plane].T, out=costs[here]).addmm_(by_prior[part], inputs[plane].T)
            costs[here].addcmul_(distances[here], curved[part, None])
        costs -= logp.clamp_(min=-MOST_BITS)
        costs.masked_fill_(distances > NEARBY**2, math.inf)
        least, found[block] = costs.min(1)
        gained[block] = costs.gather(1, k[block, None])[:, 0] - least
    best, gains = s.indices.clone(), torch.zeros(s.indices.shape, device=s.indices.device)
    best.T[free], gains.T[free] = found, gained
    return best, gains


class _Spent(torch.autograd.Function):
    """Bits of given codes, summed, with gradients for the rate model: theta (N, P, F), zero (N, P), indices int64 (N, P)."""

    @staticmethod
    def forward(ctx: Any, theta: Tensor, zero: Tensor, book: Codebook, indices: Tensor) -> Tensor:
        features = book.features()
        bits = torch.where(indices > 0, 0, softplus2(-zero)).sum()
        other = (indices > 0).T
        k, drift, odds = (x.transpose(0, 1)[other] for x in (indices, theta, zero))
        expected = torch.empty_like(drift)
        for block, parts, logp, values in rate_blocks(features, book.biases(), drift, odds, other.sum(1).tolist()):
            spent = -logp.gather(1, k[block, None])
            bits += spent.clamp(max=MOST_BITS).sum()
            for plane, part, here in parts:
                torch.mm(values[here], features[plane], out=expected[part]).sub_(features[plane][k[part]])
            expected[block] *= spent < MOST_BITS
        grad_theta = torch.zeros_like(theta)
        grad_theta.transpose(0, 1)[other] = expected
        ctx.save_for_backward(grad_theta, torch.sigmoid(zero * math.log(2)) - (indices == 0).float())
        return bits

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_theta, grad_zero = ctx.saved_tensors
        return grads[0] * grad_theta, grads[0] * grad_zero, None, None
