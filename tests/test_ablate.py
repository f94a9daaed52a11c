"""Ablations: variants are what they say, and a run gives a line."""

import csv
import math
from dataclasses import replace
from pathlib import Path

import pytest
from trainer import LEAST, make_pictures, small_runs

from bench import ablate
from bench.ablate import VARIANTS, Variant
from vqcodec.models.recipes import PHOTO
from vqcodec.train.schedule import Schedule
from vqcodec.train.validation import VALIDATION_QUALITIES


def test_variants_differ_from_their_model_in_one_thing() -> None:
    assert VARIANTS["photo"].config == PHOTO and VARIANTS["photo"].schedule == Schedule()
    for name, variant in VARIANTS.items():
        if name.startswith("onward-"):
            base = VARIANTS["onward"]
        else:
            base = VARIANTS["rounding" if variant.schedule.prior_at == 1.0 and name != "rounding" else "photo"]
        changed = (variant.config != base.config) + (variant.schedule != base.schedule)
        assert changed == (variant is not base), name
        if name != "no-top":
            assert [s.channels for s in variant.config.levels] == [s.channels for s in PHOTO.levels], name
    assert len(VARIANTS["no-top"].config.levels) == 1


def test_a_run_gives_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_pictures(tmp_path, 4, 96, 96)
    variant = Variant("in miniature", LEAST, Schedule(crop=64, large_crop=64, batch=2))
    monkeypatch.setitem(VARIANTS, "tiny", variant)
    assert "failed" in ablate.row("tiny", tmp_path)
    with small_runs(VALIDATION_QUALITIES):
        ablate.run("tiny", [tmp_path], 0.3 / 60, None, None, tmp_path)
    cells = ablate.row("tiny", tmp_path).strip("| ").split(" | ")
    assert cells[:2] == ["tiny", "in miniature"] and int(cells[2]) > 0
    assert len(cells) == 5 + len(VALIDATION_QUALITIES)
    assert 0 < float(cells[-1]) < 100


def test_a_run_may_begin_with_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = [tmp_path / "pictures"]  # apart from the sheets that runs leave
    pictures[0].mkdir()
    make_pictures(pictures[0], 4, 96, 96)
    schedules = {"first": Schedule(), "second": ablate.ONWARD}
    for name, schedule in schedules.items():
        monkeypatch.setitem(VARIANTS, name, Variant(name, LEAST, replace(schedule, crop=64, large_crop=64, batch=2)))
    with small_runs(VALIDATION_QUALITIES):
        ablate.run("first", pictures, 0.3 / 60, None, None, tmp_path)
        ablate.run("second", pictures, math.inf, 8, tmp_path / "first.safetensors", tmp_path)
    ended, begun = (lines(tmp_path / f"{name}.csv")[place] for name, place in (("first", -1), ("second", 0)))
    assert begun["step"] == "0" and ended["step"] != "0"
    assert float(begun["psnr_50"]) == pytest.approx(float(ended["psnr_50"]), abs=0.1)


def lines(log: Path) -> list[dict[str, str]]:
    with log.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_default_variants_exist(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ran: list[str] = []
    monkeypatch.setattr(ablate, "row", lambda name, folder: ran.append(name))
    monkeypatch.setattr(ablate.subprocess, "run", lambda *arguments, **options: None)
    assert ablate.main(["pictures", "-o", str(tmp_path)]) == 0
    assert ran and set(ran) <= set(VARIANTS)


def test_unknown_variants_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        ablate.main(["pictures", "--variants", "photo,nonsense"])
    assert stopped.value.code == 2
    assert "no such variant: nonsense" in capsys.readouterr().err
