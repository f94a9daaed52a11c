"""The figures of the classic systems, and the reader of MNIST's files."""

import copy
import gzip
from dataclasses import replace
from pathlib import Path

import models
import numpy as np
import pytest
from PIL import Image

from bench import classics, digits
from vqcodec import codec, weights
from vqcodec.models import recipes


@pytest.fixture(scope="module")
def raster(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("raster") / "raster.safetensors"
    model = copy.deepcopy(models.raster(layers=1))
    weights.save_model(path, model.config, model.vqvae, model.prior, {})
    return path


def test_figures_are_those_of_the_files(raster: Path) -> None:
    pictures = [models.picture(32, 32, seed) for seed in range(6)]
    found = classics.measure(raster, pictures, batch=4)
    files = [codec.compress(p, weights=raster) for p in pictures]
    restored = np.stack([np.asarray(codec.decompress(f, weights=raster)) for f in files])
    error = np.mean(((restored.astype(float) - np.stack(pictures)) / 255) ** 2)
    variance = np.stack(pictures).var() / 255**2
    assert found["mse, by variance"] == pytest.approx([error, error / variance], rel=0.02)
    assert found["bytes of file"] == np.mean([len(f) for f in files])
    nats = found["nats"]
    assert isinstance(nats, list)
    codes = [16, 64]
    bits = sum(n * c / np.log(2) for n, c in zip(nats, codes, strict=True))
    # Two segments, each rounded up to whole bytes.
    assert bits / 8 <= found["bytes of codes"] + 1 and found["bytes of codes"] < bits / 8 + 8
    assert isinstance(found["loss"], float) and found["loss"] > error / variance
    assert 1 <= found["perplexity"] <= 32


def test_command(raster: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in range(3):
        Image.fromarray(models.picture(16, 24, seed)).save(tmp_path / f"{seed}.png")
    assert classics.main([str(raster), str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [
        "pictures",
        "mse,",
        "loss",
        "perplexity",
        "nats",
        "bytes",
        "bytes",
        "ms",
    ]
    Image.fromarray(models.picture(16, 28, 9)).save(tmp_path / "other.png")
    assert classics.main([str(raster), str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("classics: ")


def test_digits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 3, 4), np.uint8)
    data = b"".join(n.to_bytes(4, "big") for n in (2051, 5, 3, 4)) + pixels.tobytes()
    (tmp_path / "plain").write_bytes(data)
    (tmp_path / "packed.gz").write_bytes(gzip.compress(data))
    assert np.array_equal(digits.read(tmp_path / "plain"), pixels)
    assert digits.main([str(tmp_path / "packed.gz"), str(tmp_path / "out"), "--count", "4"]) == 0
    assert len(list((tmp_path / "out").iterdir())) == 4
    with Image.open(tmp_path / "out" / "00003.png") as picture:
        assert np.array_equal(np.asarray(picture), pixels[3])
    for bad in (data[:-1], b"\0\0\x08\1" + data[4:], b"", b"\x1f\x8b"):
        (tmp_path / "bad").write_bytes(bad)
        assert digits.main([str(tmp_path / "bad"), str(tmp_path / "no")]) == 1
    assert "not a file of MNIST pictures" in capsys.readouterr().err


def test_the_second_operating_point_differs_in_its_codes_alone() -> None:
    found = recipes.load_config(str(Path(__file__).parents[1] / "bench" / "vqvae-mnist-24.json"))
    (stage,) = recipes.VQVAE_MNIST.stages
    few = replace(stage.slices[0], codes=24)
    assert found == replace(recipes.VQVAE_MNIST, stages=(replace(stage, slices=(few,)),))
