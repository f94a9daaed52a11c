import io
import struct
import warnings
import zlib
from dataclasses import replace

import numpy as np
import pytest
from pictures import srgb_of_light, srgb_of_p3
from PIL import Image, ImageCms, ImageOps, PngImagePlugin
from PIL.PngImagePlugin import PngInfo

from vqcodec import image
from vqcodec.errors import ImageError
from vqcodec.image import Picture, adapt, from_pil, load, save, to_pil
from vqcodec.pictures import colour, pillow, signalling
from vqcodec.pictures.signalling import CodePoints

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
GREY = colour.ColourSpace((0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06), (1.0,)).profile(grey=True)
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


def encoded(picture: Image.Image, format: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    picture.save(out, format, **options)
    return out.getvalue()


def png(array: np.ndarray, colour_type: int, *extra: bytes) -> bytes:
    """A PNG with 16 bits per channel, which Pillow does not write in colour."""
    height, width = array.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    header = struct.pack(">LLBBBBB", width, height, 16, colour_type, 0, 0, 0)
    chunks = (b"IHDR" + header, *extra, b"IDAT" + zlib.compress(rows), b"IEND")
    parts = (struct.pack(">L", len(c) - 4) + c + struct.pack(">L", zlib.crc32(c)) for c in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def tiff(
    array: np.ndarray,
    *,
    bits: int,
    photometric: int,
    sample_format: int = 1,
    data: bytes | None = None,
    more: dict[int, int] | None = None,
) -> bytes:
    """A little-endian TIFF with one uncompressed strip, and more tags."""
    height, width, samples = array.shape
    data = array.tobytes() if data is None else data
    values = {256: width, 257: height, 259: 1, 262: photometric, 277: samples, 278: height, 279: len(data)}
    values |= {339: sample_format, 273: 8, 258: bits}
    if samples == 4:
        values[338] = 2
    values |= more or {}
    after = 8 + len(data)
    count = len(values)
    entries = b""
    for tag, value in sorted(values.items()):
        if tag in (258, 339) and samples == 2:  # which fit into the entry
            entries += struct.pack("<HHLHH", tag, 3, samples, value, value)
        elif tag in (258, 339) and samples > 1:
            place = after + (0 if tag == 258 else 2 * samples)
            entries += struct.pack("<HHLL", tag, 3, samples, place)
        else:
            entries += struct.pack("<HHLL", tag, 4, 1, value)
    arrays = struct.pack(f"<{samples}H", *[bits] * samples) + struct.pack(f"<{samples}H", *[sample_format] * samples)
    head = struct.pack("<2sHL", b"II", 42, after + len(arrays))
    return head + data + arrays + struct.pack("<H", count) + entries + struct.pack("<L", 0)


def cmyk_profile() -> bytes:
    """A profile by which every ink is the same grey: any ink at all is black, no ink is white."""
    ramp = bytes(range(256))
    neutral = bytes([128, 128])
    table = b"".join(bytes([255 if inks == 0 else 0]) + neutral for inks in range(16))
    matrix = struct.pack(">9l", 65536, 0, 0, 0, 65536, 0, 0, 0, 65536)
    lut = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + matrix + ramp * 4 + table + ramp * 3
    lut += b"\0" * (-len(lut) % 4)
    size = 128 + 4 + 12 + len(lut)
    header = struct.pack(">L4sL4s4s4s", size, b"test", 0x02400000, b"prtr", b"CMYK", b"Lab ").ljust(36, b"\0") + b"acsp"
    header = header.ljust(68, b"\0") + struct.pack(">3l", 63190, 65536, 54061)
    return header.ljust(128, b"\0") + struct.pack(">L4sLL", 1, b"A2B0", 144, len(lut)) + lut


def with_orientation(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x010F] = "Camera maker"
    return exif


# Kinds of pixels


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 17), (17, 1), (31, 23), (300, 5)])
@pytest.mark.parametrize("suffix", [".png", ".webp", ".tif", ".bmp", ".ppm"])
def test_lossless_round_trip(make_photo, height, width, suffix):
    pixels = make_photo(height, width)
    picture = load(save(Picture(pixels), suffix), max_pixels=None)
    assert np.array_equal(picture.pixels, pixels)
    assert picture.pixels.flags.c_contiguous and picture.pixels.dtype == np.uint8
    assert (picture.grey, picture.alpha, picture.icc, picture.exif, picture.xmp) == (False, None, None, None, None)
    assert picture.notes == ()


@pytest.mark.parametrize("suffix", [".jpg", ".JPG", ".jpeg", ".avif"])
def test_lossy_formats_stay_close(make_photo, suffix):
    pixels = make_photo(40, 50)
    restored = load(save(Picture(pixels), suffix), max_pixels=None).pixels
    assert np.abs(restored.astype(int) - pixels).mean() < 3


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "AVIF", "TIFF", "BMP", "GIF", "PPM"])
def test_size_without_decoding(make_photo, format):
    data = encoded(Image.fromarray(make_photo(200, 300)), format)
    assert image.size(data) == (300, 200)
    with pytest.raises(ImageError, match="not a PNG"):
        image.size(b"not a picture")


