"""Picture files <-> pixels: Pillow reads files, and they become 8-bit RGB. Notes say what was converted or lost.

    bytes -> load() ---------+                +-> to_pil() -> PIL.Image
                             +-> Picture -----+
    PIL.Image -> from_pil() -+                +-> adapt() -> Picture as a format holds it -> save() -> bytes

Loading applies the orientation (metadata.py), reduces more bits per channel to 8 (samples.py) and converts CMYK, HDR
and gammas other than that of sRGB (colour.py). Other RGB and grey pictures keep their ICC profile or get one.
"""

import io
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from vqcodec import limits
from vqcodec.errors import ImageError
from vqcodec.frame import Region
from vqcodec.pictures import colour, metadata, pillow, plugins, samples, signalling
from vqcodec.pictures.metadata import EXIF_PREFIX
from vqcodec.pictures.signalling import CodePoints, Signals

# Pillow reads many more formats. Some start other programs (EPS), and many have hardly been tested against bad files.
_READ_FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "TIFF", "BMP", "GIF", "PPM", *plugins.register())
_GREY_MODES = {"1", "L", "LA", "La"}
_READ_MODES = _GREY_MODES | {"P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV"}
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


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

    Raises:
        ImageError: pixels or alpha have another type or shape.
    """

    pixels: NDArray[np.uint8]
    grey: bool = False
    alpha: NDArray[np.uint8] | None = None
    icc: bytes | None = None
    exif: bytes | None = None
    xmp: bytes | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not _is_uint8(self.pixels) or self.pixels.ndim != 3 or self.pixels.shape[2] != 3 or not self.pixels.size:
            raise ImageError(f"pixels must be uint8 (H, W, 3), got {_described(self.pixels)}")
        height, width, _ = self.pixels.shape
        if self.alpha is not None and (not _is_uint8(self.alpha) or self.alpha.shape != (height, width)):
            raise ImageError(f"alpha must be uint8 ({height}, {width}), got {_described(self.alpha)}")


def _is_uint8(value: object) -> bool:
    return isinstance(value, np.ndarray) and value.dtype == np.uint8


def _described(value: object) -> str:
    return f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__


def load(data: bytes, *, max_pixels: int | None) -> Picture:
    """Decode a PNG, JPEG, WebP, AVIF, TIFF, BMP, GIF or PNM file.

    Args:
        data: the whole file.
        max_pixels: largest width x height to accept, checked before the pixels are decoded (see `limits.excess`); None
            for Pillow's own limit (twice PIL.Image.MAX_IMAGE_PIXELS).

    Raises:
        ImageError: the file has another format, is damaged, too large or animated, or has a pixel type that from_pil()
            does not accept.
    """
    with pillow.errors("the picture cannot be decoded", any_size=max_pixels is not None) as caught:
        image = Image.open(io.BytesIO(data), formats=_READ_FORMATS)
        if problem := limits.excess(image.width, image.height, max_pixels):
            raise ImageError(problem)
        return _convert(image, signalling.read(data), caught)


def size(data: bytes) -> tuple[int, int]:
    """(width, height) in pixels that a picture file states. Nothing is decoded, and the orientation is not applied.

    Args:
        data: the whole file.

    Raises:
        ImageError: the file has a format that `load` does not read, or its header is damaged.
    """
    with pillow.errors("the picture cannot be read", any_size=True):
        return Image.open(io.BytesIO(data), formats=_READ_FORMATS).size


def from_pil(image: Image.Image) -> Picture:
    """Convert a Pillow image.

    Args:
        image: bilevel, grey, palette, RGB or CMYK, with 8 or 16 bits per channel, with or without alpha. Code points of
            its colours, as PNG and AVIF files may have, are only known before its load().

    Raises:
        ImageError: the image has several frames, another pixel type or no pixels, or its file cannot be decoded.
    """
    with pillow.errors("the picture cannot be decoded") as caught:
        return _convert(image, signalling.read(_file(image)), caught)


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
        image.info["exif"] = EXIF_PREFIX + picture.exif
    if picture.xmp is not None:
        image.info["xmp"] = picture.xmp
    return image


_NO_LIMIT = 1 << 31
_PNG_DEPTH = slice(24, 26)  # where the header of a PNG file has bit depth and colour type


@dataclass(frozen=True)
class _Writer:
    """How Pillow writes a format.

    Args:
        name: Pillow's name of the format.
        max_side: largest width and height that the format allows.
        alpha: whether the format has an alpha channel.
        grey: whether it has a grey mode.
        icc, exif, xmp: largest size of this metadata in bytes.
        options: for Pillow. They ask for lossless coding if the format has it, and else for quality 95.
    """

    name: str
    max_side: int = 0xFFFFFF
    alpha: bool = True
    grey: bool = True
    icc: int = _NO_LIMIT
    exif: int = _NO_LIMIT
    xmp: int = _NO_LIMIT
    options: dict[str, Any] = field(default_factory=dict)


_SEGMENT = 65533  # bytes in a segment of a JPEG file; profiles may have 255 of them
_JPEG = _Writer(
    "JPEG",
    max_side=65500,
    alpha=False,
    icc=255 * (_SEGMENT - 14),
    exif=_SEGMENT - len(EXIF_PREFIX),
    xmp=_SEGMENT - 29,
    options={"quality": 95, "subsampling": "4:4:4"},
)
_TIFF = _Writer("TIFF", exif=0, options={"compression": "tiff_adobe_deflate"})
_WRITERS = {
    ".png": _Writer("PNG", icc=pillow.MAX_TEXT, xmp=pillow.MAX_TEXT),
    ".jpg": _JPEG,
    ".jpeg": _JPEG,
    ".webp": _Writer("WEBP", max_side=16383, grey=False, options={"lossless": True, "exact": True}),
    ".tif": _TIFF,
    ".tiff": _TIFF,
    ".bmp": _Writer("BMP", alpha=False, icc=0, exif=0, xmp=0),
    ".avif": _Writer("AVIF", max_side=65536, grey=False, options={"quality": 95, "subsampling": "4:4:4"}),
    ".ppm": _Writer("PPM", alpha=False, icc=0, exif=0, xmp=0),
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


def adapt(picture: Picture, suffix: str) -> Picture:
    """Make of a picture what the files of a format can hold.

    Metadata that do not fit are left out. Where the ICC profile does not fit, pixels become sRGB.

    Args:
        picture: the picture.
        suffix: as of `save`.

    Returns:
        The picture, with a further note if something was left out.

    Raises:
        ImageError: no format has this suffix.
    """
    check_suffix(suffix)
    writer = _WRITERS[suffix.lower()]
    pixels, icc, notes = picture.pixels, picture.icc, list(picture.notes)
    grey_icc = icc is not None and colour.space(icc) == "GRAY"
    if icc is not None and (len(icc) > writer.icc or (picture.grey and grey_icc and not writer.grey)):
        try:
            pixels = colour.to_srgb(pixels, icc, grey=picture.grey)
        except ImageError as error:
            notes.append(f"colours may be wrong: {error}")
        icc = None
    exif = picture.exif if len(picture.exif or b"") <= writer.exif else None
    xmp = picture.xmp if len(picture.xmp or b"") <= writer.xmp else None
    lost = [name for name, old, new in (("EXIF", picture.exif, exif), ("XMP", picture.xmp, xmp)) if old and not new]
    if lost:
        held = [limit for name, limit in (("EXIF", writer.exif), ("XMP", writer.xmp)) if name in lost and limit]
        why = "have no room for so much of it" if held else "are written without"
        notes.append(f"{' and '.join(lost)} left out: {writer.name} files {why}")
    if exif and writer.name == "AVIF" and not metadata.readable(exif):  # Pillow looks for the orientation there
        exif = None
        notes.append("EXIF left out: it cannot be read, as AVIF files need")
    return replace(picture, pixels=pixels, icc=icc, exif=exif, xmp=xmp, notes=tuple(notes))


def to_grey(picture: Picture) -> Picture:
    """A picture in shades of grey: the luma of its sRGB values (ITU-R BT.601), without ICC profile."""
    if picture.grey:
        return picture
    pixels, notes = picture.pixels, picture.notes
    if picture.icc is not None:
        try:
            pixels = colour.to_srgb(pixels, picture.icc, grey=False)
        except ImageError as error:
            notes = (*notes, f"shades may be wrong: {error}")
    luma = np.asarray(Image.fromarray(pixels).convert("L"))
    return replace(picture, pixels=np.repeat(luma[..., None], 3, axis=2), grey=True, icc=None, notes=notes)


def save(picture: Picture, suffix: str) -> bytes:
    """Encode a picture: lossless as PNG, WebP, TIFF, BMP and PPM, at quality 95 as JPEG and AVIF.

    What `adapt` leaves out is left out, as is an alpha channel that is opaque everywhere in JPEG, BMP and PPM.

    Args:
        picture: the picture to encode.
        suffix: file name suffix of the format, ".png" for example, in lower or upper case.

    Returns:
        The bytes of the file.

    Raises:
        ImageError: no format has this suffix, or the format cannot hold the picture, for its transparency or size.
    """
    picture = adapt(picture, suffix)
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
    if picture.grey and not writer.grey:
        image = image.convert("RGB" if picture.alpha is None else "RGBA")
    image.info.clear()  # only some of Pillow's writers take metadata from here, so all is passed explicitly
    options = dict(writer.options)
    if picture.icc is not None:
        options["icc_profile"] = picture.icc
    if picture.exif is not None:
        options["exif"] = EXIF_PREFIX + picture.exif
    if picture.xmp is not None:
        options |= _xmp_option(writer.name, picture.xmp)
    out = io.BytesIO()
    with pillow.errors(f"the picture cannot be written as {writer.name}"):
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
    # Image.open refuses sizes that a caller may allow. Here the size of the picture is the limit.
    with pillow.errors("alpha cannot be read"), PngImagePlugin.PngImageFile(io.BytesIO(data)) as png:
        if data[_PNG_DEPTH] != b"\x08\x00":  # Pillow takes 2 and 4 bits for 8
            raise ImageError("alpha is not grey of 8 bits")
        if png.size != (width, height):
            raise ImageError(f"alpha has {png.width} x {png.height} pixels, the picture {width} x {height}")
        return np.asarray(png).copy()


def reduced(alpha: NDArray[np.uint8], region: Region | None, scale: int) -> NDArray[np.uint8]:
    """Cut out and scale down an alpha channel, uint8 (H, W), as `synthesis.reconstruct` does the picture."""
    height, width = alpha.shape
    rows, columns = (slice(0, height), slice(0, width)) if region is None else (region.rows, region.columns)
    top, left = (s.start // scale * scale for s in (rows, columns))
    bottom, right = (min(size, -(-s.stop // scale) * scale) for s, size in ((rows, height), (columns, width)))
    return np.asarray(Image.fromarray(alpha).reduce(scale, (left, top, right, bottom))).copy()


def _xmp_option(format_name: str, xmp: bytes) -> dict[str, Any]:
    if format_name == "PNG":
        info = PngImagePlugin.PngInfo()
        info.add(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp)
        return {"pnginfo": info}
    if format_name == "TIFF":
        return {"tiffinfo": {700: xmp}}
    return {"xmp": xmp}


def _file(image: Image.Image) -> bytes:
    """The file that an image is to be loaded from, b"" if there is none."""
    file = getattr(image, "fp", None)
    if file is None or getattr(file, "closed", True) or not file.seekable():
        return b""
    place = file.tell()
    file.seek(0)
    data = file.read()
    file.seek(place)
    return bytes(data)


def _convert(image: Image.Image, signals: Signals, caught: list[warnings.WarningMessage]) -> Picture:
    notes: list[str] = []
    # Phones store a depth or brightness map after the photo in the same JPEG file, which Pillow calls MPO.
    if image.format == "MPO" and (count := getattr(image, "n_frames", 1)) > 1:
        notes.append(f"the file has {count} pictures, only the first is kept")
    # To count the pages of a TIFF file would take quadratic time.
    elif getattr(image, "is_animated", False) if image.format == "TIFF" else getattr(image, "n_frames", 1) > 1:
        raise ImageError("the file has several frames or pages, only single pictures are supported")
    if image.width == 0 or image.height == 0:
        raise ImageError(f"the picture is {image.width} x {image.height} pixels, expected at least 1 x 1")
    layouts = [tile[3] for tile in getattr(image, "tile", ())]  # load() empties the list of tiles
    source, bits = image.format, samples.depth(image, layouts, signals)
    if source == "TIFF":
        samples.check_tiff(image, notes)
    image.load()  # before the metadata are read, because they may follow the pixels in the file
    samples.mend(image, " ".join(map(str, layouts)))

    exif, xmp, orientation = metadata.read(image, notes, gain_map=signals.gain_map)
    if source != "TIFF" and orientation in _TRANSPOSE:  # Pillow applies the orientation of TIFF files itself
        image = image.transpose(_TRANSPOSE[orientation])

    info, icc, alpha = image.info, _profile(image, notes), None
    if image.mode.startswith("I;16") or (image.mode == "I" and source == "PPM"):
        grey = True
        values, alpha = samples.to_8_bits(image)
        pixels = np.repeat(values[..., None], 3, axis=2)
    elif image.mode not in _READ_MODES:
        raise ImageError(f"the pixel type is {image.mode!r}, expected 8 or 16 bits per channel of grey, RGB or CMYK")
    else:
        if image.mode == "CMYK":
            image, icc = _cmyk_to_srgb(image, icc, notes), None
        grey = image.mode in _GREY_MODES
        if image.has_transparency_data:
            image = samples.in_mode(image, "LA" if grey else "RGBA")
            alpha = np.array(image.getchannel("A"))
        pixels = samples.to_array(samples.in_mode(image, "RGB"))
    if bits > 8:
        notes.append(f"{bits} bits per channel were reduced to 8")
    if icc is not None and colour.space(icc) != ("GRAY" if grey else "RGB "):
        notes.append(f"the ICC profile is for {colour.space(icc).strip()} pixels and was dropped")
        icc = None
    if icc is None or (source == "PNG" and signals.colours):  # in PNG files, code points go before a profile
        pixels, icc = _with_colours(pixels, icc, signals.colours, info, notes, grey=grey, png=source == "PNG")
    notes += [pillow.line(warning.message) for warning in caught if warning.category is UserWarning]
    return Picture(pixels, grey, alpha, icc, exif, xmp, tuple(notes))


def _with_colours(
    pixels: NDArray[np.uint8],
    icc: bytes | None,
    colours: CodePoints | None,
    info: Mapping[Any, Any],
    notes: list[str],
    *,
    grey: bool,
    png: bool,
) -> tuple[NDArray[np.uint8], bytes | None]:
    """Apply the colours that a file states by numbers: return the pixels and their ICC profile.

    A profile is made for wide-gamut pictures, which would lose colours in sRGB. Others are converted, because the codec
    is made for pixels whose steps look about equal.
    """
    try:
        if png and colours is not None and (colours.matrix or not colours.full_range):
            raise ImageError("YCbCr values or a narrow range")
        space = colour.stated(colours, info)
        if space is None or space.is_srgb(grey=grey):
            return pixels, None
        made = space.profile(grey=grey)
        if space.wide() and not grey and not space.hdr:
            return pixels, made
        pixels = colour.to_srgb(pixels, made, grey=grey)
    except ImageError as error:
        notes.append(f"the file states {error}, which is not supported: colours may be wrong")
        return pixels, icc
    notes.append(
        f"HDR ({space.hdr}) was tone-mapped to sRGB" if space.hdr else "the gamma was converted to that of sRGB"
    )
    return pixels, None


def _cmyk_to_srgb(image: Image.Image, icc: bytes | None, notes: list[str]) -> Image.Image:
    if icc is not None and colour.space(icc) == "CMYK":
        try:
            converted = colour.cmyk_to_srgb(image, icc)
        except ImageError as error:
            notes.append(pillow.line(error))
        else:
            notes.append("CMYK was converted to sRGB by the ICC profile of the picture")
            return converted
    notes.append("CMYK was converted to RGB by the plain formula, because there is no ICC profile to go by")
    return image.convert("RGB")


def _profile(image: Image.Image, notes: list[str]) -> bytes | None:
    icc = image.info.get("icc_profile") or metadata.raw_profile(image, "icc") or metadata.raw_profile(image, "icm")
    if not isinstance(icc, bytes) or not icc:
        if "icc_profile" in image.info:  # Pillow could not unpack it
            notes.append("the ICC profile is damaged and was dropped")
        return None
    if problem := colour.problem(icc):
        notes.append(f"the ICC profile {problem} and was dropped")
        return None
    return icc


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
