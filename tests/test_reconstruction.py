"""FORMAT.md's section on reconstruction, followed in float64 without the package, gives the same pixels within 1."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path

import models
import numpy as np
import pytest
import reference
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vqcodec import bitstream, coding, decoder, synthesis, weights
from vqcodec.bitstream import Container, Header
from vqcodec.models.config import Config, PriorConfig, SliceConfig, StageConfig
from vqcodec.models.layers import Linear1x1, ResidualBlock
from vqcodec.models.pixels import Renderer, SeparableLap
from vqcodec.models.quantizer import Codebook
from vqcodec.models.vqvae import SliceQuantizer
from vqcodec.train.loss import RateDistortion

GOLDEN = Path(__file__).parent / "golden"
WEIGHTS = GOLDEN / "tiny.safetensors"

# Three levels, slices of one and of more dimensions, stages of different groups, a lap and a renderer.
ROWS = Config(
    name="second reader",
    stages=(
        StageConfig(
            8,
            16,
            8,
            1,
            2,
            (
                SliceConfig(6, 1, 16, layer=1, rows=9),
                SliceConfig(2, 3, 24, layer=2, rows=2),
                SliceConfig(2, 2, 16, layer=2, rows=40),
            ),
            lapped=True,
            renderer=12,
            groups=4,
        ),
        StageConfig(16, 24, 8, 1, 0, (SliceConfig(planes=24, dim=1, codes=8, layer=0, rows=5),), groups=8),
        StageConfig(
            64,
            10,
            8,
            1,
            1,
            (SliceConfig(4, 1, 32, layer=0, rows=7), SliceConfig(3, 2, 16, layer=0, rows=3)),
        ),
    ),
    prior=PriorConfig(channels=8, embedding=8, blocks=0),
)
# Two levels without lap and renderer.
RASTER = Config(
    name="second reader of raster order",
    stages=(
        StageConfig(4, 20, 8, 1, 2, (SliceConfig(4, 3, 24, layer=1), SliceConfig(2, 4, 16, layer=2))),
        StageConfig(32, 16, 8, 1, 1, (SliceConfig(planes=1, dim=16, codes=16, layer=0),)),
    ),
    prior=PriorConfig(channels=8, blocks=0, layers=1),
)
HEIGHT, WIDTH = 107, 171


def randomise(model: RateDistortion, seed: int) -> None:
    """Random weights from codes to pixels, so large that latents are of size 1 and nothing is too small to be seen."""
    generator = torch.Generator().manual_seed(seed)

    def fill(tensor: Tensor, size: float, mean: float = 0.0) -> None:
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * size + mean)

    with torch.no_grad():
        for part in model.vqvae.modules():
            if isinstance(part, ResidualBlock):
                for layer, size in ((part.reduce, 1.0), (part.spatial, 1.0), (part.expand, 0.3)):
                    assert layer.bias is not None
                    fill(layer.weight, size / math.sqrt(layer.weight[0].numel()))
                    fill(layer.bias, 0.3 * size)
                fill(part.quality.weight, 0.2)
                fill(part.quality.bias, 0.2)
                part.deviation.copy_(torch.rand(part.deviation.shape, generator=generator) + 0.2)
            elif isinstance(part, SeparableLap):
                fill(part.weight, 0.3 / math.sqrt(part.size))
                part.weight.add_(torch.eye(part.size))
            elif isinstance(part, Renderer):
                for conv in (part.features, part.modulation, part.reduce, part.mix, part.expand):
                    assert conv.bias is not None
                    size = 0.3 if conv is part.expand else 1.0
                    fill(conv.weight, size / math.sqrt(conv.weight[0].numel()))
                    fill(conv.bias, 0.3 * size)
                part.basis.copy_(torch.linalg.qr(torch.randn(part.basis.shape, generator=generator))[0])
                part.deviation.copy_(torch.rand(part.deviation.shape, generator=generator) + 0.2)
                part.detail.copy_(torch.rand(part.detail.shape, generator=generator) + 0.2)
            elif isinstance(part, Linear1x1):
                fill(part.weight, 0.8 / math.sqrt(part.in_features))
            elif isinstance(part, SliceQuantizer):
                fill(part.log_steps, 0.5, math.log(0.5))
            elif isinstance(part, Codebook):
                fill(part.vectors, 1.0)


@pytest.fixture(scope="module", params=[ROWS, RASTER], ids=["rows", "raster"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = RateDistortion(request.param)
    randomise(model, seed=0)
    return models.save(model, tmp_path_factory.mktemp("weights") / "random.safetensors")


def as_arrays(codes: Sequence[Tensor]) -> list[reference.Ints]:
    return [level[0].numpy().astype(np.int64) for level in codes]


def assert_near(found: NDArray[np.uint8], expected: NDArray[np.uint8]) -> None:
    assert found.shape == expected.shape
    gap = np.abs(found.astype(int) - expected)
    assert int(gap.max()) <= 1
    assert float((gap > 0).mean()) < 0.002, "single precision does not explain so many differences"


@pytest.mark.parametrize("quality", [1, 44, 100])
@pytest.mark.parametrize("grey", [False, True], ids=["colour", "grey"])
def test_pixels_by_the_second_reader(path: Path, quality: int, grey: bool) -> None:
    model = weights.load(path)
    header = Header(WIDTH, HEIGHT, quality, model.id, model.config.layers, tile=64, grey=grey)
    codes = models.random_codes(model.vqvae, 128, 192, seed=quality)
    with coding.exact(model):
        expected = synthesis.reconstruct(model, header.frame, codes)[0]
    found = reference.Renderer(reference.Weights(path), quality).pixels(as_arrays(codes), HEIGHT, WIDTH, grey)
    assert_near(found, expected[:, :, 0] if grey else expected)
    share = float(((found > 0) & (found < 255)).mean())
    assert share > 0.7, "clipping would hide differences"
    assert grey or share < 1, "clipping is not tried"


@pytest.mark.parametrize("name", ["tiny", "grey", "raster"])
def test_golden_pixels_by_the_second_reader(name: str) -> None:
    header = bitstream.read_header((GOLDEN / f"{name}.vqz").read_bytes())
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as arrays:
        codes = [arrays[f"level{n}"].astype(np.int64) for n in range(len(arrays.files))]
    weights_file = GOLDEN / "raster.safetensors" if name == "raster" else WEIGHTS
    renderer = reference.Renderer(reference.Weights(weights_file), header.quality)
    with Image.open(GOLDEN / f"{name}.png") as picture:
        expected = np.asarray(picture.convert("L" if header.grey else "RGB"))
    assert_near(renderer.pixels(codes, header.height, header.width, header.grey), expected)


@functools.cache
def golden() -> Container:
    return bitstream.read((GOLDEN / "tiny.vqz").read_bytes())


@pytest.mark.parametrize("missing", [{1}, {2, 5}], ids=str)
def test_missing_segments_by_the_second_reader(missing: set[int]) -> None:
    """Layer 0 of tile 1; layer 1 of tile 0 and layer 2 of tile 1."""
    segments = tuple(None if number in missing else s for number, s in enumerate(golden().segments))
    container = dataclasses.replace(golden(), segments=segments)
    model, header = weights.load(WEIGHTS), container.header
    codes = as_arrays(decoder.decode_codes([container], model))
    loaded = reference.Weights(WEIGHTS)
    boxes = header.frame.tiles()
    for number, (top, left, height, width) in enumerate(boxes):
        unit = loaded.levels[0]["stride"]
        size = -(-height // unit) * unit, -(-width // unit) * unit
        decoded = reference.Tile(loaded, header.quality).decode(segments[number :: len(boxes)], *size)
        for found, level, expected in zip(decoded, loaded.levels, codes, strict=True):
            y, x = top // level["stride"], left // level["stride"]
            assert np.array_equal(found, expected[y : y + found.shape[0], x : x + found.shape[1]])
