"""The search for better codes: what it promises is what files cost, steps lower the cost, files stay ordinary."""

import math
from pathlib import Path

import models
import numpy as np
import pytest
import torch
from models import picture

from vqcodec import bitstream, codec, coding, decoder, encoder, search, synthesis, tuning
from vqcodec.bitstream import Header
from vqcodec.models.config import Config, PriorConfig, SliceConfig, StageConfig
from vqcodec.models.rates import RowRates
from vqcodec.visual import visual_distance
from vqcodec.weights import load

QUALITY = 60


def compress(pixels: np.ndarray, effort: int = 1, quality: int = QUALITY, **more: object) -> bytes:
    return codec.compress(pixels, quality=quality, effort=effort, weights=models.tiny_weights(), **more)  # type: ignore[arg-type]


def cost(pixels: np.ndarray, data: bytes) -> float:
    """Bits + lambda * squared error, per pixel, of a real file."""
    restored = np.asarray(codec.decompress(data, weights=models.tiny_weights())).astype(float)
    distortion = models.tiny_model().config.lambda_of((QUALITY - 1) / 99)
    bits = 8 * sum(len(part or b"") for part in bitstream.read(data).segments)
    return bits / pixels[:, :, 0].size + distortion * float(np.square(restored - pixels).mean())


@pytest.mark.parametrize("shape", [(96, 128), (50, 70), (1, 1)], ids=str)
def test_effort_pays(shape: tuple[int, int]) -> None:
    pixels = picture(*shape, seed=4)
    costs = [cost(pixels, compress(pixels, effort)) for effort in (1, 3, 6)]
    if shape == (1, 1):
        assert costs[2] <= 1.001 * costs[0], "the search computes in half precision"
    else:
        assert costs[2] < costs[1] < costs[0]
        assert costs[2] < 0.995 * costs[0]


def test_files_are_ordinary_and_repeatable() -> None:
    pixels = picture(100, 60, seed=5)
    data = compress(pixels, 4, verify=True)
    assert data == compress(pixels, 4)
    assert data != compress(pixels)
    assert bitstream.read_header(data) == bitstream.read_header(compress(pixels))


def test_what_is_evaluated_is_what_files_cost() -> None:
    pixels = picture(96, 128, seed=6)
    data = compress(pixels)
    model = models.tiny_model()
    codes = [c[0].long() for c in decoder.decode_codes([bitstream.read(data)], model)]
    padded = synthesis.cut(model, pixels[None], (slice(0, 3), slice(0, 4)), model.config.multiple)
    point = search._evaluate(model, padded, codes, QUALITY, tuning.flat(model.config, QUALITY))
    assert point.total / (96 * 128) == pytest.approx(cost(pixels, data), rel=0.02)
    assert torch.equal(torch.cat([s.indices for s in point.symbols[1:]], 1), codes[1].flatten(0, 1))
    for slopes in search._slopes(point):
        assert bool(slopes.by_prior.any()) and bool(slopes.by_decoder.any())


def visual_cost(pixels: np.ndarray, segments: list[bytes], codes: list[torch.Tensor], what: tuning.Importance) -> float:
    """Bits + weight * (squared error and visual distance, each as it counts), per pixel, of real segments."""
    model = models.tiny_model()
    header = Header(pixels.shape[1], pixels.shape[0], QUALITY, model.id, model.config.layers, 0)
    with coding.exact(model):
        restored = synthesis.reconstruct(model, header.frame, codes)[0]
    mse = float(np.square(restored.astype(float) - pixels).mean())
    distortion = what.squared * mse + what.visual * float(visual_distance(models.batch(restored), models.batch(pixels)))
    return 8 * sum(map(len, segments)) / pixels[:, :, 0].size + what.weight * distortion


