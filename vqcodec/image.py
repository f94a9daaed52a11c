"""Picture files <-> pixels: Pillow reads files, and they become 8-bit RGB. Notes say what was converted or lost.

    bytes -> load() -+
                     +-> Picture -> to_pil() -> save() -> bytes
    PIL.Image -> from_pil()

Loading applies the orientation, reduces 16 bits per channel to 8 and converts CMYK. RGB and grey pictures keep their
ICC profile.
"""

import io
import math
import re
import struct
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, PngImagePlugin, UnidentifiedImageError

from vqcodec import plugins
from vqcodec.caught import caught_warnings
from vqcodec.errors import ImageError

# Pillow reads many more formats. Some start other programs (EPS), and many have hardly been tested against bad files.
_READ_FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "TIFF", "BMP", "GIF", "PPM", *plugins.register())
_GREY_MODES = {"1", "L", "LA", "La"}
_READ_MODES = _GREY_MODES | {"P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV"}
_ORIENTATION_TAG = 0x0112
_BITS, _SAMPLES, _PLANAR, _COLOUR_MAP, _SAMPLE_FORMAT = 258, 277, 284, 320, 339  # tags of TIFF files
_GREY_SCALES = {"L;2": 85, "L;4": 17}  # what Pillow multiplies few bits of grey by, by its name of the layout
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_EXIF_PREFIX = b"Exif\0\0"
_XMP_PREFIX = b"http://ns.adobe.com/xap/1.0/\0"
_XMP_ORIENTATION = re.compile(rb"""(tiff:Orientation\s*(?:=\s*["']|>)\s*)([1-8])(?=\s*["'<])""")
_INTEGERS = {1: "B", 3: "H", 4: "L"}  # types of EXIF values that an orientation is stored as


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture in memory.

    Args:
        pixels: uint8 (H, W, 3), RGB, in the colour space of the ICC profile, or in sRGB if there is none.
        grey: whether the picture has a single channel. The three channels of the pixels are then equal.
        alpha: uint8 (H, W), 255 is opaque; None if the picture has no alpha channel.
        icc: ICC profile of an RGB or grey picture.
        exif: EXIF data, starting with its TIFF header. Its orientation is always 1.
        xmp: XMP packet.
        notes: one line for each thing that was converted or lost.
    """

    pixels: NDArray[np.uint8]
    grey: bool = False
    alpha: NDArray[np.uint8] | None = None
    icc: bytes | None = None
    exif: bytes | None = None
    xmp: bytes | None = None
    notes: tuple[str, ...] = ()


def load(data: bytes, *, max_pixels: int | None) -> Picture:
    """Decode a PNG, JPEG, WebP, AVIF, TIFF, BMP, GIF or PNM file.

    Args:
        data: the whole file.
        max_pixels: largest width x height to accept, checked before the pixels are decoded; None for no limit. Pillow's
            own limit (twice PIL.Image.MAX_IMAGE_PIXELS) applies in any case.

    Raises:
        ImageError: the file has another format, is damaged, too large or animated, or has a pixel type that from_pil()
            does not accept.
    """
    with _pillow("decoded") as caught:
        image = Image.open(io.BytesIO(data), formats=_READ_FORMATS)
        if max_pixels is not None and image.width * image.height > max_pixels:
            raise ImageError(
                f"the picture has {image.width} x {image.height} = {image.width * image.height} pixels,"
                f" the limit is {max_pixels}"
            )
        return _convert(image, caught)


def from_pil(image: Image.Image) -> Picture:
    """Convert a Pillow image.

    Args:
        image: bilevel, grey, palette, RGB or CMYK, with 8 or 16 bits per channel, with or without alpha.

    Raises:
        ImageError: the image has several frames, another pixel type or no pixels, or its file cannot be decoded.
    """
    with _pillow("decoded") as caught:
        return _convert(image, caught)


def to_pil(picture: Picture) -> Image.Image:
    """Make a Pillow image of mode L, LA, RGB or RGBA.

    The info of the image has icc_profile, exif and xmp if the picture has them.
    """
    if picture.grey:
        image = Image.fromarray(np.ascontiguousarray(picture.pixels[..., 0]))
    else:
        image = Image.fromarray(picture.pixels)
    if picture.alpha is not None:
        image.putalpha(Image.fromarray(picture.alpha))
    if picture.icc is not None:
        image.info["icc_profile"] = picture.icc
    if picture.exif is not None:
        image.info["exif"] = _EXIF_PREFIX + picture.exif
    if picture.xmp is not None:
        image.info["xmp"] = picture.xmp
    return image


@dataclass(frozen=True)
class _Writer:
    """How Pillow writes a format.

    Args:
        name: Pillow's name of the format.
        max_side: largest width and height that the format allows.
        alpha: whether the format has an alpha channel.
        grey: whether it has a grey mode.
        icc, exif, xmp: whether it can hold this metadata.
        options: for Pillow. They ask for lossless coding if the format has it, and else for quality 95.
    """

    name: str
    max_side: int = 0xFFFFFF
    alpha: bool = True
    grey: bool = True
    icc: bool = True
    exif: bool = True
    xmp: bool = True
    options: dict[str, Any] = field(default_factory=dict)


_JPEG = _Writer("JPEG", max_side=65500, alpha=False, options={"quality": 95, "subsampling": "4:4:4"})
_TIFF = _Writer("TIFF", exif=False, options={"compression": "tiff_adobe_deflate"})
_WRITERS = {
    ".png": _Writer("PNG"),
    ".jpg": _JPEG,
    ".jpeg": _JPEG,
    ".webp": _Writer("WEBP", max_side=16383, grey=False, options={"lossless": True, "exact": True}),
    ".tif": _TIFF,
    ".tiff": _TIFF,
    ".bmp": _Writer("BMP", alpha=False, icc=False, exif=False, xmp=False),
    ".avif": _Writer("AVIF", max_side=65536, grey=False, options={"quality": 95, "subsampling": "4:4:4"}),
    ".ppm": _Writer("PPM", alpha=False, icc=False, exif=False, xmp=False),
}


def check_suffix(suffix: str) -> None:
    """Check that save() can write the format of a file name suffix.

    Args:
        suffix: with the dot, in lower or upper case.

    Raises:
        ImageError: no format has this suffix.
    """
    if suffix.lower() not in _WRITERS:
        raise ImageError(f"no picture format has the suffix {suffix!r}, expected one of {' '.join(_WRITERS)}")


def save(picture: Picture, suffix: str) -> bytes:
    """Encode a picture: lossless as PNG, WebP, TIFF, BMP and PPM, at quality 95 as JPEG and AVIF.

    No error or note says that these are left out: all metadata in BMP and PPM, EXIF in TIFF, the profile of a grey
    picture in WebP and AVIF (they hold it as RGB), and an alpha channel that is opaque everywhere in JPEG, BMP and PPM.

    Args:
        picture: the picture to encode.
        suffix: file name suffix of the format, ".png" for example, in lower or upper case.

    Returns:
        The bytes of the file.

    Raises:
        ImageError: no format has this suffix, or the format cannot hold the picture, for its transparency or size.
    """
    check_suffix(suffix)
    writer = _WRITERS[suffix.lower()]
    image = to_pil(picture)
    if max(image.size) > writer.max_side:
        raise ImageError(
            f"the picture is {image.width} x {image.height} pixels, {writer.name} allows {writer.max_side} a side"
        )
    if picture.alpha is not None and not writer.alpha:
        if picture.alpha.min() < 255:
            raise ImageError(f"the picture has transparency, which {writer.name} files cannot hold; .png files can")
        image = image.convert("L" if picture.grey else "RGB")
    options = dict(writer.options)
    icc = picture.icc if writer.icc else None
    if picture.grey and not writer.grey:
        image = image.convert("RGB" if picture.alpha is None else "RGBA")
        icc = None if icc is not None and _profile_space(icc) == "GRAY" else icc
    image.info.clear()  # only some of Pillow's writers take metadata from here, so all is passed explicitly
    if icc is not None:
        options["icc_profile"] = icc
    if picture.exif is not None and writer.exif:
        options["exif"] = _EXIF_PREFIX + picture.exif
    if picture.xmp is not None and writer.xmp:
        options |= _xmp_option(writer.name, picture.xmp)
    out = io.BytesIO()
    with _pillow(f"written as {writer.name}"):
        image.save(out, format=writer.name, **options)
    return out.getvalue()


def encode_alpha(alpha: NDArray[np.uint8]) -> bytes:
    """Encode an alpha channel, uint8 (H, W), as a grey PNG file."""
    out = io.BytesIO()
    Image.fromarray(alpha).save(out, "PNG", optimize=True)
    return out.getvalue()


def decode_alpha(data: bytes, width: int, height: int) -> NDArray[np.uint8]:
    """Decode the alpha channel that `encode_alpha` encoded.

    Args:
        data: the PNG file.
        width, height: size of the picture in pixels.

    Returns:
        uint8 (height, width).

    Raises:
        ImageError: the data are not a grey PNG file of this size.
    """
    try:
        # Image.open refuses sizes that a caller may allow. Here the size of the picture is the limit.
        with PngImagePlugin.PngImageFile(io.BytesIO(data)) as png:
            if png.size != (width, height) or png.mode != "L":
                raise ImageError(f"alpha is {png.mode} {png.width} x {png.height}, the picture {width} x {height}")
            return np.asarray(png).copy()
    except (OSError, SyntaxError, ValueError) as error:
        raise ImageError(f"alpha cannot be read: {error}") from None


def _xmp_option(format_name: str, xmp: bytes) -> dict[str, Any]:
    if format_name == "PNG":
        info = PngImagePlugin.PngInfo()
        info.add(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp)
        return {"pnginfo": info}
    if format_name == "TIFF":
        return {"tiffinfo": {700: xmp}}
    return {"xmp": xmp}


@contextmanager
def _pillow(done: str) -> Iterator[list[warnings.WarningMessage]]:
    """Collect Pillow's warnings, and replace any exception by an ImageError: "the picture cannot be {done}: ..."."""
    try:
        with caught_warnings() as caught:
            yield caught
    except (ImageError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise ImageError("not a PNG, JPEG, WebP, AVIF, TIFF, BMP, GIF or PNM picture, or cut short") from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"the picture is too large: {_line(error)}") from error
    except Exception as error:  # plugins raise exceptions of nearly all types
        raise ImageError(f"the picture cannot be {done}: {_line(error)}") from error


