"""The frame of a picture: its size, its quality, and the tiles that are coded independently.

The header of a file contains a frame. Code that works without a file, such as sampling, makes its own.
"""

from dataclasses import dataclass

# (top, left, height, width) in pixels.
Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Region:
    """A part of a picture, in pixels from its top left corner."""

    left: int
    top: int
    width: int
    height: int

    @property
    def rows(self) -> slice:
        return slice(self.top, self.top + self.height)

    @property
    def columns(self) -> slice:
        return slice(self.left, self.left + self.width)


@dataclass(frozen=True)
class Frame:
    """Everything that decoding needs besides weights and codes.

    Attributes:
        width, height: in pixels.
        quality: 1 to 100.
        tile: side of a tile in pixels; 0 if the whole picture is one tile.
        grey: whether the picture has a single channel.
    """

    width: int
    height: int
    quality: int
    tile: int = 0
    grey: bool = False

    def padded(self, unit: int) -> tuple[int, int]:
        """Height and width in pixels, rounded up to multiples of `unit`."""
        return _round_up(self.height, unit), _round_up(self.width, unit)

    def tiles(self) -> list[Box]:
        """The tiles in raster order, in pixels. Those at the right and bottom edges may be smaller."""
        side = self.tile or max(self.width, self.height)
        return [
            (top, left, min(side, self.height - top), min(side, self.width - left))
            for top in range(0, self.height, side)
            for left in range(0, self.width, side)
        ]

    def padded_tiles(self, unit: int) -> list[Box]:
        """The tiles, with their heights and widths rounded up to multiples of `unit`."""
        return [
            (top, left, _round_up(height, unit), _round_up(width, unit)) for top, left, height, width in self.tiles()
        ]


def _round_up(length: int, unit: int) -> int:
    return -(-length // unit) * unit
