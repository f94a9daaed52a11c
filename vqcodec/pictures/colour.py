"""Colours of pictures: ICC profiles, made where a file states its colours by numbers, and conversions to sRGB.

    numbers of the file -> stated() -> ColourSpace -> profile() -> ICC profile -+
                                                     ICC profile of the file ---+-> to_srgb(), cmyk_to_srgb() -> pixels

Code points are those of ITU-T H.273. Profiles are matrix/TRC profiles of ICC.1:2010 (version 4.3).
"""

import io
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

from vqcodec.errors import ImageError
from vqcodec.pictures.signalling import CodePoints

_D65 = (0.3127, 0.3290)
_BT709 = (*_D65, 0.640, 0.330, 0.300, 0.600, 0.150, 0.060)
_PRIMARIES = {  # of H.273: x and y of white, red, green and blue
    1: _BT709,
    2: _BT709,  # unspecified
    4: (0.310, 0.316, 0.67, 0.33, 0.21, 0.71, 0.14, 0.08),
    5: (*_D65, 0.64, 0.33, 0.29, 0.60, 0.15, 0.06),
    6: (*_D65, 0.630, 0.340, 0.310, 0.595, 0.155, 0.070),
    7: (*_D65, 0.630, 0.340, 0.310, 0.595, 0.155, 0.070),
    9: (*_D65, 0.708, 0.292, 0.170, 0.797, 0.131, 0.046),
    11: (0.314, 0.351, 0.680, 0.320, 0.265, 0.690, 0.150, 0.060),
    12: (*_D65, 0.680, 0.320, 0.265, 0.690, 0.150, 0.060),
    22: (*_D65, 0.630, 0.340, 0.295, 0.605, 0.155, 0.077),
}
# Parameters g, a, b, c and d of parametricCurveType 3: (a x + b)^g from d up, c x below; or g alone.
_SRGB_CURVE = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
_CURVES: dict[int, tuple[float, ...]] = {4: (2.2,), 5: (2.8,), 8: (1.0,), 17: (2.6,)}
# Cameras apply the curve of BT.709 and its like, but displays answer with about that of sRGB. 2 is unspecified.
_CURVES |= dict.fromkeys((1, 2, 6, 11, 12, 13, 14, 15), _SRGB_CURVE)
_PQ, _HLG = 16, 18
_PEAK, _WHITE = 1000.0, 203.0  # cd/m2: brightest light of HDR pictures, and their reference white (ITU-R BT.2408)
_D50 = np.array([0.9642, 1.0, 0.8249])
_BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])


@dataclass(frozen=True)
class ColourSpace:
    """Primaries and a transfer function.

    Args:
        primaries: x and y of white, red, green and blue.
        curve: from values to light, both 0..1: the parameters of an ICC parametric curve, or a table.
        hdr: what HDR curve was tone-mapped to this one: "PQ", "HLG" or "".
    """

    primaries: tuple[float, ...]
    curve: tuple[float, ...]
    hdr: str = ""

    def wide(self) -> bool:
        """Whether the primaries are others than those of sRGB."""
        return not np.allclose(self.primaries, _BT709, rtol=0, atol=0.003)

    def is_srgb(self, *, grey: bool) -> bool:
        """Whether this is sRGB. Of greys, only the curve counts."""
        return self.curve == _SRGB_CURVE and (grey or not self.wide())

    def profile(self, *, grey: bool) -> bytes:
        """Make an ICC profile for RGB or grey pixels.

        Raises:
            ImageError: there are no such primaries.
        """
        description = struct.pack(">4s4xLL2s2sLL", b"mluc", 1, 12, b"en", b"US", 2 * 7, 28) + "vqcodec".encode(
            "utf-16-be"
        )
        if len(self.curve) > 5:
            levels = np.rint(65535 * np.array(self.curve)).astype(">u2")
            curve = struct.pack(">4s4xL", b"curv", len(levels)) + levels.tobytes()
        else:
            kind = 3 if len(self.curve) == 5 else 0
            curve = struct.pack(">4s4xHxx", b"para", kind) + _fixed(self.curve)
        adaptation, colorants = _matrices(self.primaries)
        tags = {b"desc": description, b"cprt": description, b"wtpt": b"XYZ \0\0\0\0" + _fixed(_D50)}
        tags[b"chad"] = b"sf32\0\0\0\0" + _fixed(adaptation.ravel())
        if grey:
            tags[b"kTRC"] = curve
        else:
            for letter, colorant in zip(b"rgb", colorants.T, strict=True):
                tags[b"%cXYZ" % letter] = b"XYZ \0\0\0\0" + _fixed(colorant)
                tags[b"%cTRC" % letter] = curve
        return _assemble(b"GRAY" if grey else b"RGB ", tags)


