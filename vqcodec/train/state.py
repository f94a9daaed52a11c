"""What a run is at any time."""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from vqcodec.errors import TrainingError
from vqcodec.models.layers import channels_last
from vqcodec.train import crops, data, perceptual
from vqcodec.train.codebooks import perplexity
from vqcodec.train.job import Job
from vqcodec.train.loss import RateDistortion
from vqcodec.train.optimisers import Optimisers, clipped_apart, optimisers_of
from vqcodec.train.progress import Progress
from vqcodec.train.recording import Recording
from vqcodec.train.rounding import Rounding
from vqcodec.train.schedule import Phase

# Before so many steps, which prepare more than they do, a run whose length is in crops has no pace.
PACE_STEPS = 10

# How different pictures are: restored and original ones, float (B, 3, H, W), 0..255 -> (B,).
Distance = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Run:
    """A run at some time.

    Attributes:
        job: what it is asked to do.
        pictures: to learn from. validation: crops to validate on, uint8 (H, W, 3); none but in the first process.
        model: what learns. average: the exponential moving average of its weights, which is what is exported.
        trained: the model as it is called in a step, which under several processes shares its gradients.
        optimisers: of the model's weights. clipped: the model's weights, in sets whose gradients are clipped apart.
        phase: see there. step: optimisation steps done. crops: crops seen, by all processes.
        spent: seconds, earlier parts of the run included. sitting: seconds spent before this sitting.
        rate_start: weight of the rate in the loss at the start. averaged: the step from which on weights are averaged.
        rounding_learned: what has stood in for the prior until its turn, by the names of a checkpoint.
        recent, loss: exponential moving averages of bits per pixel and PSNR, (2,), and the last step's loss; on the
            device, so that no step waits for numbers.
        lost: how many steps in a row, up to the last one, had a loss that is not finite; on the device as well.
        recording: of a step on a GPU, for this phase and size of crops.
        compiled: whether compiling has been tried, on a CPU, for this phase and size of crops.
        judge: LPIPS, for the log alone.
        before: validation crops as the model restored them before all training, uint8 (H, W, 3).
    """

    job: Job
    pictures: data.Pictures
    validation: list[data.Pixels]
    model: RateDistortion
    average: RateDistortion
    trained: nn.Module
    optimisers: Optimisers
    clipped: list[list[nn.Parameter]]
    phase: Phase
    rate_start: float
    recent: Tensor
    loss: Tensor
    lost: Tensor
    step: int = 0
    crops: int = 0
    spent: float = 0.0
    sitting: float = 0.0
    averaged: int = 0
    rounding_learned: dict[str, Tensor] = field(default_factory=dict)
    recording: Recording[tuple[Tensor, Tensor]] | None = None
    compiled: bool = False
    judge: Distance | None = None
    before: list[data.Pixels] = field(default_factory=list)

    @property
    def share(self) -> float:
        """The share of the run that is done, from 0; at 1 it is over."""
        return self.crops / self.job.crops if self.job.crops else self.spent / self.job.seconds

    @property
    def interrupted(self) -> bool:
        """Whether this sitting is over and the run is not."""
        return bool(self.job.crops) and self.spent - self.sitting >= self.job.seconds and self.share < 1

    def seconds_until(self, share: float) -> float:
        """About how long it takes until a share of the run is done, at the pace so far; inf where none is known."""
        if not self.job.crops:
            return share * self.job.seconds - self.spent
        if self.step < PACE_STEPS or not self.share:
            return math.inf
        return self.spent * (share - self.share) / self.share

    def report(self, stage: str) -> None:
        """Tell whoever wants to know where the run stands; `stage` as of `Progress`."""
        if self.job.on_progress:
            bpp, psnr = self.recent.tolist()
            left = max(0.0, self.seconds_until(1.0))
            used = perplexity(self.model.vqvae)
            self.job.on_progress(Progress(stage, self.step, self.spent, left, bpp, psnr, float(self.loss), used))


def new_run(job: Job, paths: list[Path], features: Sequence[Path] = (), judge: Path | None = None) -> Run:
    """A run before its first step, with new networks.

    Args:
        job: what it is asked to do. paths: pictures. features, judge: as of `train`.

    Raises:
        TrainingError: LPIPS is not installed, or none of the pictures can be read.
        WeightsError: unreadable features.
    """
    model = RateDistortion(job.config, visual_share=job.schedule.visual_share)
    if job.schedule.prior_at:
        model.rounding = Rounding(job.config)
    model = channels_last(model, job.device)
    average = copy.deepcopy(model).requires_grad_(False).eval()
    optimisers = optimisers_of(model, job.schedule)
    if features:
        model.perceptual = average.perceptual = _lpips(features, job.device)
    judging = _lpips([judge], job.device, "alex") if judge else None
    pictures, validation = crops.set_aside(job, paths)
    return Run(
        job,
        pictures,
        validation,
        model,
        average,
        trained=model,
        optimisers=optimisers,
        clipped=clipped_apart(model),
        phase=job.schedule.phase(0.0),
        rate_start=job.schedule.rate_start,
        recent=torch.full((2,), math.nan, device=job.device),
        loss=torch.tensor(math.nan),
        lost=torch.zeros((), dtype=torch.int64, device=job.device),
        judge=judging,
    )


def _lpips(features: Sequence[Path], device: torch.device, expected: str | None = None) -> Distance:
    try:
        return perceptual.distance(features, device, expected)
    except ImportError as error:
        raise TrainingError(f"{error} (pip install 'vqcodec[natural]')") from None
