"""The commented hex dump of a .vqz file, as FORMAT.md shows it: `python tests/format_dump.py FILE` prints the block.

A line is "offset: hex bytes  comment": the offset in hexadecimal, up to 16 bytes separated by single spaces, and after
two or more spaces a comment, which may be missing.
"""

import re
import sys
from pathlib import Path

from vqcodec import bitstream

_LINE = re.compile(r"([0-9a-f]{4,}): ([0-9a-f]{2}(?: [0-9a-f]{2}){0,15})(?:  .*)?")
_BYTES_PER_LINE = 16


def dump(data: bytes) -> str:
    """The lines of the dump of a whole, valid file."""
    lines = []
    offset = 0
    for size, comment in _fields(data):
        for start in range(offset, offset + size, _BYTES_PER_LINE):
            row = data[start : min(start + _BYTES_PER_LINE, offset + size)].hex(" ")
            lines.append(
                f"{start:04x}: {row:<{3 * _BYTES_PER_LINE - 1}}  {comment if start == offset else ''}".rstrip()
            )
        offset += size
    assert offset == len(data)
    return "\n".join(lines) + "\n"


def parse(block: str) -> bytes:
    """The bytes that a dump lists.

    Raises:
        ValueError: a line is not of the form above, or its offset is not the number of bytes before it.
    """
    data = b""
    for line in block.splitlines():
        match = _LINE.fullmatch(line)
        if not match:
            raise ValueError(f"not a line of a dump: {line!r}")
        if int(match[1], 16) != len(data):
            raise ValueError(f"the offset is {match[1]}, expected {len(data):04x}: {line!r}")
        data += bytes.fromhex(match[2])
    return data


def _fields(data: bytes) -> list[tuple[int, str]]:
    """Size in bytes and comment of every field, in the order of the file."""
    container = bitstream.read(data)
    header, chunks = container.header, container.chunks
    side = f"tiles of {header.tile} x {header.tile} pixels" if header.tile else "the whole picture is one tile"
    flags = ("grey" if header.grey else "RGB") + (", metadata chunks follow" if chunks else ", no metadata chunks")
    fields = [
        (4, "magic"),
        (1, f"version: {header.version}"),
        (1, f"flags: {flags}"),
        (1, f"quality: {header.quality}"),
        (1, f"tile: {side}"),
        (1, f"layers: {header.layers}"),
        (3, f"width: {header.width}"),
        (3, f"height: {header.height}"),
        (4, "weights id"),
        (2, "header check: low 16 bits of the CRC-32 of the 19 bytes before"),
    ]
    if chunks:
        fields.append((_varint_size(len(chunks)), f"chunk count: {len(chunks)}"))
    for number, chunk in enumerate(chunks, start=1):
        size = len(chunk.data)
        fields += [
            (4, f"chunk {number}: kind {chunk.kind!r}"),
            (_varint_size(size), f"  length: {size}"),
            (size, "  data"),
            (4, "  CRC-32 of kind and data"),
        ]
    tiles = header.segments // header.layers
    for index, segment in enumerate(container.segments):
        assert segment is not None  # read strictly
        size = len(segment)
        fields += [
            (_varint_size(size), f"segment {index} (layer {index // tiles}, tile {index % tiles}): length {size}"),
            (4, f"  CRC-32 of {index.to_bytes(4, 'little').hex(' ')} and data"),
            (size, "  data"),
        ]
    return fields


def _varint_size(value: int) -> int:
    return max(1, -(-value.bit_length() // 7))


if __name__ == "__main__":
    print(dump(Path(sys.argv[1]).read_bytes()), end="")
