"""The search for better codes: rounds lower the cost of files, and these stay ordinary."""

from pathlib import Path

import models
import numpy as np
import pytest
import torch
from models import picture

from vqcodec import bitstream, codec, coding, encoder, search, synthesis, tuning
from vqcodec.frame import Frame
from vqcodec.models.config import Config, PriorConfig, SliceConfig, StageConfig
from vqcodec.models.model import Model
from vqcodec.visual import visual_distance
from vqcodec.weights import load

QUALITY = 60


def compress(pixels: np.ndarray, effort: int = 1, quality: int = QUALITY, **more: object) -> bytes:
    return codec.compress(pixels, quality=quality, effort=effort, weights=models.shaken_weights(), **more)  # type: ignore[arg-type]


def cost(pixels: np.ndarray, data: bytes) -> float:
    """Bits + lambda * squared error, per pixel, of a real file."""
    restored = np.asarray(codec.decompress(data, weights=models.shaken_weights())).astype(float)
    distortion = models.tiny_model().config.lambda_of((QUALITY - 1) / 99)
    bits = 8 * sum(len(part or b"") for part in bitstream.read(data).segments)
    return bits / pixels[:, :, 0].size + distortion * float(np.square(restored - pixels).mean())


@pytest.mark.parametrize("shape", [(96, 128), (50, 70), (1, 1)], ids=str)
def test_effort_pays(shape: tuple[int, int]) -> None:
    pixels = picture(*shape, seed=5)
    costs = [cost(pixels, compress(pixels, effort)) for effort in (1, 3, 6)]
    if shape == (1, 1):
        assert costs[2] <= 1.001 * costs[0], "the search computes in half precision"
    else:
        assert costs[1] < 0.9 * costs[0] and costs[2] < 0.97 * costs[1]


@pytest.mark.parametrize("effort", [1, 3])
def test_padding_costs_next_to_nothing(effort: int) -> None:
    """Codes of positions that lie outside of the picture are cheap, whatever the padding looks like."""
    pixels = picture(64, 68, seed=4)
    codes_of = [bitstream.read(compress(part, effort)).segments for part in (pixels[:, :64], pixels)]
    sizes = [sum(len(part or b"") for part in segments) for segments in codes_of]
    assert sizes[1] < 1.22 * sizes[0], "nine columns of positions, of twelve, have a part of the picture; eight before"


def test_files_are_ordinary_and_repeatable() -> None:
    pixels = picture(100, 60, seed=5)
    data = compress(pixels, 4, verify=True)
    assert data == compress(pixels, 4)
    assert data != compress(pixels)
    assert bitstream.read_header(data) == bitstream.read_header(compress(pixels))


def visual_cost(
    pixels: np.ndarray,
    segments: list[bytes],
    codes: list[torch.Tensor],
    what: tuning.Importance,
    model: Model | None = None,
) -> float:
    """Bits + weight * (squared error and visual distance, each as it counts), per pixel, of real segments."""
    model = model or models.tiny_model()
    with coding.exact(model):
        restored = synthesis.reconstruct(model, Frame(pixels.shape[1], pixels.shape[0], QUALITY), codes)[0]
    mse = float(np.square(restored.astype(float) - pixels).mean())
    distortion = what.squared * mse
    if what.visual:
        distortion += what.visual * float(visual_distance(models.batch(restored), models.batch(pixels)))
    return 8 * sum(map(len, segments)) / pixels[:, :, 0].size + what.weight * distortion


def latents_of(model: Model, pixels: np.ndarray, quality: int = QUALITY) -> list[torch.Tensor]:
    with coding.exact(model):
        return synthesis.analyse(model, pixels[None], torch.tensor([quality]))


def file_of(
    model: Model, frame: Frame, latents: list[torch.Tensor], what: tuning.Importance
) -> tuple[list[bytes], list[torch.Tensor]]:
    """The segments and the codes that the encoder makes of latents."""
    coders = coding.new_coders(model, frame, 1)
    with coding.exact(model):
        codes = encoder.choose(model, frame, latents, what, coders)
        return coding.in_file_order(coders)[0], codes


def test_a_visual_tuning_is_what_the_search_is_after() -> None:
    """The search lowers the cost of files, with the visual distance in it."""
    pixels, model, frame = picture(96, 128, seed=6), models.tiny_model(), Frame(128, 96, QUALITY)
    what = models.visual_tuning().importance(model.config, pixels[None], QUALITY)
    given = latents_of(model, pixels)
    found = search.improve(model, frame, pixels, given, 8, what)
    before, after = (visual_cost(pixels, *file_of(model, frame, z, what), what) for z in (given, found))
    assert after < 0.995 * before


def test_costs_of_steps_weigh_planes_and_places() -> None:
    """What a squared step of a slice costs is what the encoder chooses its codes with."""
    pixels, model = picture(64, 64, seed=8), models.tiny_model()
    what = models.visual_tuning().importance(model.config, pixels[None], QUALITY)
    codes = coding.no_codes(model.config, Frame(64, 64, QUALITY))
    padded = synthesis.cut(model, pixels[None], (slice(0, 2), slice(0, 2)), model.config.multiple)
    for one in search._decode(model, codes, padded, QUALITY, what)[1]:
        piece = one.piece
        plain = piece.error_weight(what.weight, torch.tensor([QUALITY]))[0]
        expected = (plain * what.planes[piece.level][piece.planes]).repeat_interleave(piece.config.dim)[:, None, None]
        if piece.level == 1:
            assert what.places is not None
            expected = expected * what.places
        torch.testing.assert_close(one.cost[0], expected.expand(one.cost.shape[1:]))


