"""Files that were made once and must be read for ever: to the same codes everywhere, and to the same pixels within one.

tests/golden/renew.py made them; it is not for files of a format version that has been released.
"""

import runpy
from pathlib import Path

import models
import numpy as np
import pytest
import reference
import torch
from PIL import Image

from vqcodec import bitstream, codec, decoder, weights
from vqcodec.errors import (
    ChecksumError,
    HeaderError,
    LimitError,
    NotVqzError,
    TrailingDataError,
    TruncatedError,
    VersionError,
    VqcodecError,
    WeightsError,
)

GOLDEN = Path(__file__).parent / "golden"
# The files, and the weights of each.
WEIGHTS = {
    "tiny": GOLDEN / "tiny.safetensors",
    "grey": GOLDEN / "tiny.safetensors",
    "raster": GOLDEN / "raster.safetensors",
}

BAD: dict[str, tuple[type[VqcodecError], str]] = {
    "alpha-of-another-size": (ChecksumError, "alpha has 9 x 9 pixels, the picture 72 x 40"),
    "chunk-flipped": (ChecksumError, "chunk 1 of 1"),
    "cut-after-a-segment": (TruncatedError, "segment 4 of 6"),
    "cut-after-chunks": (TruncatedError, "segment 1 of 6"),
    "cut-after-header": (TruncatedError, "chunk count"),
    "cut-in-a-segment": (TruncatedError, "segment 6 of 6"),
    "cut-in-chunk": (TruncatedError, "chunk 1 of 1"),
    "cut-in-header": (TruncatedError, "20 bytes"),
    "empty": (TruncatedError, "0 bytes"),
    "header-flipped": (HeaderError, "header check"),
    "huge": (LimitError, "the limit is 400000000"),
    "magic-flipped": (NotVqzError, "starts with 16 51"),
    "other-layers": (HeaderError, "2 layers, its weights have 3"),
    "other-weights": (WeightsError, "made with weights 00000000"),
    "png": (NotVqzError, "starts with 89 50"),
    "segment-flipped": (ChecksumError, "segment 1 of 6"),
    "segments-swapped": (ChecksumError, "segment 1 of 6"),
    "trailing-byte": (TrailingDataError, "ends at byte"),
    "undecodable": (ChecksumError, "do not decode"),
    "version-2": (VersionError, "2"),
}


def golden_codes(name: str) -> list[torch.Tensor]:
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as arrays:
        return [torch.from_numpy(arrays[f"level{n}"]) for n in range(len(arrays.files))]


def golden_files(folder: Path) -> set[str]:
    """What `renew` writes; photo/ is for tests/test_golden_photo.py."""
    paths = (p.relative_to(folder) for p in folder.rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc"))
    return {str(path) for path in paths if path.parts[0] != "photo"}


@pytest.fixture(params=WEIGHTS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def data(name: str) -> bytes:
    return (GOLDEN / f"{name}.vqz").read_bytes()


def test_codes(name: str, data: bytes) -> None:
    found = [level[0] for level in decoder.decode_codes([bitstream.read(data)], weights.load(WEIGHTS[name]))]
    expected = golden_codes(name)
    assert [c.shape for c in found] == [c.shape for c in expected]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert all(float((c > 0).float().mean()) > 0.02 for c in found), "a golden file of zeros would prove nothing"


def test_codes_by_the_second_reader(name: str, data: bytes) -> None:
    """FORMAT.md, followed with whole numbers and nothing of the package, comes to the same codes."""
    container = bitstream.read(data)
    header = container.header
    loaded = reference.Weights(WEIGHTS[name])
    unit = loaded.levels[0]["stride"]
    boxes = header.frame.tiles()
    for number, (top, left, height, width) in enumerate(boxes):
        height, width = -(-height // unit) * unit, -(-width // unit) * unit
        segments = [segment for segment in container.segments[number :: len(boxes)] if segment is not None]
        decoded = reference.Tile(loaded, header.quality).decode(segments, height, width)
        for found, expected, level in zip(decoded, golden_codes(name), loaded.levels, strict=True):
            rows = slice(top // level["stride"], (top + height) // level["stride"])
            columns = slice(left // level["stride"], (left + width) // level["stride"])
            assert np.array_equal(found, expected[rows, columns].numpy())


def test_encoding_the_codes_gives_the_file(name: str, data: bytes) -> None:
    """Byte for byte, on every machine; only the choice of codes is made with floats."""
    container, codes = bitstream.read(data), [level[None] for level in golden_codes(name)]
    segments = models.encode_codes(weights.load(WEIGHTS[name]), container.header, codes)
    assert bitstream.write(container.header, container.chunks, segments) == data


def test_pixels(name: str, data: bytes) -> None:
    found = codec.decompress(data, weights=WEIGHTS[name])
    with Image.open(GOLDEN / f"{name}.png") as expected:
        assert (found.mode, found.size) == (expected.mode, expected.size)
        gap = np.abs(np.asarray(found).astype(int) - np.asarray(expected))
    assert int(gap.max()) <= 1
    assert float((gap > 0).mean()) < 0.05


def test_metadata() -> None:
    found = codec.decode_picture((GOLDEN / "tiny.vqz").read_bytes(), weights=WEIGHTS["tiny"])
    assert found.xmp == b"<x:xmpmeta/>"
    header = bitstream.read_header((GOLDEN / "tiny.vqz").read_bytes())
    assert (header.width, header.height, header.tiles, header.layers) == (72, 40, (1, 2), 3)
    found = codec.decode_picture((GOLDEN / "grey.vqz").read_bytes(), weights=WEIGHTS["tiny"])
    assert found.grey and found.alpha is not None
    assert (found.alpha == np.arange(33) * 7).all()


@pytest.mark.parametrize("file", sorted(BAD))
def test_bad_files(file: str) -> None:
    error, message = BAD[file]
    data = (GOLDEN / "bad" / f"{file}.vqz").read_bytes()
    with pytest.raises(error, match=message) as caught:
        codec.decode_picture(data, weights=WEIGHTS["tiny"])
    assert caught.type is error
    assert "\n" not in str(caught.value)


def test_every_bad_file_is_tried() -> None:
    assert {path.stem for path in (GOLDEN / "bad").iterdir()} == set(BAD)


def test_files_are_small() -> None:
    assert all(path.stat().st_size < 250_000 for path in WEIGHTS.values())
    assert sum((GOLDEN / name).stat().st_size for name in golden_files(GOLDEN)) < 450_000


def test_renewing_makes_every_file(tmp_path: Path) -> None:
    """On another machine the encoder may choose otherwise, but what it writes decodes to what stands beside it."""
    runpy.run_path(str(GOLDEN / "renew.py"))["renew"](tmp_path)

    assert golden_files(tmp_path) == golden_files(GOLDEN)
    codes = decoder.decode_codes(
        [bitstream.read((tmp_path / "tiny.vqz").read_bytes())], weights.load(tmp_path / "tiny.safetensors")
    )
    with np.load(tmp_path / "tiny.npz", allow_pickle=False) as arrays:
        assert np.array_equal(arrays["level1"], codes[1][0])
