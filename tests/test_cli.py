"""The command line with a codec that is no codec: PNG files inside of .vqz containers."""

import base64
import errno
import importlib
import io
import json
import math
import os
import re
import signal
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from commandline import ROOT, fails, process, redirected, run, tree
from PIL import Image, ImageCms

import vqcodec
from vqcodec import batch, bitstream, cli, files, image, limits, options, packaged, pool, terminal
from vqcodec.errors import FormatError, TrainingError, WeightsError
from vqcodec.pictures import plugins
from vqcodec.ssimulacra2 import ssimulacra2
from vqcodec.target import Target
from vqcodec.train.process import Interrupted


def fake_compress(picture, *, quality, target, max_size, weights, device, effort, tune, verify, on_progress):
    height, width, _ = picture.pixels.shape
    header = bitstream.Header(width, height, quality or 50, b"fake", layers=1, tile=0, grey=picture.grey)
    return bitstream.write(header, [], [image.save(picture, ".png")])


def fake_decode_picture(
    data,
    *,
    weights=None,
    look="faithful",
    device="auto",
    partial=False,
    region=None,
    scale=1,
    grey=False,
    max_pixels=limits.DEFAULT_MAX_PIXELS,
):
    container = bitstream.read(data, max_pixels=max_pixels, partial=partial)
    if (region, scale, grey) != (None, 1, False):
        raise WeightsError(f"asked for {region}, {scale}, {grey}")
    (segment,) = container.segments
    if segment is None:
        header = container.header
        return image.Picture(np.zeros((header.height, header.width, 3), np.uint8), notes=container.problems)
    return image.load(segment, max_pixels=None)


@pytest.fixture
def codec(monkeypatch):
    fake = ModuleType("vqcodec.codec")
    fake.compress, fake.decode_picture = fake_compress, fake_decode_picture
    use(monkeypatch, fake)
    return fake


def use(monkeypatch, module: ModuleType) -> None:
    package, _, name = module.__name__.rpartition(".")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(importlib.import_module(package), name, module, raising=False)


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def _one_core(monkeypatch):
    """Other processes would not know of a fake codec."""
    monkeypatch.setattr(pool, "cores", lambda: 1)


@pytest.fixture
def photo(make_photo):
    pixels = make_photo(30, 40)
    Image.fromarray(pixels).save("photo.png")
    return pixels


# The program


def test_version():
    ran = run("--version")
    assert (ran.exit_code, ran.stdout) == (0, f"vqcodec {vqcodec.__version__} (format {bitstream.VERSION})\n")


@pytest.mark.parametrize(
    "command",
    [[], ["compress"], ["decompress"], ["info"], ["compare"], ["studio"], ["train"], ["sample"], ["reconstruct"]],
)
@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help(command, option):
    ran = run(*command, option)
    assert ran.exit_code == 0 and ran.stderr == ""
    assert "Example" in ran.stdout
    assert max(map(len, ran.stdout.splitlines())) <= 100


@pytest.mark.parametrize(
    ("command", "default"), [("compress", "photo"), ("decompress", "the packaged ones that the .vqz file names")]
)
def test_help_says_which_weights_are_taken(command, default):
    text = " ".join(run(command, "-h").stdout.split())
    assert f"Weights file, or name of packaged weights. [default: {default}]" in text


def test_help_has_ranges_and_defaults():
    assert re.search(
        r"--quality INTEGER RANGE .*\[default: \(50\); 1<=x<=100\]", " ".join(run("compress", "-h").stdout.split())
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing command."),
        (["compress"], "Missing argument 'IN...'. (see vqcodec compress --help)"),
        (["nonsense"], "No such command 'nonsense'. (see vqcodec --help)"),
        (["compress", "-q", "0", "x"], "Invalid value for '-q' / '--quality': 0 is not in the range 1<=x<=100."),
        (["compress", "-q", "101", "x"], "Invalid value for '-q' / '--quality': 101 is not in the range 1<=x<=100."),
        (["compress", "-q", "9", "--target-bpp", "1", "x"], "Give one of -q and the --target options."),
        (["compress", "--target-psnr", "nan", "x"], "psnr must be above 0 and below inf, got nan."),
        (["compress", "--max-size", "0", "x"], "Invalid value for '--max-size': '0' is not a size like"),
        (["compress", "--effort", "10", "x"], "Invalid value for '--effort': 10 is not in the range 1<=x<=9."),
        (["compress", "--target-size", "5XB", "x"], "Invalid value for '--target-size': '5XB' is not a size like"),
        (["compress", "--tune", "pretty", "x"], "Invalid value for '--tune': 'pretty' is not one of 'visual', 'psnr'."),
        (["compress", "--device", "tpu", "x"], "Invalid value for '--device'"),
        (["compress", "a.png", "a.png"], "a.png and a.png would both become a.vqz"),
        (["compress", "a.png", "b.png", "-o", os.devnull], f"{os.devnull} is not a folder"),
        (["compress", "a.png", "-o", ""], "the name of the output is empty"),
        (["decompress", "a.vqz", "-o", "a.xyz"], "no picture format has the suffix '.xyz'"),
        (["decompress", "a.vqz", "--test", "-o", "a.png"], "--test writes nothing, so -o has no use."),
        (
            ["decompress", "a.vqz", "--region", "1,2,3"],
            "Invalid value for '--region': '1,2,3' is not four numbers X,Y,W,H.",
        ),
        (
            ["decompress", "a.vqz", "--scale", "1/3"],
            "Invalid value for '--scale': '1/3' is not one of '1',",
        ),
        (["decompress", "a.vqz", "--test", "--rm"], "--test writes nothing, so --skip-existing and --rm have no use."),
        (
            ["decompress", "a.vqz", "--rm", "--scale", "1/2"],
            "--rm would lose what --partial, --region, --scale and --grey",
        ),
        (["decompress", "a.vqz", "--rm", "--partial"], "--rm would lose what --partial, --region, --scale and --grey"),
        (
            ["compress", "-", "--rm", "-o", "a.vqz"],
            "--rm needs files: standard streams and devices cannot be read back.",
        ),
        (
            ["compress", "a.png", "--rm", "-o", "-"],
            "--rm needs files: standard streams and devices cannot be read back.",
        ),
        (["compress", "a.png", "--rm", "-o", os.devnull], "--rm needs files: standard streams and devices"),
        (["compress", "-", "--json"], "--json needs standard output for itself; give a file with -o."),
        (["compress", "a.png", "-o", "-", "--if-smaller"], "--if-smaller may write nothing, so it needs a file; give"),
        (["compress", "a.png", "--jobs", "0"], "Invalid value for '-j' / '--jobs': 0 is not in the range x>=1."),
        (["compress", "a.png", "-o", "out", "--strip", "--ray"], "--ray does not know --strip."),
        (["decompress", "a.vqz", "-o", "out", "--jobs", "2", "--ray"], "--ray does not know --jobs."),
        (
            ["decompress", "a", "--test", "--scale", "1/2"],
            "--test checks whether files are whole, so --scale has no use.",
        ),
        (["compare", "a", "b", "c"], "More than two pictures are compared on a page: give --html."),
        (["compare", "a", "b", "--html", "a.html", "--json"], "Give one of --html and --json."),
        (["compare", "a.png", "b.png", "--html", "a.png"], "the page must end in .html, got a.png"),
        (["info"], "Give either files or --weights."),
        (["sample"], "Missing option '-o' / '--output'."),
        (["sample", "-o", "a.xyz"], "no picture format has the suffix '.xyz'"),
        (["sample", "-o", "a.png", "--rows", "3"], "--rows says what to keep of --complete PICTURE."),
        (["sample", "-o", "a.png", "--temperature", "nan"], "--temperature must be finite."),
        (["sample", "-o", "a.png", "--complete", "b.png", "--size", "8"], "--complete PICTURE has a size of its own"),
        (["train", "x", "-o", "w.safetensors", "--minutes", "inf"], "--minutes must be finite."),
        (["train", "x"], "Missing option '-o' / '--output'."),
        (["train", "w.png", "-o", "w.safetensors"], "the sheet of pictures beside OUT would replace the input "),
        (["compare", "-", "-"], "Standard input can be read only once."),
        (["compare", "-", "a.png", "-", "--html", "a.html"], "Standard input can be read only once."),
        (["info", "-", "a.vqz", "-"], "Standard input can be read only once."),
        (["train", "x", "-o", "y", "--minutes", "0"], "Invalid value for '--minutes'"),
        (["train", "x", "-o", "y", "--distortion", "psnr"], "Invalid value for '--distortion'"),
    ],
)
def test_wrong_usage(arguments, message):
    ran = run(*arguments)
    assert (ran.exit_code, ran.stdout) == (2, "")
    (line,) = ran.stderr.splitlines()
    assert line.startswith(f"vqcodec: {message}") and line.endswith("--help)")


