"""The public API: compress and decompress, one picture or many.

    compress      picture -> pad -> latents -> per slice: estimate, choose codes, range-code -> container
                  with effort: latents -> search -> latents -> per slice, as above
    decompress    container -> per tile: range-decode codes -> per slice: estimate + codes -> pixels -> crop

Entropy coding works tile by tile, with integers and codes only (coding.py). The float networks work on the grids of the
whole picture (synthesis.py), so tiles leave no seams. Pictures of one frame go through both together.
"""

import functools
import math
import operator
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from vqcodec import bitstream, caller, coding, image, limits, metrics, packaged, search, synthesis, tuning, weights
from vqcodec.bitstream import Chunk, Container, Header
from vqcodec.decoder import decode, decode_codes
from vqcodec.encoder import choose, encode
from vqcodec.errors import ChecksumError, FormatError, ImageError, TargetError, WeightsError
from vqcodec.frame import Frame, Region
from vqcodec.image import Picture
from vqcodec.models.model import Model
from vqcodec.ssimulacra2 import SMALLEST, ssimulacra2
from vqcodec.target import HIGHEST, LOWEST, Setting, Target, largest_within
from vqcodec.trials import Trials, digest
from vqcodec.tuning import Tuning

DEFAULT_QUALITY = 50
SCALES = (1, 2, 4, 8)
TILE = 1024
GROUP_PIXELS = 1 << 24  # of pictures that go through the networks together: what one large picture has


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
        effort: 1 (fast) to 9 (best): how long to search for better codes. See `search`.
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
    rounds = search.ROUNDS[_integer("effort", effort, 1, len(search.ROUNDS)) - 1]
    source = _as_picture(picture)
    for note in source.notes:
        warnings.warn(note, stacklevel=3)  # there is the decorator between
    height, width = source.pixels.shape[:2]
    if target is not None and target.measure == "ssimulacra2" and min(height, width) < SMALLEST:
        raise TargetError(f"SSIMULACRA2 needs {SMALLEST} pixels a side, the picture has {width} x {height}")
    settings = _settings(weights, device, tile, tune, target)
    frame_of, write = functools.partial(settings.frame, source), functools.partial(settings.write, source)
    trials = Trials(settings.model, source.pixels, settings.tuned, frame_of, write, rounds, on_progress)

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
        _verify([written], settings.model, chosen)
    return written


@caller.undisturbed()
def compress_many(
    pictures: Sequence[Image.Image | NDArray[np.uint8] | Picture],
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
) -> list[bytes]:
    """Compress pictures to the bytes of .vqz files: `compress` for each, but faster if many are small and of one size.

    Without a search (target, max_size, effort above 1), pictures of one size go through the networks together. That
    changes the last digits of their sums, so that a file may differ from that of `compress` in a few codes.

    Args: as `compress`.

    Returns:
        The files in the order of the pictures.

    Raises:
        As `compress`: none is returned if one fails.
    """
    if target is not None or max_size is not None or effort != 1:
        return [
            compress(
                picture,
                quality=quality,
                target=target,
                max_size=max_size,
                weights=weights,
                device=device,
                tile=tile,
                effort=effort,
                tune=tune,
                verify=verify,
            )
            for picture in pictures
        ]
    quality = DEFAULT_QUALITY if quality is None else _integer("quality", quality, LOWEST, HIGHEST)
    sources = [_as_picture(picture) for picture in pictures]
    for note in (note for source in sources for note in source.notes):
        warnings.warn(note, stacklevel=3)  # there is the decorator between
    settings = _settings(weights, device, tile, tune)
    model, files = settings.model, [b""] * len(sources)
    frames = [settings.frame(source, quality) for source in sources]
    for frame, members in _groups(frames, frames):
        pixels = np.stack([sources[member].pixels for member in members])
        with coding.exact(model):
            tuned = settings.tuned
            importance = None if tuned is None else tuned.importance(model.config, pixels, quality)
            segments, codes = encode(model, frame, pixels, importance)
        written = [settings.write(sources[member], frame, own) for member, own in zip(members, segments, strict=True)]
        if verify:
            _verify(written, model, digest(codes))
        for member, file in zip(members, written, strict=True):
            files[member] = file
    return files


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
    max_pixels: int | None = limits.DEFAULT_MAX_PIXELS,
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


