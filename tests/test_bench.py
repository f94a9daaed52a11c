"""The benchmark: BD-rate on curves with a known answer, SSIMULACRA2 against its reference, and small real runs."""

import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import models
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

import vqcodec

pytest.importorskip("matplotlib", reason="needs the extra 'bench': pip install -e '.[bench]'")
pytest.importorskip("imagecodecs", reason="needs the extra 'bench': pip install -e '.[bench]'")
pytest.importorskip("scipy", reason="needs the extra 'bench': pip install -e '.[bench]'")

from models import TINY

from bench import (
    codecs,
    curves,
    launches,
    measures,
    plots,
    rate_distortion,
    report,
    sensitivity,
    speed,
    strip,
    targets,
)
from bench.bd_rate import Curve, bd_rate
from vqcodec import tuning
from vqcodec import weights as weights_files
from vqcodec.metrics import psnr as measured_psnr
from vqcodec.models.prior import Prior
from vqcodec.models.vqvae import VQVAE
from vqcodec.ssimulacra2 import BYTES_A_PIXEL, ssimulacra2
from vqcodec.weights import save_model

ROOT = Path(__file__).resolve().parents[1]
Array = NDArray[np.float64]
PSNR = measures.MEASURES["psnr"]


def line(offset: float, slope: float, quality: Array) -> Curve:
    """A curve whose logarithm of rate is linear in quality."""
    return Curve(np.exp(offset + slope * quality), quality)


def photo(width: int, height: int) -> NDArray[np.uint8]:
    """Smooth colours with an edge and some grain."""
    y, x = np.mgrid[:height, :width] / max(width, height)
    planes = [np.sin(5 * x + 3 * y), np.cos(4 * x * y + 1), np.where(x + y > 0.7, 0.6, -0.4)]
    noise = np.random.default_rng(1).normal(0, 0.05, (height, width, 3))
    return np.clip(127.5 + 110 * (np.stack(planes, axis=-1) + noise), 0, 255).astype(np.uint8)


# BD-rate


def test_equal_saving_everywhere() -> None:
    anchor = line(-5, 0.15, np.linspace(26, 40, 9))
    test = line(-5 + np.log(0.8), 0.15, np.linspace(28, 44, 5))
    found = bd_rate(anchor, test)
    assert found is not None
    assert found.percent == pytest.approx(-20, abs=1e-9)
    assert (found.low, found.high) == (28, 40)


def test_different_slopes() -> None:
    anchor, test = line(-5, 0.15, np.linspace(26, 40, 9)), line(-5.5, 0.16, np.linspace(30, 42, 7))
    found = bd_rate(anchor, test)
    assert found is not None
    # the mean of a linear difference is its value in the middle, 35 dB
    assert found.percent == pytest.approx(100 * (np.exp(-0.5 + 0.01 * 35) - 1), abs=1e-6)


def test_opposite_direction_is_the_reciprocal() -> None:
    a = Curve(np.array([0.1, 0.3, 0.8, 2.0]), np.array([27.0, 30.0, 34.0, 39.0]))
    b = Curve(np.array([0.15, 0.3, 0.7, 1.4]), np.array([28.0, 31.0, 34.5, 38.0]))
    forth, back = bd_rate(a, b), bd_rate(b, a)
    assert forth is not None and back is not None
    assert (1 + forth.percent / 100) * (1 + back.percent / 100) == pytest.approx(1, abs=1e-9)


def test_close_to_the_cubic_of_vceg_m33() -> None:
    # The usual test data of Bjontegaard scripts; there a cubic polynomial through four points is integrated.
    rate1, psnr1 = np.array([85.95, 157.11, 309.58, 686.76]), np.array([31.42, 34.24, 37.18, 40.28])
    rate2, psnr2 = np.array([112.75, 204.93, 407.8, 893.34]), np.array([31.24, 34.17, 37.21, 40.39])
    low, high = 31.42, 40.28
    integrals = [np.polyint(np.polyfit(psnr, np.log(rate), 3)) for rate, psnr in ((rate1, psnr1), (rate2, psnr2))]
    areas = [np.polyval(i, high) - np.polyval(i, low) for i in integrals]
    expected = 100 * (np.exp((areas[1] - areas[0]) / (high - low)) - 1)
    found = bd_rate(Curve(rate1, psnr1), Curve(rate2, psnr2))
    assert found is not None
    assert found.percent == pytest.approx(expected, abs=0.3)


