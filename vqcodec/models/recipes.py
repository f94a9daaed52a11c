"""The named configurations: the photo model, and the systems of two papers."""

from dataclasses import replace
from pathlib import Path

from vqcodec.errors import WeightsError
from vqcodec.models.config import CellConfig, Config, PriorConfig, SliceConfig, StageConfig

# Most residual blocks are at strides 16 and 64, and four of a few channels at stride 4. A renderer of pointwise layers
# works on the pixels, and probabilities come from stored tables.
PHOTO = Config(
    name="photo",
    stages=(
        StageConfig(
            stride=16,
            channels=288,
            hidden=256,
            encoder_blocks=7,
            decoder_blocks=3,
            slices=(
                SliceConfig(planes=56, dim=1, codes=256, layer=1, rows=128),
                SliceConfig(planes=56, dim=1, codes=256, layer=2, rows=128),
                SliceConfig(planes=176, dim=1, codes=256, layer=3, rows=128),
            ),
            lapped=True,
            renderer=64,
            groups=8,
            cells=CellConfig(hidden=64, encoder_blocks=3, decoder_blocks=1, decoder_groups=4),
        ),
        StageConfig(
            stride=64,
            channels=48,
            hidden=96,
            encoder_blocks=1,
            decoder_blocks=1,
            slices=(
                SliceConfig(planes=3, dim=1, codes=2048, layer=0, rows=128),
                SliceConfig(planes=45, dim=1, codes=512, layer=0, rows=128),
            ),
        ),
    ),
    prior=PriorConfig(channels=56, embedding=32),
)

# The classic systems have one quality. Their codes are chosen for the distortion alone, and the prior learns after the
# rest.

# van den Oord et al. 2017: one level of one plane. A digit of 28 x 28 pixels has 7 x 7 codes.
VQVAE_MNIST = Config(
    name="vqvae-mnist",
    stages=(StageConfig(4, 16, 64, 2, 2, (SliceConfig(planes=1, dim=16, codes=128, layer=0),)),),
    prior=PriorConfig(channels=64, blocks=0, layers=4),
    lambda_range=(0.0025, 0.0026),
    commitment=0.25,
)
# The same with a codebook of exponential moving averages (their appendix A.1). A picture of 32 x 32 has 8 x 8 codes.
VQVAE_EMA_CIFAR10 = Config(
    name="vqvae-ema-cifar10",
    stages=(StageConfig(4, 64, 64, 2, 2, (SliceConfig(planes=1, dim=64, codes=512, layer=0),)),),
    prior=PriorConfig(channels=64, blocks=0, layers=4),
    lambda_range=(0.0025, 0.0026),
    codebook="ema",
    commitment=0.25,
)
# Razavi et al. 2019: levels of one plane each. A picture of 256 x 256 has 32 x 32 and 64 x 64 codes.
VQVAE2 = Config(
    name="vqvae2",
    stages=(
        StageConfig(4, 64, 64, 2, 2, (SliceConfig(planes=1, dim=64, codes=512, layer=1),)),
        StageConfig(8, 64, 128, 2, 2, (SliceConfig(planes=1, dim=64, codes=512, layer=0),)),
    ),
    prior=PriorConfig(channels=64, blocks=1, layers=4),
    lambda_range=(0.0025, 0.0026),
    codebook="ema",
    commitment=0.25,
)
# Their third level for pictures of 1024 x 1024. All levels are at half the strides of theirs.
VQVAE2_3LEVEL = replace(
    VQVAE2,
    name="vqvae2-3level",
    stages=(
        replace(VQVAE2.stages[0], slices=(SliceConfig(planes=1, dim=64, codes=512, layer=2),)),
        replace(VQVAE2.stages[1], slices=(SliceConfig(planes=1, dim=64, codes=512, layer=1),)),
        StageConfig(16, 64, 128, 2, 2, (SliceConfig(planes=1, dim=64, codes=512, layer=0),)),
    ),
)

NAMED = {config.name: config for config in (PHOTO, VQVAE2, VQVAE2_3LEVEL, VQVAE_MNIST, VQVAE_EMA_CIFAR10)}


def load_config(name: str) -> Config:
    """Load a configuration by its name or from a JSON file.

    Raises:
        WeightsError: there is neither a configuration nor a readable JSON configuration of this name.
    """
    if name in NAMED:
        return NAMED[name]
    path = Path(name)
    if not path.is_file():
        raise WeightsError(f"no configuration {name!r}: known are {', '.join(NAMED)}, or give a JSON file")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise WeightsError(f"cannot read the configuration {name}: {error}") from None
    return Config.from_json(text)
