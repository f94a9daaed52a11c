"""When a training run does what: learning rates, weight of the rate, batches and crops as its time passes."""

import math
from dataclasses import dataclass, replace
from enum import IntEnum

# Shares of the visual distance, by what `train --distortion` calls them.
DISTORTIONS = {"mse": 0.0, "visual": 0.5}


class Phase(IntEnum):
    """The phases of a run, in their order. Checkpoints store the numbers.

    Attributes:
        ROUNDING: rounding stands in for codebooks and prior (rounding.py). PRIOR: the prior learns alone.
        JOINT: everything learns. POLISH: codes stand still; the prior and what turns codes into pixels learn.
    """

    ROUNDING = 0
    PRIOR = 1
    JOINT = 2
    POLISH = 3


@dataclass(frozen=True)
class Schedule:
    """How a run learns; what it learns is `Config`.

    Attributes:
        batch: crops a step, over all processes. crop: their side in pixels.
        large_crop: side from the share `large_from` of the time on, with as many pixels a batch.
        mirror: whether half of the crops are mirrored.
        kernel_rate: Muon's peak learning rate, for the kernels of convolutions; None leaves them to Adam.
        rate: Adam's, for the rest. prior_rate: Adam's for the prior.
        klt_rate: Adam's for the KLT matrices, which multiply large inputs: at the full rate a few steps would undo them.
        warm_up_steps: optimiser steps over which learning rates rise.
        prior_at: share of the time until which rounding stands in for codebooks and prior (rounding.py). joint_at: until which the prior
            then learns alone. See `without_rounding`.
        rounding_rate: the peak of learning rates while rounding, as a share of `rate` and the others.
        joint_rate: the peak of learning rates from then on, as a share of their peaks before.
        rate_start: weight of the rate in the loss at the start of a fresh run. rate_rise: share of the time over which it
            rises to 1: codes that are rare from the start would never be tried.
        polish_from: share of the time from which codes stand still and only the prior and what turns codes into pixels learn,
            free of the noise of quantisation, where all are learned jointly. polish_rate: the peak of learning rates then, as
            a share of their peaks before.
        prior_from: share of the time from which the prior is trained alone, where it is learned after the rest.
        average_decay: of the moving average of the weights, which is what is exported.
        clip_norm: longest gradient.
        low_qualities: qualities are drawn as a uniform number to this power: the larger, the more low ones.
        visual_share: of the visual distance in the distortion, beside the squared error (distortion.py).
    """

    batch: int = 8
    crop: int = 256
    large_crop: int = 384
    large_from: float = 0.85
    mirror: bool = True
    kernel_rate: float | None = None
    rate: float = 1e-3
    prior_rate: float = 3e-3
    klt_rate: float = 3e-5
    warm_up_steps: int = 100
    prior_at: float = 0.6
    joint_at: float = 0.7
    rounding_rate: float = 1.0
    joint_rate: float = 0.2
    rate_start: float = 0.1
    rate_rise: float = 0.35
    polish_from: float = 0.88
    polish_rate: float = 0.4
    prior_from: float = 0.5
    average_decay: float = 0.999
    clip_norm: float = 1.0
    low_qualities: float = 1.0
    visual_share: float = 0.5

    def without_rounding(self) -> "Schedule":
        """For codebooks that do not start as integers, and where the prior is learned after the rest."""
        return replace(self, prior_at=0.0, joint_at=0.0)

    def with_batch(self, batch: int) -> "Schedule":
        """With at least so many crops a step. Transforms learn at a higher rate then, as the square root of the batch (Malladi et al. 2022, "On the SDEs and
        scaling rules for adaptive gradient algorithms"), but at most twice as fast."""
        if batch <= self.batch:
            return self
        return replace(self, batch=batch, rate=self.rate * min(2.0, math.sqrt(batch / self.batch)))

    def with_distortion(self, name: str) -> "Schedule":
        """For the squared error alone ("mse"), or half of it the visual distance ("visual").

        Raises:
            ValueError: no such distortion.
        """
        if name not in DISTORTIONS:
            raise ValueError(f"distortion must be one of {', '.join(DISTORTIONS)}, got {name!r}")
        return replace(self, visual_share=DISTORTIONS[name])

    def onward(self) -> "Schedule":
        """For weights that are good already: transforms learn at half the rate, and most of the time is for rounding,
        after which what makes the codes is done; the prior catches up, and polishes with the renderer."""
        return replace(self, rounding_rate=0.5, prior_at=0.7, joint_at=0.92, polish_from=0.92, joint_rate=0.02)

    def phase(self, share: float) -> Phase:
        """The phase at a share of the time, 0..1."""
        return Phase(sum(share >= start for start in (self.prior_at, self.joint_at, self.polish_from)))

    def begins(self, phase: int) -> float:
        """The share of the time at which a phase begins; of the number after the last phase, 1."""
        return (0.0, self.prior_at, self.joint_at, self.polish_from, 1.0)[phase]

    def _passed(self, share: float) -> float:
        """The share of its own time that the phase at a share of the whole time has had."""
        phase = self.phase(share)
        start, end = self.begins(phase), self.begins(phase + 1)
        return (share - start) / max(1e-9, end - start)

    def learning_rate(self, step: int, share: float) -> float:
        """What the peak learning rates are multiplied by: a rise over the steps, and a fall in every phase."""
        phase, passed = self.phase(share), self._passed(share)
        rise = min(1.0, (step + 1) / self.warm_up_steps)
        if phase is Phase.ROUNDING:
            return rise * self.rounding_rate * min(1.0, self.joint_rate + 1 - passed)
        peak = {Phase.PRIOR: 1.0, Phase.JOINT: self.joint_rate, Phase.POLISH: self.polish_rate}[phase]
        return rise * peak * _cosine(passed)

    def rate_weight(self, share: float, start: float) -> float:
        """Weight of the rate, from `start` to 1. It rises again while the prior learns alone: what a new prior says must not
        decide at once which codes are chosen."""
        risen = self._passed(share) if self.phase(share) is Phase.PRIOR else share / self.rate_rise
        return min(1.0, start + (1 - start) * risen)

    def part(self, share: float) -> tuple[bool, float]:
        """Where the prior is learned after the rest: whether it is its turn, and the share of that part's time."""
        if share < self.prior_from:
            return False, share / self.prior_from
        return True, (share - self.prior_from) / (1 - self.prior_from)

    def crop_side(self, share: float, multiple: int) -> int:
        """Side of the crops, a multiple of `multiple`."""
        side = max(self.large_crop if share >= self.large_from else self.crop, multiple)
        return side - side % multiple

    def crops_a_step(self, side: int, processes: int) -> int:
        """Crops of each process: as many pixels a step whatever their side."""
        return max(1, round(self.batch / processes * min(1.0, (self.crop / side) ** 2)))


def _cosine(share: float) -> float:
    """From 1 to 0.01."""
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * share))


# Where the usual schedule does not fit a named configuration. Few steps at high rates are for photos, where a step is dear.
_SMALL = Schedule(
    batch=128,
    crop=32,
    large_crop=32,
    kernel_rate=5e-3,
    rate=3e-3,
    warm_up_steps=50,
    joint_rate=1.0,
    prior_from=0.4,
    visual_share=0.0,
)
_LARGE = replace(_SMALL, batch=8, crop=128, large_crop=128)
SCHEDULES = {
    "vqvae-mnist": replace(_SMALL, crop=28, large_crop=28, mirror=False),
    "vqvae-ema-cifar10": _SMALL,
    "vqvae2": _LARGE,
    "vqvae2-3level": _LARGE,
}
# Another look: a decoder that is good already, learning what low qualities lack.
LOOK = Schedule(
    kernel_rate=2e-3,
    rate=1e-3,
    warm_up_steps=50,
    prior_at=0.0,
    joint_at=0.0,
    joint_rate=1.0,
    rate_start=1.0,
    polish_from=1.0,
    prior_from=1.0,
    large_from=1.0,
    average_decay=0.995,
    low_qualities=1.5,
    visual_share=0.0,
)
