"""Vectors <-> indices: codebooks, the entropy-constrained choice, and its gradients.

A code plane quantises a vector v of D numbers, in units of the plane's step, to the index of one of K code vectors.
The choice is entropy-constrained (Chou, Lookabaugh & Gray 1989, "Entropy-constrained vector quantization", eq. 7):

    k* = argmin_k  weight * |v - e_k|^2 + bias * bits_k

Index 0 of every plane is the code nearest to zero. The rate model of a symbol (`Rates`) is a significance flag
(is it code 0?) and, if not, an exponential family over the other codes, in log2 units:

    logit_k = drift . x_k - square * |x_k|^2 - linear * |x_k|_1 + bias_k        x_k = e_k / spread

or, with a scale for each dimension, with squares and absolute values weighted one by one.

Everything here is float32 whatever autocast says: bf16 breaks the arg-min.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional

from vqcodec.models.config import LARGEST_LATTICE, SliceConfig

# Temperature, in squared steps, of the soft assignment that carries the rate's gradient to the encoder: at 0.5 a code
# one step away from the nearest has 13 % of its weight.
TEMPERATURE = 0.5
# Of the structured start: the share of the codes that are a lattice, how much larger each sphere of outer codes is than the last, and how
# many there are. Far ones catch what is out of all range, near ones what is often just beyond the lattice.
OUTPOSTS = {"far": (0.6, 1.4, 6), "near": (0.75, 1.25, 4)}
# In one dimension, where the last code lies relative to the last integer.
OUTER_REACH = 3.0
# No value costs more bits: the range coder gives every one a count of at least 1 in 2^24.
MOST_BITS = 24.0
# Entries of a K-wide tensor that are worked on at once: 2^17 floats, several such tensors fit the second-level cache.
CHUNK = 1 << 17
# The same on accelerators: half a gigabyte.
LARGE_CHUNK = 1 << 27
# Codes next to code 0.
NEAR = 13


def structured_start(codes: int, dim: int, outposts: str = "far") -> Tensor:
    """The codebook before training, sorted by norm, the zero vector first: a lattice with outposts.

    For D = 1 integers, 0, 1, -1, 2, -2, ..., the last fifth growing by a constant factor instead. Otherwise most of the codes are the shortest integer vectors and the
    rest lie around them on spheres whose radii grow by a constant factor (`OUTPOSTS`), because latents have heavy tails: a plane
    without far codes saturates on high contrast. For D > 8, where even the first shells of the lattice are larger than
    most codebooks, all codes but zero are random directions of unit norm.

    Args:
        codes: K. dim: D. outposts: as of `SliceConfig`.

    Returns:
        float32 (K, D).
    """
    if dim == 1:
        k = torch.arange(codes)
        magnitude = ((k + 1) // 2).double()
        last = magnitude[max(1, int(0.8 * codes)) - 1].clamp(min=1)
        beyond = (magnitude - last).clamp(min=0)
        magnitude = torch.where(beyond > 0, last * OUTER_REACH ** (beyond / beyond.max().clamp(min=1)), magnitude)
        return (magnitude * torch.where(k % 2 == 1, 1, -1))[:, None].float()
    generator = torch.Generator().manual_seed(codes * 1000 + dim)
    if dim > LARGEST_LATTICE:
        points = functional.normalize(torch.randn(codes, dim, generator=generator), dim=1)
        points[0] = 0
        return points
    shells: list[Tensor] = []
    share, growth, spheres = OUTPOSTS[outposts]
    count, norm = 0, 0
    while count < share * codes:
        shell = torch.tensor(list(_shell(norm, dim)), dtype=torch.float32).reshape(-1, dim)
        shells.append(shell[torch.randperm(len(shell), generator=generator)])
        count += len(shell)
        norm += 1
    inner = torch.cat(shells)[:codes]
    outer = codes - len(inner)
    sphere = max(1, -(-outer // spheres))
    numbers = torch.arange(outer)
    radii = inner.norm(dim=1).max() * growth ** (1 + numbers // sphere)
    if dim == 2:
        angles = 2 * math.pi * (numbers % sphere + 0.5 * (numbers // sphere)) / sphere
        directions = torch.stack([angles.cos(), angles.sin()], 1)
    else:
        directions = functional.normalize(torch.randn(outer, dim, generator=generator), dim=1)
    return torch.cat([inner, radii[:, None] * directions])


def start_of(config: SliceConfig) -> Tensor:
    """The start of every codebook of a slice, float32 (K, D)."""
    return structured_start(config.codes, config.dim, config.outposts)


def companding(start: Tensor) -> float:
    """Of the prior's inputs, in units for every doubling: fine near zero, the farthest code of the start at the bound of int8."""
    return min(24.0, 127 / math.log2(1 + start.abs().max().item()))