READERS = [
    ["compress", "FILE", "-o", "out.vqz"],
    ["compress", "photo.png", "--weights", "FILE", "-o", "out.vqz"],
    ["decompress", "FILE", "-o", "out.png"],
    ["decompress", "a.vqz", "--weights", "FILE", "-o", "out.png"],
    ["info", "FILE"],
    ["compare", "FILE", "photo.png"],
    ["compare", "photo.png", "FILE"],
    ["compare", "photo.png", "photo.png", "FILE", "--html", "out.html"],
    ["compare", "photo.png", "photo.png", "--weights", "FILE"],
    ["train", "FILE", "-o", "out.safetensors"],
    ["train", "photo.png", "-o", "out.safetensors", "--from", "FILE"],
    ["train", "photo.png", "-o", "FILE.natural.safetensors", "--from", "photo.png", "--natural", "FILE"],
    ["train", "photo.png", "-o", "out.safetensors", "--lpips", "FILE"],
    ["sample", "FILE", "-o", "out.png"],
    ["sample", "--complete", "FILE", "-o", "out.png"],
    ["reconstruct", "FILE", "-o", "out.png"],
    ["reconstruct", "photo.png", "--weights", "FILE", "-o", "out.png"],
]


@pytest.mark.parametrize("command", READERS, ids=" ".join)
def test_what_cannot_be_read_is_no_wrong_usage(codec, photo, monkeypatch, command):
    """Whichever command and option names it, and whether it is missing or closed: one line, and exit code 1."""
    write_vqz("a.vqz")
    arguments = [argument.replace("FILE", "x.bmp") for argument in command]
    before = tree()
    fails(run(*arguments), 1, "vqcodec: x.bmp: No such file or directory")
    assert tree() == before

    Path("x.bmp").touch()
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: os.fspath(path) != "x.bmp" and access(path, mode))
    for owner, name, function in ((options, "open", open), (Path, "read_bytes", Path.read_bytes)):

        def refuse(path, *how, function=function):
            if os.fspath(path) == "x.bmp":
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "x.bmp")
            return function(path, *how)

        monkeypatch.setattr(owner, name, refuse, raising=False)  # the tests may run as root, who reads everything
    fails(run(*arguments), 1, "vqcodec: x.bmp: Permission denied")


@pytest.mark.parametrize(
    "command",
    [
        ["compress", "photo.png", "-o", "out.png", "-f"],
        ["reconstruct", "photo.png", "-o", "out.png"],
        ["train", "photo.png", "-o", "out.safetensors"],
        ["compare", "photo.png", "photo.png", "--html", "out.html"],
    ],
    ids=" ".join,
)
def test_outputs_need_not_be_readable(photo, monkeypatch, command):
    """Nor is it wrong usage when one cannot be written."""
    name = next(argument for argument in command if argument.startswith("out."))
    Path(name).touch()
    monkeypatch.setattr(os, "access", lambda path, mode: path != name)
    said = "Permission denied" if "-f" in command else "File exists, -f would overwrite it"
    fails(run(*command), 1, f"vqcodec: {name}: {said}")


# compress and decompress


def test_decompress_passes_on_what_is_asked_for(codec):
    write_vqz("a.vqz")
    ran = run("decompress", "a.vqz", "--region", "1,2,3,4", "--scale", "1/4", "--grey")
    fails(ran, 1, "vqcodec: a.vqz: asked for (1, 2, 3, 4), 4, True")


def test_round_trip(codec, photo):
    ran = run("compress", "photo.png")
    assert (ran.exit_code, ran.stdout) == (0, "")
    size, written = os.path.getsize("photo.png"), os.path.getsize("photo.vqz")
    assert re.fullmatch(
        rf"photo\.png -> photo\.vqz: {size:,} -> {written:,} bytes, 40 x 30, {8 * written / 1200:.4f} bpp,"
        r" \d+\.\d\d s\n",
        ran.stderr,
    )
    os.remove("photo.png")
    ran = run("decompress", "photo.vqz")
    assert ran.exit_code == 0
    assert ran.stderr.startswith(f"photo.vqz -> photo.png: {written:,} -> ")
    assert np.array_equal(image.load(Path("photo.png").read_bytes(), max_pixels=None).pixels, photo)
    assert tree() == ["photo.png", "photo.vqz"]


@pytest.mark.parametrize(
    ("arguments", "settings"),
    [
        (
            ["compress", "-q", "7", "--max-size", "9KB", "--effort", "3", "--tune", "psnr", "--verify"],
            {"quality": 7, "target": None, "max_size": 9000, "effort": 3, "tune": "psnr", "verify": True},
        ),
        (
            ["compress", "--target-psnr", "36", "--max-pixels", "99"],
            {"quality": None, "target": Target("psnr", 36), "max_pixels": 99},
        ),
        (
            ["decompress", "--look", "natural", "--scale", "1/4", "--region", "1,2,3,4", "--grey", "--partial"],
            {"look": "natural", "scale": 4, "region": (1, 2, 3, 4), "grey": True, "partial": True},
        ),
    ],
    ids=["compress", "target", "decompress"],
)
def test_options_reach_ray(monkeypatch, arguments, settings):
    seen = {}

    def run_on_ray(name, settings, inputs, output, address, **options):
        seen.update(settings, name=name.lower(), inputs=inputs, output=output, **options)
        return 0

    monkeypatch.setattr(batch, "run_on_ray", run_on_ray)
    assert run(*arguments, "in", "-o", "out", "--ray", "--device", "cpu", "-f", "--quiet").exit_code == 0
    expected = {"name": arguments[0], "inputs": ("in",), "output": "out", "device": "cpu", "overwrite": True}
    assert seen.items() >= (expected | {"quiet": True, "weights": None} | settings).items()


def test_options_reach_the_codec(codec, photo, monkeypatch):
    seen = {}

    def compress(picture, **options):
        seen.update(options)
        return fake_compress(picture, **options)

    monkeypatch.setattr(codec, "compress", compress)
    Path("w.safetensors").touch()
    assert (
        run("compress", "photo.png", "-q", "7", "--weights", "w.safetensors", "--device", "cpu", "--verify").exit_code
        == 0
    )
    nothing = {"quality": None, "target": None, "max_size": None, "effort": 1, "tune": None, "on_progress": None}
    assert seen == {**nothing, "quality": 7, "weights": "w.safetensors", "device": "cpu", "verify": True}
    assert run("compress", "photo.png", "-f").exit_code == 0
    assert seen == {**nothing, "weights": None, "device": "auto", "verify": False}
    assert run("compress", "photo.png", "-f", "--effort", "3", "--weights", "photo").exit_code == 0
    assert (seen["effort"], seen["weights"]) == (3, str(packaged.find()))
    for tune in packaged.TUNES:
        assert run("compress", "photo.png", "-f", "--tune", tune).exit_code == 0
        assert seen["tune"] == tune


@pytest.mark.parametrize(
    ("arguments", "target", "max_size"),
    [
        (["--target-size", "1.5KB"], vqcodec.Target("size", 1500), None),
        (["--target-size", "2 kib", "--max-size", "3000"], vqcodec.Target("size", 2048), 3000),
        (["--target-bpp", ".3"], vqcodec.Target("bpp", 0.3), None),
        (["--target-psnr", "36"], vqcodec.Target("psnr", 36.0), None),
        (["--target-ssimulacra2", "-5"], vqcodec.Target("ssimulacra2", -5.0), None),
        (["--max-size", "1M"], None, 1_000_000),
        (["--max-size", "1" + 400 * "0"], None, 10**400),
    ],
)
def test_targets(codec, photo, monkeypatch, arguments, target, max_size):
    seen = {}

    def compress(picture, **options):
        seen.update(options)
        return fake_compress(picture, **options)

    monkeypatch.setattr(codec, "compress", compress)
    ran = run("compress", "photo.png", *arguments)
    assert ran.exit_code == 0 and re.search(r" bpp, quality 50, \d+\.\d\d s$", ran.stderr.strip())
    assert (seen["quality"], seen["target"], seen["max_size"]) == (None, target, max_size)


