"""The public API: compress and decompress.

    compress      picture -> pad -> latents -> per slice: estimate, choose codes, range-code -> container
                  with effort: codes -> search -> range-code -> container
    decompress    container -> per tile: range-decode codes -> per slice: estimate + codes -> pixels -> crop

Entropy coding works tile by tile, with integers and codes only (coding.py). The float networks work on the grids of the
whole picture (synthesis.py), so tiles leave no seams.
"""

import math
import operator
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vqcodec import bitstream, caller, coding, image, metrics, packaged, search, synthesis, tuning, weights
from vqcodec.bitstream import Chunk, Container, Header
from vqcodec.encoder import choose
from vqcodec.errors import ChecksumError, FormatError, HeaderError, ImageError, WeightsError
from vqcodec.frame import Frame, Region
from vqcodec.image import Picture
from vqcodec.models.model import Model
from vqcodec.ssimulacra2 import ssimulacra2
from vqcodec.target import HIGHEST, LOWEST, Setting, Target, largest_within
from vqcodec.trials import Trials, digest
from vqcodec.tuning import Tuning

DEFAULT_QUALITY = 50
SCALES = (1, 2, 4, 8)
TILE = 1024


@caller.undisturbed()
def compress(
    picture: Image.Image | NDArray[np.uint8] | Picture,
    *,
    quality: int | None = None,
    target: Target | None = None,
    max_size: int | None = None,
    weights: str | Path | None = None,
    device: str = "auto",
    tile: int = TILE,
    effort: int = 1,
    tune: str | None = None,
    verify: bool = False,
    on_progress: Callable[[float], None] | None = None,
) -> bytes:
    """Compress a picture to the bytes of a .vqz file. Each note of the picture gives a warning.

    Args:
        picture: a Pillow image of any mode that `image.from_pil` takes; uint8 (H, W), (H, W, 3) or (H, W, 4); or a
            Picture.
        quality: 1 (smallest) to 100 (best). None for 50; with `max_size`, for as high as it allows.
        target: file size, bits per pixel, PSNR or SSIMULACRA2 to reach, instead of a quality.
        max_size: largest size of the file in bytes. It takes precedence over quality and target.
        weights: a weights file, or the name of packaged weights; None for the packaged photo model.
        device: "auto" (CUDA if there is one), "cpu" or "cuda".
        tile: side of the independently coded tiles in pixels: a multiple of 64 (and of the model's coarsest stride) up
            to 16320. 0 codes the picture as one tile.
        effort: 1 (fast) to 9 (smallest): how long to search for better codes. See `search`.
        tune: "visual" chooses codes for what the eye sees, by SSIMULACRA2; "psnr" for squared error. None for "psnr" if
            the target is a PSNR, else for "visual" if the weights have a visual tuning (the packaged photo model has).
        verify: decode the file and compare the codes before returning.
        on_progress: called during the search with the fraction of it done. The fraction goes from 0 to 1 once for every
            setting that is tried.

    Raises:
        ValueError: quality, max_size, tile, effort or tune is out of range, or quality and target are both given.
        TargetError: no setting reaches the target or fits into max_size.
        ImageError: the picture is not supported.
        WeightsError: the weights are missing or unreadable, or have no visual tuning although `tune` is "visual".
        FormatError: `verify` found a difference.
    """
    if quality is not None:
        quality = _integer("quality", quality, LOWEST, HIGHEST)
    if quality is not None and target is not None:
        raise ValueError("quality and target exclude each other")
    if max_size is not None:
        max_size = _integer("max_size", max_size, 1)
    effort = _integer("effort", effort, 1, len(search.ROUNDS))
    if tune is not None and tune not in packaged.TUNES:
        raise ValueError(f"tune must be one of {', '.join(packaged.TUNES)}, got {tune!r}")
    source = _as_picture(picture)
    for note in source.notes:
        warnings.warn(note, stacklevel=3)  # there is the decorator between
    model = _load(weights, device)
    tuned = _tuning(weights, model, tune, target)
    unit = math.lcm(bitstream.TILE_UNIT, model.config.multiple)
    tile = _integer("tile", tile, 0, bitstream.MAX_TILE)
    if tile % unit:
        raise ValueError(f"tile must be 0 or a multiple of {unit}, got {tile!r}")
    height, width = source.pixels.shape[:2]
    chunks = _chunks(source)

    def frame_of(quality: int) -> Frame:
        return Frame(width, height, quality, tile, source.grey)

    def write(frame: Frame, segments: list[bytes]) -> bytes:
        return bitstream.write(Header.of(frame, model.id, model.config.layers), chunks, segments)

    rounds = search.ROUNDS[effort - 1]
    trials = Trials(model, source.pixels, tuned, frame_of, write, rounds, on_progress)

    def evaluate(setting: Setting) -> float:
        """What the target measures."""
        assert target is not None
        if target.measure in ("size", "bpp"):
            size = trials.size(setting)
            return size if target.measure == "size" else metrics.bits_per_pixel(size, width, height)
        return trials.likeness(setting, metrics.psnr if target.measure == "psnr" else ssimulacra2, target.value)

    best = Setting(quality or (DEFAULT_QUALITY if max_size is None else HIGHEST))
    if target is not None:
        best = target.find(evaluate)
    if max_size is not None:
        best = largest_within(trials.size, max_size, best)
    written, chosen = trials.file(best)
    if verify:
        decoded = decode_codes(bitstream.read(written, max_pixels=None), model)
        if digest(decoded) != chosen:
            raise FormatError("verification failed: the file would not decode to the codes it was made from")
    return written


