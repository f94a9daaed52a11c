"""Metadata of picture files: EXIF data and XMP packets, which are kept, and other kinds, which are only named.

    Pillow image -> read() -> EXIF data, XMP packet, orientation
                           -> notes: kinds that are dropped

What is kept describes an upright picture without attachments. All its other bytes stay as they are, because rewriting
EXIF data loses maker notes.
"""

import math
import numbers
import re
import struct
from collections.abc import Iterator

from PIL import Image

EXIF_PREFIX = b"Exif\0\0"
_XMP_PREFIX = b"http://ns.adobe.com/xap/1.0/\0"
_EXTENDED_XMP_PREFIX = b"http://ns.adobe.com/xmp/extension/\0"
_GAIN_MAP_PREFIX = b"urn:iso:std:iso:ts:21496:-1\0"
_ORIENTATION_TAG = 0x0112
_INTEGERS = {1: "B", 3: "H", 4: "L", 6: "b", 8: "h", 9: "l"}  # types of EXIF values that an orientation is stored as
_EXIF_DIRECTORY, _GPS_DIRECTORY = 0x8769, 0x8825
# Tags of TIFF files that say something about the picture rather than how it is stored: names, descriptions, makers,
# dates, artist, host, copyright.
_DESCRIPTIVE_TAGS = (269, 270, 271, 272, 285, 305, 306, 315, 316, 33432)
_IPTC_TAG, _PHOTOSHOP_TAG, _GEO_TAG = 33723, 34377, 34735
_IPTC_RESOURCE = 0x0404  # of Photoshop's image resources
_RESOLUTION_TAG = 282
_USUAL_DPI = {0, 1, 72, 96}  # what programs write or read where nobody has measured anything
_KEPT_TEXTS = {"XML:com.adobe.xmp", *(f"Raw profile type {kind}" for kind in ("exif", "APP1", "xmp", "icc", "icm"))}
_GAIN_MAP, _MOTION_PHOTO = "gain map", "video of a motion photo"
# What describes pictures and videos after the first one: XML namespace, its usual prefix, names, and what it is.
_ATTACHMENTS = (
    (b"http://ns.adobe.com/hdr-gain-map/1.0/", b"hdrgm", rb"\w+", _GAIN_MAP),
    (b"http://ns.google.com/photos/1.0/camera/", b"GCamera", rb"(?:MotionPhoto|MicroVideo)\w*", _MOTION_PHOTO),
    (b"http://ns.google.com/photos/1.0/container/", b"Container", rb"Directory", "attachments"),
)
_SEMANTIC = re.compile(rb"""[\w.-]{1,40}:Semantic\s*(?:=\s*["']|>)\s*(GainMap|RecoveryMap|MotionPhoto)""")
_EXTENSION = (b"http://ns.adobe.com/xmp/note/", b"xmpNote", rb"HasExtendedXMP")


def read(image: Image.Image, notes: list[str], *, gain_map: bool = False) -> tuple[bytes | None, bytes | None, int]:
    """Read the metadata of a Pillow image whose pixels are loaded.

    Args:
        image: the image.
        notes: get a line for what is damaged, and one that names the kinds of metadata that are not kept.
        gain_map: whether the file is known to have one.

    Returns:
        EXIF data, starting with its TIFF header; XMP packet; and the orientation as the file has it, 1 to 8, 0 if it
        has none. The orientation in what is kept is 1.
    """
    exif = _exif(image)
    if exif is not None and not readable(exif):
        exif = None
        notes.append("the EXIF data is damaged and was dropped")
    packet = _xmp(image)
    orientation = _exif_orientation(exif) or _xmp_orientation(packet)
    xmp, attachments = _without_attachments(packet)
    if exif is not None:
        exif = _upright_exif(exif, turned=orientation > 1)
    if xmp is not None:
        xmp = _upright_xmp(xmp)
    others = [*_others(image), *_resolution(image, exif)]
    dropped = dict.fromkeys([*[_GAIN_MAP] * gain_map, *attachments, *others])  # each kind once
    if dropped:
        notes.append(f"not kept: {', '.join(dropped)}")
    return exif, xmp, orientation


def raw_profile(image: Image.Image, kind: str) -> bytes:
    """Metadata that ImageMagick stores in a text chunk of PNG files: a name, a length, and hexadecimal digits."""
    text = image.info.get(f"Raw profile type {kind}")
    try:
        return bytes.fromhex("".join(text.split()[2:])) if isinstance(text, str) else b""
    except ValueError:
        return b""