def test_size_of_a_picture_that_load_refuses():
    header = struct.pack(">LLBBBBB", 2**24, 2**24, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    data = b"\x89PNG\r\n\x1a\n" + struct.pack(">L", len(header)) + chunk + struct.pack(">L", zlib.crc32(chunk))
    data += struct.pack(">L", 4) + b"IDATcut." + struct.pack(">L", zlib.crc32(b"IDATcut."))
    assert image.size(data) == (2**24, 2**24)
    with pytest.raises(ImageError, match="the limit is 9"):
        load(data, max_pixels=9)


@pytest.mark.parametrize("mode", ["L", "1"])
def test_grey(make_photo, mode):
    original = Image.fromarray(make_photo(20, 30)).convert(mode)
    picture = load(encoded(original), max_pixels=None)
    assert picture.grey and picture.alpha is None and picture.notes == ()
    assert picture.pixels.shape == (20, 30, 3)
    assert np.array_equal(picture.pixels, np.asarray(original.convert("RGB")))
    assert to_pil(picture).mode == "L"


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
@pytest.mark.parametrize("suffix", [".png", ".webp", ".tif"])
def test_alpha_round_trip(make_photo, mode, suffix):
    original = Image.fromarray(make_photo(20, 30)).convert(mode)
    alpha = np.random.default_rng(0).integers(0, 256, (20, 30), dtype=np.uint8)
    original.putalpha(Image.fromarray(alpha))
    picture = from_pil(original)
    assert to_pil(picture).mode == mode
    assert np.array_equal(np.asarray(to_pil(picture)), np.asarray(original))
    again = load(save(picture, suffix), max_pixels=None)
    assert np.array_equal(again.alpha, alpha)
    assert np.array_equal(again.pixels, picture.pixels)  # also where nothing shows


def test_alpha_in_avif(make_photo):
    alpha = np.arange(600, dtype=np.uint8).reshape(20, 30)
    again = load(save(Picture(make_photo(20, 30), alpha=alpha), ".avif"), max_pixels=None)
    assert np.abs(again.alpha.astype(int) - alpha).mean() < 5


def test_palette(make_photo):
    original = Image.fromarray(make_photo(20, 30)).quantize(16)
    for format in ("PNG", "GIF", "TIFF", "BMP"):
        picture = load(encoded(original, format), max_pixels=None)
        assert np.array_equal(picture.pixels, np.asarray(original.convert("RGB")))
        assert not picture.grey and picture.alpha is None and picture.notes == ()


@pytest.mark.parametrize("transparency", [3, bytes(range(0, 256, 16))])
def test_palette_with_transparency(make_photo, transparency):
    original = Image.fromarray(make_photo(20, 30)).quantize(16)
    data = encoded(original, transparency=transparency)
    picture = load(data, max_pixels=None)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGBA"))
    assert expected[..., 3].min() < 255
    assert np.array_equal(picture.alpha, expected[..., 3])
    assert np.array_equal(picture.pixels, expected[..., :3])
    assert to_pil(picture).mode == "RGBA"


def test_transparent_colour_of_grey_and_rgb():
    grey = Image.fromarray(np.array([[10, 20], [20, 30]], np.uint8))
    picture = load(encoded(grey, transparency=20), max_pixels=None)
    assert picture.grey and picture.alpha.tolist() == [[255, 0], [0, 255]]
    colour = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8))
    picture = load(encoded(colour, transparency=(4, 5, 6)), max_pixels=None)
    assert not picture.grey and picture.alpha.tolist() == [[255, 0]]


def test_rare_alpha_modes():
    palette = Image.new("P", (2, 1))
    palette.putalpha(128)
    assert palette.mode == "PA"
    for original in (Image.new("LA", (2, 1), (100, 128)).convert("La"), palette):
        assert from_pil(original).alpha.tolist() == [[128, 128]]
    premultiplied = from_pil(Image.new("RGBA", (1, 1), (9, 90, 200, 255)).convert("RGBa"))
    assert premultiplied.pixels.tolist() == [[[9, 90, 200]]]


DEEP = np.array([0, 127, 128, 129, 257, 385, 386, 32768, 65278, 65407, 65535, 65406], np.uint16)
DEEP_ROUNDED = [round(int(value) / 257) for value in DEEP]


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_is_rounded(kind):
    grid = DEEP.reshape(3, 4)
    data = {
        "PNG": lambda: png(grid, 0),
        "TIFF": lambda: tiff(grid[..., None], bits=16, photometric=1),
        "PPM": lambda: b"P5 4 3 65535\n" + grid.astype(">u2").tobytes(),
    }[kind]()
    picture = load(data, max_pixels=None)
    assert picture.grey and picture.alpha is None
    assert picture.pixels[..., 1].ravel().tolist() == DEEP_ROUNDED
    assert picture.notes == ("16 bits per channel were reduced to 8",)


