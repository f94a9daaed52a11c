"""The integer prior: causal, exact whatever the machine does, and the same in training as in the file."""

import copy
import functools
import itertools
from collections.abc import Callable, Iterator

import models
import pytest
import torch
from models import TINY
from torch import Tensor
from torch.nn import functional

from vqcodec.errors import WeightsError
from vqcodec.models import integers as module
from vqcodec.models.config import MAX_INPUTS, Config
from vqcodec.models.integers import IntegerConv, QualityBias
from vqcodec.models.operations import macs_per_pixel
from vqcodec.models.prior import PHASES, Prior
from vqcodec.models.recipes import NAMED
from vqcodec.train.loss import RateDistortion

HEIGHT, WIDTH = 96, 160  # of the picture: 3 x 5 top positions, 12 x 20 bottom ones


@functools.cache
def trained() -> RateDistortion:
    """Not frozen; not to be changed."""
    return models.tiny()


@functools.cache
def frozen() -> Prior:
    prior = copy.deepcopy(trained().prior)
    prior.freeze()
    return prior.requires_grad_(False)


def codes(seed: int = 0) -> list[Tensor]:
    return models.random_codes(trained().vqvae, HEIGHT, WIDTH, seed)


def parameters_of(prior: Prior, codes: list[Tensor], quality: int = 50) -> list[Tensor]:
    return models.run_prior(prior, models.code_inputs(trained().vqvae, codes), quality)


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected) == 3
    for ours, other in zip(found, expected, strict=True):
        assert torch.equal(ours, other)


# Passes


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (4, 1), (2, 2), (3, 5), (8, 8)])
def test_passes_cover_every_position_once(size: tuple[int, int]) -> None:
    seen = torch.zeros(size)
    for number, places in frozen().level(0).slice(0).passes(*size):
        assert places == tuple(slice(start, None, 2) for start in PHASES[number])
        assert seen[places].numel()
        seen[places] += 1
    assert torch.equal(seen, torch.ones(size))


# Causality


SLICES = [(0, 0), (1, 0), (1, 1)]  # level and slice of TINY, in coding order


@pytest.mark.parametrize("place", [(0, 0), (1, 2), (2, 3)], ids=str)
@pytest.mark.parametrize("phase", range(4))
@pytest.mark.parametrize("order", range(3))
def test_a_code_changes_only_what_is_coded_after_it(order: int, phase: int, place: tuple[int, int]) -> None:
    level, index = SLICES[order]
    before = codes()
    after = [c.clone() for c in before]
    first = sum(piece.planes for piece in TINY.levels[level].slices[:index])
    planes = TINY.levels[level].slices[index].planes
    y = min(2 * place[0] + PHASES[phase][0], before[level].shape[1] - 1)
    x = min(2 * place[1] + PHASES[phase][1], before[level].shape[2] - 1)
    own = PHASES.index((y % 2, x % 2))
    after[level][0, y, x, first : first + planes] = (before[level][0, y, x, first : first + planes] + 11) % 32
    found, expected = parameters_of(frozen(), after), parameters_of(frozen(), before)

    for other in range(order):
        assert torch.equal(found[other], expected[other]), "an earlier slice depends on a later one"
    changed_phases = [
        other
        for other, (row, column) in enumerate(PHASES)
        if not torch.equal(found[order][:, row::2, column::2], expected[order][:, row::2, column::2])
    ]
    assert all(other > own for other in changed_phases), "a pass depends on itself or a later one"
    # A context that nobody uses would be as causal: what comes after must depend on the code.
    if own < 3:
        assert changed_phases, "later passes do not see the code"
    for other in range(order + 1, 3):
        assert not torch.equal(found[other], expected[other]), "later slices do not see the code"


def test_the_next_pass_sees_its_four_neighbours_and_no_more() -> None:
    """Phase 1 at (y, x) has the codes of phase 0 at (y - 1, x - 1) to (y + 1, x + 1) around it."""
    level, row, column = 1, 4, 6  # a position of phase 0
    before, after = codes(), codes()
    after[level][0, row, column, :8] = (before[level][0, row, column, :8] + 9) % 64
    found, expected = parameters_of(frozen(), after)[1], parameters_of(frozen(), before)[1]
    changed = (found != expected).any(-1).any(-1)[0]
    places = {(int(y), int(x)) for y, x in changed.nonzero() if y % 2 and x % 2}
    assert places and places <= set(itertools.product((row - 1, row + 1), (column - 1, column + 1)))