def _line(error: object) -> str:
    """The message of an exception or warning in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def _convert(image: Image.Image, caught: list[warnings.WarningMessage]) -> Picture:
    notes: list[str] = []
    frames = getattr(image, "n_frames", 1)
    if frames > 1:
        # Phones store a depth or brightness map after the photo in the same JPEG file, which Pillow calls MPO.
        if image.format != "MPO":
            raise ImageError(f"the file has {frames} frames or pages, only single pictures are supported")
        notes.append(f"the file has {frames} pictures, only the first is kept")
    if image.width == 0 or image.height == 0:
        raise ImageError(f"the picture is {image.width} x {image.height} pixels, expected at least 1 x 1")
    layout = " ".join(str(tile[3]) for tile in getattr(image, "tile", ()))  # load() empties the list of tiles
    sixteen_bits = ";16" in layout
    if image.format == "TIFF":
        _check_tiff(image, notes)
    image.load()  # before the metadata are read, because they may follow the pixels in the file
    _mend(image, layout)

    exif, xmp = _exif(image, notes), _xmp(image)
    if image.format != "TIFF":  # Pillow applies the orientation of TIFF files itself
        orientation = _exif_orientation(exif)[2] or _xmp_orientation(xmp)
        if orientation in _TRANSPOSE:
            image = image.transpose(_TRANSPOSE[orientation])
    exif, xmp = _with_orientation_1(exif, xmp)

    icc = _profile(image, notes)
    alpha = None
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        sixteen_bits, grey = True, True
        values, alpha = _to_8_bits(image)
        pixels = np.repeat(values[..., None], 3, axis=2)
    elif image.mode not in _READ_MODES:
        raise ImageError(f"the pixel type is {image.mode!r}, expected 8 or 16 bits per channel of grey, RGB or CMYK")
    else:
        if image.mode == "CMYK":
            image, icc = _cmyk_to_srgb(image, icc, notes), None
        grey = image.mode in _GREY_MODES
        if image.has_transparency_data:
            image = _in_mode(image, "LA" if grey else "RGBA")
            alpha = np.array(image.getchannel("A"))
        pixels = _array(_in_mode(image, "RGB"))
    if sixteen_bits:
        notes.append("16 bits per channel were reduced to 8")
    if icc is not None and _profile_space(icc) != ("GRAY" if grey else "RGB "):
        notes.append(f"the ICC profile is for {_profile_space(icc).strip()} pixels and was dropped")
        icc = None
    notes += [_line(warning.message) for warning in caught if warning.category is UserWarning]
    return Picture(pixels, grey, alpha, icc, exif, xmp, tuple(notes))


def _check_tiff(image: Image.Image, notes: list[str]) -> None:
    """Refuse TIFF files that Pillow reads wrongly, and note what it leaves out.

    Raises:
        ImageError: samples are signed, or have 16 bits in separate planes.
    """
    tags = image.tag_v2  # type: ignore[attr-defined]
    if 2 in tags.get(_SAMPLE_FORMAT, ()) and image.mode not in ("I", "F"):
        raise ImageError("the samples are signed integers, expected unsigned ones")
    if tags.get(_PLANAR) == 2 and len(tags.get(_BITS, ())) > 1 and max(tags[_BITS]) > 8:
        raise ImageError("more than 8 bits per sample in separate planes are not supported")
    if image.mode in ("RGB", "RGBX") and tags.get(_SAMPLES, 3) > 3:
        notes.append("the fourth channel, of which the file does not say what it is, was dropped")


def _mend(image: Image.Image, layout: str) -> None:
    """Correct what Pillow took for something else in a loaded image.

    Args:
        image: gets right values. layout: how the file's samples are laid out, in Pillow's words.
    """
    transparent = image.info.get("transparency")
    scale = _GREY_SCALES.get(layout)
    if image.format == "PNG" and image.mode == "L" and scale and isinstance(transparent, int):
        image.info["transparency"] = transparent * scale  # of the file's few values; pixels have the whole range
    if image.format == "TIFF" and image.mode == "P":
        colours = image.tag_v2.get(_COLOUR_MAP, ())  # type: ignore[attr-defined]
        if colours and max(colours) < 256:  # of 8 bits, although the format asks for 16
            image.putpalette(np.array(colours, np.uint8).reshape(3, -1).T.tobytes())


def _in_mode(image: Image.Image, mode: str) -> Image.Image:
    """Convert an image, without a copy if it has the mode already."""
    return image if image.mode == mode else image.convert(mode)


def _array(image: Image.Image) -> NDArray[np.uint8]:
    """Return the pixels of an RGB image, uint8 (H, W, 3). Strips save memory: np.asarray makes several copies."""
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    for top in range(0, image.height, 256):
        bottom = min(top + 256, image.height)
        pixels[top:bottom] = np.asarray(image.crop((0, top, image.width, bottom)))
    return pixels


def _to_8_bits(image: Image.Image) -> tuple[NDArray[np.uint8], NDArray[np.uint8] | None]:
    """Return the grey values and alpha of a picture with 16 bits per pixel (12 in some TIFFs), rounded to 8 bits."""
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(258, (16,))[0]  # bits per sample
    maximum = (1 << bits) - 1
    values = np.asarray(image).astype(np.uint32)
    transparent = image.info.get("transparency")
    alpha = None if transparent is None else np.where(values == transparent, 0, 255).astype(np.uint8)
    if tags.get(262) == 0:  # photometric interpretation "white is zero"; Pillow applies it to 8 bits only
        values = maximum - values
    return ((values * 255 + maximum // 2) // maximum).astype(np.uint8), alpha


def _cmyk_to_srgb(image: Image.Image, icc: bytes | None, notes: list[str]) -> Image.Image:
    if icc is not None and _profile_space(icc) == "CMYK":
        try:
            converted = ImageCms.profileToProfile(
                image, ImageCms.ImageCmsProfile(io.BytesIO(icc)), ImageCms.createProfile("sRGB"), outputMode="RGB"
            )
        except (ImageCms.PyCMSError, OSError) as error:
            notes.append(f"the CMYK profile cannot be used: {_line(error)}")
        else:
            assert converted is not None  # only None when converting in place
            notes.append("CMYK was converted to sRGB by the ICC profile of the picture")
            return converted
    notes.append("CMYK was converted to RGB by the plain formula, because there is no ICC profile to go by")
    return image.convert("RGB")


def _profile(image: Image.Image, notes: list[str]) -> bytes | None:
    icc = image.info.get("icc_profile")
    if not icc:
        return None
    if len(icc) < 128 or icc[36:40] != b"acsp":
        notes.append("the ICC profile is damaged and was dropped")
        return None
    return bytes(icc)


def _profile_space(icc: bytes) -> str:
    """Return the colour space that a profile describes: "RGB ", "GRAY", "CMYK" or another four characters."""
    return icc[16:20].decode("latin-1")


def _exif(image: Image.Image, notes: list[str]) -> bytes | None:
    """Return the EXIF data of an opened file, starting with the TIFF header."""
    if image.format == "TIFF":
        if 0x8769 in image.getexif():  # the sub-directory with the exposure and so on
            notes.append("EXIF data of TIFF files is not kept")
        return None
    exif = bytes(image.info.get("exif") or _raw_profile(image, "exif") or _raw_profile(image, "APP1"))
    if not exif or exif.startswith(_XMP_PREFIX):
        return None
    while exif.startswith(_EXIF_PREFIX):  # Pillow adds a second one to that of some writers
        exif = exif.removeprefix(_EXIF_PREFIX)
    try:
        Image.Exif().load(exif)
    except Exception:  # noqa: BLE001 - as in _pillow()
        notes.append("the EXIF data is damaged and was dropped")
        return None
    return exif


def _xmp(image: Image.Image) -> bytes | None:
    xmp = image.info.get("xmp")
    if isinstance(xmp, str):
        return xmp.encode()
    if not xmp:
        app1 = _raw_profile(image, "APP1")
        xmp = _raw_profile(image, "xmp") or (app1 if app1.startswith(_XMP_PREFIX) else b"")
    return bytes(xmp).removeprefix(_XMP_PREFIX) or None


def _raw_profile(image: Image.Image, kind: str) -> bytes:
    """Metadata that ImageMagick stores in a text chunk of PNG files: a name, a length, and hexadecimal digits."""
    text = image.info.get(f"Raw profile type {kind}")
    try:
        return bytes.fromhex("".join(text.split()[2:])) if isinstance(text, str) else b""
    except ValueError:
        return b""


def _exif_orientation(exif: bytes | None) -> tuple[int, str, int]:
    """Find the orientation in EXIF data.

    Returns:
        Its offset, its type as of `struct`, and its value; (0, "", 0) if there is none.
    """
    if exif is None:
        return 0, "", 0
    order = "<" if exif[:2] == b"II" else ">"
    try:
        (directory,) = struct.unpack_from(order + "L", exif, 4)
        (entries,) = struct.unpack_from(order + "H", exif, directory)
        for entry in range(directory + 2, directory + 2 + 12 * entries, 12):
            tag, kind, count = struct.unpack_from(order + "HHL", exif, entry)
            if tag == _ORIENTATION_TAG and kind in _INTEGERS and count:
                form = order + _INTEGERS[kind]
                # Values that do not fit into the entry are where it points to.
                place = entry + 8
                if count * struct.calcsize(form) > 4:
                    (place,) = struct.unpack_from(order + "L", exif, place)
                return place, form, struct.unpack_from(form, exif, place)[0]
    except struct.error:
        pass
    return 0, "", 0


def _xmp_orientation(xmp: bytes | None) -> int:
    found = _XMP_ORIENTATION.search(xmp or b"")
    return int(found[2]) if found else 0


def _with_orientation_1(exif: bytes | None, xmp: bytes | None) -> tuple[bytes | None, bytes | None]:
    """Set the orientation in the metadata to 1. All other bytes stay, because rewriting EXIF loses maker notes."""
    place, form, value = _exif_orientation(exif)
    if exif is not None and value:
        exif = exif[:place] + struct.pack(form, 1) + exif[place + struct.calcsize(form) :]
    if xmp is not None:
        xmp = _XMP_ORIENTATION.sub(rb"\g<1>1", xmp)
    return exif, xmp


def contact_sheet(pictures: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Arrange pictures in a grid with about as many rows as columns.

    Args:
        pictures: at least one, each uint8 (H, W, 3), all of the same size.

    Returns:
        uint8 (rows x H, columns x W, 3). Empty cells at the end are white.
    """
    columns = math.ceil(math.sqrt(len(pictures)))
    blank = np.full_like(pictures[0], 255)
    cells = [*pictures, *[blank] * (-len(pictures) % columns)]
    rows = [np.concatenate(cells[i : i + columns], axis=1) for i in range(0, len(cells), columns)]
    return np.concatenate(rows, axis=0)
