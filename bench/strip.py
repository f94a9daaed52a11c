"""A piece of a picture as several codecs restore it at equal bytes, side by side: the original, then the others in order.

    python bench/strip.py [PICTURE] [--rate .15] [--codecs vqcodec,vqcodec-natural,avif,jxl] [--piece LEFT,TOP,SIDE] -o docs/looks.jpg

The whole picture is coded: the first codec takes its quality nearest to the rate, the others theirs nearest to its bytes. Without a
picture it is matplotlib's sample photo.
"""

import argparse
import sys
from pathlib import Path

if not __package__:  # run as a file: let the imports below find the repository's packages
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
from PIL import Image

from bench import codecs
from bench.rate_distortion import SAMPLE, load


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
    shown = [pixels]
    for number, key in enumerate(given.codecs.split(",")):
        codec = codecs.get(key)
        quality, data = codecs.nearest_quality(codec, pixels, size)
        print(f"{codec.title}: quality {quality:g}, {len(data):,} bytes")
        size = size if number else len(data)
        shown.append(codec.decode(data))
    strip = np.concatenate([restored[top : top + side, left : left + side] for restored in shown], axis=1)
    Image.fromarray(strip).save(given.output, quality=92)
    return 0


if __name__ == "__main__":
    sys.exit(main())
