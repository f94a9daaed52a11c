"""Samples pictures from the prior, or other endings of a given picture.

Sampling is ancestral: it decodes as usual, but draws every symbol at random from the prior's distribution instead of
reading it from a file (van den Oord et al. 2016; Razavi et al. 2019, section 3.3). The samples show what the prior has
learned.
"""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vqcodec import codec, coding, packaged, synthesis, weights
from vqcodec.encoder import choose
from vqcodec.entropy import Counts, Symbols, Table
from vqcodec.errors import ImageError
from vqcodec.frame import Frame
from vqcodec.image import Picture
from vqcodec.models.model import Model, walk
from vqcodec.target import HIGHEST, LOWEST

MAX_SIDE = 2048  # of a sample, in pixels


class Dice:
    """A symbol source that draws at random from the distributions it gets.

    Args:
        temperature: draws are in proportion to p^(1 / temperature). 1 uses the prior's probabilities p as they are; 0
            takes the most probable symbol.
        rng: the random generator.
    """

    def __init__(self, temperature: float, rng: np.random.Generator) -> None:
        self.temperature, self.rng = temperature, rng

    def get(self, counts: Counts) -> Symbols:
        """Draw one symbol for each row of counts: float32 (n, m) -> int32 (n,)."""
        if not self.temperature:
            return counts.argmax(1).astype(np.int32)
        # The range coder adds one to every count.
        logits = np.log(counts.astype(np.float64) + 1) / self.temperature
        sums = np.exp(logits - logits.max(1, keepdims=True, initial=-math.inf)).cumsum(1)
        thrown = self.rng.random((len(sums), 1)) * sums[:, -1:]
        return (sums <= thrown).sum(1).clip(max=counts.shape[1] - 1).astype(np.int32)

    def get_rows(self, rows: NDArray[np.integer], table: Table) -> Symbols:
        """One symbol for each row of a table, int32 (n,)."""
        return self.get(table.counts[rows])


def sample(
    count: int,
    *,
    weights_file: str | Path | None = None,
    height: int = 256,
    width: int = 256,
    quality: int = codec.DEFAULT_QUALITY,
    temperature: float = 1.0,
    seed: int = 0,
    picture: Picture | None = None,
    rows: int | None = None,
    device: str = "auto",
) -> Iterator[NDArray[np.uint8]]:
    """Sample pictures.

    Args:
        count: number of pictures.
        weights_file: a path or the name of packaged weights; None for the packaged photo model.
        height, width: of each picture, 1 to 2048 pixels. Ignored if `picture` is given.
        quality: 1 to 100: how much detail the codes carry.
        temperature: 0 or more; see `Dice`.
        seed: of the random generator. Equal seeds give equal codes.
        picture: complete this picture: keep the codes at its top and sample the rest; in shades of grey if it is so.
        rows: number of rows of codes to keep on the finest grid; None for half of them. A coarser code is kept if all
            finer positions under it are.
        device: "auto" (CUDA if there is one), "cpu" or "cuda".

    Yields:
        uint8 (height, width, 3).

    Raises:
        ValueError: a side, the quality or the temperature is out of range.
        ImageError: the picture is too large.
        WeightsError: the weights are missing or unreadable.
    """
    if picture is not None:
        height, width = picture.pixels.shape[:2]
    if not (1 <= height <= MAX_SIDE and 1 <= width <= MAX_SIDE):
        kind = ValueError if picture is None else ImageError
        raise kind(f"pictures must have 1 to {MAX_SIDE} pixels a side, got {width} x {height}")
    if not LOWEST <= quality <= HIGHEST:
        raise ValueError(f"quality must be from {LOWEST} to {HIGHEST}, got {quality!r}")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be a number from 0, got {temperature!r}")
    model = weights.load(packaged.find(weights_file), device)
    frame = Frame(width, height, quality, grey=picture is not None and picture.grey)
    given = None
    if picture is not None:
        with coding.exact(model):
            latents = synthesis.analyse(model, picture.pixels[None], torch.tensor([quality], device=model.device))
            given = choose(model, frame, latents)
    kept = frame.padded(model.config.multiple)[0] // model.config.levels[-1].stride // 2 if rows is None else rows
    dice = Dice(temperature, np.random.default_rng(seed))
    for _ in range(count):
        with coding.exact(model):  # left before the caller goes on
            (drawn,) = synthesis.reconstruct(model, frame, draw(model, frame, dice, given, kept))
        yield drawn


def draw(model: Model, frame: Frame, dice: Dice, given: list[Tensor] | None = None, rows: int = 0) -> list[Tensor]:
    """Sample the codes of a picture that is one tile.

    Args:
        model: the weights. frame: with `tile` 0. dice: the symbol source.
        given: codes as of coding.py; None to sample all.
        rows: number of rows of the finest grid that keep the given codes.

    Returns:
        Codes as of coding.py.
    """
    finest = model.config.levels[-1].stride
    codes = coding.no_codes(model.config, frame)
    (tile,) = coding.batches_of(model, frame, [(0, 0)])
    for piece in walk(model.levels, tile):
        kept = rows * finest // piece.stage.stride
        for one in tile.passes():
            one.codes = coding.get([dice], piece, one)
            if given is not None:
                known = given[piece.level][0, :kept, :, piece.planes][one.places].to(one.codes).flatten(0, 1)
                one.codes[: len(known)] = known
        codes[piece.level][..., piece.planes] = tile.take_codes().to("cpu", torch.int16)
    return codes
