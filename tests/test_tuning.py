"""The visual tuning: its file, what it makes of a picture, and what the encoder makes of that."""

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
import torch
from models import TINY, Pixels, picture

from vqcodec import bitstream, codec, coding, decoder, encoder, tuning
from vqcodec.bitstream import Header
from vqcodec.errors import WeightsError
from vqcodec.models.config import Config
from vqcodec.models.recipes import PHOTO, VQVAE_MNIST
from vqcodec.target import Target
from vqcodec.tuning import CHOICE_SHARE, LEAST_VARIANCE, SHARE, USUAL_VARIANCE, Importance, activity

ID = bytes.fromhex("01020304")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A tuning's file."""
    path = tmp_path / "mine.visual.json"
    models.visual_tuning().save(path, ID)
    return path


@pytest.fixture
def tuned(tmp_path: Path) -> Path:
    """Weights with a tuning beside them."""
    return models.tuned_weights(tmp_path)


# The file


def test_round_trip(path: Path) -> None:
    saved, loaded = models.visual_tuning(), tuning.load(path, TINY, ID)
    assert loaded is not None and loaded.qualities == saved.qualities
    for name in ("unit", "masking", "balance", "planes"):
        torch.testing.assert_close(getattr(loaded, name), getattr(saved, name), rtol=5.1e-4, atol=0)
    before = path.read_bytes()
    loaded.save(path, ID)
    assert path.read_bytes() == before, "what was rounded stays as it is"
    assert list(path.parent.iterdir()) == [path]
    fields = json.loads(before)
    assert (fields["format"], fields["weights"], fields["qualities"]) == (tuning.FORMAT, ID.hex(), [10, 50, 90])


def test_it_lies_beside_its_weights() -> None:
    assert tuning.path_of(Path("a") / "mine.safetensors") == Path("a") / "mine.visual.json"


def test_no_file_is_no_tuning(tmp_path: Path) -> None:
    assert tuning.load(tmp_path / "none.visual.json", TINY, ID) is None


def refused(path: Path, match: str) -> None:
    with pytest.raises(WeightsError, match=match) as caught:
        tuning.load(path, TINY, ID)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff\xfe", b"no JSON", b"[]", b"null", b"7", b"{}", b"[" * 100_000],
    ids=["empty", "binary", "text", "list", "null", "number", "nothing", "deep"],
)
def test_what_is_no_tuning_is_refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    refused(path, "is not a visual tuning")


def test_a_folder_is_refused(tmp_path: Path) -> None:
    refused(tmp_path, "is not a visual tuning")


ROW = [1.0] * 24
COARSE, FINE = [ROW[:12]] * 3, [ROW[:12]] * 3
HUGE = 10**400


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"format": "vqcodec visual tuning 2"}, "is not a visual tuning"),
        ({"qualities": ["low", "high"]}, "is not a visual tuning"),
        ({"qualities": [10, 50, math.inf]}, "is not a visual tuning"),
        ({"unit": None}, "is not a visual tuning"),
        ({"unit": ["1", "2", "3"]}, "is not a visual tuning"),
        ({"unit": [1, 2, HUGE]}, "is not a visual tuning"),
        ({"balance": {"10": 1}}, "is not a visual tuning"),
        ({"planes": 1}, "is not a visual tuning"),
        ({"planes": [[ROW[:12], ROW, ROW], FINE]}, "is not a visual tuning"),
        ({"weights": "04030201"}, "is of weights '04030201', not of '01020304'"),
        ({"weights": None}, "is of weights None, not of '01020304'"),
        ({"weights": "two\nlines"}, "is of weights 'two"),
        ({"qualities": [50, 10, 90]}, "does not fit"),
        ({"qualities": [10, 10, 90]}, "does not fit"),
        ({"qualities": [10, 50]}, "does not fit"),
        ({"qualities": [10], "unit": [1], "masking": [1], "balance": [1], "planes": [COARSE[:1], FINE[:1]]}, "fit"),
        ({"unit": [1, 2]}, "does not fit"),
        ({"masking": [[1, 2, 3]]}, "does not fit"),
        ({"balance": 1}, "does not fit"),
        ({"planes": []}, "does not fit"),
        ({"planes": [COARSE]}, "does not fit"),
        ({"planes": [COARSE, FINE, FINE]}, "does not fit"),
        ({"planes": [COARSE, FINE[:2]]}, "does not fit"),
        ({"planes": [COARSE, [ROW] * 3]}, "does not fit"),
        ({"planes": [COARSE, [[0.0, *ROW[:11]]] * 3]}, "does not fit"),
        ({"planes": [COARSE, [[math.nan, *ROW[:11]]] * 3]}, "does not fit"),
        ({"unit": [1, 2, -3]}, "does not fit"),
        ({"unit": [1, 2, 1e-300]}, "does not fit"),
        ({"balance": [1, 0, 1]}, "does not fit"),
        ({"balance": [1, math.inf, 1]}, "does not fit"),
        ({"masking": [0, math.nan, 0]}, "does not fit"),
        ({"masking": [0, -math.inf, 0]}, "does not fit"),
    ],
    ids=lambda x: x if isinstance(x, str) else str(x)[:40],
)
def test_wrong_fields_are_refused(path: Path, changes: dict[str, Any], match: str) -> None:
    fields = json.loads(path.read_text())
    path.write_text(json.dumps(fields | {"planes": [COARSE, FINE]}))
    assert tuning.load(path, TINY, ID) is not None
    path.write_text(json.dumps(fields | changes))
    refused(path, match)


