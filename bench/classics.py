"""The figures by which the literature compares VQ-VAEs and their priors, on pictures that training has not seen.

    python -m bench.classics WEIGHTS PICTURES... [--batch 100]

    mse         squared error with pixels in 0..1, and the same in units of their variance
    loss        the latter + codebook loss (where codes learn by gradient) + 0.25 commitment loss (van den Oord et al.
                2017, eq. 3), both as means over all numbers of the latents, which have the scale of pixels in 0..1
    perplexity  codes in effective use, averaged over planes
    nats        of the prior, for each code (a position of a plane), level by level from the coarsest
    bytes       of a picture's codes, as the range coder writes them, and of its whole file
    ms          to get the rate model of one position in raster order when sampling or decoding; and of a run of the
                whole network, which gives all positions if all codes are known, but one if they are not

Pictures must have one size. Codebook and commitment loss are equal in value. Their scale is that of the latents, which
is another in every implementation: compare the error by variance first.
"""

import argparse
import itertools
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch

from vqcodec import bitstream, codec, weights
from vqcodec.errors import VqcodecError
from vqcodec.models.model import Model
from vqcodec.models.quantizer import Codebook
from vqcodec.models.vqvae import PIXEL_SCALE
from vqcodec.train import data
from vqcodec.train.loss import RateDistortion

QUALITY = 50
FILES = 100  # so many are written as files
COMMITMENT = 0.25
WHOLE_RUNS = 5


class Watched(RateDistortion):
    """Remembers what the codebooks were given."""

    def __init__(self, model: Model) -> None:
        super().__init__(model.config, model.vqvae, model.prior)
        self.seen: list[tuple[Codebook, torch.Tensor]] = []
        self.maintain = lambda book, v: self.seen.append((book, v))
        self.eval()


def measure(path: Path, pictures: list[np.ndarray], batch: int) -> dict[str, float | list[float]]:
    """The figures; see the module."""
    model = weights.load(path)
    watched = Watched(model)
    quality = torch.tensor([QUALITY])
    pixels = np.stack(pictures).astype(np.float32)
    if any(side % model.config.multiple for side in pixels.shape[1:3]):
        raise ValueError(f"sides must be multiples of {model.config.multiple} pixels")
    error, gap, numbers, bits = 0.0, 0.0, 0, np.zeros(len(model.config.levels))
    usage: dict[Codebook, torch.Tensor] = {}
    with torch.inference_mode():
        for start in range(0, len(pixels), batch):
            part = torch.from_numpy(pixels[start : start + batch]).permute(0, 3, 1, 2)
            watched.seen.clear()
            losses = watched(part, quality.expand(len(part)))
            error += float(losses.mse.sum())
            bits += losses.level_bits.sum(0).double().numpy()
            slices = [piece for level in range(len(bits)) for piece in watched.vqvae.level_slices(level)]
            for piece, (book, v) in zip(slices, watched.seen, strict=True):
                k = book.nearest(v)
                counts = torch.stack([torch.bincount(plane, minlength=book.vectors.shape[1]) for plane in k.T])
                usage[book] = usage.get(book, torch.zeros_like(counts)) + counts
                steps = piece.steps(quality)[0][:, None] * PIXEL_SCALE
                gap += float(((v - book.lookup(k)) * steps).square().sum()) / 255**2
                numbers += v.numel()
    count = len(pixels)
    shares = [counts / counts.sum(1, keepdim=True) for counts in usage.values()]
    entropies = torch.cat([-(s * s.clamp(min=1e-12).log()).sum(1) for s in shares])
    grids = [[side // stage.stride for side in pixels.shape[1:3]] for stage in model.config.levels]
    codes = [
        sum(s.planes for s in stage.slices) * math.prod(g) for stage, g in zip(model.config.levels, grids, strict=True)
    ]
    files = [codec.compress(p, quality=QUALITY, weights=path) for p in pictures[:FILES]]
    by_variance = error / count / float(pixels.var())
    vq = COMMITMENT + (model.config.codebook == "gradient")
    return {
        "pictures": count,
        "mse, by variance": [error / count / 255**2, by_variance],
        "loss": by_variance + vq * gap / numbers,
        "perplexity": float(entropies.exp().mean()),
        "nats": [float(b) / count / n * math.log(2) for b, n in zip(bits, codes, strict=True)],
        "bytes of codes": float(np.mean([sum(len(part or b"") for part in bitstream.read(f).segments) for f in files])),
        "bytes of file": float(np.mean([len(f) for f in files])),
        "ms one, whole": list(time_per_position(model, *grids[-1])),
    }


@torch.inference_mode()
def time_per_position(model: Model, height: int, width: int) -> tuple[float, float]:
    """Milliseconds, of the finest level: of a step of `SlicePrior.walk`, and of a run over the whole grid."""
    level = len(model.config.levels) - 1
    prior = model.prior.level(level)
    part = prior.slice(0)
    quality = torch.tensor([QUALITY])
    state = torch.zeros(1, model.config.prior.channels, height, width)
    context = part.prepare(state, quality)[1]
    known = torch.zeros(1, 2 * part.piece.channels, height, width)
    start = time.perf_counter()
    steps = sum(1 for _ in itertools.islice(part.walk(context, known), 4 * width))
    middle = time.perf_counter()
    for _ in range(WHOLE_RUNS):
        part.parameters_at(0, context, known)
    end = time.perf_counter()
    return (middle - start) / steps * 1e3, (end - middle) / WHOLE_RUNS * 1e3


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path)
    parser.add_argument("pictures", type=Path, nargs="+")
    parser.add_argument("--batch", type=int, default=100)
    given = parser.parse_args(arguments)
    try:
        reader = data.Pictures(data.find_pictures(given.pictures))
        pictures = [p for p in (reader.get(i) for i in range(len(reader))) if p is not None]
        found = measure(given.weights, pictures, given.batch)
    except (OSError, ValueError, VqcodecError) as error:
        print(f"classics: {error}", file=sys.stderr)
        return 1
    for name, value in found.items():
        numbers = value if isinstance(value, list) else [value]
        print(f"{name:17}", *(f"{number:.4g}" for number in numbers))
    return 0


if __name__ == "__main__":
    sys.exit(main())