def _fixed(values: Any) -> bytes:
    """s15Fixed16Number"""
    return np.rint(np.asarray(values) * 65536).astype(">i4").tobytes()


def _assemble(space: bytes, tags: dict[bytes, bytes]) -> bytes:
    """An ICC profile of its tags. Equal tags share their data."""
    table, data, places = b"", b"", dict[bytes, int]()
    start = 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        if content not in places:
            places[content] = start + len(data)
            data += content + b"\0" * (-len(content) % 4)
        table += struct.pack(">4sLL", name, places[content], len(content))
    header = struct.pack(">L4xL4s4s4s", start + len(data), 0x04300000, b"mntr", space, b"XYZ ")
    header += struct.pack(">6H4s", 2000, 1, 1, 0, 0, 0, b"acsp")  # a date that is always the same
    header = header.ljust(68, b"\0") + _fixed(_D50)
    return header.ljust(128, b"\0") + struct.pack(">L", len(tags)) + table + data


def _matrices(primaries: tuple[float, ...]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the adaptation of white to D50, and X, Y, Z (rows) of red, green, blue (columns) after it.

    Raises:
        ImageError: these are no primaries.
    """
    x, y = np.reshape(primaries, (4, 2)).T
    try:
        with np.errstate(all="raise"):
            white, *colours = np.stack([x / y, np.ones(4), (1 - x - y) / y], axis=1)
            columns = np.array(colours).T
            cones = np.diag((_BRADFORD @ _D50) / (_BRADFORD @ white))
            adaptation = np.linalg.inv(_BRADFORD) @ cones @ _BRADFORD
            colorants = adaptation @ (columns * np.linalg.solve(columns, white))
            sensible = max(np.abs(adaptation).max(), np.abs(colorants).max()) < 4
    except (np.linalg.LinAlgError, FloatingPointError):
        sensible = False
    if not sensible:
        raise ImageError("primaries that no display can have")
    return adaptation, colorants


def stated(colours: CodePoints | None, info: Mapping[Any, Any]) -> ColourSpace | None:
    """Return the colour space that a file without an ICC profile states; None if it states none.

    Args:
        colours: code points of the file, which go before `info`.
        info: of a Pillow image: "srgb", "gamma" and "chromaticity" are the sRGB, gAMA and cHRM chunks of PNG files.

    Raises:
        ImageError: the colours are not supported. The message says which.
    """
    if colours is not None:
        return _of_code_points(colours)
    gamma, primaries = info.get("gamma"), info.get("chromaticity")
    if not isinstance(gamma, float):  # a text of this name is no chunk
        gamma = None
    if not isinstance(primaries, tuple):
        primaries = None
    if isinstance(info.get("srgb"), int) or (gamma is None and primaries is None):
        return None
    space = ColourSpace(primaries or _BT709, _SRGB_CURVE)
    if gamma is None or (abs(gamma - 0.45455) < 0.01 and not space.wide()):  # what files call 1 / 2.2 is sRGB's curve
        return space
    if not 0.05 <= gamma <= 20:
        raise ImageError(f"a gamma of {gamma:g}")
    return ColourSpace(space.primaries, (1 / gamma,))


def _of_code_points(colours: CodePoints) -> ColourSpace:
    primaries = _PRIMARIES.get(colours.primaries)
    if primaries is not None and colours.transfer in _CURVES:
        return ColourSpace(primaries, _CURVES[colours.transfer])
    if primaries is not None and colours.transfer in (_PQ, _HLG):
        return ColourSpace(primaries, _tone_curve(colours.transfer), "PQ" if colours.transfer == _PQ else "HLG")
    raise ImageError(f"colours with primaries {colours.primaries} and transfer function {colours.transfer} of H.273")


def _tone_curve(transfer: int) -> tuple[float, ...]:
    """Curve of PQ or HLG pictures for a display whose white is their reference white.

    The tone mapping is the EETF of ITU-R BT.2390, 5.4.1, from 1000 to 203 cd/m2, for each channel.
    """
    values = np.linspace(0, 1, 1024)
    if transfer == _HLG:  # BT.2100: inverse OETF, and the OOTF of a display of 1000 cd/m2
        a, b, c = 0.17883277, 0.28466892, 0.55991073
        scene = np.where(values <= 0.5, values**2 / 3, (np.exp((values - c) / a) + b) / 12)
        values = _pq(_PEAK * scene**1.2)
    peak, target = _pq(np.array([_PEAK, _WHITE]))
    e = np.minimum(values / peak, 1)
    highest = target / peak
    knee = 1.5 * highest - 0.5
    t = (np.maximum(e, knee) - knee) / (1 - knee)
    rolled = (2 * t**3 - 3 * t**2 + 1) * knee + (t**3 - 2 * t**2 + t) * (1 - knee) + (3 * t**2 - 2 * t**3) * highest
    light = _pq_light(np.where(e < knee, e, rolled) * peak) / _WHITE
    return tuple(np.clip(light, 0, 1).tolist())


_M1, _M2, _C1, _C2, _C3 = 2610 / 16384, 2523 / 32, 3424 / 4096, 2413 / 128, 2392 / 128  # of PQ, ITU-R BT.2100


def _pq(light: NDArray[np.float64]) -> NDArray[np.float64]:
    """Values 0..1 of light in cd/m2."""
    y = (light / 10_000) ** _M1
    return ((_C1 + _C2 * y) / (1 + _C3 * y)) ** _M2


def _pq_light(values: NDArray[np.float64]) -> NDArray[np.float64]:
    power = values ** (1 / _M2)
    return 10_000 * (np.maximum(power - _C1, 0) / (_C2 - _C3 * power)) ** (1 / _M1)


def problem(icc: bytes) -> str:
    """Say what is wrong with an ICC profile, in words that follow "the ICC profile"; "" if nothing is."""
    if len(icc) < 128 or icc[36:40] != b"acsp":
        return "is damaged"
    size = int.from_bytes(icc[:4], "big")
    if size > len(icc):
        return f"is cut: it has {len(icc)} of {size} bytes"
    try:
        ImageCms.ImageCmsProfile(io.BytesIO(icc))
    except (ImageCms.PyCMSError, OSError):
        return "is damaged"
    return ""


def space(icc: bytes) -> str:
    """Return the colour space that a profile describes: "RGB ", "GRAY", "CMYK" or another four characters."""
    return icc[16:20].decode("latin-1")


def to_srgb(pixels: NDArray[np.uint8], icc: bytes, *, grey: bool) -> NDArray[np.uint8]:
    """Convert pixels to sRGB.

    Args:
        pixels: uint8 (H, W, 3), RGB, or greys three times.
        icc: a profile for RGB or grey pixels.
        grey: whether the pixels are grey.

    Returns:
        uint8 (H, W, 3), greys if they were.

    Raises:
        ImageError: the profile cannot be used.
    """
    if not grey:
        image = _converted(Image.fromarray(pixels), icc, ImageCms.createProfile("sRGB"), "RGB")
        return np.array(image)
    target = ImageCms.ImageCmsProfile(io.BytesIO(ColourSpace(_BT709, _SRGB_CURVE).profile(grey=True)))
    # Optimised transforms of greys are wrong by up to 10 levels near black.
    image = _converted(
        Image.fromarray(np.ascontiguousarray(pixels[..., 0])), icc, target, "L", ImageCms.Flags.NOOPTIMIZE
    )
    return np.repeat(np.asarray(image)[..., None], 3, axis=2)


def cmyk_to_srgb(image: Image.Image, icc: bytes) -> Image.Image:
    """Convert an image of mode CMYK to RGB.

    Raises:
        ImageError: the profile cannot be used.
    """
    return _converted(image, icc, ImageCms.createProfile("sRGB"), "RGB")


def _converted(
    image: Image.Image, icc: bytes, target: Any, mode: str, flags: ImageCms.Flags = ImageCms.Flags.NONE
) -> Image.Image:
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(icc))
        converted = ImageCms.profileToProfile(image, source, target, outputMode=mode, flags=flags)
    except (ImageCms.PyCMSError, OSError) as error:
        raise ImageError(f"the {space(icc).strip()} profile cannot be used: {error}") from error
    assert converted is not None  # only None when converting in place
    return converted
