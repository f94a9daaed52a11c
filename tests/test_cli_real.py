"""The command line with the real codec, on small made pictures and tiny weights."""

import json
import os
import re
import shutil
import sys
from pathlib import Path

import models
import numpy as np
import pytest
import torch
from commandline import fails, process, run, tree
from numpy.typing import NDArray
from PIL import Image, ImageCms

import vqcodec
from vqcodec import batch, bitstream, codec, metrics, pool

GOLDEN = Path(__file__).parent / "golden"
WEIGHTS = ("--weights", str(GOLDEN / "tiny.safetensors"))


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pool, "cores", lambda: 1)  # spawning processes takes longer than these files


@pytest.fixture
def photo() -> NDArray[np.uint8]:
    """photo.png, 75 x 50."""
    pixels = models.picture(50, 75, seed=7)
    Image.fromarray(pixels).save("photo.png")
    return pixels


def pixels_of(file: str) -> NDArray[np.uint8]:
    with Image.open(file) as picture:
        return np.array(picture)


def compressed(*options: str, weights: tuple[str, ...] = WEIGHTS) -> bytes:
    """The file of photo.png."""
    ran = run("compress", "photo.png", "-f", *weights, *options)
    assert (ran.exit_code, ran.stdout) == (0, ""), ran.stderr
    return Path("photo.vqz").read_bytes()


def test_there_and_back(photo: NDArray[np.uint8]) -> None:
    data = compressed("-q", "60", "--verify")
    assert data == codec.compress(photo, quality=60, weights=WEIGHTS[1])
    ran = run("decompress", "photo.vqz", "-o", "again.png", *WEIGHTS)
    assert ran.exit_code == 0
    assert re.fullmatch(
        rf"photo\.vqz -> again\.png: {len(data):,} -> [\d,]+ bytes, 75 x 50, {8 * len(data) / 3750:.4f} bpp,"
        r" \d+\.\d\d s\n",
        ran.stderr,
    )
    restored = pixels_of("again.png")
    assert np.array_equal(restored, np.asarray(codec.decompress(data, weights=WEIGHTS[1])))
    told = [
        json.loads(run("compare", "photo.png", other, "--json", *WEIGHTS).stdout)
        for other in ("again.png", "photo.vqz")
    ]
    assert told[0]["psnr"] == told[1]["psnr"] == pytest.approx(metrics.psnr(photo, restored))
    assert told[0]["psnr"] > 20, "the picture came back"
    assert (told[0]["files"], told[1]["files"][0]["bytes"]) == ([], len(data))
    assert tree() == ["again.png", "photo.png", "photo.vqz"]


def test_info(photo: NDArray[np.uint8]) -> None:
    size = len(compressed("-q", "60"))
    (told,) = json.loads(run("info", "--json", "photo.vqz").stdout)
    weights = json.loads(run("info", "--json", *WEIGHTS).stdout)
    assert told["weights"] == weights["id"]
    assert (told["width"], told["height"], told["quality"], told["bytes"]) == (75, 50, 60, size)
    assert len(told["layer_bytes"]) == 3 and sum(told["layer_bytes"]) == size - 21
    assert weights["name"] == "golden" and weights["notes"] == {"made by": "tests/models.py"}


def test_quality_and_targets(photo: NDArray[np.uint8]) -> None:
    sizes = [len(compressed("-q", quality)) for quality in ("5", "95")]
    middle = sum(sizes) // 2
    assert sizes[0] < sizes[1]
    assert len(compressed("--max-size", str(middle))) <= middle
    reached = len(compressed("--target-size", str(middle)))
    assert sizes[0] < reached < sizes[1] and reached == pytest.approx(middle, rel=0.2)
    assert bitstream.read_header(compressed()).quality == codec.DEFAULT_QUALITY


def test_a_target_out_of_reach(photo: NDArray[np.uint8]) -> None:
    ran = run("compress", "photo.png", "--max-size", "30", *WEIGHTS)
    assert (ran.exit_code, ran.stdout) == (1, "")
    (line,) = ran.stderr.splitlines()
    assert line.startswith("vqcodec: photo.png: ") and "30" in line
    assert tree() == ["photo.png"]