def test_quality_is_part_of_the_condition() -> None:
    low, high = parameters_of(frozen(), codes(), quality=10), parameters_of(frozen(), codes(), quality=11)
    assert not torch.equal(low[0], high[0])
    assert not torch.equal(low[2], high[2])


# Exactness


def test_training_computes_what_the_file_says() -> None:
    """Fake quantisation in float32, gradients on, gives the very integers of the frozen prior, at every quality."""
    for quality in (1, 2, 37, 50, 99, 100):
        assert_same(parameters_of(trained().prior, codes(), quality), parameters_of(frozen(), codes(), quality))


def test_freezing_twice_changes_nothing() -> None:
    again = copy.deepcopy(frozen())
    again.freeze()
    assert_same(parameters_of(again, codes()), parameters_of(frozen(), codes()))


def test_thawing_is_the_inverse_of_freezing() -> None:
    """Training on from a file starts where the file stands; the curves of the quality come back up to rounding."""
    again = copy.deepcopy(frozen())
    again.thaw()
    tables = {name for name, part in again.named_modules() if isinstance(part, QualityBias)}
    again.freeze()
    for (name, found), expected in zip(again.state_dict().items(), frozen().state_dict().values(), strict=True):
        if name.rpartition(".")[0] not in tables:
            assert torch.equal(found, expected), name
        elif name.endswith("table"):
            assert float((found - expected).abs().max()) <= 1
            assert float((found != expected).float().mean()) < 0.05


def test_parameters_are_integers_in_range_and_not_all_at_the_bound() -> None:
    for found in parameters_of(frozen(), codes()):
        assert torch.equal(found, found.round())
        assert float(found.abs().max()) <= 127
        assert float(found.flatten(0, 3).std(0).min()) > 5


def test_parameters_stop_at_the_bound() -> None:
    prior = copy.deepcopy(frozen())
    for sign, (level, index) in zip((1, -1, 1), SLICES, strict=True):
        bias = prior.level(level).slice(index).head.bias
        assert bias is not None
        bias += 1000 * sign
    for sign, found in zip((1, -1, 1), parameters_of(prior, codes()), strict=True):
        assert torch.equal(found, torch.full_like(found, 127 * sign))


def test_every_sum_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """All inputs and weights of all convolutions are integers in -127..127, and the largest partial sum that any order
    of summation can meet, the sum of absolute values, is below 2^24."""
    seen = set()
    plain = IntegerConv.run

    def run(self: IntegerConv, x: Tensor, stride: int = 1, padding: int | None = None) -> Tensor:
        seen.add(self)
        for values in (x, self.weight):
            assert torch.equal(values, values.round())
            assert float(values.abs().max()) <= 127
        pad = self.kernel_size[0] // 2 if padding is None else padding
        largest = functional.conv2d(x.double().abs(), self.weight.double().abs(), None, stride, pad)
        assert float(largest.max()) < 2**24
        out = plain(self, x, stride, padding)
        assert torch.equal(out, out.round()) and float(out.abs().max()) < 2**24
        return out

    monkeypatch.setattr(IntegerConv, "run", run)
    parameters_of(frozen(), codes())
    assert seen == {part for part in frozen().modules() if isinstance(part, IntegerConv)}


@pytest.mark.parametrize("config", NAMED.values(), ids=NAMED)
def test_no_convolution_has_too_many_inputs(config: Config) -> None:
    for part in Prior(config).modules():
        if isinstance(part, IntegerConv):
            assert part.weight[0].numel() * 127 * 127 < 2**24
    with pytest.raises(ValueError, match="not exact in float32"):
        IntegerConv(MAX_INPUTS + 1, 1)


@pytest.fixture
def two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def contiguous(x: Tensor) -> Tensor:
    return x.contiguous()


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_layout_threads_and_batch_do_not_matter(layout: Callable[[Tensor], Tensor], two_threads: None) -> None:
    each = [models.code_inputs(trained().vqvae, codes(seed)) for seed in range(8)]
    torch.set_num_threads(1)
    alone = [models.run_prior(frozen(), inputs) for inputs in each]
    torch.set_num_threads(2)
    together = [
        [layout(torch.cat([inputs[level][index] for inputs in each])) for index in range(len(each[0][level]))]
        for level in range(2)
    ]
    prior = copy.deepcopy(frozen())
    for part in prior.modules():
        if isinstance(part, IntegerConv):
            part.weight.data = layout(part.weight.data)
    batch = models.run_prior(prior, together)
    for number, expected in enumerate(alone):
        assert_same([found[number, None] for found in batch], expected)
    assert_same(models.run_prior(prior, each[0]), alone[0])