@pytest.mark.parametrize(
    ("data", "bits"),
    [
        (b"P6 1 1 65535\n" + bytes(6), 16),
        (b"P5 1 1 1023\n" + bytes(2), 10),
        (b"P3 1 1 4095 0 0 0\n", 12),
        (b"P6 1 1 15\n" + bytes(3), 8),
        (tiff(np.zeros((2, 2, 1)), bits=12, photometric=1, data=bytes(6)), 12),
    ],
)
def test_lost_depth_is_noted(data, bits):
    notes = load(data, max_pixels=None).notes
    assert notes == ((f"{bits} bits per channel were reduced to 8",) if bits > 8 else ())


@pytest.mark.parametrize(("field", "bits"), [(b"av1C\x81\x00\x4c", 10), (b"av1C\x81\x00\x6c", 12)])
def test_lost_depth_of_avif_is_noted(make_photo, field, bits):
    data = encoded(Image.fromarray(make_photo(16, 16)), "AVIF")
    start = data.index(b"av1C")
    changed = data[:start] + field[:5] + data[start + 5 : start + 6] + field[6:] + data[start + 7 :]
    assert signalling.read(data).bits == 8
    assert signalling.read(changed).bits == bits


def test_16_bit_big_endian_tiff():
    little = Image.fromarray(DEEP.reshape(3, 4))
    big = Image.frombytes("I;16B", (4, 3), DEEP.astype(">u2").tobytes())
    for original in (little, big):
        picture = load(encoded(original, "TIFF"), max_pixels=None)
        assert picture.pixels[..., 0].ravel().tolist() == DEEP_ROUNDED


def test_16_bit_grey_where_white_is_zero():
    picture = load(tiff((65535 - DEEP).reshape(3, 4, 1), bits=16, photometric=0), max_pixels=None)
    assert picture.pixels[..., 0].ravel().tolist() == DEEP_ROUNDED


def test_12_bit_grey():
    packed = bytes([0x00, 0x0F, 0xFF, 0x80, 0x04, 0x01])  # 0, 4095, 2048, 1025 in rows of two
    picture = load(tiff(np.zeros((2, 2, 1)), bits=12, photometric=1, data=packed), max_pixels=None)
    assert picture.pixels[..., 0].tolist() == [[0, 255], [128, 64]]


def test_16_bit_grey_with_a_transparent_value():
    picture = load(png(DEEP.reshape(3, 4), 0, b"tRNS" + struct.pack(">H", 386)), max_pixels=None)
    assert np.argwhere(picture.alpha == 0).tolist() == [[1, 2]]


def test_16_bit_colour_with_a_transparent_value():
    """Pixels become 8 bits, and so does the value that they are compared with."""
    grid = np.zeros((2, 2, 3), np.uint16)
    grid[0, 1], grid[1] = (0x8000, 0x4000, 0x2000), 0xFFFF
    picture = load(png(grid, 2, b"tRNS" + struct.pack(">HHH", 0x8000, 0x4000, 0x2000)), max_pixels=None)
    assert picture.alpha.tolist() == [[255, 0], [255, 255]]


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_colour_is_reduced(kind, channels):
    grid = np.random.default_rng(0).integers(0, 65536, (6, 7, channels), dtype=np.uint16)
    data = png(grid, {3: 2, 4: 6}[channels]) if kind == "PNG" else tiff(grid, bits=16, photometric=2)
    picture = load(data, max_pixels=None)
    assert np.abs(picture.pixels - grid[..., :3] / 257).max() <= 1
    assert (picture.alpha is None) == (channels == 3)
    if channels == 4:
        assert np.abs(picture.alpha - grid[..., 3] / 257).max() <= 1
    assert picture.notes == ("16 bits per channel were reduced to 8",)


def test_16_bit_grey_with_alpha():
    grid = np.stack([DEEP, DEEP[::-1]], axis=-1).reshape(3, 4, 2)
    picture = load(png(grid, 4), max_pixels=None)
    assert np.abs(picture.pixels[..., 0] - grid[..., 0] / 257).max() <= 1
    assert np.abs(picture.alpha - grid[..., 1] / 257).max() <= 1


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (encoded(Image.new("F", (3, 2)), "TIFF"), "the pixel type is 'F'"),
        (encoded(Image.new("I", (3, 2)), "TIFF"), "the pixel type is 'I'"),
        (tiff(np.zeros((2, 3, 1), np.int16), bits=16, photometric=1, sample_format=2), "the pixel type is 'I'"),
        (encoded(Image.new("LAB", (3, 2)), "TIFF"), "the pixel type is 'LAB'"),
    ],
)
def test_unsupported_pixels(data, message):
    with pytest.raises(ImageError, match=message):
        load(data, max_pixels=None)


# Colour


def test_cmyk_without_profile(make_photo):
    original = Image.fromarray(make_photo(20, 30)).convert("CMYK")
    picture = load(encoded(original, "JPEG", quality=95), max_pixels=None)
    assert np.abs(picture.pixels.astype(int) - np.asarray(original.convert("RGB"))).mean() < 4
    assert picture.notes == (
        "CMYK was converted to RGB by the plain formula, because there is no ICC profile to go by",
    )