@pytest.mark.parametrize("name", ["weights", "qualities", "unit", "masking", "balance", "planes"])
def test_missing_fields_are_refused(path: Path, name: str) -> None:
    fields = json.loads(path.read_text())
    del fields[name]
    path.write_text(json.dumps(fields))
    refused(path, f"is not a visual tuning: '{name}'")


def test_a_tuning_of_another_configuration_is_refused(path: Path) -> None:
    with pytest.raises(WeightsError, match="does not fit"):
        tuning.load(path, PHOTO, ID)


# What errors count in a picture


@pytest.mark.parametrize(
    ("quality", "low", "share"), [(1, 0, 0.0), (10, 0, 0.0), (20, 0, 0.25), (50, 0, 1.0), (80, 1, 0.75), (100, 1, 1.0)]
)
def test_importance_between_and_beyond_qualities(quality: int, low: int, share: float) -> None:
    """Sensitivities, balances and units go geometrically from one quality to the next, the masking linearly."""
    tuned, pixels = models.visual_tuning(), picture(37, 53)

    def between(values: torch.Tensor) -> torch.Tensor:
        return values[low] ** (1 - share) * values[low + 1] ** share

    found = tuned.importance(TINY, pixels[None], quality)
    weight = TINY.lambda_of((quality - 1) / 99)
    assert found.weight == pytest.approx(weight * float(between(tuned.balance)))
    assert found.visual == pytest.approx(SHARE * float(between(tuned.unit)))
    assert found.squared == 1 - SHARE
    for factors, sensitivities in zip(found.planes, tuned.planes, strict=True):
        torch.testing.assert_close(factors, 1 - CHOICE_SHARE + CHOICE_SHARE * between(sensitivities))
    masking = float((1 - share) * tuned.masking[low] + share * tuned.masking[low + 1])
    texture = (activity(pixels[None], TINY) + LEAST_VARIANCE) / (USUAL_VARIANCE + LEAST_VARIANCE)
    assert found.places is not None
    torch.testing.assert_close(found.places, 1 - CHOICE_SHARE + CHOICE_SHARE * texture**masking)


def test_emphasis_multiplies_the_weight_alone() -> None:
    tuned, pixels = models.visual_tuning(), picture(40, 40)
    plain, more = (tuned.importance(TINY, pixels[None], 30, emphasis) for emphasis in (1.0, 1.7))
    assert more.weight == pytest.approx(1.7 * plain.weight)
    assert plain.places is not None and more.places is not None and torch.equal(more.places, plain.places)
    assert all(torch.equal(a, b) for a, b in zip(more.planes, plain.planes, strict=True))
    assert (more.visual, more.squared) == (plain.visual, plain.squared)
    assert tuning.flat(TINY, 30, 1.7) == Importance(1.7 * TINY.lambda_of(29 / 99))


