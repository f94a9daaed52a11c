"""Compress and decompress, whole: every size and kind of picture, damage, tiles and bands."""

import dataclasses
import functools
import io
import math
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
import torch
from models import TINY, Pixels, picture
from PIL import Image, ImageCms, features

from vqcodec import bitstream, codec, coding, decoder, image, synthesis
from vqcodec.bitstream import Chunk, Container, Header, read_info
from vqcodec.entropy import Encoder, Table
from vqcodec.errors import ChecksumError, FormatError, HeaderError, ImageError, LimitError, TargetError, WeightsError
from vqcodec.frame import Frame
from vqcodec.image import Picture
from vqcodec.metrics import psnr
from vqcodec.models.config import Config, SliceConfig, StageConfig
from vqcodec.models.recipes import VQVAE2
from vqcodec.ssimulacra2 import ssimulacra2
from vqcodec.target import Target
from vqcodec.weights import load


def compress(source: Any, **options: Any) -> bytes:
    return codec.compress(source, weights=models.tiny_weights(), **options)


def decompress(data: bytes, **options: Any) -> Image.Image:
    return codec.decompress(data, weights=models.tiny_weights(), **options)


def decode(data: bytes, **options: Any) -> Picture:
    return codec.decode_picture(data, weights=models.tiny_weights(), **options)


def error(a: Pixels, b: Pixels) -> float:
    """Root mean squared."""
    return float(np.sqrt(np.mean((a.astype(float) - b) ** 2)))


@functools.cache
def tiled() -> tuple[Pixels, bytes]:
    """A picture of 2 x 3 tiles, and its file. Not to be changed."""
    source = picture(128, 180, seed=40)
    return source, compress(source, tile=64)


# Pictures


SIZES = [
    (1, 1),
    (1, 2),
    (2, 1),
    (1, 97),
    (89, 1),
    (3, 200),
    (7, 13),
    (31, 33),
    (32, 32),
    (33, 31),
    (64, 64),
    (101, 103),
]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("tile", [0, 64])
def test_every_size(size: tuple[int, int], tile: int) -> None:
    source = picture(*size, seed=41)
    data = compress(source, quality=70, tile=tile, verify=True)
    restored = decompress(data)
    assert (restored.mode, restored.size) == ("RGB", size[::-1])
    assert error(np.asarray(restored), source) < 15
    header = bitstream.read_header(data)
    assert (header.height, header.width, header.quality, header.tile) == (*size, 70, tile)


def test_quality_is_a_knob() -> None:
    source = picture(96, 128, seed=42)
    sizes, ratios = [], []
    for quality in (1, 25, 50, 75, 100):
        data = compress(source, quality=quality)
        sizes.append(len(data))
        ratios.append(psnr(source, decode(data).pixels))
    assert sizes == sorted(sizes) and ratios == sorted(ratios)
    assert sizes[-1] > 3 * sizes[0] and ratios[-1] > ratios[0] + 6


def test_same_picture_same_bytes() -> None:
    source = picture(50, 70)
    assert compress(source) == compress(source) == compress(Image.fromarray(source))


def test_autocast_around_the_codec_changes_nothing() -> None:
    """In bfloat16 the prior's integers would not be integers."""
    source = picture(50, 70)
    data = compress(source)
    with torch.autocast("cpu", torch.bfloat16):
        assert compress(source, verify=True) == data
        assert np.array_equal(decode(data).pixels, decode(data).pixels)
        codes = decoder.decode_codes([bitstream.read(data)], models.tiny_model())
    for found, expected in zip(codes, decoder.decode_codes([bitstream.read(data)], models.tiny_model()), strict=True):
        assert torch.equal(found, expected)


def test_grey_stays_grey() -> None:
    source = picture(40, 50)[..., 1]
    restored = decompress(compress(Image.fromarray(source), quality=80))
    assert restored.mode == "L"
    assert error(np.asarray(restored), source) < 8
    found = decode(compress(source))
    assert found.grey
    assert (found.pixels == found.pixels[..., :1]).all()
    assert bitstream.read_header(compress(source)).grey


