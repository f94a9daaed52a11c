"""Codebooks, and the entropy-constrained choice of codes: vectors <-> indices.

A code plane quantises a vector v of D numbers, in units of the plane's step, to the index of one of K code vectors.
The choice is entropy-constrained (Chou, Lookabaugh & Gray 1989, "Entropy-constrained vector quantization", eq. 7):

    k* = argmin_k  weight * |v - e_k|^2 + rate_factor * bits_k

Index 0 of every plane is the code nearest to zero. The rate model of a symbol (`Rates`) has two parts: a significance
flag, whether k > 0, and an exponential family over the codes 1..K-1, in log2 units:

    logit_k = drift . x_k - square * |x_k|^2 - linear * |x_k|_1 + bias_k        x_k = e_k / spread

The rows of a stored table (`RowRates`) are tabulated members of such a family without drift.

All computations are in float32, whatever autocast says: bfloat16 is too coarse for the arg-min.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from vqcodec.models.config import LARGEST_LATTICE, SliceConfig
from vqcodec.models.rates import RowRates, RowTable, plane_chunks, softplus2

# Structured start in two or more dimensions: the least fraction of the codes in the lattice, the ratio of the radii of
# successive spheres of outer codes, and the number of spheres.
INNER, GROWTH, SPHERES = 0.75, 1.25, 4
# Structured start in one dimension: ratio of the outermost code to the last of the integers.
OUTER_REACH = 3.0
# Initial rows of a stored table: scale of the first and of the last row in steps, and log2 of `square` (near 0).
ROW_SCALES, SQUARE_START = (0.04, 100.0), -12.0


def structured_start(codes: int, dim: int) -> Tensor:
    """The codebook before training: a lattice with outer codes, the zero vector first.

    D = 1: the integers 0, 1, -1, 2, -2, ...; the last fifth grows geometrically instead.
    D = 2..8: the shortest integer vectors, then outer codes on spheres whose radii grow geometrically.
    D > 8: zero and random unit vectors, because the first shells of the lattice exceed most codebooks.

    Outer codes are needed because latents have heavy tails: without them a plane saturates at high contrast.

    Args:
        codes: K. dim: D.

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
        points = functional.normalize(torch.randn(codes, dim, generator=generator, dtype=torch.float32), dim=1)
        points[0] = 0
        return points
    shells: list[Tensor] = []
    count, norm = 0, 0
    while count < INNER * codes:
        shell = torch.tensor(list(_shell(norm, dim)), dtype=torch.float32).reshape(-1, dim)
        shells.append(shell[torch.randperm(len(shell), generator=generator)])
        count += len(shell)
        norm += 1
    inner = torch.cat(shells)[:codes]
    outer = codes - len(inner)
    sphere = max(1, -(-outer // SPHERES))
    numbers = torch.arange(outer, dtype=torch.float32)
    radii = inner.norm(dim=1).max() * GROWTH ** (1 + numbers // sphere)
    if dim == 2:
        angles = 2 * math.pi * (numbers % sphere + 0.5 * (numbers // sphere)) / sphere
        directions = torch.stack([angles.cos(), angles.sin()], 1)
    else:
        directions = functional.normalize(torch.randn(outer, dim, generator=generator, dtype=torch.float32), dim=1)
    return torch.cat([inner, radii[:, None] * directions])


def start_of(config: SliceConfig) -> Tensor:
    """The initial codebook of every plane of a slice, float32 (K, D)."""
    return structured_start(config.codes, config.dim)


def family_start(rows: int, dim: int) -> Tensor:
    """The rows of a stored table before training: Laplace distributions with geometrically spaced `ROW_SCALES`.

    Returns:
        float32 (rows, 3), see `Codebook.family`.
    """
    low, high = ROW_SCALES
    scale = low * (high / low) ** (torch.arange(rows, dtype=torch.float32) / (rows - 1))
    zero = (1 - torch.exp(-0.5 / scale)) ** dim
    linear = torch.log2(1 / (scale * math.log(2)))
    return torch.stack([torch.full_like(scale, SQUARE_START), linear, torch.log2(zero / (1 - zero))], 1)


def companding(start: Tensor) -> float:
    """The slope of the logarithmic companding of the prior's inputs: units for every doubling of 1 + magnitude.

    It maps the farthest code of the start to 127, the largest int8, and is at most 24.
    """
    return min(24.0, 127 / math.log2(1 + start.abs().max().item()))


def _shell(norm: int, dim: int) -> Iterator[tuple[int, ...]]:
    """All integer vectors of length `dim` whose squared 2-norm is `norm`."""
    if dim == 1:
        root = math.isqrt(norm)
        if root * root == norm:
            yield from ((root,), (-root,)) if root else ((0,),)
        return
    reach = math.isqrt(norm)
    for first in range(-reach, reach + 1):
        for rest in _shell(norm - first * first, dim - 1):
            yield (first, *rest)


class Codebook(nn.Module):
    """P planes of K code vectors of length D: product quantisation (van den Oord et al. 2017).

    Args:
        config: of the planes.
        learn: how the vectors learn: by the codebook loss ("gradient", eq. 3 of the paper) or as exponential moving
            averages of their members ("ema", appendix A.1; train/codebooks.py).

    Attributes:
        vectors: float32 (P, K, D), in steps.
        bias: float32 (P, K), part of the rate model, in log2 units; (1, K) with a stored table.
        family: float32 (R, 3), only with a stored table: log2 of square, log2 of linear, and zero, for each row; see
            `Rates`.
        spread: float32 (P,), what the rate model divides vectors by; see the module.
        usage, sums: float32 (P, K) and (P, K, D), exponential moving averages of the number of members of each code and
            of their sum. Training only.
        steps: float32 scalar, number of updates of these averages. Training only.
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
        """Look up code vectors: int64 (N, P) -> float32 (N, P, D), in steps."""
        return look_up(self.vectors, indices)

    def nearest(self, v: Tensor) -> Tensor:
        """Indices of the nearest codes: float (N, P, D), in steps -> int64 (N, P)."""
        with torch.autocast(v.device.type, enabled=False):
            return negative_distances(v.float(), self.vectors.detach()).argmax(-1).T

    def features(self) -> Tensor:
        """Sufficient statistics of the rate model, float32 (P, K, D + 2): x_k, its squared 2-norm and its 1-norm."""
        x = self.vectors.detach() / self.spread[:, None, None]
        return torch.cat([x, x.square().sum(-1, keepdim=True), x.abs().sum(-1, keepdim=True)], -1)

    def rate_parameters(self) -> list[nn.Parameter]:
        """The parameters of the rate model, besides those of the prior."""
        return [self.bias, self.family] if self.config.rows else [self.bias]

    def table(self) -> RowTable:
        """The stored table that the family of rate models gives; its probabilities have a gradient.

        Its x_k are the initial code vectors, because all planes share the table.
        """
        square, linear, zero = self.family.unbind(-1)
        x = self.start[1:]
        logits = self.bias[:, 1:] - torch.exp2(square)[:, None] * x.square().sum(-1)
        logits = logits - torch.exp2(linear)[:, None] * x.abs().sum(-1)
        values = logits - torch.logsumexp(logits * math.log(2), 1, keepdim=True) / math.log(2)
        softplus = softplus2(zero)
        flags = zero - softplus, -softplus
        return RowTable.of_probabilities(torch.cat([flags[0][:, None], flags[1][:, None] + values], 1))

    def inputs(self) -> Tensor:
        """What the prior sees of each code, companded: float32 (P, K, 2 D), integers in [-127, 127].

        The first D are signed values, the last D magnitudes.
        """
        e = self.vectors.detach()
        magnitude = (self.compand * torch.log2(1 + e.abs())).round().clamp(max=127)
        return torch.cat([magnitude * e.sign(), magnitude], -1)

    @torch.no_grad()
    def choose(self, v: Tensor, rates: RowRates, weight: Tensor, rate_factor: float) -> Tensor:
        """Choose codes by the module's entropy-constrained rule.

        Args:
            v: float (N, P, D), in steps.
            rates: the rate model of the symbols.
            weight: float (N, P), cost of a squared step in bits.
            rate_factor: factor on the bits. 1 is the Lagrangian optimum of a symbol on its own; less than 1 allows for
                its use as context of later symbols.

        Returns:
            int64 (N, P).
        """
        with torch.autocast(v.device.type, enabled=False):
            return self._choose(v.float(), rates, weight, rate_factor)

    def reach(self, v: Tensor, zero: Tensor, weight: Tensor, rate_factor: float | Tensor) -> Tensor:
        """The length up to which codes may win the choice: float (N, P).

        A longer code costs more than code 0 even if it takes no bits.

        Args: as `choose`; zero: see `Rates`.
        """
        gap = (v - self.vectors.detach()[:, 0]).square().sum(-1)
        return v.norm(dim=-1) + (gap + rate_factor * (softplus2(zero) - zero) / weight).sqrt()

    def open_symbols(self, v: Tensor, zero: Tensor, weight: Tensor, rate_factor: float | Tensor) -> Tensor:
        """Where a code other than 0 may win the choice: bool (N, P). Args: as `reach`."""
        nearest = self.vectors.detach()[:, 1:].norm(dim=-1).amin(1)
        return self.reach(v, zero, weight, rate_factor) >= nearest

    def _choose(self, v: Tensor, rates: RowRates, weight: Tensor, rate_factor: float) -> Tensor:
        vectors, weight = self.vectors.detach(), weight[..., None]
        # -weight * |v - e|^2, up to a constant of the symbol, as one product: [2 weight v, -weight] . [e, |e|^2]
        symbols = torch.cat([2 * weight * v, -weight], -1).transpose(0, 1)
        codes = torch.cat([vectors, vectors.square().sum(-1, keepdim=True)], -1).transpose(1, 2)
        indices = torch.zeros(v.shape[:2], dtype=torch.int64, device=v.device)
        if v.is_cuda:  # to look which symbols are open would take longer
            for planes in plane_chunks(len(v), self.config):
                scores = rates.all(planes).baddbmm_(symbols[planes], codes[planes], beta=rate_factor)
                indices[:, planes] = scores.argmax(-1).T
            return indices
        lengths = vectors.norm(dim=-1)
        reach = self.reach(v, rates.zero, weight[..., 0], rate_factor).T
        left = reach >= lengths[:, 1:].amin(1, keepdim=True)
        # How many codes to look at, from few, which do for most symbols, to all: the short ones come first.
        for count in (max(2, self.config.codes // 8), max(2, self.config.codes // 2), self.config.codes):
            mask = left
            if count < self.config.codes:
                mask = left & (reach < lengths[:, count:].amin(1, keepdim=True))
                left = left & ~mask
            # One row for each symbol, plane after plane.
            some, members = symbols[mask], mask.sum(1).tolist()
            chosen = []
            for _, parts, scores in rates.some(mask).first(count).blocks(members):
                for plane, part, here in parts:
                    scores[here].addmm_(some[part], codes[plane, :, :count], beta=rate_factor)
                chosen.append(scores.max(-1)[1])
            indices.T[mask] = torch.cat(chosen) if chosen else indices.new_zeros(0)
        return indices


def negative_distances(v: Tensor, vectors: Tensor) -> Tensor:
    """-|v - e|^2 up to a constant for each v: v (N, p, D) and vectors (p, K, D) -> (p, N, K)."""
    return torch.baddbmm(-vectors.square().sum(-1)[:, None], 2 * v.transpose(0, 1), vectors.transpose(1, 2))


def rows(x: Tensor, planes: int) -> Tensor:
    """(B, P D, h, w) -> (B h w, P, D): one row for each grid position, in raster order."""
    return x.permute(0, 2, 3, 1).reshape(-1, planes, x.shape[1] // planes)


def grid(x: Tensor, batch: int, height: int, width: int) -> Tensor:
    """The inverse of `rows`: (B h w, P, D) -> (B, P D, h, w)."""
    return x.reshape(batch, height, width, -1).permute(0, 3, 1, 2)


def look_up(table: Tensor, indices: Tensor) -> Tensor:
    """Look up rows of a table for each plane: (P, K, F) and int64 (N, P) -> (N, P, F)."""
    planes, codes, features = table.shape
    flat = indices + torch.arange(planes, device=indices.device) * codes
    return functional.embedding(flat, table.reshape(-1, features))