def decompress_many(files: Sequence[bytes], **options: Any) -> list[Image.Image]:
    """Decode the bytes of .vqz files to Pillow images: `decompress` for each, but faster if many are small.

    Args: as `decode_pictures`.

    Raises:
        As `decompress`: none is returned if one fails.
    """
    pictures = decode_pictures(files, **options)
    for problem in (problem for picture in pictures for problem in picture.notes):
        warnings.warn(problem, stacklevel=2)
    return [image.to_pil(picture) for picture in pictures]


def decode_picture(data: bytes, **options: Any) -> Picture:
    """Decode the bytes of a .vqz file. Args and Raises: as `decode_pictures`."""
    (picture,) = decode_pictures([data], **options)
    return picture


def decode_pictures(
    files: Sequence[bytes],
    *,
    weights: str | Path | None = None,
    look: str = packaged.LOOKS[0],
    device: str = "auto",
    partial: bool = False,
    region: tuple[int, int, int, int] | None = None,
    scale: int = 1,
    grey: bool = False,
    max_pixels: int | None = limits.DEFAULT_MAX_PIXELS,
) -> list[Picture]:
    """Decode the bytes of .vqz files. Those of one frame go through the networks together.

    Args:
        files: the whole files; with `partial`, the beginning of each is enough.
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
        The pictures with their alpha and metadata, in the order of the files.

    Raises:
        FormatError: the data is not a .vqz file, is damaged or cut, or the picture is too large.
        ImageError: the region is not inside the picture.
        WeightsError: the file was made with other weights, or these do not have the look or the scale.
        ValueError: there is no such look or scale, or the region is no four integers.
    """
    scale = _integer("scale", scale, 1)
    if scale not in SCALES:
        raise ValueError(f"scale must be one of {', '.join(map(str, SCALES))}, got {scale}")
    containers = [bitstream.read(data, max_pixels=max_pixels, partial=partial) for data in files]
    models = {
        weights_id: _load(_packaged(weights_id) if weights is None else weights, device, look)
        for weights_id in {container.header.weights_id for container in containers}
    }
    for model in models.values():
        if scale > (largest := synthesis.largest_scale(model.config)):
            raise WeightsError(f"these weights decode to no less than 1/{largest} of the size")
    pictures: dict[int, Picture] = {}
    frames = [container.header.frame for container in containers]
    keys = [(c.header.frame, c.header.weights_id, any(c.segments)) for c in containers]
    for (frame, weights_id, _), members in _groups(keys, frames):
        part = None if region is None else _region(region, frame)
        some = [containers[member] for member in members]
        alphas = [_alpha(container, part, scale) for container in some]
        decoded = decode(some, models[weights_id], part, scale)
        for member, container, pixels, alpha in zip(members, some, decoded, alphas, strict=True):
            picture = _picture(container, pixels, alpha)
            pictures[member] = image.to_grey(picture) if grey else picture
    return [pictures[number] for number in range(len(files))]


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
    frame = Frame(width, height, _integer("quality", quality, LOWEST, HIGHEST), TILE, picture.grey)
    tuned = _tuning(weights, model, None, None)
    with coding.exact(model):
        importance = None if tuned is None else tuned.importance(model.config, picture.pixels[None], quality)
        latents = synthesis.analyse(model, picture.pixels[None], torch.tensor([quality], device=model.device))
        codes = choose(model, frame, latents, importance)
        partial = (
            [c if level <= last else torch.zeros_like(c) for level, c in enumerate(codes)] for last in range(len(codes))
        )
        return [synthesis.reconstruct(model, frame, some)[0] for some in partial]


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
    left, top, width, height = (_integer("region", value) for value in (left, top, width, height))
    if min(left, top) < 0 or min(width, height) < 1 or left + width > frame.width or top + height > frame.height:
        given = ",".join(map(str, region))
        raise ImageError(f"the region {given} is not inside the picture of {frame.width} x {frame.height} pixels")
    return Region(left, top, width, height)


def _integer(name: str, value: object, low: int | None = None, high: int | None = None) -> int:
    """An argument that must be an integer of any type, numpy's too, but no bool.

    Raises:
        ValueError: it is not, or it is out of range.
    """
    number = None if isinstance(value, bool) or not hasattr(value, "__index__") else operator.index(value)
    if number is None or (low is not None and number < low) or (high is not None and number > high):
        wanted = "integers" if low is None else f"an integer from {low}" + ("" if high is None else f" to {high}")
        raise ValueError(f"{name} must be {wanted}, got {value!r}")
    return number