def test_cmyk_is_converted_by_its_profile():
    original = Image.new("CMYK", (16, 8), (255, 0, 0, 0))
    original.paste((0, 0, 0, 0), (8, 0, 16, 8))
    picture = load(encoded(original, "JPEG", quality=100, icc_profile=cmyk_profile()), max_pixels=None)
    assert picture.pixels[:, :8].max() < 10  # the profile says so; the plain formula would make it cyan
    assert picture.pixels[:, 8:].min() > 245
    assert picture.icc is None
    assert picture.notes == ("CMYK was converted to sRGB by the ICC profile of the picture",)


def test_cmyk_with_a_useless_profile():
    profile = struct.pack(">L", 300) + cmyk_profile()[4:200].ljust(296, b"\0")
    picture = load(encoded(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "JPEG", icc_profile=profile), max_pixels=None)
    assert picture.pixels[0, 0].tolist()[0] < 10 and picture.pixels[0, 0].tolist()[2] > 200
    assert picture.notes[0].startswith("the CMYK profile cannot be used")


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif", ".avif"])
def test_profile_is_kept(make_photo, suffix):
    assert load(save(Picture(make_photo(8, 8), icc=SRGB), suffix), max_pixels=None).icc == SRGB


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif"])
def test_profile_of_grey_goes_with_grey_pixels(make_photo, suffix):
    grey = from_pil(Image.fromarray(make_photo(8, 8)).convert("L"))
    again = load(save(Picture(grey.pixels, grey=True, icc=GREY), suffix), max_pixels=None)
    assert again.icc == GREY and again.notes == ()


@pytest.mark.parametrize("suffix", [".webp", ".avif", ".bmp", ".ppm"])
def test_where_a_grey_profile_does_not_fit_pixels_become_srgb(suffix):
    linear = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    again = load(save(Picture(linear, grey=True, icc=GREY), suffix), max_pixels=None)
    assert again.icc is None and again.notes == ()
    assert np.abs(again.pixels - srgb_of_light(linear / 255)).max() <= (8 if suffix == ".avif" else 1)


@pytest.mark.parametrize("suffix", [".bmp", ".ppm"])
def test_where_a_profile_does_not_fit_pixels_become_srgb(suffix):
    """Full green of Display P3 is outside of sRGB; greys are the same in both."""
    p3 = colour.stated(CodePoints(12, 13, 0, True), {}).profile(grey=False)
    pixels = np.array([[[0, 255, 0], [77, 77, 77], [200, 120, 100]]], np.uint8)
    again = load(save(Picture(pixels, icc=p3), suffix), max_pixels=None)
    assert np.abs(again.pixels - srgb_of_p3(pixels)).max() <= 1
    assert again.icc is None and again.pixels[0, :2].tolist() == pixels[0, :2].tolist()


def test_a_profile_that_cannot_be_used_is_noted(make_photo):
    useless = struct.pack(">L", 300) + cmyk_profile()[4:16] + b"RGB " + cmyk_profile()[20:200].ljust(280, b"\0")
    pixels = make_photo(4, 4)
    fitting = adapt(Picture(pixels, icc=useless, notes=("first",)), ".bmp")
    assert fitting.notes[0] == "first" and fitting.notes[1].startswith("colours may be wrong: the RGB profile cannot")
    assert np.array_equal(load(save(fitting, ".bmp"), max_pixels=None).pixels, pixels)


