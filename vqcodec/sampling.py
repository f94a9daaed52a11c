"""Drawing codes from the prior: pictures that were never taken, and other endings of one that was.

The prior says how probable every symbol is; decoding looks up in a file which it was, sampling throws dice. What comes
out shows what the prior has learned of pictures. (Razavi et al. 2019, section 3.3; van den Oord et al. 2016.)
"""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vqcodec import codec, coding, packaged, synthesis, weights
from vqcodec.encoder import encode
from vqcodec.entropy import Counts, Symbols, Table
from vqcodec.errors import ImageError
from vqcodec.frame import Frame
from vqcodec.image import Picture
from vqcodec.models.model import Model, walk

MAX_SIDE = 2048


class Dice:
    """A decoder of nothing: draws symbols by their counts, sharpened by a temperature.

    Args:
        temperature: 1 draws by the prior's own probabilities p, others in proportion to p^(1 / temperature), 0 takes the
            most probable. rng: source of chance.
    """

    def __init__(self, temperature: float, rng: np.random.Generator) -> None:
        self.temperature, self.rng = temperature, rng

    def get(self, counts: Counts) -> Symbols:
        """One symbol for every row of counts, (n, m) -> int32 (n,)."""
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
    """Draw pictures.

    Args:
        count: how many. weights_file: None for the packaged photo model. height, width: of each, up to 2048 pixels.
        quality: 1 to 100: how much detail the codes carry. temperature: see `Dice`. seed: the same gives the same codes.
        picture: complete this one, instead of `height` and `width`. rows: of its codes on the finest grid, from
            the top, that are kept, None for half of them; coarser codes are kept where they cover nothing else.
        device: "auto", "cpu" or "cuda".

    Yields:
        uint8 (H, W, 3).

    Raises:
        ValueError: a number is out of range. ImageError: the picture is too large. WeightsError: no such weights.
    """
    if picture is not None:
        height, width = picture.pixels.shape[:2]
    if not (1 <= height <= MAX_SIDE and 1 <= width <= MAX_SIDE):
        kind = ValueError if picture is None else ImageError
        raise kind(f"pictures must have 1 to {MAX_SIDE} pixels a side, got {width} x {height}")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be a number from 0, got {temperature!r}")
    model = weights.load(packaged.find(weights_file), device)
    frame = Frame(width, height, quality)
    with coding.exact(model):
        given = encode(model, frame, picture.pixels)[1] if picture is not None else None
        kept = frame.padded(model.config.multiple)[0] // model.config.levels[-1].stride // 2 if rows is None else rows
        dice = Dice(temperature, np.random.default_rng(seed))
        for _ in range(count):
            yield synthesis.reconstruct(model, frame, draw(model, frame, dice, given, kept))


def draw(model: Model, frame: Frame, dice: Dice, given: list[Tensor] | None = None, rows: int = 0) -> list[Tensor]:
    """Draw all codes of a picture that is one tile.

    Args:
        given, rows: codes as `coding.decode` returns them, of which the first rows of the finest grid are kept.

    Returns:
        As `coding.decode`.
    """
    finest = model.config.levels[-1].stride
    codes = coding.no_codes(model.config, frame)
    (tile,) = coding.tiles_of(model, frame)
    for piece in walk(model.levels, tile):
        kept = rows * finest // piece.stage.stride
        for one in tile.passes():
            one.codes = coding.get(dice, piece, one)
            if given is not None:
                known = given[piece.level][:kept, :, piece.planes][one.places].to(one.codes).flatten(0, 1)
                one.codes[: len(known)] = known
        codes[piece.level][..., piece.planes] = tile.codes[0].to("cpu", torch.int16)
    return codes
