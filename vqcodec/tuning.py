"""The distortion weights that the encoder chooses codes with: plain squared error, or tuned for the eye.

Squared error treats all errors alike. By SSIMULACRA2, an error in a coarse code plane matters several times as much as
its square and one in a fine plane half as much, and texture masks errors that flat areas show. train/sensitivity.py
measures both effects for given weights. This module turns the measurements into factors on the distortion weight, for
each code plane and for each position: 1 - s + s r for a sensitivity r relative to squared error. The share s is less
than that of the visual distance in training, because the transforms have learned for a choice by squared error: their
scales have most of r already.

Only the choice of codes changes. Decoders need not know of the tuning.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from vqcodec import files
from vqcodec.errors import WeightsError
from vqcodec.models.config import Config

SUFFIX = ".visual.json"
FORMAT = "vqcodec visual tuning 1"
SHARE = 0.5  # of the visual distance in the distortion of a whole picture, as in training
CHOICE_SHARE = 0.1  # the same in the choice of single codes
LUMA = (0.299, 0.587, 0.114)
BLOCK = 8  # side of the blocks in which texture is measured, in pixels
# Variances in squared 8-bit levels. The first is added to every variance, so that noise does not tell flat areas apart;
# at the second, the factor is 1.
LEAST_VARIANCE, USUAL_VARIANCE = 8.0, 200.0
STRIP = 512  # pixel rows whose activity is measured at a time, which bounds memory


@dataclass(frozen=True)
class Importance:
    """Distortion weights for the choice of the codes of B pictures of one size.

    Attributes:
        weight: lambda, in bits per pixel per unit of mean squared error on the 0..255 scale.
        planes: for each level float (P,), factors on `weight` for its code planes; empty for 1.
        places: float (B, h, w), factors for the positions of the finest level; None for 1.
        visual, squared: the distortion of a whole picture is squared * mse + visual * visual distance. The search uses
            it; `planes` and `places` approximate it symbol by symbol.
    """

    weight: float
    planes: tuple[Tensor, ...] = ()
    places: Tensor | None = None
    visual: float = 0.0
    squared: float = 1.0

    def to(self, device: torch.device) -> "Importance":
        """A copy with its tensors on a device."""
        places = None if self.places is None else self.places.to(device)
        return replace(self, planes=tuple(p.to(device) for p in self.planes), places=places)

    def of_planes(self, level: int, span: slice) -> Tensor | float:
        """The factors of some planes of a level: float (P,), or 1."""
        return self.planes[level][span] if self.planes else 1.0

    def of_places(self, finest: bool, place: tuple[slice, slice, slice]) -> Tensor | None:
        """The factors of some pictures in some rows and columns of a level's grid: float (b, h, w), or None for 1."""
        return self.places[place] if finest and self.places is not None else None


@dataclass(frozen=True)
class Tuning:
    """The eye's sensitivity to coding errors of some weights, measured at K qualities.

    Attributes:
        qualities: the K qualities, ascending, 1..100.
        unit: float (K,), the mean squared error that matters as much as a visual distance of 1.
        masking: float (K,), exponent m: sensitivity goes with (local variance)^m. Negative.
        balance: float (K,), factor on the distortion weight that keeps file sizes as they are without tuning.
        planes: for each level float (K, P), sensitivity to errors in each plane relative to their squared error.
    """

    qualities: tuple[int, ...]
    unit: Tensor
    masking: Tensor
    balance: Tensor
    planes: tuple[Tensor, ...]

    def importance(self, config: Config, pixels: NDArray[np.uint8], quality: int, emphasis: float = 1.0) -> Importance:
        """The distortion weights for pictures.

        Args:
            config: of the weights. pixels: uint8 (B, H, W, 3). quality: 1..100.
            emphasis: factor on the distortion weight, for rates between two qualities.
        """

        def factor(sensitivity: Tensor) -> Tensor:
            return 1 - CHOICE_SHARE + CHOICE_SHARE * sensitivity

        masking = float(self._at(quality, self.masking))
        texture = (activity(pixels, config) + LEAST_VARIANCE) / (USUAL_VARIANCE + LEAST_VARIANCE)
        return Importance(
            weight=emphasis * float(self._at(quality, self.balance.log()).exp()) * _lagrangian(config, quality),
            planes=tuple(factor(self._at(quality, p.log()).exp()) for p in self.planes),
            places=factor(texture**masking),
            visual=SHARE * float(self._at(quality, self.unit.log()).exp()),
            squared=1 - SHARE,
        )

    def _at(self, quality: int, values: Tensor) -> Tensor:
        """Interpolate values (K, ...) linearly between the measured qualities; clamp outside."""
        high = min(max(sum(q < quality for q in self.qualities), 1), len(self.qualities) - 1)
        first, last = self.qualities[high - 1], self.qualities[high]
        return torch.lerp(values[high - 1], values[high], min(max((quality - first) / (last - first), 0.0), 1.0))

    def save(self, path: Path, weights_id: bytes) -> None:
        """Write the tuning to a file, atomically; see `path_of` for its place."""
        fields: dict[str, Any] = {"format": FORMAT, "weights": weights_id.hex(), "qualities": self.qualities}
        fields |= {name: _digits(getattr(self, name)) for name in ("unit", "masking", "balance")}
        fields["planes"] = [_digits(level) for level in self.planes]
        files.write_atomically(path, (json.dumps(fields, indent=0) + "\n").encode())