def decompress(
    data: bytes,
    *,
    weights: str | Path | None = None,
    look: str = packaged.LOOKS[0],
    device: str = "auto",
    partial: bool = False,
    region: tuple[int, int, int, int] | None = None,
    scale: int = 1,
    grey: bool = False,
    max_pixels: int | None = bitstream.DEFAULT_MAX_PIXELS,
) -> Image.Image:
    """Decode the bytes of a .vqz file to a Pillow image of mode L, LA, RGB or RGBA.

    Args and Raises: as `decode_picture`. With `partial`, each missing or damaged part gives a warning.
    """
    picture = decode_picture(
        data,
        weights=weights,
        look=look,
        device=device,
        partial=partial,
        region=region,
        scale=scale,
        grey=grey,
        max_pixels=max_pixels,
    )
    for problem in picture.notes:
        warnings.warn(problem, stacklevel=2)
    return image.to_pil(picture)


def decode_picture(
    data: bytes,
    *,
    weights: str | Path | None = None,
    look: str = packaged.LOOKS[0],
    device: str = "auto",
    partial: bool = False,
    region: tuple[int, int, int, int] | None = None,
    scale: int = 1,
    grey: bool = False,
    max_pixels: int | None = bitstream.DEFAULT_MAX_PIXELS,
) -> Picture:
    """Decode the bytes of a .vqz file.

    Args:
        data: the whole file; with `partial`, its beginning is enough.
        weights: the weights that the file was made with, as a file or a packaged name; None for those of the packaged
            ones that its header names.
        look: "faithful" minimises the distortion; "natural" is trained for perceptual quality.
        device: "auto" (CUDA if there is one), "cpu" or "cuda".
        partial: decode what is left of a cut or damaged file. Missing codes make the picture coarser; its notes say
            what is missing.
        region: the part of the picture to decode, (left, top, width, height) in pixels: only tiles that matter for it
            are decoded. None for the whole picture.
        scale: 1, 2, 4 or 8: how many pixels, along each side, become one; a smaller picture takes less time. With a
            region, the result has all pixels that show a part of it.
        grey: make it a picture in shades of grey.
        max_pixels: largest width x height to accept, checked before any memory is allocated; None for no limit.

    Returns:
        The picture with its alpha and metadata.

    Raises:
        FormatError: the data is not a .vqz file, is damaged or cut, or the picture is too large.
        ImageError: the region is not inside the picture.
        WeightsError: the file was made with other weights, or these do not have the look or the scale.
        ValueError: there is no such look or scale, or the region is no four integers.
    """
    scale = _integer("scale", scale, 1)
    if scale not in SCALES:
        raise ValueError(f"scale must be one of {', '.join(map(str, SCALES))}, got {scale}")
    container = bitstream.read(data, max_pixels=max_pixels, partial=partial)
    header = container.header
    part = None if region is None else _region(region, header.frame)
    model = _load(_packaged(header.weights_id) if weights is None else weights, device, look)
    if scale > (largest := synthesis.largest_scale(model.config)):
        raise WeightsError(f"these weights decode to no less than 1/{largest} of the size")
    chunks = {chunk.kind: chunk.data for chunk in container.chunks}
    alpha = None
    if "ALPH" in chunks:
        try:
            alpha = image.decode_alpha(chunks["ALPH"], header.width, header.height)
        except ImageError as error:
            raise ChecksumError(str(error)) from None
        alpha = image.reduced(alpha, part, scale)
    if part is None and not any(container.segments):
        _check_fit(header, model)
        with coding.exact(model):
            pixels = synthesis.blank(model, header.frame, scale)
    else:
        codes = decode_codes(container, model, part, scale)
        with coding.exact(model):
            pixels = synthesis.reconstruct(model, header.frame, codes, part, scale)
    picture = Picture(
        pixels,
        grey=header.grey,
        alpha=alpha,
        icc=chunks.get("ICCP"),
        exif=chunks.get("EXIF"),
        xmp=chunks.get("XMP "),
        notes=container.problems,
    )
    return image.to_grey(picture) if grey else picture


