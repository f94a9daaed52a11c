"""The figures of record: what is kept follows from the single measurements, and documents say what is kept."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib", reason="needs the extra 'bench': pip install -e '.[bench]'")
pytest.importorskip("scipy", reason="needs the extra 'bench': pip install -e '.[bench]'")

from bench import record
from bench.bd_rate import bd_rate
from bench.measures import MEASURES

KEPT = sorted(record.FOLDER.glob("*.json"))


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.stem)
def test_means_are_those_of_the_pictures(path: Path) -> None:
    content = json.loads(path.read_text("utf-8"))
    means = content.pop("results")
    assert len(content["pictures"]) == content["meta"]["pictures"] == 24
    sizes = [(entry["bytes"], entry["width"] * entry["height"]) for entry in content["pictures"]]
    for i, bpp in enumerate(means["bpp"]):
        assert bpp == pytest.approx(sum(8 * file[i] / area for file, area in sizes) / 24, rel=1e-4)
    for column in means.keys() - {"quality", "bpp"}:
        for i, mean in enumerate(means[column]):
            assert mean == pytest.approx(sum(entry[column][i] for entry in content["pictures"]) / 24, rel=1e-4)


def test_what_is_kept_is_small() -> None:
    assert sum(path.stat().st_size for path in KEPT) < 200_000


@pytest.mark.parametrize("name", record.DOCUMENTS)
def test_documents_say_what_is_kept(name: str) -> None:
    """Otherwise: python -m bench.record."""
    text = (record.REPOSITORY / name).read_text("utf-8")
    assert record.BLOCK.search(text)
    assert record.fill(text, record.load()) == text
    assert text.count("<!-- record: ") == len(record.BLOCK.findall(text))


def test_first_figures_of_the_readme() -> None:
    """Read as people read them, and compared with the files: savings by SSIMULACRA2 and bits at its 60 points."""
    text = (record.REPOSITORY / "README.md").read_text("utf-8")
    kept = record.load()
    curves = {key: kept[key].curve(MEASURES["ssimulacra2"]) for key in record.LOOKS_CODECS}
    own = curves["vqcodec"]
    assert own is not None
    (sentence,) = re.findall(r"At equal looks .*?\. ", text, re.DOTALL)
    for title, key in (("JPEG", "jpeg"), ("JPEG\nXL|JPEG XL", "jxl"), ("AVIF", "avif")):
        found = re.search(rf"([0-9.]+)\s%\ssmaller\sthan\s(?:{title})(?:,|\sand|;)", sentence)
        anchor = curves[key]
        assert found and anchor is not None
        saved = bd_rate(anchor, own)
        assert saved is not None and float(found[1]) == pytest.approx(-saved.percent, abs=0.5)
    (line,) = re.findall(r"^\| 60 \|(.*)\|$", text, re.MULTILINE)
    for cell, key in zip(line.split("|"), record.LOOKS_CODECS, strict=True):
        curve = curves[key]
        assert curve is not None and float(cell) == pytest.approx(float(curve.rate_at(60)), abs=6e-4)


def measured(pictures: int = 2) -> dict[str, Any]:
    """A results file of bench.rate_distortion."""
    rows = [
        {"picture": f"{n}.png", "width": 64, "height": 48, "quality": q, "bytes": 100 * q + n, "bpp": 0.0}
        | {"psnr-rgb": 30 + q + n / 7, "lpips-alex": None if n and q == 2.5 else 0.1 / q}
        | {"encoding_time": 1.0, "decoding_time": 2.0}
        for n in range(pictures)
        for q in (1, 2.5)
    ]
    results = {"quality": [1.0, 2.5], "bpp": [0.0, 0.0], "psnr-rgb": [0.0, 0.0], "lpips-alex": [0.0, None]}
    meta = {"pictures": pictures}
    return {"name": "X", "description": "x. id 0123abcd", "meta": meta, "results": results, "pictures": rows}


def test_taking_over(tmp_path: Path) -> None:
    content = json.loads(record.text_of(record.compact(measured())))
    assert content["results"]["quality"] == [1, 2.5]
    assert content["results"]["psnr-rgb"] == [31.072, 32.572]
    assert content["results"]["lpips-alex"] == [0.1, None]
    assert content["pictures"][1]["bytes"] == [101, 251]
    assert "encoding_time" not in content["results"]
    (tmp_path / "x.json").write_text(record.text_of(content))
    (kept,) = record.load(tmp_path).values()
    assert (kept.key, kept.title) == ("x", "X")
    assert kept.columns["bpp"] == pytest.approx([8 * 100.5 / 3072, 8 * 250.5 / 3072])


def test_unknown_marks() -> None:
    with pytest.raises(ValueError, match="no block is called 'nothing'"):
        record.fill("<!-- record: nothing -->\nx\n<!-- end of record -->", {})
    assert record.fill("no marks", {}) == "no marks"