@pytest.mark.parametrize(("suffix", "format"), [(".jpg", "JPEG"), (".WEBP", "WEBP"), (".tif", "TIFF"), (".bmp", "BMP")])
def test_output_format_goes_by_the_suffix(codec, photo, suffix, format):
    run("compress", "photo.png")
    assert run("decompress", "photo.vqz", "-o", f"out{suffix}").exit_code == 0
    with Image.open(f"out{suffix}") as restored:
        assert restored.format == format


def test_quiet(codec, photo):
    assert run("compress", "photo.png", "--quiet").stderr == ""
    assert run("decompress", "photo.vqz", "-o", "x.png", "--quiet").stderr == ""


def test_notes(codec):
    Image.new("CMYK", (4, 4)).save("ink.jpg")
    first, _ = run("compress", "ink.jpg").stderr.splitlines()
    assert first.startswith("vqcodec: ink.jpg: note: CMYK was converted")


def test_streams(codec, photo):
    ran = run("compress", "-", stdin=Path("photo.png").read_bytes())
    assert ran.exit_code == 0
    assert ran.stderr.startswith("- -> -: ")
    restored = run("decompress", "-", stdin=ran.stdout_bytes)
    assert restored.stdout_bytes.startswith(b"\x89PNG")
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(restored.stdout_bytes))), photo)
    assert run("compress", "photo.png", "-o", "-").stdout_bytes == ran.stdout_bytes
    assert run("decompress", "-", "-o", "x.png", stdin=ran.stdout_bytes).stdout == ""
    assert tree() == ["photo.png", "x.png"]


def test_no_binary_to_a_terminal(photo, monkeypatch):
    monkeypatch.setattr(cli.sys, "stdout", SimpleNamespace(isatty=lambda: True))
    with pytest.raises(cli.click.UsageError, match="terminal"):
        cli._plan(["-"], None, files.PICTURE_SUFFIXES, ".vqz")


def test_existing_files_are_kept(codec, photo):
    Path("photo.vqz").write_bytes(b"precious")
    fails(run("compress", "photo.png"), 1, "vqcodec: photo.vqz: File exists, -f would overwrite it")
    assert Path("photo.vqz").read_bytes() == b"precious"
    assert run("compress", "-f", "photo.png").exit_code == 0
    assert bitstream.read_info(Path("photo.vqz").read_bytes()).header.width == 40


def set_time(name: str, seconds: int) -> None:
    os.utime(name, (seconds, seconds))


def test_times_of_sources_are_kept(codec, photo):
    set_time("photo.png", 1000)
    assert run("compress", "photo.png").exit_code == 0
    assert os.stat("photo.vqz").st_mtime == os.stat("photo.vqz").st_atime == 1000
    assert run("decompress", "photo.vqz", "-f").exit_code == 0
    assert os.stat("photo.png").st_mtime == 1000
    assert run("compress", "photo.png", "-f", "--no-preserve").exit_code == 0
    assert os.stat("photo.vqz").st_mtime > 1000


def test_skip_existing(codec, photo, make_photo):
    for name, target, source_time, target_time in [
        ("current", b"as old", 1000, 1000),
        ("newer", b"newer", 1000, 2000),
        ("outdated", b"older", 2000, 1000),
    ]:
        Image.fromarray(photo).save(f"{name}.png")
        Path(f"{name}.vqz").write_bytes(target)
        set_time(f"{name}.png", source_time)
        set_time(f"{name}.vqz", target_time)
    ran = run("compress", ".", "--skip-existing", "--json")
    assert ran.exit_code == 0 and len(ran.stderr.splitlines()) == 3
    assert ran.stderr.splitlines()[-1].startswith("vqcodec: 2 of 4 files done, 2 skipped, 0 failed; ")
    told = {line["source"]: (line["status"], line["bytes_out"]) for line in map(json.loads, ran.stdout.splitlines())}
    size = os.path.getsize("photo.vqz")
    assert told == {
        "./current.png": ("skipped", None),
        "./newer.png": ("skipped", None),
        "./outdated.png": ("done", size),
        "./photo.png": ("done", size),
    }
    assert (Path("current.vqz").read_bytes(), Path("newer.vqz").read_bytes()) == (b"as old", b"newer")
    ran = run("compress", ".", "--skip-existing")
    assert ran.exit_code == 0 and ran.stderr == "vqcodec: 0 of 4 files done, 4 skipped, 0 failed; 0 -> 0 bytes\n"


def test_skip_existing_does_not_hide_what_cannot_be_written(codec, photo, monkeypatch):
    """Nor does it replace a file that appears in the meantime."""
    Path("photo.vqz").write_bytes(b"read-only")
    set_time("photo.vqz", 1000)
    with monkeypatch.context() as patched:
        access = os.access
        patched.setattr(os, "access", lambda path, mode: path != "photo.vqz" and access(path, mode))
        fails(run("compress", "photo.png", "--skip-existing"), 1, "vqcodec: photo.vqz: Permission denied")
    assert Path("photo.vqz").read_bytes() == b"read-only"
    os.remove("photo.vqz")

    def compress(picture, **options):
        Path("photo.vqz").write_bytes(b"precious")
        return fake_compress(picture, **options)

    monkeypatch.setattr(codec, "compress", compress)
    fails(run("compress", "photo.png", "--skip-existing"), 1, "vqcodec: photo.vqz: File exists, -f would overwrite it")
    assert Path("photo.vqz").read_bytes() == b"precious"


def test_if_smaller(codec, photo, monkeypatch):
    """The fake files are a little larger than PNG files."""
    Image.fromarray(photo).save("large.bmp")
    ran = run("compress", ".", "--if-smaller", "--rm", "--json")
    size = os.path.getsize("photo.png")
    assert ran.exit_code == 0
    assert re.search(
        rf"^vqcodec: \./photo\.png: left out: {size:,} bytes would become [\d,]+$", ran.stderr, re.MULTILINE
    )
    assert ran.stderr.splitlines()[-1].startswith("vqcodec: 1 of 2 files done, 1 left out, 0 failed; ")
    assert [json.loads(line)["status"] for line in ran.stdout.splitlines()] == ["done", "left out"]
    assert tree() == ["large.vqz", "photo.png"]


def test_strip(codec, photo, monkeypatch):
    seen = []

    def compress(picture, **options):
        seen.append(picture)
        return fake_compress(picture, **options)

    monkeypatch.setattr(codec, "compress", compress)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    turned = Image.Exif()
    turned[0x0112] = 6  # a quarter to the right
    picture = Image.fromarray(photo)
    picture.putalpha(100)
    picture.save(
        "all.webp", lossless=True, exif=turned, xmp=b"<x:xmpmeta xmlns:x='adobe:ns:meta/'/>", icc_profile=profile
    )
    assert run("compress", "all.webp", "-o", "kept.vqz").exit_code == 0
    assert run("compress", "all.webp", "--strip").exit_code == 0
    kept, stripped = seen
    assert kept.exif and kept.xmp and (stripped.exif, stripped.xmp) == (None, None)
    assert stripped.icc == kept.icc == profile
    assert np.array_equal(stripped.pixels, np.rot90(photo, -1)) and stripped.alpha.max() == 100


def test_json(codec, photo):
    Path("bad.png").write_bytes(b"not a picture")
    Image.fromarray(photo).convert("CMYK").save("ink.jpg")
    ran = run("compress", "missing.png", "bad.png", "ink.jpg", "--json", "--quiet", "-q", "7")
    missing, bad, ink = map(json.loads, ran.stdout.splitlines())
    nothing = dict.fromkeys(["bytes_in", "bytes_out", "width", "height", "quality", "seconds"])
    assert ran.exit_code == 1
    assert missing == {
        **nothing,
        "source": "missing.png",
        "target": "missing.vqz",
        "status": "failed",
        "error": "missing.png: No such file or directory",
        "notes": [],
    }
    assert bad["status"] == "failed" and bad["error"].startswith("bad.png: not a PNG")
    size = os.path.getsize("ink.vqz")
    assert ink.pop("seconds") >= 0 and ink.pop("notes")[0].startswith("CMYK was converted")
    assert ink == {
        "source": "ink.jpg",
        "target": "ink.vqz",
        "status": "done",
        "bytes_in": os.path.getsize("ink.jpg"),
        "bytes_out": size,
        "width": 40,
        "height": 30,
        "quality": 7,
        "error": None,
    }
    (tested,) = map(json.loads, run("decompress", "--test", "--json", "ink.vqz").stdout.splitlines())
    assert (tested["target"], tested["bytes_in"], tested["bytes_out"], tested["status"]) == (None, size, None, "done")


