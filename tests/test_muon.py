"""Muon: the orthogonalised update, its scale, and that it works where gradients are badly conditioned."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from vqcodec import precision
from vqcodec.train.muon import ADAM_SCALE, LARGEST, Muon, orthogonalise


@pytest.mark.parametrize(("bfloat16", "error"), [(True, 0.1), (False, 1e-4)])
@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 5, 40), (4, 40, 5), (1, 1, 7)])
def test_singular_values_come_to_about_one_and_vectors_stay(
    shape: tuple[int, int, int], bfloat16: bool, error: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In half precision where that is fast, else in single."""
    monkeypatch.setattr(precision, "bfloat16_pays", lambda device: bfloat16)
    rank = min(shape[1:])
    generator = torch.Generator().manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(shape, generator=generator), full_matrices=False)
    spectrum = torch.linspace(1, 0.2, rank) * 1e-3  # the scale of the gradient does not matter
    found = orthogonalise(u * spectrum @ v)
    inside = u.mT @ found @ v.mT
    values = torch.diagonal(inside, dim1=1, dim2=2)
    assert bool(((values > 0.6) & (values < 1.3)).all())
    assert float((inside - torch.diag_embed(values)).abs().max()) < error, "rounding is all that it is off by"


def test_a_zero_gradient_moves_nothing() -> None:
    assert not bool(orthogonalise(torch.zeros(1, 4, 6)).any())


@pytest.mark.parametrize("channels_last", [False, True])
def test_update_has_the_size_of_adams(channels_last: bool) -> None:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    weight = nn.Parameter(torch.zeros(16, 8, 3, 3).contiguous(memory_format=layout))
    weight.grad = torch.randn(16, 8, 3, 3, generator=torch.Generator().manual_seed(1)).contiguous(memory_format=layout)
    Muon([weight], lr=0.5).step()
    size = float(weight.detach().square().mean().sqrt())
    assert size == pytest.approx(0.5 * ADAM_SCALE, rel=0.3)
    assert float((weight.detach() * weight.grad).sum()) < 0, "downhill"


def test_no_singular_value_grows_beyond_the_bound() -> None:
    gradient = torch.randn(12, 20, generator=torch.Generator().manual_seed(4))
    weight = nn.Parameter(torch.zeros(12, 20))
    optimiser = Muon([weight], lr=0.1)
    for _ in range(300):
        weight.grad = gradient.clone()
        optimiser.step()
    largest = float(torch.linalg.matrix_norm(weight.detach(), 2))
    assert 0.7 * LARGEST < largest < 1.25 * LARGEST


def test_layout_does_not_matter_and_alike_matrices_go_together() -> None:
    generator = torch.Generator().manual_seed(2)
    values, gradients = torch.randn(2, 3, 6, 4, 3, 3, generator=generator)
    plain = [nn.Parameter(v.clone()) for v in values]
    last = [nn.Parameter(v.clone().contiguous(memory_format=torch.channels_last)) for v in values]
    for weights in (plain, last):
        optimiser = Muon(weights, lr=0.1)
        for _ in range(2):
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.grad = gradient.clone()
            optimiser.step()
    alone = nn.Parameter(values[0].clone())
    optimiser = Muon([alone], lr=0.1)
    for _ in range(2):
        alone.grad = gradients[0].clone()
        optimiser.step()
    torch.testing.assert_close(plain[0], alone, rtol=1e-2, atol=1e-3)
    for a, b in zip(plain, last, strict=True):
        torch.testing.assert_close(a.detach(), b.detach().contiguous(), rtol=1e-2, atol=1e-3)


def test_learns_faint_directions_that_plain_descent_leaves() -> None:
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(256, 12, generator=generator) * torch.logspace(0, -1, 12)
    target = 0.3 * torch.randn(8, 12, generator=generator)

    def loss_after(make: type[torch.optim.Optimizer], rate: float) -> float:
        weight = nn.Parameter(torch.zeros(8, 12))
        optimiser = make([weight], lr=rate)  # type: ignore[call-arg]
        for step in range(100):
            for group in optimiser.param_groups:
                group["lr"] = rate * (1 - step / 100)
            optimiser.zero_grad()
            (inputs @ (weight - target).T).square().mean().backward()
            optimiser.step()
        # Every direction counts alike here.
        return float((weight.detach() - target).square().mean())

    assert loss_after(Muon, 0.2) < 0.6 * loss_after(torch.optim.SGD, 2.0)


PROCESS = """
import torch
from torch import distributed, nn
from vqcodec import precision
from vqcodec.train.muon import Muon

weights = [nn.Parameter(torch.zeros(shape)) for shape in ((4, 6), (4, 6), (4, 6), (2, 3))]
for weight in weights:
    weight.grad = torch.randn(weight.shape)  # of both processes: the seed is the same
Muon(weights, lr=1.0).step()
alone = [weight.detach().clone() for weight in weights]
for weight in weights:
    weight.data.zero_()
distributed.init_process_group("gloo")
Muon(weights, lr=1.0).step()
distributed.destroy_process_group()
torch.testing.assert_close([weight.detach() for weight in weights], alone, rtol=1e-2, atol=1e-3)
"""


@pytest.mark.slow
def test_processes_share_the_work(tmp_path: Path) -> None:
    program = tmp_path / "learn.py"
    program.write_text("import torch\ntorch.manual_seed(0)\n" + PROCESS, encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(program)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
