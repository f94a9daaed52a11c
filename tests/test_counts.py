"""What the prior says -> counts: whole numbers with the right sum, as FORMAT.md has them in Python integers."""

import dataclasses
import functools
import tempfile
from fractions import Fraction
from pathlib import Path

import models
import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import TINY
from torch import Tensor

from vqcodec import coding, weights
from vqcodec.frame import Frame
from vqcodec.models import counts
from vqcodec.models.config import Config, PriorConfig, SliceConfig, StageConfig
from vqcodec.models.counts import TOTAL, CodeTables, RowTables, Tables, flag_counts, power
from vqcodec.models.model import Model
from vqcodec.models.prior import rates
from vqcodec.models.quantizer import Codebook
from vqcodec.models.rates import RowRates

SLICES = [SliceConfig(2, 1, 64, 0), SliceConfig(3, 2, 40, 0), SliceConfig(1, 4, 160, 0), SliceConfig(1, 1, 3, 0)]


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
    found = tables.value_counts(parameters, other)
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
        for n in range(len(parameters))
        for plane in range(piece.planes)
        if other[n, plane]
    ]
    assert found.tolist() == expected


def test_no_symbols() -> None:
    tables, _ = tables_of(SLICES[1])
    found = tables.value_counts(random_parameters(SLICES[1], 5), torch.zeros(5, 3, dtype=torch.bool))
    assert found.shape == (0, 39) and found.dtype == np.float32
    assert flag_counts(torch.zeros(0, 3, 5)).shape == (0, 2)


def test_the_result_of_a_symbol_does_not_depend_on_the_others() -> None:
    piece = SLICES[1]
    tables, _ = tables_of(piece)
    parameters = random_parameters(piece, 100)
    other = torch.ones(100, piece.planes, dtype=torch.bool)
    together = tables.value_counts(parameters, other).reshape(100, piece.planes, -1)
    for n in (0, 50, 99):
        alone = tables.value_counts(parameters[n, None], other[n, None])
        assert np.array_equal(alone, together[n])


@pytest.mark.parametrize("piece", SLICES[:3], ids=str)
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
        factors += [reference.p(12 * 16 + 127, 16), reference.p(13 * 16 + 127, 16), 2**19]
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


@pytest.mark.parametrize("piece", SLICES[:3], ids=str)
def test_counts_are_close_to_the_rate_model_of_training(piece: SliceConfig) -> None:
    """What training believes a symbol costs is what it costs, but for the precision of the tables."""
    tables, book = tables_of(piece)
    parameters = random_parameters(piece, 200, largest=30)
    model = rates(parameters, piece.dim)
    every = torch.arange(piece.codes).expand(200, piece.planes, -1).unbind(-1)
    logp = -torch.stack([model.bits(book, k) for k in every], -1).detach()
    flags = torch.from_numpy((flag_counts(parameters) + 1) / TOTAL).reshape(200, piece.planes, 2)
    values = tables.value_counts(parameters, torch.ones(200, piece.planes, dtype=torch.bool))
    share = torch.from_numpy((values + 1) / TOTAL).reshape(200, piece.planes, -1)
    exact = torch.cat([flags[..., :1], flags[..., 1:] * share], -1)
    believed = torch.exp2(logp)
    likely = believed > 1e-3
    assert float((torch.log2(exact) - logp)[likely].abs().max()) < 0.03
    # The extra bits on average: the divergence of the coder's probabilities from the model's.
    extra = (believed * (logp.clamp(min=-40) - torch.log2(exact))).sum(-1)
    assert float(extra.mean()) < 0.002


@pytest.mark.parametrize("config", [TINY, models.raster().config], ids=lambda config: config.name)
def test_tables_hold_integers_of_every_slice(config: Config) -> None:
    """Of the kind that the prior needs: rows of a stored table, or what counts are computed from."""
    tables = Tables(config)
    for level, stage in enumerate(config.levels):
        for index, piece in enumerate(stage.slices):
            part = tables.slice(level, index)
            part.fill(Codebook(piece))
            part.check()
            for buffer in part.buffers():
                assert torch.equal(buffer, buffer.round())
            assert part.inputs.shape == (piece.planes, piece.codes, 2 * piece.dim)
            if isinstance(part, RowTables):
                assert part.counts.shape == (piece.rows, piece.codes)
            else:
                assert part.values.shape == (piece.planes, piece.parameters - 1, piece.codes - 1)
                assert part.bias.shape == (piece.planes, piece.codes - 1)
            assert isinstance(part, CodeTables) == (not config.joint)


# Stored tables

STORED = SliceConfig(planes=3, dim=2, codes=40, layer=0, rows=17)


