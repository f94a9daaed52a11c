"""Files of the packaged photo weights that were made once: what the program is released with must go on reading them.

`python tests/golden/renew.py --photo` made them and makes them anew when the weights are replaced.
"""

import json

import models
import numpy as np
import pytest
from golden import renew
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vqcodec import bitstream, codec, decoder, metrics, packaged, synthesis, weights
from vqcodec.weights import Model

PHOTO = renew.HERE / "photo"


@pytest.fixture(scope="module")
def expected() -> dict[str, str]:
    found: dict[str, str] = json.loads((PHOTO / "expected.json").read_text(encoding="utf-8"))
    return found


@pytest.fixture(scope="module")
def model(expected: dict[str, str]) -> Model:
    loaded = weights.load(packaged.find())
    if loaded.id.hex() != expected["weights"]:
        pytest.fail(
            f"weights/photo.safetensors are {loaded.id.hex()}, tests/golden/photo was made with {expected['weights']}: "
            "make it anew with `python tests/golden/renew.py --photo`"
        )
    return loaded


@pytest.fixture(params=list(renew.PHOTOS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def data(name: str) -> bytes:
    return (PHOTO / f"{name}.vqz").read_bytes()


def codes_of(data: bytes, model: Model, partial: bool = False) -> list[Tensor]:
    return decoder.decode_codes([bitstream.read(data, partial=partial)], model)


def check_pixels(found: NDArray[np.uint8], file: str) -> None:
    """Float arithmetic may differ by one between machines, and rarely does."""
    with Image.open(PHOTO / file) as picture:
        gap = np.abs(found.astype(int) - np.asarray(picture))
    assert int(gap.max()) <= 1
    assert float((gap > 0).mean()) < 0.05


def test_codes(name: str, data: bytes, model: Model, expected: dict[str, str]) -> None:
    codes = codes_of(data, model)
    assert renew.hash_of(codes) == expected[name]
    assert all(float((level > 0).float().mean()) > 0.02 for level in codes), "a file of zeros would prove nothing"


def test_encoding_the_codes_gives_the_file(data: bytes, model: Model) -> None:
    """Byte for byte, on every machine; only the choice of codes is made with floats."""
    container = bitstream.read(data)
    segments = models.encode_codes(model, container.header, codes_of(data, model))
    assert bitstream.write(container.header, container.chunks, segments) == data


@pytest.mark.parametrize(("look", "suffix"), [("faithful", ""), ("natural", ".natural")])
def test_pixels(name: str, look: str, suffix: str, data: bytes, model: Model) -> None:
    restored = codec.decode_picture(data, look=look)
    assert not restored.notes
    check_pixels(restored.pixels, f"{name}{suffix}.png")


@pytest.mark.parametrize(("look", "suffix"), [("faithful", ""), ("natural", ".natural")])
def test_bands_leave_no_seams(
    look: str, suffix: str, data: bytes, name: str, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bands of a row of positions overlap by as much as the real local layers see, those of the look as well."""
    monkeypatch.setitem(synthesis.BAND_PIXELS, "cpu", 1)
    check_pixels(codec.decode_picture(data, look=look).pixels, f"{name}{suffix}.png")


def test_looks_differ_in_pixels_only(name: str, data: bytes, model: Model) -> None:
    natural = weights.load(packaged.find(), look=packaged.find_look(packaged.find(), "natural"))
    assert natural.id == model.id
    for a, b in zip(codes_of(data, model), codes_of(data, natural), strict=True):
        assert a.equal(b)
    with Image.open(PHOTO / f"{name}.png") as one, Image.open(PHOTO / f"{name}.natural.png") as other:
        assert 25 < metrics.psnr(np.asarray(one), np.asarray(other)) < 50


def test_damaged(model: Model) -> None:
    """Of a file cut within a layer and with a damaged tile, the codes that are left are those of the whole file."""
    good = (PHOTO / "visual.vqz").read_bytes()
    bad, left = renew.damaged(good)
    header = bitstream.read_header(good)
    rows, columns = -(-header.height // header.tile), -(-header.width // header.tile)
    assert (rows, columns, header.layers) == (3, 4, 4)
    per_layer = np.array(left).reshape(header.layers, rows, columns)
    there = np.logical_and.accumulate(per_layer)  # a layer is of no use without those before it
    assert [int(layer.sum()) for layer in there] == [12, 11, 5, 0]
    found = codes_of(bad, model, partial=True)
    for whole, part, stage in zip(codes_of(good, model), found, model.config.levels, strict=True):
        side = header.tile // stage.stride
        for piece, span in zip(stage.slices, stage.spans, strict=True):
            seen = np.kron(there[piece.layer], np.ones((side, side), int))[: part.shape[1], : part.shape[2], None]
            assert np.array_equal(part[..., span], whole[..., span].numpy() * seen)
    restored = codec.decode_picture(bad, partial=True)
    assert [note.split(" is ")[0].split(" ends ")[0] for note in restored.notes] == [
        "segment 18 of 48",
        "the CRC-32 of segment 31 of 48",
    ]
    check_pixels(restored.pixels, "visual.damaged.png")


def test_compressing_now(name: str, data: bytes, model: Model) -> None:
    """Another machine may round a choice otherwise. That changes a few codes, but not the size or the picture."""
    picture, options = renew.PHOTOS[name]
    file = codec.compress(picture, verify=True, **options)
    assert bitstream.read_header(file) == bitstream.read_header(data)
    assert len(file) == pytest.approx(len(data), rel=0.01)
    for now, then in zip(codes_of(file, model), codes_of(data, model), strict=True):
        assert float((now == then).float().mean()) > 0.99
    now, then = (metrics.psnr(picture.pixels, codec.decode_picture(f).pixels) for f in (file, data))
    assert now == pytest.approx(then, abs=0.1)


def test_tunes_differ() -> None:
    """Neither golden file was made with a tune that has no effect."""
    assert {options["tune"] for _, options in renew.PHOTOS.values()} == set(packaged.TUNES)
    picture, options = renew.PHOTOS["psnr"]
    file = codec.compress(picture, **{**options, "tune": "visual"})
    assert file != (PHOTO / "psnr.vqz").read_bytes()


def test_files_are_there_and_small() -> None:
    names = {"expected.json", "visual.damaged.png"}
    names |= {name + end for name in renew.PHOTOS for end in (".vqz", ".png", ".natural.png")}
    assert {path.name for path in PHOTO.iterdir()} == names
    assert sum(path.stat().st_size for path in PHOTO.iterdir()) < 250_000