def test_profile_that_does_not_fit_is_dropped():
    picture = load(encoded(Image.new("L", (4, 4)), icc_profile=SRGB), max_pixels=None)
    assert picture.icc is None
    assert picture.notes == ("the ICC profile is for RGB pixels and was dropped",)
    for profile, problem in (
        (b"nonsense", "is damaged"),
        (SRGB[:-1], f"is cut: it has {len(SRGB) - 1} of {len(SRGB)} bytes"),
        (SRGB[:128] + b"\xff" * 400 + SRGB[528:], "is damaged"),
    ):
        for format in ("PNG", "JPEG", "WEBP"):
            picture = load(encoded(Image.new("RGB", (4, 4)), format, icc_profile=profile), max_pixels=None)
            assert picture.icc is None
            assert picture.notes == (f"the ICC profile {problem} and was dropped",)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_the_transparent_grey_of_few_bits(bits: int) -> None:
    """The file names one of its 2, 4, 16 or 256 values; each is transparent in turn."""
    count = 1 << bits
    values = np.arange(16) * (count - 1) // 15
    packed = np.packbits((values[:, None] >> np.arange(bits)[::-1] & 1).astype(np.uint8))
    header = struct.pack(">LLBBBBB", 16, 1, bits, 0, 0, 0, 0)
    for transparent in {0, count // 2, count - 1}:
        trns = b"tRNS" + struct.pack(">H", transparent)
        chunks = (b"IHDR" + header, trns, b"IDAT" + zlib.compress(b"\0" + packed.tobytes()), b"IEND")
        parts = (struct.pack(">L", len(c) - 4) + c + struct.pack(">L", zlib.crc32(c)) for c in chunks)
        picture = load(b"\x89PNG\r\n\x1a\n" + b"".join(parts), max_pixels=None)
        assert picture.alpha is not None
        assert picture.alpha[0].tolist() == [0 if value == transparent else 255 for value in values]
        assert picture.pixels[0, :, 0].tolist() == [value * 255 // (count - 1) for value in values]


@pytest.mark.parametrize("full", [255, 65535])
def test_palettes_of_tiff_files(full: int) -> None:
    """Of 16 bits, as the format asks for, and of 8, as some programs write."""
    colours = np.random.default_rng(0).integers(0, 256, (3, 256))
    indices = np.arange(256, dtype=np.uint8).reshape(16, 16)
    grey = Image.fromarray(indices)
    palette = encoded(grey, "TIFF", tiffinfo={262: 3, 320: tuple((colours * (full // 255)).flatten().tolist())})
    assert np.array_equal(load(palette, max_pixels=None).pixels.reshape(-1, 3), colours.T)


def test_tiff_files_that_pillow_reads_wrongly() -> None:
    deep, signed = np.arange(48, dtype="<u2").reshape(4, 4, 3), np.zeros((4, 4, 1), np.int8)
    with pytest.raises(ImageError, match="more than 8 bits per sample in separate planes"):
        load(tiff(deep, bits=16, photometric=2, more={284: 2}), max_pixels=None)
    with pytest.raises(ImageError, match="the samples are signed integers"):
        load(tiff(signed, bits=8, photometric=1, sample_format=2), max_pixels=None)


@pytest.mark.parametrize(("photometric", "samples"), [(2, 4), (1, 2)], ids=["colour", "grey"])
def test_a_channel_of_unknown_meaning_is_noted(photometric: int, samples: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 5, samples), np.uint8)
    picture = load(tiff(pixels, bits=8, photometric=photometric, more={338: 0}), max_pixels=None)
    assert np.array_equal(picture.pixels, pixels[..., : samples - 1] * np.ones(3, np.uint8)) and picture.alpha is None
    assert picture.notes == ("a channel of which the file does not say what it is was dropped",)


# Metadata


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_orientation_is_applied(make_photo, format, orientation):
    options = {"lossless": True} if format == "WEBP" else {"quality": 90}
    data = encoded(Image.fromarray(make_photo(24, 40)), format, exif=with_orientation(orientation), **options)
    picture = load(data, max_pixels=None)
    with Image.open(io.BytesIO(data)) as opened:
        assert np.array_equal(picture.pixels, np.asarray(ImageOps.exif_transpose(opened)))
    assert picture.pixels.shape == ((40, 24, 3) if orientation > 4 else (24, 40, 3))
    assert picture.notes == ()
    for suffix in (".png", ".jpg", ".avif"):
        with Image.open(io.BytesIO(save(picture, suffix))) as restored:
            assert restored.getexif().get(0x0112, 1) == 1  # nobody turns it again


def test_exif_is_kept_but_for_the_orientation():
    for order in ("<", ">"):
        exif = with_orientation(8)
        exif.endian = order
        before = exif.tobytes().removeprefix(b"Exif\0\0")
        after = load(encoded(Image.new("RGB", (4, 2)), "JPEG", exif=exif), max_pixels=None).exif
        orientation = struct.pack(order + "HHLHH", 0x0112, 3, 1, 8, 0)
        assert orientation in before
        assert after == before.replace(orientation, struct.pack(order + "HHLHH", 0x0112, 3, 1, 1, 0))
        assert after.startswith({"<": b"II", ">": b"MM"}[order])


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".avif"])
def test_exif_and_xmp_are_written(make_photo, suffix):
    exif = with_orientation(1).tobytes().removeprefix(b"Exif\0\0")
    again = load(save(Picture(make_photo(8, 8), exif=exif, xmp=b"<x/>"), suffix), max_pixels=None)
    assert again.xmp == b"<x/>"
    parsed = Image.Exif()
    parsed.load(again.exif)
    assert parsed[0x010F] == "Camera maker"


def test_xmp_in_tiff(make_photo):
    assert load(save(Picture(make_photo(8, 8), xmp=b"<x/>"), ".tif"), max_pixels=None).xmp == b"<x/>"


def exif_of(kind: int, count: int, order: str) -> bytes:
    """EXIF data with orientation 6 of any type: 1 (byte), 3 (short) or 4 (long), with values outside the entry."""
    form = order + {1: "B", 3: "H", 4: "L"}[kind]
    header = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "LH", 8, 1)
    values = struct.pack(form, 6) * count
    inline = values.ljust(4, b"\0") if len(values) <= 4 else struct.pack(order + "L", 26)
    return header + struct.pack(order + "HHL", 0x0112, kind, count) + inline + bytes(4) + values * (len(values) > 4)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(("kind", "count"), [(1, 1), (3, 1), (4, 1), (3, 2), (4, 2), (1, 9)])
def test_orientation_of_any_type_is_applied(kind: int, count: int, order: str) -> None:
    data = encoded(Image.new("RGB", (40, 24)), "JPEG", exif=b"Exif\0\0" + exif_of(kind, count, order))
    picture = load(data, max_pixels=None)
    assert picture.pixels.shape == (40, 24, 3) and picture.exif is not None
    again = load(save(picture, ".jpg"), max_pixels=None)
    assert again.pixels.shape == (40, 24, 3), "the orientation that is kept must be 1"


@pytest.mark.parametrize(
    ("kind", "prefix"), [("exif", b"Exif\0\0"), ("APP1", b"Exif\0\0"), ("exif", b""), ("exif", 2 * b"Exif\0\0")]
)
def test_exif_in_a_text_chunk(kind: str, prefix: bytes) -> None:
    """As ImageMagick writes it: a name, the length, and hexadecimal digits in lines."""
    data = prefix + exif_of(3, 1, "<")
    digits = "\n".join(data.hex()[start : start + 72] for start in range(0, 2 * len(data), 72))
    info = PngInfo()
    info.add_text(f"Raw profile type {kind}", f"\nexif\n{len(data):8}\n{digits}\n", zip=True)
    picture = load(encoded(Image.new("RGB", (40, 24)), "PNG", pnginfo=info), max_pixels=None)
    assert picture.pixels.shape == (40, 24, 3)
    assert picture.exif == exif_of(3, 1, "<").replace(b"\x06\0\0\0", b"\x01\0\0\0")


def test_exif_with_a_prefix_in_its_own_chunk() -> None:
    exif = b"Exif\0\0" + exif_of(3, 1, ">")
    plain = encoded(Image.new("RGB", (40, 24)), "PNG")
    chunk = b"eXIf" + exif
    data = plain[:33] + struct.pack(">L", len(exif)) + chunk + struct.pack(">L", zlib.crc32(chunk)) + plain[33:]
    assert load(data, max_pixels=None).pixels.shape == (40, 24, 3)


@pytest.mark.parametrize("kind", ["xmp", "APP1"])
def test_xmp_in_a_text_chunk(kind: str) -> None:
    data = XMP if kind == "xmp" else b"http://ns.adobe.com/xap/1.0/\0" + XMP
    info = PngInfo()
    info.add_text(f"Raw profile type {kind}", f"\n{kind}\n{len(data):8}\n{data.hex()}\n")
    picture = load(encoded(Image.new("RGB", (40, 24)), "PNG", pnginfo=info), max_pixels=None)
    assert picture.pixels.shape == (40, 24, 3)
    assert picture.xmp == XMP.replace(b'"6"', b'"1"') and picture.exif is None


@pytest.mark.parametrize(
    "xmp",
    [
        b"<rdf:Description tiff:Orientation='6'/>",
        b'<rdf:Description tiff:Orientation = "6" />',
        b"<tiff:Orientation> 6 </tiff:Orientation>",
        b"<tiff:Orientation >6</tiff:Orientation>",
    ],
)
def test_orientation_in_xmp_however_it_is_written(xmp: bytes) -> None:
    picture = load(encoded(Image.new("RGB", (40, 24)), "JPEG", xmp=xmp), max_pixels=None)
    assert picture.pixels.shape == (40, 24, 3)
    assert picture.xmp == xmp.replace(b"6", b"1")


def test_text_that_is_no_profile_is_passed_over() -> None:
    info = PngInfo()
    info.add_text("Raw profile type exif", "\nexif\n  12\nnot hexadecimal\n")
    assert load(encoded(Image.new("RGB", (40, 24)), "PNG", pnginfo=info), max_pixels=None).exif is None


def test_orientation_in_xmp_only(make_photo):
    original = Image.fromarray(make_photo(8, 20))
    picture = load(encoded(original, "JPEG", xmp=XMP), max_pixels=None)
    assert picture.pixels.shape == (20, 8, 3)
    assert picture.xmp == XMP.replace(b'"6"', b'"1"')


def test_exif_wins_over_xmp(make_photo):
    picture = load(encoded(Image.new("RGB", (20, 8)), "JPEG", xmp=XMP, exif=with_orientation(3)), max_pixels=None)
    assert picture.pixels.shape == (8, 20, 3)
    assert picture.xmp == XMP.replace(b'"6"', b'"1"')


@pytest.mark.parametrize("damage", [b"II*\0\xff\xff\xff\x7f", b"nonsense", b"MM\0*", b"II*\0\x08\0\0\0\xff\xff"])
def test_damaged_exif_does_no_harm(make_photo, damage):
    data = encoded(Image.fromarray(make_photo(8, 8)), "JPEG", exif=b"Exif\0\0" + damage)
    picture = load(data, max_pixels=None)
    assert picture.pixels.shape == (8, 8, 3)
    for suffix in (".png", ".jpg", ".avif"):
        assert save(picture, suffix)


def test_to_pil_has_the_metadata(make_photo):
    picture = to_pil(Picture(make_photo(4, 4), icc=SRGB, exif=b"II*\0\x08\0\0\0\0\0\0\0\0\0", xmp=b"<x/>"))
    assert picture.info["icc_profile"] == SRGB
    assert picture.info["exif"].startswith(b"Exif\0\0II*\0")
    assert picture.info["xmp"] == b"<x/>"
    again = from_pil(picture)
    assert (again.icc, again.exif, again.xmp) == (SRGB, b"II*\0\x08\0\0\0\0\0\0\0\0\0", b"<x/>")


# What is refused


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF", "AVIF"])
def test_animations_are_refused(make_photo, format):
    frames = [Image.fromarray(make_photo(16, 16, seed)) for seed in range(3)]
    with pytest.raises(ImageError, match="several frames or pages"):
        load(encoded(frames[0], format, save_all=True, append_images=frames[1:]), max_pixels=None)


def test_second_picture_in_a_jpeg_is_left_out_with_a_note(make_photo):
    first, second = (Image.fromarray(make_photo(16, 16, seed)) for seed in range(2))
    picture = load(encoded(first, "MPO", save_all=True, append_images=[second]), max_pixels=None)
    assert picture.notes == ("the file has 2 pictures, only the first is kept",)
    assert np.abs(picture.pixels.astype(int) - np.asarray(first)).mean() < 20


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "AVIF", "TIFF", "BMP", "GIF", "PPM"])
@pytest.mark.parametrize("part", [0.02, 0.3, 0.9])
def test_truncated_files_are_refused(make_photo, format, part):
    data = encoded(Image.fromarray(make_photo(64, 64)), format)
    with pytest.raises(ImageError) as caught:
        load(data[: int(len(data) * part)], max_pixels=None)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "TIFF", "GIF"])