@pytest.mark.parametrize(("mode", "shape"), [("L", ()), ("L", (1,)), ("RGB", (3,)), ("RGBA", (4,))])
def test_arrays(mode: str, shape: tuple[int, ...]) -> None:
    values = picture(20, 30)
    channels = np.concatenate([values, values[..., :1]], 2)
    array = channels[..., 0].reshape(20, 30, *shape) if mode == "L" else channels[..., : shape[0]]
    expected = compress(Image.fromarray(array.squeeze(), mode=None))
    assert decompress(expected).mode == mode
    assert compress(array) == expected
    mirrored = np.ascontiguousarray(array[:, ::-1])
    mirrored.flags.writeable = False
    assert compress(mirrored[:, ::-1]) == expected, "strides and read-only arrays must not matter"


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4, 3)),
        np.zeros((4, 4, 3), np.uint16),
        np.zeros((4, 4, 2), np.uint8),
        np.zeros((4, 4, 5), np.uint8),
        np.zeros(4, np.uint8),
        np.zeros((1, 4, 4, 3), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
    ],
    ids=lambda a: f"{a.dtype}{a.shape}",
)
def test_other_arrays_are_refused(array: Pixels) -> None:
    with pytest.raises(ImageError, match="expected uint8"):
        compress(array)


def test_names_of_files_are_refused() -> None:
    with pytest.raises(ImageError, match="expected a Pillow image, an array or a Picture, got str"):
        compress("photo.png")
    with pytest.raises(TypeError, match=r"expected the bytes of a \.vqz file, got str"):
        decompress("photo.vqz")  # type: ignore[arg-type]


def test_pictures_with_odd_strides() -> None:
    source = picture(20, 30)
    expected = compress(np.ascontiguousarray(source[::-1, ::-1]))
    assert compress(Picture(source[::-1, ::-1])) == expected
    frozen = np.ascontiguousarray(source[::-1, ::-1])
    frozen.flags.writeable = False
    assert compress(Picture(frozen)) == expected


def test_metadata_and_alpha_survive() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exif = Image.Exif()
    exif[0x010F] = "maker"
    source = Picture(
        picture(30, 41),
        alpha=picture(30, 41, seed=2)[..., 0].copy(),
        icc=profile,
        exif=exif.tobytes().removeprefix(b"Exif\0\0"),
        xmp=b"<x:xmpmeta/>",
    )
    found = decode(compress(source))
    assert (found.icc, found.exif, found.xmp, found.notes) == (source.icc, source.exif, source.xmp, ())
    assert found.alpha is not None and np.array_equal(found.alpha, source.alpha)
    back = decompress(compress(image.to_pil(source)))
    assert back.mode == "RGBA"
    assert back.info["icc_profile"] == profile
    assert back.getexif()[0x010F] == "maker"
    assert np.array_equal(np.asarray(back)[..., 3], source.alpha)


def test_alpha_larger_than_pillow_opens(monkeypatch: pytest.MonkeyPatch) -> None:
    source = Picture(picture(20, 30), alpha=picture(20, 30)[..., 0])
    data = compress(source)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 250)
    found = decode(data).alpha
    assert found is not None and np.array_equal(found, source.alpha)


def test_grey_with_alpha() -> None:
    values = picture(25, 20)
    source = Image.fromarray(values[..., 0])
    source.putalpha(Image.fromarray(values[..., 1]))
    restored = decompress(compress(source))
    assert restored.mode == "LA"
    assert np.array_equal(np.asarray(restored)[..., 1], values[..., 1])


@pytest.mark.parametrize(
    ("target", "reached"),
    [
        (Target("size", 400), lambda data, _: math.log(len(data) / 400) / 0.011),
        (Target("bpp", 0.5), lambda data, _: math.log(8 * len(data) / (64 * 96) / 0.5) / 0.011),
        (Target("psnr", 32), lambda data, source: (psnr(source, decode(data).pixels) - 32) / 0.05),
        (Target("ssimulacra2", 70), lambda data, source: (ssimulacra2(source, decode(data).pixels) - 70) / 0.5),
    ],
)
def test_target(target: Target, reached: Callable[[bytes, Pixels], float]) -> None:
    source = picture(64, 96)
    data = compress(source, target=target)
    assert abs(reached(data, source)) < 1
    plain = compress(source, quality=read_info(data).header.quality)
    assert abs(reached(data, source)) <= abs(reached(plain, source))


