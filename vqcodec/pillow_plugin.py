"""Lets Pillow open and save .vqz files. `import vqcodec` registers it.

>>> import vqcodec
>>> from PIL import Image
>>> Image.open("photo.png").save("photo.vqz", quality=40)  # doctest: +SKIP
>>> Image.open("photo.vqz").size  # decodes nothing, and does not import torch  # doctest: +SKIP
"""

import contextlib
import functools
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from PIL import Image, ImageFile

from vqcodec import bitstream
from vqcodec.errors import VqcodecError, WeightsError

FORMAT = "VQZ"
MIME_TYPE = "image/x-vqz"
_METADATA = {"icc_profile": ("ICCP", b""), "exif": ("EXIF", b"Exif\0\0"), "xmp": ("XMP ", b"")}  # chunk and prefix


class VqzImageFile(ImageFile.ImageFile):
    """An opened .vqz file of mode L, LA, RGB or RGBA, whose pixels are decoded when they are first needed.

    Its info has icc_profile, exif and xmp if the file has them. thumbnail() and draft() leave out detail that a small
    picture does not show. With `ImageFile.LOAD_TRUNCATED_IMAGES`, load() decodes what is left of a cut or damaged file,
    and gives a warning for each part that is missing.

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
    _scale = 1  # that the pixels will be decoded at

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

    def draft(self, mode: str | None, size: tuple[int, int] | None) -> tuple[str, tuple[int, int, float, float]] | None:
        """Have the pixels decoded smaller, in less time, or in grey; `thumbnail` calls this by itself.

        Args:
            mode: "L" makes an RGB picture grey, unless it has an ICC profile. Other modes are not granted.
            size: width and height in pixels. They are halved up to three times, but never below this.

        Returns:
            The mode, and the box (0, 0, width, height) of the picture in the smaller one, whose last column and row it
            may cover in part. None if nothing changes: once the pixels are decoded, or drafted smaller, they stay so.
        """
        if self._data is None or self._scale > 1:
            return None
        grey = mode == "L" and self.mode == "RGB" and "icc_profile" not in self.info
        width, height = self.size
        if size is not None:
            wanted = min(width // size[0], height // size[1])
            self._scale = next((scale for scale in (8, 4, 2) if scale <= wanted), 1)
        if self._scale == 1 and not grey:
            return None
        if grey:
            self._mode = "L"
        self._size = -(-width // self._scale), -(-height // self._scale)
        return self.mode, (0, 0, width / self._scale, height / self._scale)

    def load(self) -> Any:
        """Decode the pixels, unless that is done; see `Image.load`."""
        if self._data is not None:
            from vqcodec import codec  # imports torch

            decode = functools.partial(
                codec.decompress,
                self._data,
                weights=self.weights,
                partial=ImageFile.LOAD_TRUNCATED_IMAGES,
                max_pixels=None,
            )
            with _as_os_error():
                try:
                    decoded = decode(scale=self._scale)
                except WeightsError:  # these weights do not decode to so small a picture, or there are none
                    decoded = decode().reduce(self._scale)
            if self.mode != decoded.mode:
                decoded = decoded.convert(self.mode)
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
    known = set(inspect.signature(codec.compress).parameters) - {"picture"}
    options = {name: value for name, value in given.items() if name in known}
    info = im.info
    metadata = {name: _bytes(given[name]) for name in _METADATA if name in given}
    im.info = {name: value for name, value in (info | metadata).items() if value or name not in metadata}
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
