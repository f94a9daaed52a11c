"""Measure anew what `compress --tune visual` knows of weights: to errors of which code planes the eye is sensitive.

    python -m bench.sensitivity WEIGHTS PICTURES... [--crops 32] [--side 384]

`vqcodec train` does this at its end. The result lies beside the weights (.visual.json), whose id does not change. Give
pictures that nothing is judged by, such as those of the training.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from vqcodec import packaged, tuning, weights
from vqcodec.errors import VqcodecError
from vqcodec.train import data, sensitivity


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights")
    parser.add_argument("pictures", type=Path, nargs="+")
    parser.add_argument("--crops", type=int, default=32)
    parser.add_argument("--side", type=int, default=384, help="of the crops, in pixels")
    given = parser.parse_args(arguments)
    try:
        path = packaged.find(given.weights)
        model = weights.load(path)
        found = data.find_pictures(given.pictures)
    except VqcodecError as error:
        print(f"sensitivity: {error}", file=sys.stderr)
        return 1
    rng = np.random.default_rng(0)
    pictures = data.Pictures(found, cache_bytes=0)
    chosen = (pictures.get(int(index)) for index in rng.permutation(len(pictures))[: given.crops])
    crops = [data.crop(p, given.side, rng, mirror=False) for p in chosen if p is not None]
    tuned = sensitivity.measure(model, crops)
    tuned.save(tuning.path_of(path), model.id)
    for name in ("unit", "masking", "balance"):
        print(name, dict(zip(tuned.qualities, [round(x, 3) for x in getattr(tuned, name).tolist()], strict=True)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
