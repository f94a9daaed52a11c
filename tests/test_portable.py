"""Nothing in the package needs POSIX, the encoding of a locale, or "/" between folders."""

import ast
import ntpath
import os
from pathlib import Path

import commandline
import models
import numpy as np
import pytest
from PIL import Image

from vqcodec import files, metrics

SOURCES = [path for folder in ("vqcodec", "bench") for path in sorted((commandline.ROOT / folder).rglob("*.py"))]

# What the package stands on may use what the system has. Everything of the package is imported after that is gone.
WITHOUT_POSIX = """
import importlib, os, pkgutil, signal, sys
import click, constriction, numpy, PIL.Image, safetensors.torch, torch

for name in ("fcntl", "grp", "posix", "pwd", "resource", "termios", "tty"):
    sys.modules[name] = None  # importing it fails
for module, names in (
    (os, "chown fork getpgid getuid geteuid killpg link mkfifo pread pwrite sched_getaffinity setsid statvfs uname"),
    (signal, "SIGALRM SIGHUP SIGKILL SIGPIPE SIGQUIT SIGUSR1 alarm pthread_sigmask setitimer sigwait"),
):
    for name in names.split():
        vars(module).pop(name, None)

import vqcodec
for module in pkgutil.walk_packages(vqcodec.__path__, "vqcodec."):
    try:
        importlib.import_module(module.name)
    except ModuleNotFoundError as error:  # of an extra that is not installed
        if error.name not in ("lpips", "pyarrow", "ray", "starlette", "torchvision", "uvicorn"):
            raise
from vqcodec.cli import main
for arguments in (["compress", "a.png"], ["decompress", "a.vqz", "-o", "b.png"]):
    try:
        main([*arguments, "--weights", sys.argv[1]])
    except SystemExit as end:
        if end.code:
            raise
"""


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Paths are those of Windows, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "path", ntpath)
    monkeypatch.setattr(os, "sep", "\\")


def test_commands_need_nothing_of_posix(tmp_path: Path) -> None:
    pixels = models.picture(40, 48)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    ran = commandline.process("-c", WITHOUT_POSIX, str(models.tiny_weights()), cwd=tmp_path)
    _, errors = ran.communicate(timeout=300)
    assert ran.returncode == 0, errors.decode()
    assert sorted(os.listdir(tmp_path)) == ["a.png", "a.vqz", "b.png"]
    assert metrics.psnr(pixels, np.asarray(Image.open(tmp_path / "b.png"))) > 20


@pytest.mark.usefixtures("windows")
def test_a_backslash_ends_the_name_of_a_folder_where_it_separates_names() -> None:
    Path("a.png").touch()
    for output in ("out\\", "out/"):
        (job,) = files.plan(["a.png"], output, suffixes=(".png",), new_suffix=".vqz")
        assert (job.target, job.folder) == (f"{output}a.vqz", output)
        files.check(job, overwrite=False)  # the folder will be made


@pytest.mark.usefixtures("windows")
def test_a_drive_that_is_not_there_is_an_error() -> None:
    with pytest.raises(FileNotFoundError):
        files.check(files.Job(files.STREAM, "Z:\\out\\a.vqz", "Z:\\out\\"), overwrite=False)


def test_text_files_name_their_encoding() -> None:
    calls = [(path, node) for path in SOURCES for node in ast.walk(ast.parse(path.read_text("utf-8")))]
    texts = [(path, node) for path, node in calls if isinstance(node, ast.Call) and opens_text(node)]
    assert len(texts) > 10
    assert [f"{path}: {ast.unparse(call)}" for path, call in texts if not names_encoding(call)] == []


def opens_text(call: ast.Call) -> bool:
    name = ast.unparse(call.func)
    method = name.rpartition(".")[2]
    binary = any(isinstance(value, ast.Constant) and value.value in ("rb", "r+b", "wb", "xb") for value in call.args)
    return method in ("read_text", "write_text") or (
        method == "open"
        and name not in ("Image.open", "os.open", "opened.open", "studio.open", "tarfile.open")
        and not binary
    )


def names_encoding(call: ast.Call) -> bool:
    given = call.args + [keyword.value for keyword in call.keywords]
    return any(ast.unparse(value) in ("'utf-8'", "stream.encoding") for value in given)
