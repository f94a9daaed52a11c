"""Parameters -> counts: whole numbers with the right sum, equal to the formulas of FORMAT.md in Python integers."""

from fractions import Fraction

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import TINY
from numpy.typing import NDArray
from torch import Tensor

from vqcodec.models import counts
from vqcodec.models.config import SliceConfig
from vqcodec.models.counts import TOTAL, CodeTables, Tables, flag_counts, power
from vqcodec.models.prior import rates
from vqcodec.models.quantizer import Codebook
from vqcodec.models.rates import log_probabilities

SLICES = [SliceConfig(2, 1, 64, 0), SliceConfig(3, 2, 40, 0), SliceConfig(1, 4, 160, 0), SliceConfig(1, 1, 3, 0)]
SLICES += [SliceConfig(3, 2, 40, 0, scales=2), SliceConfig(1, 4, 60, 0, scales=4)]


def tables_of(piece: SliceConfig, spread: float = 2.0) -> tuple[CodeTables, Codebook]:
    """Tables of a codebook off its lattice, with random biases."""
    torch.manual_seed(piece.codes)
    book = Codebook(piece)
    with torch.no_grad():
        book.vectors += 0.05 * torch.randn(book.vectors.shape)
        book.bias += torch.randn(book.bias.shape)
        book.spread.fill_(spread)
    tables = CodeTables(piece)
    tables.fill(book)
    return tables, book


def value_counts(tables: CodeTables, parameters: Tensor, other: Tensor) -> NDArray[np.float32]:
    """All blocks in one array."""
    return np.concatenate(list(tables.value_counts(parameters, other)))


def random_parameters(piece: SliceConfig, rows: int, largest: int = 127) -> Tensor:
    return torch.randint(-largest, largest + 1, (rows, piece.planes, piece.parameters)).float()


def corners(piece: SliceConfig) -> Tensor:
    """Every parameter at one of its bounds, in all combinations, the same for all planes."""
    ends = torch.cartesian_prod(*[torch.tensor([-127.0, 127.0])] * piece.parameters)
    return ends[:, None].repeat(1, piece.planes, 1)


@given(st.integers(-2000, 2000), st.integers(0, 32))
@settings(derandomize=True, deadline=None, database=None, max_examples=300)
def test_power_is_the_floor(exponent: int, bits: int) -> None:
    value = power(exponent, bits)
    total = exponent + 64 * bits
    assert value**64 <= Fraction(2) ** total < (value + 1) ** 64


def test_power_of_whole_exponents() -> None:
    assert [power(64 * n, 3) for n in (-4, -3, 0, 10)] == [0, 1, 8, 8192]


def test_flags() -> None:
    parameters = torch.zeros(255, 1, 5)
    parameters[:, 0, -1] = torch.arange(-127, 128)
    found = flag_counts(parameters)
    assert found.dtype == np.float32 and found.flags.c_contiguous
    assert found.tolist() == [reference.flag_counts(z) for z in range(-127, 128)]
    assert (found.sum(1, dtype=np.float64) == TOTAL - 2).all()
    assert (np.diff(found[:, 0]) >= 0).all()
    share = (found[:, 0] + 1) / TOTAL
    odds = 2.0 ** (np.arange(-127, 128) / 8)
    np.testing.assert_allclose(share, odds / (1 + odds), atol=1.6e-5)  # odds are multiples of 2^-16


def test_flags_of_several_planes_are_in_raster_order() -> None:
    parameters = random_parameters(SLICES[1], 7)
    expected = [reference.flag_counts(int(z)) for z in parameters[..., -1].flatten()]
    assert flag_counts(parameters).tolist() == expected


