"""Training runs that take seconds, and as many steps however busy the machine is."""

import contextlib
import csv
import itertools
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import models
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from vqcodec.models.config import Config, PriorConfig, SliceConfig, StageConfig
from vqcodec.train import data, validation
from vqcodec.train import run as training
from vqcodec.train.run import Progress, train
from vqcodec.train.schedule import Schedule

# For what has nothing to do with the kinds of slices and stages, of which models.TINY has more.
LEAST = Config(
    name="least",
    stages=(
        StageConfig(8, 24, 8, 1, 1, (SliceConfig(planes=24, dim=1, codes=64, layer=1, rows=64),), lapped=True),
        StageConfig(32, 12, 8, 1, 1, (SliceConfig(planes=12, dim=1, codes=64, layer=0, rows=64),)),
    ),
    prior=PriorConfig(channels=8, embedding=8, blocks=1),
)
# All together from the start.
SMALL = Schedule(
    crop=64,
    large_crop=96,
    batch=4,
    kernel_rate=1e-2,
    rate=2.5e-3,
    warm_up_steps=10,
    prior_at=0.0,
    joint_at=0.0,
    joint_rate=1.0,
    rate_start=0.5,
    rate_rise=0.2,
    polish_rate=0.15,
)
BOOKKEEPING = {"run.REPORT_SECONDS": 0.0, "run.CHECKPOINT_SECONDS": 0.5, "run.VALIDATIONS": 3}
BOOKKEEPING |= {"begin.START_CROPS": 32, "export.TUNING_CROPS": 1}
STEPS_A_SECOND = 20
QUALITIES = (10, 30, 90)  # that runs are validated at: of all, it would take longer than the steps


@contextlib.contextmanager
def small_runs(qualities: tuple[int, ...] = QUALITIES) -> Iterator[None]:
    """In the body, runs look at few crops at few qualities, and their time goes by steps."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in BOOKKEEPING.items():
            patch.setattr(f"vqcodec.train.{name}", value)
        patch.setattr(validation, "VALIDATION_QUALITIES", qualities)
        patch.setattr(torch, "set_flush_denormal", lambda _: True)  # of the whole process
        ticks = itertools.count()  # the clock is looked at twice a step
        patch.setattr(training, "time", SimpleNamespace(monotonic=lambda: next(ticks) / (2 * STEPS_A_SECOND)))
        yield


@contextlib.contextmanager
def shared_crops() -> Iterator[None]:
    """In the body, processes share the batches that one process would see, and rounding adds no noise."""

    def stream(job: Any, pictures: data.Pictures, side: int, step: int) -> Iterator[torch.Tensor]:
        for crops in data.batches(pictures, batch=job.schedule.crops_a_step(side, 1), size=side, seed=step):
            yield crops[job.rank :: job.world]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vqcodec.train.crops.stream", stream)
        patch.setattr(torch, "rand_like", lambda x: torch.full_like(x, 0.5))
        yield


def make_pictures(folder: Path, count: int, height: int, width: int) -> Path:
    """PNG files of `models.picture`, each a bit higher and narrower than the one before."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed in range(count):
        Image.fromarray(models.picture(height + 8 * seed, width - 4 * seed, seed + 100)).save(folder / f"{seed}.png")
    return folder


def run(pictures: Path, output: Path, seconds: float, **options: Any) -> list[Progress]:
    """Train for so long, by default the least configuration on the CPU."""
    seen: list[Progress] = []
    train(
        [pictures],
        output,
        minutes=seconds / 60,
        on_progress=seen.append,
        **{"config": LEAST, "device": "cpu", "schedule": SMALL} | options,
    )
    return seen


@dataclass(frozen=True)
class Run:
    """A run that is over; whoever goes on with it takes a copy.

    Attributes:
        output: the weights file; everything else lies beside it. seen: what it reported. warnings: of pictures.
        seconds: its budget.
    """

    output: Path
    seen: list[Progress]
    warnings: list[str]
    seconds: float

    def copy(self, folder: Path) -> Path:
        """A folder with copies of all its files: the weights file there."""
        for path in self.output.parent.iterdir():
            shutil.copy(path, folder / path.name)
        return folder / self.output.name


def log_of(output: Path) -> list[dict[str, float]]:
    with output.with_suffix(".csv").open(newline="") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def sheet_of(output: Path) -> list[np.ndarray]:
    """Original, before and after."""
    with Image.open(output.with_suffix(".png")) as sheet:
        return np.split(np.asarray(sheet), 3)


def checkpoint_of(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output.with_suffix(".ckpt"))
