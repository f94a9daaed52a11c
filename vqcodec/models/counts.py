"""What the prior says of a symbol -> integer counts: the range coder's probabilities, exact on every machine.

A prior of interleaved passes chooses a row of a stored table for each symbol (`RowTables`). One in raster order gives
parameters (`CodeTables`): then a symbol k of a plane is coded in two parts, with tables of integers that the weights
file holds for each code:

    flag    whether k = 0: odds 2^(zero / 8)
    value   k among 1..K-1: in proportion to 2^(logit_k), where in units of 2^-27 of a bit
            logit_k = mean * root * X_k - 2 * square * Q_k - 2 * linear * A_k + bias_k * 2^19
            root = floor(2^(12 + s/32)), square = floor(2^(12 + s/16)), linear = floor(2^(13 + l/16))

X_k is the code vector; Q_k and A_k are its squared 2-norm and its 1-norm.

All products and sums are integers below 2^53, held in float64; the only division is between such integers. Encoder and
decoder both call these functions.
"""

import functools
import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vqcodec.entropy import Table
from vqcodec.models.config import Config, SliceConfig
from vqcodec.models.quantizer import Codebook
from vqcodec.models.rates import RowTable, row_of

# The range coder's precision. It adds 1 to every count, so n counts sum to TOTAL - n.
TOTAL = 1 << 24
LOGIT_SHIFT = 21  # from units of 2^-27 bits to units of 1/64 bit
WEIGHT_BITS = 20  # of the most probable value's unnormalised probability


def power(exponent: int, bits: int) -> int:
    """floor(2^(exponent / 64) * 2^bits), computed with integers alone; 0 if that is below 1."""
    total = exponent + 64 * bits
    if total < 0:
        return 0
    value = 1 << total
    for _ in range(6):  # the 64th root of 2^total
        value = math.isqrt(value)
    return value


def _table(slope: int, bits: int) -> Tensor:
    """floor(2^(bits + o * slope / 64)) for o = -127..127, indexed by o + 127."""
    return torch.tensor([power(o * slope, bits) for o in range(-127, 128)], dtype=torch.float64, device="cpu")


ROOT = _table(2, 12)
SQUARE = _table(4, 12)
LINEAR = _table(4, 13)
# 2^(WEIGHT_BITS - i / 64): unnormalised probability of a value whose logit is i / 64 bits below the largest.
WEIGHTS = torch.tensor([power(-i, WEIGHT_BITS) for i in range(64 * WEIGHT_BITS + 2)], dtype=torch.float64, device="cpu")


def _flags() -> NDArray[np.float32]:
    rows = []
    for o in range(-127, 128):
        odds = power(8 * o, 16)
        zero = (TOTAL - 2) * odds // (odds + (1 << 16))
        rows.append((zero, TOTAL - 2 - zero))
    return np.array(rows, np.float32)


FLAGS = _flags()


class CodeTables(nn.Module):
    """The integer tables of one slice of code planes. All buffers are integers held in floats.

    Attributes:
        inputs: float32 (P, K, 2 D), see `Codebook.inputs`.
        values: float64 (P, D + 2, K - 1): X, -2 Q and -2 A in units of 2^-10.
        bias: float64 (P, K - 1), in units of 1/256 bit.
    """

    inputs: Tensor
    values: Tensor
    bias: Tensor

    def __init__(self, piece: SliceConfig) -> None:
        super().__init__()
        self.register_buffer("inputs", torch.zeros(piece.planes, piece.codes, 2 * piece.dim, dtype=torch.float32))
        self.piece = piece
        rows = piece.parameters - 1
        self.register_buffer("values", torch.zeros(piece.planes, rows, piece.codes - 1, dtype=torch.float64))
        self.register_buffer("bias", torch.zeros(piece.planes, piece.codes - 1, dtype=torch.float64))

    def fill(self, book: Codebook) -> None:
        """Fill the tables with a trained codebook and its rate model, rounded."""
        self.inputs.copy_(book.inputs())
        features = book.features()[:, 1:].transpose(1, 2).double()
        features[:, self.piece.dim :] *= -2
        self.values.copy_((features * 1024).round())
        self.bias.copy_((book.bias.detach()[:, 1:].double() * 256).round())

    def check(self) -> None:
        """Check that every possible logit is an integer that float64 holds exactly.

        Raises:
            ValueError: a logit can be too large, or an input of the prior is outside -127..127.
        """
        x, squares, lengths = (part.abs().sum(1) for part in torch.split(self.values, [self.piece.dim, 1, 1], 1))
        largest = 127 * ROOT.max() * x + SQUARE.max() * squares + LINEAR.max() * lengths
        largest += 2.0**19 * self.bias.abs()
        if largest.max() >= 2.0**53:
            raise ValueError("the tables of a code plane are too large for exact sums")
        if self.inputs.abs().max() > 127:
            raise ValueError("an input of the prior is outside -127..127")

    def value_counts(self, parameters: Tensor, other: Tensor) -> NDArray[np.float32]:
        """Counts of the values 1..K-1, for those symbols whose flag says that k > 0.

        Args:
            parameters: integers (N, P, D + 3) from the prior, in any float dtype.
            other: bool (N, P), the flags: whether k > 0.

        Returns:
            float32 (symbols, K - 1), C-contiguous, position by position. Counts are integers; each row sums to
            2^24 - (K - 1).
        """
        planes = other.nonzero()[:, 1]
        given = parameters[other].double()
        root, square, linear, weights = (t.to(given.device) for t in (ROOT, SQUARE, LINEAR, WEIGHTS))
        mean, s, a = torch.split(given[:, :-1], [self.piece.dim, 1, 1], 1)
        s, a = (s + 127).long(), (a + 127).long()
        coefficients = torch.cat([mean * root[s], square[s], linear[a]], 1)
        logits = torch.empty(len(given), self.bias.shape[1], dtype=torch.float64, device=given.device)
        for plane in set(planes.tolist()):
            here = planes == plane
            logits[here] = torch.addmm(self.bias[plane] * 2.0**19, coefficients[here], self.values[plane])
        return _counts(logits, weights).float().cpu().numpy()


