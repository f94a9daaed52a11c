"""The container: layout, strictness, partial reading, and that no bytes whatsoever raise anything but a FormatError."""

import dataclasses
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vqcodec import bitstream
from vqcodec.bitstream import Chunk, Container, Header, read, read_header, read_info, write
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

HEADER = Header(width=130, height=70, quality=50, weights_id=b"\xde\xad\xbe\xef", layers=2, tile=128)
CHUNKS = (Chunk("ICCP", b"profile"), Chunk("note", b""))
SEGMENTS = (b"\x01\x02\x03", b"", b"\x00\x00", bytes(range(130)))  # 2 tiles x 2 layers; the last length takes two bytes
FILE = write(HEADER, CHUNKS, SEGMENTS)
SEGMENTS_START = 21 + 1 + (4 + 1 + 7 + 4) + (4 + 1 + 0 + 4)

fixed = settings(derandomize=True, deadline=None, database=None, max_examples=400)


def segment_bytes(index: int, data: bytes) -> bytes:
    """A segment as FORMAT.md writes it, for data shorter than 16 KiB."""
    size = len(data)
    length = bytes([size]) if size < 128 else bytes([size % 128 + 128, size // 128])
    return length + zlib.crc32(index.to_bytes(4, "little") + data).to_bytes(4, "little") + data


def with_check(fields: bytes) -> bytes:
    """19 header bytes with a valid header check."""
    return fields + zlib.crc32(fields).to_bytes(4, "little")[:2]


def header_bytes(**changes: bytes) -> bytes:
    """A valid header of a single 1x1 segment, fields replaced by name, with a valid header check."""
    fields = {
        "magic": b"VQZ\x1a",
        "version": b"\x01",
        "flags": b"\x00",
        "quality": b"\x32",
        "tile": b"\x00",
        "layers": b"\x01",
        "width": b"\x01\x00\x00",
        "height": b"\x01\x00\x00",
        "weights_id": b"abcd",
    }
    return with_check(b"".join({**fields, **changes}.values()))


def one_chunk(kind: bytes, data: bytes = b"") -> bytes:
    """A chunk as FORMAT.md writes it, for data shorter than 128 bytes."""
    return kind + bytes([len(data)]) + data + zlib.crc32(kind + data).to_bytes(4, "little")


# --- layout ---------------------------------------------------------------------------------------------------------


def test_layout_without_chunks_is_the_documented_one() -> None:
    header = Header(width=0x010203, height=5, quality=99, weights_id=b"abcd", layers=1, tile=16320, grey=True)
    segments = [b"x" * 300] + [b""] * 4
    expected = with_check(b"VQZ\x1a" + bytes([1, 1, 99, 255, 1, 3, 2, 1, 5, 0, 0]) + b"abcd")
    expected += b"".join(segment_bytes(index, data) for index, data in enumerate(segments))
    assert write(header, (), segments) == expected


def test_layout_with_chunks_is_the_documented_one() -> None:
    fields = b"VQZ\x1a" + bytes([1, 2, 50, 2, 2, 130, 0, 0, 70, 0, 0]) + b"\xde\xad\xbe\xef"
    expected = with_check(fields) + b"\x02" + one_chunk(b"ICCP", b"profile") + one_chunk(b"note")
    assert len(expected) == SEGMENTS_START
    expected += b"".join(segment_bytes(index, data) for index, data in enumerate(SEGMENTS))
    assert expected == FILE


def test_read_gives_back_what_was_written() -> None:
    assert read(FILE) == Container(HEADER, CHUNKS, SEGMENTS, ())
    assert read(FILE, partial=True) == Container(HEADER, CHUNKS, SEGMENTS, ())


def test_read_header_needs_only_the_header() -> None:
    assert read_header(FILE[:21]) == HEADER
    assert read_header(FILE[:21] + b"anything") == HEADER


@pytest.mark.parametrize("size", [0, 1, 127, 128, 16383, 16384, 70000])
def test_lengths_of_every_varint_size(size: int) -> None:
    header = dataclasses.replace(HEADER, tile=0, layers=1)
    chunks = (Chunk("EXIF", bytes(size)),)
    assert read(write(header, chunks, [b"\xff" * size])) == Container(header, chunks, (b"\xff" * size,), ())


headers = st.builds(
    Header,
    width=st.integers(1, 300),
    height=st.integers(1, 300),
    quality=st.integers(1, 100),
    weights_id=st.binary(min_size=4, max_size=4),
    layers=st.integers(1, 4),
    tile=st.sampled_from([0, 64, 128, 16320]),
    grey=st.booleans(),
)
known_chunks = st.lists(
    st.builds(Chunk, st.sampled_from(bitstream.CHUNK_KINDS), st.binary(max_size=200)), unique_by=lambda c: c.kind
)
other_chunks = st.lists(
    st.builds(Chunk, st.from_regex("[a-z][ -~]{3}", fullmatch=True), st.binary(max_size=5)), max_size=3
)


@fixed
@given(headers, known_chunks, other_chunks, st.data())
def test_round_trip_of_any_container(
    header: Header, known: list[Chunk], other: list[Chunk], draw: st.DataObject
) -> None:
    contents = draw.draw(st.lists(st.binary(max_size=200), min_size=1, max_size=8))
    segments = tuple(contents[index % len(contents)] for index in range(header.segments))
    data = write(header, known + other, segments)
    assert read(data) == Container(header, (*known, *other), segments, ())
    assert read(data, partial=True).problems == ()


# --- geometry -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "height", "tile", "expected"),
    [
        (1, 1, 0, [(0, 0, 1, 1)]),
        (1, 1, 64, [(0, 0, 1, 1)]),
        (5, 9000, 0, [(0, 0, 9000, 5)]),
        (128, 64, 64, [(0, 0, 64, 64), (0, 64, 64, 64)]),
        (
            129,
            65,
            64,
            [(0, 0, 64, 64), (0, 64, 64, 64), (0, 128, 64, 1), (64, 0, 1, 64), (64, 64, 1, 64), (64, 128, 1, 1)],
        ),
    ],
)
def test_tile_boxes(width: int, height: int, tile: int, expected: list[tuple[int, int, int, int]]) -> None:
    assert dataclasses.replace(HEADER, width=width, height=height, tile=tile).frame.tiles() == expected


@fixed
@given(headers)
def test_tiles_cover_every_pixel_once(header: Header) -> None:
    covered = [0] * header.pixels
    boxes = header.frame.tiles()
    for top, left, height, width in boxes:
        assert height > 0 and width > 0
        for y in range(top, top + height):
            for x in range(left, left + width):
                covered[y * header.width + x] += 1
    assert set(covered) == {1}
    assert boxes == sorted(boxes)
    assert (len({top for top, *_ in boxes}), len({left for _, left, *_ in boxes})) == header.tiles
    assert len(boxes) * header.layers == header.segments


# --- what the header may say ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"quality": b"\x00"}, HeaderError, "quality is 0, expected 1 to 100"),
        ({"quality": b"\x65"}, HeaderError, "quality is 101, expected 1 to 100"),
        ({"layers": b"\x00"}, HeaderError, "layers is 0, expected 1 to 255"),
        ({"width": bytes(3)}, HeaderError, "width is 0, expected 1 to 16777215"),
        ({"height": bytes(3)}, HeaderError, "height is 0, expected 1 to 16777215"),
        ({"flags": b"\x04"}, HeaderError, "the flags are 0b00000100, expected only the lowest two bits to be used"),
        ({"version": b"\x02"}, VersionError, "the file has format version 2, this program reads version 1"),
        ({"version": b"\x00"}, VersionError, "the file has format version 0, this program reads version 1"),
        ({"magic": b"\x89PNG"}, NotVqzError, "not a .vqz file: it starts with 89 50 4e 47 instead of 56 51 5a 1a"),
        (
            {"width": b"\xff\xff\xff", "height": b"\xff\xff\xff", "tile": b"\x01", "layers": b"\xff"},
            LimitError,
            "the header promises 17523466567680 segments, the limit is 1048576",
        ),
    ],
)
def test_bad_header_fields(changes: dict[str, bytes], error: type[FormatError], message: str) -> None:
    data = header_bytes(**changes) + segment_bytes(0, b"")
    for reader in (read_header, read, read_info):
        with pytest.raises(FormatError) as caught:
            reader(data)
        assert type(caught.value) is error
        assert str(caught.value) == message


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("width", 1 << 24, HeaderError),
        ("height", -1, HeaderError),
        ("quality", 0, HeaderError),
        ("layers", 256, HeaderError),
        ("tile", 100, HeaderError),
        ("tile", -64, HeaderError),
        ("tile", 16384, HeaderError),
        ("weights_id", b"abc", HeaderError),
        ("version", 2, VersionError),
    ],
)
def test_a_header_that_cannot_be_written_cannot_be_made(field: str, value: object, error: type[FormatError]) -> None:
    with pytest.raises(error, match="expected|version"):
        dataclasses.replace(HEADER, **{field: value})  # type: ignore[arg-type]


