"""The same networks with more residual blocks: what a larger model starts as, and another look, whose way to the pixels is longer."""

import dataclasses
import re

from vqcodec.models.config import Config
from vqcodec.models.vqvae import VQVAE, ResidualBlock
from vqcodec.weights import Model

# Residual blocks that every stage below the codes has more.
BLOCKS = 2


def look_config(config: Config) -> Config:
    """The configuration of another look: more residual blocks in the decoder's stages below the finest codes."""
    finest = config.levels[-1].stride
    stages = (
        dataclasses.replace(s, decoder_blocks=s.decoder_blocks + BLOCKS * (s.stride < finest)) for s in config.stages
    )
    return dataclasses.replace(config, stages=tuple(stages))


def with_blocks(given: Model, config: Config) -> VQVAE:
    """Given networks with the blocks that a configuration has more, which change nothing yet, and its codebooks."""
    vqvae = VQVAE(config).requires_grad_(False)
    state = given.vqvae.state_dict()
    for name, part in vqvae.named_modules():
        if isinstance(part, ResidualBlock) and f"{name}.deviation" not in state:
            # The block before it knows the scale of the same input.
            before = re.sub(r"further\.0$", "refine", name)
            if before == name:
                before = re.sub(r"\d+$", lambda number: str(int(number[0]) - 1), name)
            own = {**part.state_dict(), "deviation": state[f"{before}.deviation"]}
            state |= {f"{name}.{key}": value for key, value in own.items()}
    for level in range(len(config.levels)):
        for index, piece in enumerate(vqvae.level_slices(level)):
            piece.codebook.take_over(given.vqvae.slice(level, index).codebook)
    vqvae.load_state_dict(state | {k: v for k, v in vqvae.state_dict().items() if ".codebook." in k})
    return vqvae