@pytest.mark.parametrize("effort", [1, 2])
def test_a_size_between_those_of_two_qualities(effort: int) -> None:
    source = picture(128, 160)
    below, above = (len(compress(source, quality=q, effort=effort)) for q in (70, 72))
    wanted = round((2 * below + above) / 3)
    data = compress(source, target=Target("size", wanted), effort=effort)
    assert abs(len(data) - wanted) <= 8, "two words of the range coder"
    assert psnr(source, decode(data).pixels) > psnr(source, decode(compress(source, quality=66)).pixels)


def test_max_size() -> None:
    source = picture(64, 96)
    sizes = [len(compress(source, quality=q)) for q in (61, 62, 63)]
    limit = sizes[1]
    assert sizes[0] < limit < sizes[2]
    for options in ({}, {"quality": 90}, {"target": Target("size", 1.4 * limit)}):
        best = compress(source, max_size=limit, **options)
        assert len(best) == limit and read_info(best).header.quality in (62, 63)
    between = (2 * limit + sizes[2]) // 3
    for options in ({}, {"quality": 90}, {"target": Target("psnr", 40)}, {"effort": 2}):
        best = compress(source, max_size=between, **options)
        assert between - 8 < len(best) <= between, "two words of the range coder"
    assert read_info(compress(source, quality=20, max_size=limit)).header.quality == 20
    assert read_info(compress(source, max_size=10**9)).header.quality == 100
    with pytest.raises(TargetError, match="no file has at most 50 bytes: the smallest has"):
        compress(source, max_size=50)


def test_levels(tmp_path: Path) -> None:
    source, weights = picture(70, 90), models.tuned_weights(tmp_path)
    coarse, fine = codec.reconstruct(Picture(source), quality=80, weights=weights)
    data = codec.compress(source, quality=80, weights=weights)
    assert data != compress(source, quality=80), "tuned for the eye"
    assert np.array_equal(fine, decode(data).pixels)
    first = bitstream.read_info(data).layer_bytes[0]
    rest = sum(bitstream.read_info(data).layer_bytes) - first
    assert np.array_equal(coarse, decode(data[: len(data) - rest], partial=True).pixels)
    assert psnr(source, coarse) < psnr(source, fine)


def test_warnings_point_at_the_caller() -> None:
    with pytest.warns(UserWarning, match="CMYK") as caught:
        codec.compress(Image.new("CMYK", (8, 8)), weights=models.tiny_weights())
    assert [warning.filename for warning in caught] == [__file__]


def test_targets_that_are_none() -> None:
    with pytest.raises(ValueError, match="quality and target exclude each other"):
        compress(picture(8, 8), quality=50, target=Target("bpp", 1))
    for limit in (0, 1.5):
        with pytest.raises(ValueError, match="max_size must be an integer from 1, got"):
            compress(picture(8, 8), max_size=limit)
    with pytest.raises(TargetError, match="SSIMULACRA2 needs 8 pixels a side, the picture has 9 x 7"):
        compress(picture(7, 9), target=Target("ssimulacra2", 70))


@pytest.mark.parametrize("quality", [0, 101, -5, True, 50.0, np.float32(50), "50"], ids=repr)
def test_quality_out_of_range(quality: Any) -> None:
    with pytest.raises(ValueError, match="quality must be an integer from 1 to 100"):
        compress(picture(8, 8), quality=quality)


def test_integers_of_numpy_are_integers() -> None:
    source = picture(64, 64)
    plain = compress(source, quality=40, tile=64, effort=1, max_size=10**6)
    given = (np.int64(40), np.uint8(64), np.int8(1), np.int32(10**6))
    assert compress(source, **dict(zip(("quality", "tile", "effort", "max_size"), given, strict=True))) == plain


@pytest.mark.parametrize("tile", [-64, 1, 32, 100, 255 * 64 + 64, 64.0])
def test_tile_out_of_range(tile: Any) -> None:
    with pytest.raises(ValueError, match="tile must be (0 or a multiple of 64|an integer from 0 to 16320), got"):
        compress(picture(8, 8), tile=tile)


# Other models


THREE_LEVELS = Config(
    "three",
    (
        StageConfig(4, 24, 8, 1, 1, (SliceConfig(planes=3, dim=8, codes=32, layer=2, rows=12),)),
        StageConfig(16, 16, 8, 0, 1, (SliceConfig(4, 1, 64, 1, rows=40), SliceConfig(6, 2, 32, 1, rows=2))),
        StageConfig(128, 8, 8, 1, 0, (SliceConfig(planes=8, dim=1, codes=256, layer=0, rows=128),)),
    ),
    prior=dataclasses.replace(TINY.prior, blocks=2),
)


