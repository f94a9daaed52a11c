"""Reads and describes weights files without torch; `weights` makes models of them.

A weights file is a safetensors file. It holds encoder and decoder in half precision (codebooks and steps in single),
and the prior and its tables as the integers that they compute with. Its metadata hold the configuration as JSON and
notes on the training. The first four bytes of the SHA-256 of the file are its id, by which every .vqz file names its
weights.

A look is a second safetensors file for the same codes. It holds only the part of the decoder behind the codes
(`VQVAE.renderer`), in half precision; its metadata hold its configuration and the id of its weights.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vqcodec.errors import WeightsError
from vqcodec.models import operations
from vqcodec.models.config import Config
from vqcodec.models.operations import Shapes
from vqcodec.models.shapes import large_tensors

FORMAT = "vqcodec weights 3"
LOOK_FORMAT = "vqcodec look 2"
ID_BYTES = 4


@dataclass(frozen=True)
class WeightsFile:
    """A weights file or a look, read once: everything is of the same bytes.

    Attributes:
        path: where it was. data: its bytes. metadata, config: of its header. id: see `Model`.
        shapes: of its tensors, by name.
    """

    path: Path
    data: bytes
    metadata: dict[str, str]
    config: Config
    id: bytes
    shapes: Shapes


def read(path: Path, expected: str = FORMAT) -> WeightsFile:
    """Read a file of the format that is expected.

    Raises:
        WeightsError: it cannot be read, or it is of another format.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise WeightsError(f"cannot read weights {path}: {error.strerror}") from None
    try:
        metadata, shapes = _header(data)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        raise WeightsError(f"cannot read weights {path}: not a safetensors file") from None
    found = metadata.get("format")
    if found != expected:
        (kind, _, version), (of, _, other) = expected.rpartition(" "), str(found).rpartition(" ")
        if of == kind and other.isdecimal():
            raise WeightsError(f"{path} is a {kind} file of format {other}, and this version reads format {version}")
        raise WeightsError(f"{path} is not a {kind} file: its metadata say format {found!r}")
    config = Config.from_json(metadata.get("config", ""))
    return WeightsFile(path, data, metadata, config, id_of(data), shapes)


def _header(data: bytes) -> tuple[dict[str, str], Shapes]:
    """The metadata and the shapes of all tensors in the header of a safetensors file.

    Raises:
        ValueError, TypeError, LookupError, AttributeError, RecursionError: there is no such header.
    """
    end = 8 + int.from_bytes(data[:8], "little")
    if not 8 < end <= len(data):
        raise ValueError
    header = json.loads(data[8:end])
    metadata = header.pop("__metadata__", {})
    shapes = {name: tuple(tensor["shape"]) for name, tensor in header.items()}
    if not all(isinstance(value, str) for value in metadata.values()):
        raise TypeError
    if not all(isinstance(side, int) and 0 <= side <= len(data) for shape in shapes.values() for side in shape):
        raise ValueError
    if max((tensor["data_offsets"][1] for tensor in header.values()), default=0) != len(data) - end:
        raise ValueError  # the file is cut
    return metadata, shapes


def check_shapes(path: Path, config: Config, shapes: Shapes) -> None:
    """Check that networks will not be much larger than the file, before any are made.

    Raises:
        WeightsError: a tensor is missing or has another shape than the configuration says.
    """
    for name, shape in large_tensors(config):
        if name not in shapes:
            raise WeightsError(f"weights {path} lack {name}, which their configuration asks for")
        if shapes[name] != shape:
            raise WeightsError(f"weights {path} do not fit their configuration: {name} is {shapes[name]}, not {shape}")


def id_of(data: bytes) -> bytes:
    """The id of weights: the first four bytes of the SHA-256 of their file."""
    return hashlib.sha256(data).digest()[:ID_BYTES]


def describe(path: Path) -> dict[str, Any]:
    """Describe a weights file: id, configuration, sizes, multiply-accumulates per pixel and training notes.

    Raises:
        WeightsError: the file is not a readable weights file.
    """
    file = read(path)
    check_shapes(path, file.config, file.shapes)
    try:
        macs, parameters = operations.macs_per_pixel(file.config, file.shapes), operations.parameters(file.shapes)
    except (ValueError, LookupError, OverflowError):
        raise WeightsError(f"weights {path} do not fit their configuration") from None
    try:
        notes = json.loads(file.metadata.get("notes", "{}"))
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"weights {path}: the notes are not JSON: {error}") from None
    return {
        "id": file.id.hex(),
        "bytes": len(file.data),
        "name": file.config.name,
        "parameters": parameters,
        **{f"{part}_kmac_per_pixel": round(count / 1000, 2) for part, count in macs.items()},
        "decoding_kmac_per_pixel": round((sum(macs.values()) - macs["encoder"]) / 1000, 2),
        "notes": notes,
        "config": json.loads(file.metadata["config"]),
    }
