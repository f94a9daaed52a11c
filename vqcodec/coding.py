"""Codes <-> segments: the entropy coding of one tile after the other, on integers and only with codes.

Encoder, decoder and sampling share one loop over the passes of a slice (`code_slice`) and pass their step in.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vqcodec.bitstream import Header, tile_boxes
from vqcodec.entropy import Decoder, Encoder, Source
from vqcodec.models.counts import CodeTables, flag_counts
from vqcodec.models.prior import Places, SlicePrior
from vqcodec.models.quantizer import grid, look_up
from vqcodec.weights import Model

# Turns places and parameters of one pass, (N, P, D + 2 S + 1), into its indices, int64 (N, P): by choosing, decoding or drawing.
CodePass = Callable[[Places, Tensor], Tensor]


@contextlib.contextmanager
def exact(model: Model) -> Iterator[None]:
    """No gradients, and no autocast of the caller's: in bf16 the prior's integers would not be integers."""
    with torch.inference_mode(), torch.autocast(model.device.type, enabled=False):
        yield


@dataclass
class Tile:
    """What the prior knows of one tile between slices: its state, and where the tile lies on the level's grid."""

    box: tuple[int, int, int, int]
    state: Tensor | None = None

    def window(self, stride: int) -> tuple[slice, slice]:
        top, left, height, width = self.box
        return (slice(top // stride, -(-(top + height) // stride)), slice(left // stride, -(-(left + width) // stride)))


def tiles_of(model: Model, header: Header) -> list[Tile]:
    """Tiles, each padded to whole positions of the coarsest level."""
    unit = model.config.multiple
    return [
        Tile((top, left, -(-height // unit) * unit, -(-width // unit) * unit))
        for top, left, height, width in tile_boxes(header)
    ]


def grids(model: Model, header: Header) -> list[tuple[int, int]]:
    """Height and width of every level's grid over the padded picture."""
    unit = model.config.multiple
    height, width = -(-header.height // unit) * unit, -(-header.width // unit) * unit
    return [(height // stage.stride, width // stage.stride) for stage in model.config.levels]


def code_slice(part: SlicePrior, tables: CodeTables, state: Tensor, quality: Tensor, step: CodePass) -> tuple[
    Tensor, Tensor
]:  # fmt: skip
    """One slice of one tile: the loop that encoder and decoder share, the coding step passed in.

    Args:
        part, tables: the slice's prior and integer tables. state: of the prior, (1, C, h, w). quality: int64 (1,).
        step: called for each pass.

    Returns:
        (state, indices): the state after the slice, and int64 (h, w, P).
    """
    height, width = state.shape[2:]
    planes, _, features = tables.inputs.shape
    state, context = part.prepare(state, quality)
    known = torch.zeros(1, planes * features, height, width, dtype=torch.float32, device=state.device)
    known = known.contiguous(memory_format=torch.channels_last)
    indices = torch.zeros(height, width, planes, dtype=torch.int64, device=state.device)
    for places, parameters in part.walk(context, known):
        k = step(places, parameters)
        here = (slice(None), slice(None), *places)
        indices[places] = k.reshape(indices[places].shape)
        known[here] = grid(look_up(tables.inputs, k), 1, *known[here].shape[2:])
    return part.update(state, known), indices


def put_slice(
    coder: Encoder, part: SlicePrior, tables: CodeTables, state: Tensor, quality: Tensor, indices: Tensor
) -> Tensor:
    """Encode a slice of one tile whose codes are known.

    Args:
        coder, part, tables, state, quality: as of `code_slice`. indices: int64 (h, w, P).

    Returns:
        the state after the slice.
    """
    height, width, planes = indices.shape

    def step(places: Places, parameters: Tensor) -> Tensor:
        k = indices[places].reshape(-1, planes)
        put(coder, tables, parameters, k)
        return k

    if not part.at_once:
        return code_slice(part, tables, state, quality, step)[0]
    state, context = part.prepare(state, quality)
    known = grid(look_up(tables.inputs, indices.flatten(0, 1)), 1, height, width)
    everywhere = part.parameters_at(0, context, known)
    for number in range(height * width):
        row, column = divmod(number, width)
        step((slice(row, row + 1), slice(column, column + 1)), everywhere[number : number + 1])
    return part.update(state, known)


def put(coder: Encoder, tables: CodeTables, parameters: Tensor, k: Tensor) -> None:
    """Encode the symbols k, int64 (N, P), of one pass: all flags, then the values plane by plane."""
    other = k > 0
    coder.put(other.reshape(-1).cpu().numpy(), flag_counts(parameters))
    coder.put(k.T[other.T].cpu().numpy() - 1, tables.value_counts(parameters, other))


def get(coder: Source, tables: CodeTables, parameters: Tensor) -> Tensor:
    """The inverse of `put`."""
    flags = coder.get(flag_counts(parameters))
    k = torch.from_numpy(flags.astype(np.int64)).reshape(parameters.shape[:2]).to(parameters.device)
    other = k > 0
    values = coder.get(tables.value_counts(parameters, other))
    k.T[other.T] += torch.from_numpy(values.astype(np.int64)).to(k.device)
    return k


def encode(model: Model, header: Header, codes: list[Tensor]) -> list[bytes]:
    """Codes, as `decode` returns them -> segments in file order: its inverse."""
    quality = torch.tensor([header.quality], device=model.device)
    tiles = tiles_of(model, header)
    coders = [[Encoder() for _ in range(header.layers)] for _ in tiles]
    for tile, own in zip(tiles, coders, strict=True):
        for level, stage in enumerate(model.config.levels):
            given = codes[level][tile.window(stage.stride)].to(model.device).long()
            tile.state = model.prior.level(level).begin(tile.state, quality, 1, *given.shape[:2])
            for index, (piece, span) in enumerate(zip(stage.slices, stage.spans, strict=True)):
                part, tables = model.prior.level(level).slice(index), model.tables.slice(level, index)
                tile.state = put_slice(own[piece.layer], part, tables, tile.state, quality, given[:, :, span])
        tile.state = None
    return [own[layer].finish() for layer in range(header.layers) for own in coders]


def decode(model: Model, header: Header, segments: tuple[bytes | None, ...] | list[bytes]) -> list[Tensor]:
    """Segments in file order -> codes, as `codec.decode_codes` returns them."""
    quality = torch.tensor([header.quality], device=model.device)
    codes = [
        torch.zeros(h, w, sum(s.planes for s in stage.slices), dtype=torch.int16)
        for (h, w), stage in zip(grids(model, header), model.config.levels, strict=True)
    ]
    tiles = tiles_of(model, header)
    for number, tile in enumerate(tiles):
        own = segments[number :: len(tiles)]
        coders: dict[int, Decoder] = {}
        for level, stage in enumerate(model.config.levels):
            prior = model.prior.level(level)
            window = tile.window(stage.stride)
            h, w = (s.stop - s.start for s in window)
            tile.state = prior.begin(tile.state, quality, 1, h, w)
            for index, (piece, span) in enumerate(zip(stage.slices, stage.spans, strict=True)):
                data = own[piece.layer]
                if data is None:
                    break
                if piece.layer not in coders:
                    coders[piece.layer] = Decoder(data)
                coder = coders[piece.layer]
                tables = model.tables.slice(level, index)

                def step(_: Places, p: Tensor, coder: Decoder = coder, tables: CodeTables = tables) -> Tensor:
                    return get(coder, tables, p)

                part = prior.slice(index)
                tile.state, indices = code_slice(part, tables, tile.state, quality, step)
                codes[level][(*window, span)] = indices.to(torch.int16).cpu()
            else:
                continue
            break  # without this slice nothing after it in the tile can be decoded
        tile.state = None
    return codes
