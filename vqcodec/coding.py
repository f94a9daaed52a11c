"""Entropy coding: codes <-> segments, tile by tile. It uses integers and codes only, no latents or pixels."""

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vqcodec.entropy import Decoder, Encoder, Source
from vqcodec.frame import Box, Frame
from vqcodec.models.config import Config
from vqcodec.models.counts import CodeTables, RowTables, flag_counts
from vqcodec.models.model import Context, Level, Model, Pass, Slice, walk
from vqcodec.models.quantizer import row_of
from vqcodec.spans import span, timed


@contextlib.contextmanager
def exact(model: Model) -> Iterator[None]:
    """Disable gradients and any autocast of the caller: bfloat16 cannot hold the prior's integers."""
    with torch.inference_mode(), torch.autocast(model.device.type, enabled=False):
        yield


class Tile(Context):
    """The prior's context in one tile, and the place of the tile.

    Attributes:
        window: rows and columns of the tile on the present level's grid.
    """

    window: tuple[slice, slice]

    def __init__(self, quality: Tensor, box: Box) -> None:
        """quality: (1,), 1..100. box: of the tile in pixels, multiples of `Config.multiple`."""
        self.top, self.left, height, width = box
        super().__init__(quality, height, width)

    def begin(self, level: Level) -> None:
        super().begin(level)
        top, left = self.top // level.stage.stride, self.left // level.stage.stride
        height, width = (side // level.stage.stride for side in self.size)
        self.window = slice(top, top + height), slice(left, left + width)

    def passes(self, given: Tensor | None = None) -> Iterator[Pass]:
        """See `Context.passes`; counts the time as the prior's."""
        passes = super().passes(given)
        while True:
            with span("prior"):
                one = next(passes, None)
            if one is None:
                return
            yield one


def tiles_of(model: Model, frame: Frame) -> list[Tile]:
    """The tiles of a picture in file order."""
    quality = torch.tensor([frame.quality], device=model.device)
    return [Tile(quality, box) for box in frame.padded_tiles(model.config.multiple)]


def no_codes(config: Config, frame: Frame) -> list[Tensor]:
    """Codes that are all 0: for each level, coarse first, int16 (h, w, P) over the padded picture."""
    height, width = frame.padded(config.multiple)
    return [
        torch.zeros(
            height // stage.stride, width // stage.stride, sum(s.planes for s in stage.slices), dtype=torch.int16
        )
        for stage in config.levels
    ]


@timed("range coder")
def put(coder: Encoder, piece: Slice, one: Pass) -> None:
    """Range-code the codes of one pass.

    A prior in raster order has one pass, but the decoder needs its codes position by position.
    """
    assert piece.prior is not None and piece.tables is not None and one.codes is not None
    count = 1 if piece.prior.at_once else len(one.codes)
    for start in range(0, len(one.codes), count):
        part = slice(start, start + count)
        _put(coder, piece.tables, one.parameters[part], one.codes[part])


def _put(coder: Encoder, tables: CodeTables | RowTables, parameters: Tensor, k: Tensor) -> None:
    """Range-code symbols k, int64 (N, P): in order of their table rows, or all flags, then values plane by plane."""
    if isinstance(tables, RowTables):
        rows, order = _by_row(tables, parameters)
        coder.put_rows(k.flatten().cpu().numpy()[order], rows[order], tables.table)
        return
    other = k > 0
    coder.put(other.reshape(-1).cpu().numpy(), flag_counts(parameters))
    coder.put(k.T[other.T].cpu().numpy() - 1, tables.value_counts(parameters, other))


@timed("range coder")
def get(coder: Source, piece: Slice, one: Pass) -> Tensor:
    """Decode the codes of one pass, int64 (N, P). The inverse of `put`."""
    assert piece.tables is not None
    if isinstance(piece.tables, RowTables):
        rows, order = _by_row(piece.tables, one.parameters)
        symbols = np.empty(len(rows), np.int64)
        symbols[order] = coder.get_rows(rows[order], piece.tables.table)
        return torch.from_numpy(symbols).reshape(one.parameters.shape[:2]).to(one.parameters.device)
    flags = coder.get(flag_counts(one.parameters))
    k = torch.from_numpy(flags.astype(np.int64)).reshape(one.parameters.shape[:2]).to(one.parameters.device)
    other = k > 0
    values = coder.get(piece.tables.value_counts(one.parameters, other))
    k.T[other.T] += torch.from_numpy(values.astype(np.int64)).to(k.device)
    return k


def _by_row(tables: RowTables, parameters: Tensor) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The table rows of the N P symbols of a pass, and the order in which symbols are coded.

    Both are (N P,). Symbols are numbered position by position, and within a position plane by plane. They are coded in
    ascending order of their rows, and in the order of their numbers within a row.
    """
    rows = row_of(parameters, tables.piece.rows).flatten().cpu().numpy()
    return rows, np.argsort(rows, kind="stable")


def encode(model: Model, frame: Frame, codes: list[Tensor]) -> list[bytes]:
    """Range-code codes, in the form that `decode` returns, to segments in file order. The inverse of `decode`."""
    tiles = tiles_of(model, frame)
    coders = [[Encoder() for _ in range(model.config.layers)] for _ in tiles]
    for tile, own in zip(tiles, coders, strict=True):
        for piece in walk(model.levels, tile):
            given = codes[piece.level][(*tile.window, piece.planes)][None].to(model.device, torch.int64)
            for one in tile.passes(given):
                put(own[piece.config.layer], piece, one)
        tile.release()
    return in_file_order(coders)


def in_file_order(coders: list[list[Encoder]]) -> list[bytes]:
    """The bytes that the coders `coders[tile][layer]` wrote: layer by layer, the tiles of a layer in order."""
    return [own[layer].finish() for layer in range(len(coders[0])) for own in coders]


def decode(model: Model, frame: Frame, segments: Sequence[bytes | None]) -> list[Tensor]:
    """Decode segments in file order to codes.

    Args:
        model: the weights. frame: the picture's frame. segments: None where one is missing.

    Returns:
        For each level, coarse first, int16 (h, w, P) over the padded picture. Where a segment is missing, all codes of
        its tile from that layer on are 0.

    Raises:
        ChecksumError: a segment is not what an encoder wrote.
    """
    codes = no_codes(model.config, frame)
    tiles = tiles_of(model, frame)
    for number, tile in enumerate(tiles):
        own = segments[number :: len(tiles)]
        coders: dict[int, Decoder] = {}
        for piece in walk(model.levels, tile):
            layer = piece.config.layer
            data = own[layer]
            if data is None:
                break
            if layer not in coders:
                coders[layer] = Decoder(data)
            for one in tile.passes():
                one.codes = get(coders[layer], piece, one)
            codes[piece.level][(*tile.window, piece.planes)] = tile.take_codes()[0].to("cpu", torch.int16)
        tile.release()
    return codes
