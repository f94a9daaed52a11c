"""The rate-distortion loss: what it reports, what it minimises, and that it means what the files cost."""

import dataclasses
import functools

import models
import pytest
import torch
from models import TINY
from torch import Tensor

from vqcodec import encoder, synthesis
from vqcodec.bitstream import Header
from vqcodec.models.config import Config
from vqcodec.models.model import Estimate
from vqcodec.models.quantizer import Codebook
from vqcodec.train import loss
from vqcodec.train.loss import RateDistortion, colour, pattern

EMA = dataclasses.replace(TINY, codebook="ema", commitment=0.25)


@functools.cache
def model() -> RateDistortion:
    """In evaluation mode; not to be changed."""
    return models.tiny().eval()


def pictures() -> Tensor:
    return models.batch(*(models.picture(64, 96, seed) for seed in (21, 22, 23)))


def test_report() -> None:
    pixels, quality = pictures(), torch.tensor([10, 50, 90])
    with torch.no_grad():
        losses = model()(pixels, quality)
    assert losses.reconstruction.shape == pixels.shape
    torch.testing.assert_close(losses.mse, (losses.reconstruction - pixels).square().mean((1, 2, 3)))
    low, high = TINY.lambda_range
    weight = low * (high / low) ** ((quality - 1) / 99)
    torch.testing.assert_close(losses.cost, losses.bpp + weight * losses.mse)
    assert losses.bpp[0] < losses.bpp[1] < losses.bpp[2]
    assert losses.mse[0] > losses.mse[1] > losses.mse[2]


