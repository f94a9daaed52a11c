"""Runs the float networks over whole pictures: pixels -> latents, codes -> pixels.

The networks run in windows, which bounds memory. Windows overlap by at least the receptive field of the networks and
so leave no seams in the picture. A model without stages finer than its codes needs none: its maps are no larger than
the latents, and pixels are transformed and rendered in bands.
"""

import sys
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from vqcodec.frame import Frame
from vqcodec.models.config import Config
from vqcodec.models.model import Estimate, Level, Model, Slice, walk
from vqcodec.models.vqvae import VQVAE
from vqcodec.spans import timed

WINDOW = 2048  # side of the windows in pixels, where there are any
# Pixels that the networks' first and last step, which are local, work on at a time: what fits the cache of a CPU.
BAND_PIXELS = {"cpu": 1 << 19, "cuda": 1 << 24}


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
        values = torch.zeros(self._shape(level), dtype=torch.float32, device=self.model.device).contiguous(
            memory_format=layout
        )
        if level.number:
            stride = self.model.config.levels[level.number - 1].stride
            ratio = stride // level.stage.stride
            reach = -(-self.vqvae.decoder_reach(level.number - 1) // stride)
            coarser = self.values
            coarser = self.values
            height, width = coarser.shape[2:]
            for inner, outer, part in windows(height, width, max(1, WINDOW // stride), reach):
                box = coarser[(slice(None), slice(None), *outer)]
                start = self.vqvae.descend(level.number - 1, box, self.quality)
                values[finer(inner, ratio)] = start[finer(part, ratio)]
        self.values = values

    @timed("refinement")
    def enter(self, piece: Slice) -> None:
        """See `Estimate.enter`; a large grid is refined in place, strip by strip."""
        height, width = self.values.shape[2:]
        strips = _strips(height, width, max(1, WINDOW // piece.stage.stride))
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
        stride, finest = self.model.config.levels[level].stride, self.model.config.stages[0].stride
        reach = -(-self.vqvae.decoder_reach(level) // stride)
        height, width = self.values.shape[2:]
        for inner, outer, part in windows(height, width, _window(self.vqvae.config, stride), reach):
            features = self.vqvae.features(self.values[(slice(None), slice(None), *outer)], self.quality)
            rows, columns = finer(part, stride // finest)[2:]
            left = inner[1].start * stride
            for band, around, own in _bands(self.vqvae, features.shape, rows, self.model.device):
                decoded = self.vqvae.render(features[:, :, around], self.quality)[0]
                ys, xs = (slice(s.start * finest, s.stop * finest) for s in (own, columns))
                ready = decoded[:, ys, xs].round().clamp_(0, 255).permute(1, 2, 0).to("cpu", torch.uint8).numpy()
                top = inner[0].start * stride + (band.start - rows.start) * finest
                target = pixels[top : top + len(ready), left : left + ready.shape[1]]
                target[...] = ready[: len(target), : target.shape[1]]
                if self.frame.grey:
                    target[...] = np.rint(target.mean(2, keepdims=True, dtype=np.float32))
        return pixels


def _bands(
    vqvae: VQVAE, shape: Sequence[int], rows: slice, device: torch.device
) -> Iterator[tuple[slice, slice, slice]]:
    """Split rows of the grid of the finest stage into bands whose pixels fit the cache of a CPU.

    Args:
        vqvae: the networks. shape: of maps over the grid, (B, C, h, w). rows: what to split. device: that they run on.

    Yields:
        The rows of a band; the same with those that `VQVAE.transform` and `VQVAE.render` need above and below; and the
        place of the former in the latter.
    """
    height, width = shape[2:]
    count = max(1, BAND_PIXELS[device.type] // (width * vqvae.config.stages[0].stride ** 2))
    for start in range(rows.start, rows.stop, count):
        stop = min(start + count, rows.stop)
        low, high = max(0, start - vqvae.local_reach()), min(height, stop + vqvae.local_reach())
        yield slice(start, stop), slice(low, high), slice(start - low, stop - low)


def _window(config: Config, stride: int) -> int:
    """The side of the windows, in positions of a grid of this stride."""
    return max(1, WINDOW // stride) if config.stages[0].stride < config.levels[-1].stride else sys.maxsize


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
    for inner, outer, part in windows(*coarse, _window(model.config, unit), -(-model.vqvae.encoder_reach() // unit)):
        local = model.vqvae.encode(_transform(model, pixels, outer), quality)
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


def _transform(model: Model, pixels: NDArray[np.uint8], box: "Box") -> Tensor:
    """`VQVAE.transform` under a box of positions of the coarsest grid: float (1, C, h, w)."""
    finest = model.config.stages[0]
    rows, columns = finer(box, model.config.multiple // finest.stride)[2:]
    shape = (1, finest.channels, rows.stop - rows.start, columns.stop - columns.start)
    x = torch.empty(shape, dtype=torch.float32, device=model.device).contiguous(memory_format=torch.channels_last)
    for band, around, own in _bands(model.vqvae, shape, slice(0, shape[2]), model.device):
        under = slice(rows.start + around.start, rows.start + around.stop)
        x[:, :, band] = model.vqvae.transform(cut(model, pixels, (under, columns), finest.stride))[:, :, own]
    return x


def cut(model: Model, pixels: NDArray[np.uint8], box: "Box", stride: int) -> Tensor:
    """Cut out the pixels under a box of positions of a grid: float (1, 3, h, w), 0..255.

    Beyond the picture its last row and column are repeated.
    """
    ys, xs = (slice(s.start * stride, s.stop * stride) for s in box)
    bottom, right = (length - 1 for length in pixels.shape[:2])
    known = np.array(pixels[min(ys.start, bottom) : ys.stop, min(xs.start, right) : xs.stop])
    part = torch.from_numpy(known).to(model.device).permute(2, 0, 1)[None].float()
    pad = (0, xs.stop - xs.start - part.shape[3], 0, ys.stop - ys.start - part.shape[2])
    return functional.pad(part, pad, mode="replicate").contiguous(memory_format=torch.channels_last)


def _empty(z: Tensor, ratio: int, coarse: tuple[int, int]) -> Tensor:
    shape = (1, z.shape[1], coarse[0] * ratio, coarse[1] * ratio)
    return torch.empty(shape, dtype=z.dtype, device=z.device).contiguous(memory_format=torch.channels_last)


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
