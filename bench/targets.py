"""How near `compress --target-...` comes, over pictures.

    python -m bench.targets PICTURES... [--targets bpp=.3,psnr=34,ssimulacra2=70,size=40000,max=40000]

For each target: the largest and the mean deviation (percent of the rate, dB, points), for `max` how much of the room is
used and whether any file exceeds it; pictures out of range are counted; seconds a picture.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

from vqcodec import codec
from vqcodec.errors import TargetError
from vqcodec.metrics import psnr
from vqcodec.ssimulacra2 import ssimulacra2
from vqcodec.target import Target
from vqcodec.train import data


def reached(name: str, value: float, pixels: np.ndarray) -> float:
    """What a file with this target comes to, minus the target: relative for rates."""
    if name == "max":
        return len(codec.compress(pixels, max_size=int(value))) / value - 1
    written = codec.compress(pixels, target=Target(name, value))
    if name in ("size", "bpp"):
        size = len(written) if name == "size" else 8 * len(written) / pixels[:, :, 0].size
        return size / value - 1
    restored = np.asarray(codec.decompress(written))
    return (psnr if name == "psnr" else ssimulacra2)(pixels, restored) - value


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", type=Path, nargs="+")
    parser.add_argument("--targets", default="bpp=.3,psnr=34,ssimulacra2=70,size=40000,max=40000")
    given = parser.parse_args(arguments)
    pictures = []
    for path in data.find_pictures(given.pictures):
        with Image.open(path) as picture:
            pictures.append(np.asarray(picture.convert("RGB")))
    for text in given.targets.split(","):
        name, value = text.split("=")
        gaps, missed = [], 0
        start = time.perf_counter()
        for pixels in pictures:
            try:
                gaps.append(reached(name, float(value), pixels))
            except TargetError:
                missed += 1
        seconds = (time.perf_counter() - start) / len(pictures)
        line = f"out of range {missed}, {seconds:.1f} s a picture"
        if gaps:
            unit = 100 if name in ("size", "bpp", "max") else 1
            least, most, mean = (unit * f(gaps) for f in (min, max, lambda x: float(np.mean(np.abs(x)))))
            line = f"{least:+.2f} to {most:+.2f}, mean {mean:.2f}, {line}"
        print(f"{text}: {line}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