# Batches

Key = TypeVar("Key", bound=Hashable)


def _groups(keys: Sequence[Key], frames: Sequence[Frame]) -> Iterator[tuple[Key, list[int]]]:
    """Split pictures into groups of equal keys, which go through the networks together; yields their numbers.

    A group has at most `GROUP_PIXELS`, or is one picture.
    """
    found: dict[Key, list[int]] = {}
    for number, key in enumerate(keys):
        found.setdefault(key, []).append(number)
    for key, members in found.items():
        frame = frames[members[0]]
        count = max(1, GROUP_PIXELS // (frame.width * frame.height))
        yield from ((key, members[start : start + count]) for start in range(0, len(members), count))


def _verify(files: Sequence[bytes], model: Model, chosen: bytes) -> None:
    """Check that files of one frame decode to the codes whose `digest` is given.

    Raises:
        FormatError: they do not.
    """
    if digest(decode_codes([bitstream.read(data, max_pixels=None) for data in files], model)) != chosen:
        raise FormatError("verification failed: the file would not decode to the codes it was made from")


# Pictures and metadata


def _as_picture(picture: Image.Image | NDArray[np.uint8] | Picture) -> Picture:
    if isinstance(picture, Picture):
        return picture
    if isinstance(picture, np.ndarray):
        channels = picture.shape[2] if picture.ndim == 3 else 1
        if picture.dtype != np.uint8 or picture.ndim not in (2, 3) or channels not in (1, 3, 4) or not picture.size:
            raise ImageError(f"expected uint8 (H, W), (H, W, 3) or (H, W, 4), got {picture.dtype} {picture.shape}")
        if channels == 3:
            return Picture(picture)  # which may be large, and is left as it is
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


@dataclass(frozen=True)
class _Settings:
    """How pictures are encoded: arguments of `compress`, checked and loaded."""

    model: Model
    tuned: Tuning | None
    tile: int

    def frame(self, source: Picture, quality: int) -> Frame:
        height, width = source.pixels.shape[:2]
        return Frame(width, height, quality, self.tile, source.grey)

    def write(self, source: Picture, frame: Frame, segments: list[bytes]) -> bytes:
        """The file of a picture."""
        return bitstream.write(Header.of(frame, self.model.id, self.model.config.layers), _chunks(source), segments)


def _settings(
    weights: str | Path | None, device: str, tile: int, tune: str | None, target: Target | None = None
) -> _Settings:
    """Args and Raises: as `compress`."""
    if tune is not None and tune not in packaged.TUNES:
        raise ValueError(f"tune must be one of {', '.join(packaged.TUNES)}, got {tune!r}")
    model = _load(weights, device)
    tuned = _tuning(weights, model, tune, target)
    unit = math.lcm(bitstream.TILE_UNIT, model.config.multiple)
    tile = _integer("tile", tile, 0, bitstream.MAX_TILE)
    if tile % unit:
        raise ValueError(f"tile must be 0 or a multiple of {unit}, got {tile!r}")
    return _Settings(model, tuned, tile)


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


def _alpha(container: Container, region: Region | None, scale: int) -> NDArray[np.uint8] | None:
    """The alpha of a picture, for a region and at a scale.

    Raises:
        ChecksumError: it is damaged.
    """
    header = container.header
    data = next((chunk.data for chunk in container.chunks if chunk.kind == "ALPH"), None)
    if data is None:
        return None
    try:
        return image.reduced(image.decode_alpha(data, header.width, header.height), region, scale)
    except ImageError as error:
        raise ChecksumError(str(error)) from None


def _picture(container: Container, pixels: NDArray[np.uint8], alpha: NDArray[np.uint8] | None) -> Picture:
    """A decoded picture with its metadata."""
    chunks = {chunk.kind: chunk.data for chunk in container.chunks}
    return Picture(
        pixels,
        grey=container.header.grey,
        alpha=alpha,
        icc=chunks.get("ICCP"),
        exif=chunks.get("EXIF"),
        xmp=chunks.get("XMP "),
        notes=container.problems,
    )
