"""Sampling: symbols come up as often as the prior says, seeds repeat, and what is given is kept."""

import math
from typing import Any

import models
import numpy as np
import pytest
import torch
from models import Pixels, picture

from vqcodec import codec, coding, encoder, sampling
from vqcodec.bitstream import Header
from vqcodec.errors import ImageError
from vqcodec.image import Picture
from vqcodec.models.counts import FLAGS
from vqcodec.sampling import Dice, draw
from vqcodec.weights import load


def sample(count: int, **options: Any) -> list[Pixels]:
    return list(sampling.sample(count, weights_file=models.tiny_weights(), **options))


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_symbols_come_up_as_often_as_they_should(temperature: float) -> None:
    counts = np.array([5e6, 1e6, 1e7, 0, 777_216], np.float32)
    wanted = (counts + 1) ** (1 / temperature)
    wanted /= wanted.sum()
    symbols = Dice(temperature, np.random.default_rng(1)).get(np.tile(counts, (200_000, 1)))
    assert symbols.dtype == np.int32
    found = np.bincount(symbols, minlength=5) / len(symbols)
    assert np.abs(found - wanted).max() < 4 * math.sqrt(0.25 / len(symbols))


def test_no_chance_at_temperature_zero() -> None:
    counts = np.array([[1, 5, 2], [9, 0, 0]], np.float32)
    assert Dice(0.0, np.random.default_rng(0)).get(counts).tolist() == [1, 0]
    assert len(sample(2, height=64, width=64, temperature=0.0)) == 2


def test_no_symbols() -> None:
    assert Dice(1.0, np.random.default_rng(0)).get(np.zeros((0, 7), np.float32)).shape == (0,)
    assert Dice(0.7, np.random.default_rng(0)).get(FLAGS[:3]).shape == (3,)


def test_samples_are_what_their_file_decodes_to() -> None:
    """Drawn codes are such as a file can hold: encoded, they decode to themselves and cost what the prior says."""
    model = load(models.tiny_weights())
    header = Header(96, 64, 40, model.id, model.config.layers, tile=0)
    with coding.exact(model):
        codes = draw(model, header.frame, Dice(1.0, np.random.default_rng(3)))
        segments = models.encode_codes(model, header, codes)
        for found, drawn in zip(coding.decode(model, header.frame, [segments]), codes, strict=True):
            assert found.dtype == drawn.dtype and torch.equal(found, drawn)


def test_seeds_and_sizes() -> None:
    first, second = sample(2, height=40, width=70, seed=5)
    assert first.shape == (40, 70, 3) and first.dtype == np.uint8
    assert not np.array_equal(first, second)
    assert np.array_equal(sample(1, height=40, width=70, seed=5)[0], first)
    assert not np.array_equal(sample(1, height=40, width=70, seed=6)[0], first)


def test_the_caller_is_left_in_its_own_mode() -> None:
    """Between pictures, and with two samplers in turn."""
    samplers = [
        sampling.sample(2, weights_file=models.tiny_weights(), height=32, width=32, seed=seed) for seed in (0, 1)
    ]
    for _ in range(2):
        for sampler in samplers:
            next(sampler)
            assert not torch.is_inference_mode_enabled()
            assert (torch.ones(1, requires_grad=True) * 2).requires_grad


@pytest.mark.parametrize("rows", [0, 3, 16, 100])
def test_rows_that_are_kept(rows: int) -> None:
    model = load(models.tiny_weights())
    source = picture(128, 96)
    header = Header(96, 128, 50, model.id, model.config.layers, tile=0)
    with coding.exact(model):
        given = encoder.encode(model, header.frame, source[None])[1]
        found = draw(model, header.frame, Dice(1.0, np.random.default_rng(0)), given, rows)
    for stage, ours, theirs in zip(model.config.levels, found, given, strict=True):
        kept = rows * 8 // stage.stride
        assert torch.equal(ours[:, :kept], theirs[:, :kept])
        assert kept >= theirs.shape[1] or not torch.equal(ours[:, kept:], theirs[:, kept:])


def test_completion_starts_as_the_picture_does() -> None:
    source = picture(256, 64, seed=2)
    (ending,) = sample(1, picture=Picture(source), quality=90)
    restored = codec.decode_picture(
        codec.compress(source, quality=90, weights=models.tiny_weights()), weights=models.tiny_weights()
    ).pixels
    assert ending.shape == source.shape
    assert np.array_equal(ending[:32], restored[:32])
    assert not np.array_equal(ending[160:], restored[160:])


def test_the_endings_of_a_grey_picture_are_grey() -> None:
    source = np.repeat(models.picture(64, 64)[..., :1], 3, axis=2)
    for ending in sample(2, picture=Picture(source, grey=True), quality=90):
        assert (ending == ending[..., :1]).all()


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"height": 0}, "1 to 2048 pixels a side, got 256 x 0"),
        ({"width": 4000}, "1 to 2048 pixels a side, got 4000 x 256"),
        ({"quality": 0}, "quality must be from 1 to 100, got 0"),
        ({"quality": 101}, "quality must be from 1 to 100, got 101"),
        ({"temperature": -1.0}, "temperature must be a number from 0"),
        ({"temperature": math.nan}, "temperature must be a number from 0"),
    ],
)
def test_out_of_range(options: dict[str, Any], line: str) -> None:
    with pytest.raises(ValueError, match=line):
        sample(1, **options)


def test_picture_too_large() -> None:
    with pytest.raises(ImageError, match="1 to 2048 pixels a side, got 1 x 2049"):
        sample(1, picture=Picture(np.zeros((2049, 1, 3), np.uint8)))
