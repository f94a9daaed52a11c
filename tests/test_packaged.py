"""Which weights file is meant, and the classic weights that are in the repository."""

from pathlib import Path

import models
import numpy as np
import pytest
from PIL import Image, ImageDraw

import vqcodec
from vqcodec import codec, metrics, packaged
from vqcodec.errors import WeightsError


def test_find(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert packaged.find(models.tiny_weights()) == models.tiny_weights()
    assert packaged.find(str(models.tiny_weights())) == models.tiny_weights()
    with pytest.raises(WeightsError, match="no weights file .*nowhere"):
        packaged.find(tmp_path / "nowhere")
    package = tmp_path / "vqcodec"
    monkeypatch.setattr(packaged, "__file__", str(package / "packaged.py"))
    with pytest.raises(WeightsError, match=r"photo\.safetensors are missing"):
        packaged.find()
    for folder in (tmp_path / "weights", package / "weights_data"):  # of a checkout, of a wheel
        folder.mkdir(parents=True)
        (folder / "photo.safetensors").touch()
        assert packaged.find() == folder / "photo.safetensors"
        (folder / "digits.safetensors").touch()
        assert packaged.find("digits") == folder / "digits.safetensors"
    for name in ("nothing", "../weights/digits", str(folder / "digits")):
        with pytest.raises(WeightsError, match="no weights file"):
            packaged.find(name)


@pytest.mark.parametrize(
    ("name", "most_bytes", "least_psnr"), [("vqvae-mnist", 60, 25), ("vqvae-ema-cifar10", 110, 24)]
)
def test_classic_weights(name: str, most_bytes: int, least_psnr: float) -> None:
    """Both load by their names, and a picture as they know them comes back about as well as docs/classics.md says."""
    source = digit() if name == "vqvae-mnist" else Image.fromarray(models.picture(32, 32, seed=4))
    data = codec.compress(source, weights=name, verify=True)
    assert len(data) < most_bytes
    restored = codec.decompress(data, weights=name)
    assert (restored.mode, restored.size) == (source.mode, source.size)
    assert metrics.psnr(np.asarray(source.convert("RGB")), np.asarray(restored.convert("RGB"))) > least_psnr


def digit() -> Image.Image:
    """A stroke as of MNIST: white on black, 28 x 28, soft at its edges."""
    picture = Image.new("L", (112, 112))
    ImageDraw.Draw(picture).line([(36, 24), (76, 24), (52, 92)], fill=255, width=11, joint="curve")
    return picture.resize((28, 28), Image.Resampling.BOX)


def test_a_file_finds_the_packaged_weights_that_its_header_names() -> None:
    pixels = models.picture(40, 48)
    data = vqcodec.compress(pixels, weights="vqvae-ema-cifar10", quality=60)
    expected = vqcodec.decompress(data, weights="vqvae-ema-cifar10")
    assert np.array_equal(np.asarray(vqcodec.decompress(data)), np.asarray(expected))


def test_every_packaged_weights_file_is_known_once() -> None:
    names = [path.name for path in packaged.every()]
    assert names[0] == "photo.safetensors" and sorted(set(names)) == sorted(names)
    assert {"vqvae-mnist.safetensors", "vqvae-ema-cifar10.safetensors"} < set(names)
    assert not [name for name in names if "natural" in name]