@pytest.mark.parametrize(
    ("config", "size", "tile"), [(THREE_LEVELS, (90, 140), 128), (VQVAE2, (40, 70), 64)], ids=["three", "vqvae2"]
)
def test_any_hierarchy(config: Config, size: tuple[int, int], tile: int, tmp_path: Path) -> None:
    """More than two levels, several slices a layer, and the layout of the paper."""
    weights = models.save(models.tiny(config), tmp_path / "other.safetensors")
    source = picture(*size, seed=43)
    for side in (0, tile):
        data = codec.compress(source, weights=weights, tile=side, quality=60, verify=True)
        restored = codec.decode_picture(data, weights=weights).pixels
        assert psnr(source, restored) > 18
    if config.multiple > 64:
        with pytest.raises(ValueError, match="tile must be 0 or a multiple of 128"):
            codec.compress(source, weights=weights, tile=64)
        container = bitstream.read(data)
        header = dataclasses.replace(container.header, tile=64)
        crafted = bitstream.write(header, (), [b""] * header.segments)
        with pytest.raises(HeaderError, match="tile is 64"):
            codec.decode_picture(crafted, weights=weights)


def test_weights_of_another_id(tmp_path: Path) -> None:
    data = compress(picture(8, 8))
    other = models.save(models.tiny(seed=9), tmp_path / "other.safetensors")
    with pytest.raises(WeightsError, match="made with weights [0-9a-f]{8}, these are [0-9a-f]{8}"):
        codec.decompress(data, weights=other)
    with pytest.raises(WeightsError, match="no weights file"):
        codec.decompress(data, weights=tmp_path / "nowhere")


def test_another_number_of_layers() -> None:
    header = Header(8, 8, 50, models.tiny_model().id, layers=2, tile=0)
    with pytest.raises(FormatError, match="2 layers, its weights have 3"):
        decode(bitstream.write(header, (), [b"", b""]))


def test_verification(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = coding.decode

    def wrong(*arguments: Any) -> list[torch.Tensor]:
        codes = plain(*arguments)
        codes[1][0, 0, 0] += 1
        return codes

    monkeypatch.setattr(coding, "decode", wrong)
    compress(picture(8, 8))
    with pytest.raises(FormatError, match="verification failed"):
        compress(picture(8, 8), verify=True)
    with pytest.raises(FormatError, match="verification failed"):
        codec.compress_many([picture(8, 8)] * 2, weights=models.tiny_weights(), verify=True)


# Size


@pytest.mark.parametrize("quality", [60, 75, 95])
def test_size_is_the_cross_entropy(quality: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the prior's counts say, within 1 % and a word for each segment; and the container adds what it must."""
    bits = 0.0
    put = Encoder.put_rows

    def counted(self: Encoder, symbols: Any, rows: Any, table: Table) -> None:
        nonlocal bits
        chosen = table.counts[rows, symbols.astype(int)].astype(float) + 1
        bits -= float(np.log2(chosen / 2**24).sum())
        put(self, symbols, rows, table)

    monkeypatch.setattr(Encoder, "put_rows", counted)
    data = compress(picture(192, 160, seed=44), quality=quality)
    segments = bitstream.read(data).segments
    content = sum(len(segment) for segment in segments if segment is not None)
    assert all(segments), "a layer of nothing but code 0 takes no bytes"
    assert bits / 8 - 3 <= content <= 1.01 * bits / 8 + 4 * len(segments)
    assert content + 21 + 5 * len(segments) <= len(data) <= content + 21 + 7 * len(segments)


# Damage


@functools.cache
def small() -> bytes:
    """A file of two tiles with metadata, a few hundred bytes."""
    source = Picture(picture(20, 70), alpha=np.full((20, 70), 9, np.uint8), xmp=b"<x/>")
    return compress(source, quality=30, tile=64)


def test_any_flipped_bit_is_found() -> None:
    data = small()
    assert len(data) < 1200
    for place in range(len(data)):
        for bit in range(8):
            damaged = data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :]
            with pytest.raises((FormatError, WeightsError)):
                decode(damaged)


def test_any_cut_is_found() -> None:
    data = small()
    for length in range(len(data)):
        with pytest.raises(FormatError):
            decode(data[:length])
    with pytest.raises(FormatError):
        decode(data + b"\0")


def test_partial_decoding_of_damaged_files_raises_or_says_so() -> None:
    data = small()
    whole = decode(data)
    told = 0
    for place in range(4, len(data), 5):
        damaged = data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :]
        try:
            found = decode(damaged, partial=True)
        except (FormatError, WeightsError):
            continue
        assert found.notes
        assert found.pixels.shape == whole.pixels.shape
        assert np.array_equal(found.alpha, whole.alpha) and found.xmp == whole.xmp
        told += 1
    assert told > 10


