"""The decoder: containers of pictures of one frame -> codes -> pixels."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from vqcodec import coding, synthesis
from vqcodec.bitstream import Container, Header
from vqcodec.errors import HeaderError, WeightsError
from vqcodec.frame import Region
from vqcodec.models.model import Model


def decode(
    containers: Sequence[Container], model: Model, region: Region | None = None, scale: int = 1
) -> NDArray[np.uint8]:
    """Decode files to pixels.

    Args:
        containers: files of one frame. model: their weights. region, scale: see `synthesis.reconstruct`.

    Returns:
        uint8 (B, h, w, 3).

    Raises:
        As `decode_codes`.
    """
    frame = containers[0].header.frame
    if region is None and not any(data for container in containers for data in container.segments):
        for container in containers:
            _check_fit(container.header, model)
        with coding.exact(model):
            return synthesis.blank(model, frame, scale).repeat(len(containers), 0)
    codes = decode_codes(containers, model, region, scale)
    with coding.exact(model):
        return synthesis.reconstruct(model, frame, codes, region, scale)


def decode_codes(
    containers: Sequence[Container], model: Model, region: Region | None = None, scale: int = 1
) -> list[Tensor]:
    """Decode the codes of files: the part of decoding that is exact on every machine.

    Args:
        containers: files of one frame. model: their weights.
        region, scale: what `synthesis.reconstruct` is to be asked for; codes that do not matter for it are 0.

    Returns:
        The codes, as of coding.py.

    Raises:
        WeightsError: a file was made with other weights.
        HeaderError: the layers or tiles of a file do not fit the weights.
        ChecksumError: a segment is not what an encoder wrote.
    """
    for container in containers:
        _check_fit(container.header, model)
    frame = containers[0].header.frame
    layers = synthesis.layers_for(model.config, scale)
    tiles = synthesis.tiles_for(model, frame, region, scale)
    count = len(frame.tiles())
    segments = [
        [
            data if number // count < layers and number % count in tiles else None
            for number, data in enumerate(container.segments)
        ]
        for container in containers
    ]
    with coding.exact(model):
        return coding.decode(model, frame, segments)


def _check_fit(header: Header, model: Model) -> None:
    """Check that a file was made with these weights.

    Raises:
        WeightsError: it was not.
        HeaderError: it says so, but its layers or tiles do not fit them.
    """
    if header.weights_id != model.id:
        raise WeightsError(f"made with weights {header.weights_id.hex()}, these are {model.id.hex()}")
    if header.layers != model.config.layers:
        raise HeaderError(f"the file has {header.layers} layers, its weights have {model.config.layers}")
    if header.tile % model.config.multiple:
        raise HeaderError(f"tile is {header.tile} pixels, these weights need multiples of {model.config.multiple}")
