"""Which optimiser learns which weights, and how fast."""

import torch
from torch import nn

from vqcodec.models.layers import Linear1x1
from vqcodec.models.pixels import CellBlocks, SeparableLap
from vqcodec.train.loss import RateDistortion
from vqcodec.train.muon import Muon
from vqcodec.train.schedule import Schedule

Optimisers = dict[str, torch.optim.Optimizer]


def optimisers_of(model: RateDistortion, schedule: Schedule) -> Optimisers:
    """Adam by the name "adam" and, if the kernels of convolutions have a rate of their own, Muon for them, "muon".

    Every group of weights has its peak learning rate as "peak".
    """
    klt = [p for m in model.modules() if isinstance(m, Linear1x1) for p in m.parameters()]
    kernels = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d)] if schedule.kernel_rate else []
    known = {id(p) for p in [*klt, *kernels]}
    prior = [p for p in model.prior.parameters() if id(p) not in known]
    known |= {id(p) for p in prior}
    cells = [p for m in model.modules() if isinstance(m, CellBlocks) for p in m.parameters() if id(p) not in known]
    known |= {id(p) for p in cells}
    others = [p for p in model.parameters() if id(p) not in known]
    groups = [
        {"params": others, "peak": schedule.rate},
        {"params": cells, "peak": schedule.cell_rate},
        {"params": klt, "peak": schedule.klt_rate},
        {"params": prior, "peak": schedule.prior_rate},
    ]
    optimisers: Optimisers = {
        "adam": torch.optim.Adam([g for g in groups if g["params"]], schedule.rate, betas=(0.9, 0.99), fused=True)
    }
    if schedule.kernel_rate:
        optimisers["muon"] = Muon([{"params": kernels, "peak": schedule.kernel_rate}], schedule.kernel_rate)
    return optimisers


def clipped_apart(model: RateDistortion) -> list[list[nn.Parameter]]:
    """The weights in two sets whose gradients are clipped apart: linear transforms, and everything else.

    Gradients of the transforms are ten times as long. Clipped together with them, every batch would count for the
    networks by the inverse of a length that has nothing to do with them.
    """
    transforms = [p for m in model.modules() if isinstance(m, Linear1x1 | SeparableLap) for p in m.parameters()]
    known = {id(p) for p in transforms}
    return [transforms, [p for p in model.parameters() if id(p) not in known]]


def set_learning_rates(optimisers: Optimisers, share: float) -> None:
    """Let all learn at a share of their peak learning rates."""
    for optimiser in optimisers.values():
        for group in optimiser.param_groups:
            group["lr"] = group["peak"] * share
