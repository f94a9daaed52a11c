"""Every codec of the benchmark behind one interface: pixels and a quality in, file bytes out, and back.

The classic codecs are used as a user of Pillow or imagecodecs gets them; what differs from the libraries' defaults is
in each codec's `settings`. All of them run on a stated number of threads so that times can be compared.
"""

import bisect
import functools
import importlib.metadata
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
from numpy.typing import NDArray
from PIL import Image, features

Pixels = NDArray[np.uint8]  # (H, W, 3), sRGB


@dataclass(frozen=True)
class Codec:
    """One codec with one group of settings.

    Attributes:
        key: the name on the command line and of the results file.
        title: the name in tables and plots.
        suffix: of its files, with the dot.
        settings: one line on what was chosen.
        version: library and version.
        qualities: default operating points, rising in quality.
        scale: all qualities that `nearest_quality` may take, rising in quality.
        encode: (pixels, quality) -> file bytes.
        decode: file bytes -> pixels.
    """

    key: str
    title: str
    suffix: str
    settings: str
    version: str
    qualities: tuple[float, ...]
    scale: Sequence[float]
    encode: Callable[[Pixels, float], bytes]
    decode: Callable[[bytes], Pixels]


class CodecUnavailableError(Exception):
    """A codec cannot run here; the message says why in one line."""


def get(key: str, *, weights: Path | None = None, device: str = "auto", threads: int = 1) -> Codec:
    """The codec called `key`.

    Args:
        key: one of KEYS.
        weights: weights file of vqcodec; the packaged one if None. Other codecs ignore it.
        device: of vqcodec: "auto", "cpu" or "cuda".
        threads: for AVIF and JPEG XL; vqcodec takes what torch is set to; the others have one.

    Raises:
        CodecUnavailableError: the library or the weights are missing.
        ValueError: no codec is called so.
    """
    if key not in _MAKERS:
        raise ValueError(f"unknown codec '{key}': expected one of {', '.join(KEYS)}")
    return _MAKERS[key](weights, device, threads)


def nearest_quality(codec: Codec, pixels: Pixels, size: float) -> tuple[float, bytes]:
    """The quality whose file comes nearest to `size` bytes, and that file.

    Bisects `codec.scale`, on which file sizes have to rise; where they fall now and then, as those of JPEG XL do at low
    rates, a quality elsewhere may be nearer.
    """
    files: dict[float, bytes] = {}

    def encode(quality: float) -> int:
        if quality not in files:
            files[quality] = codec.encode(pixels, quality)
        return len(files[quality])

    above = bisect.bisect_left(codec.scale, size, hi=len(codec.scale) - 1, key=encode)
    for index in (above - 1, above):  # the last below and the first not below
        if index >= 0:
            encode(codec.scale[index])
    best = min(files, key=lambda quality: abs(len(files[quality]) - size))
    return best, files[best]


def _pillow(image_format: str, options: Callable[[float], dict[str, Any]]) -> Callable[[Pixels, float], bytes]:
    def encode(pixels: Pixels, quality: float) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, image_format, **options(quality))
        return buffer.getvalue()

    return encode


def _pillow_decode(data: bytes) -> Pixels:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def _pillow_version(feature: str, library: str) -> str:
    if not features.check(feature):
        raise CodecUnavailableError(f"this Pillow was built without {library}")
    return f"Pillow {importlib.metadata.version('pillow')}, {library} {features.version(feature)}"


def _jpeg(weights: Path | None, device: str, threads: int) -> Codec:
    turbo = features.version("libjpeg_turbo")
    return Codec(
        "jpeg",
        "JPEG",
        ".jpg",
        "Pillow's defaults: 4:2:0, baseline, standard Huffman tables",
        f"Pillow {importlib.metadata.version('pillow')}, " + (f"libjpeg-turbo {turbo}" if turbo else "libjpeg"),
        (5, 10, 15, 20, 30, 40, 50, 60, 70, 80, 90, 95),
        range(1, 96),
        _pillow("JPEG", lambda quality: {"quality": int(quality)}),
        _pillow_decode,
    )


def _webp(weights: Path | None, device: str, threads: int) -> Codec:
    return Codec(
        "webp",
        "WebP",
        ".webp",
        "Pillow's defaults: lossy, 4:2:0, method 4",
        _pillow_version("webp", "libwebp"),
        (1, 10, 20, 35, 50, 65, 75, 85, 92, 98),
        range(1, 101),
        _pillow("WEBP", lambda quality: {"quality": int(quality)}),
        _pillow_decode,
    )


def _jpeg2000(weights: Path | None, device: str, threads: int) -> Codec:
    return Codec(
        "jpeg2000",
        "JPEG 2000",
        ".jp2",
        "9/7 wavelet, colour transform, one tile, one layer; the quality is the target in bits per pixel",
        _pillow_version("jpg_2000", "OpenJPEG"),
        (0.08, 0.12, 0.2, 0.3, 0.45, 0.65, 0.9, 1.3, 1.8, 2.5),
        [step / 200 for step in range(4, 801)],
        _pillow(
            "JPEG2000",
            lambda bpp: {"irreversible": True, "mct": 1, "quality_mode": "rates", "quality_layers": [24 / bpp]},
        ),
        _pillow_decode,
    )


