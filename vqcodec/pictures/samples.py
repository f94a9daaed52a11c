"""Samples of picture files as Pillow loads them: what it reads wrongly, and 8 bits of more.

TIFF tags are those of TIFF 6.0.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vqcodec.errors import ImageError
from vqcodec.pictures.signalling import Signals

_BITS, _SAMPLES, _PLANAR, _COLOUR_MAP, _SAMPLE_FORMAT = 258, 277, 284, 320, 339  # tags of TIFF files
_GREY_SCALES = {"L;2": 85, "L;4": 17}  # what Pillow multiplies few bits of grey by, by its name of the layout


def depth(image: Image.Image, layouts: Sequence[Any], signals: Signals) -> int:
    """Return the bits per channel of an image that is not loaded yet.

    Args:
        image: the image.
        layouts: how samples are laid out, in Pillow's words.
        signals: what its file states.
    """
    if image.format == "TIFF":
        return max(image.tag_v2.get(_BITS, (8,)))  # type: ignore[attr-defined]
    if image.format == "PPM":
        maxima = [layout[1] for layout in layouts if isinstance(layout, tuple) and isinstance(layout[1], int)]
        if maxima:
            return max(maxima).bit_length()
    deep = image.mode.startswith("I") or any(";16" in str(layout) for layout in layouts)
    return signals.bits or (16 if deep else 8)


def check_tiff(image: Image.Image, notes: list[str]) -> None:
    """Refuse TIFF files that Pillow reads wrongly, and note what it leaves out.

    Raises:
        ImageError: samples are signed, or have 16 bits in separate planes.
    """
    tags = image.tag_v2  # type: ignore[attr-defined]
    if 2 in tags.get(_SAMPLE_FORMAT, ()) and image.mode not in ("I", "F"):
        raise ImageError("the samples are signed integers, expected unsigned ones")
    if tags.get(_PLANAR) == 2 and len(tags.get(_BITS, ())) > 1 and max(tags[_BITS]) > 8:
        raise ImageError("more than 8 bits per sample in separate planes are not supported")
    kept = 3 if image.mode == "RGBX" else len(image.getbands())
    if tags.get(_SAMPLES, kept) > kept:
        notes.append("a channel of which the file does not say what it is was dropped")


def mend(image: Image.Image, layout: str) -> None:
    """Correct what Pillow took for something else in a loaded image.

    Args:
        image: gets right values.
        layout: how the file's samples are laid out, in Pillow's words.
    """
    transparent = image.info.get("transparency")
    scale = _GREY_SCALES.get(layout)
    if image.format == "PNG" and image.mode == "L" and scale and isinstance(transparent, int):
        image.info["transparency"] = transparent * scale  # of the file's few values; pixels have the whole range
    if layout == "RGB;16B" and isinstance(transparent, tuple):
        image.info["transparency"] = tuple(value >> 8 for value in transparent)  # as Pillow reduced the pixels
    if isinstance(transparent, str):
        del image.info["transparency"]  # a text of that name
    if image.format == "TIFF" and image.mode == "P":
        colours = image.tag_v2.get(_COLOUR_MAP, ())  # type: ignore[attr-defined]
        if colours and max(colours) < 256:  # of 8 bits, although the format asks for 16
            image.putpalette(np.array(colours, np.uint8).reshape(3, -1).T.tobytes())


def in_mode(image: Image.Image, mode: str) -> Image.Image:
    """Convert an image, without a copy if it has the mode already."""
    return image if image.mode == mode else image.convert(mode)


def to_array(image: Image.Image) -> NDArray[np.uint8]:
    """Return the pixels of an RGB image, uint8 (H, W, 3). Strips save memory: np.asarray makes several copies."""
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    for top in range(0, image.height, 256):
        bottom = min(top + 256, image.height)
        pixels[top:bottom] = np.asarray(image.crop((0, top, image.width, bottom)))
    return pixels


def to_8_bits(image: Image.Image) -> tuple[NDArray[np.uint8], NDArray[np.uint8] | None]:
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
