"""Every file of tests/cases gets its right answer, from its own bytes to those of a .vqz file and of other formats."""

import io
from collections.abc import Callable
from pathlib import Path

import models
import numpy as np
import pytest
from commandline import fails, run
from pictures import srgb_of_light, srgb_of_p3
from PIL import Image

from vqcodec import codec, image
from vqcodec.errors import FormatError, ImageError
from vqcodec.image import Picture
from vqcodec.pictures import colour

FOLDER = Path(__file__).parent / "cases"


def raw(name: str) -> np.ndarray:
    """Pixels as the file stores them."""
    with Image.open(FOLDER / name) as opened:
        return np.asarray(opened)


def is_control_picture(picture: Picture) -> None:
    """Upright, and its EXIF says so."""
    control = image.load((FOLDER / "control_exif6.jpg").read_bytes(), max_pixels=None)
    assert picture.pixels.shape == (64, 48, 3)
    assert np.abs(picture.pixels.astype(int) - control.pixels).mean() < 6, "some of these are JPEG files, some not"
    assert picture.exif == control.exif and picture.notes == ()
    parsed = Image.Exif()
    parsed.load(picture.exif)
    assert parsed[0x0112] == 1


def is_one_value_transparent(picture: Picture) -> None:
    values = raw("trns4.png")
    assert picture.alpha is not None and np.array_equal(picture.alpha == 0, values == 15 * 17)
    assert set(np.unique(picture.alpha)) == {0, 255}


def is_palette_in_colour(picture: Picture) -> None:
    assert picture.pixels.max() > 200 and not picture.grey
    assert [note for note in picture.notes if "colour" in note] == []


def is_linear_light(picture: Picture) -> None:
    assert np.abs(picture.pixels - srgb_of_light(raw("gama1.png") / 255)).max() <= 1
    assert picture.icc is None and picture.notes == ("the gamma was converted to that of sRGB",)


def is_display_p3(picture: Picture) -> None:
    """Nothing is lost, and shown in sRGB it is what the primaries say."""
    assert picture.icc is not None and picture.notes == ()
    shown = image.load(image.save(picture, ".ppm"), max_pixels=None)
    assert np.abs(shown.pixels - srgb_of_p3(picture.pixels)).max() < 2


def is_display_p3_by_its_profile(picture: Picture) -> None:
    """The profile has a plain gamma of 2.2."""
    with Image.open(FOLDER / "control_p3icc.png") as opened:
        assert picture.icc == opened.info["icc_profile"]
    for suffix in (".ppm", ".bmp"):
        shown = image.load(image.save(picture, suffix), max_pixels=None)
        assert np.array_equal(shown.pixels, colour.to_srgb(picture.pixels, picture.icc, grey=False))
        assert np.abs(shown.pixels.astype(int) - picture.pixels).max() > 50


def is_grey_as_its_profile_says(picture: Picture) -> None:
    assert picture.grey and picture.icc is not None and picture.notes == ()
    shown = colour.to_srgb(picture.pixels, picture.icc, grey=True)
    assert abs(shown.mean() - 181) < 1.5
    for suffix in (".png", ".webp", ".avif"):
        again = image.load(image.save(picture, suffix), max_pixels=None)
        pixels = again.pixels if again.icc is None else colour.to_srgb(again.pixels, again.icc, grey=True)
        assert np.abs(pixels.astype(int) - shown).mean() < 1.5


def has_notes(*notes: str) -> Callable[[Picture], None]:
    def check(picture: Picture) -> None:
        assert picture.notes == notes and picture.icc is None
        assert picture.pixels.shape == (48, 64, 3)
        assert b"hdrgm:" not in (picture.xmp or b"")

    return check


def has_the_tags(picture: Picture) -> None:
    parsed = Image.Exif()
    assert picture.exif is not None and picture.notes == ()
    parsed.load(picture.exif)
    with Image.open(FOLDER / "tiff_tags.tif") as opened:
        for tag in (0x010F, 0x0110, 0x013B):
            assert parsed[tag] == opened.tag_v2[tag] != ""


def is_too_long_for_jpeg(picture: Picture) -> None:
    assert picture.exif is not None and len(picture.exif) == 70_026 and picture.notes == ()
    assert image.load(image.save(picture, ".png"), max_pixels=None).exif == picture.exif
    (note,) = image.adapt(picture, ".jpg").notes
    assert note.startswith("EXIF left out")
    assert image.load(image.save(picture, ".jpg"), max_pixels=None).exif is None


