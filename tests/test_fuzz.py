"""bench.fuzz: finds nothing in some inputs of each kind, and would say so if it did."""

from pathlib import Path

import models
import pytest

from bench import fuzz
from vqcodec import image


def run(folder: Path, *more: str) -> int:
    return fuzz.main(
        ["--count", "60", "--seed", "2", "--weights", str(models.tiny_weights()), "-o", str(folder), *more]
    )


def test_nothing_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "found") == 0
    printed = capsys.readouterr().out
    assert printed.endswith("seed 2, 60 inputs, 0 findings\n")
    for kind in ("vqz: ", "partial: ", "weights: ", "configuration: ", "container: ", "picture: "):
        assert kind in printed
    assert not (tmp_path / "found").exists()


def test_findings_are_saved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("no luck")

    monkeypatch.setattr(image, "load", fail)
    assert run(tmp_path) == 1
    saved = sorted(tmp_path.iterdir())
    assert saved and all(path.name.startswith("2-") and path.name.endswith("-picture") for path in saved)
    printed = capsys.readouterr().out
    assert printed.count("ZeroDivisionError: no luck") == len(saved)
    assert f"60 inputs, {len(saved)} findings" in printed
