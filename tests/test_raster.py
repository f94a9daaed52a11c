"""The Gated PixelCNN in raster order: causal, without a blind spot, the same by position as all at once, a codec."""

import copy
import functools
from pathlib import Path

import models
import numpy as np
import pytest
import reference
import torch
from models import picture
from torch import Tensor

from vqcodec import bitstream, codec, decoder, weights
from vqcodec.models.prior import Prior, RasterSlice
from vqcodec.train.loss import RateDistortion

HEIGHT, WIDTH = 72, 88  # 18 x 22 positions on the bottom grid


@functools.cache
def trained() -> RateDistortion:
    return models.raster().eval()


@functools.cache
def frozen() -> Prior:
    prior = copy.deepcopy(trained().prior)
    prior.freeze()
    return prior.requires_grad_(False)


def inputs() -> list[list[Tensor]]:
    return models.code_inputs(trained().vqvae, models.random_codes(trained().vqvae, HEIGHT, WIDTH))


def bottom(known: Tensor) -> Tensor:
    """Parameters of the bottom plane at all positions, (h, w, D + 3), given the inputs of its codes."""
    prior, (top, _) = frozen(), inputs()
    quality = torch.tensor([50])
    _, _, h, w = top[0].shape
    state = prior.level(0).begin(None, quality, 1, h, w)
    part = prior.level(0).slice(0)
    state, _ = part.prepare(state, quality)
    state = part.update(state, top[0])
    _, _, h, w = known.shape
    state = prior.level(1).begin(state, quality, 1, h, w)
    last = prior.level(1).slice(0)
    assert isinstance(last, RasterSlice)
    _, context = last.prepare(state, quality)
    return last.parameters_at(0, context, known).reshape(h, w, -1)


@pytest.mark.parametrize("place", [(0, 0), (7, 0), (7, 21), (7, 10), (17, 21)], ids=str)
def test_a_position_depends_on_what_is_before_it_and_on_nothing_else(place: tuple[int, int]) -> None:
    known = inputs()[1][0]
    other = known.clone()
    other[:, :, place[0], place[1]] = (known[:, :, place[0], place[1]] + 60) % 100
    changed = (bottom(other) != bottom(known)).any(-1)
    number = place[0] * changed.shape[1] + place[1]
    assert not bool(changed.flatten()[: number + 1].any())
    if place[1] + 1 < changed.shape[1]:
        assert bool(changed[place[0], place[1] + 1]), "the right neighbour does not see it"
    if place[0] + 1 < changed.shape[0]:
        below = changed[place[0] + 1]
        assert bool(below[max(0, place[1] - 1) : place[1] + 2].all()), "a neighbour below does not see it"


def test_no_blind_spot() -> None:
    """Everything above within reach counts, also up and to the right, which stacked masked convolutions miss."""
    known = inputs()[1][0]
    row, column = 9, 9
    seen = []
    for up, right in ((1, 0), (1, 1), (1, 2), (1, 3), (2, 2), (2, 3), (3, 3), (3, -3)):
        other = known.clone()
        other[:, :, row - up, column + right] = (known[:, :, row - up, column + right] + 60) % 100
        seen.append(bool((bottom(other) != bottom(known)).any(-1)[row, column]))
    assert sum(seen) >= 7


def test_by_position_as_all_at_once() -> None:
    found = models.run_prior(frozen(), inputs())
    expected = bottom(inputs()[1][0])
    assert torch.equal(found[1][0, :, :, 0], expected)
    assert torch.equal(found[1], found[1].round()) and float(found[1].abs().max()) <= 127
    assert float(found[1].std()) > 3


def test_training_computes_what_the_file_says() -> None:
    for ours, theirs in zip(
        models.run_prior(trained().prior, inputs()), models.run_prior(frozen(), inputs()), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_the_rest_learns_without_the_prior_and_the_prior_without_the_rest() -> None:
    model = models.raster().train()
    pixels, quality = models.batch(picture(64, 64, 1), picture(64, 64, 2)), torch.tensor([50, 50])
    model(pixels, quality, rate_weight=0.0).total.backward()
    assert all(p.grad is None or not bool(p.grad.any()) for p in model.prior.parameters())
    assert bool(model.vqvae.stage(0).analysis.weight.grad.any())  # type: ignore[union-attr]
    model.zero_grad()
    model(pixels, quality, rate_weight=1.0).total.backward()
    biases = {p for name, p in model.vqvae.named_parameters() if name.endswith("codebook.bias")}
    others = [p for p in model.vqvae.parameters() if p not in biases]
    assert all(p.grad is None or not bool(p.grad.any()) for p in others)
    assert all(p.grad is not None for name, p in model.prior.named_parameters() if "layers" in name)


@torch.no_grad()
def test_codes_are_the_nearest_and_count_as_plain_numbers_until_the_prior_learns() -> None:
    pixels, quality = models.batch(picture(64, 64, 1), picture(64, 64, 2)), torch.tensor([20, 90])
    without, with_prior = (trained()(pixels, quality, rate_weight=weight) for weight in (0.0, 1.0))
    assert torch.equal(without.reconstruction, with_prior.reconstruction)
    torch.testing.assert_close(without.bpp, torch.full((2,), 5 / 4**2 + 5 / 8**2))  # of 32 codes
    torch.testing.assert_close(without.level_bits, torch.tensor([[5 * 8.0**2, 5 * 16.0**2]] * 2))
    assert not torch.allclose(with_prior.bpp, without.bpp, rtol=1e-3)


def test_codec(tmp_path: Path) -> None:
    path = tmp_path / "raster.safetensors"
    model = copy.deepcopy(trained())
    weights.save_model(path, model.config, model.vqvae, model.prior, {})
    source = picture(52, 60)
    data = codec.compress(source, weights=path, verify=True)
    restored = np.asarray(codec.decompress(data, weights=path))
    assert restored.shape == source.shape
    with torch.no_grad():
        padded = models.batch(np.pad(source, ((0, 4), (0, 4), (0, 0)), mode="edge"))
        losses = trained()(padded, torch.tensor([50]))
    expected = losses.reconstruction[0].permute(1, 2, 0)[:52, :60].round().clamp(0, 255).numpy()
    assert np.abs(restored - expected).max() <= 1
    payload = len(data) * 8
    assert float(losses.bpp) * 56 * 64 == pytest.approx(payload, rel=0.25)


def test_codes_by_the_second_reader(tmp_path: Path) -> None:
    """FORMAT.md, followed with whole numbers and nothing of the package, comes to the same codes."""
    path = tmp_path / "raster.safetensors"
    model = copy.deepcopy(trained())
    weights.save_model(path, model.config, model.vqvae, model.prior, {})
    container = bitstream.read(codec.compress(picture(24, 40), weights=path))
    expected = decoder.decode_codes([container], weights.load(path))
    segments = [segment for segment in container.segments if segment is not None]
    found = list(reference.Tile(reference.Weights(path), 50).decode(segments, 24, 40))
    assert [k.shape for k in found] == [(3, 5, 1), (6, 10, 1)]
    for ours, theirs in zip(expected, found, strict=True):
        assert np.array_equal(ours[0].numpy(), theirs)
