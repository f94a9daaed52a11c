"""Symbols + integer counts <-> bytes: constriction's range coder behind two small classes.

Counts come as float32, C-contiguous (n, m), each row integers summing to 2^24 - m: then constriction's fixed-point
conversion is exact (it scales by exactly 1 and adds 1 to each count), on every machine and in every version that keeps
its format. Bytes are the coder's 32-bit words, little endian, without trailing zero bytes: the decoder reads zeros
behind the end anyway. Nothing here notices damage; that is what the container's checksums are for.
"""

from typing import Protocol

import constriction
import numpy as np
from numpy.typing import NDArray

from vqcodec.errors import ChecksumError

Symbols = NDArray[np.int32]
Counts = NDArray[np.float32]

_MODEL = constriction.stream.model.Categorical(perfect=False)


class Encoder:
    """Collects symbols; `finish` gives their bytes."""

    def __init__(self) -> None:
        self._coder = constriction.stream.queue.RangeEncoder()

    def put(self, symbols: NDArray[np.integer], counts: Counts) -> None:
        """Append n symbols, each in [0, m), under their counts (n, m)."""
        if len(symbols):
            self._coder.encode(np.ascontiguousarray(symbols, np.int32), _MODEL, counts)

    def finish(self) -> bytes:
        words: NDArray[np.uint32] = self._coder.get_compressed()
        return words.astype("<u4").tobytes().rstrip(b"\0")


class Source(Protocol):
    """Where symbols come from: a `Decoder`, or chance."""

    def get(self, counts: Counts) -> Symbols:
        """The next n symbols under counts (n, m)."""


class Decoder:
    """Reads symbols back from the bytes of an `Encoder`, given the same counts in the same order."""

    def __init__(self, data: bytes) -> None:
        padded = data + bytes(-len(data) % 4)
        self._coder = constriction.stream.queue.RangeDecoder(np.frombuffer(padded, "<u4").astype(np.uint32))

    def get(self, counts: Counts) -> Symbols:
        """The next n symbols under counts (n, m).

        Raises:
            ChecksumError: the bytes do not belong to these counts.
        """
        if not len(counts):
            return np.zeros(0, np.int32)
        try:
            symbols: Symbols = self._coder.decode(_MODEL, counts)
        except AssertionError as error:  # constriction's word for data that no encoder wrote
            raise ChecksumError("the codes do not decode: damaged data, or other weights") from error
        return symbols
