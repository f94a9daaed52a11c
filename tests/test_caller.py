"""What the calling program has set in torch changes neither files nor pictures."""

import contextlib
import functools
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import models
import numpy as np
import pytest
import torch
from commandline import process

from vqcodec import bitstream, codec, decoder, sampling, weights
from vqcodec.models.quantizer import structured_start

Setting = Callable[[], AbstractContextManager[object]]


@contextlib.contextmanager
def changed(read: Callable[[], object], write: Callable[..., object], value: object) -> Iterator[None]:
    before = read()
    write(value)
    try:
        yield
    finally:
        write(before)


def default_dtype(kind: torch.dtype) -> Setting:
    return lambda: changed(torch.get_default_dtype, torch.set_default_dtype, kind)


def default_device(name: str) -> Setting:
    return lambda: changed(lambda: None, torch.set_default_device, name)


def matmul_precision(name: str) -> Setting:
    return lambda: changed(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, name)


def deterministic() -> AbstractContextManager[object]:
    return changed(torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True)


SAME = {
    "float64": default_dtype(torch.float64),
    "bfloat16": default_dtype(torch.bfloat16),
    "float16": default_dtype(torch.float16),
    "meta": default_device("meta"),
    "with meta": lambda: torch.device("meta"),
    "no gradients": lambda: torch.set_grad_enabled(False),
    "inference mode": torch.inference_mode,
    "deterministic": deterministic,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}
ROUNDED = {
    "medium": matmul_precision("medium"),
    "high": matmul_precision("high"),
    "without oneDNN": lambda: torch.backends.mkldnn.flags(enabled=False),
}


@functools.cache
def weights_of(kind: str) -> Path:
    """Small weights of each kind."""
    if kind == "raster":
        return models.save(models.raster(), models.tiny_weights().with_name("raster.safetensors"))
    return models.tiny_weights()


def results(path: Path) -> tuple[bytes, bytes, bytes, bytes]:
    """A file as a search makes it, its pixels, what its coarsest level makes of it, and a sample; nothing is cached."""
    weights._load.cache_clear()
    source = models.picture(40, 50)
    data = codec.compress(source, weights=path, device="cpu", effort=2)
    pixels = np.asarray(codec.decompress(data, weights=path, device="cpu"))
    coarse, *_ = codec.reconstruct(codec.image.from_pil(codec.Image.fromarray(source)), weights=path, device="cpu")
    (sample,) = sampling.sample(1, weights_file=path, height=32, width=32, device="cpu")
    return data, pixels.tobytes(), coarse.tobytes(), sample.tobytes()


@functools.cache
def usual(kind: str) -> tuple[bytes, bytes, bytes, bytes]:
    return results(weights_of(kind))


@pytest.mark.parametrize(("kind", "name"), [("raster", "float64"), *(("tiny", name) for name in SAME)])
def test_settings_that_change_nothing(kind: str, name: str) -> None:
    expected = usual(kind)
    with SAME[name]():
        assert results(weights_of(kind)) == expected
    again = codec.compress(models.picture(40, 50), weights=weights_of(kind), device="cpu", effort=2)
    assert again == expected[0], "of the model that was loaded under the setting, too"


@pytest.mark.filterwarnings("ignore:TF32 acceleration")  # torch sets all flags of oneDNN at once
@pytest.mark.parametrize("name", ROUNDED)
def test_settings_that_round_otherwise(name: str) -> None:
    """Pixels may differ by what their rounding makes of it; codes may not."""
    source, path = models.picture(70, 90), models.tiny_weights()

    def decoded(data: bytes) -> tuple[list[torch.Tensor], np.ndarray]:
        weights._load.cache_clear()
        codes = decoder.decode_codes([bitstream.read(data)], weights.load(path))
        return codes, np.asarray(codec.decompress(data, weights=path, device="cpu"), np.int64)

    plain = codec.compress(source, weights=path, device="cpu")
    with ROUNDED[name]():
        rounded = codec.compress(source, weights=path, device="cpu", verify=True)
        under = [decoded(data) for data in (plain, rounded)]
    for (codes, pixels), data in zip(under, (plain, rounded), strict=True):
        expected_codes, expected_pixels = decoded(data)
        assert all(torch.equal(a, b) for a, b in zip(codes, expected_codes, strict=True))
        assert np.abs(pixels - expected_pixels).max() <= 2


@pytest.mark.parametrize("dim", [1, 2, 3, 16])
def test_codebooks_start_alike(dim: int) -> None:
    expected = structured_start(64, dim)
    with SAME["float16"]():
        found = structured_start(64, dim)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


CALLER = """
import sys
import torch
torch.set_default_dtype(torch.float16)
torch.set_default_device("meta")
import numpy, vqcodec
pixels = numpy.load(sys.argv[1])
data = vqcodec.compress(pixels, weights=sys.argv[2], device="cpu")
vqcodec.decompress(data, weights=sys.argv[2], device="cpu").save(sys.argv[3])
sys.stdout.buffer.write(data)
assert torch.get_default_device().type == "meta" and torch.get_default_dtype() == torch.float16
"""


def test_settings_from_before_the_import(tmp_path: Path) -> None:
    """The codec is imported when it is first asked for: then its constants are made."""
    source, path, restored = models.picture(70, 90), models.tiny_weights(), tmp_path / "restored.png"
    np.save(tmp_path / "source.npy", source)
    ran = process("-c", CALLER, str(tmp_path / "source.npy"), str(path), str(restored), stdin=subprocess.DEVNULL)
    data, errors = ran.communicate(timeout=120)
    assert ran.returncode == 0, errors.decode()
    assert data == codec.compress(source, weights=path, device="cpu")
    with codec.Image.open(restored) as found:
        assert np.array_equal(found, codec.decompress(data, weights=path, device="cpu"))
