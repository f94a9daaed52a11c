"""Picture formats that Pillow does not read by itself: HEIF, with pillow-heif, and JPEG XL, which is only named.

The plugin for JPEG XL that there is decodes before the size can be checked, takes animations for single pictures, and
leaves an EXIF orientation that must not be applied.
"""

import importlib
from collections.abc import Callable
from typing import Any, NoReturn

from PIL import Image

from vqcodec.errors import ImageError

_HEIF = (b"ftypheic", b"ftypheix", b"ftypheim", b"ftypheis", b"ftyphevc", b"ftyphevx", b"ftypmif1", b"ftypmsf1")
_JXL = (b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n")


def register() -> tuple[str, ...]:
    """Make `Image.open` read these formats, or raise an ImageError that says why not, for those who ask for them.

    Returns:
        Names for the `formats` of `Image.open`.
    """
    Image.OPEN.setdefault("HEIF", (_open_heif, lambda start: start[4:12] in _HEIF))
    # Under a name of its own, because the caller of the library may use a plugin.
    Image.OPEN["VQCODEC JXL"] = (_refusing("JPEG XL pictures cannot be read"), lambda start: start.startswith(_JXL))
    return "HEIF", "VQCODEC JXL"


def _open_heif(file: Any, name: Any) -> Any:
    """Open a HEIF picture. The plugin, a large library, is loaded when it is needed."""
    try:
        plugin = importlib.import_module("pillow_heif")
    except ImportError:
        raise ImageError("HEIF pictures need pillow-heif: pip install 'vqcodec[heif]'") from None
    return plugin.HeifImageFile(file, name)


def _refusing(message: str) -> Callable[..., NoReturn]:
    """What opens a picture that cannot be read."""

    def refuse(*_: object) -> NoReturn:
        raise ImageError(message)

    return refuse
