"""Symbols + integer counts <-> bytes: two small classes around constriction's range coder.

Counts are float32 (n, m), C-contiguous. They hold integers, and each row sums to 2^24 - m. constriction then converts
them to fixed point exactly (it multiplies by 1 and adds 1 to each count), on every machine and in every version that
keeps its format. The bytes are the coder's 32-bit words, little endian, without trailing zero bytes: the decoder reads
zeros after the end. The coder does not detect damage; the checksums of the container do.
"""

from collections.abc import Iterator
from typing import Any, Protocol

import constriction
import numpy as np
from numpy.typing import NDArray

from vqcodec.errors import ChecksumError

Symbols = NDArray[np.int32]
Counts = NDArray[np.float32]

_MODEL = constriction.stream.model.Categorical(perfect=False)


class Table:
    """Stored counts, of which each symbol uses a row: float32 (R, m), rows as of the module."""

    def __init__(self, counts: Counts) -> None:
        self.counts = np.ascontiguousarray(counts)
        self._distributions: dict[int, Any] = {}

    def distribution(self, row: int) -> Any:
        """constriction's model of a row; made once, because that takes as long as a thousand symbols."""
        if row not in self._distributions:
            self._distributions[row] = constriction.stream.model.Categorical(self.counts[row], perfect=False)
        return self._distributions[row]


class Encoder:
    """Encodes symbols; `finish` returns their bytes."""

    def __init__(self) -> None:
        self._coder = constriction.stream.queue.RangeEncoder()

    def put(self, symbols: NDArray[np.integer], counts: Counts) -> None:
        """Encode symbols, after those of earlier calls.

        Args:
            symbols: (n,), each from 0 to m - 1.
            counts: float32 (n, m), the counts of each symbol's distribution.
        """
        if len(symbols):
            self._coder.encode(np.ascontiguousarray(symbols, np.int32), _MODEL, counts)

    def put_rows(self, symbols: NDArray[np.integer], rows: NDArray[np.integer], table: Table) -> None:
        """Encode symbols whose counts are rows of a table.

        Args:
            symbols: (n,). rows: (n,), rising.
        """
        for row, part in _groups(rows):
            self._coder.encode(np.ascontiguousarray(symbols[part], np.int32), table.distribution(row))

    def finish(self) -> bytes:
        """Return the bytes of all symbols."""
        words: NDArray[np.uint32] = self._coder.get_compressed()
        return words.astype("<u4").tobytes().rstrip(b"\0")


class Source(Protocol):
    """Gives symbols: a `Decoder` reads them from bytes, a sampler draws them at random."""

    def get(self, counts: Counts) -> Symbols:
        """Return the next n symbols, int32 (n,), for counts float32 (n, m)."""

    def get_rows(self, rows: NDArray[np.integer], table: Table) -> Symbols:
        """Return the next n symbols, int32 (n,), for rows (n,), rising, of a table."""


class Decoder:
    """Decodes the bytes of an `Encoder`, given the same counts in the same order."""

    def __init__(self, data: bytes) -> None:
        padded = data + bytes(-len(data) % 4)
        self._coder = constriction.stream.queue.RangeDecoder(np.frombuffer(padded, "<u4").astype(np.uint32))

    def get(self, counts: Counts) -> Symbols:
        """Decode the next n symbols.

        Args:
            counts: float32 (n, m), as in `Encoder.put`.

        Returns:
            int32 (n,), each from 0 to m - 1.

        Raises:
            ChecksumError: the bytes do not belong to these counts.
        """
        if not len(counts):
            return np.zeros(0, np.int32)
        return self._decode(_MODEL, counts)

    def get_rows(self, rows: NDArray[np.integer], table: Table) -> Symbols:
        """Decode the next symbols; arguments as of `Encoder.put_rows`, and errors as of `get`."""
        symbols = np.zeros(len(rows), np.int32)
        for row, part in _groups(rows):
            symbols[part] = self._decode(table.distribution(row), part.stop - part.start)
        return symbols

    def _decode(self, model: Any, amount: Counts | int) -> Symbols:
        try:
            symbols: Symbols = self._coder.decode(model, amount)
        except AssertionError as error:  # raised by constriction for data that no encoder wrote
            raise ChecksumError("the codes do not decode: damaged data, or other weights") from error
        return symbols


def _groups(rows: NDArray[np.integer]) -> Iterator[tuple[int, slice]]:
    """Runs of equal numbers: each number and where it is."""
    ends = [*(np.flatnonzero(np.diff(rows)) + 1).tolist(), len(rows)] if len(rows) else []
    start = 0
    for end in ends:
        yield int(rows[start]), slice(start, end)
        start = end
