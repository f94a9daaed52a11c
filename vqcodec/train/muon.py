"""Muon: gradient descent with orthogonalised momentum, for weights that are matrices.

The update of a matrix is its averaged gradient with all singular values set to about 1, so that weak directions of the
gradient are learned as fast as strong ones (Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural
networks"). Updates are scaled to the root mean square of Adam's, so that learning rates are comparable (Liu et al.
2025, "Muon is scalable for LLM training", section 2.2).

Weight decay bounds the spectral norm (Chen, Li & Liu 2025, "Muon optimizes under spectral norm constraints"). It is
needed because updates do not shrink with the gradient: weights would grow without bound.

Adam trains all parameters that are not matrices.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, distributed, nn

from vqcodec import precision
from vqcodec.train.process import sum_over_processes

ADAM_SCALE = 0.2  # root mean square of Adam's updates, about
MOMENTUM = 0.95
ITERATIONS = 4  # of Newton-Schulz
LARGEST = 3.0  # bound of the singular values, by weight decay


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum, for weights (outputs, inputs) or kernels (outputs, inputs, h, w).

    Args:
        params: weights, or parameter groups of them. lr: learning rate.
    """

    def __init__(self, params: Iterable[nn.Parameter] | Iterable[dict[str, Any]], lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            # Matrices of equal shape are orthogonalised as a batch.
            alike: dict[torch.Size, list[tuple[nn.Parameter, Tensor]]] = {}
            for parameter in group["params"]:
                gradient = parameter.grad
                if gradient is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                state["momentum"].lerp_(gradient, 1 - MOMENTUM)
                update = gradient.lerp(state["momentum"], MOMENTUM).flatten(1)
                alike.setdefault(update.shape, []).append((parameter, update))
            for shape, members in alike.items():
                gain = ADAM_SCALE * max(shape) ** 0.5
                updates = _share_work(torch.stack([update for _, update in members]))
                for (parameter, _), update in zip(members, updates, strict=True):
                    length = group["lr"] * gain
                    parameter.mul_(1 - length / LARGEST).add_(update.view(parameter.shape), alpha=-length)


def _share_work(updates: Tensor) -> Tensor:
    """Orthogonalise matrices (B, m, n), split among the processes of a distributed run."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return orthogonalise(updates)
    own = slice(distributed.get_rank(), None, distributed.get_world_size())
    found = torch.zeros_like(updates)
    if len(updates[own]):
        found[own] = orthogonalise(updates[own])
    return sum_over_processes(found)


def orthogonalise(x: Tensor) -> Tensor:
    """Set the singular values of matrices (B, m, n) to about 1 (0.7 to 1.2; tiny ones stay smaller).

    A quintic Newton-Schulz iteration with the coefficients of Jordan et al., which are steep at zero; in bfloat16 where
    that is fast.
    """
    y = x.bfloat16() if precision.bfloat16_pays(x.device) else x
    tall = y.shape[1] > y.shape[2]
    if tall:
        y = y.mT
    y = y / (y.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(ITERATIONS):
        square = y @ y.mT
        y = 3.4445 * y + (2.0315 * square @ square - 4.7750 * square) @ y
    return (y.mT if tall else y).to(x.dtype)
