"""The schedule of a run: what its curves are at the start, on the way and at the end."""

from dataclasses import replace

import pytest
import torch

from vqcodec.models.recipes import PHOTO
from vqcodec.train.job import choose_schedule
from vqcodec.train.schedule import LOOK, SCHEDULES, Schedule


def test_learning_rates_rise_and_fall_in_every_phase() -> None:
    plan = Schedule(warm_up_steps=10, prior_at=0.5, joint_at=0.6, joint_rate=0.2, polish_from=0.8, polish_rate=0.4)
    assert [plan.phase(share) for share in (0, 0.49, 0.5, 0.59, 0.6, 0.79, 0.8, 1)] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [plan.learning_rate(step, 0.0) for step in (0, 4, 9, 10_000)] == pytest.approx([0.1, 0.5, 1, 1])

    def at(*shares: float) -> list[float]:
        return [plan.learning_rate(1000, share) for share in shares]

    assert at(0.25, 0.4, 0.49999) == pytest.approx([0.7, 0.4, 0.2], rel=1e-3)
    assert at(0.5, 0.55, 0.59999) == pytest.approx([1, 0.505, 0.01], rel=1e-3)
    assert at(0.6, 0.7, 0.79999) == pytest.approx([0.2, 0.101, 0.002], rel=1e-3)
    assert [plan.begins(phase) for phase in range(5)] == [0, 0.5, 0.6, 0.8, 1]
    assert at(0.8, 0.9, 0.99999) == pytest.approx([0.4, 0.202, 0.004], rel=1e-3)


def test_weights_that_have_a_prior_learn_all_together_from_the_start() -> None:
    plan = Schedule(warm_up_steps=10, prior_at=0.0, joint_at=0.0, joint_rate=1.0, polish_from=1.0)
    assert [plan.phase(share) for share in (0, 0.5, 0.999)] == [2, 2, 2]
    assert [plan.learning_rate(1000, share) for share in (0, 0.5, 0.99999)] == pytest.approx([1, 0.505, 0.01], rel=1e-3)


def test_going_on_from_weights_rounds_to_the_end_and_learns_nothing_together() -> None:
    plan = Schedule(warm_up_steps=10).onward()
    assert plan.prior_at > Schedule().prior_at
    assert {plan.phase(hundredth / 100) for hundredth in range(101)} == {0, 1, 3}
    rates = [plan.learning_rate(1000, share * plan.prior_at) for share in (0, 0.5, 0.99999)]
    assert rates == pytest.approx([0.5, 0.26, 0.01], rel=1e-2), "half of the rates of a fresh run"
    assert plan.learning_rate(1000, plan.prior_at) == pytest.approx(1), "but for the prior, which starts anew"


def test_rates_while_rounding_are_no_others() -> None:
    plan = Schedule(warm_up_steps=10, prior_at=0.5, joint_at=0.6, polish_from=0.8)
    slow = replace(plan, rounding_rate=0.3)
    for step, share in ((0, 0.0), (4, 0.1), (1000, 0.2), (1000, 0.49)):
        assert slow.learning_rate(step, share) == pytest.approx(0.3 * plan.learning_rate(step, share))
    for share in (0.5, 0.55, 0.6, 0.7, 0.8, 0.9):
        assert slow.learning_rate(1000, share) == plan.learning_rate(1000, share)


def test_distortions() -> None:
    assert Schedule().visual_share == 0.5
    for name, share in (("mse", 0.0), ("visual", 0.5)):
        for plan in (Schedule(batch=3), replace(LOOK, batch=3)):
            assert plan.with_distortion(name) == replace(plan, visual_share=share)
    with pytest.raises(ValueError, match="distortion must be one of mse, visual, got 'pretty'"):
        Schedule().with_distortion("pretty")


def test_what_is_small_or_another_look_is_trained_on_squared_error() -> None:
    assert {plan.visual_share for plan in (*SCHEDULES.values(), LOOK)} == {0.0}


def test_large_batches_learn_faster() -> None:
    plan = Schedule(batch=8, rate=1e-3)
    rates = [(plan.with_batch(batch).batch, plan.with_batch(batch).rate) for batch in (4, 8, 18, 64)]
    assert rates == [(8, 1e-3), (8, 1e-3), (18, pytest.approx(1.5e-3)), (64, pytest.approx(2e-3))]


def test_every_process_has_a_batch() -> None:
    """Of the usual schedule; what somebody asks for is taken at its word."""
    cpu = torch.device("cpu")
    plans = [choose_schedule(None, PHOTO, cpu, world, look=False, distortion=None) for world in (1, 2, 8)]
    assert [plan.batch for plan in plans] == [8, 16, 64]
    assert [plan.crops_a_step(256, world) for plan, world in zip(plans, (1, 2, 8), strict=True)] == [8, 8, 8]
    assert choose_schedule(Schedule(batch=4), PHOTO, cpu, 2, look=False, distortion=None).batch == 4


def test_rate_weight_reaches_one_and_stays() -> None:
    plan = Schedule(rate_rise=0.4, prior_at=0.6, joint_at=0.7)
    assert [plan.rate_weight(share, 0.1) for share in (0, 0.2, 0.4, 0.59, 1)] == pytest.approx([0.1, 0.55, 1, 1, 1])
    assert [plan.rate_weight(share, 0.1) for share in (0.6, 0.65, 0.699999)] == pytest.approx([0.1, 0.55, 1], rel=1e-3)
    assert [plan.rate_weight(share, 1.0) for share in (0, 0.65)] == [1, 1]


def test_large_crops_come_late_and_cost_no_more() -> None:
    plan = Schedule(batch=8, crop=256, large_crop=384, large_from=0.85)
    assert [plan.crop_side(share, 64) for share in (0, 0.84, 0.85, 1)] == [256, 256, 384, 384]
    assert [plan.crops_a_step(side, processes) for side, processes in ((256, 1), (256, 2), (384, 1), (384, 2))] == [
        8,
        4,
        4,
        2,
    ]
    assert plan.crops_a_step(4096, 1) == 1


def test_two_parts() -> None:
    plan = Schedule(prior_from=0.6)
    assert plan.part(0.3) == (False, pytest.approx(0.5))
    assert plan.part(0.6) == (True, pytest.approx(0))
    assert plan.part(0.9) == (True, pytest.approx(0.75))


def test_crops_fit_the_model() -> None:
    plan = Schedule(crop=100, large_crop=200)
    assert plan.crop_side(0, 64) == 64
    assert plan.crop_side(1, 64) == 192
    assert plan.crop_side(0, 128) == 128