def _others(image: Image.Image) -> Iterator[str]:
    """Name kinds of metadata for which there is no place."""
    segments = getattr(image, "applist", ())  # of JPEG files
    tags = getattr(image, "tag_v2", {}) if image.format == "TIFF" else {}
    texts = set(getattr(image, "text", {}))
    if any(name == "APP2" and content.startswith(_GAIN_MAP_PREFIX) for name, content in segments):
        yield _GAIN_MAP
    iptc_texts = {"Raw profile type iptc", "Raw profile type 8bim"}
    resources = image.info.get("photoshop")
    if isinstance(resources, dict) and _IPTC_RESOURCE in resources:
        yield "IPTC data"
    if {_IPTC_TAG, _PHOTOSHOP_TAG} & set(tags) or iptc_texts & texts:
        yield "IPTC data"
    if any(name == "APP1" and content.startswith(_EXTENDED_XMP_PREFIX) for name, content in segments):
        yield "extended XMP"
    if _GEO_TAG in tags:
        yield "GeoTIFF tags"
    if image.info.get("comment"):
        yield "comment"
    if texts - _KEPT_TEXTS - iptc_texts:
        yield "text"


def _resolution(image: Image.Image, exif: bytes | None) -> Iterator[str]:
    """Name a resolution that was set on purpose, unless EXIF data keep it."""
    kept = Image.Exif()
    kept.load(exif or b"")
    # Files of wrong types have text there.
    dots = [x for x in image.info.get("dpi", ()) if isinstance(x, numbers.Real)]
    found = [round(float(x)) for x in dots if math.isfinite(x)]
    if _RESOLUTION_TAG not in kept and not set(found) <= _USUAL_DPI:
        yield f"resolution of {' x '.join(map(str, dict.fromkeys(found)))} dpi"


# EXIF


def _exif(image: Image.Image) -> bytes | None:
    """Return the EXIF data of an opened file without prefixes."""
    if image.format == "TIFF":
        return _exif_of_tiff(image)
    exif = image.info.get("exif") or raw_profile(image, "exif") or raw_profile(image, "APP1")
    if not exif or not isinstance(exif, bytes) or exif.startswith(_XMP_PREFIX):
        return None
    while exif.startswith(EXIF_PREFIX):  # Pillow adds a second one to that of some writers
        exif = exif.removeprefix(EXIF_PREFIX)
    return exif


def _exif_of_tiff(image: Image.Image) -> bytes | None:
    """Make EXIF data of the tags of a TIFF file. b"" if that cannot be done."""
    source, made = image.getexif(), Image.Exif()
    try:
        for tag in _DESCRIPTIVE_TAGS:
            if tag in source:
                made[tag] = source[tag]
        for directory in (_EXIF_DIRECTORY, _GPS_DIRECTORY):
            if directory in source:
                made[directory] = dict(source.get_ifd(directory))
        return made.tobytes().removeprefix(EXIF_PREFIX) if made else None
    except Exception:  # noqa: BLE001 - values may be of any type
        return b""


def readable(exif: bytes) -> bool:
    """Whether Pillow can make sense of EXIF data, without prefix."""
    if exif[:4] not in (b"II*\0", b"MM\0*"):
        return False
    try:
        Image.Exif().load(exif)
    except Exception:  # noqa: BLE001 - Pillow raises exceptions of nearly all types
        return False
    return True


def _entries(exif: bytes, tag: int) -> Iterator[int]:
    """Yield the places of the entries of a tag in the first directory of EXIF data."""
    order = _order(exif)
    (directory,) = struct.unpack_from(order + "L", exif, 4)
    (entries,) = struct.unpack_from(order + "H", exif, directory)
    for entry in range(directory + 2, min(directory + 2 + 12 * entries, len(exif) - 11), 12):
        if struct.unpack_from(order + "H", exif, entry)[0] == tag:
            yield entry


def _order(exif: bytes) -> str:
    return "<" if exif[:2] == b"II" else ">"


def _exif_orientation(exif: bytes | None) -> int:
    """Return the orientation, 0 if there is none."""
    if exif is None:
        return 0
    order, value = _order(exif), 0
    try:
        for entry in _entries(exif, _ORIENTATION_TAG):
            kind, count = struct.unpack_from(order + "HL", exif, entry + 2)
            if kind in _INTEGERS and count:
                # Values that do not fit into the entry are where it points to.
                place = entry + 8
                if count * struct.calcsize(order + _INTEGERS[kind]) > 4:
                    (place,) = struct.unpack_from(order + "L", exif, place)
                value = struct.unpack_from(order + _INTEGERS[kind], exif, place)[0]
    except struct.error:
        pass
    return value if 1 <= value <= 8 else 0


