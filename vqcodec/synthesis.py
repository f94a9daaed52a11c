"""Runs the float networks over whole pictures: pixels -> latents, codes -> pixels.

The networks run in windows, which bounds memory. Windows overlap by at least the receptive field of the networks and
so leave no seams in the picture.
"""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from vqcodec.frame import Frame
from vqcodec.models.model import Estimate, Level, Model, Slice, walk
from vqcodec.spans import timed

WINDOW = 2048  # side of the windows in pixels


def reconstruct(model: Model, frame: Frame, codes: list[Tensor]) -> NDArray[np.uint8]:
    """Decode codes, as `coding.decode` returns them, to pixels uint8 (H, W, 3)."""
    estimate = GridEstimate(model, frame)
    for piece in walk(model.levels, estimate):
        height, width = codes[piece.level].shape[:2]
        for strip in _strips(height, width, WINDOW // piece.stage.stride):
            indices = codes[piece.level][None, strip, :, piece.planes].to(model.device, torch.int64)
            estimate.add_at((strip, slice(None)), piece.vectors(indices))
    return estimate.picture()


class GridEstimate(Estimate):
    """The estimate over the grids of a whole picture. Networks run in windows; codes are added in place."""

    def __init__(self, model: Model, frame: Frame) -> None:
        quality = torch.tensor([frame.quality], device=model.device)
        super().__init__(model.vqvae, quality, *frame.padded(model.config.multiple))
        self.model, self.frame = model, frame

    @timed("refinement")
    def begin(self, level: Level) -> None:
        """See `Estimate.begin`; runs window by window."""
        layout = torch.channels_last
        values = torch.zeros(self._shape(level), device=self.model.device).contiguous(memory_format=layout)
        if level.number:
            stride = self.model.config.levels[level.number - 1].stride
            ratio = stride // level.stage.stride
            reach = -(-self.vqvae.decoder_reach(level.number - 1) // stride)
            coarser = self.values
            for inner, outer, part in windows(coarser.shape[2], coarser.shape[3], max(1, WINDOW // stride), reach):
                box = coarser[(slice(None), slice(None), *outer)]
                start = self.vqvae.descend(level.number - 1, box, self.quality)
                values[finer(inner, ratio)] = start[finer(part, ratio)]
        self.values = values

    @timed("refinement")
    def enter(self, piece: Slice) -> None:
        """See `Estimate.enter`; a large grid is refined in place, strip by strip."""
        height, width = self.values.shape[2:]
        strips = _strips(height, width, WINDOW // piece.stage.stride)
        if len(strips) == 1:
            super().enter(piece)
            return
        self.piece, self.step = piece, piece.step(self.quality)
        reach = max(1, len(piece.quantizer.blocks()))  # every block has one 3x3 convolution
        above = self.values[:, :, :0]  # the rows above the strip, not refined yet
        for strip in strips:
            cut = torch.cat([above, self.values[:, :, strip.start : strip.stop + reach]], 2)
            first = above.shape[2]
            above = cut[:, :, : first + strip.stop - strip.start][:, :, -reach:]
            refined = self.vqvae.refine(piece.level, piece.index, cut, self.quality)
            self.values[:, :, strip] = refined[:, :, first : first + strip.stop - strip.start]

    @timed("refinement")
    def add_at(self, window: "Box", vectors: Tensor) -> None:
        """Add vectors, float (1, P D, h, w) in steps, to the slice's channels in a window of the grid, in place."""
        assert self.piece is not None
        self.values[(slice(None), self.piece.channels, *window)] += vectors * self.step

    @timed("decoder")
    def picture(self) -> NDArray[np.uint8]:
        """Decode the finished estimate to pixels, uint8 (H, W, 3), cropped to the picture and rounded.

        Call it after the walk.
        """
        pixels = np.empty((self.frame.height, self.frame.width, 3), np.uint8)
        level = len(self.model.config.levels) - 1
        stride = self.model.config.levels[level].stride
        reach = -(-self.vqvae.decoder_reach(level) // stride)
        height, width = self.values.shape[2:]
        for inner, outer, part in windows(height, width, max(1, WINDOW // stride), reach):
            decoded = self.vqvae.descend(level, self.values[(slice(None), slice(None), *outer)], self.quality)[0]
            ys, xs = (slice(s.start * stride, s.stop * stride) for s in part)
            ready = decoded[:, ys, xs].round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).cpu().numpy()
            top, left = inner[0].start * stride, inner[1].start * stride
            target = pixels[top : top + ready.shape[0], left : left + ready.shape[1]]
            target[...] = ready[: target.shape[0], : target.shape[1]]
            if self.frame.grey:
                target[...] = np.rint(target.mean(2, keepdims=True, dtype=np.float32))
        return pixels


def finer(box: "Box", ratio: int) -> tuple[slice, slice, slice, slice]:
    """Scale a box of grid positions up to a grid that is `ratio` times finer: an index into maps (B, C, h, w)."""
    rows, columns = (slice(s.start * ratio, s.stop * ratio) for s in box)
    return slice(None), slice(None), rows, columns


def _strips(height: int, width: int, side: int) -> list[slice]:
    """Split the rows of a grid into strips of about side x side positions."""
    rows = max(1, side * side // width)
    return [slice(start, min(start + rows, height)) for start in range(0, height, rows)]


@timed("encoder")
def analyse(model: Model, pixels: NDArray[np.uint8], quality: Tensor) -> list[Tensor]:
    """Encode pixels, uint8 (H, W, 3), to latents.

    Args:
        model: the weights. pixels: the picture. quality: (1,), 1..100.

    Returns:
        For each level, coarse first, float (1, C, h, w) over the padded picture.
    """
    unit = model.config.multiple
    height, width = pixels.shape[:2]
    down, right = -height % unit, -width % unit
    coarse = (height + down) // unit, (width + right) // unit
    latents: list[Tensor] = []
    for inner, outer, part in windows(*coarse, max(1, WINDOW // unit), -(-model.vqvae.encoder_reach() // unit)):
        local = model.vqvae.analyse(cut(model, pixels, outer), quality)
        if not latents:
            if outer == (slice(0, coarse[0]), slice(0, coarse[1])):
                return local
            latents = [
                _empty(z, unit // stage.stride, coarse) for z, stage in zip(local, model.config.levels, strict=True)
            ]
        for whole, z, stage in zip(latents, local, model.config.levels, strict=True):
            ratio = unit // stage.stride
            whole[finer(inner, ratio)] = z[finer(part, ratio)]
    return latents


def cut(model: Model, pixels: NDArray[np.uint8], box: "Box") -> Tensor:
    """Cut out the pixels under a box of positions of the coarsest grid: float (1, 3, h, w), 0..255.

    Beyond the picture its last row and column are repeated.
    """
    unit = model.config.multiple
    ys, xs = (slice(s.start * unit, s.stop * unit) for s in box)
    part = torch.from_numpy(np.array(pixels[ys, xs])).to(model.device).permute(2, 0, 1)[None].float()
    pad = (0, xs.stop - xs.start - part.shape[3], 0, ys.stop - ys.start - part.shape[2])
    return functional.pad(part, pad, mode="replicate").contiguous(memory_format=torch.channels_last)


def _empty(z: Tensor, ratio: int, coarse: tuple[int, int]) -> Tensor:
    shape = (1, z.shape[1], coarse[0] * ratio, coarse[1] * ratio)
    return torch.empty(shape, device=z.device).contiguous(memory_format=torch.channels_last)


Box = tuple[slice, slice]


def windows(height: int, width: int, size: int, reach: int) -> Iterator[tuple[Box, Box, Box]]:
    """Cover a grid with windows.

    Args:
        height, width: of the grid, in positions. size: side of a window. A grid with no more than size * size positions
            is one window. reach: by how many positions windows are widened on each side.

    Yields:
        (inner, outer, part): the window, the window widened within the grid, and the place of `inner` in `outer`.
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
