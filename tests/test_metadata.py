"""Metadata of picture files: what is kept fits an upright picture without attachments, what is not is named."""

import io
import struct
import warnings
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pictures import chunk, with_chunks
from PIL import Image, TiffImagePlugin

from vqcodec.errors import ImageError
from vqcodec.image import Picture, load, save
from vqcodec.pictures import metadata, signalling

PREFIX = b"http://ns.adobe.com/xap/1.0/\0"
NAMESPACES = """
    xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#" xmlns:tiff="http://ns.adobe.com/tiff/1.0/"
    xmlns:dc="http://purl.org/dc/elements/1.1/" xmlns:xmpNote="http://ns.adobe.com/xmp/note/"
    xmlns:hdrgm="http://ns.adobe.com/hdr-gain-map/1.0/" xmlns:h="http://ns.adobe.com/hdr-gain-map/1.0/"
    xmlns:GCamera="http://ns.google.com/photos/1.0/camera/"
    xmlns:Container="http://ns.google.com/photos/1.0/container/"
    xmlns:Item="http://ns.google.com/photos/1.0/container/item/"
"""


def encoded(format: str = "JPEG", **options: object) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (40, 24), (200, 100, 50)).save(out, format, **options)
    return out.getvalue()


def jpeg(*segments: tuple[int, bytes]) -> bytes:
    """A JPEG file with further APP segments, each a number and its data."""
    blocks = (struct.pack(">BBH", 0xFF, 0xE0 + number, len(data) + 2) + data for number, data in segments)
    plain = encoded()
    return plain[:2] + b"".join(blocks) + plain[2:]


def with_exif(exif: bytes) -> bytes:
    return jpeg((1, b"Exif\0\0" + exif))


def with_xmp(xmp: bytes) -> bytes:
    return jpeg((1, PREFIX + xmp))


def packet(attributes: str = "", elements: str = "") -> bytes:
    description = f"<rdf:Description {NAMESPACES} dc:format='image/jpeg' {attributes}>{elements}</rdf:Description>"
    return f"<x:xmpmeta xmlns:x='adobe:ns:meta/'><rdf:RDF>{description}</rdf:RDF></x:xmpmeta>".replace(
        "<rdf:RDF>", '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    ).encode()


def exif_orientation(exif: bytes) -> object:
    """As Pillow reads it, 1 if there is none."""
    parsed = Image.Exif()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parsed.load(exif)
    return parsed.get(0x0112, 1)


# EXIF


def exif_with_thumbnail(order: str, orientation: int) -> bytes:
    header = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "L", 8)
    first = struct.pack(order + "HHHLHHL", 1, 0x0112, 3, 1, orientation, 0, 26)
    second = struct.pack(order + "HHHLLHHLLL", 2, 0x0201, 4, 1, 56, 0x0202, 4, 1, 4, 0)
    return header + first + second + b"\xff\xd8\xff\xd9"


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_thumbnail_of_a_turned_picture_is_unlinked(order: str, orientation: int) -> None:
    exif = exif_with_thumbnail(order, orientation)
    expected = bytearray(exif)
    struct.pack_into(order + "H", expected, 18, 1)
    if orientation > 1:
        struct.pack_into(order + "L", expected, 22, 0)
    assert load(with_exif(exif), max_pixels=None).exif == expected


def test_the_last_of_several_orientations_counts() -> None:
    """As Pillow has it. None is left."""
    entries = b"".join(struct.pack("<HHLHH", 0x0112, 3, 1, value, 0) for value in (1, 6))
    picture = load(with_exif(b"II*\0\x08\0\0\0\x02\0" + entries + bytes(4)), max_pixels=None)
    assert picture.pixels.shape == (40, 24, 3)
    assert picture.exif is not None and b"\x06" not in picture.exif


@pytest.mark.parametrize("kind", [6, 8, 9])
def test_signed_orientations_are_applied(kind: int) -> None:
    picture = load(with_exif(struct.pack("<2sHLHHHLLL", b"II", 42, 8, 1, 0x0112, kind, 1, 6, 0)), max_pixels=None)
    assert picture.pixels.shape == (40, 24, 3)
    assert picture.exif is not None and exif_orientation(picture.exif) == 1


