"""What works on the pixels of a model whose finest stage is coarse, and such a model as a codec."""

from dataclasses import replace
from pathlib import Path

import models
import numpy as np
import pytest
import reference
import torch
from models import TINY
from torch import Tensor, nn
from torch.nn import functional

import vqcodec
from vqcodec import coding, synthesis, weights
from vqcodec.encoder import encode
from vqcodec.frame import Frame
from vqcodec.models import pixels as pixels_module
from vqcodec.models.config import CELL, SliceConfig
from vqcodec.models.layers import Condition, ResidualBlock
from vqcodec.models.operations import macs_per_pixel
from vqcodec.models.pixels import CellBlocks, Renderer, SeparableLap
from vqcodec.models.recipes import PHOTO
from vqcodec.models.vqvae import VQVAE
from vqcodec.train.start import lapped_filter, start_from_pictures


def lap_of(weight: Tensor) -> SeparableLap:
    lap = SeparableLap(len(weight))
    lap.weight.data.copy_(weight)
    return lap


@torch.no_grad()
def test_the_lap_filters_rows_and_columns() -> None:
    """Against the filter as a matrix over whole rows."""
    filter8 = lapped_filter(8).float()
    line = torch.eye(32)
    for start in (4, 12, 20):
        line[start : start + 8, start : start + 8] = filter8
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(lap_of(filter8)(x), line @ x @ line.T, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [(8, 8), (8, 40), (32, 8), (64, 40)], ids=str)
@torch.no_grad()
def test_the_inverse_filter_takes_the_lap_back(size: tuple[int, int]) -> None:
    x = torch.randn(1, 3, *size)
    lapped = lap_of(lapped_filter(8).float())(x)
    assert torch.equal(lapped, x) == (size == (8, 8)), "a single patch has no borders"
    torch.testing.assert_close(lap_of(torch.linalg.inv(lapped_filter(8)).float())(lapped), x, atol=1e-4, rtol=1e-4)


def cell_blocks() -> CellBlocks:
    """With a basis that is rounded, as files round it."""
    torch.manual_seed(0)
    found = CellBlocks(count=2, hidden=8, groups=2).eval()
    found.basis.copy_(torch.linalg.qr(torch.randn(48, 48)).Q.half())
    for block in found.blocks:
        assert isinstance(block, ResidualBlock)
        block.deviation.uniform_(0.1, 1)
        for layer in (block.expand, block.quality):
            nn.init.normal_(layer.weight, std=0.2)
    return found


def condition(*units: float) -> Condition:
    return Condition(torch.linspace(-1, 1, 6 * len(units)).reshape(len(units), 6), torch.tensor(units))


@torch.no_grad()
def test_new_blocks_on_cells_change_nothing() -> None:
    x = torch.randn(2, 3, 32, 48)
    assert torch.equal(CellBlocks(2, 8, 2)(x, condition(0.2, 0.7)), x)


def test_blocks_on_cells_are_folded_for_one_quality() -> None:
    """Pictures of one quality, whose bases are folded into the kernels without gradients, are as those among others."""
    blocks, x = cell_blocks(), torch.randn(2, 3, 32, 48)
    among_others, before = blocks(x, condition(0.2, 0.7)).detach(), x.clone()
    for number, unit in enumerate((0.2, 0.7)):
        own = replace(condition(0.2, 0.7), basis=condition(0.2, 0.7).basis[number, None], unit=torch.tensor([unit]))
        for gradients in (False, True):
            with torch.set_grad_enabled(gradients):
                one = blocks(x[number, None], own)
            assert one.requires_grad == gradients
            torch.testing.assert_close(one.detach(), among_others[number, None], atol=2e-4, rtol=1e-4)
    assert torch.equal(x, before), "what is given stays as it is"
    assert (among_others - x).abs().mean() > 0.05


@torch.no_grad()
def test_the_reach_of_blocks_on_cells() -> None:
    """A pixel changes those of its cell and of so many cells around it as there are blocks."""
    x = torch.randn(1, 3, 64, 64)
    moved = x.clone()
    moved[:, :, 33, 30] += 1
    changed = (cell_blocks()(x, condition(0.2)) != cell_blocks()(moved, condition(0.2))).any(1)[0].nonzero()
    assert (changed.amin(0).tolist(), changed.amax(0).tolist()) == ([32 - 8, 28 - 8], [35 + 8, 31 + 8])


def renderer() -> Renderer:
    torch.manual_seed(0)
    found = Renderer(channels=6, hidden=10, stride=16)
    for layer in (found.modulation, found.expand):
        nn.init.normal_(layer.weight)
    return found


def test_a_new_renderer_changes_nothing() -> None:
    pixels = torch.randn(2, 3, 32, 48)
    assert torch.equal(Renderer(6, 10, 16)(pixels, torch.randn(2, 6, 2, 3), torch.ones(2)), pixels)