def test_effort(photo: NDArray[np.uint8]) -> None:
    weights = ("--weights", str(models.shaken_weights()))
    fast, slow = compressed(weights=weights), compressed("--effort", "3", weights=weights)
    assert slow == codec.compress(photo, effort=3, weights=weights[1])
    assert slow != fast
    assert run("decompress", "--test", "photo.vqz", *weights).exit_code == 0


def test_tune(photo: NDArray[np.uint8]) -> None:
    weights = ("--weights", str(models.tuned_weights(Path())))
    plain, psnr, visual = (
        compressed(*tune, weights=weights) for tune in ((), ("--tune", "psnr"), ("--tune", "visual"))
    )
    assert plain == visual != psnr
    os.remove("tuned.visual.json")
    assert compressed(weights=weights) == psnr
    ran = run("compress", "photo.png", "-o", "no.vqz", "--tune", "visual", *weights)
    assert ran.exit_code == 1 and not Path("no.vqz").exists()
    (line,) = ran.stderr.splitlines()
    assert line.startswith("vqcodec: photo.png: ") and "tuned" in line


def test_a_truncated_file(photo: NDArray[np.uint8]) -> None:
    data = compressed("-q", "60")
    layers = json.loads(run("info", "--json", "photo.vqz").stdout)[0]["layer_bytes"]
    whole = len(data) - layers[2]
    Path("cut.vqz").write_bytes(data[: whole + 3])  # within the checksum, which takes the four bytes behind the length
    after_length = whole + (1 if layers[2] <= 1 + 4 + 127 else 2)
    message = f"the CRC-32 of segment 3 of 3 ends at byte {after_length + 4}, the file has {whole + 3} bytes"
    fails(run("decompress", "cut.vqz", *WEIGHTS), 1, f"vqcodec: cut.vqz: {message}")
    fails(run("info", "cut.vqz"), 1, f"vqcodec: cut.vqz: {message}")
    ran = run("decompress", "--test", "photo.vqz", "cut.vqz", *WEIGHTS)
    assert ran.exit_code == 1
    fine, bad, total = ran.stderr.splitlines()
    assert fine.startswith(f"photo.vqz: fine, {len(data):,} bytes, 75 x 50, ")
    assert bad == f"vqcodec: cut.vqz: {message}"
    assert total.startswith("vqcodec: 1 of 2 files done, 1 failed; ")
    assert tree() == ["cut.vqz", "photo.png", "photo.vqz"], "neither wrote anything"
    ran = run("decompress", "--partial", "cut.vqz", *WEIGHTS)
    assert ran.exit_code == 0 and ran.stderr.splitlines()[0] == f"vqcodec: cut.vqz: warning: {message}"
    run("decompress", "photo.vqz", "-o", "whole.png", *WEIGHTS)
    coarse, whole = (metrics.psnr(photo, pixels_of(file)) for file in ("cut.png", "whole.png"))
    assert 15 < coarse < whole


def test_error_lines(photo: NDArray[np.uint8]) -> None:
    data = compressed()
    used = bitstream.read_header(data).weights_id.hex()
    other = ("--weights", str(models.tiny_weights()))
    given = json.loads(run("info", "--json", *other).stdout)["id"]
    fails(
        run("decompress", "photo.vqz", "-o", "x.png", *other),
        1,
        f"vqcodec: photo.vqz: made with weights {used}, these are {given}",
    )
    Path("flipped.vqz").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    (line,) = run("decompress", "flipped.vqz", *WEIGHTS).stderr.splitlines()
    assert line.startswith("vqcodec: flipped.vqz: segment 3 of 3 is damaged: its CRC-32 is ")
    (line,) = run("decompress", "photo.png", "-o", "x.png", *WEIGHTS).stderr.splitlines()
    assert line == "vqcodec: photo.png: not a .vqz file: it starts with 89 50 4e 47 instead of 56 51 5a 1a"
    (line,) = run("compress", "photo.vqz", "-o", "x.vqz", *WEIGHTS).stderr.splitlines()
    assert line.startswith("vqcodec: photo.vqz: not a PNG, JPEG")
    (line,) = run("compress", "photo.png", "-o", "x.vqz", "--weights", "photo.png").stderr.splitlines()
    assert line.startswith("vqcodec: photo.png: cannot read weights photo.png: ")
    (line,) = run("decompress", "photo.vqz", "-o", "x.png", "--look", "natural", *WEIGHTS).stderr.splitlines()
    assert line.startswith("vqcodec: photo.vqz: no natural look for the weights ")
    fails(
        run("decompress", "photo.vqz", "-o", "x.png", "--max-pixels", "3749", *WEIGHTS),
        1,
        "vqcodec: photo.vqz: the picture has 75 x 50 = 3750 pixels, the limit is 3749, --max-pixels changes it",
    )
    assert tree() == ["flipped.vqz", "photo.png", "photo.vqz"]


