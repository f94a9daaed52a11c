"""Compress and decompress; each reads top to bottom as the list of stages.

    compress      picture -> pad -> latents -> per slice: estimate, choose codes, range-code -> container
    decompress    container -> per tile: range-decode codes -> per slice: estimate + codes -> pixels -> crop

The entropy coding works tile by tile, on integers, and only with codes; the float networks work on the assembled
grids, in windows that overlap by more than the networks reach, so that tiles leave no seams in the picture.
"""

import contextlib
import functools
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional

from vqcodec import bitstream, image, metrics, weights
from vqcodec.bitstream import Chunk, Container, Header, tile_boxes
from vqcodec.entropy import Decoder, Encoder
from vqcodec.errors import ChecksumError, FormatError, HeaderError, ImageError, WeightsError
from vqcodec.image import Picture
from vqcodec.models.counts import CodeTables, flag_counts
from vqcodec.models.prior import PHASES, SlicePrior, phases_of, rates
from vqcodec.models.quantizer import CHOICE_BIAS, grid, look_up, rows
from vqcodec.models.vqvae import PIXEL_SCALE, Slice
from vqcodec.ssimulacra2 import ssimulacra2
from vqcodec.target import HIGHEST, LOWEST, Target, largest_within
from vqcodec.weights import Model

DEFAULT_QUALITY = 50
TILE = 1024
# Side of the windows in which large pictures pass through the float networks: bounds memory.
WINDOW = 2048

# Turns the parameters of one pass, (N, P, D + 3), into its indices, int64 (N, P): by choosing or by decoding.
CodePass = Callable[[int, Tensor], Tensor]


def compress(
    picture: Image.Image | NDArray[np.uint8] | Picture,
    *,
    quality: int | None = None,
    target: Target | None = None,
    max_size: int | None = None,
    weights: str | Path | None = None,
    device: str = "auto",
    tile: int = TILE,
    verify: bool = False,
) -> bytes:
    """Compress a picture to the bytes of a .vqz file.

    Args:
        picture: a Pillow image of any mode that `image.from_pil` takes, uint8 (H, W), (H, W, 3) or (H, W, 4), or a
            Picture.
        quality: 1 (smallest) to 100 (best); None for 50, unless `target` or `max_size` say more.
        target: what the file should come to instead.
        max_size: most bytes of the file. Quality or target are met as far as it allows; with neither, it is filled.
        weights: a weights file; None for the packaged photo model.
        device: "auto", "cpu" or "cuda".
        tile: side of the independently coded tiles, a multiple of 64 up to 16320; 0 codes the picture as one tile.
        verify: decode the codes again and compare.

    Raises:
        ValueError: quality, max_size or tile not an allowed integer, or both quality and target given. TargetError: no
            quality comes to the target, or stays below max_size. ImageError: unsupported picture. WeightsError: no such
            weights.
    """
    if quality is not None and (not isinstance(quality, int) or not LOWEST <= quality <= HIGHEST):
        raise ValueError(f"quality must be an integer from {LOWEST} to {HIGHEST}, got {quality!r}")
    if quality is not None and target is not None:
        raise ValueError("quality and target exclude each other")
    if max_size is not None and (not isinstance(max_size, int) or max_size < 1):
        raise ValueError(f"max_size must be a positive integer, got {max_size!r}")
    source = _as_picture(picture)
    model = _load(weights, device)
    unit = math.lcm(bitstream.TILE_UNIT, model.config.multiple)
    if not isinstance(tile, int) or not 0 <= tile <= bitstream.MAX_TILE or tile % unit:
        raise ValueError(f"tile must be 0 or a multiple of {unit} up to {bitstream.MAX_TILE}, got {tile!r}")
    height, width = source.pixels.shape[:2]
    chunks = _chunks(source)

    @functools.cache
    def at(quality: int) -> tuple[bytes, float]:
        """The file of a quality, and its measure."""
        header = Header(width, height, quality, model.id, model.config.layers, tile, source.grey)
        with _exact(model):
            segments, codes = _encode(model, header, source.pixels)
            if verify and any(
                not torch.equal(a, b) for a, b in zip(codes, _decode_codes(model, header, segments), strict=True)
            ):
                raise FormatError("verification failed: the file would not decode to the codes it was made from")
            data = bitstream.write(header, chunks, segments)
            if target is None or target.measure == "size":
                return data, len(data)
            if target.measure == "bpp":
                return data, metrics.bits_per_pixel(len(data), width, height)
            restored = _reconstruct(model, header, codes)
            like = metrics.psnr if target.measure == "psnr" else ssimulacra2
            return data, like(source.pixels, restored)

    best = quality or (DEFAULT_QUALITY if max_size is None else HIGHEST)
    if target is not None:
        best = target.find(lambda quality: at(quality)[1])
    if max_size is not None:
        best = largest_within(lambda quality: len(at(quality)[0]), max_size, best)
    return at(best)[0]


