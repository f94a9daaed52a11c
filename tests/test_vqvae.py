"""Encoder and decoder: the start is a KLT codec, reaches are what they say, operations are counted."""

import copy
import functools
import math
from dataclasses import replace

import models
import numpy as np
import pytest
import torch
from models import TINY
from torch import Tensor, nn
from torch.nn import functional

from vqcodec.models import layers
from vqcodec.models.config import Config
from vqcodec.models.layers import Linear1x1, _Moments
from vqcodec.models.operations import macs_per_pixel
from vqcodec.models.prior import Prior
from vqcodec.models.recipes import NAMED, PHOTO, VQVAE2
from vqcodec.models.vqvae import KNOTS, RESIDUAL_UNIT, VQVAE, Stage, usual_step
from vqcodec.train.start import lapped_filter, principal_components, start_from_pictures

QUALITY = torch.tensor([50])


@functools.cache
def started(config: Config = TINY) -> VQVAE:
    """On its KLT start, not trained; not to be changed."""
    torch.manual_seed(0)
    model = VQVAE(config)
    start_from_pictures(model, models.batch(*(models.picture(256, 256, seed) for seed in range(4))))
    return model.requires_grad_(False)


@functools.cache
def shaken() -> VQVAE:
    """Every weight differs from zero; not to be changed."""
    return models.tiny().vqvae.requires_grad_(False)


# The start


@pytest.mark.parametrize("config", [TINY, VQVAE2], ids=lambda c: c.name)
def test_start_is_orthonormal(config: Config) -> None:
    for stage in started(config).stages:
        assert isinstance(stage, Stage)
        weight = stage.analysis.weight
        rank = min(weight.shape)  # channels that the input does not fill start at zero
        expected = torch.diag((torch.arange(len(weight)) < rank).float())
        torch.testing.assert_close(weight @ weight.T, expected, atol=1e-5, rtol=0)
        assert torch.equal(stage.synthesis.weight, weight.T)


def test_untrained_codec_without_quantiser_reconstructs() -> None:
    """24 of 192 channels at stride 8 keep most of a picture; pixels come back through the decoder alone."""
    pixels = models.batch(models.picture(128, 160, seed=7))
    latents = started().analyse(pixels, QUALITY)
    assert [tuple(z.shape) for z in latents] == [(1, 12, 4, 5), (1, 24, 16, 20)]
    restored = started().descend(1, latents[1], QUALITY)
    error = float((restored - pixels).square().mean())
    assert 10 * math.log10(255**2 / error) > 36
    coarse = started().descend(1, started().descend(0, latents[0], QUALITY), QUALITY)
    assert error < float((coarse - pixels).square().mean()) < float((pixels - pixels.mean()).square().mean()) / 4


def test_latents_are_in_pixel_units() -> None:
    """An orthonormal transform keeps lengths: what the latents lack is what the reconstruction lacks."""
    pixels = models.batch(models.picture(96, 96, seed=8))
    model = started(replace(TINY, stages=tuple(replace(stage, lapped=False) for stage in TINY.stages)))
    z = model.analyse(pixels, QUALITY)[1]
    x, restored = ((p - 128) / 64 for p in (pixels, model.descend(1, z, QUALITY)))
    lost = float((x - restored).square().sum())
    assert float(z.square().sum()) + lost == pytest.approx(float(x.square().sum()), rel=1e-3)


def test_laps_undo_each_other() -> None:
    stage = started().stage(0)
    assert stage.lap is not None and stage.unlap is not None
    x = torch.randn(2, 3, 24, 40)
    lapped = stage.lap(x)
    torch.testing.assert_close(stage.unlap(lapped), x, atol=1e-4, rtol=0)
    changed = (lapped != x).any(1)[0]
    assert bool(changed[4:-4].any(1).all()) and bool(changed[:, 4:-4].any(0).all())
    for corner in (changed[:4, :4], changed[:4, -4:], changed[-4:, :4], changed[-4:, -4:]):
        assert not bool(corner.any()), "the outermost half patch of each line stays"


