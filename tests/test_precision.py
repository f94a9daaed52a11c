"""bfloat16 is used where it is fast, and nowhere else."""

import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from models import picture, tiny_model

from vqcodec import packaged, precision, search, synthesis, weights
from vqcodec.frame import Frame

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def anew() -> Iterator[None]:
    precision.bfloat16_pays.cache_clear()
    yield
    precision.bfloat16_pays.cache_clear()


@pytest.mark.parametrize(("half", "single", "pays"), [(1.0, 2.0, True), (1.0, 1.1, False), (50.0, 1.0, False)])
def test_the_faster_type_is_chosen(half: float, single: float, pays: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU whose flags are unknown."""
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    monkeypatch.setattr(precision, "_seconds", lambda kind: half if kind == torch.bfloat16 else single)
    assert precision.bfloat16_pays(CPU) == pays
    with precision.autocast(CPU):
        assert torch.is_autocast_enabled("cpu") == pays


@pytest.mark.parametrize(
    ("tiles", "vectors", "vendor", "pays"),
    [
        (False, False, "AuthenticAMD", False),
        (False, True, "AuthenticAMD", True),
        (False, True, "GenuineIntel", False),
        (True, True, "GenuineIntel", True),
    ],
)
@pytest.mark.parametrize("linux", [False, True])
def test_flags_of_a_cpu_are_believed(
    tiles: bool, vectors: bool, vendor: str, pays: bool, linux: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A busy machine must not change what files hold."""
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(platform, "processor", lambda: "" if linux else f"AMD64 Family 26 Model 2 Stepping 1, {vendor}")
    monkeypatch.setattr(precision, "CPU_INFO", tmp_path / "cpuinfo")
    if linux:
        precision.CPU_INFO.write_text(f"processor\t: 0\nvendor_id\t: {vendor}\nmodel name\t: Zwölfkern®\n", "utf-8")
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: tiles)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: vectors)
    monkeypatch.setattr(precision, "_seconds", lambda kind: pytest.fail("timed"))
    assert precision.bfloat16_pays(CPU) == pays


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


@pytest.mark.parametrize("quality", [5, 50, 95])
def test_the_encoder_asks(quality: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16 latents are off by small parts of a step: the main path stays in float32."""
    model, pixels = weights.load(packaged.find()), picture(128, 192)
    found = []
    for pays in (False, True):
        monkeypatch.setattr(precision, "bfloat16_pays", lambda device, pays=pays: pays)
        found.append(synthesis.analyse(model, pixels[None], torch.tensor([quality])))
    for level, single, narrow in zip(model.levels, *found, strict=True):
        for piece in level.slices:
            moved = (narrow - single)[:, piece.channels] / piece.step(torch.tensor([quality]))
            assert 0 < moved.abs().mean() < 0.003
            assert moved.abs().max() < 0.05
