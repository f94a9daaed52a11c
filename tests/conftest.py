"""Pictures made on the spot, so that the tests need no files."""

from collections.abc import Callable
from pathlib import Path

import models
import numpy as np
import pytest
from numpy.typing import NDArray

MakePhoto = Callable[..., NDArray[np.uint8]]


@pytest.fixture(scope="session")
def make_photo() -> MakePhoto:
    """make_photo(height, width, seed=0): uint8 (height, width, 3) with smooth parts, edges and noise."""

    def make(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
        rng = np.random.default_rng(seed)
        y, x = np.mgrid[:height, :width]
        waves = [np.sin(y / a + rng.random() * 6) + np.cos(x / b) for a, b in rng.uniform(5, 40, (3, 2))]
        photo = 128 + 50 * np.stack(waves, axis=-1) + rng.normal(0, 4, (height, width, 3))
        photo[height // 3 : height // 2, width // 4 :] -= 60
        return np.clip(np.rint(photo), 0, 255).astype(np.uint8)

    return make


@pytest.fixture(scope="session")
def tiny_weights() -> Path:
    """A weights file of `models.TINY`."""
    return models.tiny_weights()
