"""Stored tables: the prior says of each symbol only which row has its probabilities."""

from pathlib import Path

import models
import numpy as np
import pytest
import reference
import torch
from models import picture

import vqcodec
from vqcodec import bitstream, coding, decoder, sampling, weights
from vqcodec.entropy import Decoder, Encoder, Table
from vqcodec.errors import ChecksumError, WeightsError
from vqcodec.frame import Frame
from vqcodec.models.config import SliceConfig
from vqcodec.models.counts import TOTAL, RowTables
from vqcodec.models.model import walk
from vqcodec.models.quantizer import Codebook
from vqcodec.models.rates import MOST_BITS, RowRates, row_of
from vqcodec.train.quantise import TEMPERATURE, quantise

PIECE = SliceConfig(planes=3, dim=1, codes=64, layer=0, rows=40)


def test_every_number_of_the_prior_is_a_row() -> None:
    rows = row_of(torch.arange(-127.0, 128.0), 40)
    assert rows.tolist() == sorted(rows.tolist()) and set(rows.tolist()) == set(range(40))


@pytest.mark.parametrize("dim", [1, 2, 4])
@torch.no_grad()
def test_rows_start_as_ever_wider_distributions(dim: int) -> None:
    """Of a lattice's codes the ones around 0 become less likely, row by row, and all of them add up."""
    book = Codebook(SliceConfig(planes=1, dim=dim, codes=200, layer=0, rows=128))
    logp = book.table().logp
    torch.testing.assert_close(torch.exp2(logp).sum(1), torch.ones(len(logp)), atol=200 * 2**-24, rtol=1e-5)
    assert bool((logp[1:, 0] < logp[:-1, 0] + 1e-4).all())
    assert float(logp[0, 0]) > -0.01 and float(logp[-1, 0]) < -5
    # In one dimension: the mass of a Laplace distribution between the middles, where codes are integers.
    if dim == 1:
        scale = 0.04 * 2500 ** (64 / 127)
        mass = (np.exp(-0.5 / scale) - np.exp(-1.5 / scale)) / 2
        assert float(torch.exp2(logp[64, 1])) == pytest.approx(mass, rel=0.02)


def test_counts_are_the_probabilities_of_the_rate_model() -> None:
    book = Codebook(PIECE)
    torch.manual_seed(1)
    with torch.no_grad():
        book.bias.normal_(0, 0.5)
        book.family += 0.2 * torch.randn_like(book.family)
    tables = RowTables(PIECE)
    tables.fill(book)
    tables.check()
    torch.testing.assert_close(tables.counts / TOTAL, torch.exp2(book.table().logp), atol=64 / TOTAL * 2, rtol=1e-3)
    torch.testing.assert_close(
        torch.exp2(tables.rates.logp), torch.exp2(book.table().logp), atol=64 / TOTAL * 2, rtol=1e-3
    )


def test_symbols_come_back_row_by_row() -> None:
    generator = np.random.default_rng(0)
    table = np.zeros((5, 9), np.float32)
    for row in table:
        row[:] = generator.multinomial(TOTAL - 9, generator.dirichlet(np.ones(9)))
    rows = np.sort(generator.choice([0, 2, 4], 300))
    symbols = np.array([generator.choice(9, p=table[row] / table[row].sum()) for row in rows])
    stored = Table(table)
    encoder = Encoder()
    encoder.put_rows(symbols, rows, stored)
    data = encoder.finish()
    assert np.array_equal(Decoder(data).get_rows(rows, stored), symbols)
    one = Encoder()
    one.put(symbols, table[rows])
    assert one.finish() == data, "as one distribution for each symbol would"
    assert len(Decoder(b"").get_rows(rows[:0], stored)) == 0
    with pytest.raises(ChecksumError):
        Decoder(b"\xff" * 64).get_rows(rows, stored)


def test_gradients_of_rows_lead_to_fewer_bits() -> None:
    """What the prior gives moves to the row that fits, and so do the rows."""
    torch.manual_seed(0)
    book = Codebook(PIECE)
    v = torch.distributions.Laplace(0, 2.0).sample((2000, 3, 1))
    given = torch.full((3,), 90.0, requires_grad=True)
    family = book.family
    optimiser = torch.optim.Adam([{"params": [given], "lr": 4.0}, {"params": [family, book.bias], "lr": 0.02}])
    weight, share = torch.full((2000, 3), 100.0), torch.full((2000,), 1 / 6000)
    spent = []
    for _ in range(60):
        rounded = given + (given.round().clamp(-127, 127) - given).detach()
        loss, indices, _ = quantise(book, v, RowRates(rounded.expand(2000, 3), book.table()), weight, 0.8, share)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        spent.append(float(loss.detach()))
    frequencies = torch.bincount(indices[:, 0], minlength=64).double() / 2000
    entropy = -float((frequencies * frequencies.clamp(min=1e-9).log2()).sum())
    assert spent[-1] < entropy + 0.08 < spent[0]