@pytest.mark.parametrize(("size", "gain"), [(4, 8.4), (8, 9.5), (16, 9.9)])
def test_lapped_filter_gains(size: int, gain: float) -> None:
    """Coding gain in dB over no transform, of a first-order process of correlation .95; a DCT's is 7.57, 8.83, 9.46."""
    count = 3 * size
    whole = torch.eye(count, dtype=torch.float64)
    for border in (size, 2 * size):
        around = slice(border - size // 2, border + size // 2)
        whole[around, around] = lapped_filter(size)
    k, n = torch.arange(size)[:, None].double(), torch.arange(size)[None].double() + 0.5
    dct = torch.cos(math.pi * k * n / size) * (2 / size) ** 0.5
    dct[0] /= 2**0.5
    places = torch.arange(count)
    process = 0.95 ** (places[:, None] - places).abs().double()
    analysis = dct @ whole[size : 2 * size]
    synthesis = torch.linalg.inv(whole)[:, size : 2 * size] @ dct.T
    spread = (analysis @ process @ analysis.T).diag() * synthesis.square().sum(0)
    assert float(-10 * spread.log10().mean()) > gain - 0.05


def test_what_a_block_adds_has_the_gradient_of_its_definition() -> None:
    y = torch.randn(2, 5, 3, 4).to(memory_format=torch.channels_last).requires_grad_()
    found = _Moments.apply(y)
    expected = y.square().mean((2, 3)).sum(1), y.mean((2, 3))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
        by_hand, automatic = (torch.autograd.grad(sums.cos().sum(), y, retain_graph=True)[0] for sums in (one, other))
        torch.testing.assert_close(by_hand, automatic)
        assert by_hand.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("strip", [1, 20, 1 << 20])
def test_a_block_does_one_picture_as_it_does_many(strip: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In strips that end anywhere, in place or not, and at once where gradients are asked for."""
    monkeypatch.setitem(layers.STRIP, "cpu", strip)
    model = copy.deepcopy(shaken()).eval()
    block = model.stage(1).decoder[0]
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(2, TINY.stages[1].channels, 7, 9, generator=generator).to(memory_format=torch.channels_last)
    both = block(x, model.condition(torch.tensor([20, 80])))
    for index, quality in enumerate((20, 80)):
        one, cond = x[index : index + 1], model.condition(torch.tensor([quality]))
        assert float((both[index] - one[0]).std()) > 0, "the block adds something"
        torch.testing.assert_close(block(one, cond)[0], both[index], rtol=1e-5, atol=1e-6)
        with torch.no_grad():
            kept = one.clone()
            torch.testing.assert_close(block(one, cond)[0], both[index], rtol=1e-5, atol=1e-6)
            assert torch.equal(one, kept)
            inplace = block(kept, cond, overwrite=True)
            assert inplace is kept and torch.equal(inplace, block(one, cond))


@pytest.mark.parametrize("strip", [1, 100])
def test_analysis_in_strips(strip: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, pixels, quality = copy.deepcopy(shaken()).eval(), models.batch(models.picture(96, 64)), torch.tensor([50])
    expected = model.analyse(pixels, quality)
    monkeypatch.setitem(layers.STRIP, "cpu", strip)
    with torch.no_grad():
        for found, other in zip(model.analyse(pixels, quality), expected, strict=True):
            torch.testing.assert_close(found, other, rtol=1e-5, atol=1e-5)


def test_leading_channels_are_the_strongest() -> None:
    pixels = models.batch(*(models.picture(256, 256, seed) for seed in range(4)))
    for z in started().analyse(pixels, torch.full((4,), 50)):
        energy = z.square().mean((0, 2, 3))
        assert bool((energy[:-1] >= energy[1:] * 0.999).all())


def test_spreads_are_powers_of_two_that_follow_the_energy() -> None:
    spreads = torch.cat([piece.codebook.spread for level in range(2) for piece in started().level_slices(level)])
    assert torch.equal(torch.exp2(spreads.log2().round()), spreads)
    assert float(spreads.min()) >= 1
    top = started().slice(0, 0).codebook.spread
    assert float(top[0]) == float(top.max()) > 4


def test_principal_components_against_numpy() -> None:
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(6, 6)) * np.logspace(0, 2, 6)
    x = torch.from_numpy(rng.normal(size=(3, 10, 10, 6)) @ mixing).permute(0, 3, 1, 2).float()
    rows = principal_components(x, 4).double().numpy()
    flat = x.permute(1, 0, 2, 3).reshape(6, -1).double().numpy()
    values = np.linalg.eigvalsh(flat @ flat.T)[::-1]
    np.testing.assert_allclose(rows @ rows.T, np.eye(4), atol=1e-5)
    np.testing.assert_allclose(((rows @ flat) ** 2).sum(1), values[:4], rtol=1e-4)
    assert (rows.sum(1) > 0).all()


def test_principal_components_of_many_channels_look_at_the_first() -> None:
    x = torch.randn(2, 20, 8, 8)
    rows = principal_components(x, 5, limit=8)
    assert rows.shape == (5, 20)
    assert not rows[:, 8:].any()
    assert torch.equal(rows[:, :8], principal_components(x[:, :8], 5))


# Quality


def test_condition_tells_qualities_apart_smoothly() -> None:
    found = started().condition(torch.arange(1, 101))
    basis = found.basis
    assert basis.shape == (100, 6)
    assert float(basis.abs().max()) <= 1.0001
    assert float((basis[1:] - basis[:-1]).norm(dim=1).min()) > 0.01
    t = (torch.arange(1, 101).double() - 1) / 99
    chebyshev = np.polynomial.chebyshev.chebvander(2 * t.numpy() - 1, 5)
    np.testing.assert_allclose(basis, chebyshev, atol=1e-4)
    # Residual blocks work in a share of the step, which follows lambda as sqrt(10 / lambda), in units of 64.
    lambdas = np.array([TINY.lambda_of(float(x)) for x in t])
    np.testing.assert_allclose(found.unit, RESIDUAL_UNIT * np.sqrt(10 / lambdas) / 64, rtol=1e-4)
    np.testing.assert_allclose(usual_step(TINY, t), np.sqrt(10 / lambdas) / 64, rtol=1e-4)


def test_steps_are_interpolated_between_knots() -> None:
    piece = shaken().slice(1, 0)
    places = np.arange(1, 101)
    found = piece.steps(torch.from_numpy(places)).double().log().numpy()
    knots = np.linspace(1, 100, KNOTS)
    for plane in range(piece.planes):
        logs = piece.log_steps[:, plane].double().numpy()
        np.testing.assert_allclose(found[:, plane], np.interp(places, knots, logs), atol=1e-4)
    steps = started().slice(1, 0).steps(torch.tensor([1, 50, 100]))[:, 0]
    assert float(steps[0]) > 2 * float(steps[1]) > 4 * float(steps[2])


# Reach


def probe_picture() -> Tensor:
    return models.batch(models.picture(320, 320, seed=3))


@pytest.mark.parametrize("place", [(160, 160), (161, 190), (175, 168)], ids=str)
def test_encoder_reach(place: tuple[int, int]) -> None:
    """A latent changes only with pixels that its lap and the encoder blocks of its stage and the finer ones reach; the
    coarsest comes close to that."""
    y, x = place
    pixels = probe_picture()
    before = shaken().analyse(pixels, QUALITY)
    pixels[:, :, y, x] += 100
    reach = 2 * 4 + 8 // 2 + 1 * 8 + 1 * 32
    for z, found, stage in zip(before, shaken().analyse(pixels, QUALITY), TINY.levels, strict=True):
        changed = (z != found).any(1)[0].nonzero() * stage.stride
        assert len(changed)
        own = torch.tensor(place)
        gaps = torch.maximum(changed - own, own - (changed + stage.stride - 1)).clamp(min=0).amax(1)
        assert int(gaps.max()) <= reach
        if stage is TINY.levels[0]:
            assert int(gaps.max()) > stage.stride / 2, "the probe must come near the limit"


@pytest.mark.parametrize(("level", "expected"), [(0, 32), (1, 8 + 8 // 2 + 4)])
def test_decoder_reach(level: int, expected: int) -> None:
    """A position of an estimate changes what it hands down up to exactly `decoder_reach` from its block."""
    estimate = shaken().analyse(probe_picture(), QUALITY)[level]
    before = shaken().descend(level, estimate, QUALITY)
    row, column = estimate.shape[2] // 2, estimate.shape[3] // 2 - 1
    moved = estimate.clone()
    moved[:, :, row, column] += 3
    changed = (before != shaken().descend(level, moved, QUALITY)).any(1)[0].nonzero()
    assert shaken().decoder_reach(level) == expected
    stride, finer = TINY.levels[level].stride, (8, 1)[level]
    low = [(place * stride - expected) // finer for place in (row, column)]
    high = [((place + 1) * stride + expected) // finer - 1 for place in (row, column)]
    assert (changed.amin(0).tolist(), changed.amax(0).tolist()) == (low, high)


@pytest.mark.parametrize(("level", "index"), [(1, 0), (1, 1)])
def test_refinement_reaches_one_position(level: int, index: int) -> None:
    estimate = shaken().analyse(probe_picture(), QUALITY)[level]
    moved = estimate.clone()
    moved[:, :, 6, 7] += 3
    changed = shaken().refine(level, index, estimate, QUALITY) != shaken().refine(level, index, moved, QUALITY)
    places = changed.any(1)[0].nonzero()
    assert (places.amin(0).tolist(), places.amax(0).tolist()) == ([5, 6], [7, 8])
    assert shaken().refinement_reach(level) == 2 * TINY.levels[level].stride


def test_nothing_to_refine_before_the_first_codes() -> None:
    zero = torch.zeros(1, 12, 3, 3)
    assert shaken().refine(0, 0, zero, QUALITY) is zero


# Structure


@pytest.mark.parametrize("config", NAMED.values(), ids=NAMED)
def test_shapes(config: Config) -> None:
    """Latents of every level; every level's estimate descends to the next finer one's shape, the last to pixels."""
    model = VQVAE(config).requires_grad_(False)
    side = 2 * config.multiple
    pixels, quality = torch.rand(2, 3, side, side) * 255, torch.tensor([1, 100])
    latents = model.analyse(pixels, quality)
    assert [z.shape for z in latents] == [(2, s.channels, side // s.stride, side // s.stride) for s in config.levels]
    for level, z in enumerate(latents):
        down = model.descend(level, z, quality)
        assert down.shape == (latents[level + 1].shape if level + 1 < len(latents) else pixels.shape)
        assert down.dtype == torch.float32


def test_bfloat16_autocast_keeps_latents_precise() -> None:
    """Sums and transforms stay in float32: only the residual blocks' insides are rounded. In training the transforms
    between levels are as well, but not the lap."""
    pixels = probe_picture()
    model = copy.deepcopy(started()).eval()
    exact = model.analyse(pixels, QUALITY)
    with torch.autocast("cpu", torch.bfloat16):
        found = model.analyse(pixels, QUALITY)
        restored = model.descend(1, found[1], QUALITY)
    for z, x in zip(found, exact, strict=True):
        assert z.dtype == torch.float32
        torch.testing.assert_close(z, x, atol=1e-4, rtol=1e-4)
    target = model.descend(1, exact[1], QUALITY)
    torch.testing.assert_close(restored, target, atol=0.01, rtol=0)
    with torch.autocast("cpu", torch.bfloat16):
        latents = model.train().analyse(pixels, QUALITY)
        rough = model.descend(1, latents[1], QUALITY)
        assert model.descend(0, latents[0], QUALITY).dtype == torch.bfloat16
    assert rough.dtype == torch.float32
    assert float((rough - target).square().mean()) < 0.5, "pixel levels"


def test_operations_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """`macs_per_pixel` is what the layers of each part do for a picture."""
    done = 0
    model = shaken()
    expected = macs_per_pixel(TINY, models.shapes(model))
    conv2d, linear, matmul = functional.conv2d, functional.linear, torch.matmul

    def counted_conv2d(x: Tensor, weight: Tensor, *rest: object) -> Tensor:
        nonlocal done
        out: Tensor = conv2d(x, weight, *rest)  # type: ignore[arg-type]
        done += weight.numel() * out.shape[2] * out.shape[3]
        return out

    def counted_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        nonlocal done
        if x.ndim > 2:  # not the conditioning on the quality, once a picture
            done += weight.numel() * x[..., 0].numel()
        return linear(x, weight, bias)

    def counted_matmul(weight: Tensor, x: Tensor) -> Tensor:
        nonlocal done
        done += weight.shape[0] * x.numel()
        return matmul(weight, x)

    monkeypatch.setattr(functional, "conv2d", counted_conv2d)
    monkeypatch.setattr(functional, "linear", counted_linear)
    monkeypatch.setattr(torch, "matmul", counted_matmul)
    monkeypatch.setattr(
        nn.Conv2d, "_conv_forward", lambda self, x, w, b: counted_conv2d(x, w, b, 1, self.padding, 1, self.groups)
    )
    # A lap leaves half a patch of every line out at each end.
    left_out = 3 * (64 + 128) * 8 * 8

    def of_one_part() -> float:
        nonlocal done
        counted, done = done, 0
        return counted / (64 * 128)

    estimates = model.analyse(models.batch(models.picture(64, 128)), QUALITY)
    # Changes of basis are folded into other layers where nobody asks for gradients.
    folded = 2 * 48**2 / 4**2
    assert of_one_part() + left_out / (64 * 128) - folded == pytest.approx(expected["encoder"])
    for level, estimate in enumerate(estimates):
        for index in range(len(model.level_slices(level))):
            model.refine(level, index, estimate, QUALITY)
    assert of_one_part() == pytest.approx(expected["refinement"])
    for level, estimate in enumerate(estimates):
        model.descend(level, estimate, QUALITY)
    assert of_one_part() + left_out / (64 * 128) - 2 * folded == pytest.approx(expected["decoder"])


def test_the_photo_model_stays_within_its_budget() -> None:
    """kMAC per pixel of refinement, decoder and prior together, and of the encoder."""
    macs = macs_per_pixel(PHOTO, models.shapes(VQVAE(PHOTO), Prior(PHOTO)))
    assert macs["refinement"] + macs["decoder"] + macs["prior"] <= 10_000
    assert macs["encoder"] <= 16_000


def test_linear_is_a_pointwise_convolution() -> None:
    layer = Linear1x1(5, 7)
    x = torch.randn(2, 5, 3, 4)
    torch.testing.assert_close(layer(x), functional.conv2d(x, layer.weight[:, :, None, None]))
