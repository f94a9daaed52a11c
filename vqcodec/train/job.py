"""What a run is asked to do: decided before it begins, and the same to its end."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from vqcodec.errors import TrainingError
from vqcodec.models.config import Config, StageConfig
from vqcodec.models.model import Model
from vqcodec.models.recipes import load_config
from vqcodec.train.progress import Progress
from vqcodec.train.schedule import LOOK, SCHEDULES, Schedule

# Crops a step of a GPU: with fewer, most of it would be idle.
GPU_BATCH = 64


@dataclass(frozen=True)
class Job:
    """What a run is asked to do.

    Attributes:
        config, schedule: what learns, and how.
        output: the weights file.
        seconds: budget of the whole run, earlier parts included; of this sitting alone where `crops` is given.
        crops: length of the whole run in crops, however long they take; None where the clock says when it ends.
        seed: of crops, qualities and initial weights.
        device: of this process. rank: its number; the first one, 0, validates and writes. world: how many there are.
        onward: whether the run began with weights that were good already, and has the schedule for these.
        look_of: id, in hexadecimal, of the weights of which another look is trained; "" if none is.
        on_progress, on_warning: as of `train`; None in all processes but the first.
    """

    config: Config
    schedule: Schedule
    output: Path
    seconds: float
    seed: int
    device: torch.device
    rank: int = 0
    world: int = 1
    onward: bool = False
    look_of: str = ""
    crops: int | None = None
    on_progress: Callable[[Progress], None] | None = None
    on_warning: Callable[[str], None] | None = None


def configuration(asked: str | Path | Config | None, given: Model | None, source: Path | None, look: bool) -> Config:
    """What is trained.

    Args:
        asked: a configuration, the name of one, a JSON file, or None. given: weights to begin with, and source: their
            file. look: whether another look of them is trained.

    Raises:
        TrainingError: the weights differ from what was asked for in more than the commitment and numbers of residual
            blocks, or a look has none.
        WeightsError: unknown configuration.
    """
    config = asked if isinstance(asked, Config) else load_config(str(asked or "photo"))
    if look:
        if given is None:
            raise TrainingError("a look needs the weights that it is for")
        return given.config
    if given is None:
        return config
    if asked is None:
        return given.config
    if fields := differences(config, with_blocks(given.config, config)):
        raise TrainingError(f"{source} has another configuration than {config.name!r}, differing in {fields}")
    return config


def with_blocks(given: Config, asked: Config) -> Config:
    """A configuration with the numbers of residual blocks of another one."""
    if len(given.stages) != len(asked.stages):
        return given
    stages = zip(given.stages, asked.stages, strict=True)
    return dataclasses.replace(given, stages=tuple(_with_blocks(*pair) for pair in stages))


def _with_blocks(given: StageConfig, asked: StageConfig) -> StageConfig:
    cells = asked.cells
    if cells is not None and given.cells is not None:
        cells = dataclasses.replace(
            given.cells, encoder_blocks=cells.encoder_blocks, decoder_blocks=cells.decoder_blocks
        )
    return dataclasses.replace(
        given, encoder_blocks=asked.encoder_blocks, decoder_blocks=asked.decoder_blocks, cells=cells
    )


def differences(asked: Config, given: Config) -> str:
    """The fields in which two configurations differ, apart from the commitment."""
    names = (field.name for field in dataclasses.fields(Config) if field.name != "commitment")
    return ", ".join(name for name in names if getattr(asked, name) != getattr(given, name))


def choose_schedule(
    asked: Schedule | None, config: Config, device: torch.device, world: int, look: bool, distortion: str | None
) -> Schedule:
    """How it is trained, without the phases that the configuration has no use for.

    Args:
        asked: a schedule; None for the usual one of the configuration, or of another look.
        config, device, world: as of `Job`. look: whether another look is trained.
        distortion: as of `Schedule.with_distortion`; None for what the schedule says.

    Raises:
        ValueError: no such distortion.
    """
    schedule = asked or (LOOK if look else SCHEDULES.get(config.name, Schedule()))
    if not asked:
        schedule = schedule.with_batch((GPU_BATCH if device.type == "cuda" else schedule.batch) * world)
    if distortion is not None:
        schedule = schedule.with_distortion(distortion)
    if not config.joint:  # the prior has its own part of the time already
        return dataclasses.replace(schedule, prior_at=0.0, joint_at=0.0, joint_rate=1.0, polish_from=1.0)
    return schedule
