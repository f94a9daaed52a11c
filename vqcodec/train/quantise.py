"""The entropy-constrained choice in training: codes, their bits, and gradients for everything that led to them.

The codes are those of `Codebook.choose`. The rate model gets the gradient of the bits of the codes chosen. A choice has
no gradient, so the vectors get that of the expected bits under a soft assignment to the codes, of `TEMPERATURE`.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from vqcodec.models.quantizer import Codebook, negative_distances
from vqcodec.models.rates import Parts, RowRates, plane_chunks

# In squared steps, of the soft assignment: at 0.5 a code one step away from the nearest has 13 % of its weight.
TEMPERATURE = 0.5
# Codes next to code 0.
NEAR = 13


def quantise(
    book: Codebook, v: Tensor, rates: RowRates, weight: Tensor, rate_factor: float | Tensor, share: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose codes, and count their bits.

    Args:
        book: P planes of K codes. v, rates, weight, rate_factor: as of `Codebook.choose`, for N rows.
        share: float (N,), what one bit of each row adds to the loss.

    Returns:
        (loss, indices, bits): the scalar sum of share * bits, with gradients for v, the table and what the prior gave;
        int64 (N, P); and float32 (N,), without gradient.
    """
    with torch.autocast(v.device.type, enabled=False):
        v = v.float()
        indices, pull = _choose(book, v.detach(), rates, weight, rate_factor, v.requires_grad)
        spent = rates.bits(book, indices)
        loss = (spent * share[:, None]).sum()
        if pull is not None:
            pulled = (v * (pull * share[:, None, None])).sum()
            loss = loss + (pulled - pulled.detach())  # nothing but a gradient
    return loss, indices, spent.detach().sum(1)


@torch.no_grad()
def _choose(
    book: Codebook, v: Tensor, rates: RowRates, weight: Tensor, rate_factor: float | Tensor, pulled: bool
) -> tuple[Tensor, Tensor | None]:
    """The codes, int64 (N, P), and if `pulled` the gradient of expected bits as of `_pull`, float (N, P, D)."""
    vectors = book.vectors.detach()
    indices = torch.zeros(v.shape[:2], dtype=torch.int64, device=v.device)
    pull: Tensor | None = None
    if v.is_cuda:
        pull = torch.empty_like(v) if pulled else None
        for planes, logp, distances, k in _chosen_chunks(book, v, rates, weight, rate_factor):
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
    for rows, parts, logp, distances, k in _chosen_blocks(
        book, target, rates.some(mask), weight.T[mask], rate_factor, members
    ):
        chosen[rows] = k
        if pulled:
            _pull_parts(logp, distances, vectors, parts, soft[rows])
    indices.T[mask] = chosen
    if pull is not None:
        pull.transpose(0, 1)[mask] = soft
    return indices, pull


def _chosen_blocks(
    book: Codebook,
    v: Tensor,
    rates: RowRates,
    weight: Tensor,
    rate_factor: float | Tensor,
    members: list[int],
) -> Iterator[tuple[slice, Parts, Tensor, Tensor, Tensor]]:
    """The choice for M symbols that are sorted by plane, in blocks that fit the cache.

    Args:
        book: the codebook. v: (M, D), in steps. rates: of the symbols, as `RowRates.some` gives them. weight: (M,).
        rate_factor: see `Codebook.choose`. members: number of symbols of each plane.

    Yields:
        What `RowRates.blocks` yields; -|v - e|^2 up to a constant of the row, (rows of the block, K); and the chosen
        codes, int64 (rows of the block,).
    """
    vectors = book.vectors.detach()
    lengths = vectors.square().sum(-1)
    for block, parts, logp in rates.blocks(members):
        distances = torch.empty_like(logp)
        for plane, part, here in parts:
            torch.addmm(-lengths[plane], v[part], vectors[plane].T, alpha=2, out=distances[here])
        scores = torch.mul(logp, rate_factor).add_(distances * weight[block, None])
        yield block, parts, logp, distances, scores.max(-1)[1]


def _chosen_chunks(
    book: Codebook, v: Tensor, rates: RowRates, weight: Tensor, rate_factor: float | Tensor
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """The choice for all symbols alike, plane by plane.

    Yields:
        Some planes, the result of `RowRates.all`, `negative_distances`, and the chosen codes, int64 (p, N).
    """
    for planes in plane_chunks(len(v), book.config):
        logp = rates.all(planes)
        distances = negative_distances(v[:, planes], book.vectors.detach()[planes])
        k = torch.addcmul(logp * rate_factor, distances, weight.T[planes, :, None]).argmax(-1)
        yield planes, logp, distances, k


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