@pytest.mark.parametrize("dim", [1, 2])
def test_choice_bits_and_gradients(dim: int) -> None:
    """Against every code's cost in float64, and numbers of the prior one up and one down."""
    torch.manual_seed(4)
    piece = SliceConfig(planes=3, dim=dim, codes=50, layer=0, rows=128)
    book = Codebook(piece)
    with torch.no_grad():
        book.vectors += 0.2 * torch.randn_like(book.vectors) * (torch.arange(50) > 0)[:, None]
        book.bias.normal_(0, 0.3)
    v = 4 * torch.randn(300, 3, dim)
    given = torch.randint(-126, 127, (300, 3)).float().requires_grad_()
    weight = 5 * torch.rand(300, 3) + 0.1
    rates = RowRates(given, book.table())
    bits = -book.table().logp.detach().double()[row_of(given.detach(), 128)]  # (N, P, K)
    distances = (v[:, :, None] - book.vectors.detach()).double().square().sum(-1)
    expected = (0.8 * bits + weight[..., None] * distances).argmin(-1)
    chosen = book.choose(v, rates, weight, 0.8)
    assert torch.equal(chosen, expected) and 0 < int((chosen == 0).sum()) < chosen.numel()
    share = torch.rand(300)
    pulled = v.clone().requires_grad_()
    loss, indices, spent = quantise(book, pulled, rates, weight, 0.8, share)
    assert torch.equal(indices, chosen)
    own = bits.gather(-1, chosen[..., None])[..., 0]
    torch.testing.assert_close(spent.double(), own.sum(1), rtol=1e-5, atol=1e-4)
    loss.backward()
    assert given.grad is not None and pulled.grad is not None and book.family.grad is not None
    row = row_of(given.detach(), 128)
    above, below = (
        -book.table().logp.detach().double()[(row + d).clamp(0, 127)].gather(-1, chosen[..., None])[..., 0]
        for d in (1, -1)
    )
    free = (torch.maximum(above, below) < MOST_BITS) & (row > 0) & (row < 127)
    slope = (above - below) / 2 * 128 / 255 * share[:, None]
    torch.testing.assert_close(given.grad.double()[free], slope[free], rtol=1e-3, atol=1e-4)
    # The encoder's gradient where a code other than 0 may win: of the expected bits under a soft assignment.
    where = v.double().requires_grad_()
    apart = (where[:, :, None] - book.vectors.detach().double()).square().sum(-1)
    (share[:, None] * (torch.softmax(-apart / TEMPERATURE, -1) * bits).sum(-1)).sum().backward()
    opened = book.open_symbols(v, rates.zero, weight, 0.8)
    assert where.grad is not None and 0 < int(opened.sum()) < opened.numel()
    torch.testing.assert_close(pulled.grad.double()[opened], where.grad[opened], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("size", [(1, 1), (40, 75), (130, 90)], ids=str)
def test_codes_by_the_second_reader(size: tuple[int, int], tiny_weights: Path) -> None:
    data = vqcodec.compress(picture(*size, seed=7), weights=tiny_weights, quality=70, tile=64, verify=True)
    container = bitstream.read(data)
    codes = decoder.decode_codes([container], weights.load(tiny_weights))
    loaded = reference.Weights(tiny_weights)
    boxes = container.header.frame.padded_tiles(loaded.levels[0]["stride"])
    for number, (top, left, height, width) in enumerate(boxes):
        own = container.segments[number :: len(boxes)]
        decoded = reference.Tile(loaded, 70).decode(own, height, width)
        for found, level, expected in zip(decoded, loaded.levels, codes, strict=True):
            y, x = top // level["stride"], left // level["stride"]
            assert np.array_equal(found, expected[0, y : y + found.shape[0], x : x + found.shape[1]].numpy())


def test_files_are_as_large_as_the_rate_model_says(tiny_weights: Path) -> None:
    model = weights.load(tiny_weights)
    frame = Frame(192, 128, 60)
    with coding.exact(model):
        codes = [c.to(torch.int64) for c in models.random_codes(model.vqvae, 128, 192)]
        segments = coding.encode(model, frame, codes)[0]
        expected = 0.0
        (tile,) = coding.batches_of(model, frame, [(0, 0)])
        for piece in walk(model.levels, tile):
            for one in tile.passes(codes[piece.level][..., piece.planes]):
                assert one.codes is not None
                expected += float(piece.rates(one.parameters).bits(piece.codebook, one.codes).sum())
    assert 8 * sum(map(len, segments)) == pytest.approx(expected, rel=0.005)


def test_codes_are_drawn(tiny_weights: Path) -> None:
    first, second = (next(sampling.sample(1, weights_file=tiny_weights, height=64, width=64, seed=3)) for _ in range(2))
    assert np.array_equal(first, second) and first.std() > 1


def test_the_search_pays(tiny_weights: Path) -> None:
    pixels = picture(96, 128, seed=4)
    model = weights.load(tiny_weights)
    costs = []
    for effort in (1, 5):
        data = vqcodec.compress(pixels, weights=tiny_weights, quality=60, effort=effort)
        restored = np.asarray(vqcodec.decompress(data, weights=tiny_weights)).astype(float)
        mse = float(np.square(restored - pixels).mean())
        costs.append(8 * len(data) / (96 * 128) + model.config.lambda_of(59 / 99) * mse)
    assert costs[1] < costs[0]


def test_bad_tables_are_refused(tiny_weights: Path, tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(tiny_weights, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    name = "tables.levels.1.0.counts"
    assert not tensors[name].is_floating_point() and int(tensors[name].sum(1)[0]) == TOTAL - 64
    for row, column, change in ((0, 0, 1), (3, 2, -(1 << 25))):
        wrong = tensors[name].clone()
        wrong[row, column] += change
        save_file({**tensors, name: wrong}, tmp_path / "wrong.safetensors", metadata)
        with pytest.raises(WeightsError, match="the counts of a table are not those of distributions"):
            weights.load(tmp_path / "wrong.safetensors")


@pytest.mark.parametrize(
    "wrong", [{"rows": 1}, {"rows": 129}, {"rows": -1}, {"rows": 8, "dim": 9}, {"rows": 8, "dim": 16}], ids=str
)
def test_bad_numbers_of_rows(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="rows must be"):
        SliceConfig(**{"planes": 1, "dim": 1, "codes": 16, "layer": 0, **wrong})
