"""The rate model of symbols: what their codes' probabilities are, by parameters or by rows of a stored table.

K-wide tensors are the largest of the codec: for rows of a table they are made for some symbols at a time, sorted by
plane so that each plane's part is one matrix product.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from vqcodec.models.config import SliceConfig

# Upper bound of the bits of a value: the range coder gives each at least 1 of 2^24 counts.
MOST_BITS = 24.0
# Entries of a K-wide tensor processed at a time: several such blocks of 2^17 floats fit the second-level cache.
CHUNK = 1 << 17
# The same for an accelerator, which has no use for the cache: half a gigabyte.
LARGE_CHUNK = 1 << 27
# The planes of a block: the number of each, its rows, and its rows within the block.
Parts = list[tuple[int, slice, slice]]


class RateParameters(Protocol):
    """What a codebook adds to the parameters of its symbols."""

    @property
    def bias(self) -> Tensor:
        """float32 (P, K), in log2 units."""

    def features(self) -> Tensor:
        """Sufficient statistics of the codes, float32 (P, K, D + 2)."""


@dataclass
class Rates:
    """The rate model of N rows of P planes, by parameters; see `quantizer`'s equation.

    Attributes:
        theta: float (N, P, D + 2), natural parameters in log2 units: drift (D), -square, -linear.
        zero: float (N, P), log2 odds of code 0 against all others.
    """

    theta: Tensor
    zero: Tensor

    def bits(self, book: RateParameters, indices: Tensor) -> Tensor:
        """The bits of codes, int64 (N, P): float32 (N, P), with gradients for parameters and the codebook's bias."""
        theta, features = self.theta.float().transpose(0, 1), book.features().transpose(1, 2)
        with torch.autocast(theta.device.type, enabled=False):
            logits = torch.baddbmm(book.bias[:, None], theta, features)  # (P, N, K)
        logp = _normalise(logits, self.zero.float().T[..., None])
        return -logp.gather(-1, indices.T[..., None])[..., 0].T


@dataclass
class RowTable:
    """A stored table of log2 probabilities.

    Attributes:
        logp: float32 (R, K), at least -MOST_BITS.
        slope: float32 (R, K), how `logp` changes with the number from the prior that chooses the row, about; without
            gradient.
    """

    logp: Tensor
    slope: Tensor

    @staticmethod
    def of_probabilities(logp: Tensor) -> "RowTable":
        """A table of log2 probabilities (R, K), which may be of learning parameters.

        Codes whose bits are at their limit still ask for rows in which any code but 0 is likelier.
        """
        limited = logp < -MOST_BITS
        zero = logp.detach()[:, :1].double()
        flag = torch.log2(-torch.expm1(zero * math.log(2))).float()
        slope = torch.where(limited, _slope(flag), _slope(logp.detach()))
        return RowTable(logp.clamp(min=-MOST_BITS), slope)


def _slope(table: Tensor) -> Tensor:
    """Central differences over the rows of a table (R, K), for a step of the number that chooses the row."""
    count = len(table)
    rows = torch.arange(count, device=table.device)
    above, below = (rows + 1).clamp(max=count - 1), (rows - 1).clamp(min=0)
    return (table[above] - table[below]) / (above - below)[:, None] * (count / 255)


@dataclass
class RowRates:
    """The rate model of N rows of P planes, by rows of a stored table.

    Attributes:
        given: (N, P), integers in [-127, 127] from the prior, any float dtype; see `row_of`.
        table: of all planes.
    """

    given: Tensor
    table: RowTable

    @property
    def row(self) -> Tensor:
        """The rows of the table, int64 of the shape of `given`."""
        return row_of(self.given.detach(), len(self.table.logp))

    @property
    def zero(self) -> Tensor:
        """See `Rates`; without gradient."""
        logp = self.table.logp.detach()[:, 0].double()
        odds = (logp - torch.log2(-torch.expm1(logp * math.log(2)))).float()
        return odds[self.row]

    def some(self, mask: Tensor) -> "RowRates":
        """The symbols where the mask, bool (P, N), says so, plane after plane: given (M,)."""
        return RowRates(self.given.T[mask], self.table)

    def first(self, count: int) -> "RowRates":
        """The same of the first codes of every row."""
        logp, slope = (part[:, :count].contiguous() for part in (self.table.logp, self.table.slope))
        return RowRates(self.given, RowTable(logp, slope))

    def blocks(self, members: list[int]) -> Iterator[tuple[slice, Parts, Tensor]]:
        """Probabilities of the codes of M symbols that `some` picked, in blocks that fit the cache.

        Args:
            members: number of symbols of each plane.

        Yields:
            A block and its planes as `plane_blocks` does, and log2 probabilities of all codes, at least -MOST_BITS,
            (rows of the block, K).
        """
        logp, row = self.table.logp.detach(), self.row
        for block, parts in plane_blocks(members, CHUNK // logp.shape[1]):
            yield block, parts, logp.index_select(0, row[block])

    def all(self, planes: slice) -> Tensor:
        """Log2 probabilities of all codes for all symbols of some planes, (p, N, K)."""
        return self.table.logp.detach()[self.row.T[planes]]

    def bits(self, book: RateParameters, indices: Tensor) -> Tensor:
        """See `Rates.bits`; with gradients for the table and for what the prior gave."""
        row = self.row
        codes = row * self.table.logp.shape[1] + indices
        spent = -functional.embedding(codes, self.table.logp.reshape(-1, 1))[..., 0]
        slope = self.table.slope.flatten()[codes]
        return spent - slope * (self.given - self.given.detach())


def row_of(given: Tensor, rows: int) -> Tensor:
    """The table rows that integers from the prior choose: floor((given + 127) * rows / 255).

    given: integers in [-127, 127], any float dtype and shape. Returns int64 of the same shape.
    """
    return (given.long() + 127) * rows // 255


def plane_blocks(members: list[int], limit: int) -> Iterator[tuple[slice, Parts]]:
    """Group the planes of rows that are sorted by plane into blocks.

    Args:
        members: number of rows of each plane.
        limit: most rows of a block, unless a single plane has more.

    Yields:
        The rows of a block, and for each of its planes that has rows: the plane, its rows, and its rows within the
        block.
    """
    parts: Parts = []
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


def plane_chunks(count: int, config: SliceConfig) -> Iterator[slice]:
    """Groups of planes whose K-wide tensors, for `count` symbols each, an accelerator works on at once."""
    some = max(1, LARGE_CHUNK // (count * config.codes))
    for start in range(0, config.planes, some):
        yield slice(start, start + some)


def _normalise(logits: Tensor, zero: Tensor) -> Tensor:
    """Log2 probabilities of all codes from logits of the codes 1..K-1 and log2 odds of code 0.

    Args:
        logits: (..., K), of which the first counts for nothing. zero: (..., 1).

    Returns:
        (..., K), at least -MOST_BITS. Codes whose bits are at their limit still ask for other odds of code 0.
    """
    values = logits[..., 1:]
    values = (values - values.detach().amax(-1, keepdim=True)).clamp(min=-2 * MOST_BITS)  # subnormal numbers are slow
    flag = -softplus2(zero)
    values = values - torch.log2(torch.exp2(values).sum(-1, keepdim=True)) + flag
    values = torch.where(values < -MOST_BITS, flag - flag.detach() - MOST_BITS, values)
    return torch.cat([(zero + flag).clamp(min=-MOST_BITS), values], -1)


def softplus2(x: Tensor) -> Tensor:
    """log2(1 + 2^x)."""
    return functional.softplus(x * math.log(2)) / math.log(2)
