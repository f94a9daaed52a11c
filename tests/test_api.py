import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import vqcodec
from vqcodec import errors


def modules_after(code: str) -> set[str]:
    code += "; import sys; print(*sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(Path(vqcodec.__file__).parents[1])}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    return set(ran.stdout.split())


def test_public_names():
    exceptions = {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert set(vqcodec.__all__) == exceptions | {"Target", "__version__", "compress", "decompress", "read_info"}
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
    assert modules_after("import vqcodec; vqcodec.read_info").isdisjoint({"torch", "numpy", "PIL", "click"})


@pytest.mark.parametrize("module", ["image", "metrics"])
def test_pixels_do_not_need_torch(module):
    assert modules_after(f"import vqcodec.{module}").isdisjoint({"torch", "click", "scipy"})