def test_float64_gives_the_same_integers() -> None:
    inputs = [[x.double() for x in level] for level in models.code_inputs(trained().vqvae, codes())]
    found = models.run_prior(copy.deepcopy(frozen()).double(), inputs)
    assert all(x.dtype == torch.float64 for x in found)
    assert_same([x.float() for x in found], parameters_of(frozen(), codes()))


@pytest.fixture(params=["highest", "medium"])
def products(request: pytest.FixtureRequest) -> Iterator[None]:
    """The caller's precision of products of float32; "medium" allows bfloat16."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("extreme", [True, False])
@pytest.mark.parametrize("layout", [contiguous, channels_last])
@pytest.mark.parametrize("stride", [1, 2])
def test_convolution_with_as_many_inputs_as_allowed(
    extreme: bool, layout: Callable[[Tensor], Tensor], stride: int, two_threads: None, products: None
) -> None:
    """1035 inputs, all at their bounds: 16.7 million, a hair below 2^24 = 16.8 million, whatever the kernel."""
    torch.manual_seed(0)
    conv = IntegerConv(115, 24, 3, bits=4)
    conv.freeze()
    x = torch.randint(-127, 128, (3, 115, 17, 13)).float()
    conv.weight.data = torch.randint(-127, 128, conv.weight.shape).float()
    if extreme:
        x, conv.weight.data = 127 * x.sign(), torch.full(conv.weight.shape, 127.0)
        x[0] = 127
    conv.exponent = torch.randint(4, 15, (24,), dtype=torch.int32)
    assert conv.bias is not None
    conv.bias.data = torch.randint(-500, 501, (24,)).float()
    conv.weight.data = layout(conv.weight.data)
    found = conv.run(layout(x), stride, padding=1)
    padded = functional.pad(x.long(), (1, 1, 1, 1)).unfold(2, 3, stride).unfold(3, 3, stride)
    total = torch.einsum("bihwyx,oiyx->bohw", padded, conv.weight.long())
    assert not extreme or int(total.max()) == 1035 * 127 * 127
    expected = (total << 4 >> conv.exponent.long()[:, None, None]) + conv.bias.long()[:, None, None]
    assert torch.equal(found.long(), expected)


def test_unfolded_convolution_is_the_same(products: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What CUDA would do, on the CPU: the branch itself needs a device, its arithmetic does not."""
    torch.manual_seed(0)
    x, weight = torch.randint(-127, 128, (2, 8, 7, 9)).float(), torch.randint(-127, 128, (6, 8, 3, 3)).float()
    for stride, padding in [(1, 1), (2, 0), (2, 1)]:
        expected = functional.conv2d(x, weight, None, stride, padding)
        with monkeypatch.context() as patch:
            patch.setattr(Tensor, "is_cpu", False)
            patch.setattr(Tensor, "is_cuda", True)
            found = module._convolve_exactly(x, weight, stride, padding)
        assert torch.equal(found, expected)


def test_devices_that_are_not_known_to_be_exact_are_refused() -> None:
    conv = IntegerConv(4, 4, 3).to("meta")
    conv.frozen = True
    with pytest.raises(WeightsError, match="exact on CPUs and CUDA devices only, not on 'meta'"):
        conv.run(torch.zeros(1, 4, 5, 5, device="meta"))


# Quantisation while training


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
@pytest.mark.parametrize("batch", [1, 15, 16, 40])
def test_batches_stay_exact_without_onednn(batch: int) -> None:
    """Torch then gives batches of 16 and more to NNPACK, whose Winograd transform rounds."""
    conv = IntegerConv(40, 24, 3)
    conv.freeze()
    generator = torch.Generator().manual_seed(batch)
    conv.weight.data = torch.randint(-127, 128, conv.weight.shape, generator=generator).float()
    x = torch.randint(-127, 128, (batch, 40, 8, 16), generator=generator).float()
    with torch.inference_mode():
        expected = functional.conv2d(x.double(), conv._scaled_weight().double(), padding=1).floor()
        with torch.backends.mkldnn.flags(enabled=False):
            found = conv.run(x) - conv.bias[:, None, None]  # type: ignore[index]
    assert torch.equal(found.double(), expected)