def stored(piece: SliceConfig = STORED) -> tuple[RowTables, Codebook]:
    """The table of a codebook off its start."""
    torch.manual_seed(1)
    book = Codebook(piece)
    with torch.no_grad():
        book.bias.add_(torch.randn(book.bias.shape))
        book.family.add_(torch.randn(book.family.shape), alpha=0.3)
    tables = RowTables(piece)
    tables.fill(book)
    return tables, book


def test_rows_are_distributions_and_the_first_likeliest_code_gets_the_rest() -> None:
    tables, book = stored()
    tables.check()
    counted = tables.counts.double()
    assert torch.equal(counted.sum(1), torch.full((17,), float(TOTAL - 40)).double())
    probabilities = torch.exp2(book.table().logp.detach().double())
    expected = (probabilities / probabilities.sum(1, keepdim=True) * (TOTAL - 40)).floor()
    extra = counted - expected
    likeliest = expected.argmax(1)
    for row, code in enumerate(likeliest.tolist()):
        assert 0 <= float(extra[row, code]) < 40
        extra[row, code] = 0
    assert not extra.any()


def test_rows_of_the_numbers_of_the_prior() -> None:
    """As FORMAT.md says, by the lowest eight bits of the number."""
    for count in (2, 17, 128):
        tables = RowTables(dataclasses.replace(STORED, rows=count))
        assert tables.row_of_given.dtype == np.uint8
        for number in range(-127, 128):
            assert tables.row_of_given[number & 255] == (number + 127) * count // 255


def test_a_model_of_rows_knows_the_bits_of_the_coder() -> None:
    """What the encoder's choice believes a code costs is what the range coder spends, as exactly as float32 says."""
    tables, book = stored()
    numbers = torch.randint(-127, 128, (100, 3)).float()
    codes = torch.randint(40, (100, 3))
    spent = RowRates(numbers, tables.rates).bits(book, codes)
    counted = tables.counts.double()[(numbers.long() + 127) * 17 // 255, codes]
    torch.testing.assert_close(spent.double(), -torch.log2((counted + 1) / TOTAL), rtol=1e-5, atol=1e-5)


# Batches of tiles

# A prior in raster order with slices of several planes.
RASTER = Config(
    name="raster of many planes",
    stages=(
        StageConfig(8, 24, 8, 0, 0, (SliceConfig(3, 4, 24, 1), SliceConfig(2, 6, 40, 2))),
        StageConfig(16, 16, 8, 0, 0, (SliceConfig(planes=16, dim=1, codes=20, layer=0),)),
    ),
    prior=PriorConfig(channels=12, blocks=0, layers=2),
)


@pytest.mark.parametrize("config", [RASTER, TINY], ids=["raster", "stored tables"])
def test_tiles_that_are_decoded_together(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two pictures of three tiles, of two sizes: segments are those of each tile alone, and come back the same in
    batches of any size, some of them missing."""
    model, width = model_of(config), 128 + config.multiple
    codes = [c.short() for c in models.random_codes(model.vqvae, 64, width, seed=3)]
    codes = [torch.cat([c, c.roll(1, 1)]) for c in codes]
    codes[0][1, :, : 64 // config.multiple] = 0  # a tile without a bit of layer 0
    missing_at = [(0, 1, 0), (1, 1, 1), (1, 2, 2), (0, 2, 1)]  # pictures, tiles and layers
    left = [c.clone() for c in codes]
    for level, stage in zip(left, config.levels, strict=True):
        layers = torch.tensor([piece.layer for piece in stage.slices for _ in range(piece.planes)])
        side = 64 // stage.stride
        for picture, tile, layer in missing_at:
            level[picture, :, tile * side : (tile + 1) * side, layers >= layer] = 0
    frame = Frame(width, 64, 50, tile=64)
    monkeypatch.setitem(coding.BATCH_PIXELS, "cpu", 64 * 64)
    with coding.exact(model):
        alone = coding.encode(model, frame, codes)
        for batch in (1, 3, 100):
            monkeypatch.setitem(coding.BATCH_PIXELS, "cpu", batch * 64 * 64)
            assert coding.encode(model, frame, codes) == alone
            missing: list[list[bytes | None]] = [list(own) for own in alone]
            for picture, tile, layer in missing_at:
                missing[picture][3 * layer + tile] = None
            for given, expected in ((alone, codes), (missing, left)):
                for ours, theirs in zip(coding.decode(model, frame, given), expected, strict=True):
                    assert torch.equal(ours, theirs)


@functools.cache
def model_of(config: Config) -> Model:
    with tempfile.TemporaryDirectory() as folder:
        return weights.load(models.save(models.tiny(config), Path(folder) / "model.safetensors"))


def test_weights_table() -> None:
    expected = [reference.p(20 * 64 - d, 64) for d in range(1282)]
    assert counts.WEIGHTS.tolist() == expected
    assert expected[-1] == 0 and expected[-2] == 1
