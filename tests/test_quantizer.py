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
from vqcodec.models.quantizer import OUTPOSTS, Codebook, grid, look_up, rows, structured_start
from vqcodec.models.rates import Rates, plane_blocks
from vqcodec.train import quantise
from vqcodec.train.codebooks import revive, start_by_k_means, update_averages

Floats = NDArray[np.float64]
SHAPES = [(1, 1, 16, 1), (5, 1, 64, 1), (3, 2, 40, 1), (2, 4, 33, 1), (3, 2, 40, 2)]  # planes, dim, codes, scales


def book_and_rows(
    planes: int, dim: int, codes: int, scales: int = 1, rows: int = 50, learn: str = "gradient"
) -> tuple[Codebook, Tensor]:
    """A codebook off its lattice, with unequal spreads and biases, and vectors in its range."""
    torch.manual_seed(planes * 100 + dim)
    book = Codebook(SliceConfig(planes, dim, codes, 0, scales), learn)
    with torch.no_grad():
        book.vectors += 0.1 * torch.randn(book.vectors.shape)
        book.bias += torch.randn(book.bias.shape)
        book.spread.copy_(2.0 ** torch.arange(planes))
    return book, torch.randn(rows, planes, dim) * 3


def rate_model(book: Codebook, rows: int = 50) -> Rates:
    planes, _, dim = book.vectors.shape
    theta = torch.randn(rows, planes, dim + 2 * book.config.scales)
    theta[..., dim:] = -theta[..., dim:].abs() / 3
    return Rates(theta, 2 * torch.randn(rows, planes))


def numpy_bits(book: Codebook, rates: Rates) -> Floats:
    """Bits of every code of every symbol, from the equations of the module, at most 24: (N, P, K)."""
    vectors, bias, spread = (t.detach().double().numpy() for t in (book.vectors, book.bias, book.spread))
    theta, zero = rates.theta.detach().double().numpy(), rates.zero.detach().double().numpy()
    planes, codes, dim = vectors.shape
    bits = np.empty((*zero.shape, codes))
    for n in range(len(zero)):
        for p in range(planes):
            x = vectors[p] / spread[p]
            square, linear = np.split(theta[n, p, dim:], 2)
            logits = x @ theta[n, p, :dim] + (x**2 * square).sum(1) + (abs(x) * linear).sum(1) + bias[p]
            significant = 1 / (1 + 2 ** zero[n, p])
            bits[n, p, 1:] = -np.log2(significant) - logits[1:] + np.log2((2 ** logits[1:]).sum())
            bits[n, p, 0] = -np.log2(1 - significant)
    return np.minimum(bits, 24)


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


@pytest.mark.parametrize("outposts", ["far", "near"])
@pytest.mark.parametrize(("codes", "dim"), [(9, 2), (96, 2), (160, 2), (400, 2), (256, 4), (500, 8)])
def test_structured_start(codes: int, dim: int, outposts: str) -> None:
    points = structured_start(codes, dim, outposts)
    share, growth, spheres = OUTPOSTS[outposts]
    assert points.shape == (codes, dim)
    assert not points[0].any()
    norms = points.norm(dim=1)
    assert bool((norms[1:] > norms[:-1] - 1e-4).all())
    assert len(torch.unique(points, dim=0)) == codes
    # First a lattice of most of the codes, which leaves no shorter integer vector out ...
    lattice = int((points == points.round()).all(1).cumprod(0).sum())
    assert lattice >= share * codes
    inner = points[:lattice].square().sum(1)
    if dim <= 4:
        reach = torch.arange(-int(inner[-1] ** 0.5), int(inner[-1] ** 0.5) + 1)
        every = torch.cartesian_prod(*[reach] * dim).reshape(-1, dim).square().sum(1)
        assert int((inner < inner[-1]).sum()) == int((every < inner[-1]).sum())
    # ... then spheres that grow, spread over all directions.
    outer = points[lattice:]
    if len(outer):
        assert float(outer.norm(dim=1).min() / norms[lattice - 1]) == pytest.approx(growth)
        assert float(norms[-1] / norms[lattice - 1]) == pytest.approx(growth ** min(spheres, len(outer)), rel=0.4)
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


@pytest.mark.parametrize(("planes", "dim", "codes", "scales"), SHAPES)
def test_nearest_is_what_a_search_finds(planes: int, dim: int, codes: int, scales: int) -> None:
    book, v = book_and_rows(planes, dim, codes, scales)
    indices = book.nearest(v)
    assert (indices.dtype, indices.shape) == (torch.int64, (50, planes))
    assert_best(numpy_distances(book, v), indices)