def flat(config: Config, quality: int, emphasis: float = 1.0) -> Importance:
    """The distortion weights of plain squared error. Args: as `Tuning.importance`."""
    return Importance(emphasis * _lagrangian(config, quality))


def path_of(weights: Path) -> Path:
    """The path of the tuning of a weights file: beside it."""
    return weights.with_suffix(SUFFIX)


def load(path: Path, config: Config, weights_id: bytes) -> Tuning | None:
    """Read the tuning of weights from a file that `Tuning.save` wrote; None if there is no file.

    Args:
        path: see `path_of`. config: of the weights. weights_id: 4 bytes.

    Raises:
        WeightsError: the file is unreadable, belongs to other weights, or does not fit their configuration.
    """
    try:
        fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if fields["format"] != FORMAT:
            raise ValueError(f"format {fields['format']!r}")
        owner = fields["weights"]
        qualities = tuple(map(int, fields["qualities"]))
        unit, masking, balance = (torch.tensor(fields[k], dtype=torch.float32) for k in ("unit", "masking", "balance"))
        planes = tuple(torch.tensor(level, dtype=torch.float32) for level in fields["planes"])
        tuning = Tuning(qualities, unit, masking, balance, planes)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise WeightsError(f"{path} is not a visual tuning: {error}") from None
    if owner != weights_id.hex():
        raise WeightsError(f"{path} is of weights {owner!r}, not of {weights_id.hex()!r}")
    count = len(qualities)
    shapes = [(count, sum(piece.planes for piece in stage.slices)) for stage in config.levels]
    positive = (tuning.unit, tuning.balance, *tuning.planes)
    if (
        count < 2
        or list(qualities) != sorted(set(qualities))
        or [tuple(p.shape) for p in tuning.planes] != shapes
        or any(x.shape != (count,) for x in (tuning.unit, tuning.masking, tuning.balance))
        or not all(bool((x > 0).all() and x.isfinite().all()) for x in positive)
        or not bool(tuning.masking.isfinite().all())
    ):
        raise WeightsError(f"{path} does not fit its weights")
    return tuning


def activity(pixels: NDArray[np.uint8], config: Config) -> Tensor:
    """Measure texture: the variance of luma within small blocks, averaged over each position of the finest level.

    Args:
        pixels: uint8 (B, H, W, 3). config: of the weights.

    Returns:
        float32 (B, h, w) over the padded pictures, in squared 8-bit levels.
    """
    stride, unit = config.levels[-1].stride, config.multiple
    height, width = pixels.shape[1:3]
    block = min(BLOCK, stride)
    strips = []
    for top in range(0, height, STRIP):
        luma = torch.from_numpy(pixels[:, top : top + STRIP] @ np.array(LUMA, np.float32))[:, None]
        down = -height % unit if top + STRIP >= height else 0
        luma = functional.pad(luma, (0, -width % unit, 0, down), mode="replicate")
        means, squares = functional.avg_pool2d(luma, block), functional.avg_pool2d(luma.square(), block)
        strips.append(functional.avg_pool2d((squares - means.square()).clamp(min=0), stride // block)[:, 0])
    return torch.cat(strips, 1)


def _lagrangian(config: Config, quality: int) -> float:
    return config.lambda_of((quality - 1) / 99)


def _digits(values: Tensor) -> Any:
    """Convert to nested lists of numbers with four significant digits."""
    if values.ndim:
        return [_digits(row) for row in values]
    return float(f"{float(values):.4g}")