def test_damaged_files_are_refused_or_read(make_photo, format):
    data = bytearray(encoded(Image.fromarray(make_photo(24, 24)), format))
    rng = np.random.default_rng(0)
    for _ in range(300):
        place = rng.integers(len(data))
        changed = data.copy()
        changed[place] ^= int(rng.integers(1, 256))
        try:
            picture = load(bytes(changed), max_pixels=10_000)
        except ImageError as error:
            assert "\n" not in str(error)
        else:
            assert picture.pixels.ndim == 3


@pytest.mark.parametrize("data", [b"", b"\0", b"no picture at all", bytes(1000), b"%!PS-Adobe-3.0 EPSF-3.0\n"])
def test_other_files_are_refused(data):
    with pytest.raises(ImageError, match="not a PNG, JPEG"):
        load(data, max_pixels=None)


def test_too_large_pictures_are_refused_before_decoding():
    data = encoded(Image.new("RGB", (100, 50)))
    assert load(data, max_pixels=5000).pixels.shape == (50, 100, 3)
    with pytest.raises(ImageError, match=r"100 x 50 = 5000 pixels, the limit is 4999"):
        load(data[:60], max_pixels=4999)


def test_decompression_bombs_are_refused():
    header = struct.pack(">LLBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    chunks = (b"IHDR" + header, b"IDAT" + zlib.compress(bytes(100)), b"IEND")
    parts = (struct.pack(">L", len(c) - 4) + c + struct.pack(">L", zlib.crc32(c)) for c in chunks)
    with pytest.raises(ImageError, match="too large"):
        load(b"\x89PNG\r\n\x1a\n" + b"".join(parts), max_pixels=None)


def test_large_pictures_within_the_limit_raise_no_warning(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load(encoded(Image.new("RGB", (12, 12))), max_pixels=None).notes == ()


def test_warnings_of_pillow_become_notes():
    data = encoded(Image.new("RGB", (4, 4)), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x05\0" + bytes(6))
    picture = load(data, max_pixels=None)
    assert any("EXIF" in note for note in picture.notes)


def test_images_without_pixels_are_refused():
    with pytest.raises(ImageError, match="0 x 5 pixels"):
        from_pil(Image.new("RGB", (0, 5)))


# Writing


def test_unknown_suffix(make_photo):
    for suffix in (".xyz", "", ".vqz"):
        with pytest.raises(ImageError, match="no picture format has the suffix"):
            save(Picture(make_photo(4, 4)), suffix)


@pytest.mark.parametrize("suffix", [".jpg", ".bmp", ".ppm"])
@pytest.mark.parametrize("grey", [False, True])
def test_transparency_needs_a_format_that_has_it(suffix, grey):
    alpha = np.full((4, 4), 255, np.uint8)
    pixels = np.full((4, 4, 3), 77, np.uint8)
    opaque = load(save(Picture(pixels, grey=grey, alpha=alpha), suffix), max_pixels=None)
    assert opaque.alpha is None and opaque.grey == grey and opaque.pixels[0, 0, 0] == 77
    alpha[1, 2] = 254
    with pytest.raises(ImageError, match="transparency"):
        save(Picture(pixels, grey=grey, alpha=alpha), suffix)


def test_size_limits_of_formats():
    with pytest.raises(ImageError, match="WEBP allows 16383 a side"):
        save(Picture(np.zeros((1, 16384, 3), np.uint8)), ".webp")


@pytest.mark.parametrize(
    ("suffix", "exif", "xmp", "lost"),
    [
        (".jpg", 65527, 65504, ""),
        (".jpg", 65528, 65504, "EXIF"),
        (".jpg", 65527, 65505, "XMP"),
        (".png", 70_000, 70_000, ""),
        (".tif", 100, 70_000, "EXIF"),
        (".bmp", 100, 100, "EXIF and XMP"),
        (".ppm", 100, 0, "EXIF"),
    ],
)
def test_metadata_that_do_not_fit_are_left_out_with_a_note(make_photo, suffix, exif, xmp, lost):
    picture = Picture(make_photo(4, 4), exif=exif_of(3, 1, "<").ljust(exif, b"\0"), xmp=bytes(xmp).replace(b"\0", b"x"))
    fitting = adapt(picture, suffix)
    assert [note.split(" left out: ")[0] for note in fitting.notes] == [lost] * bool(lost)
    again = load(save(picture, suffix), max_pixels=None)
    assert len(again.exif or b"") == (0 if "EXIF" in lost else exif)
    assert len(again.xmp or b"") == (0 if "XMP" in lost else xmp)


@pytest.mark.parametrize("suffix", [".avif", ".png", ".jpg", ".webp", ".tif"])
def test_exif_that_cannot_be_read_is_no_obstacle(make_photo, suffix):
    """It may come from files that others made. AVIF files are written without it, as TIFF files are without any."""
    fitting = adapt(Picture(make_photo(16, 16), exif=b"not of Exif"), suffix)
    load(save(fitting, suffix), max_pixels=None)
    assert bool(fitting.notes) == (suffix in (".avif", ".tif"))


def test_long_metadata_in_png_files_are_read_again(make_photo, monkeypatch):
    """Pillow stops at 1 MiB of a profile or a text, unless it is told that more may come."""
    long = struct.pack(">L", len(SRGB) + 3_000_000) + SRGB[4:] + bytes(3_000_000)
    picture = Picture(make_photo(4, 4), icc=long, xmp=b"x" * 3_000_000)
    again = load(save(picture, ".png"), max_pixels=None)
    assert (again.icc, again.xmp) == (picture.icc, picture.xmp)
    assert PngImagePlugin.MAX_TEXT_CHUNK == 1 << 20
    monkeypatch.setitem(image._WRITERS, ".png", replace(image._WRITERS[".png"], icc=2_000_000, xmp=2_000_000))
    fitting = adapt(picture, ".png")
    assert fitting.icc is None and fitting.xmp is None and np.array_equal(fitting.pixels, picture.pixels)


def test_the_limit_of_pillow_comes_back_when_the_last_thread_is_done():
    with pillow.long_texts():
        with pillow.long_texts():
            assert PngImagePlugin.MAX_TEXT_CHUNK == PngImagePlugin.MAX_TEXT_MEMORY
        assert PngImagePlugin.MAX_TEXT_CHUNK == PngImagePlugin.MAX_TEXT_MEMORY
    assert PngImagePlugin.MAX_TEXT_CHUNK == 1 << 20


@pytest.mark.parametrize(
    ("pixels", "alpha", "message"),
    [
        (np.zeros((4, 5, 3)), None, r"pixels must be uint8 \(H, W, 3\), got float64 \(4, 5, 3\)"),
        (np.zeros((4, 5), np.uint8), None, r"got uint8 \(4, 5\)"),
        (np.zeros((4, 5, 4), np.uint8), None, r"got uint8 \(4, 5, 4\)"),
        (np.zeros((0, 5, 3), np.uint8), None, r"got uint8 \(0, 5, 3\)"),
        ([[[0, 0, 0]]], None, "got list"),
        (np.zeros((4, 5, 3), np.uint8), np.zeros((4, 5)), r"alpha must be uint8 \(4, 5\), got float64 \(4, 5\)"),
        (np.zeros((4, 5, 3), np.uint8), np.zeros((5, 4), np.uint8), r"got uint8 \(5, 4\)"),
    ],
)
def test_pictures_of_another_type_or_shape_are_refused(pixels, alpha, message):
    with pytest.raises(ImageError, match=message):
        Picture(pixels, alpha=alpha)


def test_any_damage_of_alpha_is_an_image_error():
    data = image.encode_alpha(np.arange(12, dtype=np.uint8).reshape(3, 4))
    end = data.index(b"IEND") - 4
    for chunk in (b"iCCP", b"iCCPx\0", b"acTL" + bytes(8), b"tRNS", b"zTXta\0\x01"):
        block = struct.pack(">L", len(chunk) - 4) + chunk + struct.pack(">L", zlib.crc32(chunk))
        for place in (33, end):
            try:
                image.decode_alpha(data[:place] + block + data[place:], 4, 3)
            except ImageError as error:
                assert "\n" not in str(error)
    with pytest.raises(ImageError, match="alpha cannot be read: "):
        image.decode_alpha(data[:end] + b"\0\0\0\0iCCP" + struct.pack(">L", zlib.crc32(b"iCCP")) + data[end:], 4, 3)


def test_every_suffix_is_one_that_folders_are_searched_for():
    from vqcodec import files

    assert set(image._WRITERS) <= set(files.PICTURE_SUFFIXES)


def test_contact_sheet() -> None:
    cells = [np.full((2, 3, 3), value, np.uint8) for value in range(5)]
    sheet = image.contact_sheet(cells)
    assert sheet.shape == (4, 9, 3)
    assert sheet[::2, ::3, 0].tolist() == [[0, 1, 2], [3, 4, 255]]
    assert np.array_equal(image.contact_sheet(cells[:1]), cells[0])
