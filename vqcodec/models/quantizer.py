"""Vectors <-> indices: codebooks and the entropy-constrained choice.

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

import torch
from torch import Tensor, nn
from torch.nn import functional

from vqcodec.models.config import LARGEST_LATTICE, SliceConfig

# Of the structured start: the share of the codes that are a lattice, how much larger each sphere of outer codes is than
# the last, and how many there are. Far ones catch what is out of all range, near ones what is often just beyond the
# lattice.
OUTPOSTS = {"far": (0.6, 1.4, 6), "near": (0.75, 1.25, 4)}
# In one dimension, where the last code lies relative to the last integer.
OUTER_REACH = 3.0
# Of the rows of a table before training: scales of the first and the last, in steps, and log2 of `square`, next to nothing.
ROW_SCALES, SQUARE_START = (0.04, 100.0), -12.0
# No value costs more bits: the range coder gives every one a count of at least 1 in 2^24.
MOST_BITS = 24.0
# Entries of a K-wide tensor that are worked on at once: 2^17 floats, several such tensors fit the second-level cache.
CHUNK = 1 << 17


def structured_start(codes: int, dim: int, outposts: str = "far") -> Tensor:
    """The codebook before training, sorted by norm, the zero vector first: a lattice with outposts.

    For D = 1 integers, 0, 1, -1, 2, -2, ..., the last fifth growing by a constant factor instead. Otherwise most of the
    codes are the shortest integer vectors and the rest lie around them on spheres whose radii grow by a constant factor
    (`OUTPOSTS`), because latents have heavy tails: a plane without far codes saturates on high contrast. For D > 8,
    where even the first shells of the lattice are larger than most codebooks, all codes but zero are random directions
    of unit norm.

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


def family_start(rows: int, dim: int) -> Tensor:
    """The rows of a table before training: Laplace distributions of `ROW_SCALES`, evenly spaced in the logarithm.

    Returns:
        float32 (rows, 3), see `Codebook.family`.
    """
    low, high = ROW_SCALES
    scale = low * (high / low) ** (torch.arange(rows) / (rows - 1))
    zero = (1 - torch.exp(-0.5 / scale)) ** dim
    linear = torch.log2(1 / (scale * math.log(2)))
    return torch.stack([torch.full_like(scale, SQUARE_START), linear, torch.log2(zero / (1 - zero))], 1)


def row_of(given: Tensor, rows: int) -> Tensor:
    """Integers in -127..127 from the prior, any float dtype -> rows of a table, int64: floor((given + 127) * rows / 255)."""
    return (given.long() + 127) * rows // 255