def segment_ends(data: bytes) -> list[int]:
    """Where each segment ends in a file without metadata."""
    ends = [len(data)]
    for segment in reversed(bitstream.read(data).segments[1:]):
        assert segment is not None
        ends.append(ends[-1] - len(segment) - 4 - (1 if len(segment) < 128 else 2))
    return ends[::-1]


def test_a_cut_file_is_a_coarser_picture() -> None:
    source, data = tiled()
    ends = segment_ends(data)
    assert len(ends) == 3 * 6
    ratios = []
    for layers in range(4):
        cut = data[: ends[6 * layers - 1] if layers else 21]
        found = decode(cut, partial=True)
        assert len(found.notes) == (layers < 3)
        assert layers == 3 or "the file has" in found.notes[0]
        ratios.append(psnr(source, found.pixels))
    assert ratios[0] < ratios[1] < ratios[2] <= ratios[3]
    assert ratios[1] > ratios[0] + 3
    assert np.array_equal(found.pixels, decode(data).pixels)
    with pytest.raises(FormatError):
        decode(data[: ends[11]])


def test_decompress_warns_of_what_is_missing() -> None:
    _, data = tiled()
    with pytest.warns(UserWarning, match="segment 18 of 18"):
        assert decompress(data[:-1], partial=True).size == (180, 128)


def test_a_cut_inside_a_segment_is_a_cut_before_it() -> None:
    _, data = tiled()
    ends = segment_ends(data)
    before = decode(data[: ends[7]], partial=True)
    for place in (ends[7] + 1, ends[7] + 3, ends[8] - 1):
        assert np.array_equal(decode(data[:place], partial=True).pixels, before.pixels)
    assert not np.array_equal(decode(data[: ends[8]], partial=True).pixels, before.pixels)


@pytest.mark.parametrize("layer", [0, 1])
def test_damage_stays_in_its_tile(layer: int) -> None:
    _, data = tiled()
    whole = decode(data)
    ends = segment_ends(data)
    place = ends[6 * layer + 4] - 2  # the last bytes of the segment of tile 4: rows 64 to 127, columns 64 to 127
    damaged = data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
    found = decode(damaged, partial=True)
    assert len(found.notes) == 1 and "segment" in found.notes[0]
    codes = decoder.decode_codes([bitstream.read(damaged, partial=True)], models.tiny_model())
    intact = decoder.decode_codes([bitstream.read(data)], models.tiny_model())
    assert torch.equal(codes[0][0, 2:, 2:4], intact[0][0, 2:, 2:4] * layer)
    assert not codes[1][0, 8:, 8:16].any(), "later layers of the tile cannot be decoded either"
    changed = (found.pixels != whole.pixels).any(2)
    assert changed[72:120, 72:120].mean() > 0.5
    # As far as the networks reach from the tile: 8 + 4 pixels by the decoder, one position by each refinement;
    # through the coarse level another 32 by its decoder.
    reach = 12 + 2 * 8 + (32 if layer == 0 else 0)
    changed[max(0, 64 - reach) :, max(0, 64 - reach) : 128 + reach] = False
    assert not changed.any()


