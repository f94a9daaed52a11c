"""Pictures that go through the networks together: their files and pixels are those of pictures alone."""

from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
import torch
from models import picture
from PIL import Image

import vqcodec
from vqcodec import bitstream, codec, coding, decoder, encoder, synthesis, weights
from vqcodec.errors import FormatError, ImageError, WeightsError
from vqcodec.frame import Frame
from vqcodec.target import Target


@pytest.fixture(scope="module", params=list(models.KINDS))
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.save(models.KINDS[request.param](), tmp_path_factory.mktemp("weights") / "many.safetensors")


def sources() -> list[Any]:
    """Of three sizes, with alpha and metadata, in colour and grey, none beside one of its size."""
    colour = [picture(70, 90, seed=seed) for seed in range(3)]
    alpha = np.dstack([colour[0][::-1], colour[1][:, :, 0]])
    exif = Image.Exif()
    exif[0x010E] = "a description"
    described = Image.fromarray(colour[2])
    described.info["exif"] = exif.tobytes()
    grey, grey_too = picture(70, 90, seed=5)[:, :, 0], picture(70, 90, seed=6)[:, :, 0]
    return [colour[0], picture(33, 20), grey, described, picture(1, 1), alpha, picture(33, 20, seed=9), grey_too]


def near(found: Image.Image, expected: Image.Image) -> bool:
    gap = np.abs(np.asarray(found).astype(int) - np.asarray(expected))
    return found.mode == expected.mode and int(gap.max()) <= 1 and float((gap > 0).mean()) < 0.005


@pytest.mark.parametrize("options", [{}, {"quality": 80, "tile": 64, "verify": True}], ids=str)
def test_files_are_those_of_pictures_alone(options: dict[str, Any], path: Path) -> None:
    found = vqcodec.compress_many(sources(), weights=path, **options)
    for data, source in zip(found, sources(), strict=True):
        alone = vqcodec.compress(source, weights=path, **options)
        assert bitstream.read_header(data) == bitstream.read_header(alone)
        assert bitstream.read(data).chunks == bitstream.read(alone).chunks
        ours, theirs = (decoder.decode_codes([bitstream.read(x)], weights.load(path)) for x in (data, alone))
        # A choice may fall the other way in a rare tie, and what follows it with it.
        assert all(float((a != b).float().mean()) < 0.01 for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("options", [{}, {"grey": True}, {"region": (0, 0, 1, 1)}, {"scale": 2}], ids=str)
def test_pictures_are_those_of_files_alone(options: dict[str, Any], path: Path) -> None:
    files = [vqcodec.compress(source, weights=path) for source in sources()]
    for found, data in zip(vqcodec.decompress_many(files, weights=path, **options), files, strict=True):
        alone = vqcodec.decompress(data, weights=path, **options)
        assert near(found, alone)
        assert found.info.get("exif") == alone.info.get("exif")


def test_codes_are_exact(path: Path) -> None:
    """What the range coder says does not depend on the company, not even on that of missing segments."""
    model, frame = weights.load(path), Frame(150, 100, 60, 64)
    pixels = np.stack([picture(100, 150, seed=seed) for seed in range(3)])
    rng = np.random.default_rng(1)
    with coding.exact(model):
        segments, codes = encoder.encode(model, frame, pixels)
        assert coding.encode(model, frame, codes) == segments
        left = [[data if rng.random() < 0.8 else None for data in own] for own in segments]
        together = coding.decode(model, frame, left)
        for number, own in enumerate(left):
            alone = coding.decode(model, frame, [own])
            assert all(torch.equal(a[number], b[0]) for a, b in zip(together, alone, strict=True))
            assert coding.encode(model, frame, [c[number, None] for c in codes]) == [segments[number]]


def test_pictures_of_one_size_go_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most so many pixels of them, whatever lies between them."""
    seen: list[int] = []
    analyse, reconstruct = synthesis.analyse, synthesis.reconstruct
    monkeypatch.setattr(synthesis, "analyse", lambda m, p, q: seen.append(len(p)) or analyse(m, p, q))
    monkeypatch.setattr(
        synthesis, "reconstruct", lambda m, f, c, *a: seen.append(len(c[0])) or reconstruct(m, f, c, *a)
    )
    path = models.tiny_weights()
    files = vqcodec.compress_many(sources(), weights=path)
    assert sorted(seen) == [1, 2, 2, 3]
    seen.clear()
    vqcodec.decompress_many(files, weights=path)
    assert sorted(seen) == [1, 2, 2, 3]
    seen.clear()
    monkeypatch.setattr(codec, "GROUP_PIXELS", 2 * 70 * 90)
    vqcodec.compress_many(sources(), weights=path)
    assert sorted(seen) == [1, 1, 2, 2, 2]


def test_no_pictures() -> None:
    assert vqcodec.compress_many([]) == vqcodec.decompress_many([]) == []


def test_a_search_takes_pictures_one_by_one() -> None:
    path, pictures = models.tiny_weights(), [picture(40, 50), picture(40, 50, seed=1)]
    options: list[dict[str, Any]] = [{"target": Target("bpp", 0.8)}, {"max_size": 300}, {"quality": 60, "effort": 2}]
    for chosen in options:
        expected = [vqcodec.compress(source, weights=path, **chosen) for source in pictures]
        assert vqcodec.compress_many(pictures, weights=path, **chosen) == expected


def test_files_of_several_weights(tmp_path: Path) -> None:
    """Each file is decoded by its own weights if these are packaged; weights that are named must fit all of them."""
    names = ("photo", "vqvae-ema-cifar10")
    files = [vqcodec.compress(picture(40, 50), weights=name) for name in names]
    for found, data in zip(vqcodec.decompress_many(files), files, strict=True):
        assert near(found, vqcodec.decompress(data))
    with pytest.raises(WeightsError):
        vqcodec.decompress_many(files, weights="photo")


def test_files_without_codes_among_others() -> None:
    model, path = models.tiny_model(), models.tiny_weights()
    files = [vqcodec.compress(picture(64, 64, seed=seed), weights=path) for seed in range(2)]
    header = bitstream.read_header(files[0])
    files.insert(1, bitstream.write(header, [], [b""] * header.segments))
    found = vqcodec.decompress_many(files, weights=path)
    assert all(near(a, vqcodec.decompress(data, weights=path)) for a, data in zip(found, files, strict=True))
    assert header.weights_id == model.id


def test_what_fails_raises_and_what_is_lost_is_said() -> None:
    path = models.tiny_weights()
    good = vqcodec.compress(picture(40, 50), weights=path)
    bad = good[:-3] + bytes(3)
    with pytest.raises(FormatError):
        vqcodec.decompress_many([good, bad], weights=path)
    with pytest.warns(UserWarning, match="segment"):
        found = vqcodec.decompress_many([good, bad], weights=path, partial=True)
    assert near(found[0], vqcodec.decompress(good, weights=path))
    with pytest.raises(ImageError):
        vqcodec.compress_many([picture(40, 50), np.zeros((0, 3, 3), np.uint8)], weights=path)
    with pytest.raises(ValueError, match="quality"):
        vqcodec.compress_many([picture(40, 50)], weights=path, quality=101)
