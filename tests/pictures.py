"""What tests of picture files share: chunks put into PNG files, and colours computed without any profile."""

import struct
import zlib

import numpy as np
from numpy.typing import NDArray


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">L", len(data)) + kind + data + struct.pack(">L", zlib.crc32(kind + data))


def with_chunks(png: bytes, *chunks: bytes) -> bytes:
    """Put chunks right behind the IHDR of a PNG file."""
    return png[:33] + b"".join(chunks) + png[33:]


def srgb_of_light(light: NDArray[np.float64]) -> NDArray[np.float64]:
    """Values 0..255 of light 0..1, by the curve of IEC 61966-2-1."""
    light = np.clip(light, 0, 1)
    return 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


def light_of_srgb(values: NDArray[np.uint8]) -> NDArray[np.float64]:
    v = values / 255
    return np.where(v <= 0.04045, v / 12.92, ((v + 0.055) / 1.055) ** 2.4)


def srgb_of_p3(values: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Values 0..255 of Display P3 pixels (..., 3), by the matrix of CSS Color Module Level 4 and its primaries."""
    matrix = [[1.2249402, -0.2249402, 0.0], [-0.0420570, 1.0420570, 0.0], [-0.0196376, -0.0786361, 1.0982736]]
    return srgb_of_light(light_of_srgb(values) @ np.transpose(matrix))