def _upright_exif(exif: bytes, *, turned: bool) -> bytes:
    """Set the orientation to 1. If the picture was turned, unlink the thumbnail, which was not."""
    order, changed = _order(exif), bytearray(exif)
    try:
        for entry in _entries(exif, _ORIENTATION_TAG):
            struct.pack_into(order + "HLHH", changed, entry + 2, 3, 1, 1, 0)  # one short
        if turned:
            (directory,) = struct.unpack_from(order + "L", exif, 4)
            (entries,) = struct.unpack_from(order + "H", exif, directory)
            struct.pack_into(order + "L", changed, directory + 2 + 12 * entries, 0)  # of the next directory
    except struct.error:
        pass
    return bytes(changed)


# XMP


def _xmp(image: Image.Image) -> bytes | None:
    xmp = image.info.get("xmp")
    if isinstance(xmp, str):
        xmp = xmp.encode()
    if not isinstance(xmp, bytes):
        app1 = raw_profile(image, "APP1")
        xmp = raw_profile(image, "xmp") or (app1 if app1.startswith(_XMP_PREFIX) else b"")
    return xmp.removeprefix(_XMP_PREFIX) or None


def _name(xmp: bytes, namespace: bytes, usual: bytes, local: bytes) -> bytes:
    """A regular expression for names in a namespace, by the prefixes that a packet declares and by the usual one."""
    bound = re.findall(rb"""xmlns:([^\s=:]{1,40})\s*=\s*["']""" + re.escape(namespace) + rb"""["']""", xmp)
    prefixes = list(dict.fromkeys([usual, *bound]))[:8]  # thousands of them would take minutes
    return rb"(?<![\w.-])(?:" + b"|".join(map(re.escape, prefixes)) + b"):" + local


def _orientations(xmp: bytes) -> re.Pattern[bytes]:
    """Finds orientations in attributes and elements: before, and the value with spaces."""
    name = _name(xmp, b"http://ns.adobe.com/tiff/1.0/", b"tiff", b"Orientation")
    return re.compile(rb"((?:%s\s*=\s*[\"']|<%s(?:\s[^<>]*)?>))([^\"'<>]*)" % (name, name))


def _xmp_orientation(xmp: bytes | None) -> int:
    found = _orientations(xmp).search(xmp) if xmp else None
    value = found[2].strip() if found else b""
    return int(value) if re.fullmatch(rb"[1-8]", value) else 0


def _upright_xmp(xmp: bytes) -> bytes:
    return _orientations(xmp).sub(lambda found: found[1] + found[2].replace(found[2].strip(), b"1", 1), xmp)


def _without_attachments(xmp: bytes | None) -> tuple[bytes | None, list[str]]:
    """Remove what an XMP packet says of pictures and videos after the first one, and of an extension.

    Returns:
        The packet, and kinds of what it spoke of. Without the packet, if that cannot be removed.
    """
    if xmp is None:
        return None, []
    kinds = []
    for semantic in dict.fromkeys(_SEMANTIC.findall(xmp)):
        kinds.append(_MOTION_PHOTO if semantic == b"MotionPhoto" else _GAIN_MAP)
    for namespace, usual, local, kind in _ATTACHMENTS:
        name = _name(xmp, namespace, usual, local)
        if re.search(name, xmp):
            kinds += [] if kinds and kind == "attachments" else [kind]
            xmp = _without(xmp, name)
    xmp = _without(xmp, _name(xmp, *_EXTENSION))
    left = (_name(xmp, *attachment[:3]) for attachment in _ATTACHMENTS)
    if any(re.search(name, xmp) for name in left):
        return None, [*kinds, "XMP"]
    return xmp or None, kinds


def _without(xmp: bytes, name: bytes) -> bytes:
    """Remove the attributes and elements of a name."""
    xmp = re.sub(rb"""\s%s\s*=\s*(?:"[^"]*"|'[^']*')""" % name, b"", xmp)
    parts, start = [], 0
    for found in re.finditer(rb"<(%s)(?:\s[^<>]*?)?(/?)>" % name, xmp):
        if found.start() < start:  # inside of an element that is removed
            continue
        end = found.end()
        if not found[2]:
            closing = b"</" + found[1] + b">"
            end = xmp.find(closing, end) + len(closing)
            if end < len(closing):  # never closed
                break
        parts.append(xmp[start : found.start()])
        start = end
    return b"".join([*parts, xmp[start:]])