@pytest.mark.parametrize("piece", SLICES, ids=str)
@pytest.mark.parametrize("spread", [1.0, 8.0])
@pytest.mark.parametrize("kind", ["random", "small", "extreme"])
def test_values(piece: SliceConfig, spread: float, kind: str) -> None:
    tables, _ = tables_of(piece, spread)
    rows = max(3, 600 // piece.codes)
    parameters = (
        corners(piece)[torch.randperm(2**piece.parameters)[:rows]]
        if kind == "extreme"
        else random_parameters(piece, rows, 127 if kind == "random" else 20)
    )
    other = torch.rand(parameters.shape[:2]) < 0.7
    other[0] = True
    found = value_counts(tables, parameters, other)
    assert found.shape == (int(other.sum()), piece.codes - 1)
    assert found.dtype == np.float32 and found.flags.c_contiguous
    assert (found >= 0).all() and (found == np.rint(found)).all()
    assert (found.sum(1, dtype=np.float64) == TOTAL - (piece.codes - 1)).all()
    expected = [
        reference.value_counts(
            parameters[n, plane].tolist(),
            piece.dim,
            tables.values[plane].long().numpy(),
            tables.bias[plane].long().numpy(),
        )
        for plane in range(piece.planes)
        for n in range(len(parameters))
        if other[n, plane]
    ]
    assert found.tolist() == expected


def test_no_symbols() -> None:
    tables, _ = tables_of(SLICES[1])
    assert list(tables.value_counts(random_parameters(SLICES[1], 5), torch.zeros(5, 3, dtype=torch.bool))) == []
    assert flag_counts(torch.zeros(0, 3, 5)).shape == (0, 2)


@pytest.mark.parametrize("limit", [1, 7, 40, 70])
def test_the_result_does_not_depend_on_how_symbols_are_blocked(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    piece = SLICES[1]
    tables, _ = tables_of(piece)
    parameters, other = random_parameters(piece, 60), torch.rand(60, piece.planes) < 0.5
    whole = value_counts(tables, parameters, other)
    monkeypatch.setitem(counts.BLOCK, "cpu", 39 * limit)
    blocks = list(tables.value_counts(parameters, other))
    assert {len(block) for block in blocks[:-1]} <= {limit} and len(blocks[-1]) <= limit
    assert np.array_equal(np.concatenate(blocks), whole)


def test_the_result_of_a_symbol_does_not_depend_on_the_others() -> None:
    piece = SLICES[1]
    tables, _ = tables_of(piece)
    parameters = random_parameters(piece, 100)
    other = torch.ones(100, piece.planes, dtype=torch.bool)
    together = value_counts(tables, parameters, other).reshape(piece.planes, 100, -1)
    for n in (0, 50, 99):
        alone = value_counts(tables, parameters[n, None], other[n, None])
        assert np.array_equal(alone, together[:, n])


@pytest.mark.parametrize("piece", [*SLICES[:3], *SLICES[4:]], ids=str)
def test_check_refuses_what_float64_cannot_sum(piece: SliceConfig) -> None:
    """Against the largest logit in Python integers, with every parameter at its bound, for codes of all sizes."""
    outcomes = set()
    for power_of_ten in np.arange(0, 5, 0.25):
        book = Codebook(piece)
        with torch.no_grad():
            book.vectors *= 10**power_of_ten / book.vectors.abs().max()
            book.bias[:, -1] += 3
        tables = CodeTables(piece)
        tables.fill(book)
        factors = [127 * reference.p(12 * 32 + 127, 32)] * piece.dim
        factors += [reference.p(12 * 16 + 127, 16)] * piece.scales + [reference.p(13 * 16 + 127, 16)] * piece.scales
        factors += [2**19]
        columns = torch.cat([tables.values[0], tables.bias[:1]]).abs().T.tolist()
        largest = max(sum(f * int(x) for f, x in zip(factors, column, strict=True)) for column in columns)
        outcomes.add(largest < 2**53)
        if largest < 2**53:
            tables.check()
        else:
            with pytest.raises(ValueError, match="too large for exact sums"):
                tables.check()
    assert outcomes == {True, False}
    tables, _ = tables_of(piece)
    tables.check()
    tables.inputs[0, 1, 0] = 128
    with pytest.raises(ValueError, match="outside -127..127"):
        tables.check()


@pytest.mark.parametrize("piece", [*SLICES[:3], *SLICES[4:]], ids=str)
def test_counts_are_close_to_the_rate_model_of_training(piece: SliceConfig) -> None:
    """What training believes a symbol costs is what it costs, but for the precision of the tables."""
    tables, book = tables_of(piece)
    parameters = random_parameters(piece, 200, largest=30)
    model = rates(parameters, piece.dim)
    logp = log_probabilities(book.features(), book.bias.detach(), model.theta, model.zero)[0].permute(1, 0, 2)
    flags = torch.from_numpy((flag_counts(parameters) + 1) / TOTAL).reshape(200, piece.planes, 2)
    values = value_counts(tables, parameters, torch.ones(200, piece.planes, dtype=torch.bool))
    share = torch.from_numpy((values + 1) / TOTAL).reshape(piece.planes, 200, -1).transpose(0, 1)
    exact = torch.cat([flags[..., :1], flags[..., 1:] * share], -1)
    believed = torch.exp2(logp)
    likely = believed > 1e-3
    assert float((torch.log2(exact) - logp)[likely].abs().max()) < 0.03
    # The extra bits on average: the divergence of the coder's probabilities from the model's.
    extra = (believed * (logp.clamp(min=-40) - torch.log2(exact))).sum(-1)
    assert float(extra.mean()) < 0.002


def test_tables_hold_integers_of_every_slice() -> None:
    tables = Tables(TINY)
    for level, stage in enumerate(TINY.levels):
        for index, piece in enumerate(stage.slices):
            part = tables.slice(level, index)
            part.fill(Codebook(piece))
            for buffer in part.buffers():
                assert torch.equal(buffer, buffer.round())
            assert part.values.shape == (piece.planes, piece.parameters - 1, piece.codes - 1)


def test_weights_table() -> None:
    expected = [reference.p(20 * 64 - d, 64) for d in range(1282)]
    assert counts.WEIGHTS.tolist() == expected
    assert expected[-1] == 0 and expected[-2] == 1