def test_most_segments() -> None:
    header = dataclasses.replace(HEADER, width=64 << 10, height=64 << 10, tile=64, layers=1)
    assert header.segments == bitstream.MAX_SEGMENTS
    with pytest.raises(LimitError, match="2097152 segments, the limit is 1048576"):
        dataclasses.replace(header, layers=2)


def test_huge_picture_is_refused_before_anything_else_is_read() -> None:
    data = header_bytes(width=b"\xff\xff\xff", height=b"\xff\xff\xff")
    message = "the picture has 16777215 x 16777215 = 281474943156225 pixels, the limit is 400000000"
    for partial in (False, True):
        with pytest.raises(LimitError) as caught:
            read(data, partial=partial)
        assert str(caught.value) == message
    assert read(data, partial=True, max_pixels=None).segments == (None,)


def test_pixel_limit_is_the_largest_size_accepted() -> None:
    assert read(FILE, max_pixels=130 * 70).header == HEADER
    with pytest.raises(LimitError, match="130 x 70 = 9100 pixels, the limit is 9099"):
        read(FILE, max_pixels=130 * 70 - 1)


@pytest.mark.parametrize("size", [(0xFFFFFF, 1), (20, 0xFFFFFF)])
def test_a_thin_picture_counts_as_what_it_is_padded_to(size: tuple[int, int]) -> None:
    data = header_bytes(width=size[0].to_bytes(3, "little"), height=size[1].to_bytes(3, "little"))
    with pytest.raises(LimitError, match=r"as much memory as .* = 1073741760, the limit is 400000000$"):
        read(data, partial=True)
    assert read(data, partial=True, max_pixels=1073741760).header.width == size[0]


