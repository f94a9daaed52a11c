"""Reads and writes the .vqz container that FORMAT.md specifies. Standard library only.

    header (21 bytes) | chunk count, chunks (only if flagged) | segment 0 | segment 1 | ... | end of file

Reading is strict: the same content has only one valid encoding, a checksum covers every byte, and any error raises a
FormatError. The entropy coder defines what a segment holds.
"""

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from vqcodec import limits
from vqcodec.errors import (
    ChecksumError,
    FormatError,
    HeaderError,
    LimitError,
    NotVqzError,
    TrailingDataError,
    TruncatedError,
    VersionError,
)
from vqcodec.frame import Frame

MAGIC = b"VQZ\x1a"  # the last byte ends text output on some terminals and is not valid in a text file
VERSION = 1
CHUNK_KINDS = ("ICCP", "EXIF", "XMP ", "ALPH")
HEADER_BYTES = 21
TILE_UNIT = 64
MAX_TILE = 255 * TILE_UNIT

# Reading makes a list with an entry per segment, even if the file ends after its header: a million entries take 8 MB.
MAX_SEGMENTS = 1 << 20

_GREY, _HAS_CHUNKS = 1, 2  # bits of the flags byte
_VARINT_BYTES = 5  # 35 bits: every length is below 32 GiB
_CRC_BYTES = 4


