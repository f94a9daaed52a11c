"""Runs the float networks over whole pictures of one frame: pixels -> latents, codes -> pixels.

The networks run in windows, which bounds memory. Windows overlap by at least the receptive field of the networks and
so leave no seams in the picture. A model without stages finer than its codes needs none: its maps are no larger than
the latents, and pixels are transformed and rendered in bands.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from vqcodec.coding import no_codes
from vqcodec.frame import Frame, Region
from vqcodec.models.config import Config
from vqcodec.models.model import Estimate, Level, Model, Slice, walk
from vqcodec.models.vqvae import SMALLEST
from vqcodec.spans import timed

WINDOW = 2048  # side of the windows in pixels, where there are any
# Pixels that the networks' first and last step, which are local, work on at a time: what fits the cache of a CPU.
BAND_PIXELS = {"cpu": 1 << 19, "cuda": 1 << 24}


def reconstruct(
    model: Model, frame: Frame, codes: list[Tensor], region: Region | None = None, scale: int = 1
) -> NDArray[np.uint8]:
    """Decode codes to pixels.

    Args:
        model: the weights. frame: that of the pictures.
        codes: as of coding.py. For a region, only those of `tiles_for` matter.
        region: the part of each picture to decode; None for all of it.
        scale: 1, or a power of two up to `largest_scale`. A pixel of the result stands for scale x scale pixels.

    Returns:
        uint8 (B, h, w, 3). All pixels that have a part of the region.
    """
    estimate = GridEstimate(model, frame, len(codes[0]), region, scale)
    layers = layers_for(model.config, scale)
    levels = [
        replace(level, slices=tuple(piece for piece in level.slices if piece.config.layer < layers))
        for level in model.levels
    ]
    for piece in walk(levels, estimate):
        rows, columns = estimate.boxes[piece.level]
        for strip in _strips(rows.stop - rows.start, columns.stop - columns.start, WINDOW // piece.stage.stride):
            under = slice(rows.start + strip.start, rows.start + strip.stop)
            indices = codes[piece.level][:, under, columns, piece.planes].to(model.device, torch.int64)
            estimate.add_at((slice(None), strip, slice(None)), piece.vectors(indices))
    return estimate.picture()


def blank(model: Model, frame: Frame, scale: int = 1) -> NDArray[np.uint8]:
    """`reconstruct` from codes of one picture that are all 0, in a time that large pictures do not add to.

    Away from its borders such a picture repeats itself, so the middle of a smaller one takes the place of the rest.
    """
    unit = model.config.multiple
    levels = range(len(model.config.levels))
    reach = sum(model.vqvae.decoder_reach(level) + model.vqvae.refinement_reach(level) for level in levels)
    border = -(-reach // unit) * unit // scale
    period = unit // scale

    def folded(length: int) -> NDArray[np.intp]:
        """For each of `length` pixels in a row or column, one of a shorter one that is equal."""
        left_out = max(0, -(-length // scale) - 2 * (border + period)) // period * period
        places = np.arange(-(-length // scale) - left_out)
        first = border + period
        return np.concatenate([places[:first], border + np.arange(left_out) % period, places[first:]])

    rows, columns = folded(frame.height), folded(frame.width)
    height, width = (
        length - (len(places) - places[-1] - 1) * scale
        for length, places in ((frame.height, rows), (frame.width, columns))
    )
    small = replace(frame, height=int(height), width=int(width))
    pixels = reconstruct(model, small, no_codes(model.config, small), None, scale)
    return np.ascontiguousarray(pixels[:, rows[:, None], columns])


def largest_scale(config: Config) -> int:
    """The largest `scale` of `reconstruct`: pixels of the result are no larger than the finest codes' patches."""
    return min(SMALLEST, config.levels[-1].stride)