def reconstruct(
    picture: Picture, *, quality: int = DEFAULT_QUALITY, weights: str | Path | None = None, device: str = "auto"
) -> list[NDArray[np.uint8]]:
    """Decode a picture's codes progressively: from the coarsest level alone to all levels.

    Args: as `compress`.

    Returns:
        For each level uint8 (H, W, 3). Codes of all finer levels are set to 0, which keeps the decoder's estimate.
    """
    model = _load(weights, device)
    height, width = picture.pixels.shape[:2]
    frame = Frame(width, height, quality, TILE, picture.grey)
    tuned = _tuning(weights, model, None, None)
    with coding.exact(model):
        importance = None if tuned is None else tuned.importance(model.config, picture.pixels, quality)
        latents = synthesis.analyse(model, picture.pixels, torch.tensor([quality], device=model.device))
        codes = choose(model, frame, latents, importance)
        partial = (
            [c if level <= last else torch.zeros_like(c) for level, c in enumerate(codes)] for last in range(len(codes))
        )
        return [synthesis.reconstruct(model, frame, some) for some in partial]


def decode_codes(container: Container, model: Model, region: Region | None = None, scale: int = 1) -> list[Tensor]:
    """Decode the codes of a file: the part of decoding that is exact on every machine.

    Args:
        container, model: the file and its weights.
        region, scale: what `synthesis.reconstruct` is to be asked for; codes that do not matter for it are 0.

    Returns:
        As `coding.decode`.

    Raises:
        WeightsError: the file was made with other weights.
        HeaderError: the layers or tiles of the file do not fit the weights.
        ChecksumError: a segment is not what an encoder wrote.
    """
    header = container.header
    _check_fit(header, model)
    layers = synthesis.layers_for(model.config, scale)
    tiles = synthesis.tiles_for(model, header.frame, region, scale)
    count = len(header.frame.tiles())
    segments = [
        data if number // count < layers and number % count in tiles else None
        for number, data in enumerate(container.segments)
    ]
    with coding.exact(model):
        return coding.decode(model, header.frame, segments)


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


def _region(region: tuple[int, int, int, int], frame: Frame) -> Region:
    """A region of a picture.

    Raises:
        ImageError: it is not inside the picture.
        ValueError: it is not four integers.
    """
    try:
        left, top, width, height = region
    except (TypeError, ValueError):
        raise ValueError(f"region must be (left, top, width, height), got {region!r}") from None
    left, top, width, height = (_integer("region", value, 0) for value in (left, top, width, height))
    if min(width, height) < 1 or left + width > frame.width or top + height > frame.height:
        given = ",".join(map(str, region))
        raise ImageError(f"the region {given} is not inside the picture of {frame.width} x {frame.height} pixels")
    return Region(left, top, width, height)


def _integer(name: str, value: object, low: int, high: int | None = None) -> int:
    """An argument that must be an integer of any type, numpy's too, but no bool.

    Raises:
        ValueError: it is not, or it is out of range.
    """
    number = None if isinstance(value, bool) or not hasattr(value, "__index__") else operator.index(value)
    if number is None or number < low or (high is not None and number > high):
        wanted = f"an integer from {low}" + ("" if high is None else f" to {high}")
        raise ValueError(f"{name} must be {wanted}, got {value!r}")
    return number


# Pictures and metadata


def _as_picture(picture: Image.Image | NDArray[np.uint8] | Picture) -> Picture:
    if isinstance(picture, Picture):
        return picture
    if isinstance(picture, np.ndarray):
        channels = picture.shape[2] if picture.ndim == 3 else 1
        if picture.dtype != np.uint8 or picture.ndim not in (2, 3) or channels not in (1, 3, 4) or not picture.size:
            raise ImageError(f"expected uint8 (H, W), (H, W, 3) or (H, W, 4), got {picture.dtype} {picture.shape}")
        picture = Image.fromarray(picture[:, :, 0] if picture.ndim == 3 and channels == 1 else picture)
    if not isinstance(picture, Image.Image):
        raise ImageError(f"expected a Pillow image, an array or a Picture, got {type(picture).__name__}")
    return image.from_pil(picture)


def _packaged(weights_id: bytes) -> Path:
    """The packaged weights of an id; the photo model if there are none, which then says that it does not fit."""
    return weights.with_id(packaged.every(), weights_id) or packaged.find()


def _load(path: str | Path | None, device: str, look: str = packaged.LOOKS[0]) -> Model:
    found = packaged.find(path)
    return weights.load(found, device, packaged.find_look(found, look))


def _tuning(path: str | Path | None, model: Model, tune: str | None, target: Target | None) -> Tuning | None:
    """The visual tuning to choose codes with, None for squared error. Args: as `compress`."""
    if tune == "psnr" or (tune is None and target is not None and target.measure == "psnr"):
        return None
    beside = tuning.path_of(packaged.find(path))
    tuned = tuning.load(beside, model.config, model.id)
    if tuned is None and tune is not None:
        raise WeightsError(f"these weights have no visual tuning: there is no {beside.name} beside them")
    return tuned


def _chunks(picture: Picture) -> list[Chunk]:
    chunks = [
        Chunk(kind, data)
        for kind, data in (("ICCP", picture.icc), ("EXIF", picture.exif), ("XMP ", picture.xmp))
        if data
    ]
    if picture.alpha is not None:
        chunks.append(Chunk("ALPH", image.encode_alpha(picture.alpha)))
    return chunks
