"""Weights files that nobody's training wrote: nothing but WeightsError comes out, before networks are made."""

import json
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import TINY
from safetensors import safe_open
from safetensors.torch import load_file, save

from vqcodec import weights, weights_file
from vqcodec.errors import WeightsError

fixed = settings(derandomize=True, deadline=None, database=None, max_examples=80)
numbers = st.integers(-(10**30), 10**30) | st.integers(-2, 600) | st.floats() | st.booleans()
anything = st.recursive(
    st.none() | numbers | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
KINDS = (torch.uint8, torch.int8, torch.int64, torch.bool, torch.float16, torch.float32, torch.float64, torch.complex64)
KINDS += (torch.float8_e4m3fn, torch.bfloat16)


def metadata() -> dict[str, str]:
    with safe_open(models.tiny_weights(), framework="pt") as file:
        return dict(file.metadata())


def paths(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The places of all fields of a tree of JSON."""
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [p for key, value in inner for p in [(*path, key), *paths(value, (*path, key))]]


PATHS = paths(json.loads(TINY.to_json()))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mutated") / "weights.safetensors"


def load_or_refuse(file: Path, data: bytes) -> bool:
    """Whether a file loads. Refusing takes one line."""
    file.write_bytes(data)
    try:
        weights.load(file)
    except WeightsError as error:
        assert "\n" not in str(error) and len(str(error)) < 3000
        return False
    return True


def slices(count: int) -> list[dict[str, int]]:
    return [{"planes": 1, "dim": 1, "codes": 3, "layer": 0, "rows": 2} for _ in range(count)]


CELLS = {"hidden": 8, "encoder_blocks": 1, "decoder_blocks": 1}


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        (("stages", 0, "slices", 0, "codes"), 32768, "slices.1.0.codebook.vectors"),
        (("stages", 0, "slices", 0, "rows"), 100, "tables.levels.1.0.counts"),
        (("stages", 0, "channels"), 8192, "slices cover 24 of 8192 channels"),
        (("stages", 0, "stride"), 16, "stages.0.analysis.weight"),
        (("stages", 0, "renderer"), 8192, "stages.0.renderer.modulation.weight"),
        (("stages", 0, "cells", "hidden"), 8192, "stages.0.cell_encoder.blocks.0.reduce.weight"),
        (("stages", 0, "cells", "encoder_blocks"), 256, "stages.0.cell_encoder.blocks.2.reduce.weight"),
        (("stages", 0, "cells", "decoder_groups"), 1, "stages.0.cell_decoder.blocks.0.spatial.weight"),
        (("stages", 1, "hidden"), 8192, "stages.1.encoder.0.reduce.weight"),
        (("stages", 1, "encoder_blocks"), 256, "stages.1.encoder.1.reduce.weight"),
        (("stages", 0, "decoder_blocks"), 256, "stages.0.decoder.1.reduce.weight"),
        (("stages", 0, "groups"), 1, "stages.0.encoder.0.spatial.weight"),
        (("prior", "blocks"), 256, "prior.levels.0.slices.0.blocks.1.spread.weight"),
        (("prior", "channels"), 115, "prior.levels.0.slices.0.head.weight"),
        (("prior", "channels"), 10**9, "channels must be"),
        (("stages", 1, "encoder_blocks"), 10**6, "encoder_blocks must be"),
        (("stages", 1, "slices"), slices(10**5), "slices cover 100000 of 12 channels"),
        (("stages", 1, "slices"), slices(12), "slices.0.0.codebook.vectors"),
    ],
)
def test_a_configuration_is_compared_with_the_file_before_networks_are_made(
    path: tuple[Any, ...], value: Any, named: str, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "_blank", lambda _: pytest.fail("networks were made"))
    file.write_bytes(save(load_file(models.tiny_weights()), {**metadata(), "config": models.changed(path, value)}))
    for use in (weights.load, weights_file.describe):
        with pytest.raises(WeightsError, match=named):
            use(file)


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        (("stages", 0, "renderer"), 8192, "stages.0.renderer.features.weight"),
        (("stages", 0, "lapped"), True, "stages.0.lap.weight"),
        (("stages", 0, "cells"), CELLS, "stages.0.cell_encoder.blocks.0.reduce.weight"),
        (("stages", 1, "slices", 0, "codes"), 32768, "slices.0.0.codebook.vectors"),
        (("prior", "layers"), 256, "prior.levels.0.slices.0.layers.2.vertical.weight"),
        (("prior", "layers"), 0, "needs rows"),
    ],
)
def test_a_configuration_that_asks_for_more_than_the_file_has(
    path: tuple[Any, ...], value: Any, named: str, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a model in raster order without a lap, a renderer and blocks on cells."""
    model = models.raster(layers=2)
    models.save(model, file)
    with safe_open(file, framework="pt") as opened:
        own = {**opened.metadata(), "config": models.changed(path, value, model.config)}
    monkeypatch.setattr(weights, "_blank", lambda _: pytest.fail("networks were made"))
    file.write_bytes(save(load_file(file), own))
    for use in (weights.load, weights_file.describe):
        with pytest.raises(WeightsError, match=named):
            use(file)


@given(st.sampled_from(PATHS), anything)
@fixed
def test_any_configuration(file: Path, path: tuple[Any, ...], value: Any) -> None:
    load_or_refuse(file, save(load_file(models.tiny_weights()), {**metadata(), "config": models.changed(path, value)}))


@given(st.data())
@fixed
def test_any_tensors(file: Path, data: st.DataObject) -> None:
    tensors = load_file(models.tiny_weights())
    for _ in range(data.draw(st.integers(1, 2))):
        name = data.draw(st.sampled_from(sorted(tensors)))
        tensor = tensors.pop(name)
        kind = data.draw(st.sampled_from(["values", "kind", "shape", "name", "gone"]))
        if kind == "values":
            value = data.draw(st.sampled_from([0, 1, -128, 127, 2**31 - 1, -(2**62), float("nan"), float("inf"), 1e30]))
            tensor = torch.full_like(tensor.double(), value)
            tensor = tensor.to(data.draw(st.sampled_from([torch.int64, torch.float32])))
        elif kind == "kind":
            tensor = tensor.to(data.draw(st.sampled_from(KINDS)))
        elif kind == "shape":
            shape = data.draw(st.lists(st.integers(0, 5), max_size=5))
            tensor = torch.zeros(shape, dtype=tensor.dtype)
        if kind != "gone":
            tensors[data.draw(st.text(max_size=3)) if kind == "name" else name] = tensor.contiguous()
    load_or_refuse(file, save(tensors, metadata()))


@given(st.integers(0, 12_000), st.binary(min_size=1, max_size=4))
@fixed
def test_any_bytes(file: Path, place: int, replacement: bytes) -> None:
    data = models.tiny_weights().read_bytes()
    load_or_refuse(file, data[:place] + replacement + data[place + len(replacement) :])