def test_rate_window() -> None:
    anchor, test = line(-5, 0.15, np.linspace(20, 44, 9)), line(-5.5, 0.16, np.linspace(20, 44, 9))
    low, high = (np.log(rate) + 5.5 for rate in (0.15, 0.8))
    found = bd_rate(anchor, test, rates=(0.15, 0.8))
    assert found is not None
    assert (found.low, found.high) == pytest.approx((low / 0.16, high / 0.16))
    middle = (low + high) / 2 / 0.16
    assert found.percent == pytest.approx(100 * (np.exp(-0.5 + 0.01 * middle) - 1), abs=1e-6)
    assert bd_rate(anchor, test, rates=(50, 60)) is None


def test_no_common_range() -> None:
    assert bd_rate(line(-5, 0.15, np.linspace(20, 25, 3)), line(-5, 0.15, np.linspace(26, 30, 3))) is None


def test_curve_leaves_out_what_no_one_would_use() -> None:
    curve = Curve.of([0.5, 0.1, 0.3, 0.4, None, 0.9, 1.0], [34.0, 28.0, 32.0, 31.0, 33.0, None, float("inf")])
    assert curve is not None
    assert curve.rate.tolist() == [0.1, 0.3, 0.5]
    assert curve.quality.tolist() == [28, 32, 34]
    assert Curve.of([0.1, 0.2], [30.0, 29.0]) is None


# SSIMULACRA2: scores that the reference program gives for these pictures (test data of the Rust port fast-ssim2)


def reference_noise(width: int, height: int, state: int) -> NDArray[np.uint8]:
    values = []
    for _ in range(width * height * 3):
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        values.append(state >> 33 & 255)
    return np.array(values, np.uint8).reshape(height, width, 3)


