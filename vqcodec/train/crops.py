"""What a run learns from, and what it is validated on."""

import os
from collections.abc import Generator
from pathlib import Path

import numpy as np
from torch import Tensor

from vqcodec.train import data
from vqcodec.train.job import Job

VALIDATION_PICTURES = 32


def set_aside(job: Job, paths: list[Path]) -> tuple[data.Pictures, list[data.Pixels]]:
    """Split pictures into those to learn from, and one validation crop of each of the others.

    Returns:
        the training pictures; and in the first process the crops, uint8 (H, W, 3), of the side that training begins
        with.

    Raises:
        TrainingError: none of the pictures can be read.
    """
    found = data.Pictures(paths, job.on_warning, cache_bytes=0)
    training, held = data.split(paths, VALIDATION_PICTURES, lambda path: found.read(path) is not None)
    pictures = found.only(training, data.CACHE_BYTES // job.world)
    if job.rank:
        return pictures, []
    rng = np.random.default_rng(0)
    size = job.schedule.crop_side(0, job.config.multiple)
    read = (found.read(path) for path in held)
    # Copies: a crop is a view that would keep its whole picture in memory.
    return pictures, [data.crop(p, size, rng, job.schedule.mirror).copy() for p in read if p is not None]


def first(job: Job, pictures: data.Pictures, count: int) -> Tensor:
    """Some training crops, the same at every call: uint8 (count, H, W, 3)."""
    size = job.schedule.crop_side(0, job.config.multiple)
    stream = data.batches(pictures, batch=count, size=size, seed=job.seed, mirror=job.schedule.mirror)
    crops = next(stream)
    stream.close()
    return crops


def stream(job: Job, pictures: data.Pictures, side: int, step: int) -> Generator[Tensor, None, None]:
    """Endless batches for the steps of this process from `step` on: uint8 (B, side, side, 3)."""
    gpu = job.device.type == "cuda"
    return data.batches(
        pictures,
        batch=job.schedule.crops_a_step(side, job.world),
        size=side,
        # Every process, every resumption and every size of crops draws its own.
        seed=job.seed + 1000 * job.rank + step + (side << 20),
        threads=min(16, os.cpu_count() or 1) if gpu else 1,
        mirror=job.schedule.mirror,
        pinned=gpu,
    )
