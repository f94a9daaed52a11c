"""Vectors <-> indices: choices against a numpy search, gradients against autograd, learning against recomputation."""

import itertools
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from vqcodec.models import rates as rates_module
from vqcodec.models.config import SliceConfig
from vqcodec.models.quantizer import GROWTH, INNER, SPHERES, Codebook, grid, look_up, rows, structured_start
from vqcodec.models.rates import Rates, RowRates, plane_blocks
from vqcodec.train import quantise
from vqcodec.train.codebooks import revive, start_by_k_means, update_averages

Floats = NDArray[np.float64]
SHAPES = [(1, 1, 16), (5, 1, 64), (3, 2, 40), (2, 4, 33)]  # planes, dim, codes
TABLE = 24  # rows of the stored tables


def book_and_rows(
    planes: int, dim: int, codes: int, count: int = 50, table: int = 0, learn: str = "gradient"
) -> tuple[Codebook, Tensor]:
    """A codebook off its lattice, with unequal spreads, biases and rows of its table, and vectors in its range."""
    torch.manual_seed(planes * 100 + dim)
    book = Codebook(SliceConfig(planes, dim, codes, 0, rows=table), learn)
    with torch.no_grad():
        book.vectors += 0.1 * torch.randn(book.vectors.shape)
        book.bias += torch.randn(book.bias.shape)
        book.spread.copy_(2.0 ** torch.arange(planes))
        if table:
            square, linear, zero = (torch.linspace(*ends, table) for ends in ((-3, -9), (1, -4), (9, -7)))
            book.family.copy_(torch.stack([square, linear, zero], 1) + torch.randn(table, 3) / 3)
    return book, torch.randn(count, planes, dim) * 3


def by_parameters(book: Codebook, count: int = 50) -> Rates:
    """A rate model by parameters, as of a prior in raster order."""
    planes, _, dim = book.vectors.shape
    theta = torch.randn(count, planes, dim + 2)
    theta[..., dim:] = -theta[..., dim:].abs() / 3
    return Rates(theta, 2 * torch.randn(count, planes))


def by_rows(book: Codebook, count: int = 50, low: int = -127, high: int = 127) -> RowRates:
    """A rate model by rows of the codebook's table, which numbers of the prior choose."""
    given = torch.randint(low, high + 1, (count, len(book.vectors))).float()
    return RowRates(given.requires_grad_(), book.table())


def plain_table(book: Codebook, family: Tensor, bias: Tensor) -> Tensor:
    """Bits of every code in every row of the stored table, in float64 and without a limit: (R, K)."""
    x = book.start.double()[1:]
    square, linear, zero = family.unbind(-1)
    flags = functional.logsigmoid(torch.stack([zero, -zero], -1) * math.log(2)) / math.log(2)
    logits = bias[:, 1:] - 2 ** square[:, None] * x.square().sum(1) - 2 ** linear[:, None] * x.abs().sum(1)
    values = torch.log_softmax(logits * math.log(2), -1) / math.log(2)
    return -torch.cat([flags[:, :1], flags[:, 1:] + values], 1)


def plain_rows(given: Tensor, count: int) -> Tensor:
    """The rows that numbers of the prior choose: -127..127 in equal parts."""
    return torch.floor((given.detach().double() + 127) * count / 255).long()


def bits_by_rows(book: Codebook, rates: RowRates) -> Tensor:
    """Bits of every code of every symbol, from the equations of the module, at most 24: float64 (N, P, K)."""
    table = plain_table(book, book.family.detach().double(), book.bias.detach().double())
    return table.clamp(max=24)[plain_rows(rates.given, TABLE)]