def test_weights_use_their_bits() -> None:
    torch.manual_seed(0)
    conv = IntegerConv(16, 32, 3)
    with torch.no_grad():
        conv.weight *= torch.logspace(-1, 1, 32)[:, None, None, None]
    integers, exponent = conv._integers()
    assert torch.equal(integers, integers.round())
    largest = integers.abs().flatten(1).amax(1)
    assert float(largest.max()) <= 127 and float(largest.min()) >= 63
    error = (integers * torch.exp2(-exponent)[:, None, None, None] - conv.weight).abs()
    assert bool((error <= torch.exp2(-exponent - 1)[:, None, None, None] * 1.001).all())


def test_weights_stop_at_the_bound() -> None:
    conv = IntegerConv(1, 1)
    with torch.no_grad():
        conv.weight.fill_(-300)
    conv.freeze()
    assert conv.weight.flatten().tolist() == [-127]
    assert conv.exponent.tolist() == [0]


def test_gradients_pass_straight_through_the_roundings() -> None:
    torch.manual_seed(0)
    conv = IntegerConv(4, 6, 3, bits=4)
    x = torch.randint(-127, 128, (2, 4, 5, 5)).float().requires_grad_()
    aim = torch.randn(2, 6, 5, 5)
    (conv.run(x) * aim).sum().backward()
    integers, exponent = conv._integers()
    weight = (integers * torch.exp2(-exponent)[:, None, None, None]).requires_grad_()
    bias = torch.zeros(6, requires_grad=True)
    free = x.detach().clone().requires_grad_()
    ((16 * functional.conv2d(free, weight, None, padding=1) + 512 * bias[:, None, None]) * aim).sum().backward()
    assert conv.bias is not None
    for found, expected in [(x.grad, free.grad), (conv.weight.grad, weight.grad), (conv.bias.grad, bias.grad)]:
        assert found is not None and expected is not None
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


def test_biases_learn_as_fast_as_weights() -> None:
    """A few steps of an optimiser move them by several integers; freezing and thawing does not lose them."""
    conv = IntegerConv(4, 6)
    before = conv.run(torch.zeros(1, 4, 1, 1)).flatten().tolist()
    assert conv.bias is not None
    optimiser = torch.optim.Adam(conv.parameters(), lr=3e-3)
    for _ in range(100):
        optimiser.zero_grad()
        (conv.run(torch.zeros(1, 4, 1, 1)) - 20).square().sum().backward()
        optimiser.step()
    learned = conv.run(torch.zeros(1, 4, 1, 1)).flatten().tolist()
    assert before == [0] * 6 and min(learned) > 5
    conv.freeze()
    assert conv.bias.tolist() == learned
    conv.thaw()
    assert conv.run(torch.zeros(1, 4, 1, 1)).flatten().tolist() == learned


def test_quality_table_is_the_curve() -> None:
    torch.manual_seed(0)
    bias = QualityBias(8)
    with torch.no_grad():
        bias.curve += torch.randn(4, 8)
    every = torch.arange(1, 101)
    assert bias.at(every).requires_grad
    before = bias.at(every).detach()
    assert torch.equal(before, before.round())
    assert float(before.std(0).min()) > 1
    table = copy.deepcopy(bias)
    table.freeze()
    # The same polynomial in another batch shape may fall on the other side of a half.
    assert float((table.at(every) - before).abs().max()) <= 1
    assert float((table.at(every) != before).float().mean()) < 0.01
    assert torch.equal(table.at(torch.tensor([100, 1])), table.at(every)[[99, 0]])


# Cost


def test_operations_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """`macs_per_pixel` is what the convolutions do on a picture of whole units."""
    done = 0
    plain = module._convolve_exactly

    def convolve(x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
        nonlocal done
        out = plain(x, weight, stride, padding)
        done += weight.numel() * out.shape[2] * out.shape[3]
        return out

    monkeypatch.setattr(module, "_convolve_exactly", convolve)
    inputs = models.code_inputs(trained().vqvae, models.random_codes(trained().vqvae, 256, 256))
    models.run_prior(frozen(), inputs)
    counted = macs_per_pixel(TINY, models.shapes(trained().vqvae, frozen()))["prior"]
    assert counted <= done / 256**2 <= 1.1 * counted  # the passes pad by a position