def _shell(norm: int, dim: int) -> Iterator[tuple[int, ...]]:
    """All integer vectors of squared length `norm`."""
    if dim == 1:
        root = math.isqrt(norm)
        if root * root == norm:
            yield from ((root,), (-root,)) if root else ((0,),)
        return
    reach = math.isqrt(norm)
    for first in range(-reach, reach + 1):
        for rest in _shell(norm - first * first, dim - 1):
            yield (first, *rest)


@dataclass
class Rates:
    """The rate model of N rows of P planes; see the module's equation.

    Attributes:
        theta: float (N, P, D + 2 S), log2 units: drift (D), -square (S), -linear (S), for S scales.
        zero: float (N, P): log2 odds of code 0 against all others.
    """

    theta: Tensor
    zero: Tensor


class Codebook(nn.Module):
    """P planes of K code vectors of length D (van den Oord et al. 2017; several planes: product quantisation).

    Learns by the codebook loss (`gradient`, eq. 3 of the paper) or by exponential moving averages of its members
    (`ema`, appendix A.1, with Laplace-smoothed counts).
    """

    usage: Tensor
    sums: Tensor
    spread: Tensor
    steps: Tensor

    def __init__(self, config: SliceConfig, learn: str = "gradient", decay: float = 0.99) -> None:
        super().__init__()
        start = start_of(config)
        self.config, self.learn, self.decay = config, learn, decay
        self.vectors = nn.Parameter(start.repeat(config.planes, 1, 1), requires_grad=learn == "gradient")  # (P, K, D)
        self.bias = nn.Parameter(torch.zeros(config.planes, config.codes))  # log2 units, part of the rate model
        self.register_buffer("spread", torch.ones(config.planes))
        self.register_buffer("usage", torch.zeros(config.planes, config.codes))
        self.register_buffer("sums", torch.zeros(config.planes, config.codes, config.dim))
        self.register_buffer("steps", torch.zeros(()))
        # Without a structured start the codes come from data: k-means first, and dead ones are moved now and then.
        self.structured = config.structured
        self.compand = companding(start)

    def restart(self) -> None:
        """Code vectors as before training; the rate model stays."""
        self.vectors.data.copy_(start_of(self.config))

    def lookup(self, indices: Tensor) -> Tensor:
        """Code vectors: int64 (N, P) -> float32 (N, P, D)."""
        return look_up(self.vectors, indices)

    def nearest(self, v: Tensor) -> Tensor:
        """Index of the nearest code: float (N, P, D) -> int64 (N, P)."""
        with torch.autocast(v.device.type, enabled=False):
            return _distances(v.float(), self.vectors.detach()).argmax(-1).T

    def features(self) -> Tensor:
        """x_k, and its squares and absolute values, or their sums: float32 (P, K, D + 2 S)."""
        x = self.vectors.detach() / self.spread[:, None, None]
        sizes = [x.square(), x.abs()]
        if self.config.scales == 1:
            sizes = [size.sum(-1, keepdim=True) for size in sizes]
        return torch.cat([x, *sizes], -1)

    def inputs(self) -> Tensor:
        """What the prior sees of each code: integers in [-127, 127], float32 (P, K, 2 D): value and magnitude."""
        e = self.vectors.detach()
        magnitude = (self.compand * torch.log2(1 + e.abs())).round().clamp(max=127)
        return torch.cat([magnitude * e.sign(), magnitude], -1)

    @torch.no_grad()
    def choose(self, v: Tensor, rates: Rates, weight: Tensor, bias: float | Tensor) -> Tensor:
        """The entropy-constrained choice.

        Args:
            v: float (N, P, D), in steps.
            rates: the rate model of every symbol.
            weight: float (N, P), bits per unit of squared error in steps.
            bias: how much of the rate counts: 1 is the Lagrangian optimum for one symbol on its own; less leaves room
                for what this symbol does to the context of later ones.

        Returns:
            int64 (N, P).
        """
        with torch.autocast(v.device.type, enabled=False):
            return self._choose(v.float(), rates, weight, bias)

    def open_symbols(self, v: Tensor, zero: Tensor, weight: Tensor, bias: float | Tensor) -> Tensor:
        """Where another code than 0 could be chosen; bool (N, P), arguments as of `choose`.

        Code 0 is certain where its cost is below that of a free code at the least distance any other can have.
        """
        vectors = self.vectors.detach()
        length = v.norm(dim=-1)
        nearest = vectors[:, 1:].norm(dim=-1).amin(1)
        cost = weight * (v - vectors[:, 0]).square().sum(-1) + bias * (softplus2(zero) - zero)
        return cost >= weight * (nearest - length).clamp(min=0).square()

    def _choose(self, v: Tensor, rates: Rates, weight: Tensor, bias: float | Tensor) -> Tensor:
        open_rows = self.open_symbols(v, rates.zero, weight, bias)
        features, vectors = self.features(), self.vectors.detach()
        lengths = vectors.square().sum(-1)
        # One row for each open symbol, plane after plane.
        mask = open_rows.T
        target, theta, zero = (x.transpose(0, 1)[mask] for x in (v, rates.theta, rates.zero))
        importance = weight.T[mask][:, None]
        chosen = torch.empty(len(target), dtype=torch.int64, device=v.device)
        for rows, parts, logp, _ in rate_blocks(features, self.bias.detach(), theta, zero, mask.sum(1).tolist()):
            distances = torch.empty_like(logp)
            for plane, part, here in parts:
                torch.addmm(-lengths[plane], target[part], vectors[plane].T, alpha=2, out=distances[here])
            scores = logp.clamp_(min=-MOST_BITS).mul_(bias).add_(distances.mul_(importance[rows]))
            chosen[rows] = scores.max(-1)[1]
        indices = torch.zeros(v.shape[:2], dtype=torch.int64, device=v.device)
        indices.T[mask] = chosen
        return indices

    def quantise(
        self, v: Tensor, rates: Rates, weight: Tensor, bias: float | Tensor, share: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Choice and rate in training.

        Args:
            v, rates, weight, bias: as for `choose`.
            share: float (N,), what one bit of each row adds to the loss.

        Returns:
            (loss, indices, bits): the scalar sum of share * bits, whose gradient reaches v through soft assignments,
            the rate model through the chosen codes; int64 (N, P); and float32 (N,), without gradient.
        """
        with torch.autocast(v.device.type, enabled=False):
            loss, indices, bits = _Quantise.apply(  # type: ignore[no-untyped-call]
                v.float(), rates.theta.float(), rates.zero.float(), self.bias, self, weight, bias, share
            )
        return loss, indices, bits

    @torch.no_grad()
    def update_averages(self, v: Tensor, indices: Tensor) -> None:
        """Count the members of each code and, with `ema`, move it to their bias-corrected moving average."""
        planes, codes, dim = self.vectors.shape
        flat = (indices + torch.arange(planes, device=v.device) * codes).reshape(-1)
        counts = torch.zeros(planes * codes, device=v.device)
        counts = counts.index_add_(0, flat, torch.ones_like(flat, dtype=torch.float32)).reshape(planes, codes)
        if self.learn == "ema":  # otherwise the counts are only for show
            _sum_over_processes(counts)
        self.steps += 1
        self.usage.lerp_(counts, 1 - self.decay)
        if self.learn == "ema":
            totals = torch.zeros(planes * codes, dim, device=v.device).index_add_(0, flat, v.float().reshape(-1, dim))
            _sum_over_processes(totals)
            self.sums.lerp_(totals.reshape(planes, codes, dim), 1 - self.decay)
            correction = 1 - self.decay**self.steps
            usage, sums = self.usage / correction, self.sums / correction
            total = usage.sum(1, keepdim=True)
            # Laplace smoothing: a code without members would divide by zero; epsilon keeps the total unchanged.
            smooth = (usage + 1e-5) / (total + codes * 1e-5) * total
            alive = (usage > 1e-3)[..., None]
            self.vectors.copy_(torch.where(alive, sums / smooth[..., None], self.vectors))

    @torch.no_grad()
    def revive(self, v: Tensor, threshold: float = 0.01) -> int:
        """Put codes with fewer than `threshold` members per batch onto random vectors of the batch.

        Returns:
            How many codes were moved. Code 0 never is.
        """
        moved = 0
        for plane in range(len(self.vectors)):
            dead = (self.usage[plane] / (1 - self.decay ** self.steps.clamp(min=1)) < threshold).nonzero()[:, 0]
            dead = dead[dead > 0]
            if len(dead):
                picks = v[torch.randint(len(v), (len(dead),), device=v.device), plane].float()
                self.vectors[plane, dead] = picks
                self.usage[plane, dead] = 1.0
                self.sums[plane, dead] = picks
                moved += len(dead)
        return moved

    @torch.no_grad()
    def start_from(self, v: Tensor, rounds: int = 10) -> None:
        """k-means start (Lloyd): codes from the rows v, float (N, P, D), N >= K; code 0 stays nearest to zero."""
        _, codes, _ = self.vectors.shape
        pick = torch.randperm(len(v), device=v.device)[:codes]
        self.vectors[:, : len(pick)] = v[pick].float().transpose(0, 1)
        for _ in range(rounds):
            indices = self.nearest(v)
            for plane in range(len(self.vectors)):
                totals = torch.zeros_like(self.vectors[plane]).index_add_(0, indices[:, plane], v[:, plane].float())
                counts = torch.bincount(indices[:, plane], minlength=codes)[:, None]
                self.vectors[plane] = torch.where(counts > 0, totals / counts.clamp(min=1), self.vectors[plane])
        order = self.vectors.square().sum(-1).argsort(1)
        self.vectors.copy_(self.vectors.gather(1, order[..., None].expand_as(self.vectors)))


def plane_blocks(members: list[int], limit: int) -> Iterator[tuple[slice, list[tuple[int, slice, slice]]]]:
    """Cut rows that lie plane after plane into blocks of at least one plane and, if possible, at most `limit` rows.

    Args:
        members: rows of each plane. limit: see above.

    Yields:
        the rows of a block, and of each of its planes (plane, its rows, its rows within the block); planes without rows are left out.
    """
    parts: list[tuple[int, slice, slice]] = []
    first = start = 0
    for plane, count in enumerate(members):
        if not count:
            continue
        stop = start + count
        if parts and stop - first > limit:
            yield slice(first, start), parts
            parts, first = [], start
        parts.append((plane, slice(start, stop), slice(start - first, stop - first)))
        start = stop
    if parts:
        yield slice(first, start), parts


def log_probabilities(features: Tensor, bias: Tensor, theta: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
    """What a rate model says of the codes of p planes.

    Args:
        features: (p, K, F), and bias: (p, K), of the codebook. theta: (N, p, F), and zero: (N, p), as of `Rates`.

    Returns:
        log2 p of all codes (p, N, K), and the distribution over the codes but 0, with next to nothing in its place (p, N, K).
    """
    logits = torch.baddbmm(bias[:, None], theta.transpose(0, 1), features.transpose(1, 2))
    return _normalise(logits, zero.T[..., None])


def rate_blocks(
    features: Tensor, bias: Tensor, theta: Tensor, zero: Tensor, members: list[int]
) -> Iterator[tuple[slice, list[tuple[int, slice, slice]], Tensor, Tensor]]:
    """`log_probabilities` for symbols that lie plane after plane, in blocks that fit the cache.

    Args:
        features, bias: as there. theta: (M, F), zero: (M,). members: how many symbols of each plane there are.

    Yields:
        a block and its planes, as `plane_blocks`, and both of what `log_probabilities` returns, (rows of the block, K).
    """
    codes = features.shape[1]
    for block, parts in plane_blocks(members, CHUNK // codes):
        logits = torch.empty(block.stop - block.start, codes, device=theta.device)
        for plane, part, here in parts:
            torch.addmm(bias[plane], theta[part], features[plane].T, out=logits[here])
        yield block, parts, *_normalise(logits, zero[block, None])


def _normalise(logits: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
    """What `log_probabilities` returns, from logits (..., K), which are overwritten, and log2 odds of code 0 (..., 1)."""
    logits[..., 0] = -math.inf
    logits -= logits.amax(-1, keepdim=True)
    logits.clamp_(min=-2 * MOST_BITS)  # powers below would be subnormal numbers, which are slow
    values = torch.exp2(logits)
    total = values.sum(-1, keepdim=True)
    softplus = softplus2(zero)
    logits -= torch.log2(total) + softplus
    logits[..., :1] = zero - softplus
    return logits, values.div_(total)


def _sum_over_processes(x: Tensor) -> None:
    """Add up x in place over the processes of a distributed run, so that all of them learn the same codebook."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(x)


def _distances(v: Tensor, vectors: Tensor) -> Tensor:
    """-|v - e|^2 up to a constant of the row: (N, p, D) and (p, K, D) -> (p, N, K)."""
    return torch.baddbmm(-vectors.square().sum(-1)[:, None], 2 * v.transpose(0, 1), vectors.transpose(1, 2))


def softplus2(x: Tensor) -> Tensor:
    """log2(1 + 2^x)."""
    return functional.softplus(x * math.log(2)) / math.log(2)


def _pull(logp: Tensor, distances: Tensor, vectors: Tensor) -> Tensor:
    """Gradient of the expected bits of a soft assignment to some codes, float (N, p, D).

    The assignment w = softmax(-|v - e|^2 / T) gives d E_w[bits] / dv = -2/T Cov_w(log2 p, e).

    Args:
        logp: (p, N, K), and distances: of `_distances`; both are overwritten. vectors: (p, K, D).
    """
    w = torch.softmax(distances.mul_(1 / TEMPERATURE), -1)
    logp -= torch.linalg.vecdot(w, logp)[..., None]
    return torch.bmm(w.mul_(logp), vectors).transpose(0, 1) * (-2 / TEMPERATURE)


@dataclass
class _Task:
    """What `Codebook.quantise` is asked for, and what of it has a gradient: `pulled`, the vectors; `learns`, the rate model."""

    v: Tensor
    rates: Rates
    weight: Tensor
    bias: float | Tensor
    share: Tensor
    pulled: bool
    learns: bool


# Indices and bits (N, P), and what share * bits have for gradients: of v (None unless pulled), theta and the codebook's bias.
_Answer = tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]


