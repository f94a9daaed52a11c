"""Pillow opens and saves .vqz files."""

import io
import pickle
from pathlib import Path

import models
import numpy as np
import pytest
from commandline import process
from PIL import Image, ImageCms, ImageFile, UnidentifiedImageError

import vqcodec
from vqcodec import bitstream, codec, packaged
from vqcodec.bitstream import Chunk

PHOTO = Path(__file__).parent / "golden" / "photo" / "visual.vqz"  # made with the packaged weights
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


@pytest.fixture(autouse=True)
def _tiny_weights_are_packaged(monkeypatch: pytest.MonkeyPatch) -> None:
    """`models.tiny_weights` is what a file finds that names it, and what None stands for."""
    monkeypatch.setattr(packaged, "every", lambda: [models.tiny_weights()])
    find = packaged.find
    monkeypatch.setattr(packaged, "find", lambda weights=None: find(weights or models.tiny_weights()))


def source(mode: str = "RGB") -> Image.Image:
    """30 x 20 pixels; alpha, if the mode has it, grows from left to right."""
    image = Image.fromarray(models.picture(20, 30)).convert(mode)
    if mode.endswith("A"):
        image.putalpha(Image.fromarray(np.tile(np.arange(30, dtype=np.uint8) * 8, (20, 1))))
    return image


def saved(image: Image.Image, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, "VQZ", **options)
    return out.getvalue()


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def exif(orientation: int) -> Image.Exif:
    made = Image.Exif()
    made[0x0110], made[0x0112] = "camera", orientation
    return made


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA"])
def test_there_and_back(mode: str, tmp_path: Path) -> None:
    path = tmp_path / "photo.vqz"
    source(mode).save(path, quality=60)
    expected = codec.compress(source(mode), quality=60)
    assert path.read_bytes() == saved(source(mode), quality=60) == expected
    with Image.open(path) as image:
        assert (image.format, image.mode, image.size) == ("VQZ", mode, (30, 20))
        assert image.get_format_mimetype() == Image.MIME["VQZ"] == "image/x-vqz"
        assert np.array_equal(np.asarray(image), np.asarray(codec.decompress(expected)))
        image.load()[0, 0] = image.getpixel((29, 19))
        assert image.getpixel((0, 0)) == image.getpixel((29, 19))


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA"])
def test_an_image_that_is_not_loaded_yet_is_compressed(mode: str) -> None:
    data = saved(source(mode))
    loaded = opened(data)
    loaded.load()
    assert codec.compress(opened(data)) == codec.compress(loaded)


def test_an_image_is_like_others_once_it_is_loaded() -> None:
    image = opened(saved(source()))
    expected = np.asarray(opened(saved(source())))
    for other in (image.copy(), pickle.loads(pickle.dumps(image)), image):
        assert np.array_equal(np.asarray(other), expected)


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA"])
@pytest.mark.parametrize(
    ("asked", "scale", "size"),
    [((15, 10), 2, (15, 10)), ((14, 3), 2, (15, 10)), ((7, 5), 4, (8, 5)), ((1, 1), 8, (4, 3))],
)
def test_a_draft_is_decoded_smaller(mode: str, asked: tuple[int, int], scale: int, size: tuple[int, int]) -> None:
    data = saved(source(mode))
    image = opened(data)
    assert image.draft(None, asked) == (mode, (0, 0, 30 / scale, 20 / scale))
    assert (image.mode, image.size) == (mode, size)
    assert image.draft("L", (1, 1)) is None
    assert np.array_equal(np.asarray(image), np.asarray(codec.decompress(data, scale=scale)))


@pytest.mark.parametrize(("mode", "granted"), [("L", "L"), ("YCbCr", "RGB"), (None, "RGB")])
def test_a_draft_in_grey(mode: str | None, granted: str) -> None:
    data = saved(source())
    for size, scale in ((None, 1), ((16, 10), 1), ((8, 5), 2)):
        image, expected = opened(data), codec.decompress(data, scale=scale)
        drafted = image.draft(mode, size)
        assert drafted == (None if (granted, scale) == ("RGB", 1) else (granted, (0, 0, 30 / scale, 20 / scale)))
        assert image.mode == granted
        assert np.array_equal(np.asarray(image), np.asarray(expected.convert(granted)))


def test_a_draft_in_grey_loses_neither_alpha_nor_colours() -> None:
    for data, mode in ((saved(source("RGBA")), "RGBA"), (saved(source(), icc_profile=SRGB), "RGB")):
        image = opened(data)
        assert (image.draft("L", None), image.mode) == (None, mode)


def test_a_draft_of_loaded_pixels() -> None:
    image = opened(saved(source()))
    image.load()
    assert (image.draft("L", (8, 5)), image.mode, image.size) == (None, "RGB", (30, 20))


def test_a_thumbnail_is_made_from_a_draft(monkeypatch: pytest.MonkeyPatch) -> None:
    scales = []
    decompress = codec.decompress
    monkeypatch.setattr(
        codec, "decompress", lambda *args, **kw: (scales.append(kw["scale"]), decompress(*args, **kw))[1]
    )
    image, whole = opened(saved(source())), opened(saved(source()))
    image.thumbnail((7, 5))
    whole.load()
    whole.thumbnail((7, 5))
    assert scales == [2, 1]
    assert image.size == whole.size == (7, 5)
    assert np.abs(np.asarray(image).astype(int) - np.asarray(whole)).mean() < 8


