"""Recorded work: replayed with other inputs it gives what the function itself gives."""

import pytest
import torch
from torch import Tensor, nn

from vqcodec.train.recording import Recording


@pytest.mark.gpu
def test_gradients_of_other_inputs() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 1, 3)).cuda()

    def work(x: Tensor) -> Tensor:
        model.zero_grad(set_to_none=True)
        loss = model(x.float()).square().mean()
        loss.backward()
        return loss.detach()

    def gradients() -> list[Tensor]:
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    recording = Recording(work, [torch.zeros(2, 3, 16, 16, dtype=torch.uint8, device="cuda")])
    for seed in range(3):
        x = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
        loss = recording(x.pin_memory()).clone()
        found = gradients()
        with torch.no_grad():
            copy = [p.grad for p in model.parameters()]
        torch.testing.assert_close(loss, work(x.cuda()), rtol=1e-4, atol=1e-4)
        for ours, theirs in zip(found, gradients(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
        for parameter, gradient in zip(model.parameters(), copy, strict=True):
            parameter.grad = gradient  # where the recording writes
