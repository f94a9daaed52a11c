"""Runs the float networks over whole pictures of one frame: pixels -> latents, codes -> pixels.

Their maps are no larger than the latents. The first step of the encoder and the last one of the decoder, at pixels, are
local: they work in bands.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from vqcodec import precision
from vqcodec.coding import no_codes
from vqcodec.frame import Frame, Region
from vqcodec.models.config import Config
from vqcodec.models.model import Estimate, Level, Model, Slice, walk
from vqcodec.models.vqvae import SMALLEST
from vqcodec.spans import timed

Box = tuple[slice, slice]  # rows and columns of a grid

# Side in pixels of the strips in which code vectors are looked up.
STRIP = 2048
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
        for strip in _strips(rows.stop - rows.start, columns.stop - columns.start, STRIP // piece.stage.stride):
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


def _pixels(frame: Frame, region: Region | None, scale: int) -> Box:
    """The pixels of a picture reduced by `scale` that have a part of the region."""
    whole = slice(0, frame.height), slice(0, frame.width)
    return _coarser(whole if region is None else (region.rows, region.columns), scale)


def _boxes(model: Model, frame: Frame, region: Region | None, scale: int) -> list[Box]:
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
    """The estimate over the grids of pictures. Codes are added in place.

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
        """See `Estimate.begin`. The last step of `VQVAE.descend`, which is local, works in bands."""
        if not level.number:
            self.values = self._empty(level, self.boxes[0]).zero_()
            return
        coarser = level.number - 1
        stage, cond = self.vqvae.stage_of(coarser), self.vqvae.condition(self.quality)
        stride = self.model.config.levels[coarser].stride
        ratio = stride // level.stage.stride
        covered = finer(self.boxes[coarser], ratio)[2:]
        values = self._empty(level, covered)
        features = stage.decode(self.values, cond)
        columns = slice(0, features.shape[3])
        for rows, _, _ in _bands(features.shape, slice(0, features.shape[2]), stride, 0, self.model.device):
            values[finer((rows, columns), ratio)] = stage.synthesise(features[:, :, rows], cond)
        self.values = values[(slice(None), slice(None), *_inside(self.boxes[level.number], covered))]
        self.values = self.values.contiguous(memory_format=torch.channels_last)

    def _empty(self, level: Level, box: Box) -> Tensor:
        shape = (self.pictures, level.stage.channels, *(s.stop - s.start for s in box))
        return _empty(shape, self.model.device)

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
        scale = self.scale
        side = self.model.config.stages[0].stride // scale  # of the pixels that a position becomes
        kernel = self.model.reduced(scale) if scale > 1 else None
        local = self.vqvae.local_reach(decoder=True) if kernel is None else 1
        asked = _pixels(self.frame, self.region, scale)
        own = _coarser(asked, side)
        pixels = np.empty((self.pictures, *((s.stop - s.start) * side for s in own), 3), np.uint8)
        rows, columns = _inside(own, self.boxes[-1])
        features = self.vqvae.features(self.values, self.quality, scale)
        for band, around, middle in _bands(features.shape, rows, side, local, self.model.device):
            decoded = self.vqvae.render(features[:, :, around], self.quality, kernel)
            ys, xs = (slice(s.start * side, s.stop * side) for s in (middle, columns))
            target = pixels[:, (band.start - rows.start) * side : (band.stop - rows.start) * side]
            target[...] = decoded[:, :, ys, xs].round().clamp_(0, 255).permute(0, 2, 3, 1).to(torch.uint8).cpu().numpy()
            if self.frame.grey:
                target[...] = np.rint(target.mean(3, keepdims=True, dtype=np.float32))
        return np.ascontiguousarray(pixels[(slice(None), *_inside(asked, finer(own, side)[2:]))])


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


def finer(box: Box, ratio: int) -> tuple[slice, slice, slice, slice]:
    """Scale a box of grid positions up to a grid that is `ratio` times finer: an index into maps (B, C, h, w)."""
    rows, columns = (slice(s.start * ratio, s.stop * ratio) for s in box)
    return slice(None), slice(None), rows, columns


def _coarser(box: Box, ratio: int) -> Box:
    """The box of a grid that is `ratio` times coarser that covers a box."""
    rows, columns = (slice(s.start // ratio, -(-s.stop // ratio)) for s in box)
    return rows, columns


def _inside(box: Box, outer: Box) -> Box:
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
    with precision.autocast(model.device):
        return model.vqvae.encode(_transform(model, pixels, quality), quality)


def _transform(model: Model, pixels: NDArray[np.uint8], quality: Tensor) -> Tensor:
    """`VQVAE.transform` of the padded pictures: float (B, C, h, w)."""
    finest, unit = model.config.stages[0], model.config.multiple
    height, width = (-(-side // unit) * unit // finest.stride for side in pixels.shape[1:3])
    x = _empty((len(pixels), finest.channels, height, width), model.device)
    reach = model.vqvae.local_reach(decoder=False)
    for band, around, own in _bands(x.shape, slice(0, height), finest.stride, reach, model.device):
        part = cut(model, pixels, (around, slice(0, width)), finest.stride)
        x[:, :, band] = model.vqvae.transform(part, quality)[:, :, own]
    return x


def cut(model: Model, pixels: NDArray[np.uint8], box: Box, stride: int) -> Tensor:
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
