"""Several processes at work on files: they are real, and the codec in them is not."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from commandline import ROOT, process, tree
from PIL import Image

# What a picture does to the process that works on it depends on its width.
FINE, DEADLY, SLOW = 4, 5, 6
PROGRAM = f"""
import os, signal, sys, time, types
import vqcodec
from vqcodec.cli import main
torch = sys.modules["torch"] = types.ModuleType("torch")
torch.set_num_threads = lambda count: None
codec = sys.modules["vqcodec.codec"] = vqcodec.codec = types.ModuleType("vqcodec.codec")
def wait(name):
    open(f"../{{name}}-{{os.getpid()}}", "w").close()
    time.sleep(60)
def compress(picture, **_):
    width = picture.pixels.shape[1]
    if width == {DEADLY}:
        os.kill(os.getpid(), signal.SIGKILL)
    if width == {SLOW} and "HURRY" not in os.environ:
        wait("begun")
    return open({str(ROOT / "tests" / "golden" / "tiny.vqz")!r}, "rb").read()
codec.compress = compress
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background start without it
    main()
elif "WAIT" in os.environ:
    wait("starting")
"""


@pytest.fixture(autouse=True)
def _in_a_folder_of_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "in").mkdir()
    monkeypatch.chdir(tmp_path / "in")


def paint(**widths: int) -> None:
    for name, width in widths.items():
        Image.new("RGB", (width, 4)).save(f"{name}.png")


def start(*options: str, **variables: str) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    return process("../program.py", "compress", ".", "--jobs", "2", *options, env=environment, start_new_session=True)


def wait_for(name: str, count: int) -> None:
    end = time.monotonic() + 60
    while len(list(Path("..").glob(f"{name}-*"))) < count:
        assert time.monotonic() < end, f"no {name}"
        time.sleep(0.02)


def test_a_process_that_is_killed_costs_one_file() -> None:
    paint(a=FINE, b=DEADLY, c=FINE, d=FINE)
    ran = start("--json", "--rm")
    out, err = ran.communicate(timeout=60)
    told = {line["source"]: line for line in map(json.loads, out.splitlines())}
    reason = "./b.png: its process was killed by signal 9, maybe for lack of memory"
    assert ran.returncode == 1 and f"vqcodec: {reason}\n" in err.decode()
    assert err.splitlines()[-1].startswith(b"vqcodec: 3 of 4 files done, 1 failed; ")
    assert len(err.splitlines()) == 5
    assert {name: line["status"] for name, line in told.items()} == {
        "./a.png": "done",
        "./b.png": "failed",
        "./c.png": "done",
        "./d.png": "done",
    }
    assert told["./b.png"]["error"] == reason
    assert tree() == ["a.vqz", "b.png", "c.vqz", "d.vqz"]


@pytest.mark.parametrize(
    ("number", "to_all", "status", "said"),
    [
        (signal.SIGINT, True, 130, ["vqcodec: interrupted"]),
        (signal.SIGINT, False, 130, ["vqcodec: interrupted"]),
        (signal.SIGTERM, True, 143, []),
        (signal.SIGTERM, False, 143, []),
        (signal.SIGKILL, False, -9, []),
    ],
)
def test_signals_end_all_processes(number: signal.Signals, to_all: bool, status: int, said: list[str]) -> None:
    """Ctrl-C goes to all processes of a terminal, kill to one."""
    paint(a=FINE, b=SLOW, c=SLOW, d=FINE)
    ran = start()
    first = ran.stderr.readline()
    wait_for("begun", 2)
    (os.killpg if to_all else os.kill)(ran.pid, number)
    out, err = ran.communicate(timeout=30)  # until no process has these streams any more
    assert (ran.returncode, out, first.startswith(b"./a.png -> ./a.vqz: ")) == (status, b"", True)
    assert [line for line in err.decode().splitlines() if line] == said
    assert tree() == ["a.png", "a.vqz", "b.png", "c.png", "d.png"]


def test_ctrl_c_while_processes_start() -> None:
    paint(a=FINE, b=FINE)
    ran = start(WAIT="1")
    wait_for("starting", 2)
    os.killpg(ran.pid, signal.SIGINT)
    out, err = ran.communicate(timeout=30)
    assert (ran.returncode, out, err.split()) == (130, b"", [b"vqcodec:", b"interrupted"])
    assert tree() == ["a.png", "b.png"]


def test_an_interrupted_batch_goes_on() -> None:
    paint(a=FINE, b=SLOW, c=SLOW)
    ran = start()
    ran.stderr.readline()  # of the first file
    wait_for("begun", 2)
    ran.send_signal(signal.SIGTERM)
    ran.communicate(timeout=30)
    made = os.stat("a.vqz").st_ino
    ran = start("--skip-existing", HURRY="1")
    _, err = ran.communicate(timeout=60)
    assert ran.returncode == 0
    assert err.splitlines()[-1].startswith(b"vqcodec: 2 of 3 files done, 1 skipped, 0 failed; ")
    assert os.stat("a.vqz").st_ino == made
    assert tree() == ["a.png", "a.vqz", "b.png", "b.vqz", "c.png", "c.vqz"]
