"""The training distortion: a mixture of squared error and visual distance in a fixed proportion."""

import torch
from torch import Tensor, nn

from vqcodec.train.process import sum_over_processes
from vqcodec.visual import visual_distance

# Number of qualities at which the unit of the visual distance is measured; it is interpolated between them.
KNOTS = 10
# Pictures near a knot over which its running mean averages.
MEMORY = 100.0


class Distortion(nn.Module):
    """(1 - share) * squared error + share * unit(quality) * visual distance.

    At each knot the unit is a running geometric mean of squared error / visual distance over the training pictures. It
    makes both terms equal on average. So the distortion stays on the scale of the squared error, and each quality keeps
    its distortion weight. All processes of a distributed run learn the same unit.

    Attributes:
        share: of the visual distance, 0..1.
        log_unit: float (KNOTS,), natural logarithm of the unit.
        seen: float (KNOTS,), number of pictures near each knot so far.
    """

    log_unit: Tensor
    seen: Tensor

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share
        self.register_buffer("log_unit", torch.zeros(KNOTS))
        self.register_buffer("seen", torch.zeros(KNOTS))

    def forward(self, restored: Tensor, original: Tensor, quality: Tensor) -> Tensor:
        """Pictures, float (B, 3, H, W) in 0..255, and qualities (B,) -> (B,) on the scale of the squared error."""
        mse = (restored - original).square().mean((1, 2, 3))
        if not self.share:
            return mse
        visual = visual_distance(restored, original)
        place = (quality.float() - 1) / 99 * (KNOTS - 1)
        near = (1 - (place[:, None] - torch.arange(KNOTS, device=place.device)).abs()).clamp(min=0)  # (B, KNOTS)
        if self.training:
            self._learn(near, mse.detach(), visual.detach())
        # A sum of products, because autocast would compute a matrix product in bfloat16.
        return (1 - self.share) * mse + self.share * (near * self.log_unit).sum(1).exp() * visual

    @torch.no_grad()
    def _learn(self, near: Tensor, mse: Tensor, visual: Tensor) -> None:
        ratio = (mse.clamp(min=1e-3) / visual.clamp(min=1e-3)).log()
        near = near * ratio.isfinite()[:, None]
        sums = torch.stack([near.sum(0), (near * ratio.nan_to_num()[:, None]).sum(0)])
        weight, total = sum_over_processes(sums)
        self.seen += weight
        mean = total / weight.clamp(min=1e-6)
        self.log_unit += weight / self.seen.clamp(min=1e-6, max=MEMORY).maximum(weight) * (mean - self.log_unit)
