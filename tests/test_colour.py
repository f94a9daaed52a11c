"""Colours that files state by numbers: sRGB stays as it is, wide gamuts get a profile, all else becomes sRGB."""

import io
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pictures import chunk, srgb_of_light, srgb_of_p3, with_chunks
from PIL import Image, ImageCms

from vqcodec.errors import ImageError
from vqcodec.image import Picture, from_pil, load
from vqcodec.pictures import colour, signalling
from vqcodec.pictures.signalling import CodePoints

GREYS = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
COLOURS = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
SRGB = chunk(b"sRGB", b"\0")
SRGB_PRIMARIES = (31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000)
P3_PRIMARIES = (31270, 32900, 68000, 32000, 26500, 69000, 15000, 6000)


def gama(value: float) -> bytes:
    return chunk(b"gAMA", struct.pack(">L", round(100_000 * value)))


def chrm(*values: int) -> bytes:
    return chunk(b"cHRM", struct.pack(">8L", *values))


def cicp(primaries: int, transfer: int, matrix: int = 0, full_range: int = 1) -> bytes:
    return chunk(b"cICP", bytes([primaries, transfer, matrix, full_range]))


def file(pixels: NDArray[np.uint8], format: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format, **options)
    return out.getvalue()


def avif(primaries: int, transfer: int) -> bytes:
    data = file(COLOURS, "AVIF")
    return data.replace(b"colrnclx\0\1\0\r", b"colrnclx" + struct.pack(">HH", primaries, transfer))


def loaded(*chunks: bytes, pixels: NDArray[np.uint8] = COLOURS, **options: object) -> Picture:
    return load(with_chunks(file(pixels, **options), *chunks), max_pixels=None)


# sRGB, however it is stated


@pytest.mark.parametrize(
    "chunks",
    [
        [],
        [SRGB],
        [gama(0.45455)],
        [gama(0.45)],
        [gama(0.45455), chrm(*SRGB_PRIMARIES)],
        [chrm(*SRGB_PRIMARIES)],
        [SRGB, gama(1.0), chrm(*P3_PRIMARIES)],
        [cicp(1, 13)],
        [cicp(1, 13), SRGB, gama(1.0)],
        [cicp(1, 1)],
        [cicp(2, 2)],
    ],
)
def test_srgb_stays_as_it_is(chunks: list[bytes]) -> None:
    for pixels in (COLOURS, GREYS[..., 0]):
        picture, plain = loaded(*chunks, pixels=pixels), loaded(pixels=pixels)
        assert np.array_equal(picture.pixels, plain.pixels)
        assert picture.icc is None and picture.notes == ()


@pytest.mark.parametrize(("primaries", "transfer"), [(1, 13), (2, 2), (1, 1), (1, 6), (2, 13)])
def test_srgb_by_nclx_stays_as_it_is(primaries: int, transfer: int) -> None:
    picture = load(avif(primaries, transfer), max_pixels=None)
    assert picture.icc is None and picture.notes == ()
    assert np.array_equal(picture.pixels, load(file(COLOURS, "AVIF"), max_pixels=None).pixels)


# Wide gamuts


@pytest.mark.parametrize(
    "data",
    [
        with_chunks(file(COLOURS), cicp(12, 13)),
        with_chunks(file(COLOURS), cicp(12, 13), SRGB, gama(0.45455)),
        with_chunks(file(COLOURS), chrm(*P3_PRIMARIES)),
        with_chunks(
            file(COLOURS, icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()), cicp(12, 13)
        ),
    ],
    ids=["cICP", "cICP before sRGB", "cHRM", "cICP before iCCP"],
)
def test_display_p3_gets_a_profile(data: bytes) -> None:
    picture = load(data, max_pixels=None)
    assert np.array_equal(picture.pixels, COLOURS) and picture.notes == ()
    assert picture.icc is not None and colour.problem(picture.icc) == ""
    assert np.abs(colour.to_srgb(COLOURS, picture.icc, grey=False) - srgb_of_p3(COLOURS)).max() < 2