def bits_by_parameters(book: Codebook, theta: Tensor, zero: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Bits of the flag of every code of every symbol, and of its value: float64 (N, P, K) each."""
    x = (book.vectors.detach() / book.spread[:, None, None]).double()
    drift, square, linear = theta.split([x.shape[-1], 1, 1], -1)
    logits = torch.einsum("npd,pkd->npk", drift, x) + bias
    logits = logits + square * x.square().sum(-1) + linear * x.abs().sum(-1)
    values = torch.log_softmax(logits[..., 1:] * math.log(2), -1) / math.log(2)
    flags = functional.logsigmoid(torch.stack([zero, -zero], -1) * math.log(2)) / math.log(2)
    nothing = torch.zeros_like(values[..., :1])
    return -flags[..., (torch.arange(x.shape[1]) > 0).long()], -torch.cat([nothing, values], -1)


def own(bits: Tensor, indices: Tensor) -> Tensor:
    """The bits of some codes, (N, P), of those of all, (N, P, K)."""
    return bits.gather(-1, indices[..., None])[..., 0]


def numpy_distances(book: Codebook, v: Tensor) -> Floats:
    """Squared distance of every row to every code, (N, P, K)."""
    gap = v.double().numpy()[:, :, None] - book.vectors.detach().double().numpy()[None]
    return np.asarray((gap**2).sum(-1))


def assert_best(cost: Floats, indices: Tensor) -> None:
    """The indices (N, P) minimise the cost (N, P, K), up to float32 rounding."""
    found = np.take_along_axis(cost, indices.numpy()[..., None], 2)[..., 0]
    np.testing.assert_allclose(found, cost.min(2), rtol=1e-4, atol=1e-4)
    assert (indices.numpy() == cost.argmin(2)).mean() > 0.99


def test_rows_and_grid() -> None:
    x = torch.randn(2, 6, 3, 5)
    found = rows(x, planes=2)
    assert found.shape == (2 * 3 * 5, 2, 3)
    assert torch.equal(found[1 * 15 + 2 * 5 + 4, 1], x[1, 3:, 2, 4])
    assert torch.equal(grid(found, 2, 3, 5), x)


def test_look_up() -> None:
    table = torch.randn(3, 7, 4)
    indices = torch.randint(7, (5, 3))
    found = look_up(table, indices)
    assert all(torch.equal(found[n, p], table[p, indices[n, p]]) for n in range(5) for p in range(3))


# The start


@pytest.mark.parametrize(("codes", "dim"), [(9, 2), (96, 2), (160, 2), (400, 2), (256, 4), (500, 8)])
def test_structured_start(codes: int, dim: int) -> None:
    points = structured_start(codes, dim)
    assert points.shape == (codes, dim)
    assert not points[0].any()
    norms = points.norm(dim=1)
    assert bool((norms[1:] > norms[:-1] - 1e-4).all())
    assert len(torch.unique(points, dim=0)) == codes
    # First a lattice of most of the codes, which leaves no shorter integer vector out ...
    lattice = int((points == points.round()).all(1).cumprod(0).sum())
    assert lattice >= INNER * codes
    inner = points[:lattice].square().sum(1)
    if dim <= 4:
        reach = torch.arange(-int(inner[-1] ** 0.5), int(inner[-1] ** 0.5) + 1)
        every = torch.cartesian_prod(*[reach] * dim).reshape(-1, dim).square().sum(1)
        assert int((inner < inner[-1]).sum()) == int((every < inner[-1]).sum())
    # ... then spheres that grow, spread over all directions.
    outer = points[lattice:]
    if len(outer):
        assert float(outer.norm(dim=1).min() / norms[lattice - 1]) == pytest.approx(GROWTH)
        assert float(norms[-1] / norms[lattice - 1]) == pytest.approx(GROWTH ** min(SPHERES, len(outer)), rel=0.4)
        assert float(outer.mean(0).norm()) < 0.5 * float(norms[-1])


@pytest.mark.parametrize("codes", [3, 4, 16, 64, 512, 2048])
def test_structured_start_in_one_dimension(codes: int) -> None:
    """Four fifths of the codes are integers, in turn above and below 0; the rest reach on to three times the last."""
    points = structured_start(codes, 1)[:, 0]
    integers = max(1, int(0.8 * codes))
    assert points[:integers].tolist() == [(k + 1) // 2 * (1 if k % 2 else -1) for k in range(integers)]
    assert points.sign().tolist() == [0, *(1 if k % 2 else -1 for k in range(1, codes))]
    assert len(points.unique()) == codes
    above = points[points > 0]
    assert torch.equal(above, above.sort()[0])
    if codes >= 64:
        assert float(points.abs().max() / points[:integers].abs().max()) == pytest.approx(3, rel=0.02)
        growth = above[int(0.42 * codes) :]
        ratios = growth[1:] / growth[:-1]
        torch.testing.assert_close(ratios, ratios.mean().expand(len(ratios)), rtol=1e-3, atol=0)


def test_long_vectors_start_in_random_directions() -> None:
    points = structured_start(64, 17)
    assert not points[0].any()
    torch.testing.assert_close(points[1:].norm(dim=1), torch.ones(63))
    assert len(torch.unique(points, dim=0)) == 64
    assert torch.equal(points, structured_start(64, 17))


def test_inputs_of_the_prior_are_signed_bytes_that_tell_codes_apart() -> None:
    for dim, codes in [(1, 2048), (1, 64), (2, 160), (4, 160)]:
        inputs = Codebook(SliceConfig(1, dim, codes, layer=0)).inputs()
        assert inputs.shape == (1, codes, 2 * dim)
        assert torch.equal(inputs, inputs.round())
        assert float(inputs.abs().max()) <= 127
        assert not inputs[0, 0].any()
        assert torch.equal(inputs[..., :dim].abs(), inputs[..., dim:])
        near = Codebook(SliceConfig(1, dim, 9, layer=0)).inputs()
        assert len(torch.unique(near[0], dim=0)) == 9
    line = Codebook(SliceConfig(1, 1, 2048, layer=0))
    by_value = line.inputs()[0, line.vectors[0, :, 0].argsort(), 0]
    assert torch.equal(by_value, by_value.sort()[0])
    assert (float(by_value[0]), float(by_value[-1])) == (-127, 127)
    with torch.no_grad():
        line.vectors *= 2
    assert float(line.inputs().abs().max()) == 127, "codes that have moved out stay in range"


# Choices


@pytest.mark.parametrize(("planes", "dim", "codes"), SHAPES)
def test_nearest_is_what_a_search_finds(planes: int, dim: int, codes: int) -> None:
    book, v = book_and_rows(planes, dim, codes)
    indices = book.nearest(v)
    assert (indices.dtype, indices.shape) == (torch.int64, (50, planes))
    assert_best(numpy_distances(book, v), indices)


@pytest.mark.parametrize(("planes", "dim", "codes"), SHAPES)
@pytest.mark.parametrize("factor", [0.0, 0.4, 1.0])
def test_choice_is_what_a_search_finds(planes: int, dim: int, codes: int, factor: float) -> None:
    book, v = book_and_rows(planes, dim, codes, table=TABLE)
    rates = by_rows(book)
    weight = torch.rand(50, planes) * 4 + 0.1
    indices = book.choose(v, rates, weight, factor)
    cost = weight.double().numpy()[..., None] * numpy_distances(book, v) + factor * bits_by_rows(book, rates).numpy()
    assert_best(cost, indices)
    if factor:
        assert not torch.equal(indices, book.nearest(v))


def test_choice_near_zero() -> None:
    """Most of what a photo gives: small vectors whose code 0 is likely."""
    book, v = book_and_rows(3, 2, 40, count=2000, table=TABLE)
    v *= 2 ** (5 * torch.rand(2000, 3, 1) - 5)
    rates = by_rows(book, 2000, high=-20)
    weight = torch.rand(2000, 3) * 4
    cost = weight.double().numpy()[..., None] * numpy_distances(book, v) + 0.5 * bits_by_rows(book, rates).numpy()
    indices = book.choose(v, rates, weight, 0.5)
    assert_best(cost, indices)
    assert 0.6 < float((indices == 0).float().mean()) < 0.95


def test_result_does_not_depend_on_how_planes_are_chunked(monkeypatch: pytest.MonkeyPatch) -> None:
    book, v = book_and_rows(5, 2, 40, table=TABLE)
    rates, weight, share = by_rows(book), torch.ones(50, 5), torch.ones(50)
    v.requires_grad_()

    def results() -> tuple[Tensor, ...]:
        loss, indices, bits = quantise.quantise(book, v, rates, weight, 0.5, share)
        return (
            loss,
            indices,
            bits,
            book.choose(v, rates, weight, 0.5),
            *torch.autograd.grad(loss, [v], retain_graph=True),
        )

    whole = results()
    monkeypatch.setattr(rates_module, "CHUNK", 1)
    for ours, expected in zip(results(), whole, strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("limit", [0, 1, 5, 7, 100])
def test_planes_in_blocks(limit: int) -> None:
    members = [3, 0, 4, 9, 0, 0, 1, 1, 2]
    blocks = list(plane_blocks(members, limit))
    flat = [item for _, parts in blocks for item in parts]
    assert [(plane, part.stop - part.start) for plane, part, _ in flat] == [
        (0, 3),
        (2, 4),
        (3, 9),
        (6, 1),
        (7, 1),
        (8, 2),
    ]
    assert [part.start for _, part, _ in flat] == [0, 3, 7, 16, 17, 18]
    for block, parts in blocks:
        assert block.start == parts[0][1].start and block.stop == parts[-1][1].stop
        assert all(
            here.start == part.start - block.start and here.stop == part.stop - block.start for _, part, here in parts
        )
    for (block, parts), (_, following) in itertools.pairwise([*blocks, (slice(0, 0), [])]):
        size = block.stop - block.start
        assert size <= limit or len(parts) == 1
        if following:
            assert size + following[0][1].stop - following[0][1].start > limit, "the next plane would have fitted"
    assert list(plane_blocks([0, 0], limit)) == []


def test_bfloat16_autocast_does_not_reach_the_choice() -> None:
    book, v = book_and_rows(3, 2, 40, table=TABLE)
    rates, weight, share = by_rows(book), torch.ones(50, 3), torch.ones(50)
    other, _ = book_and_rows(3, 2, 40)
    parameters = by_parameters(other)
    with torch.autocast("cpu", torch.bfloat16):
        nearest, chosen = book.nearest(v), book.choose(v, rates, weight, 0.5)
        loss, indices, bits = quantise.quantise(book, v, rates, weight, 0.5, share)
        spent = parameters.bits(other, indices)
    assert torch.equal(nearest, book.nearest(v))
    assert torch.equal(chosen, book.choose(v, rates, weight, 0.5))
    assert torch.equal(indices, chosen)
    assert loss.dtype == bits.dtype == spent.dtype == torch.float32
    torch.testing.assert_close(bits.double(), own(bits_by_rows(book, rates), indices).sum(1), rtol=1e-5, atol=1e-5)
    assert torch.equal(spent, parameters.bits(other, indices))


def test_lookup() -> None:
    book, _ = book_and_rows(3, 2, 40)
    indices = torch.randint(40, (7, 3))
    found = book.lookup(indices)
    for n in range(7):
        for p in range(3):
            assert torch.equal(found[n, p], book.vectors[p, indices[n, p]])
    found.sum().backward()
    assert book.vectors.grad is not None
    assert float(book.vectors.grad.sum()) == 7 * 3 * 2


# Gradients


@pytest.mark.parametrize(("planes", "dim", "codes"), SHAPES)
@pytest.mark.parametrize("steepness", [0.3, 1.0, 10.0])
def test_bits_by_parameters(planes: int, dim: int, codes: int, steepness: float) -> None:
    """And their gradients, for the parameters and for the biases of the codebook."""
    book, _ = book_and_rows(planes, dim, codes)
    rates = by_parameters(book)
    theta = (rates.theta * steepness).requires_grad_()
    zero = (rates.zero * steepness).clamp(-15, 15).requires_grad_()
    indices = torch.randint(codes, (50, planes)) * (torch.rand(50, planes) < 0.7)
    share = torch.rand(50, planes)
    spent = Rates(theta, zero).bits(book, indices)
    (spent * share).sum().backward()

    plain = [t.detach().double().requires_grad_() for t in (theta, zero, book.bias)]
    flag, value = (own(bits, indices) for bits in bits_by_parameters(book, *plain))
    torch.testing.assert_close(spent.double(), (flag + value).clamp(max=24), rtol=1e-5, atol=1e-4)
    if steepness > 1:
        assert bool((flag + value > 24).any()), "the case must have codes at the limit"
    # Of a symbol that costs the most bits there are, only the flag learns.
    (share * (flag + torch.where(flag + value < 24, value, 0))).sum().backward()
    for ours, reference in zip((theta, zero, book.bias), plain, strict=True):
        assert ours.grad is not None and reference.grad is not None
        torch.testing.assert_close(ours.grad.double(), reference.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("planes", "dim", "codes"), SHAPES)
def test_gradients_of_bits_by_parameters_are_finite_differences(planes: int, dim: int, codes: int) -> None:
    """Along random directions, a small step up and down."""
    book, _ = book_and_rows(planes, dim, codes)
    rates = by_parameters(book)
    sizes = [2 / book.features().abs().amax((0, 1)), torch.ones(planes), torch.ones(codes)]
    inputs = [(sizes[0] * rates.theta).requires_grad_(), rates.zero.requires_grad_(), book.bias]
    indices, share = torch.randint(codes, (50, planes)), torch.rand(50, planes)

    def total() -> Tensor:
        spent = Rates(*inputs[:2]).bits(book, indices)
        assert float(spent.detach().max()) < 23, "codes at the limit have no finite differences"
        return (spent.double() * share).sum()

    for tensor, size, gradient in zip(inputs, sizes, torch.autograd.grad(total(), inputs), strict=True):
        for _ in range(3):
            step = 0.01 * size * torch.randn(tensor.shape)
            with torch.no_grad():
                tensor += step
                above = total()
                tensor -= 2 * step
                below = total()
                tensor += step
            expected = (gradient.double() * step).sum()
            torch.testing.assert_close((above - below) / 2, expected, rtol=0.01, atol=2e-3)


@pytest.mark.parametrize(("planes", "dim", "codes"), SHAPES)
@pytest.mark.parametrize("limit", [rates_module.CHUNK, 1])
def test_blocks_of_symbols(planes: int, dim: int, codes: int, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Log2 probabilities of all codes for some symbols, plane after plane."""
    monkeypatch.setattr(rates_module, "CHUNK", limit)
    mask = torch.rand(planes, 50) < 0.4
    mask[-1] = False
    mask[0, :3] = True
    book, _ = book_and_rows(planes, dim, codes, table=TABLE)
    rates = by_rows(book)
    expected = bits_by_rows(book, rates)
    found = torch.zeros(int(mask.sum()), codes)
    for block, own_planes, logp in rates.some(mask).blocks(mask.sum(1).tolist()):
        found[block] = logp.detach()
        assert [plane for plane, _, _ in own_planes] == sorted({plane for plane, _, _ in own_planes})
    torch.testing.assert_close(-found.double(), expected.transpose(0, 1)[mask], rtol=1e-5, atol=1e-4)


def slopes_by_rows(table: Tensor, given: Tensor, indices: Tensor) -> Tensor:
    """How bits change with the prior's numbers: the difference of the rows above and below, float64 (N, P).

    At the limit it is that of the flag alone.

    table: bits without a limit, of `plain_table`.
    """
    row = plain_rows(given, TABLE)
    above, below = (row + 1).clamp(max=TABLE - 1), (row - 1).clamp(min=0)
    flag = -torch.log2(-torch.expm1(-table[:, 0] * math.log(2)))
    found = torch.where(
        table[row, indices] > 24, flag[above] - flag[below], table[above, indices] - table[below, indices]
    )
    return found / (above - below) * TABLE / 255


@pytest.mark.parametrize(("planes", "dim", "codes"), SHAPES)
@pytest.mark.parametrize("steepness", [0.0, 6.0], ids=["usual", "steep"])
def test_gradients_of_the_rate(planes: int, dim: int, codes: int, steepness: float) -> None:
    book, v = book_and_rows(planes, dim, codes, table=TABLE)
    with torch.no_grad():
        book.family[:, 1] += steepness
        v[::2] *= 0.1
    v.requires_grad_()
    rates = by_rows(book)
    weight, share = 2 * torch.rand(50, planes) + 0.1, torch.rand(50)
    loss, indices, bits = quantise.quantise(book, v, rates, weight, 0.5, share)
    (3 * loss).backward()
    assert not bits.requires_grad
    assert torch.equal(indices, book.choose(v.detach(), rates, weight, 0.5))
    assert 0 < int((indices == 0).sum()) < indices.numel(), "the case must have both kinds of symbols"

    plain = [t.detach().double().requires_grad_() for t in (book.family, book.bias)]
    table = plain_table(book, *plain)
    spent = own(table[plain_rows(rates.given, TABLE)], indices)
    assert not steepness or bool((spent > 24).any()), "the case must have codes at the limit"
    spent = spent.clamp(max=24)
    torch.testing.assert_close(bits.double(), spent.sum(1), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(loss.detach().double(), (share[:, None] * spent).sum(), rtol=1e-5, atol=1e-4)
    (3 * share[:, None] * spent).sum().backward()
    for ours, reference in zip((book.family, book.bias), plain, strict=True):
        assert ours.grad is not None and reference.grad is not None
        torch.testing.assert_close(ours.grad.double(), reference.grad, rtol=1e-4, atol=1e-4)
    slopes = 3 * share[:, None] * slopes_by_rows(table.detach(), rates.given, indices)
    assert rates.given.grad is not None
    torch.testing.assert_close(rates.given.grad.double(), slopes, rtol=1e-3, atol=1e-3)

    # The encoder's gradient: of the expected bits under a soft assignment, to the first codes where code 0 is certain.
    opened = book.open_symbols(v.detach(), rates.zero, weight, 0.5)
    assert 0 < int(opened.sum()) < opened.numel(), "the case must have both kinds of symbols"
    assert v.grad is not None
    for members, count in ((opened, codes), (~opened, quantise.NEAR)):
        expected = plain_soft_gradient(book, v.detach(), bits_by_rows(book, rates), 3 * share, count)
        torch.testing.assert_close(v.grad[members].double(), expected[members], rtol=1e-3, atol=1e-3)


def plain_soft_gradient(book: Codebook, v: Tensor, bits: Tensor, share: Tensor, count: int) -> Tensor:
    """d (share * expected bits) / dv in float64, as if the codebook had its first `count` codes only."""
    free = v.double().requires_grad_()
    distances = (free[:, :, None] - book.vectors.detach()[:, :count].double()).square().sum(-1)
    soft = torch.softmax(-distances / quantise.TEMPERATURE, -1)
    (share[:, None] * (soft * bits[..., :count]).sum(-1)).sum().backward()
    assert free.grad is not None
    return free.grad


@pytest.mark.parametrize(("planes", "dim", "codes"), SHAPES)
def test_all_symbols_alike(planes: int, dim: int, codes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs on accelerators: as the other, but that every symbol is pulled by all codes."""
    book, v = book_and_rows(planes, dim, codes, table=TABLE)
    rates, weight, share = by_rows(book), torch.rand(50, planes) + 0.1, torch.rand(50)
    inputs = [rates.given, book.family, book.bias]
    loss, indices, bits = quantise.quantise(book, v, rates, weight, 0.5, share)
    expected = torch.autograd.grad(loss, inputs, retain_graph=True)
    pull = plain_soft_gradient(book, v, bits_by_rows(book, rates), share, codes)
    v.requires_grad_()
    for limit in (rates_module.LARGE_CHUNK, 1):
        with monkeypatch.context() as patch:
            patch.setattr(rates_module, "LARGE_CHUNK", limit)
            patch.setattr(Tensor, "is_cuda", True)
            again, chosen, spent = quantise.quantise(book, v, rates, weight, 0.5, share)
            with torch.no_grad():
                alone = quantise.quantise(book, v, rates, weight, 0.5, share)[1]
            plain = book.choose(v, rates, weight, 0.5)
        torch.testing.assert_close(again, loss)
        assert torch.equal(chosen, indices) and torch.equal(alone, indices) and torch.equal(plain, indices)
        torch.testing.assert_close(spent, bits)
        to_v, *found = torch.autograd.grad(again, [v, *inputs], retain_graph=True)
        torch.testing.assert_close(to_v.double(), pull, rtol=1e-3, atol=1e-3)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


# Learning


def test_moving_averages() -> None:
    planes, dim, codes = 2, 3, 8
    book, _ = book_and_rows(planes, dim, codes, learn="ema")
    assert not book.vectors.requires_grad
    start = book.vectors.detach().double().numpy().copy()
    usage, sums = np.zeros((planes, codes)), np.zeros((planes, codes, dim))
    for step in range(1, 4):
        v = torch.randn(30, planes, dim)
        indices = torch.randint(5, (30, planes))  # codes 5, 6 and 7 never have members
        before = book.vectors.detach().double().numpy().copy()
        update_averages(book, v, indices)
        for p in range(planes):
            for k in range(codes):
                members = v[indices[:, p] == k, p].double().numpy()
                usage[p, k] += 0.01 * (len(members) - usage[p, k])
                sums[p, k] += 0.01 * (members.sum(0) - sums[p, k])
        correction = 1 - 0.99**step
        counts = usage / correction
        totals = counts.sum(1, keepdims=True)
        smooth = (counts + 1e-5) / (totals + codes * 1e-5) * totals
        expected = np.where((counts > 1e-3)[..., None], sums / correction / smooth[..., None], before)
        np.testing.assert_allclose(book.vectors.detach().numpy(), expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(book.usage.numpy(), usage, rtol=1e-4)
    assert np.array_equal(book.vectors[:, 5:].detach().numpy(), start[:, 5:].astype(np.float32))


PROCESS = """
import torch
from torch import distributed
from vqcodec.models.config import SliceConfig
from vqcodec.models.quantizer import Codebook
from vqcodec.train.codebooks import update_averages

distributed.init_process_group("gloo")
book, alone = (Codebook(SliceConfig(2, 2, 8, layer=0), "ema") for _ in range(2))
rows, indices = torch.randn(2, 30, 2, 2), torch.randint(8, (2, 30, 2))  # of both processes: the seed is the same
update_averages(book, rows[distributed.get_rank()], indices[distributed.get_rank()])
distributed.destroy_process_group()
update_averages(alone, rows.flatten(0, 1), indices.flatten(0, 1))
torch.testing.assert_close(book.vectors, alone.vectors)
torch.testing.assert_close(book.usage, alone.usage)
"""


@pytest.mark.slow
def test_processes_learn_one_codebook(tmp_path: Path) -> None:
    program = tmp_path / "learn.py"
    program.write_text("import torch\ntorch.manual_seed(0)\n" + PROCESS, encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(program)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_averages_only_count_when_the_gradient_learns() -> None:
    book, v = book_and_rows(2, 1, 16)
    before = book.vectors.detach().clone()
    update_averages(book, v, book.nearest(v))
    assert torch.equal(book.vectors, before)
    torch.testing.assert_close(book.usage.sum(1), torch.full((2,), 50 * 0.01))


@pytest.mark.parametrize("learn", ["gradient", "ema"])
def test_revival_moves_dead_codes_onto_data(learn: str) -> None:
    book, _ = book_and_rows(2, 2, 16, learn=learn)
    v = torch.randn(100, 2, 2) + 10
    for _ in range(3):
        update_averages(book, v, torch.randint(1, 8, (100, 2)))  # 0 and 8 to 15 are dead
    before = book.vectors.detach().clone()
    assert revive(book, v) == 2 * 8
    assert torch.equal(book.vectors[:, :8], before[:, :8]), "code 0 and living codes stay"
    for plane in range(2):
        rows = {tuple(row) for row in v[:, plane].tolist()}
        assert all(tuple(code) in rows for code in book.vectors[plane, 8:].tolist())
    assert revive(book, v) == 0, "a revived code gets time to find members"
    moved = book.vectors.detach().clone()
    update_averages(book, v, torch.randint(1, 8, (100, 2)))
    torch.testing.assert_close(book.vectors[:, 8:], moved[:, 8:], rtol=0.02, atol=0)


def test_k_means_start_lowers_the_distortion() -> None:
    torch.manual_seed(0)
    centres = torch.randn(2, 6, 3) * 5
    v = torch.stack([centres[p, torch.randint(6, (400,))] for p in range(2)], 1) + 0.1 * torch.randn(400, 2, 3)
    book = Codebook(SliceConfig(2, 3, 16, layer=0))

    @torch.no_grad()
    def distortion() -> float:
        return float((v - book.lookup(book.nearest(v))).square().sum(-1).mean())

    lattice = distortion()
    start_by_k_means(book, v, rounds=0)
    drawn = distortion()
    start_by_k_means(book, v)
    assert distortion() < 0.5 * drawn < 0.5 * lattice
    assert distortion() < 0.1
    norms = book.vectors.square().sum(-1)
    assert torch.equal(norms.argmin(1), torch.zeros(2, dtype=torch.int64))