def test_what_a_picture_carries() -> None:
    """Transparency and greyness, and a profile."""
    source = Image.fromarray(models.picture(20, 30)[..., 0]).convert("LA")
    source.putalpha(Image.fromarray(np.tile(np.arange(30, dtype=np.uint8) * 8, (20, 1))))
    source.save("in.png")
    run("compress", "in.png", *WEIGHTS)
    assert run("decompress", "in.vqz", "-o", "out.png", *WEIGHTS).exit_code == 0
    with Image.open("out.png") as restored:
        assert restored.mode == "LA"
        assert np.array_equal(np.asarray(restored)[..., 1], np.asarray(source)[..., 1])
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(models.picture(20, 30)).save("in.png", icc_profile=profile)
    run("compress", "-f", "in.png", *WEIGHTS)
    assert run("decompress", "-f", "in.vqz", "-o", "out.png", *WEIGHTS).exit_code == 0
    with Image.open("out.png") as restored:
        assert (restored.mode, restored.info["icc_profile"]) == ("RGB", profile)


def test_folders() -> None:
    for number, name in enumerate(("in/a.png", "in/sub/b.bmp")):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(models.picture(20, 30, number)).save(name)
    os.mkdir("out")
    assert run("compress", "in", "-o", "out", "--quiet", *WEIGHTS).stderr == ""
    assert run("decompress", "out", "-o", "out", "--quiet", *WEIGHTS).stderr == ""
    assert tree("out") == ["a.png", "a.vqz", "sub/b.png", "sub/b.vqz"]
    for number, name in enumerate(("out/a.png", "out/sub/b.png")):
        assert metrics.psnr(models.picture(20, 30, number), pixels_of(name)) > 20


def test_several_processes() -> None:
    os.mkdir("in")
    for number in range(3):
        Image.fromarray(models.picture(20, 30, number)).save(f"in/{number}.png")
    Path("in/bad.png").write_bytes(b"not a picture")
    ran = run("--debug", "compress", "in", "-o", "out", "--jobs", "2", *WEIGHTS)
    assert ran.exit_code == 1 and ran.stderr.splitlines()[-1].startswith("vqcodec: 3 of 4 files done, 1 failed; ")
    assert re.search(r"Traceback .*in load\n.*\nvqcodec: in/bad\.png: not a PNG", ran.stderr, re.DOTALL), "from there"
    for number in range(3):
        expected = codec.compress(models.picture(20, 30, number), weights=WEIGHTS[1])
        assert Path(f"out/{number}.vqz").read_bytes() == expected
    assert run("decompress", "out", "--jobs", "2", "--rm", "--quiet", *WEIGHTS).stderr == ""
    assert tree("out") == ["0.png", "1.png", "2.png"]


def test_each_process_has_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        batch._begin()
        assert (torch.get_num_threads(), os.environ["OMP_NUM_THREADS"]) == (1, "1")
    finally:
        torch.set_num_threads(before)


def test_a_gpu_is_not_shared_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "cores", lambda: 3)
    for gpu, counts in ((False, [3, 3]), (True, [1, 3])):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        assert [batch._usual_count(device) for device in ("auto", "cpu")] == counts


def test_sample_and_reconstruct(photo: NDArray[np.uint8]) -> None:
    for name in ("one.png", "again.png"):
        assert run("sample", WEIGHTS[1], "-n", "2", "--size", "64", "--seed", "5", "-o", name).exit_code == 0
    assert pixels_of("one.png").shape == (64, 128, 3)
    assert np.array_equal(pixels_of("one.png"), pixels_of("again.png"))
    assert run("reconstruct", "photo.png", "-q", "60", "-o", "direct.png", *WEIGHTS).exit_code == 0
    data = compressed("-q", "60", "--tune", "psnr")
    assert np.array_equal(pixels_of("direct.png"), np.asarray(codec.decompress(data, weights=WEIGHTS[1])))
    Image.fromarray(np.dstack([photo, photo[..., 0]])).save("alpha.png")
    ran = run("reconstruct", "alpha.png", "-o", "direct.png", "-f", *WEIGHTS)
    assert ran.exit_code == 0
    assert np.array_equal(pixels_of("direct.png")[..., 3], photo[..., 0])


