"""The KLT start: an untrained network that is a codec already.

The 1x1 convolutions become the principal components of their inputs. Every residual block ends in zeros as it is made.
So the network starts as a hierarchical Karhunen-Loeve transform; if its finest stage is lapped, as a lapped one.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from vqcodec.models.config import CELL
from vqcodec.models.layers import ResidualBlock
from vqcodec.models.vqvae import PIXEL_CENTRE, PIXEL_SCALE, VQVAE, Stage

# Of the lapped transform: 1 would be orthogonal. More compacts the energy better but spreads errors.
LAP_SCALE = 1.3
# Inputs of a transform whose principal components are computed; see `principal_components`.
MOST_INPUTS = 768


@torch.no_grad()
def start_from_pictures(vqvae: VQVAE, pixels: Tensor) -> None:
    """Set the transforms, the deviations of every residual block's input, and the spread of every code plane.

    Args:
        vqvae: a new network, on the CPU. pixels: training crops, float (B, 3, H, W), 0..255, H and W multiples of
            `Config.multiple`.
    """
    x = (pixels - PIXEL_CENTRE) / PIXEL_SCALE
    if vqvae.config.stages[0].renderer or vqvae.config.stages[0].cells:
        _start_cells(vqvae.stage(0), functional.pixel_unshuffle(x, CELL))
    for index, config in enumerate(vqvae.config.stages):
        stage = vqvae.stage(index)
        if stage.lap is not None and stage.unlap is not None:
            line = lapped_filter(config.stride)
            stage.lap.weight.copy_(line)
            stage.unlap.weight.copy_(torch.linalg.inv(line))
            x = stage.lap(x)
        inputs = functional.pixel_unshuffle(x, stage.ratio)
        components = principal_components(inputs, config.channels)
        stage.analysis.weight.copy_(components)
        stage.synthesis.weight.copy_(components.T)
        x = functional.conv2d(inputs, components[:, :, None, None])
        deviation = x.square().mean((0, 2, 3)).sqrt()
        blocks: list[nn.Module] = [*stage.encoder, *stage.decoder]
        for piece in vqvae.level_slices(vqvae.config.levels.index(config)):
            if piece.refine is not None:
                blocks.append(piece.refine)
            energy = deviation[piece.start : piece.stop].reshape(piece.planes, piece.dim).mean(1)
            middle = piece.steps(torch.tensor([50]))[0]
            piece.codebook.spread.copy_(torch.exp2((energy / middle / 2).clamp(min=1).log2().round()))
        typical = _typical(deviation)
        for block in blocks:
            assert isinstance(block, ResidualBlock)
            block.deviation.copy_(typical)
        if stage.renderer is not None:
            stage.renderer.deviation.copy_(typical)


def _start_cells(stage: Stage, cells: Tensor) -> None:
    """Set the bases and deviations of what works on cells of pixels, (B, 48, h, w)."""
    basis = principal_components(cells, cells.shape[1])
    deviation = functional.conv2d(cells, basis[:, :, None, None]).square().mean((0, 2, 3)).sqrt()
    if stage.renderer is not None:
        stage.renderer.basis.copy_(basis)
        stage.renderer.detail.copy_(deviation)
    for part in (stage.cell_encoder, stage.cell_decoder):
        if part is not None:
            part.basis.copy_(basis)
            for block in part.blocks:
                assert isinstance(block, ResidualBlock)
                block.deviation.copy_(_typical(deviation))


def _typical(deviation: Tensor) -> Tensor:
    """The deviations (C,) that a residual block divides its input by: none is much smaller than the others."""
    return deviation + 0.05 * deviation.max() / math.sqrt(len(deviation)) + 1e-4


def lapped_filter(size: int) -> Tensor:
    """The filter across the border between two blocks of a DCT of `size` pixels: half of it lies on each side.

    It is the one from DCT-II and DCT-IV of Tran, Liang & Tu 2003, "Lapped transform via time-domain pre- and
    post-filtering", with its first basis function scaled by `LAP_SCALE`.

    Returns:
        float64 (size, size).
    """
    half = size // 2
    k, n = torch.arange(half, dtype=torch.float64)[:, None], torch.arange(half, dtype=torch.float64)[None] + 0.5
    dct2, dct4 = (torch.cos(math.pi * n * (k + shift) / half) * (2 / half) ** 0.5 for shift in (0.0, 0.5))
    dct2[0] /= 2**0.5
    dct4[0] *= LAP_SCALE
    first, second = torch.diag(torch.tensor([1.0, 0.0])).double(), torch.diag(torch.tensor([0.0, 1.0])).double()
    same = torch.eye(half, dtype=torch.float64)
    butterfly = torch.kron(first - second, same) + torch.kron(torch.tensor([[0, 1.0], [1.0, 0]]).double(), same.flip(0))
    middle = torch.kron(first, same) + torch.kron(second, (dct2.T @ dct4).flip(0, 1))
    return butterfly @ middle @ butterfly / 2


def principal_components(x: Tensor, count: int, limit: int = MOST_INPUTS) -> Tensor:
    """Leading principal directions, about the origin, of the channels of a map.

    With more than `limit` channels only the first ones are looked at. The inputs are an unshuffled map whose channels
    come in decreasing energy, so the later ones of every group hold next to nothing of what the leading directions
    span.

    Args:
        x: float (B, C, h, w). count: of the directions. limit: see above.

    Returns:
        orthonormal rows, float32 (count, C); zeros beyond `limit` rows.
    """
    channels = x.shape[1]
    keep = torch.arange(channels)
    if channels > limit:
        # pixel_unshuffle orders channels (c, row, column): the first ones belong to the strongest input channels.
        keep = keep[:limit]
    flat = x[:, keep].transpose(0, 1).reshape(len(keep), -1).double()
    _, vectors = torch.linalg.eigh(flat @ flat.T / flat.shape[1])
    rows = torch.zeros(count, channels)
    found = vectors.flip(1).T[:count].float()
    # A direction and its negative are equally good; fix the sign so that starts are reproducible.
    found = found * found.sum(1, keepdim=True).sign().where(found.sum(1, keepdim=True) != 0, torch.ones(()))
    rows[: len(found), keep] = found
    return rows
