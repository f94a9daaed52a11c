"""The entropy-constrained choice in training: codes, their bits, and gradients for everything that led to them.

The codes are those of `Codebook.choose`. The rate model gets the gradient of the bits of the codes chosen. A choice has
no gradient, so the vectors get that of the expected bits under a soft assignment to the codes, of `TEMPERATURE`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vqcodec.models.quantizer import Codebook, negative_distances
from vqcodec.models.rates import MOST_BITS, Parts, Rates, RowRates, log_probabilities, plane_chunks, softplus2

# In squared steps, of the soft assignment: at 0.5 a code one step away from the nearest has 13 % of its weight.
TEMPERATURE = 0.5
# Codes next to code 0.
NEAR = 13


def quantise(
    book: Codebook, v: Tensor, rates: Rates | RowRates, weight: Tensor, rate_factor: float | Tensor, share: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose codes, and count their bits.

    Args:
        book: P planes of K codes. v, rates, weight, rate_factor: as of `Codebook.choose`, for N rows.
        share: float (N,), what one bit of each row adds to the loss.

    Returns:
        (loss, indices, bits): the scalar sum of share * bits, with gradients for v, the rate model and `Codebook.bias`;
        int64 (N, P); and float32 (N,), without gradient.
    """
    with torch.autocast(v.device.type, enabled=False):
        if isinstance(rates, RowRates):
            return _quantise_rows(book, v.float(), rates, weight, rate_factor, share)
        loss, indices, bits = _Quantise.apply(  # type: ignore[no-untyped-call]
            v.float(), rates.theta.float(), rates.zero.float(), book.bias, book, weight, rate_factor, share
        )
    return loss, indices, bits