class _Quantise(torch.autograd.Function):
    """`Codebook.quantise`: K-wide tensors live only inside forward, which also computes every gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        v: Tensor,
        theta: Tensor,
        zero: Tensor,
        bias: Tensor,
        book: Codebook,
        weight: Tensor,
        rate_bias: float | Tensor,
        share: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        pulled, *learns = ctx.needs_input_grad[:4]
        task = _Task(v, Rates(theta, zero), weight, rate_bias, share, pulled, any(learns))
        answer = _quantise_all(book, task) if v.is_cuda else _quantise_open(book, task)
        indices, spent, grad_v, grad_theta, grad_bias = answer
        bits = spent.sum(1)
        grad_zero = (torch.sigmoid(zero * math.log(2)) - (indices == 0).float()) * share[:, None]
        ctx.save_for_backward(grad_v, grad_theta, grad_zero, grad_bias)
        ctx.mark_non_differentiable(indices, bits)
        return (bits * share).sum(), indices, bits

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        g = grads[0]
        grad_v, grad_theta, grad_zero, grad_bias = ctx.saved_tensors
        return (
            None if grad_v is None else g * grad_v,
            g * grad_theta,
            g * grad_zero,
            g * grad_bias,
            None,
            None,
            None,
            None,
        )


def _quantise_open(book: Codebook, task: _Task) -> _Answer:
    """Only for symbols for which another code than 0 could win, in blocks that fit the cache."""
    v, theta, zero, bias = task.v, task.rates.theta, task.rates.zero, book.bias.detach()
    features, vectors = book.features(), book.vectors.detach()
    lengths = vectors.square().sum(-1)
    bits = (softplus2(zero) - zero).clamp_(max=MOST_BITS)
    indices = torch.zeros(zero.shape, dtype=torch.int64, device=v.device)
    grad_theta, grad_bias = torch.zeros_like(theta), torch.zeros_like(bias)
    grad_v: Tensor | None = None
    if task.pulled:
        # Symbols that have code 0 for certain are pulled to it as far as the codes next to it say.
        near = vectors[:, :NEAR]
        logp, _ = log_probabilities(features[:, :NEAR], bias[:, :NEAR], theta, zero)
        grad_v = _pull(logp.clamp_(min=-MOST_BITS), _distances(v, near), near) * task.share[:, None, None]
    # One row for each open symbol, plane after plane; the others have code 0.
    mask = book.open_symbols(v, zero, task.weight, task.bias).T
    target, drift, odds = (x.transpose(0, 1)[mask] for x in (v, theta, zero))
    importance = task.weight.T[mask][:, None]
    portion = task.share.expand(mask.shape)[mask]
    count = len(target)
    chosen, spent = torch.empty(count, dtype=torch.int64, device=v.device), torch.empty(count, device=v.device)
    soft, expected = torch.empty_like(target), torch.empty_like(drift)
    for rows, parts, logp, values in rate_blocks(features, bias, drift, odds, mask.sum(1).tolist()):
        distances = torch.empty_like(logp)
        for plane, part, here in parts:
            torch.addmm(-lengths[plane], target[part], vectors[plane].T, alpha=2, out=distances[here])
        logp.clamp_(min=-MOST_BITS)
        k = torch.add(logp * task.bias, distances * importance[rows]).max(-1)[1]
        chosen[rows] = k
        spent[rows] = -logp.gather(-1, k[:, None])[:, 0]
        if task.pulled:  # as `_pull`
            w = torch.softmax(distances.mul_(1 / TEMPERATURE), -1)
            logp -= torch.linalg.vecdot(w, logp)[:, None]
            w *= logp
            for plane, part, here in parts:
                torch.mm(w[here], vectors[plane], out=soft[part])
        if not task.learns:
            continue
        # The rate model learns from the chosen code: d bits / d theta = E_p[f] - f_k, for k other than 0
        # whose bits are not at their limit.
        other = ((k > 0) & (spent[rows] < MOST_BITS)).float() * portion[rows]
        values *= other[:, None]
        for plane, part, here in parts:
            torch.mm(values[here], features[plane], out=expected[part])
            expected[part].addcmul_(features[plane][k[here]], other[here][:, None], value=-1)
            grad_bias[plane] += values[here].sum(0).scatter_add_(0, k[here], -other[here])
    if grad_v is not None:
        grad_v.transpose(0, 1)[mask] = soft.mul_((-2 / TEMPERATURE) * portion[:, None])
    if task.learns:
        grad_theta.transpose(0, 1)[mask] = expected
    indices.T[mask] = chosen
    bits.T[mask] = spent
    return indices, bits, grad_v, grad_theta, grad_bias


def _quantise_all(book: Codebook, task: _Task) -> _Answer:
    """For all symbols and codes alike: for devices where looking which symbols are open would take longer."""
    v, theta, zero, bias = task.v, task.rates.theta, task.rates.zero, book.bias.detach()
    features, vectors = book.features(), book.vectors.detach()
    indices, spent = torch.empty_like(zero, dtype=torch.int64), torch.empty_like(zero)
    grad_v = torch.empty_like(v) if task.pulled else None
    grad_theta, grad_bias = torch.zeros_like(theta), torch.zeros_like(bias)
    count, planes = zero.shape
    some = max(1, LARGE_CHUNK // (count * vectors.shape[1]))
    for start in range(0, planes, some):
        part = slice(start, start + some)
        logp, values = log_probabilities(features[part], bias[part], theta[:, part], zero[:, part])
        logp.clamp_(min=-MOST_BITS)
        distances = _distances(v[:, part], vectors[part])
        k = torch.addcmul(logp * task.bias, distances, task.weight.T[part, :, None]).argmax(-1)  # (p, N)
        bits = -logp.gather(-1, k[..., None])[..., 0]
        indices[:, part], spent[:, part] = k.T, bits.T
        if grad_v is not None:
            grad_v[:, part] = _pull(logp, distances, vectors[part]) * task.share[:, None, None]
        if task.learns:
            other = ((k > 0) & (bits < MOST_BITS)).float() * task.share
            values *= other[..., None]
            values.scatter_add_(-1, k[..., None], -other[..., None])  # now d bits / d logits
            grad_theta[:, part] = torch.bmm(values, features[part]).transpose(0, 1)
            grad_bias[part] = values.sum(1)
    return indices, spent, grad_v, grad_theta, grad_bias


def rows(x: Tensor, planes: int) -> Tensor:
    """(B, P D, h, w) -> (B h w, P, D): one row a grid position, in raster order."""
    return x.permute(0, 2, 3, 1).reshape(-1, planes, x.shape[1] // planes)


def grid(x: Tensor, batch: int, height: int, width: int) -> Tensor:
    """The inverse of `rows`: (B h w, P, D) -> (B, P D, h, w)."""
    return x.reshape(batch, height, width, -1).permute(0, 3, 1, 2)


def look_up(table: Tensor, indices: Tensor) -> Tensor:
    """Rows of a table per plane: (P, K, F) and int64 (N, P) -> (N, P, F)."""
    planes, codes, features = table.shape
    flat = indices + torch.arange(planes, device=indices.device) * codes
    return functional.embedding(flat, table.reshape(-1, features))
