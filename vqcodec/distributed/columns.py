"""Columns of datasets: callables for `Dataset.map_batches`, with bytes in and bytes out."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa

from vqcodec import bitstream, codec, files, image, limits, packaged, weights
from vqcodec.distributed.groups import Converted, Converter, each, together
from vqcodec.errors import one_line
from vqcodec.image import Picture

STRINGS = pa.list_(pa.string())


class Transcoder(Converter):
    """A callable for `Dataset.map_batches(..., batch_format="pyarrow")`: it replaces the files in a column by others.

    The column holds whole files as bytes. Where one cannot be converted, the result is null and the column "error" says
    why in one line; else "error" is null. "notes" lists what was converted or lost. All other columns and the order of
    the rows stay. Where "error" is there already, rows with an error keep it and their null, so that transcoders can
    follow each other. A null in the column stays null, without an error.

    Attributes:
        suffixes: file name suffixes of what it reads, in lower case.
        new_suffix: file name suffix of what it makes.
    """

    suffixes: tuple[str, ...]
    new_suffix: str

    def __init__(self, column: str) -> None:
        self._column = column

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Convert a batch.

        Raises:
            KeyError: it has no such column.
        """
        rows = len(batch)
        names = batch.column_names
        known = batch["error"].to_pylist() if "error" in names else [None] * rows
        made: list[bytes | None] = []
        errors: list[str | None] = []
        told = batch["notes"].to_pylist() if "notes" in names else [None] * rows
        notes: list[list[str]] = [row or [] for row in told]
        items = (
            (error, data.as_py() or b"", error is None and data.is_valid)
            for data, error in zip(batch[self._column], known, strict=True)
        )
        for noted, (error, _, result) in zip(notes, self.convert_each(items), strict=True):
            data = None
            if isinstance(result, Exception):
                error = one_line(result)
            elif result is not None:
                data, new = result
                noted += new
            made.append(data)
            errors.append(error)
        columns = {
            self._column: pa.array(made, pa.large_binary()),
            "error": pa.array(errors, pa.string()),
            "notes": pa.array(notes, STRINGS),
        }
        for name, values in columns.items():
            if name in names:
                batch = batch.set_column(names.index(name), name, values)
            else:
                batch = batch.append_column(name, values)
        return batch


class Compress(Transcoder):
    """Picture files -> .vqz files. See `Transcoder`.

    Args:
        column: the column with the files.
        weights, device, options: as `codec.compress_many`. The weights are loaded at once. A path must be there on
            every machine.
        max_pixels: as `image.load`.

    Raises:
        WeightsError: the weights cannot be used.
    """

    suffixes = files.PICTURE_SUFFIXES
    new_suffix = files.VQZ_SUFFIXES[0]

    def __init__(
        self,
        column: str = "bytes",
        *,
        weights: str | None = None,
        device: str = "auto",
        max_pixels: int = limits.DEFAULT_MAX_PIXELS,
        **options: Any,
    ) -> None:
        super().__init__(column)
        _load(weights, device)
        self._max_pixels = max_pixels
        self._options = {"weights": weights, "device": device, **options}

    def pixels(self, file: bytes) -> int:
        return math.prod(image.size(file))

    def convert_many(self, files: Sequence[bytes]) -> list[Converted | Exception]:
        pictures = each(lambda file: image.load(file, max_pixels=self._max_pixels), files)
        return together(self._compress, pictures)

    def _compress(self, pictures: list[Picture]) -> list[Converted]:
        made = codec.compress_many([replace(picture, notes=()) for picture in pictures], **self._options)
        return [(data, picture.notes) for data, picture in zip(made, pictures, strict=True)]


class Decompress(Transcoder):
    """.vqz files -> picture files. See `Transcoder`.

    Args:
        column: the column with the files.
        new_suffix: file name suffix of the format to make, ".png" for example.
        weights, look, device, options: as `codec.decode_pictures`. The weights are loaded at once. A path must be there
            on every machine.

    Raises:
        WeightsError: the weights cannot be used, or do not have the look.
        ImageError: no format has this suffix.
    """

    suffixes = files.VQZ_SUFFIXES
    new_suffix = ".png"

    def __init__(
        self,
        column: str = "bytes",
        *,
        new_suffix: str = new_suffix,
        weights: str | None = None,
        look: str = packaged.LOOKS[0],
        device: str = "auto",
        **options: Any,
    ) -> None:
        super().__init__(column)
        image.check_suffix(new_suffix)
        self.new_suffix = new_suffix
        _load(weights, device, look)
        self._options = {"weights": weights, "look": look, "device": device, **options}

    def pixels(self, file: bytes) -> int:
        return bitstream.read_header(file).pixels

    def convert_many(self, files: Sequence[bytes]) -> list[Converted | Exception]:
        pictures = together(self._decode, files)
        return each(self._save, pictures)

    def _decode(self, files: list[bytes]) -> list[Picture]:
        return codec.decode_pictures(files, **self._options)

    def _save(self, picture: Picture) -> Converted:
        fitting = image.adapt(picture, self.new_suffix)
        return image.save(fitting, self.new_suffix), fitting.notes


def _load(given: str | None, device: str, look: str = packaged.LOOKS[0]) -> None:
    """Load weights into the cache that the codec takes them from."""
    found = packaged.find(given)
    weights.load(found, device, packaged.find_look(found, look))