# --- chunks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chunks", "error", "message"),
    [
        (b"\x00", HeaderError, "the chunk count is 0, expected at least 1 because the flags promise chunks"),
        (b"\x01" + one_chunk(b"JUNK"), HeaderError, "chunk kind 'JUNK' is needed to read the file, expected one of .*"),
        (b"\x01" + one_chunk(b"no\xe9l"), HeaderError, "chunk kind is 'noél', expected a letter and three .*"),
        (b"\x01" + one_chunk(b"1abc"), HeaderError, "chunk kind is '1abc', expected a letter and three .*"),
        (b"\x01" + one_chunk(b"ab\nc"), HeaderError, r"chunk kind is 'ab\\nc', expected a letter and three .*"),
        (b"\x02" + 2 * one_chunk(b"ICCP"), HeaderError, "chunk kind 'ICCP' is there 2 times, expected at most once"),
        (
            b"\x02" + one_chunk(b"ICCP"),
            TruncatedError,
            "the kind of chunk 2 of 2 ends at byte 35, the file has 31 bytes",
        ),
        (b"\x01ICCP", TruncatedError, "the length of chunk 1 of 1 starts at byte 26, the file has 26 bytes"),
        (b"\x01ICCP\x05", TruncatedError, "chunk 1 of 1 ends at byte 32, the file has 27 bytes"),
        (b"\x01ICCP\x00", TruncatedError, "the CRC-32 of chunk 1 of 1 ends at byte 31, the file has 27 bytes"),
        (
            b"\x01ICCP" + b"\xff" * 4 + b"\x7f",
            TruncatedError,
            "chunk 1 of 1 ends at byte 34359738398, the file has 31 .*",
        ),
        (
            b"\x01" + one_chunk(b"ICCP")[:-4] + b"crc!",
            ChecksumError,
            "chunk 1 of 1 is damaged: its CRC-32 is 00 b6 bb 05, expected 63 72 63 21",
        ),
        (b"", TruncatedError, "the chunk count starts at byte 21, the file has 21 bytes"),
    ],
)
def test_bad_chunks_are_never_accepted(chunks: bytes, error: type[FormatError], message: str) -> None:
    for partial in (False, True):
        with pytest.raises(error, match=f"^{message}$") as caught:
            read(header_bytes(flags=b"\x02") + chunks, partial=partial)
        assert type(caught.value) is error


def test_chunks_that_may_be_ignored_are_kept_and_may_repeat() -> None:
    data = header_bytes(flags=b"\x02") + b"\x02" + 2 * one_chunk(b"xyzw", b"?") + segment_bytes(0, b"")
    assert read(data).chunks == (Chunk("xyzw", b"?"), Chunk("xyzw", b"?"))


