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
    latents = synthesis.analyse(model, pixels, torch.tensor([frame.quality], device=model.device))
    coders = coding.new_coders(model, frame)
    codes = choose(model, frame, latents, importance, coders)
    return coding.in_file_order(coders), codes


def choose(
    model: Model,
    frame: Frame,
    latents: list[Tensor],
    importance: Importance | None = None,
    coders: list[list[Encoder]] | None = None,
) -> list[Tensor]:
    """Choose codes.

    Args:
        model: the weights. frame: the picture's frame. latents: from `synthesis.analyse`.
        importance: weights of the errors; None for plain squared error.
        coders: `coders[tile][layer]`, which range-code the codes; None to leave that out.

    Returns:
        The codes in the form that `coding.decode` returns.
    """
    importance = (importance or tuning.flat(model.config, frame.quality)).to(model.device)
    quality = torch.tensor([frame.quality], device=model.device)
    codes = coding.no_codes(model.config, frame)
    estimate = synthesis.GridEstimate(model, frame)
    batches = coding.batches_of(model, frame)
    for piece in walk(model.levels, estimate, *batches):
        step_cost = piece.error_weight(importance.weight, quality) * importance.of_planes(piece.level, piece.planes)
        whole = latents[piece.level][:, piece.channels]
        for batch in batches:
            cuts = [(slice(None), slice(None), *window) for window in batch.windows]
            v = torch.cat([(whole[cut] - estimate.here[cut]) / estimate.step for cut in cuts])
            finest = piece.level == len(latents) - 1
            factors = [importance.of_places(finest, window) for window in batch.windows]
            for one in batch.passes(_nearest(piece, v)):
                if one.codes is None:
                    one.codes = _choose(piece, one, v, step_cost, factors, model.config.rate_factor)
                if coders is not None:
                    coding.put([coders[number][piece.config.layer] for number in batch.numbers], piece, one)
            chosen = batch.take_codes()
            vectors, narrow = piece.vectors(chosen), chosen.to("cpu", torch.int16)
            for tile, window in enumerate(batch.windows):
                estimate.add_at(window, vectors[tile : tile + 1])
                codes[piece.level][(*window, piece.planes)] = narrow[tile]
    return codes


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
    piece: Slice, one: Pass, v: Tensor, step_cost: Tensor, factors: list[Tensor | None], rate_factor: float
) -> Tensor:
    """Choose the codes of one pass by bits and weighted error.

    Args:
        piece: the slice. one: the pass.
        v: float (B, P D, h, w), the residuals of the tiles in steps.
        step_cost: float (1, P), bits per squared step.
        factors: for each tile float (h, w), what the error of each position is multiplied by, or None for 1.
        rate_factor: see `Codebook.choose`.

    Returns:
        int64 (N, P).
    """
    target = rows(v[(slice(None), slice(None), *one.places)], piece.config.planes)
    costs = step_cost.expand(len(target), -1)
    known = [here[one.places].flatten() for here in factors if here is not None]
    if known:
        costs = costs * torch.cat(known)[:, None]
    return piece.codebook.choose(target, piece.rates(one.parameters), costs, rate_factor)
