"""Pillow, run so that nothing of it comes through: exceptions become ImageError, warnings are collected."""

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image, PngImagePlugin, UnidentifiedImageError

from vqcodec.errors import ImageError
from vqcodec.pictures.caught import caught_warnings

MAX_TEXT = PngImagePlugin.MAX_TEXT_MEMORY  # bytes of profiles and texts that can be read of a PNG file


@contextmanager
def errors(failure: str) -> Iterator[list[warnings.WarningMessage]]:
    """Collect Pillow's warnings, and replace any exception by an ImageError: "{failure}: ..."."""
    try:
        with long_texts(), caught_warnings() as caught:
            yield caught
    except (ImageError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise ImageError("not a PNG, JPEG, WebP, AVIF, TIFF, BMP, GIF or PNM picture, or cut short") from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"the picture is too large: {line(error)}") from error
    except Exception as error:  # plugins raise exceptions of nearly all types
        raise ImageError(f"{failure}: {line(error)}") from error


class _LongTexts:
    """Lets Pillow read profiles and texts of PNG files up to its limit for all of a file, while any thread reads."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.readers = 0
        self.usual = 0

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with self.lock:
            if not self.readers:
                self.usual = PngImagePlugin.MAX_TEXT_CHUNK
                PngImagePlugin.MAX_TEXT_CHUNK = max(self.usual, MAX_TEXT)
            self.readers += 1
        try:
            yield
        finally:
            with self.lock:
                self.readers -= 1
                if not self.readers:
                    PngImagePlugin.MAX_TEXT_CHUNK = self.usual


long_texts = _LongTexts()


def line(error: object) -> str:
    """The message of an exception or warning in one line."""
    return " ".join(str(error).split()) or type(error).__name__
