"""Pillow, run so that nothing of it comes through: exceptions become ImageError, warnings are collected."""

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import ModuleType

from PIL import Image, PngImagePlugin, UnidentifiedImageError

from vqcodec.errors import ImageError
from vqcodec.pictures.caught import caught_warnings

MAX_TEXT = PngImagePlugin.MAX_TEXT_MEMORY  # bytes of profiles and texts that can be read of a PNG file


@contextmanager
def errors(failure: str, *, any_size: bool = False) -> Iterator[list[warnings.WarningMessage]]:
    """Collect Pillow's warnings, and replace any exception by an ImageError: "{failure}: ...".

    Args:
        failure: what has failed if there is an exception.
        any_size: whether the body itself looks at the number of pixels, so that Pillow's limit must not count.
    """
    try:
        with long_texts(), any_sizes() if any_size else nullcontext(), caught_warnings() as caught:
            yield caught
    except (ImageError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise ImageError("not a PNG, JPEG, WebP, AVIF, TIFF, BMP, GIF or PNM picture, or cut short") from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"the picture is too large: {line(error)}") from error
    except Exception as error:  # plugins raise exceptions of nearly all types
        raise ImageError(f"{failure}: {line(error)}") from error


class _Lifted:
    """Changes a limit of Pillow, which is the whole process's, while any thread is in the body."""

    def __init__(self, module: ModuleType, name: str, value: int | None) -> None:
        self.module, self.name, self.value = module, name, value
        self.lock = threading.Lock()
        self.readers = 0
        self.usual: int | None = None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with self.lock:
            if not self.readers:
                self.usual = getattr(self.module, self.name)
                setattr(self.module, self.name, self.value)
            self.readers += 1
        try:
            yield
        finally:
            with self.lock:
                self.readers -= 1
                if not self.readers:
                    setattr(self.module, self.name, self.usual)


# Profiles and texts of PNG files can be as long as Pillow allows for all of a file.
long_texts = _Lifted(PngImagePlugin, "MAX_TEXT_CHUNK", max(PngImagePlugin.MAX_TEXT_CHUNK, MAX_TEXT))
any_sizes = _Lifted(Image, "MAX_IMAGE_PIXELS", None)


def line(error: object) -> str:
    """The message of an exception or warning in one line."""
    return " ".join(str(error).split()) or type(error).__name__