def companding(start: Tensor) -> float:
    """Units of the prior's inputs for every doubling of a magnitude.

    Inputs are fine near zero, and that of the farthest code of the start is at the bound of int8.
    """
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

    Args:
        config: of the planes. learn: by the codebook loss ("gradient", eq. 3 of the paper) or by exponential moving
            averages of the members of each code ("ema", appendix A.1; train/codebooks.py).

    Attributes:
        vectors: float32 (P, K, D), in steps. bias: float32 (P, K), log2 units, part of the rate model; (1, K) with a table.
        family: float32 (R, 3), of a table's rows: log2 of square and of linear, and zero, as of `Rates`.
        spread: float32 (P,), of the rate model; see the module.
        usage, sums, steps: what training counts: moving averages of the members of each code, (P, K), and of their sum,
            (P, K, D), and the number of averages so far.
        compand: see `companding`.
    """

    usage: Tensor
    sums: Tensor
    spread: Tensor
    steps: Tensor
    start: Tensor

    def __init__(self, config: SliceConfig, learn: str = "gradient") -> None:
        super().__init__()
        start = start_of(config)
        self.config, self.learn = config, learn
        self.vectors = nn.Parameter(start.repeat(config.planes, 1, 1), requires_grad=learn == "gradient")
        self.bias = nn.Parameter(torch.zeros(1 if config.rows else config.planes, config.codes))
        if config.rows:
            self.register_buffer("start", start, persistent=False)
            self.family = nn.Parameter(family_start(config.rows, config.dim))
        self.register_buffer("spread", torch.ones(config.planes))
        self.register_buffer("usage", torch.zeros(config.planes, config.codes))
        self.register_buffer("sums", torch.zeros(config.planes, config.codes, config.dim))
        self.register_buffer("steps", torch.zeros(()))
        self.compand = companding(start)

    def lookup(self, indices: Tensor) -> Tensor:
        """Code vectors: int64 (N, P) -> float32 (N, P, D)."""
        return look_up(self.vectors, indices)

    def nearest(self, v: Tensor) -> Tensor:
        """Index of the nearest code: float (N, P, D) -> int64 (N, P)."""
        with torch.autocast(v.device.type, enabled=False):
            return negative_distances(v.float(), self.vectors.detach()).argmax(-1).T

    def features(self) -> Tensor:
        """x_k, and its squares and absolute values, or their sums: float32 (P, K, D + 2 S).

        Planes that share a table of probabilities share them: those of the codes at the start.
        """
        if self.config.rows:
            x = self.start.expand(self.config.planes, -1, -1)
        else:
            x = self.vectors.detach() / self.spread[:, None, None]
        sizes = [x.square(), x.abs()]
        if self.config.scales == 1:
            sizes = [size.sum(-1, keepdim=True) for size in sizes]
        return torch.cat([x, *sizes], -1)

    def biases(self) -> Tensor:
        """`bias` of every plane, (P, K)."""
        return self.bias.expand(self.config.planes, -1)

    def rate_parameters(self) -> list[nn.Parameter]:
        """What the rate model has besides the prior."""
        return [self.bias, self.family] if self.config.rows else [self.bias]

    def row_rates(self, given: Tensor) -> Rates:
        """The rate model of rows of the table.

        Args:
            given: integers in -127..127, (N, P), any float dtype, from the prior; see `row_of`. The gradient that they get is that of
                the line through the rows on either side.
        """
        rows = self.config.rows
        row = row_of(given.detach(), rows)
        family = self.family[row]  # (N, P, 3)
        with torch.no_grad():
            above, below = (row + 1).clamp(max=rows - 1), (row - 1).clamp(min=0)
            slope = (self.family[above] - self.family[below]) / (above - below)[..., None] * (rows / 255)
        square, linear, zero = (family + slope * (given - given.detach())[..., None]).unbind(-1)
        drift = torch.zeros(*square.shape, self.config.dim, device=square.device)
        theta = torch.cat([drift, -torch.exp2(square)[..., None], -torch.exp2(linear)[..., None]], -1)
        return Rates(theta, zero)

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
        # One row for each open symbol, plane after plane.
        mask = self.open_symbols(v, rates.zero, weight, bias).T
        target, theta, zero, importance = (x.transpose(0, 1)[mask] for x in (v, rates.theta, rates.zero, weight))
        chosen = [
            k for *_, k in chosen_blocks(self, target, Rates(theta, zero), importance, bias, mask.sum(1).tolist())
        ]
        indices = torch.zeros(v.shape[:2], dtype=torch.int64, device=v.device)
        indices.T[mask] = torch.cat(chosen) if chosen else indices.new_zeros(0)
        return indices


def plane_blocks(members: list[int], limit: int) -> Iterator[tuple[slice, list[tuple[int, slice, slice]]]]:
    """Cut rows that lie plane after plane into blocks of at least one plane and, if possible, at most `limit` rows.

    Args:
        members: rows of each plane. limit: see above.

    Yields:
        the rows of a block, and of each of its planes (plane, its rows, its rows within the block); planes without rows
        are left out.
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
        log2 p of all codes (p, N, K), and the distribution over the codes but 0, with next to nothing in its place,
        (p, N, K).
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


def chosen_blocks(
    book: Codebook, v: Tensor, rates: Rates, weight: Tensor, bias: float | Tensor, members: list[int]
) -> Iterator[tuple[slice, list[tuple[int, slice, slice]], Tensor, Tensor, Tensor, Tensor]]:
    """The entropy-constrained choice of symbols that lie plane after plane, in blocks that fit the cache.

    Args:
        v: (M, D), in steps. rates: theta (M, F) and zero (M,). weight: (M,). bias: see `Codebook.choose`. members: as of `rate_blocks`.

    Yields:
        what `rate_blocks` does, with log2 p at least -MOST_BITS; -|v - e|^2 up to a constant of the row, (rows of the block, K); and
        the codes chosen, int64 (rows of the block,).
    """
    features, vectors = book.features(), book.vectors.detach()
    lengths = vectors.square().sum(-1)
    for block, parts, logp, values in rate_blocks(features, book.biases().detach(), rates.theta, rates.zero, members):
        distances = torch.empty_like(logp)
        for plane, part, here in parts:
            torch.addmm(-lengths[plane], v[part], vectors[plane].T, alpha=2, out=distances[here])
        logp.clamp_(min=-MOST_BITS)
        scores = torch.mul(logp, bias).add_(distances * weight[block, None])
        yield block, parts, logp, values, distances, scores.max(-1)[1]


def _normalise(logits: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
    """What `log_probabilities` returns, from logits (..., K), overwritten, and log2 odds of code 0 (..., 1)."""
    logits[..., 0] = -math.inf
    logits -= logits.amax(-1, keepdim=True)
    logits.clamp_(min=-2 * MOST_BITS)  # powers below would be subnormal numbers, which are slow
    values = torch.exp2(logits)
    total = values.sum(-1, keepdim=True)
    softplus = softplus2(zero)
    logits -= torch.log2(total) + softplus
    logits[..., :1] = zero - softplus
    return logits, values.div_(total)


def negative_distances(v: Tensor, vectors: Tensor) -> Tensor:
    """-|v - e|^2 up to a constant of the row: (N, p, D) and (p, K, D) -> (p, N, K)."""
    return torch.baddbmm(-vectors.square().sum(-1)[:, None], 2 * v.transpose(0, 1), vectors.transpose(1, 2))


def softplus2(x: Tensor) -> Tensor:
    """log2(1 + 2^x)."""
    return functional.softplus(x * math.log(2)) / math.log(2)


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