def test_rm(codec, photo, monkeypatch):
    verified = []

    def compress(picture, **options):
        verified.append(options["verify"])
        return fake_compress(picture, **options)

    monkeypatch.setattr(codec, "compress", compress)
    assert run("compress", "photo.png", "--rm").exit_code == 0
    assert (verified, tree()) == ([True], ["photo.vqz"])
    assert run("decompress", "photo.vqz", "--rm").exit_code == 0
    assert tree() == ["photo.png"]
    Path("photo.vqz").write_bytes(b"newer")
    assert run("compress", "photo.png", "--rm", "--skip-existing").exit_code == 0
    assert tree() == ["photo.png", "photo.vqz"], "what is skipped stays"


def test_rm_and_skip_existing_spare_the_only_copy(codec, photo):
    """photo.vqz was made of photo.jpg, which is gone, so photo.png would take its name."""
    Path("photo.vqz").write_bytes(b"of photo.jpg")
    set_time("photo.vqz", 1000)
    said = "vqcodec: photo.vqz: File is older, and --rm does not make it again"
    fails(run("compress", "photo.png", "--rm", "--skip-existing"), 1, said)
    assert tree() == ["photo.png", "photo.vqz"] and Path("photo.vqz").read_bytes() == b"of photo.jpg"


@pytest.mark.parametrize(
    ("broken", "said", "left"),
    [
        ("codec", "vqcodec: photo.png: verification failed", ["photo.png"]),
        ("write", "vqcodec: photo.vqz: No space left on device", ["photo.png"]),
        ("disk", "vqcodec: photo.vqz: does not read back as it was written, so photo.png is kept", None),
        ("sync", "vqcodec: photo.vqz: Input/output error", None),
        ("source", "vqcodec: photo.png: has changed since it became photo.vqz, so it is kept", None),
        ("unlink", "vqcodec: photo.png: Operation not permitted", None),
    ],
)
def test_rm_keeps_what_may_be_needed(codec, photo, monkeypatch, broken, said, left):
    def compress(picture, **options):
        if broken == "codec":
            raise FormatError("verification failed")
        if broken == "source":
            Image.fromarray(255 - photo).save("photo.png")
        return fake_compress(picture, **options)

    def fail(number):
        def failing(*_, **__):
            raise OSError(number, os.strerror(number), "photo.png" if broken == "unlink" else None)

        return failing

    def write(path, data, **_):
        Path(path).write_bytes(data[:-1] + b"?")

    monkeypatch.setattr(codec, "compress", compress)
    if broken == "write":
        monkeypatch.setattr(files, "_write_all", fail(28))
    elif broken == "disk":
        monkeypatch.setattr(files, "write", write)
    elif broken == "sync":
        monkeypatch.setattr(files.os, "fsync", fail(5))
    with monkeypatch.context() as patched:
        if broken == "unlink":
            unlink = os.unlink
            patched.setattr(files.os, "unlink", lambda path: fail(1)() if path == "photo.png" else unlink(path))
        fails(run("compress", "photo.png", "--rm"), 1, said)
    assert tree() == (left or ["photo.png", "photo.vqz"])


def test_input_is_never_replaced(codec, photo):
    ran = run("compress", "-f", "photo.png", "-o", "./photo.png")
    fails(ran, 2, "vqcodec: the output ./photo.png would replace the input photo.png (see vqcodec compress --help)")


def test_cheap_checks_come_first(monkeypatch, photo):
    monkeypatch.setitem(sys.modules, "vqcodec.codec", None)  # importing it fails
    fails(run("compress", "nothing.png"), 1, "vqcodec: nothing.png: No such file or directory")
    fails(run("compress", "photo.png", "-o", "no/x.vqz"), 1, "vqcodec: no: No such file or directory")
    fails(run("compress", "", "-o", "x.vqz"), 1, "vqcodec: '': No such file or directory")


def test_a_current_folder_that_is_gone(photo, monkeypatch):
    def getcwd():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))

    monkeypatch.setattr(os, "getcwd", getcwd)
    fails(run("compress", "photo.png"), 1, "vqcodec: .: No such file or directory")


def test_names_are_shown_on_one_line(codec, photo):
    fails(run("compress", "a\n\x1b[31mb.png"), 1, r"vqcodec: a\n\x1b[31mb.png: No such file or directory")


def test_bad_files_do_not_stop_the_others(codec, photo):
    Path("bad.png").write_bytes(b"not a picture")
    Image.fromarray(photo).save("third.bmp")
    ran = run("compress", "missing.jpg", "bad.png", "photo.png", "third.bmp")
    assert ran.exit_code == 1
    lines = ran.stderr.splitlines()
    assert lines[0] == "vqcodec: missing.jpg: No such file or directory"
    assert lines[1].startswith("vqcodec: bad.png: not a PNG, JPEG")
    assert lines[2].startswith("photo.png -> photo.vqz: ")
    assert lines[3].startswith("third.bmp -> third.vqz: ")
    assert lines[4].startswith("vqcodec: 2 of 4 files done, 2 failed; ")
    assert len(lines) == 5
    assert tree() == ["bad.png", "photo.png", "photo.vqz", "third.bmp", "third.vqz"]


def test_unreadable_files_do_not_stop_the_others(codec, photo, monkeypatch):
    Image.fromarray(photo).save("closed.bmp")
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, *how: path != "closed.bmp" and access(path, *how))
    ran = run("compress", "closed.bmp", "photo.png")
    assert ran.exit_code == 1
    lines = ran.stderr.splitlines()
    assert lines[0] == "vqcodec: closed.bmp: Permission denied"
    assert lines[2].startswith("vqcodec: 1 of 2 files done, 1 failed; ")
    assert tree() == ["closed.bmp", "photo.png", "photo.vqz"]


