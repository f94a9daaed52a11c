"""The configuration: what the named ones say, the way through JSON, and that senseless ones are refused."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
from models import TINY, changed

from vqcodec.errors import WeightsError
from vqcodec.models.config import Config, SliceConfig, StageConfig
from vqcodec.models.recipes import NAMED, PHOTO, VQVAE2, load_config


@pytest.mark.parametrize("config", NAMED.values(), ids=NAMED)
def test_json_round_trip(config: Config) -> None:
    assert Config.from_json(config.to_json()) == config
    assert Config.from_json(json.dumps(json.loads(config.to_json()), indent=2)) == config


def test_levels_are_coarse_first_and_carry_codes() -> None:
    assert [stage.stride for stage in PHOTO.levels] == [64, 16]
    assert [stage.stride for stage in VQVAE2.levels] == [8, 4]
    assert all(stage.slices for stage in PHOTO.levels)
    assert (PHOTO.multiple, PHOTO.layers) == (64, 4)
    assert (TINY.multiple, TINY.layers) == (32, 3)


def test_the_layout_of_the_paper() -> None:
    slices = [piece for stage in VQVAE2.levels for piece in stage.slices]
    assert [(piece.planes, piece.codes) for piece in slices] == [(1, 512), (1, 512)]
    assert VQVAE2.codebook == "ema"


def test_parameters_of_a_symbol() -> None:
    """A row of a stored table; or a mean of each dimension, a square, a linear and the odds of code 0."""
    assert SliceConfig(1, 4, 8, 0, rows=16).parameters == 1
    assert SliceConfig(1, 4, 8, 0).parameters == 7
    assert SliceConfig(3, 1, 8, 0).parameters == 4


def test_a_prior_in_raster_order_has_no_stored_tables_and_any_other_has() -> None:
    """That is what tells whether it learns jointly with the rest."""
    assert PHOTO.joint and TINY.joint and not VQVAE2.joint
    assert 0 < TINY.rate_factor < 1 and VQVAE2.rate_factor == 0
    message = "every slice needs rows with interleaved passes, and none in raster order"
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, prior=dataclasses.replace(TINY.prior, layers=2))
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(VQVAE2, prior=dataclasses.replace(VQVAE2.prior, layers=0))
    for prior in (TINY.prior, VQVAE2.prior):
        mixed = (SliceConfig(4, 1, 16, 0, rows=8), SliceConfig(4, 1, 16, 1))
        with pytest.raises(ValueError, match=message):
            Config("bad", (stage(8, slices=mixed),), prior)


def test_lambdas_are_evenly_spaced_in_the_logarithm() -> None:
    low, high = PHOTO.lambda_range
    expected = [low * (high / low) ** (k / 10) for k in range(11)]
    assert [PHOTO.lambda_of(k / 10) for k in range(11)] == pytest.approx(expected)


def stage(
    stride: int, channels: int = 8, slices: tuple[SliceConfig, ...] | None = None, lapped: bool = False
) -> StageConfig:
    pieces = (SliceConfig(planes=channels, dim=1, codes=16, layer=0, rows=8),) if slices is None else slices
    return StageConfig(stride, channels, hidden=4, encoder_blocks=0, decoder_blocks=0, slices=pieces, lapped=lapped)


def with_layers(*layers: int) -> tuple[SliceConfig, ...]:
    return tuple(SliceConfig(planes=4, dim=1, codes=16, layer=layer, rows=8) for layer in layers)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ((), "there must be a stage"),
        ((stage(6), stage(16)), "whole factors"),
        ((stage(8), stage(8)), "whole factors"),
        ((stage(8), stage(4)), "whole factors"),
        ((stage(4), stage(8, slices=())), "0 of 8 channels"),
        ((stage(4, slices=()), stage(8)), "0 of 8 channels"),
        ((stage(4, slices=with_layers(1, 1)), stage(8, lapped=True)), "only the finest stage can be lapped"),
        ((stage(4, channels=9, slices=with_layers(0, 0)),), "8 of 9 channels"),
        ((stage(4, channels=521),), "more than 520 channels"),
        ((stage(4), stage(96)), "must divide 128"),
        ((stage(4, slices=with_layers(1, 0)),), "layers must be"),
        ((stage(4, slices=with_layers(0, 2)),), "layers must be"),
        ((stage(4, slices=with_layers(0, 0)), stage(8, slices=with_layers(1, 1))), "layers must be"),
    ],
)
def test_stages_that_do_not_fit_together(stages: tuple[StageConfig, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config("bad", stages)


def test_codebook_must_be_known() -> None:
    with pytest.raises(ValueError, match="gradient or ema"):
        dataclasses.replace(TINY, codebook="none")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("planes", 0), ("dim", 0), ("dim", 1.0), ("codes", 2), ("codes", 40000), ("layer", -1)],
        *[("planes", 1041), ("dim", True), ("dim", math.nan), ("codes", "64"), ("layer", 255), ("layer", [0])],
        *[("rows", False), ("rows", 1.0), ("rows", -1)],
    ],
)
def test_sizes_out_of_range(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{name} must be"):
        SliceConfig(**{"planes": 1, "dim": 1, "codes": 16, "layer": 0, name: value})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no json",
        "null",
        "[]",
        "{}",
        '{"name": "x"}',
        changed(["unknown"], 1),
        changed(["stages"], 7),
        changed(["stages"], []),
        changed(["stages", 0, "stride"], "four"),
        changed(["stages", 0, "unknown"], 1),
        changed(["stages", 1, "slices", 0, "codes"], 0),
        changed(["stages", 1, "slices", 0, "codes"], None),
        changed(["prior"], {"channels": -1}),
        changed(["prior"], {"channels": 116}),
        changed(["prior"], {"embedding": 116}),
        changed(["prior"], None),
        changed(["commitment"], -1),
        changed(["commitment"], None),
        changed(["lambda_range"], 3),
        changed(["lambda_range"], [0.1]),
        changed(["lambda_range"], [0.1, 0.001]),
        changed(["lambda_range"], [1e-300, 1e300]),
        changed(["lambda_range"], [0.1, 10**400]),
        changed(["lambda_range"], [True, 2]),
        changed(["lambda_range"], ["a", "b"]),
        changed(["commitment"], 10**400),
        changed(["commitment"], True),
        changed(["commitment"], math.inf),
        changed(["commitment"], math.nan),
        changed(["name"], 7),
        changed(["prior", "blocks"], 10**6),
        changed(["prior", "layers"], True),
        changed(["stages", 0, "channels"], 10**9),
        changed(["stages", 0, "hidden"], 10**9),
        changed(["stages", 0, "encoder_blocks"], 10**6),
        changed(["stages", 1, "decoder_blocks"], 10**6),
        changed(["stages", 1, "renderer"], 16),
        changed(["stages", 1, "lapped"], True),
        changed(["stages", 1, "slices"], []),
        changed(["stages", 0, "slices", 1, "rows"], 0),
        changed(["stages", 0, "groups"], 3),
        changed(["stages", 0, "renderer"], 10**6),
        changed(["stages", 0, "lapped"], 1),
        changed(["stages", 0, "cells"], 7),
        changed(["stages", 0, "cells"], {}),
        changed(["stages", 0, "cells", "hidden"], 0),
        changed(["stages", 0, "cells", "encoder_blocks"], 10**6),
        changed(["stages", 0, "cells", "decoder_groups"], 3),
        changed(["stages", 0, "cells", "unknown"], 1),
        changed(["stages", 1, "cells"], {"hidden": 8, "encoder_blocks": 1, "decoder_blocks": 1}),
        "[" * 1000 + "]" * 1000,
        "[" * 10**6,
        changed(["stages", 0, "stride"], [4] * 10**5),
    ],
    ids=lambda text: text[:40],
)
def test_bad_json(text: str) -> None:
    with pytest.raises(WeightsError, match="not a model configuration") as caught:
        Config.from_json(text)
    assert len(str(caught.value)) < 300


def test_load_config(tmp_path: Path) -> None:
    assert load_config("photo") is PHOTO
    path = tmp_path / "mine.json"
    path.write_text(TINY.to_json(), encoding="utf-8")
    assert load_config(str(path)) == TINY
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(WeightsError, match="cannot read the configuration"):
        load_config(str(path))
    with pytest.raises(WeightsError, match="known are photo, vqvae2, vqvae2-3level, vqvae-mnist, vqvae-ema-cifar10"):
        load_config(str(tmp_path / "missing.json"))