def test_factors_of_planes_and_places() -> None:
    place = (slice(0, 1), slice(1, 3), slice(0, 2))
    squares = tuning.flat(TINY, 50)
    assert squares.of_planes(1, slice(8, 12)) == 1.0
    assert squares.of_places(True, place) is None
    planes, places = (torch.rand(12), torch.rand(12)), torch.rand(2, 4, 5)
    found = Importance(1.0, planes, places)
    assert torch.equal(found.of_planes(1, slice(8, 12)), planes[1][8:])  # type: ignore[arg-type]
    assert torch.equal(found.of_places(True, place), places[:1, 1:3, :2])  # type: ignore[arg-type]
    assert found.of_places(False, place) is None, "a coarse position covers smooth and textured places"


def expected_activity(pixels: Pixels, config: Config) -> np.ndarray:
    """Block by block, in float64."""
    stride, unit = config.levels[-1].stride, config.multiple
    height, width = pixels.shape[:2]
    luma = np.pad(pixels @ np.array(tuning.LUMA), ((0, -height % unit), (0, -width % unit)), mode="edge")
    side = min(tuning.BLOCK, stride)
    count = stride // side
    blocks = luma.reshape(luma.shape[0] // stride, count, side, luma.shape[1] // stride, count, side)
    return blocks.var(axis=(2, 5)).mean(axis=(1, 3))


@pytest.mark.parametrize("config", [TINY, PHOTO, VQVAE_MNIST], ids=lambda c: c.name)
@pytest.mark.parametrize("size", [(1, 1), (37, 53), (512, 40), (513, 20), (1100, 70)], ids=str)
def test_activity(size: tuple[int, int], config: Config) -> None:
    pixels = picture(*size, seed=8)
    found = activity(pixels[None], config)[0]
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), expected_activity(pixels, config), rtol=1e-3, atol=0.1)


