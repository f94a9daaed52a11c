"""Counts the parameters and the operations of a model by the names and shapes of its tensors, and so without torch."""

import math
from collections.abc import Mapping, Sequence

from vqcodec.models.config import CELL, Config

Shapes = Mapping[str, Sequence[int]]  # of the tensors in a weights file, by name

_LEARNED = {"weight", "bias", "vectors", "family", "log_steps"}
_CURVE = 4  # coefficients of each channel of an `integers.QualityBias`, of which files hold a table
_SIDE = dict.fromkeys(("cell_encoder", "lap", "analysis", "encoder"), "encoder")  # all other parts of a stage decode


def parameters(shapes: Shapes) -> int:
    """The number of learned parameters of a model with these tensors."""
    total = 0
    for name, shape in shapes.items():
        network, last = name.split(".")[0], name.split(".")[-1]
        if network != "tables":
            total += math.prod(shape) if last in _LEARNED else _CURVE * shape[-1] if last == "table" else 0
    return total


def macs_per_pixel(config: Config, shapes: Shapes) -> dict[str, float]:
    """Multiply-accumulate operations per picture pixel of "encoder", "refinement", "decoder" and "prior".

    Only convolutions count: the conditioning on the quality happens once a picture.

    Raises:
        ValueError, LookupError, OverflowError: names and shapes are not those of a model with this configuration.
    """
    found = dict.fromkeys(("encoder", "refinement", "decoder", "prior"), 0.0)
    for name, shape in shapes.items():
        network, kind, index, *path = name.split(".")
        if path[-1] != "weight" or "quality" in path:
            continue
        if network == "prior":
            found["prior"] += _of_prior(config, int(index), path) * math.prod(shape)
        elif kind == "slices":
            found["refinement"] += math.prod(shape) / config.levels[int(index)].stride ** 2
        else:
            stride = config.stages[int(index)].stride
            found[_SIDE.get(path[0], "decoder")] += _of_stage(stride, path, shape) * math.prod(shape)
    return found


def _of_stage(stride: int, path: list[str], shape: Sequence[int]) -> float:
    """How often a picture pixel needs a weight of this tensor of a stage, on average."""
    if path in (["lap", "weight"], ["unlap", "weight"]):  # `pixels.SeparableLap`: along rows and columns, 3 channels
        return 2 * shape[0] * 3 / stride**2
    if path[0].startswith("cell_") or (path[0] == "renderer" and path[1] in ("reduce", "mix", "expand")):
        return 1 / CELL**2
    return 1 / stride**2


def _of_prior(config: Config, level: int, path: list[str]) -> float:
    """How often a picture pixel needs a weight of this tensor of a level of the prior, on average."""
    positions = 1 / config.levels[level].stride ** 2
    if path[0] == "expand":
        return 1 / config.levels[level - 1].stride ** 2  # it runs at the coarser level
    if "phases" in path:
        return positions / 4
    # With interleaved passes, `near` runs before three of four phases.
    return positions * 3 if path[-2] == "near" and not config.prior.layers else positions
