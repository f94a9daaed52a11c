"""What an error counts when codes are chosen: its square in pixels, or how much it changes what a picture looks like.

Squared error treats all errors alike. To the eye, by SSIMULACRA2, one in a coarse code plane counts several times as
much as its square says and one in a fine plane half as much, and texture hides what flat areas show. `sensitivity.py`
measures both for given weights; here the measurements become factors on the distortion weight, for every code plane and
for every position. With a share s of the visual distance in the distortion (distortion.py) and a sensitivity r,
relative to squared error, a factor is 1 - s + s r.

Decoders need not know of it: it changes which codes are chosen, not what they mean.
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
# Share of the visual distance in the distortion, as in training.
SHARE = 0.5
LUMA = (0.299, 0.587, 0.114)
BLOCK = 8  # pixels a side, of the blocks whose variance says how much texture there is
# Added to variances, in squared levels: below, differences between flat areas do not matter. And the variance of usual
# texture.
LEAST_VARIANCE, USUAL_VARIANCE = 8.0, 200.0
STRIP = 512  # rows of a picture whose activity is measured at a time


@dataclass(frozen=True)
class Importance:
    """What an error counts in the choice of the codes of one picture.

    Attributes:
        weight: bits per pixel per unit of squared error on the 0..255 scale.
        planes: for each level float (P,), factors on it for its code planes; empty for 1.
        places: float (h, w), factors for the positions of the finest level; None for 1.
        visual: how much a unit of the visual distance counts, in units of squared error. squared: how much squared
            error counts itself.
    """

    weight: float
    planes: tuple[Tensor, ...] = ()
    places: Tensor | None = None
    visual: float = 0.0
    squared: float = 1.0

    def to(self, device: torch.device) -> "Importance":
        """The same with its tensors on a device."""
        places = None if self.places is None else self.places.to(device)
        return replace(self, planes=tuple(p.to(device) for p in self.planes), places=places)

    def of_planes(self, level: int, span: slice) -> Tensor | float:
        """Factors for some planes of a level, float (P,) or 1."""
        return self.planes[level][span] if self.planes else 1.0

    def of_places(self, finest: bool, window: tuple[slice, slice]) -> Tensor | None:
        """Factors for a window of a level's positions, float (h, w), or None."""
        return self.places[window] if finest and self.places is not None else None


@dataclass(frozen=True)
class Tuning:
    """How sensitive the eye is to errors of the codes of certain weights, at a few qualities.

    Attributes:
        qualities: K of them, rising.
        unit: float (K,), squared error that counts as much as a unit of visual distance.
        masking: float (K,), power of the local variance with which the sensitivity goes; negative.
        balance: float (K,), by which the distortion weight is multiplied so that files become as large as without
            tuning.
        planes: for each level float (K, P), sensitivity to errors of each plane, in relation to their square.
    """

    qualities: tuple[int, ...]
    unit: Tensor
    masking: Tensor
    balance: Tensor
    planes: tuple[Tensor, ...]

    def importance(self, config: Config, pixels: NDArray[np.uint8], quality: int, emphasis: float = 1.0) -> Importance:
        """What errors count in a picture.

        Args:
            config: of the weights. pixels: uint8 (H, W, 3). quality: 1..100. emphasis: a factor on the weight.
        """

        def factor(sensitivity: Tensor) -> Tensor:
            return 1 - SHARE + SHARE * sensitivity

        masking = float(self._at(quality, self.masking))
        texture = (activity(pixels, config) + LEAST_VARIANCE) / (USUAL_VARIANCE + LEAST_VARIANCE)
        return Importance(
            weight=emphasis * float(self._at(quality, self.balance.log()).exp()) * _weight(config, quality),
            planes=tuple(factor(self._at(quality, p.log()).exp()) for p in self.planes),
            places=factor(texture**masking),
            visual=SHARE * float(self._at(quality, self.unit.log()).exp()),
            squared=1 - SHARE,
        )

    def _at(self, quality: int, values: Tensor) -> Tensor:
        """Rows of values (K, ...) interpolated linearly; beyond the ends as at them."""
        high = min(max(sum(q < quality for q in self.qualities), 1), len(self.qualities) - 1)
        first, last = self.qualities[high - 1], self.qualities[high]
        return torch.lerp(values[high - 1], values[high], min(max((quality - first) / (last - first), 0.0), 1.0))

    def save(self, path: Path, weights_id: bytes) -> None:
        """Write it beside weights, atomically; see `path_of`."""
        fields: dict[str, Any] = {"format": FORMAT, "weights": weights_id.hex(), "qualities": self.qualities}
        fields |= {name: _digits(getattr(self, name)) for name in ("unit", "masking", "balance")}
        fields["planes"] = [_digits(level) for level in self.planes]
        files.write_atomically(path, (json.dumps(fields, indent=0) + "\n").encode())


def flat(config: Config, quality: int, emphasis: float = 1.0) -> Importance:
    """Squared error alone."""
    return Importance(emphasis * _weight(config, quality))


def path_of(weights: Path) -> Path:
    """Where the tuning of weights is: beside them."""
    return weights.with_suffix(SUFFIX)


def load(path: Path, config: Config, weights_id: bytes) -> Tuning | None:
    """Read what `Tuning.save` wrote for these weights; None if there is no file.

    Raises:
        WeightsError: unreadable, or of other weights.
    """
    try:
        fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if fields["format"] != FORMAT:
            raise ValueError(f"format {fields['format']!r}")
        of = fields["weights"]
        qualities = tuple(map(int, fields["qualities"]))
        unit, masking, balance = (torch.tensor(fields[k], dtype=torch.float32) for k in ("unit", "masking", "balance"))
        planes = tuple(torch.tensor(level, dtype=torch.float32) for level in fields["planes"])
        tuning = Tuning(qualities, unit, masking, balance, planes)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise WeightsError(f"{path} is not a visual tuning: {error}") from None
    if of != weights_id.hex():
        raise WeightsError(f"{path} is of weights {of!r}, not of {weights_id.hex()!r}")
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
    """How much texture there is: the mean variance of luma in the small blocks of each position of the finest level.

    Args:
        pixels: uint8 (H, W, 3).

    Returns:
        float (h, w), squared levels, over the padded picture.
    """
    stride, unit = config.levels[-1].stride, config.multiple
    height, width = pixels.shape[:2]
    block = min(BLOCK, stride)
    found = []
    for top in range(0, height, STRIP):
        luma = torch.from_numpy(pixels[top : top + STRIP] @ np.array(LUMA, np.float32))[None, None]
        down = -height % unit if top + STRIP >= height else 0
        luma = functional.pad(luma, (0, -width % unit, 0, down), mode="replicate")
        means, squares = functional.avg_pool2d(luma, block), functional.avg_pool2d(luma.square(), block)
        found.append(functional.avg_pool2d((squares - means.square()).clamp(min=0), stride // block)[0, 0])
    return torch.cat(found)


def _weight(config: Config, quality: int) -> float:
    return config.lambda_of((quality - 1) / 99)


def _digits(values: Tensor) -> Any:
    """As nested lists, to four significant digits."""
    if values.ndim:
        return [_digits(row) for row in values]
    return float(f"{float(values):.4g}")