def test_a_visual_tuning_is_what_the_search_is_after() -> None:
    """The cost that is evaluated is that of files, and the search lowers it."""
    pixels = picture(96, 128, seed=6)
    model = models.tiny_model()
    header = Header(128, 96, QUALITY, model.id, model.config.layers, 0)
    what = models.visual_tuning().importance(model.config, pixels[None], QUALITY)
    with coding.exact(model):
        (segments,), codes = encoder.encode(model, header.frame, pixels[None], what)
    start = visual_cost(pixels, segments, codes, what)
    padded = synthesis.cut(model, pixels[None], (slice(0, 3), slice(0, 4)), model.config.multiple)
    point = search._evaluate(model, padded, [c[0].long() for c in codes], QUALITY, what)
    assert point.total / (96 * 128) == pytest.approx(start, rel=0.02)

    found = search.improve(model, header.frame, pixels, codes, 30, what)
    with coding.exact(model):
        assert visual_cost(pixels, coding.encode(model, header.frame, found)[0], found, what) < 0.995 * start


def test_steps_weigh_planes_by_their_sensitivity() -> None:
    pixels = picture(64, 64, seed=8)
    model = models.tiny_model()
    codes = [torch.zeros(2, 2, 12, dtype=torch.int64), torch.zeros(8, 8, 12, dtype=torch.int64)]
    padded = synthesis.cut(model, pixels[None], (slice(0, 2), slice(0, 2)), model.config.multiple)
    what = models.visual_tuning().importance(model.config, pixels[None], QUALITY)
    plain = search._evaluate(model, padded, codes, QUALITY, tuning.Importance(what.weight))
    tuned = search._evaluate(model, padded, codes, QUALITY, what)
    factors = [what.planes[0], what.planes[1][:8], what.planes[1][8:]]
    for ours, theirs, factor in zip(tuned.symbols, plain.symbols, factors, strict=True):
        torch.testing.assert_close(ours.weight.flatten(), theirs.weight.flatten() * factor)


@pytest.mark.parametrize("shape", [(96, 128), (1, 1)], ids=str)
def test_effort_with_a_visual_tuning(shape: tuple[int, int], tmp_path: Path) -> None:
    """Files are ordinary, repeatable and others than without."""
    pixels, weights = picture(*shape, seed=4), models.tuned_weights(tmp_path)
    data = codec.compress(pixels, quality=QUALITY, effort=4, weights=weights, verify=True)
    assert data == codec.compress(pixels, quality=QUALITY, effort=4, weights=weights)
    assert codec.compress(pixels, quality=QUALITY, effort=4, weights=weights, tune="psnr") == compress(pixels, 4)
    if shape != (1, 1):
        assert data != compress(pixels, 4)


def test_a_visual_tuning_of_the_smallest_pictures(tmp_path: Path) -> None:
    """Where strides are so short that padded pictures have less than 8 pixels a side, squared error is all there is."""
    stage = StageConfig(4, 48, 16, 1, 1, (SliceConfig(planes=48, dim=1, codes=32, layer=0, rows=30),))
    config = Config("small", (stage,), prior=PriorConfig(channels=16, embedding=16))
    weights = models.save(models.tiny(config), tmp_path / "small.safetensors")
    models.visual_tuning(config).save(tuning.path_of(weights), load(weights).id)
    for shape in ((3, 3), (20, 4), (9, 8)):
        codec.compress(picture(*shape), effort=2, weights=weights, tune="visual", verify=True)