def _quantise_rows(
    book: Codebook, v: Tensor, rates: RowRates, weight: Tensor, rate_factor: float | Tensor, share: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`quantise` with a stored table, whose own gradients are look-ups."""
    indices, pull = _choose_rows(book, v.detach(), rates, weight, rate_factor, v.requires_grad)
    spent = rates.bits(indices)
    loss = (spent * share[:, None]).sum()
    if pull is not None:
        pulled = (v * (pull * share[:, None, None])).sum()
        loss = loss + (pulled - pulled.detach())  # nothing but a gradient
    return loss, indices, spent.detach().sum(1)


@torch.no_grad()
def _choose_rows(
    book: Codebook, v: Tensor, rates: RowRates, weight: Tensor, rate_factor: float | Tensor, pulled: bool
) -> tuple[Tensor, Tensor | None]:
    """The codes, int64 (N, P), and if `pulled` the gradient of expected bits as of `_pull`, float (N, P, D)."""
    vectors = book.vectors.detach()
    indices = torch.zeros(v.shape[:2], dtype=torch.int64, device=v.device)
    pull: Tensor | None = None
    if v.is_cuda:
        pull = torch.empty_like(v) if pulled else None
        for planes, logp, _, distances, k in _chosen_chunks(book, v, rates, weight, rate_factor):
            indices[:, planes] = k.T
            if pull is not None:
                pull[:, planes] = _pull(logp, distances, vectors[planes])
        return indices, pull
    if pulled:
        near = vectors[:, :NEAR]
        pull = _pull(rates.table.logp[rates.row.T, :NEAR], negative_distances(v, near), near)
    mask = book.open_symbols(v, rates.zero, weight, rate_factor).T
    target, members = v.transpose(0, 1)[mask], mask.sum(1).tolist()
    chosen, soft = torch.empty(len(target), dtype=torch.int64, device=v.device), torch.empty_like(target)
    for rows, parts, logp, _, distances, k in _chosen_blocks(
        book, target, rates.some(mask), weight.T[mask], rate_factor, members
    ):
        chosen[rows] = k
        if pulled:
            _pull_parts(logp, distances, vectors, parts, soft[rows])
    indices.T[mask] = chosen
    if pull is not None:
        pull.transpose(0, 1)[mask] = soft
    return indices, pull


@dataclass
class _Task:
    """What `quantise` is asked for; the vectors need a gradient if `pulled`, the rate model if it `learns`."""

    v: Tensor
    rates: Rates
    weight: Tensor
    rate_factor: float | Tensor
    share: Tensor
    pulled: bool
    learns: bool


# Indices and bits (N, P), and the gradients of share * bits for v (None unless pulled), theta and the codebook's bias.
_Answer = tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]


class _Quantise(torch.autograd.Function):
    """`quantise`: K-wide tensors live only inside forward, which also computes every gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        v: Tensor,
        theta: Tensor,
        zero: Tensor,
        bias: Tensor,
        book: Codebook,
        weight: Tensor,
        rate_factor: float | Tensor,
        share: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        pulled, *learns = ctx.needs_input_grad[:4]
        task = _Task(v, Rates(theta, zero), weight, rate_factor, share, pulled, any(learns))
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
    bits = (softplus2(zero) - zero).clamp_(max=MOST_BITS)
    indices = torch.zeros(zero.shape, dtype=torch.int64, device=v.device)
    grad_theta, grad_bias = torch.zeros_like(theta), torch.zeros_like(bias)
    grad_v: Tensor | None = None
    if task.pulled:
        # Symbols that have code 0 for certain are pulled to it as far as the codes next to it say.
        near = vectors[:, :NEAR]
        logp, _ = log_probabilities(features[:, :NEAR], bias[:, :NEAR], theta, zero)
        grad_v = _pull(logp, negative_distances(v, near), near) * task.share[:, None, None]
    # One row for each open symbol, plane after plane; the others have code 0.
    mask = book.open_symbols(v, zero, task.weight, task.rate_factor).T
    target, drift, odds = (x.transpose(0, 1)[mask] for x in (v, theta, zero))
    importance = task.weight.T[mask]
    portion = task.share.expand(mask.shape)[mask]
    count = len(target)
    chosen, spent = torch.empty(count, dtype=torch.int64, device=v.device), torch.empty(count, device=v.device)
    soft, expected = torch.empty_like(target), torch.empty_like(drift)
    open_rates, members = Rates(drift, odds), mask.sum(1).tolist()
    for rows, parts, logp, values, distances, k in _chosen_blocks(
        book, target, open_rates, importance, task.rate_factor, members
    ):
        chosen[rows] = k
        spent[rows] = -logp.gather(-1, k[:, None])[:, 0]
        if task.pulled:
            _pull_parts(logp, distances, vectors, parts, soft[rows])
        if not task.learns:
            continue
        assert values is not None
        # The rate model learns from the chosen code: d bits / d theta = E_p[f] - f_k, for k other than 0
        # whose bits are not at their limit.
        other = ((k > 0) & (spent[rows] < MOST_BITS)).float() * portion[rows]
        values *= other[:, None]
        for plane, part, here in parts:
            torch.mm(values[here], features[plane], out=expected[part])
            expected[part].addcmul_(features[plane][k[here]], other[here][:, None], value=-1)
            grad_bias[plane] += values[here].sum(0).scatter_add_(0, k[here], -other[here])
    if grad_v is not None:
        grad_v.transpose(0, 1)[mask] = soft.mul_(portion[:, None])
    if task.learns:
        grad_theta.transpose(0, 1)[mask] = expected
    indices.T[mask] = chosen
    bits.T[mask] = spent
    return indices, bits, grad_v, grad_theta, grad_bias


def _quantise_all(book: Codebook, task: _Task) -> _Answer:
    """For all symbols and codes alike: for devices where looking which symbols are open would take longer."""
    v, theta, zero = task.v, task.rates.theta, task.rates.zero
    features, vectors = book.features(), book.vectors.detach()
    indices, spent = torch.empty_like(zero, dtype=torch.int64), torch.empty_like(zero)
    grad_v = torch.empty_like(v) if task.pulled else None
    grad_theta, grad_bias = torch.zeros_like(theta), torch.zeros_like(book.bias)
    for part, logp, values, distances, k in _chosen_chunks(book, v, task.rates, task.weight, task.rate_factor):
        bits = -logp.gather(-1, k[..., None])[..., 0]
        indices[:, part], spent[:, part] = k.T, bits.T
        if grad_v is not None:
            grad_v[:, part] = _pull(logp, distances, vectors[part]) * task.share[:, None, None]
        if task.learns:
            assert values is not None
            other = ((k > 0) & (bits < MOST_BITS)).float() * task.share
            values *= other[..., None]
            values.scatter_add_(-1, k[..., None], -other[..., None])  # now d bits / d logits
            grad_theta[:, part] = torch.bmm(values, features[part]).transpose(0, 1)
            grad_bias[part] = values.sum(1)
    return indices, spent, grad_v, grad_theta, grad_bias


def _chosen_blocks(
    book: Codebook,
    v: Tensor,
    rates: Rates | RowRates,
    weight: Tensor,
    rate_factor: float | Tensor,
    members: list[int],
) -> Iterator[tuple[slice, Parts, Tensor, Tensor | None, Tensor, Tensor]]:
    """The choice for M symbols that are sorted by plane, in blocks that fit the cache.

    Args:
        book: the codebook. v: (M, D), in steps. rates: of the symbols, as `Rates.some` gives them. weight: (M,).
        rate_factor: see `Codebook.choose`. members: number of symbols of each plane.

    Yields:
        What `Rates.blocks` yields; -|v - e|^2 up to a constant of the row, (rows of the block, K); and the chosen
        codes, int64 (rows of the block,).
    """
    vectors = book.vectors.detach()
    lengths = vectors.square().sum(-1)
    for block, parts, logp, values in rates.blocks(book, members):
        distances = torch.empty_like(logp)
        for plane, part, here in parts:
            torch.addmm(-lengths[plane], v[part], vectors[plane].T, alpha=2, out=distances[here])
        scores = torch.mul(logp, rate_factor).add_(distances * weight[block, None])
        yield block, parts, logp, values, distances, scores.max(-1)[1]


def _chosen_chunks(
    book: Codebook, v: Tensor, rates: Rates | RowRates, weight: Tensor, rate_factor: float | Tensor
) -> Iterator[tuple[slice, Tensor, Tensor | None, Tensor, Tensor]]:
    """The choice for all symbols alike, plane by plane.

    Yields:
        Some planes, both results of `Rates.all`, `negative_distances`, and the chosen codes, int64 (p, N).
    """
    for planes in plane_chunks(len(v), book.config):
        logp, values = rates.all(book, planes)
        distances = negative_distances(v[:, planes], book.vectors.detach()[planes])
        k = torch.addcmul(logp * rate_factor, distances, weight.T[planes, :, None]).argmax(-1)
        yield planes, logp, values, distances, k


def _pull(logp: Tensor, distances: Tensor, vectors: Tensor) -> Tensor:
    """Gradient of the expected bits of a soft assignment to some codes, float (N, p, D).

    The assignment w = softmax(-|v - e|^2 / T) gives d E_w[bits] / dv = -2/T Cov_w(log2 p, e).

    Args:
        logp: (p, N, K), and distances: of `negative_distances`; both are overwritten. vectors: (p, K, D).
    """
    w = torch.softmax(distances.mul_(1 / TEMPERATURE), -1)
    logp -= torch.linalg.vecdot(w, logp)[..., None]
    return torch.bmm(w.mul_(logp), vectors).transpose(0, 1) * (-2 / TEMPERATURE)


def _pull_parts(logp: Tensor, distances: Tensor, vectors: Tensor, parts: Parts, out: Tensor) -> None:
    """`_pull` for a block of symbols that are sorted by plane.

    Args:
        logp, distances: (M, K), overwritten. vectors: (P, K, D). parts: the planes of the block. out: float (M, D).
    """
    w = torch.softmax(distances.mul_(1 / TEMPERATURE), -1)
    logp -= torch.linalg.vecdot(w, logp)[:, None]
    w *= logp
    for plane, _, here in parts:
        torch.mm(w[here], vectors[plane], out=out[here])
    out *= -2 / TEMPERATURE
