"""Rounding in the place of codebooks and prior: what values cost, and that the rest of the model learns from it."""

import math

import models
import pytest
import torch

from vqcodec.models.config import TINY
from vqcodec.models.joint import RateDistortion
from vqcodec.models.quantizer import MOST_BITS
from vqcodec.models.rounding import Rounding, round_off


def logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_values_cost_what_a_logistic_distribution_says() -> None:
    v, scales = [0.2, -1.4, 2.6, 0.0, -7.9], [0.5, 1.0, 3.0, 0.2, 2.0]
    rounded, bits = round_off(torch.tensor(v), torch.tensor(scales), noisy=False)
    assert rounded.tolist() == [0, -1, 3, 0, -8]
    for k, scale, cost in zip(rounded.tolist(), scales, bits.tolist(), strict=True):
        mass = logistic((k + 0.5) / scale) - logistic((k - 0.5) / scale)
        assert cost == pytest.approx(-math.log2(mass), rel=1e-4)


def test_far_values_cost_a_bounded_number_of_bits() -> None:
    _, bits = round_off(torch.tensor([1e4, -1e4]), torch.ones(2), noisy=False)
    assert bits.tolist() == [MOST_BITS, MOST_BITS]


def test_noisy_bits_pull_values_towards_their_mean() -> None:
    torch.manual_seed(0)
    v = torch.tensor([-3.0, -0.4, 0.4, 3.0]).repeat(1000, 1).requires_grad_()
    scale = torch.full_like(v, 0.8).requires_grad_()
    _, bits = round_off(v, scale, noisy=True)
    bits.sum().backward()
    assert v.grad is not None and scale.grad is not None
    slope = v.grad.mean(0)
    assert slope.sign().tolist() == [-1, -1, 1, 1]
    # Wider distributions would suit the far values better, and narrower ones the near ones.
    assert scale.grad.mean(0).sign().tolist() == [-1, 1, 1, -1]


def test_everything_but_codebooks_and_prior_learns() -> None:
    model = RateDistortion(TINY)
    model.rounding = Rounding(TINY)
    pixels = torch.from_numpy(models.picture(64, 128, 3)).permute(2, 0, 1).float().reshape(3, 64, 2, 64)
    pixels = pixels.permute(2, 0, 1, 3).contiguous()
    model.vqvae.start_from_pictures(pixels)
    model.rounding.start_from_pictures(model.vqvae, pixels)
    quality = torch.tensor([20.0, 80.0])
    losses = model.train()(pixels, quality)
    losses.total.backward()
    for name, parameter in model.named_parameters():
        learns = not (name.startswith("prior") or "codebook" in name)
        assert (parameter.grad is not None) == learns, name
    exact = model.eval()(pixels, quality)
    assert exact.bpp[0] < exact.bpp[1] and exact.mse[0] > exact.mse[1]
    assert torch.allclose(
        exact.cost, exact.bpp + exact.mse * torch.tensor([TINY.lambda_of((q - 1) / 99) for q in (20, 80)])
    )