def half_textured(height: int = 96, width: int = 192) -> Pixels:
    """Flat on the left, noise on the right."""
    pixels = np.full((height, width, 3), 120, np.uint8)
    noise = np.random.default_rng(3).integers(70, 170, (height, width // 2, 1), np.uint8)
    pixels[:, width // 2 :] = noise
    return pixels


def test_flat_places_count_more_than_textured_ones() -> None:
    for quality in (1, 50, 100):
        places = models.visual_tuning().importance(TINY, half_textured()[None], quality).places
        assert places is not None
        flat, textured = places.chunk(2, 2)
        assert float(flat.min()) > 1 + 0.2 * CHOICE_SHARE and 1 - CHOICE_SHARE < float(textured.max()) < 1


# The encoder


def encoded(importance: Importance | None, pixels: Pixels, tile: int = 0) -> tuple[bytes, list[torch.Tensor]]:
    """A file and the encoder's codes, at quality 50."""
    model = models.tiny_model()
    height, width = pixels.shape[:2]
    header = Header(width, height, 50, model.id, model.config.layers, tile)
    with coding.exact(model):
        (segments,), codes = encoder.encode(model, header.frame, pixels[None], importance)
    return bitstream.write(header, (), segments), codes


@pytest.mark.parametrize("tile", [0, 64])
@pytest.mark.parametrize("size", [(1, 1), (33, 31), (128, 180)], ids=str)
def test_tuned_files_decode_like_any_other(size: tuple[int, int], tile: int) -> None:
    pixels = picture(*size, seed=9)
    data, codes = encoded(models.visual_tuning().importance(TINY, pixels[None], 50), pixels, tile)
    found = decoder.decode_codes([bitstream.read(data)], models.tiny_model())
    assert all(torch.equal(a, b) for a, b in zip(found, codes, strict=True))
    if size != (1, 1):
        assert any(bool((a != b).any()) for a, b in zip(encoded(None, pixels, tile)[1], codes, strict=True))


@pytest.mark.parametrize(("level", "plane"), [(0, 9), (1, 0), (1, 1), (1, 8)])
def test_factors_reach_their_plane(level: int, plane: int) -> None:
    """A plane that counts much has more codes other than 0 than one that hardly counts; little else changes."""
    pixels = picture(96, 128, seed=13)
    chosen = []
    for factor in (0.02, 50.0):
        planes = [torch.ones(12), torch.ones(12)]
        planes[level][plane] = factor
        chosen.append(encoded(Importance(TINY.lambda_of(49 / 99), tuple(planes)), pixels)[1])
    little, much = (int((codes[level][..., plane] > 0).sum()) for codes in chosen)
    assert much > little
    changed = [(a != b).flatten(0, 2).float().mean(0) for a, b in zip(*chosen, strict=True)]
    own = float(changed[level][plane])
    changed[level][plane] = 0
    assert own > 0.05
    assert own > 3 * max(float(c.max()) for c in changed)


@pytest.mark.parametrize("tile", [0, 64])
def test_factors_reach_their_places(tile: int) -> None:
    pixels = picture(128, 192, seed=12)
    places = torch.full((1, 16, 24), 0.2)
    places[:, :, :12] = 5.0
    squares = []
    for importance in (None, Importance(TINY.lambda_of(49 / 99), places=places)):
        restored = codec.decode_picture(encoded(importance, pixels, tile)[0], weights=models.tiny_weights()).pixels
        square = (restored.astype(float) - pixels) ** 2
        squares.append([square[:, :88].mean(), square[:, 104:].mean()])
    (left, right), (more, less) = squares
    assert more < 0.9 * left and less > 1.1 * right


def test_whether_the_tuning_is_used(tuned: Path) -> None:
    """By default where there is one, unless the target is a PSNR; never when PSNR is asked for."""
    pixels, untuned = picture(50, 70, seed=12), models.tiny_weights()

    def compress(weights: Path, **options: Any) -> bytes:
        return codec.compress(pixels, weights=weights, **options)

    plain, visual = compress(untuned), compress(tuned, tune="visual")
    assert visual != plain
    assert compress(tuned) == visual == compress(tuned, tune="visual", verify=True)
    assert compress(tuned, tune="psnr") == plain == compress(untuned, tune="psnr")
    assert compress(tuned, target=Target("bpp", 1.0)) != compress(untuned, target=Target("bpp", 1.0))
    target = Target("psnr", 32)
    wanted = compress(untuned, target=target)
    assert compress(tuned, target=target) == wanted
    assert compress(tuned, target=target, tune="visual") != wanted
    with pytest.raises(WeightsError, match=r"no visual tuning: there is no tiny\.visual\.json beside them"):
        compress(untuned, tune="visual")


def test_targets_are_reached_with_a_tuning(tuned: Path) -> None:
    pixels = picture(96, 128, seed=13)
    data = codec.compress(pixels, weights=tuned, target=Target("size", 900))
    assert len(data) == pytest.approx(900, rel=0.02)


def test_an_unknown_tune() -> None:
    with pytest.raises(ValueError, match="tune must be one of visual, psnr, got 'pretty'"):
        codec.compress(picture(8, 8), weights=models.tiny_weights(), tune="pretty")


def test_a_stale_tuning_is_an_error(tuned: Path, tmp_path: Path) -> None:
    """Of weights that had the name before."""
    other = models.save(models.tiny(seed=9), tmp_path / "other.safetensors")
    shutil.copy(tuning.path_of(tuned), tuning.path_of(other))
    pixels = picture(8, 8)
    for tune in (None, "visual"):
        with pytest.raises(WeightsError, match=r"other\.visual\.json is of weights"):
            codec.compress(pixels, weights=other, tune=tune)
    codec.compress(pixels, weights=other, tune="psnr")


def test_importance_moves_to_a_device() -> None:
    found = models.visual_tuning().importance(TINY, picture(40, 40)[None], 50)
    moved = found.to(torch.device("meta"))
    assert moved.places is not None and moved.places.is_meta and all(p.is_meta for p in moved.planes)
    assert dataclasses.replace(moved, planes=(), places=None) == dataclasses.replace(found, planes=(), places=None)
