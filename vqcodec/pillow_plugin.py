"""Lets Pillow open and save .vqz files. `import vqcodec` registers it.

>>> import vqcodec
>>> from PIL import Image
>>> Image.open("photo.png").save("photo.vqz", quality=40)  # doctest: +SKIP
>>> Image.open("photo.vqz").size  # decodes nothing, and does not import torch  # doctest: +SKIP
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from PIL import Image, ImageFile

from vqcodec import bitstream
from vqcodec.errors import VqcodecError

FORMAT = "VQZ"
MIME_TYPE = "image/x-vqz"
_METADATA = {"icc_profile": ("ICCP", b""), "exif": ("EXIF", b"Exif\0\0"), "xmp": ("XMP ", b"")}  # chunk and prefix


class VqzImageFile(ImageFile.ImageFile):
    """An opened .vqz file of mode L, LA, RGB or RGBA, whose pixels are decoded when they are first needed.

    Its info has icc_profile, exif and xmp if the file has them. With `ImageFile.LOAD_TRUNCATED_IMAGES`, load() decodes
    what is left of a cut or damaged file, and gives a warning for each part that is missing.

    Attributes:
        weights: the weights that the file was made with, as a file or a packaged name. None for those of the packaged
            ones that the header names. Set it before the pixels are needed.

    Raises:
        OSError: header or metadata are damaged; from verify() and load() also if the pixels are, from load() if the
            weights are missing.
    """

    format = FORMAT
    format_description = "vqcodec image"
    weights: str | Path | None = None
    _data: bytes | None = None  # of the file, until it is decoded

    def _open(self) -> None:
        assert self.fp is not None
        data = self.fp.read()
        with _as_os_error():
            container = bitstream.read(data, max_pixels=None, partial=True)  # Pillow checks the number of pixels
        header, chunks = container.header, {chunk.kind: chunk.data for chunk in container.chunks}
        self._size = header.width, header.height
        self._mode = ("L" if header.grey else "RGB") + ("A" if "ALPH" in chunks else "")
        self.info = {name: prefix + chunks[kind] for name, (kind, prefix) in _METADATA.items() if kind in chunks}
        self._data = data

    def verify(self) -> None:
        """Check every byte of the file without decoding it; see `Image.verify`."""
        if self._data is not None:
            with _as_os_error():
                bitstream.read(self._data, max_pixels=None)
        super().verify()

    def load(self) -> Any:
        """Decode the pixels, unless that is done; see `Image.load`."""
        if self._data is not None:
            from vqcodec import codec  # imports torch

            with _as_os_error():
                decoded = codec.decompress(
                    self._data, weights=self.weights, partial=ImageFile.LOAD_TRUNCATED_IMAGES, max_pixels=None
                )
            self.im, self.readonly, self._data = decoded.im, 0, None
            if self._exclusive_fp and self.fp:
                self.fp.close()
            self.fp = None
        return super().load()


def _accept(prefix: bytes) -> bool:
    return prefix.startswith(bitstream.MAGIC)


def _save(im: Image.Image, fp: IO[bytes], filename: str | bytes) -> None:
    """Write a picture. The options are those of `codec.compress`, and icc_profile, exif and xmp instead of im.info's.

    Raises:
        ValueError: an option is out of range.
        OSError: the picture is not supported or has several frames, the weights are missing, or a target is not met.
    """
    from vqcodec import codec, image  # import torch

    given = im.encoderinfo
    if given.get("append_images"):
        raise OSError("a .vqz file holds a single picture, append_images asks for several")
    known = codec.compress.__kwdefaults__ or {}
    options = {name: value for name, value in given.items() if name in known}
    info = im.info
    im.info = info | {name: _bytes(given[name]) for name in _METADATA if name in given}
    try:
        with _as_os_error():
            data = codec.compress(image.from_pil(im), **options)
    finally:
        im.info = info
    fp.write(data)


def _bytes(metadata: Any) -> Any:
    return metadata.tobytes() if isinstance(metadata, Image.Exif) else metadata


@contextlib.contextmanager
def _as_os_error() -> Iterator[None]:
    """Replace an error of this library by the kind that callers of Pillow expect."""
    try:
        yield
    except VqcodecError as error:
        raise OSError(str(error)) from error


def register() -> None:
    """Make Pillow open and save .vqz files."""
    Image.register_open(FORMAT, VqzImageFile, _accept)
    Image.register_save(FORMAT, _save)
    Image.register_save_all(FORMAT, _save)  # which refuses several frames
    Image.register_extension(FORMAT, ".vqz")
    Image.register_mime(FORMAT, MIME_TYPE)
