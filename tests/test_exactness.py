"""bench.exactness: golden files give the same codes with other threads and instruction sets, and it would notice."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"

from bench import exactness
from bench.exactness import Variant

X86 = platform.machine().lower() in ("x86_64", "amd64")


def jobs() -> list[exactness.Job]:
    return [exactness.golden(file) for file in sorted(GOLDEN.glob("*.vqz"))]


def test_threads_and_instruction_sets(capsys: pytest.CaptureFixture[str]) -> None:
    if not X86:
        pytest.skip("the instruction sets to choose from are those of x86-64 processors")
    assert exactness.compare(jobs(), [exactness.TWO_THREADS, exactness.AVX2])
    printed = capsys.readouterr().out
    assert printed.count(": equal") == 4  # three files, and integers at their bounds
    assert "AVX2        cpu, AVX2\n" in printed
    assert printed.endswith("\nall equal\n")


@pytest.mark.slow
def test_everything_there_is() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench.exactness"], cwd=ROOT, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.gpu
def test_cuda() -> None:
    assert exactness.compare(jobs(), [exactness.PLAIN, exactness.CUDA])


def test_differences_are_noticed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("tiny.vqz", "tiny.safetensors"):
        shutil.copy(GOLDEN / name, tmp_path)
    with np.load(GOLDEN / "tiny.npz") as arrays:
        codes = {name: arrays[name] for name in arrays.files}
    codes["level1"][0, 0, 0] += 1
    np.savez(tmp_path / "tiny.npz", **codes)
    monkeypatch.setattr(exactness, "_bounds_in_integers", lambda: "0")
    assert not exactness.compare([exactness.golden(tmp_path / "tiny.vqz")], [exactness.PLAIN])
    printed = capsys.readouterr().out
    assert printed.count(": DIFFERENT") == 2
    assert printed.endswith("\nNOT EQUAL\n")


def test_variants_reach_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment is what differs between them: it must be set before torch is imported."""
    seen: list[dict[str, str]] = []

    def run(command: list[str], env: dict[str, str], **_: object) -> subprocess.CompletedProcess[bytes]:
        seen.append(env)
        return subprocess.CompletedProcess(command, 0, stdout=b'["AVX2", {}]')

    monkeypatch.setattr(subprocess, "run", run)
    exactness._run(exactness.AVX2, [])
    exactness._run(Variant("other", {"A": "b"}), [])
    assert (seen[0]["ONEDNN_MAX_CPU_ISA"], seen[0]["ATEN_CPU_CAPABILITY"]) == ("AVX2", "avx2")
    assert [env["OMP_NUM_THREADS"] for env in seen] == ["2", "1"]
    assert seen[1]["A"] == "b" and seen[1]["PATH"] == os.environ["PATH"]
