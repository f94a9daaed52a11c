"""Ablations: variants are what they say, the scalar control codes Gaussians, and a run gives a line."""

from pathlib import Path
from statistics import NormalDist

import models
import numpy as np
import pytest
import torch
from PIL import Image

from bench import ablate
from bench.ablate import VARIANTS, Variant
from bench.scalar import RoundingBook
from vqcodec import training
from vqcodec.models.config import PHOTO, TINY, SliceConfig
from vqcodec.models.quantizer import Rates
from vqcodec.schedule import Schedule

BOOK = SliceConfig(planes=2, dim=1, codes=41, layer=0)


def rates_of(means: torch.Tensor, deviations: torch.Tensor, spread: torch.Tensor) -> Rates:
    """The parameters of log2 p = drift x - square x^2, x = v / spread."""
    square = spread**2 / (2 * np.log(2) * deviations**2)
    theta = torch.stack([2 * square * means / spread, -square, torch.zeros_like(square)], -1)
    return Rates(theta, torch.zeros_like(square))


def test_rounding_costs_what_a_gaussian_says() -> None:
    book = RoundingBook(BOOK)
    book.spread.copy_(torch.tensor([1.0, 4.0]))
    torch.manual_seed(0)
    v, means = torch.randn(30, 2, 1) * 3, torch.randn(30, 2)
    deviations = torch.rand(30, 2) * 3 + 2
    rates = rates_of(means, deviations, book.spread)
    v.requires_grad_()
    loss, indices, bits = book.quantise(v, rates, torch.ones(30, 2), 0.5, torch.ones(30))
    assert torch.equal(book.lookup(indices)[..., 0], v.detach()[..., 0].round())
    for row in range(30):
        total = 0.0
        for plane in range(2):
            normal = NormalDist(float(means[row, plane]), float(deviations[row, plane]))
            x = round(float(v.detach()[row, plane, 0]))
            total -= np.log2(max(normal.cdf(x + 0.5) - normal.cdf(x - 0.5), 2.0**-24))
        assert float(bits[row]) == pytest.approx(total, rel=1e-3, abs=1e-3)
    loss.backward()
    assert v.grad is not None and bool((v.grad != 0).all())


def test_far_values_are_clamped_and_cost_at_most_24_bits() -> None:
    book = RoundingBook(BOOK)
    v = torch.tensor([[[1e4], [-1e4]]])
    rates = rates_of(torch.zeros(1, 2), torch.ones(1, 2), book.spread)
    _, indices, bits = book.quantise(v, rates, torch.ones(1, 2), 0.5, torch.ones(1))
    assert book.lookup(indices).flatten().tolist() == [20, -20]
    assert float(bits) == 48


def test_rounding_takes_one_dimension() -> None:
    with pytest.raises(ValueError, match="one dimension"):
        RoundingBook(SliceConfig(planes=2, dim=2, codes=41, layer=0))


def test_variants_differ_from_the_photo_model_in_one_thing() -> None:
    assert VARIANTS["photo"].config == PHOTO and VARIANTS["photo"].schedule == Schedule()
    for name, variant in VARIANTS.items():
        changed = (variant.config != PHOTO) + (variant.schedule != Schedule())
        assert changed == (name != "photo"), name
        if name != "no-top":
            assert [s.channels for s in variant.config.levels] == [s.channels for s in PHOTO.levels], name
    assert len(VARIANTS["no-top"].config.levels) == 1


@pytest.mark.parametrize("rounding", [False, True])
def test_a_run_gives_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rounding: bool) -> None:
    for seed in range(4):
        Image.fromarray(models.picture(96, 96, seed)).save(tmp_path / f"{seed}.png")
    monkeypatch.setattr(torch, "set_flush_denormal", lambda _: True)  # of the whole process
    monkeypatch.setattr(training, "START_CROPS", 8)
    scalars = TINY.to_json().replace('"dim": 4, "layer": 2, "planes": 4', '"dim": 1, "layer": 2, "planes": 16')
    variant = Variant("in miniature", TINY.from_json(scalars), Schedule(crop=64, large_crop=64, batch=2), rounding)
    monkeypatch.setitem(VARIANTS, "tiny", variant)
    assert "failed" in ablate.row("tiny", tmp_path)
    ablate.run("tiny", [tmp_path], 1 / 60, tmp_path)
    cells = ablate.row("tiny", tmp_path).strip("| ").split(" | ")
    assert cells[:2] == ["tiny", "in miniature"] and int(cells[2]) > 0
    assert len(cells) == 4 + len(training.VALIDATION_QUALITIES)
    assert 0 < float(cells[-1]) < 100


def test_unknown_variants_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        ablate.main(["pictures", "--variants", "photo,nonsense"])
    assert stopped.value.code == 2
    assert "no such variant: nonsense" in capsys.readouterr().err