@pytest.mark.parametrize(("planes", "dim", "codes", "scales"), SHAPES)
@pytest.mark.parametrize("bias", [0.0, 0.4, 1.0])
def test_choice_is_what_a_search_finds(planes: int, dim: int, codes: int, scales: int, bias: float) -> None:
    book, v = book_and_rows(planes, dim, codes, scales)
    rates = rate_model(book)
    weight = torch.rand(50, planes) * 4 + 0.1
    indices = book.choose(v, rates, weight, bias)
    cost = weight.double().numpy()[..., None] * numpy_distances(book, v) + bias * numpy_bits(book, rates)
    assert_best(cost, indices)
    if bias:
        assert not torch.equal(indices, book.nearest(v))


def test_choice_near_zero() -> None:
    """Most of what a photo gives: small vectors whose code 0 is likely."""
    book, v = book_and_rows(3, 2, 40, rows=2000)
    v *= 2 ** (5 * torch.rand(2000, 3, 1) - 5)
    rates = rate_model(book, rows=2000)
    rates.zero += 3
    weight = torch.rand(2000, 3) * 4
    cost = weight.double().numpy()[..., None] * numpy_distances(book, v) + 0.5 * numpy_bits(book, rates)
    indices = book.choose(v, rates, weight, 0.5)
    assert_best(cost, indices)
    assert 0.6 < float((indices == 0).float().mean()) < 0.95


def test_result_does_not_depend_on_how_planes_are_chunked(monkeypatch: pytest.MonkeyPatch) -> None:
    book, v = book_and_rows(5, 2, 40)
    rates, weight, share = rate_model(book), torch.ones(50, 5), torch.ones(50)
    whole, chosen = quantise.quantise(book, v, rates, weight, 0.5, share), book.choose(v, rates, weight, 0.5)
    monkeypatch.setattr(rates_module, "CHUNK", 1)
    assert torch.equal(book.choose(v, rates, weight, 0.5), chosen)
    for ours, expected in zip(quantise.quantise(book, v, rates, weight, 0.5, share), whole, strict=True):
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
    book, v = book_and_rows(3, 2, 40)
    rates, weight, share = rate_model(book), torch.ones(50, 3), torch.ones(50)
    with torch.autocast("cpu", torch.bfloat16):
        nearest, chosen = book.nearest(v), book.choose(v, rates, weight, 0.5)
        loss, indices, bits = quantise.quantise(book, v, rates, weight, 0.5, share)
    assert torch.equal(nearest, book.nearest(v))
    assert torch.equal(chosen, book.choose(v, rates, weight, 0.5))
    assert torch.equal(indices, chosen)
    assert loss.dtype == bits.dtype == torch.float32
    np.testing.assert_allclose(
        bits, np.take_along_axis(numpy_bits(book, rates), indices.numpy()[..., None], 2).sum((1, 2)), rtol=1e-5
    )


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


