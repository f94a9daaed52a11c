"""The encoder: pixels -> codes and segments. It chooses each code greedily, by its own bits and error."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vqcodec import coding, synthesis, tuning
from vqcodec.entropy import Encoder
from vqcodec.frame import Frame
from vqcodec.models.model import Model, Pass, Slice, walk
from vqcodec.models.quantizer import rows
from vqcodec.spans import timed
from vqcodec.tuning import Importance


def encode(
    model: Model, frame: Frame, pixels: NDArray[np.uint8], importance: Importance | None = None
) -> tuple[list[bytes], list[Tensor]]:
    """Choose codes and range-code them.

    Args:
        model: the weights. frame: the picture's frame. pixels: uint8 (H, W, 3).
        importance: weights of the errors; None for plain squared error.

    Returns:
        The segments in file order, and the codes in the form that `coding.decode` returns.
    """
    importance = (importance or tuning.flat(model.config, frame.quality)).to(model.device)
    quality = torch.tensor([frame.quality], device=model.device)
    latents = synthesis.analyse(model, pixels, quality)
    codes = coding.no_codes(model.config, frame)
    estimate = synthesis.GridEstimate(model, frame)
    tiles = coding.tiles_of(model, frame)
    coders = [[Encoder() for _ in range(model.config.layers)] for _ in tiles]
    for piece in walk(model.levels, estimate, *tiles):
        step_cost = piece.error_weight(importance.weight, quality) * importance.of_planes(piece.level, piece.planes)
        for tile, own in zip(tiles, coders, strict=True):
            window = (slice(None), piece.channels, *tile.window)
            v = (latents[piece.level][window] - estimate.values[window]) / estimate.step
            factors = importance.of_places(piece.level == len(latents) - 1, tile.window)
            for one in tile.passes(_nearest(piece, v)):
                if one.codes is None:
                    one.codes = _choose(piece, one, v, step_cost, factors, model.config.rate_factor)
                coding.put(own[piece.config.layer], piece, one)
            chosen = tile.take_codes()
            estimate.add_at(tile.window, piece.vectors(chosen))
            codes[piece.level][(*tile.window, piece.planes)] = chosen[0].to("cpu", torch.int16)
    return coding.in_file_order(coders), codes


def _nearest(piece: Slice, v: Tensor) -> Tensor | None:
    """The codes nearest to v, int64 (1, h, w, P), for a prior in raster order; None for any other.

    A raster prior takes a single pass if all codes are known before it.
    """
    assert piece.prior is not None
    if not piece.prior.at_once:
        return None
    return piece.codebook.nearest(rows(v, piece.config.planes)).reshape(1, *v.shape[2:], -1)


@timed("choice")
def _choose(
    piece: Slice, one: Pass, v: Tensor, step_cost: Tensor, factors: Tensor | None, rate_factor: float
) -> Tensor:
    """Choose the codes of one pass by bits and weighted error.

    Args:
        piece: the slice. one: the pass.
        v: float (1, P D, h, w), the residual of the tile in steps.
        step_cost: float (1, P), bits per squared step.
        factors: float (h, w), what the error of each position is multiplied by; None for 1.
        rate_factor: see `Codebook.choose`.

    Returns:
        int64 (N, P).
    """
    target = rows(v[(slice(None), slice(None), *one.places)], piece.config.planes)
    costs = step_cost.expand(len(target), -1)
    if factors is not None:
        costs = costs * factors[one.places].reshape(-1, 1)
    return piece.codebook.choose(target, piece.rates(one.parameters), costs, rate_factor)
