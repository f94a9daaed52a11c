"""The schedule of a training run: phases, learning rates, weight of the bits, batches and crops over its time.

In names of this module, `rate` alone is a learning rate; `rate_weight`, `rate_start` and `rate_rise` are about the bit
rate in the loss. A share of the time is 0 at the start of a run and 1 at its end.
"""

import math
from dataclasses import dataclass, replace
from enum import IntEnum

# Share of the visual distance for each value of `train --distortion`.
DISTORTIONS = {"mse": 0.0, "visual": 0.5}


class Phase(IntEnum):
    """The phases of a run, in their order. Checkpoints store the numbers.

    Attributes:
        ROUNDING: rounding stands in for codebooks and prior (rounding.py). PRIOR: the prior learns alone.
        JOINT: everything learns. POLISH: codes stand still; the prior and the decoder behind the codes learn.
    """

    ROUNDING = 0
    PRIOR = 1
    JOINT = 2
    POLISH = 3


@dataclass(frozen=True)
class Schedule:
    """How a run learns; `Config` says what it learns.

    Attributes:
        batch: crops per step, over all processes.
        crop: side of the crops in pixels.
        large_crop, large_from: from this share of the time on, the side of the crops; batches keep their pixels.
        mirror: whether half of the crops are mirrored.
        kernel_rate: Muon's peak learning rate for convolution kernels; None leaves them to Adam.
        rate: Adam's peak learning rate for all other weights but those below.
        prior_rate: Adam's peak learning rate for the prior.
        cell_rate: Adam's peak learning rate for residual blocks on cells of pixels. They have few weights, which every
            place of a crop teaches.
        klt_rate: Adam's peak learning rate for the KLT matrices. Their inputs are large: at the full rate a few steps
            would destroy them.
        warm_up_steps: optimiser steps over which learning rates rise from 0.
        prior_at: share of the time at which the prior takes over from rounding and learns alone.
        joint_at: share of the time at which everything starts to learn together.
        rounding_rate, joint_rate, polish_rate: peak of the learning rates in each of these phases, relative to those
            above.
        rate_start: weight of the bits in the loss at the start of a fresh run.
        rate_rise: share of the time over which it rises to 1. At full weight from the start, codes that are rare at
            first would never be chosen.
        polish_from: share of the time from which codes stand still, if all is learned jointly: the prior and the
            decoder behind the codes learn without quantisation noise.
        prior_from: share of the time from which the prior learns alone, if it learns after the rest.
        average_decay: decay of the exponential moving average of the weights, which is what is exported.
        clip_norm: norm to which longer gradients are clipped, of linear transforms and of all else apart.
        low_qualities: exponent p: qualities are 1 + 99 u^p for uniform u in [0, 1]. Above 1 favours low qualities.
        visual_share: share of the visual distance in the distortion, 0..1 (distortion.py).
    """

    batch: int = 8
    crop: int = 256
    large_crop: int = 384
    large_from: float = 0.85
    mirror: bool = True
    kernel_rate: float | None = None
    rate: float = 1e-3
    prior_rate: float = 3e-3
    cell_rate: float = 4e-3
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

    def with_batch(self, batch: int) -> "Schedule":
        """A copy with at least `batch` crops per step.

        Adam's learning rate for transforms grows with the square root of the batch (Malladi et al. 2022, "On the SDEs
        and scaling rules for adaptive gradient algorithms"), to at most twice its value. `cell_rate`, which is high
        already, stays.
        """
        if batch <= self.batch:
            return self
        return replace(self, batch=batch, rate=self.rate * min(2.0, math.sqrt(batch / self.batch)))

    def with_distortion(self, name: str) -> "Schedule":
        """A copy for the squared error alone ("mse") or for equal shares of it and the visual distance ("visual").

        Raises:
            ValueError: no such distortion.
        """
        if name not in DISTORTIONS:
            raise ValueError(f"distortion must be one of {', '.join(DISTORTIONS)}, got {name!r}")
        return replace(self, visual_share=DISTORTIONS[name])

    def onward(self) -> "Schedule":
        """A copy for a warm start from good weights.

        Transforms learn at half the rate, and most of the time is for rounding. The encoder is done after that: then
        the prior catches up, and learns on together with the decoder behind the codes. Large crops come only then.
        """
        return replace(self, rounding_rate=0.5, prior_at=0.7, joint_at=0.92, polish_from=0.92, joint_rate=0.02)

    def phase(self, share: float) -> Phase:
        """The phase at a share of the time, 0..1."""
        return Phase(sum(share >= start for start in (self.prior_at, self.joint_at, self.polish_from)))

    def begins(self, phase: int) -> float:
        """The share of the time at which a phase begins; 1 for the number after the last phase."""
        return (0.0, self.prior_at, self.joint_at, self.polish_from, 1.0)[phase]

    def _passed(self, share: float) -> float:
        """The share of the present phase's own time that has passed at a share of the whole time."""
        phase = self.phase(share)
        start, end = self.begins(phase), self.begins(phase + 1)
        return (share - start) / max(1e-9, end - start)

    def learning_rate(self, step: int, share: float) -> float:
        """The factor on the peak learning rates: a linear warm-up, and a decay in every phase."""
        phase, passed = self.phase(share), self._passed(share)
        rise = min(1.0, (step + 1) / self.warm_up_steps)
        if phase is Phase.ROUNDING:
            return rise * self.rounding_rate * min(1.0, self.joint_rate + 1 - passed)
        peak = {Phase.PRIOR: 1.0, Phase.JOINT: self.joint_rate, Phase.POLISH: self.polish_rate}[phase]
        return rise * peak * _cosine(passed)

    def rate_weight(self, share: float, start: float) -> float:
        """The weight of the bits at a share of the time: from `start` to 1.

        It rises a second time while the prior learns alone, because an untrained prior must not decide which codes are
        chosen.
        """
        risen = self._passed(share) if self.phase(share) is Phase.PRIOR else share / self.rate_rise
        return min(1.0, start + (1 - start) * risen)

    def part(self, share: float) -> tuple[bool, float]:
        """For a prior that learns after the rest: whether it is its turn, and the share of that part's own time."""
        if share < self.prior_from:
            return False, share / self.prior_from
        return True, (share - self.prior_from) / (1 - self.prior_from)

    def crop_side(self, share: float, multiple: int) -> int:
        """Side of the crops in pixels at a share of the time, rounded down to a multiple of `multiple`."""
        side = max(self.large_crop if share >= self.large_from else self.crop, multiple)
        return side - side % multiple

    def crops_a_step(self, side: int, processes: int) -> int:
        """Crops per step of each process: about the same number of pixels whatever their side."""
        return max(1, round(self.batch / processes * min(1.0, (self.crop / side) ** 2)))


def _cosine(share: float) -> float:
    """Cosine decay from 1 to 0.01."""
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * share))


# Schedules of named configurations that differ from the default, which is for photos: few, expensive steps.
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
# A look: a warm start of the decoder, with more low qualities, which need it most.
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
