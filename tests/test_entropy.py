"""Symbols <-> bytes: round trips, the size against the cross-entropy, and what damaged bytes may raise."""

import constriction
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from vqcodec.entropy import Counts, Decoder, Encoder
from vqcodec.errors import ChecksumError

TOTAL = 1 << 24

fixed = settings(derandomize=True, deadline=None, database=None, max_examples=200)


def make_counts(rng: np.random.Generator, rows: int, alphabet: int, flatness: float) -> Counts:
    """Random counts (rows, alphabet) with the sum that the coder asks for; the smaller the flatness, the sharper."""
    shares = np.power(rng.random((rows, alphabet)) + 1e-9, 1 / flatness)
    free = TOTAL - alphabet
    counts = np.floor(shares / shares.sum(1, keepdims=True) * free)
    counts[np.arange(rows), counts.argmax(1)] += free - counts.sum(1)
    return np.ascontiguousarray(counts, np.float32)


def draw(rng: np.random.Generator, counts: Counts) -> NDArray[np.int64]:
    """A symbol for each row, with the row's probabilities."""
    edges = (counts.astype(np.float64) + 1).cumsum(1) / TOTAL
    return np.asarray((rng.random((len(counts), 1)) > edges).sum(1))


batches = st.lists(
    st.tuples(st.integers(0, 30), st.integers(2, 300), st.sampled_from([0.01, 0.1, 1.0])), min_size=0, max_size=5
)


@given(batches, st.integers(0, 2**32 - 1), st.booleans())
@fixed
def test_round_trip(shapes: list[tuple[int, int, float]], seed: int, likely: bool) -> None:
    """Several alphabets in one stream; symbols as their counts have it, or any symbols, unlikely ones as well."""
    rng = np.random.default_rng(seed)
    counts = [make_counts(rng, *shape) for shape in shapes]
    symbols = [draw(rng, c) if likely else rng.integers(0, c.shape[1], len(c)) for c in counts]
    encoder = Encoder()
    for s, c in zip(symbols, counts, strict=True):
        encoder.put(s, c)
    data = encoder.finish()
    decoder = Decoder(data)
    for s, c in zip(symbols, counts, strict=True):
        found = decoder.get(c)
        assert found.dtype == np.int32
        assert found.tolist() == s.tolist()
    assert not data.endswith(b"\0")
    second = reference.RangeDecoder(data)
    for s, c in zip(symbols, counts, strict=True):
        assert [second.get(row) for row in c.astype(int).tolist()] == s.tolist()


def test_nothing_takes_no_bytes() -> None:
    encoder = Encoder()
    encoder.put(np.zeros(0, np.int32), np.zeros((0, 5), np.float32))
    assert encoder.finish() == b""
    assert Decoder(b"").get(np.zeros((0, 5), np.float32)).tolist() == []


def test_certain_symbols_take_next_to_nothing() -> None:
    counts = np.tile(np.array([[TOTAL - 3, 0, 0]], np.float32), (2000, 1))
    encoder = Encoder()
    encoder.put(np.zeros(2000, np.int32), counts)
    data = encoder.finish()
    assert len(data) <= 4
    assert not Decoder(data).get(counts).any()


def test_trailing_zero_bytes_are_left_out_and_not_missed() -> None:
    """Many short streams: some words end in zero bytes, and all are read back from what is left."""
    rng = np.random.default_rng(0)
    shortened = 0
    for _ in range(3000):
        counts = make_counts(rng, 4, 16, 0.3)
        symbols = draw(rng, counts)
        encoder = Encoder()
        encoder.put(symbols, counts)
        data = encoder.finish()
        shortened += len(data) % 4 != 0
        assert Decoder(data).get(counts).tolist() == symbols.tolist()
        assert Decoder(data + bytes(8)).get(counts).tolist() == symbols.tolist()
    assert shortened > 5


@pytest.mark.parametrize("flatness", [0.03, 0.3, 3.0])
def test_size_is_the_cross_entropy(flatness: float) -> None:
    rng = np.random.default_rng(1)
    counts = make_counts(rng, 5000, 40, flatness)
    symbols = draw(rng, counts)
    encoder = Encoder()
    encoder.put(symbols, counts)
    bits = -np.log2((counts[np.arange(len(counts)), symbols].astype(np.float64) + 1) / TOTAL).sum()
    assert bits / 8 - 1 <= len(encoder.finish()) <= bits / 8 * 1.0001 + 8


def test_integer_counts_are_frequencies_to_the_unit() -> None:
    """With counts that sum to 2^24 - n the coder's frequencies are exactly the counts plus one."""
    counts = np.array([[0, 5, TOTAL - 3 - 5]], np.float32)
    family = constriction.stream.model.Categorical(perfect=False)
    for symbol, (left, frequency) in enumerate([(0, 1), (1, 6), (7, TOTAL - 7)]):
        for quantile, expected in [(left, symbol), (left + frequency - 1, symbol)]:
            point = (2**64 - 1 >> 24) * quantile
            words = np.array([point >> 32, point & 0xFFFFFFFF], np.uint32)
            assert constriction.stream.queue.RangeDecoder(words).decode(family, counts) == [expected]


def test_damage_is_a_checksum_error_or_other_symbols() -> None:
    """Nothing but ChecksumError comes out, whatever the bytes; the container's checks are what finds damage."""
    rng = np.random.default_rng(2)
    counts = make_counts(rng, 50, 20, 0.1)
    refused = 0
    for length in range(60):
        try:
            found = Decoder(rng.bytes(length)).get(counts)
        except ChecksumError:
            refused += 1
        else:
            assert ((found >= 0) & (found < 20)).all()
    assert refused < 60
    with pytest.raises(ChecksumError, match="do not decode"):
        Decoder(b"\xff" * 64).get(counts)