@dataclass(frozen=True)
class Header:
    """The first 21 bytes of a file. The constructor checks all fields, so that every Header is valid.

    Args:
        width, height: size of the picture in pixels, 1 to 16,777,215.
        quality: the quality that the picture was compressed with, 1 to 100.
        weights_id: the id of the weights that the picture was compressed with, 4 bytes.
        layers: number of progressive layers, 1 to 255.
        tile: side of a tile in pixels, a multiple of 64 up to 16,320; 0 if the whole picture is one tile.
        grey: whether the picture has a single channel.
        version: format version.

    Raises:
        VersionError: the version is not VERSION.
        HeaderError: a field is outside its allowed values.
        LimitError: there would be more than MAX_SEGMENTS segments.
    """

    width: int
    height: int
    quality: int
    weights_id: bytes
    layers: int
    tile: int
    grey: bool = False
    version: int = VERSION

    def __post_init__(self) -> None:
        _check_version(self.version)
        for name, high in (("width", 0xFFFFFF), ("height", 0xFFFFFF), ("quality", 100), ("layers", 255)):
            value = getattr(self, name)
            if not 1 <= value <= high:
                raise HeaderError(f"{name} is {value}, expected 1 to {high}")
        if self.tile not in range(0, MAX_TILE + 1, TILE_UNIT):
            raise HeaderError(f"tile is {self.tile} pixels, expected a multiple of {TILE_UNIT} up to {MAX_TILE}")
        if len(self.weights_id) != 4:
            raise HeaderError(f"weights id has {len(self.weights_id)} bytes, expected 4")
        if self.segments > MAX_SEGMENTS:
            raise LimitError(f"the header promises {self.segments} segments, the limit is {MAX_SEGMENTS}")

    @staticmethod
    def of(frame: Frame, weights_id: bytes, layers: int) -> "Header":
        """Make the header of a picture with this frame, coded with weights of this id and number of layers."""
        return Header(frame.width, frame.height, frame.quality, weights_id, layers, frame.tile, frame.grey)

    @property
    def frame(self) -> Frame:
        """The part of the header that encoder and decoder work with."""
        return Frame(self.width, self.height, self.quality, self.tile, self.grey)

    @property
    def tiles(self) -> tuple[int, int]:
        """Number of rows and number of columns of tiles."""
        if self.tile == 0:
            return 1, 1
        return -(-self.height // self.tile), -(-self.width // self.tile)

    @property
    def segments(self) -> int:
        """Number of segments in the file: one per layer and tile."""
        rows, columns = self.tiles
        return rows * columns * self.layers

    @property
    def pixels(self) -> int:
        """Number of pixels of the picture."""
        return self.width * self.height


@dataclass(frozen=True)
class Chunk:
    """A piece of metadata.

    Args:
        kind: 4 printable ASCII characters, the first a letter. If it is lower case, readers may ignore the chunk.
        data: the metadata, any number of bytes.

    Raises:
        HeaderError: the kind has another form.
    """

    kind: str
    data: bytes

    def __post_init__(self) -> None:
        if not re.fullmatch("[A-Za-z][ -~]{3}", self.kind):
            raise HeaderError(f"chunk kind is {self.kind!r}, expected a letter and three printable ASCII characters")


@dataclass(frozen=True)
class Container:
    """The parts of a file.

    Args:
        header: the header.
        chunks: metadata in the order of the file, with unknown kinds that readers may ignore.
        segments: layer by layer, the tiles of a layer in raster order; None if missing or damaged.
        problems: one line for each error in the file; empty if there is none.
    """

    header: Header
    chunks: tuple[Chunk, ...]
    segments: tuple[bytes | None, ...]
    problems: tuple[str, ...]


@dataclass(frozen=True)
class Info:
    """A description of a file, made without decoding it.

    Args:
        header: the header.
        file_bytes: size of the file.
        bits_per_pixel: bits of the whole file per pixel of the picture.
        chunks: kind of each chunk and the size of its data in bytes.
        layer_bytes: for each layer, the bytes of its segments in the file, with their lengths and checksums. The
            segments are the last part of the file: without the last n layers, it has sum(layer_bytes[-n:]) bytes less.
    """

    header: Header
    file_bytes: int
    bits_per_pixel: float
    chunks: tuple[tuple[str, int], ...]
    layer_bytes: tuple[int, ...]


def write(header: Header, chunks: Sequence[Chunk], segments: Sequence[bytes]) -> bytes:
    """Write the bytes of a file.

    Args:
        header: the header.
        chunks: metadata, each of the kinds in CHUNK_KINDS at most once.
        segments: header.segments byte strings: layer by layer, the tiles of a layer in raster order.

    Raises:
        HeaderError: a chunk kind is unknown and starts with a capital letter, or occurs twice.
        ValueError: the number of segments is not header.segments.
    """
    if len(segments) != header.segments:
        raise ValueError(f"there are {len(segments)} segments, expected {header.segments}")
    parts = [_pack_header(header, has_chunks=bool(chunks))]
    if chunks:
        _check_kinds(chunks)
        parts.append(_varint(len(chunks)))
    for chunk in chunks:
        kind = chunk.kind.encode("ascii")
        parts += kind, _varint(len(chunk.data)), chunk.data, _crc(kind + chunk.data)
    for index, segment in enumerate(segments):
        parts += _varint(len(segment)), _segment_crc(index, segment), segment
    return b"".join(parts)


def read(data: bytes, *, max_pixels: int | None = limits.DEFAULT_MAX_PIXELS, partial: bool = False) -> Container:
    """Read the parts of a file and check every byte.

    Args:
        data: the whole file.
        max_pixels: largest width x height to accept; None for no limit. It is checked before memory is allocated: a
            header of 21 bytes can state 2^48 pixels. See `limits.excess`.
        partial: accept a file that is cut or damaged after its chunks. Segments that are missing or have a wrong
            checksum are then None, and Container.problems says why.

    Raises:
        FormatError: the file is not valid; the subclass says why. No bytes cause another exception.
    """
    data = _as_bytes(data)
    header, has_chunks = _unpack_header(data)
    if problem := limits.excess(header.width, header.height, max_pixels):
        raise LimitError(problem)
    reader = _Reader(data, HEADER_BYTES)
    chunks = reader.chunks() if has_chunks else ()
    segments: list[bytes | None] = []
    problems: list[str] = []
    try:
        for index in range(header.segments):
            try:
                segments.append(reader.segment(index, header.segments))
            except ChecksumError as error:
                if not partial:
                    raise
                segments.append(None)
                problems.append(str(error))
        if reader.offset < len(data):
            raise TrailingDataError(f"the last segment ends at byte {reader.offset}, the file has {len(data)} bytes")
    except FormatError as error:
        if not partial:
            raise
        problems.append(str(error))
    segments += [None] * (header.segments - len(segments))
    return Container(header, chunks, tuple(segments), tuple(problems))


def read_header(data: bytes) -> Header:
    """Read the header of a file from its first 21 bytes. The bytes after them are not looked at.

    Raises:
        FormatError: the header is not valid; the subclass says why.
    """
    return _unpack_header(_as_bytes(data))[0]


def read_info(data: bytes) -> Info:
    """Describe a file without decoding it. The whole container is checked; the picture may have any size.

    Raises:
        FormatError: the file is not valid; the subclass says why.
    """
    container = read(data, max_pixels=None)
    header = container.header
    sizes = [len(segment) for segment in container.segments if segment is not None]  # without `partial`, none is None
    stored = [len(_varint(size)) + _CRC_BYTES + size for size in sizes]
    tiles = header.segments // header.layers
    return Info(
        header=header,
        file_bytes=len(data),
        bits_per_pixel=8 * len(data) / header.pixels,
        chunks=tuple((chunk.kind, len(chunk.data)) for chunk in container.chunks),
        layer_bytes=tuple(sum(stored[start : start + tiles]) for start in range(0, len(stored), tiles)),
    )


class _Reader:
    """Reads the bytes of a file one after the other, and checks each time that they are there."""

    def __init__(self, data: bytes, offset: int) -> None:
        self.data = data
        self.offset = offset

    def take(self, count: int, what: str) -> bytes:
        end = self.offset + count
        if end > len(self.data):
            raise TruncatedError(f"{what} ends at byte {end}, the file has {len(self.data)} bytes")
        taken = self.data[self.offset : end]
        self.offset = end
        return taken

    def varint(self, what: str) -> int:
        value = 0
        for position, byte in enumerate(self.data[self.offset : self.offset + _VARINT_BYTES]):
            value |= (byte & 0x7F) << 7 * position
            if byte < 0x80:
                if byte == 0 and position > 0:
                    raise HeaderError(f"{what} takes {position + 1} bytes, expected the shortest form")
                self.offset += position + 1
                return value
        if self.offset + _VARINT_BYTES <= len(self.data):
            raise HeaderError(f"{what} takes more than {_VARINT_BYTES} bytes, expected at most {_VARINT_BYTES}")
        raise TruncatedError(f"{what} starts at byte {self.offset}, the file has {len(self.data)} bytes")

    def chunks(self) -> tuple[Chunk, ...]:
        total = self.varint("the chunk count")
        if total == 0:
            raise HeaderError("the chunk count is 0, expected at least 1 because the flags promise chunks")
        chunks = []
        for index in range(total):
            what = f"chunk {index + 1} of {total}"
            kind = self.take(4, f"the kind of {what}")
            length = self.varint(f"the length of {what}")
            data = self.take(length, what)
            stored = self.take(_CRC_BYTES, f"the CRC-32 of {what}")
            _check_crc(what, stored, _crc(kind + data))
            chunks.append(Chunk(kind.decode("latin-1"), data))
        _check_kinds(chunks)
        return tuple(chunks)

    def segment(self, index: int, total: int) -> bytes:
        what = f"segment {index + 1} of {total}"
        length = self.varint(f"the length of {what}")
        stored = self.take(_CRC_BYTES, f"the CRC-32 of {what}")
        data = self.take(length, what)
        _check_crc(what, stored, _segment_crc(index, data))
        return data


def _pack_header(header: Header, has_chunks: bool) -> bytes:
    flags = _GREY * header.grey | _HAS_CHUNKS * has_chunks
    fields = bytes((header.version, flags, header.quality, header.tile // TILE_UNIT, header.layers))
    size = header.width.to_bytes(3, "little") + header.height.to_bytes(3, "little")
    packed = MAGIC + fields + size + header.weights_id
    return packed + _crc(packed)[:2]


def _as_bytes(data: object) -> bytes:
    """Bytes, whose parts can be keys, in place of other types of the same content.

    Raises:
        TypeError: it is of another kind.
    """
    if not isinstance(data, (bytes, bytearray, memoryview)):
        raise TypeError(f"expected the bytes of a .vqz file, got {type(data).__name__}")
    return bytes(data)


def _unpack_header(data: bytes) -> tuple[Header, bool]:
    """Return the header, and whether chunks follow it."""
    start = data[: len(MAGIC)]
    if start != MAGIC[: len(start)]:
        raise NotVqzError(f"not a .vqz file: it starts with {start.hex(' ')} instead of {MAGIC.hex(' ')}")
    # The version is checked before everything else, because another version may have another header.
    if len(data) > len(MAGIC):
        _check_version(data[len(MAGIC)])
    if len(data) < HEADER_BYTES:
        raise TruncatedError(f"the header ends at byte {HEADER_BYTES}, the file has {len(data)} bytes")
    packed, check = data[: HEADER_BYTES - 2], data[HEADER_BYTES - 2 : HEADER_BYTES]
    if check != _crc(packed)[:2]:
        raise HeaderError(f"the header check is {check.hex(' ')}, its fields give {_crc(packed)[:2].hex(' ')}")
    flags, quality, tile, layers = packed[5:9]
    if flags > (_GREY | _HAS_CHUNKS):
        raise HeaderError(f"the flags are {flags:#010b}, expected only the lowest two bits to be used")
    width, height = int.from_bytes(packed[9:12], "little"), int.from_bytes(packed[12:15], "little")
    grey = bool(flags & _GREY)
    return Header(width, height, quality, packed[15:19], layers, tile * TILE_UNIT, grey), bool(flags & _HAS_CHUNKS)


def _check_version(version: int) -> None:
    if version != VERSION:
        raise VersionError(f"the file has format version {version}, this program reads version {VERSION}")


def _crc(data: bytes, start: int = 0) -> bytes:
    return zlib.crc32(data, start).to_bytes(_CRC_BYTES, "little")


def _segment_crc(index: int, data: bytes) -> bytes:
    """CRC-32 of the index of a segment and its data. The index detects swapped segments."""
    return _crc(data, start=zlib.crc32(index.to_bytes(4, "little")))


def _check_crc(what: str, stored: bytes, computed: bytes) -> None:
    if stored != computed:
        raise ChecksumError(f"{what} is damaged: its CRC-32 is {computed.hex(' ')}, expected {stored.hex(' ')}")


def _check_kinds(chunks: Sequence[Chunk]) -> None:
    kinds = [chunk.kind for chunk in chunks]
    for kind in kinds:
        if kind[0].isupper() and kind not in CHUNK_KINDS:
            raise HeaderError(f"chunk kind {kind!r} is needed to read the file, expected one of {CHUNK_KINDS}")
    for kind in CHUNK_KINDS:
        if kinds.count(kind) > 1:
            raise HeaderError(f"chunk kind {kind!r} is there {kinds.count(kind)} times, expected at most once")


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