def test_display_p3_by_nclx_gets_a_profile() -> None:
    """Also of a Pillow image that is open and not loaded yet."""
    picture = load(avif(12, 13), max_pixels=None)
    assert picture.icc is not None and picture.icc == loaded(cicp(12, 13)).icc
    with Image.open(io.BytesIO(avif(12, 13))) as opened:
        assert from_pil(opened).icc == picture.icc


def test_a_profile_goes_before_gamma_and_nclx() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    picture = loaded(gama(1.0), icc_profile=profile)
    assert picture.icc == profile and np.array_equal(picture.pixels, COLOURS)
    data = file(COLOURS, "AVIF", icc_profile=profile)
    assert load(data, max_pixels=None).icc == profile


@pytest.mark.parametrize("primaries", [4, 5, 6, 7, 9, 11, 12, 22])
def test_white_is_white_in_every_gamut(primaries: int) -> None:
    space = colour.stated(CodePoints(primaries, 13, 0, True), {})
    assert space is not None
    pixels = np.array([[[255, 255, 255], [128, 128, 128], [0, 0, 0]]], np.uint8)
    assert np.abs(colour.to_srgb(pixels, space.profile(grey=False), grey=False).astype(int) - pixels).max() <= 1


# Gamma


@pytest.mark.parametrize("gamma", [1.0, 0.55556, 1 / 2.6])
@pytest.mark.parametrize("mode", ["RGB", "L", "P"])
def test_gamma_is_converted(gamma: float, mode: str) -> None:
    pixels = GREYS[..., 0] if mode == "L" else GREYS
    data = file(pixels)
    if mode == "P":
        out = io.BytesIO()
        Image.fromarray(GREYS[..., 0]).convert("P").save(out, "PNG")
        data = out.getvalue()
    picture = load(with_chunks(data, gama(gamma)), max_pixels=None)
    assert np.abs(picture.pixels - srgb_of_light((GREYS / 255) ** (1 / round(gamma, 5)))).max() <= 1
    assert picture.icc is None and picture.grey == (mode == "L")
    assert picture.notes == ("the gamma was converted to that of sRGB",)


def test_gamma_with_alpha() -> None:
    values = np.dstack([GREYS, GREYS[..., 0]])
    picture = loaded(gama(1.0), pixels=values)
    assert picture.alpha is not None and np.array_equal(picture.alpha, GREYS[..., 0])
    assert np.abs(picture.pixels - srgb_of_light(GREYS / 255)).max() <= 1


# HDR


def pq(light: float) -> float:
    """Value 0..1 of light in cd/m2, SMPTE ST 2084."""
    y = (light / 10_000) ** 0.1593017578125
    return ((0.8359375 + 18.8515625 * y) / (1 + 18.6875 * y)) ** 78.84375


def hlg(light: float) -> float:
    """Value 0..1 of light in cd/m2 on a display of 1000 cd/m2, ITU-R BT.2100."""
    scene = (light / 1000) ** (1 / 1.2)
    return (3 * scene) ** 0.5 if scene <= 1 / 12 else 0.17883277 * np.log(12 * scene - 0.28466892) + 0.55991073


@pytest.mark.parametrize("grey", [False, True])
def test_hdr_is_tone_mapped(grey: bool) -> None:
    """Light far below the reference white stays as it is, white is white, and both systems agree."""
    lights = np.array([0, 5, 20, 60, 90, 150, 203, 400, 1000.0])
    found = []
    for transfer, value in ((16, pq), (18, hlg)):
        values = np.array([[round(255 * value(light)) for light in lights]], np.uint8)
        pixels = values if grey else values[..., None].repeat(3, axis=2)
        picture = loaded(cicp(9, transfer), pixels=pixels)
        name = {16: "PQ", 18: "HLG"}[transfer]
        assert picture.notes == (f"HDR ({name}) was tone-mapped to sRGB",)
        assert picture.icc is None and np.ptp(picture.pixels, axis=2).max() <= 1
        found.append(picture.pixels[0, :, 0].astype(int))
    for values in found:
        assert np.abs(values[:4] - srgb_of_light(lights[:4] / 203)).max() <= 4, "steps of PQ are as large"
        assert (np.diff(values) > 0).all() and values[-1] >= 254
    assert np.abs(found[0] - found[1]).max() <= 6


