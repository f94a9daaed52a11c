import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

import vqcodec
from vqcodec import errors

TINY = Path(__file__).parent / "golden" / "tiny.vqz"
WEIGHTS = TINY.with_suffix(".safetensors")


def modules_after(code: str) -> set[str]:
    code = f"import atexit, sys; atexit.register(lambda: print(*sys.modules, file=sys.stderr)); {code}"
    environment = {**os.environ, "PYTHONPATH": str(Path(vqcodec.__file__).parents[1])}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    return set(ran.stderr.split())


def test_public_names():
    exceptions = {name for name, value in vars(errors).items() if isinstance(value, type)}
    functions = {"compress", "compress_many", "decompress", "decompress_many", "read_info"}
    assert set(vqcodec.__all__) == exceptions | functions | {"Target", "__version__"}
    assert dir(vqcodec) == sorted(vqcodec.__all__)
    for name in exceptions:
        assert getattr(vqcodec, name) is getattr(errors, name)


def test_unknown_names():
    with pytest.raises(AttributeError, match="no attribute 'decode'"):
        _ = vqcodec.decode


def test_codec_is_loaded_when_asked_for(monkeypatch):
    codec = ModuleType("vqcodec.codec")
    codec.compress, codec.decompress = object(), object()
    monkeypatch.setitem(sys.modules, "vqcodec.codec", codec)
    monkeypatch.setattr(vqcodec, "codec", codec, raising=False)
    assert vqcodec.compress is codec.compress
    assert vqcodec.decompress is codec.decompress


def test_import_is_light():
    assert modules_after("import vqcodec; vqcodec.read_info").isdisjoint({"torch", "numpy", "click"})


@pytest.mark.parametrize("arguments", [["--help"], ["compress", "--help"], ["info", str(TINY)], ["info", "--weights"]])
def test_commands_that_compute_nothing_are_light(arguments):
    assert modules_after(f"from vqcodec.cli import main; main({arguments})").isdisjoint({"torch", "numpy"})


@pytest.mark.parametrize("arguments", [["compress", "in.png", "-o", "out"], ["decompress", str(TINY), "-o", "out.png"]])
def test_commands_import_no_more_of_torch_than_they_need(tmp_path, arguments):
    """What `import torch` does not import, but a call of `torch.compile` or of a metric might."""
    Image.new("RGB", (20, 30)).save(tmp_path / "in.png")
    arguments += ["--weights", str(WEIGHTS)]
    found = modules_after(f"import os; os.chdir({str(tmp_path)!r}); from vqcodec.cli import main; main({arguments})")
    assert "torch" in found and (tmp_path / arguments[3]).exists()
    assert found.isdisjoint({"torch._dynamo", "torch._inductor", "torchvision", "lpips", "scipy", "matplotlib"})


@pytest.mark.parametrize("module", ["image", "metrics"])
def test_pixels_do_not_need_torch(module):
    assert modules_after(f"import vqcodec.{module}").isdisjoint({"torch", "click", "scipy"})