def test_write_refuses_what_read_refuses() -> None:
    with pytest.raises(HeaderError, match="'JUNK' is needed to read the file"):
        write(HEADER, [Chunk("JUNK", b"")], SEGMENTS)
    with pytest.raises(HeaderError, match="'ALPH' is there 2 times"):
        write(HEADER, [Chunk("ALPH", b"1"), Chunk("ALPH", b"2")], SEGMENTS)
    with pytest.raises(ValueError, match="there are 3 segments, expected 4"):
        write(HEADER, CHUNKS, SEGMENTS[:3])


# --- segments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("segment", "error", "message"),
    [
        (b"", TruncatedError, "the length of segment 1 of 1 starts at byte 21, the file has 21 bytes"),
        (b"\x80", TruncatedError, "the length of segment 1 of 1 starts at byte 21, the file has 22 bytes"),
        (b"\x00abc", TruncatedError, "the CRC-32 of segment 1 of 1 ends at byte 26, the file has 25 bytes"),
        (b"\x80\x20abcd", TruncatedError, "segment 1 of 1 ends at byte 4123, the file has 27 bytes"),
        (b"\x80\x00abcd", HeaderError, "the length of segment 1 of 1 takes 2 bytes, expected the shortest form"),
        (
            b"\x80" * 5 + b"\x01",
            HeaderError,
            "the length of segment 1 of 1 takes more than 5 bytes, expected at most 5",
        ),
        (b"\x00abcd", ChecksumError, "segment 1 of 1 is damaged: its CRC-32 is 1c df 44 21, expected 61 62 63 64"),
        (segment_bytes(0, b"") + b"z", TrailingDataError, "the last segment ends at byte 26, the file has 27 bytes"),
    ],
)
def test_bad_segments(segment: bytes, error: type[FormatError], message: str) -> None:
    data = header_bytes() + segment
    for reader in (read, read_info):
        with pytest.raises(FormatError) as caught:
            reader(data)
        assert type(caught.value) is error
        assert str(caught.value) == message
    assert read(data, partial=True).problems == (message,)


def test_swapped_segments_are_noticed() -> None:
    header = dataclasses.replace(HEADER, tile=0)
    whole = write(header, (), [b"one", b"two"])
    swapped = whole[:21] + whole[29:] + whole[21:29]
    with pytest.raises(ChecksumError, match="segment 1 of 2 is damaged"):
        read(swapped)
    assert read(swapped, partial=True).segments == (None, None)


# --- damage: every cut and every flipped bit ------------------------------------------------------------------------


def test_every_cut_is_an_error() -> None:
    for size in range(len(FILE)):
        with pytest.raises(TruncatedError):
            read(FILE[:size])


def test_every_cut_after_the_chunks_keeps_the_whole_segments() -> None:
    ends = [SEGMENTS_START]
    for index, segment in enumerate(SEGMENTS):
        ends.append(ends[-1] + len(segment_bytes(index, segment)))
    assert ends[-1] == len(FILE)
    for size in range(len(FILE)):
        if size < SEGMENTS_START:
            with pytest.raises(TruncatedError):
                read(FILE[:size], partial=True)
            continue
        container = read(FILE[:size], partial=True)
        whole = sum(end <= size for end in ends[1:])
        assert container.segments == SEGMENTS[:whole] + (None,) * (4 - whole)
        assert len(container.problems) == 1
        assert f"segment {whole + 1} of 4" in container.problems[0]
        assert container.problems[0].endswith(f"the file has {size} bytes")


def flipped(bit: int) -> bytes:
    damaged = bytearray(FILE)
    damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


def test_every_flipped_bit_is_an_error() -> None:
    for bit in range(8 * len(FILE)):
        with pytest.raises(FormatError) as caught:
            read(flipped(bit))
        assert type(caught.value) is not FormatError
        assert "\n" not in str(caught.value)
        if bit < 8 * 21:
            assert isinstance(caught.value, NotVqzError | VersionError | HeaderError)


def test_every_changed_byte_is_an_error() -> None:
    for position in range(len(FILE)):
        for change in range(1, 256):
            damaged = FILE[:position] + bytes([FILE[position] ^ change]) + FILE[position + 1 :]
            with pytest.raises(FormatError):
                read(damaged)


def test_partial_reading_gives_no_segment_that_is_not_intact() -> None:
    for bit in range(8 * len(FILE)):
        if bit < 8 * SEGMENTS_START:
            with pytest.raises(FormatError):
                read(flipped(bit), partial=True)
            continue
        container = read(flipped(bit), partial=True)
        assert container.problems
        assert len(container.segments) == len(SEGMENTS)
        assert any(segment is None for segment in container.segments)
        assert all(found in (None, real) for found, real in zip(container.segments, SEGMENTS, strict=True))