def test_a_draft_with_weights_that_do_not_decode_so_small(tmp_path: Path) -> None:
    path = models.save(models.raster(), tmp_path / "raster.safetensors")  # decodes to 1/4 at the least
    data = saved(source("RGBA"), weights=path)
    image, whole = opened(data), codec.decompress(data, weights=path)
    image.weights = path
    image.draft(None, (3, 2))
    assert image.size == (4, 3)
    assert np.array_equal(np.asarray(image), np.asarray(whole.reduce(8)))


def test_options_are_those_of_compress() -> None:
    size = len(saved(source(), quality=50))
    assert len(saved(source(), max_size=size)) <= size
    target = vqcodec.Target("psnr", 30)
    assert saved(source(), target=target, effort=2, optimize=True) == codec.compress(source(), target=target, effort=2)
    with pytest.raises(ValueError, match="quality must be"):
        saved(source(), quality=101)
    with pytest.raises(OSError, match="10 bytes"):
        saved(source(), max_size=10)


def test_metadata() -> None:
    """They are taken from im.info, unless an option says otherwise, and are there without decoding."""
    image = source()
    image.info |= {"icc_profile": SRGB, "exif": exif(1).tobytes(), "xmp": b"<x/>"}
    kept = {name: image.info[name] for name in ("icc_profile", "exif", "xmp")}
    assert opened(saved(image)).info == kept
    assert opened(saved(image)).getexif() == exif(1)
    assert opened(saved(image, icc_profile=None, exif=b"", xmp=b"<y/>")).info == {"xmp": b"<y/>"}
    assert opened(saved(source(), exif=exif(1))).info == {"exif": kept["exif"]}
    assert image.info == kept, "saving changes nothing"
    turned = opened(saved(source(), exif=exif(6)))
    assert (turned.size, turned.getexif()[0x0112]) == ((20, 30), 1)


def test_weights_that_are_not_packaged(tmp_path: Path) -> None:
    other = models.save(models.tiny(seed=9), tmp_path / "other.safetensors")
    data = saved(source(), weights=other)
    image = opened(data)
    with pytest.raises(OSError, match="made with weights"):
        image.load()
    image.weights = other
    assert np.array_equal(np.asarray(image), np.asarray(codec.decompress(data, weights=other)))


def test_several_frames(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="single picture"):
        source().save(tmp_path / "a.vqz", save_all=True, append_images=[source()])
    source().save(tmp_path / "a.gif", save_all=True, append_images=[source().rotate(90)])
    with Image.open(tmp_path / "a.gif") as image, pytest.raises(OSError, match="several frames"):
        image.save(tmp_path / "a.vqz", save_all=True)
    assert not (tmp_path / "a.vqz").exists()
    assert saved(source(), save_all=True) == saved(source())


def test_foreign_data() -> None:
    for data in (b"", b"VQZ", bytes(100)):
        with pytest.raises(UnidentifiedImageError):
            opened(data)


def test_damage() -> None:
    data = saved(source(), xmp=b"<x/>")
    header = bytearray(data)
    header[10] ^= 1
    for bad, message in (
        (bytes(header), "header check"),
        (data[:20], "header ends"),
        (data.replace(b"<x/>", b"<y/>"), "chunk 1 of 1 is damaged"),
    ):
        with pytest.raises(OSError, match=message):
            opened(bad)
    for bad, message in ((data[:-1], "ends at byte"), (data[:-1] + bytes([data[-1] ^ 1]), "is damaged")):
        with pytest.raises(OSError, match=message):
            opened(bad).verify()
        image = opened(bad)
        for _ in range(2):
            with pytest.raises(OSError, match=message):
                image.load()
    opened(data).verify()


def test_truncated_images_are_loaded_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    data = saved(source())[:-1]
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.warns(UserWarning, match="ends at byte"):
        pixels = np.asarray(opened(data))
    with pytest.warns(UserWarning, match="ends at byte"):
        assert np.array_equal(pixels, np.asarray(codec.decompress(data, partial=True)))


def test_the_alpha_channel_is_checked() -> None:
    container = bitstream.read(saved(source("RGBA")))
    data = bitstream.write(container.header, [Chunk("ALPH", b"no PNG")], [s for s in container.segments if s])
    assert opened(data).mode == "RGBA"
    with pytest.raises(OSError, match="alpha"):
        opened(data).load()


def test_decompression_bombs(monkeypatch: pytest.MonkeyPatch) -> None:
    data = saved(source())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 299)
    with pytest.raises(Image.DecompressionBombError, match="600 pixels"):
        opened(data)


def test_a_fresh_interpreter(tmp_path: Path) -> None:
    """`import vqcodec` is all that Pillow needs. It decodes only when it must, with the packaged weights."""
    script = f"""
import sys, vqcodec
from PIL import Image
with Image.open({str(PHOTO)!r}) as image:
    print(image.mode, image.size, image.info, "torch" in sys.modules, "numpy" in sys.modules)
    image.save("again.png")
    image.save("again.vqz", quality=40)
"""
    with Image.open(PHOTO.with_suffix(".png")) as golden:
        expected = np.array(golden)
    with process("-c", script, cwd=tmp_path) as ran:
        assert ran.communicate() == (f"RGB {golden.size} {{}} False False\n".encode(), b"")
    with Image.open(tmp_path / "again.png") as again:
        assert int(np.abs(np.array(again).astype(int) - expected).max()) <= 1
    header, first = (bitstream.read_header(path.read_bytes()) for path in (tmp_path / "again.vqz", PHOTO))
    assert (header.quality, header.weights_id) == (40, first.weights_id)
