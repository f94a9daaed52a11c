"""What PNG and AVIF files state beside their pixels and Pillow does not tell: colours by code points, and the depth.

Sources: PNG Specification (Third Edition), 11.3.2.6 cICP; ISO/IEC 14496-12 (boxes), 23008-12 (items and properties) and
the AV1 ISOBMFF binding (av1C).
"""

import struct
from collections.abc import Iterator
from typing import NamedTuple


class CodePoints(NamedTuple):
    """Colours by the numbers of ITU-T H.273: primaries, transfer function, matrix, and whether the range is full."""

    primaries: int
    transfer: int
    matrix: int
    full_range: bool


class Signals(NamedTuple):
    """What a file states.

    Args:
        colours: None if the file does not say.
        bits: per channel; 0 if the file is no AVIF file.
        gain_map: whether there is a second picture that makes this one HDR.
    """

    colours: CodePoints | None = None
    bits: int = 0
    gain_map: bool = False


def read(data: bytes) -> Signals:
    """Read the signals of a file of any format. What is damaged counts as missing."""
    try:
        if data.startswith(b"\x89PNG\r\n\x1a\n"):
            return Signals(_cicp(data))
        if data[4:8] == b"ftyp":
            return _avif(data)
    except (struct.error, LookupError):
        pass
    return Signals()


def _cicp(data: bytes) -> CodePoints | None:
    place, kind = 8, b""
    while kind != b"IDAT":
        length, kind = struct.unpack_from(">L4s", data, place)
        if kind == b"cICP":
            primaries, transfer, matrix, full_range = struct.unpack_from(">4B", data, place + 8)
            return CodePoints(primaries, transfer, matrix, full_range == 1)
        place += length + 12
    return None


def _avif(data: bytes) -> Signals:
    top = dict(_boxes(data, 0, len(data)))
    meta = dict(_boxes(data, top[b"meta"][0] + 4, top[b"meta"][1])) if b"meta" in top else {}
    brands = data[slice(*top[b"ftyp"])]
    if b"pitm" not in meta or b"iprp" not in meta:
        return Signals()
    place = meta[b"pitm"][0]
    (primary,) = struct.unpack_from(">L" if data[place] else ">H", data, place + 4)
    colours, bits = None, 8
    for kind, place in _properties(data, primary, *meta[b"iprp"]):
        if kind == b"colr" and data[place : place + 4] == b"nclx" and colours is None:
            primaries, transfer, matrix, flags = struct.unpack_from(">HHHB", data, place + 4)
            colours = CodePoints(primaries, transfer, matrix, flags >= 128)
        elif kind == b"pixi":
            bits = max(bits, *data[place + 5 : place + 5 + data[place + 4]])
        elif kind == b"av1C":
            bits = max(bits, 8 + 2 * (data[place + 2] >> 6 & 1) + 2 * (data[place + 2] >> 5 & 1))
    return Signals(colours, bits, b"tmap" in brands)


def _properties(data: bytes, item: int, start: int, end: int) -> Iterator[tuple[bytes, int]]:
    """Yield the kind and place of each property of an item. Args: start, end: the `iprp` box."""
    boxes = dict(_boxes(data, start, end))
    every = list(_boxes(data, *boxes[b"ipco"])) if b"ipco" in boxes and b"ipma" in boxes else []
    if not every:
        return
    place = boxes[b"ipma"][0]
    version, flags = data[place], data[place + 3]
    (entries,) = struct.unpack_from(">L", data, place + 4)
    place += 8
    for _ in range(entries):
        identifier, count = struct.unpack_from(">LB" if version else ">HB", data, place)
        place += 5 if version else 3
        for _ in range(count):
            index = struct.unpack_from(">H", data, place)[0] & 0x7FFF if flags & 1 else data[place] & 0x7F
            place += 2 if flags & 1 else 1
            if identifier == item and 1 <= index <= len(every):
                yield every[index - 1][0], every[index - 1][1][0]


def _boxes(data: bytes, start: int, end: int) -> Iterator[tuple[bytes, tuple[int, int]]]:
    """Yield the kind of each box and where its content starts and ends."""
    while start + 8 <= end:
        size, kind = struct.unpack_from(">L4s", data, start)
        head = 8
        if size == 1:
            (size,) = struct.unpack_from(">Q", data, start + 8)
            head = 16
        stop = start + size if size else end
        if stop < start + head or stop > end:
            return
        yield kind, (start + head, stop)
        start = stop
