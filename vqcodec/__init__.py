"""Photos to .vqz files and back, with a vector-quantised autoencoder and a learned prior.

>>> import vqcodec
>>> data = vqcodec.compress(image, quality=50)  # a PIL image or a uint8 array (H, W, 3)  # doctest: +SKIP
>>> restored = vqcodec.decompress(data)  # a PIL image  # doctest: +SKIP
"""

from typing import TYPE_CHECKING, Any

from vqcodec import pillow_plugin
from vqcodec.bitstream import read_info
from vqcodec.errors import (
    ChecksumError,
    FormatError,
    HeaderError,
    ImageError,
    LimitError,
    NotVqzError,
    TargetError,
    TrailingDataError,
    TrainingError,
    TruncatedError,
    VersionError,
    VqcodecError,
    WeightsError,
)
from vqcodec.target import Target

if TYPE_CHECKING:
    from vqcodec.codec import compress, compress_many, decompress, decompress_many

__version__ = "0.1.0"

__all__ = [
    "ChecksumError",
    "FormatError",
    "HeaderError",
    "ImageError",
    "LimitError",
    "NotVqzError",
    "Target",
    "TargetError",
    "TrailingDataError",
    "TrainingError",
    "TruncatedError",
    "VersionError",
    "VqcodecError",
    "WeightsError",
    "__version__",
    "compress",
    "compress_many",
    "decompress",
    "decompress_many",
    "read_info",
]

pillow_plugin.register()


def __getattr__(name: str) -> Any:
    # torch takes a second to import, which `vqcodec --help`, `vqcodec info` and a caller of read_info should not pay.
    if name in ("compress", "compress_many", "decompress", "decompress_many"):
        from vqcodec import codec

        return getattr(codec, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
