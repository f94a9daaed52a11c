"""Trained weights as the start of a run."""

import torch
from torch import nn

from vqcodec.models.vqvae import VQVAE, ResidualBlock


@torch.no_grad()
def load_networks(vqvae: VQVAE, given: VQVAE) -> None:
    """Load trained networks, of the same configuration or of that whose look is trained (`Config.look`).

    A look has decoder blocks of its own. They add nothing at first, and know the scale of their input from the block before them.
    """
    vqvae.load_state_dict(vqvae.state_dict() | given.state_dict())
    for index in range(len(vqvae.stages)):
        known = given.stage(index).decoder
        for block in vqvae.stage(index).decoder[len(known) :]:
            last = known[-1]
            assert isinstance(block, ResidualBlock) and isinstance(last, ResidualBlock)
            block.deviation.copy_(last.deviation)
            for parameter in block.expand.parameters():
                nn.init.zeros_(parameter)
