"""Entropy coding: codes <-> segments, tile by tile. It uses integers and codes only, no latents or pixels.

Codes are those of B pictures of one frame: for each level, coarse first, int16 (B, h, w, P) over the padded picture.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vqcodec import caller, parallel
from vqcodec.entropy import Decoder, Encoder, Source
from vqcodec.frame import Box, Frame
from vqcodec.models.config import Config
from vqcodec.models.counts import CodeTables, RowTables, flag_counts
from vqcodec.models.model import Context, Level, Model, Pass, Slice, walk
from vqcodec.spans import span, timed

# Pixels of the tiles of a batch, unless one has more. A CPU is busy with one usual tile; a GPU waits for launches.
BATCH_PIXELS = {"cpu": 1 << 20, "cuda": 1 << 24}


Place = tuple[slice, slice, slice]


def exact(model: Model) -> AbstractContextManager[None]:
    """See `caller.exact`."""
    return caller.exact(model.device)


class Tiles(Context):
    """The prior's context in a batch of tiles of one size, which the networks see together.

    Attributes:
        members: the tiles, each by the number of its picture and by its own in file order.
        places: where they are on the present level's grid, indices into codes (B, h, w, P): pictures, rows, columns.
            Tiles of successive pictures at one place have a single index; else each tile has its own.
    """

    places: list[Place]

    def __init__(self, quality: Tensor, members: list[tuple[int, int]], boxes: list[Box]) -> None:
        """quality: (1,), 1..100. boxes: of the tiles in pixels, multiples of `Config.multiple`, all of one size."""
        self.members = members
        corners, pictures = [box[:2] for box in boxes], [picture for picture, _ in members]
        together = len(set(corners)) == 1 and pictures == list(range(pictures[0], pictures[0] + len(pictures)))
        self._corners = corners[:1] if together else corners
        self._pictures = [slice(start, start + len(members) // len(self._corners)) for start in pictures]
        super().__init__(quality.expand(len(boxes)), *boxes[0][2:])

    def begin(self, level: Level) -> None:
        super().begin(level)
        stride = level.stage.stride
        height, width = (side // stride for side in self.size)
        corners = [(top // stride, left // stride) for top, left in self._corners]
        self.places = [
            (pictures, slice(top, top + height), slice(left, left + width))
            for pictures, (top, left) in zip(self._pictures, corners, strict=False)
        ]

    def cut(self, x: Tensor) -> Tensor:
        """The tiles of maps on the present level's grid: (B, C, h, w) -> (tiles, C, h', w')."""
        parts = [x[pictures, :, rows, columns] for pictures, rows, columns in self.places]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def passes(self, given: Tensor | None = None) -> Iterator[Pass]:
        """See `Context.passes`; counts the time as the prior's."""
        passes = super().passes(given)
        while True:
            with span("prior"):
                one = next(passes, None)
            if one is None:
                return
            yield one


