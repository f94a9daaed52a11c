"""Muon: gradient descent with orthogonalised momentum, for weights that are matrices.

The update of a matrix is its averaged gradient with all singular values set to about 1: directions that the gradient
knows only faintly are learned as fast as the strongest (Jordan et al. 2024, "Muon: An optimizer for hidden layers in
neural networks"). The scale is that of Liu et al. 2025, "Muon is scalable for LLM training", section 2.2: entries of about
the size of Adam's, so that learning rates mean the same. Weight decay bounds the spectral norm (Chen, Li & Liu 2025, "Muon
optimizes under spectral norm constraints"): steps do not shrink with the gradient, and without a bound weights that no
longer gain anything keep growing. Everything that is no matrix is left to Adam.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, distributed, nn

# Adam's updates have about this root mean square.
ADAM_SCALE = 0.2
MOMENTUM = 0.95
ITERATIONS = 4
# Weights shrink by so much with every step that singular values stay below this.
LARGEST = 3.0


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum, for weights (outputs, inputs) or kernels (outputs, inputs, h, w).

    Args:
        params: weights or groups of them. lr: learning rate.
    """

    def __init__(self, params: Iterable[nn.Parameter] | Iterable[dict[str, Any]], lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            # Matrices of one shape are orthogonalised together.
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
                scale = ADAM_SCALE * max(shape) ** 0.5
                updates = _share_work(torch.stack([update for _, update in members]))
                for (parameter, _), update in zip(members, updates, strict=True):
                    length = group["lr"] * scale
                    parameter.mul_(1 - length / LARGEST).add_(update.view(parameter.shape), alpha=-length)


def _share_work(updates: Tensor) -> Tensor:
    """Orthogonalise matrices (B, m, n); the processes of a distributed run each do their part."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return orthogonalise(updates)
    own = slice(distributed.get_rank(), None, distributed.get_world_size())
    found = torch.zeros_like(updates)
    if len(updates[own]):
        found[own] = orthogonalise(updates[own])
    distributed.all_reduce(found)
    return found


def orthogonalise(x: Tensor) -> Tensor:
    """Matrices (B, m, n) with the same singular vectors and singular values of about 1 (0.7 to 1.2; tiny ones less).

    A quintic Newton-Schulz iteration in half precision, with Jordan's coefficients, which are steep at zero.
    """
    y = x.bfloat16()
    tall = y.shape[1] > y.shape[2]
    if tall:
        y = y.mT
    y = y / (y.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(ITERATIONS):
        square = y @ y.mT
        y = 3.4445 * y + (2.0315 * square @ square - 4.7750 * square) @ y
    return (y.mT if tall else y).to(x.dtype)
