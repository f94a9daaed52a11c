"""The same thing computed in two ways: tiles together and alone, batches and their members, bands and the whole,
and what the search says that codes cost beside what they do cost."""

from dataclasses import replace
from typing import Any

import models
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import Pixels, picture
from torch import Tensor

from vqcodec import coding, precision, search, synthesis, tuning, weights
from vqcodec.encoder import choose, encode
from vqcodec.entropy import Table
from vqcodec.frame import Frame
from vqcodec.models.model import Context, Estimate, Model, walk
from vqcodec.tuning import Importance
from vqcodec.visual import visual_distance


@pytest.fixture(scope="module", params=list(models.KINDS))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    path = tmp_path_factory.mktemp("weights") / f"{request.param}.safetensors"
    return weights.load(models.save(models.KINDS[request.param](), path))


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for ours, other in zip(found, expected, strict=True):
        assert torch.equal(ours, other)


# Tiles


def test_tiles_together_and_alone(model: Model) -> None:
    """Every tile of a file, at its edges too, is a file of its own: the same segments, the same codes."""
    frame = Frame(80, 70, 60, tile=64)
    pixels = picture(70, 80, seed=1)
    with coding.exact(model):
        (segments,), codes = encode(model, frame, pixels[None])
        assert coding.encode(model, frame, codes)[0] == segments
        assert_equal(coding.decode(model, frame, [segments]), codes)
        boxes = frame.padded_tiles(model.config.multiple)
        assert len({box[2:] for box in boxes}) == 4, "inner tiles, right and lower ones, and the corner's"
        for number, ((top, left, height, width), padded) in enumerate(zip(frame.tiles(), boxes, strict=True)):
            alone = replace(frame, width=width, height=height, tile=0)
            own = [
                level[:, top // stage.stride :, left // stage.stride :][
                    :, : padded[2] // stage.stride, : padded[3] // stage.stride
                ]
                for level, stage in zip(codes, model.config.levels, strict=True)
            ]
            assert coding.encode(model, alone, own)[0] == segments[number :: len(boxes)]
            assert_equal(coding.decode(model, alone, [segments[number :: len(boxes)]]), own)