def decompress(
    data: bytes,
    *,
    weights: str | Path | None = None,
    device: str = "auto",
    partial: bool = False,
    max_pixels: int | None = bitstream.DEFAULT_MAX_PIXELS,
) -> Image.Image:
    """Decode the bytes of a .vqz file to a Pillow image of mode L, LA, RGB or RGBA.

    Args and Raises: as `decode_picture`. What `partial` finds missing or damaged is warned of.
    """
    picture = decode_picture(data, weights=weights, device=device, partial=partial, max_pixels=max_pixels)
    for problem in picture.notes:
        warnings.warn(problem, stacklevel=2)
    return image.to_pil(picture)


def decode_picture(
    data: bytes,
    *,
    weights: str | Path | None = None,
    device: str = "auto",
    partial: bool = False,
    max_pixels: int | None = bitstream.DEFAULT_MAX_PIXELS,
) -> Picture:
    """Decode the bytes of a .vqz file.

    Args:
        data: the whole file, or its beginning with `partial`.
        weights: the weights file that it was made with; None for the packaged photo model.
        device: "auto", "cpu" or "cuda".
        partial: decode what is there of a cut or damaged file, coarser; the notes of the picture say what is missing.
        max_pixels: refuse larger pictures before anything is allocated; None for no limit.

    Raises:
        FormatError: not a .vqz file, damaged, cut, or too large. WeightsError: made with other weights.
    """
    container = bitstream.read(data, max_pixels=max_pixels, partial=partial)
    model = _load(weights, device)
    header = container.header
    chunks = {chunk.kind: chunk.data for chunk in container.chunks}
    alpha = None
    if "ALPH" in chunks:
        try:
            alpha = image.decode_alpha(chunks["ALPH"], header.width, header.height)
        except ImageError as error:
            raise ChecksumError(str(error)) from None
    codes = decode_codes(container, model)
    with _exact(model):
        pixels = _reconstruct(model, header, codes)
    return Picture(
        pixels,
        grey=header.grey,
        alpha=alpha,
        icc=chunks.get("ICCP"),
        exif=chunks.get("EXIF"),
        xmp=chunks.get("XMP "),
        notes=container.problems,
    )


def decode_codes(container: Container, model: Model) -> list[Tensor]:
    """The code indices of a file: the part of decoding that is exact on every machine.

    Returns:
        per level, coarse first, int16 (h, w, P) of the padded picture; code 0 where a segment is missing.

    Raises:
        WeightsError: the file was made with other weights. ChecksumError: a segment is not what an encoder wrote.
    """
    header = container.header
    if header.weights_id != model.id:
        raise WeightsError(f"made with weights {header.weights_id.hex()}, these are {model.id.hex()}")
    if header.layers != model.config.layers:
        raise FormatError(f"the file has {header.layers} layers, its weights have {model.config.layers}")
    if header.tile % model.config.multiple:
        raise HeaderError(f"tile is {header.tile} pixels, these weights need multiples of {model.config.multiple}")
    with _exact(model):
        return _decode_codes(model, header, container.segments)


