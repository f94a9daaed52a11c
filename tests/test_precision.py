"""bfloat16 is used where it is fast, and nowhere else."""

import os
import subprocess
import sys

import pytest
import torch
from models import picture, tiny_model

from vqcodec import precision, search, synthesis
from vqcodec.frame import Frame

CPU = torch.device("cpu")


@pytest.fixture
def anew() -> None:
    precision.bfloat16_pays.cache_clear()


@pytest.mark.parametrize(("half", "single", "pays"), [(1.0, 2.0, True), (1.0, 1.1, False), (50.0, 1.0, False)])
def test_the_faster_type_is_chosen(
    half: float, single: float, pays: bool, anew: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "_seconds", lambda kind: half if kind == torch.bfloat16 else single)
    assert precision.bfloat16_pays(CPU) == pays
    with precision.autocast(CPU):
        assert torch.is_autocast_enabled("cpu") == pays
    precision.bfloat16_pays.cache_clear()


def test_a_cpu_without_bfloat16_computes_in_float32() -> None:
    """oneDNN is told to do without the instructions, as on a CPU with AVX2 alone."""
    command = "import torch; from vqcodec.precision import bfloat16_pays; print(bfloat16_pays(torch.device('cpu')))"
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", command], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("pays", [False, True])
def test_the_search_asks(pays: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()
    convolve = torch.nn.functional.conv2d

    def watched(x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        seen.add(torch.is_autocast_enabled("cpu"))
        return convolve(x, *args, **kwargs)  # type: ignore[arg-type]

    model = tiny_model()
    frame = Frame(64, 64, 50)
    pixels = picture(64, 64)
    latents = synthesis.analyse(model, pixels[None], torch.tensor([50]))
    monkeypatch.setattr(precision, "bfloat16_pays", lambda device: pays)
    monkeypatch.setattr(torch.nn.functional, "conv2d", watched)
    search.improve(model, frame, pixels, latents, 1)
    assert (True in seen) == pays
