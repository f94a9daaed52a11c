"""Made pictures, a tiny seeded model in which nothing is trivial, and what several test files do with codes."""

import atexit
import functools
import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vqcodec import coding, weights
from vqcodec.bitstream import Header
from vqcodec.models.config import CellConfig, Config, PriorConfig, SliceConfig, StageConfig
from vqcodec.models.integers import QualityBias
from vqcodec.models.layers import ResidualBlock
from vqcodec.models.model import Model
from vqcodec.models.pixels import Renderer
from vqcodec.models.prior import Prior, SlicePrior
from vqcodec.models.quantizer import Codebook
from vqcodec.models.vqvae import VQVAE, SliceQuantizer
from vqcodec.train.loss import RateDistortion
from vqcodec.train.start import start_from_pictures
from vqcodec.tuning import Tuning, path_of

Pixels = NDArray[np.uint8]

# Trains in a test: everything the photo model has, in miniature.
TINY = Config(
    name="tiny",
    stages=(
        StageConfig(
            8,
            24,
            16,
            1,
            1,
            (
                SliceConfig(planes=8, dim=1, codes=64, layer=1, rows=128),
                SliceConfig(planes=4, dim=4, codes=32, layer=2, rows=20),
            ),
            lapped=True,
            renderer=16,
            groups=2,
            cells=CellConfig(8, 2, 1, 1, 2),
        ),
        StageConfig(32, 12, 16, 1, 1, (SliceConfig(planes=12, dim=1, codes=512, layer=0, rows=60),)),
    ),
    prior=PriorConfig(channels=16, embedding=16),
)


def changed(path: Sequence[Any], value: Any, config: Config = TINY) -> str:
    """A configuration as JSON, with another value in a place."""
    tree = json.loads(config.to_json())
    node = tree
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    return json.dumps(tree)


def picture(height: int, width: int, seed: int = 0) -> Pixels:
    """uint8 (height, width, 3): a gradient, Gabor patches and straight edges, as photos have; no noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / max(height, width)
    slope = rng.uniform(-60, 60, (3, 2))
    image = 128 + slope[:, 0, None, None] * (y - 0.5) + slope[:, 1, None, None] * (x - 0.5)
    for _ in range(6):
        angle, frequency, spread = rng.uniform(0, np.pi), rng.uniform(10, 60), rng.uniform(0.1, 0.4)
        centre_y, centre_x = rng.uniform(0, 1, 2)
        along = (y - centre_y) * np.sin(angle) + (x - centre_x) * np.cos(angle)
        near = np.exp(-((y - centre_y) ** 2 + (x - centre_x) ** 2) / spread**2)
        colour = rng.uniform(0.5, 1, 3) * rng.choice([-1, 1])
        image = image + 35 * colour[:, None, None] * near * np.sin(frequency * along + rng.uniform(0, 6))
        image = image + rng.uniform(-25, 25, 3)[:, None, None] * (along > rng.uniform(0, 0.3))
    return np.clip(np.rint(image), 0, 255).astype(np.uint8).transpose(1, 2, 0).copy()


def shapes(vqvae: VQVAE, prior: Prior | None = None) -> dict[str, tuple[int, ...]]:
    """Shapes of tensors, by their names in a weights file."""
    parts = {"vqvae": vqvae} if prior is None else {"vqvae": vqvae, "prior": prior}
    return {
        f"{part}.{name}": tuple(tensor.shape)
        for part, module in parts.items()
        for name, tensor in module.state_dict().items()
    }


def batch(*images: Pixels) -> Tensor:
    """Pictures of one size -> float (B, 3, H, W), 0..255."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float()


def tiny(config: Config = TINY, seed: int = 0, shake: float = 1.0) -> RateDistortion:
    """A model on its KLT start, shaken: every weight that starts at zero is not, and the prior's outputs vary.

    Args:
        shake: how much the residual blocks do, which the other half of the codec does not undo; about 100 times more
            changes pixels by some units.
    """
    generator = torch.Generator().manual_seed(seed)

    def noise(like: Tensor, size: float) -> Tensor:
        return torch.randn(like.shape, generator=generator) * size

    torch.manual_seed(seed)
    model = RateDistortion(config)
    start_from_pictures(model.vqvae, batch(*(picture(256, 256, s) for s in range(4))))
    with torch.no_grad():
        for part in model.modules():
            if isinstance(part, ResidualBlock):
                part.expand.weight += noise(part.expand.weight, 0.015 * shake)
                part.quality.weight += noise(part.quality.weight, 0.1)
            elif isinstance(part, Renderer):
                for layer in (part.modulation, part.expand):
                    layer.weight += noise(layer.weight, 0.02)
            elif isinstance(part, SliceQuantizer):
                part.log_steps += noise(part.log_steps, 0.1)
            elif isinstance(part, Codebook):
                part.vectors[:, 1:] += noise(part.vectors[:, 1:], 0.03)
                part.bias += noise(part.bias, 0.5)
            elif isinstance(part, QualityBias):
                part.curve += noise(part.curve, 0.1)
            elif isinstance(part, SlicePrior):
                part.head.weight *= 6
                assert part.head.bias is not None
                part.head.bias += noise(part.head.bias, 12 / part.head.unit)
                if part.piece.rows:
                    # Rows of narrow distributions, whose code 0 is likelier than any other.
                    part.head.bias -= (45 + 5 * part.piece.dim) / part.head.unit
    return model