def batches_of(model: Model, frame: Frame, chosen: Iterable[tuple[int, int]]) -> list[Tiles]:
    """The chosen tiles, each by the numbers of its picture and its own, in batches of equal ones."""
    quality = torch.tensor([frame.quality], device=model.device)
    boxes = frame.padded_tiles(model.config.multiple)
    sizes: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for picture, number in chosen:
        sizes.setdefault(boxes[number][2:], []).append((picture, number))
    batches = []
    for (height, width), members in sizes.items():
        count = max(1, BATCH_PIXELS[model.device.type] // (height * width))
        for start in range(0, len(members), count):
            some = members[start : start + count]
            batches.append(Tiles(quality, some, [boxes[number] for _, number in some]))
    return batches


def every_tile(frame: Frame, pictures: int) -> list[tuple[int, int]]:
    """The tiles of so many pictures, for `batches_of`."""
    return list(itertools.product(range(pictures), range(len(frame.tiles()))))


def no_codes(config: Config, frame: Frame, pictures: int = 1) -> list[Tensor]:
    """Codes of so many pictures that are all 0."""
    height, width = frame.padded(config.multiple)
    return [
        torch.zeros(pictures, height // stage.stride, width // stage.stride, planes, dtype=torch.int16)
        for stage, planes in ((stage, sum(s.planes for s in stage.slices)) for stage in config.levels)
    ]


@timed("range coder")
def put(coders: Sequence[Encoder], piece: Slice, one: Pass) -> None:
    """Range-code the codes of one pass; `coders` has one for each tile of the batch.

    A prior in raster order has one pass, but the decoder needs its codes position by position.
    """
    tables = piece.tables
    assert tables is not None and one.codes is not None
    if isinstance(tables, RowTables):
        rows, order = _by_row(tables, one.parameters, len(coders))
        symbols = one.codes.reshape(len(coders), -1).cpu().numpy()
        for number, coder in enumerate(coders):
            coder.put_rows(symbols[number][order[number]], rows[number][order[number]], tables.table)
        return
    for coder, parameters, codes in zip(
        coders, *(_by_tile(x, coders) for x in (one.parameters, one.codes)), strict=True
    ):
        for place in range(len(codes)):
            _put(coder, tables, parameters[place : place + 1], codes[place : place + 1])


def _put(coder: Encoder, tables: CodeTables, parameters: Tensor, k: Tensor) -> None:
    """Range-code the symbols k of a position, int64 (1, P): all flags, then the values."""
    other = k > 0
    coder.put(other.flatten().cpu().numpy(), flag_counts(parameters))
    coder.put((k[other] - 1).cpu().numpy(), tables.value_counts(parameters, other))


@timed("range coder")
def get(coders: Sequence[Source | None], piece: Slice, one: Pass) -> Tensor:
    """Decode the codes of one pass, int64 (N, P). The inverse of `put`; a tile without a coder gets codes 0."""
    tables = piece.tables
    assert tables is not None
    if isinstance(tables, RowTables):
        rows, order = _by_row(tables, one.parameters, len(coders))
        symbols = np.zeros(rows.shape, np.int64)
        for number, coder in enumerate(coders):
            if coder is not None:
                symbols[number][order[number]] = coder.get_rows(rows[number][order[number]], tables.table)
        return torch.from_numpy(symbols).reshape(one.parameters.shape[:2]).to(one.parameters.device)
    # In raster order a pass is one position of each tile.
    flags = flag_counts(one.parameters).reshape(len(coders), -1, 2)
    k = np.zeros(one.parameters.shape[:2], np.int64)
    for number, coder in enumerate(coders):
        if coder is not None:
            k[number] = coder.get(flags[number])
    other = k > 0
    values = tables.value_counts(one.parameters, torch.from_numpy(other).to(one.parameters.device))
    start = 0
    for number, coder in enumerate(coders):
        stop = start + int(other[number].sum())
        if coder is not None:
            k[number, other[number]] += coder.get(values[start:stop])
        start = stop
    return torch.from_numpy(k).to(one.parameters.device)


def _by_tile(x: Tensor, coders: Sequence[object]) -> tuple[Tensor, ...]:
    """Split the rows of a pass by tiles: (N, ...) -> (N / tiles, ...) each."""
    return x.reshape(len(coders), -1, *x.shape[1:]).unbind()


def _by_row(tables: RowTables, parameters: Tensor, tiles: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The table rows of the symbols of a pass, and the order in which the symbols of a tile are coded.

    Both are (tiles, N P / tiles). The symbols of a tile are numbered position by position, and within a position plane
    by plane. They are coded in ascending order of their rows, and in the order of their numbers within a row.
    """
    given = parameters.to(torch.int8).cpu().numpy().reshape(tiles, -1)
    rows = np.take(tables.row_of_given, given.view(np.uint8))
    return rows, np.argsort(rows, 1, kind="stable")  # a radix sort, for numbers of one byte


Coders = list[list[list[Encoder]]]  # by picture, tile and layer


def encode(model: Model, frame: Frame, codes: list[Tensor]) -> list[list[bytes]]:
    """Range-code codes; returns the segments of each picture in file order. The inverse of `decode`."""
    coders = new_coders(model, frame, len(codes[0]))

    def encode_batch(batch: Tiles) -> None:
        for piece in walk(model.levels, batch):
            given = torch.cat([codes[piece.level][(*place, piece.planes)] for place in batch.places])
            for one in batch.passes(given.to(model.device, torch.int64)):
                put([coders[picture][number][piece.config.layer] for picture, number in batch.members], piece, one)
        batch.release()

    batches = batches_of(model, frame, every_tile(frame, len(codes[0])))
    with parallel.threads(model.device, len(batches)) as each:
        each(encode_batch, batches)
    return in_file_order(coders)


def new_coders(model: Model, frame: Frame, pictures: int) -> Coders:
    """Encoders of the segments of so many pictures."""
    return [[[Encoder() for _ in range(model.config.layers)] for _ in frame.tiles()] for _ in range(pictures)]


def in_file_order(coders: Coders) -> list[list[bytes]]:
    """The bytes that the coders of each picture wrote: layer by layer, the tiles of a layer in order."""
    return [[own[layer].finish() for layer in range(len(tiles[0])) for own in tiles] for tiles in coders]


def decode(model: Model, frame: Frame, segments: Sequence[Sequence[bytes | None]]) -> list[Tensor]:
    """Decode segments to codes.

    Args:
        model: the weights. frame: that of the pictures. segments: of each picture, in file order; None for a missing
            one.

    Returns:
        The codes. Where a segment is missing, all codes of its tile from that layer on are 0.

    Raises:
        ChecksumError: a segment is not what an encoder wrote.
    """
    codes = no_codes(model.config, frame, len(segments))
    count = len(frame.tiles())

    def decode_batch(batch: Tiles) -> None:
        left = {(picture, number): segments[picture][number::count] for picture, number in batch.members}
        coders: dict[tuple[tuple[int, int], int], Decoder] = {}
        for piece in walk(model.levels, batch):
            layer = piece.config.layer
            for tile, own in list(left.items()):
                data = own[layer]
                if data is None or not any(own[layer:]):
                    del left[tile]  # no bytes: the rest of its codes are 0
                elif (tile, layer) not in coders:
                    coders[tile, layer] = Decoder(data)
            if not left:
                break
            sources = [coders[tile, layer] if tile in left else None for tile in batch.members]
            for one in batch.passes():
                one.codes = get(sources, piece, one)
            chosen = batch.take_codes().to("cpu", torch.int16)
            for place, some in zip(batch.places, chosen.chunk(len(batch.places)), strict=True):
                codes[piece.level][(*place, piece.planes)] = some
        batch.release()

    every = every_tile(frame, len(segments))
    batches = batches_of(model, frame, [(picture, n) for picture, n in every if segments[picture][n] is not None])
    with parallel.threads(model.device, len(batches)) as each:
        each(decode_batch, batches)
    return codes