def test_a_part_and_a_smaller_picture(photo: NDArray[np.uint8]) -> None:
    """The bits per pixel are those of the file, however much of it is decoded."""
    bpp = f"{8 * len(compressed()) / 3750:.4f} bpp"
    for options, size in ((("--scale", "1/4"), "19 x 13"), (("--region", "5,6,7,8"), "7 x 8")):
        ran = run("decompress", "photo.vqz", "-f", "-o", "part.png", *options, *WEIGHTS)
        assert ran.exit_code == 0 and f" bytes, {size}, {bpp}, " in ran.stderr


def test_reconstruct_says_what_was_converted(photo: NDArray[np.uint8]) -> None:
    Image.fromarray(photo).convert("CMYK").save("photo.jpg")
    ran = run("reconstruct", "photo.jpg", "-o", "direct.png", *WEIGHTS)
    assert (ran.exit_code, ran.stdout) == (0, "")
    assert re.fullmatch("vqcodec: photo.jpg: note: CMYK was converted .*\n", ran.stderr)


def test_looks_of_the_photo_weights() -> None:
    """Unless told otherwise, the packaged weights are taken, and the faithful look of them."""
    shutil.copy(GOLDEN / "photo" / "psnr.vqz", "photo.vqz")
    for look, golden in ((), "psnr.png"), (("--look", "natural"), "psnr.natural.png"):
        assert run("decompress", "-f", "photo.vqz", *look).exit_code == 0
        gap = np.abs(pixels_of("photo.png").astype(int) - pixels_of(str(GOLDEN / "photo" / golden)))
        assert int(gap.max()) <= 1


def test_pipe_of_processes() -> None:
    """vqcodec compress - | vqcodec decompress -"""
    pixels = models.picture(40, 56, seed=7)
    Image.fromarray(pixels).save("photo.png")
    with open("photo.png", "rb") as source:
        first = process("-m", "vqcodec", "compress", "-", "-q", "70", *WEIGHTS, stdin=source)
    with first, process("-m", "vqcodec", "decompress", "-", *WEIGHTS, stdin=first.stdout) as second:
        restored, said = second.communicate()
        assert re.fullmatch(rb"- -> -: [\d,]+ -> [\d,]+ bytes, 56 x 40, .* bpp, .* s\n", first.stderr.read())
    assert (first.returncode, second.returncode) == (0, 0)
    assert said.startswith(b"- -> -: ") and b"56 x 40" in said
    Path("out.png").write_bytes(restored)
    data = codec.compress(pixels, quality=70, weights=WEIGHTS[1])
    assert np.array_equal(pixels_of("out.png"), np.asarray(codec.decompress(data, weights=WEIGHTS[1])))


def test_a_process_that_fails() -> None:
    """A shell sees the exit code and one line."""
    Path("bad.vqz").write_bytes((GOLDEN / "tiny.vqz").read_bytes()[:-1])
    with process("-m", "vqcodec", "info", "bad.vqz") as ran:
        out, said = ran.communicate()
    assert (ran.returncode, out) == (1, b"")
    assert re.fullmatch(rb"vqcodec: bad\.vqz: .*segment 6 of 6 ends at byte \d+, the file has \d+ bytes\n", said)


def test_ray_that_is_not_installed(monkeypatch: pytest.MonkeyPatch, photo: NDArray[np.uint8]) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for name in [name for name in sys.modules if name.startswith("vqcodec.distributed")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(vqcodec, "distributed", raising=False)
    for command in ("compress", "decompress"):
        message = f"--ray needs the package pyarrow: pip install 'vqcodec[ray]'. (see vqcodec {command} --help)"
        fails(run(command, "photo.png", "-o", "out", "--ray"), 2, f"vqcodec: {message}")