def test_loss_and_what_the_codebook_learns_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss is rate plus distortion, scaled so that all qualities count alike, plus the codebook's squared error in
    steps, weighted as the choice weighs it: from which alone, and not from the decoder, the code vectors learn."""
    pixels, quality = pictures(), torch.tensor([10, 50, 90])
    seen: dict[Codebook, tuple[Tensor, Tensor]] = {}
    monkeypatch.setattr(loss, "update_averages", lambda book, v, k: seen.update({book: (v, k)}))
    trained = models.tiny().train()
    losses = trained(pixels, quality, rate_weight=0.7)
    losses.total.backward()
    low, high = TINY.lambda_range
    weight = low * (high / low) ** ((quality - 1) / 99)
    balance = (weight / (low * high) ** 0.5) ** -0.4
    expected = (balance * (0.7 * losses.bpp + weight * losses.mse)).mean()
    assert len(seen) == 3
    for level in range(2):
        for piece in trained.vqvae.level_slices(level):
            v, k = seen[piece.codebook]
            importance = weight[:, None] * (piece.steps(quality).detach() * 64) ** 2 / 3
            scale = (balance[:, None] * importance).repeat_interleave(len(v) // 3, 0) / (3 * 64 * 96)
            gap = v - piece.codebook.lookup(k).detach()
            # With a tenth of the weight, the estimate learns to leave little to code.
            expected = expected + (scale[..., None] * (gap.square() + 0.1 * v.square())).sum()
            gradient = torch.zeros_like(piece.codebook.vectors)
            for plane in range(piece.planes):
                gradient[plane].index_add_(0, k[:, plane], -2 * scale[:, plane, None] * gap[:, plane])
            assert piece.codebook.vectors.grad is not None
            torch.testing.assert_close(piece.codebook.vectors.grad, gradient, rtol=1e-3, atol=1e-7)
    expected = expected + (0.005 * balance * weight * trained.vqvae.added_error()).mean()
    torch.testing.assert_close(losses.total.detach(), expected.detach(), rtol=1e-4, atol=0)


def test_what_decoders_clip_costs_nothing() -> None:
    """Values beyond 0 and 255 count as these, but have the gradients that they would have within."""
    vqvae, quality = models.tiny().vqvae.eval(), torch.tensor([50])
    estimate = Estimate(vqvae, quality, 64, 96)
    estimate.values = (3 * torch.randn(1, 24, 8, 12)).requires_grad_()
    beyond = vqvae.descend(1, estimate.values, quality)
    assert bool((beyond < -1).any()) and bool((beyond > 256).any())
    restored = estimate.pixels()
    torch.testing.assert_close(restored, beyond.clamp(0, 255), atol=1e-4, rtol=0)
    weight = torch.randn_like(beyond)
    one, other = (torch.autograd.grad((weight * x).sum(), estimate.values)[0] for x in (restored, beyond))
    torch.testing.assert_close(one, other)


def test_colours() -> None:
    """A shift of a surface counts in full, whatever its sign; grain about as much as its means are off."""
    shift = torch.tensor([3.0, -5.0])[:, None, None, None].expand(2, 3, 64, 96)
    torch.testing.assert_close(colour(shift), torch.tensor([3.0, 5.0]))
    grain = torch.randn(1, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    expected = (2 / torch.pi) ** 0.5 * sum(1 / side for side in (4, 8, 16, 32)) / 4
    assert float(colour(grain)) == pytest.approx(expected, rel=0.05)
    assert colour(torch.ones(1, 3, 10, 10)).item() == pytest.approx(1), "smaller than a square"


def test_patterns() -> None:
    """What repeats counts in full, whatever its phase; noise, ramps and shifts of colour hardly or not."""
    torch.manual_seed(0)
    tile = torch.randn(2, 3, 4, 4)
    tile -= tile.mean((2, 3), keepdim=True)
    repeated = tile.repeat(1, 1, 16, 24)
    found = pattern(repeated, 4)
    torch.testing.assert_close(found, repeated.square().mean((1, 2, 3)))
    torch.testing.assert_close(pattern(repeated.roll((1, 2), (2, 3)) + 5, 4), found)
    assert bool((pattern(tile, 4) <= 1.001 * tile.square().mean((1, 2, 3))).all()), "smaller than a neighbourhood"
    noise = torch.randn(2, 3, 64, 96)
    assert bool((pattern(noise, 4) < 0.03).all())
    waves = torch.sin(torch.arange(96) * 2 * torch.pi / 48).expand(1, 3, 64, 96)
    assert float(pattern(waves, 4)) < 0.03


def test_the_encoder_does_not_learn_from_the_codebook_loss() -> None:
    """Its gradients are those of a codebook that has no such loss; with commitment there is one that pulls."""
    found = []
    for config in (TINY, dataclasses.replace(TINY, codebook="ema"), dataclasses.replace(TINY, commitment=0.25)):
        trained = models.tiny(config)
        trained(pictures(), torch.tensor([10, 50, 90])).total.backward()
        gradient = trained.vqvae.stage(1).analysis.weight.grad
        assert gradient is not None
        found.append(gradient)
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-5)
    assert float((found[2] - found[0]).norm()) > 0.01 * float(found[0].norm())


def test_pictures_of_a_batch_do_not_mix() -> None:
    pixels, quality = pictures(), torch.tensor([10, 50, 90])
    with torch.no_grad():
        together = model()(pixels, quality)
        for n in range(3):
            alone = model()(pixels[n, None], quality[n, None])
            torch.testing.assert_close(alone.bpp[0], together.bpp[n], rtol=0.01, atol=0)
            torch.testing.assert_close(alone.mse[0], together.mse[n], rtol=0.01, atol=0)


@pytest.mark.parametrize("quality", [50, 70, 95])
def test_training_believes_what_files_cost(quality: int) -> None:
    """The bits and the error of the loss are those of compress() and decompress(), container apart."""
    picture = models.picture(128, 160, seed=32)
    with torch.no_grad():
        losses = model()(models.batch(picture), torch.tensor([quality]))
    loaded = models.tiny_model()
    header = Header(160, 128, quality, loaded.id, TINY.layers, 0)
    with torch.inference_mode():
        (segments,), codes = encoder.encode(loaded, header.frame, picture[None])
        restored = synthesis.reconstruct(loaded, header.frame, codes)[0]
    bits = 8 * sum(map(len, segments))
    assert all(segments), "a layer of nothing but code 0 takes no bytes, which the loss cannot know"
    believed = float(losses.bpp) * 128 * 160
    assert abs(bits - believed) < 0.015 * believed + 32 * len(segments)
    error = (torch.from_numpy(restored).double() - torch.from_numpy(picture).double()).square().mean()
    rounding = 1 / 12  # of pixels to whole numbers
    assert float(error) == pytest.approx(float(losses.mse) + rounding, rel=0.01, abs=0.1)


def test_less_rate_weight_more_bits() -> None:
    pixels, quality = pictures(), torch.tensor([30, 30, 30])
    with torch.no_grad():
        light, full = model()(pixels, quality, rate_weight=0.05), model()(pixels, quality)
    assert float(light.bpp.mean()) > 1.05 * float(full.bpp.mean())
    assert float(light.mse.mean()) < float(full.mse.mean())


@pytest.mark.parametrize("config", [TINY, EMA], ids=["gradient", "ema"])
def test_every_parameter_learns(config: Config) -> None:
    """DistributedDataParallel waits for the gradient of every parameter; none but the EMA codebooks may lack one."""
    trained = models.tiny(config).train()
    trained(pictures(), torch.tensor([10.0, 50.0, 90.0])).total.backward()
    for name, parameter in trained.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name
        else:
            assert name.endswith("codebook.vectors") and config.codebook == "ema"
    moving = [name for name, p in trained.named_parameters() if p.grad is not None and bool(p.grad.any())]
    idle = {name for name, p in trained.named_parameters() if p.requires_grad} - set(moving)
    # Knots of the steps between which none of these qualities lies have a gradient of zero in places, but no tensor
    # has.
    assert not idle


def test_the_prior_alone_learns_the_same_without_a_picture() -> None:
    """Its gradients are those of the whole, of which nothing else is computed."""
    pixels, quality = pictures(), torch.tensor([10.0, 50.0, 90.0])
    whole, alone = models.tiny().train(), models.tiny().train()
    alone.vqvae.requires_grad_(False)
    expected, losses = whole(pixels, quality), alone(pixels, quality)
    expected.total.backward()
    losses.total.backward()
    assert torch.equal(losses.bpp, expected.bpp)
    assert bool(losses.mse.isnan().all())
    for ours, theirs in zip(alone.prior.parameters(), whole.prior.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_codebooks_move_only_in_training() -> None:
    trained = models.tiny(EMA)
    before = [p.detach().clone() for name, p in trained.named_parameters() if name.endswith("vectors")]

    def vectors() -> list[Tensor]:
        return [p.detach() for name, p in trained.named_parameters() if name.endswith("vectors")]

    quality = torch.tensor([10, 50, 90])
    trained.eval()(pictures(), quality)
    assert all(torch.equal(a, b) for a, b in zip(before, vectors(), strict=True))
    trained.train()(pictures(), quality)
    assert not any(torch.equal(a, b) for a, b in zip(before, vectors(), strict=True))


def test_a_step_down_the_gradient_lowers_the_loss() -> None:
    trained = models.tiny()
    pixels, quality = pictures(), torch.tensor([20, 50, 80])
    optimiser = torch.optim.Adam(trained.parameters(), 1e-3)
    start = float(trained(pixels, quality).total.detach())
    for _ in range(10):
        optimiser.zero_grad()
        trained(pixels, quality).total.backward()
        optimiser.step()
    assert float(trained(pixels, quality).total.detach()) < 0.95 * start
