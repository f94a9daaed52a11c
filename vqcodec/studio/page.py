"""A self-contained page on which pictures are compared: two at a time under a slider, all of them in a table.

The page is web/compare.html with the style sheet, the script and the pictures put in. It loads nothing from elsewhere.
"""

import base64
import dataclasses
import importlib.resources
import io
import json
import math
import string
from collections.abc import Sequence
from dataclasses import dataclass

from vqcodec import image, metrics
from vqcodec.image import Picture
from vqcodec.ssimulacra2 import MOST_PIXELS, ssimulacra2


@dataclass(frozen=True, eq=False)
class Entry:
    """A picture to compare.

    Attributes:
        name: what the page calls it.
        size: bytes of its file.
        picture: what is in the file.
    """

    name: str
    size: int
    picture: Picture


def render(entries: Sequence[Entry]) -> str:
    """Make the page.

    Args:
        entries: pictures of one size, the first of which is the reference of the others.

    Returns:
        The HTML text.
    """
    reference = entries[0].picture
    height, width, _ = reference.pixels.shape
    shown = [
        {
            "name": entry.name,
            "src": "data:image/png;base64," + base64.b64encode(png(entry.picture)).decode("ascii"),
            "width": width,
            "height": height,
            "figures": figures(entry.size, entry.picture, None if entry is entries[0] else reference),
        }
        for entry in entries
    ]
    # "<" could end the script element in which the pictures stand, or begin a comment there.
    pictures = json.dumps(shown).replace("<", "\\u003c")
    template = string.Template(asset("compare.html"))
    return template.substitute(style=asset("viewer.css"), script=asset("viewer.js"), pictures=pictures)


def asset(name: str) -> str:
    """The text of a file in web/."""
    return importlib.resources.files("vqcodec.studio").joinpath("web", name).read_text("utf-8")


def png(picture: Picture, level: int = 6) -> bytes:
    """A picture as a browser shows it: a PNG file with its colour profile, but without EXIF data and XMP.

    Args:
        picture: the picture.
        level: 1 to write it fast, 9 to make it small.
    """
    out = io.BytesIO()
    shown = image.to_pil(dataclasses.replace(picture, exif=None, xmp=None))
    shown.save(out, "PNG", compress_level=level, icc_profile=picture.icc)
    return out.getvalue()


def figures(size: int, picture: Picture, reference: Picture | None) -> dict[str, str]:
    """What the table says of a picture, by column.

    Args:
        size: bytes of its file.
        picture: the picture.
        reference: what it is compared with, of the same size; None if it is the reference.
    """
    height, width, _ = picture.pixels.shape
    bits = metrics.bits_per_pixel(size, width, height)
    told = {"Bytes": f"{size:,}", "Bits per pixel": f"{bits:.4f}"}
    if reference is not None:
        psnr = metrics.psnr(reference.pixels, picture.pixels)
        told["PSNR"] = f"{psnr:.2f} dB" if math.isfinite(psnr) else "equal"
        if width * height > MOST_PIXELS:
            told["SSIMULACRA2"] = "too large"
        else:
            score = ssimulacra2(reference.pixels, picture.pixels)
            told["SSIMULACRA2"] = "too small" if math.isnan(score) else f"{score:.1f}"
    return told
