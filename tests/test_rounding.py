"""Rounding in the place of codebooks and prior: what values cost, and that the rest of the model learns from it."""

import math

import models
import pytest
import torch
from models import TINY

from vqcodec.models.rates import MOST_BITS
from vqcodec.train.loss import RateDistortion
from vqcodec.train.rounding import Rounding, round_off
from vqcodec.train.start import start_from_pictures


def logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_values_cost_what_a_logistic_distribution_says() -> None:
    v, scales = [0.2, -1.4, 2.6, 0.0, -7.9], [0.5, 1.0, 3.0, 0.2, 2.0]
    rounded, bits = round_off(torch.tensor(v), torch.tensor(scales), torch.ones(5), bias=0)
    assert rounded.tolist() == [0, -1, 3, 0, -8]
    for k, scale, cost in zip(rounded.tolist(), scales, bits.tolist(), strict=True):
        mass = logistic((k + 0.5) / scale) - logistic((k - 0.5) / scale)
        assert cost == pytest.approx(-math.log2(mass), rel=1e-4)


def test_far_values_cost_a_bounded_number_of_bits() -> None:
    _, bits = round_off(torch.tensor([1e4, -1e4]), torch.ones(2), torch.ones(2), bias=1)
    assert bits.tolist() == [MOST_BITS, MOST_BITS]


def test_integers_are_chosen_by_what_they_cost() -> None:
    v = torch.linspace(-5, 5, 100).repeat(4, 1)
    scale, weight = torch.tensor([0.1, 0.3, 1.0, 3.0])[:, None], torch.tensor([3.0, 1.0, 0.5, 0.2])[:, None]
    chosen, _ = round_off(v, scale, weight, bias=0.75)
    near, _ = round_off(v, scale, weight, bias=0)
    assert torch.equal(near, v.round())
    k = torch.arange(-6, 7).float()[:, None, None]
    mass = torch.sigmoid((0.5 - k.abs()) / scale) - torch.sigmoid((-0.5 - k.abs()) / scale)
    cost = weight * (v - k).square() - 0.75 * torch.log2(mass.clamp(min=2**-MOST_BITS))
    paid = cost.gather(0, (chosen + 6).long()[None])[0]
    one_less = ((chosen == near) | (chosen == near - near.sign())).all()
    assert one_less and (chosen != near).any()
    nearest = cost.gather(0, (near + 6).long()[None])[0]
    assert (paid <= nearest + 1e-3).all()
    # Two steps less are worth it only where scales are small.
    assert torch.allclose(paid[2:], cost.amin(0)[2:], atol=1e-3)


@pytest.mark.parametrize("scale", [0.1, 0.5, 2.0])
def test_gradients_are_those_of_means_over_a_dither(scale: float) -> None:
    """Integrated, they give the means of codes and bits over a uniform dither of one step."""
    count, step = 201, 0.01
    v = torch.arange(-400, 401) * step

    def rounded(at: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return round_off(at, torch.full_like(at, scale), torch.full_like(at, 1.5), bias=0.75)

    dither = (torch.arange(count) + 0.5)[:, None] / count - 0.5
    at = v.clone().requires_grad_()
    for mine, dithered in zip(rounded(at), rounded(v + dither), strict=True):
        (slope,) = torch.autograd.grad(mine.sum(), at, retain_graph=True)
        means = dithered.detach().mean(0)
        integral = torch.cumulative_trapezoid(slope, dx=step)
        torch.testing.assert_close(means[0] + integral, means[1:], atol=0.04, rtol=0.01)


def test_a_value_that_stays_0_moves_nothing() -> None:
    """Neither codes nor bits; the scale still learns that it was 0."""
    v, scale = torch.tensor([-0.1, 0.0, 0.1], requires_grad=True), torch.full((3,), 0.3, requires_grad=True)
    codes, bits = round_off(v, scale, torch.ones(3), bias=0.75)
    (codes.sum() + bits.sum()).backward()
    assert v.grad is not None and scale.grad is not None
    assert codes.tolist() == v.grad.tolist() == [0, 0, 0]
    assert (scale.grad > 0).all()


def test_scales_learn_from_integers() -> None:
    """Wider distributions would suit the far values better, and narrower ones the near ones."""
    v, scale = torch.tensor([-3.0, -0.4, 0.4, 3.0]), torch.full((4,), 0.8, requires_grad=True)
    round_off(v, scale, torch.ones(4), bias=0.5)[1].sum().backward()
    assert scale.grad is not None
    assert scale.grad.sign().tolist() == [-1, 1, 1, -1]


def test_everything_but_codebooks_and_prior_learns() -> None:
    model = RateDistortion(TINY)
    model.rounding = Rounding(TINY)
    pixels = torch.from_numpy(models.picture(64, 128, 3)).permute(2, 0, 1).float().reshape(3, 64, 2, 64)
    pixels = pixels.permute(2, 0, 1, 3).contiguous()
    start_from_pictures(model.vqvae, pixels)
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