@contextlib.contextmanager
def _exact(model: Model) -> Iterator[None]:
    """No gradients, and no autocast of the caller's: in bf16 the prior's integers would not be integers."""
    with torch.inference_mode(), torch.autocast(model.device.type, enabled=False):
        yield


# Codes <-> segments


@dataclass
class _TileState:
    """What the prior knows of one tile between slices: its state, and where the tile lies on the level's grid."""

    box: tuple[int, int, int, int]
    state: Tensor | None = None

    def window(self, stride: int) -> tuple[slice, slice]:
        top, left, height, width = self.box
        return (slice(top // stride, -(-(top + height) // stride)), slice(left // stride, -(-(left + width) // stride)))


def _tiles(model: Model, header: Header) -> list[_TileState]:
    """Tiles, each padded to whole positions of the coarsest level."""
    unit = model.config.multiple
    return [
        _TileState((top, left, -(-height // unit) * unit, -(-width // unit) * unit))
        for top, left, height, width in tile_boxes(header)
    ]


def _grids(model: Model, header: Header) -> list[tuple[int, int]]:
    """Height and width of every level's grid over the padded picture."""
    unit = model.config.multiple
    height, width = -(-header.height // unit) * unit, -(-header.width // unit) * unit
    return [(height // stage.stride, width // stage.stride) for stage in model.config.levels]


def _code_slice(part: SlicePrior, tables: CodeTables, state: Tensor, quality: Tensor, step: CodePass) -> tuple[
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
    for phase in phases_of(height, width):
        row, column = PHASES[phase]
        k = step(phase, part.parameters_at(phase, context, known))
        h, w = -(-(height - row) // 2), -(-(width - column) // 2)
        indices[row::2, column::2] = k.reshape(h, w, planes)
        known[:, :, row::2, column::2] = grid(look_up(tables.inputs, k), 1, h, w)
    return part.update(state, known), indices


def _put(coder: Encoder, tables: CodeTables, parameters: Tensor, k: Tensor) -> None:
    """Encode the symbols k, int64 (N, P), of one pass: all flags, then the values plane by plane."""
    other = k > 0
    coder.put(other.reshape(-1).cpu().numpy(), flag_counts(parameters))
    coder.put(k.T[other.T].cpu().numpy() - 1, tables.value_counts(parameters, other))


def _get(coder: Decoder, tables: CodeTables, parameters: Tensor) -> Tensor:
    """The inverse of `_put`."""
    flags = coder.get(flag_counts(parameters))
    k = torch.from_numpy(flags.astype(np.int64)).reshape(parameters.shape[:2]).to(parameters.device)
    other = k > 0
    values = coder.get(tables.value_counts(parameters, other))
    k.T[other.T] += torch.from_numpy(values.astype(np.int64)).to(k.device)
    return k


def _decode_codes(model: Model, header: Header, segments: tuple[bytes | None, ...] | list[bytes]) -> list[Tensor]:
    quality = torch.tensor([header.quality], device=model.device)
    codes = [
        torch.zeros(h, w, sum(s.planes for s in stage.slices), dtype=torch.int16)
        for (h, w), stage in zip(_grids(model, header), model.config.levels, strict=True)
    ]
    tiles = _tiles(model, header)
    for number, tile in enumerate(tiles):
        own = segments[number :: len(tiles)]
        coders: dict[int, Decoder] = {}
        for level, stage in enumerate(model.config.levels):
            prior = model.prior.level(level)
            window = tile.window(stage.stride)
            h, w = (s.stop - s.start for s in window)
            tile.state = prior.begin(tile.state, quality, 1, h, w)
            first = 0
            for index, piece in enumerate(stage.slices):
                data = own[piece.layer]
                if data is None:
                    break
                if piece.layer not in coders:
                    coders[piece.layer] = Decoder(data)
                coder = coders[piece.layer]
                tables = model.tables.slice(level, index)

                def step(_: int, p: Tensor, coder: Decoder = coder, tables: CodeTables = tables) -> Tensor:
                    return _get(coder, tables, p)

                part = prior.slice(index)
                tile.state, indices = _code_slice(part, tables, tile.state, quality, step)
                codes[level][(*window, slice(first, first + piece.planes))] = indices.to(torch.int16).cpu()
                first += piece.planes
            else:
                continue
            break  # without this slice nothing after it in the tile can be decoded
        tile.state = None
    return codes


# Pixels <-> codes


def _encode(model: Model, header: Header, pixels: NDArray[np.uint8]) -> tuple[list[bytes], list[Tensor]]:
    """Choose and code: pixels uint8 (H, W, 3) -> segments in file order, and the codes as `decode_codes` returns."""
    quality = torch.tensor([header.quality], device=model.device)
    weight = model.config.lambda_of((header.quality - 1) / 99)
    latents = _analyse(model, pixels, quality)
    tiles = _tiles(model, header)
    coders = [[Encoder() for _ in range(header.layers)] for _ in tiles]
    codes: list[Tensor] = []
    estimate: Tensor | None = None
    for level, z in enumerate(latents):
        estimate = _begin(model, level, estimate, z.shape, quality)
        prior = model.prior.level(level)
        stride = model.config.levels[level].stride
        level_codes = []
        for tile in tiles:
            h, w = (s.stop - s.start for s in tile.window(stride))
            tile.state = prior.begin(tile.state, quality, 1, h, w)
        for index, config in enumerate(model.config.levels[level].slices):
            piece = model.vqvae.slice(level, index)
            estimate = _refine(model, level, index, estimate, quality)
            steps = piece.steps(quality)
            scale = steps.repeat_interleave(piece.dim, 1)[:, :, None, None]
            importance = weight * (steps * PIXEL_SCALE) ** 2 / 3
            tables = model.tables.slice(level, index)
            part = prior.slice(index)
            indices = torch.zeros(*z.shape[2:], piece.planes, dtype=torch.int16)
            for tile, own in zip(tiles, coders, strict=True):
                window = tile.window(stride)
                own_estimate = estimate[(slice(None), slice(piece.start, piece.stop), *window)]
                v = (z[(slice(None), slice(piece.start, piece.stop), *window)] - own_estimate) / scale

                def step(
                    phase: int,
                    parameters: Tensor,
                    v: Tensor = v,
                    piece: Slice = piece,
                    tables: CodeTables = tables,
                    importance: Tensor = importance,
                    coder: Encoder = own[config.layer],
                ) -> Tensor:
                    row, column = PHASES[phase]
                    target = rows(v[:, :, row::2, column::2], piece.planes)
                    weights = importance.expand(len(target), -1)
                    k = piece.codebook.choose(target, rates(parameters), weights, CHOICE_BIAS)
                    _put(coder, tables, parameters, k)
                    return k

                assert tile.state is not None
                tile.state, chosen = _code_slice(part, tables, tile.state, quality, step)
                own_estimate += _vectors(piece, scale, chosen)
                indices[window] = chosen.to(torch.int16).cpu()
            level_codes.append(indices)
        codes.append(torch.cat(level_codes, -1))
    segments = [own[layer].finish() for layer in range(header.layers) for own in coders]
    return segments, codes


def _reconstruct(model: Model, header: Header, codes: list[Tensor]) -> NDArray[np.uint8]:
    """Codes as from `decode_codes` -> pixels uint8 (H, W, 3)."""
    quality = torch.tensor([header.quality], device=model.device)
    estimate: Tensor | None = None
    for level, level_codes in enumerate(codes):
        shape = (1, model.config.levels[level].channels, *level_codes.shape[:2])
        estimate = _begin(model, level, estimate, shape, quality)
        first = 0
        for index in range(len(model.config.levels[level].slices)):
            piece = model.vqvae.slice(level, index)
            estimate = _refine(model, level, index, estimate, quality)
            scale = piece.steps(quality).repeat_interleave(piece.dim, 1)[:, :, None, None]
            for strip in _strips(
                level_codes.shape[0], level_codes.shape[1], WINDOW // model.config.levels[level].stride
            ):
                indices = level_codes[strip, :, first : first + piece.planes].to(model.device)
                estimate[:, piece.start : piece.stop, strip] += _vectors(piece, scale, indices.long())
            first += piece.planes
    assert estimate is not None
    return _synthesise(model, estimate, header, quality)


def _vectors(piece: Slice, scale: Tensor, indices: Tensor) -> Tensor:
    """Indices int64 (h, w, P) -> what they add to the slice's channels of the estimate, (1, P D, h, w)."""
    height, width, planes = indices.shape
    return grid(piece.codebook.lookup(indices.reshape(-1, planes)), 1, height, width) * scale


def _begin(model: Model, level: int, coarser: Tensor | None, shape: Any, quality: Tensor) -> Tensor:
    """The estimate of a level before its first slice, (1, C, h, w), writable."""
    estimate = torch.zeros(shape, dtype=torch.float32, device=model.device).contiguous(
        memory_format=torch.channels_last
    )
    if coarser is not None:
        stride = model.config.levels[level - 1].stride
        ratio = stride // model.config.levels[level].stride
        reach = -(-model.vqvae.decoder_reach(level - 1) // stride)
        for inner, outer, part in _windows(coarser.shape[2], coarser.shape[3], max(1, WINDOW // stride), reach):
            finer = model.vqvae.descend(level - 1, coarser[(slice(None), slice(None), *outer)], quality)
            estimate[_finer(inner, ratio)] = finer[_finer(part, ratio)]
    return estimate


def _finer(box: "_Box", ratio: int) -> tuple[slice, slice, slice, slice]:
    """A box of grid positions on a grid that is finer by a factor, as an index of maps (1, C, h, w)."""
    rows, columns = (slice(s.start * ratio, s.stop * ratio) for s in box)
    return slice(None), slice(None), rows, columns


def _refine(model: Model, level: int, index: int, estimate: Tensor, quality: Tensor) -> Tensor:
    """`VQVAE.refine` over the whole grid; strip by strip, in place, if it is large."""
    height, width = estimate.shape[2:]
    strips = _strips(height, width, WINDOW // model.config.levels[level].stride)
    if len(strips) == 1:
        return model.vqvae.refine(level, index, estimate, quality)
    above = estimate[:, :, :0]  # the row above a strip, as it was: a block sees one position around each
    for strip in strips:
        cut = torch.cat([above, estimate[:, :, strip.start : strip.stop + 1]], 2)
        first = above.shape[2]
        above = estimate[:, :, strip.stop - 1 : strip.stop].clone()
        refined = model.vqvae.refine(level, index, cut, quality)
        estimate[:, :, strip] = refined[:, :, first : first + strip.stop - strip.start]
    return estimate


def _strips(height: int, width: int, side: int) -> list[slice]:
    """Rows of a grid in strips of about side x side positions."""
    rows = max(1, side * side // width)
    return [slice(start, min(start + rows, height)) for start in range(0, height, rows)]


def _analyse(model: Model, pixels: NDArray[np.uint8], quality: Tensor) -> list[Tensor]:
    """Pixels (H, W, 3) -> latents of each level over the padded picture."""
    unit = model.config.multiple
    height, width = pixels.shape[:2]
    down, right = -height % unit, -width % unit
    coarse = (height + down) // unit, (width + right) // unit
    latents: list[Tensor] = []
    for inner, outer, part in _windows(*coarse, max(1, WINDOW // unit), -(-model.vqvae.encoder_reach() // unit)):
        ys, xs = (slice(s.start * unit, s.stop * unit) for s in outer)
        cut = torch.from_numpy(np.array(pixels[ys, xs])).to(model.device).permute(2, 0, 1)[None].float()
        pad = (0, xs.stop - xs.start - cut.shape[3], 0, ys.stop - ys.start - cut.shape[2])
        cut = functional.pad(cut, pad, mode="replicate").contiguous(memory_format=torch.channels_last)
        found = model.vqvae.analyse(cut, quality)
        if not latents:
            if outer == (slice(0, coarse[0]), slice(0, coarse[1])):
                return found
            latents = [
                _empty(z, unit // stage.stride, coarse) for z, stage in zip(found, model.config.levels, strict=True)
            ]
        for whole, z, stage in zip(latents, found, model.config.levels, strict=True):
            ratio = unit // stage.stride
            whole[_finer(inner, ratio)] = z[_finer(part, ratio)]
    return latents


def _empty(z: Tensor, ratio: int, coarse: tuple[int, int]) -> Tensor:
    shape = (1, z.shape[1], coarse[0] * ratio, coarse[1] * ratio)
    return torch.empty(shape, device=z.device).contiguous(memory_format=torch.channels_last)


def _synthesise(model: Model, estimate: Tensor, header: Header, quality: Tensor) -> NDArray[np.uint8]:
    """The finest level's estimate -> pixels, cropped to the picture and rounded."""
    pixels = np.empty((header.height, header.width, 3), np.uint8)
    stride = model.config.levels[-1].stride
    level = len(model.config.levels) - 1
    reach = -(-model.vqvae.decoder_reach(level) // stride)
    for inner, outer, part in _windows(estimate.shape[2], estimate.shape[3], max(1, WINDOW // stride), reach):
        decoded = model.vqvae.descend(level, estimate[(slice(None), slice(None), *outer)], quality)[0]
        ys, xs = (slice(s.start * stride, s.stop * stride) for s in part)
        ready = decoded[:, ys, xs].round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).cpu().numpy()
        top, left = inner[0].start * stride, inner[1].start * stride
        target = pixels[top : top + ready.shape[0], left : left + ready.shape[1]]
        target[...] = ready[: target.shape[0], : target.shape[1]]
        if header.grey:
            target[...] = np.rint(target.mean(2, keepdims=True, dtype=np.float32))
    return pixels


_Box = tuple[slice, slice]


def _windows(height: int, width: int, size: int, reach: int) -> Iterator[tuple[_Box, _Box, _Box]]:
    """Cover a grid: (inner, outer, part) with outer = inner widened by `reach` inside the grid, part = inner in outer.

    The grid is one window if it is not much larger than one.
    """
    if height * width <= size * size:
        size = max(height, width)

    def spans(length: int) -> list[tuple[slice, slice, slice]]:
        found = []
        for start in range(0, length, size):
            stop = min(start + size, length)
            low, high = max(0, start - reach), min(length, stop + reach)
            found.append((slice(start, stop), slice(low, high), slice(start - low, stop - low)))
        return found

    for y in spans(height):
        for x in spans(width):
            yield (y[0], x[0]), (y[1], x[1]), (y[2], x[2])


# Pictures and metadata


def _as_picture(picture: Image.Image | NDArray[np.uint8] | Picture) -> Picture:
    if isinstance(picture, Picture):
        return picture
    if isinstance(picture, np.ndarray):
        channels = picture.shape[2] if picture.ndim == 3 else 1
        if picture.dtype != np.uint8 or picture.ndim not in (2, 3) or channels not in (1, 3, 4) or not picture.size:
            raise ImageError(f"expected uint8 (H, W), (H, W, 3) or (H, W, 4), got {picture.dtype} {picture.shape}")
        picture = Image.fromarray(picture[:, :, 0] if picture.ndim == 3 and channels == 1 else picture)
    return image.from_pil(picture)


def _load(path: str | Path | None, device: str) -> Model:
    return weights.load(weights.find(path), device)


def _chunks(picture: Picture) -> list[Chunk]:
    chunks = [
        Chunk(kind, data)
        for kind, data in (("ICCP", picture.icc), ("EXIF", picture.exif), ("XMP ", picture.xmp))
        if data
    ]
    if picture.alpha is not None:
        chunks.append(Chunk("ALPH", image.encode_alpha(picture.alpha)))
    return chunks