def test_tags_of_tiff_files_are_kept_as_exif() -> None:
    tags = {270: "caption", 271: "Maker", 272: "Model", 305: "program", 306: "2026:01:02 03:04:05", 315: "Artist"}
    tags |= {33432: "(c)", 0x8769: {0x829A: 0.5}, 0x8825: {1: "N", 2: (48.0, 8.0, 0.0)}}
    picture = load(encoded("TIFF", tiffinfo=tags, exif=Image.Exif()), max_pixels=None)
    assert picture.exif is not None and picture.notes == ()
    parsed = Image.Exif()
    parsed.load(picture.exif)
    assert {tag: parsed[tag] for tag in tags if tag < 0x8000 or tag == 33432} == {
        tag: value for tag, value in tags.items() if isinstance(value, str)
    }
    assert parsed.get_ifd(0x8769)[0x829A] == 0.5 and parsed.get_ifd(0x8825)[1] == "N"
    assert load(save(picture, ".jpg"), max_pixels=None).exif == picture.exif


def test_a_turned_tiff_is_not_turned_twice() -> None:
    exif = Image.Exif()
    exif[0x0112], exif[271] = 6, "Maker"
    picture = load(encoded("TIFF", exif=exif), max_pixels=None)
    assert picture.pixels.shape == (40, 24, 3)
    assert picture.exif is not None and exif_orientation(picture.exif) == 1


# XMP


@pytest.mark.parametrize(
    ("xmp", "kind"),
    [
        (packet('hdrgm:Version="1.0" hdrgm:GainMapMax="3"'), "gain map"),
        (packet("h:Version = '1.0'"), "gain map"),
        (packet("", "<hdrgm:Version>1.0</hdrgm:Version><h:Gamma><rdf:Seq/></h:Gamma><h:OffsetSDR/>"), "gain map"),
        (packet("GCamera:MotionPhoto='1' GCamera:MotionPhotoVersion='1'"), "video of a motion photo"),
        (packet('GCamera:MicroVideo="1" GCamera:MicroVideoOffset="999"'), "video of a motion photo"),
        (
            packet(
                "",
                "<Container:Directory><rdf:Seq><rdf:li><Container:Item Item:Semantic='GainMap' Item:Length='9'/>"
                "</rdf:li></rdf:Seq></Container:Directory>",
            ),
            "gain map",
        ),
        (packet("", "<Container:Directory><rdf:Seq/></Container:Directory>"), "attachments"),
        (packet("xmpNote:HasExtendedXMP='00112233445566778899AABBCCDDEEFF'"), ""),
    ],
)
@pytest.mark.parametrize("format", ["JPEG", "WEBP"])
def test_no_xmp_claims_what_is_not_there(xmp: bytes, kind: str, format: str) -> None:
    picture = load(encoded(format, xmp=xmp), max_pixels=None)
    assert picture.notes == ((f"not kept: {kind}",) if kind else ())
    assert picture.xmp is not None
    (description,) = ElementTree.fromstring(picture.xmp).iter(
        "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}Description"
    )
    assert description.attrib == {"{http://purl.org/dc/elements/1.1/}format": "image/jpeg"}
    assert len(description) == 0


def test_xmp_that_cannot_be_mended_is_dropped() -> None:
    """Its orientation is applied all the same."""
    picture = load(with_xmp(b"<hdrgm:Version>1.0" + packet("tiff:Orientation='6'")), max_pixels=None)
    assert picture.pixels.shape == (40, 24, 3)
    assert picture.xmp is None and picture.notes == ("not kept: gain map, XMP",)


