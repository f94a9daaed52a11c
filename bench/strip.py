"""A piece of a picture as several codecs restore it at equal bytes, in a row: the original, then the others in order.

    python -m bench.strip [PICTURE] [--rates 0.15,0.3,0.8] [--codecs vqcodec,avif,jxl] [--piece LEFT,TOP,SIDE]
        [--enlarge N] -o docs/looks.jpg

There is a row for each rate. The whole picture is coded: the first codec takes its quality nearest to the rate, the
others theirs nearest to its bytes. Each piece has the codec and the bytes of the whole file below it. Pieces are
enlarged by a whole factor, without smoothing. Without a picture it is matplotlib's sample photo.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from bench import codecs
from bench.rate_distortion import SAMPLE, load

JPEG_QUALITY = 85  # of the strip itself, where it is written as JPEG


def draw(pieces: Sequence[NDArray[np.uint8]], captions: Sequence[str], factor: int) -> Image.Image:
    """A row of pieces, each with its caption below.

    Args:
        pieces: uint8 (side, side, 3), all of one size.
        captions: of one or two lines each.
        factor: by which pieces are enlarged.
    """
    side = factor * len(pieces[0])
    font_size = max(14, side // 16)
    strip = Image.new("RGB", (len(pieces) * side, side + 3 * font_size), "white")
    pen = ImageDraw.Draw(strip)
    for number, (piece, caption) in enumerate(zip(pieces, captions, strict=True)):
        enlarged = piece.repeat(factor, axis=0).repeat(factor, axis=1)
        strip.paste(Image.fromarray(enlarged), (number * side, 0))
        middle = ((number + 0.5) * side, side + 1.5 * font_size)
        pen.multiline_text(middle, caption, "black", font_size=font_size, anchor="mm", align="center")
    return strip


def stack(rows: Sequence[Image.Image]) -> Image.Image:
    """Rows of one size below each other."""
    width, height = rows[0].size
    sheet = Image.new("RGB", (width, height * len(rows)))
    for number, row in enumerate(rows):
        sheet.paste(row, (0, number * height))
    return sheet


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path, nargs="?", default=SAMPLE)
    parser.add_argument("--rates", default="0.15", help="bits per pixel, a row for each (default: %(default)s)")
    parser.add_argument("--codecs", default="vqcodec,vqcodec-natural,avif,jxl", help="default: %(default)s")
    parser.add_argument("--piece", default="120,60,256", help="LEFT,TOP,SIDE in pixels (default: %(default)s)")
    parser.add_argument("--enlarge", type=int, default=2, metavar="N", help="default: %(default)s")
    parser.add_argument("-o", "--output", type=Path, required=True)
    given = parser.parse_args(arguments)
    pixels = load(given.picture)
    left, top, side = (int(number) for number in given.piece.split(","))
    rows = []
    for rate in map(float, given.rates.split(",")):
        size = rate * pixels[:, :, 0].size / 8
        shown, captions = [pixels], [f"original\n{rate:g} bits per pixel:"]
        for number, key in enumerate(given.codecs.split(",")):
            codec = codecs.get(key)
            quality, data = codecs.nearest_quality(codec, pixels, size)
            print(f"{codec.title}: quality {quality:g}, {len(data):,} bytes")
            size = size if number else len(data)
            shown.append(codec.decode(data))
            captions.append(f"{codec.title}\n{len(data):,} bytes")
        pieces = [restored[top : top + side, left : left + side] for restored in shown]
        rows.append(draw(pieces, captions, given.enlarge))
    stack(rows).save(given.output, quality=JPEG_QUALITY)
    return 0


if __name__ == "__main__":
    sys.exit(main())