def test_a_tile_is_coded_alone() -> None:
    """Other tiles' codes do not change a tile's segments."""
    model, (_, data) = models.tiny_model(), tiled()
    header = bitstream.read_header(data)
    codes = [c.clone() for c in decoder.decode_codes([bitstream.read(data)], model)]
    assert models.encode_codes(model, header, codes) == list(bitstream.read(data).segments)
    for level, stage in enumerate(TINY.levels):
        codes[level][0, : 64 // stage.stride, : 64 // stage.stride] = 1
    changed = models.encode_codes(model, header, codes)
    for number, (found, expected) in enumerate(zip(changed, bitstream.read(data).segments, strict=True)):
        assert (found == expected) == (number % 6 != 0)


def crafted(segments: list[bytes], chunks: tuple[Chunk, ...] = ()) -> bytes:
    header = Header(30, 20, 50, models.tiny_model().id, TINY.layers, 0)
    return bitstream.write(header, chunks, segments)


def test_segments_that_no_encoder_wrote() -> None:
    """With right checksums: garbage in, a picture of garbage or ChecksumError out."""
    rng = np.random.default_rng(0)
    refused = 0
    for length in (0, 1, 4, 5, 30, 300, 3000):
        for fill in (rng.bytes(length), b"\xff" * length, bytes(length)):
            try:
                found = decode(crafted([fill] * 3))
                assert found.pixels.shape == (20, 30, 3)
            except ChecksumError:
                refused += 1
    assert refused


def png_of_header(header: bytes, rows: bytes = b"") -> bytes:
    """A PNG file of this header and, unless rows are given, nothing to fill it."""
    data = b"\x89PNG\r\n\x1a\n"
    for chunk in (b"IHDR" + header, b"IDAT" + zlib.compress(rows), b"IEND"):
        data += (len(chunk) - 4).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
    return data


SIZE = (30).to_bytes(4, "big") + (20).to_bytes(4, "big")
FOUR_BITS = png_of_header(SIZE + bytes([4, 0, 0, 0, 0]), rows=bytes(20 * (1 + 15)))
BOMB = png_of_header((60_000).to_bytes(4, "big") * 2 + bytes([8, 0, 0, 0, 0]))


def png(size: tuple[int, int], mode: str = "L") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    "alpha",
    [b"", b"no png", png((31, 20)), png((20, 30)), png((30, 20), "RGB"), png((30, 20), "1"), png((30, 20))[:-30]]
    + [png_of_header(b"12345"), FOUR_BITS, BOMB],
    ids=["empty", "text", "wide", "turned", "rgb", "bilevel", "cut", "short", "four bits", "bomb"],
)
def test_alpha_that_does_not_fit(alpha: bytes) -> None:
    with pytest.raises(ChecksumError, match="alpha"):
        decode(crafted([b""] * 3, (Chunk("ALPH", alpha),)))


def test_alpha_that_is_damaged_behind_its_checksums() -> None:
    """PNG chunks with valid checks and senseless content: an error or a picture, nothing else."""
    rng = np.random.default_rng(1)
    good = io.BytesIO()
    Image.fromarray(picture(20, 30)[..., 0]).save(good, "PNG")
    data = good.getvalue()
    start = data.index(b"IDAT")
    refused = 0
    for _ in range(60):
        body = bytearray(data[start : -12 - 4])
        body[4 + int(rng.integers(len(body) - 4))] ^= 1 << int(rng.integers(8))
        damaged = data[:start] + bytes(body) + zlib.crc32(body).to_bytes(4, "big") + data[-12:]
        try:
            decode(crafted([b""] * 3, (Chunk("ALPH", damaged),)))
        except ChecksumError:
            refused += 1
    assert refused > 20


# Limits


def test_absurd_sizes_fail_before_anything_is_allocated(tmp_path: Path) -> None:
    """Before the weights are even looked for."""
    nowhere = tmp_path / "nowhere"
    for width, height in [(0xFFFFFF, 0xFFFFFF), (0xFFFFFF, 1000), (20_001, 20_000)]:
        header = Header(width, height, 50, bytes(4), layers=1, tile=0)
        for partial in (False, True):
            with pytest.raises(LimitError, match="the limit is 400000000"):
                codec.decompress(bitstream.write(header, (), [b""]), weights=nowhere, partial=partial)
    # Allowed by the caller, but cut: the promise is not believed either.
    data = bitstream.write(Header(0xFFFFFF, 0xFFFFFF, 50, bytes(4), layers=1, tile=0), (), [b""])
    with pytest.raises(FormatError):
        codec.decompress(data[:-1], weights=nowhere, max_pixels=None)


def test_bytes_of_any_type() -> None:
    data = compress(picture(20, 30))
    for given in (bytearray(data), memoryview(data)):
        assert np.array_equal(decompress(given), decompress(data))