def save(model: RateDistortion, path: Path) -> Path:
    """Write a weights file; freezes the prior."""
    weights.save_model(path, model.config, model.vqvae, model.prior, {"made by": "tests/models.py"})
    return path


@functools.cache
def tiny_weights(shake: float = 1.0) -> Path:
    """The weights file of `tiny(shake=shake)`, made once."""
    folder = tempfile.TemporaryDirectory(prefix="vqcodec-tests-")
    atexit.register(folder.cleanup)
    return save(tiny(shake=shake), Path(folder.name) / "tiny.safetensors")


def shaken_weights() -> Path:
    """Weights whose decoder adds what its encoder does not know of, so that a search finds much better latents."""
    return tiny_weights(30.0)


def tiny_model() -> Model:
    """`tiny_weights`, loaded."""
    return weights.load(tiny_weights())


def visual_tuning(config: Config = TINY) -> Tuning:
    """A made tuning: every plane has a sensitivity of its own at every quality."""
    generator = torch.Generator().manual_seed(1)
    planes = [sum(piece.planes for piece in stage.slices) for stage in config.levels]
    return Tuning(
        qualities=(10, 50, 90),
        unit=torch.tensor([6.0, 4.0, 3.0]),
        masking=torch.tensor([-0.1, -0.3, -0.4]),
        balance=torch.tensor([1.2, 0.9, 0.7]),
        planes=tuple((0.7 * torch.randn(3, count, generator=generator)).exp() for count in planes),
    )


def tuned_weights(folder: Path, plain: Path | None = None) -> Path:
    """A copy of weights, by default `tiny_weights`, with `visual_tuning` beside it."""
    path = Path(shutil.copy(plain or tiny_weights(), folder / "tuned.safetensors"))
    visual_tuning().save(path_of(path), weights.load(path).id)
    return path


def random_codes(model: VQVAE, height: int, width: int, seed: int = 0) -> list[Tensor]:
    """int64 (1, h, w, P) per level for a picture of this size, a multiple of `Config.multiple`; small ones likelier."""
    generator = torch.Generator().manual_seed(seed)
    codes = []
    for level, stage in enumerate(model.config.levels):
        h, w = height // stage.stride, width // stage.stride
        parts = []
        for piece in model.level_slices(level):
            size = piece.codebook.config.codes
            share = torch.rand(1, h, w, piece.planes, generator=generator)
            parts.append((share**3 * size).long().clamp(max=size - 1))
        codes.append(torch.cat(parts, -1))
    return codes


def code_inputs(model: VQVAE, codes: list[Tensor]) -> list[list[Tensor]]:
    """What the prior sees of codes: per level and slice, float (1, 2 P D, h, w)."""
    inputs = []
    for level, level_codes in enumerate(codes):
        first, parts = 0, []
        for piece in model.level_slices(level):
            indices = level_codes[0, :, :, first : first + piece.planes]
            table = piece.codebook.inputs()
            planes = torch.arange(piece.planes)
            parts.append(table[planes, indices].flatten(2).permute(2, 0, 1)[None])
            first += piece.planes
        inputs.append(parts)
    return inputs


def run_prior(prior: Prior, inputs: list[list[Tensor]], quality: int = 50) -> list[Tensor]:
    """Parameters of all symbols, given all codes: per slice, in coding order, (B, h, w, P, parameters).

    Args:
        inputs: as from `code_inputs`, with any batch size.
    """
    found: list[Tensor] = []
    state: Tensor | None = None
    for level, level_inputs in enumerate(inputs):
        count, _, h, w = level_inputs[0].shape
        qualities = torch.full((count,), quality)
        state = prior.level(level).begin(state, qualities, count, h, w)
        for index, codes in enumerate(level_inputs):
            part = prior.level(level).slice(index)
            state, context = part.prepare(state, qualities)
            parameters = torch.zeros(count, h, w, part.piece.planes, part.piece.parameters, dtype=codes.dtype)
            known = torch.zeros_like(codes)
            with torch.no_grad():
                for places, here in part.walk(context, known):
                    target = parameters[:, places[0], places[1]]
                    parameters[:, places[0], places[1]] = here.reshape(target.shape)
                    at = (slice(None), slice(None), *places)
                    known[at] = codes[at]
            state = part.update(state, codes)
            found.append(parameters)
    return found


def encode_codes(model: Model, header: Header, codes: list[Tensor]) -> list[bytes]:
    """Segments of given codes (as `codec.decode_codes` returns them): the encoder without its choice."""
    with coding.exact(model):
        return coding.encode(model, header.frame, codes)[0]


def raster(layers: int = 3, seed: int = 0) -> RateDistortion:
    """A shaken model with a prior in raster order: two levels of one plane each, K = 32, at strides 4 and 8."""
    config = Config(
        name="raster",
        stages=(
            StageConfig(4, 16, 16, 1, 1, (SliceConfig(planes=1, dim=16, codes=32, layer=1),)),
            StageConfig(8, 16, 16, 1, 1, (SliceConfig(planes=1, dim=16, codes=32, layer=0),)),
        ),
        prior=PriorConfig(channels=16, embedding=16, blocks=1, layers=layers),
        commitment=0.25,
    )
    return tiny(config, seed)


# Every kind of model that decodes differently.
KINDS: dict[str, Callable[[], RateDistortion]] = {
    "tiny": tiny,
    "raster": lambda: raster(layers=2),
}