def _avif_codec(key: str, title: str, settings: str, threads: int, **extra: Any) -> Codec:
    return Codec(
        key,
        title,
        ".avif",
        settings,
        _pillow_version("avif", "libavif"),
        (5, 15, 25, 35, 45, 55, 65, 75, 85, 92),
        range(1, 101),
        _pillow("AVIF", lambda quality: {"quality": int(quality), "speed": 6, "max_threads": threads, **extra}),
        _pillow_decode,
    )


def _avif(weights: Path | None, device: str, threads: int) -> Codec:
    return _avif_codec("avif", "AVIF", "speed 6, Pillow's defaults: 4:2:0, tuned for the eye by the encoder", threads)


def _avif_psnr(weights: Path | None, device: str, threads: int) -> Codec:
    settings = "speed 6, 4:4:4, tuned for PSNR: the stronger opponent where PSNR is measured"
    return _avif_codec("avif-psnr", "AVIF for PSNR", settings, threads, subsampling="4:4:4", advanced={"tune": "psnr"})


def _jxl(weights: Path | None, device: str, threads: int) -> Codec:
    if not imagecodecs.JPEGXL.available:
        raise CodecUnavailableError("this imagecodecs was built without libjxl")

    def encode(pixels: Pixels, distance: float) -> bytes:
        return bytes(imagecodecs.jpegxl_encode(pixels, distance=distance, effort=7, numthreads=threads))

    def decode(data: bytes) -> Pixels:
        return np.asarray(imagecodecs.jpegxl_decode(data, numthreads=threads), dtype=np.uint8)

    return Codec(
        "jxl",
        "JPEG XL",
        ".jxl",
        "effort 7; the quality is the Butteraugli distance",
        f"imagecodecs {imagecodecs.__version__}, {imagecodecs.jpegxl_version()}",
        (25, 15, 11, 8, 5.5, 4, 2.8, 2, 1.4, 0.9, 0.5),
        [step / 20 for step in range(500, 1, -1)],
        encode,
        decode,
    )


def _vqcodec(
    weights: Path | None,
    device: str,
    threads: int,
    *,
    key: str = "vqcodec",
    title: str = "vqcodec",
    look: str = "faithful",
    effort: int = 1,
    tune: str | None = None,
) -> Codec:
    """vqcodec in one of its ways."""
    try:
        import vqcodec.codec
        import vqcodec.packaged
        import vqcodec.weights
        from vqcodec.errors import VqcodecError
    except ImportError as error:
        raise CodecUnavailableError(f"vqcodec cannot be imported: {error}") from error
    try:
        path = vqcodec.packaged.find(weights)
        vqcodec.packaged.find_look(path, look)
        weights_id = vqcodec.weights_file.describe(path)["id"]
    except VqcodecError as error:
        raise CodecUnavailableError(str(error)) from error

    def encode(pixels: Pixels, quality: float) -> bytes:
        return vqcodec.codec.compress(
            pixels, quality=int(quality), weights=path, device=device, effort=effort, tune=tune
        )

    def decode(data: bytes) -> Pixels:
        return np.asarray(vqcodec.codec.decompress(data, weights=path, look=look, device=device).convert("RGB"))

    return Codec(
        key,
        title,
        ".vqz",
        f"weights {path.name}, id {weights_id}",
        f"vqcodec {vqcodec.__version__}",
        (1, 15, 30, 45, 60, 75, 90, 100) if effort == 1 else (10, 30, 50, 70, 90),
        range(1, 101),
        encode,
        decode,
    )


_MAKERS: dict[str, Callable[[Path | None, str, int], Codec]] = {
    "vqcodec": _vqcodec,
    "vqcodec-psnr": functools.partial(_vqcodec, key="vqcodec-psnr", title="vqcodec, tune psnr", tune="psnr"),
    "vqcodec-natural": functools.partial(_vqcodec, key="vqcodec-natural", title="vqcodec, natural", look="natural"),
    "vqcodec-effort-3": functools.partial(_vqcodec, key="vqcodec-effort-3", title="vqcodec, effort 3", effort=3),
    "vqcodec-effort-9": functools.partial(_vqcodec, key="vqcodec-effort-9", title="vqcodec, effort 9", effort=9),
    "vqcodec-psnr-effort-9": functools.partial(
        _vqcodec, key="vqcodec-psnr-effort-9", title="vqcodec, tune psnr, effort 9", effort=9, tune="psnr"
    ),
    "jpeg": _jpeg,
    "webp": _webp,
    "jpeg2000": _jpeg2000,
    "avif": _avif,
    "avif-psnr": _avif_psnr,
    "jxl": _jxl,
}
KEYS = tuple(_MAKERS)
# Without what is too slow to be measured unasked.
USUAL = tuple(key for key in KEYS if "-effort-" not in key)
