"""The distortion: squared error and visual distance in a fixed proportion, whatever the quality."""

import models
import pytest
import torch
from models import TINY
from torch import Tensor

from vqcodec.train.distortion import KNOTS, MEMORY, Distortion
from vqcodec.train.loss import RateDistortion
from vqcodec.visual import visual_distance

ORIGINAL = models.batch(*(models.picture(16, 16, seed) for seed in range(4)))


def changed(quality: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Pictures with noise, the lower the quality the more, and as they were: (B, 3, 16, 16) for (B,)."""
    generator = torch.Generator().manual_seed(seed)
    original = ORIGINAL[torch.randint(len(ORIGINAL), quality.shape, generator=generator)]
    size = (
        20 * 0.97 ** quality[:, None, None, None] * (0.7 + 0.6 * torch.rand(len(quality), 1, 1, 1, generator=generator))
    )
    return original + size * torch.randn(original.shape, generator=generator), original


def squared(restored: Tensor, original: Tensor) -> Tensor:
    return (restored - original).square().mean((1, 2, 3))


def units(distortion: Distortion) -> list[float]:
    return distortion.log_unit.tolist()


def at_knot(knot: int, count: int = 1) -> Tensor:
    return torch.full((count,), 1 + 99 * knot / (KNOTS - 1))


def test_no_share_is_squared_error() -> None:
    distortion = Distortion(0.0).train()
    for size in (16, 4):  # too small for the visual distance, which is not asked for
        restored, original = (x[:, :, :size, :size] for x in changed(torch.tensor([1.0, 50, 100]), 0))
        assert torch.equal(distortion(restored, original, torch.tensor([1, 50, 100])), squared(restored, original))
    assert not bool(distortion.seen.any())


def test_all_of_it_is_visual_distance_in_units_of_squared_error() -> None:
    distortion, quality = Distortion(1.0).train(), at_knot(4)
    restored, original = changed(quality, 0)
    torch.testing.assert_close(distortion(restored, original, quality), squared(restored, original))
    distortion.eval()
    other, _ = changed(quality, 1)
    scale = squared(restored, original) / visual_distance(restored, original)
    torch.testing.assert_close(distortion(other, original, quality), scale * visual_distance(other, original))


def test_both_parts_are_equal_on_average_at_every_quality() -> None:
    """Whatever the ratio of squared error to visual distance, which changes several times over from low to high."""
    distortion = Distortion(0.5).train()
    generator = torch.Generator().manual_seed(0)
    for step in range(150):
        quality = 1 + 99 * torch.rand(8, generator=generator)
        distortion(*changed(quality, step), quality)
    distortion.eval()
    visual_alone = Distortion(1.0).eval()
    visual_alone.load_state_dict(distortion.state_dict())
    found = []
    for number, value in enumerate((1, 7, 20, 35, 50, 65, 80, 93, 100)):
        quality = torch.full((64,), float(value))
        restored, original = changed(quality, 1000 + number)
        mse, visual = squared(restored, original), visual_alone(restored, original, quality)
        torch.testing.assert_close(distortion(restored, original, quality), (mse + visual) / 2)
        assert float((visual / mse).log().mean()) == pytest.approx(0, abs=0.12), value
        found.append(float((mse / visual_distance(restored, original)).mean()))
    assert max(found) > 3 * min(found)


def test_the_first_batch_sets_the_unit_at_the_knots_it_touches() -> None:
    distortion = Distortion(0.5).train()
    quality = torch.cat([at_knot(2, 2), (at_knot(6) + at_knot(7)) / 2])
    restored, original = changed(quality, 0)
    distortion(restored, original, quality)
    ratio = (squared(restored, original) / visual_distance(restored, original)).log()
    expected = torch.zeros(KNOTS)
    expected[2] = ratio[:2].mean()
    expected[6] = expected[7] = ratio[2]
    torch.testing.assert_close(distortion.log_unit, expected)
    weight = torch.zeros(KNOTS)
    weight[2], weight[6], weight[7] = 2, 0.5, 0.5
    torch.testing.assert_close(distortion.seen, weight)


@pytest.mark.parametrize("quality", [1, 100])
def test_qualities_at_the_ends_have_one_knot(quality: int) -> None:
    distortion, qualities = Distortion(0.5).train(), torch.tensor([quality])
    restored, original = changed(qualities.float(), 0)
    torch.testing.assert_close(distortion(restored, original, qualities), squared(restored, original))
    assert distortion.seen.nonzero().flatten().tolist() == [0 if quality == 1 else KNOTS - 1]


def test_the_unit_is_the_mean_of_all_pictures_so_far() -> None:
    """However they come in batches, as long as they are fewer than it remembers."""
    quality = at_knot(3, 8)
    restored, original = changed(quality, 0)
    whole, parts = Distortion(0.5).train(), Distortion(0.5).train()
    whole(restored, original, quality)
    for part in (slice(0, 1), slice(1, 6), slice(6, 8)):
        parts(restored[part], original[part], quality[part])
    torch.testing.assert_close(parts.log_unit, whole.log_unit)
    torch.testing.assert_close(parts.seen, whole.seen)


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The unit follows a change, however much came before it."""
    monkeypatch.setattr(
        "vqcodec.train.distortion.visual_distance", lambda restored, original: torch.ones(len(restored))
    )
    distortion, quality = Distortion(0.5).train(), at_knot(5, 20)
    original = torch.zeros(20, 3, 8, 8)

    def see(error: float, pictures: int) -> float:
        for _ in range(pictures // 20):
            distortion(original + error, original, quality)
        return float(distortion.log_unit[5].exp())

    assert see(1, 2000) == pytest.approx(1)
    middle = see(10, int(MEMORY))
    assert 10 < middle < 90, "most of what is remembered is new, some is old"
    assert see(10, 500) == pytest.approx(100, rel=0.05)
    assert see(1, 40 * int(MEMORY)) == pytest.approx(1)
    many = torch.zeros(300, 3, 8, 8)
    distortion(many + 10, many, at_knot(5, 300))
    assert float(distortion.log_unit[5].exp()) == pytest.approx(100, rel=1e-3), (
        "a batch of more than is remembered is all of it"
    )


def test_what_is_not_finite_is_passed_over() -> None:
    """A picture that a model in trouble restores, or one that it restores exactly."""
    distortion, quality = Distortion(0.5).train(), at_knot(3, 4)
    restored, original = changed(quality, 0)
    restored[1], restored[2], restored[3] = torch.nan, torch.inf, original[3]
    found = distortion(restored, original, quality)
    assert float(found[3]) == 0
    expected, alone = Distortion(0.5).train(), [0, 3]
    expected(restored[alone], original[alone], quality[alone])
    assert units(distortion) == pytest.approx(units(expected), rel=1e-5)
    assert float(distortion.seen[3]) == 2


def test_nothing_moves_in_evaluation() -> None:
    distortion, quality = Distortion(0.5).train(), torch.tensor([10, 50, 90])
    distortion(*changed(quality.float(), 0), quality)
    before = {name: tensor.clone() for name, tensor in distortion.state_dict().items()}
    distortion.eval()(*changed(quality.float(), 1), quality)
    for name, tensor in distortion.state_dict().items():
        assert torch.equal(tensor, before[name])
    distortion.train()(*changed(quality.float(), 1), quality)
    assert not torch.equal(distortion.log_unit, before["log_unit"])


def test_what_is_learned_is_saved() -> None:
    distortion, quality = Distortion(0.5).train(), torch.tensor([10, 50, 90])
    distortion(*changed(quality.float(), 0), quality)
    state = distortion.state_dict()
    assert state.keys() == {"log_unit", "seen"}
    assert not list(distortion.parameters())
    loaded = Distortion(0.5).eval()
    loaded.load_state_dict(state)
    test = changed(quality.float(), 1)
    assert torch.equal(loaded(*test, quality), distortion.eval()(*test, quality))


def test_autocast_changes_nothing() -> None:
    quality = torch.linspace(1, 100, 12)
    restored, original = changed(quality, 0)
    plain, cast = Distortion(0.5).train(), Distortion(0.5).train()
    expected = plain(restored, original, quality)
    with torch.autocast("cpu", torch.bfloat16):
        found = cast(restored, original, quality)
    assert found.dtype == torch.float32 and torch.equal(found, expected)
    assert torch.equal(cast.log_unit, plain.log_unit)


def test_gradients_are_of_both_parts_and_not_of_the_unit() -> None:
    distortion, quality = Distortion(0.3).train(), at_knot(4, 2)
    restored, original = changed(quality, 0)
    restored.requires_grad_()
    (found,) = torch.autograd.grad(distortion(restored, original, quality).sum(), restored)
    unit = distortion.log_unit[4].exp()
    (mse,) = torch.autograd.grad(squared(restored, original).sum(), restored)
    (visual,) = torch.autograd.grad(visual_distance(restored, original).sum(), restored)
    torch.testing.assert_close(found, 0.7 * mse + 0.3 * unit * visual)


# As part of the loss


def test_the_loss_has_it_in_place_of_squared_error() -> None:
    """But for what is reported, and what weights the rate."""
    pixels, quality = models.batch(*(models.picture(64, 96, seed) for seed in (21, 22))), torch.tensor([10, 90])
    plain, half = models.tiny().train(), models.tiny().train()
    half.distortion.share = 0.5
    one, other = plain(pixels, quality), half(pixels, quality)
    for name in ("bpp", "mse", "cost"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    low, high = TINY.lambda_range
    weight = low * (high / low) ** ((quality - 1) / 99)
    balance = (weight / (low * high) ** 0.5) ** -0.4
    restored = other.reconstruction.detach()
    distortion = half.distortion.eval()(restored, pixels, quality)
    expected = one.total + (balance * weight * (distortion - one.mse)).mean()
    torch.testing.assert_close(other.total, expected)
    other.total.backward()
    assert all(bool(p.grad.isfinite().all()) for p in half.parameters() if p.grad is not None)


def test_validation_is_on_squared_error() -> None:
    model = models.tiny().eval()
    pixels, quality = models.batch(models.picture(64, 64)), torch.tensor([40])
    with torch.no_grad():
        expected = model(pixels, quality).total
        model.distortion.share = 0.5
        assert torch.equal(model(pixels, quality).total, expected)
    assert not bool(model.distortion.seen.any())


def test_the_share_is_asked_for() -> None:
    assert RateDistortion(TINY).distortion.share == 0
    assert RateDistortion(TINY, visual_share=0.25).distortion.share == 0.25