RIGHT: dict[str, Callable[[Picture], None]] = {
    "control_exif6.jpg": is_control_picture,
    "orient_long.jpg": is_control_picture,
    "raw_profile.png": is_control_picture,
    "eXIf_prefix.png": is_control_picture,
    "trns4.png": is_one_value_transparent,
    "palette8bitcmap.tif": is_palette_in_colour,
    "gama1.png": is_linear_light,
    "cicp_p3.png": is_display_p3,
    "p3.avif": is_display_p3,
    "control_p3icc.png": is_display_p3_by_its_profile,
    "grey_icc.png": is_grey_as_its_profile_says,
    "iccp_trunc.png": has_notes("the ICC profile is cut: it has 370 of 480 bytes and was dropped"),
    "ultrahdr.jpg": has_notes("not kept: gain map"),
    "iptc.jpg": has_notes("not kept: IPTC data"),
    "tiff_tags.tif": has_the_tags,
    "exif70k.png": is_too_long_for_jpeg,
}
REFUSED = {"planar16.tif", "alph-iccp-empty.vqz"}


def test_every_file_has_an_answer() -> None:
    assert {path.name for path in FOLDER.iterdir()} == {*RIGHT, *REFUSED, "README.md"}


@pytest.mark.parametrize("name", RIGHT)
def test_the_right_answer(name: str) -> None:
    data = (FOLDER / name).read_bytes()
    picture = image.load(data, max_pixels=None)
    RIGHT[name](picture)
    with Image.open(io.BytesIO(data)) as opened:
        again = image.from_pil(opened)
    assert np.array_equal(again.pixels, picture.pixels)
    assert (again.icc, again.exif, again.xmp, again.notes) == (picture.icc, picture.exif, picture.xmp, picture.notes)


@pytest.mark.parametrize("name", RIGHT)
def test_the_round_trip(name: str) -> None:
    """What is not pixels comes back as it was; compress() warns of what `load` notes."""
    picture = image.load((FOLDER / name).read_bytes(), max_pixels=None)
    with Image.open(FOLDER / name) as opened:
        if picture.notes:
            with pytest.warns(UserWarning) as caught:
                data = codec.compress(opened, weights=models.tiny_weights())
            assert [str(warning.message) for warning in caught] == list(picture.notes)
        else:
            data = codec.compress(opened, weights=models.tiny_weights())
    restored = codec.decode_picture(data, weights=models.tiny_weights())
    assert restored.pixels.shape == picture.pixels.shape and restored.grey == picture.grey
    assert (restored.icc, restored.exif, restored.xmp) == (picture.icc, picture.exif, picture.xmp)
    assert restored.alpha is None if picture.alpha is None else np.array_equal(restored.alpha, picture.alpha)


def test_planes_of_16_bits_are_refused() -> None:
    with pytest.raises(ImageError, match="in separate planes"):
        image.load((FOLDER / "planar16.tif").read_bytes(), max_pixels=None)


def test_a_hostile_alpha_is_one_typed_error() -> None:
    path = FOLDER / "alph-iccp-empty.vqz"
    with pytest.raises(FormatError, match="alpha cannot be read"):
        codec.decode_picture(path.read_bytes(), weights=models.tiny_weights())
    ran = run("decompress", "--test", "--weights", str(models.tiny_weights()), str(path))
    fails(ran, 1, f"vqcodec: {path}: alpha cannot be read: index out of range")


def test_the_command_line_says_each_note_once(tmp_path: Path) -> None:
    target = str(tmp_path / "picture.vqz")
    ran = run("compress", "--weights", str(models.tiny_weights()), str(FOLDER / "iptc.jpg"), "-o", target)
    assert ran.exit_code == 0 and ran.stderr.count("not kept: IPTC data") == 1
    run("compress", "--weights", str(models.tiny_weights()), str(FOLDER / "exif70k.png"), "-o", target, "--force")
    ran = run("decompress", "--weights", str(models.tiny_weights()), target, "-o", str(tmp_path / "picture.jpg"))
    assert ran.exit_code == 0 and ran.stderr.count(": note: EXIF left out: JPEG files have no room") == 1
    ran = run("decompress", "--weights", str(models.tiny_weights()), target, "-o", str(tmp_path / "picture.tif"))
    assert ran.exit_code == 0 and ran.stderr.count(": note: EXIF left out: TIFF files are written without") == 1


def test_reconstruct_keeps_the_colours(tmp_path: Path) -> None:
    target = tmp_path / "shown.png"
    ran = run("reconstruct", "--weights", str(models.tiny_weights()), str(FOLDER / "cicp_p3.png"), "-o", str(target))
    assert ran.exit_code == 0
    assert image.load(target.read_bytes(), max_pixels=None).icc is not None