def test_missing_segments_change_no_other_tile(model: Model) -> None:
    """Whatever is missing, what a tile decodes to depends on its own segments alone."""
    frame = Frame(80, 70, 60, tile=64)
    rng = np.random.default_rng(2)
    with coding.exact(model):
        (segments,), codes = encode(model, frame, picture(70, 80, seed=1)[None])
        for _ in range(4):
            left = [segment if rng.random() < 0.7 else None for segment in segments]
            found = coding.decode(model, frame, [left])
            for number, (top, start, height, width) in enumerate(frame.padded_tiles(model.config.multiple)):
                own = left[number::4]
                layers = own.index(None) if None in own else len(own)
                for level, stage in enumerate(model.config.levels):
                    rows = slice(top // stage.stride, (top + height) // stage.stride)
                    columns = slice(start // stage.stride, (start + width) // stage.stride)
                    for piece, planes in zip(stage.slices, stage.spans, strict=True):
                        expected = codes[level][:, rows, columns, planes] * (piece.layer < layers)
                        assert torch.equal(found[level][:, rows, columns, planes], expected)


# Batches


QUALITIES = (5, 50, 95)


def walked(model: Model, qualities: tuple[int, ...], codes: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    """What the prior says of all symbols, pass by pass, (B, n, P, parameters), and the decoded pixels.

    codes: int64 (B, h, w, P) a level.
    """
    size = [side * model.config.levels[0].stride for side in codes[0].shape[1:3]]
    context = Context(torch.tensor(qualities), *size)
    estimate = Estimate(model.vqvae, torch.tensor(qualities), *size)
    parameters = []
    with coding.exact(model):
        for piece in walk(model.levels, estimate, context):
            here = codes[piece.level][..., piece.planes]
            for one in context.passes(here):
                parameters.append(one.parameters.unflatten(0, (len(qualities), -1)))
            estimate.add(piece.vectors(here))
        return parameters, estimate.pixels()


def test_batches_and_their_members(model: Model) -> None:
    """Of three pictures of different qualities, the prior's integers are equal, and pixels but for roundings."""
    each = [models.random_codes(model.vqvae, 64, 96, seed) for seed in range(3)]
    parameters, pixels = walked(model, QUALITIES, [torch.cat(level) for level in zip(*each, strict=True)])
    for number, (quality, codes) in enumerate(zip(QUALITIES, each, strict=True)):
        own, restored = walked(model, (quality,), codes)
        assert_equal([p[number, None] for p in parameters], own)
        torch.testing.assert_close(pixels[number, None], restored, rtol=1e-5, atol=1e-2)
        assert number == 0 or not torch.equal(parameters[0][0], parameters[0][number]), "they do differ"


def test_one_by_one_and_all_given(model: Model) -> None:
    """A decoder that learns codes pass by pass sees what an encoder sees that knows all of them."""
    codes = models.random_codes(model.vqvae, 64, 96)
    expected, _ = walked(model, (50,), codes)
    context, found = Context(torch.tensor([50]), 64, 96), []
    with coding.exact(model):
        for piece in walk(model.levels, context):
            parts = []
            for one in context.passes():
                one.codes = codes[piece.level][:, one.places[0], one.places[1]][..., piece.planes].flatten(0, 2)
                parts.append(one.parameters)
            assert torch.equal(context.take_codes(), codes[piece.level][..., piece.planes])
            found += [torch.cat(parts)] if piece.prior is not None and piece.prior.at_once else parts
    assert_equal([p[None] for p in found], expected)


# Bands


@pytest.mark.parametrize("grey", [False, True], ids=["colour", "grey"])
@pytest.mark.parametrize("rows", [1, 3])
def test_bands_and_the_whole(rows: int, grey: bool, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Latents and pixels of any kind of model, of a size that no number of bands fits."""
    frame = Frame(170, 101, 40, grey=grey)
    pixels, quality = picture(101, 170, seed=3), torch.tensor([40])
    padded = frame.padded(model.config.multiple)
    codes = [c.to(torch.int16) for c in models.random_codes(model.vqvae, *padded)]
    with coding.exact(model):
        latents = synthesis.analyse(model, pixels[None], quality)
        restored = synthesis.reconstruct(model, frame, codes)[0]
        monkeypatch.setitem(synthesis.BAND_PIXELS, "cpu", rows * padded[1] * model.config.stages[0].stride)
        monkeypatch.setattr(synthesis, "STRIP", 32)
        bands, render = 0, model.vqvae.render

        def counted(*arguments: Any) -> Tensor:
            nonlocal bands
            bands += 1
            return render(*arguments)

        monkeypatch.setattr(model.vqvae, "render", counted)
        for found, expected in zip(synthesis.analyse(model, pixels[None], quality), latents, strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
        again = synthesis.reconstruct(model, frame, codes)[0]
    assert bands > 3, "the picture must not fit one band"
    gap = np.abs(again.astype(int) - restored)
    assert int(gap.max()) <= 1 and float((gap > 0).mean()) < 0.005


def test_the_estimate_of_a_picture_and_of_a_batch(model: Model) -> None:
    """`GridEstimate`, in place and band by band, decodes to what `Estimate` decodes to."""
    codes = models.random_codes(model.vqvae, 64, 96)
    _, pixels = walked(model, (50,), codes)
    with coding.exact(model):
        restored = synthesis.reconstruct(model, Frame(96, 64, 50), codes)[0]
    gap = np.abs(restored - pixels[0].permute(1, 2, 0).clamp(0, 255).numpy())
    assert float(gap.max()) <= 0.501


# The search


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 12), st.integers(0, 5))
@settings(deadline=None, derandomize=True)
def test_windows_cover_a_grid(height: int, width: int, size: int, reach: int) -> None:
    """Every position is in one inner window, and the outer one has all of the grid that lies within reach."""
    times = np.zeros((height, width), int)
    numbers = np.arange(height * width).reshape(height, width)
    for inner, outer, part in search.windows(height, width, size, reach):
        times[inner] += 1
        assert np.array_equal(numbers[outer][part], numbers[inner])
        for own, wide, length in zip(inner, outer, (height, width), strict=True):
            assert (wide.start, wide.stop) == (max(0, own.start - reach), min(length, own.stop + reach))
    assert (times == 1).all()


@pytest.fixture
def single(monkeypatch: pytest.MonkeyPatch) -> None:
    """The search computes in float32."""
    monkeypatch.setattr(precision, "bfloat16_pays", lambda device: False)


SHAPE = (96, 128)  # of whole positions of every level: there is no padding, whose errors would count


def bits_of(model: Model, codes: list[Tensor], quality: int) -> float:
    """Cross-entropy of codes by the integer counts that the range coder gets."""
    bits = 0.0

    class Counting:
        """Takes the place of an encoder."""

        def put(self, symbols: np.ndarray, counts: np.ndarray) -> None:
            nonlocal bits
            chosen = counts[np.arange(len(symbols)), symbols.astype(int)] + 1.0
            bits -= float(np.log2(chosen / 2**24).sum())

        def put_rows(self, symbols: np.ndarray, rows: np.ndarray, table: Table) -> None:
            self.put(symbols, table.counts[rows])

    context = Context(torch.tensor([quality]), *SHAPE)
    with coding.exact(model):
        for piece in walk(model.levels, context):
            for one in context.passes(codes[piece.level][..., piece.planes].long()):
                coding.put([Counting()], piece, one)  # type: ignore[arg-type]
    return bits


def distortion_of(
    model: Model,
    codes: list[Tensor],
    pixels: Pixels,
    quality: int,
    what: Importance,
    errors: list[Tensor] | None = None,
) -> float:
    """Squared error, or what the importance mixes it with, summed over pixels; of decoding, not rounded to 8 bits.

    errors: for each slice in coding order what is added to its vectors, float (1, P D, h, w).
    """
    estimate = Estimate(model.vqvae, torch.tensor([quality]), *SHAPE)
    with coding.exact(model):
        for number, piece in enumerate(walk(model.levels, estimate)):
            vectors = piece.vectors(codes[piece.level][..., piece.planes].long())
            estimate.add(vectors if errors is None else vectors + errors[number])
        restored = estimate.pixels()
    gap = restored.double() - models.batch(pixels).double()
    total = what.squared * float(gap.square().sum()) / 3
    if what.visual:
        total += what.visual * SHAPE[0] * SHAPE[1] * float(visual_distance(restored, models.batch(pixels)))
    return total


def importance(model: Model, pixels: Pixels, quality: int, visual: bool) -> Importance:
    if visual:
        return models.visual_tuning(model.config).importance(model.config, pixels[None], quality)
    return tuning.flat(model.config, quality)


def cost_of(model: Model, codes: list[Tensor], pixels: Pixels, quality: int, what: Importance) -> float:
    return bits_of(model, codes, quality) + what.weight * distortion_of(model, codes, pixels, quality, what)


@pytest.mark.parametrize("visual", [False, True], ids=["psnr", "visual"])
@pytest.mark.parametrize("quality", [10, 60])
def test_what_the_search_evaluates(quality: int, visual: bool, model: Model, single: None) -> None:
    """The distortion is that of decoded pixels, and decoded latents are those of the codes."""
    pixels = picture(*SHAPE, seed=6)
    what = importance(model, pixels, quality, visual)
    with coding.exact(model):
        _, codes = encode(model, Frame(SHAPE[1], SHAPE[0], quality), pixels[None], what)
    found, slices = search._decode(model, codes, models.batch(pixels), quality, what)
    assert float(found.detach()) == pytest.approx(
        what.weight * distortion_of(model, codes, pixels, quality, what), rel=2e-4
    )
    estimate = Estimate(model.vqvae, torch.tensor([quality]), *SHAPE)
    with coding.exact(model):
        for one, piece in zip(slices, walk(model.levels, estimate), strict=True):
            estimate.add(piece.vectors(codes[piece.level][..., piece.planes].long()))
            torch.testing.assert_close(one.latents, estimate.here, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("visual", [False, True], ids=["psnr", "visual"])
def test_gradients_are_differences(visual: bool, model: Model, single: None) -> None:
    """What a small change of a slice's vectors does to the distortion is what its gradient says."""
    pixels, quality = picture(*SHAPE, seed=6), 60
    what = importance(model, pixels, quality, visual)
    with coding.exact(model):
        _, codes = encode(model, Frame(SHAPE[1], SHAPE[0], quality), pixels[None], what)
    distortion, slices = search._decode(model, codes, models.batch(pixels), quality, what)
    gradients = torch.autograd.grad(distortion, [one.vectors for one in slices])
    for number, gradient in enumerate(gradients):
        # Along the gradient itself, of which no sum of chances can make nothing.
        direction = gradient / gradient.square().mean().sqrt()

        def at(size: float, number: int = number, step: Tensor = direction) -> float:
            errors = [size * step if index == number else torch.zeros_like(g) for index, g in enumerate(gradients)]
            return what.weight * distortion_of(model, codes, pixels, quality, what, errors)

        # The visual distance bends more sharply: in so short a step its roundings count, up to a tenth of a bit.
        size, accuracy, noise = (0.004, 0.02, 25) if visual else (0.02, 0.001, 0)
        difference = (at(size) - at(-size)) / (2 * size)
        assert float((gradient * direction).sum()) == pytest.approx(difference, rel=accuracy, abs=noise)


@pytest.mark.parametrize("visual", [False, True], ids=["psnr", "visual"])
def test_the_search_lowers_what_it_says(
    visual: bool, model: Model, single: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Window by window, none of which sees all, it lowers the cost of the whole as it is computed apart from it."""
    pixels, quality = picture(*SHAPE, seed=7), 60
    frame, what = Frame(SHAPE[1], SHAPE[0], quality), importance(model, pixels, quality, visual)
    with coding.exact(model):
        latents = synthesis.analyse(model, pixels[None], torch.tensor([quality]))
    monkeypatch.setattr(search, "WINDOW", 64)
    monkeypatch.setattr(search, "MARGIN", 32)
    found = search.improve(model, frame, pixels, latents, 6, what)
    with coding.exact(model):
        before, after = (choose(model, frame, z, what) for z in (latents, found))
    costs = [cost_of(model, codes, pixels, quality, what) for codes in (before, after)]
    assert costs[1] < costs[0] or (costs[1] == costs[0] and not model.config.joint)
