"""FORMAT.md says what the program does: its tables, its range decoder and its hex dump are checked against the code."""

import re
import runpy
from pathlib import Path

import constriction
import format_dump
import numpy as np
import pytest

from vqcodec import bitstream, errors, limits
from vqcodec.bitstream import Chunk, Header

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden" / "tiny.vqz"
FORMAT = (ROOT / "FORMAT.md").read_text(encoding="utf-8")


def fenced(language: str) -> str:
    """The only block of FORMAT.md that is fenced as this language."""
    blocks: list[str] = re.findall(rf"^```{language}\n(.*?)^```$", FORMAT, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 1, f"FORMAT.md has {len(blocks)} blocks fenced as {language}, expected 1"
    return blocks[0]


@pytest.mark.skipif(not GOLDEN.exists(), reason=f"needs the golden file tests/golden/{GOLDEN.name}")
def test_hex_dump_is_the_golden_file() -> None:
    assert format_dump.parse(fenced("hexdump")) == GOLDEN.read_bytes()


def example(tile: int = 64, chunks: tuple[Chunk, ...] = (Chunk("ICCP", bytes(40)), Chunk("note", b""))) -> bytes:
    header = Header(width=65, height=3, quality=50, weights_id=b"abcd", layers=2, tile=tile, grey=True)
    return bitstream.write(header, chunks, [bytes(range(index, index + 60)) for index in range(header.segments)])


@pytest.mark.parametrize("data", [example(), example(tile=0, chunks=())])
def test_dump_lists_every_byte(data: bytes) -> None:
    text = format_dump.dump(data)
    assert format_dump.parse(text) == data
    assert text.startswith("0000: 56 51 5a 1a" + 38 * " " + "magic\n0004: 01" + 47 * " " + "version: 1\n")
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize(
    "line", ["0000: 5", "0000: 56 5g", "0: 56", "0000: 56,51", "0000:", "", "0001: 56", "0000: " + 17 * "56 "]
)
def test_a_malformed_dump_is_not_passed_over(line: str) -> None:
    with pytest.raises(ValueError, match="not a line of a dump|the offset is"):
        format_dump.parse(line + "\n")


def test_header_table_is_complete() -> None:
    rows = re.findall(r"^\| (\d+) \| (\d+) \| ", FORMAT, re.MULTILINE)
    end = 0
    for offset, size in rows:
        assert int(offset) == end
        end += int(size)
    assert end == bitstream.HEADER_BYTES


def test_limits_are_those_of_the_program() -> None:
    for limit in (limits.DEFAULT_MAX_PIXELS, bitstream.MAX_SEGMENTS):
        assert f"{limit:,}" in FORMAT
    for kind in bitstream.CHUNK_KINDS:
        assert re.search(rf"^\| `{kind}` \|", FORMAT, re.MULTILINE)


def test_every_format_error_is_listed() -> None:
    listed = set(re.findall(r"^\| `(\w+Error)` \|", FORMAT, re.MULTILINE))
    assert listed == {error.__name__ for error in errors.FormatError.__subclasses__()}


def test_varint_examples() -> None:
    examples = re.findall(r"^\| (\d+) \| `([0-9a-f ]+)` \|$", FORMAT, re.MULTILINE)
    assert len(examples) >= 4
    for value, encoded in examples:
        header = Header(width=1, height=1, quality=1, weights_id=bytes(4), layers=1, tile=0)
        start = bitstream.write(header, (), [bytes(int(value))])[bitstream.HEADER_BYTES :]
        assert start.startswith(bytes.fromhex(encoded))


@pytest.mark.parametrize("symbols", [1, 2, 37, 500])
def test_range_decoder_of_the_document_reads_what_constriction_writes(symbols: int, tmp_path: Path) -> None:
    program = tmp_path / "decode.py"
    program.write_text(fenced("python"), encoding="utf-8")
    decode = runpy.run_path(str(program))["decode"]
    rng = np.random.default_rng(symbols)
    alphabet = 23
    free = (1 << 24) - alphabet
    counts = np.floor(rng.dirichlet(np.full(alphabet, 0.1), size=symbols) * free).astype(np.int64)
    counts[:, 0] += free - counts.sum(axis=1)
    indices = rng.integers(0, alphabet, symbols).astype(np.int32)
    encoder = constriction.stream.queue.RangeEncoder()
    family = constriction.stream.model.Categorical(perfect=False)
    encoder.encode(indices, family, np.ascontiguousarray(counts, dtype=np.float32))
    segment = encoder.get_compressed().astype("<u4").tobytes().rstrip(b"\0")
    assert decode(segment, counts.tolist()) == indices.tolist()
