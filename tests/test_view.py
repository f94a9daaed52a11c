"""A part of a picture, and a smaller picture, against the whole."""

from pathlib import Path

import models
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import vqcodec
from vqcodec import bitstream, coding, decoder, image, synthesis, weights
from vqcodec.errors import ImageError, WeightsError
from vqcodec.frame import Frame, Region
from vqcodec.models.layers import ResidualBlock
from vqcodec.models.model import Model
from vqcodec.models.pixels import Renderer
from vqcodec.pictures import colour
from vqcodec.pictures.signalling import CodePoints

HEIGHT, WIDTH = 205, 330


@pytest.fixture(scope="module", params=list(models.KINDS))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    path = tmp_path_factory.mktemp("weights") / f"{request.param}.safetensors"
    return weights.load(models.save(models.KINDS[request.param](), path))


def random_codes(model: Model, frame: Frame) -> list[torch.Tensor]:
    padded = frame.padded(model.config.multiple)
    return [c.to(torch.int16) for c in models.random_codes(model.vqvae, *padded)]


# Parts


@pytest.mark.parametrize("side", [64, 2048])
@pytest.mark.parametrize("grey", [False, True], ids=["colour", "grey"])
def test_a_region_is_cut_from_the_whole(side: int, grey: bool, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pixels of a region at any place are those of the whole picture, but for the rounding of floats: in bands and
    strips of side x side pixels."""
    frame = Frame(WIDTH, HEIGHT, 60, grey=grey)
    codes = random_codes(model, frame)
    monkeypatch.setitem(synthesis.BAND_PIXELS, "cpu", side**2)
    monkeypatch.setattr(synthesis, "STRIP", side)
    regions = [Region(0, 0, 1, 1), Region(WIDTH - 1, HEIGHT - 1, 1, 1), Region(0, 0, WIDTH, HEIGHT)]
    regions += [Region(101, 55, 64, 32), Region(7, 100, 200, 1), Region(37, 3, 1, 202), Region(160, 96, 32, 32)]
    with coding.exact(model):
        whole = synthesis.reconstruct(model, frame, codes)[0]
        for region in regions:
            part = synthesis.reconstruct(model, frame, codes, region)[0]
            expected = whole[region.rows, region.columns]
            gap = np.abs(part.astype(int) - expected)
            assert part.shape == expected.shape and part.flags.c_contiguous
            assert gap.max() <= 1 and (gap > 0).mean() < 0.005, region


def test_only_tiles_that_matter_are_decoded(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tile of a picture of 5 x 4 is decoded for a region in its middle only if its codes can matter."""
    unit = max(16, model.config.multiple)
    frame = Frame(20 * unit, 16 * unit, 60, tile=4 * unit)
    region = Region(9 * unit, 5 * unit, unit, unit)
    tiles = synthesis.tiles_for(model, frame, region, 1)
    assert 7 in tiles and len(tiles) < 20, "in the middle, and not all"
    codes = random_codes(model, frame)
    header = bitstream.Header.of(frame, model.id, model.config.layers)
    with coding.exact(model):
        container = bitstream.read(bitstream.write(header, [], coding.encode(model, frame, codes)[0]), max_pixels=None)
    seen: set[tuple[int, int]] = set()
    make = coding.Tiles.__init__

    def note(
        self: coding.Tiles, quality: torch.Tensor, members: list[tuple[int, int]], boxes: list[coding.Box]
    ) -> None:
        seen.update(members)
        make(self, quality, members, boxes)

    monkeypatch.setattr(coding.Tiles, "__init__", note)
    decoded = decoder.decode_codes([container], model, region)
    assert seen == {(0, number) for number in tiles}
    with coding.exact(model):
        expected = synthesis.reconstruct(model, frame, codes)[0][region.rows, region.columns]
        gap = np.abs(synthesis.reconstruct(model, frame, decoded, region)[0].astype(int) - expected)
    assert gap.max() <= 1 and (gap > 0).mean() < 0.005


# Smaller pictures


def scales(model: Model) -> list[int]:
    return [scale for scale in (2, 4, 8) if scale <= synthesis.largest_scale(model.config)]


@pytest.mark.parametrize("kind", list(models.KINDS))
def test_a_smaller_picture_of_a_linear_decoder_is_its_mean(kind: str, tmp_path: Path) -> None:
    """Without residual blocks and renderers, a pixel is the mean of those that it stands for, except at borders."""
    trained = models.KINDS[kind]()
    with torch.no_grad():
        for part in trained.modules():
            if isinstance(part, (ResidualBlock, Renderer)):
                part.expand.weight.zero_()
                assert part.expand.bias is not None
                part.expand.bias.zero_()
    model = weights.load(models.save(trained, tmp_path / "linear.safetensors"))
    frame, generator = Frame(192, 128, 100), torch.Generator().manual_seed(0)
    for scale in scales(model):
        codes = random_codes(model, frame)
        layers = synthesis.layers_for(model.config, scale)
        for level, stage in enumerate(model.config.levels):
            kept = sum(piece.planes for piece in stage.slices if piece.layer < layers)
            codes[level][..., kept:] = 0
            codes[level][torch.rand(codes[level].shape, generator=generator) < 0.9] = 0  # few pixels are clipped
        with coding.exact(model):
            whole = synthesis.reconstruct(model, frame, codes)[0]
            small = synthesis.reconstruct(model, frame, codes, scale=scale)[0]
        blocks = whole.reshape(128 // scale, scale, 192 // scale, scale, 3)
        unclipped = ((blocks > 0) & (blocks < 255)).all((1, 3))
        border = 16 // scale
        inner = (slice(border, -border),) * 2
        gap = np.abs(small - blocks.mean((1, 3)))[inner][unclipped[inner]]
        assert len(gap) > 100 and gap.max() <= 1


def test_a_smaller_picture_looks_like_the_whole(model: Model) -> None:
    """Its size is rounded up, and a region of it is cut from it."""
    frame = Frame(WIDTH, HEIGHT, 60)
    codes = random_codes(model, frame)
    with coding.exact(model):
        whole = synthesis.reconstruct(model, frame, codes)[0]
        for scale in scales(model):
            small = synthesis.reconstruct(model, frame, codes, scale=scale)[0]
            assert small.shape == (-(-HEIGHT // scale), -(-WIDTH // scale), 3)
            region = Region(101, 55, 64, 33)
            part = synthesis.reconstruct(model, frame, codes, region, scale)[0]
            rows, columns = (slice(s.start // scale, -(-s.stop // scale)) for s in (region.rows, region.columns))
            gap = np.abs(part.astype(int) - small[rows, columns])
            assert part.shape == small[rows, columns].shape and gap.max() <= 1
            means = np.asarray(Image.fromarray(whole).reduce(scale), float)
            assert np.corrcoef(small.ravel(), means.ravel())[0, 1] > 0.7


@given(st.integers(1, 90), st.integers(1, 90), st.data())
@settings(deadline=None, derandomize=True, max_examples=50)
def test_alpha_follows(height: int, width: int, data: st.DataObject) -> None:
    left, top = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    region = Region(left, top, data.draw(st.integers(1, width - left)), data.draw(st.integers(1, height - top)))
    scale = data.draw(st.sampled_from([1, 2, 4, 8]))
    alpha = np.random.default_rng(0).integers(0, 256, (height, width)).astype(np.uint8)
    whole = image.reduced(alpha, None, scale)
    assert whole.shape == (-(-height // scale), -(-width // scale))
    rows, columns = (slice(s.start // scale, -(-s.stop // scale)) for s in (region.rows, region.columns))
    assert np.array_equal(image.reduced(alpha, region, scale), whole[rows, columns])


def test_files_decode_to_what_their_codes_do(model: Model) -> None:
    """At every scale, whole or in part, although only the codes that matter are decoded."""
    frame = Frame(WIDTH, HEIGHT, 60, tile=128)
    header = bitstream.Header.of(frame, model.id, model.config.layers)
    with coding.exact(model):
        segments = coding.encode(model, frame, random_codes(model, frame))[0]
    container = bitstream.read(bitstream.write(header, [], segments), max_pixels=None)
    codes = decoder.decode_codes([container], model)
    for scale in (1, *scales(model)):
        for region in (None, Region(101, 55, 64, 33)):
            with coding.exact(model):
                expected = synthesis.reconstruct(model, frame, codes, region, scale)[0]
            found = decoder.decode([container], model, region, scale)[0]
            assert np.abs(found.astype(int) - expected).max() <= 1, (scale, region)


# Pictures without codes


@pytest.mark.parametrize("size", [(1, 1), (205, 1300), (1411, 90), (900, 1000)])
def test_a_picture_without_codes_is_folded(
    size: tuple[int, int], model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is what its codes, which are all 0, decode to; no network sees all of a large one."""
    frame = Frame(size[1], size[0], 60)
    codes = coding.no_codes(model.config, frame)
    with coding.exact(model):
        expected = {scale: synthesis.reconstruct(model, frame, codes, scale=scale)[0] for scale in (1, *scales(model))}
        sides = []
        whole = synthesis.reconstruct
        monkeypatch.setattr(
            synthesis, "reconstruct", lambda m, f, *more: sides.append(max(f.width, f.height)) or whole(m, f, *more)
        )
        for scale, pixels in expected.items():
            (found,) = synthesis.blank(model, frame, scale)
            assert found.shape == pixels.shape and np.abs(found.astype(int) - pixels).max() <= 1
    assert max(sides) <= min(max(size), 800)


def test_a_file_without_codes(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = weights.load(path)
    frame = Frame(3000, 2000, 60, tile=1024)
    header = bitstream.Header.of(frame, model.id, model.config.layers)
    data = bitstream.write(header, [], [b""] * header.segments)
    monkeypatch.setattr(coding, "decode", lambda *_: pytest.fail("codes were decoded"))
    picture = vqcodec.decompress(data, weights=path)
    assert picture.size == (3000, 2000) and len(picture.crop((900, 900, 964, 964)).getcolors(4096) or []) <= 64


# The public API


@pytest.fixture(scope="module")
def path() -> Path:
    return models.tiny_weights()


@pytest.fixture(scope="module")
def data(path: Path) -> bytes:
    pixels = np.dstack([models.picture(100, 150), np.full((100, 150), 200, np.uint8)])
    return vqcodec.compress(pixels, quality=50, weights=path)


def test_decompress_a_part_and_a_scale(data: bytes, path: Path) -> None:
    whole = vqcodec.decompress(data, weights=path)
    part = vqcodec.decompress(data, weights=path, region=(20, 31, 40, 50))
    assert (part.mode, part.size) == ("RGBA", (40, 50))
    assert np.abs(np.asarray(part).astype(int) - np.asarray(whole.crop((20, 31, 60, 81)))).max() <= 1
    small = vqcodec.decompress(data, weights=path, scale=4)
    assert (small.mode, small.size) == ("RGBA", (38, 25))
    assert vqcodec.decompress(data, weights=path, region=(20, 31, 40, 50), scale=4).size == (10, 14)


def test_decompress_to_grey(data: bytes, path: Path) -> None:
    whole = vqcodec.decompress(data, weights=path)
    grey = vqcodec.decompress(data, weights=path, grey=True)
    assert grey.mode == "LA" and np.array_equal(np.asarray(grey.getchannel("L")), np.asarray(whole.convert("L")))


def test_shades_of_grey_are_those_of_the_colours_that_are_shown() -> None:
    """Pixels with a profile become sRGB first."""
    space = colour.stated(CodePoints(12, 13, 0, True), {})  # Display P3
    assert space is not None
    icc = space.profile(grey=False)
    picture = image.Picture(np.full((4, 4, 3), (200, 40, 40), np.uint8), icc=icc)
    grey = image.to_grey(picture)
    shown = Image.fromarray(colour.to_srgb(picture.pixels, icc, grey=False)).convert("L")
    assert grey.grey and grey.icc is None and np.array_equal(grey.pixels[..., 1], np.asarray(shown))
    assert not np.array_equal(np.asarray(shown), np.asarray(Image.fromarray(picture.pixels).convert("L")))


@pytest.mark.parametrize("region", [(0, 0, 151, 1), (0, 100, 1, 1), (0, 0, 0, 5), (150, 0, 1, 1), (-1, 0, 2, 1)])
def test_a_region_outside_is_refused(region: tuple[int, int, int, int], data: bytes, path: Path) -> None:
    with pytest.raises(ImageError, match=r"the region .* is not inside the picture of 150 x 100 pixels"):
        vqcodec.decompress(data, weights=path, region=region)


def test_wrong_arguments_are_refused(data: bytes, path: Path) -> None:
    with pytest.raises(ValueError, match="scale must be one of 1, 2, 4, 8, got 3"):
        vqcodec.decompress(data, weights=path, scale=3)
    for scale in (2.0, True, "2"):
        with pytest.raises(ValueError, match="scale must be an integer from 1, got"):
            vqcodec.decompress(data, weights=path, scale=scale)  # type: ignore[arg-type]
    for region in ((1, 2, 3), 5, "1,2,3,4"):
        with pytest.raises(ValueError, match=r"region must be \(left, top, width, height\), got"):
            vqcodec.decompress(data, weights=path, region=region)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="region must be integers, got 0.5"):
        vqcodec.decompress(data, weights=path, region=(0.5, 0, 1, 1))  # type: ignore[arg-type]


def test_coarse_codes_bound_the_scale(tmp_path: Path) -> None:
    path = models.save(models.raster(layers=2), tmp_path / "raster.safetensors")
    stride = weights.load(path).config.levels[-1].stride
    data = vqcodec.compress(models.picture(40, 40), weights=path)
    assert stride < 8
    with pytest.raises(WeightsError, match=f"these weights decode to no less than 1/{stride} of the size"):
        vqcodec.decompress(data, weights=path, scale=8)
