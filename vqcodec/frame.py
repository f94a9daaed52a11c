"""The frame of a picture: its size, how fine it is coded, and the tiles that are coded independently.

A file's header holds a frame; what encodes, decodes, samples or measures without a file makes one of its own.
"""

from dataclasses import dataclass

# (top, left, height, width) in pixels.
Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Frame:
    """What coding has to know of a picture besides its codes.

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
        """Where the tiles are in the picture, in raster order; those at the right and bottom may be smaller."""
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