def _counts(logits: Tensor, weights: Tensor) -> Tensor:
    """Logits in 2^-27 bits, float64 (n, m), which are overwritten -> counts, float64 (n, m)."""
    logits.mul_(2.0**-LOGIT_SHIFT).floor_()
    below = (logits.amax(1, keepdim=True) - logits).clamp_(max=len(weights) - 1).long()
    unnormalised = weights[below]
    total = TOTAL - unnormalised.shape[1]
    counts = unnormalised.mul(total).div_(unnormalised.sum(1, keepdim=True)).floor_()
    # The first of the most probable values gets the remainder.
    first = below.argmin(1, keepdim=True)
    return counts.scatter_add_(1, first, total - counts.sum(1, keepdim=True))


def flag_counts(parameters: Tensor) -> NDArray[np.float32]:
    """Counts of the flags of symbols.

    Args:
        parameters: integers (N, P, D + 3), as in `CodeTables.value_counts`.

    Returns:
        float32 (N P, 2): k = 0, k > 0. Each row sums to 2^24 - 2.
    """
    return np.take(FLAGS, parameters[..., -1].flatten().cpu().numpy().astype(np.intp) + 127, axis=0)


def tables_of(piece: SliceConfig) -> "CodeTables | RowTables":
    """Make the tables of a slice, of the kind that its configuration asks for, filled with zeros."""
    return RowTables(piece) if piece.rows else CodeTables(piece)


class RowTables(nn.Module):
    """The stored table of probabilities of one slice, from which the prior chooses a row for each symbol.

    Attributes:
        inputs: float32 (P, K, 2 D), integers; see `Codebook.inputs`.
        counts: float32 (R, K), integers; each row sums to 2^24 - K.
    """

    inputs: Tensor
    counts: Tensor

    def __init__(self, piece: SliceConfig) -> None:
        super().__init__()
        self.piece = piece
        self.register_buffer("inputs", torch.zeros(piece.planes, piece.codes, 2 * piece.dim, dtype=torch.float32))
        self.register_buffer("counts", torch.zeros(piece.rows, piece.codes, dtype=torch.float32))

    @functools.cached_property
    def table(self) -> Table:
        """The counts in the range coder's form. They are cached: fill or load the counts first."""
        return Table(self.counts.cpu().numpy())

    @functools.cached_property
    def row_of_given(self) -> NDArray[np.uint8]:
        """The row that each number of the prior chooses, by its lowest eight bits: uint8 (256,)."""
        every = torch.arange(-127, 128)
        rows = np.zeros(256, np.uint8)
        rows[every.numpy().astype(np.uint8)] = row_of(every, self.piece.rows).numpy()
        return rows

    @functools.cached_property
    def rates(self) -> RowTable:
        """What the range coder makes of the counts, for the choice of codes. Cached as `table`."""
        return RowTable.of_probabilities(torch.log2((self.counts + 1) / TOTAL))

    @torch.no_grad()
    def fill(self, book: Codebook) -> None:
        """Tabulate a trained rate model."""
        self.inputs.copy_(book.inputs())
        probabilities = torch.exp2(book.table().logp.double())
        total = TOTAL - self.piece.codes
        counts = (probabilities / probabilities.sum(1, keepdim=True) * total).floor()
        first = counts.argmax(1, keepdim=True)
        self.counts.copy_(counts.scatter_add_(1, first, total - counts.sum(1, keepdim=True)))

    def check(self) -> None:
        """Check that the range coder can use the table.

        Raises:
            ValueError: a count is negative or no integer, a row does not sum to 2^24 - K, or an input of the prior is
                outside -127..127.
        """
        counts = self.counts.double()
        total = TOTAL - self.piece.codes
        if not (
            bool((counts == counts.floor()).all())
            and bool((counts >= 0).all())
            and bool((counts.sum(1) == total).all())
        ):
            raise ValueError("the counts of a table are not those of distributions")
        if self.inputs.abs().max() > 127:
            raise ValueError("an input of the prior is outside -127..127")


class Tables(nn.Module):
    """The tables of all slices: `levels[level][slice]`, coarse first."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.levels = nn.ModuleList([nn.ModuleList([tables_of(p) for p in s.slices]) for s in config.levels])

    def slice(self, level: int, index: int) -> CodeTables | RowTables:
        tables = self.levels[level][index]  # type: ignore[index]
        assert isinstance(tables, CodeTables | RowTables)
        return tables
