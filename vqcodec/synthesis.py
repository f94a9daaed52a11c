"""Latents, codes and pixels: the float networks over whole pictures, in windows that bound memory.

Windows overlap by more than the networks reach, so they leave no seams in the picture.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from vqcodec.bitstream import Header
from vqcodec.models.quantizer import grid
from vqcodec.models.vqvae import Slice
from vqcodec.weights import Model

# Side of the windows.
WINDOW = 2048


def reconstruct(model: Model, header: Header, codes: list[Tensor]) -> NDArray[np.uint8]:
    """Codes as from `decode_codes` -> pixels uint8 (H, W, 3)."""
    quality = torch.tensor([header.quality], device=model.device)
    estimate: Tensor | None = None
    for level, (level_codes, stage) in enumerate(zip(codes, model.config.levels, strict=True)):
        shape = (1, stage.channels, *level_codes.shape[:2])
        estimate = begin(model, level, estimate, shape, quality)
        for index, span in enumerate(stage.spans):
            piece = model.vqvae.slice(level, index)
            estimate = refine(model, level, index, estimate, quality)
            scale = piece.steps(quality).repeat_interleave(piece.dim, 1)[:, :, None, None]
            height, width = level_codes.shape[:2]
            for strip in _strips(height, width, WINDOW // stage.stride):
                indices = level_codes[strip, :, span].to(model.device)
                estimate[:, piece.start : piece.stop, strip] += vectors(piece, scale, indices.long())
    assert estimate is not None
    return _synthesise(model, estimate, header, quality)


def vectors(piece: Slice, scale: Tensor, indices: Tensor) -> Tensor:
    """Indices int64 (h, w, P) -> what they add to the slice's channels of the estimate, (1, P D, h, w)."""
    height, width, planes = indices.shape
    return grid(piece.codebook.lookup(indices.reshape(-1, planes)), 1, height, width) * scale


def begin(model: Model, level: int, coarser: Tensor | None, shape: Any, quality: Tensor) -> Tensor:
    """The estimate of a level before its first slice, (1, C, h, w), writable."""
    estimate = torch.zeros(shape, dtype=torch.float32, device=model.device).contiguous(
        memory_format=torch.channels_last
    )
    if coarser is not None:
        stride = model.config.levels[level - 1].stride
        ratio = stride // model.config.levels[level].stride
        reach = -(-model.vqvae.decoder_reach(level - 1) // stride)
        for inner, outer, part in windows(coarser.shape[2], coarser.shape[3], max(1, WINDOW // stride), reach):
            start = model.vqvae.descend(level - 1, coarser[(slice(None), slice(None), *outer)], quality)
            estimate[finer(inner, ratio)] = start[finer(part, ratio)]
    return estimate


def finer(box: "Box", ratio: int) -> tuple[slice, slice, slice, slice]:
    """A box of grid positions on a grid that is finer by a factor, as an index of maps (1, C, h, w)."""
    rows, columns = (slice(s.start * ratio, s.stop * ratio) for s in box)
    return slice(None), slice(None), rows, columns


def refine(model: Model, level: int, index: int, estimate: Tensor, quality: Tensor) -> Tensor:
    """`VQVAE.refine` over the whole grid; strip by strip, in place, if it is large."""
    height, width = estimate.shape[2:]
    strips = _strips(height, width, WINDOW // model.config.levels[level].stride)
    if len(strips) == 1:
        return model.vqvae.refine(level, index, estimate, quality)
    reach = max(1, len(model.vqvae.slice(level, index).blocks()))  # a block sees one position around each
    above = estimate[:, :, :0]  # the rows above a strip, as they were
    for strip in strips:
        cut = torch.cat([above, estimate[:, :, strip.start : strip.stop + reach]], 2)
        first = above.shape[2]
        above = cut[:, :, : first + strip.stop - strip.start][:, :, -reach:]
        refined = model.vqvae.refine(level, index, cut, quality)
        estimate[:, :, strip] = refined[:, :, first : first + strip.stop - strip.start]
    return estimate


def _strips(height: int, width: int, side: int) -> list[slice]:
    """Rows of a grid in strips of about side x side positions."""
    rows = max(1, side * side // width)
    return [slice(start, min(start + rows, height)) for start in range(0, height, rows)]


def analyse(model: Model, pixels: NDArray[np.uint8], quality: Tensor) -> list[Tensor]:
    """Pixels (H, W, 3) -> latents of each level over the padded picture."""
    unit = model.config.multiple
    height, width = pixels.shape[:2]
    down, right = -height % unit, -width % unit
    coarse = (height + down) // unit, (width + right) // unit
    latents: list[Tensor] = []
    for inner, outer, part in windows(*coarse, max(1, WINDOW // unit), -(-model.vqvae.encoder_reach() // unit)):
        found = model.vqvae.analyse(cut(model, pixels, outer), quality)
        if not latents:
            if outer == (slice(0, coarse[0]), slice(0, coarse[1])):
                return found
            latents = [
                _empty(z, unit // stage.stride, coarse) for z, stage in zip(found, model.config.levels, strict=True)
            ]
        for whole, z, stage in zip(latents, found, model.config.levels, strict=True):
            ratio = unit // stage.stride
            whole[finer(inner, ratio)] = z[finer(part, ratio)]
    return latents


def cut(model: Model, pixels: NDArray[np.uint8], box: "Box") -> Tensor:
    """The pixels of a box of coarsest positions, float (1, 3, h, w); the last ones are repeated beyond the picture."""
    unit = model.config.multiple
    ys, xs = (slice(s.start * unit, s.stop * unit) for s in box)
    part = torch.from_numpy(np.array(pixels[ys, xs])).to(model.device).permute(2, 0, 1)[None].float()
    pad = (0, xs.stop - xs.start - part.shape[3], 0, ys.stop - ys.start - part.shape[2])
    return functional.pad(part, pad, mode="replicate").contiguous(memory_format=torch.channels_last)


def _empty(z: Tensor, ratio: int, coarse: tuple[int, int]) -> Tensor:
    shape = (1, z.shape[1], coarse[0] * ratio, coarse[1] * ratio)
    return torch.empty(shape, device=z.device).contiguous(memory_format=torch.channels_last)


def _synthesise(model: Model, estimate: Tensor, header: Header, quality: Tensor) -> NDArray[np.uint8]:
    """The finest level's estimate -> pixels, cropped to the picture and rounded."""
    pixels = np.empty((header.height, header.width, 3), np.uint8)
    stride = model.config.levels[-1].stride
    level = len(model.config.levels) - 1
    reach = -(-model.vqvae.decoder_reach(level) // stride)
    for inner, outer, part in windows(estimate.shape[2], estimate.shape[3], max(1, WINDOW // stride), reach):
        decoded = model.vqvae.descend(level, estimate[(slice(None), slice(None), *outer)], quality)[0]
        ys, xs = (slice(s.start * stride, s.stop * stride) for s in part)
        ready = decoded[:, ys, xs].round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).cpu().numpy()
        top, left = inner[0].start * stride, inner[1].start * stride
        target = pixels[top : top + ready.shape[0], left : left + ready.shape[1]]
        target[...] = ready[: target.shape[0], : target.shape[1]]
        if header.grey:
            target[...] = np.rint(target.mean(2, keepdims=True, dtype=np.float32))
    return pixels


Box = tuple[slice, slice]


def windows(height: int, width: int, size: int, reach: int) -> Iterator[tuple[Box, Box, Box]]:
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