def test_folders(codec, make_photo):
    for name in ("in/a.png", "in/sub/b.jpg", "in/sub/readme.txt"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("txt"):
            Path(name).touch()
        else:
            Image.fromarray(make_photo(8, 9)).save(name)
    Path("out").mkdir()
    ran = run("compress", "in", "-o", "out")
    assert ran.exit_code == 0
    assert ran.stderr.splitlines()[-1].startswith("vqcodec: 2 of 2 files done, 0 failed; ")
    assert tree("out") == ["a.vqz", "sub/b.vqz"]
    Path("back").mkdir()
    assert run("decompress", "out", "-o", "back", "--quiet").stderr == ""
    assert tree("back") == ["a.png", "sub/b.png"]
    fails(run("decompress", "in"), 2, "vqcodec: folder in holds no files named *.vqz (see vqcodec decompress --help)")


def test_pictures_that_differ_in_the_suffix_alone(codec, photo):
    Image.fromarray(photo).save("photo.bmp")
    lines = run("compress", ".").stderr.splitlines()
    assert lines[1] == "vqcodec: ./photo.png: note: becomes ./photo.png.vqz, because ./photo.bmp becomes ./photo.vqz"
    assert lines[3].startswith("vqcodec: 2 of 2 files done, 0 failed; ") and len(lines) == 4
    assert tree() == ["photo.bmp", "photo.png", "photo.png.vqz", "photo.vqz"]
    assert run("compress", ".", "-f", "--quiet").stderr == ""


@pytest.mark.parametrize(
    ("name", "start", "said"),
    [
        ("a.jxl", b"\xff\x0a\xfa", "JPEG XL pictures cannot be read"),
        ("a.jxl", b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL pictures cannot be read"),
        ("a.heic", b"\0\0\0\x18ftypheic", "HEIF pictures need pillow-heif: pip install 'vqcodec[heif]'"),
        ("a.heif", b"\0\0\0\x18ftypmif1", "HEIF pictures need pillow-heif: pip install 'vqcodec[heif]'"),
    ],
)
def test_pictures_without_a_plugin(codec, photo, monkeypatch, name, start, said):
    """Are named and counted, and do not stop the others."""
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # importing it fails
    monkeypatch.delitem(Image.OPEN, "HEIF")
    plugins.register()
    Path(name).write_bytes(start + bytes(50))
    ran = run("compress", ".")
    lines = ran.stderr.splitlines()
    assert (ran.exit_code, lines[0]) == (1, f"vqcodec: ./{name}: {said}")
    assert lines[2].startswith("vqcodec: 1 of 2 files done, 1 failed; ")
    assert tree() == [name, "photo.png", "photo.vqz"]


def test_heif(codec, make_photo):
    heif = pytest.importorskip("pillow_heif", reason="needs pip install pillow-heif")
    heif.register_heif_opener()
    turned = Image.Exif()
    turned[0x0112] = 6  # a quarter to the right
    Image.fromarray(make_photo(30, 40)).save("a.heic", exif=turned.tobytes())
    assert run("compress", ".").exit_code == 0
    assert run("decompress", "a.vqz", "-o", "a.png").exit_code == 0
    with Image.open("a.png") as restored, Image.open("a.heic") as original:
        assert restored.size == original.size == (30, 40)
        assert np.array_equal(restored, original)


def test_damaged_file(codec, photo):
    run("compress", "photo.png")
    data = Path("photo.vqz").read_bytes()
    Path("cut.vqz").write_bytes(data[:-5])
    fails(
        run("decompress", "cut.vqz"),
        1,
        f"vqcodec: cut.vqz: segment 1 of 1 ends at byte {len(data)}, the file has {len(data) - 5} bytes",
    )
    assert tree() == ["cut.vqz", "photo.png", "photo.vqz"]
    ran = run("decompress", "cut.vqz", "--partial")
    assert ran.exit_code == 0
    assert ran.stderr.splitlines()[0].startswith("vqcodec: cut.vqz: warning: segment 1 of 1 ends")
    assert Path("cut.png").exists()


def test_decompress_test_writes_nothing(codec, photo):
    run("compress", "photo.png")
    Path("bad.vqz").write_bytes(Path("photo.vqz").read_bytes()[:-1])
    ran = run("decompress", "--test", "photo.vqz", "bad.vqz")
    assert ran.exit_code == 1
    assert ran.stderr.splitlines()[0].startswith("photo.vqz: fine, ")
    assert ran.stderr.splitlines()[1].startswith("vqcodec: bad.vqz: segment 1 of 1 ends")
    assert tree() == ["bad.vqz", "photo.png", "photo.vqz"]
    assert run("decompress", "--test", "photo.vqz").exit_code == 0


def test_max_pixels(codec, photo, monkeypatch):
    told = "the picture has 40 x 30 = 1200 pixels, the limit is 1199, --max-pixels changes it"
    fails(run("compress", "photo.png", "--max-pixels", "1199"), 1, f"vqcodec: photo.png: {told}")
    with monkeypatch.context() as patch:
        patch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # twice as many are Pillow's limit
        assert run("compress", "photo.png", "--max-pixels", "1200").exit_code == 0
        assert Image.MAX_IMAGE_PIXELS == 100
    fails(run("decompress", "photo.vqz", "-o", "x.png", "--max-pixels", "1199"), 1, f"vqcodec: photo.vqz: {told}")
    assert run("decompress", "photo.vqz", "-o", "x.png", "--max-pixels", "1200").exit_code == 0


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (MemoryError(), "vqcodec: photo.png: not enough memory"),
        (FormatError("one\ntwo"), "vqcodec: photo.png: one"),
        (WeightsError("no weights"), "vqcodec: photo.png: no weights"),
        (OSError(28, "No space left on device", "tmp"), "vqcodec: tmp: No space left on device"),
        (RuntimeError("odd\nlong"), "vqcodec: photo.png: RuntimeError: odd (vqcodec --debug ... shows where)"),
        (ZeroDivisionError(), "vqcodec: photo.png: ZeroDivisionError:  (vqcodec --debug ... shows where)"),
    ],
)
def test_every_error_is_one_line(codec, photo, monkeypatch, error, line):
    def compress(*_, **__):
        raise error

    monkeypatch.setattr(codec, "compress", compress)
    fails(run("compress", "photo.png"), 1, line)
    ran = run("--debug", "compress", "photo.png")
    assert ran.exit_code == 1
    assert "Traceback" in ran.stderr and ran.stderr.endswith(line + "\n")
    assert tree() == ["photo.png"]


def test_full_disk(codec, photo, monkeypatch):
    def replace(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "replace", replace)
    monkeypatch.setattr(files.os, "link", replace)
    fails(run("compress", "photo.png"), 1, "vqcodec: photo.vqz: No space left on device")
    assert tree() == ["photo.png"]