@pytest.mark.parametrize("kind", list(models.KINDS))
def test_the_choice_is_the_entropy_constrained_one(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slopes of a parabola around another target, undamped, lead to the code of the least bits and squared error."""
    model = models.KINDS[kind]()
    piece = model.levels[1].slices[0]
    book, planes, dim = piece.codebook, piece.config.planes, piece.config.dim
    generator = torch.Generator().manual_seed(1)
    count = 200
    indices = torch.randint(0, 20, (count, planes), generator=generator)
    numbers = torch.randint(-100, 101, (count, planes, piece.config.parameters), generator=generator).float()
    with torch.no_grad():
        rates = piece.rates(numbers)
    weight = torch.rand(planes, generator=generator) + 0.5
    move = torch.randn(count, planes, dim, generator=generator)
    s = search._Symbols(piece, indices, rates, weight, torch.ones(count), torch.zeros(0), torch.zeros(0))
    slopes = search._Slopes(torch.zeros(count, planes, 2 * dim), -2 * weight[:, None] * move)
    monkeypatch.setattr(search, "NEARBY", math.inf)
    best, gains = search._best(s, slopes, weight)
    target = book.lookup(indices).detach() + move
    bits = torch.stack([rates.bits(book, torch.full_like(indices, k)) for k in range(piece.config.codes)], -1)
    errors = (target[:, :, None] - book.vectors.detach()).square().sum(-1)
    expected = (bits.detach() + weight[:, None] * errors).argmin(-1)
    assert float((best == expected).float().mean()) > 0.999
    if isinstance(rates, RowRates):
        assert torch.equal(best, book.choose(target, rates, weight.expand(count, -1), 1.0))
    assert float(gains.min()) > -1e-4 and float((best != indices).float().mean()) > 0.3


def test_curvature_is_learned_plane_by_plane() -> None:
    """Of parabolas: with evidence the true one, without what is usual, never next to nothing."""
    generator = torch.Generator().manual_seed(3)
    weight, true = torch.tensor([1.0, 2.0, 2.0, 2.0]), torch.tensor([0.5, 3.0, 3.0, -9.0])
    moving = torch.tensor([1.0, 1.0, 0.0, 1.0])[:, None]
    curvature = search._Curvature(weight)
    assert torch.equal(curvature.estimate, weight)
    for _ in range(5):
        change = torch.randn(2000, 4, 2, generator=generator) * moving
        places = 0.5 + torch.rand(2000, generator=generator)  # some bend more than others
        curvature.learn(change, 2 * true[:, None] * places[:, None, None] * change, places)
    expected = torch.tensor([0.5, 3.0, search.USUAL * 2.0, search.LEAST_CURVATURE * 2.0])
    torch.testing.assert_close(curvature.estimate, expected, rtol=0.01, atol=0)


def test_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every window changes its own part only; progress goes from 0 to 1."""
    monkeypatch.setattr(search, "WINDOW", 64)
    monkeypatch.setattr(search, "MARGIN", 32)
    pixels = picture(100, 160, seed=7)
    model = models.tiny_model()
    header = Header(160, 100, QUALITY, model.id, model.config.layers, 0)
    with coding.exact(model):
        codes = encoder.encode(model, header.frame, pixels[None])[1]
    before = [c.clone() for c in codes]
    shares: list[float] = []
    found = search.improve(model, header.frame, pixels, codes, 4, on_round=shares.append)
    assert shares == sorted(shares) and shares[-1] == 1 and len(shares) == 4 * 2 * 3
    assert all(torch.equal(a, b) for a, b in zip(codes, before, strict=True)), "the argument is left alone"
    changed = (found[1] != codes[1])[0].any(2)
    parts = [changed[y : y + 8, x : x + 8].any() for y in (0, 8) for x in (0, 8, 16)]
    assert sum(map(bool, parts)) >= 3


def test_emphasis_is_what_the_search_is_after() -> None:
    pixels = picture(96, 96, seed=7)
    model = models.tiny_model()
    header = Header(96, 96, QUALITY, model.id, model.config.layers, 0)
    with coding.exact(model):
        codes = encoder.encode(model, header.frame, pixels[None])[1]
    sizes = []
    for emphasis in (0.5, 1.0, 2.0):
        found = search.improve(
            model, header.frame, pixels, codes, 8, tuning.flat(model.config, header.quality, emphasis)
        )
        with coding.exact(model):
            sizes.append(sum(map(len, coding.encode(model, header.frame, found)[0])))
    assert sizes[0] < sizes[1] < sizes[2]


def test_wrong_effort() -> None:
    for effort in (0, 10, 2.0):
        with pytest.raises(ValueError, match="effort must be an integer from 1 to 9"):
            compress(picture(8, 8), effort)  # type: ignore[arg-type]