def test_hdr_by_nclx_is_tone_mapped() -> None:
    picture = load(avif(9, 16), max_pixels=None)
    assert picture.icc is None and picture.notes == ("HDR (PQ) was tone-mapped to sRGB",)


# What is not supported or makes no sense


@pytest.mark.parametrize(
    ("chunks", "what"),
    [
        ([cicp(8, 9)], "colours with primaries 8 and transfer function 9 of H.273"),
        ([cicp(12, 13, 1)], "YCbCr values or a narrow range"),
        ([cicp(12, 13, 0, 0)], "YCbCr values or a narrow range"),
        ([gama(0)], "a gamma of 0"),
        ([gama(0.45455), chrm(*[0] * 8)], "primaries that no display can have"),
        ([gama(0.45455), chrm(*[33000] * 8)], "primaries that no display can have"),
        ([chrm(31270, 32900, 64000, 33000, 64000, 33000, 15000, 6000)], "primaries that no display can have"),
    ],
)
def test_other_colours_are_noted(chunks: list[bytes], what: str) -> None:
    picture = loaded(*chunks)
    assert np.array_equal(picture.pixels, COLOURS) and picture.icc is None
    assert picture.notes == (f"the file states {what}, which is not supported: colours may be wrong",)


@pytest.mark.parametrize(
    "name",
    ["gamma", "chromaticity", "srgb", "icc_profile", "exif", "xmp", "photoshop", "comment", "transparency"],
)
def test_a_text_with_the_name_of_a_chunk_is_a_text(name: str) -> None:
    picture = loaded(chunk(b"tEXt", name.encode() + b"\0 1.0"))
    assert np.array_equal(picture.pixels, COLOURS) and picture.icc is None


fixed = settings(derandomize=True, deadline=None, database=None, max_examples=200)


@given(st.data())
@fixed
def test_damaged_boxes_and_chunks_raise_nothing(data: st.DataObject) -> None:
    whole = data.draw(st.sampled_from([avif(12, 13), with_chunks(file(COLOURS), cicp(12, 13))]))
    head = bytearray(whole[:600])
    for _ in range(data.draw(st.integers(0, 4))):
        head[data.draw(st.integers(12, len(head) - 1))] = data.draw(st.integers(0, 255))
    assert isinstance(signalling.read(bytes(head[: data.draw(st.integers(0, len(head)))])), signalling.Signals)


@given(st.floats(0, 50), st.lists(st.integers(0, (1 << 32) - 1) | st.integers(0, 100_000), min_size=8, max_size=8))
@fixed
def test_any_primaries_make_a_profile_or_an_error(gamma: float, primaries: list[int]) -> None:
    try:
        space = colour.stated(None, {"gamma": gamma, "chromaticity": tuple(value / 100_000 for value in primaries)})
        assert space is not None
        assert colour.problem(space.profile(grey=False)) == ""
    except ImageError:
        pass


@pytest.mark.parametrize(
    ("code_points", "notes", "has_profile"),
    [
        ((1, 13, 6), ("10 bits per channel were reduced to 8",), False),
        ((12, 13, 6), ("10 bits per channel were reduced to 8",), True),
        ((9, 16, 9), ("10 bits per channel were reduced to 8", "HDR (PQ) was tone-mapped to sRGB"), False),
    ],
    ids=["sRGB", "Display P3", "PQ"],
)
def test_heif(code_points: tuple[int, int, int], notes: tuple[str, ...], has_profile: bool) -> None:
    """HEIF files state depth and colours as AVIF files do."""
    heif = pytest.importorskip("pillow_heif", reason="needs pip install pillow-heif")
    samples = np.full((32, 48, 3), 30_000, "<u2")
    names = ("color_primaries", "transfer_characteristics", "matrix_coefficients")
    file = io.BytesIO()
    made = heif.from_bytes(mode="RGB;16", size=(48, 32), data=samples.tobytes())
    made.save(file, quality=90, **dict(zip(names, code_points, strict=True)))
    picture = load(file.getvalue(), max_pixels=None)
    assert picture.notes == notes and (picture.icc is not None) == has_profile