@pytest.mark.parametrize("shape", [(96, 128), (1, 1)], ids=str)
def test_effort_with_a_visual_tuning(shape: tuple[int, int], tmp_path: Path) -> None:
    """Files are ordinary, repeatable and others than without."""
    pixels, weights = picture(*shape, seed=4), models.tuned_weights(tmp_path, models.shaken_weights())
    data = codec.compress(pixels, quality=QUALITY, effort=4, weights=weights, verify=True)
    assert data == codec.compress(pixels, quality=QUALITY, effort=4, weights=weights)
    assert codec.compress(pixels, quality=QUALITY, effort=4, weights=weights, tune="psnr") == compress(pixels, 4)
    if shape != (1, 1):
        assert data != compress(pixels, 4)


def test_a_visual_tuning_of_the_smallest_pictures(tmp_path: Path) -> None:
    """Of pictures with less than 8 pixels a side squared error is all there is, padded or not."""
    stage = StageConfig(4, 48, 16, 1, 1, (SliceConfig(planes=48, dim=1, codes=32, layer=0, rows=30),))
    config = Config("small", (stage,), prior=PriorConfig(channels=16, embedding=16))
    weights = models.save(models.tiny(config), tmp_path / "small.safetensors")
    models.visual_tuning(config).save(tuning.path_of(weights), load(weights).id)
    for shape in ((3, 3), (20, 4), (9, 8)):
        codec.compress(picture(*shape), effort=2, weights=weights, tune="visual", verify=True)


@pytest.mark.parametrize("kind", list(models.KINDS))
def test_no_kind_of_model_loses(kind: str, tmp_path: Path) -> None:
    """Whatever the latents do on the way, the ones of the lowest cost are returned, and given ones are left alone."""
    model = load(models.save(models.KINDS[kind](), tmp_path / "weights.safetensors"))
    frame, pixels = Frame(64, 64, QUALITY), picture(64, 64, seed=9)
    what = tuning.flat(model.config, QUALITY)
    given = latents_of(model, pixels)
    before = [z.clone() for z in given]
    found = search.improve(model, frame, pixels, given, 3, what)
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))
    costs = [visual_cost(pixels, *file_of(model, frame, z, what), what, model) for z in (given, found)]
    assert costs[1] <= costs[0] * 1.001, "reconstructions are rounded, and the search computes in half precision"


def test_latents_settle_where_the_distortion_is_a_parabola() -> None:
    """Of STAY times the usual curvature: what is not quantised ends at its minimum."""
    model = models.tiny_model()
    piece = model.levels[1].slices[0]
    channels = piece.channels.stop - piece.channels.start
    generator = torch.Generator().manual_seed(1)
    goal = torch.randn(1, channels, 4, 4, generator=generator)
    latents = [torch.zeros(1, level.stage.channels, 4, 4) for level in model.levels]
    swings = [torch.zeros_like(z) for z in latents]
    step, cost = torch.full((1, channels, 1, 1), 2.0), torch.full((1, channels, 1, 1), 3.0)
    for _ in range(40):
        here = latents[1][:, piece.channels].clone()  # a decoder that gives latents back
        vectors = (here / step).requires_grad_()
        distortion = (search.STAY * cost * (vectors - goal).square()).sum()
        one = search._Decoded(piece, step, cost, vectors, here)
        search._move(latents, swings, distortion, [one], 1.0)
    torch.testing.assert_close(latents[1][:, piece.channels], goal * step, atol=0.01, rtol=0)
    assert not latents[0].any()


def test_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every window changes its own part only; progress goes from 0 to 1."""
    monkeypatch.setattr(search, "WINDOW", 64)
    monkeypatch.setattr(search, "MARGIN", 32)
    pixels, model, frame = picture(100, 160, seed=7), models.tiny_model(), Frame(160, 100, QUALITY)
    given = latents_of(model, pixels)
    shares: list[float] = []
    search.improve(model, frame, pixels, given, 4, on_round=shares.append)
    assert shares == sorted(shares) and shares[-1] == 1 and len(shares) == 4 * 2 * 3

    seen: list[tuple[int, ...]] = []

    def numbered(model: Model, frame: Frame, pixels: torch.Tensor, latents: list[torch.Tensor], *_: object) -> object:
        seen.append((frame.width, frame.height, pixels.shape[3], pixels.shape[2]))
        return [z + len(seen) for z in latents]

    monkeypatch.setattr(search, "_improve", numbered)
    found = search.improve(model, frame, pixels, given, 4)
    assert seen[:3] == [(96, 96, 96, 96), (128, 96, 128, 96), (64, 96, 64, 96)]
    for before, after, side in zip(given, found, (2, 8), strict=True):
        expected = 1 + 3 * (torch.arange(before.shape[2])[:, None] // side) + torch.arange(before.shape[3]) // side
        torch.testing.assert_close(after - before, expected.expand(before.shape).float())


def test_emphasis_is_what_the_search_is_after() -> None:
    pixels, model, frame = picture(96, 96, seed=7), models.tiny_model(), Frame(96, 96, QUALITY)
    given = latents_of(model, pixels)
    sizes = []
    for emphasis in (0.5, 1.0, 2.0):
        what = tuning.flat(model.config, QUALITY, emphasis)
        segments, _ = file_of(model, frame, search.improve(model, frame, pixels, given, 8, what), what)
        sizes.append(sum(map(len, segments)))
    assert sizes[0] < sizes[1] < sizes[2]


def test_wrong_effort() -> None:
    for effort in (0, 10, 2.0):
        with pytest.raises(ValueError, match="effort must be an integer from 1 to 9"):
            compress(picture(8, 8), effort)  # type: ignore[arg-type]