def test_interrupt(codec, photo, monkeypatch):
    Image.fromarray(photo).save("second.png")

    def compress(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(codec, "compress", compress)
    ran = run("compress", "photo.png", "second.png")
    assert ran.exit_code == 130
    assert ran.stderr.split() == ["vqcodec:", "interrupted"]
    assert tree() == ["photo.png", "second.png"]


def test_progress_bar_on_a_terminal_only(codec, photo, monkeypatch):
    Image.fromarray(photo).save("second.png")
    shown = []

    progressbar = terminal.click.progressbar
    monkeypatch.setattr(terminal.click, "progressbar", lambda **options: shown.append(1) or progressbar(**options))
    run("compress", "photo.png", "second.png")
    screen = io.StringIO()
    screen.isatty = lambda: True
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", screen)
        for count, wanted in ((2, False), (1, True)):
            with terminal.file_bar(count, wanted=wanted) as show:
                show(1)
        assert shown == [] and screen.getvalue() == ""
        now = 0.0
        for clock in ("time", "monotonic"):
            patched.setattr(time, clock, lambda: now)
        with terminal.file_bar(3, wanted=True) as show:
            for now in (2.0, 4.0):  # noqa: B007
                show(1_500_000)
    assert shown == [1]
    told = re.findall(r"[12]/3  [^\r\x1b]*", screen.getvalue())
    assert told == ["1/3  00:00:04  0.75 MP/s", "2/3  00:00:02  0.75 MP/s"]


# info


def write_vqz(name: str, **changes: object) -> bytes:
    header = {"width": 100, "height": 90, "quality": 30, "weights_id": b"\1\2\3\4", "layers": 2, "tile": 64}
    chunks = [bitstream.Chunk("ICCP", b"profile"), bitstream.Chunk("XMP ", b"packet")]
    data = bitstream.write(bitstream.Header(**header | changes), chunks, [b"abc"] * 8)
    Path(name).write_bytes(data)
    return data


def test_info():
    size = len(write_vqz("a.vqz"))
    ran = run("info", "a.vqz")
    assert (ran.exit_code, ran.stderr) == (0, "")
    assert ran.stdout.splitlines() == [
        "a.vqz",
        "  size      100 x 90 pixels, colour",
        f"  file      {size} bytes, {8 * size / 9000:.4f} bits per pixel, format 1",
        "  quality   30",
        "  weights   01020304",
        "  tiles     2 x 2 of 64 pixels a side",
        "  layers    2: 32, 32 bytes",
        "  metadata  ICCP 7 bytes, XMP 6 bytes",
    ]


def test_info_json():
    size = len(write_vqz("a.vqz", grey=True))
    Path("b.vqz").write_bytes(b"VQ")
    ran = run("info", "a.vqz", "b.vqz", "--json")
    assert ran.exit_code == 1
    assert ran.stderr == "vqcodec: b.vqz: the header ends at byte 21, the file has 2 bytes\n"
    assert json.loads(ran.stdout) == [
        {
            "file": "a.vqz",
            "bytes": size,
            "bpp": 8 * size / 9000,
            "format": 1,
            "width": 100,
            "height": 90,
            "grey": True,
            "quality": 30,
            "weights": "01020304",
            "tile": 64,
            "tiles": [2, 2],
            "layer_bytes": [32, 32],
            "chunks": [{"kind": "ICCP", "bytes": 7}, {"kind": "XMP ", "bytes": 6}],
        }
    ]


def test_info_of_standard_input():
    ran = run("info", "-", stdin=write_vqz("a.vqz"))
    assert ran.exit_code == 0 and ran.stdout.startswith("-\n  size      100 x 90")


def test_info_of_weights(monkeypatch):
    weights = ModuleType("vqcodec.weights_file")
    monkeypatch.setattr(packaged, "find", lambda path: Path(path or "built-in"))
    weights.describe = lambda path: {"file": str(path), "macs": 12.5, "config": {"a": 1}}
    use(monkeypatch, weights)
    assert run("info", "--weights").stdout == 'file: built-in\nmacs: 12.5\nconfig: {"a": 1}\n'
    assert run("info", "--weights", "my.safetensors").stdout.startswith("file: my.safetensors\n")
    assert json.loads(run("info", "--json", "--weights").stdout) == weights.describe("built-in")

    def find(path):
        raise WeightsError("there are none")

    monkeypatch.setattr(packaged, "find", find)
    fails(run("info", "--weights"), 1, "vqcodec: weights: there are none")


# compare


def test_compare(codec, photo):
    run("compress", "photo.png")
    noisy = np.clip(photo.astype(int) + 5, 0, 255).astype(np.uint8)
    Image.fromarray(noisy).save("noisy.png")
    size = os.path.getsize("photo.vqz")
    ran = run("compare", "noisy.png", "photo.vqz")
    assert (ran.exit_code, ran.stderr) == (0, "")
    first, second = ran.stdout.splitlines()
    assert first == f"photo.vqz: {size:,} bytes, {8 * size / 1200:.4f} bpp"
    score = ssimulacra2(noisy, photo)
    assert re.fullmatch(rf"PSNR 34\.\d\d dB, MS-SSIM 0\.9\d\d\d, SSIMULACRA2 {score:.1f}", second)
    assert f"{score:.1f}" != f"{ssimulacra2(photo, noisy):.1f}", "the first is the original"
    told = json.loads(run("compare", "noisy.png", "photo.vqz", "--json").stdout)
    assert told["files"] == [{"file": "photo.vqz", "bytes": size, "bpp": 8 * size / 1200}]
    assert told["psnr"] == pytest.approx(34.15, abs=0.1)
    assert told["ssimulacra2"] == score
    assert (told["width"], told["height"]) == (40, 30)


def test_compare_equal_pictures(photo):
    assert run("compare", "photo.png", "photo.png").stdout == "PSNR inf dB, MS-SSIM 1.0000, SSIMULACRA2 100.0\n"
    told = json.loads(run("compare", "photo.png", "photo.png", "--json").stdout)
    assert (told["psnr"], told["files"]) == (None, [])
    assert told["ms_ssim"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("side", "most", "said", "note"),
    [
        (7, 1600, "PSNR inf dB, MS-SSIM nan, SSIMULACRA2 nan", ""),
        (40, 1600, "PSNR inf dB, MS-SSIM 1.0000, SSIMULACRA2 100.0", ""),
        (40, 1599, "PSNR inf dB, MS-SSIM 1.0000, SSIMULACRA2 -", "no SSIMULACRA2, it would need 0.0 GB of memory"),
    ],
)
def test_compare_without_ssimulacra2(monkeypatch, side, most, said, note):
    """Of pictures that are too small for it, or too large for the memory."""
    monkeypatch.setattr("vqcodec.ssimulacra2.MOST_PIXELS", most)
    Image.new("RGB", (side, side)).save("a.png")
    ran = run("compare", "a.png", "a.png")
    assert (ran.exit_code, ran.stdout) == (0, f"{said}\n")
    assert ran.stderr == (f"vqcodec: a.png: note: {note}\n" if note else "")
    told = json.loads(run("compare", "a.png", "a.png", "--json").stdout)
    assert told["ssimulacra2"] == (100 if said.endswith(" 100.0") else None)


def test_compare_failures(photo, monkeypatch):
    Image.new("RGB", (4, 5)).save("small.png")
    ran = run("compare", "photo.png", "small.png")
    fails(ran, 1, "vqcodec: small.png: the picture has 4 x 5 pixels, photo.png has 40 x 30")
    fails(run("compare", "no.png", "photo.png"), 1, "vqcodec: no.png: No such file or directory")

    def too_much(*pictures):
        raise MemoryError

    monkeypatch.setattr("vqcodec.metrics.ms_ssim", too_much)
    fails(run("compare", "photo.png", "photo.png"), 1, "vqcodec: photo.png: not enough memory")


def pictures_of(page: str) -> list[dict]:
    """What a page of `compare --html` holds."""
    found = re.search(r'<script type="application/json" id="pictures">(.*?)</script>', Path(page).read_text())
    return json.loads(found[1])


def test_compare_on_a_page(codec, photo):
    run("compress", "photo.png")
    noisy = np.clip(photo.astype(int) + 5, 0, 255).astype(np.uint8)
    name = "<script>alert(1)<!--.png"
    Image.fromarray(noisy).save(name, exif=b"Exif\0\0II*\0 where it was taken")
    told = json.loads(run("compare", "photo.png", name, "--json").stdout)
    fails(run("compare", "photo.png", "photo.vqz", name, "--html", "out.html"), 0)
    shown = pictures_of("out.html")
    assert [picture["name"] for picture in shown] == ["photo.png", "photo.vqz", name]
    for picture, pixels in zip(shown, (photo, photo, noisy), strict=True):
        size = os.path.getsize(picture["name"])
        assert (picture["width"], picture["height"], picture["figures"]["Bytes"]) == (40, 30, f"{size:,}")
        assert picture["figures"]["Bits per pixel"] == f"{8 * size / 1200:.4f}"
        png = base64.b64decode(picture["src"].removeprefix("data:image/png;base64,"))
        assert np.array_equal(image.load(png, max_pixels=None).pixels, pixels) and b"taken" not in png
    assert [picture["figures"].get("PSNR") for picture in shown] == [None, "equal", f"{told['psnr']:.2f} dB"]
    assert 50 < float(shown[2]["figures"]["SSIMULACRA2"]) < 100
    text = Path("out.html").read_text()
    assert name not in text and not re.search("https?:|@import|url\\(", text), "nothing from elsewhere"


def test_pages_are_not_overwritten_unasked(photo):
    asked = ["compare", "photo.png", "photo.png", "--html", "out.html"]
    Path("out.html").write_text("mine")
    fails(run(*asked), 1, "vqcodec: out.html: File exists, -f would overwrite it")
    assert Path("out.html").read_text() == "mine"
    fails(run(*asked, "-f"), 0)
    assert len(pictures_of("out.html")) == 2 and tree() == ["out.html", "photo.png"]


def test_compare_on_a_page_failures(photo):
    Image.new("RGB", (4, 5)).save("small.png")
    ran = run("compare", "photo.png", "small.png", "no.png", "--html", "out.html")
    fails(ran, 1, "vqcodec: no.png: No such file or directory")
    ran = run("compare", "photo.png", "small.png", "--html", "out.html")
    fails(ran, 1, "vqcodec: small.png: the picture has 4 x 5 pixels, photo.png has 40 x 30")
    fails(run("compare", "small.png", "small.png", "--html", "out.html"), 0)
    assert pictures_of("out.html")[1]["figures"]["SSIMULACRA2"] == "too small"


# train


@pytest.fixture
def training(monkeypatch):
    fake = ModuleType("vqcodec.train.run")
    fake.calls, fake.over = [], True

    def train(pictures, output, *, on_progress, on_warning, **options):
        fake.calls.append((pictures, output, options))
        on_warning("bad.png: skipped")
        for step, stage in enumerate(["codec", "codec", "prior"]):
            on_progress(
                SimpleNamespace(
                    stage=stage, step=step, elapsed=60.0 * step, remaining=3600.0, bpp=0.5, psnr=30.0, loss=1.0
                )
            )
        return fake.over

    fake.train = train
    use(monkeypatch, fake)
    return fake


def test_train(training, photo):
    ran = run("train", ".", "-o", "w.safetensors", "--minutes", "1.5", "--config", "tiny", "--seed", "3", "--resume")
    assert (ran.exit_code, ran.stdout) == (0, "")
    assert ran.stderr.splitlines() == [
        "vqcodec: warning: bad.png: skipped",
        "codec, step 0: 0.500 bpp, 30.00 dB, 01:00:00 left",
        "prior, step 2: 0.500 bpp, 30.00 dB, 01:00:00 left",
    ]
    options = {"config": "tiny", "minutes": 1.5, "resume": True, "device": "auto", "seed": 3, "start_from": None}
    options |= {"crops": None, "features": (), "distortion": None, "judge": None}
    assert training.calls == [([Path("photo.png")], Path("w.safetensors"), options)]


def test_the_sheet_of_an_earlier_run_is_no_picture_to_train_on(training, photo):
    Image.new("RGB", (9, 9)).save("w.png")
    assert run("train", ".", "-o", "w.safetensors", "--resume").exit_code == 0
    assert training.calls[0][0] == [Path("photo.png")]
    fails(run("train", ".", "-o", "w.safetensors"), 1, "vqcodec: w.png: File exists, -f would overwrite it")


def test_one_closed_file_does_not_stop_training(training, photo, monkeypatch):
    """The loader leaves it out with a warning, as it does damaged ones."""
    Image.new("RGB", (9, 9)).save("closed.png")
    monkeypatch.setattr(os, "access", lambda path, _: os.fspath(path) != "./closed.png")
    assert run("train", ".", "-o", "w.safetensors").exit_code == 0
    assert training.calls[0][0] == [Path("closed.png"), Path("photo.png")]


@pytest.mark.parametrize(
    ("asked", "minutes", "crops"),
    [([], 180, None), (["--crops", "9"], math.inf, 9), (["--crops", "9", "--minutes", "2"], 2, 9)],
    ids=str,
)
def test_how_long_to_train(training, photo, asked, minutes, crops):
    assert run("train", ".", "-o", "w.safetensors", *asked).exit_code == 0
    assert (training.calls[0][2]["minutes"], training.calls[0][2]["crops"]) == (minutes, crops)


def test_before_the_first_step_there_are_no_numbers(training, photo, monkeypatch):
    def train(*_, on_progress, **__):
        on_progress(SimpleNamespace(stage="start", step=0, elapsed=0.0, remaining=3600.0, bpp=math.nan, psnr=math.nan))
        return True

    monkeypatch.setattr(training, "train", train)
    assert run("train", ".", "-o", "w.safetensors").stderr.splitlines() == ["start, step 0, 01:00:00 left"]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("asked", [[], ["--resume"]], ids=str)
def test_train_interrupted(training, photo, monkeypatch, number, status, asked):
    def train(*_, **__):
        raise Interrupted(number)

    monkeypatch.setattr(training, "train", train)
    arguments = ["train", "my photos", "-o", "w.safetensors", *asked]
    Path("my photos").mkdir()
    Path("photo.png").rename("my photos/photo.png")
    monkeypatch.setattr(sys, "argv", ["/usr/bin/vqcodec", *arguments])
    command = "vqcodec train 'my photos' -o w.safetensors --resume"
    fails(run(*arguments), status, f"w.safetensors: interrupted, but nothing is lost; go on with: {command}")


def test_train_in_sittings(training, photo, monkeypatch):
    monkeypatch.setattr(training, "over", False)
    for arguments, again in (
        ("train . -o w.safetensors --crops 9", "train . -o w.safetensors --crops 9 --resume"),
        ("train . -o w.safetensors --resume --crops 9", "train . -o w.safetensors --resume --crops 9"),
        ("train -o v.safetensors --crops 9 -- .", "train -o v.safetensors --crops 9 --resume -- ."),
    ):
        for command in (arguments, again):
            monkeypatch.setattr(sys, "argv", ["/usr/bin/vqcodec", *command.split()])
            ran = run(*command.split())
            assert ran.exit_code == 0
            said = ran.stderr.splitlines()[-1]
            assert said.endswith(f".safetensors: not trained to the end yet; go on with: vqcodec {again}")
        assert training.calls.pop()[2]["resume"]


@pytest.mark.parametrize("distortion", ["mse", "visual"])
def test_train_on_a_distortion_judged_by_lpips(training, photo, distortion):
    Path("a.safetensors").touch()
    asked = ["train", "photo.png", "-o", "w.safetensors", "--distortion", distortion]
    assert run(*asked, "--lpips", "a.safetensors").exit_code == 0
    options = training.calls[0][2]
    assert (options["distortion"], options["judge"]) == (distortion, Path("a.safetensors"))


def test_train_a_look(training, photo):
    for name in ("w.safetensors", "f.safetensors"):
        Path(name).touch()
    asked = ["train", "photo.png", "--natural", "f.safetensors"]
    ran = run(*asked, "-o", "w.natural.safetensors")
    assert ran.exit_code == 2 and "--natural needs --from" in ran.stderr
    asked += ["--from", "w.safetensors"]
    ran = run(*asked, "-o", "v.safetensors")
    assert ran.exit_code == 2 and "must be called w.natural.safetensors to be found, got v.safetensors" in ran.stderr
    ran = run(*asked, "-o", "w.natural.safetensors", "--config", "photo")
    assert ran.exit_code == 2 and "--config cannot change it" in ran.stderr
    assert training.calls == []
    assert run(*asked, "-o", "w.natural.safetensors").exit_code == 0
    assert training.calls[0][2]["features"] == (Path("f.safetensors"),)
    assert training.calls[0][2]["start_from"] == Path("w.safetensors")
    assert run(*asked[:4], "-o", "w.natural.safetensors", "--resume").exit_code == 0
    assert training.calls[1][2]["start_from"] is None, "its checkpoint knows the weights"


def test_the_search_bar_starts_again_for_every_quality(monkeypatch):
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", screen)
    with terminal.search_bar(wanted=True) as show:
        for share in (0.5, 1.0, 0.25):
            show(share)
    shown = re.findall(r"(\d+)%", screen.getvalue())
    assert [int(number) for number in shown][-3:] == [50, 100, 25]


def test_train_on_a_terminal(training, monkeypatch):
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", screen)
    with terminal.training_bar() as show:
        training.train([], None, on_progress=show, on_warning=lambda text: None)
    assert "prior, step 2: 0.500 bpp, 30.00 dB, 01:00:00 left" in screen.getvalue()


def test_train_failures(training, photo, monkeypatch):
    Path("w.safetensors").touch()
    fails(
        run("train", "photo.png", "-o", "w.safetensors"),
        1,
        "vqcodec: w.safetensors: File exists, -f would overwrite it",
    )
    fails(run("train", "no.png", "-o", "x.safetensors"), 1, "vqcodec: no.png: No such file or directory")
    for beside in ("v.ckpt", "u.visual.json"):
        Path(beside).touch()
        said = f"vqcodec: {beside}: File exists, -f would overwrite it"
        fails(run("train", "photo.png", "-o", f"{beside[0]}.safetensors"), 1, said)
    assert training.calls == []
    for option in ("--resume", "-f"):
        assert run("train", "photo.png", "-o", "w.safetensors", option).exit_code == 0

    def train(*_, **__):
        raise TrainingError("nothing to train on")

    monkeypatch.setattr(training, "train", train)
    fails(run("train", "photo.png", "-o", "x.safetensors"), 1, "vqcodec: x.safetensors: nothing to train on")


# sample


@pytest.fixture
def sampling(monkeypatch):
    """Draws black pictures and remembers what it was asked for."""
    seen = {}

    def sample(count, **options):
        seen.update(options, count=count)
        return iter([np.zeros((options["height"], options["width"], 3), np.uint8)] * count)

    use(monkeypatch, ModuleType("vqcodec.sampling"))
    module = sys.modules["vqcodec.sampling"]
    module.sample = sample
    module.seen = seen
    return module


def test_sample(sampling):
    ran = run("sample", "-n", "4", "--size", "20", "--temperature", "0.8", "--seed", "3", "-q", "9", "-o", "sheet.png")
    assert (ran.exit_code, ran.stdout, ran.stderr) == (0, "", "")
    with Image.open("sheet.png") as sheet:
        assert sheet.size == (40, 40)
    options = {"weights_file": None, "quality": 9, "temperature": 0.8, "seed": 3, "device": "auto"}
    assert sampling.seen == {**options, "count": 4, "height": 20, "width": 20, "picture": None, "rows": None}
    fails(run("sample", "-o", "sheet.png"), 1, "vqcodec: sheet.png: File exists, -f would overwrite it")
    assert run("sample", "-f", "-n", "1", "-o", "sheet.png").exit_code == 0


def test_sample_completes_a_picture(sampling, photo):
    ran = run("sample", "-n", "1", "--complete", "photo.png", "--rows", "2", "-o", "-")
    assert ran.exit_code == 0 and ran.stdout_bytes.startswith(b"\x89PNG")
    assert sampling.seen["rows"] == 2 and np.array_equal(sampling.seen["picture"].pixels, photo)


def test_a_completed_picture_keeps_its_colours(sampling):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.new("RGBA", (40, 30)).save("photo.png", icc_profile=profile)
    ran = run("sample", "-n", "1", "--complete", "photo.png", "-o", "ending.png")
    assert (ran.exit_code, ran.stderr) == (0, "vqcodec: photo.png: note: without its transparency\n")
    with Image.open("ending.png") as ending:
        assert ending.mode == "RGB" and ending.info["icc_profile"] == profile


def test_sample_failures(sampling):
    fails(run("sample", "--complete", "no.png", "-o", "a.png"), 1, "vqcodec: no.png: No such file or directory")
    Path("bad.png").write_bytes(b"not a picture")
    ran = run("sample", "--complete", "bad.png", "-o", "a.png")
    assert ran.exit_code == 1 and ran.stderr.startswith("vqcodec: bad.png: ") and len(ran.stderr.splitlines()) == 1
    assert tree() == ["bad.png"]


# reconstruct


def test_reconstruct(codec, photo, monkeypatch):
    seen = {}

    def reconstruct(picture, **options):
        seen.update(options)
        return [np.zeros_like(picture.pixels), picture.pixels]

    monkeypatch.setattr(codec, "reconstruct", reconstruct, raising=False)
    os.symlink("photo.png", "link.png")
    for target in ("photo.png", "link.png"):
        for command in (["reconstruct", "photo.png"], ["sample", "--complete", "photo.png"]):
            ran = run(*command, "-f", "-o", target)
            assert ran.exit_code == 2 and f"the output {target} would replace the input photo.png" in ran.stderr
    ran = run("reconstruct", "photo.png", "-q", "9", "-o", "again.png")
    assert (ran.exit_code, ran.stdout, ran.stderr) == (0, "", "")
    assert np.array_equal(image.load(Path("again.png").read_bytes(), max_pixels=None).pixels, photo)
    assert seen == {"quality": 9, "weights": None, "device": "auto"}
    assert run("reconstruct", "photo.png", "--levels", "-o", "levels.png").exit_code == 0
    sheet = image.load(Path("levels.png").read_bytes(), max_pixels=None).pixels
    assert np.array_equal(sheet[30:, :40], photo) and not sheet[:30, :40].any()
    fails(run("reconstruct", "no.png", "-o", "x.png"), 1, "vqcodec: no.png: No such file or directory")


# Real processes


def test_python_m_vqcodec():
    write_vqz("a.vqz")
    out, err = process("-m", "vqcodec", "info", "a.vqz").communicate()
    assert out.startswith(b"a.vqz") and err == b""
    ran = process("-m", "vqcodec", "compress")
    assert ran.communicate() == (b"", b"vqcodec: Missing argument 'IN...'. (see vqcodec compress --help)\n")
    assert ran.returncode == 2


@pytest.mark.parametrize(
    "arguments", [["--help"], ["info", "a.vqz"], ["compress", "no.png"], ["compress", "-q", "0", "x"]]
)
def test_torch_is_not_loaded_without_need(arguments):
    write_vqz("a.vqz")
    code = "import atexit, sys; atexit.register(lambda: print(*{'torch', 'numpy'} & set(sys.modules)));"
    code += "from vqcodec.cli import main; main()"
    out, _ = process("-c", code, *arguments).communicate()
    assert out.endswith(b"\n") and out.splitlines()[-1] == b""


@pytest.mark.parametrize(
    ("sent", "status", "said"),
    [(signal.SIGINT, 130, [b"vqcodec:", b"interrupted"]), (signal.SIGTERM, 143, []), (signal.SIGHUP, 129, [])],
)
@pytest.mark.parametrize("name", ["codec.compress", "files._write_all"])
def test_signals_in_a_process(sent, status, said, name):
    """While it compresses, and when half of the file is written."""
    code = f"""
import signal, sys, time, types
import vqcodec
from vqcodec import files
signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background start without it
for number in (signal.SIGTERM, signal.SIGHUP):  # and under nohup without these
    signal.signal(number, signal.SIG_DFL)
codec = sys.modules["vqcodec.codec"] = vqcodec.codec = types.ModuleType("vqcodec.codec")
codec.compress = lambda *_, **__: open({str(ROOT / "tests/golden/tiny.vqz")!r}, "rb").read()
def wait(*given, **_):
    if given and hasattr(given[0], "write"):
        given[0].write(given[1][:50])
    print("begun", flush=True)
    time.sleep(60)
{name} = wait
from vqcodec.cli import main
main()
"""
    Image.new("RGB", (4, 4)).save("photo.png")
    ran = process("-c", code, "compress", "photo.png")
    assert ran.stdout.readline() == b"begun\n"
    assert (len(tree()) == 2) == (name == "files._write_all")
    start = time.monotonic()
    ran.send_signal(sent)
    _, err = ran.communicate()
    assert (ran.returncode, err.split()) == (status, said)
    assert time.monotonic() - start < 30
    assert tree() == ["photo.png"]


def test_closed_pipe():
    code = "from vqcodec import files; files.write('-', bytes(1 << 20), overwrite=False)"
    ran = process("-c", code)
    ran.stdout.close()
    err = ran.stderr.read()
    ran.stderr.close()
    ran.stdin.close()
    assert ran.wait() == 1
    assert err.splitlines()[-1] == b"BrokenPipeError: [Errno 32] Broken pipe: 'standard output'"


FULL = "standard output: No space left on device"
CLOSED = "Bad file descriptor"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, which Linux has")
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    ("redirections", "arguments", "status", "said"),
    [
        ("> /dev/full", ["--help"], 1, FULL),
        ("> /dev/full", ["info", "a.vqz"], 1, FULL),
        ("> /dev/full", ["info", "a.vqz", "--json"], 1, FULL),
        ("> /dev/full", ["compare", "a.png", "a.png"], 1, FULL),
        (">&-", ["info", "a.vqz"], 1, f"standard output: {CLOSED}"),
        ("<&-", ["info", "-"], 1, f"standard input: {CLOSED}"),
        ("2>&-", ["compress", "no.png"], 1, ""),
        ("2> /dev/full", ["compress", "no.png", "no.jpg"], 1, ""),
        ("2> /dev/full", ["--debug", "compress", "no.png"], 1, ""),
        ("2> /dev/full", ["compress"], 2, ""),
        ("<&- >&- 2>&-", ["info", "a.vqz"], 1, ""),
    ],
)
def test_streams_that_are_full_or_closed(redirections, arguments, status, said, unbuffered):
    write_vqz("a.vqz")
    Image.new("RGB", (4, 4)).save("a.png")
    ran = redirected(redirections, *arguments, PYTHONUNBUFFERED=unbuffered)
    assert (ran.returncode, ran.stdout, ran.stderr) == (status, "", f"vqcodec: {said}\n" if said else "")