def test_max_pixels() -> None:
    data = compress(picture(20, 30))
    assert decompress(data, max_pixels=600).size == (30, 20)
    assert decompress(data, max_pixels=None).size == (30, 20)
    with pytest.raises(LimitError, match="30 x 20 = 600 pixels, the limit is 599"):
        decompress(data, max_pixels=599)


# Tiles and bands


def test_tiled_and_whole_files_of_the_same_codes_give_the_same_pixels() -> None:
    model, (_, data) = models.tiny_model(), tiled()
    container = bitstream.read(data)
    codes = decoder.decode_codes([container], model)
    whole = dataclasses.replace(container.header, tile=0)
    segments = models.encode_codes(model, whole, codes)
    again = bitstream.write(whole, (), segments)
    assert again != data
    assert all(
        torch.equal(a, b) for a, b in zip(decoder.decode_codes([bitstream.read(again)], model), codes, strict=True)
    )
    assert np.array_equal(decode(again).pixels, decode(data).pixels)


@pytest.fixture(scope="module")
def strongly_shaken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights whose residual blocks change pixels by several units, so that a seam would show."""
    return models.save(models.tiny(shake=200), tmp_path_factory.mktemp("weights") / "shaken.safetensors")


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("size", [(128, 180), (40, 300), (300, 33)], ids=str)
def test_bands_leave_no_seams(
    size: tuple[int, int], rows: int, strongly_shaken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Latents and pixels are the same whether what is local works on the picture at once or in bands."""
    weights = strongly_shaken
    model, quality = load(weights), torch.tensor([60])
    source = picture(*size, seed=45)
    data = codec.compress(source, quality=60, weights=weights)
    with torch.inference_mode():
        latents = synthesis.analyse(model, source[None], quality)
        restored = codec.decode_picture(data, weights=weights).pixels
        width = -(-size[1] // model.config.multiple) * model.config.multiple
        monkeypatch.setitem(synthesis.BAND_PIXELS, "cpu", rows * width * model.config.stages[0].stride)
        calls = []
        render = model.vqvae.render
        monkeypatch.setattr(model.vqvae, "render", lambda *a: calls.append(a) or render(*a))
        for found, expected in zip(synthesis.analyse(model, source[None], quality), latents, strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
        found = codec.decode_picture(data, weights=weights).pixels
    assert len(calls) == -(-size[0] // (8 * rows)), "the picture must not fit one band"
    assert int(np.abs(found.astype(int) - restored).max()) <= 1
    assert (found != restored).mean() < 0.01
    # The choice of codes may fall the other way in a rare tie, no more.
    again = decoder.decode_codes([bitstream.read(codec.compress(source, quality=60, weights=weights))], model)
    for ours, expected in zip(again, decoder.decode_codes([bitstream.read(data)], model), strict=True):
        assert float((ours != expected).float().mean()) < 0.01


def test_pixels_are_rounded() -> None:
    model, quality = models.tiny_model(), torch.tensor([50])
    with torch.inference_mode():
        estimate = model.vqvae.analyse(models.batch(picture(64, 64, seed=46)) * 4 - 384, quality)[1]
        expected = model.vqvae.descend(1, estimate, quality)[0].permute(1, 2, 0).numpy()
        grid = synthesis.GridEstimate(model, Frame(60, 50, 50))
        grid.values = estimate
        (found,) = grid.picture()
    assert (expected < 0).any() and (expected > 255).any()
    assert np.array_equal(found, np.clip(np.rint(expected), 0, 255)[:50, :60])


def test_container_of_a_real_file() -> None:
    _, data = tiled()
    container: Container = bitstream.read(data)
    assert container.header.tiles == (2, 3)
    assert len(container.segments) == container.header.segments == 18
    assert container.header.weights_id == models.tiny_model().id
    info = bitstream.read_info(data)
    assert sum(info.layer_bytes) + 21 == len(data)
    assert all(info.layer_bytes)


Save = Callable[[Path], None]


@pytest.mark.skipif(not features.check("webp"), reason="needs Pillow with WebP")
def test_pictures_of_files() -> None:
    """What image.load() gives goes through as it is."""
    source = Picture(picture(21, 34))
    for suffix in (".png", ".webp", ".tif"):
        loaded = image.load(image.save(source, suffix), max_pixels=None)
        assert np.array_equal(decode(compress(loaded)).pixels, decode(compress(source)).pixels)
