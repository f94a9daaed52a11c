"""What is built for distribution: whole, without what only developers need, and of use where it is installed."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import models
import numpy as np
import pytest
from PIL import Image

from vqcodec import __version__, metrics

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
NOT_SOURCE = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "out")


def python(*arguments: str, cwd: Path, **environment: str) -> None:
    subprocess.run([sys.executable, *arguments], cwd=cwd, env={**os.environ, **environment}, check=True)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an sdist, and with the wheel that was built from it."""
    tools = ("build", "setuptools", "twine")
    missing = [tool for tool in tools if not any(importlib.metadata.distributions(name=tool))]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}: pip install -e '.[dist]'")
    folder = tmp_path_factory.mktemp("built")
    shutil.copytree(ROOT, folder / "source", ignore=NOT_SOURCE)
    python("-m", "build", "--no-isolation", "--outdir", str(folder / "dist"), str(folder / "source"), cwd=folder)
    return folder / "dist"


def wheel(built: Path) -> Path:
    return built / f"vqcodec-{__version__}-py3-none-any.whl"


def test_the_wheel_holds_the_package_and_the_weights_that_it_uses(built: Path) -> None:
    sources = [*(ROOT / "vqcodec").rglob("*.py"), *(ROOT / "vqcodec/studio/web").iterdir()]
    package = {path.relative_to(ROOT).as_posix() for path in sources}
    weights = [path for kind in ("safetensors", "json", "md") for path in (ROOT / "weights").glob(f"*.{kind}")]
    with zipfile.ZipFile(wheel(built)) as file:
        held = {name for name in file.namelist() if ".dist-info/" not in name}
    assert held == package | {"vqcodec/py.typed"} | {f"vqcodec/weights_data/{path.name}" for path in weights}


def test_the_sdist_holds_the_sources(built: Path) -> None:
    with tarfile.open(built / f"vqcodec-{__version__}.tar.gz") as file:
        held = {name.split("/")[1] for name in file.getnames() if "/" in name}
    documents = {"CHANGELOG.md", "FORMAT.md", "README.md"}
    made = {"PKG-INFO", "setup.cfg", "vqcodec.egg-info"}
    assert held == documents | made | {"MANIFEST.in", "pyproject.toml", "vqcodec", "weights"}


def test_an_index_would_take_both(built: Path) -> None:
    python("-m", "twine", "check", "--strict", *map(str, built.iterdir()), cwd=built)


def test_what_is_installed_compresses_with_its_own_weights(built: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    install = ("-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", str(site), str(wheel(built)))
    python(*install, cwd=tmp_path)
    pixels = models.picture(40, 48)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    found = "import sys, vqcodec; assert vqcodec.__file__.startswith(sys.argv[1]), vqcodec.__file__"
    for arguments in (
        ("-c", found, str(site)),
        ("-m", "vqcodec", "compress", "a.png"),
        ("-m", "vqcodec", "decompress", "a.vqz", "-o", "b.png"),
        ("-m", "vqcodec", "decompress", "a.vqz", "--look", "natural", "-o", "c.png"),
    ):
        python(*arguments, cwd=tmp_path, PYTHONPATH=str(site))
    for restored in ("b.png", "c.png"):
        assert metrics.psnr(pixels, np.asarray(Image.open(tmp_path / restored))) > 20
