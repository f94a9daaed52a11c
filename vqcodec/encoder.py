"""Pixels -> codes and segments: the encoder, which chooses every code by its own bits and error."""

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
        pixels: uint8 (H, W, 3). importance: what errors count; None for their squares.

    Returns:
        segments in file order, and the codes as `coding.decode` returns them.
    """
    importance = (importance or tuning.flat(model.config, frame.quality)).to(model.device)
    quality = torch.tensor([frame.quality], device=model.device)
    latents = synthesis.analyse(model, pixels, quality)
    codes = coding.no_codes(model.config, frame)
    estimate = synthesis.GridEstimate(model, frame)
    tiles = coding.tiles_of(model, frame)
    coders = [[Encoder() for _ in range(model.config.layers)] for _ in tiles]
    for piece in walk(model.levels, estimate, *tiles):
        weight = piece.error_weight(importance.weight, quality) * importance.of_planes(piece.level, piece.planes)
        for tile, own in zip(tiles, coders, strict=True):
            window = (slice(None), piece.channels, *tile.window)
            v = (latents[piece.level][window] - estimate.values[window]) / estimate.scale
            places = importance.of_places(piece.level == len(latents) - 1, tile.window)
            for one in tile.passes(_nearest(piece, v)):
                if one.codes is None:
                    one.codes = _choose(piece, one, v, weight, places, model.config.choice_bias)
                coding.put(own[piece.config.layer], piece, one)
            estimate.add_at(tile.window, piece.vectors(tile.codes))
            codes[piece.level][(*tile.window, piece.planes)] = tile.codes[0].to("cpu", torch.int16)
    return coding.in_file_order(coders), codes


def _nearest(piece: Slice, v: Tensor) -> Tensor | None:
    """The codes next to v, int64 (1, h, w, P), where a prior in raster order needs to have them first; None elsewhere."""
    assert piece.prior is not None
    if not piece.prior.at_once:
        return None
    return piece.codebook.nearest(rows(v, piece.config.planes)).reshape(1, *v.shape[2:], -1)


@timed("choice")
def _choose(piece: Slice, one: Pass, v: Tensor, weight: Tensor, places: Tensor | None, bias: float) -> Tensor:
    """The codes of one pass by bits and weighted error: int64 (N, P).

    Args:
        v: what is left to code of the tile, in steps, (1, P D, h, w). weight: (1, P), bits per squared step. places: factors on it,
            (h, w), or None. bias: how much of the bits counts.
    """
    target = rows(v[(slice(None), slice(None), *one.places)], piece.config.planes)
    weights = weight.expand(len(target), -1)
    if places is not None:
        weights = weights * places[one.places].reshape(-1, 1)
    return piece.codebook.choose(target, piece.rates(one.parameters), weights, bias)
