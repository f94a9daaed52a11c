"""How codebooks learn apart from gradients: k-means start, exponential moving averages, revival of dead codes.

The codebook loss, by which most codebooks learn, is part of loss.py.
"""

import torch
from torch import Tensor, distributed

from vqcodec.models.quantizer import Codebook, start_of
from vqcodec.models.vqvae import VQVAE
from vqcodec.train.process import sum_over_processes

# Of the exponential moving averages, a step (van den Oord et al. 2017, appendix A.1: gamma).
DECAY = 0.99
# Codes with fewer members a batch, on average, are dead.
DEAD = 0.01
# The same below which a code's average says nothing any more: the code stays where it is.
EMPTY = 1e-3
# Of the Laplace smoothing of counts.
SMOOTHING = 1e-5


def restart(book: Codebook) -> None:
    """Put the code vectors where they are before training. The rate model stays as it is."""
    book.vectors.data.copy_(start_of(book.config))


@torch.no_grad()
def start_by_k_means(book: Codebook, v: Tensor, rounds: int = 10) -> None:
    """Make code vectors from data by Lloyd's algorithm; code 0 is the one nearest to zero.

    Args:
        book: P planes of K codes. v: the data, float (N, P, D), N >= K. rounds: of the algorithm.
    """
    _, codes, _ = book.vectors.shape
    pick = torch.randperm(len(v), device=v.device)[:codes]
    book.vectors[:, : len(pick)] = v[pick].float().transpose(0, 1)
    for _ in range(rounds):
        indices = book.nearest(v)
        for plane in range(len(book.vectors)):
            totals = torch.zeros_like(book.vectors[plane]).index_add_(0, indices[:, plane], v[:, plane].float())
            counts = torch.bincount(indices[:, plane], minlength=codes)[:, None]
            book.vectors[plane] = torch.where(counts > 0, totals / counts.clamp(min=1), book.vectors[plane])
    order = book.vectors.square().sum(-1).argsort(1)
    book.vectors.copy_(book.vectors.gather(1, order[..., None].expand_as(book.vectors)))


@torch.no_grad()
def update_averages(book: Codebook, v: Tensor, indices: Tensor) -> None:
    """Average the number of members of each code and, in a codebook that learns so, move it to their average.

    All processes of a distributed run learn the same codebook.

    Args:
        book: P planes of K codes; see `Codebook`. v: a batch, float (N, P, D). indices: of the codes chosen for it,
            int64 (N, P).
    """
    planes, codes, dim = book.vectors.shape
    flat = (indices + torch.arange(planes, device=v.device) * codes).reshape(-1)
    counts = torch.zeros(planes * codes, device=v.device)
    counts = counts.index_add_(0, flat, torch.ones_like(flat, dtype=torch.float32)).reshape(planes, codes)
    sum_over_processes(counts)
    book.steps += 1
    book.usage.lerp_(counts, 1 - DECAY)
    if book.learn == "ema":
        totals = torch.zeros(planes * codes, dim, device=v.device).index_add_(0, flat, v.float().reshape(-1, dim))
        sum_over_processes(totals)
        book.sums.lerp_(totals.reshape(planes, codes, dim), 1 - DECAY)
        correction = 1 - DECAY**book.steps
        usage, sums = book.usage / correction, book.sums / correction
        total = usage.sum(1, keepdim=True)
        # Laplace smoothing: a code without members would divide by zero. The total stays as it is.
        smooth = (usage + SMOOTHING) / (total + codes * SMOOTHING) * total
        alive = (usage > EMPTY)[..., None]
        book.vectors.copy_(torch.where(alive, sums / smooth[..., None], book.vectors))


@torch.no_grad()
def revive(book: Codebook, v: Tensor) -> int:
    """Put dead codes onto random vectors of a batch; all processes of a distributed run take those of the first one.

    Args:
        book: P planes of K codes. v: the batch, float (N, P, D).

    Returns:
        How many codes this process has moved. Code 0 never is.
    """
    moved = 0
    for plane in range(len(book.vectors)):
        dead = (book.usage[plane] / (1 - DECAY ** book.steps.clamp(min=1)) < DEAD).nonzero()[:, 0]
        dead = dead[dead > 0]
        if len(dead):
            picks = v[torch.randint(len(v), (len(dead),), device=v.device), plane].float()
            book.vectors[plane, dead] = picks
            book.usage[plane, dead] = 1.0
            book.sums[plane, dead] = picks
            moved += len(dead)
    if distributed.is_available() and distributed.is_initialized():
        for tensor in (book.vectors.data, book.usage, book.sums):
            distributed.broadcast(tensor, 0)
    return moved


def books_of(vqvae: VQVAE) -> list[Codebook]:
    """All codebooks, in the order of the network's modules."""
    return [part for part in vqvae.modules() if isinstance(part, Codebook)]


def perplexity(vqvae: VQVAE) -> float:
    """How many codes of a plane are in effective use: 2 to the entropy of their usage, averaged over all planes."""
    values = []
    for level in range(len(vqvae.config.levels)):
        for piece in vqvae.level_slices(level):
            share = piece.codebook.usage / piece.codebook.usage.sum(1, keepdim=True).clamp(min=1e-9)
            values.append(torch.exp(-(share * share.clamp(min=1e-12).log()).sum(1)))
    return float(torch.cat(values).mean())