def test_names_that_stdout_cannot_write():
    write_vqz("日本.vqz")
    ran = redirected("", "info", "日本.vqz", PYTHONIOENCODING="latin-1")
    assert (ran.returncode, ran.stderr) == (0, "") and ran.stdout.startswith("\\u65e5\\u672c.vqz\n")


def test_closed_streams_that_are_not_needed():
    write_vqz("a.vqz")
    ran = redirected("<&- 2>&-", "info", "a.vqz")
    assert ran.returncode == 0 and ran.stdout.startswith("a.vqz\n")


def test_a_full_stderr_does_not_stop_the_work(codec, photo, monkeypatch):
    """But the exit code tells of it."""
    Image.fromarray(photo).save("second.png")

    def echo(text, **_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(terminal.click, "echo", echo)
    monkeypatch.setattr(terminal.streams, "discard", lambda stream: None)
    assert run("compress", "photo.png", "second.png").exit_code == 1
    assert tree() == ["photo.png", "photo.vqz", "second.png", "second.vqz"]


def test_text_that_is_written_in_part():
    """An unbuffered stream takes what has room on the disk; the rest must not get lost without a word."""
    code = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000));"
    code += "from vqcodec.cli import main; main()"
    with open("out", "wb") as out:
        ran = process("-u", "-c", code, "compress", "--help", stdout=out)
        _, err = ran.communicate()
    assert (ran.returncode, err) == (1, b"vqcodec: standard output: File too large\n")


def test_shell_completion():
    environment = {"_VQCODEC_COMPLETE": "bash_complete", "COMP_WORDS": "vqcodec comp", "COMP_CWORD": "1"}
    code = "from vqcodec.cli import main; main(prog_name='vqcodec')"
    ran = process("-c", code, env={**os.environ, "PYTHONPATH": str(ROOT), **environment})
    out, _ = ran.communicate()
    assert out.split() == [b"plain,compare", b"plain,compress"]