@pytest.mark.parametrize(
    "unit",
    [
        b" ",
        b"tiff:Orientation ",
        b"<tiff:Orientation ",
        b"<hdrgm:Gamma>",
        b"xmlns:",
        b"xmlns:%d='http://ns.adobe.com/hdr-gain-map/1.0/' ",
    ],
)
def test_reading_xmp_takes_time_by_its_length(unit: bytes) -> None:
    """A pattern that starts over at every place, or tries every name at it, would take hours for these."""
    parts = (unit % number if b"%" in unit else unit for number in range(500_000 // len(unit)))
    for start in (b"", b"tiff:Orientation='", b"tiff:Orientation"):
        load(encoded("WEBP", xmp=start + b"".join(parts)), max_pixels=None)


def test_other_camera_data_in_xmp_are_kept() -> None:
    xmp = packet("GCamera:SpecialTypeID='x'")
    picture = load(with_xmp(xmp), max_pixels=None)
    assert picture.xmp == xmp and picture.notes == ()


# What is not kept


def text(kind: bytes, data: bytes) -> bytes:
    return with_chunks(encoded("PNG"), chunk(kind, data))


def exif_with(tags: dict[int, float]) -> Image.Exif:
    made = Image.Exif()
    made.update(tags)
    return made


def text_tag(tag: int) -> TiffImagePlugin.ImageFileDirectory_v2:
    made = TiffImagePlugin.ImageFileDirectory_v2()
    made.tagtype[tag] = 2
    made[tag] = "three hundred"
    made[296] = 2
    return made


IPTC = b"Photoshop 3.0\x008BIM\x04\x04\0\0\0\0\0\x0f\x1c\x02x\0\ncaption ab\0"


@pytest.mark.parametrize(
    ("data", "kinds"),
    [
        (encoded(), ""),
        (encoded("PNG"), ""),
        (encoded("WEBP"), ""),
        (encoded("TIFF"), ""),
        (encoded("AVIF"), ""),
        (jpeg((13, IPTC)), "IPTC data"),
        (jpeg((13, b"Photoshop 3.0\x008BIM\x04\x0b\0\0\0\0\0\x04abcd")), ""),
        (encoded(comment=b"drawn by hand"), "comment"),
        (encoded("GIF", comment=b"drawn by hand"), "comment"),
        (jpeg((1, b"http://ns.adobe.com/xmp/extension/\0" + bytes(40))), "extended XMP"),
        (jpeg((2, b"urn:iso:std:iso:ts:21496:-1\0\0\0\0\0")), "gain map"),
        (encoded("PNG", dpi=(300, 300)), "resolution of 300 dpi"),
        (encoded("TIFF", dpi=(300, 600)), "resolution of 300 x 600 dpi"),
        (encoded("TIFF", tiffinfo=text_tag(282)), ""),
        (encoded("JPEG", dpi=(72, 72)), ""),
        (encoded("JPEG", dpi=(300, 300), exif=exif_with({282: 300.0})), ""),
        (text(b"tEXt", b"Author\0me"), "text"),
        (text(b"iTXt", b"Title\0\0\0\0\0the picture"), "text"),
        (text(b"tEXt", b"Raw profile type iptc\0\niptc\n 2\nabab\n"), "IPTC data"),
        (encoded("TIFF", tiffinfo={33723: b"\x1c\x02x\0\ncaption ab"}), "IPTC data"),
        (encoded("TIFF", tiffinfo={34735: (1, 1, 0, 0)}), "GeoTIFF tags"),
        (jpeg((13, IPTC), (1, b"http://ns.adobe.com/xmp/extension/\0" + bytes(40))), "IPTC data, extended XMP"),
    ],
)
def test_one_note_names_what_is_not_kept(data: bytes, kinds: str) -> None:
    assert load(data, max_pixels=None).notes == ((f"not kept: {kinds}",) if kinds else ())


def test_the_gain_map_of_an_avif_file_is_named() -> None:
    """Pillow writes none, so the test changes the brand that such files have."""
    data = encoded("AVIF")
    assert not signalling.read(data).gain_map
    assert signalling.read(data.replace(b"MA1B", b"tmap")).gain_map
    notes: list[str] = []
    with Image.open(io.BytesIO(data)) as image:
        metadata.read(image, notes, gain_map=True)
    assert notes == ["not kept: gain map"]


def test_an_icc_profile_in_a_text_chunk() -> None:
    profile = load(with_chunks(encoded("PNG"), chunk(b"cICP", bytes([12, 13, 0, 1]))), max_pixels=None).icc
    assert profile is not None
    digits = f"Raw profile type icc\0\nicc\n{len(profile):8}\n{profile.hex()}\n".encode()
    picture = load(text(b"tEXt", digits), max_pixels=None)
    assert picture.icc == profile and picture.notes == ()


# Anything at all


fixed = settings(derandomize=True, deadline=None, database=None, max_examples=200)
entries = st.tuples(
    st.sampled_from([0x0112, 0x0112, 0x010F, 0x8769, 0x0201]),
    st.integers(0, 14),
    st.sampled_from([0, 1, 1, 1, 2, 3, 9, 0xFFFFFFFF]),
    st.binary(min_size=4, max_size=4) | st.integers(0, 9).map(lambda value: struct.pack("<HH", value, 0)),
)


@st.composite
def exifs(draw: st.DrawFn) -> bytes:
    """EXIF data whose structure makes sense for a while."""
    order = draw(st.sampled_from("<>"))
    header = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(
        order + "L", draw(st.sampled_from([8, 8, 8, 10, 0, 500]))
    )
    listed = draw(st.lists(entries, max_size=4))
    count = draw(st.sampled_from([len(listed)] * 4 + [0, 1, 60_000]))
    body = b"".join(struct.pack(order + "HHL", *entry[:3]) + entry[3] for entry in listed)
    return header + struct.pack(order + "H", count) + body + draw(st.binary(max_size=40))


@given(exifs() | st.binary(max_size=60))
@example(b"MM*\0\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0")
@example(b"II+\0\x08\0\0\0\x10\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0\x12\x01\x03\0\x01\0\0\0\0\0\0\0\x06\0\0\0\0\0\0\0")
@fixed
def test_any_exif_leaves_an_upright_picture(exif: bytes) -> None:
    data = with_exif(exif) if len(exif) % 2 else with_chunks(encoded("PNG"), chunk(b"eXIf", exif))
    try:
        picture = load(data, max_pixels=None)
    except ImageError as error:
        assert "\n" not in str(error)
        return
    assert sorted(picture.pixels.shape) == [3, 24, 40]
    if picture.exif is not None:
        assert exif_orientation(picture.exif) == 1
        assert len(picture.exif) == len(exif)
        again = load(save(picture, ".jpg"), max_pixels=None)
        assert again.pixels.shape == picture.pixels.shape


spaces = st.sampled_from(["", " ", "\n\t"])


@st.composite
def orientations(draw: st.DrawFn) -> tuple[int, bytes]:
    """An orientation, and a packet that has it."""
    value, quote, name = (
        draw(st.integers(0, 9)),
        draw(st.sampled_from("\"'")),
        draw(st.sampled_from(["tiff", "t", "a.b-c"])),
    )
    before, after = draw(spaces), draw(spaces)
    inside = f"{draw(spaces)}{value}{draw(spaces)}"
    declared = f" xmlns:{name}{before}={after}{quote}http://ns.adobe.com/tiff/1.0/{quote}" if name != "tiff" else ""
    if draw(st.booleans()):
        return value, packet(f"{declared} {name}:Orientation{before}={after}{quote}{inside}{quote}")
    more = f" rdf:datatype={quote}integer{quote}" if draw(st.booleans()) else ""
    element = f"<{name}:Orientation{more}{before}>{inside}</{name}:Orientation>"
    return value, packet(declared, element)


@given(orientations())
@fixed
def test_any_spelling_of_an_orientation_in_xmp_is_applied(case: tuple[int, bytes]) -> None:
    value, xmp = case
    picture = load(with_xmp(xmp), max_pixels=None)
    assert picture.pixels.shape == ((40, 24, 3) if 5 <= value <= 8 else (24, 40, 3))
    assert picture.xmp is not None and picture.exif is None and picture.notes == ()
    name = "{http://ns.adobe.com/tiff/1.0/}Orientation"
    root = ElementTree.fromstring(picture.xmp)
    texts = [node.attrib[name] for node in root.iter() if name in node.attrib]
    texts += [node.text or "" for node in root.iter(name)]
    assert [text.strip() for text in texts] == ["1"]


@given(st.lists(st.sampled_from(
    [b"<hdrgm:a>", b"</hdrgm:a>", b"<hdrgm:b/>", b' hdrgm:c="1"', b" tiff:Orientation='6'", b"<tiff:Orientation>", b"3",
     b"<Container:Directory>", b"</Container:Directory>", b"<", b">", b'"', b"'", b"=", b" ", b"xmlns:h='http://ns.adobe.com/hdr-gain-map/1.0/'",
     b"<h:a>", b"</h:a>", b"GCamera:MotionPhoto", b"\xff"]
), max_size=14).map(b"".join))  # fmt: skip
@fixed
def test_any_xmp_leaves_a_picture(xmp: bytes) -> None:
    picture = load(with_xmp(xmp), max_pixels=None)
    assert sorted(picture.pixels.shape) == [3, 24, 40]
    assert picture.xmp is None or b"hdrgm:" not in picture.xmp
    again = load(with_xmp(picture.xmp or b""), max_pixels=None)
    assert again.pixels.shape == (24, 40, 3) and again.xmp == picture.xmp
    assert np.array_equal(again.pixels, load(encoded(), max_pixels=None).pixels)
    assert isinstance(again, Picture)