def test_ssimulacra2_agrees_with_the_reference() -> None:
    grey = np.full((64, 64, 3), 128, np.uint8)
    ramp = np.broadcast_to((np.arange(64) * 255 // 63)[None, :, None], (64, 64, 3)).astype(np.uint8)
    assert ssimulacra2(ramp, grey) == pytest.approx(-64.56872148, abs=0.05)
    assert ssimulacra2(reference_noise(64, 64, 42), grey) == pytest.approx(-47.33572558, abs=0.05)
    assert ssimulacra2(grey, grey + np.uint8(50)) == pytest.approx(-8.75942256, abs=0.1)


# Measures that other packages and programs compute


def needs(module: str, package: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(module) is None
    return pytest.mark.skipif(missing, reason=f"needs the package {package}: pip install -c constraints.txt {package}")


@pytest.mark.parametrize(
    ("key", "best"),
    [
        pytest.param(
            *("butteraugli", 0),
            marks=pytest.mark.skipif(
                shutil.which("butteraugli_main") is None,
                reason="needs the program butteraugli_main: apt-get install libjxl-devtools",
            ),
        ),
        pytest.param("cvvdp", 10, marks=needs("pycvvdp", "cvvdp")),
        pytest.param("gmsd", 0, marks=needs("piq", "piq")),
        pytest.param("haarpsi", 1, marks=needs("piq", "piq")),
    ],
)
def test_measures_tell_much_loss_from_little(key: str, best: float) -> None:
    measure, compute = measures.MEASURES[key], measures.function(key, None)
    jpeg, pixels = codecs.get("jpeg"), photo(96, 64)
    low, high = (measure.scale(compute(pixels, jpeg.decode(jpeg.encode(pixels, quality)))) for quality in (10, 90))
    assert low < high < measure.scale(compute(pixels, pixels))
    assert compute(pixels, pixels) == pytest.approx(best, abs=1e-5)


def test_butteraugli_is_the_3_norm_that_the_program_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(measures.MeasureUnavailableError, match="libjxl-devtools"):
        measures.function("butteraugli", None)
    program = tmp_path / "butteraugli_main"
    program.write_text("#!/bin/sh\necho 6.4490375519\necho 3-norm: 2.133363\n")
    program.chmod(0o755)
    compute = measures.function("butteraugli", None)
    assert compute(photo(8, 9), photo(8, 9)) == 2.133363
    assert np.isnan(compute(photo(8, 7), photo(8, 7)))  # the program would say 0


def test_cvvdp_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycvvdp", None)
    monkeypatch.setattr(measures, "import_torchvision", lambda: None)
    with pytest.raises(measures.MeasureUnavailableError, match="pip install cvvdp"):
        measures.function("cvvdp", None)


def test_ssimulacra2_takes_no_more_memory_than_it_says() -> None:
    picture, other = reference_noise(600, 800, 1), reference_noise(600, 800, 2)
    tracemalloc.start()
    try:
        ssimulacra2(picture, other)
        assert tracemalloc.get_traced_memory()[1] <= BYTES_A_PIXEL * 600 * 800
    finally:
        tracemalloc.stop()


def test_ssimulacra2_edges() -> None:
    picture = photo(33, 21)
    assert ssimulacra2(picture, picture) == 100
    assert np.isnan(ssimulacra2(picture[:7], picture[:7]))
    with pytest.raises(ValueError, match="one shape"):
        ssimulacra2(picture, picture[:20])


# Codecs


@pytest.mark.parametrize("key", [key for key in codecs.KEYS if not key.startswith("vqcodec")])
def test_classic_codecs_give_more_for_more(key: str) -> None:
    codec = codecs.get(key)
    pixels = photo(71, 48)
    low, high = (codec.encode(pixels, codec.qualities[i]) for i in (1, -1))
    assert len(low) < len(high)
    decoded = [codec.decode(data) for data in (low, high)]
    assert all(d.shape == pixels.shape and d.dtype == np.uint8 for d in decoded)
    assert 15 < measured_psnr(pixels, decoded[0]) < measured_psnr(pixels, decoded[1])


@pytest.mark.parametrize(
    ("key", "title", "effort", "tune"),
    [
        ("vqcodec", "vqcodec", 1, None),
        ("vqcodec-psnr", "vqcodec, tune psnr", 1, "psnr"),
        ("vqcodec-effort-3", "vqcodec, effort 3", 3, None),
        ("vqcodec-effort-9", "vqcodec, effort 9", 9, None),
        ("vqcodec-psnr-effort-9", "vqcodec, tune psnr, effort 9", 9, "psnr"),
    ],
)
def test_variants_of_the_own_codec(
    key: str, title: str, effort: int, tune: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = tmp_path / "tiny.safetensors"
    save_model(weights, TINY, VQVAE(TINY), Prior(TINY), {})
    asked: dict[str, object] = {}

    def compress(pixels: NDArray[np.uint8], **options: object) -> bytes:
        asked.update(options)
        return b"file"

    monkeypatch.setattr("vqcodec.codec.compress", compress)
    codec = codecs.get(key, weights=weights)
    assert (codec.key, codec.title) == (key, title)
    assert codec.encode(photo(16, 16), 40.0) == b"file"
    assert asked == {"quality": 40, "weights": weights, "device": "auto", "effort": effort, "tune": tune}


def test_every_codec_has_a_colour() -> None:
    assert plots.COLOURS.keys() == set(codecs.KEYS)


def test_missing_weights_and_unknown_names(tmp_path: Path) -> None:
    with pytest.raises(codecs.CodecUnavailableError):
        codecs.get("vqcodec", weights=tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="unknown codec 'gif'"):
        codecs.get("gif")
    with pytest.raises(ValueError, match="unknown metric 'vmaf'"):
        measures.function("vmaf", None)
    with pytest.raises(measures.MeasureUnavailableError, match="alexnet_features"):
        measures.function("lpips", tmp_path)


@pytest.mark.parametrize("key", ["jpeg2000", "jxl"])
def test_nearest_quality_lies_between_the_default_ones(key: str) -> None:
    codec, pixels = codecs.get(key), photo(160, 112)
    middle = sum(len(codec.encode(pixels, quality)) for quality in codec.qualities[-3:-1]) / 2
    _, data = codecs.nearest_quality(codec, pixels, middle)
    assert len(data) == pytest.approx(middle, rel=0.03)


def test_nearest_quality_is_the_best_of_all() -> None:
    codec = codecs.get("jpeg")
    pixels = photo(80, 56)
    for size in (1, 900, 1500, 10**6):
        quality, data = codecs.nearest_quality(codec, pixels, size)
        assert data == codec.encode(pixels, quality)
        best = min(abs(len(codec.encode(pixels, q)) - size) for q in codec.scale)
        assert abs(len(data) - size) == best


# The aim


def result(key: str, qualities: list[float], bpp: list[float], psnr: list[float]) -> curves.Result:
    return curves.Result(key, key, "", {"quality": qualities, "bpp": bpp, "psnr-rgb": psnr})


def test_aim_against_jpeg() -> None:
    psnr = [26.0, 30.0, 34.0, 38.0]
    jpeg = result("jpeg", [1, 2, 3, 4], [0.2, 0.5, 1.2, 2.4], psnr)
    saved = curves.aim([jpeg, result("vqcodec", [1, 2, 3, 4], [0.15, 0.375, 0.9, 1.8], psnr)], PSNR)
    assert saved is not None and saved.value is not None
    assert saved.value.percent == pytest.approx(-25, abs=1e-6)
    assert saved.average_holds and saved.levels_hold
    assert [level.jpeg_bpp for level in saved.levels] == pytest.approx([0.2, 0.5, 1.2, 2.4])

    worse_once = curves.aim([jpeg, result("vqcodec", [1, 2, 3], [0.15, 0.25, 1.3], [26.0, 30.0, 34.0])], PSNR)
    assert worse_once is not None
    assert [level.holds for level in worse_once.levels] == [True, True, False]
    assert any("FAILS" in text for text in rate_distortion.aim_lines(worse_once))

    beyond = curves.aim([jpeg, result("vqcodec", [1, 2, 3, 4], [0.1, 0.2, 2.0, 2.5], [24.0, 24.1, 39.0, 40.0])], PSNR)
    assert beyond is not None
    assert [level.holds for level in beyond.levels] == [None, False, True, None]
    assert not beyond.levels_hold

    assert curves.aim([jpeg], PSNR) is None
    assert "not checked" in rate_distortion.aim_lines(None)[0]


def test_tunings_are_compared_with_vqcodec() -> None:
    psnr = [26.0, 30.0, 34.0, 38.0]
    own = result("vqcodec", [1, 2, 3, 4], [0.2, 0.4, 0.8, 1.6], psnr)
    tuned = result("vqcodec-psnr", [1, 2, 3, 4], [0.18, 0.36, 0.72, 1.44], psnr)
    (found,) = curves.comparisons([own, tuned], [PSNR])
    assert (found.test, found.anchor) == ("vqcodec-psnr", "vqcodec")
    assert found.value is not None and found.value.percent == pytest.approx(-10)


def test_published_curves(tmp_path: Path) -> None:
    columns = {"bpp": [0.2, 0.5, 1.0], "psnr-rgb": [26.0, 30.0, 34.0]}
    (tmp_path / "jpeg.json").write_text(json.dumps({"name": "JPEG", "description": "d", "results": columns}))
    entry = {
        "name": "HPCM-Large",
        "repo": "r",
        "path": "p",
        "metrics": ["bpp", "psnr-rgb"],
        "points": [[0.1, 29], [0.4, 34]],
    }
    (tmp_path / "extra-published.json").write_text(json.dumps({"entries": [entry, {"name": "other"}]}))
    found = curves.published(tmp_path)
    assert [r.title for r in found] == ["JPEG, published", "HPCM-Large, published"]
    curve = found[1].curve(PSNR)
    assert curve is not None and curve.rate.tolist() == [0.1, 0.4]
    compared = curves.comparisons(found, [PSNR])
    assert [(c.test, c.anchor) for c in compared] == [("HPCM-Large, published", "JPEG, published")]


# Whole runs


@pytest.mark.parametrize("script", [["-m", "bench.rate_distortion"], [str(ROOT / "bench" / "rate_distortion.py")]])
def test_scripts_run_as_modules_and_as_files(script: list[str], tmp_path: Path) -> None:
    """As modules in the folder of the repository; as files anywhere, where vqcodec alone is installed."""
    (tmp_path / "vqcodec").symlink_to(ROOT / "vqcodec")
    done = subprocess.run(
        [sys.executable, *script, "missing.png"],
        cwd=ROOT if script[0] == "-m" else tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        check=False,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (2, "rate_distortion: missing.png: no such file or folder\n")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # the scripts set it; this puts it back
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    Image.fromarray(photo(96, 64)).save(pictures / "a.png")
    Image.fromarray(photo(64, 72)).save(pictures / "b.png")
    (pictures / "notes.txt").write_text("not a picture")
    yield pictures


def test_rate_distortion_run(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    arguments = [str(folder), "-o", str(output), "--codecs", "jpeg,webp", "--qualities", "jpeg=20,50,90"]
    arguments += ["--metrics", "psnr,ms-ssim,ssimulacra2,lpips"]
    assert rate_distortion.main([*arguments, "--qualities", "webp=10,50,90"]) == 0
    printed = capsys.readouterr()
    assert "BD-rate by PSNR" in printed.out and "not checked" in printed.out
    assert "lpips: left out" in printed.err

    content = json.loads((output / "jpeg.json").read_text("utf-8"))
    assert {"name", "description", "results"} <= content.keys()
    assert content["name"] == "JPEG"
    columns = content["results"]
    assert columns["quality"] == [20, 50, 90]
    expected = {"quality", "bpp", "psnr-rgb", "ms-ssim-rgb", "ssimulacra2", "encoding_time", "decoding_time"}
    assert columns.keys() == expected
    assert columns["bpp"] == sorted(columns["bpp"]) and columns["psnr-rgb"] == sorted(columns["psnr-rgb"])

    # the same numbers from Pillow alone
    bpp, psnr = [], []
    for picture in (photo(96, 64), photo(64, 72)):
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "JPEG", quality=50)
        bpp.append(8 * len(buffer.getvalue()) / picture[..., 0].size)
        error = np.asarray(Image.open(buffer), np.float64) - picture
        psnr.append(10 * np.log10(255**2 / np.mean(error**2)))
    assert columns["bpp"][1] == pytest.approx(np.mean(bpp))
    assert columns["psnr-rgb"][1] == pytest.approx(np.mean(psnr))
    assert [p["picture"] for p in content["pictures"]] == ["a.png"] * 3 + ["b.png"] * 3

    assert {file.name for file in output.iterdir()} == {
        *("jpeg.json", "webp.json", "bd_rate.json", "report.html"),
        *("psnr.png", "ms-ssim.png", "ssimulacra2.png"),
    }
    pairs = {
        (c["test"], c["anchor"], c["measure"]) for c in json.loads((output / "bd_rate.json").read_text())["bd_rate"]
    }
    assert ("WebP", "JPEG", "psnr") in pairs
    page = (output / "report.html").read_text("utf-8")
    assert "http" not in page and "//" not in re.sub(r'"data:[^"]*"', "", page)
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(sources) == 3 + 2 * 2 * 2 and all(source.startswith("data:image/") for source in sources)


def test_own_codec_is_measured_like_the_others(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    weights = tmp_path / "tiny.safetensors"
    save_model(weights, TINY, VQVAE(TINY), Prior(TINY), {})
    codec = codecs.get("vqcodec", weights=weights)
    settings = rate_distortion.Settings({"vqcodec": (1.0, 80.0)}, ("psnr",), weights, None)
    rows = rate_distortion.measure_picture("vqcodec", folder / "a.png", settings)
    files = [vqcodec.compress(photo(96, 64), quality=quality, weights=weights) for quality in (1, 80)]
    assert [row.bytes for row in rows] == [len(file) for file in files]
    decoded = np.asarray(vqcodec.decompress(files[1], weights=weights))
    np.testing.assert_array_equal(codec.decode(files[1]), decoded)
    assert rows[1].values["psnr-rgb"] == pytest.approx(measured_psnr(photo(96, 64), decoded))


def test_processes_give_the_same_files(folder: Path) -> None:
    pictures = rate_distortion.find_pictures([folder])
    settings = rate_distortion.Settings({"jpeg": (30.0, 60.0)}, ("psnr",), None, None)
    alone, together = (rate_distortion.measure_all("jpeg", pictures, settings, jobs) for jobs in (1, 2))
    assert [(r.picture, r.quality, r.bytes, r.values) for r in alone] == [
        (r.picture, r.quality, r.bytes, r.values) for r in together
    ]


def test_pictures_of_folders(folder: Path) -> None:
    below = folder / "below"
    below.mkdir()
    with pytest.raises(ValueError, match="below holds no files"):
        rate_distortion.find_pictures([below])
    Image.fromarray(photo(8, 8)).save(below / "c.gif")
    named = folder / "notes.txt"
    assert rate_distortion.find_pictures([named, folder]) == [
        named,
        *(folder / n for n in ("a.png", "b.png", "below/c.gif")),
    ]
    assert rate_distortion.find_pictures([]), "Kodak or the sample photo"


def test_published_curves_belong_to_the_whole_kodak_set(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert rate_distortion.load_published(rate_distortion.find_pictures([folder]), folder) == []
    assert "24 Kodak pictures" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.png"], "missing.png: no such file or folder"),
        (["--codecs", "gif"], "unknown codec 'gif'"),
        (["--codecs", "jpeg", "--qualities", "jpeg=high"], "expected CODEC=NUMBER"),
        (["--codecs", "jpeg", "--qualities", "10,20"], "unknown codec '10,20'"),
    ],
)
def test_wrong_arguments(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert rate_distortion.main([*arguments, "--metrics", "psnr"]) == 2
    assert message in capsys.readouterr().err


def test_report_escapes_text() -> None:
    table = report.Table(["<a>"], [["x & y", report.Cell("1", "<2>")]])
    page = report.render("T<t>", "lead", [report.Section("S", ["p <b>"], tables=[("", table)])])
    assert "T&lt;t&gt;" in page and "p &lt;b&gt;" in page and "<small>&lt;2&gt;</small>" in page
    assert "<a>" not in page


def test_launches_are_counted(tiny_weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of operators that compute, and of what a host waits for; the codec is asked as if it were on a GPU."""
    mask = torch.tensor([True, False])

    def work() -> None:
        x = torch.ones(2)
        assert x.is_cuda
        (x.view(2, 1) + 1).relu()[mask].to("cpu").tolist()

    computed, waited = launches.count(work)
    assert computed == {"aten.ones.default": 1, "aten.add.Tensor": 1, "aten.relu.default": 1, "aten.index.Tensor": 1}
    assert waited == {"mask": 1, "to": 1, "tolist": 1}
    arguments = ["--weights", str(tiny_weights), "--sizes", "128x64", "--all"]
    assert launches.main(arguments) == 0
    output = capsys.readouterr().out
    assert "128x64 encode: " in output and "128x64 decode: " in output and "aten.im2col.default" in output
    assert launches.main(["--weights", "missing"]) == 1


def test_batches_of_tiles_are_launched_once(tiny_weights: Path) -> None:
    """Four equal tiles do not cost a GPU four times the launches of one."""
    counted = []
    for size in (64, 128):
        pixels = speed.sample(size, size)
        seen, _ = launches.count(lambda pixels=pixels: vqcodec.compress(pixels, weights=tiny_weights, tile=64))
        counted.append(seen.total())
    assert counted[0] < counted[1] < 2 * counted[0]


def test_batches_of_pictures_are_launched_once(tiny_weights: Path) -> None:
    """Nor do four pictures of one size, in either direction; the host hardly waits more often."""
    pictures = [speed.sample(64 + 8 * number, 64)[:, 8 * number :] for number in range(4)]
    files = vqcodec.compress_many(pictures, weights=tiny_weights)
    for work in (
        lambda count: vqcodec.compress_many(pictures[:count], weights=tiny_weights),
        lambda count: vqcodec.decompress_many(files[:count], weights=tiny_weights),
    ):
        (launched, waited), (more, longer) = (
            [seen.total() for seen in launches.count(lambda count=count, work=work: work(count))] for count in (1, 4)
        )
        assert launched <= more < 1.2 * launched
        assert waited <= longer < 1.2 * waited


def test_speed_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    output = tmp_path / "speed.json"
    weights = str(tmp_path / "none.safetensors")
    arguments = ["-o", str(output), "--sizes", "40x24", "--repeats", "1", "--threads", "1", "--weights", weights]
    assert speed.main(arguments) == 0
    printed = capsys.readouterr()
    assert "vqcodec: left out" in printed.err and "40x24" in printed.out
    measured = json.loads(output.read_text())["measurements"]
    assert [(m["codec"], m["direction"]) for m in measured] == [("jxl", "encode"), ("jxl", "decode")]
    assert all(m["seconds"] > 0 and m["peak_mib"] >= m["start_mib"] > 1 and m["bytes"] > 50 for m in measured)


def test_sample_photo_has_the_size_asked_for() -> None:
    assert speed.sample(1300, 30).shape == (30, 1300, 3)
    big = speed.sample(1030, 1220)
    np.testing.assert_array_equal(big[:, 511], big[:, 512])  # mirrored, no seam


def test_reuse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 48, 3), np.uint8)).save(picture)
    arguments = [str(picture), "-o", str(tmp_path / "out"), "--codecs", "jpeg", "--metrics", "psnr"]
    arguments += ["--qualities", "jpeg=20,60,90"]
    assert rate_distortion.main(arguments) == 0
    first = json.loads((tmp_path / "out" / "jpeg.json").read_text())

    def fail(*_: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(rate_distortion, "measure_all", fail)
    assert rate_distortion.main([*arguments, "--reuse"]) == 0
    assert json.loads((tmp_path / "out" / "jpeg.json").read_text())["pictures"] == first["pictures"]
    with pytest.raises(AssertionError, match="measured again"):
        rate_distortion.main([*arguments[:-1], "jpeg=20,60,91", "--reuse"])


def test_targets_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line for each target."""
    Image.fromarray(models.picture(64, 80, 3)).save(tmp_path / "a.png")
    assert targets.main([str(tmp_path / "a.png"), "--targets", "psnr=31,max=3000"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["psnr=31", "max=3000"]
    assert all("out of range 0" in line for line in lines)


def test_targets_out_of_range_everywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.fromarray(models.picture(64, 80, 3)).save(tmp_path / "a.png")
    assert targets.main([str(tmp_path / "a.png"), "--targets", "bpp=.0001"]) == 0
    assert capsys.readouterr().out.startswith("bpp=.0001: out of range 1, ")


def test_sensitivity_of_given_weights(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Their visual tuning is measured anew and lies beside them, whose bytes stay; from then on it is used."""
    own = models.tuned_weights(tmp_path)
    model, before = weights_files.load(own), own.read_bytes()
    (folder / "bad.png").write_text("no picture")
    assert sensitivity.main([str(own), str(folder), "--crops", "3", "--side", "64"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed] == ["unit", "masking", "balance"]
    found = tuning.load(tuning.path_of(own), model.config, model.id)
    assert found is not None and found.qualities != models.visual_tuning().qualities
    assert own.read_bytes() == before
    pixels = photo(72, 56)
    used = vqcodec.compress(pixels, weights=own, tune="visual")
    assert used != vqcodec.compress(pixels, weights=own, tune="psnr")
    first = tuning.path_of(own).read_bytes()
    assert sensitivity.main([str(own), str(folder), "--crops", "3", "--side", "64"]) == 0
    assert tuning.path_of(own).read_bytes() == first


def test_a_strip_shows_the_same_piece_of_every_codec(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In a row for each rate, with captions, enlarged without smoothing."""
    source, output = tmp_path / "picture.png", tmp_path / "strip.png"
    pixels = models.picture(60, 90)
    Image.fromarray(pixels).save(source)
    asked = [str(source), "--rates", "1.2,2.4", "--codecs", "jpeg,webp", "--piece", "5,9,32", "--enlarge", "4"]
    assert strip.main([*asked, "-o", str(output)]) == 0
    with Image.open(output) as shown:
        rows = np.split(np.asarray(shown), 2)
    errors = []
    for row in rows:
        columns = np.split(row, 3, axis=1)
        original, *restored = (column[:128:4, ::4] for column in columns)
        assert np.array_equal(original, pixels[9:41, 5:37])
        assert np.array_equal(original.repeat(4, axis=0).repeat(4, axis=1), columns[0][:128])
        captions = [column[128:] for column in columns]
        assert all((caption == 255).any() and (caption < 64).any() for caption in captions)
        errors.append([measured_psnr(original, piece) for piece in restored])
    assert all(18 < low < high for low, high in zip(*errors, strict=True))
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == ["JPEG", "WebP"] * 2


def test_pieces_of_a_strip_can_stay_as_they_are() -> None:
    piece = models.picture(400, 400)
    shown = np.asarray(strip.draw([piece], ["original"], 1))
    assert shown.shape == (475, 400, 3)
    assert np.array_equal(shown[:400], piece)
