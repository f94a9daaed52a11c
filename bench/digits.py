"""MNIST's files to a folder of pictures, as `vqcodec train --config vqvae-mnist` wants them.

    python -m bench.digits train-images-idx3-ubyte.gz digits/train

The format (LeCun, Cortes & Burges): four numbers of four bytes, big endian, magic 2051, count, rows and columns, then
bytes.
"""

import argparse
import gzip
import sys
from pathlib import Path

import numpy as np
from PIL import Image

MAGIC = 2051


def read(path: Path) -> np.ndarray:
    """Pictures of an IDX file, gzipped or not: uint8 (N, H, W).

    Raises:
        ValueError: it is none.
    """
    data = path.read_bytes()
    if data.startswith(b"\x1f\x8b"):
        data = gzip.decompress(data)
    numbers = np.frombuffer(data[:16], ">u4")
    if len(numbers) < 4 or numbers[0] != MAGIC or len(data) != 16 + int(np.prod(numbers[1:].astype(np.int64))):
        raise ValueError(f"{path} is not a file of MNIST pictures")
    return np.frombuffer(data, np.uint8, offset=16).reshape(numbers[1:].astype(int))


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, help="only so many")
    given = parser.parse_args(arguments)
    try:
        digits = read(given.file)[: given.count]
        given.folder.mkdir(parents=True, exist_ok=True)
        for number, digit in enumerate(digits):
            Image.fromarray(digit).save(given.folder / f"{number:05}.png")
    except (OSError, EOFError, ValueError) as error:
        print(f"digits: {error}", file=sys.stderr)
        return 1
    print(f"{len(digits)} pictures in {given.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
