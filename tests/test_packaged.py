"""Which weights file is meant."""

from pathlib import Path

import models
import pytest

from vqcodec import packaged
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
