"""The shapes that a configuration asks for are those of the networks, and account for most of them."""

import pytest
from models import TINY, raster

from vqcodec.models.config import Config
from vqcodec.models.recipes import NAMED
from vqcodec.models.shapes import large_tensors
from vqcodec.weights import _blank

CONFIGS = [*NAMED.values(), TINY, raster().config]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_shapes_are_those_of_the_networks(config: Config) -> None:
    networks = dict(zip(("vqvae", "prior", "tables"), _blank(config), strict=True))
    real = {f"{name}.{k}": tuple(v.shape) for name, part in networks.items() for k, v in part.state_dict().items()}
    asked = dict(large_tensors(config))
    assert asked.items() <= real.items()
    numbers = sum(v.numel() for part in networks.values() for v in part.state_dict().values())
    known = sum(networks[k.split(".")[0]].get_parameter(k.split(".", 1)[1]).numel() for k in asked if "tables" not in k)
    assert known > numbers / 10
    assert len(asked) > len(real) / 20