def layers_for(config: Config, scale: int) -> int:
    """How many layers `reconstruct` decodes for a smaller picture.

    Slices of the finest level hold its principal components in descending order. A patch of the smaller picture has
    few values; what comes after twice as many components is detail that it cannot show.
    """
    stage = config.levels[-1]
    shown = 2 * 3 * (stage.stride // scale) ** 2
    slices = [piece for piece, span in zip(stage.slices, stage.spans, strict=True) if span.start < shown]
    return config.layers if scale == 1 else 1 + max(piece.layer for piece in slices)


def tiles_for(model: Model, frame: Frame, region: Region | None, scale: int) -> set[int]:
    """The numbers of the tiles whose codes `reconstruct` looks at."""
    rows, columns = finer(_boxes(model, frame, region, scale)[0], model.config.levels[0].stride)[2:]
    return {
        number
        for number, (top, left, height, width) in enumerate(frame.tiles())
        if rows.start < top + height and top < rows.stop and columns.start < left + width and left < columns.stop
    }


def _pixels(frame: Frame, region: Region | None, scale: int) -> "Box":
    """The pixels of a picture reduced by `scale` that have a part of the region."""
    whole = slice(0, frame.height), slice(0, frame.width)
    return _coarser(whole if region is None else (region.rows, region.columns), scale)


def _boxes(model: Model, frame: Frame, region: Region | None, scale: int) -> "list[Box]":
    """For each level, coarse first, the box of its grid that the result of `reconstruct` depends on."""
    sizes = frame.padded(model.config.multiple)
    box = slice(0, sizes[0]), slice(0, sizes[1])
    if region is not None:
        box = finer(_pixels(frame, region, scale), scale)[2:]
    boxes: list[Box] = []
    for number, stage in reversed(list(enumerate(model.config.levels))):
        reach = model.vqvae.decoder_reach(number) + model.vqvae.refinement_reach(number)
        rows, columns = (
            slice(max(0, s.start - reach), min(size, s.stop + reach)) for s, size in zip(box, sizes, strict=True)
        )
        boxes.insert(0, _coarser((rows, columns), stage.stride))
        box = finer(boxes[0], stage.stride)[2:]
    return boxes


class GridEstimate(Estimate):
    """The estimate over the grids of pictures. Networks run in windows; codes are added in place.

    Args:
        model, frame, region, scale: see `reconstruct`. pictures: how many.

    Attributes:
        boxes: for each level, the part of its grid that the estimate covers: all that the region depends on.
    """

    def __init__(
        self, model: Model, frame: Frame, pictures: int = 1, region: Region | None = None, scale: int = 1
    ) -> None:
        quality = torch.tensor([frame.quality], device=model.device)
        super().__init__(model.vqvae, quality, *frame.padded(model.config.multiple))
        self.model, self.frame, self.pictures, self.region, self.scale = model, frame, pictures, region, scale
        self.boxes = _boxes(model, frame, region, scale)

    @timed("refinement")
    def begin(self, level: Level) -> None:
        """See `Estimate.begin`; runs window by window."""
        if not level.number:
            self.values = self._zeros(level, self.boxes[0])
            return
        stride, box = self.model.config.levels[level.number - 1].stride, self.boxes[level.number - 1]
        ratio = stride // level.stage.stride
        reach = -(-self.vqvae.decoder_reach(level.number - 1) // stride)
        covered = finer(box, ratio)[2:]
        values = self._zeros(level, covered)
        height, width = self.values.shape[2:]
        for inner, outer, part in windows(height, width, max(1, WINDOW // stride), reach):
            start = self.vqvae.descend(level.number - 1, self.values[(slice(None), slice(None), *outer)], self.quality)
            values[finer(inner, ratio)] = start[finer(part, ratio)]
        self.values = values[(slice(None), slice(None), *_inside(self.boxes[level.number], covered))]
        self.values = self.values.contiguous(memory_format=torch.channels_last)

    def _zeros(self, level: Level, box: "Box") -> Tensor:
        shape = (self.pictures, level.stage.channels, *(s.stop - s.start for s in box))
        return _empty(shape, self.model.device).zero_()

    @timed("refinement")
    def enter(self, piece: Slice) -> None:
        """See `Estimate.enter`; refines in place."""
        self.piece, self.step = piece, piece.step(self.quality)
        self.values = self.vqvae.refine(piece.level, piece.index, self.values, self.quality, overwrite=True)

    @timed("refinement")
    def add_at(self, place: tuple[slice, slice, slice], vectors: Tensor) -> None:
        """Add vectors, float (b, P D, h, w) in steps, to the slice's channels of some pictures, rows and columns."""
        assert self.piece is not None
        pictures, rows, columns = place
        self.values[pictures, self.piece.channels, rows, columns] += vectors * self.step

    @timed("decoder")
    def picture(self) -> NDArray[np.uint8]:
        """Decode the finished estimate to the pixels of `reconstruct`, rounded.

        Call it after the walk.
        """
        config, scale = self.model.config, self.scale
        level = len(config.levels) - 1
        stride, finest = config.levels[level].stride, config.stages[self.vqvae.last_stage(scale)].stride
        kernel = self.model.reduced(scale) if scale > 1 else None
        local = self.vqvae.local_reach() if kernel is None else 1
        side = finest // scale  # of the pixels that a position of the features becomes
        reach = -(-self.vqvae.decoder_reach(level) // stride)
        asked = _pixels(self.frame, self.region, scale)
        own = _coarser(asked, stride // scale)
        pixels = np.empty((self.pictures, *((s.stop - s.start) * stride // scale for s in own), 3), np.uint8)
        height, width = self.values.shape[2:]
        box = _inside(own, self.boxes[level])
        for inner, outer, part in windows(height, width, _window(config, stride), reach, box):
            features = self.vqvae.features(self.values[(slice(None), slice(None), *outer)], self.quality, scale)
            rows, columns = finer(part, stride // finest)[2:]
            left = (inner[1].start - box[1].start) * stride // scale
            for band, around, middle in _bands(features.shape, rows, side, local, self.model.device):
                decoded = self.vqvae.render(features[:, :, around], self.quality, kernel)
                ys, xs = (slice(s.start * side, s.stop * side) for s in (middle, columns))
                ready = decoded[:, :, ys, xs].round().clamp_(0, 255).permute(0, 2, 3, 1).to(torch.uint8).cpu().numpy()
                top = (inner[0].start - box[0].start) * stride // scale + (band.start - rows.start) * side
                target = pixels[:, top : top + ready.shape[1], left : left + ready.shape[2]]
                target[...] = ready
                if self.frame.grey:
                    target[...] = np.rint(target.mean(3, keepdims=True, dtype=np.float32))
        return np.ascontiguousarray(pixels[(slice(None), *_inside(asked, finer(own, stride // scale)[2:]))])


def _bands(
    shape: Sequence[int], rows: slice, side: int, reach: int, device: torch.device
) -> Iterator[tuple[slice, slice, slice]]:
    """Split rows of a grid into bands whose pixels fit the cache of a CPU.

    Args:
        shape: of maps over the grid, (B, C, h, w). rows: what to split. side: of a position in pixels.
        reach: how many rows are needed above and below. device: that the networks run on.

    Yields:
        The rows of a band; the same with those that are needed above and below; and the place of the former in the
        latter.
    """
    height, width = shape[2:]
    count = max(1, BAND_PIXELS[device.type] // (shape[0] * width * side**2))
    for start in range(rows.start, rows.stop, count):
        stop = min(start + count, rows.stop)
        low, high = max(0, start - reach), min(height, stop + reach)
        yield slice(start, stop), slice(low, high), slice(start - low, stop - low)


def _window(config: Config, stride: int) -> int:
    """The side of the windows, in positions of a grid of this stride."""
    return max(1, WINDOW // stride) if config.stages[0].stride < config.levels[-1].stride else sys.maxsize


def finer(box: "Box", ratio: int) -> tuple[slice, slice, slice, slice]:
    """Scale a box of grid positions up to a grid that is `ratio` times finer: an index into maps (B, C, h, w)."""
    rows, columns = (slice(s.start * ratio, s.stop * ratio) for s in box)
    return slice(None), slice(None), rows, columns


def _coarser(box: "Box", ratio: int) -> "Box":
    """The box of a grid that is `ratio` times coarser that covers a box."""
    rows, columns = (slice(s.start // ratio, -(-s.stop // ratio)) for s in box)
    return rows, columns


def _inside(box: "Box", outer: "Box") -> "Box":
    """The place of a box inside another one of the same grid."""
    rows, columns = (slice(s.start - o.start, s.stop - o.start) for s, o in zip(box, outer, strict=True))
    return rows, columns


def _strips(height: int, width: int, side: int) -> list[slice]:
    """Split the rows of a grid into strips of about side x side positions."""
    rows = max(1, side * side // width)
    return [slice(start, min(start + rows, height)) for start in range(0, height, rows)]


@timed("encoder")
def analyse(model: Model, pixels: NDArray[np.uint8], quality: Tensor) -> list[Tensor]:
    """Encode pixels to latents.

    Args:
        model: the weights. pixels: uint8 (B, H, W, 3). quality: (1,), 1..100, of all pictures.

    Returns:
        For each level, coarse first, float (B, C, h, w) over the padded pictures.
    """
    unit = model.config.multiple
    height, width = pixels.shape[1:3]
    down, right = -height % unit, -width % unit
    coarse = (height + down) // unit, (width + right) // unit
    latents: list[Tensor] = []
    for inner, outer, part in windows(*coarse, _window(model.config, unit), -(-model.vqvae.encoder_reach() // unit)):
        local = model.vqvae.encode(_transform(model, pixels, outer), quality)
        if not latents:
            if outer == (slice(0, coarse[0]), slice(0, coarse[1])):
                return local
            grids = [[side * unit // stage.stride for side in coarse] for stage in model.config.levels]
            latents = [_empty((*z.shape[:2], *grid), z.device) for z, grid in zip(local, grids, strict=True)]
        for whole, z, stage in zip(latents, local, model.config.levels, strict=True):
            ratio = unit // stage.stride
            whole[finer(inner, ratio)] = z[finer(part, ratio)]
    return latents


def _transform(model: Model, pixels: NDArray[np.uint8], box: "Box") -> Tensor:
    """`VQVAE.transform` under a box of positions of the coarsest grid: float (B, C, h, w)."""
    finest = model.config.stages[0]
    rows, columns = finer(box, model.config.multiple // finest.stride)[2:]
    shape = (len(pixels), finest.channels, rows.stop - rows.start, columns.stop - columns.start)
    x = _empty(shape, model.device)
    reach = model.vqvae.local_reach()
    for band, around, own in _bands(shape, slice(0, shape[2]), finest.stride, reach, model.device):
        under = slice(rows.start + around.start, rows.start + around.stop)
        x[:, :, band] = model.vqvae.transform(cut(model, pixels, (under, columns), finest.stride))[:, :, own]
    return x


def cut(model: Model, pixels: NDArray[np.uint8], box: "Box", stride: int) -> Tensor:
    """Cut out of pixels (B, H, W, 3) what is under a box of positions of a grid: float (B, 3, h, w), 0..255.

    Beyond the picture its last row and column are repeated.
    """
    ys, xs = (slice(s.start * stride, s.stop * stride) for s in box)
    bottom, right = (length - 1 for length in pixels.shape[1:3])
    known = np.array(pixels[:, min(ys.start, bottom) : ys.stop, min(xs.start, right) : xs.stop])
    part = torch.from_numpy(known).to(model.device).permute(0, 3, 1, 2).float()
    pad = (0, xs.stop - xs.start - part.shape[3], 0, ys.stop - ys.start - part.shape[2])
    return functional.pad(part, pad, mode="replicate").contiguous(memory_format=torch.channels_last)


def _empty(shape: Sequence[int], device: torch.device) -> Tensor:
    """A map to be filled, in channels-last memory from the start: to rearrange a large one takes twice its memory."""
    return torch.empty(*shape, dtype=torch.float32, device=device, memory_format=torch.channels_last)


Box = tuple[slice, slice]


def windows(height: int, width: int, size: int, reach: int, box: Box | None = None) -> Iterator[tuple[Box, Box, Box]]:
    """Cover a grid, or a box of it, with windows.

    Args:
        height, width: of the grid, in positions. size: side of a window. A box with no more than size * size positions
            is one window. reach: by how many positions windows are widened on each side. box: None for the whole grid.

    Yields:
        (inner, outer, part): the window, the window widened within the grid, and the place of `inner` in `outer`.
    """
    rows, columns = box or (slice(0, height), slice(0, width))
    if (rows.stop - rows.start) * (columns.stop - columns.start) <= size * size:
        size = max(height, width)

    def spans(own: slice, length: int) -> list[tuple[slice, slice, slice]]:
        found = []
        for start in range(own.start, own.stop, size):
            stop = min(start + size, own.stop)
            low, high = max(0, start - reach), min(length, stop + reach)
            found.append((slice(start, stop), slice(low, high), slice(start - low, stop - low)))
        return found

    for y in spans(rows, height):
        for x in spans(columns, width):
            yield (y[0], x[0]), (y[1], x[1]), (y[2], x[2])
