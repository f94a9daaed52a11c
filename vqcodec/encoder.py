"""The encoder: pixels -> codes and segments. It chooses each code greedily, by its own bits and error."""

import functools

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vqcodec import coding, parallel, synthesis, tuning
from vqcodec.frame import Frame
from vqcodec.models.model import Model, Pass, Slice, walk
from vqcodec.models.quantizer import rows
from vqcodec.models.rates import RowRates
from vqcodec.spans import timed
from vqcodec.tuning import Importance


def encode(
    model: Model, frame: Frame, pixels: NDArray[np.uint8], importance: Importance | None = None
) -> tuple[list[list[bytes]], list[Tensor]]:
    """Choose codes and range-code them.

    Args:
        model: the weights. frame: that of the pictures. pixels: uint8 (B, H, W, 3).
        importance: weights of the errors; None for plain squared error.

    Returns:
        The segments of each picture in file order, and the codes.
    """
    latents = synthesis.analyse(model, pixels, torch.tensor([frame.quality], device=model.device))
    coders = coding.new_coders(model, frame, len(pixels))
    codes = choose(model, frame, latents, importance, coders)
    return coding.in_file_order(coders), codes


def choose(
    model: Model,
    frame: Frame,
    latents: list[Tensor],
    importance: Importance | None = None,
    coders: coding.Coders | None = None,
) -> list[Tensor]:
    """Choose codes.

    Args:
        model: the weights. frame: that of the pictures. latents: from `synthesis.analyse`.
        importance: weights of the errors; None for plain squared error.
        coders: what range-codes the codes; None to leave that out.

    Returns:
        The codes, as of coding.py.
    """
    importance = (importance or tuning.flat(model.config, frame.quality)).to(model.device)
    quality = torch.tensor([frame.quality], device=model.device)
    pictures = len(latents[0])
    codes = coding.no_codes(model.config, frame, pictures)
    estimate = synthesis.GridEstimate(model, frame, pictures)
    batches = coding.batches_of(model, frame, coding.every_tile(frame, pictures))
    covered = [_covered(model, frame, stage.stride) for stage in model.config.levels]

    def choose_in(piece: Slice, batch: coding.Tiles) -> None:
        """Choose the codes of a slice in a batch of tiles."""
        costs = step_costs(piece, quality, importance)
        whole = latents[piece.level][:, piece.channels]
        v = (batch.cut(whole) - batch.cut(estimate.here)) / estimate.step
        if (cover := covered[piece.level]) is not None:
            v = v * batch.cut(cover.expand(pictures, -1, -1, -1))
        finest = piece.level == len(latents) - 1
        factors = [importance.of_places(finest, place) for place in batch.places]
        for one in batch.passes(_nearest(piece, v)):
            if one.codes is None:
                one.codes = _choose(piece, one, v, costs, factors, model.config.rate_factor)
            if coders is not None:
                own = [coders[picture][number][piece.config.layer] for picture, number in batch.members]
                coding.put(own, piece, one)
        chosen = batch.take_codes()
        vectors, narrow = piece.vectors(chosen), chosen.to("cpu", torch.int16)
        count = len(batch.places)
        for place, added, some in zip(batch.places, vectors.chunk(count), narrow.chunk(count), strict=True):
            estimate.add_at(place, added)
            codes[piece.level][(*place, piece.planes)] = some

    with parallel.threads(model.device, len(batches)) as each:
        for piece in walk(model.levels, estimate, *batches):
            each(functools.partial(choose_in, piece), batches)
    return codes


def step_costs(piece: Slice, quality: Tensor, importance: Importance) -> Tensor:
    """What a squared step costs in the planes of a slice, but for `Importance.places`: bits, float (1, P).

    quality: (1,), 1..100.
    """
    return piece.error_weight(importance.weight, quality) * importance.of_planes(piece.level, piece.planes)


def _covered(model: Model, frame: Frame, stride: int) -> Tensor | None:
    """Which positions of a grid have a part of the picture: 1 or 0, float (1, 1, h, w); None where all have.

    The others are padding alone: what their latents are does not matter, so that they may be what they are estimated.
    """
    rows, columns = (
        torch.arange(whole // stride) * stride < length
        for length, whole in zip((frame.height, frame.width), frame.padded(model.config.multiple), strict=True)
    )
    covered = (rows[:, None] & columns)[None, None]
    return None if covered.all() else covered.float().to(model.device)


def _nearest(piece: Slice, v: Tensor) -> Tensor | None:
    """The codes nearest to v, int64 (B, h, w, P), for a prior in raster order; None for any other.

    A raster prior takes a single pass if all codes are known before it.
    """
    assert piece.prior is not None
    if not piece.prior.at_once:
        return None
    return piece.codebook.nearest(rows(v, piece.config.planes)).reshape(len(v), *v.shape[2:], -1)


@timed("choice")
def _choose(
    piece: Slice, one: Pass, v: Tensor, costs: Tensor, factors: list[Tensor | None], rate_factor: float
) -> Tensor:
    """Choose the codes of one pass by bits and weighted error.

    Args:
        piece: the slice. one: the pass.
        v: float (B, P D, h, w), the residuals of the tiles in steps.
        costs: from `step_costs`.
        factors: what the error of each position is multiplied by, float (n, h, w) for n tiles each, or None for 1.
        rate_factor: see `Codebook.choose`.

    Returns:
        int64 (N, P).
    """
    target = rows(v[(slice(None), slice(None), *one.places)], piece.config.planes)
    costs = costs.expand(len(target), -1)
    known = [here[(slice(None), *one.places)].flatten() for here in factors if here is not None]
    if known:
        costs = costs * torch.cat(known)[:, None]
    rates = piece.rates(one.parameters)
    assert isinstance(rates, RowRates)  # the only ones that tell codes their bits as they are chosen
    return piece.codebook.choose(target, rates, costs, rate_factor)