def plain_log_probabilities(book: Codebook, theta: Tensor, zero: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """log2 p of both flags, (N, P, 2), and of the values 1..K-1 given their flag, (N, P, K - 1), in float64."""
    x = (book.vectors.detach() / book.spread[:, None, None]).double()
    drift, square, linear = theta.split([x.shape[-1], book.config.scales, book.config.scales], -1)
    logits = torch.einsum("npd,pkd->npk", drift, x) + bias
    for weights, sizes in ((square, x.square()), (linear, x.abs())):  # one weight for all dimensions, or one for each
        logits = logits + torch.einsum("npd,pkd->npk", weights.expand(*weights.shape[:2], x.shape[-1]), sizes)
    flags = functional.logsigmoid(torch.stack([zero, -zero], -1) * math.log(2))
    return flags / math.log(2), torch.log_softmax(logits[..., 1:] * math.log(2), -1) / math.log(2)


@pytest.mark.parametrize(("planes", "dim", "codes", "scales"), SHAPES)
@pytest.mark.parametrize("steepness", [0.3, 1.0])
def test_gradients_of_the_rate(planes: int, dim: int, codes: int, scales: int, steepness: float) -> None:
    book, v = book_and_rows(planes, dim, codes, scales)
    rates = rate_model(book)
    rates.theta *= steepness
    v[::2] *= 0.1
    v.requires_grad_()
    theta, zero = rates.theta.requires_grad_(), rates.zero.requires_grad_()
    weight, share = torch.rand(50, planes) + 0.1, torch.rand(50)
    loss, indices, bits = quantise.quantise(book, v, rates, weight, 0.5, share)
    (3 * loss).backward()
    assert not bits.requires_grad
    assert torch.equal(indices, book.choose(v.detach(), rates, weight, 0.5))
    assert 0 < int((indices == 0).sum()) < indices.numel(), "the case must have both kinds of symbols"

    plain = [t.detach().double().requires_grad_() for t in (theta, zero, book.bias)]
    flags, values = plain_log_probabilities(book, *plain)
    flag = -flags.gather(-1, (indices > 0).long()[..., None])[..., 0]
    value = torch.where(indices > 0, -values.gather(-1, (indices - 1).clamp(min=0)[..., None])[..., 0], 0)
    spent = (flag + value).detach().clamp(max=24).sum(1)
    torch.testing.assert_close(bits.double(), spent, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(loss.detach().double(), (share * spent).sum(), rtol=1e-5, atol=1e-4)
    # Of a symbol that costs the most bits there are, only the flag learns.
    learns = flag + torch.where(flag + value < 24, value, 0)
    (3 * share[:, None] * learns).sum().backward()
    for ours, reference in zip((theta, zero, book.bias), plain, strict=True):
        assert ours.grad is not None and reference.grad is not None
        torch.testing.assert_close(ours.grad.double(), reference.grad, rtol=1e-4, atol=1e-4)

    # The encoder's gradient: of the expected bits under a soft assignment, to the first codes where code 0 is certain.
    opened = book.open_symbols(v.detach(), zero.detach(), weight, 0.5)
    assert 0 < int(opened.sum()) < opened.numel(), "the case must have both kinds of symbols"
    assert v.grad is not None
    for members, count in ((opened, codes), (~opened, quantise.NEAR)):
        expected = plain_soft_gradient(book, v.detach(), *(t.detach() for t in plain), 3 * share, count)
        torch.testing.assert_close(v.grad[members].double(), expected[members], rtol=1e-3, atol=1e-3)


def plain_soft_gradient(
    book: Codebook, v: Tensor, theta: Tensor, zero: Tensor, bias: Tensor, share: Tensor, count: int
) -> Tensor:
    """d (share * expected bits) / dv in float64, as if the codebook had its first `count` codes only."""
    flags, values = plain_log_probabilities(book, theta, zero, bias)
    values = torch.log_softmax(values[..., : count - 1] * math.log(2), -1) / math.log(2)
    bits = -torch.cat([flags[..., :1], flags[..., 1:] + values], -1).clamp(min=-24)
    free = v.double().requires_grad_()
    distances = (free[:, :, None] - book.vectors.detach()[:, :count].double()).square().sum(-1)
    soft = torch.softmax(-distances / quantise.TEMPERATURE, -1)
    (share[:, None] * (soft * bits).sum(-1)).sum().backward()
    assert free.grad is not None
    return free.grad


@pytest.mark.parametrize(("planes", "dim", "codes", "scales"), SHAPES)
def test_all_symbols_alike(planes: int, dim: int, codes: int, scales: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs on accelerators: as the other, but that every symbol is pulled by all codes."""
    book, v = book_and_rows(planes, dim, codes, scales)
    rates, weight, share = rate_model(book), torch.rand(50, planes) + 0.1, torch.rand(50)
    inputs = [x.requires_grad_() for x in (rates.theta, rates.zero, book.bias)]
    loss, indices, bits = quantise.quantise(book, v, rates, weight, 0.5, share)
    expected = torch.autograd.grad(loss, inputs)
    pull = plain_soft_gradient(book, v.detach(), *(x.detach().double() for x in inputs), share, codes)
    monkeypatch.setattr(quantise, "_quantise_open", quantise._quantise_all)
    for limit in (rates_module.LARGE_CHUNK, 1):
        monkeypatch.setattr(rates_module, "LARGE_CHUNK", limit)
        again, chosen, spent = quantise.quantise(book, v.requires_grad_(), rates, weight, 0.5, share)
        torch.testing.assert_close(again, loss)
        assert torch.equal(chosen, indices)
        torch.testing.assert_close(spent, bits)
        to_v, *found = torch.autograd.grad(again, [v, *inputs])
        torch.testing.assert_close(to_v.double(), pull, rtol=1e-3, atol=1e-3)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            assert torch.equal(quantise.quantise(book, v, rates, weight, 0.5, share)[1], indices)


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