def test_partial_reading_goes_on_after_a_damaged_segment() -> None:
    container = read(flipped(8 * (SEGMENTS_START + 5)), partial=True)  # the first data byte of the first segment
    assert container.segments == (None, *SEGMENTS[1:])
    (problem,) = container.problems
    assert problem.startswith("segment 1 of 4 is damaged: its CRC-32 is ")


def test_partial_reading_reports_trailing_bytes() -> None:
    container = read(FILE + b"z", partial=True)
    assert container.segments == SEGMENTS
    assert container.problems == (f"the last segment ends at byte {len(FILE)}, the file has {len(FILE) + 1} bytes",)


# --- any bytes at all -----------------------------------------------------------------------------------------------


def check_any_bytes(data: bytes) -> None:
    """Reading raises a FormatError of one line, or gives a container that is the only one with these bytes."""
    for partial in (False, True):
        try:
            container = read(data, partial=partial)
        except FormatError as error:
            assert type(error) is not FormatError
            assert len(str(error).splitlines()) == 1
            continue
        assert len(container.segments) == container.header.segments
        if not container.problems:
            assert all(segment is not None for segment in container.segments)
            whole = [segment for segment in container.segments if segment is not None]
            assert write(container.header, container.chunks, whole) == data
            assert read_info(data).header == container.header
        else:
            assert partial


@fixed
@given(
    st.one_of(
        st.binary(), st.binary().map(lambda rest: FILE[:5] + rest), st.binary().map(lambda rest: FILE[:21] + rest)
    )
)
def test_fuzz_random_bytes(data: bytes) -> None:
    check_any_bytes(data)


@fixed
@given(st.binary(min_size=14, max_size=14), st.binary(max_size=60))
def test_fuzz_headers_with_a_valid_check(fields: bytes, rest: bytes) -> None:
    check_any_bytes(with_check(FILE[:5] + fields) + rest)


@fixed
@given(st.binary(max_size=40), st.integers(1, 4))
def test_fuzz_small_valid_headers(rest: bytes, layers: int) -> None:
    check_any_bytes(header_bytes(layers=bytes([layers])) + rest)
    check_any_bytes(header_bytes(layers=bytes([layers]), flags=b"\x02") + rest)


@fixed
@given(
    st.lists(st.tuples(st.integers(0, len(FILE)), st.integers(0, 20), st.binary(max_size=20)), min_size=1, max_size=4)
)
def test_fuzz_edits_of_a_real_file(edits: list[tuple[int, int, bytes]]) -> None:
    data = FILE
    for start, removed, inserted in edits:
        data = data[:start] + inserted + data[start + removed :]
    check_any_bytes(data)


# --- what `info` shows ----------------------------------------------------------------------------------------------


def test_info_accounts_for_every_byte() -> None:
    info = read_info(FILE)
    assert info.header == HEADER
    assert info.file_bytes == len(FILE)
    assert info.bits_per_pixel == pytest.approx(8 * len(FILE) / (130 * 70))
    assert info.chunks == (("ICCP", 7), ("note", 0))
    assert info.layer_bytes == ((1 + 4 + 3) + (1 + 4 + 0), (1 + 4 + 2) + (2 + 4 + 130))
    assert sum(info.layer_bytes) == len(FILE) - SEGMENTS_START


def test_cutting_the_last_layer_off_leaves_the_others() -> None:
    container = read(FILE[: -read_info(FILE).layer_bytes[-1]], partial=True)
    assert container.segments == (*SEGMENTS[:2], None, None)


def test_info_works_at_any_size_of_picture() -> None:
    header = dataclasses.replace(HEADER, width=0xFFFFFF, height=0xFFFFFF, tile=0, layers=1)
    assert read_info(write(header, (), [b""])).header == header


def test_import_and_info_need_nothing_heavy() -> None:
    """Pillow is imported, because `import vqcodec` registers the plugin."""
    program = (
        "import sys; from vqcodec import bitstream\n"
        "bitstream.read_info(bytes.fromhex(sys.argv[1]))\n"
        "print(sorted({name.partition('.')[0] for name in sys.modules} & set(sys.argv[2].split())))"
    )
    heavy = "torch numpy click constriction safetensors"
    root = Path(bitstream.__file__).parents[1]
    command = [sys.executable, "-c", program, FILE.hex(), heavy]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"
