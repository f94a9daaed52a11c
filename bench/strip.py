"""A piece of a picture as several codecs restore it at equal bytes, in a row: the original, then the others in order.

    python -m bench.strip [PICTURE] [--rate 0.15] [--codecs vqcodec,vqcodec-natural,avif,jxl] [--piece LEFT,TOP,SIDE]
        -o docs/looks.jpg

The whole picture is coded: the first codec takes its quality nearest to the rate, the others theirs nearest to its
bytes. Each piece has the codec and the bytes of the whole file below it. A piece of less than 384 pixels is enlarged by
a whole factor, without smoothing. Without a picture it is matplotlib's sample photo.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from bench import codecs
from bench.rate_distortion import SAMPLE, load

LEAST_SIDE = 384  # pixels of a piece as shown


def draw(pieces: list[NDArray[np.uint8]], captions: list[str]) -> Image.Image:
    """A row of pieces, each with its caption below.

    Args:
        pieces: uint8 (side, side, 3), all of one size.
        captions: of one or two lines each.
    """
    factor = -(-LEAST_SIDE // len(pieces[0]))
    side = factor * len(pieces[0])
    font_size = side // 16
    strip = Image.new("RGB", (len(pieces) * side, side + 3 * font_size), "white")
    pen = ImageDraw.Draw(strip)
    for number, (piece, caption) in enumerate(zip(pieces, captions, strict=True)):
        enlarged = piece.repeat(factor, axis=0).repeat(factor, axis=1)
        strip.paste(Image.fromarray(enlarged), (number * side, 0))
        middle = ((number + 0.5) * side, side + 1.5 * font_size)
        pen.multiline_text(middle, caption, "black", font_size=font_size, anchor="mm", align="center")
    return strip


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path, nargs="?", default=SAMPLE)
    parser.add_argument("--rate", type=float, default=0.15, help="bits per pixel")
    parser.add_argument("--codecs", default="vqcodec,vqcodec-natural,avif,jxl")
    parser.add_argument("--piece", default="120,60,256", help="LEFT,TOP,SIDE in pixels")
    parser.add_argument("-o", "--output", type=Path, required=True)
    given = parser.parse_args(arguments)
    pixels = load(given.picture)
    left, top, side = (int(number) for number in given.piece.split(","))
    size = given.rate * pixels[:, :, 0].size / 8
    shown, captions = [pixels], ["original"]
    for number, key in enumerate(given.codecs.split(",")):
        codec = codecs.get(key)
        quality, data = codecs.nearest_quality(codec, pixels, size)
        print(f"{codec.title}: quality {quality:g}, {len(data):,} bytes")
        size = size if number else len(data)
        shown.append(codec.decode(data))
        captions.append(f"{codec.title}\n{len(data):,} bytes")
    pieces = [restored[top : top + side, left : left + side] for restored in shown]
    draw(pieces, captions).save(given.output, quality=92)
    return 0


if __name__ == "__main__":
    sys.exit(main())