@pytest.mark.parametrize("place", [(0, 0), (17, 40), (31, 47)], ids=str)
def test_a_pixel_is_rendered_from_its_cell_and_its_patch(place: tuple[int, int]) -> None:
    pixels = torch.randn(1, 3, 32, 48, requires_grad=True)
    features = torch.randn(1, 6, 2, 3, requires_grad=True)
    y, x = place
    renderer()(pixels, features, torch.ones(1))[0, 1, y, x].backward()
    assert pixels.grad is not None and features.grad is not None
    own = torch.zeros(32, 48, dtype=torch.bool)
    own[y // CELL * CELL :, x // CELL * CELL :][:CELL, :CELL] = True
    assert torch.equal((pixels.grad != 0).any(1)[0], own)
    patch = torch.zeros(2, 3, dtype=torch.bool)
    patch[y // 16, x // 16] = True
    assert torch.equal((features.grad != 0).all(1)[0], patch)


def test_operations_of_the_renderer_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    done = 0

    def convolve(self: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        nonlocal done
        done += weight.numel() * x.shape[2] * x.shape[3]
        return functional.conv2d(x, weight, bias)

    monkeypatch.setattr(nn.Conv2d, "_conv_forward", convolve)
    found = renderer()
    found(torch.randn(1, 3, 32, 48), torch.randn(1, 6, 2, 3), torch.ones(1))
    shapes = {f"vqvae.stages.0.renderer.{name}": tensor.shape for name, tensor in found.state_dict().items()}
    assert done / (32 * 48) == pytest.approx(macs_per_pixel(PHOTO, shapes)["decoder"])


@pytest.mark.parametrize("strip", [1, 100, 1000])
def test_one_picture_is_rendered_as_many_are(strip: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Strip by strip, with folded matrices."""
    monkeypatch.setattr(pixels_module, "STRIP", strip)
    found = renderer()
    with torch.no_grad():
        found.basis.copy_(torch.linalg.qr(torch.randn(48, 48)).Q)
        found.deviation.uniform_(0.5, 2)
        found.detail.uniform_(0.5, 2)
        pixels, features = torch.randn(1, 3, 80, 48), torch.randn(1, 6, 5, 3)
        one = found(pixels, features, torch.tensor([0.7]))
    many = found(pixels, features, torch.tensor([0.7]))
    assert one.grad_fn is None and many.grad_fn is not None
    torch.testing.assert_close(one, many.detach(), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_start_is_a_transform_that_loses_nothing() -> None:
    """If all 192 components of patches of 8 x 8 pixels are kept."""
    pixels = models.batch(*(models.picture(64, 96, seed) for seed in range(8)))
    finest = replace(TINY.stages[0], channels=192, slices=(SliceConfig(192, 1, 64, layer=1, rows=128),))
    model = VQVAE(replace(TINY, stages=(finest, TINY.stages[1]))).eval()
    start_from_pictures(model, pixels)
    quality = torch.full((8,), 50)
    latents = model.analyse(pixels, quality)
    torch.testing.assert_close(model.descend(1, latents[1], quality), pixels, atol=0.02, rtol=0)
    energy = latents[1].square().mean((0, 2, 3))
    assert float(energy[:20].sum()) > 0.97 * float(energy.sum()), "the first components hold nearly all"


@pytest.mark.parametrize("size", [(1, 1), (33, 70), (128, 180)], ids=str)
def test_files_decode(size: tuple[int, int], tiny_weights: Path) -> None:
    pixels = models.picture(*size, seed=3)
    data = vqcodec.compress(pixels, weights=tiny_weights, quality=80, tile=64, effort=2, verify=True)
    restored = np.asarray(vqcodec.decompress(data, weights=tiny_weights))
    assert restored.shape == pixels.shape
    if size != (1, 1):
        assert np.abs(restored.astype(int) - pixels).mean() < 8


def test_bands_leave_no_seams(tiny_weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, pixels, quality = weights.load(tiny_weights), models.picture(200, 232, seed=4), torch.tensor([60])
    data = vqcodec.compress(pixels, weights=tiny_weights, quality=60)
    whole = np.asarray(vqcodec.decompress(data, weights=tiny_weights)).astype(int)
    with coding.exact(model):
        latents = synthesis.analyse(model, pixels[None], quality)
    monkeypatch.setitem(synthesis.BAND_PIXELS, "cpu", 232 * 16 * 3)
    parts = np.asarray(vqcodec.decompress(data, weights=tiny_weights)).astype(int)
    assert np.abs(parts - whole).max() <= 1
    with coding.exact(model):
        for found, expected in zip(synthesis.analyse(model, pixels[None], quality), latents, strict=True):
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("quality", [1, 60])
def test_pixels_by_the_second_reader(quality: int, tiny_weights: Path) -> None:
    model = weights.load(tiny_weights)
    with coding.exact(model):
        _, codes = encode(model, Frame(90, 50, quality), models.picture(50, 90, seed=quality)[None])
        expected = synthesis.reconstruct(model, Frame(90, 50, quality), codes)[0]
    found = reference.Renderer(reference.Weights(tiny_weights), quality).pixels(
        [c[0].numpy().astype(np.int64) for c in codes], 50, 90
    )
    gap = np.abs(found.astype(int) - expected)
    assert int(gap.max()) <= 1 and float((gap > 0).mean()) < 0.002
    assert float(((found > 0) & (found < 255)).mean()) > 0.7, "clipping would hide differences"
